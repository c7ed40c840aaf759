"""One run of conjugate gradients: the recurrences, with their curvature watched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._bounds import ErrorWatch
from implicit_grad._errors import Status
from implicit_grad._linear import LinearSolution, Operator, dot, norm
from implicit_grad._stopping import SLACK, Budget, Run

# Energy gained over this many iterations decides whether CG still makes progress.
PATIENCE = 5
# A step so long that rounding in M times it is this many right-hand sides leads nowhere.
LOST = 100


@dataclasses.dataclass(frozen=True)
class _Claim:
    """The error for which a run stopped, and the μ, known or estimated, that it rests on."""

    error: float
    mu: float
    is_bound: bool


class ConjugateGradients(Run):
    """The iterate and everything that the recurrences carry.

    `precondition` approximates M⁻¹; None divides by M's scale.
    """

    def __init__(
        self,
        operator: Operator,
        rhs: Tensor,
        budget: Budget,
        precondition: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(operator, rhs, budget)
        self.precondition = precondition
        self.coefficients: list[tuple[float, float, float]] = []
        self.warm = False
        self._claim: _Claim | None = None

    def start_at(self, x: Tensor) -> None:
        """Start from x if it is nearer than 0 in the energy norm; takes one product, and x itself.

        (x − x*)ᵀM(x − x*) − x*ᵀM x* = −xᵀ(rhs + residual). The residual's size would not tell: that
        of CG's iterates may well be larger than the right-hand side's.
        """
        residual = self.rhs - self.operator.matvec(x)
        self.iterations += 1
        if dot(x, self.rhs + residual) > 0:
            self.x, self.residual, self.warm = x, residual, True

    def iterate(self) -> None:
        """Conjugate gradients on operator · d = residual, adding d to x."""
        self.residual = r = self.residual.clone()
        self.status, self._claim = self.budget.exhausted, None
        rr = dot(r, r)
        if math.sqrt(rr) <= self.budget.target:
            self.status = Status.CONVERGED
            return
        z, weight = self._preconditioned(r)
        rz = weight * (rr if z is r else dot(r, z))
        if not rz > 0:
            return self._stop_at_preconditioner()
        p = z * weight
        watch = None if self.operator.rtol_error is None else ErrorWatch(self.operator.mu, rz)
        energy, gains = 0.0, [math.inf] * PATIENCE
        eps, size = torch.finfo(r.dtype).eps, norm(self.rhs)
        while self.iterations < self.budget.maxiter:
            product = self.operator.matvec(p)
            self.iterations += 1
            curvature = dot(p, product)
            if not math.isfinite(curvature):
                return self.fail(Status.NONFINITE_OPERATOR)
            pp = dot(p, p)
            self.meet(curvature / pp)
            if curvature <= 0:
                return self._stop_at_negative_curvature()
            alpha = rz / curvature
            if alpha * math.sqrt(pp) * self._curvature[1] * eps > LOST * size:
                self.status = Status.SINGULAR
                return
            self.x.add_(p, alpha=alpha)
            r.sub_(product, alpha=alpha)
            del product  # the next one need not find it still there
            rr = dot(r, r)
            z, weight = self._preconditioned(r)
            gain, rz_before = alpha * rz, rz
            rz = weight * (rr if z is r else dot(r, z))
            beta = rz / rz_before
            self.coefficients.append((alpha, beta, rz))
            if math.sqrt(rr) <= self.budget.target:
                self.status = Status.CONVERGED
                return
            if not rz > 0:
                return self._stop_at_preconditioner()
            if watch is not None and self._near_enough(watch):
                self.status = Status.CONVERGED
                return
            energy, gains = energy + gain, [*gains[1:], gain]
            if sum(gains) <= eps**2 * energy:
                self.status = self.budget.stalled
                return
            p.mul_(beta).add_(z, alpha=weight)

    def solution(self, residual: float | None) -> LinearSolution:
        """The result, with CG's coefficients where a single run of recurrences made it."""
        connected = self.precondition is None and not self.restarted
        return dataclasses.replace(
            super().solution(residual),
            coefficients=tuple(self.coefficients) if connected else (),
            error_is_bound=None if self._claim is None else self._claim.is_bound,
        )

    def _kept(self, size: float) -> bool:
        """The promise is a small residual, or, if the error ended the run, a small error."""
        if super()._kept(size) or self._claim is None:
            return super()._kept(size)
        return self._claim.error + (self.gap or 0.0) / self._claim.mu <= SLACK * self._error_limit

    @property
    def _missed(self) -> Status:
        return super()._missed if self._claim is None else Status.STAGNATED

    def _preconditioned(self, r: Tensor) -> tuple[Tensor, float]:
        """z and w with w·z = r preconditioned; a scale that is a number costs no vector."""
        if self.precondition is not None:
            return self.precondition(r), 1.0
        scale = self.operator.scale
        if isinstance(scale, Tensor):
            return r / scale, 1.0
        return r, 1.0 if scale is None else 1.0 / scale

    @property
    def _error_limit(self) -> float:
        return (self.operator.rtol_error or 0.0) * self.operator.scaled_norm(self.x)

    def _near_enough(self, watch: ErrorWatch) -> bool:
        """Whether the iterate's error is at most what `Operator.rtol_error` allows."""
        limit, known = self._error_limit, self.operator.mu
        if self.precondition is None:
            watch.note(*self.coefficients[-1])
            near, error, mu = watch.within(limit), watch.error, watch.mu
        else:  # the coefficients do not tell about M over its scale, but ‖e‖ ≤ ‖r‖/μ
            scale = self.operator.scale
            largest = 1.0 if scale is None else float(torch.as_tensor(scale).max())
            mu = self._curvature[0] / largest if known is None else known
            error = self.operator.residual_norm(self.residual) / mu
            near = error <= limit
        if near:
            self._claim = _Claim(error, mu, known is not None)
        return near

    def _stop_at_negative_curvature(self) -> None:
        """Keep x, a descent direction, but no longer than the first-order solution."""
        self.status = Status.NEGATIVE_CURVATURE
        self._at_least_first_order()
        size, limit = self.operator.scaled_norm(self.x), self.operator.residual_norm(self.rhs)
        if size > limit:
            self.x.mul_(limit / size)

    def _stop_at_preconditioner(self) -> None:
        """Keep x, which rests on directions that were right."""
        self.status = Status.BAD_PRECONDITIONER
        self._at_least_first_order()

    def _at_least_first_order(self) -> None:
        if not self.coefficients:
            self.x = self.operator.over_scale(self.rhs).clone()
