"""Conjugate gradients, with its curvature watched and its residual recomputed."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, LinearSolveError, Status
from implicit_grad._linear import (
    LinearSolution,
    LinearSolver,
    Operator,
    dot,
    norm,
    relative_residual,
)

# Energy gained over this many iterations decides whether CG still makes progress.
_PATIENCE = 5
# A restart from the recomputed residual must cut it by this factor to be worth the products.
_RESTART_GAIN = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients for symmetric systems (Hestenes and Stiefel, 1952).

    Args:
        maxiter: most products to take. 0 takes none: with `proximal` that is first-order MAML.
        rtol: stop when the residual is at most `rtol` times the right-hand side. None with a given
            `maxiter` asks for a fixed budget, the truncation of the iMAML paper, which does not
            warn. None without `maxiter` means eps^(2/3) for the coarsest dtype among the tensors:
            4e-11 in float64, 2e-5 in float32.
        atol: or when the residual is at most `atol`, in the units of the right-hand side.
        damping: solve (A + damping·I) u = v instead. It changes the answer; off by default.
        on_negative_curvature: at the first direction p with pᵀAp ≤ 0, "stop" at the current
            iterate (on the very first direction: v over A's scale, first-order MAML) or "raise".

    A solve that stops before convergence is not linear in v: the gradient of a sum of losses is
    then not exactly the sum of their gradients. Until such a direction is met every iterate x has
    vᵀx > 0; where all curvature is positive the safeguard changes no bit. After a stop, ‖x‖ is
    limited to that of the first-order solution.

    >>> CG(maxiter=5)
    CG(maxiter=5, rtol=None, atol=0.0, damping=0.0, on_negative_curvature='stop')
    """

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    on_negative_curvature: Literal["stop", "raise"] = "stop"

    symmetric_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_stopping(self, least=0)
        if not 0 <= self.damping < math.inf:
            raise InvalidArgumentError(
                f"CG(damping={self.damping}): expected a finite number of at least 0"
            )
        if self.on_negative_curvature not in ("stop", "raise"):
            raise InvalidArgumentError(
                f"CG(on_negative_curvature={self.on_negative_curvature!r}): "
                'expected "stop" or "raise"'
            )

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        if self.damping:
            undamped = operator.matvec
            operator = dataclasses.replace(
                operator, matvec=lambda x: undamped(x) + self.damping * x
            )
        if self.maxiter == 0:
            return LinearSolution(_over_scale(rhs, operator), Status.FIRST_ORDER)
        budget = _Budget.of(self, operator, rhs, unit)
        run = _Run(operator, rhs, budget)
        run.iterate()
        if not budget.fixed:
            residual: float | None = run.refine()
        else:
            residual = relative_residual(operator, run.x, rhs) if verify else None
        if run.status == Status.NEGATIVE_CURVATURE and self.on_negative_curvature == "raise":
            raise LinearSolveError(f"CG met negative curvature: {run.status.sentence}")
        return run.solution(residual)


@dataclasses.dataclass(frozen=True)
class _Budget:
    """When to stop: at a residual norm, or after a number of iterations."""

    target: float
    maxiter: int
    fixed: bool  # the number of iterations is a choice, and no tolerance was asked for

    @staticmethod
    def of(solver: CG | NormalCG, operator: Operator, rhs: Tensor, unit: float) -> _Budget:
        """The rules of `CG`, for a right-hand side that was divided by `unit`."""
        eps = torch.finfo(rhs.dtype).eps if operator.eps is None else operator.eps
        fixed = solver.maxiter is not None and solver.rtol is None and solver.atol == 0.0
        rtol = eps ** (2 / 3) if solver.rtol is None else max(solver.rtol, 10 * eps)
        if fixed:
            rtol = eps
        maxiter = min(10 * rhs.numel(), 1000) if solver.maxiter is None else solver.maxiter
        return _Budget(max(rtol * norm(rhs), solver.atol / unit), maxiter, fixed)

    @property
    def exhausted(self) -> Status:
        """The status of a run that used all its iterations."""
        return Status.TRUNCATED if self.fixed else Status.MAX_ITER


