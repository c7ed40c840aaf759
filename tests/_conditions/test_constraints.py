"""Minima under constraints: gradients by exact solutions, and what is said where there are none."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import normal, tensors, wavy

import implicit_grad as ig
from implicit_grad.solvers import GradientDescent, GurobiQP, SciPyMinimize

pytestmark = pytest.mark.usefixtures("double_precision")
STRICT = {"on_failure": "raise"}


@pytest.fixture(autouse=True)
def every_warning():
    """Those that torch gives once a process too: of a tensor with a graph made a number."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def close(actual, expected, tolerance=1e-9):
    """Equal relative to the size of what is expected."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2)


def gradients(phi, wanted):
    """Of an outer loss without symmetry."""
    return torch.autograd.grad(wavy(phi), wanted, allow_unused=True, materialize_grads=True)


# ---------------------------------------------------------------- quadratic programs


def quadratic(x, p):
    return (p["M"] @ x).square().sum() / 2 + x.square().sum() / 4 + p["c"] @ x


def equality(x, p):
    return p["A"] @ x - p["b"]


def inequality(x, p):
    return {"rows": p["G"] @ x - p["h"]}


def box(p):
    return p["lower"], p["upper"]


def program(seed, n, equalities, inequalities):
    """A feasible quadratic program with bounds; its objective pulls out of the feasible set."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    inside = draw(n)
    p = {"M": draw(n, n), "c": 3 * draw(n), "A": draw(equalities, n), "G": draw(inequalities, n)}
    p |= {"b": p["A"] @ inside, "h": p["G"] @ inside + draw(inequalities).abs()}
    p |= {"lower": inside - draw(n).abs() - 0.1, "upper": inside + draw(n).abs() + 0.1}
    return p


def enumerated(p):
    """The minimum, the multipliers of its active rows and the slack of the others.

    All subsets of the inequalities are tried as the active set, bounds among them.
    """
    n, eye = len(p["c"]), torch.eye(len(p["c"]))
    Q = p["M"].T @ p["M"] + eye / 2
    rows, limits = torch.cat([p["G"], -eye, eye]), torch.cat([p["h"], -p["lower"], p["upper"]])
    held = len(p["b"])
    for size in range(n - held + 1):
        sets = torch.tensor(list(itertools.combinations(range(len(rows)), size)), dtype=torch.int64)
        sets = sets.view(math.comb(len(rows), size), size)
        J = torch.cat([p["A"].expand(len(sets), -1, -1), rows[sets]], 1)
        k = J.shape[1]
        K = torch.zeros(len(sets), n + k, n + k)
        K[:, :n, :n], K[:, :n, n:], K[:, n:, :n] = Q, J.mT, J
        c, b = (p[name].expand(len(sets), -1) for name in ("c", "b"))
        right = torch.cat([-c, b, limits[sets]], 1)
        solution, failed = torch.linalg.solve_ex(K, right)
        x, mu = solution[:, :n], solution[:, n + held :]
        slack = limits - x @ rows.T
        good = (failed == 0) & (slack >= -1e-9).all(1) & (mu >= 0).all(1)
        for i in good.nonzero().flatten().tolist():
            others = torch.ones(len(rows), dtype=torch.bool).index_fill(0, sets[i], False)
            found = torch.linalg.solve(K[i], right[i])  # alone, to be differentiable
            return found[:n], mu[i], slack[i][others]
    raise AssertionError("the program has no minimum")


drawn_programs = given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 4),
    equalities=st.integers(0, 1),
    inequalities=st.integers(0, 2),
    dense=st.booleans(),
)


def solved_program(seed, n, equalities, inequalities, dense):
    """A program that is strictly complementary, and what solves it."""
    p = program(seed, n, equalities, inequalities)
    _, mu, slack = enumerated(p)
    assume(torch.cat([mu, slack]).min() > 0.02)
    condition = ig.argmin(
        quadratic,
        bounds=box,
        equality=equality if equalities else None,
        inequality=inequality if inequalities else None,
    )
    solver = ig.Exact() if dense else None
    solve = ig.implicit(
        lambda p: enumerated(p)[0].detach(), condition, linear_solver=solver, **STRICT
    )
    return {name: t.requires_grad_() for name, t in p.items()}, solve


