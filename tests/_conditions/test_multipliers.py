"""Multipliers as outputs: against closed forms, and what they say of the minimum's value."""

import pytest
import torch
from problems import normal

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


def close(found, expected, tol=1e-8):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_an_equality_constrained_quadratic_in_closed_form():
    """[[H, Aᵀ], [A, 0]] [x; ν] = [c; b], differentiated by every argument."""
    H, A = normal(5, 5, seed=1), normal(2, 5, seed=2)
    c, b, v, w = normal(5, seed=3), normal(2, seed=4), normal(5, seed=5), normal(2, seed=6)
    args = (H, A, c, b)

    def kkt(H, A, c, b):
        H = H @ H.T + torch.eye(5)
        matrix = torch.cat([torch.cat([H, A.T], 1), torch.cat([A, torch.zeros(2, 2)], 1)])
        both = torch.linalg.solve(matrix, torch.cat([c, b]))
        return both[:5], both[5:]

    def objective(x, H, A, c, b):
        return x @ (H @ H.T + torch.eye(5)) @ x / 2 - c @ x

    def equality(x, H, A, c, b):
        return {"sum": A @ x - b}

    condition = ig.argmin(objective, equality=equality, multipliers=True)
    x, multipliers = ig.implicit(lambda *a: kkt(*a)[0], condition, on_failure="raise")(*args)
    exact = kkt(*args)
    close(multipliers.equality["sum"], exact[1])
    assert multipliers.lower is None and multipliers.inequality is None
    outer = x @ v + multipliers.equality["sum"] @ w
    right = exact[0] @ v + exact[1] @ w
    first, expected = (torch.autograd.grad(f, args, create_graph=True) for f in (outer, right))
    close(first, expected)
    second, expected = (
        torch.autograd.grad(sum(g.sin().sum() for g in f), args) for f in (first, expected)
    )
    close(second, expected, 1e-7)


# The nearest point to y with sum s, first element at most r, and all at least 0: at
# y = (0.9, 0.5, 0.2, −1) it is (r, x₂, x₃, 0), x₂ + x₃ = s − r, x₂ − x₃ = y₂ − y₃.
Y, S, R = torch.tensor([0.9, 0.5, 0.2, -1.0]), torch.tensor(1.0), torch.tensor(0.3)


def projected(y, s, r):
    half = (s - r - y[1] - y[2]) / 2
    return torch.stack([r, y[1] + half, y[2] + half, torch.zeros(()).to(y)])


def distance(x, y, s, r):
    return (x - y).square().sum() / 2


CONSTRAINTS = {
    "bounds": (0.0, None),
    "equality": lambda x, y, s, r: x.sum() - s,
    "inequality": lambda x, y, s, r: (x[:1] - r, [x[1:2] - 2]),
}


def solve(**options):
    condition = ig.argmin(distance, **CONSTRAINTS, multipliers=True)
    return ig.implicit(projected, condition, **options)


def expected(y, s, r):
    """ν = y₂ − x₂; then each other element's own slope."""
    x = projected(y, s, r)
    nu = y[1] - x[1]
    zero = torch.zeros(()).to(y)
    lower = torch.stack([zero, zero, zero, x[3] - y[3] + nu])
    return x, lower, nu, y[0] - x[0] - nu


def points():
    return tuple(t.double().requires_grad_() for t in (Y, S, R))


def test_all_kinds_at_once_and_their_gradients():
    args = points()
    x, found = solve(on_failure="raise")(*args)
    x0, lower, nu, mu = expected(*args)
    close(x, x0)
    close(found.lower, lower)
    close(found.upper, torch.zeros(4))
    close(found.equality, nu)
    close(found.inequality, (mu[None], [torch.zeros(1)]))
    for one, other in ((found.lower[3], lower[3]), (found.equality, nu), (found.inequality[0], mu)):
        slopes = [
            torch.autograd.grad(t.sum(), args, allow_unused=True, retain_graph=True)
            for t in (one, other)
        ]
        slopes = [
            [torch.zeros_like(a) if g is None else g for a, g in zip(args, s, strict=True)]
            for s in slopes
        ]
        close(*slopes)


def test_they_are_the_derivatives_of_the_minimum_s_value():
    """The envelope theorem: d min/ds = −ν, d min/dr = −μ."""
    y, s, r = points()
    x, found = solve()(y, s, r)
    value = torch.autograd.grad(distance(x, y, s, r), (s, r))
    close(value, (-found.equality.detach(), -found.inequality[0][0].detach()))


def test_transforms_and_no_gradient():
    args = tuple(t.detach() for t in points())

    def all_in_one(y, s, r):
        x, found = solve()(y, s, r)
        return torch.cat([x, found.lower, found.equality[None], found.inequality[0]])

    def reference(y, s, r):
        x, lower, nu, mu = expected(y, s, r)
        return torch.cat([x, lower, nu[None], mu[None]])

    every = (0, 1, 2)
    close(torch.func.jacrev(all_in_one, every)(*args), torch.func.jacrev(reference, every)(*args))
    batch = (args[0].expand(2, 4), args[1] + torch.tensor([0.0, 0.1]), args[2].expand(2))
    close(torch.func.vmap(all_in_one)(*batch), torch.func.vmap(reference)(*batch))
    with torch.no_grad():
        _, found = solve()(*points())
    assert not found.equality.requires_grad
    with torch.inference_mode():
        close(solve()(*points())[1].equality, expected(*args)[2])


def test_with_aux_a_container_and_a_minimiser_of_ours():
    pytest.importorskip("scipy")

    def objective(phi, c):
        return (phi["a"] - c).square().sum() + (phi["b"] - 3).square()

    solve = ig.implicit(
        ig.solvers.SciPyMinimize(method="SLSQP", tol=1e-12),
        ig.argmin(objective, bounds=(None, {"a": 0.5, "b": 1.0}), multipliers=True),
        init=lambda c: {"a": torch.zeros(2), "b": torch.zeros(())},
    )
    c = torch.tensor([0.2, 2.0], requires_grad=True)
    phi, found = solve(c)
    close(phi, {"a": torch.tensor([0.2, 0.5]), "b": torch.tensor(1.0)}, 1e-6)
    close(found.upper, {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor(4.0)}, 1e-6)
    close(torch.autograd.grad(found.upper["a"].sum(), c)[0], torch.tensor([0.0, 2.0]), 1e-6)
    with_aux = ig.implicit(
        lambda c: (torch.zeros(2).to(c), "aux"),
        ig.argmin(lambda x, c: (x - c).square().sum(), bounds=(None, 0.0), multipliers=True),
        has_aux=True,
    )
    (_, found), aux = with_aux(torch.ones(2))
    assert aux == "aux"
    close(found.upper, torch.full((2,), 2.0))


def test_multipliers_that_are_not_unique_are_told():
    condition = ig.argmin(
        lambda x, c: (x - c).square().sum(),
        equality=lambda x, c: torch.stack([x.sum(), 2 * x.sum()]),
        multipliers=True,
    )
    c = torch.tensor([1.0, 2.0])
    with pytest.warns(ig.ImplicitGradWarning, match="multipliers are not unique"):
        _, found = ig.implicit(lambda c: c - c.mean(), condition)(c)
    close(found.equality @ torch.tensor([1.0, 2.0]), torch.tensor(3.0))  # of their sum


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("multipliers=True is for minima under", {"multipliers": True}),
        (r"multipliers=1\): expected True or False", {"multipliers": 1, "bounds": (0, 1)}),
    ],
)
def test_what_cannot_work_is_named(message, options):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        ig.argmin(distance, **options)
