"""imaml: gradients, memory, what it leaves alone, and what it refuses."""

import copy
import subprocess
import sys
import textwrap
import warnings
import weakref
from types import SimpleNamespace

import learn2learn as l2l
import pytest
import torch
from problems import Tied, count_tensors, minimize, no_garbage_collector, normal, wavy
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn.functional import cross_entropy, mse_loss

import implicit_grad as ig
from implicit_grad._theorem.linearization import Linearization
from implicit_grad.solvers import NewtonCG
from implicit_grad.testing import peak_memory

STYLES = ("tensor", "closure")
CURVATURES = ("hessian", "gauss_newton")
EXACT = {"linear_solver": ig.Exact(), "on_failure": "raise"}


pytestmark = pytest.mark.usefixtures("double_precision")


def wrapped(model, lam=2.0, lr=0.2, **options):
    """The model as an imaml; MAML's options and imaml's together."""
    names = ("first_order", "allow_unused", "allow_nograd")
    theirs = {k: options.pop(k) for k in names if k in options}
    return ig.imaml(l2l.algorithms.MAML(model, lr=lr, **theirs), lam=lam, **options)


def network(inputs=3, hidden=4, outputs=2):
    """A small network that is not linear in its weights."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def data(seed=1, inputs=3, outputs=2, size=6):
    """A support or query set."""
    X = normal(size, inputs, seed=seed, grad=False)
    return X, normal(size, outputs, seed=seed + 50, grad=False)


def error(learner, batch):
    """The loss of most tasks here."""
    return mse_loss(learner(batch[0]), batch[1])


def adapt(learner, loss, style, steps=1, **options):
    """Some gradient steps on loss(learner), in either style."""
    if style == "closure":
        learner.adapt(lambda: loss(learner), steps=steps, **options)
        return
    for _ in range(steps):
        learner.adapt(loss(learner), **options)


def outer(learner):
    """A function of all the learner's weights, with no symmetry."""
    return wavy(list(learner.module.parameters()))


def gradients(loss, maml):
    """The loss's derivatives with respect to all that is trained."""
    trained = [p for p in maml.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, retain_graph=True)


def close(actual, expected, tolerance=1e-8):
    """Equal relative to the size of what is expected, one by one, none of it zero."""
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert e.norm() > 1e-6
        assert (a - e).norm() <= tolerance * e.norm()


def same(actual, expected):
    """Bitwise equal, one by one."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def flat(tensors):
    """One vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def dense(model, values, loss, v, lam, curved=None):
    """λ (∇²loss + λ)⁻¹ v with dense matrices; `loss(call)` gets the model as a function.

    `curved(flat function of the weights)` replaces the Hessian.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in trained.values()]

    def unflat(vector):
        parts = vector.split([s.numel() for s in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return dict(zip(trained, parts, strict=True))

    def call_at(vector):
        return lambda *args: functional_call(model, unflat(vector), args)

    point = flat(values)
    if curved is None:
        matrix = jacrev(grad(lambda w: loss(call_at(w))))(point)
    else:
        matrix = curved(call_at, point)
    u = torch.linalg.solve(matrix + lam * torch.eye(len(point)), flat(v))
    return list(unflat(lam * u).values()), matrix


def weights_of(learner):
    """The learner's present weights, those that are trained."""
    return [p for p in learner.module.parameters() if p.requires_grad]


# ---------------------------------------------------------------- closed form


LINEAR = {"weight": (2, 3), "bias": (2,)}


def lam_forms():
    """λ in every form that imaml takes, of the same order of magnitude."""
    return {
        "float": 0.7,
        "tensor": torch.tensor(0.7),
        "Parameter": nn.Parameter(torch.tensor(0.7)),
        "list": [nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.1))],
        "dict": {n: nn.Parameter(torch.tensor(0.7 + len(s))) for n, s in reversed(LINEAR.items())},
        "mixed": [nn.Parameter(torch.tensor(0.7)), 1.1],
        "per element": [nn.Parameter(torch.rand(*s) + 0.5) for s in LINEAR.values()],
        "fixed": [torch.rand(*s) + 0.5 for s in LINEAR.values()],
        "per output": [nn.Parameter(torch.rand(2, 1) + 0.5), 0.9],
    }


def linear_regression(theta, lam, batch):
    """The minimum in closed form, row by row: (ZᵀZ/n + λ) w = Zᵀy/n + λθ with Z = [X, 1]."""
    X, y = batch
    if isinstance(lam, dict):
        lam = [lam[name] for name in LINEAR]
    lams = lam if isinstance(lam, list) else [lam, lam]
    parts = [torch.as_tensor(w).expand(s) for w, s in zip(lams, LINEAR.values(), strict=True)]
    spread, start = (torch.cat([w, b[:, None]], 1) for w, b in (parts, theta))
    Z = torch.cat([X, torch.ones(len(X), 1)], 1)
    rows = [
        torch.linalg.solve(Z.T @ Z / len(X) + torch.diag(w), Z.T @ y[:, i] / len(X) + w * t)
        for i, (w, t) in enumerate(zip(spread, start, strict=True))
    ]
    solution = torch.stack(rows)
    return solution[:, :-1], solution[:, -1]


def newton(objective, init):
    """A solver for imaml: Newton's method."""
    return minimize(objective, init)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", ["tensor", "closure", "function", "minimiser"])
@pytest.mark.parametrize("form", lam_forms())
def test_linear_regression_meets_the_closed_form(form, style, curvature):
    lam, batch = lam_forms()[form], data()
    solver = {"function": newton, "minimiser": ig.solvers.GradientDescent(lr=0.2, tol=1e-12)}
    maml = wrapped(
        nn.Linear(3, 2),
        lam=lam,
        lr=0.2,
        solver=solver.get(style),
        linear_solver=ig.CG(rtol=1e-13),
        curvature=curvature,
        on_failure="raise",
    )
    learner = maml.clone()
    if style in solver:
        learner.adapt(lambda: error(learner, batch))
    else:
        adapt(learner, lambda it: error(it, batch), style, steps=250)
    reference = linear_regression(tuple(maml.module.parameters()), lam, batch)
    close(list(learner.module.parameters()), list(reference))
    close(gradients(outer(learner), maml), gradients(wavy(list(reference)), maml))


