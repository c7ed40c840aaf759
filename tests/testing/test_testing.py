"""The testing kit: what it finds in a museum of faults, and that it finds nothing else."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from museum import PIECES, data, descent, normal, number, objective, ridge
from problems import minimize
from test_readme import README, python_blocks

import implicit_grad as ig
from implicit_grad.testing import Cause, GradientCheckError, check_implicit
from implicit_grad.testing import strategies as draw
from implicit_grad.testing.differences import derivative, noise
from implicit_grad.testing.local_problem import Local
from implicit_grad.testing.subject import captured_tensors

pytest_plugins = ["pytester"]

F32, F64 = torch.float32, torch.float64


# ---------------------------------------------------------------- it finds what is wrong, and why


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torchopt's
@pytest.mark.parametrize("name", PIECES)
def test_the_museum(name):
    piece = PIECES[name]()
    report = check_implicit(piece.solve, piece.args, raise_on_failure=False, **piece.options)
    assert not report.ok and report.cause == piece.cause, f"{report}"
    assert all((a.cause is None) == a.ok for a in report.arguments)
    assert piece.cause.sentence.split()[0] in str(report) and piece.cause.name in str(report)


def test_every_cause_but_the_last_resort_has_a_piece():
    causes = {make().cause for make in PIECES.values()}
    assert set(Cause) - causes == {Cause.UNEXPLAINED}


@pytest.mark.parametrize("reference", ["exact", "unrolled"])
@pytest.mark.parametrize(
    "name", ["one_iteration_of_cg", "half_of_an_argument_detached", "half_the_lambda"]
)
def test_other_references_find_the_same(name, reference):
    piece = PIECES[name]()
    options = {"unrolled": ridge} if reference == "unrolled" else {}
    if name == "half_the_lambda" and reference == "unrolled":
        options = {"unrolled": lambda X, y, lam: ridge(X, y, lam / 2)}
    if name == "half_of_an_argument_detached" and reference == "exact":
        options["condition"] = ig.argmin(objective)
    report = check_implicit(
        piece.solve, piece.args, reference=reference, raise_on_failure=False, **options
    )
    assert not report.ok
    if options.get("condition") is None:
        assert report.cause == piece.cause, f"{report}"


def test_the_message_tells_it_all():
    piece = PIECES["lambda_as_an_item"]()
    with pytest.raises(AssertionError) as caught:
        check_implicit(piece.solve, piece.args)
    assert isinstance(caught.value, GradientCheckError)
    text, report = str(caught.value), caught.value.report
    assert text == str(report)
    for part in (
        "finite differences through the solver",
        "ok   X [9, 4]: error",
        "FAIL lam []: error 1",
        "|gradient| 0 -> MISSING_CROSS_DERIVATIVE",
        "why  MISSING_CROSS_DERIVATIVE: F depends on this argument",
        "item()",
        "seen the backward solve reports CONVERGED after 4 iterations",
        "seen lam: along a direction, ∂F/∂a is",
    ):
        assert part in text, text
    assert max(map(len, text.splitlines())) <= 100
    assert [a.ok for a in report.arguments] == [True, True, False]


@pytest.mark.parametrize("decimals", [2, 3])
def test_rounded_solutions_are_too_noisy(decimals):
    solve = ig.implicit(
        lambda *args: torch.round(ridge(*args), decimals=decimals), ig.argmin(objective)
    )
    report = check_implicit(solve, data(), raise_on_failure=False)
    assert report.cause == Cause.REFERENCE_TOO_NOISY, f"{report}"


def test_a_random_condition_is_one_function_while_it_is_measured():
    def condition(w, b):
        return (torch.nn.functional.dropout(w, 0.5) - b).square().sum() + w.square().sum()

    first = Local(ig.argmin(condition), (normal(8),), normal(8), ()).residual
    torch.rand(3)  # what a solver does between
    assert torch.equal(Local(ig.argmin(condition), (normal(8),), normal(8), ()).residual, first)


FAULTS = {
    "sign": lambda g, k: -g,
    "factor": lambda g, k: 1.01 * g,
    "lost": lambda g, k: 0 * g if k == 0 else g,
    "element": lambda g, k: torch.cat([g.flatten()[:1] * 2, g.flatten()[1:]]).view_as(g),
}


@given(draw.problems(), st.sampled_from(sorted(FAULTS)))
def test_any_fault_in_any_gradient_is_found(problem, fault):
    gradients = problem.hypergradient(lambda p: _first(p).sum(), problem.args)
    faulty = [FAULTS[fault](g, k) for k, g in enumerate(gradients)]
    differences = [(f - g).norm() / g.norm() for f, g in zip(faulty, gradients, strict=True)]
    hypothesis.assume(gradients[0].norm() > 0.1 and differences[0] > 5e-3)

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return _first(problem.solver(*_rebuild(problem, tensors))).clone()

        @staticmethod
        def backward(ctx, v):
            with torch.enable_grad():
                tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                found = problem.hypergradient(
                    lambda p: (_first(p) * v).sum(), _rebuild(problem, tensors)
                )
            return tuple(FAULTS[fault](g, k) for k, g in enumerate(found))

    args = [t for a in problem.args for t in (a.values() if isinstance(a, dict) else (a,))]
    report = check_implicit(
        Faulty.apply, args, outer=lambda p: p.sum(), raise_on_failure=False, directions=3
    )
    assert not report.ok, f"{report}"


def _first(phi):
    return phi["rest"] if isinstance(phi, dict) else phi


def _rebuild(problem, tensors):
    if not isinstance(problem.args[0], dict):
        return tuple(tensors)
    return ({"rest": tensors[0], "first": tensors[1]}, *tensors[2:])


# ---------------------------------------------------------------- it finds nothing else


@settings(max_examples=60)
@given(draw.problems())
def test_right_gradients_pass(problem):
    check_implicit(problem.implicit(), problem.args)


@given(draw.problems(dtype=F32))
def test_right_gradients_pass_in_single_precision(problem):
    check_implicit(problem.implicit(), problem.args)


@given(draw.problems(sizes=st.integers(1, 12), condition_number=1000.0))
def test_badly_conditioned_problems_pass(problem):
    check_implicit(problem.implicit(linear_solver=ig.Exact()), problem.args)


@given(draw.problems())
def test_right_gradients_pass_against_every_reference(problem):
    solve = problem.implicit()
    check_implicit(solve, problem.args, reference="unrolled", unrolled=problem.exact)
    check_implicit(solve, problem.args, reference="exact")
    check_implicit(problem.exact, problem.args)


@settings(max_examples=10)
@given(draw.problems(families=("quadratic", "logarithmic", "proximal")))
def test_solvers_with_a_tolerance_pass(problem):
    def start(first, *rest):
        zeros = torch.zeros(problem.operator.size, dtype=F64)
        return first if problem.family == "proximal" else problem._form(zeros)

    solver = ig.solvers.SciPyMinimize(method="BFGS", tol=1e-6)
    check_implicit(ig.implicit(solver, problem.condition, init=start), problem.args)


@settings(max_examples=3)
@given(draw.tasks(), draw.networks(inputs=2, outputs=4, max_layers=2))
def test_few_shot_tasks_pass(task, network):
    module, (X, y), (test_X, test_y) = network.module, task.support, task.query
    X, test_X = (x.repeat(1, 2)[:, :2] for x in (X, test_X))
    loss = torch.nn.functional.cross_entropy

    def call(phi, inputs):
        return torch.func.functional_call(module, phi, (inputs,))

    theta = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    condition = ig.proximal(lambda phi, X: loss(call(phi, X), y), lam=2.0)
    solve = ig.implicit(ig.solvers.NewtonCG(tol=1e-8), condition)
    check_implicit(solve, (theta, X), outer=lambda phi: loss(call(phi, test_X), test_y))


@pytest.mark.parametrize("seed", range(3))
def test_two_oracles_agree_to_six_digits(seed):
    """Differences through the solver, and 100 unrolled steps of another one."""
    task = draw.Task(shots=3, queries=3, seed=seed)
    (X, y), (test_X, test_y) = task.support, task.query
    module = draw.Network((2, 2, 2), bias=False, seed=seed).module
    theta = {k: p.detach().requires_grad_() for k, p in module.named_parameters()}

    def loss(phi, X, y):
        out = torch.func.functional_call(module, phi, (X,))
        return torch.nn.functional.cross_entropy(out, y)

    def unrolled(theta):
        phi = {k: t.clone() for k, t in theta.items()}
        for _ in range(100):
            pull = sum((phi[k] - t).square().sum() for k, t in theta.items())
            slopes = torch.autograd.grad(loss(phi, X, y) + pull, phi.values(), create_graph=True)
            phi = {k: p - 0.3 * g for (k, p), g in zip(phi.items(), slopes, strict=True)}
        return phi

    condition = ig.proximal(lambda phi: loss(phi, X, y), lam=2.0)
    solver, linear_solver = ig.solvers.NewtonCG(tol=1e-11), ig.CG(rtol=1e-12)
    solve = ig.implicit(solver, condition, linear_solver=linear_solver)
    options = {"outer": lambda phi: loss(phi, test_X, test_y), "rtol": 1e-6, "atol": 1e-9}
    check_implicit(solve, (theta,), directions=1, **options)
    check_implicit(solve, (theta,), reference="unrolled", unrolled=unrolled, **options)


@given(draw.problems(families=["proximal"]))
def test_the_gradient_of_a_moreau_envelope(problem):
    """Of the inner objective's minimum by θ it is λ (θ − φ), whatever the loss."""
    theta, b, M = problem.args
    phi = problem.implicit(linear_solver=ig.Exact())(theta, b, M)
    step = problem._vector(theta) - problem._vector(phi)
    envelope = problem._quadratic(phi, b, M) + problem.lam / 2 * step.square().sum()
    found = torch.autograd.grad(envelope, _leaves([theta]))
    expected = problem._form(problem.lam * step.detach())
    for f, e in zip(found, _leaves([expected]), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_moreau_envelope_is_of_second_order_in_phi():
    X, y, theta, way, lam = normal(12, 4, grad=False), normal(12), normal(4), normal(4, seed=1), 0.5

    def loss(w):
        return torch.nn.functional.softplus(X @ w).sum() - y.detach().sigmoid() @ (X @ w)

    solution = minimize(lambda w: loss(w) + lam / 2 * (w - theta.detach()).square().sum(), theta)
    sizes, errors = [10.0**-k for k in (1, 1.5, 2, 2.5, 3, 3.5, 4)], []
    for size in sizes:
        phi = (solution + size * way / way.norm()).detach()
        condition = ig.proximal(loss, lam)
        solve = ig.implicit(
            lambda _, phi=phi: phi, condition, linear_solver=ig.Exact(), on_failure="ignore"
        )
        phi = solve(theta)
        envelope = loss(phi) + lam / 2 * (phi - theta).square().sum()
        (found,) = torch.autograd.grad(envelope, theta)
        errors.append(float((found - lam * (theta - solution)).detach().norm()))
    rise = math.log10(errors[0] / errors[-1]) / 3
    assert abs(rise - 2) < 0.1, errors


def test_constraints_pass():
    condition = ig.argmin(lambda p, t: (p - t).square().sum() / 2, bounds=(0.0, None))
    solve = ig.implicit(lambda t: t.clamp(min=0.0), condition)
    check_implicit(solve, (torch.tensor([1.0, -2.0, 3.0], dtype=F64),))


def test_an_argument_without_influence_passes():
    solve = ig.implicit(
        lambda init, b: b / 2 + 1e-9 * init, ig.argmin(lambda p, i, b: (p * p - p * b).sum())
    )
    check_implicit(solve, (normal(3), normal(3, seed=1)))


def test_captured_tensors_are_checked_too():
    W, lam = normal(9, 4, seed=3), number(0.5)
    condition = ig.proximal(lambda w, y: (W @ w - y).square().sum() / 2, lam)
    solve = ig.implicit(lambda t, y: ridge_near(W.detach(), y, t, lam.detach()), condition)
    report = check_implicit(solve, (normal(4), normal(9, seed=2)))
    assert {(a.name, a.kind) for a in report.arguments} == {
        ("t", "argument"), ("y", "argument"), ("lam", "parameter"),
        (next(a.name for a in report.arguments if a.kind == "captured"), "captured"),
    }  # fmt: skip


def ridge_near(X, y, theta, lam):
    eye = torch.eye(len(theta), dtype=F64)
    return torch.linalg.solve(X.T @ X + lam * eye, X.T @ y + lam * theta)


@pytest.mark.parametrize("right", [True, False])
def test_large_problems(right):
    n = 600
    scale = torch.linspace(1, 3, n, dtype=F64)
    condition = ig.argmin(lambda p, b: (scale * p * p).sum() / 2 - b @ p)
    solve = ig.implicit((lambda b: b / scale) if right else torch.zeros_like, condition)
    report = check_implicit(solve, (normal(n),), raise_on_failure=False)
    assert report.ok == right
    assert report.cause == (None if right else Cause.WRONG_CONDITION), f"{report}"


# ---------------------------------------------------------------- what it leaves alone, and refuses


def test_nothing_of_the_users_changes():
    W = normal(9, 4, seed=3)
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda y, lam: ridge(W.detach(), y, lam),
        ig.argmin(lambda w, y, lam: objective(w, W, y, lam)),
        linear_solver=ig.CG(maxiter=1),
        monitor=monitor,
        on_failure="raise",
    )
    _, y, lam = data()
    before = [t.detach().clone() for t in (W, y, lam)]
    storage, random = W.data_ptr(), torch.get_rng_state()
    report = check_implicit(solve, (y, lam), raise_on_failure=False)
    assert report.cause == Cause.LINEAR_SOLVE_NOT_CONVERGED
    assert [torch.equal(t, b) for t, b in zip((W, y, lam), before, strict=True)] == [True] * 3
    assert W.data_ptr() == storage and W._version == y._version == 0
    assert all(t.grad is None for t in (W, y, lam))
    assert torch.equal(torch.get_rng_state(), random)
    assert not monitor.reports and solve.setup.reporting.on_failure == "raise"


