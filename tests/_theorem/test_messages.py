"""Warnings name the solver that was used, the tensors' own dtype and the cause."""

import dataclasses

import pytest
import torch

import implicit_grad as ig

INDEFINITE = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))


def saddle(solver):
    b = torch.ones(3, dtype=torch.float64, requires_grad=True)
    condition = ig.argmin(lambda x, b: x @ INDEFINITE @ x / 2 - b @ x)
    solve = ig.implicit(
        lambda b: torch.linalg.solve(INDEFINITE, b), condition, linear_solver=solver
    )
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature") as said:
        solve(b).backward(torch.arange(1.0, 4.0, dtype=torch.float64))
    (message,) = (str(w.message) for w in said)
    return message, b.grad


def test_negative_curvature_names_the_solver_that_met_it():
    message, _ = saddle(ig.CG())
    assert "CG gave the derivative of a training that was stopped" in message
    assert "a time of |phi|/|F|, of 1 to 200 over the greatest curvature" in message
    assert "EarlyStopped(time=...)" in message and "CG stops" not in message
    message, gradient = saddle(ig.MINRES())
    assert "MINRES goes on there" in message and "CG stops" not in message
    exact = torch.linalg.solve(INDEFINITE, torch.arange(1.0, 4.0, dtype=torch.float64))
    torch.testing.assert_close(gradient, exact)
    message, _ = saddle(ig.Exact())
    assert "CG" not in message and "MINRES" not in message


@pytest.mark.parametrize("linear_solver", [ig.CG(), ig.MINRES(), ig.Exact()])
def test_an_unsolved_problem_is_named_before_its_curvature(linear_solver):
    """Between two minima, on the way to one."""
    a = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.3, 0.4], dtype=torch.float64)
    condition = ig.argmin(lambda w, a: (w**4 / 4 - w**2 / 2 - a * w).sum())
    solve = ig.implicit(lambda a: start.clone(), condition, linear_solver=linear_solver)
    with pytest.warns(ig.ImplicitGradWarning) as said:
        solve(a).sum().backward()
    (message,) = (str(w.message) for w in said)
    first, second = "First: phi does not solve the inner problem", "non-positive curvature"
    assert 0 <= message.find(first) < message.find(second)
    assert "First" not in saddle(linear_solver)[0]  # of which only the second is true


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_curvature_of_zero_is_told_for_what_it_is(dtype):
    """x₀ alone is determined; a gradient along x₁ meets a curvature of exactly 0."""
    b = torch.ones(2, dtype=dtype, requires_grad=True)
    condition = ig.argmin(lambda x, b: (x[0] - b[0]) ** 2 + 0 * x[1])
    v = torch.tensor([0.0, 1.0], dtype=dtype)
    with pytest.warns(ig.ImplicitGradWarning, match=r"zero curvature.*MINRES\(\)") as said:
        ig.implicit(torch.clone, condition)(b).backward(v)
    assert "lam" not in str(said[0].message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stagnating(ig.CG):
    """CG that says of itself that it stagnated."""

    def solve(self, operator, rhs, verify=False):
        return dataclasses.replace(super().solve(operator, rhs, verify), status=STAGNATED)


STAGNATED = ig.Status.STAGNATED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_is_advised_where_it_helps(dtype):
    a = torch.ones(3, dtype=dtype, requires_grad=True)
    solve = ig.implicit(
        torch.clone, ig.argmin(lambda x, a: ((x - a) ** 2).sum()), linear_solver=Stagnating()
    )
    with pytest.warns(ig.ImplicitGradWarning, match="stopped improving above rtol") as said:
        solve(a).sum().backward()
    assert ("use float64" in str(said[0].message)) == (dtype == torch.float32)


def test_a_class_for_a_condition_is_to_be_called():
    with pytest.raises(ig.InvalidArgumentError, match=r"got the class argmin: call it .* argmin\("):
        ig.implicit(lambda b: b, ig.argmin)


def hilbert(n: int) -> torch.Tensor:
    """A matrix that no iteration of a few steps solves with."""
    i = torch.arange(1.0, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i - 1)


# In each, the linear solve fails too.
FAILING = {
    "MAX_ITER": (ig.CG(maxiter=2, rtol=1e-12), hilbert(8)),
    "STAGNATED": (ig.CG(rtol=1e-30, maxiter=1000), hilbert(8)),
    "SINGULAR": (ig.Exact(), torch.ones(8, 8, dtype=torch.float64)),
    "SINGULAR of MINRES": (ig.MINRES(), torch.ones(8, 8, dtype=torch.float64)),
}


@pytest.mark.parametrize("off", [0.0, 1.0])
@pytest.mark.parametrize("name", FAILING)
def test_an_unsolved_problem_is_named_before_a_failed_solve(name, off):
    linear_solver, A = FAILING[name]
    x = torch.linspace(1.0, 2.0, 8, dtype=torch.float64)
    b = (A @ x).requires_grad_()
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda b: x + off * x.flip(0),  # a solution, if nothing is added
        ig.argmin(lambda w, b: w @ A @ w / 2 - b @ w),
        linear_solver=linear_solver,
        monitor=monitor,
    )
    with pytest.warns(ig.ImplicitGradWarning) as said:
        solve(b)[0].backward()
    status = monitor.last.status
    assert status.name == name.partition(" ")[0]
    (message,) = (str(w.message) for w in said)
    assert status.sentence[:40] in message
    assert message.startswith("two things are wrong") == bool(off)


