"""Cones among the constraints: smooth but for where they end; second-order ones at an apex.

s ∈ K means s₀ ≥ ‖s̄‖, and its multiplier z ∈ K pulls φ by −(∂s/∂φ)ᵀz. Where s₀ > 0, ‖s̄‖ − s₀ is as
smooth as any inequality. At the apex, s = 0, it has a kink. With z inside K, φ may move only where
s stays 0 (zᵀds = 0 and ds ∈ K leave nothing else), so that s = 0 acts as so many equations; with z
on the boundary of K the cone opens along a ray, and φ has a kink (Bonnans and Ramírez, 2005,
Perturbation analysis of second-order cone programming problems).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import ActiveSet, Bounds
from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.base import Condition
from implicit_grad._conditions.constraints import (
    Constraints,
    Evaluated,
    forces,
    linearized,
    rows_of,
)
from implicit_grad._conditions.exponential_cones import Corner, ExponentialCones
from implicit_grad._conditions.multipliers import DEPENDENT, NO_FORCE
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import Status
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._torch.transforms import is_batched

# A vector that is no longer than this, relative to φ, is at the apex: a solver that finds its
# objective to 1e-11 finds what is flat to the root of that. The multiplier tells which it is.
_AT_APEX = 1e-5
_EXACT = 1e-11  # what no solver has to find
# Where multipliers are not unique, those inside the cones are sought by so many projections, each
# to a depth that is this part of the last one's.
_PROJECTIONS, _SHALLOWER = 200, 0.95

SecondOrder = Callable[..., Sequence[tuple[Tensor, Tensor]]]


@dataclasses.dataclass(frozen=True, eq=False)
class cone_argmin(argmin):
    """A minimum under constraints, among them cones: functions of (phi, *args), each or none.

    `second_order` returns a list of vectors that are to lie in K, each with the sizes of its
    elements' gradients in φ, 0 for constants; `exponential` what its file says.
    """

    _: dataclasses.KW_ONLY
    second_order: SecondOrder | None = None
    exponential: Callable[..., ExponentialCones] | None = None

    @functools.cached_property
    def constraints(self) -> Constraints:
        """Those that were given."""
        given = self.bounds, self.equality, self.inequality
        return _WithCones(*given, self.second_order, self.exponential)

    def for_tasks(self) -> Condition | None:
        """A batch of problems; those at an apex go their own way, as others with odd rows do."""

        def inequality(phi: Any, *args: Any) -> list[Tensor]:
            tensors, _ = pytree.flatten(phi)
            rows = [] if self.inequality is None else [self.inequality(phi, *args)]
            if self.second_order is not None:
                cones = self.second_order(phi, *args)
                at_apex = (_is_apex(s, sizes, tensors) for s, sizes in cones)
                pairs = zip(at_apex, cones, strict=True)
                rows += [torch.where(at, 0.0, _surface(s))[None] for at, (s, _) in pairs]
            if self.exponential is not None:
                rows.append(self.exponential(phi, *args).smooth(_size(tensors)))
            return rows

        plain = argmin(self.objective, equality=self.equality, inequality=inequality)
        return plain.for_tasks()


cone_argmin.__name__ = argmin.__name__  # as messages call it


@dataclasses.dataclass(frozen=True, eq=False)
class _WithCones(Constraints):
    """Constraints, and s ∈ K for each cone."""

    second_order: SecondOrder | None = None
    exponential: Callable[..., ExponentialCones] | None = None

    def __bool__(self) -> bool:
        return True

    @property
    def rows(self) -> bool:
        return True

    def at(
        self, objective: Objective, phi: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Evaluated:
        bounds, values = self._evaluated(phi, args, kwargs)
        equality, inequality = rows_of(values)
        apexes: list[list[Tensor]] = []
        corners: list[Corner] = []
        for s, sizes in self.second_order(phi, *args, **kwargs) if self.second_order else ():
            # under vmap it is only looked at what F depends on
            if not is_batched(s) and bool(_is_apex(s, sizes, objective.phi)):
                apexes.append(list(s.unbind()))
            else:
                inequality = [*inequality, _surface(s)]
        equality = [*equality, *itertools.chain(*apexes)]
        if self.exponential:
            cones = self.exponential(phi, *args, **kwargs)
            if is_batched(cones.parts):
                smooth = list(cones.surface().unbind())
            else:
                smooth, corners = cones.divided(_size(objective.phi))
            inequality = [*inequality, *smooth]
        of_corners = [t for corner in corners for t in (corner.x, corner.y, corner.z)]
        limits = (*bounds.lower, *bounds.upper)
        outputs = [t for t in (*limits, *equality, *inequality, *of_corners) if t is not None]
        linearize = functools.partial(
            _linearized, objective, bounds, equality, inequality, apexes, corners
        )
        return Evaluated((objective.value, *outputs), linearize)


def _linearized(
    objective: Objective,
    bounds: Bounds,
    equality: list[Tensor],
    inequality: list[Tensor],
    apexes: list[list[Tensor]],
    corners: list[Corner],
) -> Linearization:
    """F around φ, once it is known which way cones lead from their tips."""
    with torch.enable_grad():
        edges = [(corner, corner.edge()) for corner in corners if not corner.is_tip]
        tips = [(corner, corner.x.clone(), corner.parts()) for corner in corners if corner.is_tip]
        inequality = [*inequality, *(row for _, rows in edges for row in rows)]
        if tips:
            held = [row for _, _, parts in tips for row in parts]
            above = [x for _, x, _ in tips]
            _, active = forces(objective, bounds, [*equality, *held], [*inequality, *above])
            nu = dict(zip(map(id, active.rows), active.nu.tolist(), strict=True))
            for corner, x, parts in tips:
                u, *of_parts = (nu.get(id(row), 0.0) for row in (x, *parts))
                inequality = [*inequality, *corner.tip(u, of_parts)]
    steep = {id(rows[0]) for corner, rows in edges if corner.is_steep}
    kink = functools.partial(_kink, apexes, inequality, steep)
    return linearized(objective, bounds, *forces(objective, bounds, equality, inequality), kink)


def _size(phi: Tensors) -> Tensor:
    """The largest element."""
    return torch.stack([p.detach().abs().amax() for p in phi if p.numel()]).amax()


def _is_apex(s: Tensor, sizes: Tensor, phi: Tensors) -> Tensor:
    """Whether s is zero beside φ, by its elements' own units; to rounding if they are constant."""
    moves = sizes > 0
    reach = torch.where(moves, _AT_APEX * sizes, _EXACT * sizes.amax())
    return (s.detach().abs() <= reach * _size(phi).clamp(min=_AT_APEX)).all()


