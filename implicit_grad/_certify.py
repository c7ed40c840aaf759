"""The certificate: how far the whole hypergradient is from that of the exact inner solution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.base import check_callable
from implicit_grad._curvature.comparison import direction
from implicit_grad._errors import InvalidArgumentError, Status, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._linear_solvers.gmres import GMRES
from implicit_grad._linear_solvers.iterative import Iterative
from implicit_grad._theorem.adjoint import Solved, solve_adjoint, solve_newton
from implicit_grad._theorem.linearization import Curvature, Linearization
from implicit_grad._torch.pytree import Tensors, length
from implicit_grad._wrapper.evaluation import Evaluation
from implicit_grad._wrapper.implicit_solver import ImplicitSolver, default_linear_solver
from implicit_grad._wrapper.outer import Outer

_ROUNDINGS = 32.0  # what sums of a few terms lose
_NO_SOLUTION = (Status.SINGULAR, Status.STAGNATED, Status.MAX_ITER)  # was found, or there is none


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `certify` found. Its estimates are right to first order in the inner error.

    Attributes:
        tensors: what the gradients are with respect to: the arguments that require grad, then the
            tensors that the condition's function captured.
        gradients: the hypergradient at the solver's φ, as `backward` computes it.
        corrected: the hypergradient with its first-order error taken out: its own error is second
            order in ‖φ − φ*‖.
        error: estimate of the error of `gradients`, ‖corrected − gradients‖₂ over all tensors.
        relative_error: the same over ‖gradients‖₂.
        inner_error: estimate of ‖φ − φ*‖₂.
        outer_loss_error: estimate of outer_loss(φ*) − outer_loss(φ).
        status: the worst of the three linear solves, of all tasks in a batch; if it is
            not `ok`, trust nothing here.
    """

    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    corrected: tuple[Tensor, ...]
    error: float
    relative_error: float
    inner_error: float
    outer_loss_error: float
    status: Status

    @property
    def descends(self) -> bool:
        """Whether −gradients is a direction of descent of the exact outer loss, by the estimate."""
        return self.status.ok and self.relative_error < 1

    def __str__(self) -> str:
        if not self.status.ok:
            return f"Not certified, for a linear solve failed: {self.status}"
        falls = "falls" if self.descends else "need not fall"
        return (
            f"By first-order estimates, the gradient is {100 * self.relative_error:.2g} % off "
            f"(error {self.error:.2g}); the exact outer loss {falls} against it.\n"
            f"phi is {self.inner_error:.2g} away from the inner problem's solution, where the "
            f"outer loss differs by {self.outer_loss_error:.2g}."
        )


