"""A user's mistake gives one line with the remedy, and everything with LRTT_TRACEBACK=1; a bug gives its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import folder  # noqa: F401  the fixture

from lightning_lrtt import _cli_errors
from lightning_lrtt.cli import main

CONFIG = "--trainer.strategy.init_args.config."
FIT = ["fit", "--config", "fit.yaml"]


def said(args: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Exit status and the lines of stderr that begin with the command's name."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "usage:" not in error
    return stop.value.code, [line for line in error.splitlines() if line.startswith("lrtt")]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fit", "--config", "nope.yaml"], ["nope.yaml", "does not exist", "current directory"]),
        ([*FIT, "--config", "broken.yaml"], ["mapping values are not allowed", "line 1", "must be YAML"]),
        (["fit"], ["fit.model", "--config FILE"]),
        (["fti"], ["fti", "'fit', 'validate'"]),
        ([*FIT, "--trainer.strategy=lrt"], ["trainer.strategy must be auto, lrtt,", "got 'lrt'", "mean 'lrtt'?"]),
        ([*FIT, "--model=foo.Bar"], ["model: no class 'foo.Bar'", "current directory"]),
        ([*FIT, "--model=tiny_module.Modle"], ["no class 'tiny_module.Modle'", "did you mean 'Model'?"]),
        ([*FIT, "--trainer.callbacks+=Nope"], ["trainer.callbacks: must be a class", "got 'Nope'"]),
        ([*FIT, "--config", "callback.yaml"], ["trainer.callbacks: must be a class", "mean 'TileMonitor'?"]),
        ([*FIT, "--modle.init_args.lr=3"], ["--modle.init_args.lr=3", "did you mean '--model'?"]),
        ([*FIT, "--model.init_args.lr=fast"], ["model.lr: must be float, got 'fast'"]),
        ([*FIT, "--trainer.max_epochs=ten"], ["trainer.max_epochs: must be int or null, got 'ten'"]),
        ([*FIT, CONFIG + "rnak=2"], ["strategy.config key must be one of rank, ", "got 'rnak'", "mean 'rank'?"]),
        ([*FIT, CONFIG + "rank=0"], ["LRTTConfig: rank must be >= 1, got 0"]),
        ([*FIT, CONFIG + "fast_device=SoftBound"], ["config.fast_device: must be a class", "mean 'SoftBounds'?"]),
        ([*FIT, CONFIG + "transfer_mode=puls"], ["transfer_mode: must be one of 'auto', 'digital'", "got 'puls'"]),
        ([*FIT, "--trainer.accelerator=gpux"], ["invalid accelerator name", "Available names are"]),
        ([*FIT, "--ckpt_path=no.ckpt"], ["no.ckpt", "not found", "current directory"]),
        (["device", "reram"], ["lrtt device: NAME must be one of", "got 'reram'"]),
        (["bench", "--device-preset", "reram"], ["lrtt bench: --device-preset must be one of", "got 'reram'"]),
        (["inspect", "no.gguf"], ["lrtt inspect", "no.gguf"]),
        (["export", "no.ckpt", "--to", "x.pt"], ["lrtt export: source must be a checkpoint file", "not there"]),
        (["info", "--of", "no.yaml"], ["no.yaml", "does not exist"]),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) and value[0] in "fit fti info" else "",
)
def test_one_line(folder: Path, capfd: pytest.CaptureFixture[str], args: list[str], words: list[str]) -> None:  # noqa: F811
    (folder / "broken.yaml").write_text("a: b: c\n")
    (folder / "callback.yaml").write_text(
        "trainer: {callbacks: [{class_path: TileMonitr, init_args: {trace: true}}]}\n"
    )
    status, lines = said(args, capfd)
    assert status in (1, 2)
    assert len(lines) == 1, lines
    for word in words:
        assert word.lower() in lines[0].lower()


def test_a_class_within_a_class_needs_its_path(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Regression: "got 'SoftBounds'; did you mean 'SoftBounds'?"."""
    text = (folder / "fit.yaml").read_text()
    outer = "class_path: ConstantStep\n          init_args: {dw_min: 0.002}"
    assert outer in text
    for name, words in (
        ("SoftBounds", "; write 'lightning_lrtt.devices.SoftBounds'"),
        ("SoftBound", "; did you mean 'SoftBounds'?"),
    ):
        pair = f"class_path: OneSided\n          init_args: {{device: {{class_path: {name}}}}}"
        (folder / "fit.yaml").write_text(text.replace(outer, pair))
        status, lines = said(FIT, capfd)
        assert status == 2
        assert len(lines) == 1
        assert f"got '{name}'{words}" in lines[0]
        assert "visible_device: must be " in lines[0]
    path = "lightning_lrtt.devices.SoftBounds"
    (folder / "fit.yaml").write_text(text.replace(outer, pair.replace("SoftBound}", path + "}")))
    main(FIT)


def test_everything_on_request(
    folder: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LRTT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="invalid strategy name"):
        main([*FIT, "--trainer.strategy=lrt"])
    with pytest.raises(SystemExit):
        main([*FIT, CONFIG + "rnak=2"])
    assert "usage:" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "bug", "words"),
    [
        ("self.lr = lr", "[].missing", "has no attribute 'missing'"),  # inside jsonargparse's ValueError
        ("return (self.net", "int('x')", "invalid literal for int"),
    ],
    ids=["__init__", "training_step"],
)
def test_a_bug_keeps_its_traceback(folder: Path, line: str, bug: str, words: str) -> None:  # noqa: F811
    """An exception of the user's own code is none of the configuration's."""
    text = (folder / "tiny_module.py").read_text()
    assert line in text
    (folder / "tiny_module.py").write_text(text.replace(line, f"{bug}; {line}"))
    with pytest.raises(ValueError, match=words):
        main(FIT)


def test_a_value_that_a_module_refuses(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """ValueError in an ``__init__`` is about the configuration, whoever wrote it."""
    text = (folder / "tiny_module.py").read_text()
    (folder / "tiny_module.py").write_text(text.replace("self.lr = lr", "raise ValueError('too wide'); self.lr = lr"))
    status, lines = said(FIT, capfd)
    assert (status, lines) == (1, ["lrtt fit: too wide (LRTT_TRACEBACK=1 shows where)"])


def test_a_library_error_that_is_no_mistake() -> None:
    """The frame that raised decides, not the type."""
    try:
        int("x")
    except ValueError as error:
        assert not _cli_errors.is_mistake(error)
    assert _cli_errors.is_mistake(ValueError("LRTT: lr must be > 0, got -1"))
    assert _cli_errors.is_mistake(FileNotFoundError(2, "No such file or directory", "x.gguf"))
    assert not _cli_errors.is_mistake(RuntimeError("CUDA error: must be ..."))


def test_one_line_whatever_the_text() -> None:
    assert "\n" not in _cli_errors.line("first\n  second\n\nthird")
    assert _cli_errors.line(KeyError()) == "KeyError"
