"""Whether φ has digits enough to tell which constraints it rests on.

An interior point method that stops at sz = 1e-11, s the distance from a constraint and z the force
there, may leave both at 3e-6 where both are 0. Then φ touches the constraint or not by chance, and
presses on it or not. It is taken for a kink if Newton's step, along the constraint's gradient, or a
share of it where φ is beside the constraint, would bring φ there; or if the force of one that
presses is hardly more than what it would change by on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import BESIDE, ActiveSet
from implicit_grad._conditions.multipliers import DEPENDENT, ROUNDING
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Flat, Tensors

_SHARE = 0.1
# So many bounds are looked at, the most doubtful if curvature is the same everywhere: each takes a
# product, and there are as many bounds as unknowns.
_BOUNDS = 5


def is_in_doubt(active: ActiveSet, stationarity: Tensors, phi: Tensors) -> bool:
    """Whether some constraint may be active that is not, or the other way round.

    `stationarity` is ∂ℒ/∂φ, with its graph.
    """
    flat = Flat(phi)
    force = flat.ravel(stationarity).detach()

    def bend(way: Tensor) -> Tensor:
        """How much force there is after a step that goes 1 along the constraint's gradient."""
        curved = flat.ravel(vjp(stationarity, phi, flat.unravel(way)))
        return way @ curved / (way @ way)

    def is_free(way: Tensor) -> bool:
        return bool(way.norm() > flat.eps**DEPENDENT)

    slope = force - active.nu @ active.gradients
    rounding = flat.eps**ROUNDING * (slope.abs() + active.nu.abs() @ active.gradients.abs())
    project = active.onto_tangent(active.units, phi)
    for gradient, distance in chain(zip(*active.nearby, strict=True), _nearby(active, force)):
        way = project(gradient)
        push = -(force @ way)
        pushes = is_free(way) and bool(push > rounding @ way.abs())
        share = _SHARE if distance <= BESIDE * active.size else 1.0
        if pushes and bool(push >= share * distance * bend(way)):
            return True
    return any(
        is_free(way) and bool(_SHARE * pressure * (way @ way) <= slack * bend(way))
        for way, pressure, slack in _faint(active, force, phi)
    )


def _nearby(active: ActiveSet, force: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of bounds that are not touched, but not far, and how far φ is from them."""
    push = torch.stack([force, -force]) * ~active.held
    room = active.room.flatten()
    for i in _first(torch.where(push > 0, push, 0.0).flatten() / room):
        gradient = torch.zeros_like(force)
        gradient[i % len(force)] = -1.0 if i < len(force) else 1.0
        yield gradient, room[i]


def _faint(
    active: ActiveSet, force: Tensor, phi: Tensors
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Constraints that hardly press on φ, nor are touched quite.

    For each the way that φ may move once it is let go, the force, and how far φ is from it.
    """
    rows, bounds = active.nu * active.lengths, force.abs() * active.held
    hardly = BESIDE * torch.cat([rows, bounds]).norm()
    for i in ((active.slack > 0) & (rows <= hardly)).nonzero()[:, 0].tolist():
        others = torch.arange(len(rows), device=rows.device) != i
        way = active.onto_tangent(active.units[others], phi)(active.units[i])
        yield way, rows[i], active.slack[i]
    slack = torch.where(active.at_lower, active.room[0], active.room[1])
    faint = active.held & (slack > 0) & (bounds <= hardly)
    for i in _first(torch.where(faint, slack, 0.0) / bounds):
        only = torch.zeros_like(force)
        only[i] = 1.0
        freed = active.without_bound(i)
        yield freed.onto_tangent(freed.units, phi)(only), bounds[i], slack[i]


def _first(doubts: Tensor) -> list[int]:
    """Where the largest are, but for those of 0."""
    largest = doubts.nan_to_num(nan=0.0).topk(min(_BOUNDS, len(doubts)))
    return largest.indices[largest.values > 0].tolist()
