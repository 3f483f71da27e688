"""The installed package: what was compiled, public names, and that callbacks/ has one name only."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import lightning_lrtt


def test_build_info() -> None:
    info = lightning_lrtt.build_info()
    assert isinstance(info["with_cuda"], bool)
    assert isinstance(info["openmp"], bool)
    assert info["cpu_instructions"] in ("base", "v3", "v4")
    assert info["compiler"]
    if info["with_cuda"]:
        assert "80" in info["cuda_architectures"]
        assert info["cuda_runtime"] >= 12000


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "lightning_lrtt",
            [
                "LRTT",
                "LRTTConfig",
                "LRTTStrategy",
                "PulseConfig",
                "ResumableLoader",
                "build_info",
                "convert_to_digital",
                "convert_to_lrtt",
                "devices",
            ],
        ),
        ("lightning_lrtt.nn", ["LRTTConv1d", "LRTTConv2d", "LRTTLinear", "LRTTTransposedLinear"]),
        ("lightning_lrtt.export", ["digital_state_dict", "export_checkpoint"]),
        ("lightning_lrtt.devices", ["ConstantStep", "Ideal", "LinearStep", "SoftBounds"]),
        ("lightning_lrtt.callbacks", ["TileMonitor"]),
    ],
    ids=["package", "nn", "export", "devices", "callbacks"],
)
def test_public_names(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    for name in names:
        assert hasattr(found, name), name
        assert name in found.__all__


def test_callbacks_under_another_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install puts the repository on the path; a second copy of the classes would go unrecognised."""
    folder = Path(importlib.import_module("lightning_lrtt.callbacks").__file__).parent
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "callbacks", raising=False)
    with pytest.raises(ImportError, match=r"import it as lightning_lrtt\.callbacks, got 'callbacks'"):
        importlib.import_module("callbacks")


def test_a_strategy_is_registered_by_importing_the_package() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    assert "lrtt" in StrategyRegistry.available_strategies()
