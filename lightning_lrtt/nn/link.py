"""The way from a parameter of a tile to the module that owns it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lrtt.nn.tile import TileModule


class TileLink:
    """What ``parameter.tile`` is: a way from C, A or B to the module that owns them.

    It holds no strong reference and copies to nothing, so that deepcopy and pickle of a parameter do not drag the module
    along; the module sets the link anew whenever its parameters change.
    """

    __slots__ = ("_module",)

    def __init__(self, module: TileModule | None = None) -> None:
        self._module = weakref.ref(module) if module is not None else None

    @property
    def module(self) -> TileModule | None:
        """The owner, or None if it is gone."""
        return self._module() if self._module is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return (TileLink, ())
