"""Matrices with a chosen spectrum, made of numbers that one can read."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["definite", "indefinite", "nonsymmetric"]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers; drawn in float64, so that a seed means the same in every dtype."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=random).to(dtype)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A square matrix with the given eigenvalues.

    Q (Λ + N) Qᵀ, with Λ the diagonal of `spectrum`, N strictly upper triangular and 0 but for
    `skew` next to the diagonal, and Q orthogonal, from `seed`; seed 0 stands for Q = I, so that the
    simplest operator is a diagonal matrix.

    >>> Operator((1.0, 3.0)).matrix
    tensor([[1., 0.],
            [0., 3.]], dtype=torch.float64)
    """

    spectrum: tuple[float, ...]
    seed: int = 0
    skew: float = 0.0
    dtype: torch.dtype = torch.float64

    def __repr__(self) -> str:
        parts = [str(self.spectrum)]
        parts += [f"seed={self.seed}"] if self.seed else []
        parts += [f"skew={self.skew}"] if self.skew else []
        parts += [f"dtype={self.dtype}"] if self.dtype != torch.float64 else []
        return f"Operator({', '.join(parts)})"

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.spectrum)

    @property
    def symmetric(self) -> bool:
        """Whether the matrix is."""
        return not self.skew or self.size < 2

    @property
    def matrix(self) -> Tensor:
        """The matrix, dense."""
        core = torch.diag(torch.tensor(self.spectrum, dtype=torch.float64))
        core += self.skew * torch.diag(torch.ones(max(self.size - 1, 0), dtype=torch.float64), 1)
        if self.seed:
            basis, _ = torch.linalg.qr(normal(self.size, self.size, seed=self.seed))
            core = basis @ core @ basis.T
        return ((core + core.T) / 2 if self.symmetric else core).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The product with a vector."""
        return self.matrix @ x
