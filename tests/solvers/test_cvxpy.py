"""CVXPY's problems: against closed forms, our own constrained minima, and finite differences."""

import pytest
import torch
from torch.nn.functional import softplus

import implicit_grad as ig
from implicit_grad import prox
from implicit_grad.solvers import CVXPY, ProximalGradient

cp = pytest.importorskip("cvxpy")
pytestmark = pytest.mark.usefixtures("double_precision")


def close(found, expected, tol=1e-6):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def wrapped(objective, constraints, parameters, **options):
    layer = CVXPY(cp.Problem(cp.Minimize(objective), constraints), parameters)
    return ig.implicit(layer, layer.condition, on_failure="raise", **options)


def differences(function, args, h=1e-5):
    """The gradient of a number, by central differences."""
    grads = []
    for i, a in enumerate(args):
        grad = torch.zeros_like(a)
        for j in range(a.numel()):
            step = torch.zeros(a.numel())
            step[j] = h
            ends = [
                function(*args[:i], (a + s * step.view(a.shape)).detach(), *args[i + 1 :])
                for s in (1, -1)
            ]
            grad.view(-1)[j] = (ends[0] - ends[1]).detach() / (2 * h)
        grads.append(grad)
    return tuple(grads)


def test_projection_onto_the_simplex():
    x, y = cp.Variable(4, name="x"), cp.Parameter(4)
    project = wrapped(cp.sum_squares(x - y), [x >= 0, cp.sum(x) == 1], [y])
    at = torch.tensor([0.9, 0.5, 0.1, -1.0], requires_grad=True)
    found = project(at)["x"]
    close(found, torch.tensor([0.7, 0.3, 0.0, 0.0]))
    rows = [torch.autograd.grad(e, at, retain_graph=True)[0] for e in found]
    S = torch.tensor([1.0, 1.0, 0.0, 0.0])
    close(torch.stack(rows), torch.diag(S) - torch.outer(S, S) / 2)
    assert y.value is None  # nothing of the user's is changed


def test_a_lasso_is_that_of_proximal_steps():
    A, b = torch.randn(12, 6), torch.randn(12)
    w, P, q = cp.Variable(6, name="w"), cp.Parameter((12, 6)), cp.Parameter(12)
    lam = cp.Parameter(nonneg=True)
    by_cvxpy = wrapped(cp.sum_squares(P @ w - q) / 2 + lam * cp.norm1(w), [], [P, q, lam])
    by_prox = ig.implicit(
        ProximalGradient(),
        ig.prox_gradient(
            lambda w, A, b, lam: (A @ w - b).square().sum() / 2,
            prox.soft_threshold(lambda A, b, lam: lam),
        ),
        init=lambda A, b, lam: torch.zeros(6),
    )
    args = tuple(t.requires_grad_() for t in (A, b, torch.tensor(2.0)))
    v = torch.randn(6)
    one, other = by_cvxpy(*args)["w"], by_prox(*args)
    assert 0 < int((other == 0).sum()) < 6
    close(one, other)
    close(*(torch.autograd.grad(w @ v, args) for w in (one, other)))


def coupled(v):
    """A quadratic form that couples its unknowns."""
    x, c = cp.Variable(3, name="x"), cp.Parameter(3)
    matrix = torch.tensor([[3.0, 1.0, -1.0], [1.0, 2.0, 0.5], [-1.0, 0.5, 4.0]])
    solve = wrapped(cp.quad_form(x, matrix.numpy()) / 2 + c @ x, [cp.sum(x) == 1], [c])
    return lambda c: solve(c)["x"] @ v[:3], (torch.tensor([1.0, -2.0, 0.5]),)


def second_order(v):
    X, y, r = cp.Variable((2, 2), name="X"), cp.Parameter((2, 2)), cp.Parameter(pos=True)
    solve = wrapped(cp.sum_squares(X - y), [cp.norm(X, "fro") <= r, X[0, 1] >= 0.1], [y, r])
    args = torch.tensor([[2.0, -0.5], [0.3, 1.0]]), torch.tensor(1.2)
    return lambda *a: (solve(*a)["X"] * v.view(2, 2)).sum(), args


def exponential(v):
    """Regularised logistic regression, whose losses CVXPY writes with exponential cones."""
    X, labels = torch.randn(8, 3), torch.randn(8).sign()
    w, lam = cp.Variable(3, name="w"), cp.Parameter(pos=True)
    losses = cp.sum(cp.logistic(cp.multiply(-labels.numpy(), X.numpy() @ w)))
    solve = wrapped(losses + lam * cp.sum_squares(w), [], [lam])

    def outer(lam):
        found = solve(lam)["w"]
        slope = torch.func.grad(lambda w: softplus(-labels * (X @ w)).sum() + lam * w @ w)
        close(slope(found.detach()), torch.zeros(3), 1e-5)
        return found @ v[:3]

    return outer, (torch.tensor(0.7),)