def test_random_solvers_leave_the_generator_alone():
    piece, random = PIECES["noise"](), torch.get_rng_state()
    check_implicit(piece.solve, piece.args, raise_on_failure=False)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_argument_that_is_captured_as_well_is_one_tensor():
    X, y, lam = data()
    condition = ig.argmin(lambda w, a, y, lam: objective(w, (a + X) / 2, y, lam))
    solve = ig.implicit(ridge, condition)
    report = check_implicit(solve, (X, y, lam), reference="unrolled", unrolled=ridge)
    assert [a.kind for a in report.arguments] == ["argument"] * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_part_shows_along_one_direction(seed):
    x = normal(3, seed=seed)
    with pytest.raises(GradientCheckError):
        check_implicit(lambda x: x[:2].sin().sum() + x[2].detach(), (x,), directions=1)


def test_captured_tensors_come_back_from_a_solver_that_raises():
    W = normal(3)

    def solver(b):
        if not torch.equal(W.detach(), before):
            raise KeyError("moved")
        return b * W.detach()

    before = W.detach().clone()
    solve = ig.implicit(solver, ig.argmin(lambda p, b: (p - b * W).square().sum()))
    with pytest.raises(KeyError):
        check_implicit(solve, (normal(3, seed=1),))
    assert torch.equal(W.detach(), before)


