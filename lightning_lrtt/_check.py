"""One way to say that an argument is wrong: what, the value, the rule, the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def fail(owner: str, name: str, rule: str, value: Any, remedy: str = "") -> ValueError:
    """Build the error of a refused argument; the caller raises it."""
    tail = f"; {remedy}" if remedy else ""
    return ValueError(f"{owner}: {name} must be {rule}, got {value!r}{tail}")


def number(
    owner: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    remedy: str = "",
) -> None:
    """Require a finite number with ``low <= value <= high`` and ``value > above``.

    Raises:
        TypeError: If ``value`` is no real number.
        ValueError: If it is outside the range or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if math.isfinite(value) and low <= value <= high and value > above:
        return
    bounds = [f"> {above:g}"] if above > -math.inf else []
    bounds += [f">= {low:g}"] if low > -math.inf else []
    bounds += [f"<= {high:g}"] if high < math.inf else []
    raise fail(owner, name, " and ".join(["finite", *bounds]), value, remedy)


def integer(owner: str, name: str, value: Any, *, low: int, high: int | None = None, remedy: str = "") -> None:
    """Require an ``int`` with ``low <= value <= high``.

    Raises:
        TypeError: If ``value`` is no integer.
        ValueError: If it is outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        rule = f">= {low}" if high is None else f"between {low} and {high}"
        raise fail(owner, name, rule, value, remedy)


def choice(owner: str, name: str, value: Any, options: Iterable[str], remedy: str = "") -> None:
    """Require one of ``options``.

    Raises:
        ValueError: If ``value`` is none of them.
    """
    options = tuple(options)
    if value not in options:
        raise fail(owner, name, "one of " + ", ".join(map(repr, options)), value, remedy)
