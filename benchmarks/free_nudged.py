"""Two-phase training: time of a CPU step, of a captured GPU step, of a geometric window, and accuracy on the digits.

    python benchmarks/free_nudged.py step                  # 784-512-512-10, batch 64, T 20/4, one CPU thread
    python benchmarks/free_nudged.py digits --seeds 5      # test accuracy of examples/free_nudged_digits
    python benchmarks/free_nudged.py geometric --seeds 5   # test accuracy of examples/geometric_retrieval
    python benchmarks/free_nudged.py compile               # a free window of 20 steps: eager, torch.compile, one kernel
    python benchmarks/free_nudged.py gpu                   # captured step and captured window, on a CUDA device

``step`` interleaves its rows, so that a busy machine slows them alike; it prints the fastest and the median CPU time.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_lrtt.cli import LRTTCLI
from lightning_lrtt.free_nudged import Estimator, FreeNudgedModule, HopfieldMLP, States, System, TwoPhase

ROOT = Path(__file__).resolve().parent.parent
SIZES, BATCH = [784, 512, 512, 10], 64
Step = Callable[[], None]


def two_phase(
    kind: str, order: str, t1: int, t2: int, device: str = "cpu", fresh: bool = False
) -> tuple[FreeNudgedModule, Step]:
    """Windows, surrogate and its backward; no optimizer. ``fresh``: gradients are made anew, as Lightning does."""
    torch.manual_seed(0)
    module = FreeNudgedModule(HopfieldMLP(SIZES, order=order), Estimator(kind=kind, beta=0.1), t1, t2).to(device)  # type: ignore[arg-type]
    x, y = torch.rand(BATCH, SIZES[0], device=device), torch.arange(BATCH, device=device) % 10

    def step() -> None:
        module.zero_grad(set_to_none=fresh)
        module.training_step((x, y)).backward()

    return module, step


def by_autograd(kind: str, t1: int, t2: int) -> Step:
    """The same network relaxed by autograd of Phi, as the public research code does it."""

    class Autograd(HopfieldMLP):
        def window(
            self, *, x: Tensor, context: Any, states: Any, steps: int, target: Any, beta: Any, clamped: Any
        ) -> Any:
            for _ in range(steps):
                with torch.enable_grad():
                    leaves = [s.detach().requires_grad_() for s in self.split(states)]
                    layers, total = [x, *leaves], torch.zeros((), device=x.device)
                    for i, layer in enumerate(self.layers):
                        total = (
                            total
                            + (layers[i + 1] * torch.nn.functional.linear(layers[i], layer.weight, layer.bias)).sum()
                        )
                    drives = list(torch.autograd.grad(total, leaves))
                if beta is not None:
                    drives[-1] = drives[-1] - beta.view(-1, 1) * (leaves[-1].detach() - target)
                new = [self.hidden.apply(u) for u in drives[:-1]] + [drives[-1]]
                states = {"odd": torch.cat(new[0::2], 1), "even": torch.cat(new[1::2], 1)}
            return states

        def contrast(self, **arguments: Any) -> Tensor:
            return System.contrast(self, **arguments)

    torch.manual_seed(0)
    engine = TwoPhase(Autograd(SIZES), Estimator(kind=kind, beta=0.1), t1, t2)  # type: ignore[arg-type]
    x, y = torch.rand(BATCH, SIZES[0]), torch.arange(BATCH) % 10

    def step() -> None:
        engine.system.zero_grad(set_to_none=False)
        engine.surrogate(x, engine.run(x, y)).backward()

    return step


def backprop() -> Step:
    """A feed-forward network of the same layers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(784, 512),
        torch.nn.Tanh(),
        torch.nn.Linear(512, 512),
        torch.nn.Tanh(),
        torch.nn.Linear(512, 10),
    )
    x, y = torch.rand(BATCH, SIZES[0]), torch.arange(BATCH) % 10

    def step() -> None:
        net.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(net(x), y).backward()

    return step


