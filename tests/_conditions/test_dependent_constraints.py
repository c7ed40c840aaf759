"""Active constraints that depend on each other, against differences of exact solutions.

φ is differentiable where all of them press on it, and the Jacobian has to be right and silent;
where one does not, φ has a kink, and the status has to say so.
"""

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

import implicit_grad as ig
from implicit_grad._conditions.multipliers import nonnegative

pytestmark = pytest.mark.usefixtures("double_precision")
RIGHT = {"CONVERGED", "EXACT", "ZERO_RHS"}
INF = torch.inf


def jacobian_and_status(condition, exact, *args, linear_solver=None):
    """The implicit Jacobians of an exact solution, and the worst status on the way."""
    monitor = ig.Monitor()
    options = {"linear_solver": linear_solver, "monitor": monitor, "on_failure": "ignore"}
    solve = ig.implicit(lambda *args: exact(*args).detach(), condition, **options)
    J = jacobian(lambda *args: solve(*args), args)
    return J, min(report.status for report in monitor.reports).name


def differences(exact, args, way, step=1e-5):
    """The derivatives of an exact solution ahead along a direction, and behind."""
    here, ahead, behind = (
        exact(*(a + s * d for a, d in zip(args, way, strict=True))) for s in (0, step, -step)
    )
    return (ahead - here) / step, (here - behind) / step


# ---------------------------------------------------------------- random polyhedra


def solved(p):
    """The minimum of zᵀQz/2 − yᵀz with R(z − x) ≤ 0, E(z − x) = 0 and lower ≤ z − x ≤ upper.

    By enumeration: every independent subset of the inequalities is tried as the active set.
    """
    n, eye = len(p["y"]), torch.eye(len(p["y"]))
    sides = torch.cat([-p["lower"], p["upper"]])
    rows = torch.cat([p["R"], torch.cat([-eye, eye])[sides.isfinite()]])
    slack = torch.cat([torch.zeros(len(p["R"])), sides[sides.isfinite()]])
    limits, equal, m = slack + rows @ p["x"], p["E"], len(p["E"])
    for size in range(n - m + 1):
        subsets = list(itertools.combinations(range(len(rows)), size))
        sets = torch.tensor(subsets, dtype=torch.int64).view(len(subsets), size)
        J = torch.cat([equal.expand(len(sets), -1, -1), rows[sets]], 1)
        k = m + size
        K = torch.zeros(len(sets), n + k, n + k)
        K[:, :n, :n], K[:, :n, n:], K[:, n:, :n] = p["Q"], J.mT, J
        right = torch.cat(
            [p["y"].expand(len(sets), -1), (equal @ p["x"]).expand(len(sets), -1), limits[sets]], 1
        )
        independent = torch.linalg.svdvals(J).amin(1) > 1e-9 if k else torch.tensor([True])
        z, mu = torch.linalg.solve_ex(K, right)[0].split([n, k], 1)
        good = independent & (z @ rows.T <= limits + 1e-10).all(1) & (mu[:, m:] >= -1e-10).all(1)
        if bool(good.any()):
            return z[good][0]
    raise AssertionError("the program has no minimum")


