"""φ that holds symmetric or Hermitian matrices: directions that keep them so, and if solutions do.

Values of `cholesky`, `eigh` and what is made of them are those of one triangle, derivatives by
torch's word those of a function of such matrices. In other directions the two differ, which
is no mistake where no solution moves there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._torch.pytree import Tensors, length


class SymmetricPart:
    """What of directions in φ keeps its matrices symmetric, or Hermitian, where they are."""

    def __init__(self, phi: Tensors, eps: float) -> None:
        self._tolerance = eps**0.5
        self._mirrors = [_mirror(p.detach(), self._tolerance) for p in phi]

    def of(self, along: Tensors) -> Tensors:
        """The direction, without what would make the matrices another kind."""
        pairs = zip(along, self._mirrors, strict=True)
        return tuple(d if mirror is None else (d + mirror(d)) / 2 for d, mirror in pairs)

    def has_solutions(
        self, along: Tensors, products: Callable[[Tensors], tuple[Tensors, Tensors]]
    ) -> bool:
        """Whether solutions move in it alone, by products of u with Aᵀ and with (∂F/∂a)ᵀ.

        So it is where for antisymmetric u the former are antisymmetric, and the latter zero.
        """
        if not any(self._mirrors):
            return False
        beside = tuple(d - s for d, s in zip(along, self.of(along), strict=True))
        of_all, of_beside = products(along), products(beside)
        left = self.of(of_beside[0]), of_beside[1]
        return all(
            length(some) <= self._tolerance * length(whole)
            for some, whole in zip(left, of_all, strict=True)
        )


def _mirror(p: Tensor, tolerance: float) -> Callable[[Tensor], Tensor] | None:
    """What leaves a matrix, or a stack of them, as it is, up to what a solver leaves over."""
    for of, rows in ((_transposed, -2), (_adjoint, -3)):
        square = p.ndim >= -rows and p.shape[rows] == p.shape[rows + 1] > 1
        if square and (of is _transposed or p.shape[-1] == 2):
            if length([p - of(p)]) <= tolerance * length([p]):
                return of
    return None


def _transposed(p: Tensor) -> Tensor:
    return p.mT


def _adjoint(p: Tensor) -> Tensor:
    """That of a matrix of complex numbers, which are pairs in φ."""
    return torch.view_as_real(torch.view_as_complex(p.contiguous()).mH.resolve_conj())