@pytest.mark.parametrize("linear_solver", [ig.Exact(), ig.NormalCG(rtol=1e-12), ig.CG(rtol=1e-12)])
@pytest.mark.parametrize("style", STYLES)
def test_every_linear_solver_agrees(style, linear_solver):
    maml, batch = wrapped(nn.Linear(3, 2), linear_solver=linear_solver), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, batch), style, steps=200)
    reference = linear_regression(tuple(maml.module.parameters()), 2.0, batch)
    close(gradients(outer(learner), maml), gradients(wavy(list(reference)), maml))


@pytest.mark.parametrize("style", ["tensor", "closure", "solver"])
def test_maml_unrolled_to_convergence_has_the_same_gradient(style):
    model, support, query, lam, lr = network(), data(1), data(2), 3.0, 0.15
    theta = dict(model.named_parameters())
    phi = theta
    for _ in range(100):
        loss = mse_loss(functional_call(model, phi, support[0]), support[1])
        pull = sum((phi[n] - theta[n]).square().sum() for n in theta)
        slope = torch.autograd.grad(loss + lam / 2 * pull, list(phi.values()), create_graph=True)
        phi = {n: p - lr * g for (n, p), g in zip(phi.items(), slope, strict=True)}
    unrolled = mse_loss(functional_call(model, phi, query[0]), query[1])
    maml = wrapped(model, lam, lr, solver=newton if style == "solver" else None, **EXACT)
    learner = maml.clone()
    if style == "solver":
        learner.adapt(lambda: error(learner, support))
    else:
        adapt(learner, lambda it: error(it, support), style, steps=100)
    close(list(learner.parameters()), list(phi.values()))
    close(gradients(error(learner, query), maml), gradients(unrolled, maml))


@pytest.mark.parametrize("style", STYLES)
def test_far_from_convergence_the_hessian_is_where_it_is_said_to_be(style):
    """At the last iterate but one for a tensor, at the solution for a function."""
    maml, batch = wrapped(network(), **EXACT), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, batch), style, steps=2)
    point = weights_of(learner)
    adapt(learner, lambda it: error(it, batch), style)
    point = point if style == "tensor" else weights_of(learner)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    expected, _ = dense(maml.module, point, lambda call: error(call, batch), v, 2.0)
    close(gradients(outer(learner), maml), expected, 1e-11)


# ---------------------------------------------------------------- Gauss-Newton


LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def far_off(output):
    """A squared error with a target so far away that the Hessian is indefinite."""
    return mse_loss(output, torch.full_like(output, 20.0))


def on_labels(output):
    """A cross-entropy."""
    return 5 * cross_entropy(output, LABELS)


def gauss_newton(inputs, criterion):
    """Jᵀ (∂²loss/∂output²) J, for `dense`."""

    def matrix(call_at, point):
        output = call_at(point)(inputs)
        jacobian = jacrev(lambda w: call_at(w)(inputs))(point).flatten(0, 1)
        curved = jacrev(grad(lambda o: criterion(o.view_as(output))))(output.flatten())
        return jacobian.T @ curved @ jacobian

    return matrix


@pytest.mark.parametrize("criterion", [on_labels, far_off])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("linear_solver", [ig.Exact(), ig.CG(rtol=1e-13)], ids=["Exact", "CG"])
def test_gauss_newton_is_the_dense_matrix(linear_solver, style, criterion):
    inputs, lam, monitor = data()[0], 0.3, ig.Monitor()
    options = {"linear_solver": linear_solver, "monitor": monitor, "on_failure": "raise"}
    maml = wrapped(network(), lam, 0.01, curvature="gauss_newton", **options)
    learner = maml.clone()
    adapt(learner, lambda it: criterion(it(inputs)), style, steps=2)
    point = weights_of(learner)
    adapt(learner, lambda it: criterion(it(inputs)), style)
    point = point if style == "tensor" else weights_of(learner)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    formed = gauss_newton(inputs, criterion)
    expected, matrix = dense(maml.module, point, None, v, lam, formed)
    close(gradients(outer(learner), maml), expected)
    assert monitor.last.curvature == "gauss_newton"
    assert monitor.last.min_curvature >= lam * (1 - 1e-9)
    least = float(torch.linalg.eigvalsh(matrix)[0])
    if isinstance(linear_solver, ig.Exact):
        assert abs(monitor.last.min_curvature - lam - least) < 1e-8
    _, full = dense(maml.module, point, lambda call: criterion(call(inputs)), v, lam)
    assert torch.linalg.eigvalsh(full)[0] < -0.05, "here the Hessian itself is indefinite"
    assert not torch.allclose(full, matrix)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", ["penalty", "two calls", "module", "weights only"])
def test_gauss_newton_refuses_losses_that_are_not_of_one_output(case, style):
    maml, (X, y) = wrapped(network(), curvature="gauss_newton"), data()
    losses = {
        "penalty": lambda it: mse_loss(it(X), y) + sum(p.square().sum() for p in it.parameters()),
        "two calls": lambda it: mse_loss(it(X), y) + mse_loss(it(X[:2]), y[:2]),
        "module": lambda it: mse_loss(it.module(X), y),
        "weights only": lambda it: sum(p.square().sum() for p in it.parameters()),
    }
    learner = maml.clone()
    with pytest.raises(ig.GraphError, match=r"function of the output of one.*curvature=\"hessian"):
        adapt(learner, losses[case], style)
    same(learner.parameters(), maml.parameters())
    adapt(learner, lambda it: error(it, (X, y)), style)
    assert all(g.norm() > 0 for g in gradients(outer(learner), maml))


class Several(nn.Module):
    """A network that returns a container."""

    def __init__(self, net, container):
        super().__init__()
        self.net, self.container = net, container

    def forward(self, x):
        first, second = self.net(x).unbind(1)
        return {
            dict: {"first": first, "second": second, "mask": None, "sizes": torch.arange(2)},
            tuple: (first, [second]),
        }[self.container]


@pytest.mark.parametrize("container", [dict, tuple])
def test_gauss_newton_through_containers_of_outputs(container):
    net, (X, y) = network(), data()

    def loss(output):
        if isinstance(output, dict):
            output = output["first"], [output["second"]]
        if isinstance(output, tuple):
            output = torch.stack([output[0], output[1][0]], 1)
        return mse_loss(output, y) + (output[:, 0] * output[:, 1]).exp().mean()

    outcomes = []
    for model in (net, Several(net, container)):
        maml = wrapped(model, curvature="gauss_newton", **EXACT)
        learner = maml.clone()
        adapt(learner, lambda it: loss(it(X)), "tensor", steps=3)
        outcomes.append(gradients(outer(learner), maml))
    close(*outcomes, 1e-12)


