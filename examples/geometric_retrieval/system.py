"""A particle that moves through a memory of embeddings: retrieval, velocity, curvature, and a metric to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from examples.geometric_retrieval.geometry import GivensRotor, diagonal
from lightning_lrtt import _check
from lightning_lrtt.free_nudged import States, System


@lru_cache(maxsize=8)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By function, not by system: a copy of a system must not go on stepping the original."""
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class _Context:
    """Frozen for a step. The candidates do not depend on the position, so they are turned and weighed once.

    Args:
        turn: R ``[n, n]``; the metric is ``R^T diag(g) R``.
        g: Diagonal ``[n]``.
        candidates: Prototypes, then the memory, turned by R ``[K, n]``.
        lengths: g-length of each candidate, squared ``[K]``.
        states: What each candidate stands for: one-hot classes ``[K, D]``.
        prototypes: Mean embedding of each class in the memory ``[D, n]``, not turned.
        barred: Infinite cost of empty slots and of the query's own entry ``[B, K]``, else 0.
    """

    turn: Tensor
    g: Tensor
    candidates: Tensor | None = None
    lengths: Tensor | None = None
    states: Tensor | None = None
    prototypes: Tensor | None = None
    barred: Tensor | None = None


class GeometricRetrieval(System):
    """Windows of retrieval steps; ``E = sum_t R_t sqrt(g(v_t, v_t) + eps)`` along the path is what two phases contrast.

    At each step the position q asks the candidates (class prototypes and the memory bank): with ``cost = R_sc
    sqrt(g(c - q, c - q) + eps)`` and ``w = softmax(-retrieval_beta cost)``, ``act = sum w state`` are the retrieved
    classes; q moves towards their prototypes with a shared momentum field. A nudge pulls towards the target's
    prototype. The contrast of the phases shortens the metric along the path that should have been taken and lengthens
    it along the one that was: ``dE/dg_i = sum_t R_t (R v_t)_i^2 / (2 spd_t)``.

    Hooks to override, keyword-only: `compute_R_sc`, `build_retrieval_batch`, `get_velocity`, `step_dynamics`.

    Args:
        n: Coordinates of an embedding.
        classes: D.
        eps: Under every square root.
        retrieval_beta: Sharpness of the softmax, > 0.
        rotor_k: Angles of the rotor.
        rotor_mode: ``on``, or ``off``: the metric stays diagonal.
        memory: Capacity of the bank.
        rate: Speed of approach, > 0.
        momentum: Share of the field in the velocity, in [0, 1).
        curvature: Strength of the scalar curvature.
        compiled: Whether a step goes through `torch.compile`, which fuses its 35 small operators; hooks that are
            overridden must suit it.

    Raises:
        ValueError: If a number is out of range.
    """

    clampable = False  # the retrieved classes are made anew in each step

    def __init__(
        self,
        n: int = 8,
        classes: int = 10,
        eps: float = 1e-8,
        retrieval_beta: float = 5.0,
        rotor_k: int = 6,
        rotor_mode: Literal["off", "on"] = "on",
        memory: int = 2048,
        rate: float = 0.05,
        momentum: float = 0.1,
        curvature: float = 0.1,
        compiled: bool = False,
    ) -> None:
        super().__init__(rate=rate)
        name = type(self).__name__
        _check.integer(name, "n", n, low=2)
        _check.integer(name, "classes", classes, low=2)
        _check.integer(name, "memory", memory, low=1)
        _check.number(name, "eps", eps, above=0.0)
        _check.number(name, "retrieval_beta", retrieval_beta, above=0.0)
        _check.number(name, "rate", rate, above=0.0)
        _check.number(name, "momentum", momentum, low=0.0, high=0.99)
        _check.number(name, "curvature", curvature, low=0.0)
        _check.choice(name, "rotor_mode", rotor_mode, ("off", "on"))
        self.n, self.classes, self.eps = n, classes, eps
        self.retrieval_beta, self.momentum, self.curvature = retrieval_beta, momentum, curvature
        self.g = nn.Parameter(torch.ones(n))
        self.rotor = GivensRotor(n, rotor_k)
        self.rotor.angles.requires_grad_(rotor_mode == "on")
        self.register_buffer("field", torch.zeros(n))
        self.register_buffer("keys", torch.zeros(memory, n))
        self.register_buffer("values", torch.zeros(memory, classes))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.compiled = compiled

    # -------------------------------------------------------------- hooks of the window

    def compute_R_sc(self, *, position: Tensor) -> Tensor:
        """Scalar curvature at the positions ``[B]``, >= 1: space is more expensive far from the origin."""
        r = position.square().sum(1)
        return 1.0 + self.curvature * r / (1.0 + r)

    def build_retrieval_batch(self, *, context: _Context, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turned query ``[B, n]``, turned candidates ``[K, n]`` and their states ``[K, D]``."""
        assert context.candidates is not None and context.states is not None
        return position @ context.turn.t(), context.candidates, context.states

    def get_velocity(self, *, context: _Context, position: Tensor, act: Tensor) -> Tensor:
        """Towards the prototypes of the retrieved classes, with the field's momentum ``[B, n]``."""
        assert context.prototypes is not None
        return act @ context.prototypes - position + self.momentum * self.field

    def step_dynamics(self, *, position: Tensor, velocity: Tensor) -> Tensor:
        """The next position. The shared field follows the mean velocity; it is registered and restored between
        phases.
        """
        self.field.lerp_(velocity.mean(0), self.rate)
        return position + self.rate * velocity

    # -------------------------------------------------------------- the protocol

    def registered(self) -> Mapping[str, Any]:
        """The field moves in a window; the memory is written after it."""
        return {"field": self.field}

    @torch.no_grad()
    def project(self) -> None:
        """Metric of trace n and in [0.01, 100], angles in [-pi, pi).

        Shorter paths are what every contrast asks for; the trace keeps it from answering with a smaller unit of length.
        """
        self.g.mul_(self.n / self.g.sum()).clamp_(0.01, 100.0)
        self.rotor.project()

    def prepare(self, *, x: Tensor, differentiable: bool) -> _Context:
        """The metric; without gradients also the candidates, once for all steps of all windows."""
        if differentiable:
            return _Context(self.rotor.matrix(), self.g)
        turn, g = self.rotor.matrix().detach(), self.g.detach()
        slots = torch.arange(len(self.keys), device=x.device) < self.written
        counts = self.values.sum(0)
        prototypes = (self.values.t() @ self.keys) / counts.clamp(min=1.0).unsqueeze(1)
        candidates = torch.cat([prototypes, self.keys]) @ turn.t()
        states = torch.cat([torch.eye(self.classes, dtype=x.dtype, device=x.device), self.values])
        empty = torch.cat([counts == 0, ~slots])
        own = (self.keys.unsqueeze(0) == x.unsqueeze(1)).all(-1)  # an embedding does not retrieve itself
        own = torch.cat([own.new_zeros(len(x), self.classes), own], 1)
        # Finite: while the memory is empty a softmax of infinities would be NaN.
        barred = (own | empty).to(x.dtype) * 1e4
        return _Context(turn, g, candidates, diagonal(candidates, g), states, prototypes, barred)

    def start(self, *, x: Tensor, context: _Context) -> States:
        """At the embedding, with an empty path."""
        b = len(x)
        return {
            "position": x,
            "act": x.new_zeros(b, self.classes),
            "speed": x.new_zeros(b),
            "path": x.new_zeros(b, 0, self.n),
            "curvature": x.new_zeros(b, 0),
            "lior": x.new_zeros(b, 0),
        }

    def window(
        self,
        *,
        x: Tensor,
        context: _Context,
        states: States,
        steps: int,
        target: Tensor | None,
        beta: Tensor | None,
        clamped: Tensor | None,
    ) -> States:
        """``steps`` retrieval steps; path, curvature and LIoR of each step are appended to the states."""
        position, act, speed = states["position"], states["act"], states["speed"]
        assert context.prototypes is not None
        velocities, curvatures, liors = [], [], []
        pull = None if beta is None or target is None else target @ context.prototypes
        one_step = _compiled(type(self)._step) if self.compiled else type(self)._step
        for _ in range(steps):
            position, act, velocity, r, spd = one_step(self, context, position, pull, beta)
            velocities.append(velocity)
            curvatures.append(r)
            liors.append(r * spd)
            speed = speed + spd
        return {
            "position": position,
            "act": act,
            "speed": speed,
            "path": torch.cat([states["path"], torch.stack(velocities, 1)], 1),
            "curvature": torch.cat([states["curvature"], torch.stack(curvatures, 1)], 1),
            "lior": torch.cat([states["lior"], torch.stack(liors, 1)], 1),
        }

    def _step(
        self, context: _Context, position: Tensor, pull: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The next position, and what was retrieved, the velocity, the curvature and the speed on the way."""
        assert context.lengths is not None and context.barred is not None
        r = self.compute_R_sc(position=position)
        q, candidates, kinds = self.build_retrieval_batch(context=context, position=position)
        weighed = q * context.g
        squared = torch.addmm(context.lengths, weighed, candidates.t(), alpha=-2.0) + (weighed * q).sum(1, keepdim=True)
        cost = r.unsqueeze(1) * (squared.clamp(min=0.0) + self.eps).sqrt() + context.barred
        act = torch.softmax(-self.retrieval_beta * cost, 1) @ kinds
        velocity = self.get_velocity(context=context, position=position, act=act)
        if pull is not None:
            assert beta is not None
            velocity = velocity + beta.view(-1, 1) * (pull - position)
        spd = (diagonal(velocity @ context.turn.t(), context.g) + self.eps).sqrt()
        return self.step_dynamics(position=position, velocity=velocity), act, velocity, r, spd

    def energy(self, *, x: Tensor, context: _Context, states: States) -> Tensor:
        """Length of the path, weighted by curvature ``[B]``; differentiable by the metric."""
        turned = states["path"] @ context.turn.t()
        return (states["curvature"] * (diagonal(turned, context.g) + self.eps).sqrt()).sum(1)

    def output(self, *, states: States) -> Tensor:
        """The retrieved classes ``[B, D]``."""
        return states["act"]

    def encode(self, *, target: Tensor) -> Tensor:
        """One-hot rows."""
        return (target.unsqueeze(1) == torch.arange(self.classes, device=target.device)).to(self.g.dtype)

    def cost(self, *, states: States, target: Tensor) -> Tensor:
        """Half the squared error of the retrieved classes, for the log; the nudge is a pull on the position."""
        return 0.5 * (states["act"] - target).square().sum(1)

    def commit(self, *, x: Tensor, states: States, target: Tensor) -> None:
        """Write the batch's embeddings and classes over the oldest entries, once a step."""
        slots = (self.written + torch.arange(len(x), device=x.device)) % len(self.keys)
        self.keys.index_copy_(0, slots, x)
        self.values.index_copy_(0, slots, target)
        self.written.add_(len(x))
