"""Products that torch gets wrong are found, named and replaced; right ones raise no alarm."""

import warnings

import pytest
import torch
from derivatives import CubeTwice
from problems import PROBLEMS, normal, wavy
from torch import nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional as F

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


class Detached(torch.autograd.Function):
    """x³, whose backward holds x constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0].detach() ** 2


class InNumPy(Detached):
    """x³, whose backward is no operation of torch."""

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().numpy()
        return torch.as_tensor(g.detach().numpy() * 3 * x**2)


class WhereNegative(Detached):
    """x³, whose backward is right for positive x."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * torch.where(x > 0, x, x.detach()) ** 2


class Weighted(torch.autograd.Function):
    """a·x², which takes a for a constant."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x)
        ctx.a = a
        return a * x**2

    @staticmethod
    def backward(ctx, g):
        return g * 2 * ctx.a * ctx.saved_tensors[0], None


class WeightedByData(torch.autograd.Function):
    """a·x², whose derivative by x does not know a."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return a * x**2

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        return g * 2 * a.data * x, g * x.detach() ** 2


def hooked(x):
    """x³, with a hook that cuts the gradient's graph."""
    y = x**3
    if y.requires_grad:
        y.register_hook(lambda g: g.detach().clone())
    return y


WRONG = {
    "Detached": Detached.apply,
    "InNumPy": InNumPy.apply,
    "WhereNegative": WhereNegative.apply,
    "hook": hooked,
}


def cube(x):
    return x**3


def problem(special):
    """A regression through the special function."""
    X, y = normal(20, 4, seed=1, grad=False), normal(20, seed=2, grad=False)

    def objective(w, theta):
        X_, y_ = X.to(w.dtype), y.to(w.dtype)
        fit = (special(torch.tanh(X_ @ w)) - y_).square().mean()
        return fit + (w - theta).square().sum()

    return objective


def hypergradient(special, dtype=torch.float64, **options):
    theta = normal(4, seed=3, dtype=dtype)
    monitor = ig.Monitor()
    solver = ig.solvers.GradientDescent(lr=0.1, steps=300)
    solve = ig.implicit(solver, ig.argmin(problem(special)), monitor=monitor, **options)
    return grad(wavy(solve(theta)), theta)[0], monitor.last


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRONG)
def test_differences_take_over(name, dtype):
    expected, _ = hypergradient(cube, dtype)
    found, report = hypergradient(WRONG[name], dtype)
    assert (report.curvature, report.status.ok) == ("finite_difference", True)
    assert name in report.check and "not the difference" in report.check
    tolerance = 1e-7 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", WRONG)
def test_a_pinned_curvature_is_told(name):
    with pytest.warns(ig.ImplicitGradWarning, match=f"(?s){name}.*implicit gradient is wrong"):
        _, report = hypergradient(WRONG[name], curvature="hessian")
    assert report.status is ig.Status.WRONG_PRODUCT
    with pytest.raises(ig.LinearSolveError, match="WRONG_PRODUCT"):
        hypergradient(WRONG[name], curvature="hessian", on_failure="raise")


class Deep(nn.Module):
    """Twelve layers, the special function after one of them."""

    def __init__(self, special, place):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.special, self.place = special, place

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if i % 3 else torch.nn.functional.softplus(layer(x))
            x = self.special(x) if i == self.place else x
        return x


@pytest.mark.parametrize(
    ("place", "dtype"), [(0, torch.float64), (5, torch.float64), (11, torch.float32)]
)  # through eleven layers, float32 does not tell
@pytest.mark.parametrize(
    ("special", "name"),
    [
        (Detached.apply, "Detached"),
        (InNumPy.apply, "InNumPy"),
    ],
)
def test_the_operation_that_is_wrong_is_named(special, name, place, dtype):
    net = Deep(special, place).to(dtype)
    X = normal(20, 4, seed=1, grad=False).to(dtype)
    theta = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}

    def loss(phi, theta):
        fit = (torch.func.functional_call(net, phi, (X,)) - 0.3).square().sum()
        return fit + sum((phi[k] - t).square().sum() for k, t in theta.items())

    monitor = ig.Monitor()
    solver = ig.solvers.GradientDescent(lr=0.01, steps=3)
    options = {"linear_solver": ig.CG(maxiter=1), "monitor": monitor, "on_failure": "ignore"}
    phi = ig.implicit(solver, ig.argmin(loss), **options)(theta)
    sum(p.sum() for p in phi.values()).backward()
    assert f"it first shows at {name}:" in monitor.last.check


def test_when_products_are_checked():
    calls = []

    def counting(x):
        calls.append(x)
        return cube(x)

    counts = {}
    for check in ("never", "once", "always"):
        condition = ig.argmin(problem(counting))
        solve = ig.implicit(lambda theta: theta.detach().clone(), condition, check=check)
        counts[check] = []
        for _ in range(2):
            calls.clear()
            solve(normal(4, seed=3))
            counts[check].append(len(calls))
    assert counts["never"] == [1, 1]
    assert counts["once"][1] == 1 < counts["once"][0] == counts["always"][0] == counts["always"][1]
    assert counts["once"][0] == 1 + 2  # two gradients
    _, report = hypergradient(Detached.apply, check="never")
    assert (report.curvature, report.check) == ("hessian", None)
    with pytest.raises(ig.InvalidArgumentError, match=r'check=True.: expected "once", "always"'):
        ig.implicit(lambda theta: theta, ig.argmin(problem(cube)), check=True)


