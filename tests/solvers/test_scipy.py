"""SciPy's minimisers and root finders: against known solutions and SciPy itself."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
from minimisers import (
    ARGUMENT,
    NEEDS_SCIPY,
    SOLUTION,
    START,
    constrained_projection,
    flat,
    logistic,
    rosenbrock,
    shapes,
    single,
    slope_at,
    tied,
)
from problems import normal, tensors
from torch import Tensor

import implicit_grad as ig
from implicit_grad.solvers import GurobiQP, SciPyMinimize, SciPyRoot

SCIPY = (
    "Nelder-Mead Powell CG BFGS Newton-CG L-BFGS-B TNC COBYLA COBYQA SLSQP trust-constr dogleg "
    "trust-ncg trust-exact trust-krylov"
).split()


LOOSE = {"Nelder-Mead": 1e-6, "Powell": 1e-6, "COBYLA": 1e-6, "COBYQA": 1e-6, "SLSQP": 1e-5}


BOUNDED = {"Nelder-Mead", "Powell", "L-BFGS-B", "TNC", "COBYLA", "COBYQA", "SLSQP", "trust-constr"}


CONSTRAINED = {"COBYLA", "COBYQA", "SLSQP", "trust-constr"}


TOO_HARD = {"COBYLA"}


def within_reach(method, make) -> bool:
    """Not a valley for a linear model, nor eleven unknowns without a gradient."""
    if make is rosenbrock:
        return method not in TOO_HARD
    return make not in (shapes, single) or method not in ("Nelder-Mead", "COBYLA", "Powell")


@NEEDS_SCIPY
@pytest.mark.parametrize(
    ("method", "make"),
    [
        (method, make)
        for method in SCIPY
        for make in (shapes, tied, logistic, rosenbrock, single)
        if within_reach(method, make)
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:scipy")  # trust-krylov's own arithmetic
def test_every_method_of_scipy_reaches_the_minimum(method, make):
    problem = make()
    options = {"maxfev": 5000} if method == "Nelder-Mead" else {}
    if method in ("COBYLA", "SLSQP"):
        options = {"maxiter": 5000}
    tol = 1e-12 if make is not single else 1e-6
    solver = SciPyMinimize(method=method.upper(), tol=tol, options=options)
    with torch.no_grad():
        phi = solver.minimize(problem.objective, problem.init)
    accuracy = 1e-3 if make is single else LOOSE.get(method, 1e-7)
    assert (flat(phi) - flat(problem.minimum)).norm() < accuracy
    for found, like in zip(tensors(phi), tensors(problem.init), strict=True):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)


def bounded_quadratic() -> tuple[Callable[[Any], Tensor], Any, Any, Any]:
    """Separate elements, so that the bounded minimum is the free one, clipped."""
    target = {"a": torch.tensor([-2.0, 0.3, 5.0]), "b": torch.tensor([[1.0, -1.0]])}
    target = {k: t.double() for k, t in target.items()}
    bounds = ({"a": torch.tensor([-1.0, 0.0, 1.0]), "b": -0.5}, {"a": 2.0, "b": None})
    minimum = {"a": torch.tensor([-1.0, 0.3, 2.0]), "b": torch.tensor([[1.0, -0.5]])}

    def objective(phi):
        return sum((k + 1) * (phi[n] - target[n]).square().sum() for k, n in enumerate(target))

    init = {k: torch.full_like(t, 1.5) for k, t in target.items()}
    return objective, init, bounds, minimum


@NEEDS_SCIPY
@pytest.mark.parametrize("as_field", [False, True], ids=["keyword", "field"])
@pytest.mark.parametrize("method", [m for m in SCIPY if m in BOUNDED])
def test_scipy_under_bounds(method, as_field):
    objective, init, bounds, minimum = bounded_quadratic()
    options = {"maxiter": 3000} if method in ("Nelder-Mead", "COBYLA") else None
    solver = SciPyMinimize(
        method=method, tol=1e-12, options=options, bounds=bounds if as_field else None
    )
    phi = solver.minimize(objective, init, **({} if as_field else {"bounds": bounds}))
    assert (flat(phi) - flat(minimum)).abs().max() < (1e-5 if method in LOOSE else 1e-7)
    both = dataclasses.replace(solver, bounds=bounds).minimize(objective, init, bounds=bounds)
    assert torch.equal(flat(both), flat(phi))
    with pytest.raises(ARGUMENT, match="own bounds differ"):
        dataclasses.replace(solver, bounds=(0, None)).minimize(objective, init, bounds=bounds)


@NEEDS_SCIPY
@pytest.mark.parametrize("method", sorted(BOUNDED))
def test_a_start_out_of_bounds_is_brought_in(method):
    """Which SciPy would warn about in one method, and do silently in others."""
    seen = []

    def objective(x):
        seen.append(x.detach().item())
        return ((x - 0.3) ** 2).sum()

    init = torch.tensor([9.0], dtype=torch.float64)
    phi = SciPyMinimize(method=method, tol=1e-8).minimize(objective, init, bounds=(0.0, 2.0))
    assert abs(float(phi) - 0.3) < 1e-5
    assert seen[0] == 2.0 and init == 9.0


BOUND_FORMS = {
    "a number": ((0.0, 1.0), [0.0, 0.5, 1.0]),
    "None": (None, [-1.0, 0.5, 2.0]),
    "only lower": ((0, None), [0.0, 0.5, 2.0]),
    "only upper": ((None, 1), [-1.0, 0.5, 1.0]),
    "a tensor": ((torch.tensor([-0.5, 0.6, 0.0]), None), [-0.5, 0.6, 2.0]),
    "requires grad": ((torch.tensor([-0.5, 0.6, 0.0]).requires_grad_(), None), [-0.5, 0.6, 2.0]),
    "a 0-d tensor": ((None, torch.tensor(0.25)), [-1.0, 0.25, 0.25]),
}


@NEEDS_SCIPY
@pytest.mark.parametrize("form", BOUND_FORMS)
@pytest.mark.parametrize("solver", [SciPyMinimize(tol=1e-10), GurobiQP()], ids=["SciPy", "Gurobi"])
def test_forms_of_bounds(form, solver):
    if isinstance(solver, GurobiQP):
        pytest.importorskip("gurobipy")
    target = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    bounds, expected = BOUND_FORMS[form]
    phi = solver.minimize(lambda p: (p - target).square().sum(), target * 0, bounds=bounds)
    assert (phi - torch.tensor(expected)).abs().max() < 1e-7


def suited(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The constraints; before SciPy 1.16 COBYLA takes an equality as two inequalities only."""
    from scipy import __version__ as version

    old = tuple(map(int, version.split(".")[:2])) < (1, 16)
    if method != "COBYLA" or not old or "equality" not in given:
        return given
    others = dict(given)
    equality, inequality = others.pop("equality"), others.pop("inequality", lambda p: ())

    def both(p: Tensor) -> Any:
        sides = optree.tree_leaves(equality(p))
        return inequality(p), sides, [-side for side in sides]

    return {**others, "inequality": both}


