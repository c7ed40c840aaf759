"""A tolerance that a minimiser was given is met, or the user is told that it is not."""

import warnings

import pytest
import torch

import implicit_grad as ig
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOptim

pytestmark = pytest.mark.usefixtures("double_precision")


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def bowl(phi):
    """Curvatures 1 and 10, minimum at (1, 1)."""
    return ((phi - 1) ** 2 * torch.tensor([1.0, 10.0], dtype=phi.dtype)).sum() / 2


def logcosh(phi):
    return (phi - 1).cosh().log().sum() + 0.1 * phi.square().sum()


SHORT = {
    "GradientDescent": GradientDescent(lr=0.1, tol=1e-9, steps=3),
    "GradientDescent, rtol": GradientDescent(lr=0.1, rtol=1e-9, steps=3),
    "Nesterov": Nesterov(lr=0.1, tol=1e-9, steps=3),
    "NewtonCG": NewtonCG(tol=1e-9, maxiter=3, cg=1),
    "TorchOptim": TorchOptim(factory=sgd, tol=1e-9, steps=3),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_missed_tolerance_is_told_with_numbers(name):
    solver, init = SHORT[name], torch.zeros(2)
    with pytest.warns(ig.ImplicitGradWarning) as said:
        phi = solver.minimize(logcosh, init)
    slope = torch.func.grad(logcosh)(phi).norm().item()
    (message,) = (str(w.message) for w in said)
    option = "rtol" if solver.tol is None else "tol"
    assert message.startswith(f"{type(solver).__name__}: {option}=1e-09")
    assert f"after 3 steps the gradient's norm is {slope:.2g}" in message
    assert "Allow more steps" in message


def test_torchopt_tells_as_well():
    torchopt = pytest.importorskip("torchopt")
    solver = ig.solvers.TorchOpt(transform=torchopt.sgd(lr=0.1), tol=1e-9, steps=3)
    with pytest.warns(ig.ImplicitGradWarning, match="TorchOpt: tol=1e-09 was asked for"):
        solver.minimize(bowl, torch.zeros(2))


@pytest.mark.parametrize("steps", [0, 1])
def test_the_last_iterate_is_looked_at(steps):
    """One step of length 1 solves (φ − 1)²/2 exactly; no step leaves a gradient of 1."""
    solver = GradientDescent(lr=1.0, tol=1e-9, steps=steps)
    square = lambda phi: ((phi - 1) ** 2).sum() / 2  # noqa: E731
    if steps:
        assert solver.minimize(square, torch.zeros(1)) == 1
        return
    with pytest.warns(ig.ImplicitGradWarning, match="after 0 steps the gradient's norm is 1"):
        solver.minimize(square, torch.zeros(1))


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_said_of_a_number_of_steps(name):
    solver = SHORT[name]
    options = {"tol": None, "rtol": None}
    phi = type(solver)(**{**vars(solver), **options}).minimize(logcosh, torch.zeros(2))
    assert torch.isfinite(phi).all()


def test_a_kink_is_told_for_what_it_is():
    """|φ − 1| with a slope of its own has its minimum where no gradient is small."""
    kinked = lambda phi: (2 * (phi - 0.3).abs() + 0.1 * phi).sum()  # noqa: E731
    with pytest.warns(ig.ImplicitGradWarning, match="No step length makes .* kink"):
        NewtonCG(tol=1e-9, maxiter=100).minimize(kinked, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_no_alarm_at_rounding_level(seed, dtype):
    """No gradient of exactly 0 can be had, and none is missed, whatever the scale of φ."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(40, 6, generator=g) * torch.logspace(0, seed % 3, 6)
    X, y = X.to(dtype), torch.randn(40, generator=g).to(dtype)
    for shift in (0.0, 100.0):
        ridge = lambda w: ((X @ (w - shift) - y) ** 2).mean() + (w - shift).square().sum() / 100  # noqa: B023, E731
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            NewtonCG(tol=0.0, maxiter=100, cg=18).minimize(ridge, torch.zeros(6, dtype=dtype))


def test_it_is_told_through_implicit_and_imaml():
    a = torch.ones(2, requires_grad=True)
    objective = lambda phi, a: logcosh(phi) + (phi * a).sum()  # noqa: E731
    solve = ig.implicit(NewtonCG(tol=1e-9, maxiter=1), ig.argmin(objective), init=torch.zeros_like)
    with pytest.warns(ig.ImplicitGradWarning, match="tol=1e-09 was asked for"):
        solve(a)
    l2l = pytest.importorskip("learn2learn")
    model = torch.nn.Linear(2, 1)
    solver = NewtonCG(tol=1e-12, maxiter=1, cg=1)
    learner = ig.imaml(l2l.algorithms.MAML(model, lr=0.1), lam=2.0, solver=solver).clone()
    X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(ig.ImplicitGradWarning, match="NewtonCG: tol=1e-12"):
        learner.adapt(lambda: logcosh(learner(X)))
