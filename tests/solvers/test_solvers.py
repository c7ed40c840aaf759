"""Minimisers and root finders: against known solutions, rates from theory, and each other."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import optree
import pytest
import torch
from problems import minimize as newton
from problems import normal, tensors, wavy
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau

import implicit_grad as ig
from implicit_grad.solvers import (
    GradientDescent,
    GurobiQP,
    MissingPackageError,
    Nesterov,
    NewtonCG,
    SciPyMinimize,
    SciPyRoot,
    TorchOpt,
    TorchOptim,
)
from implicit_grad.solvers._neighbours import needed_by
from implicit_grad.solvers.gurobi_qp import _check_status

ARGUMENT, SOLUTION = ig.InvalidArgumentError, ig.InvalidSolutionError
NEEDS_SCIPY = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="no SciPy")


START = torch.tensor([1.0, 2.0], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """An objective, a start, its minimum by other means, and its curvature around both."""

    objective: Callable[[Any], Tensor]
    init: Any
    minimum: Any
    L: float
    mu: float
    quadratic: bool = False


def flat(tree: Any) -> Tensor:
    """All numbers in a container."""
    return torch.cat([torch.zeros(0), *(t.detach().double().flatten() for t in tensors(tree))])


def slope_at(objective: Callable[[Any], Tensor], phi: Any) -> Tensor:
    """The objective's gradient, each distinct tensor once, by torch itself."""
    leaves, structure = optree.tree_flatten(phi)
    variables = {id(t): t.detach().clone().requires_grad_() for t in leaves}
    value = objective(optree.tree_unflatten(structure, [variables[id(t)] for t in leaves]))
    grads = torch.autograd.grad(value, list(variables.values()), allow_unused=True)
    return torch.cat([g.flatten().double() for g in grads if g is not None])


def shapes() -> Problem:
    """A quadratic of a nested container: a matrix, a vector, a 0-d and an empty tensor."""
    minimum = {"w": normal(2, 3, seed=1, grad=False), "rest": [normal(4, seed=2, grad=False)]}
    minimum["rest"] += [normal(seed=3, grad=False), torch.zeros(0, 2, dtype=torch.float64)]
    weights = [1.0, 2.0, 4.0, 3.0]

    def objective(phi):
        pairs = zip(tensors(phi), tensors(minimum), weights, strict=True)
        return sum(c * (p - m).square().sum() for p, m, c in pairs) / 2

    init = optree.tree_map(torch.zeros_like, minimum)
    return Problem(objective, init, minimum, 4.0, 1.0, quadratic=True)


def tied() -> Problem:
    """One tensor in two places: (p − 1)² + (p − 3)² + 2 (q + 1)², so p = 2 and q = −1."""

    def objective(phi):
        first, (second, q) = phi
        return ((first - 1) ** 2 + (second - 3) ** 2 + 2 * (q + 1) ** 2).sum()

    p, q = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return Problem(objective, (p, [p, q]), (p + 2, [p + 2, q - 1]), 4.0, 4.0, quadratic=True)


def logistic() -> Problem:
    """Ridge-penalised logistic regression."""
    X, y = normal(30, 3, seed=1, grad=False), normal(30, seed=2, grad=False).sign()

    def objective(w):
        return softplus(-y * (X @ w)).mean() + 0.05 * w.square().sum()

    init = torch.zeros(3, dtype=torch.float64)
    L = float(torch.linalg.eigvalsh(X.T @ X)[-1]) / 120 + 0.1
    return Problem(objective, init, newton(objective, init), L, 0.1)


def network() -> Problem:
    """A tanh network with weight decay, near enough to a minimum to know which it is."""
    X, y = normal(12, 2, seed=1, grad=False), normal(12, seed=2, grad=False)

    def objective(w):
        error = torch.tanh(X @ w["in"]) @ w["out"] - y
        return error.square().mean() / 2 + 0.05 * (w["in"].square().sum() + w["out"].square().sum())

    random = {"in": normal(2, 3, seed=3, grad=False), "out": normal(3, seed=4, grad=False)}
    descent = random
    for _ in range(500):
        slopes = torch.func.grad(objective)(descent)
        descent = {k: t - 0.5 * slopes[k] for k, t in descent.items()}
    minimum = newton(objective, descent)
    init = {k: t + 0.02 * random[k] for k, t in minimum.items()}
    return Problem(objective, init, minimum, 2.0, 0.02)


def rosenbrock() -> Problem:
    """The banana valley: κ = 2500 at its minimum (1, 1)."""

    def objective(x):
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2

    init = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    return Problem(objective, init, torch.ones_like(init), 2000.0, 0.4)


def single() -> Problem:
    """The quadratic of `shapes` in float32."""
    double = shapes()
    minimum, init = (optree.tree_map(Tensor.float, t) for t in (double.minimum, double.init))

    def objective(phi):
        pairs = zip(tensors(phi), tensors(minimum), strict=True)
        return sum((p - m).square().sum() for p, m in pairs) / 2

    return Problem(objective, init, minimum, 1.0, 1.0, quadratic=True)


PROBLEMS = {f.__name__: f for f in (shapes, tied, logistic, network, rosenbrock, single)}