def polyhedron(seed):
    """A problem whose solution lies on more constraints than it takes to hold it there.

    Independent rows, and combinations, copies and opposites of them, some as bounds and some as
    equations, at a vertex or not; in half of the cases some have no multiplier by construction.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    def choose(*among):
        return among[int(torch.randint(0, len(among), (1,), generator=random))]

    n = choose(2, 3, 4)
    rank, axes = choose(*range(1, n)), choose(True, False)
    M, x, eye = draw(n, n), choose(0.0, 1.0) * draw(n), torch.eye(n)
    basis = eye[:rank] if axes else torch.linalg.qr(draw(n, n))[0][:rank]
    rows = torch.cat([basis, draw(choose(1, 2), rank) @ basis])
    extra = {"copy": 2 * rows[:1], "opposite": -rows[:1], "equation": rows[:0], "no": rows[:0]}
    kind = choose(*extra)
    rows = torch.cat([rows, extra[kind]])
    E = basis[:1] if kind == "equation" else eye[:0]
    lower, upper = torch.full((n,), -INF), torch.full((n,), INF)
    if axes and choose(True, False):  # the first rows as bounds, the first element fixed
        upper[:rank], rows = 0.0, rows[rank:]
        lower[0] = choose(0.0, -INF)
    share = choose(1.0, 0.3)  # of the constraints, with a multiplier
    pushes = [
        (0.2 + torch.rand(k, generator=random)) * (torch.rand(k, generator=random) < share)
        for k in (len(rows), n)
    ]
    Q = M @ M.T / 2 + 0.3 * eye
    active = torch.cat([rows, eye[upper.isfinite()], E])
    along = draw(n)
    along = along - torch.linalg.pinv(active) @ (active @ along)  # free to move
    z = x + choose(0.0, 1.0) * along
    y = Q @ z + pushes[0] @ rows + pushes[1] * upper.isfinite() + draw(len(E)) @ E
    return {"Q": Q, "y": y, "x": x, "R": rows, "E": E, "lower": lower, "upper": upper}, z


def condition_for(p):
    """The problem of `solved`, as a function of y and x, which moves all constraints together."""
    given = {"bounds": lambda y, x: (p["lower"] + x, p["upper"] + x)}
    if len(p["R"]):
        given["inequality"] = lambda z, y, x: p["R"] @ (z - x)
    if len(p["E"]):
        given["equality"] = lambda z, y, x: p["E"] @ (z - x)
    return ig.argmin(lambda z, y, x: z @ p["Q"] @ z / 2 - y @ z, **given)


def compared(seed):
    """How far differences ahead and behind are apart, the Jacobian's error, and the status."""
    p, z = polyhedron(seed)
    args = p["y"], p["x"]
    random = torch.Generator().manual_seed(seed)

    def exact(y, x):
        return solved({**p, "y": y, "x": x})

    assert (exact(*args) - z).abs().max() < 1e-9
    dense = ig.Exact() if seed % 2 else None
    J, status = jacobian_and_status(condition_for(p), exact, *args, linear_solver=dense)
    kink, error = 0.0, 0.0
    for _ in range(3):
        way = [torch.randn(a.shape, generator=random) for a in args]
        ahead, behind = differences(exact, args, way)
        along = sum(j @ d for j, d in zip(J, way, strict=True))
        kink = max(kink, float((ahead - behind).abs().max()))
        error = max(error, float((along - (ahead + behind) / 2).abs().max()))
    return kink, error, status


def test_random_polyhedra():
    """Right and silent where differences ahead and behind agree, degenerate where they do not."""
    seen = collections.Counter()
    for seed in range(75):
        kink, error, status = compared(seed)
        if kink > 1e-3:
            assert status == "DEGENERATE", (seed, status)
        else:
            assert status in RIGHT and error < 1e-4, (seed, status, error)
        seen[kink > 1e-3] += 1
    assert seen[True] >= 7 and seen[False] >= 35


