"""MINRES: the iterate of least residual, for symmetric systems that may be indefinite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.abreast import solve_abreast
from implicit_grad._linear_solvers.base import LinearSolution, Operator, dot, norm
from implicit_grad._linear_solvers.iterative import Iterative, Stepwise
from implicit_grad._linear_solvers.small_systems import TogetherIfSmall
from implicit_grad._options import require_nonnegative

# The decrease of the squared residual over this many iterations tells whether there is progress.
_PATIENCE = 5
# The matrix is singular to working precision if an x so large that rounding in M x is this part of
# the right-hand side still does not solve the system.
_LOST = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MINRES(Iterative, TogetherIfSmall):
    """The minimal residual method for symmetric systems (Paige and Saunders, 1975).

    Solves A u = v whether A is positive definite or not; at a saddle or a maximum of the inner
    objective the solution exists but is not the derivative of a minimiser. Arguments as for `CG`.

    >>> MINRES(maxiter=20)
    MINRES(maxiter=20, rtol=None, atol=0.0, damping=0.0)
    """

    damping: float = 0.0

    symmetric_only: ClassVar[bool] = True
    truncates: ClassVar[bool] = True
    takes_tasks = True
    when_indefinite: ClassVar[str] = "MINRES goes on there, for phi may be a saddle"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative(self, "damping")

    @property
    def takes_small_tasks(self) -> bool:  # type: ignore[override]
        """Whether no number of iterations was asked for."""
        return self.maxiter is None

    def takes(self, n_tasks: int, unknowns: int) -> bool:
        """Any number of any size: side by side, if not by a factorisation."""
        return True

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        run = self._run(operator, rhs, unit)
        run.iterate()
        return run.solution(run.refine() if verify or not run.budget.fixed else None)

    def solve_tasks(
        self, operator: Operator, rhs: Tensor, verify: bool
    ) -> tuple[Tensor, list[LinearSolution]]:
        if self.takes_small_tasks and super().takes(*rhs.shape):
            return super().solve_tasks(operator, rhs, verify)
        return solve_abreast(self._run, operator, rhs, verify)

    def _run(self, operator: Operator, rhs: Tensor, unit: float) -> _MinimalResidual:
        budget = self.budget(operator, rhs, unit)
        return _MinimalResidual(operator.damped(self.damping), rhs, budget)


class _MinimalResidual(Stepwise):
    """Lanczos tridiagonalisation, and its QR factorisation by one rotation an iteration."""

    size = 0.0  # of the tridiagonal matrix, and so of M, from below

    def solution(self, residual: float | None) -> LinearSolution:
        found = super().solution(residual)
        # the extremes are 0 where M only links two groups of unknowns, such as φ and multipliers
        return dataclasses.replace(found, norm=self.size if self.operator.scale is None else None)

    def steps(self) -> Generator[Tensor, Tensor, None]:
        """MINRES on operator · d = residual, adding d to x.

        Names as in the paper: v is a Lanczos vector (orthonormal in the scale's inner product, u
        is the scale times v, times beta), alpha and beta the tridiagonal matrix, c and s the
        rotation, phi_bar the residual norm √(rᵀS⁻¹r).
        """
        self.residual = r = self.residual.clone()
        self.status, eps = self.budget.exhausted, self.operator.precision(r)
        u_before, u = torch.zeros_like(r), r.clone()
        w_before, w = torch.zeros_like(r), torch.zeros_like(r)
        z = self.operator.over_scale(u)
        beta_before, beta = 1.0, math.sqrt(dot(u, z))
        start = phi_bar = beta
        delta_bar, epsilon, c, s, size = 0.0, 0.0, -1.0, 0.0, 0.0
        gains, least_squares = [math.inf] * _PATIENCE, None
        while self.iterations < self.budget.maxiter:
            v = z / beta
            product = yield v
            self.iterations += 1
            product = product.sub(u_before, alpha=beta / beta_before)
            alpha = dot(v, product)
            u_before, u = u, product.sub_(u, alpha=alpha / beta)
            z = self.operator.over_scale(u)
            square = dot(u, z)
            if not math.isfinite(alpha + square):
                self.fail(Status.NONFINITE_OPERATOR)
                return
            self.meet(alpha / dot(v, v))
            beta_before, beta = beta, math.sqrt(square)
            self.size = size = max(size, math.hypot(alpha, beta))
            # the last rotation, on the new column; then a new one, to make beta disappear
            delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
            epsilon_before, epsilon, delta_bar = epsilon, s * beta, -c * beta
            if c * gamma_bar > eps * size:  # the residual's own curvature: Liu and Roosta (2022)
                z_r = self.operator.over_scale(r)
                self.meet(-c * gamma_bar * dot(r, z_r) / dot(z_r, z_r))
            gamma = math.hypot(gamma_bar, beta)
            slope = math.hypot(gamma_bar, delta_bar)  # ‖M r‖ over ‖r‖
            if slope <= math.sqrt(eps) * size and least_squares is None:
                least_squares = self.x.clone()
            if least_squares is not None and (
                gamma <= eps * size or eps * size * norm(self.x) > _LOST * norm(self.rhs)
            ):
                self.x, self.status = least_squares, Status.SINGULAR
                return
            c, s = gamma_bar / gamma, beta / gamma
            w_before, w = w, v.sub_(w_before, alpha=epsilon_before).sub_(w, alpha=delta).div_(gamma)
            self.x.add_(w, alpha=c * phi_bar)
            gains = [*gains[1:], (c * phi_bar) ** 2]
            phi_bar *= s
            if beta:
                r.mul_(s * s).sub_(u, alpha=c * phi_bar / beta)
            if beta == 0 or norm(r) <= self.budget.target:
                self.status = Status.CONVERGED
                return
            if sum(gains) <= (eps * start) ** 2:
                self.status = self.budget.stalled
                return
