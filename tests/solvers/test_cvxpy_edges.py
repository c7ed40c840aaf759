"""CVXPY's problems at the edges of their cones: zeros of parameters, weights of 0, small cones."""

import math

import numpy as np
import pytest
import torch

import implicit_grad as ig
from implicit_grad.solvers import CVXPY

cp = pytest.importorskip("cvxpy")
pytestmark = pytest.mark.usefixtures("double_precision")
V = (1.0, 2.0, -3.0)


def close(found, expected, tol=1e-5):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def wrapped(objective, constraints, parameters, **options):
    layer = CVXPY(cp.Problem(cp.Minimize(objective), constraints), parameters)
    return ig.implicit(layer, layer.condition, **{"on_failure": "raise", **options})


def gradient(solve, *args):
    v = torch.tensor(V)[: args[0].numel()]
    return torch.autograd.grad(next(iter(solve(*args).values())).flatten() @ v, args)


# ---------------------------------------------------------------- exponential cones

# Of rel_entr(p, z) and each of these: z and dz/dp, in closed form. At p = 0, z is 0 too where the
# rest pushes it down, and leaves 0 with the slope that its multiplier has.
NEAR = torch.tensor([0.5, 0.4, -0.6], dtype=torch.float64)


def by_distance(p):
    root = (NEAR.square() + 4 * p).sqrt()
    return (NEAR + root) / 2, torch.diag(1 / root)


def by_simplex(p):
    z = p / p.sum()
    return z, (torch.eye(3) - z[:, None]) / p.sum()


ENTROPIES = {
    "distance": (lambda z: (cp.sum_squares(z - NEAR.numpy()) / 2, []), by_distance),
    "simplex": (lambda z: (0, [cp.sum(z) == 1]), by_simplex),
    "sum": (lambda z: (cp.sum(z), []), lambda p: (p, torch.eye(3))),
}


@pytest.mark.parametrize("least", [0.0, 1e-12, 1e-9, 1e-7, 1e-4, 0.1])
@pytest.mark.parametrize("bound", ["none", "constraint", "attribute"])
@pytest.mark.parametrize("kind", ENTROPIES)
def test_zeros_of_a_distribution(kind, bound, least):
    more, closed_form = ENTROPIES[kind]
    z, p = cp.Variable(3, name="z", nonneg=bound == "attribute"), cp.Parameter(3, nonneg=True)
    rest, constraints = more(z)
    bounds = [z >= 0] if bound == "constraint" else []
    solve = wrapped(cp.sum(cp.rel_entr(p, z)) + rest, [*constraints, *bounds], [p])
    at = torch.tensor([0.5, 0.5 - least, least], requires_grad=True)
    expected, jacobian = closed_form(at.detach())
    close(solve(at)["z"].detach(), expected)
    # between 1e-8 and 1e-4 z has few digits
    tolerance = 0.02 if least == 1e-7 else 1e-3 if least == 1e-4 else 1e-5
    (found,) = gradient(solve, at)
    close(found, torch.tensor(V) @ jacobian, tolerance)


def test_zeros_of_a_distribution_under_transforms():
    z, p = cp.Variable(3, name="z"), cp.Parameter(3, nonneg=True)
    solve = wrapped(cp.sum(cp.rel_entr(p, z)), [cp.sum(z) == 1], [p])
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1e-10, 0.4, 0.6]], requires_grad=True)
    v = torch.tensor(V)
    (found,) = torch.autograd.grad((torch.func.vmap(solve)(rows)["z"] @ v).sum(), rows)
    jacobians = [by_simplex(row)[1] for row in rows.detach()]
    close(found, torch.stack([v @ jacobian for jacobian in jacobians]))
    close(torch.func.jacrev(solve)(rows[0].detach())["z"], jacobians[0])