def torchopt_sgd(problem: Problem, **stop: Any) -> TorchOpt:
    torchopt = pytest.importorskip("torchopt")
    return TorchOpt(transform=torchopt.sgd(lr=1 / problem.L, momentum=0.7, nesterov=True), **stop)


def sgd(problem: Problem, **stop: Any) -> TorchOptim:
    def factory(params):
        return torch.optim.SGD(params, lr=1 / problem.L, momentum=0.7, nesterov=True)

    return TorchOptim(factory=factory, **stop)


def adam(problem: Problem, **stop: Any) -> TorchOptim:
    return TorchOptim(
        factory=lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.8, 0.9)),
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.98),
        **stop,
    )


def lbfgs(problem: Problem, **stop: Any) -> TorchOptim:
    exact = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    return TorchOptim(factory=lambda params: torch.optim.LBFGS(params, max_iter=5, **exact), **stop)


DESCENTS: dict[str, Callable[..., Any]] = {
    "GradientDescent": lambda p, **stop: GradientDescent(lr=1 / p.L, **stop),
    "Nesterov": lambda p, **stop: Nesterov(lr=1 / p.L, kappa=p.L / p.mu, **stop),
    "Nesterov, adaptive": lambda p, **stop: Nesterov(lr=1 / p.L, **stop),
    "Nesterov, momentum": lambda p, **stop: Nesterov(lr=1 / p.L, momentum=0.6, **stop),
    "NewtonCG": lambda p, **stop: NewtonCG(maxiter=100, cg=15, **stop),
    "NewtonCG, short": lambda p, **stop: NewtonCG(maxiter=200, cg=2, **stop),
    "SGD": sgd,
    "Adam": adam,
    "LBFGS": lbfgs,
    "TorchOpt": torchopt_sgd,
}
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


# rates


