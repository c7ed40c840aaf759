"""`implicit`: run any solver, and give what it returns the implicit gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, overload

from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.base import Condition
from implicit_grad._conditions.proximal import proximal
from implicit_grad._curvature.auto import check_curvature
from implicit_grad._curvature.checks import Check, Checks, check_option
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._linear_solvers.given import SolveFunction, as_linear_solver
from implicit_grad._linear_solvers.warm_start import Slot, WarmStart
from implicit_grad._options import check_value, is_integer, is_number
from implicit_grad._theorem.linearization import Curvature
from implicit_grad._theorem.report import Monitor, OnFailure, Reporting
from implicit_grad._wrapper.evaluation import Setup
from implicit_grad._wrapper.implicit_solver import (
    ImplicitSolver,
    Minimizer,
    RootFinder,
    Solver,
    default_linear_solver,
)
from implicit_grad._wrapper.warm import asks_for_start
from implicit_grad.solvers._descent import Descent

_LINEAR_SOLVERS = "CG(), EarlyStopped(...), MINRES(), GMRES(), NormalCG(), Neumann(), Exact()"


@overload
def implicit(
    solver: Solver,
    condition: Condition,
    *,
    linear_solver: LinearSolver | SolveFunction | None = None,
    curvature: Curvature = "auto",
    init: Callable[..., Any] | None = None,
    has_aux: bool = False,
    polish: int = 0,
    warm_start: bool | WarmStart = False,
    check: Check = "once",
    rtol_gradient: float | None = None,
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
) -> ImplicitSolver: ...


@overload
def implicit(
    solver: None = None,
    *,
    condition: Condition,
    linear_solver: LinearSolver | SolveFunction | None = None,
    curvature: Curvature = "auto",
    init: Callable[..., Any] | None = None,
    has_aux: bool = False,
    polish: int = 0,
    warm_start: bool | WarmStart = False,
    check: Check = "once",
    rtol_gradient: float | None = None,
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
) -> Callable[[Solver], ImplicitSolver]: ...


def implicit(
    solver: Solver | None = None,
    condition: Condition | None = None,
    *,
    linear_solver: LinearSolver | SolveFunction | None = None,
    curvature: Curvature = "auto",
    init: Callable[..., Any] | None = None,
    has_aux: bool = False,
    polish: int = 0,
    warm_start: bool | WarmStart = False,
    check: Check = "once",
    rtol_gradient: float | None = None,
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
) -> ImplicitSolver | Callable[[Solver], ImplicitSolver]:
    """Make any solver differentiable by the implicit function theorem.

    `solver(*args)` returns phi, a tensor, a module, or any container of them. The wrapped solver
    returns the same phi with gradients with respect to all tensors among the arguments, and to
    those that the condition's function captured: with F(φ, a) = 0 by the condition, A = ∂F/∂φ and v
    the gradient that arrives at phi, it solves Aᵀu = v and returns −(∂F/∂a)ᵀu. The solver itself is
    not differentiated and may be any code. Without a solver, a decorator is returned.

    A module stands for its parameters that require grad. The solver is handed a copy of one among
    the arguments, to train in place as it likes; the condition's function a copy with φ in their
    place (and not once more what φ was trained from, if that was the first argument); and what
    comes back is a copy whose parameters carry the gradient.

    Args:
        solver: any callable. Tensors reach it detached, and with gradient recording on, as training
            loops need it. (A solver that only applies modules saves memory by working under
            `torch.no_grad()`.) Or one of `implicit_grad.solvers`, which is handed the condition's
            objective.
        condition: what phi solves: `argmin`, `proximal`, `prox_gradient`, `root` or `fixed_point`.
        linear_solver: what solves Aᵀu = v. By default `CG()` for `argmin` and `proximal`;
            `MINRES()` for equality and inequality constraints and for symmetric roots, where A may
            be indefinite; for other roots and fixed points `GMRES()`, and `NormalCG()` if that
            fails. There are `EarlyStopped(...)`, `Neumann()` and `Exact()` as well. Or a function
            `solve(matvec, b)` that returns x with matvec(x) = b, a tensor or an array: see below.
        curvature: products with the "hessian" of an argmin's or proximal's objective, with its
            "gauss_newton" part (phi is a module, whose outputs are seen when the function calls it,
            or the condition has `model=`; changes the answer), or by
            "finite_difference"s of gradients. "auto" takes the Hessian, and differences if an
            operation has no second derivative in torch; the report says which.
        init: `init(*args)` is where a solver of `implicit_grad.solvers` starts; by default the
            first argument.
        has_aux: whether the solver is a function that returns (phi, aux). The wrapped one then does
            so too. aux may be anything (a count of steps, a residual, a trained model): it comes
            back as it is, with its tensors detached, and no condition sees it.
        polish: Newton steps to take from the solver's φ, each only if it makes ‖F‖ smaller and
            leads to no kink; with Hessian products and a linear solver run to a tolerance, the
            gradient's error is then second order in what the solver left unsolved.
        warm_start: start where the last call ended, for outer loops in which the arguments move
            little from call to call: True, or a `WarmStart()`, whose `at(key)` tells problems apart
            that share this solver. A solver of `implicit_grad.solvers` then starts at the last φ in
            place of `init`, if it is of the same form, shapes, dtype and device; a function with a
            parameter `start` is handed a copy of it, or None; and `CG` starts from its last
            solution. The gradient is that of where the solver ends, wherever it started, but for
            what is left unsolved; where there are several minima, it may be another one. It costs
            two vectors like φ; what it saves is in the `Report`. Under `torch.func.vmap` all starts
            are fresh, and `certify` and `check_implicit` leave no trace.
        check: whether products with A, and how F changes with the arguments, are held against
            differences, at φ: "once" for this solver and each kind of graph, "always" or "never".
            The condition's function is then evaluated a few times more. Torch's derivatives can be
            wrong, as where a custom Function's backward detaches or uses NumPy. Differences then
            take over with curvature="auto"; with another one, or if they are wrong too, the status
            is WRONG_PRODUCT. So it is where the objective's gradient is not the derivative of its
            value: a part that depends on phi is detached (estimators such as DiCE mean that: take
            "never" for them). Nothing is said where rounding or kinks leave it open, or in half
            precision.
        rtol_gradient: stop the linear solve as soon as the relative error of u is below this: by a
            bound where the strong convexity is known, by an estimate where it is not (the report
            says which). A minimiser of `implicit_grad.solvers` without a tolerance of its own also
            stops when ‖F‖ has fallen by this factor, which promises less: see `certify`.
        monitor: collects a `Report` for each backward solve.
        on_failure: on numerical trouble, a minimiser's missed tolerance included, "warn"
            (`ImplicitGradWarning`, at the line of the call), "raise" (`LinearSolveError`) or
            "ignore".

    Raises:
        InvalidArgumentError: an argument, here or in a call, cannot work.
        InvalidSolutionError: the solver returned something that cannot be phi.
        GraphError: in backward, when the gradient cannot be had any more.

    A function for `linear_solver` is handed flat vectors, φ's tensors one after another; matvec is
    the product with Aᵀ (with A, where φ is polished), λ of a proximal term included. Its answer is
    held to a residual of eps^(1/4) of b. SciPy's GMRES, and a sparse factorisation of A that the
    solver has made anyhow:

    >>> import numpy, scipy.sparse.linalg
    >>> def by_scipy(matvec, b):
    ...     product = scipy.sparse.linalg.LinearOperator(
    ...         (len(b), len(b)), matvec=lambda x: matvec(x).numpy(), dtype=b.numpy().dtype
    ...     )
    ...     return scipy.sparse.linalg.gmres(product, b.numpy(), rtol=1e-8)[0]
    >>> class Factorised:
    ...     def solver(self, k, b):
    ...         matrix = scipy.sparse.diags_array([k.numpy(), numpy.ones(2)], offsets=[0, 1])
    ...         self.factors = scipy.sparse.linalg.splu(matrix.tocsc())
    ...         return self.factors.solve(b.numpy())
    ...     def transposed(self, matvec, b):
    ...         return self.factors.solve(b.numpy(), trans="T")

    Ridge regression, solved in closed form by code that autograd never sees:

    >>> import torch
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
            "implicit: condition must be argmin(...), proximal(...), prox_gradient(...), root(...) "
            f"or fixed_point(...), got {_described(condition)}"
        )
    if linear_solver is None:
        linear_solver = default_linear_solver(condition)
    linear_solver = as_linear_solver(linear_solver, "implicit", _LINEAR_SOLVERS)
    if curvature == "gauss_newton" or linear_solver.needs_convex:
        condition = condition.seeing_outputs()
    if linear_solver.symmetric_only and not condition.symmetric:
        raise InvalidArgumentError(
            f"implicit: {type(linear_solver).__name__} needs a symmetric system, but the Jacobian "
            f"of {type(condition).__name__} is general: use GMRES(), NormalCG(), Neumann() or "
            f"Exact(), or {type(condition).__name__}(..., symmetric=True) if it is symmetric here",
            anchor="needs-symmetric",
        )
    if linear_solver.definite_only and not condition.definite:
        raise InvalidArgumentError(
            f"implicit: {type(linear_solver).__name__} needs a positive definite system, but "
            "multipliers of constraints make it indefinite: use MINRES() or Exact()",
            anchor="needs-definite",
        )
    if linear_solver.keeps_start and not condition.is_minimum:
        raise InvalidArgumentError(
            f"implicit: EarlyStopped is for argmin and proximal, whose phi gradient steps find; "
            f"with {type(condition).__name__} use GMRES() or MINRES()"
        )
    if linear_solver.needs_scale and not isinstance(condition, proximal):
        raise InvalidArgumentError(
            f"implicit: {type(linear_solver).__name__} is for proximal and imaml, where lam is the "
            f"least curvature that it leaves; with {type(condition).__name__} use CG() or MINRES()"
        )
    if isinstance(linear_solver, EarlyStopped) and linear_solver.counts_nothing:
        raise InvalidArgumentError(
            "implicit: EarlyStopped() is for imaml, which counts its steps: give "
            "EarlyStopped(steps=..., lr=...) or (time=...) here; see training_time"
        )
    _check_curvature(curvature, condition, linear_solver)
    check_value("implicit", "polish", polish, is_integer(polish, 0), "a number of Newton steps")
    good = isinstance(warm_start, (bool, WarmStart))
    check_value("implicit", "warm_start", warm_start, good, "True, False or a WarmStart()")
    if warm_start is not False and linear_solver.keeps_start:
        raise InvalidArgumentError(
            "implicit: EarlyStopped differentiates a training from its own start, and with "
            "warm_start a training began calls ago: use CG(), or leave warm_start out"
        )
    check_value("implicit", "has_aux", has_aux, isinstance(has_aux, bool), "True or False")
    good = rtol_gradient is None or (is_number(rtol_gradient) and 0 < rtol_gradient < 1)
    expected = "None or a number between 0 and 1"
    check_value("implicit", "rtol_gradient", rtol_gradient, good, expected)
    if rtol_gradient is not None and not linear_solver.tells_error:
        raise InvalidArgumentError(
            f"implicit: rtol_gradient={rtol_gradient!r} is for CG, whose coefficients tell the "
            f"error; {type(linear_solver).__name__} stops by its own options"
        )
    reporting = Reporting(
        monitor=monitor,
        on_failure=on_failure,
        strong_convexity=condition.strong_convexity_with(curvature),
        rtol_gradient=rtol_gradient,
    )
    check_option(check, "implicit")
    checks = Checks(check)
    store = warm_start if isinstance(warm_start, WarmStart) else None
    if warm_start is True:
        store = WarmStart()
    setup = Setup(
        condition=condition,
        linear_solver=linear_solver,
        reporting=reporting,
        curvature=curvature,
        polish=polish,
        checks=checks,
        has_aux=has_aux,
        warm_start=store,
    )
    if condition.tasks and (reason := setup.why_one_by_one(if_small=False)) is not None:
        raise InvalidArgumentError(f"implicit: with tasks=True, {reason}")

    def wrap(solver: Solver) -> ImplicitSolver:
        return _wrapped(solver, setup, init)

    return wrap if solver is None else wrap(solver)