@settings(max_examples=60)
@drawn_programs
def test_strictly_complementary_programs(seed, n, equalities, inequalities, dense):
    """Against central differences of the exact solution, along random directions."""
    p, solve = solved_program(seed, n, equalities, inequalities, dense)
    found = gradients(solve(p), list(p.values()))
    h = 1e-5
    for i in range(3):
        way = {k: normal(*t.shape, seed=seed + i, grad=False) for k, t in p.items()}
        moved = ({k: t.detach() + s * way[k] for k, t in p.items()} for s in (h, -h))
        ahead, behind = (wavy(enumerated(q)[0]) for q in moved)
        along = sum((g * d).sum() for g, d in zip(found, way.values(), strict=True))
        reference = (ahead - behind) / (2 * h)
        assert abs(along - reference) <= 1e-6 * (1 + abs(reference) + sum(g.norm() for g in found))


# ---------------------------------------------------------------- closed forms

A = [0.9, -1.7, 0.6, 2.2]


def distance(x, a):
    return sum((t - s).square().sum() for t, s in zip(tensors(x), tensors(a), strict=True)) / 2


def simplex(a):
    """The projection onto {x ≥ 0, Σx = 1}, differentiable."""
    ordered = a.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(a) + 1, dtype=a.dtype)
    count = int((ordered > excess).sum())
    return (a - excess[count - 1]).clamp_min(0)


def entropy(x, a):
    return (x * x.log()).sum() - a @ x


