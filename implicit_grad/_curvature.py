"""What A is made of: an objective's Hessian, its Gauss-Newton part, or differences of gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_grad._ad import (
    Force,
    Linearization,
    gradient,
    once_differentiable,
    vjp,
    without_hooks,
)
from implicit_grad._batch_norm import lean_batch_norms
from implicit_grad._errors import GraphError, InvalidArgumentError
from implicit_grad._tree import Tensors

Curvature = Literal["auto", "hessian", "gauss_newton", "finite_difference"]
CURVATURES = ("auto", "hessian", "gauss_newton", "finite_difference")

_NO_DOUBLE_BACKWARD = re.compile(
    r"derivative for .* is not implemented|double backward|once_differentiable"
)
_CHANGED = (
    "the condition's function has other derivatives when it is evaluated again: it refers to a "
    "variable that has changed since, or it is random. Pass everything it needs as arguments"
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The smooth part of an inner objective, evaluated at φ with its graph.

    Attributes:
        value: the scalar.
        phi: the tensors in its graph that stand for φ.
        force: F from ∇value (the identity, or what adds λ(φ − θ)).
        outputs: the model's outputs that value depends on φ through, if there is a model.
        again: evaluates value at another φ, on the same arguments; needed for differences.
        guard: see `Linearization`.
        tasks: how many separate problems the value sums over.
        own: whether the graph is nobody else's.
    """

    value: Tensor
    phi: Tensors
    force: Callable[[Tensors], Force] = Force
    outputs: Tensors | None = None
    again: Callable[[Tensors], Tensor] | None = None
    guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    tasks: int | None = None
    own: bool = True

    def linearize(self, curvature: Curvature) -> Linearization:
        """F around φ, with products of the kind asked for."""
        around = self._linearized(curvature)
        around.tasks = self.tasks
        return around

    def _linearized(self, curvature: Curvature) -> Linearization:
        if curvature == "finite_difference":
            return FiniteDifference(self)
        if curvature == "auto":
            return Ladder(self)
        if once_differentiable([self.value], self.phi):
            raise GraphError(
                f'curvature="{curvature}": between phi and the objective, a custom Function is '
                "marked as once_differentiable, or a function is compiled (torch.compile), and has "
                'no second derivative; use "auto"'
            )
        return GaussNewton(self) if curvature == "gauss_newton" else Hessian(self)


class Hessian(Linearization):
    """A is the second derivative: a product is one backward pass through the gradient's graph."""

    curvature = "hessian"
    is_hessian = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        with torch.enable_grad():
            slope = self._slope()
            force = objective.force(slope)
        super().__init__(
            force.residual, objective.phi, slope, force.pulled, force.scale, objective.guard
        )
        self.held = force.held
        self.convex = None if objective.outputs is None else lambda: GaussNewton(objective)

    def curved_product(self, x: Tensors) -> Tensors:
        """The same: the matrix is symmetric."""
        return self.curved_transposed(x)

    def _slope(self) -> Tensors:
        """∇value."""
        with lean_batch_norms([self.objective.value], self.objective.phi, self.objective.own):
            return gradient(self.objective.value, self.objective.phi)


class GaussNewton(Hessian):
    """The same, with the Hessian of loss(model(φ)) replaced by Jᵀ (∂²loss/∂output²) J.

    J is the Jacobian of the model's outputs, so the model's own curvature is dropped and the
    operator is positive semi-definite for losses that are convex in the outputs (Schraudolph,
    2002, Fast curvature matrix-vector products). The cross-derivatives in `pullback` stay exact.
    """

    curvature = "gauss_newton"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        assert objective.outputs is not None
        self._outputs = objective.outputs
        with torch.enable_grad():
            self._loss_gradient = gradient(objective.value, self._outputs)
            self._dummy = tuple(torch.zeros_like(o, requires_grad=True) for o in self._outputs)
            self._to_phi = vjp(self._outputs, self.phi, self._dummy)

    def _slope(self) -> Tensors:  # no product goes through it
        return gradient(self.objective.value, self.objective.phi)

    def curved_transposed(self, u: Tensors) -> Tensors:
        """Jᵀ (∂²loss/∂output²) J u."""
        in_outputs = vjp(self._to_phi, self._dummy, u)
        curved = vjp(self._loss_gradient, self._outputs, in_outputs)
        return vjp(self._outputs, self.phi, curved)