def _described(condition: object) -> str:
    if isinstance(condition, type) and issubclass(condition, Condition):
        return f"{describe(condition)}: call it with your function, {condition.__name__}(...)"
    return describe(condition)


def _wrapped(solver: Solver, setup: Setup, init: Callable[..., Any] | None) -> ImplicitSolver:
    """The solver with its setup, once they are known to go together."""
    handed = isinstance(solver, (Minimizer, RootFinder))
    if handed and isinstance(solver, type):
        raise InvalidArgumentError(
            f"implicit: solver is the class {solver.__name__}; make one: {solver.__name__}(...)"
        )
    if init is not None and not callable(init):
        raise InvalidArgumentError(
            "implicit: init must be a function of the solver's arguments that returns where to "
            f"start, got {describe(init)}"
        )
    if not callable(solver) and not handed:
        raise InvalidArgumentError(
            "implicit: solver must be callable or have a method minimize or find_root, got "
            f"{describe(solver)}"
        )
    if setup.has_aux and handed:
        raise InvalidArgumentError(
            "implicit: has_aux=True is for solver functions that return (phi, aux); "
            f"{describe(solver)} with a method minimize or find_root returns phi alone"
        )
    if init is not None and not handed:
        raise InvalidArgumentError(
            "implicit: init is for solvers of implicit_grad.solvers; this solver is a function "
            "and chooses its own start"
        )
    if setup.warm_start is not None and not handed:
        _check_starts(solver, setup.linear_solver, setup.warm_start)
    if handed:
        condition = _with_bounds_of(solver, setup.condition)
        _check_prox(solver)
        _check_curvature(setup.curvature, condition, setup.linear_solver)
        training = solver.training if isinstance(solver, Descent) else None
        if setup.warm_start is not None:
            training = None  # it is longer than the minimiser's own steps
        setup = dataclasses.replace(setup, condition=condition, training=training)
        solver = _to_accuracy(solver, setup.reporting.rtol_gradient)
    return ImplicitSolver(solver, setup, init)


