"""One fit of the segmented strategy: its exchange, its steps, its self-test and its statistics."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed
from torchmetrics import Metric

from lightning_lrtt.nn import find_tiles
from lightning_lrtt.strategies.exchange import CollectiveExchange, Exchange
from lightning_lrtt.strategies.resume import collect_rng, restore_rng
from lightning_lrtt.strategies.segment_checks import ReplicaError, compare_cards, compare_hashes, hash64, identity_card
from lightning_lrtt.strategies.segment_data import has_segments, map_segments, pick
from lightning_lrtt.strategies.segment_reduce import BAD, SQUARE, Reduced, Reducer
from lightning_lrtt.strategies.segment_rng import TRAIN, isolated, key
from lightning_lrtt.strategies.segment_step import Result, Runner
from lightning_lrtt.strategies.shared_memory import NoSharedMemoryError, SharedMemoryExchange, one_host

if TYPE_CHECKING:
    from lightning_lrtt.strategies.ddp import LRTTDDPStrategy

log = logging.getLogger(__name__)


class SegmentFit:
    """Made in the strategy's setup, after the model is on its device; ends with its teardown. Collective.

    Args:
        strategy: Whose settings count.
        trainer: The Trainer.

    Attributes:
        test_hash: What the self-test's segment hashed to; None before the first step.
        last_bytes_sent: What this worker gave to others in the last step.

    Raises:
        MisconfigurationException: If the workers' settings, code or builds differ.
    """

    def __init__(self, strategy: LRTTDDPStrategy, trainer: pl.Trainer) -> None:
        self.strategy, self.trainer = strategy, trainer
        self.module = trainer.lightning_module
        device = strategy.root_device
        numbers = {
            name: getattr(strategy, name)
            for name in (
                "segments",
                "nonfinite",
                "segment_clip",
                "verify_every",
                "threads",
                "exchange",
                "self_test",
                "seed",
            )
        }
        numbers |= {f"tile {name}": repr(tile.config) for name, tile in find_tiles(self.module).items()}
        compare_cards(identity_card(self.module, numbers, device))
        state = strategy.broadcast(collect_rng(torch.device("cpu")))  # for what runs outside of segments
        restore_rng(state, torch.device("cpu"))
        self.exchange = _exchange(strategy)
        self.reducer = Reducer(self.exchange, strategy.nonfinite, strategy.segment_clip)
        self.runner = Runner(self.module, self._forward, self._backward, device, strategy.segments)
        self.test_hash: int | None = None
        self.last_bytes_sent = 0
        self._reduced: Reduced | None = None

    # -------------------------------------------------------------- a step

    def training_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All of this worker's segments, the exchange, and what is logged; returns the mean loss."""
        batch, rest = args[0], args[1:]
        step = self.trainer.global_step
        self.reducer.check()
        test = self.strategy.self_test and self.test_hash is None
        own = self.exchange.own
        order = list(range(len(own)))
        results: dict[int, Result] = {}
        with isolated(self.strategy.root_device):
            self.runner.start()
            if test:
                self._self_test(batch, rest, kwargs, step)
                order.reverse()  # segment 0 alone before, now after others
            for j in order:
                results[j] = self.runner.run(own[j], self._seed(step, own[j]), (pick(batch, j), *rest), kwargs)
            if test and own.start == 0 and _hash(results[0]) != self.test_hash:
                raise ReplicaError(
                    "LRTTDDPStrategy: a segment must give the same bits alone and after others, got others in segment 0; "
                    "training_step keeps something from one call to the next (an attribute, a cache, a lazily made tensor). "
                    "Keep it in a buffer, or set self_test=False if it does not matter"
                )
        self.runner.finish()
        self.runner.buffers.compared()
        reduced = self.reducer.reduce([results[j] for j in range(len(own))], self.runner, step)
        self._reduced = reduced
        for name, value in reduced.logs.items():
            options = dict(self.runner.recorder.options[name])
            options["sync_dist"] = False
            self.module.log(name, value, **{"batch_size": 1, **options})
        self._log_statistics(reduced)
        extras = [results[j].extra for j in range(len(own))]
        return {"loss": reduced.loss, "segments": extras} if any(extras) else reduced.loss

    def install(self) -> None:
        """Give the reduced gradients to parameters and the operands of all segments to pulsed tiles."""
        reduced = self._reduced
        assert reduced is not None
        for i, (_, parameter) in enumerate(self.runner.parameters):
            parameter.grad = reduced.gradients.get(i)
        for tile, calls, samples in zip(self.runner.tiles, reduced.operands, reduced.samples, strict=True):
            tile.latch.clear()
            tile.latch.samples = samples
            if tile.config.is_pulsed and tile.A.grad is not None and tile.B.grad is not None:
                tile.latch.calls = calls
                # g0 is the gradient before it was divided: so the pulses' lr follows the division like any other scaling.
                good = reduced.good.to(tile.A.dtype)
                tile.latch.grad_a, tile.latch.grad_b = tile.A.grad * good, tile.B.grad * good
        self._reduced = None

    def verify(self) -> None:
        """Compare hashes of the replicas every `verify_every` steps.

        Raises:
            ReplicaError: If they differ.
        """
        every, step = self.strategy.verify_every, self.trainer.global_step + 1
        if every and step % every == 0 and self.exchange.workers > 1:
            self.compare_replicas(step)

    def compare_replicas(self, step: int, what: str = "parameters and buffers") -> None:
        """Collective.

        Raises:
            ReplicaError: If parameters or buffers differ.
        """
        tensors = [*self.module.parameters(), *self.module.buffers()]
        hashes = [words[0] for words in self.exchange.meet([hash64(tensors)])]
        compare_hashes(what, hashes, step)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.strategy.precision_plugin.train_step_context():
            return self.module.training_step(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        self.strategy.precision_plugin.backward(loss, self.module, None)

    def _seed(self, step: int, segment: int) -> int:
        return key(self.strategy.seed, TRAIN, step, segment)

    def _self_test(self, batch: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], step: int) -> None:
        """Let every worker compute segment 0 from the same batch, alone."""
        device = self.strategy.root_device
        segment: Any = pick(batch, 0) if self.exchange.rank == 0 else None
        if self.exchange.workers > 1:
            box = [move_data_to_device(segment, torch.device("cpu"))]
            try:
                distributed.broadcast_object_list(box)
            except (TypeError, AttributeError) as error:  # pickle's ways to say no
                raise MisconfigurationException(
                    f"LRTTDDPStrategy: batches must be picklable for the self-test, but {error}; set self_test=False"
                ) from error
            segment = move_data_to_device(box[0], device)
        result = self.runner.run(0, self._seed(step, 0), (segment, *rest), kwargs)
        self.test_hash = _hash(result)
        hashes = [words[0] for words in self.exchange.meet([self.test_hash])]
        compare_hashes("the self-test's segment", hashes, step)

    # -------------------------------------------------------------- statistics

    def _log_statistics(self, reduced: Reduced) -> None:
        trainer = self.trainer
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        self.last_bytes_sent, self.exchange.bytes_sent = self.exchange.bytes_sent, 0
        due = every and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
        if not due or trainer.barebones:
            return
        norms = reduced.rows[:, SQUARE].sqrt()
        values = {
            "norm_mean": norms.mean(),
            "norm_max": norms.max(),
            "norm_min": norms.min(),
            "nonfinite": reduced.rows[:, BAD].sum(),
            "bytes_sent": float(self.last_bytes_sent),
            "gradient_bytes": float(self.reducer.gradient_bytes),
            "operand_bytes": float(self.reducer.operand_bytes),
        }
        for name, value in values.items():
            number: Any = value.float() if isinstance(value, Tensor) else value
            self.module.log(f"segment/{name}", number, on_step=True, on_epoch=False, batch_size=1)

    def announce(self) -> None:
        """Say once who computes what."""
        lines = [f"worker {w}: segments {own.start} to {own.stop - 1}" for w, own in enumerate(self.exchange.owners)]
        kind = type(self.exchange).__name__
        if self.exchange.rank == 0:
            log.info("lightning_lrtt: %d segments over %s; %s", self.exchange.segments, kind, "; ".join(lines))
            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("segment/owners", "  \n".join([kind, *lines]), self.trainer.global_step)

    # -------------------------------------------------------------- end

    def fail(self) -> None:
        """Let the others know at once that this worker has an error."""
        self.exchange.fail()

    def close(self) -> None:
        """Let go of shared memory and groups."""
        self.exchange.close()


