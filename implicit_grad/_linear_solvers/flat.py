"""Curvature that cannot be told from 0, because φ solves the inner problem only so far.

Many objectives do not change along certain curves: U Vᵀ is the same for U Q and V Q⁻ᵀ, a network
is the same whatever the length of weights before a normalisation. At a minimum there is no
curvature along them, and an outer loss that does not change there either has a right derivative,
M⁻¹ on what is left. But where φ has a slope F ≠ 0, moving along the curve for ‖φ‖ turns F by as
much as its length: the curvature there is of the order of ‖F‖/‖φ‖, and of any sign (for the length
of weights it is Euler's identity Hφ = −F). An iteration that goes on for long enough takes that for
curvature, and leaves the solution that it has found long before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, Operator, T, dot, norm

# φ solves the inner problem if ‖F‖/‖φ‖ is at most this part of the greatest curvature.
_SOLVED = 1e-4
# A residual that a change of M by so many times ‖F‖/‖φ‖ explains is as good as 0.
_SLACK = 3
# ‖M x‖‖x‖/xᵀM x of a solution that may be one. It is (κ + 1)/(2√κ) at most where M is positive.
_LONG = 30
# How a run may end that has gone on, along flat directions, after all else was solved.
MAY_BE_FLAT = (
    Status.NEGATIVE_CURVATURE,
    Status.TRUNCATED,
    Status.MAX_ITER,
    Status.STAGNATED,
    Status.SINGULAR,
)


def unknown_curvature(operator: Operator, rows: int) -> list[float]:
    """‖F‖/‖φ‖ for each row of a batch of this size; 0 where nothing is known."""
    unasked = operator.scale is None and operator.rtol_error is None
    if operator.spans is None or not (operator.is_hessian and unasked):
        return [0.0] * rows
    return [times.bend for times in operator.spans(rows)]


def is_flat(least: float, greatest: float, unknown: float) -> bool:
    """Whether the least curvature that was met is none that φ, once solved, need have."""
    return abs(least) <= unknown <= _SOLVED * greatest


def is_solved(residual: T, x: T, unknown: T) -> bool | Tensor:
    """Whether x, of this norm, solves the system but for curvature that is not known."""
    return residual <= _SLACK * unknown * x


def told_flat(
    solutions: Sequence[LinearSolution], operator: Operator, rhs: Tensor
) -> list[LinearSolution]:
    """The solutions, marked where the negative curvature that they met is none to speak of.

    CG has marked those that it ended before that. Of others x may have grown along flat directions,
    which a residual does not tell: ‖x‖ is to be at most `_LONG` times xᵀMx/‖Mx‖, which no part
    of x without curvature adds to, and xᵀMx more than that of a flat direction.
    """
    suspects = [
        s.status.ok and not s.is_flat and s.extremes is not None and s.extremes[0] < 0
        for s in solutions
    ]
    if not any(suspects):
        return list(solutions)
    found, rows = [], rhs.view(len(solutions), -1)
    unknown = unknown_curvature(operator, len(rows))
    for solution, suspect, b, size in zip(solutions, suspects, rows, unknown, strict=True):
        if suspect and solution.extremes is not None and is_flat(*solution.extremes, size):
            x = solution.x.flatten()
            length, along = norm(x), dot(x, b)
            is_curved = along > _SLACK * size * length**2
            is_short = length * norm(b) <= _LONG * along
            solution = dataclasses.replace(solution, is_flat=is_curved and is_short)
        found.append(solution)
    return found