@pytest.mark.parametrize("bound", [True, False])
def test_zeros_of_what_an_entropy_is_relative_to(bound):
    """z log(z/p) + z²/2 − qz has its least at z = p exp(q − 1 − z), which for p = 0 is 0."""
    z, p, q = cp.Variable(3, name="z", nonneg=bound), cp.Parameter(3, nonneg=True), cp.Parameter(3)
    solve = wrapped(cp.sum(cp.rel_entr(z, p)) + cp.sum_squares(z) / 2 - q @ z, [], [p, q])
    at, slope = torch.tensor([0.5, 0.3, 0.0]), torch.tensor([1.0, 0.2, -0.4])
    args = at.requires_grad_(), slope.requires_grad_()
    by_p, by_q = gradient(solve, *args)
    z = solve(*args)["z"].detach()
    factor = (slope - 1 - z).exp().detach()
    close(z, at.detach() * factor)
    close(by_p, torch.tensor(V) * factor / (1 + z))
    close(by_q, torch.tensor(V) * z / (1 + z))


def test_probabilities_too_small_for_a_solver():
    x, c = cp.Variable(3, name="x"), cp.Parameter(3)
    solve = wrapped(-cp.sum(cp.entr(x)) - c @ x, [cp.sum(x) == 1], [c])
    for last in (-1.0, -20.0, -60.0):
        at = torch.tensor([1.0, 0.5, last], requires_grad=True)
        (found,) = gradient(solve, at)
        close(found, torch.autograd.grad(at.softmax(0) @ torch.tensor(V), at)[0])


@pytest.mark.parametrize("least", [0.0, 0.1])
def test_an_infinite_slope_is_told(least):
    """Of p log p at 0, where more than the objective counts it: here, how far z may go."""
    z, p, near = cp.Variable(2, name="z"), cp.Parameter(2, nonneg=True), torch.tensor([0.2, 0.3])
    within = cp.sum(cp.rel_entr(p, z)) <= 0.3
    monitor = ig.Monitor()
    options = {"monitor": monitor, "on_failure": "ignore"}
    solve = wrapped(cp.sum_squares(z - near.numpy()), [within], [p], **options)
    gradient(solve, torch.tensor([1.0, least], requires_grad=True))
    assert monitor.last.status is (ig.Status.CONVERGED if least else ig.Status.DEGENERATE)


def test_the_shared_zeros_of_two_distributions_are_told():
    z, p, q = cp.Variable(2, name="z"), cp.Parameter(2, nonneg=True), cp.Parameter(2, nonneg=True)
    entropies = cp.sum(cp.rel_entr(p, z)) + cp.sum(cp.rel_entr(q, z))
    solve = wrapped(entropies, [cp.sum(z) == 1], [p, q])
    args = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    with pytest.raises(ig.LinearSolveError, match="part ways"):
        gradient(solve, *(a.requires_grad_() for a in args))


def test_an_exponential_below_the_digits_of_a_solver():
    """Clarabel has exp(−20) to one digit, and of exp(−60) none."""
    x, c = cp.Variable(2, name="x"), cp.Parameter(2)
    solve = wrapped(cp.sum(cp.exp(x)) + cp.sum_squares(x - c) / 2, [], [c])
    (found,) = gradient(solve, torch.tensor([-20.0, -60.0], requires_grad=True))
    close(found, torch.tensor(V)[:2])


def test_probabilities_too_small_for_a_solver_under_a_least_entropy():
    """softmax(c/τ), with the τ of that entropy."""
    x, c = cp.Variable(4, name="x"), cp.Parameter(4)
    solve = wrapped(-c @ x, [cp.sum(x) == 1, cp.sum(cp.entr(x)) >= 0.7], [c])
    v = torch.tensor([*V, 4.0])
    for last in (-1.0, -20.0):
        at = torch.tensor([1.0, 0.5, 0.2, last], requires_grad=True)
        x = solve(at)["x"]

        def excess(tau, at=at):
            x = (at / tau).softmax(0)
            return -(x * (at / tau).log_softmax(0)).sum() - 0.7

        tau = torch.tensor(0.3)
        for _ in range(9):
            tau = tau.detach()
            tau = tau - excess(tau) / torch.func.grad(excess)(tau).detach()
        expected = (at / tau).softmax(0)
        close(x, expected)
        close(*(torch.autograd.grad(phi @ v, at)[0] for phi in (x, expected)))


