"""F around one φ: products with A = ∂F/∂φ and with ∂F/∂a, from a graph that is recorded once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from implicit_grad._errors import GraphError, Status
from implicit_grad._linear_solvers.base import Filter, Times
from implicit_grad._torch.graph import coarsest, once_differentiable
from implicit_grad._torch.products import Pullback, vjp, without_hooks
from implicit_grad._torch.pytree import Tensors, length

Curvature = Literal["auto", "hessian", "gauss_newton", "finite_difference"]
CURVATURES = ("auto", "hessian", "gauss_newton", "finite_difference")


class Stationarity(NamedTuple):
    """F, made from the gradient of an objective's smooth part; see `Linearization`."""

    residual: Tensors | Callable[[], Tensors]
    linear_part: Tensors = ()
    scale: Tensors | None = None
    anchors: Mapping[int, tuple[int, Tensor]] = MappingProxyType({})
    starts: Tensors = ()


class Finding(NamedTuple):
    """What a check of products found to be wrong, and whether differences of gradients are right.

    Only with curvature="auto" may they take over. A `complete` sentence says what follows, too.
    """

    sentence: str
    differences_take_over: bool
    complete: bool = False


class SwitchedToDifferences(Exception):
    """Products are of another kind, and precision, from now on: solve again."""


