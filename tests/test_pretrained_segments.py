"""``lrtt_ddp`` with ``pretrained=``: every worker reads the file once, nothing of it is sent, the bits are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_lrtt.callbacks import PretrainedInit
from safetensors.torch import save_file
from segment_jobs import DIGITAL, PULSED, Failed, Net, fit, fit_pretrained, run


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A file and its weights, which no seed of the workers gives; beside it one with other values."""
    torch.manual_seed(77)
    state = {name: torch.randn_like(value).clamp(-0.9, 0.9) for name, value in Net().state_dict().items()}
    path = str(tmp_path / "a.safetensors")
    save_file(state, path)
    save_file({name: value * 0.5 for name, value in state.items()}, path + ".other")
    return path, state


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_every_worker_reads_for_itself_and_any_number_gives_the_same_bits(config: Any, checkpoint: Any) -> None:
    """1, 2 and 3 workers with random weights of their own, in three modes: one digest; no C is broadcast."""
    path, state = checkpoint
    found = [
        *run(1, fit_pretrained, path, "progressive", config),
        *run(2, fit_pretrained, path, "progressive", config),
        *run(2, fit_pretrained, path, "lazy", config),
        *run(3, fit_pretrained, path, "prefetch", config),
    ]
    assert len(found) == 8
    for worker in found:
        assert sorted(worker["loads"]) == sorted(state)  # each once
        assert worker["sent"] > 0
        assert worker["sent_c"] == 0
        for name, value in worker["start"].items():
            same = torch.tensor(value).eq(state[f"{name}.weight"]).float().mean()
            assert same == 1 if config is DIGITAL else same > 0.5  # bounds vary by 30%: some cells are clipped
    assert len({worker["digest"] for worker in found}) == 1
    assert len({tuple(worker["metrics"].items()) for worker in found}) == 1


def test_setup_and_prefetching_do_not_meet(checkpoint: Any) -> None:
    """Regression: worker 1 started its tiles afresh before worker 0's keys and counters came, worker 0 after sending them."""
    path, _ = checkpoint
    (expected,) = run(1, fit_pretrained, path, "progressive", PULSED)
    found = run(2, fit_pretrained, path, "prefetch", PULSED, "slow")
    assert {worker["digest"] for worker in found} == {expected["digest"]}


def test_a_resumed_run_reads_nothing(checkpoint: Any, tmp_path: Path) -> None:
    """Two epochs against one, its checkpoint and another without the file; by the callback, too."""
    path, _ = checkpoint
    (whole,) = run(1, fit_pretrained, path, "progressive", DIGITAL)
    run(2, fit_pretrained, path, "lazy", DIGITAL, epochs=1, save=str(tmp_path / "half.ckpt"))
    Path(path).rename(path + ".gone")
    rest = run(2, fit_pretrained, path, "lazy", DIGITAL, resume=str(tmp_path / "half.ckpt"))
    assert [worker["loads"] for worker in rest] == [[], []]
    assert {worker["digest"] for worker in rest} == {whole["digest"]}


def test_the_callback_hands_over_to_the_strategy(checkpoint: Any) -> None:
    path, _ = checkpoint
    (expected,) = run(1, fit_pretrained, path, "progressive", DIGITAL)
    found = run(2, fit, config=DIGITAL, trainer={"callbacks": [PretrainedInit(path, "lazy")]})
    assert {worker["digest"] for worker in found} == {expected["digest"]}


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("missing", {0: "pretrained must be readable by every worker", 1: "FileNotFoundError"}),
        ("other", dict.fromkeys((0, 1), "pretrained weights must have the same bits on all workers")),
    ],
)
def test_workers_with_other_files(trouble: str, said: dict[int, str], checkpoint: Any) -> None:
    """No worker waits for its time to be up."""
    with pytest.raises(Failed) as caught:
        run(2, fit_pretrained, checkpoint[0], "progressive", DIGITAL, trouble)
    for rank, part in said.items():
        assert part in caught.value.errors[rank]
