"""Batches of small systems: their matrices, by a product for each unknown, and one factorisation.

A product with a unit vector for each task is a column of all their matrices at once, and LU
factorisations of a batch are one call. So a batch costs little more than its largest system, and
solutions are those of a direct method: more accurate than any tolerance asked for. A system that is
out of the ordinary (singular, or not finite, or without a right-hand side) is left to the solver
itself, alone, with products by its matrix, and ends as it would have ended by itself.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator, dots

# Most numbers in all matrices (128 MB in float64).
_NUMBERS = 2**24
# Most unknowns, and most for each task: iterations one by one would take fewer products.
_UNKNOWNS, _FOR_EACH_TASK = 128, 8
# A matrix may be singular to working precision if rounding in M x is this part of rhs, ...
_LOST = 1e-4
# or if the ratio of its pivots is so many times n eps.
_PIVOTS = 10.0
_POWERS = 3  # of MᵀM that estimate ‖M‖₂


class TogetherIfSmall(LinearSolver):
    """A linear solver that leaves batches of small systems to one factorisation.

    Attributes:
        each: whether it takes a product for each unknown by itself, too.
        found: how such a solution ends.
    """

    each: ClassVar[bool] = False
    found: ClassVar[Status] = Status.CONVERGED

    @property
    def takes_small_tasks(self) -> bool:  # type: ignore[override]
        """Whether nothing is asked for that a factorisation does not give."""
        return True

    def takes(self, n_tasks: int, unknowns: int) -> bool:
        """Whether the matrices fit into memory, and iterations would not be less work."""
        few = self.each or unknowns <= min(_UNKNOWNS, _FOR_EACH_TASK * n_tasks)
        return few and n_tasks * unknowns**2 <= _NUMBERS

    def solve_tasks(
        self, operator: Operator, rhs: Tensor, verify: bool
    ) -> tuple[Tensor, list[LinearSolution]]:
        return _solve_small(self, operator, rhs, verify)

    @abc.abstractmethod
    def target(self, operator: Operator, rhs: Tensor) -> float:
        """The relative residual that a solution has to reach."""


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The matrices of all tasks, and what is known of each."""

    matrix: Tensor
    asymmetric: Tensor
    norm: Tensor

    @staticmethod
    def of(operator: Operator, like: Tensor) -> Matrices:
        """By a product for each unknown, of vectors like these rows, if they are not known."""
        known = None if operator.matrix is None else operator.matrix()
        matrix = _by_products(operator, like) if known is None else known
        rounding = like.shape[1] * torch.finfo(like.dtype).eps + 8 * operator.precision(like)
        size, skew = (torch.linalg.matrix_norm(m) for m in (matrix, matrix - matrix.mT))
        return Matrices(matrix, ~(skew <= rounding * size), _norms(matrix))

    def eigenvalues(self) -> Tensor:
        """The least and the greatest of each matrix, which is symmetric or taken for it."""
        matrix = torch.where(torch.isfinite(self.norm)[:, None, None], self.matrix, 0.0)
        found: Tensor = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[:, [0, -1]]
        return found

    def alone(self, operator: Operator, task: int) -> Operator:
        """The operator of one task."""
        matrix, scale = self.matrix[task], operator.scale
        return dataclasses.replace(
            operator,
            matvec=lambda x: matrix @ x,
            rmatvec=lambda x: matrix.mT @ x,
            scale=scale[task] if isinstance(scale, Tensor) and scale.dim() else scale,
            convex=None,
            matrix=None,
        )


def _solve_small(
    solver: TogetherIfSmall, operator: Operator, rhs: Tensor, verify: bool
) -> tuple[Tensor, list[LinearSolution]]:
    """Solve operator · x = rhs, where both have a row for each task."""
    n, status = rhs.shape[1], solver.found
    if not n:
        return rhs.clone(), [solver.solve(operator, row, verify) for row in rhs]
    matrices = Matrices.of(operator, rhs)
    damped = operator.damped(solver.damping)
    shifted = matrices.matrix
    if solver.damping:
        shifted = shifted + solver.damping * torch.eye(n, dtype=rhs.dtype, device=rhs.device)
    factors, pivots, _ = torch.linalg.lu_factor_ex(shifted)
    x = torch.linalg.lu_solve(factors, pivots, rhs[:, :, None])[:, :, 0]
    size, residual = (dots(r, r).sqrt() for r in (rhs, rhs - damped.matvec(x)))
    sizes, eps = factors.diagonal(dim1=1, dim2=2).abs(), torch.finfo(rhs.dtype).eps
    lost = eps * matrices.norm.double() * dots(x, x).sqrt() > _LOST * size
    regular = sizes.amin(1) > _PIVOTS * n * eps * sizes.amax(1)
    ordinary = (size > 0) & regular & ~lost & (residual <= solver.target(operator, rhs) * size)
    if solver.symmetric_only:
        ordinary &= ~matrices.asymmetric
    extremes = None
    if operator.is_hessian or status is Status.EXACT:
        extremes = matrices.eigenvalues()
        if operator.is_hessian and solver.symmetric_only:
            ordinary &= extremes[:, 0] > 0
    else:  # what products with unit vectors met
        diagonal = shifted.diagonal(dim1=1, dim2=2)
        extremes = torch.stack([diagonal.amin(1), diagonal.amax(1)], 1)
    told = torch.stack([
        *(t.double() for t in (ordinary, matrices.asymmetric, residual / size, matrices.norm)),
        *extremes.double().T,
    ])  # fmt: skip
    found = []
    for task, (fine, skew, relative, norm, *met) in enumerate(told.T.tolist()):
        if not fine:
            single = solver.solve(matrices.alone(operator, task), rhs[task], verify)
            x[task] = single.x
            found.append(dataclasses.replace(single, x=x[task]))  # and hold no other
            continue
        known = None if skew and status is Status.EXACT else (met[0], met[1])
        found.append(LinearSolution(x[task], status, n, relative, known, norm=norm))
    return x, found


def _by_products(operator: Operator, like: Tensor) -> Tensor:
    columns = []
    for j in range(like.shape[1]):
        unit = torch.zeros_like(like)
        unit[:, j] = 1.0
        columns.append(operator.matvec(unit))
    return torch.stack(columns, 2)


def _norms(matrix: Tensor) -> Tensor:
    """‖M‖₂ of each matrix, from below."""
    lengths = torch.linalg.vector_norm(matrix, dim=1)
    x = matrix.gather(2, lengths.argmax(1)[:, None, None].expand(-1, matrix.shape[1], 1))
    for _ in range(_POWERS):
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        x = matrix @ (matrix.mT @ x)
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2)).sqrt()
    return norms
