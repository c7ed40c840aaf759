"""`implicit(warm_start=...)`: solvers start where the last call ended, and nothing else changes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import implicit_grad as ig

X = torch.linspace(-1, 2, 30, dtype=torch.float64).reshape(10, 3).sin()
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1 * X[:, 0].cos()


def objective(w, theta, lam):
    fit = torch.nn.functional.softplus(X @ w - Y).square().sum()
    return fit + lam * (w - theta).square().sum()


def number(value, grad=True):
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


THETA = torch.zeros(3, dtype=torch.float64)
SOLVER = ig.solvers.GradientDescent(lr=0.15, tol=1e-9)


def gradient(solve, lam, theta=THETA):
    lam = number(lam)
    phi = solve(theta, lam)
    (g,) = torch.autograd.grad(phi.square().sum(), lam)
    return phi.detach(), g


@pytest.fixture
def monitored():
    monitor = ig.Monitor()
    return ig.implicit(SOLVER, ig.argmin(objective), warm_start=True, monitor=monitor), monitor


def test_gradients_are_those_of_cold_starts_and_cost_less(monitored):
    warm, monitor = monitored
    cold_monitor = ig.Monitor()
    cold = ig.implicit(SOLVER, ig.argmin(objective), monitor=cold_monitor)
    for lam in (0.5, 0.51, 0.515, 0.515):
        for (a, b), tolerance in zip(
            zip(gradient(warm, lam), gradient(cold, lam), strict=True), (1e-7, 1e-6), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert [r.warm_started for r in monitor.reports] == [False, True, True, True]
    first, *later, last = [r.evaluations for r in monitor.reports]
    assert all(n < first for n in later) and last <= 2
    assert monitor.reports[-1].iterations < monitor.reports[0].iterations  # CG's as well
    assert cold_monitor.last.warm_started is None and cold_monitor.last.evaluations is None


@pytest.mark.parametrize(
    "theta",
    [torch.zeros(3), torch.zeros(3, 1, dtype=torch.float64), [THETA]],
    ids=["dtype", "shape", "container"],
)
def test_another_form_starts_fresh(theta):
    starts = []

    class Once:
        def minimize(self, objective, init):
            starts.append(init)
            return torch.zeros_like(init) + 1 if torch.is_tensor(init) else [init[0] + 1]

    def one(phi, theta, lam):
        tensor = phi if torch.is_tensor(phi) else phi[0]
        return (tensor - 1).square().sum() + 0 * lam

    solve = ig.implicit(Once(), ig.argmin(one), warm_start=True, on_failure="ignore")
    solve(THETA, number(1.0, False))
    solve(THETA, number(1.0, False))
    solve(theta, number(1.0, False))
    solve(theta, number(1.0, False))
    leaves = [s if torch.is_tensor(s) else s[0] for s in starts]
    assert [float(s.sum()) for s in leaves] == [0, 3, 0, 3]


def test_what_is_kept_is_nobody_elses(monitored):
    solve, _ = monitored
    lam = number(0.5, False)
    phi = solve(THETA, lam)
    first = phi.clone()
    phi.detach().add_(100)
    again = solve(THETA, lam)
    torch.testing.assert_close(again, first, rtol=1e-9, atol=1e-9)

    held = []

    class Writes:
        def minimize(self, objective, init):
            held.append(init.clone())
            init.fill_(7.0)  # its own copy
            if len(held) == 2:
                raise KeyboardInterrupt
            return torch.ones_like(init)

    solve = ig.implicit(
        Writes(),
        ig.argmin(objective),
        init=lambda theta, lam: theta.clone(),
        warm_start=True,
        on_failure="ignore",
    )
    solve(THETA, lam)
    with pytest.raises(KeyboardInterrupt):
        solve(THETA, lam)
    solve(THETA, lam)
    assert torch.equal(held[1], torch.ones_like(THETA)) and torch.equal(held[2], held[1])


def test_one_phi_for_each_key():
    store, monitor = ig.WarmStart(), ig.Monitor()
    solve = ig.implicit(SOLVER, ig.argmin(objective), warm_start=store, monitor=monitor)
    for _ in range(2):
        for key, lam in (("a", 0.5), ("b", 1.0)):
            with store.at(key):
                gradient(solve, lam)
    assert [r.warm_started for r in monitor.reports] == [False, False, True, True]
    assert all(r.evaluations <= 2 for r in monitor.reports[2:])
    store.clear()
    with store.at("a"):
        gradient(solve, 0.5)
    assert monitor.last.warm_started is False


def test_certify_and_check_leave_no_trace():
    short = ig.solvers.GradientDescent(lr=0.02, steps=5)
    solve = ig.implicit(short, ig.argmin(objective), warm_start=True, on_failure="ignore")
    twin = ig.implicit(short, ig.argmin(objective), warm_start=True, on_failure="ignore")
    lam = number(0.5)
    solve(THETA, lam), twin(THETA, lam)
    outer = lambda phi: phi.square().sum()  # noqa: E731
    one, two = (ig.certify(solve, (THETA, lam), outer) for _ in range(2))
    assert one.error == two.error
    with pytest.raises(ig.testing.GradientCheckError):  # five steps do not solve it
        ig.testing.check_implicit(solve, (THETA, lam))
    phi, expected = solve(THETA, lam), twin(THETA, lam)
    assert torch.equal(phi, expected)
    torch.autograd.grad(outer(phi), lam)
    certified = torch.autograd.grad(outer(expected), lam)  # of the very φ that the call found
    assert torch.allclose(certified[0], one.gradients[0], rtol=1e-6)


def test_a_function_that_asks_is_handed_the_last_phi():
    starts = []

    def fit(theta, lam, start=None):
        starts.append(start)
        return [theta.new_ones(3) * lam]

    condition = ig.argmin(lambda w, theta, lam: (w[0] - lam).square().sum())
    solve = ig.implicit(fit, condition, warm_start=True)
    phi = solve(THETA, number(1.0))
    solve(THETA, number(2.0))
    assert starts[0] is None
    assert torch.equal(starts[1][0], torch.ones_like(THETA)) and not starts[1][0].requires_grad
    assert starts[1][0].data_ptr() != phi[0].data_ptr()
    solve(THETA.float(), torch.tensor(2.0))
    assert starts[2] is None  # of another dtype
    with pytest.raises(ig.InvalidArgumentError, match="argument start"):
        solve(THETA, lam=number(2.0), start=None)


def test_modules_start_from_their_last_weights():
    weights, buffers = [], []

    def train(net, lam, start=None):
        weights.append(None if start is None else start.weight.detach().clone())
        buffers.append(start is not None and start is not net and start.weight.requires_grad)
        net = net if start is None else start
        with torch.no_grad():
            net.weight.fill_(float(lam))
        return net

    solve = ig.implicit(
        train, ig.argmin(lambda net, lam: (net.weight - lam).square().sum()), warm_start=True
    )
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    lam = torch.tensor(3.0, requires_grad=True)
    solve(model, lam)
    net = solve(model, lam)
    assert weights[0] is None and torch.equal(weights[1], torch.full((1, 2), 3.0)) and buffers[1]
    net.weight.sum().backward()
    assert lam.grad == 2 and torch.equal(model.weight, before)
    solve(nn.Linear(4, 1, bias=False), lam)  # another form
    assert weights[2] is None

    def fit(net, lam):
        return (net(X.float()[:, :2])[:, 0] - Y.float()).square().sum() + lam * sum(
            p.square().sum() for p in net.parameters()
        )

    monitor = ig.Monitor()
    solve = ig.implicit(
        ig.solvers.NewtonCG(tol=1e-4), ig.argmin(fit), warm_start=True, monitor=monitor
    )
    for _ in range(2):
        solve(model, lam).weight.sum().backward()
    assert [r.warm_started for r in monitor.reports] == [False, True]
    assert monitor.last.evaluations < monitor.reports[0].evaluations


def test_roots_too():
    pytest.importorskip("scipy")
    monitor = ig.Monitor()
    cube = ig.root(lambda x, a: x**3 + x - a)
    solve = ig.implicit(ig.solvers.SciPyRoot(), cube, warm_start=True, monitor=monitor)
    a = torch.tensor([5.0, 1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        x = solve(a)
        (g,) = torch.autograd.grad(x.sum(), a)
        torch.testing.assert_close(g, 1 / (3 * x.detach() ** 2 + 1))
    assert monitor.last.warm_started and monitor.last.evaluations < monitor.reports[0].evaluations


def test_proximal_terms_keep_their_own_steps():
    monitor = ig.Monitor()
    loss = lambda w: (X @ w - Y).square().sum()  # noqa: E731
    solve = ig.implicit(
        ig.solvers.GradientDescent(lr=0.03, tol=1e-9),
        ig.proximal(loss, 1e3),  # stable only by proximal steps
        warm_start=True,
        monitor=monitor,
    )
    theta = THETA.clone().requires_grad_()
    exact = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + 2e-3 * X.T @ X).sum(0)
    for _ in range(2):
        theta.grad = None
        solve(theta).sum().backward()
        torch.testing.assert_close(theta.grad, exact)
    assert monitor.last.warm_started and monitor.last.evaluations <= 2


def test_transforms_are_right_and_batches_start_fresh():
    newton, condition = ig.solvers.NewtonCG(tol=1e-9), ig.argmin(objective)
    monitor = ig.Monitor()
    solve = ig.implicit(newton, condition, warm_start=True, monitor=monitor)
    cold = ig.implicit(newton, condition)
    gradient(solve, 0.5)
    lams = torch.tensor([0.3, 0.9], dtype=torch.float64)

    def value(solve):
        return lambda lam: solve(THETA, lam).square().sum()

    def both(transform):
        return transform(value(solve)), transform(value(cold))

    for transform, at in (
        (torch.func.grad, lams[0]),
        (lambda f: torch.func.vmap(torch.func.grad(f)), lams),
        (torch.func.hessian, lams[1]),
    ):
        here, there = (f(at) for f in both(transform))
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)
    torch.func.vmap(torch.func.grad(value(solve)))(lams)
    assert monitor.last.warm_started is None

    def fit(lam, start):
        assert start is None or not many
        return lam.clone()

    for options in ({}, {"linear_solver": ig.Exact()}):  # at once, and one by one
        condition = ig.argmin(lambda w, lam: (w - lam).square().sum())
        many, solve = False, ig.implicit(fit, condition, warm_start=True, **options)
        solve(lams[0])
        many = True
        ones = torch.func.vmap(torch.func.grad(solve))(lams)
        torch.testing.assert_close(ones, torch.ones_like(lams))


def test_batches_of_tasks_are_warm_as_well():
    monitor = ig.Monitor()
    solve = ig.implicit(
        SOLVER,
        ig.argmin(lambda w, t, lam: ((w - t) ** 2 + lam * w**4).sum(1), tasks=True),
        warm_start=True,
        monitor=monitor,
    )
    target = torch.ones(4, 3, dtype=torch.float64)
    for _ in range(2):
        solve(target, number(0.5)).sum().backward()
    assert monitor.reports[0].warm_started is False and monitor.last.warm_started is True


def test_threads_share_what_is_kept(monitored):
    solve, _ = monitored
    expected = gradient(solve, 0.5)[1]
    found, errors = [], []

    def work():
        try:
            found.extend(gradient(solve, 0.5)[1] for _ in range(3))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(found) == 9
    for g in found:
        torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-10)


def test_a_failed_call_keeps_the_last_good_phi(monitored):
    solve, monitor = monitored
    gradient(solve, 0.5)
    with pytest.raises(ig.InvalidSolutionError):
        gradient(solve, 1e6)  # its steps are too long
    gradient(solve, 0.5)
    assert monitor.last.warm_started and monitor.last.evaluations <= 2


def test_refusals():
    condition = ig.argmin(objective)
    with pytest.raises(ig.InvalidArgumentError, match="warm_start=1"):
        ig.implicit(SOLVER, condition, warm_start=1)
    with pytest.raises(ig.InvalidArgumentError, match="training began calls ago"):
        early = ig.EarlyStopped(steps=5, lr=0.1)
        ig.implicit(SOLVER, condition, warm_start=True, linear_solver=early)
    with pytest.raises(ig.InvalidArgumentError, match="parameter start"):
        ig.implicit(lambda x: x, condition, warm_start=True, linear_solver=ig.Exact())
    ig.implicit(lambda x: x, condition, warm_start=True)  # CG is warm