class _Run:
    """One run of CG: the iterate and everything that the recurrences carry."""

    def __init__(self, operator: Operator, rhs: Tensor, budget: _Budget) -> None:
        self.operator, self.rhs, self.budget = operator, rhs, budget
        self.x = torch.zeros_like(rhs)
        self.residual = rhs
        self.status = budget.exhausted
        self.iterations = 0
        self.curvature = (math.inf, -math.inf)
        self.coefficients: list[tuple[float, float, float]] = []
        self.restarted = False

    def iterate(self) -> None:
        """Conjugate gradients on operator · d = residual, adding d to x."""
        r = self.residual.clone()
        p = _over_scale(r, self.operator).clone()
        rz = dot(r, p)
        rz_start, energy, gains = rz, 0.0, [math.inf] * _PATIENCE
        x_norm, x_dot_p, p_norm = 0.0, 0.0, rz  # squares and products, weighted by the scale
        self.status = self.budget.exhausted
        while self.iterations < self.budget.maxiter:
            product = self.operator.matvec(p)
            self.iterations += 1
            curvature = dot(p, product)
            if not math.isfinite(curvature):
                self.status = Status.NONFINITE_OPERATOR
                self.x = torch.full_like(self.x, math.nan)
                return
            self._note(curvature / dot(p, p))
            if curvature <= 0:
                self._stop_at_negative_curvature(x_norm, rz_start)
                return
            alpha = rz / curvature
            self.x.add_(p, alpha=alpha)
            r.sub_(product, alpha=alpha)
            x_norm += 2 * alpha * x_dot_p + alpha * alpha * p_norm
            rr = dot(r, r)
            z, weight = self._preconditioned(r)
            gain, rz_before = alpha * rz, rz
            rz = weight * (rr if z is r else dot(r, z))
            beta = rz / rz_before
            self.coefficients.append((alpha, beta, rz))
            if math.sqrt(rr) <= self.budget.target:
                self.status = Status.CONVERGED
                return
            energy, gains = energy + gain, [*gains[1:], gain]
            if sum(gains) <= torch.finfo(r.dtype).eps ** 2 * energy:
                self.status = Status.STAGNATED
                return
            x_dot_p = beta * (x_dot_p + alpha * p_norm)
            p_norm = rz + beta * beta * p_norm
            p.mul_(beta).add_(z, alpha=weight)

    def refine(self) -> float:
        """Hold the carried residual to its word: recompute it, and restart where it has drifted.

        Returns the relative residual. The factor 2 is the slack between the two residuals.
        """
        before = math.inf
        while True:
            self.residual = self.rhs - self.operator.matvec(self.x)
            size = norm(self.residual)
            if self.status in (Status.CONVERGED, Status.STAGNATED):
                small = size <= 2 * self.budget.target
                self.status = Status.CONVERGED if small else Status.STAGNATED
                room = self.iterations < self.budget.maxiter
                if not small and room and size < _RESTART_GAIN * before:
                    before, self.restarted = size, True
                    self.iterate()
                    continue
            return size / norm(self.rhs)

    def solution(self, residual: float | None) -> LinearSolution:
        """The result, with CG's coefficients where a single run of recurrences made it."""
        return LinearSolution(
            self.x,
            self.status,
            self.iterations,
            residual,
            self.curvature if self.iterations else None,
            () if self.restarted else tuple(self.coefficients),
        )

    def _preconditioned(self, r: Tensor) -> tuple[Tensor, float]:
        """z and w with w·z = r over the scale; a scale that is a number costs no vector."""
        scale = self.operator.scale
        if isinstance(scale, Tensor):
            return r / scale, 1.0
        return r, 1.0 if scale is None else 1.0 / scale

    def _note(self, curvature: float) -> None:
        least, greatest = self.curvature
        self.curvature = (min(least, curvature), max(greatest, curvature))

    def _stop_at_negative_curvature(self, x_norm: float, rz_start: float) -> None:
        """Keep x, a descent direction, but no longer than the first-order solution."""
        self.status = Status.NEGATIVE_CURVATURE
        if self.iterations == 1:
            self.x = _over_scale(self.rhs, self.operator).clone()
        elif x_norm > rz_start and not self.restarted:
            self.x.mul_(math.sqrt(rz_start / x_norm))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on the normal equations MᵀM x = Mᵀ rhs, for non-symmetric systems.

    Two products an iteration and the condition number squared: the price of needing no symmetry.
    Arguments as for `CG`; `rtol` is that of the system itself, ‖rhs − M x‖ ≤ rtol ‖rhs‖.

    >>> NormalCG(rtol=1e-8).symmetric_only
    False
    """

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0

    symmetric_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_stopping(self, least=1)

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        """CGLS: the residual s of the system is carried, that of the normal equations is Mᵀs."""
        budget = _Budget.of(self, operator, rhs, unit)
        status, least, greatest = budget.exhausted, math.inf, -math.inf
        x, s = torch.zeros_like(rhs), rhs.clone()
        r = operator.rmatvec(s)
        p, rr = r.clone(), dot(r, r)
        iterations = 0
        while iterations < budget.maxiter:
            product = operator.matvec(p)
            iterations += 1
            stretch = dot(product, product)
            if not math.isfinite(stretch + rr):
                nan = torch.full_like(rhs, math.nan)
                return LinearSolution(nan, Status.NONFINITE_OPERATOR, iterations)
            if stretch == 0.0:
                status = Status.SINGULAR
                break
            curvature = math.sqrt(stretch / dot(p, p))
            least, greatest = min(least, curvature), max(greatest, curvature)
            x.add_(p, alpha=rr / stretch)
            s.sub_(product, alpha=rr / stretch)
            if norm(s) <= budget.target:
                status = Status.CONVERGED
                break
            r, rr_before = operator.rmatvec(s), rr
            rr = dot(r, r)
            p.mul_(rr / rr_before).add_(r)
        residual = relative_residual(operator, x, rhs)
        if status == Status.CONVERGED and residual * norm(rhs) > 2 * budget.target:
            status = Status.STAGNATED
        return LinearSolution(x, status, iterations, residual, (least, greatest))


def _over_scale(rhs: Tensor, operator: Operator) -> Tensor:
    """The solution if the operator were just its scale: no product taken."""
    return rhs if operator.scale is None else rhs / operator.scale


def _check_stopping(solver: CG | NormalCG, least: int) -> None:
    name, maxiter = type(solver).__name__, solver.maxiter
    if maxiter is not None and (
        not isinstance(maxiter, int) or isinstance(maxiter, bool) or maxiter < least
    ):
        raise InvalidArgumentError(
            f"{name}(maxiter={maxiter!r}): expected None or an integer of at least {least}"
        )
    if solver.rtol is not None and not 0 < solver.rtol < 1:
        raise InvalidArgumentError(
            f"{name}(rtol={solver.rtol!r}): expected None or a number between 0 and 1"
        )
    if not 0 <= solver.atol < math.inf:
        raise InvalidArgumentError(f"{name}(atol={solver.atol!r}): expected a number of at least 0")
