"""Preconditioners: cheap approximations of A⁻¹ that make conjugate gradients faster."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import Operator
from implicit_grad._options import check_value, is_integer, require_count, require_count_or_none

Precondition = Callable[[Tensor], Tensor]


@runtime_checkable
class Preconditioner(Protocol):
    """Gives each solve an approximation of A⁻¹, symmetric and positive definite."""

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
        require_count_or_none(self, "probes", 2)
        require_count(self, "max_size", 1)

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
        require_count(self, "rank", 1)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cholesky:
    """A itself, factorised, for `Reuse`: one factorisation then serves many similar problems.

    Takes a product for each unknown. Where A is not positive definite, |A| stands in for it: A with
    the absolute values of its eigenvalues. (Where A is very ill-conditioned, the inverse is
    calculated from the eigenvalues, too.)

    Args:
        max_size: most unknowns to build a dense matrix for.

    >>> Cholesky()
    Cholesky(max_size=2000)
    """

    max_size: int = 2000

    def __post_init__(self) -> None:
        require_count(self, "max_size", 1)

    def build(self, operator: Operator, like: Tensor) -> Precondition:
        """r ↦ A⁻¹r; the function holds on to no graph, for `Reuse` keeps it."""
        n = like.numel()
        if n > self.max_size:
            raise InvalidArgumentError(
                f"Cholesky() would build a dense {n} × {n} matrix; its max_size is "
                f"{self.max_size}. Use Nystrom(rank=...), or raise max_size"
            )
        matrix = operator.dense(like)  # of which its lower half is read
        eps = torch.finfo(like.dtype).eps
        factor, failed = torch.linalg.cholesky_ex(matrix)
        pivots = factor.diagonal()
        # a condition number, about the square of this ratio, below 1/√eps keeps an inverse positive
        if not failed and float(pivots.min()) > eps**0.25 * float(pivots.max()):
            # multiplied with a vector, the inverse takes a fraction of two triangular solves' time
            return functools.partial(torch.mv, torch.cholesky_inverse(factor))
        if not bool(torch.isfinite(matrix).all()):
            return lambda r: r  # the solver will meet what is not finite, and tell
        values, vectors = torch.linalg.eigh(matrix)
        sizes = values.abs()
        sizes = sizes.clamp(min=eps * float(sizes.max()) or 1.0)
        return lambda r: vectors @ ((vectors.mT @ r) / sizes)


class Reuse:
    """A preconditioner that is built once and kept for many solves.

    For hypergradients that follow one another, as in meta-training: φ, and A with it, changes
    little from one to the next, so that an approximation of A⁻¹ stays a good one for a while.
    Solves to a tolerance are as accurate as without it, and take fewer iterations. With a fixed
    budget, or after a stop at negative curvature, the results depend on the calls before. Give each
    of several problems of one size a `Reuse` of its own. Copies and pickles start empty.

    Args:
        preconditioner: `Cholesky()`, `Nystrom(rank=...)` or `Jacobi()`.
        solves: how many solves one is kept for (a polishing step is a solve too); a system of
            another form gets a new one at once.

    >>> Reuse(Cholesky())
    Reuse(Cholesky(max_size=2000), solves=100)
    """

    def __init__(self, preconditioner: Preconditioner, *, solves: int = 100) -> None:
        if isinstance(preconditioner, type) or not isinstance(preconditioner, Preconditioner):
            raise InvalidArgumentError(
                f"Reuse({preconditioner!r}): expected Cholesky(), Nystrom(rank=...) or Jacobi()"
            )
        check_value("Reuse", "solves", solves, is_integer(solves, 1), "an integer of at least 1")
        self.preconditioner, self.solves = preconditioner, solves
        self._kept: tuple[object, Precondition] | None = None
        self._left = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Reuse({self.preconditioner!r}, solves={self.solves})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Reuse, solves=self.solves), (self.preconditioner,)

    def build(self, operator: Operator, like: Tensor) -> Precondition:
        """The kept function, or a new one."""
        form = like.shape, like.dtype, like.device
        with self._lock:
            if self._kept is not None and self._left > 0 and self._kept[0] == form:
                self._left -= 1
                return self._kept[1]
        # not under the lock: what A is made of may solve systems of its own, by this very solver
        made = self.preconditioner.build(operator, like)
        probe = made(operator.matvec(torch.ones_like(like)))
        if bool(torch.isfinite(probe).all()):  # else the next solve is not to suffer for this one
            with self._lock:
                self._kept, self._left = (form, made), self.solves - 1
        return made


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


def checked(precondition: Precondition, like: Tensor, solver: str) -> Precondition:
    """The function, its results checked for their form; `solver` is whose option it is."""

    def apply(r: Tensor) -> Tensor:
        z = precondition(r)
        if not isinstance(z, Tensor) or (z.shape, z.dtype) != (like.shape, like.dtype):
            raise InvalidArgumentError(
                f"{solver}(preconditioner=...): for {describe(r)} it returned {describe(z)}; "
                "expected a vector of the same form"
            )
        return z

    return apply
