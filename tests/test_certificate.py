"""The certificate: estimates, corrections and bounds of a hypergradient's error, held to it."""

import statistics

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Instance,
    deep_equilibrium,
    logistic,
    minimize,
    nonlinear_system,
    normal,
    prox,
    tensors,
    wavy,
)
from torch import nn
from torch.nn.functional import softplus

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")
EXACT = {"linear_solver": ig.Exact(), "on_failure": "raise"}


@pytest.fixture(autouse=True)
def every_warning():
    """Those that torch gives once a process too: of a tensor with a graph made a number."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def distance(xs, ys=None):
    """‖x − y‖ over all tensors."""
    parts = [x if ys is None else x - y for x, y in zip(xs, ys or xs, strict=True)]
    return float(torch.cat([p.flatten() for p in parts]).norm())


def draws(seed):
    """A source of normal numbers."""
    random = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=random)


def returning(values):
    """A solver that has made up its mind."""
    return lambda *args: values


# ---------------------------------------------------------------- the estimate


def random_logistic(draw):
    y = (draw(12) > 0).double()
    return lambda w, X: (softplus(X @ w) - y * (X @ w)).mean(), draw(4), draw(12, 4)


def random_network(draw):
    y = draw(10)

    def loss(w, X):
        return (torch.tanh(X @ w[:6].view(3, 2)) @ w[6:] - y).square().mean()

    return loss, draw(8), draw(10, 3)


def solved(objective, start, *args):
    """The minimum with its dense implicit derivative, a Newton step that is 0, and the Hessian."""
    slope = torch.func.grad(objective)
    fixed = [t.detach() for t in args]
    x = minimize(lambda w: objective(w, *fixed), start)
    hessian = torch.func.jacrev(slope)(x, *fixed)
    return x - torch.linalg.solve(hessian, slope(x, *args)), hessian


@pytest.mark.parametrize("make", [random_logistic, random_network], ids=lambda f: f.__name__)
def test_the_estimate_on_problems_with_exact_solutions(make):
    """After a few steps of gradient descent, on 60 problems each."""
    ratios, relative, corrections, outer_errors, refused = [], [], [], [], 0
    for seed in range(300):
        draw = draws(seed)
        loss, *args = make(draw)
        theta, X = (t.requires_grad_() for t in args)
        lam = 0.3 + float(draw(1).abs())

        def objective(w, theta, X):
            return loss(w, X) + prox(w, theta, lam)  # noqa: B023

        path = [theta.detach()]
        for _ in range(60):
            w = path[-1].detach().requires_grad_()
            (slope,) = torch.autograd.grad(objective(w, theta.detach(), X.detach()), w)
            path.append(path[-1] - slope / (2 + lam))
        solution, hessian = solved(objective, path[-1], theta, X)
        if torch.linalg.eigvalsh(hessian)[0] < 0.05:
            continue  # hardly a minimum
        exact = torch.autograd.grad(wavy(solution), (theta, X))
        phi, solution = path[1 + seed % 11], solution.detach()
        options = {"linear_solver": ig.Exact(), "on_failure": "ignore"}
        c = ig.certify(ig.implicit(returning(phi), ig.proximal(loss, lam), **options), args, wavy)
        assert c.tensors[0] is theta and c.tensors[1] is X and len(c.tensors) == 2
        assert c.descends == (c.status.ok and c.relative_error < 1)
        assert c.relative_error == pytest.approx(c.error / distance(c.gradients))
        true = distance(c.gradients, exact)
        if not 1e-9 < true <= 0.4 * distance(exact):
            continue
        if not c.status.ok:
            refused += 1
            continue
        ratios.append(c.error / true)
        relative.append(true / distance(exact))
        corrections.append(distance(c.corrected, exact) / true)
        outer_errors.append(c.outer_loss_error / float(wavy(solution) - wavy(phi)))
        if relative[-1] < 0.01:
            assert c.inner_error == pytest.approx(float((phi - solution).norm()), rel=0.1)
        if len(ratios) == 60:
            break
    figures = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{len(ratios)} problems, relative errors {min(relative):.1e} to {max(relative):.2f}")
    print("estimate/true", *(f"{r:.3f}" for r in figures), f"; {refused} refused")
    print(f"corrected/plain error median {statistics.median(corrections):.3f}")
    assert len(ratios) == 60 and max(relative) > 0.2 and refused < 5
    # a Hessian that is much nearer to singular at phi than at the solution makes it larger still
    outside = sum(not 0.8 <= ratio <= 2 for ratio in ratios)
    assert outside <= (0 if make is random_logistic else 2) and min(ratios) >= 0.8
    assert statistics.median(corrections) < 0.2
    assert abs(statistics.median(outer_errors) - 1) < 0.1


def test_gradients_are_those_of_backward():
    problem = logistic()
    solve = ig.implicit(problem.solver, problem.condition, **EXACT)
    c = ig.certify(solve, problem.args, problem.outer)
    assert all(map(torch.equal, c.gradients, problem.gradients(solve)))
    assert all(a is b for a, b in zip(c.tensors, problem.wanted, strict=True))
    assert c.relative_error < 1e-12 and c.descends


# ---------------------------------------------------------------- slopes


def as_argmin():
    """`logistic` as a bare objective, over a container."""
    base = logistic()
    (lam,), loss = base.captured, base.condition.loss

    def objective(phi, theta, X, y, lam):
        w = torch.cat([phi["a"], phi["b"]])
        return loss(w, X, y) + prox(w, theta, lam) + (w**4).sum() / 4

    def reference(*args):
        a, b = args[0][:1].detach(), args[0][1:].detach()
        return minimize(lambda phi: objective(phi, *args), {"a": a, "b": b})

    return Instance(None, ig.argmin(objective), (*base.args, lam), reference, wavy)


def slope(xs, ys):
    """Of a line through the logarithms."""
    x, y = torch.tensor(xs).log(), torch.tensor(ys).log()
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


@pytest.mark.parametrize(
    "make", [logistic, as_argmin, nonlinear_system, deep_equilibrium], ids=lambda f: f.__name__
)
def test_orders_in_the_inner_error(make):
    """One for the plain gradient, two for the corrected and the polished one."""
    problem = make()
    expected = problem.gradients(problem.reference)
    inputs = optree.tree_map(lambda t: t.detach() if torch.is_tensor(t) else t, problem.args)
    solution = optree.tree_map(torch.detach, problem.reference(*inputs))
    sizes = [10.0**-k for k in (1.5, 2, 2.5, 3, 3.5, 4, 4.5)]
    errors = {"plain": [], "corrected": [], "polished": [], "estimate": []}
    for size in sizes:
        way = [normal(*t.shape, seed=5 + i, grad=False) for i, t in enumerate(tensors(solution))]
        length = distance(way)
        places = iter(size * d / length for d in way)
        phi = optree.tree_map(lambda t: t + next(places), solution)  # noqa: B023
        solve = ig.implicit(returning(phi), problem.condition, **EXACT)
        c = ig.certify(solve, problem.args, problem.outer)
        assert c.inner_error == pytest.approx(size, rel=0.3)
        polished = ig.implicit(returning(phi), problem.condition, polish=1, **EXACT)
        errors["plain"].append(distance(c.gradients, expected))
        errors["corrected"].append(distance(c.corrected, expected))
        errors["polished"].append(distance(problem.gradients(polished), expected))
        errors["estimate"].append(c.error)
    slopes = {name: slope(sizes, values) for name, values in errors.items()}
    print(make.__name__, {name: round(value, 3) for name, value in slopes.items()})
    for name, order in {"plain": 1, "corrected": 2, "polished": 2, "estimate": 1}.items():
        assert abs(slopes[name] - order) < 0.1, name


# ---------------------------------------------------------------- polish


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), distant=st.floats(-3, 0.5), lam=st.floats(0.05, 2))
def test_polish_never_makes_the_residual_larger(seed, distant, lam):
    """Objectives with many minima, maxima and saddles; a refusal changes no bit."""
    draw = draws(seed)
    X, theta = draw(6, 4), draw(4).requires_grad_()
    start = theta.detach() + 10**distant * draw(4)

    def loss(w, X):
        return torch.cos(X @ w).sum() / 2

    def size(w):
        return float(torch.func.grad(lambda w: loss(w, X) + prox(w, theta.detach(), lam))(w).norm())

    def polished(**options):
        solve = ig.implicit(returning(start), ig.proximal(loss, lam), **options)
        with torch.no_grad():
            plain = solve(theta, X)
        phi = solve(theta, X).detach()
        assert torch.equal(phi, plain)
        return phi

    phi = polished(polish=1, on_failure="ignore", linear_solver=ig.Exact())
    assert size(phi) <= size(start)
    assert torch.equal(phi, start) or size(phi) < size(start)
    H = torch.func.jacrev(torch.func.grad(loss))(start, X) + lam * torch.eye(4)
    if torch.linalg.eigvalsh(H)[0] < -1e-9:
        assert torch.equal(phi, start)
        with pytest.raises(ig.LinearSolveError, match=r"phi was not polished: .*non-positive curv"):
            polished(polish=1, on_failure="raise", linear_solver=ig.Exact())
        with pytest.warns(ig.ImplicitGradWarning, match="phi was not polished"):
            polished(polish=1, linear_solver=ig.Exact())
    else:
        full = start - torch.linalg.solve(
            H, torch.func.grad(lambda w: loss(w, X) + prox(w, theta.detach(), lam))(start)
        )
        if size(full) < size(start):
            torch.testing.assert_close(phi, full, rtol=1e-9, atol=1e-9)
        more = polished(polish=3, on_failure="ignore")
        assert size(more) <= size(phi) * (1 + 1e-9) + 1e-9


def test_polish_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x, theta = normal(8, 3, seed=2, grad=False), dict(model.named_parameters())
    masks = []
    model[2].register_forward_hook(lambda module, args, output: masks.append(output == 0))

    def loss(w):
        return torch.func.functional_call(model, w, (x,)).square().mean()

    before = (torch.get_rng_state(), [b.clone() for b in model.buffers()])
    # the solver draws nothing, so all masks are of evaluations of ours
    solve = ig.implicit(lambda theta: theta.copy(), ig.proximal(loss, 500.0), polish=2, **EXACT)
    wavy(solve(theta)).backward()
    after = (torch.get_rng_state(), list(model.buffers()))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert len(masks) >= 3 and all(torch.equal(mask, masks[0]) for mask in masks)


# ---------------------------------------------------------------- bounds


def test_an_outer_loss_that_depends_on_theta_directly():
    """F = φ + (φ − θ) and an outer loss θ·φ, by hand: dθ = φ + θ/2, exactly θ."""
    theta = torch.tensor([2.0], requires_grad=True)
    solve = ig.implicit(
        returning(torch.tensor([1.5])), ig.proximal(lambda w: w.square().sum() / 2, 1.0), **EXACT
    )
    c = ig.certify(solve, (theta,), lambda phi: (theta * phi).sum())
    assert c.gradients[0].item() == pytest.approx(2.5) and c.corrected[0].item() == pytest.approx(2)
    assert (c.error, c.inner_error) == pytest.approx((0.5, 0.5))
    assert c.outer_loss_error == pytest.approx(-1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["argmin", "proximal", "proximal per element"])
def test_the_bound_of_the_linear_solve_holds(form, dtype):
    """Fixed budgets on quadratics with curvatures over up to four decades."""
    ratios = []
    for seed in range(60):
        draw = draws(seed)
        n = 5 + seed % 20
        basis, _ = torch.linalg.qr(draw(n, n))
        X = 10 ** (draw(1).abs().clamp_max(2) * (torch.linspace(-1, 0.3, n)))[:, None] * basis
        v, theta = draw(n), draw(n).to(dtype).requires_grad_()
        unit = 40.0 if form == "proximal" else 1.0  # the norms of u and of dθ are not the same
        lam = 0.05 * unit * (draw(n).exp() if form == "proximal per element" else torch.ones(n))
        H = (unit * X.T @ X).to(dtype)
        if form == "argmin":
            H = H + torch.diag(lam).to(dtype)
            condition = ig.argmin(lambda w, t: w @ H @ w / 2 - t @ w, strong_convexity=0.05)  # noqa: B023
            exact = torch.linalg.solve(H.double(), v)
        else:
            weight = 0.05 * unit if form == "proximal" else lam.to(dtype)
            condition = ig.proximal(lambda w: w @ H @ w / 2, weight, convex=True)  # noqa: B023
            exact = lam * torch.linalg.solve(H.double() + torch.diag(lam), v)
        monitor = ig.Monitor()
        solve = ig.implicit(
            returning(theta.detach()),
            condition,
            linear_solver=ig.CG(maxiter=1 + seed % 12),
            monitor=monitor,
            on_failure="ignore",
        )
        found = torch.autograd.grad(solve(theta), theta, v.to(dtype))[0]
        error = float((found.double() - exact).norm())
        # what float32 does to v and lam on the way in is not the solve's
        error -= 0.0 if dtype == torch.float64 else 1e-5 * float(exact.norm())
        if error > 0:
            ratios.append(monitor.last.solve_error_bound / error)
    figures = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{form}, {dtype}: bound/error", *(f"{r:.3g}" for r in figures), len(ratios))
    assert len(ratios) > 40 and min(ratios) >= 1
    assert statistics.median(ratios) <= 10


def test_no_bound_where_none_is_known():
    """Gauss-Newton drops curvature that an argmin's strong convexity may rest on."""
    theta = torch.tensor([1.0], requires_grad=True)
    monitor = ig.Monitor()
    condition = ig.argmin(
        lambda z, t: z.sum() + (z * z).sum() / 20, 2.0, model=lambda w, t: w * w - t
    )
    for curvature in ("hessian", "gauss_newton"):
        solve = ig.implicit(
            returning(torch.ones(1)),
            condition,
            curvature=curvature,
            linear_solver=ig.CG(maxiter=1),
            monitor=monitor,
            on_failure="ignore",
        )
        solve(theta).sum().backward()
    hessian, gauss_newton = monitor.reports
    assert hessian.solve_error_bound is not None and gauss_newton.solve_error_bound is None


