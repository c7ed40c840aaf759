"""The active set of a minimum under constraints: what holds φ where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_grad._conditions.bounds import Limits
from implicit_grad._conditions.dependence import part_ways, scattered
from implicit_grad._conditions.multipliers import DEPENDENT, Touched, independent, pressing, span
from implicit_grad._errors import Status
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Flat, Tensors

# How far from its limit, relative to the size of φ, a constraint may be that φ rests on: 1e-8 in
# float64, 3e-4 in float32; only where φ turns out to be less accurate, 5e-7 and 2e-3. (Powers of
# the dtype's eps.)
TOUCHING, CLOSE = 0.5, 0.4
# How far beside a constraint a solver that stops at an objective's error of 1e-11 may leave φ, if
# it rests there without a force: more than the root of that.
BESIDE = 1e-5
# How far away a constraint may be that it is asked whether a step of Newton's leads there.
NEARBY = 1e-3


class Bounds(NamedTuple):
    """For each tensor of φ its lower and its upper bound."""

    lower: Limits
    upper: Limits

    def distances(self, phi: Tensors) -> Tensor:
        """How far the elements of the flat φ are from their lower and their upper bound: 2 rows."""

        def distance(bound: Tensor | None, p: Tensor, sign: int) -> Tensor:
            apart = torch.full_like(p, torch.inf) if bound is None else sign * (p - bound)
            return apart.flatten()

        return torch.stack([
            torch.cat([distance(b, p, sign) for b, p in zip(limits, phi, strict=True)])
            for limits, sign in ((self.lower, 1), (self.upper, -1))
        ])  # fmt: skip

    def values(self, phi: Tensors, at_lower: Tensors) -> Tensors:
        """For elements at a bound, the bound."""
        return tuple(
            torch.where(down, p if lo is None else lo, p if up is None else up)
            for p, down, lo, up in zip(phi, at_lower, self.lower, self.upper, strict=True)
        )

    @property
    def differentiable(self) -> bool:
        """Whether a bound requires grad."""
        return any(b is not None and b.requires_grad for b in (*self.lower, *self.upper))


class ActiveSet(NamedTuple):
    """The constraints that press on φ.

    Attributes:
        rows: the values of equality and inequality among them, with their graph.
        gradients: of the rows.
        lengths: their norms, or 1 in the place of 0.
        units: the gradients over their lengths, on the elements that are not held at a bound.
        nu: one right multiplier for each row.
        kept: which rows make an independent set that the others depend on; what is violated without
            a direction to mend it is kept too, to be felt.
        at_lower, at_upper: which elements of the flat φ are held at their bounds.
        by_chance: whether some constraint is touched that does not press.
        stiffness: of the objective: how large forces become over a distance of 1.
        loose: which elements of the flat φ neither the objective's curvature nor a row holds.
        slack: how far φ is from the rows; 0 for equations.
        nearby: of rows that are not touched, but not far: their gradients, of norm 1, one a row,
            and how far φ is from them.
        room: how far the elements of the flat φ are from their lower and their upper bound, a row
            each; infinitely far unless nearby.
        size: of φ, which decides what is near.
    """

    rows: list[Tensor]
    gradients: Tensor
    lengths: Tensor
    units: Tensor
    nu: Tensor
    kept: Tensor
    at_lower: Tensor
    at_upper: Tensor
    by_chance: bool
    stiffness: float
    loose: Tensor
    slack: Tensor
    nearby: tuple[Tensor, Tensor]
    room: Tensor
    size: float

    @property
    def held(self) -> Tensor:
        """Which elements of the flat φ are held at a bound."""
        return self.at_lower | self.at_upper

    def divided(self) -> tuple[list[Tensor], list[Tensor]]:
        """The rows of the independent set, and the others."""
        kept = self.kept.tolist()
        pairs = list(zip(self.rows, kept, strict=True))
        return [g for g, stays in pairs if stays], [g for g, stays in pairs if not stays]

    def depends(self, bounds: Bounds) -> bool:
        """Whether there are more constraints than directions that they take from φ."""
        between = self.at_lower & self.at_upper
        return not bool(self.kept.all()) or (bounds.differentiable and bool(between.any()))

    def kink(self, phi: Tensors, bounds: Bounds) -> Status | None:
        """Why φ has no derivative, where it has none."""
        if self.by_chance:
            return Status.DEGENERATE
        pairs = [*self._relation(phi, bounds), *self._fixed(phi, bounds)]
        if pairs and part_ways(pairs, phi, self.onto_tangent(self.units, phi)):
            return Status.DEPENDENT_CONSTRAINTS
        return None

    def without_bound(self, i: int) -> ActiveSet:
        """The same for a φ whose element i is not held."""
        free = torch.ones_like(self.at_lower)
        free[i] = False
        freed = self._replace(at_lower=self.at_lower & free, at_upper=self.at_upper & free)
        return freed._replace(units=self.gradients * ~freed.held / self.lengths[:, None])

    def onto_tangent(self, units: Tensor, phi: Tensors) -> Callable[[Tensor], Tensor]:
        """Projects flat vectors on the directions in which φ may move along such rows."""
        basis = span(units, Flat(phi).eps ** DEPENDENT)

        def project(x: Tensor) -> Tensor:
            x = x * ~self.held
            return (x - basis.mT @ (basis @ x)) * ~self.held

        return project

    def _relation(self, phi: Tensors, bounds: Bounds) -> list[tuple[Tensor, Tensor]]:
        """The rows, and the bounds that they are tied to, with weights that add to zero slope."""
        if bool(self.kept.all()):
            return []
        flat = Flat(phi)
        weights = scattered(self.nu) * ~self.kept
        inverse = torch.linalg.pinv(self.units[self.kept].mT)
        weights[self.kept] = -(inverse @ (weights @ self.units))
        # a row that is not tied to the others has rounding for its weight, and may bend
        tied = weights.abs() > flat.eps**DEPENDENT * weights.abs().max()
        weights = weights * tied / self.lengths
        pull = -(weights @ self.gradients)[self.held]
        with torch.enable_grad():
            limits = bounds.values(phi, split(self.at_lower, phi))
            off = flat.ravel([p - limit for p, limit in zip(phi, limits, strict=True)])
            return [(torch.stack(self.rows), weights), (off[self.held], pull)]

    def _fixed(self, phi: Tensors, bounds: Bounds) -> list[tuple[Tensor, Tensor]]:
        """Both bounds of elements that have no room between them."""
        fixed = self.at_lower & self.at_upper
        if not bounds.differentiable or not bool(fixed.any()):
            return []
        flat, weights = Flat(phi), scattered(fixed[fixed].to(self.nu))
        with torch.enable_grad():
            lower, upper = (
                flat.ravel([p if b is None else b for p, b in zip(phi, limits, strict=True)])
                for limits in bounds
            )
            return [(lower[fixed], weights), (upper[fixed], -weights)]


def active_set(
    slope: Tensors, phi: Tensors, bounds: Bounds, equality: list[Tensor], inequality: list[Tensor]
) -> ActiveSet:
    """Which constraints press on φ; `slope` is the objective's gradient, with its graph.

    What counts as near, and as a force, is relative: to the size of φ, of a row's gradient, and of
    the forces. Multiples of φ, of the objective or of a row have the same active set.
    """
    flat, rows = Flat(phi), [*equality, *inequality]
    # φ = 0 has no size of its own
    size = max(flat.eps**CLOSE, _largest(flat.ravel(phi)))
    touching, close = (flat.eps**power * size for power in (TOUCHING, CLOSE))
    gradients = jacobian(rows, phi, flat)
    values = flat.ravel([g.detach() for g in rows])
    lengths = gradients.norm(dim=1)
    equations = torch.arange(len(rows), device=flat.device) < len(equality)
    # what is violated has to be felt in F, whatever its multiplier
    equations = equations | (values > close * lengths)
    room = bounds.distances(phi)
    beyond = torch.logical_or(*(room <= -close))
    force, stiffness = flat.ravel(slope), _stiffness(slope, phi, flat)
    for reach in (touching, close):
        near = equations | (values >= -reach * lengths)
        at_lower, at_upper = room <= reach
        constraints = Touched(
            rows=gradients[near],
            equations=equations[near],
            lower=at_lower | beyond,
            upper=at_upper | beyond,
            eps=flat.eps,
        )
        found = pressing(force, reach * stiffness, constraints)
        off = values[near][found.rows].abs() > reach * lengths[near][found.rows]
        if found.explained and not bool(off.any()):
            break
    pressing_rows = near.nonzero()[found.rows].flatten()
    nearby = ~near & (values >= -NEARBY * size * lengths)
    apart = gradients[nearby] / lengths[nearby, None], -values[nearby] / lengths[nearby]
    slack = (-values / lengths).masked_fill(equations | (lengths == 0), 0.0)[pressing_rows]
    lengths, gradients = lengths[pressing_rows], gradients[pressing_rows]
    violated = values[pressing_rows].abs() > close * lengths
    lengths = torch.where(lengths > 0, lengths, 1.0)
    units = gradients * ~found.held / lengths[:, None]
    powerless = units.norm(dim=1) <= flat.eps**DEPENDENT
    kept = independent(units, violated, flat.eps**DEPENDENT) | (violated & powerless)
    return ActiveSet(
        rows=[rows[i] for i in pressing_rows.tolist()],
        gradients=gradients,
        units=units,
        lengths=lengths,
        nu=_completed(found.nu[found.rows], kept, force, gradients, found.held),
        kept=kept,
        at_lower=found.held & at_lower,
        at_upper=found.held & at_upper,
        by_chance=bool(found.idle.any()),
        stiffness=_largest(stiffness) or _largest(force) / size or 1.0,
        loose=(stiffness == 0) & ~found.held & (units.abs() <= flat.eps**DEPENDENT).all(0),
        slack=slack.clamp(min=0.0),
        nearby=apart,
        room=room.clamp(min=0.0).masked_fill(room > max(close, NEARBY * size), torch.inf),
        size=size,
    )


def _largest(vector: Tensor) -> float:
    return float(vector.abs().max()) if len(vector) else 0.0


def _completed(nu: Tensor, kept: Tensor, slope: Tensor, gradients: Tensor, held: Tensor) -> Tensor:
    """The multipliers, those of independent rows anew: to the last digit, given the others."""
    rest = (slope + nu[~kept] @ gradients[~kept]) * ~held
    solution = torch.linalg.pinv((gradients[kept] * ~held).mT) @ -rest
    return nu.masked_scatter(kept, solution)


def _stiffness(slope: Tensors, phi: Tensors, flat: Flat) -> Tensor:
    """How much each element of the slope changes when φ moves by 1: the size of H's rows."""
    way = scattered(flat.ravel(phi))
    return flat.ravel(vjp(slope, phi, flat.unravel(way))).abs()


def jacobian(rows: list[Tensor], phi: Tensors, flat: Flat) -> Tensor:
    """The gradients of constraints, one a row."""
    if not rows:
        return flat.ravel(phi).detach().new_zeros(0, sum(p.numel() for p in phi))
    return torch.stack([flat.ravel(vjp([c], phi, [torch.ones_like(c)])) for c in rows])


def split(mask: Tensor, phi: Tensors) -> Tensors:
    """A flat mask in the form of φ."""
    parts = torch.split(mask, [p.numel() for p in phi])
    return tuple(part.view(p.shape) for part, p in zip(parts, phi, strict=True))