def ill_conditioned(kappa: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A quadratic with curvatures from 1/κ to 1, and a start with all of them."""
    curvatures = torch.logspace(-math.log10(kappa), 0, 20, dtype=torch.float64)
    return lambda x: (curvatures * x * x).sum() / 2, torch.ones_like(curvatures)


def steps_taken(solver: Any, kappa: float) -> int:
    """Gradients until the gradient has fallen a thousandfold from that of the slowest direction."""
    objective, init = ill_conditioned(kappa)
    count = itertools.count()

    def counted(x):
        next(count)
        return objective(x)

    phi = dataclasses.replace(solver(kappa), tol=1e-3 / kappa, steps=10**6).minimize(counted, init)
    assert slope_at(objective, phi).norm() <= 1e-3 / kappa
    return next(count)


def exponent(counts: dict[float, int]) -> float:
    """p in steps ∝ κᵖ, from the least squares line in logarithms."""
    return float(np.polyfit(*np.log10([list(counts), list(counts.values())]), 1)[0])


def test_nesterov_takes_root_kappa_where_gradient_descent_takes_kappa():
    plain = {k: steps_taken(lambda _: GradientDescent(lr=1, steps=1), k) for k in (10, 100, 1000)}
    many = (10, 100, 1000, 10_000)
    known = {k: steps_taken(lambda k: Nesterov(lr=1, kappa=k, steps=1), k) for k in many}
    unknown = {k: steps_taken(lambda _: Nesterov(lr=1, steps=1), k) for k in many}
    assert 0.93 < exponent(plain) < 1.07
    assert 0.43 < exponent(known) < 0.57
    assert 0.4 < exponent(unknown) < 0.6
    assert known[1000] < plain[1000] / 10
    for kappa, steps in known.items():  # one over the rate: ln(κ-fold less than it was) √κ
        assert steps < 1.7 * math.sqrt(kappa) * math.log(1e3) + 10


def test_nesterovs_constant_momentum_has_the_rate_of_the_theory():
    """On x²/2κ with lr = 1 the iteration has the double eigenvalue 1 − 1/√κ: errors are known."""
    kappa, steps = 100.0, 60
    rate = 1 - 1 / math.sqrt(kappa)
    phi = Nesterov(lr=1, kappa=kappa, steps=steps).minimize(
        lambda x: x.square().sum() / (2 * kappa), torch.ones(1, dtype=torch.float64)
    )
    # x₀ = 1 and x₁ = 1 − 1/κ fix a and b in x_k = (a + b k) rateᵏ
    slope = (1 - 1 / kappa) / rate - 1
    assert float(phi) == pytest.approx((1 + slope * steps) * rate**steps, rel=1e-10)


def test_nesterov_restarts_where_the_general_sequence_swings():
    """Without restarts the t_k sequence needs many times more steps on a strongly convex bowl."""
    objective, x = ill_conditioned(100.0)
    count, y, t = 0, x, 1.0
    while slope_at(objective, y).norm() > 1e-8:
        before, x = x, y - slope_at(objective, y)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        y, count = x + (last - 1) / t * (x - before), count + 1
    phi = Nesterov(lr=1, tol=1e-8, steps=count // 3).minimize(objective, torch.ones_like(x))
    assert slope_at(objective, phi).norm() <= 1e-8


# NewtonCG


def test_newton_is_quadratic_near_the_minimum():
    problem = logistic()
    errors = [
        float(slope_at(problem.objective, NewtonCG(maxiter=n, cg=3).minimize(
            problem.objective, problem.init)).norm())
        for n in range(6)
    ]  # fmt: skip
    assert errors[3] < 0.5 * errors[2] ** 1.5 and errors[4] < 1e-12


def test_newton_with_full_cg_takes_one_step_on_a_quadratic():
    problem = shapes()
    phi = NewtonCG(maxiter=1, cg=11).minimize(problem.objective, problem.init)
    assert (flat(phi) - flat(problem.minimum)).norm() < 1e-13


def test_newton_direction_has_the_given_number_of_products():
    """cg=1 is steepest descent with the exact length for a quadratic."""
    objective, init = ill_conditioned(100.0)
    slope = slope_at(objective, init)
    curved = slope_at(objective, slope)  # the gradient is linear: it multiplies by the Hessian
    expected = init - (slope @ slope) / (slope @ curved) * slope
    found = NewtonCG(maxiter=1, cg=1).minimize(objective, init)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("start", [(x, y) for x in (-3, -0.5, 1e-3, 2) for y in (-2, 1e-3, 0.7)])
def test_newton_descends_from_negative_curvature(start):
    """Two double wells with a bump between them: minima have x = ±1 and y = ±1."""

    def objective(p):
        return ((p * p - 1) ** 2).sum() + 0.1 * (p[0] * p[1]) ** 2

    init, values = torch.tensor(start, dtype=torch.float64), []
    for n in range(25):
        values.append(float(objective(NewtonCG(maxiter=n, cg=2).minimize(objective, init))))
    slack = 4 * torch.finfo(torch.float64).eps
    assert all(b <= a * (1 + slack) for a, b in itertools.pairwise(values))
    end = NewtonCG(maxiter=60, cg=2).minimize(objective, init)
    assert slope_at(objective, end).norm() < 1e-10
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(objective, end)).min() > 0


def test_newton_goes_down_the_gradient_if_the_first_curvature_is_negative():
    """Where −cos is concave, one step is the gradient's, not Newton's, which climbs to π."""
    init = torch.tensor([2.5], dtype=torch.float64)
    step = NewtonCG(maxiter=1).minimize(lambda x: -torch.cos(x).sum(), init)
    assert torch.allclose(step, init - torch.sin(init), rtol=1e-14)


def test_newton_halves_steps_that_overshoot():
    """√(1 + x²) from 2: Newton's own step leads to −8, and diverges from there."""

    def objective(x):
        return torch.sqrt(1 + x * x).sum()

    init = torch.tensor([2.0], dtype=torch.float64)
    assert float(NewtonCG(maxiter=1).minimize(objective, init)) == pytest.approx(-0.5)
    assert abs(float(NewtonCG(maxiter=10).minimize(objective, init))) < 1e-12


def test_newton_halves_steps_that_gain_too_little():
    """From just below 1 its own step leads to just above −1, and to hardly less."""
    init = torch.tensor([1 - 1e-6], dtype=torch.float64)
    end = NewtonCG(maxiter=1).minimize(lambda x: torch.sqrt(1 + x * x).sum(), init)
    assert abs(float(end)) < 1e-5


def test_newton_ends_where_the_objective_is_not_defined():
    """Trial points with NaN are too far; the minimum of x − ln x is 1."""
    init = torch.tensor([1e-3], dtype=torch.float64)
    end = NewtonCG(maxiter=60).minimize(lambda x: (x - torch.log(x)).sum(), init * 0 + 3.0)
    assert float(end) == pytest.approx(1.0, abs=1e-10)


def test_newton_reaches_rounding_level_despite_a_large_constant():
    """Near the minimum the values are all 1e4, and only slopes can tell; float32 alike."""
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        minimum = torch.linspace(-1, 1, 5, dtype=dtype)

        def objective(x, minimum=minimum):
            return torch.cosh(x - minimum).sum() + 1e4

        end = NewtonCG(maxiter=30).minimize(objective, torch.zeros_like(minimum))
        assert (end - minimum).norm() < limit


def test_newton_without_a_hessian_goes_down_the_gradient():
    """∇²|x|^1.5 is infinite at 0; y's part of the objective can be lowered all the same."""

    def objective(p):
        return p[0].abs() ** 1.5 + (p[1] - 1) ** 2

    init = torch.zeros(2, dtype=torch.float64)
    end = NewtonCG(maxiter=20).minimize(objective, init)
    assert (end - torch.tensor([0.0, 1.0])).norm() < 1e-6


# torch.optim and TorchOpt


def by_hand(optimizer_of, objective, init, steps, scheduler_of=None):
    """The usual training loop."""
    w = init.clone().requires_grad_()
    optimizer = optimizer_of([w])
    scheduler = scheduler_of(optimizer) if scheduler_of else None
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = objective(w)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler:
            scheduler.step()
    return w.detach()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.3, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
    "LBFGS strong_wolfe": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", max_iter=2),
}
SCHEDULERS = {
    "none": None,
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.7),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "plateau": lambda optimizer: ReduceLROnPlateau(
        optimizer, factor=0.1, patience=0, threshold=0.3
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torch_optimizers_do_what_they_do_in_a_training_loop(optimizer, scheduler):
    problem, steps = logistic(), 7
    factory, schedule = OPTIMIZERS[optimizer], SCHEDULERS[scheduler]
    solver = TorchOptim(factory=factory, scheduler=schedule, steps=steps)
    expected = by_hand(factory, problem.objective, problem.init + 1, steps, schedule)
    for _ in range(2):  # no state is left from one run to the next
        found = solver.minimize(problem.objective, problem.init + 1)
        assert torch.equal(found, expected)


class LookAhead(torch.optim.Optimizer):
    """Evaluates at a trial point before it takes a step of gradient descent."""

    def __init__(self, params, trial):
        super().__init__(params, {})
        self.trial = trial

    @torch.no_grad()
    def step(self, closure):
        (p,) = self.param_groups[0]["params"]
        loss, before = closure(), p.clone()
        slope = p.grad.clone()
        p.fill_(self.trial)
        closure()
        p.copy_(before - 0.5 * slope)
        return loss


@pytest.mark.parametrize("trial", [-1.0, 0.0], ids=["where the objective is NaN", "at the minimum"])
def test_only_the_points_before_steps_are_watched(trial):
    """A line search may try where the objective is not defined, or the gradient small."""

    def objective(p):
        return (p * p / 2 + torch.where(p < 0, torch.nan, 0.0)).sum()

    solver = TorchOptim(factory=lambda params: LookAhead(params, trial), steps=3, tol=1e-6)
    assert solver.minimize(objective, torch.tensor([8.0])) == 1.0


def test_torchopt_does_what_it_does_by_hand():
    torchopt = pytest.importorskip("torchopt")
    problem = logistic()
    decay = torchopt.schedule.polynomial_schedule(0.5, 0.1, 1.0, 10, 0)
    for transform in (torchopt.adam(0.1), torchopt.rmsprop(0.1), torchopt.sgd(decay, momentum=0.5)):
        clipped = torchopt.combine.chain(torchopt.clip.clip_grad_norm(0.05), transform)
        for rule in (transform, clipped):
            w = (problem.init + 1,)
            state = rule.init(w)
            for _ in range(5):
                g = (slope_at(problem.objective, w[0]),)
                updates, state = rule.update(g, state, params=w, inplace=False)
                w = torchopt.apply_updates(w, updates, inplace=False)
            solver = TorchOpt(transform=rule, steps=5)
            for _ in range(2):
                found = solver.minimize(problem.objective, problem.init + 1)
                assert torch.allclose(found, w[0], rtol=1e-14)


# SciPy


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
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # SciPy's trust-krylov
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


def constrained_projection() -> tuple[Callable[[Tensor], Tensor], dict[str, Any], Tensor]:
    """The nearest point to y with sum 1, first element ≤ 0.3 and all ≥ 0, from the KKT conditions.

    y = (0.9, 0.5, 0.2, −1): x₄ = 0 and x₁ = 0.3 are active, so x₂ + x₃ = 0.7 and x₂ − x₃ = 0.3.
    """
    y = torch.tensor([0.9, 0.5, 0.2, -1.0], dtype=torch.float64)
    given = {
        "bounds": (0, None),
        "equality": lambda p: {"sum": p.sum() - 1},
        "inequality": lambda p: (p[:1] - 0.3, [p[1:2] - 2]),
    }
    minimum = torch.tensor([0.3, 0.5, 0.2, 0.0], dtype=torch.float64)
    return lambda p: (p - y).square().sum(), given, minimum


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
    problem = rosenbrock()
    few = SciPyMinimize(method="BFGS", options={"maxiter": 3})
    with pytest.warns(ig.ImplicitGradWarning, match="BFGS stopped.*Maximum number of iter"):
        phi = few.minimize(problem.objective, problem.init)
    assert torch.isfinite(phi).all()
    infeasible = {"equality": lambda p: p.sum() - 1, "inequality": lambda p: p.square().sum()}
    with pytest.warns(ig.ImplicitGradWarning, match="SLSQP stopped"):
        SciPyMinimize(method="SLSQP").minimize(torch.sum, problem.init, **infeasible)
    with pytest.warns(ig.ImplicitGradWarning, match="SLSQP stopped"):  # gradient or not
        SciPyMinimize(method="SLSQP").minimize(lambda p: 0 * p.sum(), problem.init, **infeasible)


@NEEDS_SCIPY
def test_scipys_failure_at_rounding_level_is_none():
    """The line search cannot go on, SciPy says so, and the gradient is as good as zero."""
    from scipy.optimize import minimize

    curvatures = torch.logspace(0, 3, 6, dtype=torch.float64)

    def objective(x):
        return (curvatures * (x - 1 / 3) ** 2).sum() + torch.cosh(x - 0.3).sum() + 1e6

    def numpy(x):
        slope = 2 * curvatures.numpy() * (x - 1 / 3) + np.sinh(x - 0.3)
        return objective(torch.tensor(x)).item(), slope

    reference = minimize(numpy, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-300})
    assert not reference.success and "precision loss" in reference.message
    init = torch.zeros(6, dtype=torch.float64)
    phi = SciPyMinimize(method="BFGS", tol=1e-300).minimize(objective, init)  # no warning
    assert slope_at(objective, phi).norm() < 1e-5


