"""Roots, fixed points and constrained minima under vmap: one system, and equal to the loop."""

import warnings

import pytest
import torch
from problems import normal, wavy
from torch.func import grad, hessian, jacrev, vmap

import implicit_grad as ig

# torch's own, in the decompositions that forward mode needs
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

B, N = 6, 4
F64 = torch.float64


def problem():
    A = normal(B, N, N, seed=1, grad=False) / 3
    return A, normal(B, N, seed=2, grad=False)


def iterate(A, b):
    x = torch.zeros_like(b)
    for _ in range(120):
        x = torch.tanh(A @ x + b)
    return x


def image(x, A, b):
    return torch.tanh(A @ x + b)


CONDITIONS = {
    "fixed point": ig.fixed_point(image),
    "root": ig.root(lambda x, A, b: (x - image(x, A, b)) * (1 + x.square())),
}
SOLVERS = {
    "default": None,
    "Exact": ig.Exact(),
    "GMRES": ig.GMRES(rtol=1e-13),
    "NormalCG": ig.NormalCG(rtol=1e-13),
}


def loop(function, *batches):
    found = [function(*task) for task in zip(*batches, strict=True)]
    if isinstance(found[0], tuple):
        return tuple(map(torch.stack, zip(*found, strict=True)))
    return torch.stack(found)


