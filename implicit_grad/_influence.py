"""Influence: what the outer loss owes to each training point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.base import check_callable, scalar
from implicit_grad._conditions.dependence import scattered
from implicit_grad._errors import InvalidArgumentError, Status, describe
from implicit_grad._options import is_integer
from implicit_grad._theorem.adjoint import solve_adjoint
from implicit_grad._theorem.linearization import Linearization
from implicit_grad._torch import pytree
from implicit_grad._torch.products import variables, vjp
from implicit_grad._torch.pytree import Tensors, inner
from implicit_grad._wrapper.evaluation import Evaluation
from implicit_grad._wrapper.implicit_solver import ImplicitSolver
from implicit_grad._wrapper.outer import Outer

# F bends as the weights change where its slopes do by more than rounding, this power of eps.
_ROUNDING = 0.5
_NOT_LINEAR = (
    "influence: the objective is not linear in the weights (a division by weights.sum(), a power "
    "or a softmax of them?), so that leaving a point out is not to take its term from a sum. The "
    "removals are of first order, and leverages NaN. Write the objective as the sum over points of "
    "weight times loss, plus what does not depend on the weights"
)


@dataclasses.dataclass(frozen=True)
class Influence:
    """What `influence` found, for each training point: tensors of the form of the weights.

    Attributes:
        gradient: the outer loss's derivative by the point's weight, −vᵀA⁻¹gᵢ.
        removal: by how much the outer loss changes if the point is left out. It is corrected where
            that was asked for, and of first order, −wᵢ times the gradient, elsewhere (and where the
            objective is not linear in the weights, which is told). Where a leverage is 1 or more,
            nothing holds φ without the point: NaN.
        leverage: hᵢ, where the removal is corrected; NaN elsewhere.
        status: the worst of the linear solves.
    """

    gradient: Tensor
    removal: Tensor
    leverage: Tensor
    status: Status


def influence(
    solve: ImplicitSolver,
    weights: Tensor,
    outer: Callable[[Any], Tensor],
    *,
    args: Sequence[Any] | None = None,
    leave_one_out: bool | Sequence[int] = False,
) -> Influence:
    """How an outer loss would change if training points had other weights, or were left out.

    The inner problem is a minimum whose objective is Σᵢ wᵢℓᵢ(φ) plus what does not depend on the
    weights w. With gᵢ = ∇ℓᵢ, dφ/dwᵢ = −A⁻¹gᵢ, so that one linear solve Aᵀu = v tells −gᵢᵀu for
    all points (Cook and Weisberg, 1982, Residuals and Influence in Regression; Koh and Liang, 2017,
    Understanding Black-box Predictions via Influence Functions).

    Leaving a point out also takes its curvature Hᵢ = ∇²ℓᵢ from A. With sᵢ = A⁻¹gᵢ, one system more
    for each such point, the minimum along sᵢ of the second-order model of the objective without the
    point is at

        φ + wᵢsᵢ/(1 − hᵢ),        hᵢ = wᵢ sᵢᵀHᵢsᵢ / sᵢᵀgᵢ,

    and the outer loss is evaluated there. Where ℓᵢ depends on φ through one number xᵢᵀφ, this is
    Newton's step for the problem without the point (Pregibon, 1981, Logistic Regression
    Diagnostics); for least squares hᵢ is the leverage, a diagonal element of the hat matrix, and
    the step is exact.

    Args:
        solve: what `implicit` returned.
        weights: the weights, of any shape; ones mean the plain objective.
        outer: `outer(phi)` returns a scalar tensor, and does not read the weights.
        args: the arguments to call `solve` with, one of which (or a tensor in one) is `weights`
            itself; by default weights alone.
        leave_one_out: whether to correct the removals: of all points, or of those with these
            (flat) indices, such as the few with the largest gradients.

    Raises:
        InvalidArgumentError: an argument cannot work.
        GraphError: the correction needs products with the Hessian, and there are none.

    The mean of three numbers; without the last it is 1.5:

    >>> import implicit_grad as ig, torch
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> mean = ig.implicit(
    ...     lambda w: (w * x).sum() / w.sum(), ig.argmin(lambda m, w: (w * (m - x) ** 2).sum())
    ... )
    >>> ig.influence(mean, torch.ones(3), outer=lambda m: m, leave_one_out=[2]).removal
    tensor([ 0.6667,  0.3333, -1.5000])
    """
    args = (weights,) if args is None else args
    chosen = _check(solve, weights, outer, args, leave_one_out)
    leaves, tree = pytree.flatten(tuple(args), whole_modules=True)
    own = weights.detach().clone().requires_grad_()
    args = tree.rebuild([own if t is weights else t for t in leaves])
    evaluation, inputs = solve.without_trace().evaluation(args, {})
    place = next(i for i, t in enumerate(inputs) if t is own)
    with torch.enable_grad():
        phi = evaluation.solve_and_record(inputs)
        around, stand_ins = evaluation.recorded()
    if place in evaluation.unread:
        raise InvalidArgumentError(
            "influence: the condition's function does not depend on weights: it has to multiply "
            "each point's loss with its weight"
        )
    here = Outer("influence: outer", outer, evaluation, phi, (own,))
    solver = evaluation.method.linear_solver
    solved = solve_adjoint(solver, around, here.v, verify=True)
    (gradient,) = here.with_implicit(around, solved.x, (stand_ins[place],))
    removal, leverage = -own.detach() * gradient, torch.full_like(gradient, math.nan)
    statuses = [solved.status(around)]
    if chosen:
        points = _Points(evaluation, phi, inputs, place)
        if not points.are_terms_of_a_sum():
            evaluation.method.reporting.say(_NOT_LINEAR, anchor="not-linear-in-weights")
            chosen = ()
        for i in chosen:
            s, g, status = points.solved(around, i)
            statuses.append(status)
            w = float(own.detach().flatten()[i])
            h = points.leverage(s, g, i, w)
            leverage.view(-1)[i] = h
            changed = math.nan
            if h < 1:
                there = tuple(p + w / (1 - h) * x for p, x in zip(phi, s, strict=True))
                changed = _value(outer, evaluation, there) - float(here.value)
            removal.view(-1)[i] = changed
    status = Status.worst(statuses)
    if not status.ok:
        evaluation.method.reporting.say(f"influence: {status.sentence}", status.anchor)
    return Influence(gradient, removal, leverage, status)


class _Points:
    """Gradients and curvatures of single points' losses, by derivatives of F with respect to w."""

    def __init__(self, evaluation: Evaluation, phi: Tensors, inputs: Tensors, place: int) -> None:
        self._solver = evaluation.method.linear_solver.cold()
        with torch.enable_grad():
            at, known = variables(phi), (*inputs, *evaluation.captured)
            a = tuple(t.detach().requires_grad_() if t.requires_grad else t.detach() for t in known)
            self._around, self._weights = evaluation.linearize(at, a), a[place]
            self._dummy = tuple(torch.zeros_like(p, requires_grad=True) for p in at)
            (self._slopes,) = self._around.pullback(self._dummy, (self._weights,))

    def are_terms_of_a_sum(self) -> bool:
        """Whether ∂²F/∂w² = 0, along random directions: F is linear in the weights."""
        u = tuple(map(scattered, self._dummy))
        with torch.enable_grad():
            (slopes,) = self._around.pullback(u, (self._weights,))
        with torch.no_grad():
            way = scattered(slopes)
            (bent,) = vjp((slopes,), (self._weights,), (way,))
            size = float(slopes.norm() * way.norm())
            rounding = torch.finfo(slopes.dtype).eps ** _ROUNDING * size
            return not float((bent * self._weights).abs().sum()) > rounding

    def solved(self, around: Linearization, i: int) -> tuple[Tensors, Tensors, Status]:
        """A⁻¹gᵢ, gᵢ, and how the solve ended."""
        with torch.no_grad():
            g = vjp((self._slopes,), self._dummy, (self._one(i),))
        solved = solve_adjoint(self._solver, around, g, verify=True)
        return solved.x, g, solved.status(around)

    def leverage(self, s: Tensors, g: Tensors, i: int, weight: float) -> float:
        """wᵢ sᵢᵀHᵢsᵢ / sᵢᵀgᵢ."""
        along = inner(s, g)
        if along == 0:
            return 0.0
        with torch.enable_grad():
            product = self._around.unscaled_transposed(s)
        with torch.no_grad():
            (bent,) = vjp(product, (self._weights,), s)
        return weight * float(bent.flatten()[i]) / along

    def _one(self, i: int) -> Tensor:
        """1 in the place of a point, 0 in those of the others."""
        one = torch.zeros_like(self._slopes).flatten()
        one[i] = 1
        return one.view_as(self._slopes)