def _hash(result: Result) -> int:
    return hash64([result.loss, *result.gradients.values(), *result.buffers.values(), *result.logs.values()])


def _exchange(strategy: LRTTDDPStrategy) -> Exchange:
    segments, rank, workers = strategy.segments, strategy.global_rank, strategy.world_size
    device, wanted = strategy.root_device, strategy.exchange
    possible = workers > 1 and device.type == "cpu" and one_host()
    if wanted == "shared_memory" and workers > 1 and not possible:
        raise MisconfigurationException(
            "LRTTDDPStrategy: exchange='shared_memory' must have CPU workers on one Linux host, got "
            f"{workers} workers on {device.type}; use exchange='collectives' or 'auto'"
        )
    if possible and wanted != "collectives":
        try:
            return SharedMemoryExchange(segments, rank, workers, strategy.timeout)
        except NoSharedMemoryError as error:
            if wanted == "shared_memory":
                raise
            log.warning("lightning_lrtt: %s; taking collectives", error)
    return CollectiveExchange(segments, rank, workers, device, strategy.timeout)


# -------------------------------------------------------------- settings that the teardown takes back


def replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; returns what sets it back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def pin(threads: int) -> list[Callable[[], None]]:
    """Set the number of intra-op threads: Lightning's and torchrun's defaults follow the number of workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return [lambda: torch.set_num_threads(before)]


def deterministic_cuda() -> list[Callable[[], None]]:
    """Let torch use (or demand) algorithms that give the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    undo = [replace(torch.backends.cudnn, "benchmark", False), replace(torch.backends.cudnn, "deterministic", True)]
    if not torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True)
        undo.append(replace(torch.utils.deterministic, "fill_uninitialized_memory", False))
        undo.append(lambda: torch.use_deterministic_algorithms(False))
    return undo