@NEEDS_SCIPY
def test_at_a_bound_only_the_projected_gradient_counts_for_success():
    """The gradient at the bounds is large, and the run ends for want of iterations."""
    bounds = (torch.tensor([0.5, 0.5]), None)
    exhausted = SciPyMinimize(options={"maxiter": 0}, bounds=bounds)
    at_minimum = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert (exhausted.minimize(lambda x: x.square().sum(), at_minimum) == 0.5).all()
    with pytest.warns(ig.ImplicitGradWarning, match="L-BFGS-B stopped.*ITERATIONS"):
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
    ended = optimize.OptimizeResult(x=x.numpy(), fun=0.0, success=False, message="?", nfev=7)
    monkeypatch.setattr(optimize, "minimize", lambda **_: ended)
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
def test_root_finders_failure_at_rounding_level_is_none():
    from scipy.optimize import root

    def residual(x):
        return x**3 + x - 2 / 3

    reference = root(residual, START.numpy(), tol=0.0)
    assert not reference.success and abs(reference.fun).max() < 1e-15
    phi = SciPyRoot(tol=0.0).find_root(residual, START)  # no warning
    assert residual(phi).norm() < 1e-15


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


# Gurobi


@NEEDS_SCIPY
def test_gurobi_matches_slsqp_on_random_programs():
    pytest.importorskip("gurobipy")
    for seed in range(5):
        B, c = normal(6, 6, seed=seed, grad=False), normal(6, seed=seed + 50, grad=False)
        G, h = normal(4, 6, seed=seed + 100, grad=False), normal(4, seed=seed + 150, grad=False)
        row = normal(6, seed=seed + 200, grad=False)

        def objective(p, B=B, c=c):
            x = torch.cat([p[0], p[1].flatten()])
            return (B @ x).square().sum() / 2 + 0.1 * x.square().sum() + c @ x + 3

        def equality(p, row=row):
            return row @ torch.cat([p[0], p[1].flatten()]) - 0.2

        def inequality(p, G=G, h=h):
            return G @ torch.cat([p[0], p[1].flatten()]) - h.abs()

        given = {"equality": equality, "inequality": inequality, "bounds": (-0.5, 0.5)}
        init = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
        phi = GurobiQP().minimize(objective, init, **given)
        # at such a tolerance SLSQP may say that its line search failed, and be right all the same
        slsqp = SciPyMinimize(method="SLSQP", tol=1e-15).minimize(objective, init, **given)
        assert [t.shape for t in phi] == [t.shape for t in init]
        assert (flat(phi) - flat(slsqp)).abs().max() < 1e-6
        close = [flat(equality(phi)), flat(inequality(phi)), flat(phi) - 0.5, -0.5 - flat(phi)]
        active = [r[r.abs() < 1e-4] for r in close]
        assert sum(map(len, active)) >= 2
        assert torch.cat(active).abs().max() < 1e-12  # active constraints can be told from others


