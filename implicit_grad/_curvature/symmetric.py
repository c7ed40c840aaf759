"""φ that holds symmetric matrices: directions that keep them so, and whether solutions do.

Values of `cholesky`, `eigh` and what is made of them are those of one triangle, derivatives by
torch's word those of a function of symmetric matrices. In other directions the two differ, which
is no mistake where no solution moves there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from implicit_grad._torch.pytree import Tensors, length


class SymmetricPart:
    """What of directions in φ keeps its matrices symmetric, where they are."""

    def __init__(self, phi: Tensors, eps: float) -> None:
        self._tolerance = eps**0.5
        self._symmetric = [_is_symmetric(p.detach(), self._tolerance) for p in phi]

    def of(self, along: Tensors) -> Tensors:
        """The direction, without what would make the matrices another kind."""
        pairs = zip(along, self._symmetric, strict=True)
        return tuple((d + d.mT) / 2 if symmetric else d for d, symmetric in pairs)

    def has_solutions(
        self, along: Tensors, products: Callable[[Tensors], tuple[Tensors, Tensors]]
    ) -> bool:
        """Whether solutions move in it alone, by products of u with Aᵀ and with (∂F/∂a)ᵀ.

        So it is where for antisymmetric u the former are antisymmetric, and the latter zero.
        """
        if not any(self._symmetric):
            return False
        beside = tuple(d - s for d, s in zip(along, self.of(along), strict=True))
        of_all, of_beside = products(along), products(beside)
        left = self.of(of_beside[0]), of_beside[1]
        return all(
            length(some) <= self._tolerance * length(whole)
            for some, whole in zip(left, of_all, strict=True)
        )


def _is_symmetric(p: Tensor, tolerance: float) -> bool:
    """Whether it is a symmetric matrix, or a stack of them, up to what a solver leaves."""
    if p.ndim < 2 or p.shape[-1] != p.shape[-2] or p.shape[-1] < 2:
        return False
    return length([p - p.mT]) <= tolerance * length([p])
