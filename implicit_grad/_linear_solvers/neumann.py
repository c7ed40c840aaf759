"""The Neumann series: a fixed number of terms, for systems near a multiple of the identity."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator, dot, norm
from implicit_grad._options import is_number, require, require_count

# Products taken to estimate the largest eigenvalue.
_POWER_ITERATIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """The truncated Neumann series (Lorraine, Vicol and Duvenaud, 2020), without any symmetry.

    x = s·Σ_{k < terms} (I − s·M)ᵏ rhs, for s = `scale`. The sum is what `terms` steps of gradient
    descent find, and the gradient of that many unrolled steps of length s. It converges if every
    eigenvalue of s·M lies within 1 of 1. With a Hessian and a given `scale`, those steps are what
    is asked for: they need not converge (see also `EarlyStopped`), but may not be too long.

    Args:
        terms: how many. Each takes one product; that of the last one tells the residual.
        scale: s; None takes 1/|λ| for the eigenvalue λ of greatest size, estimated by 8 power
            iterations from a fixed random vector.

    >>> Neumann(terms=10).scale is None
    True
    """

    terms: int = 20
    scale: float | None = None

    symmetric_only: ClassVar[bool] = False
    definite_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count(self, "terms", 1)
        scale = self.scale
        good = scale is None or (is_number(scale) and 0 < abs(scale) < math.inf)
        require(self, "scale", good, "None or a finite number other than 0")

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        eps, size, products, scale = operator.precision(rhs), norm(rhs), 0, self.scale
        if scale is None:
            products = _POWER_ITERATIONS
            largest = _largest_eigenvalue(operator, rhs)
            if largest == 0.0:
                return LinearSolution(torch.zeros_like(rhs), Status.SINGULAR, products, 1.0)
            scale = 1 / largest
        x, term, before = torch.zeros_like(rhs), rhs.clone(), math.inf
        after, turns = size, False
        for _ in range(self.terms):
            x.add_(term, alpha=scale)
            product = operator.matvec(term)
            products += 1
            before, turns = after, scale * dot(term, product) > after**2
            term.sub_(product, alpha=scale)  # the residual of x, but for rounding
            after = norm(term)
            if not eps * size < after < size / eps:
                break
        if not math.isfinite(after):
            nan = torch.full_like(rhs, math.nan)
            return LinearSolution(nan, Status.NONFINITE_OPERATOR, products)
        residual = norm(rhs - operator.matvec(x)) / size
        steps = operator.is_hessian and self.scale is not None and not (turns and after >= before)
        if residual <= eps ** (2 / 3):
            status = Status.CONVERGED
        elif steps:  # where terms grow, it is along negative curvature, as the steps' derivative
            return LinearSolution(x, Status.TRUNCATED, products, residual, filter_error=0.0)
        elif after >= before or residual >= 1:
            status = Status.DIVERGED
        else:
            status = Status.TRUNCATED
        # the series converges for the |λ| that its scale is made for
        return LinearSolution(x, status, products, residual, norm=1 / abs(scale))


def _largest_eigenvalue(operator: Operator, like: Tensor) -> float:
    """About the size of the eigenvalue of greatest size; NaN if a product is not finite."""
    random = torch.Generator().manual_seed(0)  # of its own: no draw of the user's changes
    v = torch.randn(like.numel(), generator=random).to(like)
    size = 0.0
    for _ in range(_POWER_ITERATIONS):
        v = operator.matvec(v / norm(v))
        size = norm(v)
        if size == 0.0:
            break
    return size