def test_another_kind_of_graph_is_checked_too():
    kinds = iter([cube, Detached.apply])
    condition = ig.argmin(lambda w, theta, special: problem(special)(w, theta))
    monitor = ig.Monitor()
    solve = ig.implicit(ig.solvers.NewtonCG(), condition, monitor=monitor, on_failure="ignore")
    for special in kinds:
        wavy(solve(normal(4, seed=3), special)).backward()
    assert [r.curvature for r in monitor.reports] == ["hessian", "finite_difference"]


@pytest.mark.parametrize("part", ["factor", "term", "between", "whole"])
def test_a_part_that_only_a_later_call_holds_constant_is_found(part):
    """The operations are the same, and what they are applied to is not."""

    def objective(w, theta, holds):
        held = w.detach() if holds else w
        here = {name: held if name == part else w for name in ("factor", "term", "whole")}
        between = (w * w).sin()
        between = between.detach() if holds and part == "between" else between
        coupled = (w * here["factor"]).sum() + (here["term"] * here["term"]).sum()
        coupled = coupled + (between * w).sum() + (w * w).sin().sum()
        value = coupled + 3 * (here["whole"] - theta).square().sum()
        return value + (w - theta).square().sum()

    def counting(w, theta, holds):
        counting.calls += 1
        return objective(w, theta, holds)

    theta, monitor = normal(4, seed=3), ig.Monitor()
    solver = ig.solvers.NewtonCG()

    def minimised(theta, holds):
        return solver.minimize(lambda w: objective(w, theta, False), theta)

    condition = ig.argmin(counting)
    solve = ig.implicit(minimised, condition, monitor=monitor, on_failure="ignore")
    counting.calls = 0
    for holds in (False, False, True):
        counting.calls = 0
        wavy(solve(theta, holds)).backward()
        assert (counting.calls == 1) == (len(monitor.reports) == 2)
    assert [r.status is ig.Status.WRONG_PRODUCT for r in monitor.reports] == [False, False, True]


def test_a_longer_loop_is_no_other_kind_of_graph():
    calls = []

    def objective(w, theta, steps):
        calls.append(steps)
        x = w
        for _ in range(steps):
            x = 0.5 * torch.tanh(x) + theta
        return (w - theta).square().sum() + x.square().sum() / 100

    theta, newton = normal(4, seed=3), ig.solvers.NewtonCG()
    known = {n: newton.minimize(lambda w, n=n: objective(w, theta, n), theta) for n in (3, 4, 9)}
    solve = ig.implicit(lambda theta, steps: known[steps], ig.argmin(objective))
    for steps in known:
        calls.clear()
        solve(theta, steps)
        assert (len(calls) > 1) == (steps == 3)


@pytest.mark.parametrize("function", [Weighted, WeightedByData])
def test_cross_derivatives(function):
    a, monitor = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), ig.Monitor()

    def objective(w, a):
        return function.apply(w, a).sum() / 2 + (w**4).sum() / 4 - w.sum()

    solve = ig.implicit(
        ig.solvers.NewtonCG(), ig.argmin(objective), monitor=monitor, on_failure="ignore"
    )
    w = solve(a)
    (found,) = grad(w.sum(), a)
    if function is Weighted:  # its derivative by a is not there at all
        assert monitor.last.status is ig.Status.WRONG_PRODUCT
        assert "with an argument" in monitor.last.check and "Weighted" in monitor.last.check
    else:
        expected = -w.detach() / (a + 3 * w.detach() ** 2)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
        assert monitor.last.curvature == "finite_difference"


@pytest.mark.parametrize(
    ("linear_solver", "flagged"), [(ig.NormalCG(), True), (ig.Exact(), False)], ids=str
)
def test_roots(linear_solver, flagged):
    """Aᵀu is a first derivative, and right; A x needs the second, and only NormalCG takes it."""
    b, monitor = normal(3, seed=1), ig.Monitor()
    condition = ig.root(lambda w, b: InNumPy.apply(w) + w - b)
    options = {"monitor": monitor, "on_failure": "ignore", "linear_solver": linear_solver}
    w = ig.implicit(ig.solvers.SciPyRoot(), condition, init=torch.zeros_like, **options)(b)
    (found,) = grad(w.sum(), b)
    assert (monitor.last.status is ig.Status.WRONG_PRODUCT) == flagged
    if not flagged:
        torch.testing.assert_close(found, 1 / (3 * w.detach() ** 2 + 1))


POINTS = normal(20, 3, seed=8, grad=False)


def by_cholesky(S):
    """Squared lengths of the points in units of S, of which one triangle is read."""
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(S), POINTS.mT, upper=False)
    return z.square().sum(0)


def by_eigh(S):
    values, vectors = torch.linalg.eigh(S)
    return ((POINTS @ vectors).square() / values).sum(1)


