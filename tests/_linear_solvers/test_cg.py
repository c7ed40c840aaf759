"""Linear solvers: against dense algebra, on systems drawn by their size, spectrum and dtype."""

import dataclasses
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import Operator, Times
from implicit_grad._linear_solvers.cg import CG
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._linear_solvers.exact import Exact
from implicit_grad._linear_solvers.normal_cg import NormalCG
from implicit_grad._theorem.linearization import Linearization

F32, F64 = torch.float32, torch.float64

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 24)
LOG_KAPPAS = st.floats(0, 4)
SCALES = st.integers(-60, 60)


def orthogonal(n: int, random: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=random))[0]


def symmetric(eigenvalues: Tensor, random: torch.Generator) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = orthogonal(len(eigenvalues), random)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def system(seed: int, n: int, log_kappa: float, dtype=F64) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with eigenvalues in [1, kappa], and a right-hand side."""
    random = torch.Generator().manual_seed(seed)
    eigenvalues = 10 ** (log_kappa * torch.rand(n, dtype=F64, generator=random))
    eigenvalues[0], eigenvalues[-1] = 10**log_kappa, 1.0
    matrix = symmetric(eigenvalues, random).to(dtype)
    return matrix, torch.randn(n, dtype=dtype, generator=random)


def operator(matrix: Tensor, scale: Tensor | None = None) -> Operator:
    return Operator(lambda x: matrix @ x, lambda x: matrix.T @ x, scale)


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


class Counting:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.products = 0
        self.operator = Operator(self.of(matrix), self.of(matrix.T))

    def of(self, matrix: Tensor):
        def product(x: Tensor) -> Tensor:
            self.products += 1
            return matrix @ x

        return product


# ---------------------------------------------------------------- agreement with dense algebra


@given(SEEDS, SIZES, LOG_KAPPAS, SCALES)
def test_cg_equals_exact(seed, n, log_kappa, scale):
    matrix, rhs = system(seed, n, log_kappa)
    matrix, rhs = matrix * 2.0**scale, rhs * 2.0 ** (-2 * scale)
    exact = Exact().solve(operator(matrix), rhs)
    found = CG(rtol=1e-13).solve(operator(matrix), rhs)
    assert exact.status == Status.EXACT
    assert relative(exact.x, torch.linalg.solve(matrix, rhs)) < 1e-14 * n * 10**log_kappa
    assert relative(found.x, exact.x) < 1e-12 * 10**log_kappa


@given(SEEDS, SIZES, st.floats(0, 2), st.booleans())
def test_normal_cg_equals_exact(seed, n, log_kappa, swap):
    random = torch.Generator().manual_seed(seed)
    spread = 10 ** (log_kappa * torch.rand(n, dtype=F64, generator=random))
    matrix = orthogonal(n, random) @ torch.diag(spread) @ orthogonal(n, random)
    rhs = torch.randn(n, dtype=F64, generator=random)
    exact = Exact().solve(operator(matrix), rhs)
    found = NormalCG(rtol=1e-12).solve(operator(matrix), rhs)
    assert relative(found.x, exact.x) < 1e-10 * 10**log_kappa


@given(SEEDS, st.integers(1, 6), st.integers(0, 5), st.floats(0, 3), st.booleans())
def test_cg_equals_exact_through_implicit(seed, rows, columns, log_kappa, proximal):
    n = rows * columns + 2
    matrix, rhs = system(seed, n, log_kappa)
    shapes = {"a": (rows, columns), "b": (), "c": (1,)}

    def split(vector):
        parts = vector.split([math.prod(s) for s in shapes.values()])
        return {k: p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}

    def joined(tree):
        return torch.cat([t.flatten() for t in tree.values()])

    def gradient(linear_solver):
        theta = {k: t.clone().requires_grad_() for k, t in split(rhs).items()}
        if proximal:
            condition = ig.proximal(lambda w: joined(w) @ matrix @ joined(w) / 2, 0.7)
            whole = matrix / 0.7 + torch.eye(n, dtype=F64)
        else:
            condition = ig.argmin(
                lambda w, t: joined(w) @ matrix @ joined(w) / 2 - joined(w) @ joined(t)
            )
            whole = matrix

        def solver(theta):
            return split(torch.linalg.solve(whole, joined(theta)))

        phi = ig.implicit(solver, condition, linear_solver=linear_solver, on_failure="raise")(theta)
        weights = torch.arange(1.0, n + 1, dtype=F64)
        (weights @ joined(phi)).backward()
        found = joined({k: t.grad for k, t in theta.items()})
        return found, torch.linalg.solve(whole, weights)

    for solver in (ig.CG(rtol=1e-13), ig.Exact(), ig.NormalCG(rtol=1e-12)):
        found, expected = gradient(solver)
        assert relative(found, expected) < 1e-10 * 10**log_kappa / 10


@given(SEEDS, st.integers(1, 8), st.booleans())
def test_products_and_transposed_products_agree(seed, n, diagonal):
    random = torch.Generator().manual_seed(seed)
    a, b, u, w = (torch.randn(n, n, dtype=F64, generator=random) for _ in range(4))
    x = torch.randn(n, dtype=F64, generator=random).requires_grad_()
    y = torch.randn(2, dtype=F64, generator=random).requires_grad_()
    smooth = (torch.tanh(a @ x) * y.sum(), (b @ x).sum() * y**2)
    scale = (torch.rand(n, dtype=F64, generator=random), torch.rand((), dtype=F64))
    parts = {"smooth": smooth, "scale": scale} if diagonal else {}
    around = Linearization(smooth, (x, y), **parts)
    u, w = (u[0], u[0, :1].expand(2)), (w[0], w[0, :1].expand(2))

    def dot(p, q):
        return sum((a * b).sum() for a, b in zip(p, q, strict=True))

    left, right = dot(around.unscaled_transposed(u), w), dot(u, around.unscaled_product(w))
    assert abs(left - right) <= 1e-12 * (1 + abs(left))
    held = dot([s * a for s, a in zip(scale, u, strict=True)], w) if diagonal else 0.0
    assert abs(dot(around.transposed(u), w) - left - held) <= 1e-12 * (1 + abs(left))


# ---------------------------------------------------------------- scale, repetition, edge cases


@given(SEEDS, SIZES, LOG_KAPPAS, st.sampled_from([-40, -16, 16, 40]), st.sampled_from([F32, F64]))
def test_a_power_of_two_in_the_right_hand_side_comes_out_bitwise(seed, n, log_kappa, k, dtype):
    matrix, rhs = system(seed, n, log_kappa, dtype)
    for solver in (CG(), CG(maxiter=3), NormalCG(), Exact(), CG(rtol=1e-3, damping=0.1)):
        one = solver.solve(operator(matrix), rhs)
        other = solver.solve(operator(matrix), rhs * 2.0**k)
        assert torch.equal(one.x * 2.0**k, other.x)
        assert (one.status, one.iterations) == (other.status, other.iterations)
        assert torch.equal(one.x, solver.solve(operator(matrix), rhs).x)


@given(SEEDS, SIZES, LOG_KAPPAS, st.sampled_from([-300, -40, 40, 300]))
def test_a_power_of_two_in_the_matrix_comes_out_bitwise(seed, n, log_kappa, k):
    matrix, rhs = system(seed, n, log_kappa)
    for solver in (CG(), CG(maxiter=3), CG(maxiter=500)):
        one = solver.solve(operator(matrix), rhs)
        other = solver.solve(operator(matrix * 2.0**k), rhs)
        assert torch.equal(one.x, other.x * 2.0**k)
        assert (one.status, one.iterations) == (other.status, other.iterations)


@pytest.mark.parametrize("solver", [CG(), CG(maxiter=0), CG(maxiter=3), NormalCG(), Exact()])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_special_right_hand_sides(solver, dtype):
    matrix, rhs = system(1, 5, 1.0, dtype)
    counting = Counting(matrix)
    zero = solver.solve(counting.operator, torch.zeros_like(rhs))
    assert zero.status == Status.ZERO_RHS and zero.x.count_nonzero() == zero.iterations == 0
    empty = solver.solve(counting.operator, rhs[:0])
    assert empty.status == Status.ZERO_RHS and empty.x.shape == (0,) and empty.residual == 0.0
    for value in (math.nan, math.inf, -math.inf):
        spoilt = rhs.clone()
        spoilt[2] = value
        solution = solver.solve(counting.operator, spoilt)
        assert solution.status == Status.NONFINITE_RHS and bool(solution.x.isnan().all())
        assert not solution.status.ok
    assert counting.products == 0


@pytest.mark.parametrize(
    "solver",
    [
        CG(),
        CG(maxiter=3),
        NormalCG(),
        NormalCG(maxiter=3),
        ig.MINRES(),
        ig.MINRES(maxiter=3),
        ig.Neumann(),
        ig.Neumann(scale=0.1),
        Exact(),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_operators_that_are_not_finite(solver, value):
    matrix, rhs = system(1, 5, 1.0)
    matrix[3, 2] = matrix[2, 3] = value
    solution = solver.solve(operator(matrix), rhs)
    assert solution.status == Status.NONFINITE_OPERATOR and bool(solution.x.isnan().all())


def test_normal_equations_that_underflow_are_called_singular():
    tiny, rhs = 1e-100 * torch.eye(3, dtype=F64), torch.ones(3, dtype=F64)  # ‖M Mᵀrhs‖² = 0
    assert NormalCG().solve(operator(tiny), rhs).status == Status.SINGULAR
    assert CG().solve(operator(tiny), rhs).status == Status.CONVERGED


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_one_unknown(dtype, size):
    matrix, rhs = torch.full((1, 1), 4.0, dtype=dtype), torch.full((1,), size, dtype=dtype)
    for solver in (CG(), NormalCG(), Exact()):
        solution = solver.solve(operator(matrix), rhs)
        assert torch.equal(solution.x, rhs / 4) and solution.status.ok and solution.iterations == 1


@pytest.mark.parametrize(
    ("dtype", "size", "least"),
    [(F32, 1e-42, 0.25), (F32, 3e38, 2.0), (F64, 1e-310, 0.25), (F64, 1.7e308, 2.0)],
)
@pytest.mark.parametrize("solver", [CG(), NormalCG(), ig.MINRES(), Exact()], ids=repr)
def test_right_hand_sides_at_the_ends_of_the_range(solver, dtype, size, least):
    """Nothing over- or underflows on the way, though squares of such numbers would."""
    eigenvalues = least * torch.tensor([1.0, 1.5, 2.0], dtype=dtype)
    rhs = size * torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
    solution = solver.solve(operator(torch.diag(eigenvalues)), rhs)
    assert solution.status in (Status.CONVERGED, Status.EXACT)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(solution.x, rhs / eigenvalues, rtol=1e-4, atol=2 * smallest)


def test_a_damped_operator_is_damped_in_all_its_products():
    matrix, x = system(3, 4, 1.0)
    skewed = operator(matrix.triu())
    damped = dataclasses.replace(skewed, convex=skewed.matvec).damped(0.5)
    torch.testing.assert_close(damped.matvec(x), matrix.triu() @ x + x / 2)
    torch.testing.assert_close(damped.rmatvec(x), matrix.triu().T @ x + x / 2)
    torch.testing.assert_close(damped.convex(x), damped.matvec(x))


def test_a_budget_is_kept():
    matrix, rhs = system(3, 20, 3.0)
    for budget in range(1, 8):
        counting = Counting(matrix)
        solution = CG(maxiter=budget).solve(counting.operator, rhs, verify=False)
        assert counting.products == solution.iterations == budget
        assert solution.status == Status.TRUNCATED


def test_damping_shifts_the_operator():
    matrix, rhs = system(3, 20, 2.0)
    found = CG(rtol=1e-13, damping=0.3).solve(operator(matrix), rhs).x
    shifted = matrix + 0.3 * torch.eye(20, dtype=F64)
    assert relative(found, torch.linalg.solve(shifted, rhs)) < 1e-11


@given(SEEDS, SIZES, st.floats(0, 2))
def test_a_scale_changes_the_path_and_not_the_solution(seed, n, log_kappa):
    matrix, rhs = system(seed, n, log_kappa)
    scale = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = CG(rtol=1e-13).solve(operator(matrix + torch.diag(scale), scale), rhs).x
    exact = torch.linalg.solve(matrix + torch.diag(scale), rhs)
    assert relative(found, exact) < 1e-12 * 10**log_kappa


# ---------------------------------------------------------------- negative curvature


@pytest.mark.parametrize("dtype", [F64, F32])
def test_negative_curvature_is_found_and_the_answer_descends(dtype):
    n, found = 60, 0
    for seed in range(100):
        random = torch.Generator().manual_seed(seed)
        eigenvalues = torch.rand(n, dtype=F64, generator=random) * 3 + 0.1
        negative = 1 + seed % 5
        eigenvalues[:negative] = -0.05 - torch.rand(negative, dtype=F64, generator=random)
        matrix = symmetric(eigenvalues, random).to(dtype)
        rhs = torch.randn(n, dtype=dtype, generator=random)
        solution = CG().solve(operator(matrix), rhs)
        found += solution.status == Status.NEGATIVE_CURVATURE
        assert solution.iterations <= n + 20
        assert solution.extremes is not None and solution.extremes[0] < 0
        assert float(rhs.double() @ solution.x.double()) > 0
        greatest = max(map(abs, EarlyStopped(time=1.0).solve(operator(matrix), rhs).extremes))
        stopped = EarlyStopped(time=200 / greatest).solve(operator(matrix), rhs)
        torch.testing.assert_close(solution.x, stopped.x, rtol=1e-3, atol=1e-3)
    assert found == 100


@pytest.mark.parametrize("curvature", [0.0, -1e-12, -1.0, -1e12])
@pytest.mark.parametrize("scale", [None, 0.3, torch.full((7,), 0.3, dtype=F64)])
def test_a_first_direction_without_curvature(curvature, scale):
    """The first-order answer; without a unit, 1/|h|, or where there is no curvature at all, 1."""
    rhs = torch.randn(7, dtype=F64, generator=torch.Generator().manual_seed(0))
    solution = CG().solve(operator(curvature * torch.eye(7, dtype=F64), scale), rhs)
    assert solution.status == Status.NEGATIVE_CURVATURE
    assert solution.iterations == (2 if scale is None else 1)
    expected = rhs / (abs(curvature) or 1.0) if scale is None else rhs / 0.3
    torch.testing.assert_close(solution.x, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("curvature", [0.0, -1e-12, -1.0])
def test_a_later_direction_without_curvature_keeps_the_iterate(curvature, scale):
    matrix = torch.diag(torch.tensor([2.0, curvature], dtype=F64))
    rhs = torch.tensor([1.0, 0.25], dtype=F64)
    before = CG(maxiter=1).solve(operator(matrix, scale), rhs)
    solution = CG().solve(operator(matrix, scale), rhs)
    assert solution.status == Status.NEGATIVE_CURVATURE and solution.iterations == 2
    assert before.status == Status.TRUNCATED
    length = min(1.0, float(rhs.norm() / scale / before.x.norm()))
    torch.testing.assert_close(solution.x, before.x * length, rtol=1e-14, atol=0)


@pytest.mark.parametrize("c", [2.0**-40, 1.0, 2.0**30])
@pytest.mark.parametrize("curvature", [0.0, -1e-12, -1.0])
def test_a_later_direction_without_curvature_has_the_time_of_a_training(curvature, c):
    """Without a unit: 1/h where training has settled, 200 over the greatest curvature where not."""
    matrix = c * torch.diag(torch.tensor([2.0, curvature], dtype=F64))
    rhs = torch.tensor([1.0, 0.25], dtype=F64)
    solution = CG().solve(operator(matrix), rhs)
    assert solution.status == Status.NEGATIVE_CURVATURE and solution.iterations == 4
    flat = 1.0 if curvature == -1.0 else 100.0
    expected = torch.tensor([0.5, 0.25 * flat], dtype=F64) / c
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=0)
    assert solution.substitute == "early_stopped" and solution.filter_error < 1e-9


def test_a_training_that_is_known_takes_the_place_of_a_guess():
    matrix = torch.diag(torch.tensor([2.0, 0.1, -1.0], dtype=F64))
    rhs = torch.ones(3, dtype=F64)
    training = EarlyStopped(steps=9, lr=0.3)
    known = dataclasses.replace(operator(matrix), training=lambda: training.weigh)
    torch.testing.assert_close(CG().solve(known, rhs).x, training.solve(known, rhs).x)
    unknown = dataclasses.replace(known, training=lambda: None)
    torch.testing.assert_close(CG().solve(unknown, rhs).x, CG().solve(operator(matrix), rhs).x)


@pytest.mark.parametrize("c", [2.0**-40, 1.0, 2.0**30])
@pytest.mark.parametrize("longest, times", [(30.0, 60.0), (1e3, 200.0), (0.01, 1.0), (0.0, 1.0)])
def test_a_training_is_no_longer_than_phi_and_its_slope_let_it_be(longest, times, c):
    """Both have a say: what φ and F allow, and 1 to 200 over the greatest curvature."""
    matrix = c * torch.diag(torch.tensor([2.0, 0.01, -0.1], dtype=F64))
    rhs = torch.ones(3, dtype=F64)
    given = dataclasses.replace(operator(matrix), spans=lambda rows: [Times(longest / c)] * rows)
    expected = EarlyStopped(time=times / (2.0 * c)).solve(given, rhs)
    torch.testing.assert_close(CG().solve(given, rhs).x, expected.x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("maxiter", [2, 3, 5])
def test_a_budget_is_that_of_the_second_attempt_too(maxiter):
    values = torch.linspace(-1.0, 5.0, 40, dtype=F64)
    random = torch.Generator().manual_seed(0)
    matrix = symmetric(values, random)
    rhs = matrix @ torch.randn(40, dtype=F64, generator=random)
    start = torch.linalg.eigh(matrix)[1][:, 0]
    solution = CG(maxiter=maxiter).solve(operator(matrix), start + rhs / 100)
    assert solution.status == Status.NEGATIVE_CURVATURE
    assert maxiter < solution.iterations <= 2 * maxiter


def textbook(matrix: Tensor, rhs: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients as in the textbook, without any safeguard."""
    x, r, p = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
    rr = float(torch.dot(r, r))
    for _ in range(iterations):
        product = matrix @ p
        alpha = rr / float(torch.dot(p, product))
        x.add_(p, alpha=alpha)
        r.sub_(product, alpha=alpha)
        rr, before = float(torch.dot(r, r)), rr
        p.mul_(rr / before).add_(r)
    return x