def test_gurobi_fulfils_kkt():
    pytest.importorskip("gurobipy")
    objective, given, minimum = constrained_projection()
    with torch.no_grad():
        phi = GurobiQP().minimize(objective, torch.zeros_like(minimum), **given)
    assert (phi - minimum).abs().max() < 1e-12


def test_gurobi_in_float32_and_without_constraints():
    pytest.importorskip("gurobipy")
    for problem in (single(), shapes(), tied()):
        phi = GurobiQP().minimize(problem.objective, problem.init)
        accuracy = 1e-6 if problem.L == 1 else 1e-12
        assert (flat(phi) - flat(problem.minimum)).abs().max() < accuracy


GUROBI_ERRORS = {
    "cubic": (lambda p: (p**3).sum() + 9 * (p * p).sum(), {}, ARGUMENT, "objective must be quad"),
    "kink": (lambda p: p[0].abs() + p[1], {}, ARGUMENT, "objective must be quadratic"),
    "another kink": (lambda p: p[0] + p[1].abs(), {}, ARGUMENT, "objective must be quadratic"),
    "concave": (lambda p: -(p * p).sum(), {}, ARGUMENT, r"not convex.*eigenvalues from -2 to -2"),
    "saddle": (lambda p: p[0] * p[1], {}, ARGUMENT, "not convex.*from -1 to 1"),
    "curved row": (torch.sum, {"equality": lambda p: p.square()}, ARGUMENT, "equality must be aff"),
    "curved inequality": (
        torch.sum,
        {"inequality": lambda p: p.square()},
        ARGUMENT,
        "inequality must be affine",
    ),
    "infeasible": (
        lambda p: p.square().sum(),
        {"inequality": lambda p: [p + 1, 1 - p]},
        SOLUTION,
        "GurobiQP: the problem is infeasible",
    ),
    "unbounded": (torch.sum, {"bounds": (None, 0)}, SOLUTION, "GurobiQP: the problem is unbounded"),
    "infeasible and falling": (
        torch.sum,
        {"inequality": lambda p: [p + 1, 1 - p]},
        SOLUTION,
        "the problem is infeasible: no phi",
    ),
    "unbounded along an equality": (
        torch.sum,
        {"equality": lambda p: p[0] - p[1]},
        SOLUTION,
        "the problem is unbounded: the objective falls",
    ),
    "not a number": (lambda p: torch.log(p - 9).sum(), {}, SOLUTION, "GurobiQP: at step 0.*nan"),
}