class Linearization:
    """F(φ, a) as a graph at one point: products with A = ∂F/∂φ and with ∂F/∂a.

    F(φ) = smooth(φ) + linear_part(φ) + scale·φ + …: the parts of F that depend on φ.

    Attributes:
        residual: F at φ, with its graph; made when it is read if it was given as a function, so
            that it takes no memory while a linear solver works.
        phi: the tensors in the graph that stand for φ.
        smooth: what of F bends with φ; by default all of it.
        linear_part: what λ adds when it is a matrix, linear in φ.
        scale: the diagonal of a proximal term. It is kept out of the graph: linear solvers add it
            themselves, and take it for the natural unit of A.
        anchors: for tensors θ that enter F as −λθ only, id(θ) ↦ (the place in φ of what θ holds
            back, λ). Products with ∂F/∂θ then need no graph.
        starts: for each tensor of φ, the one (of θ) that its training starts from; () if that is
            not known.
        n_tasks: how many tasks there are along φ's first dimension; None if φ is one solution.
        convex: makes the same problem with an operator that is never indefinite, where it can.
        primal: the problem of the same A whose adjoint problem this is; None if it is none.
        finding: what a check of its products found, if they are wrong or were replaced.
        training: see `Operator`.
        batches: of how many batches of data F is the sum, if it is one.
        warm_started: whether φ was sought from where the last call ended, if that was asked for.
        evaluations: of the objective or residual, by the solver that was handed it, if counted.
        degenerate: why φ has no derivative here, if it lies at a kink.
        said_symmetric: whether A is symmetric by the user's word: F is not an objective's gradient,
            so that A may be negative definite as well as positive definite.
        guard: entered for the one product that goes past φ in the graph.
    """

    curvature = "jacobian"  # of what A is made, for reports
    is_hessian = False  # A is the second derivative of an objective, or stands for it
    finding: Finding | None = None
    remark: str | None = None  # what users should know of A, whatever a solve comes to
    is_differentiated = False  # solutions of its linear systems will be, or are derivatives
    training: Callable[[], Filter | None] | None = None
    batches: int | None = None
    warm_started: bool | None = None
    evaluations: int | None = None

    def __init__(
        self,
        residual: Tensors | Callable[[], Tensors],
        phi: Tensors,
        smooth: Tensors | None = None,
        linear_part: Tensors = (),
        scale: Tensors | None = None,
        *,
        anchors: Mapping[int, tuple[int, Tensor]] = MappingProxyType({}),
        starts: Tensors = (),
        n_tasks: int | None = None,
        convex: Callable[[], Linearization] | None = None,
        primal: Linearization | None = None,
        degenerate: Status | None = None,
        said_symmetric: bool = False,
        guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.make_residual = residual if callable(residual) else lambda: residual
        self.phi = phi
        self.smooth = self.residual if smooth is None else smooth
        self.linear_part, self.scale, self.anchors = linear_part, scale, anchors
        self.starts, self.n_tasks, self.convex = starts, n_tasks, convex
        self.primal, self.degenerate = primal, degenerate
        if primal is not None:
            self.is_hessian = primal.is_hessian
        self.said_symmetric = said_symmetric
        self._guard = guard
        self._pullback_of_dummy: tuple[Tensors, Tensors] | None = None

    @functools.cached_property
    def precision(self) -> float:
        """The relative precision of the products."""
        return coarsest(self.smooth, self.phi)

    @property
    def is_adjoint(self) -> bool:
        """Whether F is itself the residual of an adjoint problem."""
        return self.primal is not None

    @property
    def is_wrong(self) -> bool:
        """Whether products are known to be wrong."""
        return self.finding is not None and not self.finding.differences_take_over

    @property
    def residual(self) -> Tensors:
        """F at φ, with its graph."""
        with torch.enable_grad():
            return self.make_residual()

    def training_times(self, n_tasks: int) -> list[Times]:
        """What each task's way and slope tell of the time of its training.

        Where the slope has fallen on the way, φ went at least ‖F‖ times that time. The way is known
        if its start is, and φ has left it; then its time may be as short as a step's. An adjoint's
        A is known as far as φ is, however far u is solved.
        """
        if self.primal is not None:
            return self.primal.training_times(n_tasks)

        def of_task(task: int) -> Times:
            phi, slope, starts = (
                [t.detach().reshape(n_tasks, -1)[task] for t in tensors]
                for tensors in (self.phi, self.residual, self.starts)
            )
            size, way = length(slope), length([p - s for p, s in zip(phi, starts, strict=False)])
            if not size:
                return Times()
            far = length(phi)
            bend = size / far if far else 0.0
            return Times(way / size, 0.0, bend) if way else Times(far / size, bend=bend)

        return [of_task(task) for task in range(n_tasks)]

    def matrix(self) -> Tensor | None:
        """A of each task, where that is known at less than a product for each unknown."""
        return None

    def augment(self, v: Tensors) -> Tensors:
        """The right-hand side of Aᵀu = v; longer than v where F has unknowns besides φ."""
        return v

    def recover(self, u: Tensors, v: Tensors) -> Tensors:
        """u with the parts that follow from the linear solver's without solving."""
        return u

    def transposed(self, u: Tensors) -> Tensors:
        """Aᵀu: one backward pass through the graph of F (reverse over reverse for a Hessian)."""
        return self.with_scale(self.unscaled_transposed(u), u)

    def with_scale(self, product: Tensors, u: Tensors) -> Tensors:
        """The product plus scale·u."""
        if self.scale is None:
            return product
        return tuple(p + s * x for p, s, x in zip(product, self.scale, u, strict=True))

    def unscaled_transposed(self, u: Tensors) -> Tensors:
        """Aᵀu without the scale's part."""
        return self._and_linear_part(self.smooth_transposed(u), u)

    def unscaled_product(self, x: Tensors) -> Tensors:
        """A x without the scale's part."""
        return self._and_linear_part(self.smooth_product(x), x)

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """The part of Aᵀu that the functions' curvature makes."""
        return self._to_phi(u)

    @functools.cached_property
    def _to_phi(self) -> Pullback:
        return Pullback(self.smooth, self.phi)

    def smooth_product(self, x: Tensors) -> Tensors:
        """The curvature's part of A x, as the derivative of the map w ↦ Aᵀw (double vjp)."""
        if self._pullback_of_dummy is None:
            if once_differentiable(self.smooth, self.phi):
                raise GraphError(
                    "a product with A (not Aᵀ) differentiates the backward pass of F, in which a "
                    "custom Function is marked as once_differentiable, or a function is compiled: "
                    "use GMRES(), Neumann() or Exact()",
                    anchor="no-second-derivative",
                )
            with torch.enable_grad():
                dummy = tuple(torch.zeros_like(f, requires_grad=True) for f in self.smooth)
                self._pullback_of_dummy = dummy, vjp(self.smooth, self.phi, dummy)
        dummy, pullback = self._pullback_of_dummy
        return vjp(pullback, dummy, x)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu, for any tensors in F's graph."""
        if all(id(x) in self.anchors for x in inputs):
            places = ((x, *self.anchors[id(x)]) for x in inputs)
            return tuple((-lam * u[i]).to(x.dtype) for x, i, lam in places)
        with self._guard(), without_hooks(inputs):
            return vjp(self.residual, inputs, u)

    def at_start(self, rest: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂φ₀/∂inputs)ᵀ rest, for the φ₀ from which training starts."""
        from_here = [
            [r.to(x.dtype) for r, start in zip(rest, self.starts, strict=False) if start is x]
            for x in inputs
        ]
        return tuple(
            sum(parts[1:], parts[0]) if parts else torch.zeros_like(x)
            for parts, x in zip(from_here, inputs, strict=True)
        )

    def _and_linear_part(self, product: Tensors, u: Tensors) -> Tensors:
        """The product plus that with the linear part, which is symmetric."""
        if not self.linear_part:
            return product
        return tuple(map(torch.add, product, vjp(self.linear_part, self.phi, u)))