@pytest.mark.parametrize("dtype", [F64, F32])
def test_on_semidefinite_systems_the_safeguard_changes_no_bit(dtype):
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        factor = torch.randn(20, 30, dtype=dtype, generator=random)
        matrix = factor.T @ factor  # 30 × 30 of rank 20
        rhs = matrix @ torch.randn(30, dtype=dtype, generator=random)
        rhs /= 2.0 ** math.frexp(float(rhs.abs().max()))[1]
        for budget in (1, 5, 12):
            solution = CG(maxiter=budget).solve(operator(matrix), rhs)
            assert solution.status == Status.TRUNCATED
            plain = textbook(matrix, rhs, budget)
            assert (solution.x - plain).norm() <= 1e4 * torch.finfo(dtype).eps * plain.norm()
        assert CG(rtol=1e-3).solve(operator(matrix), rhs).status == Status.CONVERGED
        assert CG().solve(operator(matrix), rhs).status != Status.NEGATIVE_CURVATURE


# ---------------------------------------------------------------- what is reported is true


@pytest.mark.parametrize("dtype", [F64, F32])
def test_converged_means_a_small_true_residual(dtype):
    statuses = []
    for seed in range(0, 400, 5):
        matrix, rhs = system(seed, 5 + seed % 39, 8 * seed / 400, dtype)
        for rtol in (None, 1e-3, 1e-6, 1e-12):
            solution = CG(rtol=rtol).solve(operator(matrix), rhs)
            statuses.append(solution.status)
            eps = torch.finfo(dtype).eps
            promised = eps ** (2 / 3) if rtol is None else max(rtol, 10 * eps)
            residual = rhs - matrix @ solution.x
            true = float(residual.double().norm() / rhs.double().norm())
            assert math.isclose(solution.residual, true, rel_tol=1e-3, abs_tol=eps)
            assert solution.status != Status.CONVERGED or true <= 2 * promised * (1 + 1e-6)
            assert solution.status in (Status.CONVERGED, Status.STAGNATED, Status.MAX_ITER) or (
                dtype == F32 and solution.status == Status.NEGATIVE_CURVATURE
            )
    assert statuses.count(Status.CONVERGED) >= 0.3 * len(statuses)