@NEEDS_SCIPY
@pytest.mark.parametrize("method", sorted(CONSTRAINED))
def test_scipy_under_constraints(method):
    objective, given, minimum = constrained_projection()
    options = {"rhobeg": 0.1} if method == "COBYLA" else {}  # with 1 it ends somewhere else
    solver = SciPyMinimize(method=method, tol=1e-10, options=options)
    phi = solver.minimize(objective, torch.full_like(minimum, 0.4), **suited(method, given))
    assert (phi - minimum).abs().max() < (1e-5 if method == "trust-constr" else 1e-6)


@NEEDS_SCIPY
@pytest.mark.parametrize("method", sorted(CONSTRAINED))
def test_scipy_on_a_curved_constraint(method):
    """The lowest x + y on the circle of radius 2 is (−√2, −√2); so it is in the disc."""
    start = torch.tensor([-1.0, -1.5], dtype=torch.float64)
    for kind in ("equality", "inequality"):
        given = suited(method, {kind: lambda p: p.square().sum() - 4})
        solver = SciPyMinimize(method=method, tol=1e-10, options={"maxiter": 2000})
        phi = solver.minimize(torch.sum, start, **given)
        assert (phi + math.sqrt(2)).abs().max() < 1e-5


@NEEDS_SCIPY
@pytest.mark.parametrize("method", ["Newton-CG", "dogleg", "trust-exact", "trust-ncg", "BFGS"])
def test_scipy_takes_the_steps_that_it_takes_with_exact_derivatives(method):
    """Four iterations from the start, next to SciPy's own Rosenbrock function."""
    from scipy.optimize import minimize, rosen, rosen_der, rosen_hess

    problem, options = rosenbrock(), {"maxiter": 4}
    hessian = None if method == "BFGS" else rosen_hess
    start = problem.init.numpy()
    reference = minimize(rosen, start, jac=rosen_der, hess=hessian, method=method, options=options)
    with pytest.warns(ig.ImplicitGradWarning, match=f"{method} stopped"):
        phi = SciPyMinimize(method=method, options=options).minimize(
            problem.objective, problem.init
        )
    assert np.allclose(phi.numpy(), reference.x, rtol=1e-9)
    assert slope_at(problem.objective, phi).norm() > 1e-2