@pytest.mark.parametrize("b", [-2.0, -0.4, -0.3, -0.1])
def test_tips_that_phi_moves_along_all_ways(b):
    """x log(x/z) at 0, where its slopes exp(a − 1) + b are not above 0."""
    u, at = cp.Variable(2, name="u"), cp.Parameter(2)
    solve = wrapped(cp.rel_entr(u[0], u[1]) + cp.sum_squares(u - at) / 2, [], [at])
    args = torch.tensor([-0.6, b], requires_grad=True)
    x, z = solve(args)["u"].detach()
    (found,) = gradient(solve, args)
    if math.exp(-1.6) + b <= 0:
        close(found, torch.zeros(2))
    else:
        bend = torch.tensor([[1 / x, -1 / z], [-1 / z, x / z**2]]) + torch.eye(2)
        close(found, torch.linalg.solve(bend, torch.tensor(V)[:2]))


def test_a_tip_leads_along_the_ray_of_its_multipliers():
    """x ≤ p log(z/p) is pulled up, and z down by 2: z = p/2, so that x leaves 0 by −p log 2."""
    u, p = cp.Variable(3, name="u"), cp.Parameter(nonneg=True)
    objective = -u[0] + 2 * u[1] + cp.sum_squares(u - np.array([0.0, 0.0, 1.0])) / 2
    solve = wrapped(objective, [cp.constraints.ExpCone(u[0], p, u[1])], [p])
    at = torch.tensor(0.0, requires_grad=True)
    (found,) = torch.autograd.grad(solve(at)["u"] @ torch.tensor(V), at)
    close(found, torch.tensor(1.0 - math.log(2)))


OTHERS = "a bound on it", "an exponential", "a height that the user has", "a height squared"


def one_cone(kind):
    """An objective and constraints with one exponential cone."""
    z, p, t = cp.Variable(name="z"), cp.Parameter(name="p", nonneg=True), cp.Variable(name="t")
    x = cp.Variable(name="x", nonpos=True)
    return {
        "an entropy": (cp.rel_entr(p, z) + cp.square(z), []),
        "a bound on it": (cp.square(z - p), [cp.rel_entr(p, z) <= 1]),
        "an exponential": (cp.exp(z) - p * z, []),
        "a height that the user has": (-t + cp.square(z), [cp.constraints.ExpCone(t, p, z)]),
        "a height squared": (cp.square(cp.log1p(x)) + cp.square(x - p), []),
    }[kind], p


@pytest.mark.parametrize("kind", ["an entropy", *OTHERS])
def test_heights_that_only_the_objective_sees_are_known(kind):
    (objective, constraints), p = one_cone(kind)
    layer, at = CVXPY(cp.Problem(cp.Minimize(objective), constraints), [p]), torch.tensor(0.2)
    cones = layer.condition.exponential(layer(at), at)
    assert cones.counted.tolist() == [kind == "an entropy"]


# ---------------------------------------------------------------- rows


def test_rows_that_a_cone_implies_are_left_out_and_no_others():
    x, p = cp.Variable(name="x"), cp.Parameter(nonneg=True)

    def condition(objective, bound):
        return CVXPY(cp.Problem(cp.Minimize(objective), [bound]), [p]).condition

    entropy = cp.rel_entr(p, x)
    for implied in (x >= 0, 3 * x >= 0, -2 * x <= 0):
        assert condition(entropy, implied).inequality is None
    assert condition(cp.rel_entr(p, x - 0.1), 7 * x >= 0.7).inequality is None  # to rounding
    for other in (x <= 0, x >= 0.1, x >= -p):
        assert condition(entropy, other).inequality is not None
    solve = wrapped(cp.exp(x) + p * x, [x >= 0], [p])  # x is no height, but above the surface
    at = torch.tensor(0.3, requires_grad=True)
    phi = solve(at)["x"]
    close(torch.stack([phi.detach(), *torch.autograd.grad(phi, at)]), torch.zeros(2))