def test_gauss_newton_finds_the_call_that_the_loss_came_from():
    outcomes = []
    for spectators in (False, True):
        torch.manual_seed(1)
        maml = wrapped(network(), curvature="gauss_newton", **EXACT)
        learner, loss = maml.clone(), None
        if spectators:
            learner(data(7)[0])
        loss = error(learner, data(1))
        if spectators:
            learner(data(8)[0])
        learner.adapt(loss)
        outcomes.append(gradients(outer(learner), maml))
    same(*outcomes)


# ---------------------------------------------------------------- ANIL: features outside


def head_in_closed_form(features, targets, theta, lam):
    """(FᵀF c + λ) Wᵀ = c Fᵀy + λ θᵀ for a linear head without bias; as differentiable as torch."""
    c = 2 / targets.numel()
    matrix = c * features.T @ features + lam * torch.eye(features.shape[1])
    return torch.linalg.solve(matrix, c * features.T @ targets + lam * theta.T).T


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("leaf", [False, True], ids=["network", "leaf"])
def test_features_outside_get_their_cross_derivative(leaf, style, curvature):
    body, lam, support, query = network(outputs=4), 0.9, data(1), data(2)
    maml = wrapped(nn.Linear(4, 2, bias=False), lam, 0.5, curvature=curvature, **EXACT)
    theta = maml.module.weight
    features, far = body(support[0]), body(query[0])
    if leaf:
        features, far = features.detach().requires_grad_(), far.detach()
    wanted = [theta, features] if leaf else [theta, *body.parameters()]
    learner = maml.clone()
    adapt(learner, lambda it: mse_loss(it(features), support[1]), style, steps=250)
    actual = torch.autograd.grad(mse_loss(learner(far), query[1]), wanted, retain_graph=True)
    solved = head_in_closed_form(features, support[1], theta, lam)
    expected = torch.autograd.grad(mse_loss(far @ solved.T, query[1]), wanted, retain_graph=True)
    close(actual, expected)
    if not leaf:
        alone = torch.autograd.grad(mse_loss(far @ solved.detach().T, query[1]), wanted[1:])
        assert not torch.allclose(alone[0], expected[1]), "the cross-derivative matters here"


@pytest.mark.parametrize("style", STYLES)
def test_one_backward_for_several_tasks_is_the_sum_of_their_backwards(style):
    body = network(outputs=4)
    maml = wrapped(nn.Linear(4, 2), 0.9, 0.5)
    optimised = [*body.parameters(), *maml.parameters()]

    def task(index, features, far):
        learner = maml.clone()
        adapt(learner, lambda it: mse_loss(it(features), data(index)[1]), style, steps=3)
        return mse_loss(learner(far), data(index + 10)[1])

    def alone(index):
        return task(index, body(data(index)[0]), body(data(index + 10)[0]))

    def backward(losses):
        for p in optimised:
            p.grad = None
        for loss in losses:
            loss.backward()
        return [p.grad for p in optimised]

    apart = backward(alone(i) for i in range(3))
    together = backward([sum(alone(i) for i in range(3))])
    close(together, apart, 1e-13)
    batch = body(torch.cat([data(i)[0] for i in (0, 1, 2, 10, 11, 12)])).split(6)
    shared = backward([sum(task(i, batch[i], batch[i + 3]) for i in range(3))])
    close(shared, apart, 1e-13)


# ---------------------------------------------------------------- outer losses at several steps


def quadratic(batch, lam):
    """The Jacobian dφ/dθ = λ (H + λ)⁻¹ of every solution of `error` on a linear layer, by hand."""
    Z = torch.cat([batch[0], torch.ones(len(batch[0]), 1)], 1)
    return lam * torch.linalg.inv(Z.T @ Z / len(Z) + lam * torch.eye(4))


@pytest.mark.parametrize("kinds", ["ccc", "tc", "cct", "ctc"])
def test_outer_losses_at_several_steps(kinds):
    """Right through functions (c); a tensor (t) serves until the next one supersedes it."""
    lam = nn.Parameter(torch.tensor(0.7))
    maml, support, query = wrapped(nn.Linear(3, 2), lam, 0.3, **EXACT), data(1), data(2)
    jacobian = quadratic(support, 0.7)
    learner, total = maml.clone(), 0.0
    expected, expected_lam = torch.zeros(2, 4), 0.0
    start = torch.cat([maml.module.weight, maml.module.bias[:, None]], 1).detach()
    for kind in kinds:
        adapt(learner, lambda it: error(it, support), "closure" if kind == "c" else "tensor")
        loss = error(learner, query)
        total = total + loss
        phi = list(learner.module.parameters())
        v = torch.autograd.grad(loss, phi, retain_graph=True)
        u = torch.cat([v[0], v[1][:, None]], 1) @ jacobian / 0.7
        expected += 0.7 * u
        moved = torch.cat([phi[0], phi[1][:, None]], 1).detach() - start
        expected_lam = expected_lam - (moved * u).sum()
    theta, bias, slope = torch.autograd.grad(total, [maml.module.weight, maml.module.bias, lam])
    close([theta, bias, slope], [expected[:, :3], expected[:, 3], expected_lam], 1e-11)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("between", [(), ("closure",)])
