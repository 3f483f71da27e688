"""The parts of ``lrtt_ddp`` in one process: tree, kernel, data, checks, refusals."""

from __future__ import annotations

import threading

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from segment_jobs import PULSED, Net, Rows
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from lightning_lrtt import _C, LRTTDDPStrategy, ResumableLoader
from lightning_lrtt.ops import reference_segments
from lightning_lrtt.strategies.segment_checks import hash64
from lightning_lrtt.strategies.segment_data import SegmentLoader
from lightning_lrtt.strategies.tree import maximal_nodes, owners, root_program, sum_program, tree

SUM = torch.ops.lrtt.segment_sum_


def numbers(*values: float) -> torch.Tensor:
    """float64."""
    return torch.tensor(values, dtype=torch.float64)


# -------------------------------------------------------------- tree


@pytest.mark.parametrize("segments", [12, 144])
@given(workers=st.integers(1, 144))
@settings(max_examples=60, deadline=None)
def test_any_owner_map_adds_in_the_order_of_the_tree(segments, workers):
    """Nodes of the workers, then the root of the nodes: the bits of the tree written out by hand."""
    workers = min(workers, segments)
    x = [randn(s, 5) * 10.0 ** (s % 7) for s in range(segments)]

    def by_hand(level: list[torch.Tensor]) -> list[torch.Tensor]:
        out = []
        for i in range(0, len(level), 12):
            a, b, c, d, e, f = (level[i + 2 * j] + level[i + 2 * j + 1] for j in range(6))
            out.append(((a + b) + (c + d)) + (e + f))
        return out

    expected = x
    while len(expected) > 1:
        expected = by_hand(expected)
    nodes = []
    for own in owners(segments, workers):
        mine = maximal_nodes(segments, own)
        out = [torch.empty(5) for _ in mine]
        SUM(
            out,
            [x[s] for s in own],
            torch.ones(len(own), dtype=torch.float64),
            numbers(1),
            numbers(),
            sum_program(mine),
            False,
        )
        nodes += out
    total = torch.empty(5)
    SUM(
        [total],
        nodes,
        torch.ones(len(nodes), dtype=torch.float64),
        numbers(1),
        numbers(),
        list(root_program(segments, workers)),
        False,
    )
    assert same_bits(total, expected[0])


def test_owner_map_is_a_partition_and_ships_little():
    """1 or 2 nodes a worker with 12 segments, up to 7 with 144."""
    for segments, most in ((12, 2), (144, 7)):
        for workers in range(1, segments + 1):
            own = owners(segments, workers)
            assert [s for part in own for s in part] == list(range(segments))
            assert max(len(part) for part in own) - min(len(part) for part in own) <= 1
            assert max(len(maximal_nodes(segments, part)) for part in own) <= most
    with pytest.raises(ValueError, match="at most the 12 segments, got 13; use fewer workers, or segments=144"):
        owners(12, 13)
    with pytest.raises(ValueError, match="segments must be 12, 144 or 1728, got 24"):
        tree(24)


# -------------------------------------------------------------- kernel


def call(
    dtype: torch.dtype, weights: torch.Tensor, stats: torch.Tensor, sizes=(9000, 70, 1), absent=(1, 2), redo=False
):
    """Arguments for four segments, two nodes of three parameters; one slot is absent."""
    slots = [randn(10 * p + s, n).to(dtype) for p, n in enumerate(sizes) for s in range(4)]
    slots[absent[0] * 4 + absent[1]] = torch.empty(0, dtype=dtype)
    out = [torch.full((n,), 7.0, dtype=dtype) for n in sizes for _ in range(2)]
    return (
        out,
        slots,
        weights,
        numbers(0.25),
        stats,
        sum_program((tree(12).left.left.left, *maximal_nodes(12, range(4, 6)))),
        redo,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 0.3, 0, 1)], ids=["ones", "weighted"])
@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf")])
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_equals_reference(dtype, weights, bad, threads):
    """Sums, norms and flags, bit for bit, on any number of threads; a weight of 0 hides NaN."""
    results = []
    before = torch.get_num_threads()
    for op in (SUM, reference_segments.segment_sum_):
        arguments = call(dtype, numbers(*weights), torch.zeros(4, 2, dtype=torch.float64), sizes=(50000, 70, 1))
        if bad is not None:
            arguments[1][2][41] = bad
        torch.set_num_threads(threads)
        op(*arguments)
        torch.set_num_threads(before)
        results.append(
            [*arguments[0], arguments[4][:, 1], arguments[4][[0, 1, 3], 0]]
        )  # the norm of NaN has no one bit pattern
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    flags = results[0][-2].tolist()
    assert flags == [0.0, 0.0, float(bad is not None), 0.0]