def test_relative_entropy_of_zeros():
    """A label's zeros are parameters on the boundary of exponential cones."""
    x, p = cp.Variable(3, name="x"), cp.Parameter(3, nonneg=True)
    near = torch.tensor([0.1, 0.2, 0.7])
    of_x = cp.sum(cp.rel_entr(p, x)) + cp.sum_squares(x - near.numpy()) / 2
    solve = wrapped(of_x, [], [p], polish=1)
    at = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    found = solve(at)["x"]
    root = (near.square() + 4 * at.detach()).sqrt()
    close(found, (near + root) / 2)
    (gradient,) = torch.autograd.grad(found @ torch.tensor([1.0, 2.0, 3.0]), at)
    close(gradient, torch.tensor([1.0, 2.0, 3.0]) / root)


def linear(v):
    """A corner of a polygon."""
    x, c, b = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(3)
    A = torch.tensor([[1.0, 2.0], [3.0, 1.0], [-1.0, 0.0]])
    solve = wrapped(c @ x, [A.numpy() @ x <= b], [c, b])
    return lambda c, b: solve(c, b)["x"] @ v[:2], (
        torch.tensor([-1.0, -1.0]),
        torch.tensor([4.0, 5.0, 0.0]),
    )


def test_second_derivatives_of_the_projection_onto_a_ball():
    x, y, r = cp.Variable(3, name="x"), cp.Parameter(3), cp.Parameter(nonneg=True)
    solve = wrapped(cp.sum_squares(x - y), [cp.norm(x) <= r, x[0] <= 0.3], [y, r])
    args = torch.tensor([1.0, 2.0, -0.5], requires_grad=True), torch.tensor(1.1, requires_grad=True)

    def exact(y, r):
        rest = y[1:] / y[1:].norm() * (r.square() - 0.09).sqrt()
        return torch.cat([0 * y[:1] + 0.3, rest])

    def twice(phi):
        first = torch.autograd.grad(phi.sin().sum(), args, create_graph=True)
        return torch.autograd.grad(first[0].sin().sum() + first[1], args)

    close(twice(solve(*args)["x"]), twice(exact(*args)))


@pytest.mark.parametrize("problem", [coupled, second_order, exponential, linear])
def test_cones_against_finite_differences(problem):
    outer, args = problem(torch.randn(4))
    args = tuple(a.requires_grad_() for a in args)
    found = torch.autograd.grad(outer(*args), args)
    close(found, differences(outer, args, h=1e-4), 1e-4)


def group_lasso(kind):
    """A solver of a lasso with three groups of two, as a function of its data and penalty."""
    random = torch.Generator().manual_seed(5)
    A, mixed = (torch.randn(*shape, generator=random) for shape in ((12, 6), (5, 2)))
    groups = [slice(2 * i, 2 * i + 2) for i in range(3)]
    w, b, lam = cp.Variable(6, name="w"), cp.Parameter(12), cp.Parameter(nonneg=True)
    of_group = mixed if kind == "more rows than unknowns" else torch.eye(2)
    penalty = sum(cp.norm(of_group.numpy() @ w[group]) for group in groups)
    constraints = [w >= 0] if kind == "nonnegative" else []
    objective = cp.sum_squares(A.numpy() @ w - b) / 2 + lam * penalty
    return wrapped(objective, constraints, [b, lam]), torch.randn(12, generator=random)


@pytest.mark.parametrize("kind", ["plain", "nonnegative", "more rows than unknowns"])
def test_groups_that_are_zero_are_apexes_of_cones(kind):
    solve, b = group_lasso(kind)
    v = torch.randn(6)

    def outer(*args):
        return solve(*args)["w"] @ v

    seen = set()
    for lam in (0.5, 1.5, 3.0, 6.0):
        args = tuple(t.requires_grad_() for t in (b, torch.tensor(lam)))
        zeros = (solve(*args)["w"].detach().view(3, 2).norm(dim=1) < 1e-6).sum()
        seen.add(int(zeros))
        found = torch.autograd.grad(outer(*args), args)
        close(found, differences(outer, args, h=1e-3), 1e-3)
    assert seen & {1, 2}


def shrinking(least=None):
    x, at, by = cp.Variable(2, name="x"), cp.Parameter(2), cp.Parameter(nonneg=True)
    objective = cp.Minimize(cp.sum_squares(x - at) / 2 + by * cp.norm(x))
    return CVXPY(cp.Problem(objective, [] if least is None else [x >= least]), [at, by])


def shrunk(y, lam, least=None, **options):
    """The point nearest to y, shortened by lam: 0 if y is shorter."""
    layer = shrinking(least)
    return ig.implicit(layer, layer.condition, **options)(y, lam)["x"]


