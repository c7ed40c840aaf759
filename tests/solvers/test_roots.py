"""Root finders: against closed forms, in any container, batched, and honest where they fail."""

import functools
import math

import pytest
import torch

import implicit_grad as ig
from implicit_grad.solvers import Bisection, Broyden, FixedPoint, Newton

pytestmark = pytest.mark.usefixtures("double_precision")

FINDERS = {
    "FixedPoint": FixedPoint(maxiter=3000),
    "FixedPoint, damped": FixedPoint(damping=0.7, maxiter=3000),
    "Anderson": FixedPoint(anderson=5),
    "Newton": Newton(),
    "Newton, GMRES": Newton(linear_solver=ig.GMRES(rtol=1e-3)),
    "Newton, function": Newton(linear_solver=lambda matvec, b: by_columns(matvec, b)),
    "Broyden": Broyden(),
    "Broyden, short": Broyden(memory=4),
}
every = pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
SOLUTION, ARGUMENT = ig.InvalidSolutionError, ig.InvalidArgumentError


def by_columns(matvec, b):
    return torch.linalg.solve(torch.stack([matvec(e) for e in torch.eye(len(b))], dim=1), b)


def contraction(n, seed=0, slope=0.8):
    """φ ↦ tanh(Wφ + b) with ‖W‖ = slope: a layer of a deep equilibrium model."""
    W = torch.randn(n, n)
    W = slope * W / torch.linalg.matrix_norm(W, 2)
    return lambda phi, b: torch.tanh(phi @ W.T + b), W


def close(found, expected, tol=1e-9):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


# ------------------------------------------------------------------------- roots are found


@every
def test_a_fixed_point_and_its_gradient_in_closed_form(finder):
    """φ = tanh(Wφ + b) has dφ = (I − D W)⁻¹ D db with D = diag(1 − φ²)."""
    layer, W = contraction(12)
    b, v = torch.randn(12, requires_grad=True), torch.randn(12)
    solve = ig.implicit(finder, ig.fixed_point(layer), init=torch.zeros_like)
    phi = solve(b)
    close(layer(phi, b), phi, 1e-10)
    D = torch.diag(1 - phi.detach() ** 2)
    expected = (torch.linalg.inv(torch.eye(12) - D @ W) @ D).T @ v
    close(torch.autograd.grad(phi @ v, b)[0], expected)


@every
def test_containers_dtypes_and_empty_tensors_are_kept(finder):
    def residual(phi):
        return {"a": (phi["a"] - 2).float(), "b": [phi["b"][0] - 3, phi["b"][1]]}

    init = {"a": torch.zeros(2, 2, dtype=torch.float32), "b": [torch.zeros(()), torch.zeros(0, 3)]}
    before = {"a": init["a"].clone(), "b": [t.clone() for t in init["b"]]}
    phi = finder.find_root(residual, init)
    close(phi["a"], torch.full((2, 2), 2.0, dtype=torch.float32), 1e-5)
    close(phi["b"][0], torch.tensor(3.0), 1e-5)  # the coarsest dtype's eps decides when to stop
    assert phi["b"][1].shape == (0, 3)
    torch.testing.assert_close(init, before, rtol=0, atol=0)