def test_without_anything_that_requires_grad_all_floats_are_checked():
    args = tuple(t.detach() for t in data())
    report = check_implicit(ig.implicit(ridge, ig.argmin(objective)), args)
    assert [a.name for a in report.arguments] == ["X", "y", "lam"]
    X, y, lam = data()
    report = check_implicit(ig.implicit(ridge, ig.argmin(objective)), (X.detach(), y, lam))
    assert [a.name for a in report.arguments] == ["y", "lam"]


def test_a_gradient_without_known_cause_says_so():
    report = check_implicit(
        lambda x: x.detach() ** 2 + 3 * x - 3 * x.detach(), (normal(3),), raise_on_failure=False
    )
    assert report.cause == Cause.UNEXPLAINED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "numeric"}, 'expected "finite-difference", "unrolled" or "exact"'),
        ({"reference": "unrolled"}, 'reference="unrolled" goes with unrolled='),
        ({"unrolled": ridge}, 'reference="unrolled" goes with unrolled='),
        ({"reference": "exact"}, "pass condition="),
        ({"rtol": 0.0}, r"rtol=0.0\): expected a number between 0 and 1"),
        ({"directions": 0}, r"directions=0\): expected an integer of at least 1"),
        ({"outer": lambda w: w}, "outer must return a scalar tensor, got a float64 tensor"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        check_implicit(ridge, data(), **options)


def test_nothing_to_differentiate_by():
    with pytest.raises(ig.InvalidArgumentError, match="no floating-point tensor"):
        check_implicit(lambda n: torch.ones(n), (3,))


def test_no_exact_solution():
    condition = ig.argmin(lambda p, t: (p.sum() - t.sum()) ** 2)
    with pytest.raises(ig.InvalidArgumentError, match="no isolated solution"):
        check_implicit(ig.implicit(lambda t: t + 0, condition), (normal(3),), reference="exact")


def test_rtol_is_what_it_says():
    solve = ig.implicit(descent(200), ig.argmin(objective))
    found = check_implicit(solve, data(), rtol=0.5)
    worst = max(a.error for a in found.arguments)
    assert 1e-7 < worst < 0.1
    found = check_implicit(solve, data(), rtol=worst / 10, raise_on_failure=False)
    assert found.cause == Cause.INNER_NOT_SOLVED


# ---------------------------------------------------------------- differences


@pytest.mark.parametrize("sigma", [1e-12, 1e-6, 1e-2])
def test_noise_is_measured(sigma):
    random = torch.Generator().manual_seed(0)
    jitter = (sigma * torch.randn(7 * 99, generator=random, dtype=F64)).tolist()
    found = [noise([1.0 + 1e-9 * k + jitter[7 * i + k] for k in range(7)]) for i in range(99)]
    assert 0.8 * sigma < sorted(found)[49] < 1.5 * sigma
    assert noise([0.5 * k * k - k for k in range(7)]) < 1e-12


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (math.exp, 1.0),
        (lambda t: math.log(1e-4 + t), 1e4),  # fails at the first steps
        (lambda t: 1 / (0.013 - t), 1 / 0.013**2),  # has a pole there
        (lambda t: t**3, 0.0),
        (lambda t: 7.0, 0.0),
    ],
)
def test_derivatives(function, expected):
    found = derivative(function, 0.02, 1e-16, 1e-5, scale=1.0)
    assert abs(found.value - expected) <= 1e-4 * abs(expected) + 1e-8
    assert abs(found.value - expected) <= 3 * found.error + 1e-9 * abs(expected)
    assert found.error <= 0.03 * abs(expected) + 1e-6


