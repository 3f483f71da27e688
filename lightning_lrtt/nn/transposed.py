"""The tile of a layer that stores its weight as ``[in, out]``: `Conv1D` of Hugging Face transformers (GPT-2)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn.linear import LRTTLinear


def conv1d_class() -> type[nn.Module] | None:
    """``transformers.pytorch_utils.Conv1D`` if that module has been imported; otherwise no model can contain one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class LRTTTransposedLinear(LRTTLinear):
    """`LRTTLinear` for a digital layer whose weight is ``[in, out]``.

    The tile holds C as ``[out, in]`` like every other; conversion, digital checkpoints that are loaded by name, export
    and `to_digital` transpose.

    All arguments and shapes are those of `LRTTLinear`.

    Example:
        >>> import torch
        >>> layer = LRTTTransposedLinear(6, 4, config=LRTTConfig(rank=2))
        >>> state = {"weight": torch.ones(6, 4), "bias": torch.zeros(4)}  # a digital checkpoint
        >>> layer.load_state_dict(state)
        <All keys matched successfully>
        >>> layer.weight.shape
        torch.Size([4, 6])
    """

    transposed = True

    @property
    def nx(self) -> int:
        """Inputs, as Conv1D calls them."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Outputs, as Conv1D calls them."""
        return self.out_features

    @classmethod
    def from_digital(cls, linear: Any, config: LRTTConfig, tile: int | None = None) -> LRTTTransposedLinear:
        """Take over a Conv1D's weight and bias; both keep their Parameter identity, the weight is transposed in place.

        Bounded devices clip the weight.
        """
        inputs, outputs = linear.weight.shape
        new = cls(inputs, outputs, linear.bias is not None, config, "meta", linear.weight.dtype, tile)
        linear.weight.data = linear.weight.data.t().contiguous()
        linear.weight.grad = None  # of the other shape
        return new.adopt(linear)

    def to_digital(self) -> Any:
        """A Conv1D with the effective weight."""
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            new = Conv1D(self.out_features, self.in_features)
        new.weight = nn.Parameter(self.effective_weight().t().contiguous(), self.A.requires_grad)
        if self.bias is not None:  # a Conv1D always has one
            new.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return new.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = prefix + "weight"
        digital = not any(prefix + name in state_dict for name in ("A", "B", "tile_state"))
        if digital and weight in state_dict:
            state_dict = {**state_dict, weight: state_dict[weight].t()}
        super()._load_from_state_dict(state_dict, prefix, *args)
