"""What is known about each backward solve: a `Report`, for a `Monitor` or as a warning."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Literal

import torch

from implicit_grad._ad import Linearization
from implicit_grad._adjoint import solve_adjoint
from implicit_grad._errors import (
    ImplicitGradWarning,
    InvalidArgumentError,
    LinearSolveError,
    Status,
)
from implicit_grad._linear import LinearSolution, LinearSolver, dot, norm
from implicit_grad._tree import Flat, Tensors

OnFailure = Literal["warn", "raise", "ignore"]

# φ counts as unsolved when it is certainly farther than this from a solution, relative to its size;
# smaller than SMALL, its size counts as SMALL, so that φ = 0 can be a solution.
INNER_TOLERANCE, SMALL = 1e-2, 1e-3


@dataclasses.dataclass(frozen=True)
class Report:
    """One backward solve.

    Attributes:
        status: how it ended; `status.sentence` says what that means.
        iterations: products taken by the iteration.
        linear_residual: ‖v − Aᵀu‖/‖v‖, recomputed from u; None where there was nothing to check.
        inner_residual: ‖F(φ)‖₂, in the units of F; 0 if the inner problem is solved exactly.
        min_curvature: least pᵀAp/pᵀp that the solver met (`NormalCG`: least ‖Aᵀp‖/‖p‖); below 0, A
            is not positive definite.
        ritz_min: least Ritz value from CG's coefficients: an estimate, from above, of A's least
            eigenvalue in units of A's scale (λ for `proximal`, else 1).
        ritz_max: greatest Ritz value, from below, likewise.
        solve_error_bound: a bound on the 2-norm of the error of dθ that the linear solve makes
            (for other conditions than `proximal`, of u); None unless the strong convexity is known.
        outer_loss_error: −uᵀF, the first-order estimate of how much the outer loss would change
            if the inner problem were solved exactly.
        curvature: the operator: "hessian", "gauss_newton" or "jacobian".
        damping: added to A's diagonal by the linear solver; not 0 means that the answer differs.
    """

    status: Status
    iterations: int
    linear_residual: float | None
    inner_residual: float
    min_curvature: float | None
    ritz_min: float | None
    ritz_max: float | None
    solve_error_bound: float | None
    outer_loss_error: float
    curvature: str
    damping: float


class Monitor:
    """Collects one `Report` for each backward solve, from whatever thread runs it.

    >>> monitor = Monitor()
    >>> monitor.reports, monitor.last
    ([], None)
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self.reports[-1] if self.reports else None

    def clear(self) -> None:
        """Forget all reports."""
        self.reports.clear()


