"""Nesterov's accelerated gradient: √κ steps where gradient descent takes κ."""

from __future__ import annotations

import dataclasses
import math

from implicit_grad._errors import InvalidArgumentError
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._options import is_number, require, require_positive
from implicit_grad._torch.pytree import Tensors, inner
from implicit_grad.solvers._descent import Stepwise, Watch
from implicit_grad.solvers._objective import moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nesterov(Stepwise):
    """x⁺ = y − lr ∇objective(y), y⁺ = x⁺ + β (x⁺ − x): gradients are taken ahead of the iterate.

    For strongly convex objectives with curvatures between μ and L, lr = 1/L and κ = L/μ, the
    momentum is β = (√κ − 1)/(√κ + 1), and the error falls by 1 − 1/√κ a step (Nesterov, 2004,
    Introductory Lectures on Convex Optimization, 2.2.1). Without `kappa` and `momentum`, β grows
    towards 1 as for general convex objectives, and starts again from 0 whenever the last movement
    was uphill, which finds the same rate without knowing κ (O'Donoghue and Candès, 2015, Adaptive
    Restart for Accelerated Gradient Schemes). With a proximal term, κ ≤ (L + λ)/λ for convex
    losses.

    Args:
        lr: step length, at most 1/L.
        kappa: the condition number κ ≥ 1.
        momentum: or β itself, 0 ≤ β < 1.
        steps: the most steps to take; None means 10,000.
        tol: stop when ‖∇objective‖₂ is at most this at a point y, which is then returned.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1.

    >>> import torch
    >>> half_square = lambda phi: (phi * phi).sum() / 2
    >>> Nesterov(lr=0.5, kappa=9.0, steps=2).minimize(half_square, torch.tensor([8.0]))
    tensor([1.])
    """

    lr: float
    kappa: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr")
        good = self.kappa is None or (is_number(self.kappa) and 1 <= self.kappa < math.inf)
        require(self, "kappa", good, "None or a number of at least 1")
        good = self.momentum is None or (is_number(self.momentum) and 0 <= self.momentum < 1)
        require(self, "momentum", good, "None or a number from 0 to below 1")
        if self.kappa is not None and self.momentum is not None:
            raise InvalidArgumentError("Nesterov: give kappa or momentum, not both")

    @property
    def elementwise(self) -> bool:
        """Whether it descends a batch of problems just as each of them alone."""
        restarts = self.kappa is None and self.momentum is None
        return not self.has_tolerance and not restarts

    def training(self, phi: Tensors) -> EarlyStopped | None:
        beta = self._constant_momentum()
        if beta is None or not self.counts_steps:
            return None
        return EarlyStopped(steps=self.steps, lr=self.lr, momentum=beta, nesterov=True)

    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        x = y = start
        t = 1.0
        for step in range(self.most_steps):
            here = watch.at(y, step)
            before, x = x, here.step(self.lr)
            movement = moved(x, before, -1.0)
            beta = self._constant_momentum()
            if beta is None:
                if inner(here.slope, movement) > 0:
                    t = 1.0
                t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
                beta = (last - 1) / t
            y = moved(x, movement, beta)
        return x

    def _constant_momentum(self) -> float | None:
        if self.kappa is None:
            return self.momentum
        root = math.sqrt(self.kappa)
        return (root - 1) / (root + 1)
