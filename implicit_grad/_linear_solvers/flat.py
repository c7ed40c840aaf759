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
import math
from collections.abc import Sequence

from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, Operator, T, dot

# φ solves the inner problem if ‖F‖/‖φ‖ is at most this part of the greatest curvature.
_SOLVED = 1e-4
# A residual that a change of M by so many times ‖F‖/‖φ‖ explains is as good as 0.
_SLACK = 10
# How a run may end that has gone on, along flat directions, after all else was solved.
MAY_BE_FLAT = (Status.NEGATIVE_CURVATURE, Status.MAX_ITER, Status.STAGNATED, Status.SINGULAR)


def unknown_curvature(operator: Operator, rows: int) -> list[float]:
    """‖F‖/‖φ‖ for each row of a batch of this size; 0 where nothing is known."""
    if operator.spans is None or operator.scale is not None or operator.rtol_error is not None:
        return [0.0] * rows
    return [1 / times.longest if times.longest else math.inf for times in operator.spans(rows)]


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

    One that rests on it, xᵀMx being as small as that of a flat direction, is not marked.
    """
    suspects = [s.status.ok and s.extremes is not None and s.extremes[0] < 0 for s in solutions]
    if not any(suspects):
        return list(solutions)
    found, rows = [], rhs.view(len(solutions), -1)
    unknown = unknown_curvature(operator, len(rows))
    for solution, suspect, b, size in zip(solutions, suspects, rows, unknown, strict=True):
        if suspect and solution.extremes is not None and is_flat(*solution.extremes, size):
            x = solution.x.flatten()
            rests_on_it = abs(dot(x, b)) <= _SLACK * size * dot(x, x)
            solution = dataclasses.replace(solution, is_flat=not rests_on_it)
        found.append(solution)
    return found