@pytest.mark.parametrize(("tread", "start"), [(0.03, 0.0), (1e-2, 0.3), (1e-3, 0.3), (1e-4, 0.3)])
def test_stairs_are_noticed(tread, start):
    found = derivative(lambda t: tread * round((t + start) / tread), 0.02, 1e-16, 1e-5, scale=1.0)
    assert found.error > tread and abs(found.value - 1) <= 3 * found.error


def test_jitter_is_in_the_error():
    random = torch.Generator().manual_seed(0)

    def function(t):
        return math.sin(t) + 1e-6 * float(torch.randn((), generator=random))

    for _ in range(20):
        found = derivative(function, 0.02, 1e-6, 1e-5)
        assert abs(found.value - 1) <= 3 * found.error and 1e-6 < found.error < 0.1


# ---------------------------------------------------------------- captures


def test_tensors_are_found_wherever_functions_hold_them():
    a, b, c, d, e = (normal(2, seed=k) for k in range(5))
    module = torch.nn.Linear(2, 1)
    box = {"deep": [c]}

    class Callable_:
        def __init__(self):
            self.e = e

        def __call__(self, x):
            return x

    def default(x, d=d):
        return x

    import functools

    held = {
        id(t): name
        for name, t in captured_tensors(
            lambda: a, functools.partial(torch.add, b), lambda: box["deep"], default, Callable_(),
            lambda: module,
        )
    }  # fmt: skip
    for tensor in (a, b, c, d, e, module.weight, module.bias):
        assert id(tensor) in held
    assert held[id(a)] == "a" and held[id(c)] == "box['deep'][0]"
    assert held[id(module.weight)] == "module.weight"


