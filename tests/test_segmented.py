"""Acceptance of ``lrtt_ddp``: T1 to T9 of the specification, on small models in forked workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import segment_jobs as jobs
import torch
from helpers import clean_environment
from segment_jobs import DIGITAL, NOISY, NOISY_PULSED, PULSED, Failed, run

from lightning_lrtt import build_info
from lightning_lrtt.strategies.tree import owners

MODELS = {
    "mlp": {"kind": "mlp"},
    "conv-batchnorm": {"kind": "conv"},
    "transformer-dropout": {"kind": "transformer"},
    "lrtt-digital": {"kind": "mlp", "config": DIGITAL},
    "lrtt-pulsed": {"kind": "mlp", "config": PULSED},
    "lrtt-pulsed-conv": {"kind": "conv", "config": PULSED},
}
STEPS = 2 * jobs.ROWS // jobs.BATCH
_alone: dict[str, dict] = {}
_one_gpu: list[str] = []


def alone(name: str) -> dict:
    """The result of one worker, computed once."""
    if not _alone:
        for key, result in zip(MODELS, run(1, jobs.several, list(MODELS.values()))[0], strict=True):
            _alone[key] = result
    return _alone[name]


def check_same(workers: int, **strategy) -> None:
    """Every model, trained by ``workers``, equals the run of one worker in parameters, metrics and schedule."""
    results = run(workers, jobs.several, [{**model, **strategy} for model in MODELS.values()])
    for i, name in enumerate(MODELS):
        expected = alone(name)
        for rank, result in enumerate(r[i] for r in results):
            assert result["digest"] == expected["digest"], f"{name}: worker {rank} of {workers}"
            assert result["metrics"] == expected["metrics"], f"{name}: worker {rank} of {workers}"
            assert result["lr"] == expected["lr"]
            # The self-test is one call more on every worker.
            assert result["calls"] == 1 + STEPS * len(owners(12, workers)[rank])


@pytest.mark.parametrize("workers", [2, 3])
def test_T1_one_digest_for_any_number_of_workers(workers):
    """Counts that do and do not cut the quads; dropout, augmentation, batch norm, clipping and a plateau schedule."""
    check_same(workers)


def test_T1_the_models_learn_and_the_schedule_acts():
    """Otherwise equal digests would say little: the loss falls and the plateau scheduler has lowered some rate."""
    rates = {alone(name)["lr"] for name in MODELS}
    assert len(rates) > 1, rates
    assert len({alone(name)["digest"] for name in MODELS}) == len(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, 5, 6, 7, 12])
def test_T1_one_digest_for_more_workers(workers):
    """The other counts of the acceptance list; 5 and 7 do not divide 12."""
    check_same(workers)


@pytest.mark.parametrize("workers", [2, 3])
def test_T1_collectives_give_the_same_digest(workers):
    """The exchange is not part of the numbers."""
    check_same(workers, exchange="collectives")


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_T1_noise_of_converters_follows_the_segment(name):
    """Reads draw by (ticket, sample of the segment), whoever computes it: 1, 2 and 3 workers, digital and pulsed tiles."""
    fits = [{"kind": name, "config": config, "epochs": 1} for config in (NOISY, NOISY_PULSED)]
    one = run(1, jobs.several, fits)[0]
    assert one[0]["digest"] != run(1, jobs.fit, kind=name, config=DIGITAL, epochs=1)[0]["digest"]
    for workers in (2, 3):
        for own in run(workers, jobs.several, fits):
            assert [r["digest"] for r in own] == [r["digest"] for r in one]
            assert [r["metrics"] for r in own] == [r["metrics"] for r in one]


def test_plain_ddp_draws_other_noise_on_every_worker():
    """Lightning's DDP with digital tiles and converters: the numbers of samples are shared out over workers."""
    for rank, tiles in enumerate(run(2, jobs.plain_ddp)):
        assert tiles == [(rank * 2**25, 2**25)] * 2


def test_T1_144_segments():
    """Two levels of the tree; 5 workers own up to 6 nodes."""
    job = {"kind": "mlp", "config": PULSED, "segments": 144, "batch": 144, "rows": 288, "epochs": 1}
    one = run(1, jobs.fit, **job)[0]["digest"]
    assert {r["digest"] for r in run(5, jobs.fit, **job)} == {one}


@pytest.mark.parametrize("name", ["conv-batchnorm", "lrtt-pulsed"])
def test_T2_restarts_with_other_numbers_of_workers(name, tmp_path):
    """1 -> 3 -> 2 -> 12 over restarts, two of them in the middle of an epoch of four steps, equals 1."""
    last, keep = None, jobs.keep_all(tmp_path)
    for workers, steps in ((1, 3), (3, 4), (2, 6), (12, 8)):
        results = run(workers, jobs.fit, **MODELS[name], resume=last, trainer={**keep, "max_steps": steps})
        assert results[0]["step"] == steps
        last = str(tmp_path / "last.ckpt")
    assert {r["digest"] for r in results} == {alone(name)["digest"]}
    saved = torch.load(last, weights_only=True)["lrtt_segments"]
    assert (saved["segments"], saved["threads"], saved["seed"], saved["batch_sizes"]) == (12, 1, 3, [jobs.BATCH])


