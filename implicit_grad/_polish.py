"""One Newton step on φ itself: what a solver left unsolved becomes second order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from implicit_grad._ad import Linearization
from implicit_grad._adjoint import solve_newton
from implicit_grad._errors import Status
from implicit_grad._linear import LinearSolver, norm
from implicit_grad._tree import Flat, Tensors
from implicit_grad.monitor import Reporting

_LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def newton_candidates(
    solver: LinearSolver, around: Linearization, reporting: Reporting
) -> Iterator[Tensors]:
    """φ + t d for A d = −F and ever shorter t; none where A has negative curvature.

    A step that lowers ‖F‖ brings ‖φ − φ*‖ from δ to O(δ²), and with it the error of the implicit
    gradient. Where A is not positive definite, Newton's method may go to a saddle or a maximum.
    """
    solved = solve_newton(solver, around)
    least = None if solved.linear.curvature is None else solved.linear.curvature[0]
    if not solved.linear.status.ok or (around.is_hessian and (least or 0.0) < 0):
        status = solved.linear.status
        reason = Status.NEGATIVE_CURVATURE if status.ok else status
        reporting.say(f"phi was not polished: {reason.sentence}")
        return
    for length in _LENGTHS:
        with torch.no_grad():
            yield tuple(
                torch.add(p, d, alpha=length).detach()
                for p, d in zip(around.phi, solved.x, strict=False)
            )


def is_better(there: Linearization, here: Linearization) -> bool:
    """Whether ‖F‖ is smaller there."""
    with torch.no_grad():
        return _size(there) < _size(here)


def _size(around: Linearization) -> float:
    return norm(Flat(around.residual).ravel(around.residual))
