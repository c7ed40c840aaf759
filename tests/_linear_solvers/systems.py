"""Linear systems with known properties, and operators that are matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._linear_solvers.base import Operator

F32, F64 = torch.float32, torch.float64


def orthogonal(n: int, random: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=random))[0]


def symmetric(values: Tensor, random: torch.Generator) -> Tensor:
    basis = orthogonal(len(values), random)
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def operator(matrix: Tensor, like: Tensor | None = None, **known) -> Operator:
    """A matrix as an operator on vectors like this one, products rounded to the matrix's dtype."""
    vectors = matrix.dtype if like is None else like.dtype

    def product(m: Tensor) -> Callable[[Tensor], Tensor]:
        if m.dtype == vectors:
            return lambda x: m @ x
        wide = m.to(vectors)
        return lambda x: (wide @ x).to(m.dtype).to(vectors)

    eps = torch.finfo(matrix.dtype).eps
    return Operator(product(matrix), product(matrix.T), eps=eps, **known)


def low_rank_plus_identity(seed: int, n: int = 200, rank: int = 8) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.ones(n, dtype=F64)
    values[:rank] += 10 ** (1 + 3 * torch.rand(rank, dtype=F64, generator=random))
    values[rank:] += torch.rand(n - rank, dtype=F64, generator=random) * 0.1
    return symmetric(values, random), torch.randn(n, dtype=F64, generator=random)


class Counting:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.products, self._matrix = 0, matrix
        self.operator = Operator(self.product, self.product)

    def product(self, x: Tensor) -> Tensor:
        self.products += 1
        return self._matrix @ x


def indefinite(seed: int, n: int = 60) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(n, dtype=F64, generator=random) * 3 + 0.1
    negative = 1 + seed % 5
    values[:negative] = -0.05 - torch.rand(negative, dtype=F64, generator=random)
    return symmetric(values, random), torch.randn(n, dtype=F64, generator=random)