def scatter(lengths, skew=0.0):
    """That of points with heavy tails; with skew, symmetric for the weight 0.7 only."""

    def step(S, weight):
        plain = (6 / (3 + lengths(S)) * POINTS.mT) @ POINTS / 20
        return plain + weight * torch.eye(3) + skew * (weight - 0.7) * torch.ones(3, 3).triu(1)

    def solver(weight):
        S = torch.eye(3)
        for _ in range(100):
            S = step(S, weight)
        return S

    return solver, ig.fixed_point(step)


def likelihood(S, weight):
    L = torch.linalg.cholesky(S)
    prior = weight * (2 * L.diagonal().log().sum() + torch.cholesky_inverse(L).trace())
    return 20 * L.diagonal().log().sum() + by_cholesky(S).sum() / 2 + prior


def covariance(weight):
    """The least likelihood's."""
    return (POINTS.mT @ POINTS + 2 * weight * torch.eye(3)) / (20 + 2 * weight)


@pytest.mark.parametrize(
    ("solver", "condition"),
    [scatter(by_cholesky), scatter(by_eigh), (covariance, ig.argmin(likelihood))],
    ids=["cholesky", "eigh", "minimum"],
)
def test_one_triangle_of_a_symmetric_phi_is_enough(solver, condition):
    """Beside symmetric matrices torch's derivatives are not those of values; no φ goes there."""
    weight, outer = torch.tensor(0.7, requires_grad=True), normal(3, 3, seed=9, grad=False)
    outer = outer + outer.mT
    (wanted,) = grad((solver(weight) * outer).sum(), weight)
    (got,) = grad((ig.implicit(solver, condition)(weight) * outer).sum(), weight)
    torch.testing.assert_close(got, wanted)


def test_one_triangle_of_a_hermitian_phi_is_enough():
    z = torch.complex(POINTS, POINTS.flip(0))
    weight, outer = torch.tensor(0.7, requires_grad=True), torch.complex(POINTS[:3], POINTS[3:6])

    def step(S, weight):
        L = torch.linalg.cholesky(S)
        lengths = torch.linalg.solve_triangular(L, z.mT, upper=False).abs().square().sum(0)
        return (6 / (3 + lengths) * z.mT) @ z.conj() / 20 + weight * torch.eye(3)

    def solver(weight):
        S = torch.eye(3, dtype=z.dtype)
        for _ in range(100):
            S = step(S, weight)
        return S

    (wanted,) = grad((solver(weight) * outer).sum().real, weight)
    (got,) = grad((ig.implicit(solver, ig.fixed_point(step))(weight) * outer).sum().real, weight)
    torch.testing.assert_close(got, wanted)


def test_one_triangle_of_a_phi_that_leaves_symmetry_is_told():
    weight = torch.tensor(0.7, requires_grad=True)
    S = ig.implicit(*scatter(by_cholesky, skew=1.0))(weight)
    assert torch.allclose(S, S.mT)
    with pytest.warns(ig.ImplicitGradWarning, match="is not the difference of residuals"):
        S.sum().backward()


def test_one_triangle_of_a_phi_near_any_theta_is_told():
    weight = torch.tensor(0.7)
    theta = covariance(weight).requires_grad_()  # which moves with its elements, one by one
    solve = ig.implicit(lambda theta, weight: theta.clone(), ig.proximal(likelihood, 1.0))
    with pytest.warns(ig.ImplicitGradWarning, match="is not the derivative of its value"):
        solve(theta, weight).sum().backward()


def test_kernels_of_two_numbers_are_no_hermitian_matrices():
    a, monitor = normal(3, 2, 2, 2, seed=1), ig.Monitor()
    condition = ig.argmin(lambda w, a: (Detached.apply(w) / 3 + w**2 / 2 - a * w).sum())
    options = {"curvature": "hessian", "on_failure": "ignore", "monitor": monitor}
    solve = ig.implicit(lambda a: ((1 + 4 * a.abs()).sqrt() - 1) / 2, condition, **options)
    solve(a).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT


def test_a_symmetric_phi_hides_nothing():
    """What is wrong in symmetric directions, too, is found as ever."""
    a, monitor = (torch.eye(2) + 0.5).requires_grad_(), ig.Monitor()
    condition = ig.argmin(lambda S, a: (Detached.apply(S) / 3 + S**2 / 2 - a * S).sum())
    options = {"curvature": "hessian", "on_failure": "ignore", "monitor": monitor}
    solve = ig.implicit(lambda a: ((1 + 4 * a).sqrt() - 1) / 2, condition, **options)
    solve(a).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT


def test_an_argument_may_be_detached():
    theta, monitor = normal(4, seed=3), ig.Monitor()
    condition = ig.argmin(lambda w, theta: (w - theta.detach()).square().sum() + w.sum() * theta[0])
    wavy(ig.implicit(ig.solvers.NewtonCG(), condition, monitor=monitor)(theta)).backward()
    assert monitor.last.check is None


