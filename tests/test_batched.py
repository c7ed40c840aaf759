"""Batches of problems: under vmap and as stacks, equal to one problem after another."""

import pytest
import torch
from problems import minimize, normal, prox, wavy
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.nn.functional import softplus

import implicit_grad as ig
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOptim

# torch's own, in the decompositions that forward mode needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

B, N, M = 5, 3, 6
LAM = 0.7
TIGHT = {"linear_solver": ig.CG(rtol=1e-13), "on_failure": "raise"}


def loss(phi, X):
    """Not quadratic, and convex."""
    return softplus(X @ phi).sum() + (phi**4).sum() / 20


def black_box(theta, X):
    return minimize(lambda w: loss(w, X) + prox(w, theta, LAM), theta)


SOLVERS = {
    "a function": black_box,
    "Newton": NewtonCG(maxiter=50, tol=1e-13),
    "descent": GradientDescent(lr=0.05, steps=30),
    "accelerated": Nesterov(lr=0.05, kappa=20.0, steps=30),
    "until a tolerance": GradientDescent(lr=0.05, tol=0.1),
    "of torch": TorchOptim(factory=lambda t: torch.optim.SGD(t, lr=0.05), steps=30),
}


def tasks():
    return normal(B, N, seed=1, grad=False), normal(B, M, N, seed=2, grad=False)


def close(actual, expected, tolerance=1e-10):
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        assert e.norm() > 1e-6 and (a - e).norm() <= tolerance * e.norm()


def loop(function, *batches):
    """One task after another, stacked."""
    found = [function(*task) for task in zip(*batches, strict=True)]
    if isinstance(found[0], tuple):
        return tuple(map(torch.stack, zip(*found, strict=True)))
    return torch.stack(found)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_equals_the_loop(name):
    """Also where the inner problems are not solved: then both do the same steps."""
    theta, X = tasks()
    condition, quiet = ig.proximal(loss, LAM), {**TIGHT, "on_failure": "ignore"}
    solve = ig.implicit(SOLVERS[name], condition, **quiet)

    def outer(theta, X):
        return wavy(solve(theta, X))

    for function in (solve, grad(outer, (0, 1)), jacrev(solve, (0, 1)), hessian(outer)):
        close(vmap(function)(theta, X), loop(function, theta, X))
    close(
        vmap(lambda t, X: jvp(solve, (t, X), (t, X))[1])(theta, X),
        loop(lambda t, X: jvp(solve, (t, X), (t, X))[1], theta, X),
    )


@pytest.mark.parametrize("outer_dim", [0, 1])
def test_what_the_tasks_share_collects_their_gradients(outer_dim):
    theta, lam = normal(N, seed=1), torch.tensor(LAM, dtype=torch.float64, requires_grad=True)
    X = normal(B, M, N, seed=2)
    solve = ig.implicit(NewtonCG(maxiter=50, tol=1e-13), ig.proximal(loss, lam), **TIGHT)
    moved = X.movedim(0, outer_dim)
    phi = vmap(solve, in_dims=(None, outer_dim))(theta, moved)
    wanted = (theta, X, lam)
    found = torch.autograd.grad(wavy(phi), wanted, create_graph=True)
    phi = torch.stack([solve(theta, x) for x in X])
    expected = torch.autograd.grad(wavy(phi), wanted, create_graph=True)
    close(found, expected)
    second = [torch.autograd.grad(wavy(g), wanted) for g in (found, expected)]
    close(*second)


