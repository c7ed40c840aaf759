"""Batches of tasks: clone(tasks=...) against the loop over clones."""

import contextlib
import copy
import dataclasses
import itertools
import math
import warnings
import weakref

import pytest
import torch
from learners import learn2learn
from problems import Tied, count_tensors, no_garbage_collector, normal
from torch import nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, mse_loss

import implicit_grad as ig
from implicit_grad import CG, Status
from implicit_grad.learn2learn import ImplicitMAML
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOptim

F32, F64 = torch.float32, torch.float64
STYLES = ("tensor", "closure")
CURVATURES = ("hessian", "gauss_newton")
TASKS = 3


def wrapped(model, lam=2.0, lr=0.1, **options):
    """The model as an imaml; MAML's options and imaml's together."""
    names = ("first_order", "allow_unused", "allow_nograd")
    theirs = {k: options.pop(k) for k in names if k in options}
    maml = ig.imaml(model, lam, lr=lr, **{"on_failure": "ignore", **options})
    vars(maml).update(theirs)
    return maml


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
    "MiniImagenetCNN": (lambda m: m.MiniImagenetCNN(3, hidden_size=4), (3, 84, 84)),
    "OmniglotCNN": (lambda m: m.OmniglotCNN(3, hidden_size=4), (28, 28)),
    "OmniglotFC": (lambda m: m.OmniglotFC(49, 3, sizes=[8, 6]), (1, 7, 7)),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_learn2learns_networks(dtype, name, style, curvature, double_precision):
    torch.set_default_dtype(dtype)
    make, shape = MODELS[name]
    labels = torch.arange(3).expand(TASKS, 3)

    def loss(learner, batch):
        each = cross_entropy if learner.tasks is None else vmap(cross_entropy)
        return each(learner(batch[0]), batch[1])

    def compare_on_random_images():
        model = make(learn2learn().vision.models)
        batches = tuple((torch.rand(TASKS, 3, *shape), labels) for _ in range(2))
        maml = wrapped(model, 1.0, 0.05, curvature=curvature, linear_solver=CG(maxiter=2))
        compare(maml, style, 2, loss, batches, 1e-9 if dtype == F64 else 1e-3)

    # In float32 rounding chooses between almost equal maxima of a pool, a kink in the loss: of six
    # draws, one had a gradient 1e-2 off in the loop as in the batch. A wrong batch fails always.
    for _ in range(0 if dtype == F64 else 4):
        with contextlib.suppress(AssertionError):
            compare_on_random_images()
            return
    compare_on_random_images()


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
        for _ in range(4):
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
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # an older torch's
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
