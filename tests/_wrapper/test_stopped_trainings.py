"""Trainings that were stopped: EarlyStopped's gradient against autograd's through the steps."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit_grad as ig

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


X, Y = normal(12, 6, seed=0), normal(12, seed=1)
LR = 0.05


def descend(gradient, start, steps, momentum=0.0):
    """SGD of torch.optim, tensor by tensor; differentiable where grad mode is on."""
    phi = {k: t.clone() for k, t in start.items()}
    v = {k: torch.zeros_like(t) for k, t in phi.items()}
    for _ in range(steps):
        slope = gradient(phi)
        v = {k: momentum * v[k] + slope[k] for k in phi}
        phi = {k: phi[k] - LR * v[k] for k in phi}
    return phi


def misfit(phi, X, y):
    return (X @ torch.cat([phi["a"], phi["b"].reshape(-1)]) - y).square().sum() / 2 / len(y)


def slope_of_misfit(phi, X, y):
    x = torch.cat([phi["a"], phi["b"].reshape(-1)])
    g = X.T @ (X @ x - y) / len(y)
    return {"a": g[:2], "b": g[2:].reshape(2, 2)}


def outer(phi):
    return (phi["a"] * torch.tensor([1.0, -2.0], dtype=F64)).sum() + phi["b"].square().sum()


def zeros():
    return {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(2, 2, dtype=F64)}


def gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def close(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).norm()) <= 1e-10 * (1 + float(y.norm()))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_minimum_that_steps_did_not_reach(steps, momentum, curvature):
    """On a quadratic A is the same all along the path, and the gradient by y is exact."""
    ridge = torch.tensor([0.3, 0.02], dtype=F64)

    def slope(phi, y, ridge):
        g = slope_of_misfit(phi, X, y)
        return {"a": g["a"] + ridge[0] * phi["a"], "b": g["b"] + ridge[1] * phi["b"]}

    def solver(y):
        return descend(lambda phi: slope(phi, y, ridge), zeros(), steps, momentum)

    def model(phi, y):
        return phi["a"], phi["b"], X @ torch.cat([phi["a"], phi["b"].reshape(-1)])

    def loss(outputs, y):
        a, b, z = outputs
        fit = (z - y).square().sum() / 2 / len(y)
        return fit + ridge[0] / 2 * a.square().sum() + ridge[1] / 2 * b.square().sum()

    stopped = ig.EarlyStopped(steps=steps, lr=LR, momentum=momentum)
    solve = ig.implicit(
        solver, ig.argmin(loss, model=model), linear_solver=stopped, curvature=curvature
    )
    close(gradients(lambda y: outer(solve(y)), Y), gradients(lambda y: outer(solver(y)), Y))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("per", ["number", "tensor", "element"])
def test_a_proximal_minimum_that_steps_from_theta_did_not_reach(steps, momentum, per):
    """θ acts through λθ, and as the place where training starts."""
    lam = {
        "number": 0.4,
        "tensor": {"a": torch.tensor(0.4, dtype=F64), "b": torch.tensor(1.3, dtype=F64)},
        "element": {"a": torch.tensor([0.1, 2.0], dtype=F64), "b": torch.full((2, 2), 0.7).to(F64)},
    }[per]
    weights = {k: lam for k in "ab"} if per == "number" else lam

    def solver(theta, y):
        def slope(phi):
            g = slope_of_misfit(phi, X, y)
            return {k: g[k] + weights[k] * (phi[k] - theta[k]) for k in g}

        return descend(slope, theta, steps, momentum)

    def loss(phi, y):
        return misfit(phi, X, y)

    stopped = ig.EarlyStopped(steps=steps, lr=LR, momentum=momentum)
    solve = ig.implicit(solver, ig.proximal(loss, lam), linear_solver=stopped)
    args = normal(2, seed=2), normal(2, 2, seed=3), Y
    close(
        gradients(lambda a, b, y: outer(solve({"a": a, "b": b}, y)), *args),
        gradients(lambda a, b, y: outer(solver({"a": a, "b": b}, y)), *args),
    )


def test_what_an_argument_does_is_taken_at_the_end_of_the_path():
    """∂F/∂λ = φ − θ changes along the path; what is promised is the filter at its end."""
    lam = torch.tensor(0.4, dtype=F64, requires_grad=True)
    theta, v = normal(6, seed=2), normal(6, seed=5)
    H = X.T @ X / len(Y)

    def solver(theta):
        phi = theta.clone()
        for _ in range(7):
            phi = phi - LR * (X.T @ (X @ phi - Y) / len(Y) + 0.4 * (phi - theta))
        return phi

    solve = ig.implicit(
        solver,
        ig.proximal(lambda phi: (X @ phi - Y).square().sum() / 2 / len(Y), lam),
        linear_solver=ig.EarlyStopped(steps=7, lr=LR),
    )
    phi = solve(theta)
    (phi @ v).backward()
    A = H + 0.4 * torch.eye(6, dtype=F64)
    left = torch.linalg.matrix_power(torch.eye(6, dtype=F64) - LR * A, 7)
    g = torch.linalg.solve(A, torch.eye(6, dtype=F64) - left)
    expected = -(phi.detach() - theta) @ g @ v
    assert float(lam.grad) == pytest.approx(float(expected), rel=1e-9)


def test_a_learned_lam_and_theta_tied_twice():
    lam = torch.tensor(0.4, dtype=F64, requires_grad=True)

    def solver(theta, y):
        def slope(phi):
            g = X[:, :4].T @ (X[:, :4] @ torch.cat(phi) - y) / len(y)
            return [g[:2] + 0.4 * (phi[0] - theta[0]), g[2:] + 0.4 * (phi[1] - theta[1])]

        phi = [t.clone() for t in theta]
        for _ in range(5):
            phi = [p - LR * s for p, s in zip(phi, slope(phi), strict=True)]
        return phi

    def loss(phi, y):
        return (X[:, :4] @ torch.cat(phi) - y).square().sum() / 2 / len(y)

    solve = ig.implicit(
        solver, ig.proximal(loss, lam), linear_solver=ig.EarlyStopped(steps=5, lr=LR)
    )
    t = normal(2, seed=7)

    def total(phi):
        return (torch.cat(phi) * torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=F64)).sum()

    close(
        gradients(lambda t, y: total(solve([t, t], y)), t, Y),
        gradients(lambda t, y: total(solver([t, t], y)), t, Y),
    )


def test_tasks_and_vmap():
    def solver(theta, y):
        phi = theta.clone()
        for _ in range(6):
            phi = phi - LR * (X.T @ (X @ phi - y) / 12 + 0.5 * (phi - theta))
        return phi

    def loss(phi, y):
        return (X @ phi - y).square().sum() / 24

    stopped = ig.EarlyStopped(steps=6, lr=LR)
    solve = ig.implicit(solver, ig.proximal(loss, 0.5), linear_solver=stopped)
    thetas, ys = normal(3, 6, seed=2), normal(3, 12, seed=3)
    pairs = zip(thetas, ys, strict=True)
    expected = [gradients(lambda t, y: solver(t, y).pow(3).sum(), t, y) for t, y in pairs]
    found = torch.func.vmap(torch.func.grad(lambda t, y: solve(t, y).pow(3).sum(), argnums=(0, 1)))(
        thetas, ys
    )
    close(found, [torch.stack(g) for g in zip(*expected, strict=True)])


def bent(phi, a):
    """A saddle: curvature of both signs, wherever φ is."""
    return (phi[0] ** 2 - phi[1] ** 2 / 2 + phi[0] ** 3 / 6) / 2 + phi @ a


def test_neither_a_saddle_nor_a_slope_is_trouble():
    """φ is not meant to be a minimum: nothing is said, and the report tells what was done."""
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda a: torch.tensor([0.5, 2.0], dtype=F64),
        ig.argmin(bent),
        linear_solver=ig.EarlyStopped(time=3.0),
        monitor=monitor,
    )
    a = torch.ones(2, dtype=F64, requires_grad=True)
    solve(a).sum().backward()  # warnings are errors here
    report = monitor.last
    assert report.status.ok and report.min_curvature < 0 and report.inner_residual > 0.5
    assert report.filter_error < 1e-9 and report.linear_residual is None
    h = torch.tensor([1.25, 0.5], dtype=F64)
    assert torch.allclose(a.grad, torch.expm1(-3.0 * h) / h)


def test_second_derivatives_are_refused():
    solve = ig.implicit(
        lambda a: torch.tensor([0.5, 2.0], dtype=F64),
        ig.argmin(bent),
        linear_solver=ig.EarlyStopped(time=3.0),
    )
    a = torch.ones(2, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(solve(a).pow(2).sum(), a, create_graph=True)
    with pytest.raises(ig.GraphError, match="second derivatives through EarlyStopped"):
        g.sum().backward()


def test_where_it_does_not_belong():
    stopped = ig.EarlyStopped(time=1.0)
    with pytest.raises(ig.InvalidArgumentError, match="EarlyStopped needs a symmetric system"):
        ig.implicit(lambda a: a, ig.root(lambda phi, a: phi - a), linear_solver=stopped)
    with pytest.raises(ig.InvalidArgumentError, match="EarlyStopped is for argmin and proximal"):
        ig.implicit(
            lambda a: a, ig.root(lambda phi, a: phi - a, symmetric=True), linear_solver=stopped
        )
    bounded = ig.argmin(bent, equality=lambda phi, a: phi.sum())
    with pytest.raises(ig.InvalidArgumentError, match="EarlyStopped needs a positive definite"):
        ig.implicit(lambda a: a, bounded, linear_solver=stopped)
    solve = ig.implicit(lambda a: a, ig.argmin(bent), linear_solver=stopped)
    with pytest.raises(ig.InvalidArgumentError, match=r"EarlyStopped .* CG\(\)"):
        ig.certify(solve, (torch.ones(2, requires_grad=True),), torch.sum)


def half_trained(steps, lr):
    """Steps down the saddle from a start beside it: both ends of the path are far from settled."""

    def solver(a):
        phi = torch.tensor([0.3, 0.4], dtype=F64)
        for _ in range(steps):
            phi = phi - lr * (torch.tensor([1.0, -0.5], dtype=F64) * phi + a)
        return phi

    return solver


def test_a_neumann_series_with_the_steps_length_is_the_derivative_of_the_steps():
    """Its terms grow along negative curvature as the steps do: that is no trouble."""
    solver, monitor = half_trained(9, 0.2), ig.Monitor()

    def quadratic(phi, a):
        return (phi[0] ** 2 - phi[1] ** 2 / 2) / 2 + phi @ a

    solve = ig.implicit(
        solver,
        ig.argmin(quadratic),
        linear_solver=ig.Neumann(terms=9, scale=0.2),
        monitor=monitor,
    )
    a = normal(2, seed=4)
    close(
        gradients(lambda a: solve(a).pow(3).sum(), a),
        gradients(lambda a: solver(a).pow(3).sum(), a),
    )
    assert monitor.last.status == ig.Status.TRUNCATED
    long = ig.implicit(
        solver,
        ig.argmin(lambda phi, a: phi.square().sum() / 2 + phi @ a),
        linear_solver=ig.Neumann(terms=30, scale=2.5),
    )
    with pytest.warns(ig.ImplicitGradWarning, match="a scale too large"):
        gradients(lambda a: long(a).sum(), a)


def test_by_default_a_saddle_gets_the_minimisers_own_steps():
    start = torch.tensor([0.4, 0.3], dtype=F64)
    minimiser = ig.solvers.GradientDescent(lr=0.1, steps=5)
    monitor, a = ig.Monitor(), normal(2, seed=4)
    options = {"init": lambda a: start, "monitor": monitor}
    default = ig.implicit(minimiser, ig.argmin(bent), **options)
    with pytest.warns(ig.ImplicitGradWarning, match="the minimiser's own number of steps"):
        found = gradients(lambda a: default(a).pow(3).sum(), a)
    assert monitor.last.substitute == "early_stopped"
    assert monitor.last.status == ig.Status.NEGATIVE_CURVATURE
    own = ig.implicit(
        minimiser, ig.argmin(bent), linear_solver=ig.EarlyStopped(steps=5, lr=0.1), **options
    )
    close(found, gradients(lambda a: own(a).pow(3).sum(), a))


def test_a_minimisers_optimizer_is_looked_at_once_a_solve():
    """A factory may be slow, or print; a run makes one as well."""
    made = []

    def factory(tensors):
        made.append(torch.optim.SGD(tensors, lr=0.1))
        return made[-1]

    start = torch.tensor([0.4, 0.3], dtype=F64)
    minimiser = ig.solvers.TorchOptim(factory=factory, steps=5)
    solve = ig.implicit(minimiser, ig.argmin(bent), init=lambda a: start)
    with pytest.warns(ig.ImplicitGradWarning, match="the minimiser's own number of steps"):
        gradients(lambda a: solve(a).pow(3).sum(), normal(2, seed=4))
    assert len(made) == 2


@pytest.mark.parametrize("off", [0.0, 1e-3, 0.3])
def test_by_default_a_saddle_gets_the_time_that_phi_and_its_slope_allow(off):
    """Each task its own, in a batch as alone; none below 1 over the greatest curvature."""
    h = torch.tensor([1.0, -0.3, 2.0], dtype=F64)

    def solver(b):
        return b / h + off

    def objective(phi, b):
        return (h * phi * phi).sum() / 2 - phi @ b

    b, v = normal(4, 3, seed=4), normal(3, seed=5)
    solve = ig.implicit(solver, ig.argmin(objective), on_failure="ignore")
    batch = torch.func.vmap(torch.func.grad(lambda b: solve(b) @ v))(b)
    for task, found in zip(b, batch, strict=True):
        phi, slope = solver(task), h * off
        longest = float(phi.norm() / slope.norm()) if off else float("inf")
        time = min(max(longest, 0.5), 100.0)
        expected = v * -torch.expm1(-time * h.abs()) / h.abs()
        close([found], [expected])
        close(gradients(lambda b: solve(b) @ v, task), [expected])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-30, 30),
    st.integers(-30, 30),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.03, 1.0]),
    st.booleans(),
)
def test_units_change_neither_statuses_nor_relative_gradients(of_phi, of_value, seed, off, saddle):
    """φ times c, and the objective times d, with arguments in their own units."""
    h = torch.tensor([1.0, -0.3 if saddle else 0.1, 3.0], dtype=F64)
    b, error = normal(3, seed=seed), off * normal(3, seed=seed + 1)

    def run(c, d):
        def objective(phi, b):
            x = phi / c
            return d * ((h * x * x).sum() / 2 + (x**4).sum() / 20 - x @ b)

        def solver(b):
            x = torch.ones(3, dtype=F64)
            for _ in range(400):
                x = x - (h * x + x**3 / 5 - b) / (h.abs() + 3 * x.square() / 5 + 0.1)
            return c * (x + error)

        monitor, leaf = ig.Monitor(), b.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solve = ig.implicit(solver, ig.argmin(objective), monitor=monitor, check="never")
            (solve(leaf) / c).sum().backward()
        return monitor.last, leaf.grad

    (report, gradient), (same, scaled) = run(1.0, 1.0), run(2.0**of_phi, 2.0**of_value)
    assert report.status == same.status and report.substitute == same.substitute
    assert torch.allclose(gradient, scaled, rtol=1e-9, atol=0)


def test_zero_may_be_a_solution():
    """Its own size is no measure for it, and no number of ours is one in the user's units."""
    for unit in (1e-12, 1.0, 1e12):
        y = torch.tensor([unit, unit, -2 * unit], dtype=F64, requires_grad=True)
        ones = torch.ones(3, dtype=F64)

        def objective(w, y, ones=ones):
            return (w * ones - y).square().sum() / 2

        near = ig.implicit(lambda y, u=unit: torch.tensor(1e-9 * u).double(), ig.argmin(objective))
        near(y).backward()  # warnings are errors here
        far = ig.implicit(lambda y, u=unit: torch.tensor(0.1 * u).double(), ig.argmin(objective))
        with pytest.warns(ig.ImplicitGradWarning, match="phi does not solve the inner problem"):
            far(y).backward()