@pytest.mark.parametrize("condition", ["argmin", "proximal", "with a model"])
def test_stacks_equal_the_loop(condition):
    theta, X = (t.requires_grad_() for t in tasks())

    def objective(phi, theta, X):
        return loss(phi, X) + prox(phi, theta, LAM)

    single, batch = {
        "argmin": (
            ig.argmin(objective),
            ig.argmin(vmap(objective), tasks=True),
        ),
        "proximal": (ig.proximal(loss, LAM), ig.proximal(vmap(loss), LAM, tasks=True)),
        "with a model": (
            ig.proximal(lambda out, X: out.square().sum(), LAM, model=lambda phi, X: X @ phi),
            ig.proximal(
                lambda out, X: out.square().sum(1),
                LAM,
                tasks=True,
                model=lambda phi, X: (X @ phi[:, :, None])[:, :, 0],
            ),
        ),
    }[condition]
    solver, products = NewtonCG(maxiter=50, tol=1e-12), ig.Monitor()
    options = {"curvature": "gauss_newton"} if condition == "with a model" else {}
    one = ig.implicit(solver, single, **TIGHT, **options)
    all_at_once = ig.implicit(solver, batch, monitor=products, **TIGHT, **options)
    found = torch.autograd.grad(wavy(all_at_once(theta, X)), (theta, X))
    phi = torch.stack([one(t, x) for t, x in zip(theta, X, strict=True)])
    close(found, torch.autograd.grad(wavy(phi), (theta, X)))
    assert len(products.reports) == B
    assert {r.products for r in products.reports} == {products.last.products}


def test_one_task_in_trouble_is_one_report():
    """One of the tasks has negative curvature; the others get their gradients."""
    c = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64, requires_grad=True)
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda c: torch.ones(3, 2, dtype=torch.float64),
        ig.argmin(lambda phi, c: c * (phi - 1).square().sum(1), tasks=True),
        monitor=monitor,
        on_failure="ignore",
    )
    solve(c).sum().backward()
    names = [r.status.name for r in monitor.reports]
    assert names == ["CONVERGED", "NEGATIVE_CURVATURE", "CONVERGED"]
    with pytest.raises(ig.LinearSolveError, match="non-positive curvature"):
        loud = ig.implicit(solve.solver, solve.setup.condition, on_failure="raise")
        loud(c).sum().backward()


def test_random_numbers_differ_between_tasks():
    solve = ig.implicit(
        torch.clone,
        ig.proximal(lambda p: torch.nn.functional.dropout(p, 0.5).square().sum(), 1.0),
        on_failure="ignore",
    )
    theta = torch.ones(64, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(vmap(solve, randomness="different")(theta).sum(), theta)
    rows = {tuple(row) for row in (g > 0.5).tolist()}
    assert len(rows) > 8
    assert ((g - 1).abs().minimum((g - 1 / 9).abs()) < 1e-12).all()


def test_functions_that_cannot_run_for_a_batch_run_one_by_one():
    def branching(phi, X):
        return loss(phi, X) if float(phi.detach().sum()) > -1e9 else phi.sum()

    theta, X = tasks()
    solve = ig.implicit(black_box, ig.proximal(branching, LAM), **TIGHT)
    plain = ig.implicit(black_box, ig.proximal(loss, LAM), **TIGHT)
    outer = [grad(lambda t, X, s=s: wavy(s(t, X)), (0, 1)) for s in (solve, plain)]
    close(vmap(outer[0])(theta, X), vmap(outer[1])(theta, X))


BAD = {
    "linear solver": (
        lambda: ig.implicit(
            torch.clone, ig.proximal(loss, 1.0, tasks=True), linear_solver=ig.MINRES()
        ),
        "linear_solver must be CG",
    ),
    "polish": (
        lambda: ig.implicit(torch.clone, ig.proximal(loss, 1.0, tasks=True), polish=1),
        "do not go with tasks=True",
    ),
    "constraints": (
        lambda: ig.argmin(loss, bounds=(0, 1), tasks=True),
        "tasks does not go with constraints",
    ),
    "one loss for all": (
        lambda: ig.implicit(torch.clone, ig.proximal(lambda p: p.sum(), 1.0, tasks=True))(
            normal(B, N)
        ),
        rf"one number for each of {B} tasks.*shape \(\)",
    ),
    "no first dimension": (
        lambda: ig.implicit(torch.clone, ig.proximal(lambda p: p, 1.0, tasks=True))(
            torch.tensor(1.0, requires_grad=True)
        ),
        "first dimension of each tensor of phi counts the tasks",
    ),
    "a matrix": (
        lambda: ig.implicit(
            torch.clone, ig.proximal(loss, ig.LowRank(1.0, torch.ones(B, N, 1)), tasks=True)
        )(normal(B, N)),
        "LowRank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    make, message = BAD[name]
    with pytest.raises(ig.InvalidArgumentError, match=message):
        make()
