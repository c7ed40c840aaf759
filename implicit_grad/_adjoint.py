"""The linear systems around φ, as linear solvers see them: one flat vector, one flat operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._ad import Linearization
from implicit_grad._linear import LinearSolution, LinearSolver, Operator
from implicit_grad._tree import Flat, Tensors


def solve_adjoint(
    solver: LinearSolver, linearization: Linearization, v: Tensors, verify: bool
) -> tuple[Tensors, LinearSolution]:
    """Solve Aᵀu = v for the tuple of tensors u."""
    flat = Flat(v)
    scale = _flat_scale(linearization.scale, v, flat)

    def products(smooth: Callable[[Tensors], Tensors]) -> Callable[[Tensor], Tensor]:
        def matvec(x: Tensor) -> Tensor:
            product = flat.ravel(smooth(flat.unravel(x)))
            return product if scale is None else product.add_(scale * x)

        return matvec

    operator = Operator(
        matvec=products(linearization.smooth_transposed),
        rmatvec=products(linearization.smooth_product),
        scale=scale,
        eps=flat.eps,
    )
    with torch.no_grad():
        solution = solver.solve(operator, flat.ravel(v), verify)
        return flat.unravel(solution.x), solution


def _flat_scale(scale: Tensors | None, like: Tensors, flat: Flat) -> float | Tensor | None:
    if not scale:
        return None
    if all(s is scale[0] and s.dim() == 0 for s in scale):
        return float(scale[0].detach())
    return flat.ravel([s.detach().expand_as(x) for s, x in zip(scale, like, strict=True)])
