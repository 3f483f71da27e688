"""Validation loss and a sample before and after."""

from __future__ import annotations

import logging
import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from typing_extensions import override

log = logging.getLogger("lightning_lrtt.examples")


class BeforeAndAfter(Callback):
    """Logs the loss on the validation text and a continuation of ``prompt``, at the start and the end of training.

    Args:
        prompt: What is continued.
        length: By how many bytes.
        temperature: Of the sampling.
    """

    def __init__(self, prompt: str = "The statement ", length: int = 200, temperature: float = 0.7) -> None:
        self.prompt, self.length, self.temperature = prompt, length, temperature
        self.losses: dict[str, float] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prompt=self.prompt)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look("before", trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look("after", trainer, pl_module)

    @torch.no_grad()
    def _look(self, when: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        was_training = module.training
        module.eval()
        total = count = 0
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = batch.to(module.device)
            total += F.cross_entropy(
                module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
            count += batch[:, 1:].numel()
        loss = self.losses[when] = total / count
        generator = torch.Generator(module.device).manual_seed(0)
        tokens = torch.tensor([list(self.prompt.encode())], device=module.device)
        for _ in range(self.length):
            weights = (module(tokens[:, -128:])[:, -1] / self.temperature).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(weights, 1, generator=generator)], 1)
        text = bytes(tokens[0].tolist()).decode(errors="replace")
        log.info("%s: validation loss %.4f, %.3f bits a byte; sample:\n%s\n", when, loss, loss / math.log(2), text)
        module.train(was_training)
