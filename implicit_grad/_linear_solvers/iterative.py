"""When an iteration stops: the rules it is given, and the true residual it is held to."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
from collections.abc import Generator
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator, drift, norm
from implicit_grad._options import (
    require_count_or_none,
    require_fraction,
    require_nonnegative,
)

# Energy gained over this many iterations decides whether CG still makes progress.
PATIENCE = 5
# A step so long that rounding in M times it is this many right-hand sides leads nowhere.
LOST = 100
# A restart from the recomputed residual must cut it by this factor to be worth the products.
RESTART_GAIN = 0.5
# A recomputed residual may exceed the tolerance by this factor.
SLACK = 2


S = TypeVar("S", bound="Iterative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iterative(LinearSolver):
    """A linear solver that stops at a tolerance or after a number of iterations.

    Attributes:
        truncates: whether `maxiter` alone asks for a fixed budget, as for symmetric systems: the
            truncation of the iMAML paper. For others it is a limit, and the default tolerance is
            kept.
        most_iterations: to take by default, where unknowns are many.
    """

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0

    least_maxiter: ClassVar[int] = 1
    truncates: ClassVar[bool] = False
    most_iterations: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        require_count_or_none(self, "maxiter", self.least_maxiter)
        require_fraction(self, "rtol")
        require_nonnegative(self, "atol")

    def to_tolerance(self: S) -> S:
        """The default tolerance in place of a number of iterations (0 is none: first order)."""
        if not (self.is_truncation and self.maxiter):
            return self
        return dataclasses.replace(self, maxiter=None)

    @property
    def is_truncation(self) -> bool:
        """Whether it is for a fixed number of iterations, and no tolerance was asked for."""
        return self.truncates and self.maxiter is not None and not self.is_asked

    @property
    def is_asked(self) -> bool:
        """Whether the tolerance is the user's own."""
        return self.rtol is not None or self.atol != 0.0

    def target(self, operator: Operator, rhs: Tensor) -> float:
        """The relative residual at which an iteration ends."""
        return self.relative_budget(operator, rhs, rhs.shape[-1]).target

    def budget(self, operator: Operator, rhs: Tensor, unit: float) -> Budget:
        """These rules for a right-hand side that was divided by `unit`."""
        relative = self.relative_budget(operator, rhs, rhs.numel())
        return relative._replace(target=max(relative.target * norm(rhs), self.atol / unit))

    def relative_budget(self, operator: Operator, rhs: Tensor, unknowns: int) -> Budget:
        """The rules but for `atol`, for a right-hand side of norm 1."""
        eps = operator.precision(rhs)
        fixed = self.is_truncation
        usual = eps ** (2 / 3)
        rtol = usual if self.rtol is None else max(self.rtol, min(10 * eps, usual))
        maxiter = min(10 * unknowns, self.most_iterations) if self.maxiter is None else self.maxiter
        return Budget(eps if fixed else rtol, maxiter, fixed)


class Budget(NamedTuple):
    """When to stop: at a residual norm, or after a number of iterations."""

    target: float
    maxiter: int
    fixed: bool  # the number of iterations is a choice, and no tolerance was asked for

    @property
    def exhausted(self) -> Status:
        """The status of a run that used all its iterations."""
        return Status.TRUNCATED if self.fixed else Status.MAX_ITER

    @property
    def stalled(self) -> Status:
        """The status of a run that rounding keeps from its tolerance."""
        return Status.TRUNCATED if self.fixed else Status.STAGNATED


class Run(abc.ABC):
    """One solve by an iteration: the iterate, the residual carried with it, and what was met."""

    def __init__(self, operator: Operator, rhs: Tensor, budget: Budget) -> None:
        self.operator, self.rhs, self.budget = operator, rhs, budget
        self.x = torch.zeros_like(rhs)
        self.residual = rhs
        self.status = budget.exhausted
        self.iterations = 0
        self.restarted = False
        self.residual_norm: float | None = None
        self.gap: float | None = None
        self.rounding: float | None = None
        self._extremes = (math.inf, -math.inf)

    @abc.abstractmethod
    def iterate(self) -> None:
        """Solve operator · d = residual, adding d to x; leaves the carried residual behind."""

    def refine(self, product: Tensor | None = None) -> float:
        """Hold the carried residual to its word: recompute it, and restart where it has drifted.

        `product` is that with x, if it is known. Returns the relative residual.
        """
        before = math.inf
        while True:
            product = self.operator.matvec(self.x) if product is None else product
            carried, self.residual, product = self.residual, self.rhs - product, None
            self._measure(carried)
            size = norm(self.residual)
            if self.status in (Status.CONVERGED, self.budget.stalled):
                small = self._kept(size)
                self.status = Status.CONVERGED if small else self._missed
                room = self.iterations < self.budget.maxiter and not self.budget.fixed
                if not small and room and size < RESTART_GAIN * before:
                    before, self.restarted = size, True
                    self.iterate()
                    continue
            return size / norm(self.rhs)

    def _kept(self, size: float) -> bool:
        """Whether a recomputed residual of this size keeps the promise of convergence."""
        return size <= SLACK * self.budget.target

    @property
    def _missed(self) -> Status:
        """The status of a run whose promise was not kept."""
        return self.budget.stalled

    def _measure(self, carried: Tensor) -> None:
        """The true residual and its distance from the carried one, in the units of the bounds."""
        operator, greatest = self.operator, max(self._extremes[1], 0.0)
        away = self.residual - carried
        sizes = norm(away), greatest, norm(self.x), norm(self.rhs)
        least_scale = (
            1.0 if operator.scale is None else float(torch.as_tensor(operator.scale).min())
        )
        self.rounding = operator.rounding(self.rhs)
        error = drift(*sizes, self.rounding) / math.sqrt(least_scale)
        self.residual_norm = operator.residual_norm(self.residual) + error
        gap = sizes[0] if operator.scale is None else operator.residual_norm(away)
        self.gap = gap + error

    @property
    def extremes(self) -> tuple[float, float] | None:
        """The least and greatest quotient pᵀMp/pᵀp met."""
        return self._extremes if self._extremes[0] <= self._extremes[1] else None

    def meet(self, quotient: float) -> None:
        """Remember a Rayleigh quotient pᵀMp/pᵀp."""
        least, greatest = self._extremes
        if not least <= quotient <= greatest:
            self._extremes = (min(least, quotient), max(greatest, quotient))

    def follow(self, other: Run) -> None:
        """Count the products of a first attempt, and remember the extremes that it met."""
        self.iterations += other.iterations
        for quotient in other.extremes or ():
            self.meet(quotient)

    def fail(self, status: Status) -> None:
        """Give up without an answer."""
        self.status = status
        self.x = torch.full_like(self.x, math.nan)

    def solution(self, residual: float | None) -> LinearSolution:
        """The result."""
        return LinearSolution(
            self.x,
            self.status,
            self.iterations,
            residual,
            self.extremes,
            residual_norm=self.residual_norm,
            gap=self.gap,
            rounding=self.rounding,
        )


class Stepwise(Run):
    """A run that can stop where it wants a product, so that several go side by side."""

    @abc.abstractmethod
    def steps(self) -> Generator[Tensor, Tensor, None]:
        """`iterate`, which is sent the product with each vector that it yields."""

    def iterate(self) -> None:
        steps = self.steps()
        with contextlib.suppress(StopIteration):
            vector = next(steps)
            while True:
                vector = steps.send(self.operator.matvec(vector))