def cpu_steps(rounds: int) -> None:
    """Interleaved rounds of all rows."""
    torch.set_num_threads(1)
    rows: dict[str, Step] = {"plain backpropagation, same layers": backprop()}
    for kind in ("positive", "centered"):
        rows[f"autograd of Phi, synchronous 20/4, {kind}"] = by_autograd(kind, 20, 4)
        module, rows[f"closed form by torch's products, synchronous 20/4, {kind}"] = two_phase(
            kind, "synchronous", 20, 4
        )
        module.system.fused = False
        rows[f"closed form, synchronous 20/4, {kind}"] = two_phase(kind, "synchronous", 20, 4)[1]
        rows[f"closed form, even_odd 20/4, {kind}"] = two_phase(kind, "even_odd", 20, 4)[1]
        rows[f"closed form, even_odd 10/2, {kind}"] = two_phase(kind, "even_odd", 10, 2)[1]
    times: dict[str, list[float]] = {name: [] for name in rows}
    for index in range(rounds + 2):
        for name, step in rows.items():
            start = time.process_time()
            step()
            if index >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    print("| step | fastest ms | median ms |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {min(values):.1f} | {statistics.median(values):.1f} |")


def compiled(rounds: int) -> None:
    """A free window of 20 steps on one CPU thread: torch's products, the same compiled by inductor, the kernel."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    system, x = HopfieldMLP(SIZES), torch.rand(BATCH, SIZES[0])
    with torch.no_grad():
        context = system.prepare(x=x, differentiable=False)
        states = system.start(x=x, context=context)

    @torch.no_grad()
    def window(steps: int, odd: Tensor, even: Tensor) -> States:
        return system.window(
            x=x, context=context, states={"odd": odd, "even": even}, steps=steps, target=None, beta=None, clamped=None
        )

    faster = torch.compile(window)  # one step: 20 of them in one graph take minutes to compile

    def by_steps(odd: Tensor, even: Tensor) -> States:
        now = {"odd": odd, "even": even}
        for _ in range(20):
            now = faster(1, now["odd"], now["even"])
        return now

    rows: dict[str, tuple[bool, Callable[[Tensor, Tensor], States]]] = {
        "torch's products, eager": (False, partial(window, 20)),
        "torch's products, a step by torch.compile": (False, by_steps),
        "one compiled kernel": (True, partial(window, 20)),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for index in range(rounds + 2):
        for name, (system.fused, run) in rows.items():
            start = time.process_time()
            run(states["odd"], states["even"])
            if index >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    print("| free window, 20 steps | fastest ms | median ms |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {min(values):.1f} | {statistics.median(values):.1f} |")


def train(file: str, seed: int, **changes: Any) -> float:
    """Test accuracy of a configuration with another seed."""
    config = yaml.safe_load((ROOT / "examples" / file).read_text())
    trainer = config["trainer"]
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint")]
    config |= {"seed_everything": seed}
    if "strategy" in trainer:
        trainer["strategy"]["init_args"]["config"]["seed"] = seed
    with tempfile.TemporaryDirectory() as folder:
        trainer |= {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "default_root_dir": folder,
        } | changes
        cli = LRTTCLI(args={"subcommand": "fit", "fit": config}, save_config_callback=None)
        return float(cli.trainer.callback_metrics["test/acc"])


def accuracy(files: list[str], seeds: int) -> None:
    """One row a configuration."""
    sys.path.append(str(ROOT))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print("| configuration | median | min | max | seconds a run |\n|---|---|---|---|---|")
    for file in files:
        start = time.perf_counter()
        scores = [train(file, seed) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / seeds
        print(
            f"| {file} | {statistics.median(scores):.4f} | {min(scores):.4f} | {max(scores):.4f} | {seconds:.0f} |",
            flush=True,
        )


def plain(t1: int, t2: int, device: str) -> Step:
    """The same centered step as anybody would write it in PyTorch: closed form, a matrix a layer, no engine."""
    torch.manual_seed(0)
    system = HopfieldMLP(SIZES).to(device)
    w = [layer.weight for layer in system.layers]
    b = [layer.bias for layer in system.layers]
    x, y = torch.rand(BATCH, SIZES[0], device=device), torch.arange(BATCH, device=device) % 10
    target = (y.unsqueeze(1) == torch.arange(10, device=device)).float()

    def relax(states: list[Tensor], drive: Tensor, steps: int, beta: float) -> list[Tensor]:
        for _ in range(steps):
            one = torch.tanh(drive + states[1] @ w[1])
            two = torch.tanh(states[0] @ w[1].t() + b[1] + states[2] @ w[2])
            out = states[1] @ w[2].t() + b[2]
            states = [one, two, (out + beta * target) / (1 + beta) if beta else out]
        return states

    @torch.no_grad()
    def step() -> None:
        drive = torch.addmm(b[0], x, w[0].t())
        free = relax([x.new_zeros(BATCH, n) for n in SIZES[1:]], drive, t1, 0.0)
        plus, minus = relax(free, drive, t2, 0.1), relax(free, drive, t2, -0.1)
        for i, layer in enumerate(system.layers):
            below = (x, x) if i == 0 else (plus[i - 1], minus[i - 1])
            layer.weight.grad = (minus[i].t() @ below[1] - plus[i].t() @ below[0]) / (0.2 * BATCH)
            layer.bias.grad = (minus[i] - plus[i]).sum(0) / (0.2 * BATCH)

    return step


def capture(step: Step) -> Step:
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Step, device: str, seconds: float = 0.5) -> float:
    """Median over 7 windows that take ``seconds`` together."""

    def window(rounds: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / rounds

    window(2)
    rounds = max(1, round(1e3 * seconds / 7 / window(3)))
    return statistics.median(window(rounds) for _ in range(7))


def waits(step: Step, device: str) -> str:
    """How often one step makes the host wait for the device."""
    if device != "cuda":
        return "-"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchroniz" in str(w.message) for w in seen))


def row(name: str, step: Step, device: str) -> None:
    """One line of the table: eager, captured, waits."""
    eager = milliseconds(step, device)
    count = waits(step, device)
    captured = milliseconds(capture(step), device) if device == "cuda" else None
    times = "- | -" if captured is None else f"{captured:.3f} | {eager / captured:.1f}"
    print(f"| {name} | {eager:.3f} | {times} | {count} |", flush=True)


def gpu(device: str) -> None:
    """Eager and captured. With ``--device cpu`` only the eager column, to see that it runs."""
    sys.path.append(str(ROOT))
    from examples.geometric_retrieval.model import GeometricModule
    from examples.geometric_retrieval.system import GeometricRetrieval

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, T 20/4 unless stated, batch {BATCH}, float32\n")
    print("| step | eager ms | captured ms | ratio | host waits |\n|---|---|---|---|---|", flush=True)
    row("plain PyTorch, closed form, centered", plain(20, 4, device), device)
    for kind, order, t1, t2, fused in (
        ("centered", "synchronous", 20, 4, False),
        ("centered", "synchronous", 20, 4, True),
        ("positive", "synchronous", 20, 4, True),
        ("centered", "even_odd", 20, 4, True),
        ("centered", "even_odd", 10, 2, True),
    ):
        module, step = two_phase(kind, order, t1, t2, device, fresh=True)
        module.system.fused = fused
        row(f"{kind}, {order} {t1}/{t2}, {'one kernel a window' if fused else 'products of torch'}", step, device)
    x, y = torch.randn(8, 8, device=device), torch.arange(8, device=device)
    for compiled in (False, True):
        torch.manual_seed(0)
        module = GeometricModule(system=GeometricRetrieval(compiled=compiled), estimator=Estimator(kind="positive"))
        module = module.to(device)

        def window(module: GeometricModule = module) -> None:
            module.zero_grad(set_to_none=True)
            module.training_step((x, y)).backward()

        def free(module: GeometricModule = module) -> None:
            module.engine.free(x)

        by = ", torch.compile" if compiled else ""
        row(f"geometric, free window of 64 steps, B = 8, n = 8, memory 2048{by}", free, device)
        row(f"geometric, step of two such windows and their gradient{by}", window, device)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["step", "compile", "digits", "geometric", "gpu"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="of the part 'gpu'")
    args = parser.parse_args()
    if args.part == "step":
        cpu_steps(args.rounds)
    elif args.part == "compile":
        compiled(args.rounds)
    elif args.part == "digits":
        accuracy([f"free_nudged_digits/{name}.yaml" for name in ("dense", "config", "pulsed")], args.seeds)
    elif args.part == "geometric":
        accuracy([f"geometric_retrieval/{name}.yaml" for name in ("config", "fixed")], args.seeds)
    else:
        gpu(args.device)


if __name__ == "__main__":
    main()
