"""The proximal term ½ (φ − θ)ᵀΛ(φ − θ): the forms that Λ may have, and what it adds to F and A."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._ad import Force, leaves_behind
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._tree import Tensors


class LowRank(NamedTuple):
    """Λ = diag(diagonal) + U Uᵀ: a λ that also holds φ back along a few directions at once.

    Args:
        diagonal: λ > 0 in any of its other forms: a number, a tensor, or a container of them.
        factor: U, in the form of θ, each tensor with one more dimension at its end, the rank.

    >>> lam = LowRank(0.5, torch.ones(3, 1))  # for a theta of shape (3,): 0.5 I + 1 1ᵀ
    >>> proximal_pull(lam, torch.zeros(3), "here").term([torch.ones(3)], [torch.zeros(3)])
    tensor(5.2500)
    """

    diagonal: Any
    factor: Any


class Pull(NamedTuple):
    """Λ spread over the leaves of θ: a weight for each, and U's part for each if it has one."""

    weights: tuple[Tensor, ...]
    factors: tuple[Tensor, ...] = ()

    def of(self, kept: Sequence[int]) -> Pull:
        """The pull on some of the leaves only."""
        return Pull(
            tuple(self.weights[i] for i in kept),
            tuple(self.factors[i] for i in kept if self.factors),
        )

    def detached(self) -> Pull:
        """The same without its graph."""
        own = {id(t): t.detach() for part in self for t in part}  # what was one tensor stays one
        return Pull(*(tuple(own[id(t)] for t in part) for part in self))

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

    def force(
        self,
        slope: Tensors,
        phi: Sequence[Tensor],
        theta: Sequence[Tensor],
        slots: Sequence[int] | None = None,
    ) -> Force:
        """F = slope + Λ(φ − θ); φ[slots[i]] is what θ[i] holds back."""
        slots = range(len(theta)) if slots is None else slots
        places = list(zip(slots, self.weights, theta, strict=True))
        scale: dict[int, Tensor] = {}
        for slot, weight, _ in places:
            # tied weights are pulled at by every θ that stands in their places
            scale[slot] = scale[slot] + weight if slot in scale else weight
        pulled: list[Tensor] = []
        if self.factors:
            pulled = [torch.zeros_like(p) for p in phi]
            along = self.along_factors([phi[slot] - t for slot, _, t in places])
            for slot, part in zip(slots, along, strict=True):
                pulled[slot] = pulled[slot] + part

        def residual() -> Tensors:
            sums = list(map(torch.add, slope, pulled) if pulled else slope)
            for slot, weight, t in places:
                sums[slot] = sums[slot] + weight * (phi[slot] - t)
            return tuple(sums)

        held: dict[int, tuple[int, Tensor]] = {}
        if not (self.factors or any(w.requires_grad for w in self.weights)):
            held = {id(t): (slot, weight) for slot, weight, t in places}
        entangled = len(held) < len(places) or held.keys() & {id(t) for t in leaves_behind(slope)}
        scales = tuple(scale[i] for i in range(len(slope)))
        return Force(residual, tuple(pulled), scales, {} if entangled else held)

    def _coordinates(self, away: Sequence[Tensor]) -> Tensor:
        """Uᵀ(φ − θ)."""
        parts = [
            torch.tensordot(d, u, dims=d.dim()) for d, u in zip(away, self.factors, strict=True)
        ]
        return torch.stack(parts).sum(0)


class Steps:
    """Gradient steps from anywhere, for as long as λ and θ do not change.

    Steps of the same length as the one before share what does not depend on φ.
    """

    def __init__(self, pull: Pull, theta: Tensors) -> None:
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
    pull: Pull
    theta: Tensors

    def __call__(self, phi: Any) -> Tensor:
        return self.loss(phi) + self.pull.term(_tree.leaves(phi), self.theta)

    @functools.cached_property
    def steps(self) -> Steps:
        """Gradient steps, from the gradient of the loss alone."""
        return Steps(self.pull, self.theta)

    def slope(self, phi: Tensors, of_loss: Tensors) -> Tensors:
        """The gradient at φ, from that of the loss."""
        with torch.no_grad():
            away = torch._foreach_sub(phi, self.theta)
            pulls = torch._foreach_mul(away, self.pull.weights)
            if self.pull.factors:
                torch._foreach_add_(pulls, self.pull.along_factors(away))
            return tuple((g + p).to(g.dtype) for g, p in zip(of_loss, pulls, strict=True))