def test_outer_losses_at_superseded_tensor_steps_are_refused(curvature, between):
    maml, query = wrapped(network(), curvature=curvature), data(2)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data(1)), "tensor")
    early = error(learner, query)
    weights = list(learner.module.parameters())
    for style in ("tensor", *between):
        adapt(learner, lambda it: error(it, data(1)), style)
    late = error(learner, query)
    with pytest.raises(ig.GraphError, match=r"later adapt\(loss\) has replaced.*adapt\(lambda"):
        (early + late).backward(retain_graph=True)
    with pytest.raises(ig.GraphError, match=r"later adapt\(loss\) has replaced"):
        wavy(weights).backward()
    error(learner, query).backward()
    assert all(p.grad.norm() > 0 for p in maml.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_the_loss_before_adaptation_joins_that_after_it(style):
    maml, support, query = wrapped(nn.Linear(3, 2), 0.7, 0.3, **EXACT), data(1), data(2)
    learner = maml.clone()
    before = error(learner, query)
    v = torch.autograd.grad(before, list(learner.parameters()), retain_graph=True)
    adapt(learner, lambda it: error(it, support), style, steps=3)
    after = error(learner, query)
    w = torch.autograd.grad(after, list(learner.parameters()), retain_graph=True)
    pulled = torch.cat([w[0], w[1][:, None]], 1) @ quadratic(support, 0.7)
    expected = [v[0] + pulled[:, :3], v[1] + pulled[:, 3]]
    close(gradients(before + after, maml), expected, 1e-11)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ending", ["nothing", "query", "backward"])
def test_a_learner_is_gone_with_its_last_reference(ending, style, curvature):
    maml = wrapped(network(), curvature=curvature, lam=nn.Parameter(torch.tensor(2.0)))
    support, query = data(1), data(2)
    for p in maml.parameters():
        p.grad = torch.zeros_like(p)

    def task():
        learner = maml.clone()
        adapt(learner, lambda it: error(it, support), style, steps=2)
        fast = next(learner.module.parameters())
        implicit = fast.grad_fn.next_functions[0][0]
        assert type(implicit).__name__ == "ImplicitFunctionBackward"
        watched = [weakref.ref(o) for o in (learner, learner.module, fast, implicit)]
        if ending != "nothing":
            loss = error(learner, query)
            if ending == "backward":
                loss.backward()
        return watched

    with no_garbage_collector():
        watched = task()
        assert [w() for w in watched] == [None] * 4
        before = count_tensors()
        for _ in range(50):
            task()
        assert count_tensors() == before


def test_gauss_newton_forgets_the_calls_of_former_steps():
    learner, batch = wrapped(network(), curvature="gauss_newton").clone(), data()
    outputs = []
    for _ in range(3):
        output = learner(batch[0])
        outputs.append(weakref.ref(output))
        learner.adapt(mse_loss(output, batch[1]))
        del output
    assert [w() is None for w in outputs] == [True, True, False]


@pytest.mark.parametrize("style", STYLES)
def test_peak_memory_does_not_grow_with_the_steps(style):
    torch.set_default_dtype(torch.float32)
    maml = wrapped(l2l.vision.models.OmniglotCNN(5, hidden_size=8), lr=0.05, on_failure="ignore")
    images, labels = torch.rand(5, 28, 28), torch.arange(5)

    def peak(steps):
        def task():
            learner = maml.clone()
            adapt(learner, lambda it: cross_entropy(it(images), labels), style, steps=steps)
            cross_entropy(learner(images), labels).backward()

        return peak_memory(task)

    peak(1)  # allocates .grad
    peaks = {steps: peak(steps) for steps in (1, 2, 4, 16, 64, 256)}
    assert len({peaks[steps] for steps in (2, 4, 16, 64, 256)}) == 1, peaks
    assert 0.5 * peaks[2] < peaks[1] <= peaks[2]


# ---------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_running_statistics_are_those_of_mamls_forwards(mode, style):
    model = l2l.vision.models.OmniglotCNN(5, hidden_size=4)
    getattr(model, mode)()
    images, labels = torch.rand(5, 28, 28), torch.arange(5)
    buffers = []
    for ours in (True, False):
        twin = copy.deepcopy(model)
        maml = l2l.algorithms.MAML(twin, lr=0.05)
        if ours:
            maml = ig.imaml(maml, 1.5, linear_solver=ig.CG(maxiter=2), on_failure="ignore")
        identity = [id(b) for b in twin.buffers()]
        for _ in range(2):
            learner = maml.clone()
            theta = [p.detach() for p in maml.parameters()]
            if ours:
                adapt(learner, lambda it: cross_entropy(it(images), labels), style, steps=3)
            else:
                for _ in range(3):
                    pairs = zip(learner.parameters(), theta, strict=True)
                    pull = sum((p - t).square().sum() for p, t in pairs)
                    learner.adapt(cross_entropy(learner(images), labels) + 0.75 * pull)
            cross_entropy(learner(images.flip(0)), labels).backward()
        assert [id(b) for b in twin.buffers()] == identity
        buffers.append([b.double() for b in twin.buffers()])
    assert (mode == "eval") == all(
        torch.equal(b.double(), now) for b, now in zip(model.buffers(), buffers[0], strict=True)
    )
    for mine, theirs in zip(*buffers, strict=True):
        assert (mine - theirs).norm() <= 1e-11 * theirs.norm()
    assert float(buffers[0][2]) == (8 if mode == "train" else 0)


def conjugate_gradients(product, b, iterations):
    """Conjugate gradients as in a textbook."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(iterations):
        Ap = product(p)
        alpha = (r @ r) / (p @ Ap)
        x, r_next = x + alpha * p, r - alpha * Ap
        p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
    return x


def test_dropout_keeps_the_mask_of_the_loss():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    maml, lam = wrapped(model, 3.0, linear_solver=ig.CG(maxiter=4)), 3.0
    learner = maml.clone()
    weights = list(learner.parameters())
    loss = error(learner, data())
    slope = torch.autograd.grad(loss, weights, create_graph=True)
    vector = torch.cat([g.flatten() for g in slope])

    def product(p):
        parts = torch.autograd.grad(vector, weights, p, retain_graph=True)
        return flat(parts) + lam * p

    learner.adapt(loss)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    expected = lam * conjugate_gradients(product, flat(v), 4)
    actual = flat(gradients(outer(learner), maml))
    close([actual], [expected], 1e-12)
    exact = torch.stack([product(column) for column in torch.eye(len(actual))])
    assert (actual - lam * torch.linalg.solve(exact, flat(v))).norm() > 1e-9 * actual.norm()


@pytest.mark.parametrize("style", STYLES)
def test_random_numbers_are_drawn_by_the_steps_only(style):
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    maml = wrapped(model, 3.0)
    torch.manual_seed(4)
    for _ in range(3):
        maml(data()[0])
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), style, steps=3)
    assert torch.equal(torch.get_rng_state(), expected)
    outer(learner).backward()
    assert torch.equal(torch.get_rng_state(), expected)


# ---------------------------------------------------------------- kinds of parameters


@pytest.mark.parametrize("style", STYLES)
def test_tied_unused_and_frozen_parameters(style):
    model, batch, lam = Tied(), data(outputs=3), 2.0
    model.encode.bias.requires_grad_(False)
    maml = wrapped(model, lam, allow_unused=True, allow_nograd=True, **EXACT)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, batch), style, steps=2)
    point = weights_of(learner)
    adapt(learner, lambda it: error(it, batch), style)
    point = point if style == "tensor" else weights_of(learner)
    module = learner.module
    assert module.encode.weight is module.decode.weight
    assert torch.equal(module.encode.bias, model.encode.bias)
    assert len(point) == 4
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    expected, _ = dense(model, point, lambda call: error(call, batch), v, lam)
    actual = gradients(outer(learner), maml)
    close(actual, expected, 1e-11)
    close(actual[2:], v[2:], 1e-14)  # unused: A = λ, so dθ = v
    assert torch.equal(module.spare.weight, model.spare.weight)


class Recurrent(nn.Module):
    """A recurrent network with a linear head."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # learn2learn's clone_module looks at it
def test_recurrent_networks_meet_finite_differences(kind, style):
    model = Recurrent(kind)
    maml = wrapped(model, 3.0, 0.2, **EXACT)
    x, y = normal(4, 5, 2, seed=1, grad=False), normal(4, 1, seed=2, grad=False)

    def solved():
        learner = maml.clone()
        adapt(learner, lambda it: mse_loss(it(x), y), style, steps=120)
        return outer(learner)

    actual = gradients(solved(), maml)
    assert all(g.norm() > 1e-3 for g in actual)
    direction = [normal(*p.shape, seed=i, grad=False) for i, p in enumerate(maml.parameters())]

    def value(step):
        with torch.no_grad():
            for p, d in zip(maml.parameters(), direction, strict=True):
                p.add_(d, alpha=step)
        result = float(solved().detach())
        with torch.no_grad():
            for p, d in zip(maml.parameters(), direction, strict=True):
                p.sub_(d, alpha=step)
        return result

    h = 5e-4  # differences of order 4
    coarse, fine = ((value(k * h) - value(-k * h)) / (2 * k * h) for k in (2, 1))
    expected = (4 * fine - coarse) / 3
    assert abs(float(flat(actual) @ flat(direction)) - expected) < 1e-8 * abs(expected)


class Odd(nn.Module):
    """A 0-d parameter, an empty one, and None among them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.linear = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return torch.exp(self.scale) * self.linear(x) + self.empty.sum()


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
def test_parameters_without_dimensions_or_elements(style, curvature):
    model, batch = Odd(), data()
    maml = wrapped(model, 30.0, 0.02, curvature=curvature, **EXACT)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, batch), style)
    point = weights_of(maml) if style == "tensor" else weights_of(learner)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    formed = gauss_newton(batch[0], lambda output: mse_loss(output, batch[1]))
    curved = formed if curvature == "gauss_newton" else None
    expected, _ = dense(model, point, lambda call: error(call, batch), v, 30.0, curved)
    scale, empty, weight = gradients(outer(learner), maml)
    close([scale, weight], [expected[0], expected[2]], 1e-11)
    assert empty.shape == (0, 3)


# ---------------------------------------------------------------- first order


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("how", ["no iterations", "first_order"])
def test_the_first_order_gradient_is_mamls_at_the_same_weights(how, style):
    options = {"linear_solver": ig.CG(maxiter=0)} if how == "no iterations" else {}
    first_order = how == "first_order"
    model = network()
    maml = wrapped(model, 2.0, first_order=first_order, **options)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data(1)), style, steps=3)
    theirs = l2l.algorithms.MAML(copy.deepcopy(model), lr=0.0, first_order=True)
    with torch.no_grad():
        for p, adapted in zip(theirs.parameters(), learner.parameters(), strict=True):
            p.copy_(adapted)
    reference = theirs.clone()
    reference.adapt(error(reference, data(1)))
    expected = torch.autograd.grad(error(reference, data(2)), list(theirs.parameters()))
    same(gradients(error(learner, data(2)), maml), expected)


# ---------------------------------------------------------------- reports


def saddle(learner):
    """A loss with a Hessian of −1 everywhere."""
    return -sum(p.square().sum() for p in learner.parameters()) / 2


@pytest.mark.parametrize("style", STYLES)
def test_every_backward_leaves_one_report(style):
    monitor = ig.Monitor()
    maml = wrapped(network(), monitor=monitor, linear_solver=ig.CG(maxiter=3))
    for count in (1, 2, 3):
        learner = maml.clone()
        adapt(learner, lambda it: error(it, data(1)), style, steps=2)
        assert len(monitor.reports) == count - 1
        error(learner, data(2)).backward()
        assert len(monitor.reports) == count
    report = monitor.last
    assert (report.status, report.iterations) == (ig.Status.TRUNCATED, 3)
    assert report.curvature == "hessian"
    point = weights_of(learner)
    loss = error(learner, data(1))
    pairs = zip(torch.autograd.grad(loss, point), point, maml.parameters(), strict=True)
    if style == "closure":  # linearised at the solution itself
        inner = flat([g + 2.0 * (p - t) for g, p, t in pairs]).norm()
        assert abs(report.inner_residual - inner) < 1e-12
    assert 0 < report.linear_residual < 1


@pytest.mark.parametrize("style", STYLES)
def test_negative_curvature_is_raised_warned_of_or_left(style):
    def backward(on_failure):
        maml = wrapped(network(), 0.5, 0.1, on_failure=on_failure, monitor=ig.Monitor())
        learner = maml.clone()
        adapt(learner, saddle, style)
        outer(learner).backward()
        assert maml.reporting.monitor.last.status == ig.Status.NEGATIVE_CURVATURE
        return learner

    with pytest.raises(ig.LinearSolveError, match="non-positive curvature") as raised:
        backward("raise")
    assert raised.value.report.min_curvature == pytest.approx(-0.5, rel=1e-12)
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature"):
        backward("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward("ignore")


def test_a_step_on_a_tensor_is_not_held_to_what_a_solver_promises():
    maml = wrapped(network(), solver=newton, on_failure="raise", monitor=ig.Monitor())
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    outer(learner).backward()
    assert maml.reporting.monitor.last.inner_residual > 1e-2
    lazy = wrapped(
        nn.Linear(3, 2), lam=0.1, solver=lambda objective, init: init, on_failure="raise"
    )
    learner = lazy.clone()
    learner.adapt(lambda: 100 * error(learner, data()))
    with pytest.raises(ig.LinearSolveError, match="does not solve the inner problem"):
        outer(learner).backward()


# ---------------------------------------------------------------- derivatives of derivatives


def loss_of_an_adapted_learner(maml, weight):
    """It depends on θ and, in the inner loss and directly, on the weight."""
    learner = maml.clone()
    learner.adapt(lambda: weight.exp() * error(learner, data()))
    return error(learner, data(seed=2)) * (1 + weight)


def meta_gradient(maml, weight, create_graph):
    """When it is taken, the learner is gone."""
    loss = loss_of_an_adapted_learner(maml, weight)
    return torch.autograd.grad(loss, [*maml.parameters(), weight], create_graph=create_graph)


def moved(tensors, direction, step):
    for t, d in zip(tensors, direction, strict=True):
        t.data.add_(d, alpha=step)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("curvature", ["auto", "hessian"])
def test_second_and_third_derivatives(curvature, learned):
    """Hessian-vector products through an adapted learner, as TRPO takes them."""
    torch.manual_seed(0)
    lam = nn.Parameter(torch.tensor(2.0)) if learned else 2.0
    maml = wrapped(
        network(), lam, solver=NewtonCG(tol=1e-13), curvature=curvature, on_failure="raise",
        linear_solver=ig.CG(rtol=1e-13),
    )  # fmt: skip
    weight = nn.Parameter(torch.tensor(0.7))
    inputs = [*maml.parameters(), weight]
    v = [normal(*p.shape, seed=i, grad=False) for i, p in enumerate(inputs)]

    def along(create_graph):
        """H v, as a list."""
        first = meta_gradient(maml, weight, create_graph=True)
        inner = sum((g * d).sum() for g, d in zip(first, v, strict=True))
        return torch.autograd.grad(inner, inputs, create_graph=create_graph)

    def differences(function):
        found = []
        for step in (2e-6, -4e-6):
            moved(inputs, v, step)
            found.append(function())
        moved(inputs, v, 2e-6)
        return [(a - b) / 4e-6 for a, b in zip(*found, strict=True)]

    close(along(False), differences(lambda: meta_gradient(maml, weight, False)), 1e-5)
    inner = sum((g * d).sum() for g, d in zip(along(True), v, strict=True))
    third = torch.autograd.grad(inner, inputs)
    close(third, differences(lambda: along(False)), 1e-4)


def test_second_derivatives_accumulate_once():
    """In backward(), too, where the record's tensors could receive gradients besides."""
    maml = wrapped(network(), solver=NewtonCG(tol=1e-12), linear_solver=ig.CG(rtol=1e-12))
    weight = nn.Parameter(torch.tensor(0.7))
    inputs = [*maml.parameters(), weight]
    expected = torch.autograd.grad(wavy(meta_gradient(maml, weight, True)), inputs)
    wavy(meta_gradient(maml, weight, True)).backward()
    close([p.grad for p in inputs], expected, 1e-12)


@pytest.mark.parametrize(
    ("tolerance", "promises"), [({}, False), ({"tol": 1e-9}, True), ({"rtol": 1e-9}, True)]
)
def test_a_number_of_steps_promises_no_solution(tolerance, promises):
    solver = ig.solvers.GradientDescent(lr=1e-3, steps=1, **tolerance)
    maml = wrapped(nn.Linear(3, 2), lam=0.1, solver=solver, on_failure="raise")
    learner = maml.clone()
    learner.adapt(lambda: 100 * error(learner, data()))
    if promises:
        with pytest.raises(ig.LinearSolveError, match="does not solve the inner problem"):
            outer(learner).backward()
    else:
        outer(learner).backward()


@pytest.mark.parametrize(
    ("linear_solver", "damping"), [(ig.CG(damping=0.3), 0.3), (ig.CG(), 0.0), (ig.Exact(), 0.0)]
)
def test_reports_tell_the_damping(linear_solver, damping):
    monitor = ig.Monitor()
    learner = wrapped(nn.Linear(3, 2), linear_solver=linear_solver, monitor=monitor).clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    outer(learner).backward()
    assert monitor.last.damping == damping


# ---------------------------------------------------------------- gradients that cannot be had


@pytest.mark.parametrize("curvature", CURVATURES)
def test_second_derivatives_are_refused_where_only_a_tensor_is_known(curvature):
    maml = wrapped(network(), curvature=curvature)
    learner = maml.clone()
    learner.adapt(error(learner, data()))
    with pytest.raises(ig.GraphError, match=r"create_graph=True.*adapt\(lambda"):
        torch.autograd.grad(outer(learner), list(maml.parameters()), create_graph=True)


def test_second_derivatives_are_refused_of_a_truncated_solve():
    maml = wrapped(network())
    learner = maml.clone()
    learner.adapt(lambda: error(learner, data()), steps=50)
    parameters = list(maml.parameters())
    first = torch.autograd.grad(outer(learner), parameters, create_graph=True)
    with pytest.raises(ig.GraphError, match=r"solve to a tolerance, CG\(rtol"):
        torch.autograd.grad(wavy(first), parameters)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("what", ["theta", "lam"])
def test_theta_and_lam_must_wait_for_backward(what, style):
    lam = nn.Parameter(torch.tensor(2.0))
    maml = wrapped(network(), lam)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), style)
    loss = outer(learner)
    group = [lam] if what == "lam" else list(maml.module.parameters())
    for p in group:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(group, 0.1).step()
    with pytest.raises(ig.GraphError, match=r"modified in place.*Call backward\(\) first"):
        loss.backward()


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
def test_an_overwritten_support_batch_is_an_error(style, curvature):
    maml, (X, y) = wrapped(network(), curvature=curvature), data()
    learner = maml.clone()
    adapt(learner, lambda it: mse_loss(it(X), y), style)
    loss = outer(learner)
    X.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- after an exception


