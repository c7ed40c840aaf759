"""The multipliers of a minimum under constraints, as functions of φ and of the arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_grad._conditions.active_set import Bounds, active_set, jacobian
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._warnings import warn


class Multipliers(NamedTuple):
    """What each constraint pushes φ with: how much the minimum rises as the constraint tightens.

    At φ, with f the objective (Karush, Kuhn and Tucker),

        ∇f − lower + upper + Σ equality·∇(equality) + Σ inequality·∇(inequality) = 0.

    Attributes:
        lower, upper: of the bounds, in the form of φ; at least 0, and 0 where φ is off its bound.
        equality: in the form of what `equality` returns, of any sign.
        inequality: in the form of what `inequality` returns; at least 0, and 0 where it is not
            active.

    What was not given is None.
    """

    lower: Any = None
    upper: Any = None
    equality: Any = None
    inequality: Any = None


def multipliers_at(
    value: Tensor, phi: Tensors, bounds: Bounds, equality: list[Tensor], inequality: list[Tensor]
) -> tuple[Tensors, Tensors, Tensor]:
    """Those of lower and upper bounds, for each tensor of φ, and of the rows, one by one.

    With ν right at φ and F = ∇f + Σ ν∇c, which is 0 for elements of φ off their bounds, ν changes
    by −J⁺F as φ and the arguments change, J the gradients of an independent set of rows. That is
    Newton's step from ν, in an equation linear in ν: its derivatives of every order are ν's.
    """
    slope, flat = gradient(value, phi), Flat(phi)
    with torch.no_grad():
        active = active_set(slope, phi, bounds, equality, inequality)

    def force(nu: Tensor) -> Tensor:
        weights = [w.to(row) for w, row in zip(nu.unbind(), active.rows, strict=True)]
        return flat.ravel(slope) + flat.ravel(vjp(active.rows, phi, weights))

    nu, kept, free = active.nu, active.kept, ~active.held
    if active.rows:
        gradients = jacobian(active.divided()[0], phi, flat)
        inverse = torch.linalg.pinv((gradients * free).mT)
        nu = nu.masked_scatter(kept, nu[kept] - inverse @ (force(nu) * free))
    if not bool(kept.all()):
        warn(_MANY, anchor="many-multipliers")
    left = force(nu)
    of_bounds = (left * active.at_lower).clamp(min=0), (-left * active.at_upper).clamp(min=0)
    lower, upper = map(flat.unravel, of_bounds)
    known = dict(zip(map(id, active.rows), nu.unbind(), strict=True))
    rows = [known.get(id(row), torch.zeros_like(row)) for row in (*equality, *inequality)]
    return lower, upper, torch.stack(rows) if rows else nu


_MANY = (
    "multipliers: active constraints depend on each other at phi, so their multipliers are not "
    "unique; those returned are some that are right, and have no derivative. Remove constraints "
    "that others imply"
)
