"""f(M) rhs by Lanczos' process, for symmetric M: a function of the matrix, from its products alone.

k products make an orthonormal basis V of the Krylov space of rhs, in which M is a tridiagonal
matrix T; f(M) rhs is about ‖rhs‖ V f(T) e₁ (Druskin and Knizhnerman, 1989, Two polynomial methods
of calculating functions of symmetric matrices; Saad, 1992, Analysis of some Krylov subspace
approximations to the matrix exponential operator). That is exact for polynomials f of a degree
below k, and about as good as the best of them for any other f. M need not be definite.

All vectors are kept, and each is made orthogonal to all before it: T's eigenvalues are then those
that an exact run would have found. A single system is a batch of one.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import Filter, LinearSolution, LinearSolver, Operator, dots

# The result has to change little this many times in a row: it may pause, and then go on.
_PATIENCE = 2
# A new vector is 0 to working precision if it is this many times eps of what its size could be.
_ROUNDING = 10
# Rounding in the products may cost this many times the tolerance; beyond, the status says so.
_SLACK = 10


def apply_filter(
    operator: Operator,
    rhs: Tensor,
    filters: Sequence[Filter],
    maxiter: int,
    target: float,
    exhausted: Status,
) -> list[LinearSolution]:
    """f(M) rhs for each row of rhs and its f, until its relative change is at most `target`."""
    runs = [_Tridiagonal(weigh, target, exhausted) for weigh in filters]
    largest = rhs.abs().amax(1) if rhs.shape[1] else rhs.new_zeros(len(rhs))
    for run, size in zip(runs, largest.tolist(), strict=True):
        run.start(size)
    going = largest.isfinite() & (largest > 0)
    v = torch.where(going[:, None], rhs / largest[:, None], 0.0)
    size = dots(v, v).sqrt()
    v = _over(v, size)
    basis = v.new_empty(min(maxiter, rhs.shape[1]), *v.shape)
    eps = operator.precision(rhs)
    for k in range(len(basis)):
        if not any(run.going for run in runs):
            break
        basis[k] = v
        product = operator.matvec(v)
        alpha = dots(v, product)
        v = _orthogonal(product, basis[: k + 1])
        beta = dots(v, v).sqrt() if k + 1 < rhs.shape[1] else torch.zeros_like(alpha)
        sizes = beta.tolist()
        for run, a, b in zip(runs, alpha.tolist(), sizes, strict=True):
            run.extend(a, b, eps)
        if len(runs) == 1:
            v = v / (sizes[0] or 1.0)
        else:
            v = _over(v, beta.where(torch.tensor([run.going for run in runs]).to(beta.device), 0.0))
    return [
        run.solution(_combined(run.y, basis[:, task], float(length) * float(most)))
        for task, (run, length, most) in enumerate(zip(runs, size, largest, strict=True))
    ]


class Filtering(LinearSolver):
    """A linear solver that takes f(M) rhs in the place of M⁻¹rhs, for one or many tasks."""

    maxiter: int
    rtol: float | None

    symmetric_only: ClassVar[bool] = True
    definite_only: ClassVar[bool] = True
    takes_tasks = True

    @abc.abstractmethod
    def _filtered(self, operator: Operator, rhs: Tensor) -> list[LinearSolution]:
        """What takes the place of the solution, for each row of rhs."""

    def _apply(self, operator: Operator, rhs: Tensor, weigh: Filter) -> list[LinearSolution]:
        """f(M) rhs for each row of rhs, to rtol, or as far as so many products lead."""
        eps = operator.precision(rhs)
        target = eps ** (2 / 3) if self.rtol is None else max(self.rtol, 10 * eps)
        exhausted = Status.TRUNCATED if self.rtol is None else Status.MAX_ITER
        return apply_filter(operator, rhs, [weigh] * len(rhs), self.maxiter, target, exhausted)

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        (found,) = self._filtered(of_one(operator), rhs[None])
        return found

    def solve_tasks(
        self, operator: Operator, rhs: Tensor, verify: bool
    ) -> tuple[Tensor, list[LinearSolution]]:
        found = self._filtered(operator, rhs)
        return torch.stack([solution.x for solution in found]), found


def of_one(operator: Operator) -> Operator:
    """The operator for a batch of one."""
    return dataclasses.replace(operator, matvec=lambda x: operator.matvec(x[0])[None])


def _orthogonal(product: Tensor, basis: Tensor) -> Tensor:
    """The product without its parts along the basis; twice is enough (Giraud et al., 2005)."""
    if len(product) == 1:
        rows, rest = basis[:, 0], product[0].clone()  # in place: new memory costs as much as sums
        for _ in range(2):
            rest.addmv_(rows.mT, rows @ rest, alpha=-1)
        return rest[None]
    for _ in range(2):
        parts = (basis * product).sum(-1, keepdim=True)
        product = product - (basis * parts).sum(0)
    return product


def _over(rows: Tensor, sizes: Tensor) -> Tensor:
    """Rows of length 1, and zeros for those that have ended."""
    ended = sizes == 0
    scaled = rows / torch.where(ended, 1.0, sizes).to(rows.dtype)[:, None]
    return scaled.masked_fill(ended[:, None], 0.0)


def _combined(y: list[float], basis: Tensor, length: float) -> Tensor:
    """‖rhs‖ V y."""
    return basis.new_tensor(y) @ basis[: len(y)] * length


class _Tridiagonal:
    """T of one task, and f(T) e₁, which is the result in terms of the basis."""

    def __init__(self, weigh: Filter, target: float, exhausted: Status) -> None:
        self._weigh, self._target, self._exhausted = weigh, target, exhausted
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self._changes = [1.0] * _PATIENCE
        self._noise = 0.0  # what rounding may add to M
        self.y: list[float] = []
        self.ritz: list[float] = []
        self.status, self.going = exhausted, True

    def start(self, largest: float) -> None:
        """There is nothing to do for a right-hand side that is 0 or not finite."""
        if largest == 0.0:
            self._end(Status.ZERO_RHS)
        elif not math.isfinite(largest):
            self._end(Status.NONFINITE_RHS)

    def extend(self, alpha: float, beta: float, eps: float) -> None:
        """One row more: what the product has of the last vector, and the size of what is new."""
        if not self.going:
            return
        if not math.isfinite(alpha + beta):
            return self._end(Status.NONFINITE_OPERATOR)
        self._diagonal.append(alpha)
        before, (self.ritz, self._vectors) = self.y, self._eigen()
        self.y = self._function(0.0)
        self._changes = [*self._changes[1:], self._relative([*before, 0.0])]
        self._noise = eps * max(map(abs, (*self.ritz, *self._beside)))
        if max(self._changes) <= self._target:
            return self._end(Status.CONVERGED)
        if beta <= _ROUNDING * self._noise:
            self._changes = [eps] * _PATIENCE  # the basis holds all that M makes of rhs
            return self._end(Status.CONVERGED)
        self._beside.append(beta)

    def solution(self, x: Tensor) -> LinearSolution:
        """The result for this task, made of x; NaN if there is none."""
        if self.status is Status.ZERO_RHS:
            return LinearSolution(x, self.status, residual=0.0)
        if self.status in (Status.NONFINITE_RHS, Status.NONFINITE_OPERATOR):
            return LinearSolution(x.fill_(math.nan), self.status, len(self._diagonal))
        # what the last products changed, and what rounding in them may have
        by_rounding = [self._relative(self._function(n)) for n in (-self._noise, self._noise)]
        error = max(*self._changes, *by_rounding)
        status, extremes, count = self.status, (self.ritz[0], self.ritz[-1]), len(self.ritz)
        if status is Status.CONVERGED and error > _SLACK * self._target:
            fixed = self._exhausted is Status.TRUNCATED
            status = Status.TRUNCATED if fixed else Status.STAGNATED
        return LinearSolution(x, status, count, extremes=extremes, filter_error=error)

    def _relative(self, other: list[float]) -> float:
        """How far from the result another one is."""
        size = math.hypot(*self.y)
        return math.dist(other, self.y) / size if size else 0.0

    def _function(self, shift: float) -> list[float]:
        """f(T + shift) e₁."""
        weights = self._weigh(torch.tensor(self.ritz, dtype=torch.float64) + shift)
        found: list[float] = (self._vectors @ (weights * self._vectors[0])).tolist()
        return found

    def _eigen(self) -> tuple[list[float], Tensor]:
        """T's eigenvalues and eigenvectors."""
        rows = [[0.0] * len(self._diagonal) for _ in self._diagonal]
        for i, entry in enumerate(self._diagonal):
            rows[i][i] = entry
        for i, entry in enumerate(self._beside, 1):  # eigh reads what is below the diagonal
            rows[i][i - 1] = entry
        values, vectors = torch.linalg.eigh(torch.tensor(rows, dtype=torch.float64))
        return values.tolist(), vectors

    def _end(self, status: Status) -> None:
        self.status, self.going = status, False