def test_a_distribution_that_is_constant_may_have_zeros():
    z, near, p = cp.Variable(3, name="z"), cp.Parameter(3), np.array([0.5, 0.5, 0.0])
    solve = wrapped(cp.sum(cp.rel_entr(p, z)) + cp.sum_squares(z - near) / 2, [], [near])
    for at in (NEAR, NEAR.abs()):
        root = (at.square() + 4 * torch.tensor(p)).sqrt()
        (found,) = gradient(solve, at.clone().requires_grad_())
        close(found, (1 + at / root) / 2 * torch.tensor(V))


def test_problems_without_constraints_and_parameters_that_are_never_1():
    x, c = cp.Variable(2, name="x"), cp.Parameter(2, nonpos=True)
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    solve = wrapped(cp.quad_form(x, matrix.numpy()) / 2 + c @ x, [], [c])
    at = torch.tensor([-1.0, 0.0], requires_grad=True)
    assert set(solve(at)) == {"x"}  # and nothing auxiliary
    close(gradient(solve, at)[0], -torch.linalg.solve(matrix, torch.tensor(V)[:2]))


@pytest.mark.parametrize("bounds", [[0, 1], [None, 1]])
def test_bounds_that_variables_have_of_their_own(bounds):
    x, y = cp.Variable(2, name="x", bounds=bounds), cp.Parameter(2)
    at = torch.tensor([2.0, 0.5], requires_grad=True)
    solve = wrapped(cp.sum_squares(x - y), [], [y])
    close(solve(at)["x"].detach(), torch.tensor([1.0, 0.5]))
    close(gradient(solve, at)[0], torch.tensor([0.0, V[1]]))


# ---------------------------------------------------------------- weights

TERMS = {
    "1-norm": (cp.norm1, torch.sign),
    "2-norm": (cp.norm, lambda x: x / x.norm()),
    "exp": (lambda x: cp.sum(cp.exp(x)), torch.exp),
    "log": (lambda x: -cp.sum(cp.log(x + 1)), lambda x: -1 / (1 + x)),
}