def _value(outer: Callable[[Any], Tensor], evaluation: Evaluation, phi: Tensors) -> float:
    with torch.no_grad():
        container = evaluation.phi_tree.rebuild(phi, owned=True)
        value = scalar("influence: outer", outer(container))
        if evaluation.condition.processes is not None:
            (value,) = evaluation.condition.processes.mean((value,))
        return float(value)


def _check(
    solve: object, weights: object, outer: object, args: object, leave_one_out: object
) -> Sequence[int]:
    """The points to be left out, once the arguments are known to work."""
    if not isinstance(solve, ImplicitSolver):
        raise InvalidArgumentError(
            f"influence: solve must be what implicit() returned, got {describe(solve)}"
        )
    setup = solve.setup
    if setup.linear_solver.keeps_start or setup.linear_solver.needs_scale:
        raise InvalidArgumentError(
            "influence: leaving a point out is compared with the exact inner solution, which is "
            f"not what {type(setup.linear_solver).__name__} is for: use CG()"
        )
    if not torch.is_tensor(weights) or not weights.is_floating_point():
        raise InvalidArgumentError(
            f"influence: weights must be a floating-point tensor, got {describe(weights)}"
        )
    if not isinstance(args, (tuple, list)):
        raise InvalidArgumentError(
            f"influence: args must be a tuple of the solver's arguments, got {describe(args)}"
        )
    if not any(t is weights for t in pytree.leaves(tuple(args))):
        raise InvalidArgumentError(
            "influence: args must hold weights, the very tensor, so that the solver gets it"
        )
    check_callable("influence", "outer", outer)
    count = weights.numel()
    if isinstance(leave_one_out, bool):
        chosen: Sequence[int] = range(count if leave_one_out else 0)
    else:
        if torch.is_tensor(leave_one_out):
            leave_one_out = leave_one_out.tolist()
        good = isinstance(leave_one_out, (tuple, list, range)) and all(
            is_integer(i, 0) and i < count for i in leave_one_out
        )
        if not good:
            raise InvalidArgumentError(
                f"influence(leave_one_out={leave_one_out!r}): expected True, False or indices of "
                f"weights, of which there are {count}"
            )
        chosen = list(leave_one_out)  # type: ignore[call-overload]
    condition = setup.condition
    smooth = condition.is_minimum and condition.definite and not condition.constrained
    if chosen and (condition.tasks or not smooth):
        raise InvalidArgumentError(
            "influence: leave_one_out is for argmin and proximal without constraints or tasks, "
            "where the point's curvature is a part of A"
        )
    return chosen