class Stop(Exception):
    """Raised by the functions below, not by anything else."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("when", ["before the forward", "inside it", "after it"])
def test_an_exception_in_the_function_leaves_the_learner_as_it_was(when, call, kind):
    """The 4th call is the evaluation at the solution, which leaves even the buffers alone."""

    class Interrupting(nn.Identity):
        armed = False

        def forward(self, x):
            if self.armed:
                raise kind()
            return x

    switch = Interrupting()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), switch, nn.Tanh(), nn.Linear(4, 2))
    maml, batch = wrapped(model, monitor=ig.Monitor()), data()
    learner = maml.clone()
    adapt(learner, lambda it: error(it, batch), "tensor")
    loss = outer(learner)
    expected = gradients(loss, maml) if loss is not None else None
    loss = outer(learner)
    weights = list(learner.parameters())
    values = [p.detach().clone() for p in weights]
    buffers = list(learner.buffers())
    calls, statistics = 0, None

    def function():
        nonlocal calls, statistics
        calls += 1
        if calls == call and when == "before the forward":
            raise kind()
        learner.module[2].armed = calls == call and when == "inside it"
        try:
            result = error(learner, batch)
        finally:
            learner.module[2].armed = False
        if calls < 4:
            statistics = [b.clone() for b in learner.buffers()]
        if calls == call:
            raise kind()
        return result

    with pytest.raises(kind):
        learner.adapt(function, steps=3)
    assert calls == call
    assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))
    same(weights, values)
    assert all(b is a for b, a in zip(learner.buffers(), buffers, strict=True))
    if call == 4:
        same(buffers, statistics)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch.is_grad_enabled()
    same(gradients(loss, maml), expected)
    learner.adapt(function, steps=3)
    assert not torch.equal(next(learner.parameters()), weights[0])


@pytest.mark.parametrize("case", ["raises", "overwrites", "diverges", "forgets", "interrupts"])
def test_a_failing_solver_leaves_the_learner_as_it_was(case):
    def solver(objective, init):
        objective(tuple(p + 1 for p in init))
        if case == "raises":
            raise Stop
        if case == "interrupts":
            raise KeyboardInterrupt
        if case == "overwrites":
            for p in init:
                p.zero_()
            raise Stop
        return tuple(p / 0 for p in init) if case == "diverges" else None

    maml = wrapped(network(), solver=solver)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    weights = list(learner.parameters())
    values = [p.detach().clone() for p in weights]
    expected = gradients(outer(learner), maml)
    errors = {"diverges": ig.InvalidSolutionError, "forgets": ig.InvalidSolutionError}
    with pytest.raises(KeyboardInterrupt if case == "interrupts" else errors.get(case, Stop)):
        learner.adapt(lambda: error(learner, data()))
    assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))
    same(weights, values)
    same(gradients(outer(learner), maml), expected)


def test_a_refused_loss_leaves_the_learner_as_it_was():
    maml = wrapped(network())
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), "tensor")
    weights = list(learner.parameters())
    expected = gradients(outer(learner), maml)
    foreign = torch.zeros((), requires_grad=True)
    for bad in (None, torch.zeros(2), foreign, lambda: None, lambda: foreign):
        with pytest.raises(ig.ImplicitGradError):
            learner.adapt(bad)
        assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))
    same(gradients(outer(learner), maml), expected)


# ---------------------------------------------------------------- bad input


def plain():
    """Something that is not wrapped."""
    return l2l.algorithms.MAML(nn.Linear(3, 2), lr=0.1)


NOT_POSITIVE = "lam must be a number .*finite and greater than 0, got "
MAML_WANTED = r"must be a learn2learn\.algorithms\.MAML, got {}\. .*imaml\(l2l\.algorithms\.MAML"
BAD_CALLS = {
    "a module": (lambda: ig.imaml(nn.Linear(2, 2)), MAML_WANTED.format("a Linear")),
    "None": (lambda: ig.imaml(None), MAML_WANTED.format("None")),
    "a string": (lambda: ig.imaml("maml"), MAML_WANTED.format("a str")),
    "a look-alike": (
        lambda: ig.imaml(SimpleNamespace(**dict.fromkeys(dir(plain())))),
        MAML_WANTED.format("a SimpleNamespace"),
    ),
    "MAML itself": (lambda: ig.imaml(l2l.algorithms.MAML), MAML_WANTED.format("a type")),
    "wrapped": (lambda: ig.imaml(ig.imaml(plain())), "is wrapped by imaml already"),
    "lam 0": (lambda: ig.imaml(plain(), 0.0), NOT_POSITIVE + "0$"),
    "lam < 0": (lambda: ig.imaml(plain(), -1), NOT_POSITIVE + "-1$"),
    "lam NaN": (lambda: ig.imaml(plain(), float("nan")), NOT_POSITIVE + "nan$"),
    "lam inf": (lambda: ig.imaml(plain(), float("inf")), NOT_POSITIVE + "inf$"),
    "lam None": (lambda: ig.imaml(plain(), None), NOT_POSITIVE + "None$"),
    "lam True": (lambda: ig.imaml(plain(), True), NOT_POSITIVE + "a bool$"),
    "lam string": (lambda: ig.imaml(plain(), "2"), "lam"),
    "lam integer": (lambda: ig.imaml(plain(), torch.tensor(2)), NOT_POSITIVE + "an int64 tensor"),
    "lam elements": (
        lambda: ig.imaml(plain(), [torch.tensor([[1.0], [0.0]]), 1.0]),
        NOT_POSITIVE + "a tensor with other values",
    ),
    "lam short": (lambda: ig.imaml(plain(), [1.0]), "each of the 2 parameters, got 1"),
    "lam long": (lambda: ig.imaml(plain(), (1.0,) * 3), "each of the 2 parameters, got 3"),
    "lam names": (
        lambda: ig.imaml(plain(), {"weight": 1.0, "bias_": 1.0}),
        r"\['weight', 'bias'\]; got \['weight', 'bias_'\]",
    ),
    "lam shape": (
        lambda: ig.imaml(plain(), [torch.ones(3, 2), 1.0]),
        r"lam of shape \(3, 2\) does not fit theta\[0\] of shape \(2, 3\)",
    ),
    "lam leaf": (
        lambda: ig.imaml(plain(), torch.tensor(2.0, requires_grad=True)),
        r"must be a torch\.nn\.Parameter, so that it appears in parameters\(\)",
    ),
    "lam computed": (
        lambda: ig.imaml(plain(), [nn.Parameter(torch.tensor(1.0)).exp(), 1.0]),
        r"must be a torch\.nn\.Parameter",
    ),
    "linear_solver": (
        lambda: ig.imaml(plain(), linear_solver="cg"),
        r"linear_solver must be CG\(\), MINRES\(\), Neumann\(\) or Exact\(\), got 'cg'",
    ),
    "linear_solver class": (
        lambda: ig.imaml(plain(), linear_solver=ig.CG),
        r"linear_solver must be CG\(\), MINRES\(\), Neumann\(\) or Exact\(\), got <class",
    ),
    "solver": (lambda: ig.imaml(plain(), solver=3), r"solver must have minimize.*got an int"),
    "curvature": (
        lambda: ig.imaml(plain(), curvature="gauss-newton"),
        'curvature=\'gauss-newton\': expected one of "auto", "hessian"',
    ),
    "monitor": (lambda: ig.imaml(plain(), monitor=[]), r"must be an implicit_grad\.Monitor\(\)"),
    "on_failure": (lambda: ig.imaml(plain(), on_failure="no"), "on_failure='no': expected"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_at_once(case):
    call, sentence = BAD_CALLS[case]
    with pytest.raises(ig.InvalidArgumentError, match=sentence):
        call()


def test_misspelt_options_are_python_errors():
    with pytest.raises(TypeError, match="lamda"):
        ig.imaml(plain(), lamda=2.0)
    with pytest.raises(TypeError, match="step"):
        ig.imaml(plain()).clone().adapt(lambda: 0, step=3)


@pytest.mark.parametrize("form", ["one", "several"])
def test_a_lam_that_training_made_negative_is_refused_by_the_next_clone(form):
    lam = nn.Parameter(torch.tensor(0.1))
    maml = wrapped(nn.Linear(3, 2), lam if form == "one" else [lam, 1.0])
    maml.clone()
    lam.grad = torch.tensor(1.0)
    torch.optim.SGD([lam], 0.5).step()
    with pytest.raises(ig.InvalidArgumentError, match=NOT_POSITIVE + r"-0\.4$"):
        maml.clone()


def detached(learner):
    return error(learner, data()).detach()


def without_gradients(learner):
    with torch.no_grad():
        return error(learner, data())


BAD_LOSSES = {
    "None": (lambda it: None, ig.InvalidArgumentError, r"or a function without.*got None"),
    "number": (lambda it: 3.0, ig.InvalidArgumentError, "got a float"),
    "vector": (lambda it: it(data()[0])[:, 0], ig.InvalidArgumentError, r"scalar.*shape \(6,\)"),
    "integer": (lambda it: torch.tensor(3), ig.InvalidArgumentError, "got an int64 tensor"),
    "detached": (detached, ig.GraphError, r"has no graph to the learner's weights"),
    "no_grad": (without_gradients, ig.GraphError, r"computed under torch\.no_grad\(\)"),
    "foreign": (
        lambda it: torch.zeros((), requires_grad=True).exp(),
        ig.InvalidArgumentError,
        "does not depend on the",
    ),
    "original's": (lambda it: it.root.square().sum(), ig.InvalidArgumentError, "does not depend"),
    "returns None": (lambda it: lambda: None, ig.InvalidArgumentError, "scalar .*got None"),
    "returns a vector": (lambda it: lambda: it(data()[0])[0], ig.InvalidArgumentError, "scalar"),
    "returns another": (
        lambda it: lambda: torch.zeros((), requires_grad=True).exp(),
        ig.InvalidArgumentError,
        "depend",
    ),
    "returns detached": (lambda it: lambda: detached(it), ig.GraphError, "has no graph"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_are_refused(case):
    make, kind, sentence = BAD_LOSSES[case]
    maml = wrapped(nn.Linear(3, 2))
    maml.module.root = maml.module.weight
    learner = maml.clone()
    learner.module.__dict__["root"] = maml.module.weight
    learner.module._parameters.pop("root", None)
    weights = list(learner.parameters())
    with pytest.raises(kind, match=sentence):
        learner.adapt(make(learner))
    assert all(p is w for p, w in zip(learner.parameters(), weights, strict=True))


def test_a_loss_serves_one_step():
    learner = wrapped(network()).clone()
    loss = error(learner, data())
    learner.adapt(loss)
    with pytest.raises(ig.InvalidArgumentError, match="compute it anew from this learner's output"):
        learner.adapt(loss)


def test_steps_are_for_functions_and_gradient_descent():
    learner = wrapped(network()).clone()
    with pytest.raises(ig.InvalidArgumentError, match="steps needs a function"):
        learner.adapt(error(learner, data()), steps=2)
    learner = wrapped(network(), solver=newton).clone()
    with pytest.raises(ig.InvalidArgumentError, match=r"steps is for the default.*newton"):
        learner.adapt(lambda: error(learner, data()), steps=2)


def test_without_learn2learn_the_package_imports_and_says_what_imaml_wants():
    program = """
        import sys

        class Refusing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "learn2learn":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Refusing())
        import torch
        import implicit_grad as ig
        import implicit_grad.learn2learn

        try:
            ig.imaml(torch.nn.Linear(2, 2))
        except ig.InvalidArgumentError as error:
            print(error)
        assert "learn2learn" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "must be a learn2learn.algorithms.MAML, got a Linear" in done.stdout
    assert 'pip install "implicit-grad[learn2learn]"' in done.stdout