def convex_problem(seed: int, log_kappa: float, rtol: float):
    """One backward of a quadratic with least eigenvalue μ: its report, error and spectrum.

    Errors below the rounding error of the dense reference count as 0.
    """
    mu = 10 ** ((seed % 7) / 2 - 2)
    matrix, b = system(seed, 10 + seed % 30, log_kappa)
    matrix = matrix * mu
    condition = ig.argmin(lambda w, b: w @ matrix @ w / 2 - b @ w, strong_convexity=mu * (1 - 1e-9))
    monitor, b = ig.Monitor(), b.requires_grad_()
    solver = ig.CG(rtol=rtol)
    solve = ig.implicit(
        lambda b: torch.linalg.solve(matrix, b), condition, linear_solver=solver, monitor=monitor
    )
    v = torch.randn(len(b), dtype=F64, generator=torch.Generator().manual_seed(seed + 1))
    (gradient,) = torch.autograd.grad(solve(b), b, v)
    error = error_beyond_rounding(gradient, matrix, v)
    return monitor.last, error, torch.linalg.eigvalsh(matrix)


def error_beyond_rounding(x: Tensor, matrix: Tensor, rhs: Tensor) -> float:
    """‖x − matrix⁻¹ rhs‖, less what float64 can tell about it."""
    exact = torch.linalg.solve(matrix, rhs)
    rounding = torch.finfo(F64).eps * float(torch.linalg.cond(matrix) * exact.norm())
    return max(0.0, float((x - exact).norm()) - rounding)


