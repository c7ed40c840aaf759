"""`implicit`: run any solver, and give what it returns the implicit gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from implicit_grad import _tree
from implicit_grad._conditions import Call, Condition, argmin, proximal
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._evaluation import Evaluation
from implicit_grad._function import ImplicitFunction
from implicit_grad._krylov import CG, NormalCG
from implicit_grad._linear import LinearSolver
from implicit_grad.monitor import Monitor, OnFailure, Reporting


@runtime_checkable
class Minimizer(Protocol):
    """A solver that is handed the objective and where to start (see `implicit_grad.solvers`)."""

    def minimize(self, objective: Callable[[Any], Tensor], init: Any) -> Any:
        """Return phi, in the form of init, that minimises objective(phi)."""
        ...


class ImplicitSolver:
    """A solver whose output carries implicit gradients; made by `implicit`."""

    def __init__(
        self,
        solver: Callable[..., Any] | Minimizer,
        condition: Condition,
        linear_solver: LinearSolver,
        init: Callable[..., Any] | None,
        reporting: Reporting,
    ) -> None:
        if callable(solver):
            functools.update_wrapper(self, solver)
        self.solver, self.condition, self.linear_solver = solver, condition, linear_solver
        self.init, self.reporting = init, reporting

    def __repr__(self) -> str:
        name = getattr(self.solver, "__qualname__", None) or repr(self.solver)
        return f"implicit({name}, {type(self.condition).__name__}, {self.linear_solver})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the solver; the phi it returns has gradients with respect to all its arguments."""
        self.condition.check_call(Call(args, kwargs))
        inputs, tree = _tree.flatten((args, kwargs, self.condition.parameters))
        evaluation = Evaluation(
            self.run, self.condition, self.linear_solver, self.reporting, tree, inputs
        )
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            with torch.inference_mode(False):
                phi = evaluation.solve(inputs)
                return evaluation.phi_tree.rebuild(phi)
        problem = evaluation.problem()
        phi = ImplicitFunction.apply(problem, *inputs)
        if evaluation.captured:
            # Only at φ do we learn which tensors the user's function captured: attach them too.
            phi = ImplicitFunction.apply(problem, *inputs, *evaluation.captured)
        return evaluation.phi_tree.rebuild(phi)

    def run(self, call: Call, parameters: Any) -> Any:
        """The solver's own output."""
        if not isinstance(self.solver, Minimizer):
            return self.solver(*call.args, **call.kwargs)
        if self.init is None and not call.args:
            raise InvalidArgumentError(
                "implicit: without a positional argument to start from, this minimiser needs init="
            )
        init = call.args[0] if self.init is None else self.init(*call.args, **call.kwargs)
        return self.solver.minimize(self.condition.objective_of(call, parameters), init)


@overload
def implicit(
    solver: Callable[..., Any] | Minimizer,
    condition: Condition,
    *,
    linear_solver: LinearSolver | None = None,
    init: Callable[..., Any] | None = None,
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
) -> ImplicitSolver: ...


@overload
def implicit(
    solver: None = None,
    *,
    condition: Condition,
    linear_solver: LinearSolver | None = None,
    init: Callable[..., Any] | None = None,
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
) -> Callable[[Callable[..., Any] | Minimizer], ImplicitSolver]: ...


