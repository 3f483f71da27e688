"""The ``lrtt_ddp`` strategy: data-parallel training whose bits do not depend on the number of workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed
from typing_extensions import override

from lightning_lrtt import _check
from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.strategies import segment_fit
from lightning_lrtt.strategies.restart import join_after_restart
from lightning_lrtt.strategies.segment_data import SegmentLoader, has_segments, map_segments
from lightning_lrtt.strategies.segment_fit import SegmentFit
from lightning_lrtt.strategies.segment_refuse import refuse
from lightning_lrtt.strategies.tiles import TileStrategy
from lightning_lrtt.strategies.tree import depth_of, owners
from lightning_lrtt.weights import Pretrained

log = logging.getLogger(__name__)


class LRTTDDPStrategy(TileStrategy, DDPStrategy):
    """Train on LR-TT tiles with any number of workers, with the same bits for every number.

    A global batch is ``segments`` fixed parts; each worker computes some of them, one after the other, and gradients are
    added along one fixed tree. ``batch_size`` of the training loader is the *global* batch, a multiple of ``segments``.
    Validation, test and prediction run whole on every worker. What is promised holds for the same hardware and build; see
    docs/segments.md.

    Args:
        config: The tiles' numbers. None: ``LRTTConfig()``.
        include: Globs of qualified layer names to convert; None: all.
        exclude: Globs of qualified layer names that stay digital.
        tile_lr_scale: Factor on the configured lr for tiles.
        on_nonfinite: As in `LRTTStrategy`, for operands of pulses.
        pretrained: As in `LRTTStrategy`. Every worker reads the file for itself and nothing that comes from it is sent; what
            a lazy mode has left is read before the first training step, in which replicas are compared.
        segments: 12, 144 or 1728; at least as many as workers. Part of the numbers.
        nonfinite: A segment whose loss or gradient is not finite: ``raise`` names step and segments (on GPUs when the next
            step begins), ``skip`` leaves it out of the mean on all workers, ``report`` only logs it.
        segment_clip: Largest norm of one segment's gradient, > 0; None: no limit.
        verify_every: Steps between comparisons of the replicas' hashes; 0: never.
        threads: Intra-op threads of every worker. Part of the numbers on CPUs, so it does not follow the worker count.
        exchange: ``shared_memory`` for CPU workers of one host, ``collectives`` for everything; ``auto`` takes shared memory
            where all workers can have it.
        self_test: In the first step of a fit let all workers compute segment 0 and compare it.
        timeout: Seconds that a worker may keep the others waiting, > 0.
        start_method: How Lightning starts workers.
        process_group_backend: Of torch.distributed; None: nccl for GPUs, gloo for CPUs.
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.

    Raises:
        ValueError: For numbers out of range.
        MisconfigurationException: At setup, for what would change the bits or could not be reduced by segment.

    Example:
        >>> LRTTDDPStrategy(segments=12, nonfinite="skip").segments
        12
    """

    strategy_name = "lrtt_ddp"

    def __init__(
        self,
        config: LRTTConfig | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        tile_lr_scale: float = 1.0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        pretrained: str | Pretrained | None = None,
        segments: int = 12,
        nonfinite: Literal["raise", "skip", "report"] = "raise",
        segment_clip: float | None = None,
        verify_every: int = 100,
        threads: int = 1,
        exchange: Literal["auto", "shared_memory", "collectives"] = "auto",
        self_test: bool = True,
        timeout: float = 600.0,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        me = "LRTTDDPStrategy"
        depth_of(segments)
        _check.choice(me, "nonfinite", nonfinite, ("raise", "skip", "report"))
        _check.choice(me, "exchange", exchange, ("auto", "shared_memory", "collectives"))
        _check.integer(me, "verify_every", verify_every, low=0)
        _check.integer(me, "threads", threads, low=1)
        _check.number(me, "timeout", timeout, above=0.0)
        if segment_clip is not None:
            _check.number(me, "segment_clip", segment_clip, above=0.0)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            start_method=start_method,
        )
        self._init_tiles(config, include, exclude, tile_lr_scale, on_nonfinite, pretrained)
        self.segments, self.nonfinite, self.segment_clip = segments, nonfinite, segment_clip
        self.verify_every, self.threads, self.exchange = verify_every, threads, exchange
        self.self_test, self.timeout = self_test, timeout
        self.seed = 0
        self.fit: SegmentFit | None = None
        self._batch_sizes: list[int] = []  # of the training loaders; kept for checkpoints after the fit
        self._saved: dict[str, Any] = {}  # of the checkpoint that the fit goes on from
        self._undo: list[Callable[[], None]] = []

    # -------------------------------------------------------------- start and end

    @override
    def setup_environment(self) -> None:
        self._undo += segment_fit.pin(self.threads)
        super().setup_environment()
        if self.root_device.type == "cuda":
            self._undo += segment_fit.deterministic_cuda()
        owners(self.segments, self.world_size)  # refuses too many workers
        trainer = self.lightning_module.trainer
        # Lightning would shuffle and cut the loaders by rank.
        self._undo.append(segment_fit.replace(trainer._accelerator_connector, "use_distributed_sampler", False))

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        backend, timeout = self._get_process_group_backend(), timedelta(seconds=self.timeout)
        join_after_restart(backend, self.global_rank, self.world_size, timeout, self.root_device)
        super().setup_distributed()  # leaves a group that exists as it is

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            refuse(self, trainer)
            given = os.environ.get("PL_GLOBAL_SEED")
            self.seed = int(self.broadcast(torch.initial_seed() if given is None else int(given)))
        super().setup(trainer)
        self._undo += segment_fit.keep_metrics_local(self.lightning_module)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._undo.append(segment_fit.mark_training_loaders(trainer, self))
        self._undo.append(segment_fit.transfer_by_segment(self.lightning_module))
        self.fit = SegmentFit(self, trainer)

    @override
    def _fill(self, trainer: pl.Trainer) -> None:
        if self.pretrained is None:
            return
        error: Exception | None = None
        try:
            super()._fill(trainer)
        except Exception as caught:  # told to the others, who would wait for this worker until their time is up
            error = caught
        if not self.reduce_boolean_decision(error is None):
            raise error or MisconfigurationException(
                f"LRTTDDPStrategy: pretrained must be readable by every worker, got {self.pretrained.path!r}, at which another "
                "worker failed; its own error says why"
            )

    @override
    def configure_ddp(self) -> None:
        # No wrapper: the exchange is ours. What every worker reads from the pretrained file is not sent.
        read = [] if self.pretrained is None else self.pretrained.tensors()
        with segment_fit.left_out_of_broadcasts(self.lightning_module, read):
            _sync_module_states(self.lightning_module)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.fit is not None
        if self.pretrained is not None and self.pretrained.tensors():
            self.pretrained.finish()  # a layer that only some workers call must have the same weights on all
            if self.world_size > 1:
                self.fit.compare_replicas(self.lightning_module.trainer.global_step, "pretrained weights")
        self.fit.announce()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.fit is not None:
            self.fit.fail()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self.fit is not None:
            self.fit.close()
            self.fit = None
        self._saved = {}
        while self._undo:
            self._undo.pop()()
        super().teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(cls.strategy_name, cls, description="LR-TT, the same bits for any number of workers")

    # -------------------------------------------------------------- data

    loads_training_data = False  # while Lightning prepares the training loaders, not those of validation

    def start_loading(self) -> None:
        """Called before Lightning prepares the training loaders (again)."""
        loop = self.lightning_module.trainer.fit_loop
        if loop._combined_loader is None or loop._should_reload_train_dl:
            self._batch_sizes = []
        self.loads_training_data = True

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if not self.loads_training_data:
            return dataloader
        loader = SegmentLoader(
            dataloader, self.segments, owners(self.segments, self.world_size)[self.global_rank], self.seed
        )
        saved = self._saved.get("batch_sizes", [])[len(self._batch_sizes) : len(self._batch_sizes) + 1]
        if saved and saved[0] != loader.batch_size:
            raise MisconfigurationException(
                f"LRTTDDPStrategy: batch_size must be the checkpoint's, {saved[0]}, got {loader.batch_size}; it is the global "
                "batch, which does not change with the number of workers"
            )
        self._batch_sizes.append(loader.batch_size)
        return loader

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        one = super().batch_to_device
        if not has_segments(batch):
            return one(batch, device, dataloader_idx)
        return map_segments(batch, lambda s: one(self.precision_plugin.convert_input(s), device, dataloader_idx))

    # -------------------------------------------------------------- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.fit is not None
        return self.fit.training_step(args, kwargs)

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: torch.optim.Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        # The segments' backward passes are done; now that Lightning has zeroed gradients the sum takes their place.
        assert self.fit is not None and self.lightning_module is not None
        self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.fit.install()
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    @override
    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.fit is not None
        self.fit.verify()
        return result

    @override
    def on_train_end(self) -> None:
        if self.fit is not None:
            self.fit.reducer.check()
        super().on_train_end()

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """What Lightning reduces has been reduced by segment, or computed whole by every worker: it is returned as it is."""
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        distributed.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    # -------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        if self.fit is not None:
            self.fit.reducer.check()  # a step that broke the parameters must not be what one resumes from
        if "optimizer_states" in checkpoint:
            checkpoint["lrtt_segments"] = {
                "segments": self.segments,
                "threads": self.threads,
                "seed": self.seed,
                "workers": self.world_size,
                "batch_sizes": list(self._batch_sizes),
                "self_test": self.fit.test_hash if self.fit is not None else None,
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get("lrtt_segments")
        if saved is None:
            log.info("lightning_lrtt: the checkpoint was not written by lrtt_ddp; from here on the run is segmented")
        else:
            for name, why in (
                ("segments", "another tree adds in another order"),
                ("threads", "matrix products add in another order"),
            ):
                if saved[name] != getattr(self, name):
                    raise MisconfigurationException(
                        f"LRTTDDPStrategy: {name} must be the checkpoint's, {saved[name]}, got {getattr(self, name)}; {why}"
                    )
            self.seed, self._saved = saved["seed"], dict(saved)
        super().load_optimizer_state_dict(checkpoint)