@pytest.mark.parametrize("case", GUROBI_ERRORS)
def test_gurobis_errors(case):
    pytest.importorskip("gurobipy")
    objective, given, error, sentence = GUROBI_ERRORS[case]
    with pytest.raises(error, match=sentence):
        GurobiQP().minimize(objective, torch.tensor([0.4, 0.7]).double(), **given)


def test_gurobis_doubts_are_a_warning():
    names = pytest.importorskip("gurobipy").GRB
    for status, solutions in ((names.SUBOPTIMAL, 1), (names.ITERATION_LIMIT, 1)):
        with pytest.warns(ig.ImplicitGradWarning, match=f"not sure.* ended with status {status}"):
            _check_status(SimpleNamespace(Status=status, SolCount=solutions), names)
    _check_status(SimpleNamespace(Status=names.OPTIMAL, SolCount=1), names)  # says nothing


def test_gurobis_params_reach_gurobi():
    pytest.importorskip("gurobipy")
    problem = shapes()
    with pytest.raises(SOLUTION, match="without a solution, with status"):
        GurobiQP(params={"IterationLimit": 0, "BarIterLimit": 0, "Presolve": 0}).minimize(
            problem.objective, problem.init, bounds=(0.5, 1.0), equality=lambda p: p["w"].sum() - 4
        )


# hypergradients


def ridge_problem() -> tuple[tuple[Tensor, ...], Callable[..., Tensor], Callable[..., Tensor]]:
    """θ-centred ridge regression: its arguments, objective and closed form."""
    X, y = normal(10, 4, seed=1), normal(10, seed=2)
    theta, lam = normal(4, seed=3), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def objective(w, theta, X, y, lam):
        return ((X @ w - y) ** 2).mean() + lam / 2 * (w - theta).square().sum()

    def closed(theta, X, y, lam):
        A = 2 * X.T @ X / len(y) + lam * torch.eye(4, dtype=X.dtype)
        return torch.linalg.solve(A, 2 * X.T @ y / len(y) + lam * theta)

    return (theta, X, y, lam), objective, closed


RIDGE = Problem(torch.sum, None, None, L=6.0, mu=0.7)
EVERY = {
    **{
        name: (lambda make=make: make(RIDGE, tol=1e-11))
        for name, make in DESCENTS.items()
        if name != "LBFGS"
    },
    "LBFGS": lambda: lbfgs(RIDGE, tol=1e-8, steps=20),
    "SciPy": lambda: pytest.importorskip("scipy") and SciPyMinimize(tol=1e-11),
    "SciPy trust-exact": lambda: (
        pytest.importorskip("scipy") and SciPyMinimize(method="trust-exact", tol=1e-11)
    ),
    "Gurobi": lambda: pytest.importorskip("gurobipy") and GurobiQP(),
}


@pytest.mark.parametrize("condition", ["argmin", "proximal"])
@pytest.mark.parametrize("solver", EVERY)
def test_hypergradients_match_the_closed_form(solver, condition):
    args, objective, closed = ridge_problem()
    expected = torch.autograd.grad(wavy(closed(*args)), args)
    if condition == "argmin":
        solve = ig.implicit(EVERY[solver](), ig.argmin(objective), on_failure="raise")
        phi = solve(*args)
    else:
        loss = lambda w, X, y: ((X @ w - y) ** 2).mean()  # noqa: E731
        condition = ig.proximal(loss, args[3])
        phi = ig.implicit(EVERY[solver](), condition, on_failure="raise")(*args[:3])
    for found, exact in zip(torch.autograd.grad(wavy(phi), args), expected, strict=True):
        assert (found - exact).norm() < (1e-7 if solver == "LBFGS" else 1e-9) * exact.norm()


CONSTRAINED_SOLVERS = {
    "SLSQP": lambda: SciPyMinimize(method="SLSQP", tol=1e-14),
    "COBYQA": lambda: SciPyMinimize(method="COBYQA", tol=1e-10),
    "Gurobi": lambda: pytest.importorskip("gurobipy") and GurobiQP(),
}


@NEEDS_SCIPY
@pytest.mark.parametrize("solver", CONSTRAINED_SOLVERS)
def test_hypergradients_of_a_projection_on_the_simplex(solver):
    """On the support S of the solution, dφ/dy = I − 11ᵀ/|S|; off it, 0."""
    y = torch.tensor([0.9, 0.5, -0.3, 0.1, 0.05], dtype=torch.float64, requires_grad=True)
    condition = ig.argmin(
        lambda p, y: (p - y).square().sum(), bounds=(0, None), equality=lambda p, y: p.sum() - 1
    )
    phi = ig.implicit(CONSTRAINED_SOLVERS[solver](), condition, on_failure="raise")(y)
    threshold = (1.4 - 1) / 2  # by Held, Wolfe and Crowder's algorithm: 0.9 and 0.5 stay
    assert (phi - (y - threshold).clamp_min(0)).abs().max() < 1e-7
    support = (y.detach() > threshold + 1e-9).double()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (slope,) = torch.autograd.grad((weights * phi).sum(), [y])
    on_support = weights * support
    expected = on_support - support * on_support.sum() / support.sum()
    assert (slope - expected).abs().max() < 1e-6


