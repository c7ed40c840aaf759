"""Minimisers that step downhill: they reach minima, stop when told, and say when they diverge."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
from minimisers import (
    DESCENTS,
    NEEDS_SCIPY,
    PROBLEMS,
    RIDGE,
    SOLUTION,
    Problem,
    flat,
    single,
    slope_at,
)
from problems import normal, tensors

from implicit_grad.solvers import GradientDescent, GurobiQP, SciPyMinimize, SciPyRoot, TorchOptim

HAVE_NO_VALLEY = {"GradientDescent", "Nesterov, momentum", "SGD", "TorchOpt", "Adam"}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


@pytest.fixture(params=DESCENTS)
def descent(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return DESCENTS[request.param]


def pairs(problems=PROBLEMS, minimisers=DESCENTS):
    """Which minimiser is held to which problem."""
    return [
        pytest.param(PROBLEMS[name], DESCENTS[minimiser], id=f"{name}-{minimiser}")
        for name, minimiser in itertools.product(problems, minimisers)
        if name != "rosenbrock" or minimiser not in HAVE_NO_VALLEY
    ]


@pytest.mark.parametrize(("make", "descent"), pairs())
def test_reaches_the_minimum_and_the_tolerance(make, descent):
    problem = make()
    tol = 1e-5 if make is single else 1e-8  # torch's LBFGS forgets curvatures below 1e-10
    with torch.no_grad():
        phi = descent(problem, tol=tol).minimize(problem.objective, problem.init)
    assert optree.tree_structure(phi) == optree.tree_structure(problem.init)
    for found, like in zip(tensors(phi), tensors(problem.init), strict=True):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)
        assert not found.requires_grad
    assert slope_at(problem.objective, phi).norm() <= tol * (1 + 1e-6)
    error = (flat(phi) - flat(problem.minimum)).norm()
    assert error <= 2 * tol / min(problem.mu, 0.2)


@pytest.mark.parametrize("problem", ["tied"], indirect=True)
def test_tied_tensors_stay_tied(problem, descent):
    first, (second, _) = descent(problem, tol=1e-9).minimize(problem.objective, problem.init)
    assert first is second


@pytest.mark.parametrize("problem", ["shapes"], indirect=True)
def test_changes_nothing_of_the_users(problem, descent):
    captured = normal(4, seed=9)
    captured.grad = torch.ones_like(captured)
    init = optree.tree_map(lambda t: t.clone().requires_grad_(), problem.init)
    for t in tensors(init):
        t.grad = torch.full_like(t, 2.0)

    def objective(phi):
        assert torch.is_grad_enabled() or not any(p.requires_grad for p in tensors(phi))
        return problem.objective(phi) + (phi["rest"][0] * captured).sum()

    def fingerprint():
        numbers = [t.detach().clone() for t in tensors(init)]
        grads = [t.grad.clone() for t in (captured, *tensors(init))]
        return [*numbers, *grads, torch.get_rng_state(), torch.tensor(np.random.get_state()[1][:4])]

    def flags():
        return [t.requires_grad for t in tensors(init)], torch.get_default_dtype()

    before = fingerprint(), flags()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            phi = descent(problem, tol=1e-8).minimize(objective, init)
            assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        assert not any(t.is_inference() for t in tensors(phi))
        assert flags() == before[1]
        for old, new in zip(before[0], fingerprint(), strict=True):
            assert torch.equal(old, new)
        places = {t.data_ptr() for t in tensors(init) if t.numel()}
        assert not places & {t.data_ptr() for t in tensors(phi)}


@pytest.mark.parametrize("problem", ["logistic"], indirect=True)
def test_stops_as_soon_as_the_gradient_is_small(problem, descent):
    start = float(slope_at(problem.objective, problem.init).norm())
    steps = []

    def counted(phi):
        steps.append(phi)
        return problem.objective(phi)

    counts = {}
    for stop in ({"tol": 1e-3 * start}, {"rtol": 1e-3}, {"tol": 1e-3 * start, "rtol": 0.5}):
        steps.clear()
        phi = descent(problem, **stop).minimize(counted, problem.init)
        wanted = max(stop.get("tol", 0), stop.get("rtol", 0) * start)
        reached = float(slope_at(problem.objective, phi).norm())
        assert reached <= wanted * (1 + 1e-9)
        assert torch.equal(steps[-1].detach(), phi)  # no evaluation after the one that sufficed
        counts[len(stop), "tol" in stop] = len(steps)
    assert counts[1, True] == counts[1, False] >= counts[2, True]
    if "lbfgs" not in str(getattr(descent(problem, tol=1), "factory", "")):  # whose steps are long
        assert counts[1, True] > counts[2, True]


def test_tolerances_are_replaceable_fields(descent, problem):
    solver = dataclasses.replace(descent(problem, tol=1e-3), rtol=0.25)
    assert (solver.tol, solver.rtol) == (1e-3, 0.25)


@pytest.mark.parametrize("problem", ["logistic"], indirect=True)
@pytest.mark.parametrize("name", [n for n in DESCENTS if "NewtonCG" not in n])
def test_takes_the_steps_it_is_told_to(problem, name):
    init = problem.init + 1
    assert torch.equal(DESCENTS[name](problem, steps=0).minimize(problem.objective, init), init)
    each = [DESCENTS[name](problem, steps=n).minimize(problem.objective, init) for n in (1, 2, 3)]
    assert len({tuple(phi.tolist()) for phi in each}) == 3


def test_a_zero_gradient_does_not_end_a_fixed_number_of_steps():
    def decaying(params):
        return torch.optim.SGD(params, lr=0.5, weight_decay=1.0)

    phi = torch.tensor([8.0])
    assert TorchOptim(factory=decaying, steps=3).minimize(lambda p: 0 * p.sum(), phi) == 1.0
    assert TorchOptim(factory=decaying, tol=0).minimize(lambda p: 0 * p.sum(), phi) == 8.0


@pytest.mark.parametrize("name", [name for name in DESCENTS if name != "Adam"])
def test_divergence_is_an_error_that_names_minimiser_and_step(name):
    """x⁴ from 10 with lr 1 overflows within six steps; with a line search nothing does.

    Adam's steps do not grow with the gradient.
    """
    steep = Problem(lambda x: (x**4).sum() * 1e3, torch.tensor([10.0]), None, L=1.0, mu=0.5)
    solver = DESCENTS[name](steep, tol=1e-6)
    name = type(solver).__name__
    try:
        phi = solver.minimize(steep.objective, steep.init)
    except SOLUTION as error:
        assert re.match(rf"{name}: at step [1-9]\d* the objective is (nan|inf)", str(error))
    else:
        assert slope_at(steep.objective, phi).norm() <= 1e-6


def test_gradient_descent_diverges_at_the_step_it_says():
    x, step = torch.tensor([10.0]), 0
    while torch.isfinite((x**4).sum()) and torch.isfinite(4 * x**3):
        x, step = x - 4 * x**3, step + 1
    solver = GradientDescent(lr=1, steps=100)
    with pytest.raises(SOLUTION, match=f"GradientDescent: at step {step} the objective is"):
        solver.minimize(lambda p: (p**4).sum(), torch.tensor([10.0]))
    with pytest.raises(SOLUTION, match="phi holds NaN or Inf after the last step"):
        GradientDescent(lr=1e38, steps=1).minimize(lambda p: (p**4).sum(), torch.tensor([10.0]))


@NEEDS_SCIPY
@pytest.mark.parametrize("where", ["value", "gradient"])
def test_nan_at_init_is_an_error(descent, where):
    def objective(p):
        return torch.log(p).sum() if where == "value" else torch.sqrt(p * 0).sum()

    every = [descent(RIDGE, tol=1e-6), SciPyMinimize(), SciPyMinimize(method="Nelder-Mead")]
    for solver in every:
        name = type(solver).__name__
        with pytest.raises(SOLUTION, match=rf"{name}: at step 0 the objective is.*(nan|inf)"):
            solver.minimize(objective, torch.tensor([-1.0, 2.0]))
    with pytest.raises(SOLUTION, match="SciPyRoot: at step 0 the residual holds NaN"):
        SciPyRoot().find_root(torch.log, torch.tensor([-1.0, 2.0]))


@NEEDS_SCIPY
def test_an_empty_phi_is_returned_as_it_is(descent):
    def objective(phi):
        return torch.zeros((), dtype=torch.float64, requires_grad=True) * 1

    for init in ([], {"a": torch.zeros(0, 3).double()}):
        for solver in (descent(RIDGE, tol=1e-6), SciPyMinimize(), GurobiQP()):
            found = solver.minimize(objective, init)
            assert optree.tree_structure(found) == optree.tree_structure(init)
        assert tensors(SciPyRoot().find_root(lambda p: p, init)) is not None
