"""The fixed tree of segments: who owns what, and in which order it is added. Pure integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from lightning_lrtt import _check

BASE = 12  # segments of one level
DEPTHS = (1, 2, 3)


@dataclass(frozen=True)
class Node:
    """The segments ``first`` to ``last - 1``, added as ``left + right``; a leaf is one segment."""

    first: int
    last: int
    left: Node | None = None
    right: Node | None = None

    @property
    def is_leaf(self) -> bool:
        """Whether it is a single segment."""
        return self.left is None


def depth_of(segments: int) -> int:
    """D with ``segments == 12**D``.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is no power of 12 up to 1728.
    """
    _check.integer("LRTTDDPStrategy", "segments", segments, low=1)
    for depth in DEPTHS:
        if segments == BASE**depth:
            return depth
    raise _check.fail(
        "LRTTDDPStrategy",
        "segments",
        "12, 144 or 1728",
        segments,
        "the tree adds pairs, quads and thirds of 12, level by level",
    )


@cache
def tree(segments: int) -> Node:
    """The tree of all segments: pairs, quads, ``(q0 + q1) + q2``; 12 such trees make the next level, the same way."""
    nodes = [Node(i, i + 1) for i in range(segments)]
    for _ in range(depth_of(segments)):
        nodes = [_twelve(nodes[i : i + BASE]) for i in range(0, len(nodes), BASE)]
    return nodes[0]


def _twelve(nodes: list[Node]) -> Node:
    pairs = [_join(nodes[i], nodes[i + 1]) for i in range(0, BASE, 2)]
    quads = [_join(pairs[i], pairs[i + 1]) for i in range(0, BASE // 2, 2)]
    return _join(_join(quads[0], quads[1]), quads[2])


def _join(left: Node, right: Node) -> Node:
    return Node(left.first, right.last, left, right)


@cache
def owners(segments: int, workers: int) -> tuple[range, ...]:
    """The consecutive segments of each worker; sizes differ by one at most.

    Raises:
        ValueError: If there are more workers than segments.

    Example:
        >>> [len(own) for own in owners(12, 5)]
        [3, 3, 2, 2, 2]
    """
    depth_of(segments)
    _check.integer("LRTTDDPStrategy", "workers", workers, low=1)
    if workers > segments:
        raise _check.fail(
            "LRTTDDPStrategy",
            "devices * num_nodes",
            f"at most the {segments} segments",
            workers,
            "use fewer workers, or segments=144",
        )
    share, more = divmod(segments, workers)
    ends = [0]
    for worker in range(workers):
        ends.append(ends[-1] + share + (worker < more))
    return tuple(range(first, last) for first, last in pairwise(ends))


@cache
def maximal_nodes(segments: int, own: range) -> tuple[Node, ...]:
    """The largest nodes whose segments all belong to ``own``, in order: what a worker ships.

    Example:
        >>> [(n.first, n.last) for n in maximal_nodes(12, range(0, 3))]
        [(0, 2), (2, 3)]
    """

    def walk(node: Node) -> Iterator[Node]:
        if own.start <= node.first and node.last <= own.stop:
            yield node
        elif node.left is not None and node.right is not None and node.first < own.stop and own.start < node.last:
            yield from walk(node.left)
            yield from walk(node.right)

    return tuple(walk(tree(segments)))


def sum_program(nodes: tuple[Node, ...]) -> list[int]:
    """The program of ``segment_sum_`` that makes ``nodes`` of their segments, pushed in order."""
    program: list[int] = []
    for node in nodes:
        leaves: list[int] = []
        _post_order(node, {(i, i + 1) for i in range(node.first, node.last)}, leaves)
        leaves[-1] += 1
        program += leaves
    return program


@cache
def root_program(segments: int, workers: int) -> tuple[int, ...]:
    """The program that makes the total of the nodes of all workers, pushed worker by worker."""
    shipped = {(n.first, n.last) for own in owners(segments, workers) for n in maximal_nodes(segments, own)}
    program: list[int] = []
    _post_order(tree(segments), shipped, program)
    program[-1] += 1
    return tuple(program)


def _post_order(node: Node, given: set[tuple[int, int]], program: list[int]) -> None:
    """Two for every addition, counted at the value pushed last before it."""
    if (node.first, node.last) in given:
        program.append(0)
        return
    assert node.left is not None and node.right is not None
    _post_order(node.left, given, program)
    _post_order(node.right, given, program)
    program[-1] += 2
