"""Derivatives of a noisy black box by differences, with an estimate of their error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise

SHRINK, LEVELS, RESTARTS = 3.0, 8, 3
FAILURES = (ArithmeticError, ValueError, RuntimeError)  # what a solver may do far from its point


@dataclasses.dataclass(frozen=True)
class Derivative:
    """A derivative and about how far off it is."""

    value: float
    error: float


def noise(values: list[float]) -> float:
    """The standard deviation of the noise in values at equal, tiny steps of a smooth function.

    From differences of order 3 and more, to which a smooth function contributes nothing (Moré and
    Wild, 2011, Estimating computational noise).
    """
    differences, found = list(values), []
    for order in range(1, len(values)):
        differences = [b - a for a, b in pairwise(differences)]
        factor = math.factorial(order) ** 2 / math.factorial(2 * order)
        mean = sum(d * d for d in differences) / len(differences)
        if order >= 3:
            found.append(math.sqrt(factor * mean))
    return max(found)


def derivative(
    function: Callable[[float], float], step: float, noise: float, rtol: float, scale: float = 0.0
) -> Derivative:
    """function'(0), by central differences extrapolated to step 0 (Ridders, 1982).

    The step shrinks until the extrapolated values agree to rtol or noise takes over; from a step
    at which the function fails or is not finite, it shrinks on. A table that makes no sense (the
    first steps crossed a pole) is begun anew with smaller ones; a derivative that is only certain
    to `scale` is certain enough.
    """
    first = _ridders(function, step, noise, rtol)
    found = first
    for _ in range(RESTARTS):
        if found.error <= max(0.03 * abs(found.value), 1e-6 * scale):
            return found
        step /= SHRINK**4
        found = _ridders(function, step, noise, rtol)
        if found.value == 0.0:
            break  # on the tread of a stair there is no slope to see
    return first


def _ridders(
    function: Callable[[float], float], step: float, noise: float, rtol: float
) -> Derivative:
    best = Derivative(math.nan, math.inf)
    previous, slopes, rounding = list[float](), list[float](), 0.0
    for _ in range(LEVELS):
        slope = _central(function, step)
        if slope is None:
            previous, slopes, step = [], [], step / SHRINK**2
            continue
        slopes.append(slope)
        rounding = 2 * noise / step
        row, apart = [slope], math.inf
        for order, before in enumerate(previous, start=1):
            row.append(row[-1] + (row[-1] - before) / (SHRINK ** (2 * order) - 1))
        for j in range(1, len(row)):
            apart = max(abs(row[j] - row[j - 1]), abs(row[j] - previous[j - 1]))
            if apart + rounding < best.error:
                best = Derivative(row[j], apart + rounding)
        if len(row) > 2 and (best.error <= rtol * abs(best.value) or apart > 2 * best.error):
            break  # good enough, or getting worse
        previous, step = row, step / SHRINK
    return Derivative(best.value, max(best.error, _jump(slopes, rounding)))


def _jump(slopes: list[float], rounding: float) -> float:
    """The greatest change between steps, if it is no sign of convergence.

    The first changes of a smooth function are the greatest; stairs, poles and jitter are not so.
    """
    changes = [abs(b - a) for a, b in pairwise(slopes)]
    largest = max(changes, default=0.0)
    gross = largest > 0.1 * max(map(abs, slopes), default=0.0)
    return largest if gross and largest > 3 * changes[0] + 5 * rounding else 0.0


def _central(function: Callable[[float], float], step: float) -> float | None:
    try:
        slope = (function(step) - function(-step)) / (2 * step)
    except FAILURES:
        return None
    return slope if math.isfinite(slope) else None
