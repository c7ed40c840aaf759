"""Derivatives of imaml's gradients: right, or refused."""

import learn2learn as l2l
import pytest
import torch
from learners import (
    CURVATURES,
    STYLES,
    adapt,
    close,
    data,
    error,
    flat,
    moved,
    network,
    outer,
    weights_of,
    wrapped,
)
from problems import errors_of_torch, normal, wavy
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import mse_loss

import implicit_grad as ig
from implicit_grad.solvers import NewtonCG

pytestmark = pytest.mark.usefixtures("double_precision")


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


def test_the_default_cg_of_five_products_solves_on_for_second_derivatives():
    """They are those of the whole gradient, which create_graph=True returns; as TRPO asks."""
    parts, monitor = {}, ig.Monitor()
    for name, solver in (("default", None), ("exact", ig.Exact())):
        torch.manual_seed(0)
        maml = wrapped(network(), solver=NewtonCG(tol=1e-12), linear_solver=solver, monitor=monitor)
        weight = nn.Parameter(torch.tensor(0.7))
        first = meta_gradient(maml, weight, create_graph=True)
        second = torch.autograd.grad(wavy(first), [*maml.parameters(), weight])
        parts[name] = (first, second)
    for mine, theirs in zip(parts["default"], parts["exact"], strict=True):
        close(mine, theirs, 1e-6)
    assert monitor.reports[0].iterations > 5


def test_second_derivatives_with_the_default_lam():
    """g = (I + t H(φ))⁻¹ v(φ), and φ moves with θ by the same implicit derivative."""
    model, support, query = network(), data(1), data(2)
    maml = ig.imaml(l2l.algorithms.MAML(model, lr=0.2))
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def at(flat, batch):
        parts = flat.split([s.numel() for s in shapes.values()])
        weights = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return mse_loss(functional_call(model, weights, batch[0]), batch[1])

    def matrix(phi):
        return torch.eye(len(phi)) + 0.6 * jacrev(jacrev(at))(phi, support)

    learner = maml.clone()
    learner.adapt(lambda: error(learner, support), steps=3)
    phi, parameters = flat(weights_of(learner)), list(maml.parameters())
    first = torch.autograd.grad(error(learner, query), parameters, create_graph=True)
    w = normal(len(phi), seed=3, grad=False)
    second = torch.autograd.grad(torch.cat([g.flatten() for g in first]) @ w, parameters)
    whole = jacrev(lambda p: torch.linalg.solve(matrix(p), jacrev(at)(p, query)))(phi)
    close([flat(first)], [torch.linalg.solve(matrix(phi), jacrev(at)(phi, query))], 1e-6)
    close([flat(second)], [torch.linalg.solve(matrix(phi), whole.T @ w)], 1e-6)


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
    options = {} if promises else {"on_failure": "raise"}
    learner = wrapped(nn.Linear(3, 2), lam=0.1, solver=solver, **options).clone()
    if promises:
        with pytest.warns(ig.ImplicitGradWarning, match=r"tol=1e-09.* was asked for"):
            learner.adapt(lambda: 100 * error(learner, data()))
        with pytest.warns(ig.ImplicitGradWarning, match="does not solve the inner problem"):
            outer(learner).backward()
    else:
        learner.adapt(lambda: 100 * error(learner, data()))
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


@pytest.mark.parametrize("linear_solver", [ig.CG(maxiter=0), ig.CG(maxiter=5, damping=0.1)])
def test_second_derivatives_are_refused_of_another_solve(linear_solver):
    maml = wrapped(network(), linear_solver=linear_solver)
    learner = maml.clone()
    learner.adapt(lambda: error(learner, data()), steps=50)
    parameters = list(maml.parameters())
    first = torch.autograd.grad(outer(learner), parameters, create_graph=True)
    with pytest.raises(ig.GraphError, match=r"solve to a tolerance, such as CG\(\)"):
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
    with errors_of_torch():
        loss.backward()
