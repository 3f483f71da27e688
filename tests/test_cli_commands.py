"""``lrtt info``, ``lrtt bench``, ``lrtt completion``, ``lrtt --help``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_lrtt
from lightning_lrtt import info_command
from lightning_lrtt.bench_command import measure
from lightning_lrtt.cli import main

ROOT = Path(__file__).resolve().parent.parent
CPU_ONLY = {"with_cuda": False, "openmp": True, "debug": False, "cpu_instructions": "v3", "compiler": "x"}
CUDA = {**CPU_ONLY, "with_cuda": True, "cuda_architectures": "80-real 90-real 90-virtual", "cuda_runtime": 13000,
        "cuda_driver": 13000}  # fmt: skip


def machine(**changes: Any) -> dict[str, Any]:
    """A machine on which nothing is slow, but for ``changes``."""
    return {"machine": "x86_64", "build": CPU_ONLY, "torch_cuda": None, "gpus": [], "gpus_of_driver": [], "cpus": 4,
            "threads": 4} | changes  # fmt: skip


def gpu(major: int, minor: int) -> dict[str, Any]:
    return {"name": "Some GPU", "capability": [major, minor], "memory": 2**34}


@pytest.fixture(autouse=True)
def no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lrtt"])


def test_info_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    said = capsys.readouterr().out
    for fact in (torch.__version__, lightning_lrtt.build_info()["compiler"], f"{torch.get_num_threads()} of "):
        assert fact in said
    assert re.search(r"^slow", said, re.MULTILINE)


def test_info_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["build"] == lightning_lrtt.build_info()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert isinstance(found["slow"], list)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"gpus_of_driver": ["H200"]}, ["H200", "no CUDA", "install a CUDA build of torch"]),
        ({"gpus_of_driver": ["H200"], "torch_cuda": "13.0"}, ["torch cannot use it"]),
        ({"gpus": [gpu(9, 0)]}, ["CPU kernels only", "LRTT_CUDA=ON"]),
        ({"gpus": [gpu(9, 0)], "build": CUDA}, []),
        ({"gpus": [gpu(8, 9)], "build": CUDA}, []),  # sm_80 code runs on 8.9
        ({"gpus": [gpu(10, 0)], "build": CUDA}, ["10.0", "not among the compiled", "first used"]),
        ({"gpus": [gpu(7, 5)], "build": CUDA}, ["no kernel runs", "CMAKE_CUDA_ARCHITECTURES=75"]),
        ({"gpus": [gpu(9, 0)], "build": {**CUDA, "cuda_driver": 12080}}, ["12.8", "13.0", "update the driver"]),
        ({"build": {**CPU_ONLY, "debug": True}}, ["debug build"]),
        ({"build": {**CPU_ONLY, "openmp": False}}, ["no OpenMP"]),
        ({"build": {**CPU_ONLY, "cpu_instructions": "base"}}, ["no AVX2"]),
        ({"build": {**CPU_ONLY, "cpu_instructions": "base"}, "machine": "aarch64"}, []),
        ({"threads": 8}, ["OMP_NUM_THREADS=4"]),
    ],
    ids=[
        "fine",
        "torch-cpu",
        "torch-blind",
        "core-cpu",
        "h200",
        "ada",
        "blackwell",
        "turing",
        "driver",
        "debug",
        "openmp",
        "avx",
        "arm",
        "threads",
    ],
)
def test_what_is_slow_on_a_machine(changes: dict[str, Any], words: list[str]) -> None:
    found = info_command.slow(machine(**changes))
    assert len(found) == bool(words), found
    for word in words:
        assert word in found[0]


def test_the_gpus_of_the_driver(tmp_path: Path) -> None:
    """As /proc has them, without a CUDA build of torch."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 5\n")
    assert info_command._driver_gpus(tmp_path) == ["NVIDIA H200"]
    assert info_command._driver_gpus(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", ""),
        (
            "strategy: {init_args: {config: {fast_device: Ideal, pulse: {desired_bl: 127}}}}",
            "pulse.desired_bl: 127 slots",
        ),
        ("strategy: {init_args: {config: {pulse: {desired_bl: 127}}}}", ""),  # nothing reads it
        ("strategy: {init_args: {config: {transfer_every: 1}}}", "transfer_every: 1"),
        ("strategy: {init_args: {config: {io: {inp_bits: 7}}}}", "io: every read"),
        ("detect_anomaly: true", "trainer.detect_anomaly"),
        ("profiler: simple", "trainer.profiler"),
        ("accelerator: gpu", "no CUDAGraph"),
        ("{log_every_n_steps: 1, callbacks: [{class_path: TileMonitor}]}", "TileMonitor: measures"),
        ("{log_every_n_steps: 1, callbacks: [{class_path: TileMonitor, init_args: {every_n_steps: 50}}]}", ""),
    ],
)
def test_what_is_slow_in_a_configuration(text: str, words: str) -> None:
    import yaml

    found = info_command.slow_in_config({"trainer": yaml.safe_load(text)})
    assert len(found) == bool(words), found
    assert not words or found[0].startswith(words) or words in found[0]