@settings(max_examples=25)
@given(
    seed=st.integers(0, 199),
    of_objective=st.sampled_from([1e-6, 1e-2, 1e3, 1e8]),
    of_phi=st.sampled_from([1e-4, 1e-1, 1e2, 1e6]),
    of_a_row=st.sampled_from([1e-6, 1e-2, 1e3, 1e8]),
)
def test_the_verdict_knows_no_units(seed, of_objective, of_phi, of_a_row):
    """φ in other units, and multiples of the objective and of one row: the same status and J."""
    p, z = polyhedron(seed)
    J, status = jacobian_and_status(condition_for(p), lambda y, x: z, p["y"], p["x"])
    other = {name: t.clone() for name, t in p.items()}
    other["Q"] *= of_objective / of_phi**2
    other["y"] *= of_objective / of_phi
    other["x"] *= of_phi
    other["R"][:1] *= of_a_row
    found, same = jacobian_and_status(
        condition_for(other),
        lambda y, x: z * of_phi,
        other["y"],
        other["x"],
        linear_solver=ig.Exact(),
    )
    assert (status in RIGHT) == (same in RIGHT) and (status == "DEGENERATE") == (
        same == "DEGENERATE"
    )
    if status in RIGHT:
        by_y, by_x = found[0] * of_objective / of_phi**2, found[1]
        torch.testing.assert_close((by_y, by_x), J, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("of_a_row", [1e-9, 1.0, 1e9])
def test_near_is_relative(unit, of_a_row):
    """To the size of φ and of a row's gradient: what is far in their units is never near."""
    y = torch.tensor([1.0, -2.0, 0.5]) * unit
    condition = ig.argmin(
        lambda z, y: (z - y).square().sum(),
        bounds=(-1.5 * unit, None),
        inequality=lambda z, y: of_a_row * (z.sum() - unit),
    )
    (J,), status = jacobian_and_status(condition, lambda y: y.clamp_min(-1.5 * unit), y)
    assert status in RIGHT
    torch.testing.assert_close(J, torch.diag(torch.tensor([1.0, 0.0, 1.0])))


@pytest.mark.parametrize("distance", [0.0, 1e-10, 1e-7, 1e-3])
@pytest.mark.parametrize("kind", ["bounds", "inequality"])
def test_a_constraint_beside_an_accurate_solution(kind, distance):
    """Within the accuracy of φ it is touched by chance; farther away there is nothing to say."""
    limit = 1.0 + distance
    given = (None, limit) if kind == "bounds" else (lambda z, y: z - limit)
    y = torch.tensor([1.0, 0.3])
    condition = ig.argmin(half_distance, **{kind: given})
    (J,), status = jacobian_and_status(condition, torch.clone, y)
    assert (status == "DEGENERATE") == (distance < 1e-8)
    torch.testing.assert_close(J, torch.eye(2))


# ---------------------------------------------------------------- problems that people have


def isotonic_regression(y, lower, upper):
    """Pool adjacent violators, then clip."""
    blocks = []
    for value in y.tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, n), (a, m) = blocks.pop(), blocks.pop()
            blocks.append([(a * m + b * n) / (m + n), m + n])
    return torch.cat([torch.full((n,), value) for value, n in blocks]).clamp(lower, upper)


def half_distance(z, y):
    return (z - y).square().sum() / 2


def test_isotonic_regression_with_bounds():
    """z₁ ≤ z₂ and z₂ ≤ upper imply z₁ ≤ upper: at the bound there are more rows than elements."""
    condition = ig.argmin(half_distance, bounds=(-0.4, 0.5), inequality=lambda z, y: z[:-1] - z[1:])
    at_bounds = 0
    for seed in range(40):
        y = torch.randn(7, generator=torch.Generator().manual_seed(seed))

        def exact(y):
            return isotonic_regression(y, -0.4, 0.5)

        (J,), status = jacobian_and_status(condition, exact, y)
        columns = [differences(exact, (y,), (d,)) for d in torch.eye(7)]
        numeric = torch.stack([(ahead + behind) / 2 for ahead, behind in columns], 1)
        assert status in RIGHT and (J - numeric).abs().max() < 1e-6, (seed, status)
        at_bounds += int((exact(y).abs() > 0.39).sum() > 1)
    assert at_bounds >= 20


def equation(b):
    return b / 2 * torch.ones(2)


def sum_of_squares(z, b):
    return z.square().sum()