def test_the_error_bound_holds_and_is_tight():
    ratios = []
    for seed in range(200):
        rtol = 10 ** -(1.0 + seed % 8)
        report, error, _ = convex_problem(seed, 0.5 + 3 * (seed % 11) / 11, rtol)
        assert report.status == Status.CONVERGED
        assert report.solve_error_bound is not None
        assert report.solve_error_bound >= error
        if error > 1e-13:
            ratios.append(report.solve_error_bound / error)
    assert len(ratios) > 150
    assert statistics.median(ratios) <= 2.5


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("lam", [0.05, 1.0, 20.0])
def test_bound_and_ritz_values_are_in_the_units_of_the_proximal_term(lam, per_element):
    ratios = []
    for seed in range(40):
        matrix, theta = system(seed, 15, 1.5)
        matrix = lam * (matrix - (1 - 1e-6) * torch.eye(15))  # convex, and hardly more
        weights = torch.tensor(lam, dtype=F64)
        if per_element:
            weights = lam * (1 + torch.linspace(0, 1, 15, dtype=F64))
        root = weights.sqrt().expand(15)
        eigenvalues = torch.linalg.eigvalsh(torch.eye(15) + matrix / root[:, None] / root)
        shifted = torch.eye(15, dtype=F64) + matrix / weights.expand(15)[:, None]
        monitor, theta = ig.Monitor(), theta.requires_grad_()
        condition = ig.proximal(lambda w, m=matrix: w @ m @ w / 2, weights, convex=True)
        solve = ig.implicit(
            lambda theta, m=shifted: torch.linalg.solve(m, theta),
            condition,
            linear_solver=ig.CG(rtol=10.0 ** -(1 + seed % 6)),
            monitor=monitor,
        )
        v = torch.randn(15, dtype=F64, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad(solve(theta), theta, v)
        error, report = error_beyond_rounding(gradient, shifted.T, v), monitor.last
        assert report.solve_error_bound >= error
        ratios.append(report.solve_error_bound / max(error, 1e-13))
        assert float(eigenvalues[0]) * (1 - 1e-9) <= report.ritz_min
        assert report.ritz_max <= float(eigenvalues[-1]) * (1 + 1e-9)
        assert report.ritz_max >= 0.8 * float(eigenvalues[-1])
    assert statistics.median(ratios) <= 3.0


def test_reported_curvature_lies_within_the_spectrum():
    for seed in range(60):
        report, _, eigenvalues = convex_problem(seed, 2.0, 1e-10)
        least, greatest = float(eigenvalues[0]), float(eigenvalues[-1])
        slack = 1e-10 * greatest
        assert least - slack <= report.min_curvature <= greatest + slack
        assert least - slack <= report.ritz_min <= report.min_curvature + slack
        assert report.ritz_min <= report.ritz_max <= greatest + slack
        # After a run to convergence the extreme Ritz values are eigenvalues.
        assert report.ritz_min <= least * 1.05
        assert report.ritz_max >= greatest * 0.999


def test_ritz_values_are_those_of_the_krylov_space():
    matrix, v = system(5, 12, 2.0)
    steps = 5
    powers = [v]
    for _ in range(steps - 1):
        powers.append(matrix @ powers[-1] / powers[-1].norm())
    basis = torch.linalg.qr(torch.stack(powers, dim=1))[0]
    expected = torch.linalg.eigvalsh(basis.T @ matrix @ basis)
    monitor, b = ig.Monitor(), torch.zeros(12, dtype=F64, requires_grad=True)
    condition = ig.argmin(lambda w, b: w @ matrix @ w / 2 - b @ w)
    solver = ig.CG(maxiter=steps)
    solve = ig.implicit(torch.clone, condition, linear_solver=solver, monitor=monitor)
    torch.autograd.grad(solve(b), b, v)
    assert math.isclose(monitor.last.ritz_min, expected[0], rel_tol=1e-10)
    assert math.isclose(monitor.last.ritz_max, expected[-1], rel_tol=1e-10)


def test_the_outer_loss_error_is_first_order_right():
    matrix, b = system(5, 12, 1.0)
    exact, away = torch.linalg.solve(matrix, b), system(6, 12, 1.0)[1]
    condition = ig.argmin(lambda w, b: w @ matrix @ w / 2 - b @ w)
    errors = []
    for distance in (1e-3, 1e-4):
        monitor, phi = ig.Monitor(), exact + distance * away
        solve = ig.implicit(lambda b, phi=phi: phi, condition, monitor=monitor)
        outer = (solve(b.clone().requires_grad_()) ** 3).sum()
        outer.backward()
        change = float((exact**3).sum() - outer.detach())
        errors.append(abs(monitor.last.outer_loss_error - change))
        assert errors[-1] < 10 * distance * abs(change)
        residual = float((matrix @ (phi - exact)).norm())
        assert math.isclose(monitor.last.inner_residual, residual, rel_tol=1e-8)
    assert 90 < errors[0] / errors[1] < 110  # what is left is of second order