@pytest.mark.parametrize("lam", [4.9, 4.999, 5.0, 5.001, 5.1])
def test_a_kink_at_the_apex_is_told(lam):
    monitor, y = ig.Monitor(), torch.tensor([3.0, 4.0], requires_grad=True)
    x = shrunk(y, torch.tensor(lam), monitor=monitor, on_failure="ignore")
    (found,) = torch.autograd.grad(x.sum(), y)
    kink = monitor.last.status is ig.Status.DEGENERATE
    assert kink == (lam == 5.0)
    if not kink:
        unit = y.detach() / 5
        P = torch.eye(2) - torch.outer(unit, unit)
        close(found, (torch.eye(2) - lam / 5 * P).sum(0) if lam < 5 else torch.zeros(2))


@pytest.mark.parametrize("least", [-3.0, -0.5, 0.5, 0.99])
def test_a_bound_may_share_the_pull_of_an_apex(least):
    """x ≥ 0 holds y's first element; how much of it the cone holds is for no one to say."""
    y = torch.tensor([-3.0, least], requires_grad=True)
    x = shrunk(y, torch.tensor(1.0), least=0, on_failure="raise")
    (found,) = torch.autograd.grad(x.sum(), y)
    close(found, torch.zeros(2))


@pytest.mark.parametrize(("size", "solved"), [(1e6, True), (1e-4, True), (1e-6, False)])
def test_small_problems_are_right_or_told_of(size, solved):
    """Clarabel's tolerances are absolute: an x of 1e-6 is found to few digits only."""
    monitor, y = ig.Monitor(), (size * torch.tensor([3.0, 4.0])).requires_grad_()
    x = shrunk(y, torch.tensor(size), monitor=monitor, on_failure="ignore")
    (found,) = torch.autograd.grad(x.sum(), y)
    unit = torch.tensor([0.6, 0.8])
    expected = (torch.eye(2) - (torch.eye(2) - torch.outer(unit, unit)) / 5).sum(0)
    assert monitor.last.status.ok == solved
    assert (float((found - expected).norm()) < 1e-4) == solved


@pytest.mark.parametrize("least", [None, -0.5])
def test_a_batch_some_of_which_are_at_the_apex(least):
    y = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]], requires_grad=True)
    lam = torch.tensor(1.0)

    def solve(row):
        return shrunk(row, lam, least, on_failure="raise")

    alone, batch, v = (
        torch.stack([solve(row) for row in y]),
        torch.func.vmap(solve)(y),
        torch.randn(3, 2),
    )
    one, other = (torch.autograd.grad((x * v).sum(), y)[0] for x in (alone, batch))
    close(one, other)
    close(other[1], torch.zeros(2))
    at_kink = torch.func.vmap(lambda row: shrunk(row, 5 * lam))
    with pytest.warns(ig.ImplicitGradWarning, match="by chance"):
        torch.autograd.grad(at_kink(y).sum(), y)


def test_a_batch_whose_cones_are_0_to_the_bit():
    """There the norm's gradient is 0, and the cone looks like one inequality that presses."""
    layer, y, lam = shrinking(), torch.zeros(3, 2, requires_grad=True), torch.tensor(1.0)
    nothing = {name: torch.zeros_like(t) for name, t in layer(torch.zeros(2), lam).items()}
    solve = ig.implicit(lambda y, lam: nothing, layer.condition, on_failure="raise")
    x = torch.func.vmap(lambda row: solve(row, lam)["x"])(y)
    (found,) = torch.autograd.grad((x * torch.randn(3, 2)).sum(), y)
    close(found, torch.zeros(3, 2))


def test_a_batch_has_one_objective_and_one_inequality():
    layer, y = shrinking(-0.5), torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    lam = torch.tensor([1.0, 2.0])
    each = [layer(*row) for row in zip(y, lam, strict=True)]
    together = {name: torch.stack([phi[name] for phi in each]) for name in each[0]}
    batch = layer.condition.for_tasks()
    one = [layer.condition.objective(*row) for row in zip(each, y, lam, strict=True)]
    close(batch.objective(together, y, lam), torch.stack(one))
    bounds, surfaces = torch.func.vmap(batch.inequality)(together, y, lam)
    assert bounds.shape == (2, 2) and surfaces.shape == (2, 1)


def test_vmap_and_float32():
    x, y = cp.Variable(3, name="x"), cp.Parameter(3)
    project = wrapped(cp.sum_squares(x - y), [x >= 0], [y])
    batch = torch.tensor([[1.0, -1.0, 2.0], [-3.0, 0.5, 1.0]], dtype=torch.float32)
    found = torch.func.vmap(lambda y: project(y)["x"])(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, batch.relu(), rtol=1e-4, atol=1e-4)


