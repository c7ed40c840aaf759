"""Conjugate gradients on the normal equations: for systems without symmetry."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import (
    LinearSolution,
    Operator,
    dot,
    norm,
    relative_residual,
)
from implicit_grad._linear_solvers.iterative import SLACK, Iterative
from implicit_grad._linear_solvers.small_systems import TogetherIfSmall

# Mᵀs is 0 to working precision if it is this many times eps of what its size could be.
_ROUNDING = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG(Iterative, TogetherIfSmall):
    """Conjugate gradients on the normal equations MᵀM x = Mᵀ rhs, for non-symmetric systems.

    Two products an iteration and the condition number squared: the price of needing no symmetry and
    keeping no vectors. Half of the products are with A itself, which takes second derivatives of
    the residual. `rtol` is that of the system itself, ‖rhs − M x‖ ≤ rtol ‖rhs‖, and so is
    `atol`; `maxiter` is a limit, also without them.

    >>> NormalCG(rtol=1e-8).symmetric_only
    False
    """

    symmetric_only: ClassVar[bool] = False
    takes_both_products: ClassVar[bool] = True

    @property
    def takes_small_tasks(self) -> bool:  # type: ignore[override]
        """Whether no number of iterations was asked for."""
        return self.maxiter is None

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        """CGLS: the residual s of the system is carried, that of the normal equations is Mᵀs."""
        budget = self.budget(operator, rhs, unit)
        eps = torch.finfo(rhs.dtype).eps
        status, least, greatest = budget.exhausted, math.inf, 0.0
        x, s = torch.zeros_like(rhs), rhs.clone()
        r = operator.rmatvec(s)
        p, rr = r.clone(), dot(r, r)
        iterations = 0
        while iterations < budget.maxiter:
            if math.sqrt(rr) <= _ROUNDING * eps * greatest * norm(s):
                status = Status.SINGULAR  # a least-squares solution, and s is not small
                break
            product = operator.matvec(p)
            iterations += 1
            stretch = dot(product, product)
            if not math.isfinite(stretch + rr):
                nan = torch.full_like(rhs, math.nan)
                return LinearSolution(nan, Status.NONFINITE_OPERATOR, iterations)
            if stretch == 0.0:
                status = Status.SINGULAR
                break
            quotient = math.sqrt(stretch / dot(p, p))
            least, greatest = min(least, quotient), max(greatest, quotient)
            x.add_(p, alpha=rr / stretch)
            s.sub_(product, alpha=rr / stretch)
            if norm(s) <= budget.target:
                status = Status.CONVERGED
                break
            r, rr_before = operator.rmatvec(s), rr
            rr = dot(r, r)
            p.mul_(rr / rr_before).add_(r)
        residual = relative_residual(operator, x, rhs)
        if status == Status.CONVERGED and residual * norm(rhs) > SLACK * budget.target:
            status = budget.stalled
        met = (least, greatest) if least <= greatest else None
        return LinearSolution(x, status, iterations, residual, met)
