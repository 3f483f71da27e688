"""benchmarks/run.py: every operation runs on a CPU in its quick form; what it compares with is what it says."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Operators, clean_environment
from torch import nn

import lightning_lrtt
from lightning_lrtt import _C, LRTT, LRTTConfig, callbacks, devices
from lightning_lrtt.nn import LRTTLinear
from lightning_lrtt.ops import COUNTS

ROOT = Path(__file__).resolve().parent.parent
SOFT = devices.SoftBounds()
OPS = ("update", "transfer", "step", "mlp24", "large", "llama", "small", "tree")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command, from another folder than the repository's."""
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment())


@functools.cache
def quick() -> tuple[dict[str, Any], str]:
    """What one quick run of everything wrote and printed."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        done = run("--op", *OPS, "--quick", "--device", "cpu", "--json", str(out))
        assert done.returncode == 0, done.stderr
        assert [path.name for path in Path(folder).iterdir()] == ["out.json"]
        return json.loads(out.read_text()), done.stdout


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def rows(op: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in quick()[0]["ops"][op]["rows"]}


@pytest.mark.parametrize("op", OPS)
def test_every_operation_runs_on_a_cpu(op: str) -> None:
    if op == "llama":
        pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
    found = rows(op)
    timed = [row for row in found.values() if row["ms"] is not None]
    assert timed
    for row in found.values():
        assert (row["ms"] is None) == bool(row["missing"])  # never without a reason
        assert all(row["checks"].values())
    assert f"## {op}: " in quick()[1]
    assert all(f"| {name} | " in quick()[1] for name in found)


def test_floors() -> None:
    """Bytes over the bandwidth of the same run, and the time over the larger floor."""
    about = quick()[0]["about"]
    row = rows("step")["dense, fused AdamW"]
    size, samples = 48, 40
    # x and dx in float32, y and D in bf16; W, m, v each read and written
    moved = samples * size * (4 + 4 + 2 + 2) + 4 * size * size * 6
    assert row["bytes"] == moved
    assert row["flops"] == 3 * 2 * samples * size * size
    assert row["memory_floor_ms"] == pytest.approx(1e3 * moved / (about["copy_GBs"] * 1e9))
    assert row["matrix_floor_ms"] == pytest.approx(1e3 * row["flops"] / (about["product_TFLOPs"] * 1e12))
    assert row["over_floor"] == pytest.approx(row["ms"] / max(row["memory_floor_ms"], row["matrix_floor_ms"]))


def test_step_compares_pulses_with_their_expectation() -> None:
    for name in ("light", "heavy"):
        row = rows("step")[f"LR-TT pulsed, {name}"]
        assert [row["checks"][f"{array} within 4 s.e."] for array in "ABC"] == [True] * 3
        assert row["checks"]["one transfer every T steps"]
        assert row["more"]["same pulses eagerly"]
        assert row["worst"] >= row["ms"]


def test_small_layers_are_read_as_their_rows_say(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, taken = module("op_kernels"), {}

    def in_turn(runs: Any, *args: Any) -> dict[str, Any]:
        for name, (step, *_) in runs.items():
            with Operators() as operators:
                step()
            taken[name] = operators.names
        return {}

    monkeypatch.setattr(kernels, "in_turn", in_turn)
    sizes = {"samples": 4, "outputs": 12, "inputs": 8, "rank": 4}
    list(kernels.small_layer(module("measure").Options("cpu", True, sizes, None)))
    assert taken == {"one launch each": ["small_forward", "small_backward"] * 16, "several launches": []}


def test_what_is_missing_is_said() -> None:
    row = rows("step")["LoRA (peft), fused AdamW"]
    try:
        import peft  # noqa: F401
    except ImportError:
        assert "peft is not installed" in row["missing"]
    else:
        assert row["ms"] is not None
    assert rows("mlp24")["LR-TT pulsed, captured"]["missing"] == "CUDA graphs need a GPU"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "nothing"], "invalid choice: 'nothing'"),
        ([], "--op must name operations"),
        (["--op", "tree", "--quick", "--device", "cpu", "--set", "size=3"], "--set must be one of ['floats']"),
        (["--op", "tree", "--quick", "--device", "cpu", "--set", "floats=0"], "got 'floats=0'"),
    ],
    ids=["unknown op", "no op", "unknown size", "no size"],
)
def test_arguments(
    module: Any, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    with pytest.raises(SystemExit) as refused:
        module("run").main()
    assert message in capsys.readouterr().err + str(refused.value)


def test_list(module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--list"])
    assert module("run").main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[::2]} == set(OPS)


def test_plain_pytorch_equals_the_digital_tile(module: Any) -> None:
    """The peer called eager PyTorch LR-TT: same C, A, B in, the same C and A after a whole cycle (rounding of float32)."""
    contenders = module("contenders")
    base = nn.Linear(6, 5)
    tile = LRTTLinear.from_digital(nn.Linear(6, 5), LRTTConfig(rank=2, transfer_every=3))
    model, plain = contenders.reference(base, 2, 3, lr=0.1)
    ours = LRTT(tile.parameters(), lr=0.1)
    with torch.no_grad():
        tile.weight.copy_(model[0].C)
        tile.bias.copy_(model[0].bias)
        tile.B.copy_(model[0].B)
    start = tile.weight.clone()
    for i in range(3):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(i))
        for layer, optimizer in ((model, plain), (tile, ours)):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    assert not torch.allclose(tile.weight, start, atol=1e-4)
    # 3 steps of sums of 7 and 6 products of order 1: some 50 roundings of 6e-8
    torch.testing.assert_close(model[0].C, tile.weight, rtol=0, atol=3e-6)
    torch.testing.assert_close(model[0].bias, tile.bias, rtol=0, atol=3e-6)
    assert not model[0].A.any() and not tile.A.any()


@pytest.mark.parametrize("scale", [1e-3, 0.3], ids=["light", "heavy"])
def test_pulse_expectation_is_the_mean_over_seeds(module: Any, scale: float) -> None:
    """Mean and variance of the counts of 300 independent keys, with operands that do not depend on them."""
    expected = module("pulse_expectation")
    config = LRTTConfig(rank=2, transfer_every=1, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(9, n, generator=generator) for n in (6, 5))
    a, b = 0.02 * torch.randn(5, 2, generator=generator), torch.randn(2, 6, generator=generator)
    counts = []
    for seed in range(300):
        tile = LRTTLinear(6, 5, bias=False, config=config, tile=seed)
        with torch.no_grad():
            tile.A.copy_(a)
            tile.B.copy_(b)
        optimizer = LRTT(tile.parameters(), lr=0.1)
        if not seed:
            watch = expected.PulseExpectation(tile, 0.1)
            watch.attach(optimizer)
        tile(x).backward(scale * d)
        optimizer.step()
        counts.append(tile.tile_counts[[COUNTS["pulses_a"], COUNTS["pulses_b"]]])
    seen = torch.stack(counts).double()
    mean, variance = watch.mean[:2], watch.variance[:2]
    assert (variance > 0).all()
    # Standard errors: of the mean sqrt(V / 300); of the variance about V sqrt(2 / 300) = 8%, so 4 of them are 33%
    assert ((seen.mean(0) - mean).abs() < 4 * (variance / 300).sqrt()).all()
    torch.testing.assert_close(seen.var(0), variance, rtol=0.4, atol=0)


def test_pulse_expectation_of_a_transfer(module: Any) -> None:
    """Likewise C, whose operands A and B are set after the update."""
    expected = module("pulse_expectation")
    config = LRTTConfig(rank=2, transfer_every=1, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
    generator = torch.Generator().manual_seed(0)
    a, b = 0.05 * torch.randn(5, 2, generator=generator), torch.randn(2, 6, generator=generator)
    counts = []
    for seed in range(300):
        tile = LRTTLinear(6, 5, bias=False, config=config, tile=seed)
        with torch.no_grad():
            tile.A.copy_(a)
            tile.B.copy_(b)
        if not seed:
            watch = expected.PulseExpectation(tile, 0.1)
            watch("before_transfer", [tile])
        tile.flush()
        counts.append(tile.tile_counts[COUNTS["pulses_c"]])
    seen = torch.stack(counts).double()
    assert abs(seen.mean() - watch.mean[2]) < 4 * (watch.variance[2] / 300).sqrt()
    torch.testing.assert_close(seen.var(), watch.variance[2], rtol=0.4, atol=0)


def test_another_package_beside_the_installed_one(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of ``--base`` but the build: the other package is a copy of this one, in a folder."""
    bench, used = module("run"), tmp_path / "used"

    def copy(ref: str, folder: Path) -> Path:
        assert ref == "HEAD"
        package = folder / "package" / "lightning_lrtt"
        shutil.copytree(Path(lightning_lrtt.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(Path(callbacks.__file__).parent, package / "callbacks", dirs_exist_ok=True)
        shutil.copy(_C.__file__, package)
        with (package / "__init__.py").open("a") as file:
            file.write(f"\nopen({str(used)!r}, 'a').write('x')\n")
        return package.parent

    monkeypatch.setattr(bench, "build", copy)
    out = tmp_path / "out.json"
    args = ["--op", "tree", "--quick", "--device", "cpu", "--base", "HEAD", "--rounds", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    assert bench.main() == 0
    assert used.read_text() == "x"  # in its round, and not in the other side's
    found = json.loads(out.read_text())
    assert [row["row"] for row in found["ratios"]] == ["tree", "tree, norms and flags", "zero, 12 additions, scale"]
    assert [len(side) for side in found["rounds"].values()] == [1, 1]
    first = found["ratios"][0]
    here, base = (found["rounds"][side][0]["ops"]["tree"]["rows"][0]["ms"] for side in ("here", "base"))
    assert first["ratio"] == pytest.approx(here / base)
    assert "| tree | zero, 12 additions, scale |" in capsys.readouterr().out


@pytest.mark.parametrize(("side", "status"), [("here", 1), ("base", 0), ("", 0)])
def test_a_check_that_fails_here_is_the_exit_status_of_a_comparison(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], side: str, status: int
) -> None:
    """Regression: with ``--base`` a check that failed, or an operation that crashed, was not told at all."""
    benchmark = module("run")

    def measured(command: list[str], **kwargs: Any) -> SimpleNamespace:
        failed = side == ("base" if "--package" in command else "here")
        row = {
            "name": "RuntimeError" if failed else "light",
            "ms": None if failed else 1.0,
            "checks": {"ran to its end": not failed},
        }
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"ops": {"step": {"rows": [row]}}}))
        return SimpleNamespace(returncode=int(failed))

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=measured))
    monkeypatch.setattr(benchmark, "build", lambda ref, folder: folder)
    monkeypatch.setattr(sys, "argv", ["run.py", "--op", "step", "--base", "HEAD", "--device", "cpu", "--rounds", "1"])
    assert benchmark.main() == status
    assert ("step, RuntimeError: ran to its end did not hold here" in capsys.readouterr().out) == bool(status)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it compiles the core
def test_base_is_built(module: Any, tmp_path: Path) -> None:
    package = module("run").build("HEAD", tmp_path)
    assert list((package / "lightning_lrtt").glob("_C.*"))
    assert (package / "lightning_lrtt" / "callbacks" / "cuda_graph.py").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one")
def test_captured_steps_own_what_their_graphs_read(module: Any) -> None:
    """Regression: graphs outlived the closures they were captured from, and read what later contenders put there."""
    measure, graphs = module("measure"), module("op_graphs")
    for keep in (lambda step: measure.captured([step], "cuda"), lambda step: graphs.recorded(step, None, "cuda")):
        x = torch.zeros(8, device="cuda")
        alive = weakref.ref(x)
        kept = keep(functools.partial(x.add_, 1))
        del x
        gc.collect()
        assert kept and alive() is not None