def close(actual, expected, tolerance=1e-9):
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        assert e.norm() > 1e-6 and (a - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_vmap_is_one_system_and_equals_the_loop(condition, linear_solver):
    monitor = ig.Monitor()
    solve = ig.implicit(
        iterate,
        CONDITIONS[condition],
        linear_solver=SOLVERS[linear_solver],
        monitor=monitor,
        on_failure="raise",
    )

    def outer(A, b):
        return wavy(solve(A, b))

    A, b = problem()
    found = vmap(grad(outer, (0, 1)))(A, b)
    assert [(r.status.ok, r.products) for r in monitor.reports] == [(True, N + 1)] * B
    close(found, loop(grad(outer, (0, 1)), A, b))
    if linear_solver == "default":
        for function in (jacrev(solve, (0, 1)), hessian(outer)):
            close(vmap(function)(A[:2], b[:2]), loop(function, A[:2], b[:2]))


def test_linear_systems_in_closed_form():
    A, b = (t.requires_grad_() for t in problem())
    solve = ig.implicit(torch.linalg.solve, ig.root(lambda x, A, b: A @ x - b))
    found = torch.autograd.grad(wavy(vmap(solve)(A, b)), (A, b))
    close(found, torch.autograd.grad(wavy(torch.linalg.solve(A, b)), (A, b)), 1e-11)


def test_symmetric_systems():
    A, b = problem()
    A = A + A.mT
    monitor = ig.Monitor()
    condition = ig.root(lambda x, A, b: A @ x - b, symmetric=True)
    solve = ig.implicit(torch.linalg.solve, condition, monitor=monitor)
    b.requires_grad_()
    (found,) = torch.autograd.grad(wavy(vmap(solve)(A, b)), b)
    assert monitor.last.products == N + 1
    close(found, torch.autograd.grad(wavy(torch.linalg.solve(A, b)), b)[0], 1e-11)


def by_run(condition, solver, linear_solver, *batches):
    """Gradients and statuses under vmap, and one after another."""
    found = []
    for run in (vmap, lambda f: lambda *batches: loop(f, *batches)):
        monitor = ig.Monitor()
        solve = ig.implicit(
            solver, condition, linear_solver=linear_solver, monitor=monitor, on_failure="ignore"
        )
        own = [t.clone().requires_grad_() for t in batches]
        gradients = torch.autograd.grad(wavy(run(solve)(*own)), own)
        found.append((gradients, [r.status for r in monitor.reports]))
    (together, statuses), (apart, alone) = found
    return together, apart, statuses, alone


SYMMETRIC = {"CG": ig.CG(), "damped": ig.CG(damping=0.2), "MINRES": None}


@pytest.mark.parametrize("linear_solver", SYMMETRIC)
def test_symmetric_matrices_of_either_sign(linear_solver):
    A, b = problem()
    A = A @ A.mT + torch.eye(N, dtype=F64)
    A[1] *= -1
    A[4] *= -1e-3
    b[2] = 0.0
    condition = ig.root(lambda x, A, b: A @ x - b, symmetric=True)
    chosen = SYMMETRIC[linear_solver]
    together, apart, statuses, alone = by_run(condition, torch.linalg.solve, chosen, A, b)
    close(together, apart, 1e-8)
    assert statuses == alone == [ig.Status.CONVERGED] * B


@pytest.mark.parametrize("linear_solver", [ig.CG(), ig.MINRES()], ids=["CG", "MINRES"])
def test_a_false_promise_of_symmetry_is_told_where_it_spoils(linear_solver):
    A = torch.eye(N, dtype=F64).repeat(B, 1, 1)
    A[2] += torch.triu(torch.full((N, N), 3.0, dtype=F64), 1)
    condition = ig.root(lambda x, A, b: A @ x - b, symmetric=True)
    _, _, statuses, alone = by_run(condition, torch.linalg.solve, linear_solver, A, problem()[1])
    assert sorted(statuses) == sorted(alone)
    assert [i for i, status in enumerate(statuses) if status == ig.Status.NOT_SYMMETRIC] == [2]


def test_large_systems_are_solved_one_by_one():
    monitor = ig.Monitor()
    diagonal = torch.linspace(1, 2, 17, dtype=F64)
    solve = ig.implicit(lambda b: b / diagonal, ig.root(lambda x, b: diagonal * x - b),
                        monitor=monitor)  # fmt: skip
    b = normal(2, 17)
    (found,) = torch.autograd.grad(vmap(solve)(b).sum(), b)
    assert len({r.products for r in monitor.reports}) and monitor.last.products != 18
    torch.testing.assert_close(found, (1 / diagonal).expand(2, 17))


def test_a_singular_task_is_one_report():
    A, b = problem()
    A[2] = 0.0
    monitor = ig.Monitor()
    condition = ig.root(lambda x, A, b: A @ x - b)
    solve = ig.implicit(lambda A, b: torch.linalg.pinv(A) @ b, condition, monitor=monitor)
    b.requires_grad_()
    phi = vmap(solve)(A, b)
    with pytest.warns(ig.ImplicitGradWarning, match="singular"):
        phi.sum().backward()
    assert [r.status.ok for r in monitor.reports] == [True, True, False, True, True, True]


# ---------------------------------------------------------------- constraints


def quadratic(x, c):
    return (x - c).square() @ torch.linspace(1, 2, N, dtype=F64) + (x.sum() / 3) ** 4


def ball(x, c):
    return x.square().sum() - 1


def plane(x, c):
    return x.sum() - 0.5 - c[0] / 20


FORMS = {
    "bounds": {"bounds": (-0.2, torch.full((N,), 0.4, dtype=F64))},
    "bounds that follow": {"bounds": lambda c: (-0.2 + 0.01 * c.sum(), None)},
    "equality": {"equality": plane},
    "inequality": {"inequality": ball},
    "all": {"bounds": (-0.2, None), "equality": plane, "inequality": ball},
}


def by_scipy(form):
    from scipy.optimize import minimize

    def solve(c):
        c = c.detach()
        bounds = form.get("bounds", (None, None))
        lower, upper = bounds(c) if callable(bounds) else bounds
        ends = [
            torch.as_tensor(sign * torch.inf if e is None else e).expand(N).tolist()
            for e, sign in ((lower, -1), (upper, 1))
        ]
        constraints = [
            {"type": kind, "fun": lambda x, f=form[name], s=sign: s * float(f(torch.tensor(x), c))}
            for name, kind, sign in (("equality", "eq", 1), ("inequality", "ineq", -1))
            if name in form
        ]
        start = torch.full((N,), 0.1, dtype=F64)
        x = torch.tensor(
            minimize(
                lambda x: float(quadratic(torch.tensor(x), c)),
                start,
                bounds=list(zip(*ends, strict=True)),
                constraints=constraints,
                method="SLSQP",
                options={"ftol": 1e-15, "maxiter": 300},
            ).x
        )
        return x

    return solve


@pytest.mark.parametrize("linear_solver", ["default", "Exact"])
@pytest.mark.parametrize("form", FORMS)
def test_constrained_minima_are_one_system_and_equal_the_loop(form, linear_solver):
    c = normal(B, N, seed=5, grad=False)
    reports = []
    gradients = []
    for run in (vmap, lambda f: lambda c: loop(f, c)):
        monitor = ig.Monitor()
        solve = ig.implicit(
            by_scipy(FORMS[form]),
            ig.argmin(quadratic, **FORMS[form]),
            linear_solver=ig.Exact() if linear_solver == "Exact" else None,
            monitor=monitor,
        )
        gradients.append(run(grad(lambda c, s=solve: wavy(s(c))))(c))
        reports.append(monitor.reports)
    close(*gradients)
    together, apart = reports
    assert [r.status for r in together] == [r.status for r in apart]
    assert len({r.products for r in together}) == 1  # those of all
    assert together[0].products < sum(r.products for r in apart)


def test_tasks_out_of_the_ordinary_go_their_own_way():
    """Bounds touched by chance, bounds that press, copies of a constraint, and free ones."""
    c = torch.tensor(
        [[1.0, 0.3], [2.0, 0.3], [0.4, 0.3], [1.5, 0.2], [0.1, 0.9]], dtype=F64
    ).requires_grad_()
    condition = ig.argmin(
        lambda x, c: (x - c).square().sum(),
        bounds=(None, 1.0),
        inequality=lambda x, c: torch.stack([x[0] - 1.2, x[1] - 0.8, 2 * x[1] - 1.6]),
    )
    found = []
    for run in (vmap, lambda f: lambda c: loop(f, c)):
        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda c: torch.minimum(c.detach(), torch.tensor([1.0, 0.8], dtype=F64)),
            condition,
            monitor=monitor,
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (g,) = torch.autograd.grad(wavy(run(solve)(c)), c)
        sentences = sorted(str(w.message) for w in told)
        found.append((g, sentences, sorted(r.status for r in monitor.reports)))
    (g, told, statuses), (expected, alone, statuses_alone) = found
    close(g, expected)
    assert told == alone and statuses == statuses_alone
    assert sorted(set(s.name for s in statuses)) == ["CONVERGED", "DEGENERATE"]


@pytest.mark.parametrize("status", ["CONVERGED", "DEGENERATE"])
def test_many_cotangents_of_a_task_out_of_the_ordinary(status):
    """Copies of a constraint, where the batch is that of jacrev's cotangents."""
    limit = torch.tensor([1.0, 0.8], dtype=F64)
    condition = ig.argmin(
        lambda x, c: (x - c).square().sum(),
        inequality=lambda x, c: torch.stack([x[0] - 1.0, x[1] - 0.8, 2 * x[1] - 1.6]),
    )
    monitor = ig.Monitor()
    options = {"monitor": monitor, "on_failure": "ignore"}
    solve = ig.implicit(lambda c: torch.minimum(c.detach(), limit), condition, **options)
    c = torch.tensor([1.0 if status == "DEGENERATE" else 0.3, 2.0], dtype=F64)
    found = jacrev(solve)(c)
    assert {report.status.name for report in monitor.reports} == {status}
    close(found, torch.diag((c <= limit).to(F64)))


# ---------------------------------------------------------------- what else conditions take


def of_each(c):
    """The minimum of (x − c)⁴/4 + (x − c)²/2 + x, and the root of its slope."""
    x = c.detach().clone()
    for _ in range(50):
        x = x - ((x - c) ** 3 + x - c + 1) / (3 * (x - c) ** 2 + 1)
    return x


def valley(x, c):
    return ((x - c) ** 4 / 4 + (x - c) ** 2 / 2 + x).sum()


def slope(x, c):
    return (x - c) ** 3 + x - c + 1


WITH_AUX = {
    "argmin": ig.argmin(lambda x, c: (valley(x, c), "aux"), has_aux=True),
    "root": ig.root(lambda x, c: (slope(x, c), {"calls": 1}), has_aux=True),
    "fixed_point": ig.fixed_point(lambda x, c: (x - slope(x, c) / 5, None), has_aux=True),
    "prox_gradient": ig.prox_gradient(
        lambda x, c: (valley(x, c), x), lambda x, step, c: x, has_aux=True
    ),
    "batches": ig.argmin(lambda x, scale, c: scale * valley(x, c), batches=[0.3, 0.7]),
}


@pytest.mark.parametrize("name", WITH_AUX)
def test_aux_is_ignored_and_sums_over_batches_are_taken_one_by_one(name):
    c = normal(B, N, seed=4)
    solve = ig.implicit(of_each, WITH_AUX[name], on_failure="raise")
    (found,) = torch.autograd.grad(wavy(vmap(solve)(c)), c)
    phi = of_each(c).requires_grad_()
    (expected,) = torch.autograd.grad(wavy(phi), phi)  # for x − c is a constant
    close(found, expected, 1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_multipliers_equal_those_of_the_loop(form):
    c, found = normal(B, N, seed=5), []
    for run in (vmap, lambda f: lambda c: loop(f, c)):
        solve = ig.implicit(
            by_scipy(FORMS[form]), ig.argmin(quadratic, multipliers=True, **FORMS[form])
        )

        def all_of(c, solve=solve):
            phi, multipliers = solve(c)
            parts = (m for m in multipliers if m is not None)
            return torch.cat([phi, *(m.flatten() for m in parts)])

        values = run(all_of)(c)
        found.append((values.detach(), *torch.autograd.grad(wavy(values), c)))
    close(*found)


def test_minimisers_of_ours_run_for_the_whole_batch():
    calls = []

    def counted(x, c):
        calls.append(x)
        return valley(x, c)

    solve = ig.implicit(ig.solvers.GradientDescent(lr=0.2, steps=20), ig.argmin(counted))
    vmap(solve)(normal(B, N))
    assert len(calls) < 2 * 20


def test_bad_bounds_are_refused_before_the_solver_runs():
    condition = ig.argmin(quadratic, bounds=lambda c: (c, c - 1))
    solve = ig.implicit(lambda c: pytest.fail("it ran"), condition)
    with pytest.raises(ig.InvalidArgumentError, match="no lower bound greater"):
        vmap(solve)(normal(B, N))
