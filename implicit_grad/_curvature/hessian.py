"""A as the second derivative of an objective, or as its Gauss-Newton part."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._curvature.objective import Objective
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.graph import between
from implicit_grad._torch.own_backward import own_backwards
from implicit_grad._torch.products import gradient, vjp
from implicit_grad._torch.pytree import Tensors

_LINEAR = (
    'curvature="gauss_newton": output {} of the model, of shape {}, enters the loss linearly, so '
    "that all of its curvature is the model's own, which is dropped: the gradient is off. If it is "
    "a penalty on phi, let the model return phi itself and the loss compute the penalty from it; "
    'or use curvature="hessian"'
)


class Hessian(Linearization):
    """A is the second derivative: a product is one backward pass through the gradient's graph."""

    curvature = "hessian"
    is_hessian = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        with torch.enable_grad():
            smooth = self._slope()
            F = objective.stationarity(smooth)
        super().__init__(
            F.residual,
            objective.phi,
            smooth,
            F.linear_part,
            F.scale,
            anchors=F.anchors,
            starts=F.starts,
            n_tasks=objective.n_tasks,
            convex=self._convex(objective),
            guard=objective.guard,
        )

    @functools.cached_property
    def precision(self) -> float:
        """That of the objective's gradient."""
        return self.objective.precision

    def smooth_product(self, x: Tensors) -> Tensors:
        """A x, which is Aᵀx, as the matrix is symmetric."""
        return self.smooth_transposed(x)

    @staticmethod
    def _convex(objective: Objective) -> Callable[[], Linearization] | None:
        known = objective.outputs is not None or objective.gauss_newton is not None
        return functools.partial(GaussNewton, objective) if known else None

    def _slope(self) -> Tensors:
        """∇value."""
        return slope(self.objective)


def slope(objective: Objective) -> Tensors:
    """∇value, whose graph has the derivatives that torch gets wrong from formulas of our own."""
    with own_backwards(objective.special, objective.own):
        return gradient(objective.value, objective.phi)


class GaussNewton(Hessian):
    """A with Jᵀ (∂²loss/∂output²) J in the place of the Hessian of loss(model(φ)).

    J is the Jacobian of the model's outputs, so the model's own curvature is dropped and the
    operator is positive semi-definite for losses that are convex in the outputs (Schraudolph,
    2002, Fast curvature matrix-vector products). The cross-derivatives in `pullback` stay exact.
    """

    curvature = "gauss_newton"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        product = objective.gauss_newton
        if product is None:
            assert objective.outputs is not None
            product = GaussNewtonProduct(objective.value, objective.outputs, self.phi)
        self._product = product

    @property
    def remark(self) -> str | None:  # type: ignore[override]
        """What the products leave out, if it is seen."""
        return self._product.remark()

    def _slope(self) -> Tensors:  # no product goes through it
        return gradient(self.objective.value, self.objective.phi)

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """Jᵀ (∂²loss/∂output²) J u."""
        return self._product(u)


class GaussNewtonProduct:
    """u ↦ Jᵀ (∂²value/∂output²) J u, from the graphs of value over outputs over φ."""

    def __init__(self, value: Tensor, outputs: Tensors, phi: Tensors) -> None:
        self._outputs, self._phi = outputs, phi
        with torch.enable_grad():
            self._loss_gradient = gradient(value, outputs)
            self._dummy = tuple(torch.zeros_like(o, requires_grad=True) for o in outputs)
            self._to_phi = vjp(outputs, phi, self._dummy)

    def __call__(self, u: Tensors) -> Tensors:
        in_outputs = vjp(self._to_phi, self._dummy, u)
        curved = vjp(self._loss_gradient, self._outputs, in_outputs)
        return vjp(self._outputs, self._phi, curved)

    def remark(self) -> str | None:
        """Of an output that bends with φ and enters the loss linearly: A has nothing of it."""
        for i, (output, slope) in enumerate(zip(self._outputs, self._loss_gradient, strict=True)):
            bends = any(True for _ in between([slope], self._outputs))
            if bends or not bool(slope.any()):  # or the loss does not look at it
                continue
            with torch.enable_grad():
                along = gradient(output.sum(), self._phi)
            if any(True for _ in between(along, self._phi)):
                return _LINEAR.format(i, tuple(output.shape))
        return None

    def jacobian_is_inconsistent(self, x: Tensors) -> bool:
        """Whether J x, by the derivative of a backward pass, is not what that pass says of it."""
        random = torch.Generator().manual_seed(1)
        w = tuple(
            torch.randn(o.shape, generator=random).to(o.device, o.dtype) for o in self._outputs
        )
        with torch.no_grad():
            pairs = (
                (vjp(self._to_phi, self._dummy, x), w),
                (vjp(self._outputs, self._phi, w), x),
            )
        (forwards, size), (backwards, size_too) = map(_dot_and_sizes, pairs)
        return abs(forwards - backwards) > 1e-3 * max(size, size_too)


def _dot_and_sizes(pair: tuple[Tensors, Tensors]) -> tuple[float, float]:
    """xᵀy, and its usual size if x and y have nothing to do with each other."""
    products = [(x * y).flatten().double().cpu() for x, y in zip(*pair, strict=True)]
    flat = torch.cat(products)
    return float(flat.sum()), float(flat.norm())
