"""A minimum of loss + g for a g with a proximal operator: F = φ − prox(φ − t ∇loss(φ), t)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit_grad._conditions.base import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    like_phi,
    scalar,
    without_aux,
)
from implicit_grad._conditions.dependence import scattered
from implicit_grad._curvature.hessian import slope as slope_of
from implicit_grad._curvature.jacobian import MISSING, Jacobian
from implicit_grad._curvature.objective import Objective
from implicit_grad._options import require_flag
from implicit_grad._torch import pytree
from implicit_grad._torch.missing import missing_told
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Flat, Tensors
from implicit_grad._torch.transforms import is_transformed


@dataclasses.dataclass(frozen=True, eq=False)
class prox_gradient(Condition):
    """φ minimises loss(φ, *args) + g(φ), with g convex and known by its proximal operator.

    At a minimum φ = prox(φ − t ∇loss(φ), t), for any one t > 0 and then for all of them (Parikh and
    Boyd, 2014, Proximal Algorithms, 4.2.1), so t is nobody's choice. It is a power of 2 not far
    below 1/‖∇²loss‖ at φ: then neither loss nor g outweighs the other in F, which scales with φ.
    Where prox has a kink at φ (a weight just enters a lasso's support), so has the solution.

    Args:
        loss: `loss(phi, *args)` returns a scalar tensor, twice differentiable around the solution.
        prox: `prox(x, step, *args)` returns the φ that minimises g(φ) + ‖φ − x‖²/(2·step), in the
            form of x: one of `implicit_grad.prox`, or any other.
        has_aux: `loss` returns (value, aux), of which aux, which may be anything, is ignored.

    A lasso, and how its sum of weights changes with the penalty (by −Σ (XᵀX)⁻¹sign(w)):

    >>> import implicit_grad as ig
    >>> loss = lambda w, y, lam: (w - y).square().sum() / 2
    >>> lasso = ig.implicit(
    ...     ig.solvers.ProximalGradient(),
    ...     ig.prox_gradient(loss, ig.prox.soft_threshold(lambda y, lam: lam)),
    ... )
    >>> lam = torch.tensor(1.0, requires_grad=True)
    >>> lasso(torch.tensor([3.0, 0.5, 2.0]), lam).sum().backward()
    >>> round(float(lam.grad), 4)
    -2.0
    """

    loss: Callable[..., Tensor]
    prox: Callable[..., Any]
    _: dataclasses.KW_ONLY
    has_aux: bool = False
    symmetric = False
    is_minimum: ClassVar[bool] = False
    must_depend_on_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_callable("prox_gradient", "loss", self.loss)
        check_callable("prox_gradient", "prox", self.prox)
        require_flag(self, "has_aux")

    def problem_for(self, solver: str, call: Call) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        def prox(x: Any, step: float) -> Any:
            return self.prox(x, step, *call.args, **call.kwargs)

        def residual(phi: Any) -> Any:
            tensors, tree = pytree.unknowns(phi)
            own = tuple(t if t.requires_grad else t.detach().requires_grad_() for t in tensors)
            return tree.rebuild(self._residual(tree.rebuild(own), own, call))

        if solver != "minimize":
            return residual, {}
        return lambda phi: self._loss(phi, call), {"prox": prox}

    def at(self, phi: Any, variables: Tensors, call: Call, again: Again | None) -> Snapshot:
        residual = self._residual(phi, variables, call)
        return Snapshot(residual, lambda _: Jacobian(residual, variables))

    def _loss(self, phi: Any, call: Call) -> Tensor:
        loss = without_aux("prox_gradient: loss", self.loss, self.has_aux)
        return scalar("prox_gradient: loss", loss(phi, *call.args, **call.kwargs))

    def _residual(self, phi: Any, variables: Tensors, call: Call) -> Tensors:
        with torch.enable_grad():
            slope = slope_of(Objective(self._loss(phi, call), variables))
            step = _step(slope, variables)
            ahead = [p - step * g for p, g in zip(variables, slope, strict=True)]
            _, tree = pytree.unknowns(phi)
            image = self.prox(tree.rebuild(ahead), step, *call.args, **call.kwargs)
            there = like_phi("prox_gradient: prox", image, phi, variables)
            return tuple(map(torch.sub, variables, there))


@torch.no_grad()
def _step(slope: Tensors, phi: Tensors) -> float:
    """1/‖∇²loss‖, by a power iteration that ends at once; ‖φ‖/‖slope‖ where loss is linear."""
    if is_transformed(phi):
        return 1.0  # then only what F depends on is looked at
    flat = Flat(phi)
    x = scattered(flat.ravel(phi))
    for _ in range(2):
        with missing_told(MISSING):
            x = flat.ravel(vjp(slope, phi, flat.unravel(x / x.norm())))
        if not 0 < float(x.norm()) < math.inf:
            break
    else:
        return _power_of_2(1 / float(x.norm()))
    size, steep = pytree.length(phi), pytree.length(slope)
    return _power_of_2(size / steep) if size and steep else 1.0


def _power_of_2(step: float) -> float:
    """The one below: F holds the step constant, so it should stay as φ moves a little."""
    _, exponent = math.frexp(step)
    return math.ldexp(1.0, exponent - 1)