@pytest.mark.parametrize("steps", [1, 3])
def test_by_default_a_few_steps_of_a_module_are_as_short_as_they_were(steps):
    """How far it went, over its slope, is their time; ‖φ‖/‖F‖ is thousands of times more."""
    net, lr = Saddle(), 1e-3
    a = torch.tensor([0.3, 0.4], dtype=F64, requires_grad=True)

    def train(net, a):
        for _ in range(steps):
            slope = torch.autograd.grad(bent(net.phi, a), net.phi)[0]
            with torch.no_grad():
                net.phi -= lr * slope
        return net

    solve = ig.implicit(train, ig.argmin(lambda net, a: bent(net.phi, a)))
    with pytest.warns(ig.ImplicitGradWarning, match=r"a time of \|phi - phi_0\|/\|F\|"):
        found = gradients(lambda a: solve(net, a).phi.sum(), a)
    assert (found[0] + steps * lr).abs().max() < 0.01 * steps * lr


def test_by_default_a_few_steps_of_weights_in_a_dict_are_as_short_as_they_were():
    """Where the dict of weights is handed in; a vector handed in might be anything."""
    lr, start = 1e-3, {"x": 5 * torch.ones(1, dtype=F64), "y": 5 * torch.ones(1, dtype=F64)}
    a = torch.tensor([0.3, 0.4], dtype=F64, requires_grad=True)

    def value(phi, *args):
        return bent(torch.cat(list(phi.values())), args[-1])

    def step(start, a):
        phi = {k: p.clone().requires_grad_() for k, p in start.items()}
        slopes = torch.autograd.grad(value(phi, a), list(phi.values()))
        return {k: p - lr * g for (k, p), g in zip(phi.items(), slopes, strict=True)}

    solve = ig.implicit(step, ig.argmin(value))
    with pytest.warns(ig.ImplicitGradWarning, match=r"a time of \|phi - phi_0\|/\|F\|"):
        found = gradients(lambda a: sum(solve(start, a).values()).sum(), a)
    assert (found[0] + lr).abs().max() < 0.01 * lr
    unknown = ig.implicit(lambda a: step(start, a), ig.argmin(value))
    with pytest.warns(ig.ImplicitGradWarning, match="far too long after a few steps"):
        found = gradients(lambda a: sum(unknown(a).values()).sum(), a)
    assert (found[0] + lr).abs().max() > lr