CLOSED = {
    "box": (distance, {"bounds": (-1.0, 0.8)}, lambda a: a.clamp(-1.0, 0.8)),
    "below": (distance, {"bounds": (None, 0.7)}, lambda a: a.clamp_max(0.7)),
    "above": (distance, {"bounds": (torch.tensor(0.65), None)}, lambda a: a.clamp_min(0.65)),
    "moving box": (
        distance,
        {"bounds": lambda a: (-0.1 * a.square().sum(), a.detach().abs() * 0.5 + a[1].exp())},
        lambda a: torch.minimum(
            torch.maximum(a, -0.1 * a.square().sum()), a.detach().abs() * 0.5 + a[1].exp()
        ),
    ),
    "sphere": (
        distance,
        {"equality": lambda x, a: x.square().sum() - a[0]},
        lambda a: a * a[0].sqrt() / a.norm(),
    ),
    "ball": (
        distance,
        {"inequality": lambda x, a: x.square().sum() - a[0]},
        lambda a: a * a[0].sqrt() / a.norm(),
    ),
    "wide ball": (distance, {"inequality": lambda x, a: x.square().sum() - 50}, lambda a: a),
    "simplex": (
        distance,
        {"bounds": (0, None), "equality": lambda x, a: x.sum() - 1},
        simplex,
    ),
    "softmax": (entropy, {"equality": lambda x, a: [x.sum() - 1]}, lambda a: a.softmax(0)),
    "corner": (
        lambda x, a: a @ x,
        {
            "inequality": lambda x, a: [x.square().sum() - 4],
            "equality": lambda x, a: (x[0] - a[0], x[1] + a[0], x[2] * 2 - a[2]),
        },
        lambda a: torch.stack([a[0], -a[0], a[2] / 2, -(4 - 2 * a[0] ** 2 - a[2] ** 2 / 4).sqrt()]),
    ),
    "rows twice": (
        distance,
        {"equality": lambda x, a: (x.sum() - 1, 3 * x.sum() - 3)},
        lambda a: a - (a.sum() - 1) / 4,
    ),
    "a row of bounds": (
        distance,
        {"inequality": lambda x, a: (x - 0.7, 2 * x.sum() - 4, x.sum() - 2 + 1e-9)},
        lambda a: a.clamp_max(0.7),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dense", [False, True], ids=["iterative", "Exact"])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name, dense, dtype):
    objective, constraints, exact = CLOSED[name]
    a = torch.tensor(A, dtype=dtype, requires_grad=True)
    solver = ig.Exact() if dense else None
    condition = ig.argmin(objective, **constraints)
    solve = ig.implicit(lambda a: exact(a).detach(), condition, linear_solver=solver, **STRICT)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close(gradients(solve(a), a), gradients(exact(a), a), tolerance)


def test_a_singular_system_is_called_that():
    """Not where the multipliers are not unique ("rows twice"), but where φ is not."""
    a, monitor = torch.tensor(A, requires_grad=True), ig.Monitor()
    solve = ig.implicit(
        lambda a: a.detach() - (a.sum() - 1) / 4,
        ig.argmin(lambda x, a: (x[:2].sum() - a[:2].sum()).square(), equality=lambda x, a: x[0]),
        linear_solver=ig.Exact(),
        monitor=monitor,
    )
    with pytest.warns(ig.ImplicitGradWarning, match="singular to working precision"):
        gradients(solve(a), a)
    assert monitor.last.status == ig.Status.SINGULAR and monitor.last.curvature == "lagrangian"


FORMS = {
    "numbers": lambda lo, up: (0.1, 0.8),
    "no upper": lambda lo, up: (0.1, None),
    "no lower": lambda lo, up: (None, 0.8),
    "tensors": lambda lo, up: (torch.tensor(0.1), torch.tensor([0.8])),
    "containers": lambda lo, up: (lo, up),
    "branches": lambda lo, up: ({"u": lo["u"], "v": 0.1}, {"u": 0.9, "v": up["v"][0, 0]}),
    "function": lambda lo, up: lambda a, *rest: (lo, {k: 2 * t for k, t in up.items()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_bounds(form):
    """On a φ of several tensors; bounds that require grad get theirs."""
    a = {"u": normal(5, seed=1), "v": normal(2, 3, seed=2)}
    lo = {k: (normal(*t.shape, seed=3, grad=False) / 9).requires_grad_() for k, t in a.items()}
    up = {k: (1 + t.detach().abs()).requires_grad_() for k, t in lo.items()}
    bounds = FORMS[form](lo, up)

    def clamped(a):
        low, high = bounds(a) if callable(bounds) else bounds

        def limit(bound, name, none):
            bound = bound[name] if isinstance(bound, dict) else bound
            return torch.as_tensor(none if bound is None else bound)

        return {
            k: torch.minimum(torch.maximum(t, limit(low, k, -9.0)), limit(high, k, 9.0))
            for k, t in a.items()
        }

    def solver(a):
        return {k: t.detach() for k, t in clamped(a).items()}

    wanted = [*a.values(), *lo.values(), *up.values()]
    solve = ig.implicit(solver, ig.argmin(distance, bounds=bounds), **STRICT)
    close(gradients(solve(a), wanted), gradients(clamped(a), wanted))


# ---------------------------------------------------------------- whole solvers


def test_scipy_and_gurobi_agree_with_the_enumeration():
    p = {k: t.requires_grad_() for k, t in program(4, 4, 1, 2).items()}
    exact, mu, slack = enumerated(p)
    assert torch.cat([mu, slack]).min() > 0.02 and len(mu) >= 2
    given = {"equality": equality, "inequality": inequality}
    found = []
    for solver, bounds in (
        (lambda p: enumerated({k: t.detach() for k, t in p.items()})[0], box),
        (GurobiQP(), box),
        (SciPyMinimize(method="SLSQP", tol=1e-14), box),
        (SciPyMinimize(method="SLSQP", tol=1e-14, bounds=tuple(b.detach() for b in box(p))), None),
    ):
        condition = ig.argmin(quadratic, bounds=bounds, **given)
        init = {} if bounds is box and callable(solver) else {"init": lambda p: torch.zeros(4)}
        phi = ig.implicit(solver, condition, **init, **STRICT)(p)
        close(phi, exact, 1e-6)
        found.append(gradients(phi, list(p.values())))
    for other in found[1:3]:
        close(other, found[0], 1e-5)
    names = list(p)
    fixed = [names.index(k) for k in p if k not in ("lower", "upper")]
    close([found[3][i] for i in fixed], [found[0][i] for i in fixed], 1e-5)


# ---------------------------------------------------------------- where there is no derivative


DEGENERATE = {
    "bound": {"bounds": (-5.0, 0.6)},
    "inequality": {"inequality": lambda x, a: x[2] - 0.6},
    "among others": {
        "inequality": lambda x, a: [x[3] - 1, x[2] - 0.6],
        "bounds": (-1.0, None),
    },
    "two at once": {"bounds": (None, 0.6), "inequality": lambda x, a: x[2] - 0.6},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", DEGENERATE)
def test_constraints_that_are_active_by_chance(case, dtype):
    a, monitor = torch.tensor(A, dtype=dtype, requires_grad=True), ig.Monitor()

    def solver(a):
        x = a.clone()
        x[3] = {"among others": 1.0, "bound": 0.6, "two at once": 0.6}.get(case, x[3])
        x[0] = 0.6 if case in ("bound", "two at once") else x[0]
        x[1] = -1.0 if case == "among others" else x[1]
        return x

    condition = ig.argmin(distance, **DEGENERATE[case])
    phi = ig.implicit(solver, condition, monitor=monitor)(a)
    with pytest.warns(ig.ImplicitGradWarning, match="active by chance"):
        found = torch.autograd.grad(phi.sum(), a)[0]
    assert monitor.last.status == ig.Status.DEGENERATE
    free = solver(a.detach()) == a.detach()
    close(found, free.to(dtype), 1e-9 if dtype == torch.float64 else 1e-4)  # x[2] free to move
    with pytest.raises(ig.LinearSolveError, match="active by chance") as caught:
        ig.implicit(solver, condition, **STRICT)(a).sum().backward()
    assert caught.value.report.status == ig.Status.DEGENERATE


@pytest.mark.parametrize("pulled", [0.0, 1e-3])
def test_forces_that_equations_carry_are_as_uncertain_as_what_makes_them(pulled):
    """x ≥ 0, and (x − a)² by way of e = x − a: what is uncertain of e is so of the force on x."""
    monitor = ig.Monitor()
    a = torch.tensor([-pulled, 1.0], dtype=torch.float64, requires_grad=True)

    def solver(a):
        x = a.clamp(min=0) + torch.tensor([1e-10, 0.0], dtype=torch.float64)
        return {"x": x, "e": x - a}

    condition = ig.argmin(
        lambda phi, a: phi["e"].square().sum(),
        equality=lambda phi, a: phi["x"] - a - phi["e"],
        inequality=lambda phi, a: -phi["x"],
    )
    x = ig.implicit(solver, condition, monitor=monitor, on_failure="ignore")(a)["x"]
    close(torch.autograd.grad(x[1], a)[0], torch.tensor([0.0, 1.0]))
    assert monitor.last.status is (ig.Status.CONVERGED if pulled else ig.Status.DEGENERATE)


def test_polish_takes_no_step_to_a_kink():
    """Where more constraints are touched there are more multipliers, to explain any slope."""
    condition = ig.argmin(lambda x, a: (x - a).square().sum(), inequality=lambda x, a: x[0] - 1)
    solve = ig.implicit(lambda a: a - 1e-3, condition, polish=1)
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.warns(ig.ImplicitGradWarning, match="phi was not polished: .* by chance"):
        close(solve(a), a - 1e-3)


UNSOLVED = {
    "off the equality": ({"equality": lambda x, a: x.sum() - 3}, lambda a: a),
    "infeasible": ({"inequality": lambda x, a: x.square().sum() - 2}, lambda a: a),
    "not at rest": ({"bounds": (-3, 3)}, lambda a: a.index_fill(0, torch.tensor(1), 0.3)),
    "at the wrong upper bound": ({"bounds": (0.0, 2.5)}, lambda a: torch.full_like(a, 2.5)),
    "at the wrong lower bound": ({"bounds": (-2, None)}, lambda a: torch.full_like(a, -2)),
    "outside of the bounds": ({"bounds": (0.0, 1.0)}, lambda a: a.clamp(-0.5, 1.0)),
    "at rest outside of the bounds": ({"bounds": (None, 1.0)}, lambda a: a),
}


@pytest.mark.parametrize("case", UNSOLVED)
def test_a_phi_that_is_no_solution(case):
    constraints, solver = UNSOLVED[case]
    a, monitor = torch.tensor(A, requires_grad=True), ig.Monitor()
    phi = ig.implicit(solver, ig.argmin(distance, **constraints), monitor=monitor)(a)
    with pytest.warns(ig.ImplicitGradWarning, match="does not solve the inner problem"):
        phi.sum().backward()
    assert monitor.last.status == ig.Status.INNER_NOT_STATIONARY
    assert monitor.last.inner_residual > 0.1


# ---------------------------------------------------------------- together with the rest


@pytest.mark.parametrize("name", ["softmax", "ball", "simplex", "moving box"])
def test_polish_and_certify(name):
    """From a φ that is off by 1e-4 where it does not rest at a bound."""
    objective, constraints, exact = CLOSED[name]
    a = torch.tensor(A, requires_grad=True)
    at_rest = {"simplex": 0.0, "moving box": exact(a).masked_fill(exact(a) == a, 99)}.get(name, 99)

    def off(a):
        x = exact(a).detach()
        return x + 1e-4 * torch.tensor([1.0, -0.5, 0.3, 0.8]) * (x != at_rest)

    condition = ig.argmin(objective, **constraints)
    expected = gradients(exact(a), a)[0]
    plain, polished = (
        (gradients(ig.implicit(off, condition, polish=polish, **STRICT)(a), a)[0] - expected).norm()
        for polish in (0, 1)
    )
    certificate = ig.certify(ig.implicit(off, condition, **STRICT), (a,), wavy)
    corrected = (certificate.corrected[0] - expected).norm()
    assert polished <= 1e-6 and corrected <= 1e-6
    if name != "moving box" and plain > 1e-5:
        assert max(polished, corrected) < plain / 100
    assert certificate.status.ok and abs(certificate.error - plain) <= 0.05 * plain + 1e-9


def test_certify_where_bounds_move_the_solution():
    """At the exact solution there is nothing to correct, by the bounds neither."""
    p = {k: t.requires_grad_() for k, t in program(4, 4, 1, 2).items()}
    exact, *_ = enumerated(p)
    condition = ig.argmin(quadratic, bounds=box, equality=equality, inequality=inequality)
    solve = ig.implicit(lambda p: exact.detach(), condition, **STRICT)
    c = ig.certify(solve, (p,), wavy)
    close(c.gradients, gradients(solve(p), c.tensors), 1e-8)
    close(c.corrected, c.gradients, 1e-8)
    moving = [g.norm() for t, g in zip(c.tensors, c.gradients, strict=True) if t is p["lower"]]
    assert moving[0] > 0.01


def test_no_bound_for_a_system_with_multipliers():
    """Strong convexity of the objective bounds the solution, not the multipliers."""
    a = torch.tensor(A, requires_grad=True)
    bounds = {}
    for name, constraints in {
        "rows": {"equality": lambda x, a: 1e-3 * (x.sum() - 1)},
        "bounds": {"bounds": (0.0, None)},
    }.items():
        monitor = ig.Monitor()
        condition = ig.argmin(distance, 1.0, **constraints)
        solve = ig.implicit(
            lambda a: a.clone(),
            condition,
            linear_solver=ig.MINRES(maxiter=1),
            monitor=monitor,
            on_failure="ignore",
        )
        solve(a).sum().backward()
        bounds[name] = monitor.last.solve_error_bound
    assert bounds["rows"] is None and bounds["bounds"] < 1e-9


# ---------------------------------------------------------------- derivatives of derivatives


def twice(phi, wanted):
    """Gradients of a function of the gradients."""
    first = torch.autograd.grad(
        wavy(phi), wanted, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradients(first, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dense", [False, True], ids=["iterative", "Exact"])
@pytest.mark.parametrize("name", sorted(CLOSED.keys() - {"rows twice"}))
def test_closed_forms_twice(name, dense, dtype):
    objective, constraints, exact = CLOSED[name]
    a = torch.tensor(A, dtype=dtype, requires_grad=True)
    solver = ig.Exact() if dense else None
    condition = ig.argmin(objective, **constraints)
    options = {"linear_solver": solver, "monitor": (monitor := ig.Monitor()), **STRICT}
    solve = ig.implicit(lambda a: exact(a).detach(), condition, **options)
    close(twice(solve(a), a), twice(exact(a), a), 1e-9 if dtype == torch.float64 else 1e-4)
    assert monitor.reports[0].curvature == "lagrangian"  # as recorded, and not made anew


@settings(max_examples=50)
@drawn_programs
def test_programs_twice(seed, n, equalities, inequalities, dense):
    """Against autograd through the system that the right active set makes."""
    p, solve = solved_program(seed, n, equalities, inequalities, dense)
    wanted = list(p.values())
    found, expected = twice(solve(p), wanted), twice(enumerated(p)[0], wanted)
    size = 1 + max(float(e.abs().max()) for e in expected if e.numel())
    for f, e in zip(found, expected, strict=True):
        assert ((f - e).abs() <= 1e-6 * size).all()


def curved(x, p, s, r, b):
    return (x - p).pow(4).sum() / 4 + (x - p).square().sum() * (1 + p.sum().sin() / 4) / 2


CURVED = {
    "bounds": lambda p, s, r, b: (b, None),
    "equality": lambda x, p, s, r, b: x.square().sum() - s,
    "inequality": lambda x, p, s, r, b: torch.stack([x[0] * x[1] - r, x[2] - 10]),
}


def on_curves(p, s, r, b):
    """Newton's method for x and the multipliers of x² = s and x₀x₁ = r, with x₃ = b₃."""
    p, s, r, b = (t.detach() for t in (p, s, r, b))
    free = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])

    def F(z):
        x, nu = z[:5], z[5:]

        def lagrangian(x):
            c = torch.stack([x.square().sum() - s, x[0] * x[1] - r])
            return curved(x, p, s, r, b) + nu @ c, c

        slope, c = torch.func.grad(lagrangian, has_aux=True)(x)
        return torch.cat([slope * free + (x - b) * (1 - free), c])

    z = torch.tensor([1.0, 0.34, 0.3, 0.1, 0.5, 0.0, 0.5])
    for _ in range(30):
        step = torch.linalg.solve(torch.func.jacrev(F)(z), F(z))
        z = z - step
        if step.norm() < 1e-12:  # the next one would be at rounding error
            break
    return z[:5]


@pytest.mark.parametrize("linear_solver", [None, ig.Exact()], ids=["iterative", "Exact"])
def test_derivatives_to_the_third_order_on_curved_constraints(linear_solver):
    b = torch.tensor([-9.0, -9.0, -9.0, 0.1, -9.0])
    p = torch.tensor([1.2, 0.8, 0.3, -1.0, 0.5])
    args = tuple(t.requires_grad_() for t in (p, torch.tensor(1.5), torch.tensor(0.35), b))
    condition = ig.argmin(curved, **CURVED)
    solve = ig.implicit(on_curves, condition, linear_solver=linear_solver, **STRICT)
    assert torch.autograd.gradgradcheck(solve, args, fast_mode=True)

    def slope(*args):
        return torch.autograd.grad(wavy(solve(*args)), args, create_graph=True)

    if linear_solver is None:  # which takes long
        assert torch.autograd.gradgradcheck(slope, args, fast_mode=True)


@pytest.mark.parametrize("name", ["moving box", "sphere", "simplex", "softmax"])
def test_second_derivatives_under_transforms(name):
    objective, constraints, exact = CLOSED[name]
    solve = ig.implicit(lambda a: exact(a).detach(), ig.argmin(objective, **constraints), **STRICT)
    a = torch.tensor(A)
    rows = torch.stack([a, a + 0.013, 1.01 * a, a - 0.02])

    def hessian(solve):
        return torch.func.hessian(lambda a: wavy(solve(a)))

    expected = torch.stack([hessian(exact)(a) for a in rows])
    close(torch.func.vmap(hessian(solve))(rows), expected)
    close(torch.func.jacfwd(torch.func.jacfwd(lambda a: wavy(solve(a))))(a), expected[0])


NO_SECOND = {
    "by chance": ({"bounds": (-5.0, 0.6)}, lambda a: a.clamp_max(0.6), "active by chance"),
    "rows twice": (*CLOSED["rows twice"][1:], "depend on each other"),
    "no room": (
        {"bounds": lambda a: (a.square(), a.square().clone())},
        lambda a: a.square(),
        "depend on each other",
    ),
}


@pytest.mark.parametrize("name", NO_SECOND)
def test_where_there_are_no_second_derivatives(name):
    constraints, exact, why = NO_SECOND[name]
    a = torch.tensor(A, requires_grad=True)
    solve = ig.implicit(lambda a: exact(a).detach(), ig.argmin(distance, **constraints))
    phi = solve(a)
    with pytest.raises(ig.GraphError, match=f"second derivatives are not available here: .*{why}"):
        torch.autograd.grad(phi.square().sum(), a, create_graph=True)


# ---------------------------------------------------------------- bad arguments


def solving(linear_solver=None, solver=torch.clone, curvature="auto", **constraints):
    """Run a backward pass under some constraints."""
    a = torch.tensor(A, requires_grad=True)
    condition = ig.argmin(distance, **constraints)
    options = {"linear_solver": linear_solver, "curvature": curvature}
    ig.implicit(solver, condition, **options, on_failure="ignore")(a).sum().backward()


def sums(x, a):
    return x.sum() - 1


BAD = {
    r"bounds must be a pair \(lower, upper\).*got a list": lambda: solving(bounds=[0, 1, 2]),
    r"bounds must be a pair \(lower, upper\).*got an int": lambda: solving(bounds=0),
    r"equality must be a function of \(phi, ...\), got a float": lambda: solving(equality=1.0),
    r"inequality must be a function.*got a str": lambda: solving(inequality="x > 0"),
    r"model does not go with constraints": lambda: solving(bounds=(0, 1), model=distance),
    r"CG needs a positive definite system, but multipliers.*MINRES\(\) or Exact\(\)": lambda: (
        solving(ig.CG(), equality=sums)
    ),
    r"Neumann needs a positive definite": lambda: solving(ig.Neumann(), inequality=sums),
    r"curvature='finite_difference'\): expected \"auto\" or \"hessian\"$": lambda: solving(
        curvature="finite_difference", bounds=(0, 1)
    ),
    r"implicit\(curvature='finite_difference'\)": lambda: solving(
        solver=SciPyMinimize(bounds=(0, 1)), curvature="finite_difference"
    ),
    r"equality must return floating-point tensors, got a float": lambda: solving(
        equality=lambda x, a: 0.0
    ),
    r"inequality must return floating-point tensors, got a int64 tensor|an int64": lambda: solving(
        inequality=lambda x, a: x.long()
    ),
    r"equality must return floating-point tensors, got None": lambda: solving(
        equality=lambda x, a: None
    ),
    r"argmin: the lower bound must be None, a number, a tensor, or a container": lambda: solving(
        bounds=(torch.zeros(3), None)
    ),
    r"the lower bound must be None, a number.*phi:": lambda: solving(bounds=({"x": 0.0}, None)),
    r"does not take constraints \(equality\): use SciPyMinimize or GurobiQP": lambda: solving(
        solver=GradientDescent(lr=0.1, steps=3), equality=sums
    ),
    r"has bounds, which go with argmin without bounds of its own": lambda: solving(
        solver=SciPyMinimize(bounds=(0, 1)), bounds=(0, 1)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        BAD[message]()
