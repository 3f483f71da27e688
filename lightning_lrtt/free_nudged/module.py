"""The LightningModule that trains a system by two phases under automatic optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lrtt import _check
from lightning_lrtt.free_nudged.engine import Outcome, TwoPhase, distance
from lightning_lrtt.free_nudged.estimator import Estimator
from lightning_lrtt.free_nudged.stats import PhaseStats
from lightning_lrtt.free_nudged.system import System, leaves_of

OBSERVABLES = ("cost_free", "cost_nudged", "residual_free", "residual_nudged", "phase_distance", "saturation", "beta")


class FreeNudgedModule(pl.LightningModule):
    """``training_step`` relaxes twice and returns a surrogate whose gradient is the estimator's; the rest is Lightning.

    Automatic optimisation, so clipping, accumulation, precision plugins, DDP and averaging work. Relaxation never calls
    ``backward`` and runs in the parameters' precision, also under mixed precision, where only those products of the
    surrogate are rounded that hold a difference of the phases. ``train/loss`` is the cost of the free states.
    Subclasses add metrics and ``configure_optimizers``; those that override ``setup``, ``on_train_batch_start``,
    ``optimizer_step`` or a hook of checkpoints call ``super()``. Checkpoints also hold what the system registered and no
    state dict contains: the states of its generators, and its plain tensors.

    Args:
        system: What relaxes, e.g. `HopfieldMLP`. Its layers may become tiles (``strategy="lrtt"``).
        estimator: How it is nudged; None: centered, beta 0.1.
        free_steps: T1.
        nudged_steps: T2.
        form: See `TwoPhase`.
        init: See `TwoPhase`. ``previous`` states are saved in checkpoints.
        nudge_from: See `TwoPhase`.
        tolerance: See `TwoPhase`.
        check_every: See `TwoPhase`.
        schedule: Beta as a function of the optimizer step, e.g. `DecayingBeta`; None: the estimator's beta.
        statistics: Record `OBSERVABLES` at every step, on the device; `FreeNudgedMonitor` switches it on.

    Raises:
        ValueError: As `TwoPhase`, at construction; also when a schedule leaves the stable range.
        TypeError: If a hook of the system has the wrong signature.
        MisconfigurationException: At setup, for ``form="direct"`` under mixed precision, and for a fit of parameters
            in half precision.

    Example:
        >>> from lightning_lrtt.free_nudged import HopfieldMLP
        >>> module = FreeNudgedModule(HopfieldMLP([4, 8, 3]), free_steps=10)
        >>> module(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    beta: Tensor

    def __init__(
        self,
        system: System,
        estimator: Estimator | None = None,
        free_steps: int = 20,
        nudged_steps: int = 4,
        form: Literal["difference", "direct"] = "difference",
        init: Literal["zeros", "previous"] = "zeros",
        nudge_from: Literal["free", "start"] = "free",
        tolerance: float | None = None,
        check_every: int = 5,
        schedule: Callable[[int], float] | None = None,
        statistics: bool = False,
    ) -> None:
        super().__init__()
        self.system = system
        self.engine = TwoPhase(
            system,
            estimator or Estimator(),
            free_steps,
            nudged_steps,
            form=form,
            init=init,
            nudge_from=nudge_from,
            tolerance=tolerance,
            check_every=check_every,
        )
        if schedule is not None and not self.estimator.divides:
            raise _check.fail("FreeNudgedModule", "schedule", "None for kind 'contrastive'", schedule, "it has no beta")
        self.schedule, self.statistics = schedule, statistics
        # An attribute that changes in every step with init="previous": whoever records steps sees that these are new
        # tensors each time, which a graph would not hand on.
        self.carried: Tensor | None = None
        self.stats = PhaseStats(OBSERVABLES)
        first = next(iter(system.parameters()))
        self.register_buffer("beta", torch.zeros((), dtype=first.dtype), persistent=False)
        self.set_step(0)

    @property
    def estimator(self) -> Estimator:
        """As given."""
        return self.engine.estimator

    # -------------------------------------------------------------- what a subclass may say

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch."""
        x, target = batch
        return x, target

    def forward(self, x: Tensor) -> Tensor:
        """Outputs after a free window."""
        return self.system.output(states=self.engine.free(x))

    # -------------------------------------------------------------- Lightning

    def setup(self, stage: str) -> None:
        """Refuse what cannot work before anything runs."""
        self.system.check()
        precision = str(self.trainer.precision)
        halves = sorted({str(p.dtype) for p in self.system.parameters() if p.dtype in (torch.float16, torch.bfloat16)})
        half = precision in ("16-true", "bf16-true") or precision.startswith("transformer-engine")
        if stage == "fit" and (half or halves):
            got = repr(precision) if half else f"{', '.join(halves)} in the system"
            raise MisconfigurationException(
                f"FreeNudgedModule: precision must keep float32 or float64 parameters, got {got}; relaxation runs in the "
                "parameters' precision, whose 8 to 11 bits would bury the difference of the phases; use 'bf16-mixed' or "
                "'16-mixed'"
            )
        if "mixed" in precision and self.engine.form == "direct":
            raise MisconfigurationException(
                f"FreeNudgedModule: form must be 'difference' under precision {precision!r}, got "
                "'direct'; "
                "products of whole states, rounded to 8 bits, would bury the difference of the phases"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Outside of what a CUDA graph replays: beta is a tensor that the windows read."""
        self.set_step(self.trainer.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The update, then parameters back to what is physical (`System.project`).

        Not in ``on_train_batch_end``: callbacks' hooks of that name run before the module's, so checkpoints and averages
        would hold what is not physical.
        """
        super().optimizer_step(*args, **kwargs)
        self.system.project()

    def set_step(self, step: int) -> None:
        """Set beta for an optimizer step: the schedule's value, with a drawn sign for ``random_sign``.

        Lightning calls it through ``on_train_batch_start``; loops of your own call it themselves.

        Raises:
            ValueError: If the schedule leaves the range in which the nudged energy has a minimum.
        """
        beta = self.estimator.beta
        if self.schedule is not None:
            beta = float(self.schedule(step))
            _check.number("FreeNudgedModule", f"schedule({step})", beta, above=0.0)
        self.estimator.check_range(*self.system.beta_range(), beta)
        if self.estimator.kind == "random_sign":  # the same in every process and after a resume
            beta *= 1 if np.random.SeedSequence([self.estimator.seed, step]).generate_state(1)[0] & 1 else -1
        self.beta.fill_(beta)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Free window, nudged windows, surrogate."""
        x, target = self.unpack(batch)
        outcome = self.engine.run(x, target, self.beta, self.statistics)
        if self.statistics:
            self._record(outcome)
        if self.engine.init == "previous":
            self.carried = self.system.output(states=outcome.free)
        if self._trainer is not None:
            self.log("train/loss", outcome.cost, batch_size=len(x))
        return self.engine.surrogate(x, outcome, self.beta)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the cost of the free states."""
        x, target = self.unpack(batch)
        states = self.engine.free(x)
        cost = self.system.cost(states=states, target=self.system.encode(target=target)).mean()
        self.log("val/loss", cost, batch_size=len(x))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the states that the next batch starts from, and registered state that is in no state dict."""
        if self.engine.previous is not None:
            checkpoint["free_nudged_states"] = dict(self.engine.previous)
        if registered := self._beside_state_dict():
            checkpoint["free_nudged_registered"] = {
                name: value.get_state() if isinstance(value, torch.Generator) else value.detach().clone()
                for name, value in registered.items()
            }

    @torch.no_grad()
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from them; a checkpoint that has none leaves everything as it is.

        Raises:
            ValueError: If a registered tensor has another shape than the checkpoint's.
        """
        states = checkpoint.get("free_nudged_states")
        if states is not None and self.engine.init == "previous":
            self.engine.previous = dict(states)  # on any device: the module may not have been moved to its own yet
        saved = checkpoint.get("free_nudged_registered", {})
        for name, value in self._beside_state_dict().items():
            if name not in saved:
                continue
            if isinstance(value, torch.Generator):
                self._go_on(name, value, saved[name].cpu())
            elif value.shape != saved[name].shape:
                raise _check.fail(
                    "FreeNudgedModule",
                    f"registered {name!r}",
                    f"of the checkpoint's shape {list(saved[name].shape)}",
                    list(value.shape),
                    "build the system with the numbers that it was trained with",
                )
            else:
                value.copy_(saved[name])

    @staticmethod
    def _go_on(name: str, generator: torch.Generator, state: Tensor) -> None:
        """From where the checkpoint's generator stood; those of other kinds of devices have states of other sizes."""
        if state.shape == generator.get_state().shape:
            generator.set_state(state)
        else:
            rank_zero_warn(
                f"FreeNudgedModule: the checkpoint's generator {name!r} must be of the kind of {generator.device}, got "
                "one of another device; its draws go on from the system's own seed, not from the checkpoint"
            )

    def _beside_state_dict(self) -> dict[str, Tensor | torch.Generator]:
        """Registered generators and the registered tensors that the state dict does not hold, by name."""
        found = dict(leaves_of(self.system.registered()))
        if not found:
            return {}
        held = {
            value.untyped_storage().data_ptr()
            for value in self.system.state_dict(keep_vars=True).values()
            if isinstance(value, Tensor) and value.numel()
        }
        return {
            name: value
            for name, value in found.items()
            if isinstance(value, torch.Generator) or value.untyped_storage().data_ptr() not in held
        }

    @torch.no_grad()
    def _record(self, outcome: Outcome) -> None:
        nudged = next(p for p in outcome.phases if p.states is not outcome.free)
        states = {name: s.real if s.is_complex() else s for name, s in nudged.states.items()}
        assert outcome.residuals is not None
        self.stats.record(
            [
                outcome.cost,
                self.system.cost(states=states, target=outcome.target).mean(),
                *outcome.residuals.unbind(),
                distance(states, outcome.free),
                self.system.saturation(outcome.free),
                self.beta,
            ]
        )
