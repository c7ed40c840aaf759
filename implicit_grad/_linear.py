"""The contract of linear solvers, and the dense one: find x with M x = rhs, M given by products."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, Status


@dataclasses.dataclass(frozen=True)
class Operator:
    """A square matrix known by its products with flat vectors.

    `scale` is its natural unit (λ of a proximal term, as a number or per element): what the matrix
    would be if it were diagonal. None means 1. `eps` is the relative precision of the products,
    None that of the vectors.
    """

    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]
    scale: float | Tensor | None = None
    eps: float | None = None


@dataclasses.dataclass(frozen=True)
class LinearSolution:
    """What a linear solver found, and how it knows.

    `residual` is ‖rhs − M x‖/‖rhs‖, computed from x and not carried along (None if not computed).
    `curvature` holds the least and greatest pᵀMp/pᵀp met. `coefficients` are CG's: for each
    iteration alpha, beta and the new residual's rᵀr (over the scale, if any); Ritz values and error
    bounds follow from them.
    """

    x: Tensor
    status: Status
    iterations: int = 0
    residual: float | None = None
    curvature: tuple[float, float] | None = None
    coefficients: tuple[tuple[float, float, float], ...] = ()


class LinearSolver(abc.ABC):
    """Solves M x = rhs; `symmetric_only` says whether M has to be symmetric."""

    symmetric_only: ClassVar[bool]

    def solve(self, operator: Operator, rhs: Tensor, verify: bool = True) -> LinearSolution:
        """Solve operator · x = rhs.

        Zero and non-finite right-hand sides are dealt with here, and the others are brought to
        magnitude 1 by a power of two, which changes no bit unless something would over- or
        underflow. `verify=False` allows to skip the product that recomputes the residual where
        nothing was promised about it.
        """
        largest = float(rhs.abs().max()) if rhs.numel() else 0.0
        if largest == 0.0:
            return LinearSolution(torch.zeros_like(rhs), Status.ZERO_RHS, residual=0.0)
        if not math.isfinite(largest):
            return LinearSolution(torch.full_like(rhs, math.nan), Status.NONFINITE_RHS)
        limit = 126 if rhs.dtype == torch.float32 else 1022
        unit = 2.0 ** max(-limit, min(limit, math.frexp(largest)[1]))
        solution = self._solve(operator, rhs / unit, unit, verify)
        coefficients = tuple((a, b, rr * unit * unit) for a, b, rr in solution.coefficients)
        return dataclasses.replace(solution, x=solution.x * unit, coefficients=coefficients)

    @abc.abstractmethod
    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        """Solve for a right-hand side of magnitude 1, which stands for `unit` times as much."""


def relative_residual(operator: Operator, x: Tensor, rhs: Tensor) -> float:
    """‖rhs − M x‖/‖rhs‖."""
    return norm(rhs - operator.matvec(x)) / norm(rhs)


def dot(x: Tensor, y: Tensor) -> float:
    """xᵀy, in the precision of the vectors (float32 or better)."""
    return float(torch.dot(x, y))


def norm(x: Tensor) -> float:
    """‖x‖₂."""
    return math.sqrt(dot(x, x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(LinearSolver):
    """Dense solution by LU factorisation, for small problems and as the reference in tests.

    Takes one product per unknown, so it refuses systems of more than `max_size` unknowns.

    >>> Exact(max_size=100).max_size
    100
    """

    max_size: int = 2000

    symmetric_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_size < 1:
            raise InvalidArgumentError(f"Exact(max_size={self.max_size}): expected at least 1")

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        n = rhs.numel()
        if n > self.max_size:
            raise InvalidArgumentError(
                f"Exact() would build a dense {n} × {n} matrix; its max_size is {self.max_size}. "
                "Use CG() (or NormalCG() for root and fixed_point), or raise max_size"
            )
        identity = torch.eye(n, dtype=rhs.dtype, device=rhs.device)
        matrix = torch.stack([operator.matvec(column) for column in identity], dim=1)
        if not bool(torch.isfinite(matrix).all()):
            return LinearSolution(torch.full_like(rhs, math.nan), Status.NONFINITE_OPERATOR, n)
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        pivot_sizes = factors.diagonal().abs()
        singular = bool(info) or bool(
            pivot_sizes.min() <= n * torch.finfo(rhs.dtype).eps * pivot_sizes.max()
        )
        x = torch.linalg.lu_solve(factors, pivots, rhs[:, None])[:, 0]
        if singular and not bool(torch.isfinite(x).all()):
            return LinearSolution(torch.full_like(rhs, math.nan), Status.SINGULAR, n)
        status = Status.SINGULAR if singular else Status.EXACT
        residual = norm(rhs - matrix @ x) / norm(rhs)
        return LinearSolution(x, status, n, residual, _extreme_eigenvalues(matrix))


def _extreme_eigenvalues(matrix: Tensor) -> tuple[float, float] | None:
    """Least and greatest eigenvalue of a matrix that is symmetric but for rounding, else None."""
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > rounding:
        return None
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return float(eigenvalues[0]), float(eigenvalues[-1])
