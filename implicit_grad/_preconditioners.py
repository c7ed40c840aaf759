"""Preconditioners: cheap approximations of A⁻¹ that make conjugate gradients faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear import Operator
from implicit_grad._stopping import is_integer

Precondition = Callable[[Tensor], Tensor]


@runtime_checkable
class Preconditioner(Protocol):
    """Builds an approximation of A⁻¹, symmetric and positive definite, anew for each solve."""

    def build(self, operator: Operator, like: Tensor) -> Precondition:
        """A function r ↦ about A⁻¹r, for vectors like this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jacobi:
    """Division by A's diagonal: for variables of different scales.

    Args:
        probes: None takes the diagonal exactly, by a product for each unknown; a number k ≥ 2
            estimates it by k products with random signs z, as the mean of z ∘ Az (Bekas,
            Kokiopoulou and Saad, 2007). An element counts as no smaller than its standard error,
            nor than A's scale, so that all are positive.
        seed: of the signs; no other random number generator is touched.
        max_size: most unknowns to take the exact diagonal of.

    >>> Jacobi(probes=10)
    Jacobi(probes=10, seed=0, max_size=2000)
    """

    probes: int | None = None
    seed: int = 0
    max_size: int = 2000

    def __post_init__(self) -> None:
        if self.probes is not None and not is_integer(self.probes, 2):
            raise InvalidArgumentError(
                f"Jacobi(probes={self.probes!r}): expected None or an integer of at least 2"
            )

    def build(self, operator: Operator, like: Tensor) -> Precondition:
        """Division by the diagonal."""
        diagonal = self._diagonal(operator, like)
        if operator.scale is None:
            largest = float(diagonal.abs().max())
            diagonal = diagonal.clamp(min=torch.finfo(like.dtype).eps * largest or 1.0)
        else:
            diagonal = torch.maximum(diagonal, torch.as_tensor(operator.scale).to(diagonal))
        return lambda r: r / diagonal

    def _diagonal(self, operator: Operator, like: Tensor) -> Tensor:
        n = like.numel()
        if self.probes is None:
            if n > self.max_size:
                raise InvalidArgumentError(
                    f"Jacobi() would take {n} products for {n} unknowns; its max_size is "
                    f"{self.max_size}. Pass probes=10 to estimate the diagonal, or raise max_size"
                )
            identity = torch.eye(n, dtype=like.dtype, device=like.device)
            return torch.stack([operator.matvec(e)[i] for i, e in enumerate(identity)])
        random = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, (self.probes, n), generator=random).to(like) * 2 - 1
        samples = torch.stack([z * operator.matvec(z) for z in signs])
        return torch.maximum(samples.mean(0), samples.std(0) / self.probes**0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom:
    """A of low rank plus its scale: for few large eigenvalues above a bulk.

    The randomised Nyström approximation UΛUᵀ of A − S, S being A's scale (of S^(-½)AS^(-½) − I
    where S differs per element), computed stably with a shift (Tropp, Yurtsever, Udell and Cevher,
    2017), and the inverse of UΛUᵀ + S by Woodbury's identity. Where A has no scale of its own, of A
    plus the least eigenvalue found, as Frangella, Tropp and Udell (2021) do.

    Args:
        rank: how many eigenvalues; takes as many products for each solve.
        seed: of the sketch; no other random number generator is touched.

    >>> Nystrom(rank=10)
    Nystrom(rank=10, seed=0)
    """

    rank: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_integer(self.rank, 1):
            raise InvalidArgumentError(
                f"Nystrom(rank={self.rank!r}): expected an integer of at least 1"
            )

    def build(self, operator: Operator, like: Tensor) -> Precondition:
        """r ↦ (UΛUᵀ + S)⁻¹r."""
        scale = operator.scale
        root = 1.0 if scale is None else torch.as_tensor(scale).to(like).sqrt()

        def curved(x: Tensor) -> Tensor:
            product = operator.matvec(x / root) / root
            return product if scale is None else product - x

        basis, eigenvalues = _nystrom(curved, like, self.rank, self.seed)
        shift = torch.ones_like(eigenvalues[-1])
        if scale is None:
            smallest = torch.finfo(like.dtype).eps ** 0.5 * eigenvalues[0]
            shift = torch.maximum(eigenvalues[-1], smallest)
            shift = torch.where(shift > 0, shift, torch.ones_like(shift))
        # (UΛUᵀ + σI)⁻¹ = I/σ − U (Λ/(σ(Λ + σ))) Uᵀ
        weights = eigenvalues / (eigenvalues + shift)

        def precondition(r: Tensor) -> Tensor:
            r = r / root
            return (r - basis @ (weights * (basis.mT @ r))) / shift / root

        return precondition


def _nystrom(
    product: Callable[[Tensor], Tensor], like: Tensor, rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Orthonormal U and descending Λ ≥ 0 with UΛUᵀ near the positive part of a matrix."""
    n = like.numel()
    random = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n, min(rank, n), generator=random, dtype=torch.float64)
    sketch = torch.linalg.qr(sketch)[0].to(like)
    image = torch.stack([product(column) for column in sketch.mT], dim=1)
    shift = torch.finfo(like.dtype).eps * float(torch.linalg.matrix_norm(image))
    image = image + shift * sketch
    core = sketch.mT @ image
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    # The inverse root of the core, without the directions of negative or no curvature.
    kept = values > torch.finfo(like.dtype).eps * values.abs().max()
    root = torch.where(kept, values, torch.ones_like(values)).rsqrt() * kept
    basis, singular, _ = torch.linalg.svd(image @ (vectors * root), full_matrices=False)
    return basis, (singular.square() - shift).clamp(min=0.0)


def checked(precondition: Precondition, like: Tensor) -> Precondition:
    """The function, its results checked for their form."""

    def apply(r: Tensor) -> Tensor:
        z = precondition(r)
        if not isinstance(z, Tensor) or (z.shape, z.dtype) != (like.shape, like.dtype):
            raise InvalidArgumentError(
                f"CG(preconditioner=...): for {describe(r)} it returned {describe(z)}; expected a "
                "vector of the same form"
            )
        return z

    return apply