# ---------------------------------------------------------------- strategies


@given(draw.problems())
def test_problems_have_exact_solutions_and_hypergradients(problem):
    args = problem.args
    phi = problem.implicit(linear_solver=ig.Exact(), on_failure="raise")(*args)
    weights = draw.normal(problem.operator.size, seed=9)
    found = torch.autograd.grad((problem._vector(phi) * weights).sum(), _leaves(args))
    expected = problem.hypergradient(lambda p: (problem._vector(p) * weights).sum(), args)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-9)
    assert eval(repr(problem), vars(draw).copy()) == problem


def _leaves(args):
    return [t for a in args for t in (a.values() if isinstance(a, dict) else (a,))]


@given(st.sampled_from(["definite", "indefinite", "nonsymmetric"]), st.data())
def test_operators_have_their_spectrum(kind, data):
    operator = data.draw(draw.operators(kind))
    values = torch.linalg.eigvals(operator.matrix)
    expected = torch.tensor(operator.spectrum, dtype=F64)
    scale = 1e-4 if kind == "nonsymmetric" else 1e-10  # defective matrices are sensitive
    torch.testing.assert_close(
        values.real.sort().values, expected.sort().values, rtol=0, atol=scale * 10
    )
    symmetric = torch.equal(operator.matrix, operator.matrix.T)
    assert symmetric == operator.symmetric == (kind != "nonsymmetric")
    assert (min(operator.spectrum) < 0) == (kind == "indefinite")
    torch.testing.assert_close(operator(expected), operator.matrix @ expected)


