"""Batches of tasks: clone(tasks=...) against the loop over clones, its CG against CG alone."""

import copy
import dataclasses
import itertools
import math
import warnings
import weakref

import learn2learn as l2l
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Tied, count_tensors, no_garbage_collector, normal
from torch import nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, mse_loss

import implicit_grad as ig
from implicit_grad import CG, Status
from implicit_grad._linear_solvers.base import Operator
from implicit_grad.learn2learn import ImplicitMAML
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOptim

F32, F64 = torch.float32, torch.float64
STYLES = ("tensor", "closure")
CURVATURES = ("hessian", "gauss_newton")
TASKS = 3


# ---------------------------------------------------------------- CG for many against CG alone


# What the matrix of a task may be like: its eigenvalues, for n unknowns. With n >= 6 no three
# iterations exhaust it, so that what happens is not for rounding errors to decide.
SPECTRA = {
    "definite": lambda n: torch.linspace(1, 7, n),
    "indefinite": lambda n: torch.linspace(-2, 5, n),
    "negative": lambda n: -torch.linspace(3, 9, n),
    "singular": lambda n: torch.cat([torch.zeros(n // 2), torch.linspace(1, 5, n - n // 2)]),
}
TROUBLE = ("no rhs", "NaN rhs", "Inf rhs", "NaN", "Inf")
SCALES = [None, 0.5, 2.0, "tensor"]


class Systems:
    """A batch of systems of several sorts and magnitudes; `alone` gives one of them."""

    def __init__(self, sorts, n, dtype, seed, scale=None, powers=None):
        random = torch.Generator().manual_seed(seed)
        self.count, self.n, self.powers = len(sorts), n, powers or [0] * len(sorts)
        matrices = [self._matrix(sort, random) for sort in sorts]
        self.rhs = torch.randn(len(sorts), n, generator=random, dtype=F64)
        per_element = torch.rand(len(sorts), n, generator=random, dtype=F64) + 0.5
        self.scale = per_element.to(dtype) if scale == "tensor" else scale
        for task, (sort, power) in enumerate(zip(sorts, self.powers, strict=True)):
            matrices[task] *= 2.0**power
            self.rhs[task] *= 2.0 ** (-power) if sort != "no rhs" else 0.0
            if sort in ("NaN rhs", "Inf rhs"):
                self.rhs[task, 0] = float(sort[:3])
        self.matrices, self.rhs = torch.stack(matrices).to(dtype), self.rhs.to(dtype)

    def _matrix(self, sort, random):
        draw = torch.randn(self.n, self.n, generator=random, dtype=F64)
        if sort in ("NaN", "Inf"):
            return torch.full_like(draw, float(sort))
        basis = torch.linalg.qr(draw)[0]
        eigenvalues = SPECTRA.get(sort, SPECTRA["definite"])(self.n).to(F64)
        matrix = basis @ torch.diag(eigenvalues) @ basis.T
        return (matrix + matrix.T) / 2

    def operator(self, task=None):
        """Of all tasks, or of one: with the same rounding errors in its products."""
        matrices = self.matrices if task is None else self.matrices[task]
        scale = self.scale
        if task is not None and torch.is_tensor(scale):
            scale = scale[task]

        def product(x):
            curved = torch.stack([m @ r for m, r in zip(matrices, x, strict=True)])
            return curved if scale is None else curved + scale * x

        if task is None:
            return Operator(product, product, scale)

        def alone(x):
            curved = matrices @ x
            return curved if scale is None else curved + scale * x

        return Operator(alone, alone, scale)

    def together(self, solver, verify=True):
        """All solutions from one run."""
        x, solutions = solver.solve_tasks(self.operator(), self.rhs.clone(), verify)
        assert len(solutions) == self.count
        assert all(s.x.data_ptr() == row.data_ptr() for s, row in zip(solutions, x, strict=True))
        return solutions

    def apart(self, solver, verify=True):
        """All solutions from runs of their own."""
        return [solver.solve(self.operator(t), self.rhs[t], verify) for t in range(self.count)]


def near(actual, expected, tolerance):
    """Equal relative to the size of what is expected, NaN and None where that is."""
    if expected is None or actual is None:
        return actual is expected
    a, e = (torch.as_tensor(t).double() for t in (actual, expected))
    kept = torch.isfinite(e)
    if not torch.equal(kept, torch.isfinite(a)) or a.shape != e.shape:
        return False
    size = e[kept].abs().max() if kept.any() else 0.0
    return bool(((a - e)[kept].abs() <= tolerance * size).all())


def equal_solutions(found, expected, tolerance=None):
    """Fields alike; rounding errors grow with the length of the steps."""
    if tolerance is None:
        eps = torch.finfo(expected.x.dtype).eps
        tolerance = 1e4 * eps * max([1.0, *sum(expected.coefficients, ())]) ** 2
    assert found.status == expected.status
    assert found.iterations == expected.iterations
    assert near(found.x, expected.x, tolerance)
    assert near(found.curvature, expected.curvature, tolerance)
    assert near(found.coefficients or None, expected.coefficients or None, tolerance)
    for name in ("residual", "residual_norm", "gap"):
        actual, alone = getattr(found, name), getattr(expected, name)
        assert (actual is None) == (alone is None), name
        if alone is not None:
            assert math.isnan(actual) == math.isnan(alone), name
            assert math.isnan(alone) or abs(actual - alone) <= tolerance * max(alone, 1.0), name
    assert found.substitute is expected.substitute is None


@given(
    st.lists(st.sampled_from([*SPECTRA, *TROUBLE]), min_size=1, max_size=5),
    st.integers(6, 9),
    st.integers(0, 2**31),
    st.sampled_from(SCALES),
    st.sampled_from([F32, F64]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.25]),
    st.booleans(),
)
def test_a_budget_gives_each_task_what_it_would_get_alone(
    sorts, n, seed, scale, dtype, maxiter, damping, verify
):
    systems = Systems(sorts, n, dtype, seed, scale)
    solver = CG(maxiter=maxiter, damping=damping)
    pairs = zip(systems.together(solver, verify), systems.apart(solver, verify), strict=True)
    for found, expected in pairs:
        equal_solutions(found, expected)


@given(
    st.lists(
        st.sampled_from(["definite", "indefinite", "negative", *TROUBLE]), min_size=1, max_size=5
    ),
    st.integers(6, 9),
    st.integers(0, 2**31),
    st.sampled_from(SCALES),
    st.sampled_from([F32, F64]),
    st.sampled_from([{"rtol": 1e-3}, {}, {"atol": 1e-3}, {"rtol": 1e-3, "maxiter": 4}]),
    st.sampled_from([0.0, 0.25]),
)
def test_a_tolerance_gives_each_task_what_it_would_get_alone(
    sorts, n, seed, scale, dtype, options, damping
):
    systems, solver = Systems(sorts, n, dtype, seed, scale), CG(damping=damping, **options)
    pairs = zip(systems.together(solver), systems.apart(solver), strict=True)
    for found, expected in pairs:
        if expected.status == Status.CONVERGED:
            # a residual that is a hair from the tolerance may take one more iteration, or one less
            assert found.status == expected.status
            assert abs(found.iterations - expected.iterations) <= 1
            assert found.residual <= 2e-3
        else:
            equal_solutions(found, expected)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [None, 0.5, "tensor"])
@pytest.mark.parametrize("n", [12, 9000])
def test_a_budget_is_met_to_the_last_number(n, scale, dtype):
    """Short rows, and rows that are long enough to be multiplied one by one."""
    eigenvalues = torch.linspace(1, 5, n, dtype=dtype)
    rhs = torch.randn(4, n, dtype=dtype)
    scales = torch.rand(4, n, dtype=dtype) + 0.5 if scale == "tensor" else scale

    def operator(own):
        def product(x):
            return eigenvalues * x + (0 if own is None else own) * x

        return Operator(product, product, own)

    solver = CG(maxiter=5)
    x, solutions = solver.solve_tasks(operator(scales), rhs, True)
    for task, found in enumerate(solutions):
        own = scales[task] if scale == "tensor" else scales
        expected = solver.solve(operator(own), rhs[task])
        equal_solutions(found, expected, 1e-13 if dtype == F64 else 2e-5)
        assert torch.equal(x[task], found.x)
        assert (found.status, found.iterations) == (Status.TRUNCATED, 5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [None, 2.0, "tensor"])
def test_magnitudes_do_not_matter(scale, dtype):
    powers = [-100, -60, 0, 60, 100] if scale is None else [0] * 5
    systems = Systems(["definite"] * 5, 6, dtype, 3, scale, powers)
    if scale is not None:
        systems.rhs *= 10.0 ** torch.tensor([-30.0, -10.0, 0.0, 10.0, 30.0])[:, None].to(dtype)
    if dtype == F32 and scale is None:  # squares must not overflow in CG alone either
        systems = Systems(["definite"] * 5, 6, dtype, 3, scale, [-40, -20, 0, 20, 40])
    for solver in (CG(maxiter=3), CG(rtol=1e-4), CG(maxiter=3, damping=0.0)):
        pairs = zip(systems.together(solver), systems.apart(solver), strict=True)
        for found, expected in pairs:
            equal_solutions(found, expected)


def test_right_hand_sides_of_any_magnitude():
    rhs = normal(5, 4, seed=1, grad=False)
    sizes = torch.tensor([1e-300, 1e-200, 1.0, 1e200, 1e300], dtype=F64)
    triple = Operator(lambda x: 3 * x, lambda x: 3 * x)
    x, solutions = CG(maxiter=2).solve_tasks(triple, rhs * sizes[:, None], True)
    assert torch.allclose(x / sizes[:, None], rhs / 3, rtol=1e-14)
    assert [s.status for s in solutions] == [Status.CONVERGED] * 5


@pytest.mark.parametrize("solver", [CG(maxiter=3), CG(), CG(rtol=1e-2), CG(maxiter=4, rtol=1e-9)])
@pytest.mark.parametrize("bad", ["indefinite", "singular", *TROUBLE])
def test_a_bad_task_changes_no_bit_of_the_others(bad, solver):
    for dtype in (F32, F64):
        clean = Systems(["definite"] * 4, 7, dtype, 5, 0.5)
        mixed = Systems(["definite"] * 4, 7, dtype, 5, 0.5)
        trouble = Systems([bad] * 4, 7, dtype, 6, 0.5)
        mixed.matrices[2], mixed.rhs[2] = trouble.matrices[2], trouble.rhs[2]
        expected, found = clean.together(solver), mixed.together(solver)
        for task in (0, 1, 3):
            assert torch.equal(found[task].x, expected[task].x)
            assert repr(found[task]) == repr(expected[task])
        wanted = {
            "indefinite": Status.NEGATIVE_CURVATURE,
            "no rhs": Status.ZERO_RHS,
            "NaN rhs": Status.NONFINITE_RHS,
            "Inf rhs": Status.NONFINITE_RHS,
            "NaN": Status.NONFINITE_OPERATOR,
            "Inf": Status.NONFINITE_OPERATOR,
        }
        if bad in wanted:
            assert found[2].status == wanted[bad]
        assert torch.isnan(found[2].x).any() == (bad in ("NaN rhs", "Inf rhs", "NaN", "Inf"))


def test_a_restart_is_of_its_task_only():
    """A product that changes after some calls leaves one carried residual wrong."""
    calls = 0

    def product(x):
        nonlocal calls
        calls += 1
        return x * torch.tensor([[1.0], [2.0 if calls <= 3 else 2.5]], dtype=F64) * spread

    spread = torch.linspace(1, 3, 3, dtype=F64)
    rhs = torch.ones(2, 3, dtype=F64)
    x, (steady, drifting) = CG(rtol=1e-10).solve_tasks(Operator(product, product), rhs, True)
    assert torch.allclose(x, rhs / spread / torch.tensor([[1.0], [2.5]]), rtol=1e-9)
    assert [s.status for s in (steady, drifting)] == [Status.CONVERGED] * 2
    assert (steady.iterations, len(steady.coefficients)) == (3, 3)
    assert (drifting.iterations, drifting.coefficients) == (6, ())
    assert 0 < steady.gap < 1e-12


def test_first_order_and_refusals():
    systems = Systems(["definite", "indefinite"], 5, F64, 1, 2.0)
    solver = CG(maxiter=0)
    for found, expected in zip(systems.together(solver), systems.apart(solver), strict=True):
        equal_solutions(found, expected, 0.0)
    with pytest.raises(ig.LinearSolveError, match="CG met negative curvature"):
        Systems(["definite", "negative"], 5, F64, 1, 2.0).together(
            CG(on_negative_curvature="raise")
        )
    kept = Systems(["definite", "definite"], 5, F64, 1, 2.0)
    assert all(s.status.ok for s in kept.together(CG(on_negative_curvature="raise")))


@pytest.mark.parametrize("count", [1, 3])
def test_systems_without_unknowns(count):
    x, solutions = CG().solve_tasks(Operator(torch.clone, torch.clone), torch.zeros(count, 0), True)
    assert x.shape == (count, 0)
    assert [s.status for s in solutions] == [Status.ZERO_RHS] * count


# ---------------------------------------------------------------- a batch against the loop


def wrapped(model, lam=2.0, lr=0.1, **options):
    """The model as an imaml; MAML's options and imaml's together."""
    names = ("first_order", "allow_unused", "allow_nograd")
    theirs = {k: options.pop(k) for k in names if k in options}
    options = {"on_failure": "ignore", **options}
    return ig.imaml(l2l.algorithms.MAML(model, lr=lr, **theirs), lam=lam, **options)


def network(inputs=3, hidden=4, outputs=2):
    """A small network that is not linear in its weights."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def data(seed=1, inputs=3, outputs=2, size=6):
    """The support or query sets of all tasks."""
    X = normal(TASKS, size, inputs, seed=seed, grad=False).to(torch.get_default_dtype())
    return X, normal(TASKS, size, outputs, seed=seed + 50, grad=False).to(X)


def of(batch, task):
    """The support or query set of one task."""
    return tuple(t[task] for t in batch)


def error(learner, batch):
    """One loss, or one for each task of a learner for many."""
    if getattr(learner, "tasks", None) is None:
        return mse_loss(learner(batch[0]), batch[1])
    return vmap(mse_loss)(learner(batch[0]), batch[1])


def adapt(learner, loss, style, steps=1, **options):
    """Some gradient steps, or a minimisation, on loss(learner)."""
    if style != "tensor":
        learner.adapt(lambda: loss(learner), **{"steps": steps} if style == "closure" else {})
        return
    for _ in range(steps):
        learner.adapt(loss(learner), **options)


def trained(maml):
    return [p for p in maml.parameters() if p.requires_grad]


def compare(maml, style="tensor", steps=3, loss=error, batches=None, tolerance=1e-10):
    """The adapted weights and the gradients of all tasks, by a loop and at once; both learners."""
    support, query = batches or (data(1), data(2))
    clones, alone = [], 0.0
    for task in range(TASKS):
        learner = maml.clone()
        adapt(learner, lambda it, t=task: loss(it, of(support, t)), style, steps)
        alone = alone + (1 + task) * loss(learner, of(query, task))
        clones.append(learner)
    learner = maml.clone(tasks=TASKS)
    adapt(learner, lambda it: loss(it, support), style, steps)
    losses = loss(learner, query)
    assert losses.shape == (TASKS,)
    together = (losses * torch.arange(1, TASKS + 1)).sum()
    modules = [it.module.parameters() for it in (learner, *clones)]
    for weight, *each in zip(*modules, strict=True):
        each = torch.stack(list(each)).detach()
        near_or_fail(weight.detach().expand_as(each), each, tolerance)
    expected = torch.autograd.grad(alone, trained(maml), allow_unused=True)
    actual = torch.autograd.grad(together, trained(maml), allow_unused=True)
    size = max(g.norm() for g in expected if g is not None)
    assert size > 1e-3
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a - e).norm() <= tolerance * size
    return learner, clones


def near_or_fail(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * max(1.0, expected.norm())


doubled = pytest.mark.usefixtures("double_precision")


WAYS = [
    *itertools.product(STYLES, CURVATURES),
    ("closure", "auto"),
]


@pytest.mark.parametrize(("style", "curvature"), WAYS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_batch_is_the_loop(dtype, style, curvature, double_precision):
    torch.set_default_dtype(dtype)
    tolerance = 1e-10 if dtype == F64 else 1e-6
    for steps in (1, 3):
        compare(wrapped(network(), curvature=curvature), style, steps, tolerance=tolerance)


def lams():
    """λ in every form that batches take, for `network`."""
    shapes = [p.shape for p in network().parameters()]
    return {
        "number": 1.5,
        "tensor": torch.tensor(1.5),
        "Parameter": nn.Parameter(torch.tensor(1.5)),
        "per parameter": [nn.Parameter(torch.rand(()) + 1) for _ in shapes],
        "per element": [nn.Parameter(torch.rand(s) + 1) for s in shapes],
        "fixed": [torch.rand(s) + 1 for s in shapes],
        "mixed": [nn.Parameter(torch.rand(4, 1) + 1), 1.5, 2, nn.Parameter(torch.rand(2) + 1)],
    }


@doubled
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", lams())
def test_lam_and_its_gradient(form, style):
    maml = wrapped(network(), lams()[form])
    compare(maml, style)
    forms = {"Parameter": 1, "per parameter": 4, "per element": 4, "mixed": 2}
    assert len(trained(maml)) == 4 + forms.get(form, 0)


@doubled
@pytest.mark.parametrize("linear_solver", [CG(), CG(rtol=1e-3), CG(maxiter=3, damping=0.2)])
@pytest.mark.parametrize("style", STYLES)
def test_tolerances_and_damping(style, linear_solver):
    compare(wrapped(network(), linear_solver=linear_solver), style, tolerance=1e-9)


@doubled
@pytest.mark.parametrize("how", ["clone", "maml", "no iterations"])
@pytest.mark.parametrize("style", STYLES)
def test_first_order(style, how):
    options = {"linear_solver": CG(maxiter=0)} if how == "no iterations" else {}
    maml = wrapped(network(), first_order=how != "no iterations", **options)
    learner, _ = compare(maml, style)
    assert learner.first_order == (how != "no iterations")
    exact = wrapped(maml.module).clone(first_order=True, tasks=TASKS)
    adapt(exact, lambda it: error(it, data(1)), style, 3)
    near_or_fail(next(exact.parameters()), next(learner.parameters()), 1e-12)


SOLVERS = {
    "GradientDescent": GradientDescent(lr=0.1, steps=7),
    "Nesterov": Nesterov(lr=0.1, steps=7),
    "Adam": TorchOptim(factory=lambda p: torch.optim.Adam(p, lr=0.05), steps=7),
    "NewtonCG": NewtonCG(tol=1e-13),
}


@doubled
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    maml = wrapped(network(), solver=SOLVERS[name], linear_solver=CG(rtol=1e-13))
    compare(maml, "solver", tolerance=1e-9)


@doubled
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_task_has_its_own_statistics(mode, style, curvature):
    """The clones of a loop share their buffers: for the comparison, each has a model of its own."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    getattr(model, mode)()
    before = [b.clone() for b in model.buffers()]
    learner = wrapped(model, curvature=curvature).clone(tasks=TASKS)
    adapt(learner, lambda it: error(it, data(1)), style, 3)
    losses = error(learner, data(2))
    gradient = torch.autograd.grad(losses.sum(), list(model.parameters()))
    assert all(torch.equal(b, was) for b, was in zip(model.buffers(), before, strict=True))
    total = [torch.zeros_like(g) for g in gradient]
    for task in range(TASKS):
        twin = copy.deepcopy(model)
        alone = wrapped(twin, curvature=curvature).clone()
        own = of(data(1), task)
        adapt(alone, lambda it, own=own: error(it, own), style, 3)
        loss = error(alone, of(data(2), task))
        near_or_fail(losses[task], loss, 1e-12)
        each = torch.autograd.grad(loss, list(twin.parameters()))
        total = [t + g for t, g in zip(total, each, strict=True)]
        for stacked, buffer in zip(learner.buffers(), alone.buffers(), strict=True):
            near_or_fail(stacked[task].double(), buffer.double(), 1e-12)
    for actual, expected in zip(gradient, total, strict=True):
        assert (actual - expected).norm() <= 1e-10 * max(g.norm() for g in total)


class Counter(nn.Module):
    """Assigns its buffer anew, and has another under two names."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(3, 2), nn.Module()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.other.register_buffer("calls", self.calls)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.calls += 1
        return self.linear(x) + self.mean.sum() + self.other.calls


@doubled
@pytest.mark.parametrize("style", STYLES)
def test_buffers_that_are_assigned_or_shared(style):
    model, support, query = Counter(), data(1), data(2)
    learner = wrapped(model).clone(tasks=TASKS)
    adapt(learner, lambda it: error(it, support), style, 3)
    losses = error(learner, query)
    for task in range(TASKS):
        alone = wrapped(copy.deepcopy(model)).clone()
        adapt(alone, lambda it, t=task: error(it, of(support, t)), style, 3)
        near_or_fail(losses[task], error(alone, of(query, task)), 1e-12)
        for name, buffer in alone.module.named_buffers():
            near_or_fail(dict(learner.module.named_buffers())[name][task], buffer, 1e-12)
    assert learner.module.calls is learner.module.other.calls


@doubled
@pytest.mark.parametrize("style", STYLES)
def test_dropout_has_a_mask_for_each_task_and_keeps_it(style):
    """The products are those of the loss with its mask: with the exact solve, A u = v."""
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 2, bias=False))
    maml = wrapped(model, 6.0, linear_solver=CG(rtol=1e-13), on_failure="raise")
    learner = maml.clone(tasks=TASKS)
    same = torch.ones(1, 6, 3).expand(TASKS, 6, 3)
    outputs = learner(same)
    assert not torch.equal(outputs[0], outputs[1])
    start = list(learner.parameters())
    masks = torch.get_rng_state()
    adapt(learner, lambda it: error(it, data(1)), style)
    point = start if style == "tensor" else list(learner.parameters())
    end, v = list(learner.parameters()), [normal(*p.shape, seed=1, grad=False) for p in start]
    fixed = maml.clone(tasks=TASKS)
    fixed._weights.install(tuple(p.detach().clone().requires_grad_() for p in point))
    inner = torch.autograd.grad(
        sum((e * w).sum() for e, w in zip(end, v, strict=True)), list(maml.parameters())
    )
    # by hand, at the same point with the same masks: they are drawn as often as adapt calls
    torch.set_rng_state(masks)
    if style == "closure":
        error(fixed, data(1))
    loss = error(fixed, data(1)).sum()
    weights = list(fixed.parameters())
    slope = torch.autograd.grad(loss, weights, create_graph=True)
    flat = torch.cat([g.flatten(1) for g in slope], 1)
    rows = []
    for j in range(flat.shape[1]):
        each = torch.autograd.grad(flat[:, j].sum(), weights, retain_graph=True)
        rows.append(torch.cat([g.flatten(1) for g in each], 1))
    matrix = torch.stack(rows, 1) + 6.0 * torch.eye(flat.shape[1])
    u = torch.linalg.solve(matrix, torch.cat([w.flatten(1) for w in v], 1))
    expected = 6.0 * u.sum(0)
    actual = torch.cat([g.flatten() for g in inner])
    assert (actual - expected).norm() <= 1e-10 * expected.norm()


@doubled
@pytest.mark.parametrize("style", STYLES)
def test_tied_unused_and_frozen_parameters(style):
    model = Tied()
    model.encode.bias.requires_grad_(False)
    maml = wrapped(model, allow_unused=True, allow_nograd=True)
    batches = data(1, outputs=3), data(2, outputs=3)
    learner, _ = compare(maml, style, batches=batches)
    module = learner.module
    assert module.encode.weight is module.decode.weight
    assert module.encode.weight.shape == (TASKS, 3, 3)
    assert torch.equal(module.encode.bias, model.encode.bias)  # one for all
    for names, words in (({"allow_unused": False}, "spare"), ({"allow_nograd": False}, "encode")):
        learner = maml.clone(tasks=TASKS, **names)
        with pytest.raises(ig.InvalidArgumentError, match=words):
            adapt(learner, lambda it: error(it, batches[0]), style)


class Containers(nn.Module):
    """Takes and returns containers."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, batch, *, shift, mode):
        assert mode == "both"
        first, second = self.net(batch["x"][0] + shift).unbind(1)
        return {"first": first, "rest": (second, None)}


@doubled
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
def test_containers_of_inputs_and_outputs(style, curvature):
    def loss(learner, batch):
        X, y = batch
        found = learner({"x": (X, X)}, shift=X[..., :1], mode="both")
        output = torch.stack([found["first"], found["rest"][0]], -1)
        assert found["rest"][1] is None
        return (output - y).square().mean((-1, -2))

    compare(wrapped(Containers(), curvature=curvature), style, loss=loss)


MODELS = {
    "MiniImagenetCNN": (lambda: l2l.vision.models.MiniImagenetCNN(3, hidden_size=4), (3, 84, 84)),
    "OmniglotCNN": (lambda: l2l.vision.models.OmniglotCNN(3, hidden_size=4), (28, 28)),
    "OmniglotFC": (lambda: l2l.vision.models.OmniglotFC(49, 3, sizes=[8, 6]), (1, 7, 7)),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_learn2learns_networks(dtype, name, style, curvature, double_precision):
    torch.set_default_dtype(dtype)
    make, shape = MODELS[name]
    labels = torch.arange(3).expand(TASKS, 3)
    batches = tuple((torch.rand(TASKS, 3, *shape), labels) for _ in range(2))

    def loss(learner, batch):
        each = cross_entropy if learner.tasks is None else vmap(cross_entropy)
        return each(learner(batch[0]), batch[1])

    maml = wrapped(make(), 1.0, 0.05, curvature=curvature, linear_solver=CG(maxiter=2))
    compare(maml, style, 2, loss, batches, 1e-9 if dtype == F64 else 1e-4)


@doubled
def test_features_outside_get_their_cross_derivative():
    body, (X, y), (Q, t) = network(outputs=4), data(1), data(2)
    maml = wrapped(nn.Linear(4, 2), 0.9, 0.3)
    gradients = []
    for batched in (False, True):
        features, far = body(X), body(Q)
        if batched:
            learner = maml.clone(tasks=TASKS)
            adapt(learner, lambda it, f=features: error(it, (f, y)), "tensor", 3)
            total = error(learner, (far, t)).sum()
        else:
            total = 0.0
            for task in range(TASKS):
                learner = maml.clone()
                support = of((features, y), task)
                adapt(learner, lambda it, s=support: error(it, s), "tensor", 3)
                total = total + error(learner, of((far, t), task))
        gradients.append(torch.autograd.grad(total, [*body.parameters(), *maml.parameters()]))
    for actual, expected in zip(*gradients, strict=True):
        assert (actual - expected).norm() <= 1e-10 * expected.norm()


@doubled
@pytest.mark.parametrize("style", STYLES)
def test_a_clone_of_a_batched_learner_goes_on_from_it(style):
    maml, support, query = wrapped(network()), data(1), data(2)
    first = maml.clone(tasks=TASKS)
    adapt(first, lambda it: error(it, support), style, 2)
    second = first.clone()
    assert second.tasks == TASKS
    adapt(second, lambda it: error(it, query), style, 2)
    actual = torch.autograd.grad(error(second, data(3)).sum(), trained(maml))
    alone = 0.0
    for task in range(TASKS):
        outer = maml.clone()
        adapt(outer, lambda it, t=task: error(it, of(support, t)), style, 2)
        inner = outer.clone()
        adapt(inner, lambda it, t=task: error(it, of(query, t)), style, 2)
        alone = alone + error(inner, of(data(3), task))
    expected = torch.autograd.grad(alone, trained(maml))
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-10 * e.norm()


@doubled
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("curvature", ["auto", "hessian"])
def test_second_derivatives(curvature, learned):
    lam = nn.Parameter(torch.tensor(2.0)) if learned else 2.0
    maml = wrapped(
        network(), lam, solver=NewtonCG(tol=1e-13), curvature=curvature, on_failure="raise",
        linear_solver=CG(rtol=1e-13),
    )  # fmt: skip
    support, query = data(1), data(2)

    def curved(total):
        first = torch.autograd.grad(total, trained(maml), create_graph=True)
        inner = sum((g * (1 + g.cos())).sum() for g in first)
        return torch.autograd.grad(inner, trained(maml))

    alone = 0.0
    for task in range(TASKS):
        learner = maml.clone()
        learner.adapt(lambda it=learner, t=task: error(it, of(support, t)))
        alone = alone + error(learner, of(query, task))
    learner = maml.clone(tasks=TASKS)
    learner.adapt(lambda: error(learner, support))
    actual, expected = curved(error(learner, query).sum()), curved(alone)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-8 * e.norm()


@doubled
def test_outer_losses_at_several_steps():
    maml, support, query = wrapped(network()), data(1), data(2)

    def total(learner, support, query):
        result = 0.0
        for _ in range(3):
            learner.adapt(lambda: error(learner, support))
            result = result + error(learner, query).sum()
        return result

    tasks = range(TASKS)
    alone = sum(total(maml.clone(), of(support, t), of(query, t)) for t in tasks)
    expected = torch.autograd.grad(alone, trained(maml))
    actual = torch.autograd.grad(total(maml.clone(tasks=TASKS), support, query), trained(maml))
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-10 * e.norm()


# ---------------------------------------------------------------- reports and trouble


@doubled
@pytest.mark.parametrize("linear_solver", [CG(maxiter=3), CG()])
@pytest.mark.parametrize("style", STYLES)
def test_a_report_for_each_task(style, linear_solver):
    monitor = ig.Monitor()
    maml = wrapped(network(), monitor=monitor, linear_solver=linear_solver)
    compare(maml, style)
    alone, together = monitor.reports[:TASKS], monitor.reports[TASKS:]
    assert len(together) == TASKS
    for report in together:  # autograd runs the backward passes of a loop in its own order
        other = min(alone, key=lambda r: abs(r.inner_residual - report.inner_residual))
        alone.remove(other)
        for name, value in vars(other).items():
            if name == "products" and linear_solver.maxiter is None:
                continue  # all tasks wait for the slowest
            if isinstance(value, float):
                assert getattr(report, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name
            else:
                assert getattr(report, name) == value, name


@doubled
@pytest.mark.parametrize("style", STYLES)
def test_only_the_bad_task_is_warned_of_or_raised(style):
    """The second task's loss has a Hessian of about −10 everywhere."""

    def loss(learner, batch):
        fine = error(learner, batch)
        weights = torch.cat([p.flatten(1) for p in learner.parameters()], 1)
        return fine - torch.tensor([0.0, 5.0, 0.0]) * weights.square().sum(1)

    def backward(on_failure, bad=True):
        monitor = ig.Monitor()
        maml = wrapped(network(), 5.0, monitor=monitor, on_failure=on_failure)
        learner = maml.clone(tasks=TASKS)
        adapt(learner, lambda it: (loss if bad else error)(it, data(1)), style)
        losses = error(learner, data(2))
        losses.sum().backward()
        return monitor

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monitor = backward("warn")
    assert len(seen) == 1 and "non-positive curvature" in str(seen[0].message)
    statuses = [r.status for r in monitor.reports]
    assert statuses == [Status.TRUNCATED, Status.NEGATIVE_CURVATURE, Status.TRUNCATED]
    assert [r.min_curvature < 0 for r in monitor.reports] == [False, True, False]
    with pytest.raises(ig.LinearSolveError, match="non-positive curvature") as raised:
        backward("raise")
    assert raised.value.report.status == Status.NEGATIVE_CURVATURE
    backward("ignore")
    backward("raise", bad=False)


@doubled
def test_a_task_with_nan_leaves_the_others_alone():
    """What they share is the sum of their gradients only."""
    monitor, (X, y) = ig.Monitor(), data(1)
    maml, outcomes = wrapped(network(), monitor=monitor, linear_solver=CG()), []
    for bad in (1.0, torch.nan):
        learner = maml.clone(tasks=TASKS)
        support = X * torch.tensor([1.0, bad, 1.0])[:, None, None]
        adapt(learner, lambda it, s=support: error(it, (s, y)), "tensor", 2)
        losses = error(learner, data(2))
        losses.sum().backward()
        outcomes.append((losses[::2].tolist(), monitor.reports[::2]))
        assert losses[1].isnan() == (monitor.reports[1].status == Status.NONFINITE_RHS)
        assert losses[1].isnan() == math.isnan(bad)
        monitor.clear()
    (clean, alone), (mixed, beside) = outcomes
    assert clean == mixed
    assert [dataclasses.replace(r, products=0) for r in alone] == [
        dataclasses.replace(r, products=0) for r in beside
    ]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ending", ["nothing", "query", "backward"])
def test_a_learner_is_gone_with_its_last_reference(ending, style, curvature, double_precision):
    maml = wrapped(network(), nn.Parameter(torch.tensor(2.0)), curvature=curvature)
    for p in maml.parameters():
        p.grad = torch.zeros_like(p)

    def task():
        learner = maml.clone(tasks=TASKS)
        adapt(learner, lambda it: error(it, data(1)), style, 2)
        watched = [weakref.ref(o) for o in (learner, learner.module, *learner.module.parameters())]
        if ending != "nothing":
            loss = error(learner, data(2)).sum()
            if ending == "backward":
                loss.backward()
        return watched

    with no_garbage_collector():
        task()
        assert [w() for w in task()] == [None] * 6
        before = count_tensors()
        for _ in range(20):
            task()
        assert count_tensors() == before


# ---------------------------------------------------------------- bad input


def state(maml):
    """All that a user has in a learner, by identity and by value."""
    kept = [*maml.parameters(), *maml.buffers()]
    return [id(t) for t in kept], [t.detach().clone() for t in kept]


def unchanged(maml, before):
    ids, values = state(maml)
    return ids == before[0] and all(map(torch.equal, values, before[1]))


PLAIN = "CG without preconditioner and warm start"
LOW_RANK = ig.LowRank((1.0,) * 4, tuple(torch.ones(*p.shape, 1) for p in network().parameters()))
BAD_CLONES = {
    "0": (0, {}, r"clone\(tasks=0\): expected None or an integer of at least 1"),
    "-1": (-1, {}, r"clone\(tasks=-1\): expected"),
    "True": (True, {}, r"clone\(tasks=True\): expected"),
    "string": ("3", {}, r"clone\(tasks='3'\): expected"),
    "float": (3.0, {}, r"clone\(tasks=3\.0\): expected"),
    "MINRES": (3, {"linear_solver": ig.MINRES()}, f"{PLAIN}.*got MINRES"),
    "Exact": (3, {"linear_solver": ig.Exact()}, f"{PLAIN}.*got Exact"),
    "Neumann": (3, {"linear_solver": ig.Neumann()}, f"{PLAIN}.*got Neumann"),
    "Jacobi": (3, {"linear_solver": CG(preconditioner=ig.Jacobi())}, f"{PLAIN}.*got CG"),
    "warm": (3, {"linear_solver": CG(warm_start=ig.WarmStart())}, f"{PLAIN}.*got CG"),
    "minres": (3, {"linear_solver": CG(on_negative_curvature="minres")}, '"stop" or "raise"; got'),
    "LowRank": (3, {"lam": LOW_RANK}, "lam must not be a LowRank matrix"),
}


@pytest.mark.parametrize("case", BAD_CLONES)
def test_bad_clones_are_refused(case):
    tasks, options, sentence = BAD_CLONES[case]
    model = nn.Sequential(*network(), nn.BatchNorm1d(2)) if "lam" not in options else network()
    maml = wrapped(model, **options)
    before = state(maml)
    with pytest.raises(ig.InvalidArgumentError, match=sentence):
        maml.clone(tasks=tasks)
    assert unchanged(maml, before)
    assert maml.tasks is None


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks_are_refused(kind):
    maml = wrapped(nn.Sequential(kind(2, 3), nn.Linear(3, 1)))
    with pytest.raises(ig.InvalidArgumentError, match=rf"no rule for nn\.{kind.__name__}; clone"):
        maml.clone(tasks=3)


@doubled
def test_attention_is_called_for_all_tasks():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, 0.0), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(torch.cat([x, x[:, :1]], 1)))

    compare(wrapped(Attention(), linear_solver=CG(maxiter=2)))


def test_a_network_without_trainable_parameters_can_be_called():
    model = network().requires_grad_(False)
    learner = wrapped(model, allow_nograd=True).clone(tasks=TASKS)
    X = data()[0]
    assert torch.allclose(learner(X), model(X))
    with pytest.raises(ig.InvalidArgumentError, match="no parameter that requires grad"):
        adapt(learner, lambda it: error(it, data()), "tensor")


def test_a_batch_of_batches_is_refused():
    learner = wrapped(network()).clone(tasks=3)
    for tasks in (3, 4):
        with pytest.raises(ig.InvalidArgumentError, match="this learner has 3 tasks already"):
            learner.clone(tasks=tasks)


BAD_INPUTS = {
    "no dimension": (lambda: torch.tensor(1.0), r"got a float32 tensor of shape \(\)"),
    "one task": (lambda: torch.zeros(6, 3), r"got a float32 tensor of shape \(6, 3\)"),
    "too few": (lambda: torch.zeros(2, 6, 3), r"got a float32 tensor of shape \(2, 6, 3\)"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_without_the_tasks_are_refused(case):
    make, seen = BAD_INPUTS[case]
    learner = wrapped(nn.Sequential(nn.BatchNorm1d(3), *network())).clone(tasks=TASKS)
    before = state(learner)
    with pytest.raises(
        ig.InvalidArgumentError, match=f"with tasks=3, the first dimension of each input.*{seen}"
    ):
        learner(make())
    assert unchanged(learner, before)


BAD_LOSSES = {
    "scalar": (lambda losses: losses.sum(), r"shape \(\)"),
    "too few": (lambda losses: losses[:2], r"shape \(2,\)"),
    "column": (lambda losses: losses[:, None], r"shape \(3, 1\)"),
    "None": (lambda losses: None, "got None"),
    "integers": (lambda losses: losses.long(), r"got an int64 tensor of shape \(3,\)"),
    "number": (lambda losses: 3.0, "got a float"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", BAD_LOSSES)
def test_losses_of_another_shape_are_refused(case, style):
    change, seen = BAD_LOSSES[case]
    maml = wrapped(network())
    learner = maml.clone(tasks=TASKS)
    before, original = state(learner), state(maml)
    sentence = rf"one number for each of 3 tasks, .*shape \(3,\), such as torch\.func.*{seen}"
    if (case, style) == ("number", "tensor") or (case, style) == ("None", "tensor"):
        sentence = "adapt: loss must be"
    with pytest.raises(ig.InvalidArgumentError, match=sentence):
        adapt(learner, lambda it: change(error(it, data(1))), style)
    assert unchanged(learner, before)
    assert unchanged(maml, original)
    adapt(learner, lambda it: error(it, data(1)), style)
    assert not unchanged(learner, before)


def test_a_learner_without_tasks_is_as_before():
    learner = wrapped(network()).clone(tasks=None)
    assert isinstance(learner, ImplicitMAML)
    assert learner.tasks is None