def implicit(
    solver: Callable[..., Any] | Minimizer | None = None,
    condition: Condition | None = None,
    *,
    linear_solver: LinearSolver | None = None,
    init: Callable[..., Any] | None = None,
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
) -> ImplicitSolver | Callable[[Callable[..., Any] | Minimizer], ImplicitSolver]:
    """Make any solver differentiable by the implicit function theorem.

    `solver(*args)` returns phi, a tensor or any container of tensors. The wrapped solver returns
    the same phi with gradients with respect to all tensors among the arguments, and to those that
    the condition's function captured: with F(φ, a) = 0 by the condition, A = ∂F/∂φ and v the
    gradient that arrives at phi, it solves Aᵀu = v and returns −(∂F/∂a)ᵀu. The solver itself is
    not differentiated and may be any code. Without a solver, a decorator is returned.

    Args:
        solver: any callable; its tensors arrive detached, with gradient recording on. Or one of
            `implicit_grad.solvers`, which is handed the condition's objective.
        condition: what phi solves: `argmin`, `proximal`, `root` or `fixed_point`.
        linear_solver: for Aᵀu = v: `CG()` (the default) where A is symmetric, `NormalCG()` (the
            default) where it need not be, or `Exact()`.
        init: `init(*args)` is where a minimiser of `implicit_grad.solvers` starts; by default the
            first argument.
        monitor: collects a `Report` for each backward solve.
        on_failure: on numerical trouble "warn" (`ImplicitGradWarning`), "raise"
            (`LinearSolveError`) or "ignore".

    Raises:
        InvalidArgumentError: an argument, here or in a call, cannot work.
        InvalidSolutionError: the solver returned something that cannot be phi.
        GraphError: in backward, when the gradient cannot be had any more.

    Ridge regression, solved in closed form by code that autograd never sees:

    >>> def ridge(X, y, lam):
    ...     return torch.linalg.solve(X.T @ X + lam * torch.eye(2), X.T @ y)
    >>> def objective(w, X, y, lam):
    ...     return ((X @ w - y) ** 2).sum() / 2 + lam * (w * w).sum() / 2
    >>> X, y = torch.eye(2), torch.tensor([2.0, 4.0])
    >>> lam = torch.tensor(1.0, requires_grad=True)
    >>> w = implicit(ridge, argmin(objective))(X, y, lam)
    >>> w.sum().backward()  # w = y / (1 + lam), so its sum has derivative -6 / (1 + lam)²
    >>> lam.grad
    tensor(-1.5000)
    """
    if isinstance(solver, Condition):
        raise InvalidArgumentError("implicit: as a decorator, pass the condition as condition=...")
    if not isinstance(condition, Condition):
        raise InvalidArgumentError(
            "implicit: condition must be argmin(...), proximal(...), root(...) or "
            f"fixed_point(...), got {describe(condition)}"
        )
    if linear_solver is None:
        linear_solver = CG() if condition.symmetric else NormalCG()
    if not isinstance(linear_solver, LinearSolver):
        raise InvalidArgumentError(
            f"implicit: linear_solver must be CG(), NormalCG() or Exact(), got {linear_solver!r}"
        )
    if linear_solver.symmetric_only and not condition.symmetric:
        raise InvalidArgumentError(
            f"implicit: {type(linear_solver).__name__} needs a symmetric system, but the Jacobian "
            f"of {type(condition).__name__} is general: use NormalCG() or Exact()"
        )
    reporting = Reporting(
        monitor=monitor,
        on_failure=on_failure,
        curvature="hessian" if condition.symmetric else "jacobian",
        damping=getattr(linear_solver, "damping", 0.0),
        strong_convexity=_strong_convexity(condition),
    )
    if solver is None:
        return lambda solver: implicit(
            solver,
            condition,
            linear_solver=linear_solver,
            init=init,
            monitor=monitor,
            on_failure=on_failure,
        )
    if not callable(solver) and not isinstance(solver, Minimizer):
        raise InvalidArgumentError(
            f"implicit: solver must be callable or have a minimize method, got {describe(solver)}"
        )
    if init is not None and not isinstance(solver, Minimizer):
        raise InvalidArgumentError(
            "implicit: init is for minimisers of implicit_grad.solvers; this solver is a function "
            "and chooses its own start"
        )
    return ImplicitSolver(solver, condition, linear_solver, init, reporting)


def _strong_convexity(condition: Condition) -> float | None:
    """μ in units of the operator's scale, where the condition knows it."""
    if isinstance(condition, proximal):
        return 1.0 if condition.convex else None
    return condition.strong_convexity if isinstance(condition, argmin) else None
