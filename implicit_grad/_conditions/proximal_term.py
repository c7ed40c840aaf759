"""The proximal term ½ (φ − θ)ᵀΛ(φ − θ): its value, its gradient, and what it adds to F and A."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_grad._theorem.linearization import Stationarity
from implicit_grad._torch import pytree
from implicit_grad._torch.graph import leaves_behind
from implicit_grad._torch.pytree import Tensors


class ProximalTerm(NamedTuple):
    """Λ spread over the leaves of θ: a weight for each, and U's part for each if it has one."""

    weights: tuple[Tensor, ...]
    factors: tuple[Tensor, ...] = ()

    def of(self, kept: Sequence[int]) -> ProximalTerm:
        """The pull on some of the leaves only."""
        return ProximalTerm(
            tuple(self.weights[i] for i in kept),
            tuple(self.factors[i] for i in kept if self.factors),
        )

    def detached(self) -> ProximalTerm:
        """This term with weights and factors cut off from their graph."""
        own = {id(t): t.detach() for part in self for t in part}  # what was one tensor stays one
        return ProximalTerm(*(tuple(own[id(t)] for t in part) for part in self))

    def term(self, phi: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
        """½ (φ − θ)ᵀΛ(φ − θ)."""
        away = [p - t for p, t in zip(phi, theta, strict=True)]
        terms = [(w * d**2).sum() for w, d in zip(self.weights, away, strict=True)]
        if self.factors:
            terms.append(self._coordinates(away).square().sum())
        return torch.stack(terms).sum() / 2

    def along_factors(self, away: Sequence[Tensor]) -> list[Tensor]:
        """U Uᵀ(φ − θ)."""
        coordinates = self._coordinates(away)
        return [factor @ coordinates for factor in self.factors]

    def stationarity(
        self,
        slope: Tensors,
        phi: Sequence[Tensor],
        theta: Sequence[Tensor],
        slots: Sequence[int] | None = None,
    ) -> Stationarity:
        """F = slope + Λ(φ − θ); φ[slots[i]] is what θ[i] holds back."""
        slots = range(len(theta)) if slots is None else slots
        places = list(zip(slots, self.weights, theta, strict=True))
        scale: dict[int, Tensor] = {}
        for slot, weight, _ in places:
            # tied weights are linear_part at by every θ that stands in their places
            scale[slot] = scale[slot] + weight if slot in scale else weight
        linear_part: list[Tensor] = []
        if self.factors:
            linear_part = [torch.zeros_like(p) for p in phi]
            along = self.along_factors([phi[slot] - t for slot, _, t in places])
            for slot, part in zip(slots, along, strict=True):
                linear_part[slot] = linear_part[slot] + part

        def residual() -> Tensors:
            sums = list(map(torch.add, slope, linear_part) if linear_part else slope)
            for slot, weight, t in places:
                sums[slot] = sums[slot] + weight * (phi[slot] - t)
            return tuple(sums)

        anchors: dict[int, tuple[int, Tensor]] = {}
        if not (self.factors or any(w.requires_grad for w in self.weights)):
            anchors = {id(t): (slot, weight) for slot, weight, t in places}
        entangled = len(anchors) < len(places) or anchors.keys() & {
            id(t) for t in leaves_behind(slope)
        }
        scales = tuple(scale[i] for i in range(len(slope)))
        start = {slot: t for slot, _, t in places}
        starts = tuple(start[i] for i in range(len(slope)))
        anchors = {} if entangled else anchors
        return Stationarity(residual, tuple(linear_part), scales, anchors, starts)

    def _coordinates(self, away: Sequence[Tensor]) -> Tensor:
        """Uᵀ(φ − θ)."""
        parts = [
            torch.tensordot(d, u, dims=d.dim()) for d, u in zip(away, self.factors, strict=True)
        ]
        return torch.stack(parts).sum(0)


class ProximalSteps:
    """Gradient steps from anywhere, for as long as λ and θ do not change.

    Steps of the same length as the one before share what does not depend on φ.
    """

    def __init__(self, pull: ProximalTerm, theta: Tensors) -> None:
        self._pull, self._theta = pull, theta
        self._lr: float | None = None
        self._shares: list[Tensor] = []  # λ·lr for each tensor

    @torch.no_grad()
    def __call__(self, phi: Tensors, slope: Sequence[Tensor | None], lr: float) -> Tensors:
        """φ − lr (slope + Λ(φ − θ)), without a graph; None is a slope of 0."""
        if not phi:
            return ()
        if lr != self._lr:
            self._lr, self._shares = lr, self._shares_of(lr)
        moved = torch._foreach_lerp(phi, self._theta, self._shares)
        if self._pull.factors:
            along = self._pull.along_factors(torch._foreach_sub(phi, self._theta))
            torch._foreach_sub_(moved, along, alpha=lr)
        moving = [(p, g) for p, g in zip(moved, slope, strict=True) if g is not None]
        torch._foreach_sub_([p for p, _ in moving], [g for _, g in moving], alpha=lr)
        return tuple(moved)

    def _shares_of(self, lr: float) -> list[Tensor]:
        distinct = {id(w): w for w in self._pull.weights}
        share = {i: w * lr for i, w in distinct.items()}  # one product for one λ
        weights = zip(self._pull.weights, self._theta, strict=True)
        return [share[id(w)].to(t.dtype) for w, t in weights]


@dataclasses.dataclass(frozen=True)
class ProximalObjective:
    """φ ↦ loss(φ) + ½ (φ − θ)ᵀΛ(φ − θ); `theta` are the leaves of θ.

    A function like any other, which our own minimisers take apart: the gradient of the second part
    needs no graph.
    """

    loss: Callable[[Any], Tensor]
    pull: ProximalTerm
    theta: Tensors

    def __call__(self, phi: Any) -> Tensor:
        return self.loss(phi) + self.pull.term(pytree.leaves(phi), self.theta)

    @functools.cached_property
    def steps(self) -> ProximalSteps:
        """Gradient steps, from the gradient of the loss alone."""
        return ProximalSteps(self.pull, self.theta)

    def slope(self, phi: Tensors, of_loss: Tensors) -> Tensors:
        """The gradient at φ, from that of the loss."""
        with torch.no_grad():
            away = torch._foreach_sub(phi, self.theta)
            pulls = torch._foreach_mul(away, self.pull.weights)
            if self.pull.factors:
                torch._foreach_add_(pulls, self.pull.along_factors(away))
            return tuple((g + p).to(g.dtype) for g, p in zip(of_loss, pulls, strict=True))