# Moré, Garbow and Hillstrom (1981), Testing unconstrained optimization software: three systems
def rosenbrock(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def helical_valley(x):
    turn = torch.atan2(x[1], x[0]) / (2 * math.pi)
    return torch.stack([10 * (x[2] - 10 * turn), 10 * (x[:2].norm() - 1), x[2]])


def tridiagonal(x):
    left, right = torch.nn.functional.pad(x, (1, 1)).unfold(0, 3, 1)[:, ::2].T
    return (3 - 2 * x) * x - left - 2 * right + 1


SYSTEMS = {
    "rosenbrock": (rosenbrock, torch.tensor([-1.2, 1.0])),
    "helical valley": (helical_valley, torch.tensor([-1.0, 0.0, 0.0])),
    "tridiagonal": (tridiagonal, -torch.ones(10)),
    "tridiagonal, large": (tridiagonal, -torch.ones(300)),
}


@pytest.mark.parametrize("finder", [Newton(), Broyden()], ids=["Newton", "Broyden"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_from_afar(finder, system):
    residual, init = SYSTEMS[system]
    phi = finder.find_root(residual, init.double())
    assert residual(phi).norm() < 1e-10 * residual(init.double()).norm()
    if system == "rosenbrock":
        close(phi, torch.ones(2))


@pytest.mark.parametrize("unit", [1e-8, 1e8])
@pytest.mark.parametrize("finder", [Newton(), Broyden()], ids=["Newton", "Broyden"])
def test_units_do_not_matter(finder, unit):
    phi = finder.find_root(lambda x: rosenbrock(x / unit) / unit, unit * torch.tensor([-1.2, 1.0]))
    close(phi / unit, torch.ones(2))


def test_newton_s_digits_double():
    assert Newton(maxiter=6, tol=1e-14).find_root(
        lambda x: x * x - 2, torch.tensor([1.0])
    ).item() == pytest.approx(math.sqrt(2), abs=1e-15)


def test_anderson_on_a_linear_map_ends_after_as_many_steps_as_unknowns():
    """As GMRES does (Walker and Ni, 2011)."""
    A, b = torch.randn(6, 6), torch.randn(6)
    finder = FixedPoint(anderson=6, maxiter=8, tol=1e-8)
    close(finder.find_root(lambda x: A @ x - b, torch.zeros(6)), torch.linalg.solve(A, b), 1e-6)


def test_broyden_on_a_linear_system_ends_after_twice_as_many_steps_as_unknowns():
    """Gay (1979), Some convergence properties of Broyden's method."""
    A, b = torch.eye(6) + 0.3 * torch.randn(6, 6), torch.randn(6)
    phi = Broyden(maxiter=13, tol=1e-9).find_root(lambda x: A @ x - b, torch.zeros(6))
    close(phi, torch.linalg.solve(A, b), 1e-8)


def test_broyden_needs_no_derivatives():
    phi = Broyden().find_root(
        lambda x: torch.from_numpy(x.numpy() ** 3 - 8), torch.tensor([1.0, 3.0])
    )
    close(phi, torch.full((2,), 2.0))
    with pytest.raises(ARGUMENT, match=r"no way from phi.*Broyden\(\)"):
        Newton().find_root(lambda x: torch.from_numpy(x.detach().numpy() ** 3), torch.ones(2))


@every
def test_a_residual_that_takes_gradients_itself(finder):
    def residual(phi):
        leaf = phi if phi.requires_grad else phi.detach().requires_grad_()
        (slope,) = torch.autograd.grad((leaf - 3).cosh().log().sum(), leaf, create_graph=True)
        return slope

    close(finder.find_root(residual, torch.full((3,), 2.5)), torch.full((3,), 3.0))


# ------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "make",
    [FixedPoint, functools.partial(FixedPoint, anderson=3), Newton, Broyden],
    ids=["FixedPoint", "Anderson", "Newton", "Broyden"],
)
def test_a_batch_is_solved_as_each_of_its_tasks(make):
    slopes = torch.tensor([0.1, 0.5, 0.9, -0.7])[:, None]
    start, b = torch.randn(4, 3), torch.randn(4, 3)

    def residual(phi, rows=slice(None)):
        return phi - torch.tanh(slopes[rows] * phi.roll(1, dims=-1) + b[rows])

    found = make(tasks=True).find_root(residual, start)
    for i in range(4):
        one = make().find_root(functools.partial(residual, rows=i), start[i])
        close(found[i], one, 1e-12)


def test_one_task_that_fails_does_not_spoil_the_others():
    shift = torch.tensor([[-4.0], [1.0], [-9.0]])  # x² + 1 has no root
    with pytest.warns(ig.ImplicitGradWarning, match="in 1 of 3 tasks"):
        phi = Newton(tasks=True).find_root(lambda x: x * x + shift, torch.full((3, 1), 1.5))
    close(phi[[0, 2], 0], torch.tensor([2.0, 3.0]))


def test_vmap_over_a_root_finder():
    b = torch.rand(5, 3) + 1
    solve = ig.implicit(Newton(), ig.root(lambda x, b: x**3 - b))
    roots = torch.func.vmap(solve)(b)
    close(roots, b ** (1 / 3))
    jacobian = torch.func.vmap(torch.func.jacrev(solve))(b)
    close(jacobian, torch.diag_embed(b ** (-2 / 3) / 3))


# ------------------------------------------------------------------------------- bisection


def kepler(E, e, M):
    return E - e * torch.sin(E) - M


def test_kepler_s_equation_and_its_derivatives():
    """dE/dM = 1/(1 − e cos E), dE/de = sin E/(1 − e cos E)."""
    e = torch.tensor([0.01, 0.5, 0.999, 0.8]).requires_grad_()
    M = torch.tensor([0.5, 3.0, 0.02, math.pi / 2]).requires_grad_()
    solve = ig.implicit(Bisection(lower=0.0, upper=math.pi), ig.root(kepler))
    E = solve(e, M)
    close(kepler(E, e, M), torch.zeros(4), 1e-14)
    found = torch.autograd.grad(E.sum(), (e, M))
    slope = 1 - e * torch.cos(E)
    close(found, (torch.sin(E) / slope, 1 / slope))


def test_bisection_of_a_container_and_with_a_tolerance():
    init = {"a": torch.zeros(2), "b": torch.zeros(1, 2, dtype=torch.float32)}

    def residual(phi):
        return {"a": phi["a"] ** 3 - 2, "b": 0.25 - phi["b"] ** 2}

    lower = {"a": 0.0, "b": torch.tensor([[0.0, -3.0]])}
    upper = {"a": torch.tensor([2.0, 5.0]), "b": torch.tensor([[7.0, 0.0]])}
    phi = Bisection(lower=lower, upper=upper).find_root(residual, init)
    close(phi["a"], torch.full((2,), 2 ** (1 / 3)), 1e-15)
    assert phi["b"].dtype == torch.float32
    torch.testing.assert_close(phi["b"], torch.tensor([[0.5, -0.5]], dtype=torch.float32))
    rough = Bisection(lower=0.0, upper=2.0, tol=1e-3).find_root(lambda x: x**3 - 2, torch.zeros(1))
    assert 1e-9 < abs(rough.item() - 2 ** (1 / 3)) < 1e-3


@pytest.mark.parametrize("ends", [(0.0, 3.0), (-2.0, 0.0), (0.0, 1e300), (-1e-300, 1e300)])
def test_roots_at_the_ends_and_wide_intervals(ends):
    phi = Bisection(lower=ends[0], upper=ends[1]).find_root(lambda x: x, torch.ones(2))
    assert bool((phi.abs() < 1e-299).all())


def test_what_bisection_refuses_and_tells():
    def find(residual, lower=0.0, upper=1.0, size=2):
        return Bisection(lower=lower, upper=upper).find_root(residual, torch.zeros(size))

    with pytest.raises(ARGUMENT, match=r"same for 1 of 2 elements.*2 at 0 and 3 at 1"):
        find(lambda x: x - torch.tensor([0.5, -2.0]))
    with pytest.raises(ARGUMENT, match="lower must be finite"):
        find(lambda x: x, lower=None)
    with pytest.raises(ARGUMENT, match="no lower bound greater"):
        find(lambda x: x, lower=2.0)
    with pytest.raises(SOLUTION, match="NaN"):
        find(lambda x: torch.log(x - 0.5))
    with pytest.warns(ig.ImplicitGradWarning, match="a pole, not a root"):
        find(lambda x: 1 / (x - 0.3))
    with pytest.warns(ig.ImplicitGradWarning, match="has to be elementwise"):
        find(lambda x: x.flip(0) * 2 + x - torch.tensor([1.2, 1.9]))


# -------------------------------------------------------------------- honest where they fail


FAIL = {
    "FixedPoint": FixedPoint(maxiter=3),
    "Anderson": FixedPoint(anderson=2, maxiter=3),
    "Newton": Newton(maxiter=2),
    "Broyden": Broyden(maxiter=2),
}


@pytest.mark.parametrize("name", FAIL)
def test_too_few_steps_are_told_with_numbers(name):
    with pytest.warns(ig.ImplicitGradWarning) as said:
        phi = FAIL[name].find_root(lambda x: x - torch.cos(x), torch.full((2,), 9.0))
    assert torch.isfinite(phi).all()
    message = str(said[0].message)
    assert f"after {FAIL[name].maxiter} steps" in message and "maxiter" in message


@pytest.mark.parametrize("finder", [Newton(), Broyden()], ids=["Newton", "Broyden"])
def test_no_root_is_told(finder):
    with pytest.warns(ig.ImplicitGradWarning, match="is not reached"):
        finder.find_root(lambda x: x * x + 1, torch.tensor([1.0]))


@every
def test_rounding_meets_any_tolerance(finder):
    """No warning, though none of these can make the residual 0."""
    tight = type(finder)(**{**vars(finder), "tol": 0.0})
    phi = tight.find_root(lambda x: x - torch.cos(x) / 2, torch.ones(3))
    close(phi, torch.cos(phi) / 2, 1e-15)


@every
def test_a_start_at_the_root_stays_there(finder):
    start = torch.full((2,), 0.7390851332151607)
    close(finder.find_root(lambda x: x - torch.cos(x), start), start, 1e-14)


def test_nan_is_refused():
    with pytest.raises(SOLUTION, match=r"step 0 the residual holds NaN.*not defined at init"):
        Newton().find_root(torch.log, torch.tensor([-1.0]))
    with pytest.raises(SOLUTION, match="no contraction here"):
        FixedPoint().find_root(lambda x: x - x**3 * 4, torch.tensor([3.0]))
    # a line search comes back from where there is nothing
    close(Newton().find_root(torch.log, torch.tensor([20.0])), torch.ones(1))


OPTIONS = {
    r"FixedPoint\(damping=0\): expected a number > 0": lambda: FixedPoint(damping=0),
    r"FixedPoint\(anderson=-1\)": lambda: FixedPoint(anderson=-1),
    r"Newton\(maxiter=-1\)": lambda: Newton(maxiter=-1),
    r"Newton\(rtol=2\)": lambda: Newton(rtol=2),
    "Newton: linear_solver must be": lambda: Newton(linear_solver="lu"),
    r"Broyden\(memory=0\)": lambda: Broyden(memory=0),
    r"Broyden\(tol=-1\)": lambda: Broyden(tol=-1),
    r"Newton\(tasks=1\)": lambda: Newton(tasks=1),
    r"Bisection\(tol='a'\)": lambda: Bisection(lower=0, upper=1, tol="a"),
    "the first dimension of each tensor of phi counts the tasks": lambda: Newton(
        tasks=True
    ).find_root(lambda x: x, (torch.ones(2), torch.ones(3))),
    "must return the form of phi": lambda: Newton().find_root(lambda x: (x, x), torch.ones(2)),
    "fixed_point: map must return the form of phi": lambda: ig.implicit(
        Newton(), ig.fixed_point(lambda x, a: [x])
    )(torch.ones(2)),
    "it returned a float64 tensor of shape": lambda: Broyden().find_root(
        lambda x: x[:1], torch.ones(2)
    ),
}


@pytest.mark.parametrize("message", OPTIONS)
def test_what_cannot_work_is_named(message):
    with pytest.raises(ARGUMENT, match=message):
        OPTIONS[message]()