def test_T3_skip_leaves_a_bad_segment_out_alike(tmp_path):
    """A NaN in one sample: 1 and 4 workers skip the same segments, and the parameters stay finite."""
    for model in ("conv-batchnorm", "lrtt-pulsed"):
        job = {**MODELS[model], "bad": 17, "nonfinite": "skip"}
        one = run(1, jobs.fit, **job)[0]
        assert {r["digest"] for r in run(4, jobs.fit, **job)} == {one["digest"]}
        assert one["loss"] == one["loss"], "the loss of the remaining segments is finite"
        assert one["digest"] != alone(model)["digest"]


def test_T3_clip_acts_alike():
    """Clipping single segments changes the result, and not with the number of workers."""
    for model in ("mlp", "lrtt-pulsed"):
        job = {**MODELS[model], "segment_clip": 0.05}
        one = run(1, jobs.fit, **job)[0]["digest"]
        assert {r["digest"] for r in run(2, jobs.fit, **job)} == {one}
        assert one != alone(model)["digest"]


@pytest.mark.parametrize("workers", [1, 3])
def test_T3_raise_names_step_and_segment(workers):
    """All workers stop with the same message before the parameters change."""
    with pytest.raises(Failed) as failed:
        run(workers, jobs.fit, bad=17)
    assert len(failed.value.errors) == workers
    assert len({e for e in failed.value.errors.values()}) == 1
    assert "NonFiniteSegmentError" in failed.value.errors[0]
    assert "at optimizer step" in failed.value.errors[0] and "in segment" in failed.value.errors[0]


def test_T4_a_short_last_batch_is_refused_or_dropped():
    """100 samples in batches of 24 leave 4: an error, or with drop_last a run that equals the one without those rows."""
    with pytest.raises(Failed, match=r"the last batch must be whole, got 100 samples in batches of 24.*drop_last=True"):
        run(1, jobs.fit, rows=100)
    assert run(2, jobs.fit, rows=100, drop_last=True, epochs=1)[0]["calls"] == 1 + 6 * 4
    with pytest.raises(Failed, match=r"batch_size must be a multiple of 12.*got 20; use 24 or 12"):
        run(1, jobs.fit, batch=20, rows=80)