def test_an_objective_that_holds_a_part_of_phi_constant_is_another_condition():
    """Its gradient's zero is a root, differentiated as such; it is no minimum of its value."""
    X, y, lam = normal(20, 3, seed=1, grad=False), normal(20, seed=2, grad=False), normal().exp()
    lam = lam.detach().requires_grad_()

    def value(w, lam):
        return (X @ w - y).square().mean() + lam * (w * w.detach()).sum()

    def slope(w, lam):
        return X.T @ (X @ w - y) / 10 + lam * w

    def solve(lam):
        return torch.linalg.solve(X.T @ X / 10 + lam * torch.eye(3, dtype=X.dtype), X.T @ y / 10)

    with pytest.warns(ig.ImplicitGradWarning, match="ig.root"):
        ig.implicit(solve, ig.argmin(value))(lam).sum().backward()
    (found,) = grad(ig.implicit(solve, ig.root(slope))(lam).sum(), lam)
    torch.testing.assert_close(found, grad(solve(lam).sum(), lam)[0])


class HalfTheSlope(Detached):
    """x³ with half its derivative."""

    @staticmethod
    def backward(ctx, g):
        return g * 1.5 * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("wrong", ["phi", "argument"])
def test_a_residual_with_a_wrong_derivative(wrong):
    b, monitor = normal(3, seed=1), ig.Monitor()

    def residual(w, b):
        first, second = (HalfTheSlope.apply, cube)[:: 1 if wrong == "phi" else -1]
        return first(w) + w - second(b)

    options = {"monitor": monitor, "on_failure": "ignore", "linear_solver": ig.Exact()}
    solve = ig.implicit(ig.solvers.SciPyRoot(), ig.root(residual), init=torch.zeros_like, **options)
    solve(b).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT
    assert ("with an argument" in monitor.last.check) == (wrong == "argument")


@pytest.mark.parametrize("apart", [False, True], ids=["one tensor", "two tensors"])
def test_an_element_that_jumps_hides_nothing_beside_it(apart):
    """A smoothed sign jumps within any step."""
    a, monitor = torch.tensor([0.0, 1.0, 2.0], requires_grad=True), ig.Monitor()

    def residual(w, a):
        w = torch.cat(w)
        jump = w[:1] * (w[:1] ** 2 + 1e-18).rsqrt()
        beside = HalfTheSlope.apply(w[1:]) - a[1:] ** 3
        return list((w - a + torch.cat([jump, beside])).split([1, 2] if apart else [3]))

    def solver(a):
        return list(a.detach().clone().split([1, 2] if apart else [3]))

    options = {"monitor": monitor, "on_failure": "ignore"}
    torch.cat(ig.implicit(solver, ig.root(residual), **options)(a)).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT


@pytest.mark.parametrize("special", [CubeTwice.apply, lambda x: x.logcumsumexp(0)])
def test_third_derivatives_that_are_wrong_are_refused(special):
    theta = normal(4, seed=3)
    solver = ig.solvers.NewtonCG(tol=1e-12)
    solve = ig.implicit(solver, ig.argmin(problem(special)))
    (slope,) = grad(wavy(solve(theta)), theta)
    torch.testing.assert_close(slope, slope)
    with pytest.raises(ig.GraphError, match="second derivatives are not available"):
        grad(wavy(solve(theta)), theta, create_graph=True)[0].sum().backward()


def rows(function):
    """The function of twenty numbers in five rows."""
    return lambda x: function(x.view(5, 4)).flatten()


def by_its_gradient(special):
    """The problem as a root: the objective, and the residual that a user makes of it."""
    objective = problem(special)

    def residual(w, theta):
        return grad(objective(w, theta), w, create_graph=True)[0]

    return objective, residual


def twice(condition, objective):
    """A derivative of the hypergradient at a minimum of the objective, under that condition."""
    minimum = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(objective))
    solve = ig.implicit(lambda theta: minimum(theta.detach()).detach(), condition)
    theta = normal(4, seed=3)
    (slope,) = grad(wavy(solve(theta)), theta, create_graph=True)
    return grad(wavy(slope), theta)[0]


@pytest.mark.parametrize(
    "special",
    [
        CubeTwice.apply,
        lambda x: x.logcumsumexp(0),
        lambda x: x + F.pdist(x.view(5, 4)).sum(),
        rows(lambda x: F.layer_norm(x, (4,))),
    ],
    ids=["custom", "logcumsumexp", "pdist", "layer_norm"],
)
def test_roots_of_gradients_with_wrong_third_derivatives_are_refused(special):
    objective, residual = by_its_gradient(special)
    wrong = r"second derivative of the residual.*suspect"
    missing = (
        r"an operation that the residual goes through has no derivative"  # in torch 2.4, pdist's
    )
    with pytest.raises(ig.GraphError, match=f"{wrong}|{missing}"):
        twice(ig.root(residual), objective)


@pytest.mark.parametrize(
    "special",
    [cube, rows(lambda x: x.log_softmax(1)), rows(lambda x: F.glu(x.repeat(1, 2))), F.softplus],
    ids=["cube", "log_softmax", "glu", "softplus"],
)
def test_roots_of_gradients_have_the_minimums_second_derivatives(special):
    objective, residual = by_its_gradient(special)
    expected = twice(ig.argmin(objective), objective)
    torch.testing.assert_close(twice(ig.root(residual), objective), expected)
    # a preconditioner that is held constant is no fault of the residual
    scaled = ig.root(lambda w, theta: residual(w, theta) * (1 + w.detach() ** 2))
    torch.testing.assert_close(twice(scaled, objective), expected)


