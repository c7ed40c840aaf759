"""Proximal gradient steps, the ready proxes, and the condition: against optimality conditions."""

import math

import pytest
import torch
from torch.nn.functional import softplus

import implicit_grad as ig
from implicit_grad import prox
from implicit_grad.solvers import NewtonCG, ProximalGradient

pytestmark = pytest.mark.usefixtures("double_precision")

ARGUMENT = ig.InvalidArgumentError
METHODS = {"FISTA": ProximalGradient(), "ISTA": ProximalGradient(accelerated=False)}
both = pytest.mark.parametrize("solver", METHODS.values(), ids=METHODS)


def close(found, expected, tol=1e-8):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def squares(w, X, y, lam):
    return (X @ w - y).square().sum() / 2


def sparse_problem(rows=30, columns=60, unit=1.0):
    X = torch.randn(rows, columns) * torch.logspace(0, -1, columns)
    w = torch.zeros(columns)
    w[::9] = 2.0
    y = (X @ w + 0.1 * torch.randn(rows)) * unit
    lam = 0.03 * (X.T @ y).abs().max()
    return X, y.requires_grad_(), lam.detach().requires_grad_()


def lasso(solver=None, **options):
    return ig.implicit(
        solver or ProximalGradient(),
        ig.prox_gradient(squares, prox.soft_threshold(lambda X, y, lam: lam)),
        init=lambda X, y, lam: X.new_zeros(X.shape[1]),
        **options,
    )


# ------------------------------------------------------------------------------- lasso


@both
@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
def test_a_lasso_meets_its_optimality_conditions_and_has_their_derivatives(solver, unit):
    """On the support S: X_Sᵀ(y − Xw) = λ sign(w), so dw_S = (X_SᵀX_S)⁻¹(X_Sᵀdy − sign(w) dλ)."""
    X, y, lam = sparse_problem(unit=unit)
    w = lasso(solver, on_failure="raise")(X, y, lam)
    slope, S = (X.T @ (y - X @ w)).detach() / lam.item(), w.detach() != 0
    assert 3 < int(S.sum()) < len(w) / 2
    close(slope[S], w.detach()[S].sign())
    assert bool((slope[~S].abs() < 1).all())
    v = torch.randn(len(w))
    found = torch.autograd.grad(w @ v, (y, lam))
    XS = X[:, S]
    q = torch.linalg.solve(XS.T @ XS, v[S])
    close(found, (XS @ q, -(w.detach()[S].sign() @ q)))


@pytest.mark.parametrize("unit", [1e-10, 1e10])
def test_the_objective_s_unit_changes_nothing(unit):
    """In float32, where a step of length 1 would drown φ, or be drowned."""
    y = torch.tensor([1.0, 0.05, -0.7], dtype=torch.float32, requires_grad=True)
    condition = ig.prox_gradient(
        lambda w, y: unit * (w - y).cosh().sum(), prox.soft_threshold(0.1 * unit)
    )
    w = ig.implicit(ProximalGradient(), condition, on_failure="raise")(y)
    shift = math.asinh(0.1)
    close(w.double(), torch.tensor([1 - shift, 0.0, shift - 0.7]), 1e-5)
    slopes = [torch.autograd.grad(t, y, retain_graph=True)[0] for t in w]
    close(torch.stack(slopes).double(), torch.diag(torch.tensor([1.0, 0.0, 1.0])), 1e-4)


def test_the_solver_may_be_any_other_and_phi_inexact():
    """Elements that ought to be 0 and are not quite do not join the support."""
    X, y, lam = sparse_problem()
    exact = lasso()(X, y, lam)
    outcome = {}
    for name, offset in (("exact", 0.0), ("off", 1e-7)):
        condition = ig.prox_gradient(squares, prox.soft_threshold(lambda X, y, lam: lam))
        noise = offset * torch.randn(len(exact))
        solve = ig.implicit(lambda *_, n=noise: exact.detach() + n, condition)
        outcome[name] = torch.autograd.grad(solve(X, y, lam).square().sum(), (y, lam))
    close(outcome["off"], outcome["exact"], 1e-4)


