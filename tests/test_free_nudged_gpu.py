"""A whole free + nudged step on a GPU: without host reads, and captured in one CUDA graph to the bits of the eager
step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lrtt import LRTT, LRTTConfig, build_info, convert_to_lrtt, devices
from lightning_lrtt.free_nudged import Estimator, FreeNudgedModule, HopfieldConvNet, HopfieldMLP, ResistiveMLP
from lightning_lrtt.free_nudged.estimator import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
]
needs_kernels = pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only")
Step = Callable[[], None]


def build(
    kind: str = "centered",
    system: Any = None,
    config: LRTTConfig | None = None,
    form: str = "difference",
    **kwargs: Any,
) -> tuple[FreeNudgedModule, Step, torch.Tensor]:
    """A module on the GPU, its whole training step (optimizer included), and the input that the step reads."""
    torch.manual_seed(0)
    system = HopfieldMLP([12, 16, 9, 4]) if system is None else system
    if config is not None:
        convert_to_lrtt(system, config)
    estimator = Estimator(kind=kind, points=4 if kind == "holomorphic" else None)  # type: ignore[arg-type]
    module = FreeNudgedModule(
        system, estimator, form=form, statistics=True, **({"free_steps": 8, "nudged_steps": 3} | kwargs)
    ).cuda()
    optimizer: torch.optim.Optimizer = (
        LRTT(module.parameters(), lr=0.02) if config is not None else torch.optim.SGD(module.parameters(), lr=0.02)
    )
    shape = (8, 1, 8, 8) if isinstance(system, HopfieldConvNet) else (8, 12)
    x, y = torch.randn(shape, device="cuda"), torch.arange(8, device="cuda") % 4

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module.training_step((x, y)).backward()
        optimizer.step()

    return module, step, x


def run(steps: int, captured: bool, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The module's state and statistics after ``steps`` steps with changing input and beta; 3 eager ones come first."""
    module, step, x = build(**kwargs)
    generator = torch.Generator("cuda").manual_seed(1)
    replay, side = step, torch.cuda.Stream()
    for index in range(steps):
        x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
        if module.estimator.divides:
            module.beta.fill_(0.1 / (1 + index))  # a schedule reaches the graph
        if captured and index == 3:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        side.wait_stream(torch.cuda.current_stream())  # x and beta are written there
        with torch.cuda.stream(side if index < 3 else torch.cuda.current_stream()):
            replay()
        torch.cuda.synchronize()
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


SYSTEMS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: HopfieldMLP([12, 16, 9, 4]),
    "even_odd": lambda: HopfieldMLP([12, 16, 9, 4], order="even_odd"),
    "conv": lambda: HopfieldConvNet((1, 8, 8), [4], 4),
    "resistive": lambda: ResistiveMLP([12, 8, 4]),
}
SOFT = devices.SoftBounds(dw_min=0.002)
CONFIGS = {
    "digital": LRTTConfig(rank=2, transfer_every=4),
    "pulsed": LRTTConfig(rank=2, transfer_every=4, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT),
}


def assert_captured_is_eager(**kwargs: Any) -> None:
    one, other = (run(7, captured, **kwargs) for captured in (False, True))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        assert bool(torch.isfinite(value.float()).all())


@pytest.mark.parametrize("kind", KINDS)
def test_captured_equals_eager(kind: str) -> None:
    assert_captured_is_eager(kind=kind)


@pytest.mark.parametrize("name", SYSTEMS)
def test_captured_systems(name: str) -> None:
    """Relaxation by autograd is captured too."""
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    state = SYSTEMS[name]().state_dict()

    def fresh() -> Any:
        system = SYSTEMS[name]()
        system.load_state_dict(state)
        return system

    one, other = (run(7, captured, system=fresh()) for captured in (False, True))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@needs_kernels
@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("config", CONFIGS)
def test_captured_tiles(config: str, form: str) -> None:
    """Latch, pulses and transfers of both phases in one graph."""
    assert_captured_is_eager(config=CONFIGS[config], form=form)


@pytest.mark.parametrize("kind", ["centered", "holomorphic", "coupled_centered"])
def test_no_synchronisation(kind: str) -> None:
    _, step, _ = build(kind)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gpu_agrees_with_cpu() -> None:
    """Float64 parameters after 5 steps on both devices, to the rounding of sums in another order."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        module = FreeNudgedModule(HopfieldMLP([12, 16, 9, 4]), free_steps=8).double().to(device)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
        y = torch.arange(8, device=device) % 4
        for _ in range(5):
            optimizer.zero_grad()
            module.training_step((x, y)).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten().cpu() for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_geometric_window_captured() -> None:
    """Two windows of 64 steps with field, memory and metric update in one graph; no host sync."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from examples.geometric_retrieval.model import GeometricModule
    from examples.geometric_retrieval.system import GeometricRetrieval

    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        module = GeometricModule(system=GeometricRetrieval(), estimator=Estimator(kind="positive", beta=0.1)).cuda()
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
        x, y = torch.randn(8, 8, device="cuda"), torch.arange(8, device="cuda")

        def step(module: Any = module, optimizer: Any = optimizer, x: Any = x, y: Any = y) -> None:
            optimizer.zero_grad(set_to_none=True)
            module.training_step((x, y)).backward()
            optimizer.step()
            module.system.project()

        replay: Step = step
        for index in range(5):
            x.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(index)))
            if captured and index == 2:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                replay = graph.replay
            torch.cuda.set_sync_debug_mode("error" if index > 0 else "default")
            try:
                replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append([module.system.g.detach().clone(), module.system.field.clone(), module.system.keys.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


ROOT = Path(__file__).resolve().parent.parent
ON_LRTT = ["--trainer.strategy=lightning_lrtt.LRTTStrategy", "--trainer.strategy.init_args.include=[]"]


@needs_kernels
@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("free_nudged_digits/config.yaml", []),
        ("free_nudged_digits/pulsed.yaml", []),
        ("free_nudged_digits/dense.yaml", ON_LRTT),
        ("geometric_retrieval/config.yaml", [*ON_LRTT, "--trainer.limit_train_batches=20"]),
    ],
    ids=["digital", "pulsed", "dense", "geometric"],
)
def test_examples_recorded_equal_eager(
    config: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--trainer.callbacks+=CUDAGraph``: whole steps are replayed, and the checkpoint has the bits of the run without."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
    from lightning_lrtt.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])
    finals = []
    for graphs in (False, True):
        where = tmp_path / str(graphs)
        words = ["fit", "-c", f"examples/{config}", *more, "--trainer.max_epochs=2", "--trainer.accelerator=gpu"]
        words += [f"--trainer.logger.init_args.save_dir={where}", "--test_after_fit=false"]
        main([*words, "--trainer.callbacks+=CUDAGraph"] if graphs else words)
        (path,) = where.rglob("*.ckpt")
        finals.append(torch.load(path, weights_only=False)["state_dict"])
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name
    (folder,) = {path.parent for path in (tmp_path / "True").rglob("events.out*")}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert events.Scalars("graph/captures")[-1].value == 1
    assert events.Scalars("graph/replays")[-1].value > 20
