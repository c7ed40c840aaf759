"""`implicit`: run any solver, and give what it returns the implicit gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from implicit_grad import _linear, _tree
from implicit_grad._ad import Linearization, leaves_behind
from implicit_grad._conditions import Call, Condition, Snapshot, argmin, describe, proximal
from implicit_grad._errors import GraphError, InvalidArgumentError, InvalidSolutionError
from implicit_grad._function import ImplicitFunction, Problem, variables
from implicit_grad._krylov import CG, NormalCG
from implicit_grad._linear import LinearSolver
from implicit_grad._solution import checked
from implicit_grad._state import RandomState, undisturbed
from implicit_grad._tree import Tensors, Tree
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
        evaluation = _Evaluation(self, tree, inputs)
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
        init = call.args[0] if self.init is None else self.init(*call.args, **call.kwargs)
        return self.solver.minimize(self.condition.objective_of(call, parameters), init)


class _Evaluation:
    """One call of an implicit solver, as backward needs it: the solution and F's graph there.

    It never holds φ or the arguments with their graphs: they would keep their own node alive.
    """

    def __init__(self, owner: ImplicitSolver, tree: Tree, inputs: Tensors) -> None:
        self.owner, self.tree = owner, tree
        self.wanted = [t.requires_grad for t in inputs]
        self.devices = {t.device for t in inputs}
        self.captured: Tensors = ()
        self.phi_tree: Tree
        self._phi: Tensors | None = None
        self._record: tuple[Snapshot, Tensors] | None = None
        self._random: RandomState | None = None

    def problem(self) -> Problem:
        """The problem whose F is recorded where the solver's φ is."""
        return Problem(self.solve_and_record, self.linearize, self.solve_adjoint, self.recorded)

    def solve(self, inputs: Tensors) -> Tensors:
        """Run the solver on tensors of its own with gradients on, as any training loop expects."""
        lent = tuple(
            t.detach().clone() if wanted else t.detach()
            for t, wanted in zip(inputs, self.wanted, strict=True)
        )
        versions = [t._version for t in lent]
        call, parameters = self._call(lent)
        with torch.enable_grad():
            returned = self.owner.run(call, parameters)
        for before, tensor, wanted in zip(versions, lent, self.wanted, strict=True):
            if tensor._version != before and not wanted:
                raise InvalidSolutionError(
                    f"the solver changed one of its arguments in place ({describe(tensor)}); it "
                    "must work on a copy: argument.clone()"
                )
        phi, self.phi_tree = checked(returned, lent, self.owner.condition.template(call))
        self.devices |= {t.device for t in phi}
        return phi

    def solve_and_record(self, inputs: Tensors) -> Tensors:
        """Solve, and evaluate the user's function at φ while what it refers to is still there.

        A function may refer to variables of the caller (a loop's current batch) that have changed
        by the time backward runs; the graph recorded here does not change.
        """
        if self._phi is None:
            self._phi = self.solve(inputs)
            self._random = RandomState(self.devices)
            with torch.enable_grad():
                phi, a = variables(self._phi), self._variables(inputs)
            snapshot = self._evaluate(phi, a)
            self._record = snapshot, a
            leaves = leaves_behind(snapshot.outputs)
            self._check_dependence(leaves, phi)
            own = {id(t) for t in (*phi, *a)}
            self.captured = tuple(t for t in leaves if id(t) not in own)
        return tuple(t.detach() for t in self._phi)

    def recorded(self) -> tuple[Linearization, Tensors]:
        """F around φ from the record, and the tensors that stand for the arguments in it."""
        assert self._record is not None
        snapshot, a = self._record
        return snapshot.linearize(), (*a, *self.captured)

    def linearize(self, phi: Tensors, inputs: Tensors) -> Linearization:
        """F around φ evaluated anew, with a graph back to φ and the arguments."""
        assert self._record is not None
        if self.captured:
            raise GraphError(
                "second derivatives with respect to tensors that the condition's function "
                "captured (closed over, or parameters of a module in it) are not available: pass "
                "these tensors to the solver as arguments"
            )
        again = self._evaluate(phi, inputs)
        for before, now in zip(self._record[0].outputs, again.outputs, strict=True):
            tolerance = torch.finfo(before.dtype).eps ** 0.5
            if not torch.allclose(before.detach(), now.detach(), rtol=tolerance, atol=tolerance):
                raise GraphError(
                    "the condition's function gave another value when it was evaluated again for "
                    "a second derivative: it refers to a variable that has changed since the "
                    "solver ran, or it is random. Pass everything it needs as arguments"
                )
        return again.linearize()

    def solve_adjoint(self, around: Linearization, v: Tensors) -> Tensors:
        """u with Aᵀu = v, and its report."""
        reporting = self.owner.reporting
        u, solution = _linear.solve_adjoint(
            self.owner.linear_solver, around, v, verify=reporting.monitor is not None
        )
        reporting.tell(solution, around, u)
        return u

    def _evaluate(self, phi: Tensors, inputs: Tensors) -> Snapshot:
        call, parameters = self._call(inputs)
        with undisturbed(self.devices, self._random):
            return self.owner.condition.at(self.phi_tree.rebuild(phi), phi, call, parameters)

    def _call(self, inputs: Tensors) -> tuple[Call, Any]:
        args, kwargs, parameters = self.tree.rebuild(inputs)
        return Call(args, kwargs), parameters

    def _variables(self, inputs: Tensors) -> Tensors:
        return tuple(
            v if wanted else v.detach()
            for v, wanted in zip(variables(inputs), self.wanted, strict=True)
        )

    def _check_dependence(self, leaves: Tensors, phi: Tensors) -> None:
        if not self.owner.condition.must_depend_on_phi or not any(p.numel() for p in phi):
            return
        if not {id(t) for t in leaves} & {id(t) for t in phi}:
            name = type(self.owner.condition).__name__
            raise InvalidArgumentError(
                f"{name}: the function's value does not depend on phi, its first argument, so it "
                "does not define phi (was phi detached, or converted to NumPy, inside it?)"
            )


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
