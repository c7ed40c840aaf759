"""Second-order cones among the constraints: smooth but for the apex, where they are equations.

s ∈ K means s₀ ≥ ‖s̄‖, and its multiplier z ∈ K pulls φ by −(∂s/∂φ)ᵀz. Where s₀ > 0, ‖s̄‖ − s₀ is as
smooth as any inequality. At the apex, s = 0, it has a kink. With z inside K, φ may move only where
s stays 0 (zᵀds = 0 and ds ∈ K leave nothing else), so that s = 0 acts as so many equations; with z
on the boundary of K the cone opens along a ray, and φ has a kink (Bonnans and Ramírez, 2005,
Perturbation analysis of second-order cone programming problems).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import ActiveSet
from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.base import Condition
from implicit_grad._conditions.constraints import Constraints, Evaluated, linearized, rows_of
from implicit_grad._conditions.multipliers import DEPENDENT, NO_FORCE
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import Status
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._torch.transforms import is_transformed

# A vector that is no longer than this, relative to φ, is at the apex: a solver that finds its
# objective to 1e-11 finds what is flat to the root of that. The multiplier tells which it is.
_AT_APEX = 1e-5
# Where multipliers are not unique, those inside the cones are sought by so many projections, each
# to a depth that is this part of the last one's.
_PROJECTIONS, _SHALLOWER = 200, 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class cone_argmin(argmin):
    """A minimum under constraints, of which `cones(phi, *args)` are vectors that lie in K.

    Those are to be of the size of φ: the apex is where all of a vector is small beside φ.
    """

    _: dataclasses.KW_ONLY
    cones: Callable[..., Sequence[Tensor]]

    @functools.cached_property
    def constraints(self) -> Constraints:
        """Those that were given."""
        return _WithCones(self.bounds, self.equality, self.inequality, self.cones)

    def for_tasks(self) -> Condition | None:
        """A batch of problems; those at an apex go their own way, as others with odd rows do."""

        def inequality(phi: Any, *args: Any) -> list[Tensor]:
            tensors, _ = pytree.flatten(phi)
            given = [] if self.inequality is None else [self.inequality(phi, *args)]
            surfaces = [
                torch.where(_is_apex(s, tensors), 0.0, _surface(s)) for s in self.cones(phi, *args)
            ]
            return [*given, torch.stack(surfaces)]

        plain = argmin(self.objective, equality=self.equality, inequality=inequality)
        return plain.for_tasks()


cone_argmin.__name__ = argmin.__name__  # as messages call it


@dataclasses.dataclass(frozen=True, eq=False)
class _WithCones(Constraints):
    """Constraints, and s ∈ K for each of `cones`."""

    cones: Callable[..., Sequence[Tensor]] | None = None

    def __bool__(self) -> bool:
        return True

    @property
    def rows(self) -> bool:
        return True

    def at(
        self, objective: Objective, phi: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Evaluated:
        assert self.cones is not None
        bounds, values = self._evaluated(phi, args, kwargs)
        equality, inequality = rows_of(values)
        apexes = []
        for s in self.cones(phi, *args, **kwargs):
            # under a transform it is only looked at what F depends on
            if not is_transformed((s,)) and bool(_is_apex(s, objective.phi)):
                apexes.append(list(s.unbind()))
                equality = [*equality, *apexes[-1]]
            else:
                inequality = [*inequality, _surface(s)]
        limits = (*bounds.lower, *bounds.upper)
        outputs = [t for t in (*limits, *equality, *inequality) if t is not None]
        kink = functools.partial(_kink, apexes, inequality)
        linearize = functools.partial(linearized, objective, bounds, equality, inequality, kink)
        return Evaluated((objective.value, *outputs), linearize)


def _is_apex(s: Tensor, phi: Tensors) -> Tensor:
    """Whether s is zero beside φ."""
    size = torch.stack([p.detach().abs().amax() for p in phi if p.numel()]).amax()
    return s.detach().abs().amax() <= _AT_APEX * size.clamp(min=_AT_APEX)


def _surface(s: Tensor) -> Tensor:
    """At most 0 where s is in K."""
    surface: Tensor = s[1:].norm() - s[0]
    return surface


def _kink(
    apexes: list[list[Tensor]],
    inequality: list[Tensor],
    active: ActiveSet,
    phi: Tensors,
) -> Status | None:
    """DEGENERATE, unless right multipliers lie inside K for all cones at their apexes."""
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
