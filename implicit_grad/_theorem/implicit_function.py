"""THE FILE: a solver's output, differentiated by the implicit function theorem.

A solver returns φ for arguments a. Near them, φ(a) is defined by F(φ, a) = 0. Differentiate that:

    ∂F/∂φ · dφ + ∂F/∂a · da = 0,    so with A = ∂F/∂φ,    dφ = −A⁻¹ ∂F/∂a · da.

Backward receives v = ∂(outer loss)/∂φ and returns vᵀdφ/da without ever forming A⁻¹: it solves one
linear system and takes one product,

    Aᵀu = v,        d(outer loss)/da = −(∂F/∂a)ᵀ u.

How φ was found does not enter. And u is itself the solution of a problem, Aᵀu − v = 0, with
arguments (φ, a, v): so where a gradient of the gradient is asked for, backward calls
`ImplicitFunction` again, on that adjoint problem, and derivatives of every order follow.

One exception is made on request: φ that were trained by steps φ⁺ = φ − lr F and stopped before
F = 0. Then a function g(A) takes the place of A⁻¹ (see `EarlyStopped`), and the start φ₀(a) counts:

    dφ = −g(A) ∂F/∂a · da + (I − A g(A)) dφ₀,    so with u = g(A)ᵀv,
    d(outer loss)/da = −(∂F/∂a)ᵀ u + (∂φ₀/∂a)ᵀ (v − Aᵀu).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._errors import GraphError
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch.products import dense, own_precision, variables, vjp
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.transforms import Plain, is_transformed, lifted, pullback


@dataclasses.dataclass
class Problem:
    """F(φ, a) = 0, for flat tuples of tensors φ and a.

    Attributes:
        solve: a ↦ φ, any code; called once, in forward.
        linearize: (φ, a) ↦ F around that point, differentiable with respect to φ and a.
        solve_adjoint: (F around φ, v) ↦ u with Aᵀu = v.
        snapshot: () ↦ (F around φ, the tensors that stand for a in it), as recorded when φ was
            found; None lets backward linearise anew.
        keeps_start: whether φ still depends on where its training started.
        smooth: a ↦ φ, made of a problem that has derivatives of every order; None where this is
            one itself.
    """

    solve: Callable[[Tensors], Tensors]
    linearize: Callable[[Tensors, Tensors], Linearization]
    solve_adjoint: Callable[[Linearization, Tensors], Tensors]
    snapshot: Callable[[], tuple[Linearization, Tensors]] | None = None
    keeps_start: bool = False
    smooth: Callable[[Tensors], Tensors] | None = None
    is_differentiated = False  # whether derivatives of its gradients were asked for

    def recorded(self, phi: Tensors, inputs: Tensors) -> tuple[Linearization, Tensors]:
        """F around φ on tensors of its own, cut off from the graph that φ and a came from."""
        with torch.enable_grad():
            if self.snapshot is not None:
                around, inputs = self.snapshot()
            else:
                phi, inputs = variables(phi), variables(inputs)
                around = self.linearize(phi, inputs)
        around.is_differentiated = self.is_differentiated
        return around, inputs

    def adjoint(self, size: int) -> Problem:
        """The problem whose solution is u: Aᵀu − v = 0, with arguments (φ, a, v)."""

        def split(inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
            return inputs[:size], inputs[size:-size], inputs[-size:]

        def solve(inputs: Tensors) -> Tensors:
            phi, a, v = split(inputs)
            return self.solve_adjoint(self.recorded(phi, a)[0], v)

        def linearize(u: Tensors, inputs: Tensors) -> Linearization:
            phi, a, v = split(inputs)
            around = self.linearize(phi, a)
            smooth = around.unscaled_transposed(u)
            product = around.with_scale(smooth, u)
            residual = tuple(p - w for p, w in zip(product, v, strict=True))
            return Linearization(
                residual,
                u,
                smooth,
                scale=around.scale,
                n_tasks=around.n_tasks,
                primal=around,
                said_symmetric=around.said_symmetric,
            )

        return Problem(solve, linearize, self.solve_adjoint)


class ImplicitFunction(torch.autograd.Function):
    """φ = problem.solve(a), with the implicit gradient as its backward pass."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *a: Tensor) -> Tensors:
        # all in one: `setup_context` makes torch inspect this signature at each call
        phi = problem.solve(a)
        ctx.problem, ctx.size = problem, len(phi)
        ctx.save_for_backward(*phi, *a)
        ctx.set_materialize_grads(False)
        return phi

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem, wanted = ctx.problem, ctx.needs_input_grad[1:]
        if all(v is None for v in cotangents):
            return (None,) * (1 + len(wanted))
        phi, a = _saved(ctx)
        if is_transformed(v for v in cotangents if v is not None):
            return None, *_batched_backward(problem, phi, a, cotangents, wanted)
        v = tuple(
            torch.zeros_like(p) if v is None else dense(v)
            for v, p in zip(cotangents, phi, strict=True)
        )
        with own_precision(x.device for x in (*phi, *a)):
            if torch.is_grad_enabled() and problem.smooth is not None:
                a = connected(a)
                grads = vjp(problem.smooth(a), _chosen(a, wanted), v)
            else:
                grads = _gradients(problem, phi, a, v, wanted)
        found = iter(grads)
        return None, *(next(found) if wants else None for wants in wanted)


