"""Batches of problems: under vmap and as stacks, equal to one problem after another."""

import math

import pytest
import torch
from problems import minimize, normal, prox, wavy
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.nn.functional import softplus

import implicit_grad as ig
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOptim

# torch's own, in the decompositions that forward mode needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

B, N, M = 3, 3, 6
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
    "descent": GradientDescent(lr=0.05, steps=10),
    "accelerated": Nesterov(lr=0.05, kappa=20.0, steps=10),
    "until a tolerance": GradientDescent(lr=0.05, tol=0.1),
    "of torch": TorchOptim(factory=lambda t: torch.optim.SGD(t, lr=0.05), steps=10),
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


# ---------------------------------------------------------------- what a reviewer found


class Quartic(torch.autograd.Function):
    """φ⁴, differentiable once only, with the rule for vmap that torch makes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**4

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 4 * g * ctx.saved_tensors[0] ** 3


def test_curvature_is_not_lost_under_vmap():
    """torch hides the mark of functions that are differentiable once."""

    def objective(phi, y):
        return Quartic.apply(phi).sum() + (phi - y).square().sum()

    descent = GradientDescent(lr=0.05, tol=1e-12)
    solve = ig.implicit(descent, ig.argmin(objective), on_failure="raise")
    y = normal(4, 3)
    (found,) = torch.autograd.grad(vmap(solve)(y).sum(), y)
    phi = vmap(solve)(y).detach()
    torch.testing.assert_close(found, 2 / (2 + 12 * phi**2), rtol=1e-8, atol=0)
    once = ig.implicit(
        descent, ig.argmin(vmap(objective), tasks=True), curvature="hessian", on_failure="ignore"
    )
    with pytest.raises(ig.GraphError, match="once_differentiable"):
        once(y).sum().backward()


def test_a_captured_batch_is_refused():
    theta, X = tasks()
    scales = torch.rand(B, dtype=torch.float64)

    def inner(scale):
        condition = ig.proximal(lambda phi, X: scale * loss(phi, X), LAM)
        return vmap(ig.implicit(GradientDescent(lr=0.05, steps=9), condition))(theta, X)

    with pytest.raises(ig.GraphError, match="captured a tensor"):
        vmap(inner)(scales)


def test_batches_within_batches():
    theta, X = tasks()
    scales = torch.rand(4, dtype=torch.float64)
    condition = ig.proximal(lambda phi, X, scale: scale * loss(phi, X), LAM)
    solve = ig.implicit(NewtonCG(maxiter=50, tol=1e-13), condition, **TIGHT)
    outer = grad(lambda t, X, scale: wavy(solve(t, X, scale)), (0, 1, 2))
    found = vmap(lambda s: vmap(outer, in_dims=(0, 0, None))(theta, X, s))(scales)
    for i, scale in enumerate(scales):
        expected = loop(lambda t, X, s=scale: outer(t, X, s), theta, X)
        close(tuple(t[i] for t in found), expected)


@pytest.mark.parametrize("reason", ["a branch", "an output that is no tensor"])
def test_a_black_box_runs_once_a_sample_whatever_the_condition(reason):
    runs = []

    def counted(theta, X):
        runs.append(theta)
        return black_box(theta, X)

    def branching(phi, X):
        return loss(phi, X) if float(phi.detach().sum()) > -1e9 else phi.sum()

    model = {"model": lambda phi, X: (phi, None)}
    condition = {
        "a branch": ig.proximal(branching, LAM),
        "an output that is no tensor": ig.proximal(lambda out, X: loss(out[0], X), LAM, **model),
    }[reason]
    theta, X = tasks()
    solve = ig.implicit(counted, condition, **TIGHT)
    vmap(grad(lambda t, X: wavy(solve(t, X))))(theta, X)
    assert len(runs) == B


def test_the_users_errors_are_raised_once():
    """And nothing is solved again to find them anew."""
    monitor = ig.Monitor()
    flat = ig.argmin(lambda phi, y: (phi * 0).sum() + (y * 0).sum() - phi.square().sum())
    solve = ig.implicit(torch.clone, flat, monitor=monitor, on_failure="raise")
    y = normal(4, 2)
    with pytest.raises(ig.LinearSolveError):
        torch.autograd.grad(vmap(solve)(y).sum(), y)
    assert len(monitor.reports) == 4


def test_a_lam_for_each_task():
    theta, X = tasks()
    lams = torch.rand(B, dtype=torch.float64) + 0.5

    def outer(lam, theta, X):
        condition = ig.proximal(loss, lam)
        return wavy(ig.implicit(NewtonCG(maxiter=50, tol=1e-13), condition, **TIGHT)(theta, X))

    every = (0, 1, 2)
    close(vmap(grad(outer, every))(lams, theta, X), loop(grad(outer, every), lams, theta, X))


def test_first_order_looks_at_the_right_hand_sides():
    condition = ig.proximal(lambda p: p.square().sum(1), 2.0, tasks=True)
    monitor = ig.Monitor()
    quiet = {"on_failure": "ignore", "monitor": monitor}
    solve = ig.implicit(torch.clone, condition, linear_solver=ig.CG(maxiter=0), **quiet)
    theta = normal(3, 2)
    v = torch.tensor([[1.0, 2.0], [0.0, 0.0], [math.nan, 1.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(solve(theta), theta, v)
    assert [r.status.name for r in monitor.reports] == ["FIRST_ORDER", "ZERO_RHS", "NONFINITE_RHS"]
    assert torch.equal(found[:2], v[:2]) and found[2].isnan().all()


def test_the_sum_of_losses_may_be_larger_than_a_loss():
    """In float16, whose greatest number is 65,504."""
    condition = ig.proximal(lambda p: p.square().sum(1) * 100, 300.0, tasks=True)
    theta = torch.full((40, 4), 3.0, dtype=torch.float16, requires_grad=True)
    phi = ig.implicit(lambda t: t * 0.6, condition, on_failure="ignore")(theta)
    (found,) = torch.autograd.grad(phi.sum(), theta)
    torch.testing.assert_close(found, torch.full_like(found, 0.6))


def test_a_batch_without_samples():
    with pytest.raises(ig.InvalidArgumentError, match="without samples"):
        vmap(ig.implicit(black_box, ig.proximal(loss, LAM)))(*(t[:0] for t in tasks()))


# ---------------------------------------------------------------- errors

BAD = {
    "finite differences": (
        lambda: ig.implicit(
            torch.clone, ig.proximal(loss, 1.0, tasks=True), curvature="finite_difference"
        ),
        "with tasks=True, finite differences are taken for one task at a time",
    ),
    "linear solver": (
        lambda: ig.implicit(
            torch.clone, ig.proximal(loss, 1.0, tasks=True), linear_solver=ig.Exact()
        ),
        "CG without preconditioner and warm start.*got Exact",
    ),
    "polish": (
        lambda: ig.implicit(torch.clone, ig.proximal(loss, 1.0, tasks=True), polish=1),
        "with tasks=True, polish and rtol_gradient are for one task at a time",
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