@NEEDS_SCIPY
def test_scipys_tolerance_is_the_gradients():
    problem = rosenbrock()
    for method, tol in itertools.product(("L-BFGS-B", "TNC", "BFGS", "trust-ncg"), (1e-3, 1e-7)):
        phi = SciPyMinimize(method=method, tol=tol).minimize(problem.objective, problem.init)
        assert slope_at(problem.objective, phi).abs().max() <= tol


@NEEDS_SCIPY
def test_scipys_failure_is_a_warning_with_its_message():
    from scipy.optimize import minimize, rosen, rosen_der

    problem, few = rosenbrock(), {"maxiter": 3}
    said = minimize(rosen, problem.init.numpy(), jac=rosen_der, method="BFGS", options=few).message
    with pytest.warns(ig.ImplicitGradWarning, match=f"BFGS stopped.*{re.escape(said)}"):
        phi = SciPyMinimize(method="BFGS", options=few).minimize(problem.objective, problem.init)
    assert torch.isfinite(phi).all()
    infeasible = {"equality": lambda p: p.sum() - 1, "inequality": lambda p: p.square().sum()}
    with pytest.warns(ig.ImplicitGradWarning, match="SLSQP stopped"):
        SciPyMinimize(method="SLSQP").minimize(torch.sum, problem.init, **infeasible)
    with pytest.warns(ig.ImplicitGradWarning, match="SLSQP stopped"):  # gradient or not
        SciPyMinimize(method="SLSQP").minimize(lambda p: 0 * p.sum(), problem.init, **infeasible)


def without_success(x: Tensor) -> Any:
    """What SciPy returns when it ends at x and does not call that a success."""
    from scipy.optimize import OptimizeResult

    return OptimizeResult(x=x.numpy(), fun=0.0, success=False, message="?", nfev=7)


@NEEDS_SCIPY
def test_scipys_failure_at_rounding_level_is_none(monkeypatch):
    """A line search finds no lower value; whether SciPy calls that a failure does not matter."""
    from scipy import optimize

    curvatures = torch.logspace(0, 3, 6, dtype=torch.float64)

    def objective(x):
        return (curvatures * (x - 1 / 3) ** 2).sum() + torch.cosh(x - 0.3).sum()

    init = torch.zeros(6, dtype=torch.float64)
    endless = SciPyMinimize(method="BFGS", tol=1e-300)
    phi = endless.minimize(objective, init)  # no warning
    assert slope_at(objective, phi).norm() < 1e-5
    monkeypatch.setattr(optimize, "minimize", lambda **_: without_success(phi))
    assert torch.equal(endless.minimize(objective, init), phi)  # none either
    monkeypatch.setattr(optimize, "minimize", lambda **_: without_success(phi + 1e-3))
    with pytest.warns(ig.ImplicitGradWarning, match="BFGS stopped after 7 evaluations"):
        endless.minimize(objective, init)


@NEEDS_SCIPY
def test_at_a_bound_only_the_projected_gradient_counts_for_success():
    """The gradient at the bounds is large, and the run ends for want of iterations."""
    bounds = (torch.tensor([0.5, 0.5]), None)
    exhausted = SciPyMinimize(options={"maxiter": 0}, bounds=bounds)
    at_minimum = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert (exhausted.minimize(lambda x: x.square().sum(), at_minimum) == 0.5).all()
    with pytest.warns(ig.ImplicitGradWarning, match="L-BFGS-B stopped after"):
        exhausted.minimize(lambda x: x.square().sum(), at_minimum + 1)


@NEEDS_SCIPY
@pytest.mark.parametrize("away", [None, 0, 1, 3])
def test_a_run_without_success_that_fulfils_kkt_is_a_solution(monkeypatch, away):
    """With the sum and two bounds active; moved along them, against them, or to where one idles."""
    from scipy import optimize

    objective, given, minimum = constrained_projection()
    x = minimum.clone()
    if away is not None:
        x[away] -= 1e-3
    if away == 1:
        x[2] += 1e-3  # the sum is 1 still
    monkeypatch.setattr(optimize, "minimize", lambda **_: without_success(x))
    run = SciPyMinimize(method="SLSQP")
    if away is None:
        assert torch.equal(run.minimize(objective, torch.full_like(minimum, 0.4), **given), minimum)
        return
    with pytest.warns(ig.ImplicitGradWarning, match="SLSQP stopped after 7 evaluations"):
        run.minimize(objective, torch.full_like(minimum, 0.4), **given)


ROOT_METHODS = (
    "hybr lm broyden1 broyden2 anderson linearmixing diagbroyden excitingmixing krylov df-sane"
).split()


