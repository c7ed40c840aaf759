"""Broyden's method: a root by what the steps tell of the Jacobian, without derivatives."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from implicit_grad._options import require_count
from implicit_grad.solvers._roots import Method, Residual, RootFinding, norms

# The least part of its own length that a step's image must have along the step to be learned from.
_PLAIN = 1e-8
# As many unknowns, in each task, may be differenced one by one.
_FEW = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(RootFinding):
    """φ ← φ − t H residual(φ), H an estimate of the inverse Jacobian that each step mends.

    H starts as the multiple of the identity that fits a small step along the residual best, and
    is changed by a matrix of rank 1 so that it maps the change of the residual to the step
    (Broyden, 1965, A class of methods for solving nonlinear simultaneous equations). Where no t
    in 1, 1/2, … makes ‖residual‖ smaller, H starts anew: up to 50 unknowns (in each task) from
    differences of the residual, an evaluation for each. No derivative is taken, so the residual
    may be any code; two copies of φ are kept for each of the last `memory` steps.

    Args:
        memory: the most steps that are remembered.
        maxiter: the most steps, mostly one evaluation of the residual each.
        tol: stop when ‖residual‖₂ is at most this.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1. Without either,
            when it has fallen by eps^(3/4): 2e-12 in float64, 6e-6 in float32.
        tasks: φ is a batch of separate problems along the first dimension of its tensors; each
            has an H and a step length of its own, and stops by itself.

    >>> import torch
    >>> Broyden().find_root(lambda phi: phi**3 - 7, torch.tensor([1.0]))
    tensor([1.9129])
    """

    memory: int = 50
    maxiter: int = 200
    halvings: ClassVar[int] = 10
    more: ClassVar[str] = "Allow more steps (maxiter) and memory, start nearer, or take Newton()"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "memory", 1)

    def method(self, at: Residual, x: Tensor, f: Tensor) -> Method:
        return _RankOnes(at, self.memory, x, f)


class _RankOnes(Method):
    """H = scale·I + Σ u vᵀ for each row, or with a dense matrix in the place of scale·I."""

    def __init__(self, at: Residual, memory: int, x: Tensor, f: Tensor) -> None:
        self._at, self._memory = at, memory
        self._us: list[Tensor] = []
        self._vs: list[Tensor] = []
        self._dense: Tensor | None = None
        self._scale = self._fitting(x, f)

    def start_anew(self, x: Tensor, f: Tensor) -> bool:
        other = bool(self._us) or (self._dense is None and f.shape[1] <= _FEW)
        self._us, self._vs = [], []
        if f.shape[1] <= _FEW and other:
            self._dense = self._by_differences(x, f)
        else:
            self._scale = self._fitting(x, f)
        return other

    def direction(self, x: Tensor, f: Tensor) -> Tensor:
        if len(self._us) >= self._memory:
            self.start_anew(x, f)
        return -self._product(f, self._us, self._vs)

    def learn(self, step: Tensor, change: Tensor) -> None:
        image = self._product(change, self._us, self._vs)
        along = _dots(step, image)
        plain = along.abs() > _PLAIN * (norms(step) * norms(image))[:, None]
        self._vs = [*self._vs, self._product(step, self._vs, self._us, transposed=True)]
        self._us = [*self._us, torch.where(plain, (step - image) / along, 0.0)]

    def _product(
        self, x: Tensor, left: list[Tensor], right: list[Tensor], transposed: bool = False
    ) -> Tensor:
        """H x, or Hᵀx with the sides exchanged."""
        if self._dense is None:
            product = self._scale * x
        else:
            product = ((self._dense.mT if transposed else self._dense) @ x[:, :, None])[:, :, 0]
        for u, v in zip(left, right, strict=True):
            product = product + u * _dots(v, x)
        return product

    def _fitting(self, x: Tensor, f: Tensor) -> Tensor:
        """The multiple of the identity that maps a change of the residual to a step along it."""
        length = norms(f)
        step = (self._short(x) / torch.where(length > 0, length, 1.0))[:, None].to(f) * f
        change = self._at(x + step) - f
        scale = _dots(step, change) / _dots(change, change)
        return torch.where(torch.isfinite(scale) & (scale != 0), scale, 1.0)

    def _by_differences(self, x: Tensor, f: Tensor) -> Tensor:
        """The inverse Jacobian, column by column."""
        short = self._short(x).to(f)
        columns = []
        for i in range(f.shape[1]):
            there = x.clone()
            there[:, i] += short
            columns.append((self._at(there) - f) / (there - x)[:, i, None])
        jacobian = torch.stack(columns, dim=2)
        finite = torch.isfinite(jacobian).all(dim=2).all(dim=1)
        inverse: Tensor = torch.linalg.pinv(torch.where(finite[:, None, None], jacobian, 0.0))
        return inverse

    def _short(self, x: Tensor) -> Tensor:
        """Of each row, a length that is short for differences."""
        size = norms(x) + norms(self._at.first)
        short: Tensor = self._at.eps**0.5 * torch.where(size > 0, size, 1.0)
        return short


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy of each row, as a column."""
    products: Tensor = torch.linalg.vecdot(x, y)
    return products[:, None]
