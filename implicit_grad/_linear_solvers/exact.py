"""The dense linear solver: the matrix column by column, and the factorisation that suits it."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, Status
from implicit_grad._linear_solvers.base import LinearSolution, Operator, norm
from implicit_grad._linear_solvers.small_systems import TogetherIfSmall
from implicit_grad._options import require_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(TogetherIfSmall):
    """Dense solution by a factorisation, for small problems and as the reference in tests.

    A matrix that is symmetric, to rounding, is factorised as LLᵀ (Cholesky) if it is positive
    definite, and as LDLᵀ (Bunch and Kaufman, 1977) if it is not; any other matrix as LU. Takes one
    product per unknown, so it refuses systems of more than `max_size` unknowns.

    >>> Exact(max_size=100).max_size
    100
    """

    max_size: int = 2000

    symmetric_only: ClassVar[bool] = False
    each: ClassVar[bool] = True
    found: ClassVar[Status] = Status.EXACT

    def __post_init__(self) -> None:
        require_count(self, "max_size", 1)

    def takes(self, n_tasks: int, unknowns: int) -> bool:
        """Whether the matrices fit into memory; one that is too large is refused."""
        return unknowns <= self.max_size and super().takes(n_tasks, unknowns)

    def target(self, operator: Operator, rhs: Tensor) -> float:
        """The relative residual that tells a regular system."""
        return float(operator.precision(rhs) ** 0.5)

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        n = rhs.numel()
        if n > self.max_size:
            raise InvalidArgumentError(
                f"Exact() would build a dense {n} × {n} matrix; its max_size is {self.max_size}. "
                "Use CG() (or NormalCG() for root and fixed_point), or raise max_size"
            )
        matrix = operator.dense(rhs)
        if not bool(torch.isfinite(matrix).all()):
            return LinearSolution(torch.full_like(rhs, math.nan), Status.NONFINITE_OPERATOR, n)
        # what stands in no equation, and is not asked for, is 0: it makes nothing singular
        there = (matrix != 0).any(0) | (matrix != 0).any(1) | (rhs != 0)
        if bool(there.all()):
            return _factorised(matrix, rhs, operator.precision(rhs), n)
        found = _factorised(matrix[there][:, there], rhs[there], operator.precision(rhs), n)
        x = torch.zeros_like(rhs).masked_scatter(there, found.x)
        return dataclasses.replace(found, x=x)


def _factorised(matrix: Tensor, rhs: Tensor, eps: float, products: int) -> LinearSolution:
    """What a factorisation gives, the matrix's columns being precise to eps."""
    extremes, size = None, None
    if _is_symmetric(matrix, eps):
        x, extremes, singular = _solve_symmetric((matrix + matrix.mT) / 2, rhs)
    else:
        x, singular = _solve_lu(matrix, rhs)
        size = float(torch.linalg.matrix_norm(matrix, 2))
    if not bool(torch.isfinite(x).all()):
        x, singular = torch.linalg.pinv(matrix) @ rhs, True
    status = Status.SINGULAR if singular else Status.EXACT
    residual: float | None = norm(rhs - matrix @ x) / norm(rhs)
    if singular and not residual <= torch.finfo(rhs.dtype).eps ** 0.5:  # there is no solution
        x, residual = torch.full_like(rhs, math.nan), None
    return LinearSolution(x, status, products, residual, extremes, norm=size)


def _is_symmetric(matrix: Tensor, eps: float) -> bool:
    """Whether a matrix is symmetric but for rounding, its columns being precise to eps."""
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps + 8 * eps
    difference = torch.linalg.matrix_norm(matrix - matrix.mT)
    return bool(difference <= rounding * torch.linalg.matrix_norm(matrix))


def _solve_symmetric(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, tuple[float, float], bool]:
    """The solution, the extreme eigenvalues and whether one is 0 to working precision."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    sizes = eigenvalues.abs()
    singular = _negligible(float(sizes.min()), float(sizes.max()), rhs)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        x = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
    else:
        x = _solve_ldl(matrix, rhs)
    return x, (float(eigenvalues[0]), float(eigenvalues[-1])), singular


def _solve_ldl(matrix: Tensor, rhs: Tensor) -> Tensor:
    try:
        factors, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
        x: Tensor = torch.linalg.ldl_solve(factors, pivots, rhs[:, None])[:, 0]
        return x
    except (RuntimeError, NotImplementedError):  # not on every device
        return _solve_lu(matrix, rhs)[0]


def _solve_lu(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, bool]:
    """The solution, and whether a pivot is 0 to working precision."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    sizes = factors.diagonal().abs()
    singular = _negligible(float(sizes.min()), float(sizes.max()), rhs)
    return torch.linalg.lu_solve(factors, pivots, rhs[:, None])[:, 0], singular


def _negligible(least: float, greatest: float, rhs: Tensor) -> bool:
    return least <= rhs.numel() * torch.finfo(rhs.dtype).eps * greatest