def same(x, step, theta):
    return x


@pytest.mark.parametrize(
    ("special", "told"), [(Detached.apply, True), (CubeTwice.apply, False), (cube, False)]
)
@pytest.mark.parametrize("kind", ["root", "fixed_point", "prox_gradient", "argmin"])
def test_second_derivatives_by_arguments_that_are_wrong_are_refused(kind, special, told):
    """What is wrong there is no part of products with φ: first derivatives are right."""
    theta = normal(4, seed=3)

    def objective(w, theta):
        return (w**2).sum() / 2 + (w**4).sum() / 20 - (w * special(theta)).sum()

    def residual(w, theta):
        return w + w**3 / 5 - special(theta)

    def solver(theta):
        w = torch.zeros(4)
        for _ in range(50):
            w = w - residual(w, theta) / (1 + 3 * w**2 / 5)
        return w

    condition = {
        "root": ig.root(residual),
        "fixed_point": ig.fixed_point(lambda w, theta: w - residual(w, theta) / 2),
        "prox_gradient": ig.prox_gradient(objective, same),
        "argmin": ig.argmin(objective),
    }[kind]
    solve = ig.implicit(solver, condition, on_failure="raise")
    w = solver(theta.detach()).requires_grad_()
    expected = grad(wavy(w), w)[0] / (1 + 3 * w**2 / 5) * 3 * theta**2
    torch.testing.assert_close(grad(wavy(solve(theta)), theta)[0], expected)
    if told:
        with pytest.raises(ig.GraphError, match=r"is not the difference of its.*suspect Detached"):
            grad(wavy(solve(theta)), theta, create_graph=True)
        return

    def slope(theta):
        return grad(wavy(solve(theta)), theta, create_graph=True)[0]

    torch.autograd.gradcheck(slope, (theta,))


def test_a_prox_gradients_loss_has_derivatives_of_our_own():
    """torch's third derivative of a layer norm is another."""
    objective = problem(rows(lambda x: F.layer_norm(x, (4,))))
    steps = ig.prox_gradient(objective, lambda x, step, theta: x)
    torch.testing.assert_close(twice(steps, objective), twice(ig.argmin(objective), objective))


def test_a_maps_second_derivative_is_our_own_where_torchs_is_wrong():
    """torch holds the norm constant in the second derivative of a weight norm."""

    def weighted(w, theta):
        return torch.tanh(torch._weight_norm(w.view(2, 2), theta.view(2, 1), 0).flatten() / 2 + 1)

    theta = normal(2, seed=3)
    solve = ig.implicit(
        ig.solvers.Newton(), ig.fixed_point(weighted), init=lambda theta: theta.repeat(2)
    )

    def slope(theta):
        return grad(wavy(solve(theta)), theta, create_graph=True)[0]

    torch.autograd.gradcheck(slope, (theta,))


def test_a_missing_third_derivative_is_said_with_advice():
    objective, residual = by_its_gradient(
        rows(lambda x: F.batch_norm(x, None, None, training=True))
    )
    assert torch.isfinite(twice(ig.argmin(objective), objective)).all()
    missing = r"derivative of that order in torch.*ig\.argmin"
    wrong = r"second derivative of the residual.*suspect"  # as it is in torch 2.4
    with pytest.raises(ig.GraphError, match=f"{missing}|{wrong}"):
        twice(ig.root(residual), objective)


MISSING = {"input_lengths": torch.full((4,), 5), "target_lengths": torch.full((4,), 2)}


@pytest.mark.parametrize("kind", ["root", "root by Newton", "prox_gradient"])
def test_a_missing_derivative_of_a_residual_is_said_with_advice(kind):
    X, targets = normal(5, 4, 3, seed=1, grad=False), torch.randint(1, 4, (4, 2))

    def objective(w, theta):
        scores = (X @ w).log_softmax(2)
        return F.ctc_loss(scores, targets, **MISSING) + (w - theta).square().sum()

    def residual(w, theta):
        return grad(objective(w, theta), w, create_graph=True)[0]

    condition = ig.root(residual)
    if kind == "prox_gradient":
        condition = ig.prox_gradient(objective, lambda x, step, theta: x)
    solver = ig.solvers.Newton() if "Newton" in kind else lambda theta: theta.detach().clone()
    options = {"init": lambda theta: theta} if "Newton" in kind else {}
    with pytest.raises(ig.GraphError, match=r"no second derivative.*ig\.argmin"):
        ig.implicit(solver, condition, **options)(normal(3, 4, seed=3)).sum().backward()