SMOOTH = {
    "an equation as two inequalities": (
        sum_of_squares,
        {"inequality": lambda z, b: torch.stack([z.sum() - b, b - z.sum()])},
        equation,
        torch.tensor(1.0),
    ),
    "the same without a force": (
        lambda z, b: (z - b.detach() / 2).square().sum(),
        {"inequality": lambda z, b: torch.stack([z.sum() - b, b - z.sum()])},
        equation,
        torch.tensor(1.0),
    ),
    "an equation twice, of other size": (
        sum_of_squares,
        {"equality": lambda z, b: (z.sum() - b, 1e3 * (b - z.sum()))},
        equation,
        torch.tensor(1.0),
    ),
    "an equation and a row that it implies": (
        sum_of_squares,
        {"equality": lambda z, b: z.sum() - b, "inequality": lambda z, b: 2 * z.sum() - 2 * b},
        equation,
        torch.tensor(1.0),
    ),
    "a ball twice": (
        half_distance,
        {"inequality": lambda z, y: [z.square().sum() - 1, 3 * z.square().sum() - 3]},
        lambda y: y / y.norm(),
        torch.tensor([1.2, 0.9]),
    ),
    "fixed elements, one of them without a force": (
        half_distance,
        {"bounds": lambda y: (y[:1] * torch.ones(3), y[:1] * torch.ones(3))},
        lambda y: y[0] * torch.ones(3),
        torch.tensor([0.3, 0.3, -1.0]),
    ),
    "a bound that an equation implies": (
        half_distance,
        {"bounds": (0.0, None), "equality": lambda z, y: z.sum()},
        lambda y: y * 0,
        torch.tensor([0.3, -0.2, 1.0]),
    ),
    "the tip of a pyramid": (
        lambda z, y: y @ z,
        {"inequality": lambda z, y: [z[2] - 1 + s * (z[i] - 1) for i in (0, 1) for s in (1, -1)]},
        lambda y: y * 0 + 1,
        torch.tensor([0.1, -0.2, -1.0]),
    ),
    "a linear program whose optimum is an edge's end": (
        lambda z, y: y @ z + z[2] ** 2,
        {"bounds": (0.0, None), "inequality": lambda z, y: z[:2].sum() - 1},
        lambda y: torch.stack([0 * y[0] + 1, 0 * y[0], -y[2] / 2]),
        torch.tensor([-2.0, -1.0, -0.5]),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dense", [False, True], ids=["iterative", "Exact"])
@pytest.mark.parametrize("name", SMOOTH)
def test_right_and_silent(name, dense, dtype):
    objective, constraints, exact, at = SMOOTH[name]
    at = at.to(dtype)
    condition = ig.argmin(objective, **constraints)
    solver = ig.Exact() if dense else None
    (J,), status = jacobian_and_status(
        condition, lambda a: exact(a).to(dtype), at, linear_solver=solver
    )
    assert status in RIGHT
    expected = jacobian(exact, at).to(dtype)
    torch.testing.assert_close(
        J, expected, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9
    )


def test_a_tie_in_a_corner_is_a_kink():
    """Marginal returns of 3 in the first and in the second: a little more, and the second is in."""
    returns = torch.tensor([4.0, 3.0, 1.0, 0.5])
    condition = ig.argmin(
        lambda w, r: w.square().sum() / 2 - r @ w,
        bounds=(0, 1),
        equality=lambda w, r: w.sum() - 1,
    )
    _, status = jacobian_and_status(condition, lambda r: torch.tensor([1.0, 0, 0, 0]), returns)
    assert status == "DEGENERATE"


# ---------------------------------------------------------------- constraints that part ways

PARTING = {
    "an order and two upper bounds, each with its own argument": (
        {"bounds": lambda u: (None, u), "inequality": lambda z, u: z[0] - z[1]},
        torch.tensor([1.0, -0.5]),
        lambda u: u * 0,
        torch.tensor([0.0, 0.0]),
    ),
    "lower and upper bound, each with its own argument": (
        {"bounds": lambda u: (u[0], u[1])},
        torch.tensor([0.2, 0.7]),
        lambda u: u[:1] * torch.ones(2),
        torch.tensor([0.3, 0.3]),
    ),
    "two inequalities as an equation, each with its own argument": (
        {"inequality": lambda z, u: torch.stack([z.sum() - u[0], u[1] - z.sum()])},
        torch.tensor([0.2, 0.7]),
        lambda u: (u[:1] - 0.9) / 2 + torch.tensor([0.2, 0.7]),
        torch.tensor([0.3, 0.3]),
    ),
    "a row that turns away from another": (
        {"inequality": lambda z, u: torch.stack([z[0], z[0] + u * z[1]])},
        torch.tensor([1.0, 1.0]),
        lambda u: torch.tensor([0.0, 1.0]),
        torch.tensor(0.0),
    ),
    "a row that turns away from another around φ": (
        {"inequality": lambda z, u: torch.stack([z[0], z[0] + u * z[1]])},
        torch.tensor([1.0, 0.0]),
        lambda u: torch.tensor([0.0, 0.0]),
        torch.tensor(0.0),
    ),
    "a ball that touches a plane": (
        {"inequality": lambda z, u: torch.stack([z.square().sum() - 1, z[0] - 1])},
        torch.tensor([2.0, 0.0]),
        lambda u: torch.tensor([1.0, 0.0]),
        torch.tensor(0.0),
    ),
    "two balls that touch": (
        {
            "inequality": lambda z, u: [
                ((z - s) * torch.tensor([1.0, 2.0])).square().sum() - 1
                for s in (torch.tensor([1.0, 0]), torch.tensor([-1.0, 0]))
            ]
        },
        torch.tensor([0.5, 0.0]),
        lambda u: torch.tensor([0.0, 0.0]),
        torch.tensor(0.0),
    ),
}


@pytest.mark.parametrize("case", PARTING)
def test_constraints_that_part_ways_are_named(case):
    """The derivative depends on the choice of multipliers, or is none: never in silence."""
    constraints, target, exact, at = PARTING[case]
    u, target = at.double().requires_grad_(), target.double()

    def objective(z, u):
        return (z - target - 0 * u.sum()).square().sum() / 2

    solve = ig.implicit(lambda u: exact(u), ig.argmin(objective, **constraints))
    with pytest.warns(ig.ImplicitGradWarning, match="depend on each other at phi, but part ways"):
        solve(u).sum().backward()


INFEASIBLE = {
    "has no gradient": {"inequality": lambda z, u: z.square().sum() + 1},
    "does not depend on phi": {"equality": lambda z, u: (z[0], torch.tensor(0.7))},
    "is held by bounds": {
        "bounds": (torch.tensor([0.0, -9.0]), torch.tensor([0.0, 9.0])),
        "equality": lambda z, u: z[0] - 0.5,
    },
    "contradicts another": {"equality": lambda z, u: (z[0], z[0] - 0.5)},
}


@pytest.mark.parametrize("case", INFEASIBLE)
def test_what_is_violated_is_felt(case):
    """Even where no direction mends it, and none of the other constraints could tell."""
    u = torch.zeros(2, requires_grad=True)
    condition = ig.argmin(half_distance, **INFEASIBLE[case])
    solve = ig.implicit(torch.zeros_like, condition, on_failure="raise")
    with pytest.raises(ig.LinearSolveError):
        (solve(u) @ torch.tensor([1.0, 2.0])).backward()


def test_bounds_that_move_together_are_silent():
    """An order and one upper bound for both: z = (u, u)."""
    u = torch.tensor(0.0, requires_grad=True)
    target = torch.tensor([1.0, -0.5])
    condition = ig.argmin(
        lambda z, u: (z - target).square().sum(),
        bounds=lambda u: (None, u),
        inequality=lambda z, u: z[0] - z[1],
    )
    solve = ig.implicit(lambda u: u * torch.ones(2), condition, on_failure="raise")
    (grad,) = torch.autograd.grad(solve(u) @ torch.tensor([1.0, 10.0]), u)
    torch.testing.assert_close(grad, torch.tensor(11.0))


# ---------------------------------------------------------------- nonnegative least squares


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(0, 7),
    n=st.integers(1, 6),
    rank=st.integers(1, 6),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
)
def test_nonnegative_least_squares_meet_their_conditions(seed, k, n, rank, scale):
    """Feasible, no gain in any direction, none at all where a variable is positive."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, rank, generator=random) @ torch.randn(rank, n, generator=random)
    rows = torch.nn.functional.normalize(rows, dim=1)
    target = scale * torch.randn(n, generator=random)
    signed = torch.rand(k, generator=random) < 0.3
    sign = torch.randint(-1, 2, (n,), generator=random).double()
    x, b = nonnegative(target, rows, signed, sign, 2.2e-16)
    rest = (target + x @ rows + sign * b) / scale
    gains = torch.cat([-(rows @ rest), (-sign * rest)[sign != 0]])
    values = torch.cat([x.masked_fill(signed, 1.0), b[sign != 0]])
    assert (values >= 0).all() and (b[sign == 0] == 0).all()
    assert (gains <= 1e-9).all() and (gains[values > 0].abs() <= 1e-7).all()