def test_examples_shrink_to_readable_ones():
    def least(strategy, condition=lambda _: True):
        return repr(hypothesis.find(strategy, condition, settings=settings(database=None)))

    assert least(draw.problems()) == (
        "InnerProblem(family='quadratic', operator=SpectralMatrix((1.0,)), seed=0, lam=1.0, "
        "form='vector')"
    )
    assert "SpectralMatrix((1.0, 1.0))" in least(draw.problems(), lambda p: p.operator.size > 1)
    assert least(draw.operators("nonsymmetric")) == "SpectralMatrix((1.0, 1.0), skew=1.0)"
    assert (
        least(draw.operators("indefinite"), lambda o: o.size > 1) == "SpectralMatrix((-1.0, 1.0))"
    )
    assert least(draw.tasks()).startswith("Task(ways=2, shots=1, queries=1, features=1, seed=0")
    assert least(draw.networks()).startswith("Network(widths=(1, 1), activation='tanh'")
    tree = hypothesis.find(draw.trees(), lambda t: isinstance(t, dict))
    assert list(tree) == ["a"] and tree["a"].shape == ()
    assert draw.SpectralMatrix((2.0, 3.0)).matrix.tolist() == [[2.0, 0.0], [0.0, 3.0]]


@given(draw.trees(dtypes=(F32, F64), max_parts=2, depth=3))
def test_trees_can_be_arguments(tree):
    def solver(tree, b):
        return torch.utils._pytree.tree_map(lambda t: t.detach() * b, tree)

    leaves = torch.utils._pytree.tree_leaves(tree)
    assert leaves and all(t.requires_grad and t.dtype in (F32, F64) for t in leaves)
    hypothesis.assume(all(t.numel() for t in leaves))
    total = check_implicit(
        lambda tree: torch.utils._pytree.tree_map(lambda t: t * 2, tree), (tree,)
    )
    assert len(total.arguments) == len(leaves)