@pytest.mark.parametrize("weight", [0.0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("term", TERMS)
def test_a_weight_too_small_for_a_solver_is_told(term, weight):
    """What CVXPY minimises in its term's place is left anywhere, and says nothing of the weight."""
    of_x, slope = TERMS[term]
    x, y, lam = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(nonneg=True)
    monitor = ig.Monitor()
    objective = cp.sum_squares(x - y) / 2 + lam * of_x(x)
    solve = wrapped(objective, [], [y, lam], monitor=monitor, on_failure="ignore")
    at = torch.tensor([1.0, 0.3], requires_grad=True)
    by_at, by_lam = gradient(solve, at, torch.tensor(weight, requires_grad=True))
    v = torch.tensor(V)[:2]
    if monitor.last.status.ok:
        x = solve(at, torch.tensor(weight))["x"].detach()
        bend = torch.func.jacrev(slope)(x)
        expected = torch.linalg.solve(torch.eye(2) + weight * bend, v)
        close(by_at, expected)
        close(by_lam, -expected @ slope(x), 1e-3)
        assert weight
    else:
        assert monitor.last.status is ig.Status.DEGENERATE and weight <= 1e-6
    # and if nobody asks for its gradient, nothing is wrong
    if not weight:
        (found,) = gradient(lambda y: solve(y, torch.tensor(0.0)), at)
        assert monitor.last.status.ok
        close(found, v)


PENALTIES = {
    "1-norm": cp.norm1,
    "2-norm": cp.norm,
    "max-norm": cp.norm_inf,
    "huber": lambda x: cp.sum(cp.huber(x, 0.1)),
    "positive part": lambda x: cp.sum(cp.pos(x)),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", PENALTIES)
def test_random_penalties_are_right_or_told(kind, seed):
    """Weights from 1e-9 to 10, against differences; from 1e-5 on nothing is to be told."""
    random = np.random.default_rng(seed)
    A, b, v = random.normal(size=(6, 3)), random.normal(size=6), torch.tensor(V)
    lam = 10 ** random.uniform(-9, 1) if seed else 0.0
    x, weight = cp.Variable(3, name="x"), cp.Parameter(nonneg=True)
    objective = cp.sum_squares(A @ x - b) / 2 + weight * PENALTIES[kind](x)
    monitor = ig.Monitor()
    solve = wrapped(objective, [], [weight], monitor=monitor, on_failure="ignore")
    at = torch.tensor(lam, requires_grad=True)
    (found,) = torch.autograd.grad(solve(at)["x"] @ v, at)
    h = max(1e-3 * lam, 1e-4)
    steps = ((-3, 0), (4, h), (-1, 2 * h)) if lam < h else ((1, h), (-1, -h))
    ends = sum(w * (solve(torch.tensor(lam + s))["x"] @ v) for w, s in steps)
    if monitor.last.status.ok:
        close(found, ends / (2 * h), 0.02)
    else:
        assert monitor.last.status is ig.Status.DEGENERATE and lam < 1e-5


def test_a_weight_of_0_in_a_batch_is_told():
    x, y, lam = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(nonneg=True)
    monitor = ig.Monitor()
    objective = cp.sum_squares(x - y) / 2 + lam * cp.norm1(x)
    solve = wrapped(objective, [], [y, lam], monitor=monitor, on_failure="ignore")
    at = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    lams = torch.tensor([0.5, 0.0], requires_grad=True)
    (found,) = torch.autograd.grad(torch.func.vmap(solve)(at, lams)["x"].sum(), lams)
    close(found[0], torch.tensor(-2.0))
    assert sorted(r.status.name for r in monitor.reports) == ["CONVERGED", "DEGENERATE"]


def test_what_hangs_loose_but_is_not_pulled_stays_in_the_batch():
    """The variable for a norm below its bound."""
    x, y = cp.Variable(2, name="x"), cp.Parameter(2)
    monitor = ig.Monitor()
    solve = wrapped(cp.sum_squares(x - y), [cp.norm1(x) <= 9], [y], monitor=monitor)
    at = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    (found,) = torch.autograd.grad(torch.func.vmap(solve)(at)["x"].sum(), at)
    close(found, torch.ones(2, 2))
    one, other = (report.products for report in monitor.reports)
    assert one == other  # those of both


def test_the_radius_0_of_a_robust_constraint_is_told():
    x, y, r = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(nonneg=True)
    monitor = ig.Monitor()
    within = cp.sum(x) + r * cp.norm(x) <= 1
    options = {"monitor": monitor, "on_failure": "ignore"}
    solve = wrapped(cp.sum_squares(x - y) / 2, [within], [y, r], **options)
    for radius in (0.0, 0.1):
        args = torch.tensor([1.0, 2.0]), torch.tensor(radius)
        gradient(solve, *(a.requires_grad_() for a in args))
        assert monitor.last.status is (ig.Status.CONVERGED if radius else ig.Status.DEGENERATE)


# ---------------------------------------------------------------- second-order cones


@pytest.mark.parametrize("unit", [1e-5, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("polish", [0, 1])
def test_a_cone_knows_no_units(unit, polish):
    """What is small is measured row by row: a ball in other units than x's is no apex."""
    x, y = cp.Variable(2, name="x"), cp.Parameter(2)
    ball = cp.norm(unit * x) <= unit
    solve = wrapped(cp.sum_squares(x - y), [ball], [y], polish=polish)
    at = torch.tensor([3.0, 4.0], requires_grad=True)
    unit_vector = at.detach() / 5
    close(solve(at)["x"].detach(), unit_vector)
    (found,) = gradient(solve, at)
    across = torch.eye(2) - torch.outer(unit_vector, unit_vector)
    close(found, across @ torch.tensor(V)[:2] / 5)


@pytest.mark.parametrize("radius", [1e-9, 1e-7, 1e-5, 1.0])
def test_a_radius_that_is_a_parameter_is_known_exactly(radius):
    """However small it is, x lies on a sphere, and not at an apex."""
    x, y, r = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(nonneg=True)
    solve = wrapped(cp.sum_squares(x - y), [cp.SOC(r, x)], [y, r])
    args = torch.tensor([3.0, 4.0]), torch.tensor(radius)
    _, by_radius = gradient(solve, *(a.requires_grad_() for a in args))
    close(by_radius, torch.tensor(0.6 * V[0] + 0.8 * V[1]))


def test_a_radius_of_0_is_told():
    x, y, r = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(nonneg=True)
    solve = wrapped(cp.sum_squares(x - y), [cp.SOC(r, x)], [y, r])
    args = torch.tensor([3.0, 4.0]), torch.tensor(0.0)
    with pytest.raises(ig.LinearSolveError, match="part ways"):
        gradient(solve, *(a.requires_grad_() for a in args))


def test_jacrev_at_an_apex():
    x, y = cp.Variable(2, name="x"), cp.Parameter(2)
    solve = wrapped(cp.sum_squares(x - y) / 2 + cp.norm(x), [], [y])
    close(torch.func.jacrev(solve)(torch.tensor([0.3, 0.4]))["x"], torch.zeros(2, 2))


# ---------------------------------------------------------------- kinks


@pytest.mark.parametrize("polish", [0, 1])
@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4])
def test_a_solution_too_near_to_a_kink_is_told(size, polish):
    """Clarabel leaves x at 2e-6 where it is 0 without a force, and has as much to either side."""
    x, y = cp.Variable(2, name="x"), cp.Parameter(2)
    layer = CVXPY(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0]), [y])
    monitor = ig.Monitor()
    options = {"monitor": monitor, "on_failure": "ignore", "polish": polish}
    solve = ig.implicit(layer, layer.condition, **options)
    for side in (1.0, -1.0):
        at = torch.tensor([side * size, 1.0], requires_grad=True)
        (found,) = torch.autograd.grad(solve(at)["x"].sum(), at)
        expected = torch.tensor([(side + 1) / 2, 1.0])
        fine = monitor.last.status.ok
        assert fine or monitor.last.status is ig.Status.DEGENERATE
        assert not fine or torch.allclose(found, expected)
        assert fine if size >= (1e-6 if polish else 1e-5) else size or not fine


def test_kinks_in_a_batch_are_told():
    x, y = cp.Variable(2, name="x"), cp.Parameter(2)
    monitor = ig.Monitor()
    options = {"monitor": monitor, "on_failure": "ignore"}
    solve = wrapped(cp.sum_squares(x - y), [x >= 0], [y], **options)
    at = torch.tensor([[0.5, 1.0], [0.0, 1.0], [-0.5, 1.0]], requires_grad=True)
    (found,) = torch.autograd.grad(torch.func.vmap(solve)(at)["x"].sum(), at)
    close(found[::2], torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert sorted(r.status.name for r in monitor.reports) == ["CONVERGED"] * 2 + ["DEGENERATE"]


# ---------------------------------------------------------------- the solver, and names


def test_the_solver_tries_again_in_shorter_steps():
    """At full length it gives up here, with 3e-6 for an element that is 0."""
    X = np.random.default_rng(1).normal(size=(8, 4))
    w, lam = cp.Variable(4, name="w"), cp.Parameter(nonneg=True)
    objective = cp.sum(cp.logistic(X @ w)) / 8 + lam * cp.norm1(w)
    found = CVXPY(cp.Problem(cp.Minimize(objective)), [lam])(torch.tensor(0.1))["w"]
    assert found[0].abs() < 1e-7


@pytest.mark.parametrize("names", ["xxx", "xxy", "xyy"])
def test_variables_and_parameters_may_share_a_name(names):
    x = cp.Variable(2, name=names[0], nonneg=True)
    y, z = (cp.Parameter(2, name=name, nonneg=True) for name in names[1:])
    solve = wrapped(cp.sum_squares(x - y) / 2 + z @ x, [], [y, z])
    args = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0])
    found = gradient(solve, *(a.requires_grad_() for a in args))
    close(solve(*args)["x"].detach(), torch.tensor([2.5, 0.0]))
    close(torch.stack(found), torch.tensor([[V[0], 0.0], [-V[0], 0.0]]))
