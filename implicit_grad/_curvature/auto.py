"""Which A: the kind asked for, or the Hessian until an operation lacks a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from implicit_grad._curvature.finite_difference import FiniteDifference
from implicit_grad._curvature.hessian import GaussNewton, Hessian
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import GraphError
from implicit_grad._options import check_one_of
from implicit_grad._theorem.linearization import (
    CURVATURES,
    Curvature,
    Linearization,
    SwitchedToDifferences,
)
from implicit_grad._torch.missing import lacks_derivative, missing_told
from implicit_grad._torch.pytree import Tensors


def linearize(objective: Objective, curvature: Curvature) -> Linearization:
    """F around φ, with products of the kind asked for."""
    if curvature == "finite_difference":
        return FiniteDifference(objective)
    if curvature == "auto":
        return AutoCurvature(objective)
    if objective.is_once_differentiable:
        raise GraphError(
            f'curvature="{curvature}": between phi and the objective, a custom Function is '
            "marked as once_differentiable, or a function is compiled (torch.compile), or "
            'F.linear_cross_entropy works in chunks, and has no second derivative; use "auto"',
            anchor="no-second-derivative",
        )
    make = _GaussNewton if curvature == "gauss_newton" else _WithAdvice
    with _told_with_advice(curvature):
        return make(objective)


def _told_with_advice(curvature: str) -> AbstractContextManager[None]:
    """Where torch says inside that a second derivative is missing, so do we, and what to do."""
    return missing_told(
        f'curvature="{curvature}": an operation of the inner objective has no second derivative in '
        'torch; use "auto" or "finite_difference", which take differences of gradients (with '
        "imaml: learner.adapt(lambda: loss(...))), or another form of the operation"
    )


class _WithAdvice(Hessian):
    """With that advice for what its products lack."""

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """∇²value u."""
        with _told_with_advice(self.curvature):
            return super().smooth_transposed(u)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu."""
        with _told_with_advice(self.curvature):
            return super().pullback(u, inputs)


class _GaussNewton(_WithAdvice, GaussNewton):
    """With that advice."""


class AutoCurvature(Linearization):
    """The Hessian, or finite differences once some operation turns out to lack a double backward.

    `curvature` tells which. Fused attention needs no second rung: see `isolated`.
    """

    is_hessian = True

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        once = objective.is_once_differentiable
        self._rung = parts = self._differences(None) if once else self._first_rung()
        super().__init__(
            parts.make_residual,
            parts.phi,
            parts.smooth,
            parts.linear_part,
            parts.scale,
            anchors=parts.anchors,
            starts=parts.starts,
            n_tasks=objective.n_tasks,
            convex=parts.convex,
            guard=objective.guard,
        )

    def _first_rung(self) -> Linearization:
        try:
            return Hessian(self._objective)
        except (RuntimeError, NotImplementedError) as error:
            if not lacks_derivative(error):
                raise
            return self._differences(error)

    @property
    def curvature(self) -> str:  # type: ignore[override]
        """The kind of products that work here, as far as is known."""
        return self._rung.curvature

    @property
    def precision(self) -> float:
        """The relative precision of the products that work here."""
        return self._rung.precision

    def transposed(self, u: Tensors) -> Tensors:
        """Aᵀu; outside of a solve, a product may be of either kind."""
        try:
            return super().transposed(u)
        except SwitchedToDifferences:
            return super().transposed(u)

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """∇²value u."""
        try:
            return self._rung.smooth_transposed(u)
        except (RuntimeError, NotImplementedError) as error:
            if not lacks_derivative(error):
                raise
            self._rung = self._differences(error)
        raise SwitchedToDifferences

    def smooth_product(self, x: Tensors) -> Tensors:
        """A x, which is Aᵀx, as the matrix is symmetric."""
        return self.smooth_transposed(x)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu."""
        return self._first_that_works(lambda: self._rung.pullback(u, inputs))

    def _first_that_works(self, product: Callable[[], Tensors]) -> Tensors:
        try:
            return product()
        except (RuntimeError, NotImplementedError) as error:
            if not lacks_derivative(error):
                raise
            self._rung = self._differences(error)
        return product()

    def _differences(self, cause: Exception | None) -> Linearization:
        if self._objective.again is None and "attention" in str(cause):
            raise GraphError(
                f"fused attention has no second derivative ({cause}). Where that is known, it is "
                "computed step by step: call the learner, learner(x), instead of learner.module or "
                "a method of the model; or pass a function, learner.adapt(lambda: loss(...))",
                anchor="no-second-derivative",
            ) from cause
        if self._objective.again is None:
            raise GraphError(
                "an operation of the inner objective has no second derivative in torch"
                f"{'' if cause is None else f' ({cause})'}, and differences of gradients need the "
                "objective as a function of the weights: use implicit(), or with imaml "
                'learner.adapt(lambda: loss(...)) and curvature="finite_difference"; or another '
                "form of the operation",
                anchor="no-second-derivative",
            ) from cause
        return FiniteDifference(self._objective)


def check_curvature(curvature: object, where: str, offered: Sequence[str] = CURVATURES) -> None:
    """Raise unless this is one of the kinds of products offered."""
    check_one_of(where, "curvature", curvature, offered)


def has_second_derivative(objective: Objective) -> bool:
    """Whether torch can take a product with the Hessian."""
    probe = tuple(torch.ones_like(p) for p in objective.phi)
    try:
        with torch.no_grad():
            AutoCurvature(objective).transposed(probe)
    except GraphError:
        return False
    return True