def test_decays_like_the_weights_are_not_taken_for_their_start():
    start = {"x": 5 * torch.ones(1, dtype=F64), "y": 5 * torch.ones(1, dtype=F64)}
    decays = {name: torch.zeros(1, dtype=F64, requires_grad=True) for name in start}

    def value(phi, decays):
        decayed = sum((decays[name] * phi[name].square()).sum() for name in phi)
        return bent(torch.cat(list(phi.values())), torch.tensor([0.3, 0.4], dtype=F64)) + decayed

    solve = ig.implicit(lambda decays: {k: 0.99 * t for k, t in start.items()}, ig.argmin(value))
    with pytest.warns(ig.ImplicitGradWarning, match="far too long after a few steps"):
        sum(solve(decays).values()).sum().backward()


def test_a_module_that_stays_where_it_was_has_a_gradient_all_the_same():
    solve = ig.implicit(
        lambda net, a: net, ig.argmin(lambda net, a: bent(net.phi, a)), on_failure="ignore"
    )
    (found,) = gradients(lambda a: solve(Saddle(), a).phi.sum(), torch.ones(2, dtype=F64))
    assert found.abs().min() > 0.3


class Saddle(torch.nn.Module):
    """A point on `bent`."""

    def __init__(self):
        super().__init__()
        self.phi = torch.nn.Parameter(torch.tensor([2.0, 3.0], dtype=F64))