@dataclasses.dataclass(frozen=True)
class Reporting:
    """Where news of a backward solve goes, and what is known beforehand.

    `strong_convexity` is μ relative to the operator's scale; `inner_solved` says whether φ was
    meant to solve the inner problem (a few adaptation steps do not mean to).
    """

    monitor: Monitor | None = None
    on_failure: OnFailure = "warn"
    curvature: str = "hessian"
    damping: float = 0.0
    strong_convexity: float | None = None
    inner_solved: bool = True

    def __post_init__(self) -> None:
        if self.monitor is not None and not isinstance(self.monitor, Monitor):
            raise InvalidArgumentError(
                f"monitor must be an implicit_grad.Monitor(), got {self.monitor!r}"
            )
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise InvalidArgumentError(
                f'on_failure={self.on_failure!r}: expected "warn", "raise" or "ignore"'
            )

    def solve(self, solver: LinearSolver, around: Linearization, v: Tensors) -> Tensors:
        """u with Aᵀu = v; the residual is recomputed where someone will read it."""
        u, solution = solve_adjoint(solver, around, v, verify=self.monitor is not None)
        self._tell(solution, around, u)
        return u

    def _tell(self, solution: LinearSolution, around: Linearization, u: Tensors) -> None:
        """Record the solve, and warn or raise if it failed."""
        quiet = self.on_failure == "ignore" or (solution.status.ok and not self.inner_solved)
        if self.monitor is None and quiet:
            return  # nobody would read a report: measure nothing
        report = self._report(solution, around, u)
        if self.monitor is not None:
            self.monitor.reports.append(report)
        if report.status.ok or self.on_failure == "ignore":
            return
        if self.on_failure == "raise":
            raise LinearSolveError(f"{report.status.sentence} ({_figures(report)})", report)
        # no figures here: Python shows a warning once only if its text does not change
        warnings.warn(report.status.sentence, ImplicitGradWarning, stacklevel=2)

    def _report(self, solution: LinearSolution, around: Linearization, u: Tensors) -> Report:
        flat = Flat(around.phi)
        with torch.no_grad():
            residual, phi = flat.ravel(around.residual), flat.ravel(around.phi)
            inner, size = norm(residual), norm(phi)
            outer_error = -dot(flat.ravel(u), residual)
        status = solution.status
        least, greatest = solution.curvature or (None, None)
        if status == Status.EXACT and self.curvature != "jacobian" and least is not None:
            status = Status.NEGATIVE_CURVATURE if least < 0 else status  # not a minimum
        if status.ok and self.inner_solved and greatest is not None and not around.is_adjoint:
            # ‖F‖ ≤ ‖A‖·‖φ − φ*‖: a residual this large means a φ at least that far away
            if not inner <= INNER_TOLERANCE * greatest * max(size, SMALL):
                status = Status.INNER_NOT_STATIONARY
        ritz = ritz_values(solution)
        return Report(
            status=status,
            iterations=solution.iterations,
            linear_residual=solution.residual,
            inner_residual=inner,
            min_curvature=least,
            ritz_min=ritz[0] if ritz else None,
            ritz_max=ritz[-1] if ritz else None,
            solve_error_bound=self._error_bound(solution, around),
            outer_loss_error=outer_error,
            curvature=self.curvature,
            damping=self.damping,
        )

    def _error_bound(self, solution: LinearSolution, around: Linearization) -> float | None:
        if self.strong_convexity is None or self.damping or around.is_adjoint:
            return None
        if not solution.status.ok:
            return None
        energy = radau_bound(solution, self.strong_convexity)
        if energy is None:
            return None
        largest = max((float(s.max()) for s in around.scale or () if s.numel()), default=1.0)
        return math.sqrt(largest * energy / self.strong_convexity)


def radau_bound(solution: LinearSolution, mu: float) -> float | None:
    """A bound on (x − x*)ᵀM(x − x*), if M ⪰ μ times its scale.

    The Gauss-Radau quadrature of Golub and Meurant, in the form of Meurant and Tichý (2013, On
    computing quadrature-based bounds for the A-norm of the error in conjugate gradients).
    """
    if not solution.coefficients:
        return None
    gamma = 1 / mu
    for alpha, beta, _ in solution.coefficients:
        if alpha >= gamma:  # rounding, or a μ that is too large
            return None
        gamma = (gamma - alpha) / (mu * (gamma - alpha) + beta)
    return gamma * solution.coefficients[-1][2]


def ritz_values(solution: LinearSolution) -> list[float]:
    """Eigenvalues of the Lanczos matrix behind CG's coefficients, in ascending order."""
    size = len(solution.coefficients)
    if not size:
        return []
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for j, (alpha, beta, _) in enumerate(solution.coefficients):
        matrix[j, j] += 1 / alpha
        if j + 1 < size:
            matrix[j + 1, j + 1] = beta / alpha
            matrix[j, j + 1] = matrix[j + 1, j] = math.sqrt(beta) / alpha
    values: list[float] = torch.linalg.eigvalsh(matrix).tolist()
    return values


def _figures(report: Report) -> str:
    parts = [f"status {report.status.name}", f"{report.iterations} iterations"]
    for name in ("linear_residual", "inner_residual", "min_curvature"):
        value = getattr(report, name)
        if value is not None:
            parts.append(f"{name} {value:.2g}")
    return ", ".join(parts)