def test_norm_is_the_norm():
    """Against float64 numpy; the error of a sum of 9071 squares is at most n * 2**-53 relative."""
    arguments = call(torch.float32, torch.ones(4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    SUM(*arguments)
    for s in range(4):
        exact = sum(np.square(slot.double().numpy()).sum() for slot in arguments[1][s::4])
        assert abs(float(arguments[4][s, 0]) / exact - 1) < 9071 * 2**-53


def test_redo_does_nothing_when_all_weights_are_one():
    """The second pass after norms are known costs nothing in the usual case."""
    arguments = call(torch.float32, torch.ones(4, dtype=torch.float64), numbers(), redo=True)
    SUM(*arguments)
    assert all((t == 7).all() for t in arguments[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    """Schema and fake agree with the kernel."""
    torch.library.opcheck(SUM, call(dtype, torch.ones(4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)))


@pytest.mark.parametrize(
    "program", [[0, 1], [2, 1], [0, 3, 5], [1, 0], []], ids=["left over", "empty", "deep", "cut", "nothing"]
)
def test_wrong_programs_are_refused(program):
    """A program that would leave the stack or hand out half a sum."""
    out = [torch.zeros(3)]
    slots = [torch.zeros(3) for _ in program]
    with pytest.raises(ValueError, match=r"program must push each segment|out must hold"):
        SUM(out, slots, torch.ones(len(program), dtype=torch.float64), numbers(1), numbers(), program, False)


PROGRAMS = {
    "one worker": range(12),
    "two nodes": range(2, 9),
    "one segment": range(5, 6),
    "many slots": range(7, 60),  # of 144: more than pass through a GPU's registers at once
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("own", PROGRAMS)
def test_programs_equal_reference(own, offset, dtype):
    """Quads, pairs and single slots pass in other ways; whole blocks, cut ones, vectors cut to single elements."""
    own = PROGRAMS[own]
    nodes, steps = maximal_nodes(12 if own.stop <= 12 else 144, own), len(own)
    sizes = (4096, 4096 + 77, 300, 1)
    slots = [randn(100 * p + s, n + offset).to(dtype)[offset:] for p, n in enumerate(sizes) for s in own]
    results = []
    for op in (SUM, reference_segments.segment_sum_):
        out = [torch.full((n + offset,), 7.0, dtype=dtype)[offset:] for n in sizes for _ in nodes]
        stats = torch.zeros(steps, 2, dtype=torch.float64)
        op(out, slots, torch.ones(steps, dtype=torch.float64), numbers(0.25), stats, sum_program(nodes), False)
        results.append([*out, stats])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one")
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("own", PROGRAMS)
def test_cuda_equals_cpu(own, offset, dtype, weighted):
    """The same bits of sums, norms and flags: several parameters, whole and cut blocks, an absent slot, an infinity."""
    own = PROGRAMS[own]
    nodes, steps = maximal_nodes(12 if own.stop <= 12 else 144, own), len(own)
    sizes = (3 * 4096, 50001, 70, 1)
    weights = torch.ones(steps, dtype=torch.float64)
    if weighted:
        weights[0], weights[-1] = 0.3, 0.0 if steps > 1 else 0.5
    results = []
    for device in ("cpu", "cuda"):
        slots = [randn(100 * p + s, n + offset).to(dtype).to(device)[offset:] for p, n in enumerate(sizes) for s in own]
        slots[0][5] = float("inf")
        slots[steps - 1] = torch.empty(0, dtype=dtype, device=device)
        out = [torch.full((n + offset,), 7.0, dtype=dtype, device=device)[offset:] for n in sizes for _ in nodes]
        stats = torch.zeros(steps, 2, dtype=torch.float64, device=device)
        SUM(out, slots, weights.to(device), numbers(0.25).to(device), stats, sum_program(nodes), False)
        results.append([t.cpu() for t in (*out, stats)])
    for a, b in zip(*results, strict=True):
        assert same_bits(a.nan_to_num(1e9), b.nan_to_num(1e9))


# -------------------------------------------------------------- barrier


def test_barrier_meets_times_out_and_fails():
    """Threads meet; one that is missing is named after the time limit; a failure wakes the others."""
    memory = torch.zeros(_C.barrier_bytes, dtype=torch.uint8)
    at = memory.data_ptr()
    _C.barrier_init(at, 2)
    seen = []
    other = threading.Thread(target=lambda: seen.append(_C.barrier_wait(at, _C.barrier_arrive(at, 1), 100_000)))
    other.start()
    assert _C.barrier_wait(at, _C.barrier_arrive(at, 0), 100_000) == 0
    other.join()
    assert seen == [0]
    meeting = _C.barrier_arrive(at, 0)
    assert _C.barrier_wait(at, meeting, 50) == 1
    assert _C.barrier_missing(at, meeting) == [1]
    _C.barrier_fail(at, 1)
    assert _C.barrier_wait(at, meeting, 100_000) == 2
    assert _C.barrier_failed(at) == 1


# -------------------------------------------------------------- data


def batches(loader, workers: int, epoch: int = 0, skip: int = 0) -> list[list[torch.Tensor]]:
    """Inputs by global batch and segment, as ``workers`` workers see them."""
    out: list[list[torch.Tensor]] = []
    for own in owners(12, workers):
        mine = SegmentLoader(loader, 12, own, seed=5)
        mine.load_state_dict({**mine.state_dict(), "epoch": epoch, "batch": skip})
        for i, batch in enumerate(mine):
            out += [[]] if i == len(out) else []
            out[i] += [x for x, _ in batch]
    return out


LOADERS = {
    "shuffled": lambda: DataLoader(Rows((6,)), batch_size=24, shuffle=True),
    "own generator": lambda: DataLoader(
        Rows((6,)), batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(9)
    ),
    "weighted": lambda: DataLoader(Rows((6,)), batch_size=24, sampler=WeightedRandomSampler(torch.arange(96.0), 96)),
    "resumable": lambda: ResumableLoader(Rows((6,)), batch_size=24),
    "processes": lambda: DataLoader(Rows((6,)), batch_size=24, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_worker_count_sees_the_same_segments(kind):
    """Order and augmentation noise, bit for bit; another epoch is another order; the global generator is untouched."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = batches(LOADERS[kind](), 1)
    other = batches(LOADERS[kind](), 1 if kind == "processes" else 5)
    assert all(torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one[0][0], batches(LOADERS[kind](), 1, epoch=1)[0][0])
    resumed = batches(LOADERS[kind](), 2, skip=3)
    assert torch.equal(torch.cat(resumed[0]), torch.cat(one[3]))


def test_processes_and_none_give_the_same_noise():
    """Augmentation is keyed by segment, not by who loads it."""
    assert torch.equal(
        torch.cat(batches(LOADERS["shuffled"](), 1)[0]), torch.cat(batches(LOADERS["processes"](), 1)[0])
    )


class Stream(IterableDataset):
    """Rows without numbers."""

    def __iter__(self):
        return iter(torch.randn(48, 6))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=24), "over a map-style dataset, got the iterable Stream"),
        (lambda: DataLoader(Rows((6,)), batch_size=None), "one that makes its batches itself"),
        (
            lambda: DataLoader(
                Rows((6,)), batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(range(96)), 24, False)
            ),
            "got batch_sampler=Mine; use batch_size and sampler",
        ),
        (
            lambda: DataLoader(
                Rows((6,)), batch_size=24, sampler=torch.utils.data.DistributedSampler(Rows((6,)), 1, 0)
            ),
            "without a DistributedSampler",
        ),
        (lambda: [1, 2], "a DataLoader or ResumableLoader"),
        (lambda: DataLoader(Rows((6,)), batch_size=120, drop_last=True), "hold a batch of 120, got 96 samples"),
        (lambda: DataLoader(Rows((6,)), batch_size=8), "multiple of 12 .*got 8; use 12"),
    ],
)
def test_loaders_that_cannot_be_cut_are_refused(loader, message):
    """Each with what to do."""
    with pytest.raises(MisconfigurationException, match=message):
        SegmentLoader(loader(), 12, range(12), 0)


# -------------------------------------------------------------- checks


def test_hash_sees_every_bit_order_and_shape():
    """One flipped bit, a swap, a sign of zero, a longer tensor."""
    x = [randn(0, 1000), torch.tensor([True, False, True]), torch.tensor(0.0)]
    base = hash64(x)
    assert base == hash64([t.clone() for t in x])
    flipped = x[0].clone()
    flipped[999] = torch.nextafter(flipped[999], torch.tensor(9.0))
    swapped = x[0][torch.cat([torch.tensor([1, 0]), torch.arange(2, 1000)])]
    for other in (
        [flipped, *x[1:]],
        [swapped, *x[1:]],
        [x[0], x[1], torch.tensor(-0.0)],
        [x[1], x[0], x[2]],
        x[:2],
        [torch.cat([x[0], torch.zeros(1)]), *x[1:]],
    ):
        assert hash64(other) != base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segments": 24}, "segments must be 12, 144 or 1728, got 24"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'raise', 'skip', 'report', got 'ignore'"),
        ({"segment_clip": 0.0}, "segment_clip must be finite and > 0, got 0.0"),
        ({"verify_every": -1}, "verify_every must be >= 0, got -1"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"timeout": 0.0}, "timeout must be finite and > 0, got 0.0"),
        ({"exchange": "mpi"}, "exchange must be one of 'auto', 'shared_memory', 'collectives', got 'mpi'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    """At construction."""
    with pytest.raises(ValueError, match=message):
        LRTTDDPStrategy(**arguments)


QUIET = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Manual(Net):
    """Manual optimisation."""

    automatic_optimization = False


class LogsMetric(Net):
    """A metric object in training_step."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import MeanMetric

        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        return loss


class NoLoss(Net):
    """Returns nothing."""

    def training_step(self, batch, batch_idx):
        return None


class LogsSometimes(Net):
    """Another name in another segment."""

    def training_step(self, batch, batch_idx):
        self.log(f"train/{self.calls % 2}", 1.0)
        return super().training_step(batch, batch_idx)


class Iterates(Net):
    """Takes the iterator."""

    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class Sparse(Net):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 3, sparse=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.embedding(torch.tensor([1])).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LogsMedian(Net):
    """A reduction that segments do not have."""

    def training_step(self, batch, batch_idx):
        self.log("train/x", 1.0, reduce_fx=torch.median)
        return super().training_step(batch, batch_idx)


class Ragged(Net):
    """Segments of one row and of two."""

    def training_step(self, batch, batch_idx):
        rows = 1 + self.calls % 2
        return super().training_step([part[:rows] for part in batch], batch_idx)


class Grows(Net):
    """A buffer of another shape in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def training_step(self, batch, batch_idx):
        self.seen = torch.cat([self.seen, torch.ones(1)])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Net, {"accumulate_grad_batches": 2}, "accumulate_grad_batches must be 1, got 2"),
        (Manual, {}, "optimization must be automatic, got manual"),
        (Net, {"sync_batchnorm": True}, "sync_batchnorm must be off"),
        (LogsMetric, {}, "metric mean must not be updated in training_step"),
        (NoLoss, {}, "training_step must return a loss for every segment, got NoneType"),
        (LogsSometimes, {}, "must log the same names in every segment, got train/0, train/1 in some only"),
        (Iterates, {}, "training_step must be one that takes a batch, got dataloader_iter"),
        (Sparse, {}, "the gradient of embedding.weight must be dense, got torch.sparse_coo; use sparse=False"),
        (LogsMedian, {}, "reduce_fx of self.log..train/x.. must be mean, sum, min or max"),
        (Ragged, {"config": PULSED}, "every segment must call each tile with the same shapes, got .* samples; pad"),
        (Grows, {}, "buffer seen must keep shape and dtype in training_step"),
        (
            Net,
            {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
            "precision must be '32-true', '64-true' or 'bf16-mixed', got 16-mixed; a gradient scaler",
        ),
    ],
    ids=[
        "accumulation",
        "manual",
        "sync_batchnorm",
        "metric",
        "no loss",
        "names",
        "iterator",
        "sparse",
        "reduction",
        "ragged",
        "buffer",
        "scaler",
    ],
)
def test_set_ups_are_refused(model, options, message):
    """Before the first update, with the reason."""
    config = options.get("config")
    options = {name: value for name, value in options.items() if name != "config"}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=LRTTDDPStrategy(config=config, self_test=False, exclude=None if config else ["*"]),
        **QUIET,
        **options,
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model(), DataLoader(Rows((6,)), batch_size=24))


def test_statistics_reach_tensorboard(tmp_path):
    """Norms, flags and bytes at the logging interval, the owner map as text."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="run", version=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=LRTTDDPStrategy(exclude=["*"]),
        max_epochs=1,
        logger=logger,
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Net()
    trainer.fit(model, DataLoader(Rows((6,)), batch_size=24), DataLoader(Rows((6,), 24), batch_size=24))
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag for tag in events.Tags()["scalars"] if tag.startswith("segment/")}
    assert scalars == {
        f"segment/{n}"
        for n in ("norm_mean", "norm_max", "norm_min", "nonfinite", "bytes_sent", "gradient_bytes", "operand_bytes")
    }
    size = sum(p.numel() * 4 for p in model.parameters())
    assert [e.value for e in events.Scalars("segment/gradient_bytes")] == [size, size]
    assert [e.value for e in events.Scalars("segment/bytes_sent")] == [0.0, 0.0]  # nobody to send to
    assert all(e.value > 0 for e in events.Scalars("segment/norm_min"))
    assert "segment/owners/text_summary" in events.Tags()["tensors"]
