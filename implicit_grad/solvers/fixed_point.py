"""Fixed-point iteration, plain or with Anderson's acceleration."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._options import require_count, require_positive
from implicit_grad.solvers._roots import Method, Residual, RootFinding

# Differences of residuals that others explain to this part of them count for nothing.
_DEPENDENT = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPoint(RootFinding):
    """φ ← φ − damping · residual(φ); for `fixed_point(map)` that is φ ← map(φ).

    It converges where map is a contraction. With `anderson=m` the last m steps are combined, at
    the price of 2m copies of φ: the residual is taken for linear in their span and made as small
    as can be there. Where it is linear, that is GMRES (Anderson, 1965, Iterative procedures for
    nonlinear integral equations; Walker and Ni, 2011, Anderson acceleration for fixed-point
    iterations). No derivative is taken.

    Args:
        damping: share of the step to map(φ), or step length for a `root`, > 0.
        anderson: how many steps are combined; 0 is the plain iteration, 5 a good choice.
        maxiter: the most steps, one evaluation of the residual each.
        tol: stop when ‖residual‖₂ is at most this.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1. Without either,
            when it has fallen by eps^(3/4): 2e-12 in float64, 6e-6 in float32.
        tasks: φ is a batch of separate problems along the first dimension of its tensors; each is
            accelerated, and stops, by itself.

    >>> import torch
    >>> FixedPoint().find_root(lambda phi: phi - torch.cos(phi), torch.tensor([1.0]))
    tensor([0.7391])
    """

    damping: float = 1.0
    anderson: int = 0
    maxiter: int = 1000
    diverged: ClassVar[str] = (
        "the map is no contraction here: take a smaller damping, anderson=5, or Newton()"
    )
    more: ClassVar[str] = "Allow more steps (maxiter), or take anderson=5 or Newton()"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "damping")
        require_count(self, "anderson", 0)

    def method(self, at: Residual, x: Tensor, f: Tensor) -> Method:
        return _Mixing(self, at.eps)


class _Mixing(Method):
    def __init__(self, options: FixedPoint, eps: float) -> None:
        self._damping, self._most, self._eps = options.damping, options.anderson, eps
        self._steps: list[Tensor] = []
        self._changes: list[Tensor] = []

    def direction(self, x: Tensor, f: Tensor) -> Tensor:
        plain: Tensor = -self._damping * f
        if not self._changes:
            return plain
        steps, changes = (torch.stack(t, dim=2) for t in (self._steps, self._changes))
        sizes = torch.linalg.vector_norm(changes, dim=1, keepdim=True)
        sizes = torch.where(sizes > 0, sizes, 1.0)
        q, r = torch.linalg.qr(changes / sizes)
        weights = torch.linalg.pinv(r, rtol=self._eps**_DEPENDENT) @ (q.mT @ f[:, :, None])
        along = (steps - self._damping * changes) @ (weights / sizes.mT)
        mixed: Tensor = plain - along[:, :, 0]
        return mixed

    def learn(self, step: Tensor, change: Tensor) -> None:
        if self._most:
            self._steps = [*self._steps, step][-self._most :]
            self._changes = [*self._changes, change][-self._most :]
