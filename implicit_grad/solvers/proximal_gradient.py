"""Proximal gradient steps, plain (ISTA) and accelerated (FISTA), whose length finds itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.base import like_phi
from implicit_grad._conditions.dependence import scattered
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import (
    require_count,
    require_flag,
    require_fraction,
    require_tolerance,
)
from implicit_grad._torch.pytree import Tensors, inner, length
from implicit_grad._warnings import tell
from implicit_grad.solvers._objective import ObjectiveFunction, Point, moved
from implicit_grad.solvers._roots import DEFAULT_POWER, refuse_modules

Prox = Callable[[Any, float], Any]
# A step this many times eps·‖φ‖ is rounding error, and so are as many last places of a value.
_STEP_ROUNDING, _LAST_PLACES = 4.0, 16
# Halvings below the first length, and how lengths grow again where that is allowed.
_HALVINGS, _GROWTH = 60, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProximalGradient:
    """x⁺ = prox(y − t ∇objective(y), t), the minimiser for `prox_gradient`: lasso and the like.

    t is halved until the objective lies below its parabola of curvature 1/t at x⁺ (Beck and
    Teboulle, 2009, A fast iterative shrinkage-thresholding algorithm for linear inverse problems),
    so no step length has to be known. With `accelerated`, y lies ahead of x by momentum that
    starts again whenever the last movement was uphill (O'Donoghue and Candès, 2015, Adaptive
    restart for accelerated gradient schemes).

    Args:
        prox: `prox(x, step)`, one of `implicit_grad.prox` for instance, where it is used by
            itself; in `implicit` the condition `prox_gradient(loss, prox)` has it.
        accelerated: whether to take FISTA's steps, or ISTA's.
        maxiter: the most steps, a gradient and at least one value each.
        tol: stop when ‖y − x⁺‖₂/t is at most this, which without g is the gradient's norm.
        rtol: or when it is at most `rtol` times its first value, 0 < rtol < 1. Without either,
            when it has fallen by eps^(3/4): 2e-12 in float64, 6e-6 in float32.

    >>> from implicit_grad.prox import soft_threshold
    >>> loss = lambda w: (w - torch.tensor([3.0, 0.5])).square().sum() / 2
    >>> ProximalGradient(prox=soft_threshold(1.0)).minimize(loss, torch.zeros(2))
    tensor([2., 0.])
    """

    prox: Prox | None = None
    accelerated: bool = True
    maxiter: int = 10_000
    tol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.prox is not None and not callable(self.prox):
            raise InvalidArgumentError(
                f"ProximalGradient: prox must be a function of (x, step), got {describe(self.prox)}"
            )
        require_flag(self, "accelerated")
        require_count(self, "maxiter", 1)
        require_tolerance(self, "tol")
        require_fraction(self, "rtol")

    def minimize(
        self, objective: Callable[[Any], Tensor], init: Any, prox: Prox | None = None
    ) -> Any:
        """Minimise objective + g from init; phi has the form of init."""
        given = self.prox or prox
        if given is None or (self.prox and prox):
            raise InvalidArgumentError(
                "ProximalGradient: give prox once, here or in prox_gradient(loss, prox)"
            )
        with torch.inference_mode(False), torch.no_grad():
            refuse_modules(type(self).__name__, init)
            seen = ObjectiveFunction(self, objective, init)
            if not any(p.numel() for p in seen.start):
                return seen.result(seen.start)
            phi, missed = _Run(self, seen, given).to_the_end()
            found = seen.result(phi)
            if missed is not None:
                tell(missed, anchor="solver-missed", of=type(self).__name__)
            return found


class _Run:
    """One descent: the length of its steps, and when they are short enough."""

    def __init__(self, options: ProximalGradient, seen: ObjectiveFunction, prox: Prox) -> None:
        self.options, self.seen, self._prox = options, seen, prox
        self.eps = max(torch.finfo(p.dtype).eps for p in seen.start)
        self.start = length(seen.start)
        self.step = self.shortest = 0.0
        self.size, self.target = math.inf, 0.0

    def to_the_end(self) -> tuple[Tensors, str | None]:
        """φ, and a sentence on the tolerance if φ does not meet it."""
        x = y = self.seen.start
        t, free = 1.0, False  # whether the length may grow: not while there is momentum
        for count in range(self.options.maxiter):
            here = self.seen.at(y)
            self.seen.check(here, count)
            if not count:
                self._begin(here)
            there, movement = self._stepped(here, free)
            if there is None:
                return x, self._missed(count, _NO_LENGTH)
            self.size = length(movement) / self.step
            if not count:
                self.target = self._target()
            scale = self.start + length(there)
            if self.size <= self.target or (
                self.size * self.step <= _STEP_ROUNDING * self.eps * scale
            ):
                return there, None
            ahead = moved(there, x, -1.0)
            x = there
            if not self.options.accelerated or inner(movement, ahead) < 0:
                t, y, free = 1.0, x, True
                continue
            t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            y, free = moved(x, ahead, (last - 1) / t), False
        return x, self._missed(self.options.maxiter, _MORE)

    def _begin(self, here: Point) -> None:
        """The first length: 1 over the curvature along some direction, which may be too long."""
        size, steep = self.start or 1.0, here.norm
        direction = tuple(map(scattered, here.phi))
        short = self.eps ** (1 / 3) * size / length(direction)
        ahead = self.seen.at(moved(here.phi, direction, short)).slope
        curvature = length(moved(ahead, here.slope, -1.0)) / (short * length(direction))
        straight = size / steep if steep else 1.0  # for an objective that does not bend
        self.step = 1 / curvature if 0 < curvature < math.inf else straight
        self.shortest = self.step * 2.0**-_HALVINGS

    def _stepped(self, here: Point, free: bool) -> tuple[Tensors | None, Tensors]:
        """x⁺ and x⁺ − y; None if the objective lies above all parabolas."""
        rounding = _LAST_PLACES * self.eps * abs(here.value)
        before = self.step
        if free:
            self.step *= _GROWTH
        while True:
            there = self._image(moved(here.phi, here.slope, -self.step))
            movement = moved(there, here.phi, -1.0)
            square = inner(movement, movement) / (2 * self.step)
            if square <= 10 * rounding and self.step > before:
                self.step = before  # values do not tell whether a longer one would do
                continue
            if self.seen.value(there) - here.value - inner(here.slope, movement) <= (
                square + rounding
            ):
                return there, movement
            self.step /= 2
            if self.step < self.shortest:
                return None, movement

    def _image(self, x: Tensors) -> Tensors:
        container = self.seen.tree.rebuild(x)
        return like_phi("ProximalGradient: prox", self._prox(container, self.step), container, x)

    def _target(self) -> float:
        tol, rtol = self.options.tol, self.options.rtol
        if rtol is None:
            rtol = self.eps**DEFAULT_POWER if tol is None else 0.0
        return max(tol or 0.0, rtol * self.size)

    def _missed(self, count: int, why: str) -> str:
        steps = f"{count} step{'s' * (count != 1)}"
        return (
            f"ProximalGradient: a norm of {self.target:.2g} was asked for and is not reached: "
            f"after {steps} that of (y - prox(y - t*slope))/t is {self.size:.2g}. "
            f"What phi lacks to a solution, its implicit gradient lacks as well. {why}"
        )


_MORE = "Allow more steps (maxiter), or make the objective better conditioned (scale its inputs)"
_NO_LENGTH = (
    "No step length makes the objective smaller: it has a kink there, it is random, or its "
    "gradient is not that of its value"
)