def test_a_certificate_takes_no_products_that_were_found_wrong():
    """Differences take over for it as well: its corrected gradient is that of the right cube."""
    options = {"linear_solver": ig.CG(maxiter=1), "on_failure": "ignore"}  # something to correct
    solver, theta = ig.solvers.GradientDescent(lr=0.1, steps=300), normal(4, seed=3)

    def corrected(special):
        solve = ig.implicit(solver, ig.argmin(problem(special)), **options)
        return ig.certify(solve, (theta,), wavy).corrected[0]

    torch.testing.assert_close(corrected(Detached.apply), corrected(cube), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- imaml


class Cubed(nn.Module):
    """A network through the special function."""

    def __init__(self, special):
        super().__init__()
        torch.manual_seed(0)
        self.special, self.inner, self.outer = special, nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.outer(self.special(torch.tanh(self.inner(x))))


def meta_gradient(special, in_loss=False, **options):
    X, y = normal(12, 4, seed=1, grad=False), normal(12, 1, seed=2, grad=False)
    model, monitor = Cubed(cube if in_loss else special), ig.Monitor()
    solver = ig.CG(maxiter=100, rtol=1e-10)
    options = {"lam": 2.0, "linear_solver": solver, "monitor": monitor} | options
    learner = ig.imaml(model, lr=0.05, **options).clone()
    outer = special if in_loss else cube
    learner.adapt(lambda: (outer(learner(X)) - y).square().mean(), steps=50)
    (learner(X.flip(0)) - y).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), monitor.last


