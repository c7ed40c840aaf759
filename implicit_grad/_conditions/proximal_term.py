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
from implicit_grad._torch.foreach import add_, added, lerp_, multiplied, subtracted
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
            terms.append(self.coordinates(away).square().sum())
        return torch.stack(terms).sum() / 2

    def along_factors(self, away: Sequence[Tensor]) -> list[Tensor]:
        """U Uᵀ(φ − θ)."""
        coordinates = self.coordinates(away)
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
            # a tied weight is pulled by every θ that stands in one of its places
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

    def coordinates(self, away: Sequence[Tensor]) -> Tensor:
        """Uᵀ(φ − θ)."""
        parts = [
            torch.tensordot(d, u, dims=d.dim()) for d, u in zip(away, self.factors, strict=True)
        ]
        return torch.stack(parts).sum(0)


@torch.no_grad()
def gradient_step(phi: Tensors, slope: Sequence[Tensor | None], lr: float) -> Tensors:
    """φ + (−lr·slope), rounded twice as MAML does it, and without a graph; None is a slope of 0."""
    moving = [(p, g) for p, g in zip(phi, slope, strict=True) if g is not None]
    if not moving:
        return tuple(p.detach().clone() for p in phi)
    moved = multiplied([g for _, g in moving], -lr)
    add_(moved, [p for p, _ in moving])
    there = iter(moved)
    pairs = zip(phi, slope, strict=True)
    return tuple(p.detach().clone() if g is None else next(there) for p, g in pairs)


def _free_step(phi: Tensors, slope: Sequence[Tensor | None], lr: float) -> Tensors:
    """φ − lr·slope in one pass, but for the last bit as `gradient_step`."""
    if any(g is None for g in slope):
        return gradient_step(phi, slope, lr)
    return added(phi, [g for g in slope if g is not None], -lr)


class ProximalSteps:
    """Proximal gradient steps from anywhere, for as long as λ and θ do not change.

    φ⁺ = argmin slope·φ⁺ + ‖φ⁺ − φ‖²/(2 lr) + ½ (φ⁺ − θ)ᵀΛ(φ⁺ − θ) rests where slope + Λ(φ − θ) = 0,
    as a gradient step on the sum would, and is stable for every Λ (Parikh and Boyd, 2014, Proximal
    Algorithms, 4.2). With E = I + lr·diag(λ), and U Uᵀ by the Woodbury identity,

        φ⁺ − θ = (E + lr·U Uᵀ)⁻¹ (φ − lr·slope − θ).

    Steps of the same length as the one before share what does not depend on φ.
    """

    def __init__(self, pull: ProximalTerm, theta: Tensors) -> None:
        self._pull, self._theta = pull, theta
        self._lr: float | None = None
        self._shares: list[Tensor] = []  # of θ in φ⁺, 1 − E⁻¹, for each tensor
        self._along: tuple[list[Tensor], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, phi: Tensors, slope: Sequence[Tensor | None], lr: float) -> Tensors:
        """φ⁺, without a graph; None is a slope of 0."""
        if not phi:
            return ()
        if lr != self._lr:
            self._lr, self._shares, self._along = lr, self._shares_of(lr), self._along_of(lr)
        moved = _free_step(phi, slope, lr)
        lerp_(moved, self._theta, self._shares)
        if self._along is not None:
            factors, inverse = self._along
            away = subtracted(moved, self._theta)
            coordinates = inverse @ self._pull.coordinates(away)
            add_(moved, [factor @ coordinates for factor in factors], -1.0)
        return moved

    def _shares_of(self, lr: float) -> list[Tensor]:
        shares: dict[tuple[int, torch.dtype], Tensor] = {}  # one for one λ
        for weight, theta in zip(self._pull.weights, self._theta, strict=True):
            if (id(weight), theta.dtype) not in shares:
                scaled = weight * lr
                shares[id(weight), theta.dtype] = (scaled / (1 + scaled)).to(theta.dtype)
        return [
            shares[id(w), t.dtype] for w, t in zip(self._pull.weights, self._theta, strict=True)
        ]

    def _along_of(self, lr: float) -> tuple[list[Tensor], Tensor] | None:
        """E⁻¹U and (I/lr + UᵀE⁻¹U)⁻¹."""
        if not self._pull.factors:
            return None
        pairs = list(zip(self._pull.factors, self._pull.weights, strict=True))
        scaled = [u / (1 + lr * w.expand(u.shape[:-1])).unsqueeze(-1) for u, w in pairs]
        both = zip(self._pull.factors, scaled, strict=True)
        gram = torch.stack([u.flatten(0, -2).T @ s.flatten(0, -2) for u, s in both]).sum(0)
        matrix = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / lr
        return scaled, torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L)


@dataclasses.dataclass(frozen=True)
class ProximalObjective:
    """φ ↦ loss(φ) + ½ (φ − θ)ᵀΛ(φ − θ); `theta` are the leaves of θ, as reals.

    A function like any other, which our own minimisers take apart: the gradient of the second part
    needs no graph.
    """

    loss: Callable[[Any], Tensor]
    pull: ProximalTerm
    theta: Tensors

    def __call__(self, phi: Any) -> Tensor:
        return self.loss(phi) + self.pull.term(pytree.reals(phi), self.theta)

    @functools.cached_property
    def steps(self) -> ProximalSteps:
        """Gradient steps, from the gradient of the loss alone."""
        return ProximalSteps(self.pull, self.theta)

    def slope(self, phi: Tensors, of_loss: Tensors) -> Tensors:
        """The gradient at φ, from that of the loss."""
        with torch.no_grad():
            away = subtracted(phi, self.theta)
            pulls = multiplied(away, self.pull.weights)
            if self.pull.factors:
                add_(pulls, self.pull.along_factors(away))
            return tuple((g + p).to(g.dtype) for g, p in zip(of_loss, pulls, strict=True))
