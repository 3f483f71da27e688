"""``lrtt info``: versions, what was compiled, what this machine has, and what will be slow and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_lrtt._compiled import build_info

__all__ = ["collect", "slow", "slow_in_config"]

HELP = "Say versions, GPUs, what was compiled, and what will be slow and why."
_PACKAGES = ("lightning-lrtt", "torch", "lightning", "jsonargparse", "torchmetrics", "tensorboard", "numpy")
_OPTIONAL = ("matplotlib", "safetensors", "gguf", "scikit-learn", "rich", "torchvision")
_WORDS = {"base": "base (no AVX2)", "v3": "v3 (AVX2)", "v4": "v4 (AVX-512)"}


def collect() -> dict[str, Any]:
    """What is installed, compiled and there.

    Returns:
        ``packages`` (name to version, None if missing), ``python``, ``build`` (`lightning_lrtt.build_info`),
        ``torch_cuda`` (the CUDA version torch was built with, or None), ``gpus`` (of torch: name, capability as
        ``[major, minor]``, memory in bytes), ``gpus_of_driver`` (names that the NVIDIA driver tells), ``cpus`` (that this
        process may use) and ``threads`` (of torch and of the CPU kernels).

    Example:
        >>> collect()["build"]["debug"]
        False
    """
    packages: dict[str, str | None] = {}
    for name in (*_PACKAGES, *_OPTIONAL):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        gpus.append({"name": found.name, "capability": [found.major, found.minor], "memory": found.total_memory})
    return {
        "packages": packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "build": build_info(),
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "gpus_of_driver": _driver_gpus(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _driver_gpus(folder: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Also without a CUDA build of torch; Linux only."""
    names = []
    for path in sorted(folder.glob("*/information")):
        lines = path.read_text(errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def _runs_on(architectures: str, capability: Sequence[int]) -> str:
    """``native``, ``jit`` (from PTX, when first used) or ``no``; the rules of CUDA's binary and PTX compatibility."""
    major, minor = capability
    jit = False
    for word in architectures.replace(";", " ").split():
        number, _, kind = word.partition("-")
        built = divmod(int("".join(c for c in number if c.isdigit())), 10)
        if kind != "virtual" and built[0] == major and built[1] <= minor:
            return "native"
        jit = jit or (kind != "real" and built <= (major, minor))
    return "jit" if jit else "no"


def slow(info: Mapping[str, Any]) -> list[str]:
    """What of `collect` makes training slow or impossible, with the remedy; one line each.

    Example:
        >>> slow({**collect(), "threads": 64, "cpus": 2})[-1]
        'threads: 64 on 2 CPUs only wait for one another; set OMP_NUM_THREADS=2'
    """
    build, gpus, found = info["build"], info["gpus"], []
    rebuild = "reinstall with nvcc on PATH: LRTT_CUDA=ON pip install -e ."
    if info["gpus_of_driver"] and not gpus:
        why = "this torch has no CUDA" if info["torch_cuda"] is None else "torch cannot use it"
        found.append(
            f"GPU: there is one ({info['gpus_of_driver'][0]}), but {why}; training runs on the CPU: install a CUDA build "
            "of torch that suits the driver"
        )
    if gpus and not build["with_cuda"]:
        found.append(
            f"build: CPU kernels only, although torch sees {gpus[0]['name']}; tiles on it are refused: {rebuild}"
        )
    if build["with_cuda"]:
        if gpus and build["cuda_driver"] < build["cuda_runtime"] // 1000 * 1000:
            found.append(
                f"driver: CUDA {_version(build['cuda_driver'])}, the kernels are of {_version(build['cuda_runtime'])} and "
                "will not start; update the driver or rebuild with an older nvcc"
            )
        for gpu in gpus:
            how, name = _runs_on(build["cuda_architectures"], gpu["capability"]), "{}.{}".format(*gpu["capability"])
            if how == "jit":
                found.append(
                    f"GPU: {gpu['name']} (compute capability {name}) is not among the compiled architectures "
                    f"({build['cuda_architectures']}); kernels are compiled when first used, for tens of seconds once"
                )
            elif how == "no":
                found.append(
                    f"GPU: no kernel runs on {gpu['name']} (compute capability {name}); compiled: "
                    f"{build['cuda_architectures']}; rebuild with CMAKE_CUDA_ARCHITECTURES={name.replace('.', '')}"
                )
    if build["debug"]:
        found.append("build: a debug build; reinstall without CMAKE_BUILD_TYPE=Debug")
    if not build["openmp"]:
        found.append("build: no OpenMP, the CPU kernels run on one thread; install it for your compiler and reinstall")
    if build["cpu_instructions"] == "base" and info["machine"].lower() in ("x86_64", "amd64"):
        found.append("CPU: it has no AVX2; the vector loops of the CPU kernels run in their narrowest form")
    if info["threads"] > (info["cpus"] or info["threads"]):
        found.append(
            f"threads: {info['threads']} on {info['cpus']} CPUs only wait for one another; set OMP_NUM_THREADS={info['cpus']}"
        )
    return found


def slow_in_config(config: Mapping[str, Any]) -> list[str]:
    """What of a run's configuration costs time, one line each.

    Args:
        config: As ``--print_config`` writes it.

    Example:
        >>> slow_in_config({"trainer": {"detect_anomaly": True}})
        ['trainer.detect_anomaly: reads every gradient on the host and keeps steps out of CUDA graphs']
    """
    trainer = config.get("trainer") or {}
    found, checks = [], _CONFIG_CHECKS
    strategy = trainer.get("strategy")
    tile = (strategy.get("init_args") or {}).get("config") or {} if isinstance(strategy, Mapping) else {}
    for name in ("pulse", "transfer_pulse"):
        train = tile.get(name) or {}
        if tile.get("fast_device" if name == "pulse" else "visible_device") and train.get("desired_bl", 31) > 31:
            found.append(
                f"{name}.desired_bl: {train['desired_bl']} slots; up to 31 fit one word, more cost time in proportion and "
                "resolve small products no better"
            )
    if tile.get("io") or tile.get("io_backward"):
        found.append("io: every read goes through converters with noise, on top of its matrix product")
    if tile.get("transfer_every") == 1:
        found.append(
            "transfer_every: 1 transfers in every step, which touches all of C; 8 to 128 learn as well on the digits"
        )
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    names = {str(entry.get("class_path", "")).rpartition(".")[2]: entry.get("init_args") or {} for entry in callbacks}
    for key, test, text in checks:
        if test(trainer.get(key)):
            found.append(f"trainer.{key}: {text}")
    if trainer.get("accelerator") in ("gpu", "cuda") and "CUDAGraph" not in names:
        found.append(
            "callbacks: no CUDAGraph; small steps wait for their launches: --config examples/overlays/production.yaml"
        )
    monitor = names.get("TileMonitor", {})
    if "TileMonitor" in names and (monitor.get("every_n_steps") or trainer.get("log_every_n_steps") or 50) < 10:
        found.append(
            "TileMonitor: measures all tiles every few steps; raise every_n_steps or trainer.log_every_n_steps"
        )
    if monitor.get("trace"):
        found.append("TileMonitor: trace reads from the device at every step")
    if names.get("FreeNudgedMonitor", {}).get("bptt_every_n_steps"):
        found.append("FreeNudgedMonitor: bptt_every_n_steps backpropagates through the whole relaxation at such steps")
    return found


_CONFIG_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("detect_anomaly", bool, "reads every gradient on the host and keeps steps out of CUDA graphs"),
    ("deterministic", lambda value: value not in (None, False), "refuses or replaces fast kernels of torch"),
    ("profiler", lambda value: value is not None, "records every call"),
    ("precision", lambda value: str(value) in ("64", "64-true"), "float64 is far slower on most GPUs"),
)