def _gradients(
    problem: Problem, phi: Tensors, a: Tensors, v: Tensors, wanted: tuple[bool, ...]
) -> Tensors:
    """−(∂F/∂a)ᵀu for those a that are wanted."""
    if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
        problem.is_differentiated = True
        phi, a = connected(phi), connected(a)
        u = ImplicitFunction.apply(problem.adjoint(len(phi)), *phi, *a, *v)
        around = problem.linearize(phi, a)
    else:
        around, a = problem.recorded(phi, a)
        u = problem.solve_adjoint(around, v)
    targets = _chosen(a, wanted)
    grads = around.pullback(tuple(-x for x in u), targets)
    if problem.keeps_start and around.starts:
        left = tuple(map(torch.sub, v, around.transposed(u)))
        grads = tuple(map(torch.add, grads, around.at_start(left, targets)))
    return grads


def _chosen(a: Tensors, wanted: tuple[bool, ...]) -> list[Tensor]:
    return [x for x, wants in zip(a, wanted, strict=True) if wants]


def _batched_backward(
    problem: Problem,
    phi: Tensors,
    a: Tensors,
    cotangents: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Backward for cotangents under a transform: many at once, or with tangents of their own."""
    places = [i for i, wants in enumerate(wanted) if wants]

    def at_phi(xs: Tensors, phi: Tensors) -> Tensors:
        there = dataclasses.replace(problem, solve=lambda _: tuple(p.detach() for p in phi))
        inputs = dict(enumerate(a)) | dict(zip(places, xs, strict=True))
        attached: Tensors = ImplicitFunction.apply(there, *inputs.values())
        return attached

    v = [torch.zeros_like(p) if v is None else v for v, p in zip(cotangents, phi, strict=True)]
    xs = [a[i] for i in places]
    grads = lifted(pullback(Plain(at_phi), len(xs)), (*xs, *v), known=phi)
    found = dict(zip(places, grads, strict=True))
    return tuple(found.get(i) for i in range(len(wanted)))


def connected(tensors: Tensors) -> Tensors:
    """New nodes of the graph with these values: differentiating by them goes no further."""
    return tuple(t.view_as(t) for t in tensors)


def _saved(ctx: Any) -> tuple[Tensors, Tensors]:
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise GraphError(
            "an argument of the solver (theta, data, lam) or the phi it returned was modified in "
            "place between forward and backward, for instance by optimizer.step() before "
            "loss.backward(), or by nn.Embedding(max_norm=...) when it is called; the implicit "
            "gradient would be taken at the wrong point. Call backward() first, or pass a clone()",
            anchor="modified-in-place",
        ) from error
    return saved[: ctx.size], saved[ctx.size :]