def test_trees_cover_the_nestings():
    for kind in (torch.Tensor, list, tuple, dict):
        hypothesis.find(draw.trees(), lambda t, kind=kind: isinstance(t, kind))
    hypothesis.find(draw.trees(), lambda t: isinstance(t, list) and isinstance(t[0], dict))


@given(draw.tasks(), draw.networks(inputs=3, outputs=2))
def test_tasks_and_networks(task, network):
    (X, y), (test_X, test_y) = task.support, task.query
    assert X.shape == (task.ways * task.shots, task.features) and test_X.shape[0] == len(test_y)
    assert torch.bincount(y).tolist() == [task.shots] * task.ways
    assert not torch.equal(X[:1], test_X[:1])
    out = network.module(torch.ones(1, 3, dtype=F64))
    assert out.shape == (1, 2)
    assert torch.equal(out, network.module(torch.ones(1, 3, dtype=F64)))


@given(draw.positive(0.01, 5.0), draw.tensors(2, 3))
def test_numbers_and_tensors(lam, X):
    assert 0.01 <= lam.item() <= 5 and lam.requires_grad and lam.shape == ()
    assert X.shape == (2, 3) and X.requires_grad


# ---------------------------------------------------------------- the package


@pytest.fixture
def brief() -> Iterator[None]:
    """Few examples for property tests with settings of their own."""
    before = settings.get_current_profile_name()
    phases = [hypothesis.Phase.generate]
    settings.register_profile("brief", max_examples=3, database=None, phases=phases)
    settings.load_profile("brief")
    yield
    settings.load_profile(before)


def test_the_snippet_of_the_docstring_runs(brief):
    text = textwrap.dedent(ig.testing.__doc__.split("call:\n")[1].split("When it fails")[0])
    names = {"solve": ig.implicit(ridge, ig.argmin(objective))}
    exec(text, names)
    test = names["test_my_solver"]
    test()
    names["solve"] = ig.implicit(lambda X, y, lam: ridge(X, y, 2 * lam), ig.argmin(objective))
    with pytest.raises(GradientCheckError, match="WRONG_CONDITION"):
        test()


def test_the_snippet_of_the_readme_runs(brief):
    blocks, names = python_blocks(README.read_text(encoding="utf-8")), {"__name__": "readme"}
    (last,) = (k for k, block in enumerate(blocks) if "check_implicit" in block)
    for block in blocks[: last + 1]:
        exec(compile(block, str(README), "exec"), names)
    snippet = blocks[last][blocks[last].index("from hypothesis") :]
    assert len(snippet.strip().splitlines()) == 6
    test, fit = names["test_my_solver"], names["fit"]
    test()
    names["solve"].solver = lambda X, y, lam: fit(X, y, 2 * lam)
    with pytest.raises(GradientCheckError, match="WRONG_CONDITION"):
        test()