def page(info: Mapping[str, Any], reasons: Sequence[str]) -> str:
    """The text of ``lrtt info``."""
    build, packages = info["build"], info["packages"]
    have = ", ".join(f"{name} {packages[name]}" for name in _OPTIONAL if packages[name])
    without = ", ".join(name for name in _OPTIONAL if not packages[name])
    if build["with_cuda"]:
        driver = _version(build["cuda_driver"]) if build["cuda_driver"] else "none"
        cuda = (
            f"architectures {build['cuda_architectures']}; runtime {_version(build['cuda_runtime'])}, driver {driver}"
        )
    else:
        cuda = "not compiled in"
    gpus = [
        "{} (compute capability {}.{}, {:.0f} GiB)".format(g["name"], *g["capability"], g["memory"] / 2**30)
        for g in info["gpus"]
    ]
    rows = [
        ("python", f"{info['python']}, {info['machine']}"),
        *((name, str(packages[name])) for name in _PACKAGES),
        ("optional", have + (f"; missing: {without}" if without else "")),
        ("CUDA of torch", info["torch_cuda"] or "none"),
        ("CUDA kernels", cuda),
        ("GPU", "; ".join(gpus) or "none that torch can use"),
        (
            "CPU kernels",
            f"instructions {_WORDS.get(build['cpu_instructions'], build['cpu_instructions'])}, "
            f"{'OpenMP' if build['openmp'] else 'no OpenMP'}, {build['compiler']}",
        ),
        ("threads", f"{info['threads']} of {info['cpus']} CPUs"),
    ]
    lines = [f"{name:<15} {value}" for name, value in rows]
    lines += ["", "slow:" if reasons else "slow: nothing that is known of", *(f"  {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``lrtt info``."""
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument(
        "--of", metavar="FILE", action="append", default=[], help="also judge this configuration; later files override"
    )


def main(args: Sequence[str], read_config: Callable[[Sequence[str]], Mapping[str, Any]]) -> None:
    """The subcommand ``lrtt info``.

    Args:
        args: Command line after ``info``.
        read_config: What ``lrtt fit`` makes of these files, nothing instantiated.
    """
    parser = argparse.ArgumentParser(
        prog="lrtt info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Versions, GPUs and drivers, compiled architectures, CPU instruction sets and threads; and what will\n"
        "be slow on this machine (and with this configuration), and why.",
        epilog="examples:\n  lrtt info\n  lrtt info --of examples/digits/pulsed.yaml --of examples/overlays/debug.yaml",
    )
    add_arguments(parser)
    given = parser.parse_args(args)
    info = collect()
    reasons = slow(info) + (slow_in_config(read_config(given.of)) if given.of else [])
    sys.stdout.write(json.dumps({**info, "slow": reasons}, indent=2) + "\n" if given.json else page(info, reasons))