def test_T5_thread_sanitizer(tmp_path):
    """The barrier and the slots under ThreadSanitizer: no data race, and the sums are right."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ for the sanitizer build")
    root, program = Path(__file__).parent, tmp_path / "tsan"
    core = root.parent / "csrc" / "cpu"
    build = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-ffp-contract=off",
        str(root / "segments_tsan.cpp"),
        str(core / "barrier.cpp"),
        str(core / "segments.cpp"),
        str(core / "segment_lanes.cpp"),
        "-DLRTT_ISA=base",
        "-o",
        str(program),
        "-pthread",
        "-Wno-unknown-pragmas",
    ]
    built = subprocess.run(build, capture_output=True, text=True, timeout=120, check=False)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("no ThreadSanitizer runtime")
    assert built.returncode == 0, built.stderr
    # Where the kernel spreads addresses widely, the runtime finds its own taken: without randomisation it does not. A
    # container may forbid to turn that off.
    off = ["setarch", os.uname().machine, "-R"]
    for before in (off, []) if shutil.which("setarch") else ([],):
        done = subprocess.run([*before, str(program)], capture_output=True, text=True, timeout=60, check=False)
        if not done.stderr.startswith("setarch:"):
            break
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(f"ThreadSanitizer cannot run with this kernel's address randomisation: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


def within(limit: float, seconds: Callable[[], float]) -> bool:
    """One of five measurements is below ``limit``: other work on the machine makes them longer, never shorter."""
    return any(seconds() < limit for _ in range(5))


@pytest.mark.parametrize("exchange", ["shared_memory", "collectives"])
def test_T6_an_exception_ends_all_workers_soon(exchange):
    """A worker that raises: the others hear of it at once, and all processes have ended within 2 s."""

    def seconds() -> float:
        with pytest.raises(Failed) as failed:
            run(3, jobs.fit, trouble=jobs.raises, exchange=exchange)
        assert "ValueError: on purpose" in failed.value.errors[1]
        for rank in (0, 2):
            assert "WorkerLostError" in failed.value.errors[rank]
        return time.monotonic() - float(failed.value.errors[1].rpartition(" ")[2])

    assert within(2.0, seconds)


def test_T6_teardown_is_quick_and_leaves_nothing():
    """After a fit: under 2 s, no file in /dev/shm, settings of the process as before."""

    def seconds() -> float:
        results = run(2, jobs.fit_and_look)
        for result in results:
            assert result["threads"] == result["threads_before"] == 2
            assert not result["files"]
        return max(result["teardown"] for result in results)

    assert within(2.0, seconds)


@pytest.mark.parametrize("exchange", ["shared_memory", "collectives"])
def test_T7_a_killed_worker_stops_the_others_and_the_run_resumes(exchange, tmp_path):
    """kill -9 of a worker: an error that says so, no hang; going on from the last checkpoint equals the run of one."""
    with pytest.raises(Failed) as failed:
        run(3, jobs.fit, "mlp", PULSED, trouble=jobs.dies, exchange=exchange, trainer=jobs.keep_all(tmp_path))
    assert failed.value.errors[1] == "ended without a result"
    for rank in (0, 2):
        assert "WorkerLostError" in failed.value.errors[rank]
    last = str(tmp_path / "last.ckpt")
    assert os.path.exists(last)
    assert {r["digest"] for r in run(2, jobs.fit, "mlp", PULSED, resume=last)} == {alone("lrtt-pulsed")["digest"]}


@pytest.mark.parametrize("exchange", ["shared_memory", "collectives"])
def test_T7_a_hanging_worker_is_given_up(exchange):
    """A worker that sleeps: the others stop after ``timeout`` and say what to do."""
    # The time is also what the workers have to find each other: on a busy machine the first can be too short for that.
    for timeout in (6, 60):
        with pytest.raises(Failed) as failed:
            run(2, jobs.fit, trouble=jobs.sleeps, exchange=exchange, timeout=float(timeout), patience=0.5)
        wanted = [f"timeout = {timeout} s", "raise strategy.timeout"]
        wanted += ["worker 1 did not come"] if exchange == "shared_memory" else []
        missing = [words for words in wanted if words not in failed.value.errors[0]]
        if not missing:
            break
    assert not missing, failed.value


def test_T8_other_numbers_than_the_checkpoint_are_refused(tmp_path):
    """Threads, segments and batch are part of the numbers."""
    path = str(tmp_path / "one.ckpt")
    run(1, jobs.fit, epochs=1, save=path)
    for wrong, message in (
        ({"threads": 2}, "threads must be the checkpoint's, 1, got 2"),
        ({"segments": 144, "batch": 144, "rows": 144}, "segments must be the checkpoint's, 12, got 144"),
        ({"batch": 48}, "batch_size must be the checkpoint's, 24, got 48"),
    ):
        with pytest.raises(Failed, match=message):
            run(1, jobs.fit, resume=path, **wrong)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("threads", "intra-op threads must be the same on all workers"),
        ("code", "code of the LightningModule must be the same on all workers"),
        ("settings", "segment_clip must be the same on all workers"),
    ],
)
def test_T8_workers_that_differ_are_refused(trouble, message):
    """Before the first step, on every worker."""
    with pytest.raises(Failed) as failed:
        run(2, jobs.fit_differently, trouble)
    assert len(failed.value.errors) == 2
    for error in failed.value.errors.values():
        assert message in error


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (jobs.computes_differently, "the self-test's segment must have the same bits on all workers"),
        (jobs.drifts, "parameters and buffers must have the same bits on all workers"),
        (jobs.remembers, "a segment must give the same bits alone and after others"),
    ],
    ids=["arithmetic", "drift", "memory"],
)
def test_T8_self_test_and_hashes_find_what_settings_do_not_show(trouble, message):
    """Another result for the same segment, a replica that is changed on one worker, and a model that keeps state."""
    with pytest.raises(Failed, match=message):
        run(2, jobs.fit, trouble=trouble)


def on_gpus(workers: int) -> list[list[str]]:
    """Digests of every model by rank: one group of processes trains all of them, as starting CUDA takes seconds."""
    models = [{**model, "accelerator": "gpu"} for model in MODELS.values()]
    return [[r["digest"] for r in own] for own in run(workers, jobs.several, models)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one")
@pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_T9_one_digest_on_gpus(workers):
    """NCCL on 1 (a second run), 2 and 4 GPUs: the digests of one."""
    if torch.cuda.device_count() < workers:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices, {workers} wanted: run on a machine that has them")
    if not _one_gpu:
        _one_gpu.extend(on_gpus(1)[0])
    for rank, own in enumerate(on_gpus(workers)):
        assert dict(zip(MODELS, own, strict=True)) == dict(zip(MODELS, _one_gpu, strict=True)), f"worker {rank}"


def test_a_restarted_group_does_not_read_the_addresses_of_the_dead():
    """Regression: a second attempt over torchrun's store met the first one's addresses there, and its workers never met."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    digests = [run(2, jobs.fit_under_torchrun, server.port, attempt) for attempt in (0, 1)]
    assert len({digest for attempt in digests for digest in attempt}) == 1


@pytest.mark.slow
def test_torchrun_restarts_and_goes_on(tmp_path):
    """torchrun --max-restarts: a worker is killed once, the group starts anew and ends in the digest of one worker."""
    script = Path(jobs.__file__).parent / "segment_script.py"
    environment = clean_environment(PYTHONPATH=str(script.parent))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "digest").read_text() == alone("lrtt-pulsed")["digest"]


@pytest.mark.slow
def test_the_example_shows_one_digest():
    """One command, 1, 2, 3 and 5 workers through Lightning's launcher and the command line."""
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "examples" / "segmented" / "run.py"), "--epochs", "1"]
    done = subprocess.run(
        command, cwd=root, env=clean_environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3", "5"]
    assert len({line[2] for line in lines}) == 1