def test_sparse_logistic_regression_against_finite_differences():
    X, labels = torch.randn(40, 8), torch.randn(40).sign()

    def loss(w, lam, scale):
        return softplus(-labels * (X @ w["w"] * scale + w["b"])).sum()

    def penalty(lam, scale):
        return {"w": lam, "b": 0.0}

    solve = ig.implicit(
        ProximalGradient(),
        ig.prox_gradient(loss, prox.soft_threshold(penalty)),
        init=lambda lam, scale: {"w": torch.zeros(8), "b": torch.zeros(())},
    )

    def outer(lam, scale):
        w = solve(lam, scale)
        return (w["w"] * torch.arange(8.0)).sum() + w["b"]

    args = torch.tensor(3.0, requires_grad=True), torch.tensor(1.3, requires_grad=True)
    assert 0 < int((solve(*args)["w"] == 0).sum()) < 8
    found = torch.autograd.grad(outer(*args), args)
    for i, h in enumerate(torch.eye(2) * 1e-4):
        ahead, behind = (outer(args[0] + s * h[0], args[1] + s * h[1]) for s in (1, -1))
        close(found[i], ((ahead - behind) / 2e-4).detach(), 1e-5)


def test_second_derivatives_and_transforms():
    """Of (y − λ)² for y > λ: a soft threshold squared."""
    loss = lambda w, y, lam: (w - y).square().sum() / 2  # noqa: E731
    condition = ig.prox_gradient(loss, prox.soft_threshold(lambda y, lam: lam))
    solve = ig.implicit(ProximalGradient(), condition)
    y, lam = torch.tensor([3.0, 0.2, -2.0]), torch.tensor(0.5)
    outer = lambda lam: solve(y, lam).square().sum()  # noqa: E731
    close(torch.func.jacrev(torch.func.grad(outer))(lam), torch.tensor(4.0))
    batch = torch.func.vmap(torch.func.grad(outer))(torch.tensor([0.5, 1.0]))
    close(batch, torch.tensor([-8.0, -6.0]))


def test_newton_on_the_same_condition():
    """Its residual bends only where the support changes: a semismooth Newton's method."""
    X, y, lam = sparse_problem(rows=80, columns=20)
    w = lasso()(X, y, lam)
    close(lasso(ig.solvers.Newton())(X, y, lam), w)


# ----------------------------------------------------------------------- projections


def test_projection_onto_the_simplex_and_its_derivative():
    """x = (y − θ)⁺ with Σx = 1, and dx/dy = I_S − 1_S1_Sᵀ/|S|."""
    y = torch.tensor([0.9, 0.5, 0.1, -1.0], requires_grad=True)
    solve = ig.implicit(
        ProximalGradient(),
        ig.prox_gradient(lambda x, y: (x - y).square().sum(), prox.simplex()),
    )
    x = solve(y)
    close(x, torch.tensor([0.7, 0.3, 0.0, 0.0]))
    rows = [torch.autograd.grad(e, y, retain_graph=True)[0] for e in x]
    S = torch.tensor([1.0, 1.0, 0.0, 0.0])
    close(torch.stack(rows), torch.diag(S) - torch.outer(S, S) / 2)


@pytest.mark.parametrize("total", [0.1, 1.0, 30.0])
def test_simplex_meets_its_optimality_conditions(total):
    x = torch.randn(20, 7, 5)
    p = prox.simplex(total)(x, step=1.0)
    close(p.sum(-1), torch.full((20, 7), total), 1e-12)
    assert bool((p >= 0).all())
    theta = (x - p).masked_fill(p == 0, -math.inf).amax(-1, keepdim=True)
    close((x - theta).relu(), p, 1e-12)


def test_a_quadratic_in_a_box_is_argmin_under_bounds():
    A = torch.randn(6, 6)
    A, b = A @ A.T + torch.eye(6), torch.randn(6).mul(4).requires_grad_()
    upper = torch.tensor(0.4, requires_grad=True)

    def objective(x, b, upper):
        return x @ A @ x / 2 - b @ x

    at = lambda b, upper: torch.zeros(6)  # noqa: E731
    bounds = lambda b, upper: (-0.2, upper)  # noqa: E731
    by_prox = ig.implicit(
        ProximalGradient(),
        ig.prox_gradient(objective, prox.box(-0.2, lambda b, upper: upper)),
        init=at,
    )(b, upper)
    by_kkt = ig.implicit(
        lambda *_: by_prox.detach(), ig.argmin(objective, bounds=bounds), on_failure="raise"
    )(b, upper)
    assert 0 < int((by_prox == 0.4).sum()) < 6
    v = torch.randn(6)
    close(*(torch.autograd.grad(x @ v, (b, upper)) for x in (by_prox, by_kkt)))