def _check_starts(solver: Any, linear_solver: LinearSolver, store: WarmStart | Slot) -> None:
    """Raise if there is nothing that could start where the last call ended."""
    if asks_for_start(solver) or linear_solver.starting_from(store.slot()) is not linear_solver:
        return
    raise InvalidArgumentError(
        "implicit: warm_start has nothing to start: give the solver function a parameter start, "
        "in which it gets the last phi (None in the first call); of the linear solvers CG() can"
    )


def _check_curvature(
    curvature: Curvature, condition: Condition, linear_solver: LinearSolver
) -> None:
    check_curvature(curvature, "implicit")
    name, offered = type(condition).__name__, condition.curvatures
    if linear_solver.needs_convex and not condition.is_minimum:
        raise InvalidArgumentError(
            f'implicit: on_negative_curvature="gauss_newton" is for minima, not for {name}: use '
            "MINRES() where its Jacobian may be indefinite"
        )
    asked = curvature == "gauss_newton" or linear_solver.needs_convex
    if "gauss_newton" not in offered and asked:
        raise InvalidArgumentError(
            "implicit: Gauss-Newton products need to know where the model ends and the loss "
            f"begins: pass {name}(loss, ..., model=model) with loss(model(phi, *args), *args)"
        )
    check_curvature(curvature, "implicit", offered)


def _with_bounds_of(solver: Any, condition: Condition) -> Condition:
    """The condition with the minimiser's own bounds, which φ then rests on."""
    bounds = getattr(solver, "bounds", None)
    if bounds is None:
        return condition
    if not isinstance(condition, argmin) or condition.bounds is not None:
        raise InvalidArgumentError(
            f"implicit: {type(solver).__name__} has bounds, which go with argmin without bounds of "
            "its own; give them once"
        )
    return dataclasses.replace(condition, bounds=bounds)


def _check_prox(solver: Any) -> None:
    """Raise where a minimiser's own prox is not the condition's."""
    if getattr(solver, "prox", None) is not None:
        raise InvalidArgumentError(
            f"implicit: {type(solver).__name__} has a prox, which the condition has to know of: "
            "leave it out there and give prox_gradient(loss, prox)"
        )


def _to_accuracy(solver: Any, rtol_gradient: float | None) -> Any:
    """The minimiser with the tolerance of the adaptive mode, if it was not given one."""
    if rtol_gradient is None or not isinstance(solver, Descent) or solver.has_tolerance:
        return solver
    return dataclasses.replace(solver, rtol=rtol_gradient)