def test_variables_and_parameters_with_a_sign():
    x, y = cp.Variable((2, 2), name="x", nonneg=True), cp.Parameter((2, 2), nonneg=True)
    solve = wrapped(cp.sum_squares(x - y) + x[0, 0] * 6, [], [y])
    at = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    found = solve(at)["x"]
    close(found, torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), at)
    close(gradient, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))


def bad(kind):
    x, y = cp.Variable(2, name="x"), cp.Parameter(2, name="y")
    distance = cp.Minimize(cp.sum_squares(x - y))
    good = cp.Problem(distance, [x >= 0])
    if kind == "problem":
        CVXPY(distance, [y])
    elif kind == "parameters":
        CVXPY(good, [])
    elif kind == "dpp":
        CVXPY(cp.Problem(cp.Minimize(cp.sum_squares(y[0] * (y @ x)))), [y])
    elif kind == "integers":
        CVXPY(cp.Problem(cp.Minimize(cp.sum(cp.Variable(2, integer=True)))), [])
    elif kind == "semi-definite":
        X = cp.Variable((2, 2), name="X")
        CVXPY(cp.Problem(cp.Minimize(cp.trace(X) + y @ x), [X >> 0]), [y])(torch.ones(2))
    elif kind == "power":
        point = cp.Variable(3, name="point")
        CVXPY(cp.Problem(distance, [cp.PowCone3D(*point, 0.3), point[:2] == x]), [y])
    elif kind in ("symmetric", "diag", "complex"):
        shape = 2 if kind == "complex" else (2, 2)
        X = cp.Variable(shape, name="X", **{kind: True})
        CVXPY(cp.Problem(cp.Minimize(cp.sum_squares(X) + y @ x), [x >= 0]), [y])
    elif kind in ("a complex parameter", "a diag parameter"):
        shape, (_, declared, _) = (2, 2), kind.split()
        X = cp.Parameter(shape, name="X", **{declared: True})
        CVXPY(cp.Problem(cp.Minimize(cp.sum_squares(cp.real(X) @ x - 1))), [X])
    elif kind == "no variables":
        CVXPY(cp.Problem(cp.Minimize(cp.sum(y))), [y])
    elif kind == "names":
        CVXPY(cp.Problem(cp.Minimize(cp.sum(x + cp.Variable(2, name="x")))), [])
    elif kind == "shape":
        CVXPY(good, [y])(torch.ones(3))
    elif kind == "unbounded":
        CVXPY(cp.Problem(cp.Minimize(y @ x)), [y])(torch.ones(2))
    elif kind == "infeasible":
        CVXPY(cp.Problem(distance, [x >= 0, x <= y]), [y])(-torch.ones(2))
    else:
        CVXPY(good, [y], options=3)


REFUSED = {
    "problem": "must be a cvxpy.Problem",
    "parameters": "it has y, and none were given",
    "dpp": r"is_dpp\(\)",
    "integers": "must be continuous",
    "semi-definite": "semi-definite and power cones",
    "power": "semi-definite and power cones",
    "symmetric": "X must not be declared symmetric",
    "diag": "X must not be declared .*diagonal",
    "complex": "X must not be declared .*complex",
    "a complex parameter": "X must not be declared .*complex",
    "a diag parameter": "X must not be declared .*diagonal",
    "no variables": "has no variables",
    "names": "need names that differ",
    "shape": r"shapes, \[\(2,\)\], got \[\(3,\)\]",
    "infeasible": "the problem is infeasible",
    "unbounded": "the problem is unbounded",
    "options": "None or a dict",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_named(kind):
    with pytest.raises(ig.ImplicitGradError, match=REFUSED[kind]):
        bad(kind)


@pytest.mark.parametrize("linear_solver", [None, ig.Exact()])
@pytest.mark.parametrize("norm", [cp.norm, cp.norm1, cp.norm_inf])
def test_a_norm_below_its_bound_leaves_nothing_singular(norm, linear_solver):
    """The variable that CVXPY adds for it lies anywhere in between, and nothing depends on it."""
    x, y, r = cp.Variable(3, name="x"), cp.Parameter(3), cp.Parameter(nonneg=True)
    layer = CVXPY(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [norm(x) <= r]), [y, r])
    solve = ig.implicit(layer, layer.condition, linear_solver=linear_solver, on_failure="raise")
    at, radius = torch.tensor([1.0, 2.0, 2.0], requires_grad=True), torch.tensor(20.0)
    v = torch.tensor([1.0, 2.0, 3.0])
    (found,) = torch.autograd.grad(solve(at, radius.requires_grad_())["x"] @ v, at)
    close(found, v)
    both = torch.stack([at, 2 * at]).detach().requires_grad_()
    rows = torch.func.vmap(lambda y: solve(y, radius.detach())["x"])(both)
    (found,) = torch.autograd.grad((rows @ v).sum(), both)
    close(found, torch.stack([v, v]))