@pytest.mark.parametrize("linear_solver", [ig.CG(), ig.Exact(), ig.CG(maxiter=1, rtol=1e-9)])
def test_curvature_that_the_outer_loss_does_not_see_counts_all_the_same(linear_solver):
    """φ is right to 1e-7; along its error F is steep, and the outer loss depends on other parts."""
    steep = torch.tensor([1e6, 1.0, 2.0], dtype=torch.float64)
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    target = lambda a: torch.stack([a.new_tensor(1.0), a, a])  # noqa: E731
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda a: target(a) + a.new_tensor([1e-7, 0.0, 0.0]),
        ig.argmin(lambda w, a: (steep * (w - target(a)).square()).sum() / 2),
        linear_solver=linear_solver,
        monitor=monitor,
        on_failure="ignore",
    )
    (solve(a) * a.new_tensor([0.0, 1.0, 3.0])).sum().backward()
    assert monitor.last.inner_residual > 0.05
    assert monitor.last.status is not ig.Status.INNER_NOT_STATIONARY


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("linear_solver", [ig.CG(), ig.MINRES(), ig.Exact()])
@pytest.mark.parametrize("kind", ["argmin", "bounds", "inequality", "root"])
def test_a_small_residual_where_curvature_is_small_is_no_solution(kind, linear_solver, tasks):
    """Descent along curvatures of 1 to 1e4 leaves the flattest at 0, and F is 3e-5 ‖A‖‖φ‖."""
    if kind == "root":
        linear_solver = ig.Exact() if linear_solver == ig.Exact() else ig.GMRES()
    if kind == "inequality" and linear_solver == ig.CG():
        linear_solver = None  # which multipliers do not go with
    curvatures = torch.tensor([1.0, 1e2, 1e4], dtype=torch.float64)

    def residual(w, a):
        return curvatures.to(w.dtype) * (w - a)

    def objective(w, a):
        return (curvatures * (w - a).square()).sum() / 2

    conditions = {
        "argmin": ig.argmin(objective),
        "bounds": ig.argmin(objective, bounds=(None, 2.0)),
        "inequality": ig.argmin(objective, inequality=lambda w, a: w - 2.0),
        "root": ig.root(residual),
    }

    def status(solver, outer, dtype=torch.float64):
        a = torch.tensor([0.5, 1.0, 1.0], dtype=dtype)
        condition = conditions[kind]
        monitor = ig.Monitor()
        solve = ig.implicit(
            solver, condition, linear_solver=linear_solver, monitor=monitor, on_failure="ignore"
        )
        loss = lambda a: outer(solve(a))  # noqa: E731
        if tasks:
            torch.func.vmap(torch.func.grad(loss))(torch.stack([a, a]))
        else:
            torch.autograd.grad(loss(a.requires_grad_()), a)
        (found,) = {report.status for report in monitor.reports}
        return found

    def descent(a):
        w = torch.zeros_like(a)
        for _ in range(100):
            w = w - curvatures * (w - a) / 1e4
        return w

    everything = torch.Tensor.sum
    assert status(descent, everything) is ig.Status.INNER_NOT_STATIONARY
    assert status(descent, lambda w: w[2]).ok  # which is where it should be, and all that counts
    assert status(lambda a: a.clone(), everything).ok
    assert status(lambda a: a * (1 + 1e-4), everything).ok
    assert status(lambda a: a + torch.finfo(a.dtype).eps, everything, torch.float32).ok


@pytest.mark.parametrize("tasks", [False, True])
def test_a_training_that_stopped_short_of_flat_directions_is_told(tasks):
    """Their error hardly shows in F, and need not show along v; one of 1 % of φ is none."""
    told = {0.009: 0, 0.1: 0}
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.float64))[0]
        curvatures = torch.logspace(-2, 1, 6, dtype=torch.float64)
        A = basis * curvatures @ basis.mT
        b, v, off = torch.randn(3, 6, generator=random, dtype=torch.float64)

        def solution(b, A=A):
            return torch.linalg.solve(A, b)

        way = basis[:, :2] @ off[:2]  # along the two flattest
        v = v - (v @ way) / (way @ way) * way
        for part in told:
            monitor = ig.Monitor()

            def stopped(b, part=part, way=way, solution=solution):
                phi = solution(b)
                return phi + part * phi.norm() / way.norm() * way

            condition = ig.argmin(lambda w, b, A=A: w @ A @ w / 2 - b @ w)
            solve = ig.implicit(stopped, condition, monitor=monitor, on_failure="ignore")
            loss = lambda b, v=v, solve=solve: solve(b) @ v  # noqa: E731
            if tasks:
                torch.func.vmap(torch.func.grad(loss))(torch.stack([b, b]))
            else:
                a = b.clone().requires_grad_()
                torch.autograd.grad(loss(a), a)
            told[part] += monitor.last.status is ig.Status.INNER_NOT_STATIONARY
    assert told[0.009] == 0
    assert told[0.1] >= 8


@pytest.mark.parametrize("linear_solver", [ig.CG(), ig.Exact()])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_curvature_that_gauss_newton_leaves_out_is_no_flat_direction(curvature, linear_solver):
    """1e-4 from the minimum, where w₁ has a curvature of 10, and by Gauss-Newton one of 1e-3."""

    def model(w, a):
        return torch.stack([w[0], w[1] ** 2, *w])

    def loss(o, a):
        return (o[0] - a).square() / 2 + (o[1] + 5).square() / 2 + 1e-3 * o[2:].square().sum() / 2

    solve = ig.implicit(
        lambda a: torch.stack([a / 1.001, torch.full_like(a, 1e-4)]),
        ig.argmin(loss, model=model),
        curvature=curvature,
        linear_solver=linear_solver,
        monitor=(monitor := ig.Monitor()),
        on_failure="ignore",
    )
    a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(solve(a).sum(), a)
    assert monitor.last.curvature == curvature and monitor.last.status.ok