def certify(
    solve: ImplicitSolver,
    args: Sequence[Any],
    outer_loss: Callable[[Any], Tensor],
) -> Certificate:
    """Estimate the total error of a hypergradient, and correct it.

    With r = F(φ), one Newton step leads to φ⁺ = φ + d, A d = −r. There, the solution u of Aᵀu = v
    leaves the residual e = v⁺ − A⁺ᵀu, from which u⁺ = u + (A⁺ᵀ)⁻¹e, and the corrected gradient
    −(∂F⁺/∂a)ᵀu⁺ (plus what the outer loss depends on directly). Its distance to the gradient at φ
    is the estimate. Cost: the solver, one backward solve as `solve` takes it, two more with the
    Hessian and the condition's default linear solver, and one outer gradient.

    Args:
        solve: what `implicit` returned.
        args: the arguments to call it with.
        outer_loss: `outer_loss(phi)` returns a scalar tensor.

    Raises:
        InvalidArgumentError: an argument cannot work, or no tensor requires grad.
    """
    _check(solve, args, outer_loss)
    # the φ that the next call will find
    evaluation, inputs = solve.without_trace().evaluation(tuple(args), {})
    with torch.enable_grad():
        phi = evaluation.solve_and_record(inputs)
    wanted = [t for t in inputs if t.requires_grad]
    tensors = (*wanted, *evaluation.captured)
    if not tensors:
        raise InvalidArgumentError("certify: none of the arguments requires grad")
    around, targets = _recorded(evaluation, inputs)
    here = Outer("certify: outer_loss", outer_loss, evaluation, phi, tensors)
    first = solve_adjoint(evaluation.method.linear_solver, around, here.v, verify=True)
    gradients = here.with_implicit(around, first.x, targets)

    # what is judged may be truncated, damped or Gauss-Newton; what it is judged by is not
    # products that were found to be wrong stay replaced
    asked = evaluation.curvature
    curvature: Curvature = "auto" if asked == "gauss_newton" else asked
    with torch.enable_grad():
        true, _ = evaluation.recorded(curvature)
    solver = default_linear_solver(evaluation.condition)
    newton = _to_rounding(
        lambda solver: solve_newton(solver, true),
        solver,
        true,
        lambda: length(true.transposed(direction(true.phi))),
    )
    moved = tuple((p + d).detach() for p, d in zip(phi, newton.x, strict=False))
    around_moved = evaluation.around(moved, curvature)
    there = Outer("certify: outer_loss", outer_loss, evaluation, moved, tensors)
    with torch.no_grad():
        same = [x.shape for x in first.x] == [p.shape for p in around_moved.phi]
        start = first.x if same else tuple(map(torch.zeros_like, around_moved.phi))
        product = around_moved.transposed(start)
        v = around_moved.augment(there.v)
        rest = tuple(v - p for v, p in zip(v, product, strict=True))
    second = _to_rounding(
        lambda solver: solve_adjoint(solver, around_moved, rest, verify=True),
        solver,
        around_moved,
        lambda: length(v) + length(product),
    )
    with torch.no_grad():
        u = tuple(map(torch.add, start, second.x))
        u = around_moved.recover(u, there.v)
    corrected = there.with_implicit(around_moved, u, targets)

    solves = ((first, around), (newton, true), (second, around_moved))
    status = Status.worst(solved.status(at) for solved, at in solves)
    if not status.ok:
        evaluation.method.reporting.say(f"not certified: {status.sentence}", status.anchor)
    error, size = _distance(corrected, gradients), length(gradients)
    return Certificate(
        tensors=tensors,
        gradients=gradients,
        corrected=corrected,
        error=error,
        relative_error=error / size if size else (math.inf if error else 0.0),
        inner_error=length(newton.x[: len(phi)]),
        outer_loss_error=-sum(
            float((x * f.detach()).sum()) for x, f in zip(first.x, around.residual, strict=True)
        ),
        status=status,
    )


def _recorded(evaluation: Evaluation, inputs: Tensors) -> tuple[Linearization, Tensors]:
    """F around φ, and the tensors in its graph that stand for those to differentiate by."""
    with torch.enable_grad():
        around, a = evaluation.recorded()
    captured = a[len(inputs) :]
    return around, (*(x for x, t in zip(a, inputs, strict=False) if t.requires_grad), *captured)


def _to_rounding(
    solve: Callable[[LinearSolver], Solved],
    solver: LinearSolver,
    around: Linearization,
    terms: Callable[[], float],
) -> Solved:
    """The solve; where it fails, down to the rounding of terms of that size in its right-hand side.

    Where phi may turn freely, nothing solves for what is rounded in the directions of the turn.
    """
    solved, rounding = solve(solver), _ROUNDINGS * around.precision
    status = solved.status(around)
    lost = status == Status.NEGATIVE_CURVATURE and all(
        s.extremes is not None and abs(s.extremes[0]) <= rounding * s.extremes[1]
        for s in solved.solutions
    )
    if not (lost or status in _NO_SOLUTION):
        return solved
    with torch.no_grad():
        atol = rounding * terms()
    if isinstance(solver, Iterative):
        return solve(dataclasses.replace(solver, atol=atol))
    return solve(GMRES(atol=atol))  # the first part of the default for other systems


def _distance(x: Tensors, y: Tensors) -> float:
    """‖x − y‖₂ over all tensors."""
    return length([a - b for a, b in zip(x, y, strict=True)])


def _check(solve: object, args: object, outer_loss: object) -> None:
    if not isinstance(solve, ImplicitSolver):
        raise InvalidArgumentError(
            f"certify: solve must be what implicit() returned, got {describe(solve)}"
        )
    linear_solver = solve.setup.linear_solver
    if linear_solver.keeps_start or linear_solver.needs_scale:
        raise InvalidArgumentError(
            "certify: a gradient is judged by that of the exact inner solution, which is not what "
            f"{type(linear_solver).__name__} is for: certify one by CG()"
        )
    if not isinstance(args, (tuple, list)):
        raise InvalidArgumentError(
            f"certify: args must be a tuple of the solver's arguments, got {describe(args)}"
        )
    check_callable("certify", "outer_loss", outer_loss)