def test_info_of_a_configuration(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as `lrtt fit` reads it: later files override."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["info", "--of", "examples/digits/pulsed.yaml"])
    assert "trainer.detect_anomaly" not in capsys.readouterr().out
    main(["info", "--of", "examples/digits/pulsed.yaml", "--of", "examples/overlays/debug.yaml"])
    assert "trainer.detect_anomaly" in capsys.readouterr().out


def test_bench_measures(capsys: pytest.CaptureFixture[str]) -> None:
    """Positive times; the ratios are those of the rounds, so the median lies between the extremes."""
    main(["bench", "--size=24", "--samples=4", "--rank=2", "--transfer-every=2", "--rounds=3", "--on=cpu", "--json",
          "--device-preset=ecram"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["size"], found["samples"], found["rank"], found["preset"]) == (24, 4, 2, "ecram")
    assert all(value > 0 for value in found["milliseconds"].values())
    for middle, low, high in found["of_dense"].values():
        assert 0 < low <= middle <= high


def test_bench_takes_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variant moves its weights, and both LR-TT layers transfer: what is timed is training."""
    from lightning_lrtt import bench_command

    seen = []
    make = bench_command._step

    def spy(module: torch.nn.Module, *rest: Any) -> Any:
        seen.append((module, module.weight.detach().clone()))
        return make(module, *rest)

    monkeypatch.setattr(bench_command, "_step", spy)
    measure(size=16, samples=8, rank=2, transfer_every=2, rounds=3)
    assert len(seen) == 3
    for module, before in seen:
        assert not torch.equal(module.weight, before)
    for module, _ in seen[1:]:
        assert module.counts()["transfers"] == 4  # 4 rounds, the first of which warms up
    assert seen[2][0].counts()["pulses_c"] > 0


def test_bench_page(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--size=8", "--samples=2", "--rank=2", "--transfer-every=1", "--rounds=3", "--on=cpu"])
    said = capsys.readouterr().out
    for words in ("dense, SGD", "LR-TT, digital", "LR-TT, pulsed (idealized)", "ms a step"):
        assert words in said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """All subcommands, commands to begin with, and the files they name are there."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", "export", "inspect", "device", "bench", "info", "completion"):
        assert re.search(rf"^    {name} ", said, re.MULTILINE), name
    examples = set(re.findall(r"examples/[\w/]+\.yaml", said))
    assert examples and all((ROOT / path).is_file() for path in examples)
    assert "LRTT_TRACEBACK" in said


@pytest.mark.parametrize("name", ["export", "inspect", "device", "bench", "info", "completion"])
def test_help_of_a_subcommand(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_completion_in_bash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The script, asked by bash."""
    pytest.importorskip("shtab", reason="completion scripts are written by shtab: pip install shtab")
    main(["completion", "bash"])
    script = tmp_path / "lrtt"
    script.write_text(capsys.readouterr().out)
    assert script.stat().st_size < 200_000
    ask = f"source {script}; F=$(complete -p lrtt | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
    for words in ("lrtt in", "lrtt device reram_a", "lrtt fit --optimizer LRT", "lrtt fit --trainer.max_e"):
        last = words.split()[-1]
        ask += f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); COMPREPLY=()\n"
        ask += f"$F lrtt {last} x; echo ${{COMPREPLY[@]}}\n"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "inspect info", "reram_array_om reram_array_hfo2", "LRTT", "--trainer.max_epochs"
    ]  # fmt: skip


def test_completion_needs_shtab(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bash"])
    assert stop.value.code == 1
    assert "pip install shtab" in capfd.readouterr().err
