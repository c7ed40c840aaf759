"""Derivatives of a noisy black box by differences, with an estimate of their error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise

from implicit_grad.testing.subject import FAILURES

SHRINK, GROW, LEVELS, RESTARTS = 3.0, 5.0, 8, 3


@dataclasses.dataclass(frozen=True)
class Derivative:
    """A derivative, about how far off it is, and the smallest step it was made with."""

    value: float
    error: float
    step: float = math.inf


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
    at which the function fails or is not finite, it shrinks on. A table that makes no sense is
    begun anew: with a greater step, for the noise may have been too much, then with smaller ones,
    for the first may have crossed a pole. A derivative that is only certain to `scale` is certain
    enough.
    """
    best = _ridders(function, step, noise, rtol)
    for first in (GROW * step, *(step / SHRINK ** (4 * k) for k in range(1, RESTARTS + 1))):
        if best.error <= max(0.03 * abs(best.value), 1e-6 * scale):
            break
        # with the greater step only, one takes what is left of the error for noise
        seen = best.error * best.step / 2 if first > step and best.error < math.inf else 0.0
        found = _ridders(function, first, max(noise, seen), rtol)
        if found.value == 0.0 and first < step:
            break  # on the tread of a stair there is no slope to see
        best = min(best, found, key=lambda derivative: derivative.error)
    return best


def _ridders(
    function: Callable[[float], float], step: float, noise: float, rtol: float
) -> Derivative:
    best = Derivative(math.nan, math.inf)
    previous, slopes, rounding = list[float](), list[tuple[float, float]](), 0.0
    for _ in range(LEVELS):
        slope = _central(function, step)
        if slope is None:
            previous, slopes, step = [], [], step / SHRINK**2
            continue
        slopes.append((step, slope))
        rounding = 2 * noise / step
        row, apart = [slope], math.inf
        for order, before in enumerate(previous, start=1):
            row.append(row[-1] + (row[-1] - before) / (SHRINK ** (2 * order) - 1))
        for j in range(1, len(row)):
            apart = max(abs(row[j] - row[j - 1]), abs(row[j] - previous[j - 1]))
            if apart + rounding < best.error:
                best = Derivative(row[j], apart + rounding, step)
        if len(row) > 2 and (best.error <= rtol * abs(best.value) or apart > 2 * best.error):
            break  # good enough, or getting worse
        previous, step = row, step / SHRINK
    error = max(best.error, _jump(slopes, rounding, best.step))
    return dataclasses.replace(best, error=error)


def _jump(slopes: list[tuple[float, float]], rounding: float, best_step: float) -> float:
    """What a jump of the function does to a slope at the best step; 0 if it is smooth.

    The first changes of a smooth function's slopes are the greatest, and they do not end at exactly
    0, as on the tread of a stair; stairs, poles and jitter are not so. A jump that is seen at a
    smaller step than the best does less there.
    """
    changes = [(step, abs(b - a)) for (_, a), (step, b) in pairwise(slopes)]
    largest = max((change for _, change in changes), default=0.0)
    gross = largest > 0.1 * max((abs(slope) for _, slope in slopes), default=0.0)
    if not gross or (slopes[-1][1] and largest <= 3 * changes[0][1] + 5 * rounding):
        return 0.0
    return max(change * min(1.0, step / best_step) for step, change in changes)


def _central(function: Callable[[float], float], step: float) -> float | None:
    try:
        slope = (function(step) - function(-step)) / (2 * step)
    except FAILURES:
        return None
    return slope if math.isfinite(slope) else None
