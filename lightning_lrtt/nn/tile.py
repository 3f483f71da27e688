"""The state of one tile and what every layer that owns one can do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lrtt import _check
from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn import identity
from lightning_lrtt.nn.analog import analog_read
from lightning_lrtt.nn.function import digital_read, is_latched, latched_read
from lightning_lrtt.nn.key import tile_key
from lightning_lrtt.nn.latch import Latch
from lightning_lrtt.nn.link import TileLink
from lightning_lrtt.nn.multiplication import Multiplication
from lightning_lrtt.ops import COUNTS, CYCLE, KEY, STATE_SIZE, A, B, C
from lightning_lrtt.ops.kernels import MAX_SAMPLES

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TileLink", "TileModule", "find_tiles", "tile_key"]

_CELLS = ("A_cells", "B_cells", "C_cells")  # buffers, by array


class TileModule(Multiplication):
    """Base of the LR-TT layers: parameters ``weight`` (C), ``A``, ``B``, the tile's counters and its latch.

    ``weight`` keeps the shape of the digital layer; as a matrix it is C ``[d, k]``. Subclasses say how the layer multiplies.

    Args:
        weight_shape: Shape of ``weight``; the first dimension is d, the others multiply to k.
        config: The tile's numbers.
        bias: Whether there is a digital bias ``[d]``.
        device: Where the tile lives.
        dtype: float32, or float64 if the tile is digital throughout.
        tile: Number of the tile, from which its random key is derived. None draws one from torch's default generator, so
            that ``seed_everything`` fixes it and equal layers differ.

    Raises:
        ValueError: If the rank exceeds min(d, k) or the tile has too many cells.
        TypeError: If the dtype does not suit the devices.
    """

    weight: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    tile_state: Tensor
    tile_counts: Tensor
    A_cells: Tensor | None  # what the cells hold beside the weight that is read: `cells`
    B_cells: Tensor | None
    C_cells: Tensor | None
    tile_reads: Tensor | None  # how often converters read the tile, in training and in evaluation
    transposed = False  # whether the digital layer stores its weight as [in, out]

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        config: LRTTConfig,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        d, k = weight_shape[0], int(torch.Size(weight_shape[1:]).numel())
        name = type(self).__name__
        _check.integer(name, "outputs", d, low=1)
        _check.integer(name, "inputs", k, low=1)
        if config.rank > min(d, k):
            raise _check.fail(
                name,
                "config.rank",
                f"at most min(d, k) = {min(d, k)}",
                config.rank,
                "lower the rank for this layer, or let convert_to_lrtt do it",
            )
        if d * k >= 2**32:
            raise _check.fail(name, "d * k", "below 2**32 cells", d * k, "split the layer")
        _check_dtype(name, dtype, config)
        self.config = config
        self.tile_shape = (d, k)
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype), requires_grad=False)
        self.A = nn.Parameter(torch.zeros(d, config.rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(config.rank, k, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._key = tile_key(config.seed, int(torch.randint(2**62, (), device="cpu")) if tile is None else tile)
        self.register_buffer("tile_state", self._fresh_state().to(device))
        self.register_buffer("tile_counts", _fresh_counts().to(device))
        for array, shape in ((A, self.A.shape), (B, self.B.shape), (C, self.tile_shape)):
            planes = self._planes(array)
            held = torch.zeros(planes, *shape, device=device) if planes else None
            self.register_buffer(_CELLS[array], held)  # None: nothing is stored
        reads = None if config.io is None else torch.zeros(2, dtype=torch.int64, device=device)
        self.register_buffer("tile_reads", reads)
        # Of the converters' noise: the number of a batch's first sample, and how many numbers a batch may take.
        self.first_sample, self.most_samples = 0, MAX_SAMPLES
        self.io_numbers = (
            () if config.io is None else (config.io.pack(), (config.io_backward or config.io).pack(backward=True))
        )
        self.output_scale: Tensor | None
        self.register_buffer("output_scale", None)  # `set_output_scale`; in the state dict only where there is one
        self.hyper = config.pack(k)
        self.latch = Latch()
        self._link()

    # -------------------------------------------------------------- state

    @property
    def matrix(self) -> Tensor:
        """C as the matrix ``[d, k]``, sharing memory with ``weight``."""
        return self.weight.detach().view(self.tile_shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A ``[d, r]`` and B ``[r, k]``, detached."""
        return self.A.detach(), self.B.detach()

    def _planes(self, array: int) -> int:
        device = self.config.visible_device if array == C else self.config.fast_device
        return device.planes if device is not None else 0

    def cells(self, *arrays: int) -> list[Tensor]:
        """What the cells of ``arrays`` hold beside the weight that is read, ``[planes, rows, columns]`` each.

        Only of arrays whose device needs it: the persistent weight under write noise, the two conductances of a pair. In
        the order in which the operators take it.
        """
        held = (getattr(self, _CELLS[array]) for array in arrays)
        return [cells for cells in held if cells is not None]

    def _fresh_state(self) -> Tensor:
        state = torch.zeros(STATE_SIZE, dtype=torch.int64)
        state[KEY] = self._key
        return state

    def adopt(self, digital: Any) -> Self:
        """Take over weight and bias of a digital layer, keeping their Parameter identity, with fresh factors."""
        device = digital.weight.device
        learns = digital.weight.requires_grad  # a frozen layer stays frozen
        self.weight = digital.weight.requires_grad_(False)
        self.bias = digital.bias
        self.A = nn.Parameter(torch.zeros_like(self.A, device=device), learns)
        self.B = nn.Parameter(torch.empty_like(self.B, device=device), learns)
        self.tile_state = self._fresh_state().to(device)
        self.tile_counts = _fresh_counts().to(device)
        for name in _CELLS:
            if (held := getattr(self, name)) is not None:
                setattr(self, name, torch.zeros_like(held, device=device))
        if self.tile_reads is not None:
            self.tile_reads = torch.zeros(2, dtype=torch.int64, device=device)
        self._link()
        self.write_visible()
        self.reset_factors()
        return self.train(digital.training)

    def to_digital(self) -> nn.Module:
        """A plain torch layer with the effective weight."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Start over: C and bias as in the digital layer, C clipped to its device, fresh factors and counters."""
        if self.weight.is_meta:
            return
        with torch.no_grad():
            self.tile_state.copy_(self._fresh_state())
            self.tile_counts.copy_(_fresh_counts())
            if self.tile_reads is not None:
                self.tile_reads.zero_()
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
            if self.bias is not None:
                bound = self.tile_shape[1] ** -0.5
                nn.init.uniform_(self.bias, -bound, bound)
        self.write_visible()
        self.reset_factors()

    def write_visible(self, values: Tensor | None = None) -> int:
        """Write C, clipped to the bounds of its device.

        Args:
            values: The weight to write, in any shape with d * k elements; None clips what is there.

        Returns:
            How many cells were clipped or stand at a bound; 0 on a digital C.
        """
        with torch.no_grad():
            if values is not None:
                self.weight.copy_(values.reshape(self.weight.shape))
            if self.config.visible_device is None or self.weight.is_meta:
                return 0
            return int(torch.ops.lrtt.clip_(self.matrix, self.tile_state, self.hyper, C, True, self.cells(C)))

    def reset_factors(self) -> None:
        """A = 0 and a fresh B: what follows an initialisation or a load of a digital weight."""
        if self.B.is_meta:
            return
        a, b = self.factors()
        torch.ops.lrtt.reinit_([a], [b], [self.tile_state], [self.hyper], self.cells(A, B))

    @torch.no_grad()
    def reset_cells(
        self, array: str = "C", columns: slice = slice(None), probability: float = 1.0, number: int = 0
    ) -> None:
        """Reset cells: each goes to its reset value (``reset``, ``reset_dtod``) with the noise ``reset_std``.

        Args:
            array: ``A``, ``B`` or ``C``.
            columns: Columns of that matrix, without a step.
            probability: Probability that a cell is reset; the cells of a pair are reset each on its own.
            number: Tells the resets of one optimizer step apart; equal numbers reset the same cells to the same values.

        Raises:
            ValueError: If the array has no device, or an argument is out of range.

        Example:
            >>> from lightning_lrtt import LRTTConfig, devices
            >>> from lightning_lrtt.nn import LRTTLinear
            >>> cell = devices.SoftBounds(reset=0.1, reset_std=0.0)
            >>> layer = LRTTLinear(3, 2, config=LRTTConfig(rank=1, visible_device=cell))
            >>> layer.reset_cells("C", slice(0, 2))
            >>> layer.weight[:, :2].flatten().tolist() == [0.10000000149011612] * 4
            True
        """
        name = type(self).__name__
        _check.choice(f"{name}.reset_cells", "array", array, "ABC")
        _check.number(f"{name}.reset_cells", "probability", probability, low=0.0, high=1.0)
        _check.integer(f"{name}.reset_cells", "number", number, low=0, high=2**32 - 1)
        which = "ABC".index(array)
        w = (*self.factors(), self.matrix)[which]
        first, last, step = columns.indices(w.shape[1])
        if step != 1:
            raise _check.fail(f"{name}.reset_cells", "columns", "a slice without a step", columns)
        torch.ops.lrtt.reset_cells_(
            w,
            self.tile_state,
            self.hyper,
            which,
            first,
            max(first, last),
            float(probability),
            number,
            self.cells(which),
        )

    def restart(self) -> int:
        """After a digital weight was written into C: clip it to its device, A = 0, fresh B, a new cycle.

        Returns:
            How many cells were clipped or stand at a bound.
        """
        at_bound = self.write_visible()
        with torch.no_grad():
            self.tile_state[CYCLE] += 1
        self.reset_factors()
        return at_bound

    def bounds(self) -> tuple[float, float]:
        """Mean lower and upper bound of the cells of C; infinite without a device."""
        device = self.config.visible_device
        if device is None:
            return -math.inf, math.inf
        numbers = device.numbers()
        return numbers["w_min"], numbers["w_max"]

    def materialize(self, device: torch.device) -> None:
        """Give a tile on the meta device memory, with fresh counters; C, A, B and bias are not initialised."""
        self.to_empty(device=device, recurse=False)
        with torch.no_grad():
            self.tile_state.copy_(self._fresh_state())
            self.tile_counts.copy_(_fresh_counts())
            if self.tile_reads is not None:
                self.tile_reads.zero_()

    def set_output_scale(self, scale: float | None) -> None:
        """Let the tile apply ``scale (C + alpha A B)``: so weights beyond the bounds of a device fit into it.

        The factors' gradients contain the scale. In a state dict it is the buffer ``output_scale``.

        Args:
            scale: Finite and > 0; None: no scale.
        """
        if scale is not None:
            _check.number(type(self).__name__, "output_scale", scale, above=0.0)
        self.output_scale = None if scale is None else self.weight.new_tensor(scale)

    def effective_weight(self) -> Tensor:
        """``C + alpha A B``, times the output scale, in the shape of ``weight``: the matrix that the layer applies."""
        a, b = self.factors()
        weight = torch.addmm(self.matrix, a, b, alpha=self.config.alpha).view(self.weight.shape)
        return weight if self.output_scale is None else weight * self.output_scale

    @torch.no_grad()
    def flush(self) -> None:
        """Transfer now, whatever the counter says; afterwards C alone is the model and A = 0.

        With tau != alpha the effective weight changes, as at every transfer.
        """
        a, b = self.factors()
        torch.ops.lrtt.transfer_(
            [a], [b], [self.matrix], [self.tile_state], [self.tile_counts], [self.hyper], [0], True, self.cells(A, B, C)
        )

    def counts(self) -> dict[str, int]:
        """The accumulators by name (see ``ops.COUNTS``). Reads from the device: not for a training step."""
        return dict(zip(COUNTS, self.tile_counts.tolist(), strict=True))

    # -------------------------------------------------------------- reading

    def read(self, x: Tensor) -> Tensor:
        """The layer's output for x, in a way that lets a pulsed tile latch its operands."""
        fused = self.output_scale is None and is_latched(self, x)
        y = latched_read(self, x, self.bias) if fused else self.multiply(x)
        return y if fused or self.bias is None else self.add_bias(y)

    def multiply(self, x: Tensor) -> Tensor:
        """`read` without the bias.

        The seam for rules that choose the operands of an update themselves, such as two-phase learning: backward through
        ``(d * tile.multiply(x)).sum()`` sends the tile the outer product ``d x^T`` and nothing else, latched on a pulsed
        tile, as ``p.grad`` of A and B on every tile.
        """
        y: Tensor
        if self.config.io is not None:
            y = analog_read(self, x)
        elif is_latched(self, x):
            y = latched_read(self, x)
        else:
            y = digital_read(self, x)
        return y if self.output_scale is None else y * self.output_scale.to(y.dtype)

    # -------------------------------------------------------------- links, copies, loading

    def _link(self, keep: bool = False) -> None:
        """Let the parameters find this module (``keep``: unless they belong to another one that lives), and lay them out
        as the kernels read them: ``.to(memory_format=torch.channels_last)`` permutes a kernel in memory.
        """
        link = TileLink(self)
        for parameter in (self.weight, self.A, self.B):
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
            old = getattr(parameter, "tile", None)
            if not (keep and isinstance(old, TileLink) and old.module is not None):
                parameter.tile = link  # type: ignore[method-assign, assignment]  # over Tensor.tile, for this parameter

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "latch": Latch()}  # operands of an unfinished step stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self._link(keep=True)  # copy.copy shares the parameters with the original

    def _apply(self, fn: Any, recurse: bool = True) -> TileModule:
        probe = torch.empty(0, dtype=self.A.dtype, device=self.A.device)
        _check_dtype(type(self).__name__, fn(probe).dtype, self.config)  # before anything is rounded
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self._link()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = [prefix + name for name in ("A", "B", "tile_state", "tile_counts", *_CELLS)]
        digital = prefix + "weight" in state_dict and not any(name in state_dict for name in own)
        described = state_dict.get(prefix + "_extra_state")
        if described is not None and (wrong := identity.disagreements(identity.decode(described), self.description())):
            error_msgs.append(
                f"{type(self).__name__} {prefix.removesuffix('.')!r}: the checkpoint's tile must be the module's, but "
                f"{'; '.join(wrong)}. Convert with the checkpoint's numbers, or load what `lrtt export` makes of it"
            )
            return
        if not digital and (prefix + "output_scale" in state_dict) != (self.output_scale is not None):
            self.set_output_scale(
                None if self.output_scale is not None else 1.0
            )  # an LR-TT checkpoint brings its own or none
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._link()
        # Digital or old; converters are no part of what a checkpoint must agree with.
        optional = (prefix + "_extra_state", prefix + "tile_reads")
        missing_keys[:] = [name for name in missing_keys if name not in optional]
        unexpected_keys[:] = [name for name in unexpected_keys if name != prefix + "tile_reads"]
        if digital:  # a digital checkpoint starts fresh factors
            missing_keys[:] = [name for name in missing_keys if name not in (*own, prefix + "output_scale")]
            if self.output_scale is not None and not self.weight.is_meta:
                with torch.no_grad():
                    self.weight.div_(self.output_scale)
            self.restart()

    def description(self) -> dict[str, Any]:
        """What a checkpoint must agree with: rank, alpha, devices and layout."""
        return identity.describe(self.config, self.transposed)

    def get_extra_state(self) -> Tensor:
        """`description` as a tensor, so that a checkpoint alone says what its C, A and B mean."""
        return identity.encode(self.description())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: loading compares it before anything is copied."""

    def extra_repr(self) -> str:
        """Shape and the numbers that differ from the defaults' meaning at a glance."""
        c = self.config
        devices = [type(x).__name__ if x else "digital" for x in (c.fast_device, c.visible_device)]
        return (
            f"{self.tile_shape[1]} -> {self.tile_shape[0]}, bias={self.bias is not None}, rank={c.rank}, "
            f"T={c.transfer_every} {c.transfer_unit}, A/B={devices[0]}, C={devices[1]}"
        )


def find_tiles(module: nn.Module) -> dict[str, TileModule]:
    """The LR-TT layers below ``module`` by qualified name, each once.

    Args:
        module: Any module, a tile too (its name is then empty).
    """
    return {name: child for name, child in module.named_modules() if isinstance(child, TileModule)}


def _fresh_counts() -> Tensor:
    counts = torch.zeros(len(COUNTS), dtype=torch.int64)
    counts[COUNTS["first_bad_step"]] = -1
    return counts


def _check_dtype(name: str, dtype: torch.dtype, config: LRTTConfig) -> None:
    single = config.fast_device is not None or config.visible_device is not None or config.io is not None
    allowed = (torch.float32,) if single else (torch.float32, torch.float64)
    if dtype not in allowed:
        names = " or ".join(str(t).removeprefix("torch.") for t in allowed)
        raise TypeError(
            f"{name}: dtype must be {names} {'on devices and behind converters' if single else ''}, got {dtype}; "
            "for half precision keep the tile in float32 and use autocast (precision='bf16-mixed')".replace("  ", " ")
        )
