"""Whether φ has digits enough to tell which constraints it rests on.

An interior point method that stops at sz = 1e-11, s the distance from a constraint and z the force
there, may leave both at 3e-6 where both are 0. Then φ touches the constraint or not by chance, and
presses on it or not. It is taken for a kink if a share of Newton's step, along the constraint's
gradient, would bring a φ beside it there; or if the force of one that presses is hardly more than
what it would change by on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import BESIDE, ActiveSet
from implicit_grad._conditions.multipliers import DEPENDENT
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Flat, Tensors

_SHARE = 0.1


def is_in_doubt(active: ActiveSet, stationarity: Tensors, phi: Tensors) -> bool:
    """Whether some constraint may be active that is not, or the other way round.

    `stationarity` is ∂ℒ/∂φ, with its graph.
    """
    flat = Flat(phi)

    def bend(way: Tensor) -> Tensor:
        """How much force there is after a step that goes 1 along the constraint's gradient."""
        curved = flat.ravel(vjp(stationarity, phi, flat.unravel(way)))
        return way @ curved / (way @ way)

    def is_free(way: Tensor) -> bool:
        return bool(way.norm() > flat.eps**DEPENDENT)

    project = active.onto_tangent(active.units, phi)
    for gradient, distance in zip(*active.beside, strict=True):
        way = project(gradient)
        push = -(flat.ravel(stationarity) @ way)
        if is_free(way) and bool(push > 0) and bool(push >= _SHARE * distance * bend(way)):
            return True
    forces = active.nu * active.lengths
    faint = (active.slack > 0) & (forces <= BESIDE * forces.norm())
    for i in faint.nonzero()[:, 0].tolist():
        others = torch.arange(len(forces), device=forces.device) != i
        way = active.onto_tangent(active.units[others], phi)(active.units[i])
        force = forces[i] * (way @ way)
        if is_free(way) and bool(_SHARE * force <= active.slack[i] * bend(way)):
            return True
    return False
