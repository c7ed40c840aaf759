"""Constraints that depend on each other at φ: whether they still do when φ or the arguments move.

Their gradients are tied by relations, Σ wᵢ∇cᵢ = 0. Multipliers are then not unique, but φ is
differentiable as long as each relation stays what it is: if q = Σ wᵢcᵢ changes with an argument,
the constraints part ways, some cease to be active, and φ has a kink; if q bends with φ along the
others, or its slope there changes with an argument, then the derivative of φ depends on which of
the multipliers are taken (Gauvin and Janin, 1988; Bonnans and Shapiro, 2000, Perturbation analysis
of optimization problems, section 4.5). Copies, an equation as two inequalities, or RᵀR = I as nine
equations have no such q; a ball that touches a plane has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._torch.graph import leaves_behind
from implicit_grad._torch.products import vjp, without_hooks
from implicit_grad._torch.pytree import Flat, Tensors

# What of a sum's derivative is left, relative to that of another sum of the same terms, when it is
# zero but for rounding: a power of the dtype's eps.
_ROUNDING = 0.4


def scattered(like: Tensor) -> Tensor:
    """Numbers of both signs, of size 0.5 to 1.5, in the form of a tensor, always the same."""
    random = torch.Generator().manual_seed(0)
    size = torch.rand(like.shape, generator=random, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, like.shape, generator=random) * 2 - 1
    return (sign * size).to(like)


def part_ways(
    relation: list[tuple[Tensor, Tensor]], phi: Tensors, onto_tangent: Callable[[Tensor], Tensor]
) -> bool:
    """Whether a sum of terms, given with their weights, is stationary only here.

    `onto_tangent` projects a flat vector on the directions in which φ may move.
    """
    flat, terms = Flat(phi), [t for t, _ in relation]
    leaves = tuple(t for t in leaves_behind(terms) if all(t is not p for p in phi))
    way = onto_tangent(scattered(flat.ravel(phi)))

    def derivatives(weights: list[Tensor]) -> Tensors:
        with torch.enable_grad(), without_hooks(leaves):
            first = vjp(terms, (*phi, *leaves), weights)
            along = flat.ravel(first[: len(phi)]) @ way
            second = vjp([along], (*phi, *leaves), [torch.ones_like(along)])
        bends = onto_tangent(flat.ravel(second[: len(phi)]))
        return (*first[len(phi) :], bends, *second[len(phi) :])

    weights = [w.to(t) for t, w in relation]
    others = derivatives([w * scattered(w) for w in weights])
    rounding = flat.eps**_ROUNDING
    return any(
        bool(d.norm() > rounding * other.norm())
        for d, other in zip(derivatives(weights), others, strict=True)
    )


def is_pushed(loose: Tensors, stationarity: Tensors, phi: Tensors) -> bool:
    """Whether arguments move the force on elements of φ that nothing holds.

    So it is with what CVXPY, say, minimises in the place of |w| in λ|w|, where λ is 0 or so small
    that a solver has left it anywhere: with λ it comes down to |w|, and then w moves.
    """
    leaves = tuple(t for t in leaves_behind(stationarity) if all(t is not p for p in phi))
    if not leaves:
        return False
    weights = tuple(map(scattered, phi))
    of_loose = tuple(w * mask for w, mask in zip(weights, loose, strict=True))
    with without_hooks(leaves):
        pairs = zip(*(vjp(stationarity, leaves, w) for w in (of_loose, weights)), strict=True)
    rounding = Flat(phi).eps ** _ROUNDING
    return any(bool(of.norm() > rounding * every.norm()) for of, every in pairs)