@NEEDS_SCIPY
def test_root_finders_go_with_roots_and_fixed_points():
    """x = tanh(W x)/3 + b, either way; the reference unrolls the iteration."""
    W, b = normal(4, 4, seed=1), normal(4, seed=2)
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(100):
        x = torch.tanh(W @ x / 4) / 3 + b
    expected = torch.autograd.grad(wavy(x), [W, b])
    conditions = (
        ig.fixed_point(lambda x, b, W: torch.tanh(W @ x / 4) / 3 + b),
        ig.root(lambda x, b, W: x - b - torch.tanh(W @ x / 4) / 3),
    )
    for condition, method in itertools.product(conditions, ("hybr", "lm", "krylov", "broyden1")):
        solver = SciPyRoot(method=method, tol=1e-12)
        phi = ig.implicit(solver, condition, on_failure="raise")(b, W)
        for found, exact in zip(torch.autograd.grad(wavy(phi), [W, b]), expected, strict=True):
            assert (found - exact).norm() < 1e-9 * exact.norm()


# what cannot work


def with_option(solver: Any, **options: Any) -> Callable[[], Any]:
    return lambda: solver(**options)


SGD = OPTIMIZERS["SGD"]
NAN = float("nan")
BAD_OPTIONS = {
    r"GradientDescent\(lr=0\): expected a number > 0": with_option(GradientDescent, lr=0, steps=1),
    r"GradientDescent\(lr='1'\)": with_option(GradientDescent, lr="1", steps=1),
    r"GradientDescent\(lr=inf\)": with_option(GradientDescent, lr=math.inf, steps=1),
    r"GradientDescent: give steps, tol or both": with_option(GradientDescent, lr=1),
    r"GradientDescent\(steps=-1\): expected an integer of": with_option(
        GradientDescent, lr=1, steps=-1
    ),
    r"GradientDescent\(steps=2.0\)": with_option(GradientDescent, lr=1, steps=2.0),
    r"GradientDescent\(steps=True\)": with_option(GradientDescent, lr=1, steps=True),
    r"GradientDescent\(tol=-1\): expected None or a number of at": with_option(
        GradientDescent, lr=1, tol=-1
    ),
    r"GradientDescent\(tol=nan\)": with_option(GradientDescent, lr=1, tol=NAN),
    r"GradientDescent\(rtol=1\): expected None or a number between": with_option(
        GradientDescent, lr=1, rtol=1
    ),
    r"GradientDescent\(rtol=0\)": with_option(GradientDescent, lr=1, rtol=0),
    r"Nesterov\(lr=-1\)": with_option(Nesterov, lr=-1, steps=1),
    r"Nesterov\(kappa=0.5\): expected None or a number of at least 1": with_option(
        Nesterov, lr=1, steps=1, kappa=0.5
    ),
    r"Nesterov\(kappa=inf\)": with_option(Nesterov, lr=1, steps=1, kappa=math.inf),
    r"Nesterov\(momentum=1\): expected None or a number from 0 to": with_option(
        Nesterov, lr=1, steps=1, momentum=1
    ),
    r"Nesterov\(momentum=-0.1\)": with_option(Nesterov, lr=1, steps=1, momentum=-0.1),
    r"Nesterov: give kappa or momentum, not both": with_option(
        Nesterov, lr=1, steps=1, kappa=2, momentum=0.5
    ),
    r"NewtonCG\(maxiter=-1\): expected an integer of at least 0": with_option(NewtonCG, maxiter=-1),
    r"NewtonCG\(cg=0\): expected an integer of at least 1": with_option(NewtonCG, cg=0),
    r"NewtonCG\(rtol=2\)": with_option(NewtonCG, rtol=2),
    r"TorchOptim: factory must be a function.*got a str": with_option(
        TorchOptim, factory="sgd", steps=1
    ),
    r"TorchOptim: scheduler must be None or a function": with_option(
        TorchOptim, factory=SGD, steps=1, scheduler=3
    ),
    r"TorchOptim: give steps": with_option(TorchOptim, factory=SGD),
    r"TorchOpt: transform must be.*got a function": with_option(TorchOpt, transform=SGD, steps=1),
    r"SciPyMinimize\(method='adam'\): expected one of Nelder-Mead, ": with_option(
        SciPyMinimize, method="adam"
    ),
    r"SciPyMinimize\(tol=-1\)": with_option(SciPyMinimize, tol=-1),
    r"SciPyMinimize\(options=3\): expected None or a dict": with_option(SciPyMinimize, options=3),
    r"SciPyRoot\(method='newton'\): expected one of hybr, lm": with_option(
        SciPyRoot, method="newton"
    ),
    r"SciPyRoot\(tol='a'\)": with_option(SciPyRoot, tol="a"),
    r"GurobiQP\(params='fast'\): expected None or a dict": with_option(GurobiQP, params="fast"),
}


@pytest.mark.parametrize("sentence", BAD_OPTIONS)
def test_options_that_cannot_work(sentence):
    with pytest.raises(ARGUMENT, match=f"^{sentence}"):
        BAD_OPTIONS[sentence]()