def test_the_trust_region_problem_on_a_ball():
    """min −bᵀx in ‖x‖ ≤ r is x = r b/‖b‖; over a container, the ball is one for all of it."""
    b, r = torch.randn(5, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    condition = ig.prox_gradient(
        lambda x, b, r: -(b[:2] @ x["u"]) - b[2:] @ x["v"] + 0.01 * x["u"].square().sum(),
        prox.l2_ball(lambda b, r: r),
    )
    init = lambda b, r: {"u": torch.zeros(2), "v": torch.zeros(3)}  # noqa: E731
    x = ig.implicit(ProximalGradient(), condition, init=init)(b, r)
    found = torch.cat([x["u"], x["v"]])
    close(found.norm(), r)
    slope = (b - 0.02 * torch.cat([x["u"], torch.zeros(3)])).detach()
    close(found, (r * slope / slope.norm()).detach())
    plain = lambda x, b, r: -(b @ x)  # noqa: E731
    solve = ig.implicit(
        ProximalGradient(),
        ig.prox_gradient(plain, prox.l2_ball(lambda b, r: r)),
        init=lambda b, r: torch.zeros(5),
    )
    v = torch.randn(5)
    expected = torch.autograd.grad(r * b / b.norm() @ v, (b, r))
    close(torch.autograd.grad(solve(b, r) @ v, (b, r)), expected)


def test_proxes_of_containers_and_per_element_weights():
    x = {"a": torch.tensor([3.0, -3.0]), "b": (torch.tensor(0.5),)}
    shrunk = prox.soft_threshold({"a": torch.tensor([1.0, 2.0]), "b": 0.0})(x, step=1.0)
    close(shrunk, {"a": torch.tensor([2.0, -1.0]), "b": (torch.tensor(0.5),)})
    assert prox.box(None, 1.0)(x, step=9.0)["a"].tolist() == [1.0, -3.0]
    inside = prox.l2_ball(10.0)(x, step=1.0)
    close(inside, x)


# ------------------------------------------------------------------------- honest, and refusals


@both
def test_a_missed_tolerance_is_told(solver):
    X, y, lam = sparse_problem()
    short = type(solver)(**{**vars(solver), "maxiter": 3})
    with pytest.warns(ig.ImplicitGradWarning, match=r"is not reached: after 3 steps"):
        lasso(short)(X, y, lam)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_meets_any_tolerance(solver, dtype):
    tight = type(solver)(**{**vars(solver), "tol": 0.0, "prox": prox.soft_threshold(0.1)})
    y = torch.tensor([1.0, 0.05, -3.0], dtype=dtype)
    w = tight.minimize(lambda w: (w - y).cosh().sum(), torch.zeros_like(y))
    shift = math.asinh(0.1)
    expected = torch.tensor([1 - shift, 0.0, shift - 3], dtype=dtype)
    assert w.dtype == dtype
    close(w, expected, 200 * torch.finfo(dtype).eps)  # curvatures of 1 to 10


def test_a_curvature_that_falls_on_the_way_costs_little():
    """Lengths grow again: from curvature 1200 at the start to 2 at the minimum."""
    solver = ProximalGradient(prox=lambda x, step: x, maxiter=300)
    w = solver.minimize(lambda w: (w**4).sum() + w.square().sum(), torch.full((3,), 10.0))
    close(w, torch.zeros(3))


def test_nan_is_refused():
    with pytest.raises(ig.InvalidSolutionError, match="at step 0"):
        ProximalGradient(prox=prox.box(-1, 1)).minimize(lambda w: w.log().sum(), -torch.ones(2))


REFUSED = {
    r"soft_threshold: weight.*no lower bound greater": lambda: prox.soft_threshold(-1.0),
    "box: bounds must not be NaN, and no lower": lambda: prox.box(1.0, 0.0),
    r"simplex\(total=0\)": lambda: prox.simplex(0),
    r"l2_ball\(radius='a'\)": lambda: prox.l2_ball("a"),
    "needs a last dimension": lambda: prox.simplex()(torch.tensor(1.0), 1.0),
    "prox_gradient: prox must be a function": lambda: ig.prox_gradient(squares, 3),
    "prox_gradient: loss must be a function": lambda: ig.prox_gradient(3, prox.simplex()),
    "prox must be a function of": lambda: ProximalGradient(prox=3),
    r"ProximalGradient\(maxiter=0\)": lambda: ProximalGradient(maxiter=0),
    "give prox once": lambda: ProximalGradient().minimize(torch.sum, torch.ones(2)),
    "has a prox, which the condition has to know": lambda: ig.implicit(
        ProximalGradient(prox=prox.simplex()), ig.prox_gradient(squares, prox.simplex())
    ),
    "does not take a prox: use ProximalGradient": lambda: lasso(NewtonCG())(*sparse_problem()),
    "prox_gradient: prox must return the form of phi": lambda: ig.implicit(
        lambda a: a.detach(), ig.prox_gradient(lambda p, a: p.sum(), lambda x, step, a: (x, x))
    )(torch.ones(2, requires_grad=True)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_named(message):
    with pytest.raises(ARGUMENT, match=message):
        REFUSED[message]()
