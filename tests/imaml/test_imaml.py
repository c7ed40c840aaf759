"""imaml: its gradients against closed forms, unrolling and differences."""

import copy
import warnings

import pytest
import torch
from learners import (
    CURVATURES,
    EXACT,
    STYLES,
    adapt,
    close,
    data,
    dense,
    error,
    flat,
    gauss_newton,
    gradients,
    network,
    newton,
    outer,
    same,
    weights_of,
    wrapped,
)
from problems import Tied, normal, wavy
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import mse_loss

import implicit_grad as ig
from implicit_grad._theorem.linearization import Linearization

pytestmark = pytest.mark.usefixtures("double_precision")


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


@pytest.mark.parametrize("kinds", ["ccc", "tc", "cct", "ctc", "ttt", "tctt"])
def test_outer_losses_at_several_steps(kinds):
    """Through functions (c), and through tensors (t), whose graphs wait for the outer losses."""
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
def test_outer_losses_of_no_call_are_refused_at_superseded_tensor_steps(curvature, between):
    maml, query = wrapped(network(), curvature=curvature), data(2)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data(1)), "tensor")
    early = mse_loss(learner.module(query[0]), query[1])
    weights = list(learner.module.parameters())
    for style in ("tensor", *between):
        adapt(learner, lambda it: error(it, data(1)), style)
    late = error(learner, query)
    refused = r"later adapt\(loss\) has replaced.*keep_steps=True.*adapt\(lambda"
    for loss in (early + late, wavy(weights)):
        with pytest.raises(ig.GraphError, match=refused):
            loss.backward(retain_graph=True)
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
    theirs = copy.deepcopy(model)
    with torch.no_grad():
        for p, adapted in zip(theirs.parameters(), learner.parameters(), strict=True):
            p.copy_(adapted)
    expected = torch.autograd.grad(error(theirs, data(2)), list(theirs.parameters()))
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
        torch.testing.assert_close(found, (p - 0.1 * g + 0.1 * 0.01 * theta) / (1 + 0.1 * 0.01))


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