def test_each_step_takes_lam_as_it_is_then():
    lam, model = nn.Parameter(torch.tensor(2.0)), network()
    learner = wrapped(model, lam=lam, lr=0.1).clone()
    learner.adapt(error(learner, data()))
    lam.data.fill_(0.01)
    before = [p.detach().clone() for p in learner.module.parameters()]
    loss = error(learner, data())
    slope = torch.autograd.grad(loss, list(learner.module.parameters()), retain_graph=True)
    learner.adapt(loss)
    tensors = zip(before, slope, model.parameters(), learner.module.parameters(), strict=True)
    for p, g, theta, found in tensors:
        torch.testing.assert_close(found, p - 0.1 * (g + 0.01 * (p - theta)))


def test_a_learner_may_be_cloned_and_called_inside_a_transform():
    maml, (X, _) = wrapped(network()), data()
    slope = grad(lambda s: s * maml.clone()(X).sum())(torch.tensor(1.0))
    torch.testing.assert_close(slope, maml(X).sum())


@pytest.mark.parametrize("style", STYLES)
def test_thetas_gradient_is_lam_u_without_a_graph(style, monkeypatch):
    """Unless something else of the inner problem depends on θ too."""
    seen = []
    pullback = Linearization.pullback

    def spy(self, u, inputs):
        seen.append(bool(self.anchors))
        return pullback(self, u, inputs)

    monkeypatch.setattr(Linearization, "pullback", spy)
    for lam in (2.0, nn.Parameter(torch.tensor(2.0))):
        learner = wrapped(network(), lam=lam, on_failure="ignore").clone()
        adapt(learner, lambda learner: error(learner, data()), style)
        error(learner, data(seed=7)).backward()
    assert seen == [True, False]
