"""Convolutions on a tile: C is the unfolded kernel ``[out, in * kernel]``, one sample per output position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lrtt import _check
from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn.tile import TileModule
from lightning_lrtt.ops.schema import BLOCK_SAMPLES

# Elements of one unfolded chunk: 16 MiB of float32. Chunks hold whole blocks of samples, so the size is not
# part of the numbers.
_CHUNK_ELEMENTS = 2**22


class _LRTTConv(TileModule):
    """What both convolutions share; ``ndim`` spatial dimensions."""

    ndim: int
    digital_class: ClassVar[Callable[..., nn.Conv1d | nn.Conv2d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        config: LRTTConfig = LRTTConfig(),  # noqa: B008
        device: Any = None,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
    ) -> None:
        # The digital layer on meta parses and checks the geometry exactly as torch does.
        geometry = self.digital_class(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, "meta"
        )
        name = type(self).__name__
        if groups != 1:
            raise _check.fail(name, "groups", "1", groups, "keep a grouped convolution digital")
        if padding_mode != "zeros":
            raise _check.fail(name, "padding_mode", "'zeros'", padding_mode, "pad before the layer with F.pad")
        super().__init__(tuple(geometry.weight.shape), config, bias, device, dtype, tile)
        self.in_channels, self.out_channels, self.groups, self.padding_mode = in_channels, out_channels, 1, "zeros"
        self.kernel_size, self.stride, self.dilation = geometry.kernel_size, geometry.stride, geometry.dilation
        self.padding = geometry.padding
        if self.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(self.dilation, self.kernel_size, strict=True)
        ):
            raise _check.fail(
                name, "padding", "symmetric", "same", "an even kernel pads one side more; pad before the layer"
            )
        self._pads = tuple(
            {"valid": 0, "same": d * (k - 1) // 2}[self.padding] if isinstance(self.padding, str) else self.padding[i]
            for i, (d, k) in enumerate(zip(self.dilation, self.kernel_size, strict=True))
        )
        self.reset_parameters()

    @classmethod
    def from_digital(cls, conv: nn.Conv1d | nn.Conv2d, config: LRTTConfig, tile: int | None = None) -> Any:
        """Take over ``conv``'s kernel and bias; both keep their Parameter identity. Bounded devices clip the kernel."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            config,
            "meta",
            conv.weight.dtype,
            tile,
        )
        return new.adopt(conv)

    def to_digital(self) -> Any:
        """A plain convolution with the effective kernel."""
        new = self.digital_class(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            1,
            self.bias is not None,
            "zeros",
            "meta",
            self.weight.dtype,
        )
        new.weight = nn.Parameter(self.effective_weight(), self.A.requires_grad)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; an input without batch dimension is a batch of one."""
        if x.dim() == self.ndim + 1:
            return self.read(x.unsqueeze(0)).squeeze(0)
        return self.read(x)

    def _kernel(self, w: Tensor) -> Tensor:
        return w.view(-1, self.in_channels, *self.kernel_size)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, spatial: bool = True) -> Tensor:
        convolve: Callable[..., Tensor] = F.conv1d if self.ndim == 1 else F.conv2d
        if not spatial:
            return convolve(x, kernel, bias)
        return convolve(x, kernel, bias, self.stride, self._pads, self.dilation)

    def _convolve_backward(
        self, grad: Tensor, x: Tensor, kernel: Tensor, needs: tuple[bool, bool], spatial: bool = True
    ) -> Any:
        n = self.ndim
        stride, pads, dilation = (self.stride, self._pads, self.dilation) if spatial else ([1] * n, [0] * n, [1] * n)
        by_x, by_w, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, stride, pads, dilation, False, [0] * n, 1, [*needs, False]
        )
        return by_x, by_w

    def project(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._convolve(x, self._kernel(w), bias)

    def project_backward(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        by_x, by_w = self._convolve_backward(grad, x, self._kernel(w), needs)
        return by_x, None if by_w is None else by_w.reshape(by_w.shape[0], -1)

    def _pointwise(self, a: Tensor) -> Tensor:
        return a.view(*a.shape, *[1] * self.ndim)

    def mix(self, z: Tensor, a: Tensor) -> Tensor:
        return self._convolve(z, self._pointwise(a), spatial=False)

    def mix_backward(self, grad: Tensor, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        by_z, by_a = self._convolve_backward(grad, z, self._pointwise(a), (True, True), spatial=False)
        return by_z, by_a.view_as(a), None

    def add_bias(self, y: Tensor) -> Tensor:
        assert self.bias is not None
        return y + self.bias.to(y.dtype).view(-1, *[1] * self.ndim)

    def bias_gradient(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad.sum((0, *range(2, grad.dim())), dtype=dtype)

    def samples(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2).reshape(-1, features.shape[1])

    def _output_size(self, x: Tensor) -> list[int]:
        return [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x.shape[2:], self._pads, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]

    def _positions(self, x: Tensor) -> int:
        return math.prod(self._output_size(x))

    def _geometry(self) -> list[Any]:
        """Kernel, dilation, padding and stride as F.unfold takes them: in one dimension, of an image one high."""
        if self.ndim == 1:
            return [(1, self.kernel_size[0]), (1, self.dilation[0]), (0, self._pads[0]), (1, self.stride[0])]
        return [self.kernel_size, self.dilation, self._pads, self.stride]

    def _unfold(self, x: Tensor) -> Tensor:
        """``[batch * positions, k]``."""
        columns = F.unfold(x.unsqueeze(2) if self.ndim == 1 else x, *self._geometry())
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])

    def chunks(self, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        positions = self._positions(x)
        images = max(_CHUNK_ELEMENTS // (positions * self.tile_shape[1]), 1)
        for first in range(0, x.shape[0], images):
            piece = x[first : first + images]
            yield first * positions, piece, self._unfold(piece)

    def unsamples(self, rows: Tensor, x: Tensor) -> Tensor:
        features = rows.shape[1]
        return rows.view(x.shape[0], -1, features).transpose(1, 2).reshape(x.shape[0], features, *self._output_size(x))

    def fold(self, rows: Tensor, x: Tensor) -> Tensor:
        columns = rows.view(x.shape[0], -1, rows.shape[1]).transpose(1, 2)
        size = x.shape[2:] if self.ndim == 2 else (1, x.shape[2])
        return F.fold(columns, size, *self._geometry()).view(x.shape)

    def patches(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        positions, k = self._positions(x), self.tile_shape[1]
        total = x.shape[0] * positions
        chunk = max(_CHUNK_ELEMENTS // k // BLOCK_SAMPLES, 1) * BLOCK_SAMPLES
        for first in range(0, total, chunk):
            last = min(first + chunk, total)
            image, end = first // positions, -(-last // positions)
            rows = self._unfold(x[image:end])
            yield first, rows[first - image * positions : last - image * positions]


class LRTTConv1d(_LRTTConv):
    """`torch.nn.Conv1d` on an LR-TT tile, whose C is the unfolded kernel; one sample is one output position.

    A digital tile never unfolds: B is a convolution with r outputs, A a 1x1 convolution. A pulsed update unfolds its input in
    chunks of bounded size.

    Args:
        in_channels: Input channels.
        out_channels: Output channels, d.
        kernel_size: As in `torch.nn.Conv1d`; k is ``in_channels`` times its elements.
        stride: As in `torch.nn.Conv1d`.
        padding: As in `torch.nn.Conv1d`, but ``same`` must be symmetric (odd kernels).
        dilation: As in `torch.nn.Conv1d`.
        groups: 1.
        bias: Whether there is a digital bias.
        padding_mode: ``zeros``.
        config: The tile's numbers.
        device: Torch device.
        dtype: float32; float64 for tiles that are digital throughout.
        tile: See `TileModule`.

    Raises:
        ValueError: If groups, the padding mode or the padding is another, or the rank exceeds min(d, k).

    Shape:
        input ``[N, in, L]`` or ``[in, L]``, output as `torch.nn.Conv1d`; weight ``[out, in, kernel]``, A ``[out, r]``,
        B ``[r, in * kernel]``.

    Example:
        >>> import torch
        >>> LRTTConv1d(2, 4, 3, padding=1, config=LRTTConfig(rank=2))(torch.zeros(1, 2, 5)).shape
        torch.Size([1, 4, 5])
    """

    ndim = 1
    digital_class = nn.Conv1d


class LRTTConv2d(_LRTTConv):
    """`torch.nn.Conv2d` on an LR-TT tile, whose C is the unfolded kernel; one sample is one output position.

    A digital tile never unfolds: B is a convolution with r outputs, A a 1x1 convolution. A pulsed update unfolds its input in
    chunks of bounded size.

    Args:
        in_channels: Input channels.
        out_channels: Output channels, d.
        kernel_size: As in `torch.nn.Conv2d`; k is ``in_channels`` times its elements.
        stride: As in `torch.nn.Conv2d`.
        padding: As in `torch.nn.Conv2d`, but ``same`` must be symmetric (odd kernels).
        dilation: As in `torch.nn.Conv2d`.
        groups: 1.
        bias: Whether there is a digital bias.
        padding_mode: ``zeros``.
        config: The tile's numbers.
        device: Torch device.
        dtype: float32; float64 for tiles that are digital throughout.
        tile: See `TileModule`.

    Raises:
        ValueError: If groups, the padding mode or the padding is another, or the rank exceeds min(d, k).

    Shape:
        input ``[N, in, H, W]`` or ``[in, H, W]``, output as `torch.nn.Conv2d`; weight ``[out, in, kh, kw]``, A ``[out, r]``,
        B ``[r, in * kh * kw]``.

    Example:
        >>> import torch
        >>> LRTTConv2d(1, 4, 3, config=LRTTConfig(rank=2))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """

    ndim = 2
    digital_class = nn.Conv2d