class FiniteDifference(Hessian):
    """Products by central differences of gradients, for models without a double backward.

    ∇²G u ≈ (∇G(φ + εu) − ∇G(φ − εu)) / 2ε with ε = eps^(1/3) max(1, ‖φ‖) / ‖u‖, where the errors
    of truncation and rounding balance: relative errors are around 1e-10 in float64, 1e-5 in
    float32, if ∇G changes over lengths around max(1, ‖φ‖). Two gradients a product.
    """

    curvature = "finite_difference"

    def __init__(self, objective: Objective) -> None:
        if objective.tasks is not None:
            raise GraphError("finite differences are taken for one task at a time")
        if objective.again is None:
            raise GraphError(
                'curvature="finite_difference" needs the inner objective as a function of the '
                "weights (with imaml: learner.adapt(lambda: loss(...))), and gives first "
                "derivatives only"
            )
        super().__init__(objective)
        self.convex = None
        self._again = objective.again
        self._eps = max(torch.finfo(p.dtype).eps for p in objective.phi)
        self.precision = self._eps ** (2 / 3)
        self._size = _norm(objective.phi)
        self._check_unchanged()

    def _slope(self) -> Tensors:
        with torch.no_grad():
            return gradient(self.objective.value, self.objective.phi)

    def curved_transposed(self, u: Tensors) -> Tensors:
        """∇²value u."""
        return self._differences(u, ())[: len(u)]

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu: what λ(φ − θ) adds, and differences of the gradients by the inputs."""
        exact = super().pullback(u, inputs)
        return tuple(map(torch.add, exact, self._differences(u, inputs)[len(u) :]))

    def _differences(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """The derivatives of ∇value along u in φ, with respect to φ and to the inputs."""
        length = _norm(u)
        if not 0 < length < float("inf"):  # 0: the products are too; Inf: let it be seen
            return tuple(torch.zeros_like(x) * length for x in (*u, *inputs))
        step = self._eps ** (1 / 3) * max(1.0, self._size) / length
        ahead, behind = (self._slope_at(sign * step, u, inputs) for sign in (1, -1))
        return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))

    def _slope_at(self, step: float, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        with torch.no_grad():
            moved = tuple(torch.add(p, w, alpha=step) for p, w in zip(self.phi, u, strict=True))
        phi = tuple(p.detach().requires_grad_() for p in moved)
        with torch.enable_grad():
            value = self._again(phi)
        with torch.no_grad(), self._guard(), without_hooks(inputs):
            return gradient(value, (*phi, *inputs))

    def _check_unchanged(self) -> None:
        """Raise if the function, evaluated again where it was recorded, has another gradient."""
        zero = tuple(torch.zeros_like(p) for p in self.phi)
        difference = [
            a - b for a, b in zip(self._slope_at(0.0, zero, ()), self.curved, strict=True)
        ]
        if not _norm(difference) <= self._eps**0.5 * _norm(self.curved):
            raise GraphError(_CHANGED)


class Climbed(Exception):
    """Products are of another kind, and precision, from now on: solve again."""


class Ladder(Linearization):
    """The Hessian, or finite differences once some operation turns out to lack a double backward.

    `curvature` tells which. Fused attention needs no second rung: see `undisturbed`.
    """

    is_hessian = True

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        once = once_differentiable([objective.value], objective.phi)
        self._rung = parts = self._differences(None) if once else Hessian(objective)
        fields = parts.phi, parts.curved, parts.pulled, parts.scale
        super().__init__(parts.make_residual, *fields, guard=objective.guard)
        self.convex = parts.convex

    @property
    def curvature(self) -> str:  # type: ignore[override]
        """The kind of products that work here, as far as is known."""
        return self._rung.curvature

    @property
    def precision(self) -> float | None:  # type: ignore[override]
        """That of the products that work here."""
        return self._rung.precision

    def transposed(self, u: Tensors) -> Tensors:
        """Aᵀu; outside of a solve, a product may be of either kind."""
        try:
            return super().transposed(u)
        except Climbed:
            return super().transposed(u)

    def curved_transposed(self, u: Tensors) -> Tensors:
        """∇²value u."""
        before = self._rung
        product = self._first_that_works(lambda: self._rung.curved_transposed(u))
        if self._rung is not before:
            raise Climbed
        return product

    def curved_product(self, x: Tensors) -> Tensors:
        """The same: the matrix is symmetric."""
        return self.curved_transposed(x)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu."""
        return self._first_that_works(lambda: self._rung.pullback(u, inputs))

    def _first_that_works(self, product: Callable[[], Tensors]) -> Tensors:
        try:
            return product()
        except (RuntimeError, NotImplementedError) as error:
            if not _NO_DOUBLE_BACKWARD.search(str(error)):
                raise
            self._rung = self._differences(error)
        return product()

    def _differences(self, cause: Exception | None) -> Linearization:
        if self._objective.again is None:
            raise GraphError(
                "an operation of the inner objective has no second derivative in torch"
                f"{'' if cause is None else f' ({cause})'}, and differences of gradients need the "
                "objective as a function of the weights: use implicit(), or with imaml "
                'learner.adapt(lambda: loss(...)) and curvature="finite_difference"; or another '
                "form of the operation"
            ) from cause
        return FiniteDifference(self._objective)


def check_curvature(curvature: object, where: str, offered: Sequence[str] = CURVATURES) -> None:
    """Raise unless this is one of the kinds of products offered."""
    if curvature not in offered:
        names = ", ".join(f'"{name}"' for name in offered)
        raise InvalidArgumentError(f"{where}: curvature={curvature!r}: expected one of {names}")


def has_second_derivative(objective: Objective) -> bool:
    """Whether torch can take a product with the Hessian."""
    probe = tuple(torch.ones_like(p) for p in objective.phi)
    try:
        with torch.no_grad():
            Ladder(objective).transposed(probe)
    except GraphError:
        return False
    return True


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))