# ---------------------------------------------------------------- what else there may be


def test_captured_tensors_and_an_outer_loss_of_arguments():
    theta, X, weight = normal(3, seed=1), normal(5, 3, seed=2), normal(3, seed=3)
    encoder = nn.Linear(3, 3)

    def loss(w, X):
        return softplus(encoder(X) @ w * weight.exp().sum()).sum()

    def exact(theta, X):
        return minimize(lambda w: loss(w, X) + prox(w, theta, 0.9), theta)

    def outer(phi):
        return wavy(phi) + (phi * theta).sum() + (encoder(X) @ phi).square().sum() * weight[0]

    phi = exact(theta, X).detach() + 1e-5
    c = ig.certify(ig.implicit(returning(phi), ig.proximal(loss, 0.9), **EXACT), (theta, X), outer)
    assert {id(t) for t in c.tensors[2:]} == {id(t) for t in (weight, *encoder.parameters())}
    expected = torch.autograd.grad(outer(exact(theta, X)), c.tensors)
    plain, corrected = (distance(g, expected) for g in (c.gradients, c.corrected))
    assert corrected < 1e-3 * plain and c.error == pytest.approx(plain, rel=1e-2)


def test_on_every_rung():
    """Also where products are found on the second rung, and while they are looked for."""
    ids = torch.tensor([[0, 1], [2, 1], [3, 3]])
    theta = normal(4, 2, seed=1)

    def loss(w, embed):
        return torch.sin(embed(w)).sum()

    found = []
    for embed in (
        lambda w: nn.functional.embedding_bag(ids, w, mode="mean"),
        lambda w: w[ids].mean(1),
    ):
        condition = ig.proximal(lambda w, e=embed: loss(w, e), 2.0)
        phi = theta.detach() - 0.2
        found.append(ig.certify(ig.implicit(returning(phi), condition), (theta,), wavy))
    assert distance(found[0].corrected, found[1].corrected) < 1e-7
    assert found[0].error == pytest.approx(found[1].error, rel=1e-6) and found[0].error > 0.01