def _surface(s: Tensor) -> Tensor:
    """At most 0 where s is in K."""
    surface: Tensor = s[1:].norm() - s[0]
    return surface


def _kink(
    apexes: list[list[Tensor]],
    inequality: list[Tensor],
    steep: set[int],
    active: ActiveSet,
    phi: Tensors,
) -> Status | None:
    """DEGENERATE, unless right multipliers lie inside K for all cones at their apexes.

    Or if one of the rows that are `steep` presses.
    """
    if steep & set(map(id, active.rows)):
        return Status.DEGENERATE
    if not apexes:
        return None
    places = {id(row): i for i, row in enumerate(active.rows)}
    cones = [torch.tensor([places[id(e)] for e in s], device=active.nu.device) for s in apexes]
    pushing = [places[id(row)] for row in inequality if id(row) in places]
    eps, nu, lengths = Flat(phi).eps, active.nu, active.lengths
    force = (nu.abs() * lengths).max()
    noise = [eps**NO_FORCE * (nu[c].norm() + force / lengths[c].max()) for c in cones]
    ways = _ways(active, eps**DEPENDENT)
    goals = [nu[c].norm() for c in cones]
    for i in range(_PROJECTIONS):
        depths = [-nu[c[0]] - nu[c[1:]].norm() for c in cones]
        signs = bool((nu[pushing] >= -(eps**NO_FORCE) * force / lengths[pushing]).all())
        if signs and all(bool(d > n) for d, n in zip(depths, noise, strict=True)):
            return None
        if not len(ways):
            break
        target = nu.clone()
        target[pushing] = target[pushing].clamp(min=0.0)
        for c, goal in zip(cones, goals, strict=True):
            target[c] = -_into_cone(-nu[c], goal * _SHALLOWER**i)
        nu = nu + ways.mT @ (ways @ (target - nu))
    return Status.DEGENERATE


def _ways(active: ActiveSet, close: float) -> Tensor:
    """An orthonormal basis, one vector a row, of how multipliers may change and stay right."""
    left, sizes, _ = torch.linalg.svd(active.units, full_matrices=True)
    ways = left[:, int((sizes > close).sum()) :] / active.lengths[:, None]
    basis: Tensor = torch.linalg.qr(ways)[0].mT
    return basis


def _into_cone(z: Tensor, depth: Tensor) -> Tensor:
    """The vector that is nearest to z among those with z₀ ≥ ‖z̄‖ + depth."""
    height, size = z[0] - depth, z[1:].norm()
    if bool(size <= height):
        return z
    if bool(size <= -height):
        return torch.cat([depth[None], torch.zeros_like(z[1:])])
    half = (height + size) / 2
    return torch.cat([(half + depth)[None], z[1:] * (half / size)])
