"""The entry point for callbacks: nothing unless asked for, nothing heavy, nothing twice."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from features import feature
from lightning_helpers import Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor, default_callbacks
from torch import nn

from lightning_lrtt import callbacks

GROUP = "lightning.pytorch.callbacks_factory"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as the only one with an entry point, whatever else is in the environment."""
    own = EntryPoint("lrtt", "lightning_lrtt.callbacks:default_callbacks", GROUP)
    monkeypatch.setattr(
        "lightning.fabric.utilities.registry.entry_points", lambda group: [own] if group == GROUP else []
    )


def test_declared() -> None:
    """In pyproject.toml; an installation of this version has it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {"lrtt": "lightning_lrtt.callbacks:default_callbacks"}
    found = [point for point in entry_points(group=GROUP) if point.name == "lrtt"]
    assert [point.load() for point in found] == [default_callbacks], "reinstall: pip install -e ."


@feature("Callbacks", "entry point for callbacks")
def test_nothing_unless_asked_for(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns nothing unless ``LRTT_AUTO_CALLBACKS=1``; then a TileMonitor that stands back without tiles or beside
    one of your own.
    """
    monkeypatch.delenv("LRTT_AUTO_CALLBACKS", raising=False)
    assert not any(isinstance(callback, TileMonitor) for callback in trainer(tmp_path, []).callbacks)
    monkeypatch.setenv("LRTT_AUTO_CALLBACKS", "1")

    def fit(name: str, model: Net, *args: object, **kwargs: object) -> set[str]:
        expected = 1 + len(args[0])
        run = trainer(tmp_path / name, *args, **kwargs)
        assert sum(isinstance(callback, TileMonitor) for callback in run.callbacks) == expected
        tags: list[str] = []
        log = run.logger.log_metrics
        monkeypatch.setattr(
            run.logger, "log_metrics", lambda metrics, step=None: (tags.extend(metrics), log(metrics, step))
        )
        run.fit(model, loader(10))
        assert all(tags.count(tag) <= 2 for tag in tags)  # two logging steps, nothing twice
        return {tag for tag in tags if tag.startswith("tile/")}

    seen = fit("tiles", Net(), [])
    assert "tile/net.0/norm_A" in seen
    assert fit("own", Net(), [TileMonitor()]) == seen

    class Digital(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 3))

    assert fit("digital", Digital(), [], None) == set()


def test_it_imports_nothing_that_a_trainer_has_not() -> None:
    code = (
        "import sys, lightning.pytorch as pl\n"
        "pl.Trainer(logger=False, enable_checkpointing=False, accelerator='cpu', barebones=True)\n"
        "before = set(sys.modules)\n"
        "from lightning_lrtt.callbacks import default_callbacks\n"
        "assert default_callbacks() == []\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(name for name in new if name not in sys.stdlib_module_names))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(out.stdout.splitlines()[-1])) <= {"lightning_lrtt", "_lightning_lrtt_editable"}, out.stdout


@pytest.mark.parametrize("name", [name for name in callbacks.__all__ if name[0].isupper()])
def test_every_callback_has_a_state_key_and_undoes(name: str) -> None:
    kind = getattr(callbacks, name)
    for method in ("state_key", "teardown", "on_exception"):
        assert method in vars(kind), f"{name} must override {method}"
    arguments = {"PretrainedInit": ("model.gguf",)}  # the others need none
    assert kind(*arguments.get(name, ())).state_key.startswith(name)