def test_the_plug_in(pytester):
    pytester.makeconftest('pytest_plugins = ["implicit_grad.testing.plugin"]')
    pytester.makepyfile(
        """
        import torch, hypothesis, implicit_grad as ig
        from hypothesis import given, strategies as st
        from implicit_grad.testing import check_implicit

        def test_a_linear_solver(implicit_problem):
            solve = implicit_problem.implicit(linear_solver=ig.NormalCG())
            check_implicit(solve, implicit_problem.args)

        drawn = set()

        @given(st.integers())
        def test_random_numbers(k):
            drawn.add(float(torch.rand(())))

        def test_they_were_the_same_in_every_example():
            assert len(drawn) == 1
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=12)


def test_hypothesis_is_imported_only_for_strategies():
    code = """
import sys, implicit_grad as ig
assert ig.testing.check_implicit and "hypothesis" not in sys.modules
assert ig.testing.strategies.problems and "hypothesis" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'strategy'"):
        _ = ig.testing.strategy


def line_trained(steps, calls):
    """A loop that trains a copy of the module that it is given, and counts its runs."""
    X = torch.linspace(-1, 1, 12, dtype=F64)[:, None]
    y = X[:, 0].sin() + 0.3

    def loss(line, lam):
        return (line(X.to(lam))[:, 0] - y.to(lam)).square().mean() + lam * sum(
            p.square().sum() for p in line.parameters()
        )

    def train(start, lam):
        calls.append(None)
        line = copy.deepcopy(start)
        for _ in range(steps):
            slopes = torch.autograd.grad(loss(line, lam), tuple(line.parameters()))
            with torch.no_grad():
                for p, slope in zip(line.parameters(), slopes, strict=True):
                    p -= 0.3 * slope
        return line

    return ig.implicit(train, ig.argmin(loss), on_failure="ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("steps", "most"), [(4, 90), (60, 40)])
def test_a_module_that_training_starts_from_is_no_variable(steps, most, dtype):
    calls = []
    torch.manual_seed(0)
    line, lam = torch.nn.Linear(1, 1).to(dtype), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    report = check_implicit(
        line_trained(steps, calls),
        (line, lam),
        outer=lambda line: (line(torch.ones(1, 1, dtype=dtype)) - 1).square().sum(),
        raise_on_failure=False,
    )
    assert [a.name for a in report.arguments] == ["lam"]
    assert report.cause is (Cause.INNER_NOT_SOLVED if steps == 4 else None)
    assert len(calls) <= most
    assert line.weight.requires_grad and line.weight.grad is None


@pytest.mark.parametrize("regularised", [False, True])
def test_an_unfinished_loop_is_named_before_a_singular_matrix(regularised):
    """In float32 a condition number of 10⁴ is no singular matrix, either."""
    scales = torch.tensor([1.0, 1.5, 2.0, 2.5, 1e-4 if regularised else 0.0])

    def objective(w, b):
        return (scales * (w - b[0]) ** 2).sum() / 2 + (w[0] - b[0, 0]) ** 4

    def fit(b):
        w = torch.zeros(5)
        for _ in range(9):
            w = w - 0.1 * torch.func.grad(objective)(w, b)
        return w

    report = check_implicit(
        ig.implicit(fit, ig.argmin(objective), on_failure="ignore"),
        (torch.tensor([[1.0, 2.0, -1.0, 0.5, 1.0]]),),
        raise_on_failure=False,
    )
    assert report.cause is Cause.INNER_NOT_SOLVED


def pulled(x, q):
    return (x - q).square().sum()


UNDER_CONSTRAINTS = {
    "another sign, as SciPy has it": (
        lambda q: q.clamp(min=0.2),
        ig.argmin(pulled, inequality=lambda x, q: x - 0.2),
        Cause.WRONG_CONDITION,
    ),
    "stopped early": (
        lambda q: 0.7 * q.clamp(min=0.2) + 0.3 * torch.tensor([0.2, 0.9, 0.2]).double(),
        ig.argmin(pulled, inequality=lambda x, q: 0.2 - x),
        Cause.INNER_NOT_SOLVED,
    ),
    "a kink": (
        lambda q: q.clamp(min=0.5),
        ig.argmin(pulled, inequality=lambda x, q: 0.5 - x),
        Cause.REFERENCE_TOO_NOISY,
    ),
    "half of an argument detached": (
        lambda q: q.clamp(min=0.2),
        ig.argmin(lambda x, q: pulled(x, (q + q.detach()) / 2), inequality=lambda x, q: 0.2 - x),
        Cause.MISSING_CROSS_DERIVATIVE,
    ),
}


@pytest.mark.parametrize("name", UNDER_CONSTRAINTS)
def test_what_is_wrong_under_constraints(name):
    solver, condition, cause = UNDER_CONSTRAINTS[name]
    q = torch.tensor([-1.0, 0.5, -0.7], dtype=torch.float64)
    solve = ig.implicit(solver, condition, on_failure="ignore")
    assert check_implicit(solve, (q,), raise_on_failure=False).cause is cause