def failing(case):
    """A certificate of a problem with something wrong about it, under `on_failure`."""
    theta = torch.tensor([0.3, 0.4], requires_grad=True)
    loss, phi, outer = {
        "indefinite": (lambda w: -w.square().sum(), theta, wavy),
        "singular": (lambda w: -w.square().sum() / 2, theta, wavy),
        "not finite": (lambda w: (w - 0.3).abs().sqrt().sum(), theta, wavy),
        "outer loss": (lambda w: w.square().sum(), theta, lambda phi: (phi * torch.nan).sum()),
    }[case]
    return lambda on_failure, solver=None: ig.certify(
        ig.implicit(
            returning(phi.detach().clone()),
            ig.proximal(loss, 1.0),
            linear_solver=solver,
            on_failure=on_failure,
        ),
        (theta,),
        outer,
    )


FAILURES = {
    "indefinite": ig.Status.NEGATIVE_CURVATURE,
    "singular": ig.Status.NEGATIVE_CURVATURE,
    "not finite": ig.Status.NONFINITE_OPERATOR,
    "outer loss": ig.Status.NONFINITE_RHS,
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_certificate_that_is_none_says_so(case):
    attempt, status = failing(case), FAILURES[case]
    c = attempt("ignore")
    assert c.status == status and not c.descends
    with pytest.warns(ig.ImplicitGradWarning, match="not certified: "):
        attempt("warn")
    with pytest.raises(ig.LinearSolveError, match="not certified: "):
        attempt("raise")
    if case == "indefinite":
        assert attempt("ignore", ig.Exact()).status == status


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_phi_that_may_turn_freely(rank):
    """The factor of a matrix: nothing solves for the rounding of F in the directions of turns."""
    A, a = normal(5, 5, seed=1, grad=False), torch.tensor(0.5, requires_grad=True)
    A = A @ A.mT

    def factor(a):
        values, vectors = torch.linalg.eigh(A + a * torch.eye(5))
        return vectors[:, -rank:] * values[-rank:].sqrt()

    def misfit(U, a):
        return (A + a * torch.eye(5) - U @ U.mT).square().sum()

    weights = torch.arange(25.0).reshape(5, 5)
    certificate = ig.certify(
        ig.implicit(factor, ig.argmin(misfit)), (a,), lambda U: (U @ U.mT * weights).sum()
    )
    assert certificate.status.ok
    assert certificate.relative_error < 1e-9


@pytest.mark.parametrize("solver", [None, ig.MINRES()])
def test_a_covariance_of_which_one_triangle_is_read(solver):
    X, weight, lam = normal(30, 3, seed=2, grad=False), normal(3, 3, seed=3), torch.tensor(0.3)
    lam.requires_grad_()

    def likelihood(S, lam):
        L = torch.linalg.cholesky(S)
        z = torch.linalg.solve_triangular(L, X.mT, upper=False)
        penalty = lam * torch.cholesky_inverse(L).trace()
        return (30 + 2 * lam) * L.diagonal().log().sum() + z.square().sum() / 2 + penalty

    solve = ig.implicit(
        lambda lam: (X.mT @ X + 2 * lam * torch.eye(3)) / (30 + 2 * lam),
        ig.argmin(likelihood),
        linear_solver=solver,
    )
    certificate = ig.certify(solve, (lam,), lambda S: (S * (weight + weight.mT)).sum())
    assert certificate.status.ok
    assert certificate.relative_error < 1e-9


def test_a_kink_is_not_certified():
    a = torch.tensor([0.5, 2.0], requires_grad=True)
    condition = ig.argmin(lambda x, a: (x - a).square().sum(), bounds=(None, 0.5))
    solve = ig.implicit(lambda a: a.clamp_max(0.5), condition, on_failure="ignore")
    assert ig.certify(solve, (a,), wavy).status == ig.Status.DEGENERATE


def test_zero_gradients():
    theta = normal(3, seed=1)
    solve = ig.implicit(torch.clone, ig.proximal(lambda w: (w**4).sum(), 1.0), on_failure="ignore")
    flat = ig.certify(solve, (theta,), lambda phi: phi.sum() * 0)
    assert (flat.error, flat.relative_error) == (0, 0)
    kink = ig.certify(solve, (theta,), lambda phi: (phi - theta.detach()).square().sum())
    assert kink.relative_error == float("inf") and not kink.descends


# ---------------------------------------------------------------- bad arguments

QUARTIC = ig.proximal(lambda w: (w**4).sum(), 1.0)


def certified(solve=None, theta=None, outer=wavy, condition=QUARTIC, **options):
    theta = normal(3, seed=1) if theta is None else theta
    solve = ig.implicit(torch.clone, condition) if solve is None else solve
    return ig.certify(solve, (theta,), outer, **options)


BAD = {
    r"solve must be what implicit\(\) returned, got a function": lambda: certified(lambda t: t),
    "none of the arguments requires grad": lambda: certified(theta=torch.ones(3)),
    "args must be a tuple of the solver's arguments, got a float": lambda: ig.certify(
        ig.implicit(torch.clone, QUARTIC), torch.ones(3), torch.sum
    ),
    "outer_loss must return a scalar.*shape": lambda: certified(outer=lambda phi: phi),
    "outer_loss must return a scalar.*float": lambda: certified(outer=lambda phi: 1.0),
    r"polish=-1\): expected a number of Newton steps": lambda: ig.implicit(
        torch.clone, QUARTIC, polish=-1
    ),
    r"polish=True\): exp": lambda: ig.implicit(torch.clone, QUARTIC, polish=True),
    r"rtol_gradient=0\): exp": lambda: ig.implicit(torch.clone, QUARTIC, rtol_gradient=0),
    r"rtol_gradient=1.0\): exp": lambda: ig.implicit(torch.clone, QUARTIC, rtol_gradient=1.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        BAD[message]()