@NEEDS_SCIPY
@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.filterwarnings("ignore:(An i|I)ll-conditioned matrix")  # SciPy's anderson
def test_every_root_finder_of_scipy_reaches_the_root(method):
    W, b = normal(3, 3, seed=1, grad=False) / 4, normal(3, seed=2, grad=False)

    def residual(phi):
        x = torch.cat([phi["x"], phi["y"].reshape(1)])
        f = b - x + torch.tanh(W @ x) / 3
        return {"x": f[:2], "y": f[2]}

    init = {"x": torch.zeros(2, dtype=torch.float64), "y": torch.zeros((), dtype=torch.float64)}
    mixing = method in ("linearmixing", "excitingmixing", "diagbroyden")
    options = {"jac_options": {"alpha": 0.8}} if mixing else None
    with torch.no_grad():
        phi = SciPyRoot(method=method, tol=1e-11, options=options).find_root(residual, init)
    assert flat(residual(phi)).norm() < 1e-9
    x = torch.zeros(3, dtype=torch.float64)
    for _ in range(200):
        x = b + torch.tanh(W @ x) / 3
    assert (flat(phi) - x).norm() < 1e-8
    assert phi["y"].shape == ()


@NEEDS_SCIPY
def test_root_finders_failure_at_rounding_level_is_none(monkeypatch):
    """As they end for a tolerance of 0, whether SciPy calls that a failure or not."""
    from scipy import optimize

    def residual(x):
        return x**3 + x - 2 / 3

    endless = SciPyRoot(tol=0.0)
    phi = endless.find_root(residual, START)  # no warning
    assert residual(phi).norm() < 1e-12
    monkeypatch.setattr(optimize, "root", lambda *_, **__: without_success(phi))
    assert torch.equal(endless.find_root(residual, START), phi)  # none either
    monkeypatch.setattr(optimize, "root", lambda *_, **__: without_success(phi + 1e-3))
    with pytest.warns(ig.ImplicitGradWarning, match="hybr stopped without success"):
        endless.find_root(residual, START)


@NEEDS_SCIPY
@pytest.mark.parametrize("method", ["hybr", "lm", "krylov"])
def test_jacobians_are_autograds_where_they_are_used(method):
    recorded = []

    def residual(x):
        recorded.append(torch.is_grad_enabled() and x.requires_grad)
        return x**3 + x - 2

    SciPyRoot(method=method).find_root(residual, START)
    assert any(recorded) == (method != "krylov")
    assert len(recorded) < 40


def test_flat_functions_derivatives():
    """Against torch.autograd.functional, for a function of two tensors with two outputs."""
    from implicit_grad.solvers._flat import Coordinates
    from implicit_grad.solvers._objective import Variables

    init = {"a": normal(2, seed=1, grad=False), "b": normal(1, 2, seed=2, grad=False)}
    at = Coordinates(Variables(GurobiQP(), init))

    def on_vector(x):
        return torch.stack([(x[:2] * x[2:]).sin().sum(), x.pow(3).sum()])

    f = at.function("f", lambda phi: list(on_vector(torch.cat([phi["a"], phi["b"][0]]))))
    x, w, p = at.start, np.array([0.5, -2.0]), np.arange(4.0)
    there = torch.tensor(x)  # a copy
    assert np.allclose(f(x), on_vector(there))
    jacobian = torch.autograd.functional.jacobian(on_vector, there)
    assert np.allclose(f.jacobian(x), jacobian)
    for weights in (w, None):
        v = torch.ones(2).double() if weights is None else torch.tensor(w)
        hessian = torch.autograd.functional.hessian(lambda x, v=v: on_vector(x) @ v, there)
        assert np.allclose(f.hessian(x, weights), hessian)
    assert np.allclose(f.hessian_product(x, p), hessian.numpy() @ p)
    phi = at.tensors(x)
    x += 1  # as SciPy does, which reuses its vectors
    assert torch.equal(torch.cat([phi[0], phi[1][0]]), there)


@NEEDS_SCIPY
def test_root_finders_failure_is_a_warning():
    with pytest.warns(ig.ImplicitGradWarning, match=r"hybr stopped without success, at a residual"):
        SciPyRoot().find_root(lambda x: x * x + 1, torch.tensor([1.0]).double())
    with pytest.warns(ig.ImplicitGradWarning, match="krylov stopped"):
        SciPyRoot(method="krylov", options={"maxiter": 1}).find_root(
            lambda x: x**3 - 2, torch.tensor([9.0]).double()
        )


@NEEDS_SCIPY
def test_nan_at_the_end_is_an_error_of_scipy():
    def objective(p):
        return torch.where(p < 0, torch.nan, p).sum() if p.requires_grad else p.sum() * torch.inf

    with pytest.raises(SOLUTION, match="SciPyMinimize: Nelder-Mead ended where the objective is"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            SciPyMinimize(method="Nelder-Mead").minimize(objective, START)