def evaluated(lam: Any) -> Any:
    """λ, or what it returns if it is a function (a module with parameters to be learned)."""
    return lam() if callable(lam) else lam


def proximal_pull(lam: Any, theta: Any, where: str) -> Pull:
    """The pull of λ on each leaf of θ; λ may be given for whole branches of θ at once."""
    theta_leaves = _tree.leaves(theta)
    for leaf in theta_leaves:
        if not (torch.is_tensor(leaf) and leaf.is_floating_point()):
            raise InvalidArgumentError(
                f"{where}: theta, the solver's first argument, must hold floating-point tensors "
                f"only; it holds {describe(leaf)}"
            )
    if isinstance(lam, LowRank):
        return Pull(_weights(lam.diagonal, theta, where), _factors(lam.factor, theta, where))
    return Pull(_weights(lam, theta, where))


def _weights(lam: Any, theta: Any, where: str) -> tuple[Tensor, ...]:
    if not _tree.leaves(lam):
        check_lam(lam, where)
    try:
        spread = optree.broadcast_prefix(lam, theta, namespace=_tree.NAMESPACE)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{where}: lam must be a number, a tensor, or a container in the form of theta: {error}"
        ) from None
    made: dict[Any, Tensor] = {}
    for distinct in {id(value): value for value in spread}.values():
        check_lam(distinct, where)

    def weight(value: Any, i: int, t: Tensor) -> Any:
        # one tensor for one λ, so that a λ for all of θ is seen to be one number
        if not torch.is_tensor(value):
            key: Any = (value, t.dtype, t.device)
            if key not in made:
                made[key] = torch.tensor(value, dtype=t.dtype, device=t.device)
            value = made[key]
        elif value.device != t.device:
            value = made.setdefault((id(value), t.device), value.to(t.device))
        if value.dim() > t.dim() or any(
            a not in (1, b) for a, b in zip(reversed(value.shape), reversed(t.shape), strict=False)
        ):
            raise InvalidArgumentError(
                f"{where}: lam of shape {tuple(value.shape)} does not fit "
                f"{_tree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}"
            )
        return value

    return _for_each_leaf(weight, spread, theta)


def _factors(factor: Any, theta: Any, where: str) -> tuple[Tensor, ...]:
    if _tree.structure(factor) != _tree.structure(theta):
        raise InvalidArgumentError(
            f"{where}: the factor of a low-rank lam must have theta's form, "
            f"{_tree.structure(theta)}, got {_tree.structure(factor)}"
        )
    ranks = {u.shape[-1] for u in _tree.leaves(factor) if torch.is_tensor(u) and u.dim()}

    def part(u: Any, i: int, t: Tensor) -> Any:
        good = torch.is_tensor(u) and u.is_floating_point() and u.shape[:-1] == t.shape
        if not good or u.dim() != t.dim() + 1 or len(ranks) != 1:
            raise InvalidArgumentError(
                f"{where}: the factor of a low-rank lam must have one more dimension than "
                f"{_tree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}, the same rank for "
                f"all tensors; got {describe(u)}"
            )
        if not bool(torch.isfinite(u).all()):
            raise InvalidArgumentError(f"{where}: the factor of lam holds NaN or Inf")
        return u

    return _for_each_leaf(part, _tree.leaves(factor), theta)


def _for_each_leaf(
    make: Callable[[Any, int, Tensor], Any], values: Sequence[Any], theta: Any
) -> tuple[Tensor, ...]:
    pairs = zip(values, _tree.leaves(theta), strict=True)
    return tuple(make(value, i, t) for i, (value, t) in enumerate(pairs))


def check_lam(lam: Any, where: str) -> None:
    """λ must be a positive finite number or a floating-point tensor of such."""
    if torch.is_tensor(lam) and torch._C._functorch.is_functorch_wrapped_tensor(lam):
        return  # under a transform nothing is known of its values; the plain calls look at them
    if torch.is_tensor(lam) and lam.is_floating_point():
        good = bool((lam > 0).all()) and bool(torch.isfinite(lam).all())
        shown = "a tensor with other values" if lam.numel() != 1 else f"{lam.item():g}"
    elif isinstance(lam, (int, float)) and not isinstance(lam, bool):
        good, shown = 0 < lam < math.inf, f"{lam:g}"
    else:
        good, shown = False, describe(lam)
    if not good:
        raise InvalidArgumentError(
            f"{where}: lam must be a number or a floating-point tensor, finite and greater than 0, "
            f"got {shown}"
        )