@contextlib.contextmanager
def left_out_of_broadcasts(module: pl.LightningModule, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let torch's broadcast of module states leave out what every worker has read for itself."""
    read = {id(tensor) for tensor in tensors}
    named = (*module.named_parameters(), *module.named_buffers())
    target: Any = module  # the attribute is torch's
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    target._ddp_params_and_buffers_to_ignore = [*before, *(name for name, tensor in named if id(tensor) in read)]
    try:
        yield
    finally:
        target._ddp_params_and_buffers_to_ignore = before


def keep_metrics_local(module: pl.LightningModule) -> list[Callable[[], None]]:
    """Every worker validates everything, so adding up metric states over workers would count each sample several times."""
    return [replace(m, "sync_on_compute", False) for m in module.modules() if isinstance(m, Metric)]


def mark_training_loaders(trainer: pl.Trainer, strategy: LRTTDDPStrategy) -> Callable[[], None]:
    """Let the strategy know which loaders are the training's: Lightning hands it all of them alike."""
    loop: Any = trainer.fit_loop
    original = loop.setup_data

    def setup_data() -> None:
        strategy.start_loading()
        try:
            original()
        finally:
            strategy.loads_training_data = False

    loop.setup_data = setup_data
    return lambda: loop.__dict__.pop("setup_data", None)


def transfer_by_segment(module: pl.LightningModule) -> Callable[[], None]:
    """Call the user's ``on_before_batch_transfer`` for each segment."""
    original = module._on_before_batch_transfer

    def transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        if has_segments(batch):
            return map_segments(batch, lambda s: original(s, dataloader_idx))
        return original(batch, dataloader_idx)

    module._on_before_batch_transfer = transfer  # type: ignore[method-assign]  # of this instance only

    def undo() -> None:
        with contextlib.suppress(AttributeError):
            del module._on_before_batch_transfer

    return undo