@pytest.mark.parametrize("good", [0, 1e-300, 5, np.float32(0.5)])
def test_numbers_of_other_kinds_are_fine(good):
    assert GradientDescent(lr=1, tol=good).tol == good
    assert Nesterov(lr=1, tol=1, kappa=good + 1).kappa == good + 1
    assert Nesterov(lr=1, tol=1, momentum=0).momentum == 0
    assert NewtonCG(maxiter=0, cg=1).minimize(torch.sum, torch.ones(2)).tolist() == [1, 1]


def scipy_with(**given: Any) -> Callable[[], Any]:
    return lambda: SciPyMinimize().minimize(torch.sum, START, **given)


BAD_CALLS = {
    r"GradientDescent: init must hold floating-point tensors.*an int64 tensor": lambda: (
        GradientDescent(lr=1, steps=1).minimize(torch.sum, [START, torch.tensor([1])])
    ),
    r"NewtonCG: objective must return a scalar floating-point tensor, got a float64 ten": lambda: (
        NewtonCG().minimize(lambda p: p, START)
    ),
    r"SciPyMinimize: objective must return a scalar.*got a float$": lambda: (
        SciPyMinimize().minimize(lambda p: p.sum().item(), START)
    ),
    r"TorchOptim: factory must return a torch.optim.Optimizer, got a list": lambda: TorchOptim(
        factory=lambda params: params, steps=1
    ).minimize(torch.sum, START),
    r"SciPyMinimize: bounds must be a pair \(lower, upper\), got a float": scipy_with(bounds=1.0),
    r"SciPyMinimize: bounds must not be NaN, and no lower.*1 of 2 el": scipy_with(
        bounds=(torch.tensor([0, 3]), 2)
    ),
    r"SciPyMinimize: bounds must not be NaN.*2 of 2 elem": scipy_with(bounds=(NAN, None)),
    r"SciPyMinimize: the lower bound must be None, a number, a tensor": scipy_with(
        bounds=({"a": 1}, None)
    ),
    r"SciPyMinimize: the upper bound must be": scipy_with(bounds=(None, torch.zeros(3))),
    r"SciPyMinimize: the upper bound must.*str": scipy_with(bounds=(None, "x")),
    r"SciPyMinimize\(method='L-BFGS-B'\) cannot handle equality and.*SLSQP, trust-con": scipy_with(
        equality=lambda p: p
    ),
    r"SciPyMinimize\(method='BFGS'\) cannot handle bounds; these can: COBYLA": lambda: (
        SciPyMinimize(method="bfgs").minimize(torch.sum, START, bounds=(0, 1))
    ),
    r"SciPyMinimize: inequality must return floating-point tensors, got a float": lambda: (
        SciPyMinimize(method="SLSQP").minimize(torch.sum, START, inequality=lambda p: 1.0)
    ),
    r"SciPyRoot: residual returned 1 numbers for the 2 of phi": lambda: SciPyRoot().find_root(
        lambda p: p[:1], START
    ),
    r"SciPyRoot: residual must return floating-point tensors": lambda: SciPyRoot().find_root(
        lambda p: None, START
    ),
}


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_calls_that_cannot_work(sentence):
    if sentence.startswith("SciPy"):
        pytest.importorskip("scipy")
    with pytest.raises(ARGUMENT, match=f"^{sentence}"):
        BAD_CALLS[sentence]()


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
def test_nan_at_the_end_is_an_error_of_scipy():
    def objective(p):
        return torch.where(p < 0, torch.nan, p).sum() if p.requires_grad else p.sum() * torch.inf

    with pytest.raises(SOLUTION, match="SciPyMinimize: Nelder-Mead ended where the objective is"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            SciPyMinimize(method="Nelder-Mead").minimize(objective, START)


@NEEDS_SCIPY
def test_an_empty_phi_is_returned_as_it_is(descent):
    def objective(phi):
        return torch.zeros((), dtype=torch.float64, requires_grad=True) * 1

    for init in ([], {"a": torch.zeros(0, 3).double()}):
        for solver in (descent(RIDGE, tol=1e-6), SciPyMinimize(), GurobiQP()):
            found = solver.minimize(objective, init)
            assert optree.tree_structure(found) == optree.tree_structure(init)
        assert tensors(SciPyRoot().find_root(lambda p: p, init)) is not None


def test_a_package_that_no_extra_brings_is_missed_as_usual():
    with pytest.raises(ModuleNotFoundError, match="nowhere") as caught, needed_by(GurobiQP()):
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    assert not isinstance(caught.value, ig.ImplicitGradError)


@pytest.mark.parametrize("package", ["scipy", "gurobipy"])
def test_a_missing_package_is_named_by_its_extra(package, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    calls = {
        "scipy": [
            lambda: SciPyMinimize().minimize(lambda p: p.square().sum(), START),
            lambda: SciPyRoot().find_root(lambda p: p, START),
        ],
        "gurobipy": [lambda: GurobiQP().minimize(lambda p: p.square().sum(), START)],
    }
    extra = {"scipy": "scipy", "gurobipy": "gurobi"}[package]
    for call in calls[package]:
        with pytest.raises(
            MissingPackageError, match=rf"pip install 'implicit-grad\[{extra}\]'"
        ) as e:
            call()
        assert isinstance(e.value, ModuleNotFoundError) and isinstance(
            e.value, ig.ImplicitGradError
        )
        assert e.value.name == package