@pytest.mark.parametrize("in_loss", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_learners(name, in_loss):
    expected, _ = meta_gradient(cube, in_loss)
    found, report = meta_gradient(WRONG[name], in_loss)
    assert report.curvature == "finite_difference" and report.check
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    _, report = meta_gradient(WRONG[name], in_loss, curvature="hessian", on_failure="ignore")
    assert report.status is ig.Status.WRONG_PRODUCT


@pytest.mark.filterwarnings("ignore:.*enters the loss linearly")  # without a second derivative
@pytest.mark.parametrize("in_loss", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_gauss_newton_does_without_the_models_second_derivative(name, in_loss):
    """A backward that is linear in its cotangent is enough, where the loss has a Hessian."""
    options = {"curvature": "gauss_newton", "on_failure": "ignore"}
    expected, _ = meta_gradient(cube, in_loss, **options)
    found, report = meta_gradient(WRONG[name], in_loss, **options)
    right = torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert right == (report.status is not ig.Status.WRONG_PRODUCT)
    assert right == (not in_loss and name in ("Detached", "WhereNegative"))


def test_learners_refuse_third_derivatives_that_are_wrong():
    X, y = normal(12, 4, seed=1, grad=False), normal(12, 1, seed=2, grad=False)
    for special, refused in ((cube, False), (CubeTwice.apply, True)):
        model = Cubed(special)
        solver = ig.CG(maxiter=100, rtol=1e-10)
        maml = ig.imaml(model, lr=0.05, lam=2.0, linear_solver=solver)
        learner = maml.clone()
        learner.adapt(lambda: (learner(X) - y).square().mean(), steps=50)  # noqa: B023
        outer, theta = (learner(X.flip(0)) - y).square().mean(), tuple(model.parameters())
        if not refused:
            sum(g.square().sum() for g in grad(outer, theta, create_graph=True)).backward()
            continue
        with pytest.raises(ig.GraphError, match="third derivative of the objective"):
            grad(outer, theta, create_graph=True)


def test_each_kind_of_loss_is_asked_for_second_derivatives():
    """The first loss has them; the second, of another clone, has none in torch."""
    X, y = normal(12, 4, seed=1, grad=False), normal(12, 1, seed=2, grad=False)
    monitor = ig.Monitor()
    model = nn.Linear(4, 1)
    maml = ig.imaml(model, lr=0.05, lam=1.0, monitor=monitor)
    for loss in (nn.functional.mse_loss, lambda out, y: OnceMarked.apply(out - y).mean()):
        learner = maml.clone()
        learner.adapt(lambda: loss(learner(X), y), steps=3)  # noqa: B023
        learner(X).sum().backward()
    assert [report.curvature for report in monitor.reports] == ["hessian", "finite_difference"]


class OnceMarked(torch.autograd.Function):
    """x², without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_the_check_option_of_imaml():
    _, report = meta_gradient(Detached.apply, check="never")
    assert report.curvature == "hessian"
    with pytest.raises(ig.InvalidArgumentError, match=r"imaml\(check=.often.\): expected"):
        meta_gradient(cube, check="often")


CTC = {"input_lengths": torch.full((4,), 12), "target_lengths": torch.full((4,), 3)}


@pytest.mark.parametrize("curvature", ["auto", "hessian", "gauss_newton"])
def test_a_missing_second_derivative_is_said_with_advice(curvature):
    X, targets = normal(4, 12, 5, seed=1, grad=False), torch.randint(1, 6, (4, 3))
    learner = ig.imaml(nn.Linear(5, 6), lr=0.05, curvature=curvature).clone()

    def loss():
        return F.ctc_loss(learner(X).log_softmax(-1).transpose(0, 1), targets, **CTC)

    learner.adapt(loss())
    with pytest.raises(ig.GraphError, match=r"no second derivative.*adapt\(lambda: loss"):
        loss().backward()


# ---------------------------------------------------------------- no false alarms

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Hardswish, nn.PReLU, nn.SELU, nn.Tanh)
NORMS = (nn.Identity, lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4))
LOSSES = (F.cross_entropy, lambda o, y: F.l1_loss(o, F.one_hot(y, 3).to(o)))


def right_problem(seed):
    """A random convolutional network and a loss, with kinks."""
    torch.manual_seed(seed)
    act, norm, loss = (
        options[seed // step % len(options)]
        for options, step in ((ACTIVATIONS, 1), (NORMS, 6), (LOSSES, 2))
    )
    layers = (nn.Conv2d(1, 4, 3), norm(), act(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), act())
    head = (nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 3 * 3, 3))
    return nn.Sequential(*layers, *head), torch.randn(8, 1, 12, 12), torch.arange(8) % 3, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_networks_raise_no_alarm(dtype):
    for seed in range(36):
        model, x, y, loss = right_problem(seed)
        model, x = model.to(dtype), x.to(dtype).requires_grad_()
        theta = dict(model.named_parameters())

        def inner(w, x, model=model, loss=loss, y=y):
            return loss(functional_call(model, w, (x,)), y)

        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda theta, x: {n: t.detach().clone() for n, t in theta.items()},
            ig.proximal(inner, 1.0),
            linear_solver=ig.CG(maxiter=1),
            on_failure="ignore",
            monitor=monitor,
        )
        wavy(solve(theta, x)).backward()
        assert monitor.last.check is None, (seed, monitor.last.check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_said_in_half_precision(dtype):
    _, report = hypergradient(cube, dtype, on_failure="ignore")
    assert report.check is None


def test_gradients_by_arguments_in_half_precision_are_too_coarse_to_be_compared():
    for seed in range(30):
        a, X = (normal(*s, seed=seed, grad=False, dtype=torch.float32) for s in ((1,), (7, 1)))
        a = a.bfloat16().requires_grad_()

        def objective(w, a, X=X):
            cubes = CubeTwice.apply(X @ w), CubeTwice.apply(a.float())
            near = (w - a.float()).square().sum()
            return 0.1 * cubes[0].square().sum() + near + 0.1 * (w * cubes[1]).sum()

        monitor = ig.Monitor()
        solve = ig.implicit(
            ig.solvers.NewtonCG(),
            ig.argmin(objective),
            init=lambda a: torch.zeros(1, dtype=torch.float32),
            monitor=monitor,
        )
        solve(a).sum().backward()
        assert monitor.last.check is None, (seed, monitor.last.check)


@pytest.mark.parametrize("row", [0, 3])
def test_rows_for_padding_are_held_on_purpose(row):
    """Those of one table; another has none."""
    words, lam = torch.tensor([[1, 2, row], [3 - row, row, row]]), torch.tensor(0.3)
    tables = nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(4, 2, padding_idx=row)])
    targets, free = normal(2, 2, seed=1, grad=False), torch.arange(4) != row

    def value(tables, lam):
        mean = tables[1](words).mean(1) + 0 * tables[0](words[:, 0])
        return (mean - targets).square().sum() + sum(
            lam * table.weight.square().sum() for table in tables
        )

    def exact(lam):
        shares = F.one_hot(words, 4).double().mean(1)[:, free]
        return torch.linalg.solve(shares.T @ shares + lam * torch.eye(3), shares.T @ targets)

    @torch.no_grad()
    def train(tables, lam):
        tables[0].weight.zero_()
        tables[1].weight[free] = exact(lam)
        return tables

    lam.requires_grad_()
    solve = ig.implicit(train, ig.argmin(value), on_failure="raise")
    solve(tables, lam)[1].weight.square().sum().backward()
    torch.testing.assert_close(lam.grad, grad(exact(lam).square().sum(), lam)[0])


@pytest.mark.parametrize("padding", [0, None])
def test_rows_that_are_not_for_padding_are_not_held(padding):
    words, targets = torch.tensor([3, 3]), normal(2, 2, seed=1, grad=False)
    known = nn.Embedding(4, 2, padding_idx=0)  # no part of phi

    def value(table, lam):
        error = table(words).detach() * table(words) + known(words) - targets
        return error.square().sum() + lam * table.weight.square().sum()

    solve = ig.implicit(lambda table, lam: table, ig.argmin(value))
    lam = torch.tensor(0.3, requires_grad=True)
    with pytest.warns(ig.ImplicitGradWarning, match="held constant"):
        solve(nn.Embedding(4, 2, padding_idx=padding), lam).weight.sum().backward()


@pytest.mark.parametrize(
    "dtype, smooth",
    [
        (torch.float32, 1e-4),
        (torch.float32, 1e-6),
        (torch.float64, 1e-7),
        (torch.float64, 1e-10),
    ],
)
@pytest.mark.parametrize("kind", ["argmin", "root"])
def test_a_smoothed_modulus_may_bend_within_less_than_a_step(kind, dtype, smooth):
    a = torch.tensor([0.0, 2.0, -1.5], dtype=dtype, requires_grad=True)

    def objective(w, a):
        return (w - a).square().sum() / 2 + (w**2 + smooth**2).sqrt().sum() / 2

    def residual(w, a):
        return w - a + w * (w**2 + smooth**2).rsqrt() / 2

    def shrink(a):  # exact where w is 0, and elsewhere to smooth²
        return a - a.clamp(-0.5, 0.5)

    condition = ig.argmin(objective) if kind == "argmin" else ig.root(residual)
    monitor = ig.Monitor()
    ig.implicit(shrink, condition, monitor=monitor, on_failure="raise")(a).sum().backward()
    assert monitor.last.check is None and monitor.last.curvature != "finite_difference"
    expected = torch.tensor([0.0, 1.0, 1.0], dtype=dtype)
    torch.testing.assert_close(a.grad, expected, rtol=1e-6, atol=2.1 * smooth)


@pytest.mark.parametrize("smooth", [1e-7, 1e-8, 1e-10])
@pytest.mark.parametrize("apart", [False, True], ids=["one tensor", "two tensors"])
def test_what_bends_within_less_than_a_step_hides_nothing_beside_it(smooth, apart):
    a, monitor = torch.tensor([0.0, 2.0, 0.75], requires_grad=True), ig.Monitor()

    def objective(w, a):
        w = torch.cat(w)
        near = (w - a).square().sum() / 2 + (w[0] ** 2 + smooth**2).sqrt() / 2
        return near + Detached.apply(w[1:]).sum() / 3

    def solver(a):
        w = torch.cat([a[:1], ((1 + 4 * a[1:]).sqrt() - 1) / 2])
        return list(w.split([1, 2])) if apart else [w]

    options = {"curvature": "hessian", "on_failure": "ignore", "monitor": monitor}
    solve = ig.implicit(solver, ig.argmin(objective), **options)
    torch.cat(solve(a)).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT


@pytest.mark.parametrize("make", PROBLEMS)
def test_the_zoo_raises_no_alarm(make):
    problem, monitor = make(), ig.Monitor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.gradients(ig.implicit(problem.solver, problem.condition, monitor=monitor))
    assert monitor.last.check is None


@pytest.mark.parametrize("conjugate", [False, True])
def test_the_modulus_of_complex_numbers_bends(conjugate):
    """|z| is no function that is linear in pieces; complex arguments are moved and summed whole."""
    A, b = (torch.randn(*shape, dtype=torch.complex128) for shape in ((3, 3), (3,)))
    A.requires_grad_(), b.requires_grad_()

    def exact(A, b):
        return torch.view_as_real(torch.linalg.solve(A.mH @ A + torch.eye(3), A.mH @ b))

    def objective(w, A, b):
        w = torch.view_as_complex(w)
        rest = (A @ w - b).conj() if conjugate else A @ w - b
        return rest.abs().square().sum() + w.abs().square().sum()

    monitor = ig.Monitor()
    solve = ig.implicit(lambda *a: exact(*a).detach(), ig.argmin(objective), monitor=monitor)
    found, expected = (grad(wavy(f(A, b)), (A, b)) for f in (solve, exact))
    torch.testing.assert_close(found, expected)
    assert monitor.last.check is None and monitor.last.curvature == "hessian"


def test_a_wrong_layer_shows_among_many_kinks():
    """In float32, where differences cross thousands of kinks, which are held where they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    head, x = nn.Linear(16 * 13 * 13, 5), torch.randn(20, 1, 28, 28, dtype=torch.float32)
    model, head, reports = model.float(), head.float(), []
    theta = {**dict(model.named_parameters()), "w": head.weight}
    for special in (cube, Detached.apply):

        def loss(w, special=special):
            w = dict(w)
            out = special(functional_call(model, w, (x,)) @ w.pop("w").T)
            return F.cross_entropy(out, torch.arange(20) % 5)

        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda theta: {n: t.detach().clone() for n, t in theta.items()},
            ig.proximal(loss, 1.0),
            linear_solver=ig.CG(maxiter=1),
            on_failure="ignore",
            monitor=monitor,
        )
        wavy(solve(theta)).backward()
        reports.append(monitor.last)
    assert reports[0].check is None and "Detached" in reports[1].check


class TanhOfData(torch.autograd.Function):
    """tanh, whose backward holds its value constant."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].data ** 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_an_objective_bends_a_product_that_is_8_percent_off_shows(dtype):
    def hypergradient(tanh):
        a = torch.tensor([1.0, 0.5, -0.7], dtype=dtype, requires_grad=True)

        def objective(w, a):
            return (tanh(2 * w) - a).square().sum() + 0.1 * w.square().sum()

        def near_the_minimum(a):
            return torch.tensor([0.9, 0.27, -0.4], dtype=dtype)

        monitor, condition = ig.Monitor(), ig.argmin(objective)
        solve = ig.implicit(near_the_minimum, condition, monitor=monitor, on_failure="ignore")
        return grad(solve(a).sum(), a)[0], monitor.last.curvature

    expected, _ = hypergradient(torch.tanh)
    found, curvature = hypergradient(TanhOfData.apply)
    assert curvature == "finite_difference"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_held_part_shows_where_value_and_gradient_are_both_zero(dtype):
    """w - a - w.detach()/2 is 0 at w = 2a: so are the value's derivative and the gradient."""
    a = torch.tensor([1.0, 0.5, -0.7], dtype=dtype, requires_grad=True)
    monitor = ig.Monitor()
    held = ig.argmin(lambda w, a: (w - w.detach() / 2 - a).square().sum())
    solve = ig.implicit(lambda a: 2 * a, held, monitor=monitor, on_failure="ignore")
    solve(a).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT
    assert "held constant" in monitor.last.check
