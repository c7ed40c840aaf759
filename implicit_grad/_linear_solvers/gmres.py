"""GMRES: the least residual in a Krylov space, for systems without symmetry."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, Operator, norm
from implicit_grad._linear_solvers.iterative import Budget, Iterative, Run
from implicit_grad._linear_solvers.preconditioners import Precondition, checked
from implicit_grad._linear_solvers.small_systems import TogetherIfSmall
from implicit_grad._options import require, require_count_or_none

# By default the basis may hold as many numbers as this (128 MB in float64), or _LEAST vectors.
_NUMBERS, _LEAST = 2**24, 20
# A cycle that leaves more than this part of the residual is the first of many that do.
_NO_GAIN = 0.999
# A number is 0 to working precision if it is this many times eps of what its size could be.
_ROUNDING = 10
# The matrix is singular to working precision if rounding in M x is this part of the right side.
_LOST = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(Iterative, TogetherIfSmall):
    """The generalised minimal residual method (Saad and Schultz, 1986), for any square system.

    One product with Aᵀ an iteration; `NormalCG` also takes as many with A, which differentiate the
    residual twice. One vector is kept for each iteration, up to `restart`. If that is the number of
    unknowns, the solution is exact but for rounding. If it is less, the cycles between restarts can
    make no progress (where the matrix is like a rotation): the status says so, and `NormalCG` may
    do better.

    Args:
        maxiter: most products to take; by default 10 for each unknown, at most 2,000.
        rtol: stop when the residual is at most `rtol` times the right-hand side. None means
            eps^(2/3) for the coarsest dtype among the tensors.
        atol: or when the residual is at most `atol`, in the units of the right-hand side.
        restart: vectors to keep. None: as many as fit into 2²⁴ numbers, but 20 at least.
        preconditioner: a linear function of a flat vector (φ's tensors one after another) that
            approximates the inverse of the matrix at hand: (Aᵀ)⁻¹ in a backward pass, A = ∂F/∂φ,
            so for a factorisation of A a solve with its transpose. It need not be symmetric.

    >>> GMRES(restart=50)
    GMRES(maxiter=None, rtol=None, atol=0.0, restart=50, preconditioner=None)
    """

    restart: int | None = None
    preconditioner: Precondition | None = None

    symmetric_only: ClassVar[bool] = False
    most_iterations: ClassVar[int] = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count_or_none(self, "restart", 1)
        given = self.preconditioner
        good = given is None or (callable(given) and not isinstance(given, type))
        expected = "None or a function of a flat vector; "
        expected += "Jacobi(), Nystrom(...) and Cholesky() are for symmetric systems, with CG"
        require(self, "preconditioner", good, expected)

    @property
    def takes_small_tasks(self) -> bool:  # type: ignore[override]
        """Whether no number of iterations, and no preconditioner, was asked for."""
        return self.maxiter is None and self.preconditioner is None

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        given = self.preconditioner
        precondition = None if given is None else checked(given, rhs, "GMRES")
        restart = max(_LEAST, _NUMBERS // rhs.numel()) if self.restart is None else self.restart
        run = _Arnoldi(operator, rhs, self.budget(operator, rhs, unit), precondition, restart)
        run.iterate()
        return run.solution(run.refine())


class _Arnoldi(Run):
    """Cycles of Arnoldi's process, and at the end of each the iterate of least residual."""

    def __init__(
        self,
        operator: Operator,
        rhs: Tensor,
        budget: Budget,
        precondition: Precondition | None,
        restart: int,
    ) -> None:
        super().__init__(operator, rhs, budget)
        self.precondition, self.restart = precondition, restart
        self.eps = torch.finfo(rhs.dtype).eps
        self.size = 0.0  # ‖M‖, at least
        self.reach = 0.0  # ‖M P‖, at least, with the preconditioner P: H's size
        self._basis = rhs.new_empty(0, rhs.numel())

    def iterate(self) -> None:
        """GMRES on operator · d = residual, adding d to x, from one restart to the next."""
        self.status, after = self.budget.exhausted, norm(self.residual)
        while self.iterations < self.budget.maxiter and after > self.budget.target:
            before = after
            status = self._cycle(before)
            if status is not None:
                self.status = status
                return
            after = norm(self.residual)
            if after > _NO_GAIN * before and self.iterations < self.budget.maxiter:
                self.status = self.budget.stalled
                return
        if after <= self.budget.target:
            self.status = Status.CONVERGED

    def solution(self, residual: float | None) -> LinearSolution:
        """The result, with ‖M‖ beside the extremes, which are 0 where M is a quarter turn."""
        return dataclasses.replace(super().solution(residual), norm=self.size or None)

    def _cycle(self, beta: float) -> Status | None:
        """One cycle, from a residual of norm `beta`; a status if the iteration ends with it."""
        least, status = _LeastSquares(beta), None
        torch.div(self.residual, beta, out=self._vector(0))
        room = min(self.restart, self.budget.maxiter - self.iterations, self.rhs.numel())
        while len(least) < room and least.residual > self.budget.target:
            column = self._expand(len(least))
            if not math.isfinite(column[-1]):
                self.x = torch.full_like(self.x, math.nan)
                z = self._preconditioned(self._basis[len(least)])
                finite = bool(torch.isfinite(z).all())
                return Status.NONFINITE_OPERATOR if finite else Status.BAD_PRECONDITIONER
            if not least.append(column, _ROUNDING * self.eps * self.reach):
                status = Status.SINGULAR
                break
            if column[-1] <= self.eps * self.reach:  # products lead nowhere new
                break
        return self._move(least) or status

    def _vector(self, k: int) -> Tensor:
        """The place of vector k of the basis, which grows as it is needed."""
        if k >= len(self._basis):
            rows = min(max(16, 2 * k), self.restart + 1)
            grown = self.rhs.new_empty(rows, self.rhs.numel())
            grown[:k] = self._basis[:k]
            self._basis = grown
        return self._basis[k]

    def _expand(self, k: int) -> list[float]:
        """Find the basis's next vector; returns column k of H, with M V = V H.

        Gram and Schmidt's projection, twice over, keeps the basis orthonormal to working precision
        (Giraud, Langou and Rozložník, 2005, The loss of orthogonality in the Gram-Schmidt
        orthogonalization process), and works with all vectors at once.
        """
        z = self._preconditioned(self._basis[k])
        following = self._vector(k + 1)
        following.copy_(self.operator.matvec(z))
        self.iterations += 1
        basis = self._basis[: k + 1]
        projected = basis @ following
        following -= projected @ basis
        again = basis @ following
        following -= again @ basis
        length = norm(following)
        column = [*(projected + again).tolist(), length]
        self._meet_product(z, column)
        following /= length or 1.0
        return column

    def _preconditioned(self, v: Tensor) -> Tensor:
        return v if self.precondition is None else self.precondition(v)

    def _meet_product(self, z: Tensor, column: list[float]) -> None:
        """Remember the stretch ‖M z‖/‖z‖ and, where it is at hand, the quotient zᵀM z/zᵀz."""
        stretch = math.hypot(*column)
        self.reach = max(self.reach, stretch)
        if self.precondition is None:  # then z is of length 1, and a vector of the basis
            self.meet(column[-2])
        elif (length := norm(z)) > 0:
            stretch /= length
        self.size = max(self.size, stretch)

    def _move(self, least: _LeastSquares) -> Status | None:
        """Go to the iterate of least residual; its residual follows without a product."""
        y, status = least.solution(), None
        if self._is_lost(y):
            y, status = least.solution(rcond=math.sqrt(self.eps)), Status.SINGULAR
        self.x += self._preconditioned(self._combined(y))
        self.residual = self._combined(least.remainder())
        return status

    def _combined(self, weights: list[float]) -> Tensor:
        """The sum of the basis's vectors with these weights."""
        return torch.tensor(weights, dtype=torch.float64).to(self.rhs) @ self._basis[: len(weights)]

    def _is_lost(self, y: list[float]) -> bool:
        """Whether y is so long that rounding in H y hides the right-hand side."""
        return not self.eps * self.reach * math.hypot(*y) <= _LOST * norm(self.rhs)


class _LeastSquares:
    """min ‖βe₁ − H y‖ for Hessenberg's H, made a triangle by a rotation for each column."""

    def __init__(self, beta: float) -> None:
        self._columns: list[list[float]] = []
        self._rotations: list[tuple[float, float]] = []
        self._rhs = [beta]

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def residual(self) -> float:
        """The least norm."""
        return abs(self._rhs[-1])

    def append(self, column: list[float], negligible: float) -> bool:
        """Take in one more column of H; refused if it depends on those before it."""
        new = column.copy()
        for i, (c, s) in enumerate(self._rotations):
            above, below = new[i], new[i + 1]
            new[i], new[i + 1] = c * above + s * below, c * below - s * above
        *above_diagonal, last, below = new
        size = math.hypot(last, below)
        if size <= negligible:
            return False
        c, s = last / size, below / size
        self._columns.append([*above_diagonal, size])
        self._rotations.append((c, s))
        self._rhs[-1:] = c * self._rhs[-1], -s * self._rhs[-1]
        return True

    def solution(self, rcond: float | None = None) -> list[float]:
        """y; without the directions that H makes shorter by rcond than others, if it is given."""
        n = len(self)
        triangle = torch.zeros(n, n, dtype=torch.float64)
        for j, column in enumerate(self._columns):
            triangle[: j + 1, j] = torch.tensor(column, dtype=torch.float64)
        rhs = torch.tensor(self._rhs[:n], dtype=torch.float64)[:, None]
        if rcond is None:
            y = torch.linalg.solve_triangular(triangle, rhs, upper=True)
        else:
            y = torch.linalg.pinv(triangle, rtol=rcond) @ rhs
        found: list[float] = y[:, 0].tolist()
        return found

    def remainder(self) -> list[float]:
        """βe₁ − H y."""
        rest = [0.0] * len(self) + self._rhs[-1:]
        for i, (c, s) in reversed(list(enumerate(self._rotations))):
            above, below = rest[i], rest[i + 1]
            rest[i], rest[i + 1] = c * above - s * below, c * below + s * above
        return rest
