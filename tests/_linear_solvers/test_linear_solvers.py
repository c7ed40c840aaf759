"""Every linear solver against dense algebra: what it must solve, and what it may say otherwise."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import pytest
import torch
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator
from implicit_grad._theorem.linearization import Linearization

F32, F64 = torch.float32, torch.float64
SIZES = (0, 1, 2, 7, 60, 200)
# dtype of the vectors, dtype of the matrix and its products, condition numbers
PRECISIONS = {
    "float64": (F64, F64, (1.0, 30.0, 1e3, 1e8)),
    "float32": (F32, F32, (1.0, 30.0, 1e3)),
    "bfloat16": (F32, torch.bfloat16, (1.0, 4.0)),
}


def spectrum(kind: str, n: int, kappa: float, random: torch.Generator) -> Tensor:
    """Sizes from 1 to kappa, with the signs and zeros of a kind of matrix."""
    values = kappa ** torch.rand(n, dtype=F64, generator=random)
    values[:1], values[-1:] = kappa, 1.0
    if kind == "indefinite":
        values[: n // 2] *= -1
    if kind in ("consistent", "inconsistent"):
        values[-max(1, n // 10) :] = 0.0
    return values


def orthogonal(n: int, random: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=random))[0]


def symmetric(values: Tensor, random: torch.Generator) -> Tensor:
    basis = orthogonal(len(values), random)
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def operator(matrix: Tensor, like: Tensor | None = None, **known) -> Operator:
    """A matrix as an operator on vectors like this one, products rounded to the matrix's dtype."""
    vectors = matrix.dtype if like is None else like.dtype

    def product(m: Tensor) -> Callable[[Tensor], Tensor]:
        if m.dtype == vectors:
            return lambda x: m @ x
        wide = m.to(vectors)
        return lambda x: (wide @ x).to(m.dtype).to(vectors)

    eps = torch.finfo(matrix.dtype).eps
    return Operator(product(matrix), product(matrix.T), eps=eps, **known)


@dataclass(frozen=True)
class System:
    matrix: Tensor  # as the operator has it
    rhs: Tensor

    @staticmethod
    def draw(kind: str, n: int, kappa: float, precision: str, seed: int) -> System:
        vectors, products, _ = PRECISIONS[precision]
        name = f"{kind} {n} {kappa} {precision} {seed}"
        random = torch.Generator().manual_seed(crc32(name.encode()))
        values = spectrum(kind, n, kappa, random)
        if kind == "nonsymmetric":
            matrix = orthogonal(n, random) @ torch.diag(values) @ orthogonal(n, random)
        elif precision == "bfloat16" and kind in ("consistent", "inconsistent"):
            matrix = torch.diag(values)  # rounding would take the singularity away
        else:
            matrix = symmetric(values, random)
        rhs = torch.randn(n, dtype=F64, generator=random)
        if kind == "consistent":
            rhs = matrix @ rhs
        return System(matrix.to(products), rhs.to(vectors))

    @property
    def operator(self) -> Operator:
        return operator(self.matrix, self.rhs)

    def residual(self, x: Tensor) -> float:
        rhs = self.rhs.double()
        return float((rhs - self.matrix.double() @ x.double()).norm() / rhs.norm())

    def error(self, x: Tensor) -> float:
        exact = torch.linalg.solve(self.matrix.double(), self.rhs.double())
        return float((x.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Row:
    """A solver (for a matrix), the condition numbers up to which it must solve each kind of
    system, and how it may end where it need not."""

    make: Callable[[System], LinearSolver]
    solves: dict[str, float]
    otherwise: set[Status]
    exact: bool = False
    kinds: set[str] = field(default_factory=lambda: set(KINDS))


KINDS = ("definite", "indefinite", "nonsymmetric", "consistent", "inconsistent")
SYMMETRIC = set(KINDS) - {"nonsymmetric"}
SLOW = {Status.MAX_ITER, Status.STAGNATED}
BREAKS = SLOW | {Status.NEGATIVE_CURVATURE, Status.SINGULAR}
DEFINITE = {"definite": 1e3, "consistent": 30.0}


def diagonal(system: System) -> Callable[[Tensor], Tensor]:
    sizes = system.matrix.diagonal().abs().to(system.rhs.dtype).clamp(min=1e-3)
    return lambda r: r / sizes


def warmed(system: System) -> LinearSolver:
    solver = ig.CG(warm_start=ig.WarmStart())
    if len(system.rhs):
        solver.solve(system.operator, system.rhs + 0.1 * system.rhs.flip(0))
    return solver


def reusing(system) -> ig.CG:
    """With what was built for a system close by."""
    kept = ig.Reuse(ig.Nystrom(rank=5))
    if len(system.rhs):
        known = system.operator
        near = dataclasses.replace(known, matvec=lambda x: known.matvec(x) + 0.01 * x)
        kept.build(near, system.rhs)
    return ig.CG(preconditioner=kept)


ROWS = {
    "CG": Row(lambda _: ig.CG(), DEFINITE, BREAKS, kinds=SYMMETRIC),
    "CG+Jacobi": Row(
        lambda _: ig.CG(preconditioner=ig.Jacobi()), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Jacobi(probes)": Row(
        lambda _: ig.CG(preconditioner=ig.Jacobi(probes=20)), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Nystrom": Row(
        lambda _: ig.CG(preconditioner=ig.Nystrom(rank=5)), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Cholesky": Row(
        lambda _: ig.CG(preconditioner=ig.Cholesky()), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+Reuse": Row(reusing, DEFINITE, BREAKS, kinds=SYMMETRIC),
    "CG+callable": Row(
        lambda s: ig.CG(preconditioner=diagonal(s)), DEFINITE, BREAKS, kinds=SYMMETRIC
    ),
    "CG+warm": Row(warmed, DEFINITE, BREAKS, kinds=SYMMETRIC),
    "CG->MINRES": Row(
        lambda _: ig.CG(on_negative_curvature="minres"),
        DEFINITE | {"indefinite": 30.0},
        SLOW | {Status.SINGULAR},
        kinds=SYMMETRIC,
    ),
    "MINRES": Row(
        lambda _: ig.MINRES(),
        {"definite": 30.0, "indefinite": 30.0, "consistent": 30.0},
        SLOW | {Status.SINGULAR},
        kinds=SYMMETRIC,
    ),
    "NormalCG": Row(
        lambda _: ig.NormalCG(),
        dict.fromkeys(KINDS[:4], 30.0),
        SLOW | {Status.SINGULAR},
    ),
    "Neumann": Row(
        lambda _: ig.Neumann(terms=1000),
        {"definite": 30.0, "consistent": 30.0},
        {Status.TRUNCATED, Status.DIVERGED, Status.SINGULAR},
    ),
    "Exact": Row(
        lambda _: ig.Exact(),
        dict.fromkeys(KINDS[:3], 1e8),
        {Status.SINGULAR},
        exact=True,
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ROWS)
def test_solved_as_promised_or_honest(name, precision):
    row, (_, products, kappas) = ROWS[name], PRECISIONS[precision]
    eps = torch.finfo(products).eps
    cases = [(k, n, c, s) for k in row.kinds for n in SIZES for c in kappas for s in range(2)]
    for kind, n, kappa, seed in cases:
        system = System.draw(kind, n, kappa, precision, seed)
        where = (name, kind, n, kappa, precision, seed)
        solution = row.make(system).solve(system.operator, system.rhs)
        status, x = solution.status, solution.x
        assert x.shape == system.rhs.shape and x.dtype == system.rhs.dtype, where
        if n == 0 or not system.rhs.any():
            assert status == Status.ZERO_RHS and not x.any(), where
            continue
        assert bool(torch.isfinite(x).all()) or status == Status.SINGULAR, where
        done = status in (Status.CONVERGED, Status.EXACT)
        assert done or status in row.otherwise, (*where, status, solution.residual)
        assert done or not kappa <= row.solves.get(kind, 0.0), (*where, status, solution.residual)
        if bool(torch.isfinite(x).all()):
            true = system.residual(x)
            slack = 4 * eps * (1 + kappa * float(x.norm() / system.rhs.norm()))
            assert math.isclose(solution.residual, true, rel_tol=1e-2, abs_tol=slack), where
        if not done:
            continue
        if row.exact:
            assert status == Status.EXACT and kind not in ("consistent", "inconsistent"), where
            assert system.error(x) <= 4 * n * torch.finfo(x.dtype).eps * kappa, where
            continue
        promised = 2 * eps ** (2 / 3)
        assert true <= promised + slack, (*where, true)
        if kind not in ("consistent", "inconsistent"):
            assert system.error(x) <= 1.5 * kappa * (promised + slack), where


def test_how_many_systems():
    count = sum(
        len(row.kinds) * len(SIZES) * len(kappas) * 2
        for row in ROWS.values()
        for *_, kappas in PRECISIONS.values()
    )
    assert count >= 1_000


# ---------------------------------------------------------------- preconditioners


def low_rank_plus_identity(seed: int, n: int = 200, rank: int = 8) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.ones(n, dtype=F64)
    values[:rank] += 10 ** (1 + 3 * torch.rand(rank, dtype=F64, generator=random))
    values[rank:] += torch.rand(n - rank, dtype=F64, generator=random) * 0.1
    return symmetric(values, random), torch.randn(n, dtype=F64, generator=random)


@pytest.mark.parametrize("scale", [None, 1.0, "elements"])
def test_nystrom_takes_fewer_iterations_where_few_eigenvalues_are_large(scale):
    iterations = {"plain": 0, "nystrom": 0}
    solvers = {"plain": ig.CG(), "nystrom": ig.CG(preconditioner=ig.Nystrom(rank=12))}
    for seed in range(10):
        matrix, rhs = low_rank_plus_identity(seed)
        unit = scale
        if scale == "elements":
            unit = torch.linspace(0.5, 200.0, len(rhs), dtype=F64)
            matrix = matrix * unit.sqrt() * unit.sqrt()[:, None]
        exact = torch.linalg.solve(matrix, rhs)
        for name, solver in solvers.items():
            solution = solver.solve(operator(matrix, scale=unit), rhs)
            assert solution.status == Status.CONVERGED
            torch.testing.assert_close(solution.x, exact, rtol=1e-6, atol=1e-8)
            iterations[name] += solution.iterations
        assert solution.coefficients == ()  # they would be read as A's
    # without a scale, what the sketch sees of the bulk is a poor guess at its size
    assert iterations["nystrom"] <= (0.85 if scale is None else 0.35) * iterations["plain"]


def test_nystrom_of_full_rank_is_the_inverse():
    for scale in (None, 0.7, torch.linspace(0.5, 2.0, 12, dtype=F64)):
        random = torch.Generator().manual_seed(3)
        matrix = symmetric(torch.linspace(3.0, 40.0, 12, dtype=F64), random)
        rhs = torch.randn(12, dtype=F64, generator=random)
        known = operator(matrix, scale=scale)
        approximate = ig.Nystrom(rank=50).build(known, rhs)
        if scale is None:  # all is shifted by the least eigenvalue
            matrix = matrix + 3.0 * torch.eye(12, dtype=F64)
        torch.testing.assert_close(approximate(rhs), torch.linalg.solve(matrix, rhs))


def test_cholesky_is_the_inverse_and_of_an_indefinite_matrix_that_of_its_size():
    random = torch.Generator().manual_seed(3)
    values = torch.linspace(3.0, 40.0, 12, dtype=F64)
    rhs = torch.randn(12, dtype=F64, generator=random)
    matrix = symmetric(values, random)
    found = ig.CG(preconditioner=ig.Cholesky(), rtol=1e-10).solve(operator(matrix), rhs)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs))
    assert found.iterations == 1
    values, vectors = torch.linalg.eigh(matrix - 20 * torch.eye(12, dtype=F64))
    size = vectors * values.abs() @ vectors.mT
    approximate = ig.Cholesky().build(operator(matrix - 20 * torch.eye(12, dtype=F64)), rhs)
    torch.testing.assert_close(approximate(rhs), torch.linalg.solve(size, rhs))
    zero = ig.Cholesky().build(operator(torch.zeros(12, 12, dtype=F64)), rhs)(rhs)
    assert torch.isfinite(zero).all()


def test_reuse_builds_anew_after_some_solves_and_for_another_form():
    matrix, rhs = low_rank_plus_identity(0, 30)
    kept, products = ig.Reuse(ig.Nystrom(rank=4), solves=3), []

    def counted(x: Tensor) -> Tensor:
        products.append(x)
        return matrix @ x

    known = dataclasses.replace(operator(matrix), matvec=counted)
    for solve in range(7):
        before = len(products)
        kept.build(known, rhs)
        assert len(products) - before == (5 if solve % 3 == 0 else 0)  # 1 is to see if it is finite
    other = operator(torch.eye(5, dtype=F64))
    assert kept.build(other, rhs[:5])(rhs[:5]).shape == (5,)
    with pytest.raises(ig.InvalidArgumentError, match="its max_size is 5"):
        ig.Reuse(ig.Cholesky(max_size=5)).build(known, rhs)
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert repr(twin) == repr(kept)
        before = len(products)
        twin.build(known, rhs)
        assert len(products) - before == 5  # it has kept nothing


@pytest.mark.parametrize("preconditioner", [ig.Jacobi(), ig.Cholesky()])
def test_what_a_bad_product_made_is_not_kept(preconditioner):
    matrix, rhs = low_rank_plus_identity(0, 30)
    solver = ig.CG(rtol=1e-10, preconditioner=ig.Reuse(preconditioner))
    bad = solver.solve(operator(matrix * math.nan), rhs)
    assert not bad.status.ok
    good = solver.solve(operator(matrix), rhs)
    assert good.status == Status.CONVERGED
    torch.testing.assert_close(good.x, torch.linalg.solve(matrix, rhs))
    if isinstance(preconditioner, ig.Cholesky):
        assert good.iterations == 1


@pytest.mark.timeout(60)
def test_nested_layers_may_share_what_is_reused():
    """The outer system's products solve systems of the inner layer's, by the same solver."""
    torch.manual_seed(0)
    C = torch.randn(3, 2, dtype=F64)

    def gradient(preconditioner) -> Tensor:
        solver = ig.CG(rtol=1e-12, preconditioner=preconditioner)
        newton = ig.solvers.NewtonCG(maxiter=30, cg=10, tol=1e-12)
        below = ig.proximal(lambda w, a: (w - C @ a).cosh().sum(), lam=1.0)
        inner = ig.implicit(newton, below, linear_solver=solver)
        start = torch.zeros(3, dtype=F64)
        above = ig.proximal(lambda a: inner(start, a).square().sum(), lam=1.0)
        descent = ig.solvers.GradientDescent(lr=0.05, steps=200)
        outer = ig.implicit(descent, above, linear_solver=solver, on_failure="ignore")
        theta = torch.ones(2, dtype=F64, requires_grad=True)
        return torch.autograd.grad(outer(theta).sum(), theta)[0]

    torch.testing.assert_close(gradient(ig.Reuse(ig.Cholesky())), gradient(None))


@pytest.mark.parametrize("preconditioner", [ig.Cholesky(), ig.Nystrom(rank=8)])
def test_what_is_reused_saves_products_and_keeps_no_graph(preconditioner):
    torch.manual_seed(0)
    X = torch.randn(40, 20, dtype=F64) * torch.logspace(0, -2, 20, dtype=F64)
    theta = torch.randn(20, dtype=F64, requires_grad=True)

    def loss(phi: Tensor) -> Tensor:
        return torch.nn.functional.softplus(X @ phi).mean()

    monitors, gradients = {}, {}
    for name, given in (("anew", preconditioner), ("kept", ig.Reuse(preconditioner))):
        monitors[name], gradients[name] = ig.Monitor(), []
        solve = ig.implicit(
            ig.solvers.NewtonCG(maxiter=40, cg=20, tol=1e-12),
            ig.proximal(loss, lam=1e-3),
            linear_solver=ig.CG(rtol=1e-9, preconditioner=given),
            monitor=monitors[name],
        )
        for step in range(5):
            moved = (theta + 0.02 * step).detach().requires_grad_()
            phi = solve(moved)
            gradients[name].append(torch.autograd.grad(phi.sin().sum(), moved)[0])
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    anew, kept = (sum(r.products for r in m.reports) for m in monitors.values())
    assert kept < 0.75 * anew
    del phi, moved
    gc.collect()
    assert not any(issubclass(type(thing), Linearization) for thing in gc.get_objects())


@pytest.mark.parametrize("seed", range(10))
def test_jacobi_takes_fewer_iterations_on_bad_scaling(seed):
    random = torch.Generator().manual_seed(seed)
    units = 10 ** (3 * torch.rand(100, dtype=F64, generator=random))
    well = symmetric(1 + torch.rand(100, dtype=F64, generator=random), random)
    matrix = well * units * units[:, None]
    rhs = torch.randn(100, dtype=F64, generator=random)
    plain = ig.CG(rtol=1e-6).solve(operator(matrix), rhs)
    for jacobi, part in ((ig.Jacobi(), 0.05), (ig.Jacobi(probes=30), 0.2)):
        found = ig.CG(rtol=1e-6, preconditioner=jacobi).solve(operator(matrix), rhs)
        assert found.status == Status.CONVERGED
        assert found.iterations <= part * plain.iterations


def test_jacobi_divides_by_the_diagonal_and_stays_positive():
    matrix = torch.tensor([[4.0, 1.0, 0.0], [1.0, -2.0, 3.0], [0.0, 3.0, 0.5]], dtype=F64)
    rhs = torch.tensor([8.0, 1.0, 1.0], dtype=F64)
    exact = ig.Jacobi().build(operator(matrix), rhs)(rhs)
    assert exact[0] == 2.0 and exact[2] == 2.0 and exact[1] > 1e10
    held = ig.Jacobi().build(operator(matrix, scale=1.0), rhs)(rhs)
    assert held.tolist() == [2.0, 1.0, 1.0]
    wide = symmetric(torch.linspace(1.0, 3.0, 40, dtype=F64), torch.Generator().manual_seed(0))
    ones = torch.ones(40, dtype=F64)
    errors = [
        (1 / ig.Jacobi(probes=k).build(operator(wide), ones)(ones) - wide.diagonal()).norm()
        for k in (10, 1000)
    ]
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.05 * wide.diagonal().norm()


@pytest.mark.parametrize("jacobi", [ig.Jacobi(probes=3), ig.Nystrom(rank=3)])
def test_sketches_leave_the_users_random_numbers_alone(jacobi):
    matrix, rhs = low_rank_plus_identity(0, 30)
    before = torch.get_rng_state()
    solver = ig.CG(preconditioner=jacobi)
    first = solver.solve(operator(matrix), rhs).x
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, solver.solve(operator(matrix), rhs).x)
    other = ig.CG(preconditioner=type(jacobi)(**(vars(jacobi) | {"seed": 1})))
    assert not torch.equal(first, other.solve(operator(matrix), rhs).x)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda r: -r, "first order"),
        (lambda r: r * math.nan, "first order"),
        (lambda r: r * 0, "first order"),
        (lambda r: r * float(r.abs().max() > 0.4), "an iterate"),
        (lambda r: r if float(r.abs().max()) > 0.4 else -r, "an iterate"),
    ],
)
def test_a_preconditioner_that_is_not_positive_definite_is_reported(function, x):
    matrix, rhs = low_rank_plus_identity(0, 30)
    rhs = rhs / rhs.abs().max() / 1.1
    solution = ig.CG(preconditioner=function).solve(operator(matrix, scale=0.5), rhs)
    assert solution.status == Status.BAD_PRECONDITIONER and not solution.status.ok
    assert bool(torch.isfinite(solution.x).all()) and float(solution.x @ rhs) > 0
    assert torch.equal(solution.x, rhs / 0.5) == (x == "first order")


@pytest.mark.parametrize("function", [lambda r: r[:-1], lambda r: r.float(), lambda r: r.tolist()])
def test_a_preconditioners_form_is_checked(function):
    matrix, rhs = low_rank_plus_identity(0, 30)
    with pytest.raises(ig.InvalidArgumentError, match=r"of shape \(30,\) it returned a"):
        ig.CG(preconditioner=function).solve(operator(matrix), rhs)


# ---------------------------------------------------------------- warm starts


class Counting:
    """A matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.products, self._matrix = 0, matrix
        self.operator = Operator(self.product, self.product)

    def product(self, x: Tensor) -> Tensor:
        self.products += 1
        return self._matrix @ x


def changing(step: int, task: int = 0) -> tuple[Tensor, Tensor]:
    """Systems that change by about a thousandth from step to step."""
    random = torch.Generator().manual_seed(task)
    matrix = symmetric(torch.logspace(0, 2, 50, dtype=F64), random)
    drift = symmetric(torch.rand(50, dtype=F64, generator=random), random)
    rhs = torch.randn(50, dtype=F64, generator=random)
    return matrix + 1e-3 * step * drift, rhs + 1e-3 * step * rhs.flip(0)


def test_a_warm_start_takes_fewer_products_for_the_same_answer():
    cold, warm = ig.CG(rtol=1e-6), ig.CG(rtol=1e-6, warm_start=ig.WarmStart())
    products = {cold: 0, warm: 0}
    for step in range(10):
        matrix, rhs = changing(step)
        for solver in products:
            counting = Counting(matrix)
            solution = solver.solve(counting.operator, rhs * 2.0**40)
            if step:
                products[solver] += counting.products
            assert counting.products == solution.iterations + 1  # the residual, recomputed
            assert solution.status == Status.CONVERGED
            exact = torch.linalg.solve(matrix, rhs) * 2.0**40
            assert float((solution.x - exact).norm() / exact.norm()) < 2e-6 * 100
    assert products[warm] <= 0.8 * products[cold]


def test_a_second_solve_of_the_same_system_takes_two_products():
    matrix, rhs = changing(0)
    solver = ig.CG(rtol=1e-6, warm_start=ig.WarmStart())
    first = solver.solve(Counting(matrix).operator, rhs)
    counting = Counting(matrix)
    second = solver.solve(counting.operator, rhs)
    assert counting.products == 2 and second.iterations == 1
    assert torch.equal(first.x, second.x) and second.status == Status.CONVERGED


@pytest.mark.parametrize(
    "spoilt", ["shape", "dtype", "farther than 0", "hardly farther than 0", "nan"]
)
def test_a_start_that_does_not_help_is_not_used(spoilt):
    matrix, rhs = changing(0)
    store = ig.WarmStart()
    x = {
        "shape": rhs[:-1],
        "dtype": rhs.float(),
        "farther than 0": -torch.linalg.solve(matrix, rhs),
        "hardly farther than 0": -torch.linalg.solve(matrix, rhs) / 1e4,
        "nan": rhs * math.nan,
    }[spoilt]
    store.slot().put(x)
    cold = ig.CG(rtol=1e-6).solve(operator(matrix), rhs)
    found = ig.CG(rtol=1e-6, warm_start=store).solve(operator(matrix), rhs)
    assert torch.equal(found.x, cold.x)
    assert found.iterations == cold.iterations + (spoilt not in ("shape", "dtype"))


def test_a_budget_holds_for_warm_starts_too():
    matrix, rhs = changing(0)
    solver = ig.CG(maxiter=4, warm_start=ig.WarmStart())
    residuals = []
    for _ in range(6):
        counting = Counting(matrix)
        solution = solver.solve(counting.operator, rhs)
        assert counting.products == 5 and solution.iterations == 4
        residuals.append(solution.residual)
    assert residuals[-1] < 0.25 * residuals[0]
    one = ig.CG(maxiter=1, warm_start=ig.WarmStart())
    one.solve(operator(matrix), rhs)  # its start would take the only product there is
    cold = ig.CG(maxiter=1).solve(operator(matrix), rhs.flip(0))
    assert torch.equal(one.solve(operator(matrix), rhs.flip(0)).x, cold.x)


def test_two_products_are_enough_for_a_start_and_a_step():
    matrix, rhs = changing(0)
    two = ig.CG(maxiter=2, warm_start=ig.WarmStart())
    cold = two.solve(operator(matrix), rhs)
    warm = two.solve(operator(matrix), rhs)
    assert cold.iterations == warm.iterations == 2 and warm.residual < cold.residual


def test_failed_solves_are_not_kept():
    store = ig.WarmStart()
    solver = ig.CG(rtol=1e-6, warm_start=store)
    solver.solve(operator(-torch.eye(3, dtype=F64)), torch.ones(3, dtype=F64))
    assert len(store) == 0
    solver.solve(operator(torch.eye(3, dtype=F64)), torch.ones(3, dtype=F64))
    assert len(store) == 1
    store.clear()
    assert len(store) == 0


def test_after_negative_curvature_a_warm_start_is_forgotten():
    found = 0
    for seed in range(50):
        random = torch.Generator().manual_seed(seed)
        matrix = symmetric(torch.linspace(0.5, 3.0, 30, dtype=F64), random)
        rhs = torch.randn(30, dtype=F64, generator=random)
        solver = ig.CG(warm_start=ig.WarmStart())
        solver.solve(operator(matrix), rhs)
        vector = orthogonal(30, random)[0]
        bent = matrix - 3.5 * vector[:, None] * vector
        cold, warm = ig.CG().solve(operator(bent), rhs), solver.solve(operator(bent), rhs)
        assert torch.equal(warm.x, cold.x) and warm.status == cold.status
        assert warm.status == Status.NEGATIVE_CURVATURE and float(warm.x @ rhs) > 0
        assert warm.x.norm() <= rhs.norm() * (1 + 1e-12)
        found += warm.iterations > cold.iterations + 1
    assert found > 40  # the warm runs were under way when they met it


def test_keys_are_kept_apart_and_go_with_the_call():
    store = ig.WarmStart()
    solver = ig.CG(rtol=1e-6, warm_start=store)
    bound = {}
    for key in ("a", "b"):
        with store.at(key):
            bound[key] = solver.for_call()
            assert store.slot().key == key
            with store.at("inner"):
                assert store.slot().key == "inner"
            assert store.slot().key == key
    assert store.slot().key is None
    assert solver.for_call() != solver and ig.CG().for_call() == ig.CG()
    for round_ in range(2):
        for task, key in enumerate(("a", "b")):
            matrix, rhs = changing(0, task)
            solution = bound[key].solve(operator(matrix), rhs)
            assert (solution.iterations == 1) == (round_ == 1)
    assert len(store) == 2


def test_threads_have_keys_of_their_own():
    store = ig.WarmStart()
    solver = ig.CG(rtol=1e-6, warm_start=store)
    barrier, wrong = threading.Barrier(4), []

    def work(task: int) -> None:
        with store.at(task):
            barrier.wait()
            bound = solver.for_call()
            for round_ in range(5):
                solution = bound.solve(operator(changing(0, task)[0]), changing(0, task)[1])
                if (solution.iterations == 1) != (round_ > 0):
                    wrong.append((task, round_, solution.iterations))

    threads = [threading.Thread(target=work, args=(task,)) for task in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(store) == 4


def test_the_backward_pass_finds_the_key_of_its_forward_call():
    store = ig.WarmStart()
    matrix, rhs = changing(0)
    condition = ig.argmin(lambda w, b: w @ matrix @ w / 2 - b @ w)
    solve = ig.implicit(
        lambda b: torch.linalg.solve(matrix, b),
        condition,
        linear_solver=ig.CG(rtol=1e-6, warm_start=store),
    )
    b = rhs.clone().requires_grad_()
    with store.at("first"):
        one = solve(b)
    with store.at("second"):
        two = solve(b)
    (one.square().sum() + two.sum()).backward()
    for key, v in (("first", 2 * one), ("second", torch.ones_like(two))):
        with store.at(key):
            kept = store.slot().get(rhs)
        torch.testing.assert_close(matrix @ kept, v.detach(), rtol=1e-4, atol=1e-4)
    assert len(store) == 2


def test_a_copy_of_a_store_is_empty():
    import copy
    import pickle

    store = ig.WarmStart()
    store.slot().put(torch.ones(2))
    assert len(copy.deepcopy(store)) == 0 == len(pickle.loads(pickle.dumps(store)))


# ---------------------------------------------------------------- negative curvature


def indefinite(seed: int, n: int = 60) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(n, dtype=F64, generator=random) * 3 + 0.1
    negative = 1 + seed % 5
    values[:negative] = -0.05 - torch.rand(negative, dtype=F64, generator=random)
    return symmetric(values, random), torch.randn(n, dtype=F64, generator=random)


@pytest.mark.parametrize(
    "preconditioner",
    [
        None,
        ig.Jacobi(),
        ig.Jacobi(probes=20),
        ig.Nystrom(rank=5),
        ig.Cholesky(),
        ig.Reuse(ig.Cholesky(), solves=3),
        lambda r: r / 2,
    ],
)
@pytest.mark.parametrize("scale", [None, 0.4, "elements"])
def test_invariants_after_negative_curvature(preconditioner, scale):
    if scale == "elements":
        scale = torch.linspace(0.2, 3.0, 60, dtype=F64)
    for seed in range(40):
        matrix, rhs = indefinite(seed)
        known = operator(matrix, scale=scale)
        solution = ig.CG(preconditioner=preconditioner).solve(known, rhs)
        assert solution.status == Status.NEGATIVE_CURVATURE and solution.iterations <= 60
        assert solution.curvature[0] <= 0 and float(solution.x @ rhs) > 0
        first_order = known.over_scale(rhs)
        assert known.scaled_norm(solution.x) <= known.scaled_norm(first_order) * (1 + 1e-12)
        assert solution.substitute is None


def test_on_request_negative_curvature_raises():
    matrix, rhs = indefinite(0)
    with pytest.raises(ig.LinearSolveError, match="CG met negative curvature"):
        ig.CG(on_negative_curvature="raise").solve(operator(matrix), rhs)


@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_on_request_minres_solves_the_same_system(damping):
    for seed in range(20):
        matrix, rhs = indefinite(seed)
        counting = Counting(matrix)
        solver = ig.CG(rtol=1e-10, maxiter=400, on_negative_curvature="minres", damping=damping)
        solution = solver.solve(counting.operator, rhs)
        shifted = matrix + damping * torch.eye(60, dtype=F64)
        assert solution.status == Status.CONVERGED and solution.substitute == "minres"
        assert float((shifted @ solution.x - rhs).norm() / rhs.norm()) <= 2e-10
        assert solution.curvature[0] < 0 < solution.curvature[1]
        assert counting.products == solution.iterations + 2  # and two residuals
    short = ig.CG(maxiter=5, on_negative_curvature="minres").solve(operator(matrix), rhs)
    assert short.status == Status.TRUNCATED


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_on_request_gauss_newton_takes_the_convex_matrix(damping):
    for seed in range(20):
        matrix, rhs = indefinite(seed)
        values, vectors = torch.linalg.eigh(matrix)
        convex = vectors @ torch.diag(values.clamp(min=0.1)) @ vectors.T
        known = operator(matrix, convex=lambda x, m=convex: m @ x)
        solver = ig.CG(rtol=1e-10, on_negative_curvature="gauss_newton", damping=damping)
        solution = solver.solve(known, rhs)
        if damping and solution.substitute is None:
            continue  # the damped matrix may be definite
        exact = torch.linalg.solve(convex + damping * torch.eye(60, dtype=F64), rhs)
        assert solution.status == Status.CONVERGED and solution.substitute == "gauss_newton"
        assert float((solution.x - exact).norm() / exact.norm()) < 1e-7
        assert solution.curvature[0] < 0
    fixed = ig.CG(maxiter=8, on_negative_curvature="gauss_newton")
    solution = fixed.solve(operator(matrix, convex=lambda x: convex @ x), rhs)
    assert solution.status == Status.TRUNCATED and 8 < solution.iterations <= 16
    plain = ig.CG(maxiter=8).solve(operator(convex), rhs)
    assert torch.equal(solution.x, plain.x)


@pytest.mark.parametrize("policy", ["minres", "gauss_newton"])
def test_what_is_solved_instead_keeps_the_options(policy):
    matrix, rhs = indefinite(0)
    convex = symmetric(
        torch.linspace(100.0, 120.0, 60, dtype=F64), torch.Generator().manual_seed(0)
    )
    coarse = ig.CG(on_negative_curvature=policy, atol=0.1 * float(rhs.norm()))
    known = operator(matrix, convex=lambda x: convex @ x)
    fine = dataclasses.replace(coarse, atol=0.0).solve(known, rhs)
    found = coarse.solve(known, rhs)
    assert found.status == fine.status == Status.CONVERGED
    assert 1e-3 < found.residual <= 0.1 and fine.residual < 1e-9
    if policy == "gauss_newton":  # the curvature of both matrices
        assert found.curvature[0] < 0 and found.curvature[1] >= 100


def test_what_is_solved_instead_starts_from_zero():
    """A store holds solutions of A, and the last one may have been of the matrix in its place."""
    matrix, rhs = indefinite(0)
    convex = symmetric(torch.linspace(1.0, 9.0, 60, dtype=F64), torch.Generator().manual_seed(0))
    known = operator(matrix, convex=lambda x: convex @ x)
    solver = ig.CG(on_negative_curvature="gauss_newton", warm_start=ig.WarmStart())
    once, again = (solver.solve(known, rhs) for _ in range(2))
    assert torch.equal(once.x, again.x) and again.iterations >= once.iterations


@pytest.mark.parametrize(
    ("value", "status"),
    [(0.0, Status.NEGATIVE_CURVATURE), (math.nan, Status.NONFINITE_OPERATOR)],
)
def test_a_matrix_in_as_place_may_fail_too(value, status):
    matrix, rhs = indefinite(0)
    found = ig.CG(on_negative_curvature="gauss_newton").solve(
        operator(matrix, convex=lambda x: value * x), rhs
    )
    assert found.status == status and found.curvature[0] < 0


def test_a_preconditioner_lasts_when_a_warm_start_is_given_up():
    matrix, rhs = indefinite(0)
    solver = ig.CG(preconditioner=lambda r: r / 2, warm_start=ig.WarmStart())
    solver.warm_start.slot().put(rhs / 10)
    seen = []
    cold = ig.CG(preconditioner=lambda r: seen.append(1) or r / 2).solve(operator(matrix), rhs)
    calls = len(seen)
    counted = dataclasses.replace(solver, preconditioner=lambda r: seen.append(1) or r / 2)
    found = counted.solve(operator(matrix), rhs)
    assert torch.equal(found.x, cold.x) and found.iterations > cold.iterations
    assert len(seen) > 2 * calls


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_gauss_newton_without_a_convex_matrix_says_what_to_do(damping):
    matrix, rhs = indefinite(0)
    solver = ig.CG(on_negative_curvature="gauss_newton", damping=damping)
    with pytest.raises(ig.LinearSolveError, match=r'model=.*curvature="gauss_newton"'):
        solver.solve(operator(matrix), rhs)
    definite = symmetric(torch.linspace(1.0, 2.0, 60, dtype=F64), torch.Generator())
    assert solver.solve(operator(definite), rhs).status == Status.CONVERGED


# ---------------------------------------------------------------- Neumann, MINRES, Exact


@pytest.mark.parametrize("symmetric_", [True, False])
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_the_neumann_series_has_its_terms(terms, symmetric_):
    random = torch.Generator().manual_seed(0)
    matrix = torch.eye(9, dtype=F64) + 0.2 * torch.randn(9, 9, dtype=F64, generator=random)
    matrix = (matrix + matrix.T) / 2 if symmetric_ else matrix
    rhs = torch.randn(9, dtype=F64, generator=random)
    step = torch.eye(9, dtype=F64) - 0.5 * matrix
    expected = 0.5 * sum(torch.linalg.matrix_power(step, k) @ rhs for k in range(terms))
    solution = ig.Neumann(terms=terms, scale=0.5).solve(operator(matrix), rhs)
    torch.testing.assert_close(solution.x, expected)
    assert solution.status == Status.TRUNCATED and solution.iterations == terms
    true = float((rhs - matrix @ expected).norm() / rhs.norm())
    assert math.isclose(solution.residual, true, rel_tol=1e-10)


def test_neumann_finds_its_scale_and_notices_divergence():
    random = torch.Generator().manual_seed(0)
    for top in (1e-3, 1.0, 1e5):
        matrix = symmetric(torch.linspace(top / 5, top, 50, dtype=F64), random)
        rhs = torch.randn(50, dtype=F64, generator=random)
        before = torch.get_rng_state()
        found = ig.Neumann(terms=300).solve(operator(matrix), rhs)
        assert torch.equal(torch.get_rng_state(), before)
        assert found.status == Status.CONVERGED and found.iterations <= 8 + 150
        exact = torch.linalg.solve(matrix, rhs)
        assert float((found.x - exact).norm() / exact.norm()) < 1e-9
        for diverging in (
            ig.Neumann(terms=20, scale=2.3 / top).solve(operator(matrix), rhs),
            ig.Neumann(terms=20).solve(operator(-matrix), rhs),
            ig.Neumann(terms=4000, scale=3.0 / top).solve(operator(matrix), rhs),
        ):
            assert diverging.status == Status.DIVERGED and not diverging.status.ok
            assert "smaller scale" in diverging.status.sentence
    zero = ig.Neumann().solve(operator(torch.zeros(3, 3, dtype=F64)), torch.ones(3, dtype=F64))
    assert zero.status == Status.SINGULAR


def test_neumann_notices_growth_before_it_shows():
    """A negative eigenvalue whose component is small still: the residual is small but grows."""
    matrix = torch.diag(torch.tensor([1.0, 0.9, -0.5], dtype=F64))
    rhs = torch.tensor([1.0, 1.0, 1e-4], dtype=F64)
    solution = ig.Neumann(terms=15, scale=1.0).solve(operator(matrix), rhs)
    assert solution.residual < 0.1 and solution.status == Status.DIVERGED


def test_a_neumann_series_cut_off_on_its_hump_is_reported():
    """Far from normal, terms grow before they shrink: such a sum is worse than 0."""
    matrix = torch.tensor([[0.5, -10.0], [0.0, 0.5]], dtype=F64)
    rhs = torch.tensor([0.0, 1.0], dtype=F64)
    cut = ig.Neumann(terms=4, scale=1.0).solve(operator(matrix), rhs)
    assert cut.residual > 1 and cut.status == Status.DIVERGED
    whole = ig.Neumann(terms=100, scale=1.0).solve(operator(matrix), rhs)
    assert whole.status == Status.CONVERGED
    torch.testing.assert_close(whole.x, torch.linalg.solve(matrix, rhs))


def test_minres_has_the_least_residual_of_the_krylov_space():
    for scale in (None, 0.3, torch.linspace(0.5, 2.0, 12, dtype=F64)):
        random = torch.Generator().manual_seed(1)
        values = torch.tensor([-3.0, -1, -0.5, *range(1, 10)], dtype=F64)
        matrix = symmetric(values, random)
        rhs = torch.randn(12, dtype=F64, generator=random)
        weights = torch.ones(12, dtype=F64) * (1.0 if scale is None else scale)
        powers = [rhs / weights]
        for steps in range(1, 6):
            basis = torch.stack(powers, dim=1)
            root = weights.rsqrt()[:, None]
            least = torch.linalg.lstsq(root * (matrix @ basis), root * rhs[:, None]).solution
            found = ig.MINRES(maxiter=steps).solve(operator(matrix, scale=scale), rhs)
            torch.testing.assert_close(found.x, (basis @ least)[:, 0], rtol=1e-8, atol=1e-10)
            assert found.status == Status.TRUNCATED and found.iterations == steps
            assert found.gap < 1e-13 and -3 <= found.curvature[0] <= found.curvature[1] <= 9
            powers.append(matrix @ powers[-1] / weights)
        found = ig.MINRES().solve(operator(matrix, scale=scale), rhs)
        assert -3 - 1e-9 <= found.curvature[0] < 0 and found.status == Status.CONVERGED


def test_minres_damps():
    matrix, rhs = indefinite(3)
    found = ig.MINRES(rtol=1e-12, damping=0.7).solve(operator(matrix), rhs).x
    shifted = matrix + 0.7 * torch.eye(60, dtype=F64)
    torch.testing.assert_close(found, torch.linalg.solve(shifted, rhs), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [ig.MINRES(), ig.NormalCG()])
def test_inconsistent_systems_get_a_least_squares_solution(solver):
    for seed in range(20):
        system = System.draw("inconsistent", 60, 30.0, "float64", seed)
        found = solver.solve(system.operator, system.rhs)
        assert found.status == Status.SINGULAR and found.iterations < 180
        least = torch.linalg.lstsq(system.matrix, system.rhs[:, None], driver="gelsd").solution
        best = system.residual(least[:, 0])
        assert best * (1 - 1e-9) <= found.residual <= best * (1 + 1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_exact_reports_the_extreme_eigenvalues_of_symmetric_matrices(sign):
    values = torch.linspace(1.0, 5.0, 9, dtype=F64)
    values[::2] *= sign or 1.0
    random = torch.Generator().manual_seed(0)
    matrix = symmetric(values, random)
    if sign == 0.0:
        matrix = matrix + torch.triu(torch.ones(9, 9, dtype=F64), 1)
    rhs = torch.randn(9, dtype=F64, generator=random)
    found = ig.Exact().solve(operator(matrix), rhs)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs), rtol=1e-12, atol=1e-12)
    assert found.status == Status.EXACT and (found.curvature is None) == (sign == 0.0)
    if sign:
        torch.testing.assert_close(found.curvature, (float(values.min()), float(values.max())))


def test_exact_takes_rounded_matrices_for_symmetric_and_no_others():
    random = torch.Generator().manual_seed(0)
    matrix = symmetric(torch.linspace(1.0, 3.0, 50, dtype=F64), random).float()
    rhs = torch.randn(50, generator=random)
    rounded = matrix * (1 + 0.004 * (torch.rand(50, 50, generator=random) - 0.5))
    coarse = Operator(lambda x: rounded @ x, lambda x: rounded.T @ x, eps=2.0**-8)
    assert ig.Exact().solve(coarse, rhs).curvature is not None
    assert ig.Exact().solve(operator(rounded), rhs).curvature is None
    skewed = matrix + 0.1 * torch.triu(torch.ones(50, 50))
    assert (
        ig.Exact().solve(Operator(skewed.matmul, skewed.T.matmul, eps=2.0**-8), rhs).curvature
        is None
    )


@pytest.mark.parametrize("factor", ["ldl_factor_ex", "ldl_solve"])
def test_exact_does_without_ldl_where_a_device_lacks_it(factor, monkeypatch):
    def absent(*_):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.linalg, factor, absent)
    matrix, rhs = indefinite(0)
    found = ig.Exact().solve(operator(matrix), rhs)
    assert found.status == Status.EXACT
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [ig.CG, ig.MINRES, ig.NormalCG])
def test_a_fixed_budget_does_not_warn_of_rounding(solver):
    """It promised no tolerance; where rounding ends it early, that is all it could do."""
    system = System.draw("definite", 60, 1e3, "float32", 0)
    statuses = {
        solver(maxiter=k).solve(system.operator, system.rhs, verify=verify).status
        for k in (1, 30, 300, 900)
        for verify in (True, False)
    }
    assert statuses <= {Status.TRUNCATED, Status.CONVERGED}
    asked = solver(maxiter=900, rtol=1e-7).solve(system.operator, system.rhs)
    assert asked.status in (Status.STAGNATED, Status.MAX_ITER)


@pytest.mark.parametrize(("kappa", "most"), [(30.0, 100), (1e3, 300)])
def test_cg_notices_steps_that_lead_nowhere(kappa, most):
    for seed in range(3):
        system = System.draw("inconsistent", 60, kappa, "bfloat16", seed)
        solution = ig.CG(maxiter=3000).solve(system.operator, system.rhs)
        assert solution.status == Status.SINGULAR and solution.iterations < most


def test_minres_ends_where_rounding_lets_it_gain_nothing():
    for seed in range(5):
        system = System.draw("indefinite", 40, 1e5, "float64", seed)
        asked = ig.MINRES(maxiter=2000, rtol=1e-15).solve(system.operator, system.rhs)
        fixed = ig.MINRES(maxiter=2000).solve(system.operator, system.rhs)
        assert asked.status == Status.STAGNATED and asked.iterations < 2000
        assert fixed.status == Status.TRUNCATED and fixed.iterations < 2000


@pytest.mark.parametrize(
    ("solver", "rtol_error", "promised"),
    [
        (ig.CG(), None, True),
        (ig.CG(maxiter=3, rtol=1e-3), None, True),
        (ig.CG(maxiter=3), 0.1, True),
        (ig.CG(maxiter=3), None, False),
        (ig.MINRES(maxiter=3, rtol=1e-3), None, True),
        (ig.MINRES(maxiter=3), None, False),
    ],
)
def test_the_residual_is_recomputed_where_something_was_promised(solver, rtol_error, promised):
    system = System.draw("definite", 60, 30.0, "float64", 0)
    counting = Counting(system.matrix)
    known = dataclasses.replace(counting.operator, rtol_error=rtol_error)
    unverified = solver.solve(known, system.rhs, verify=False)
    assert (unverified.residual is not None) == promised
    assert counting.products == unverified.iterations + promised
    assert solver.solve(known, system.rhs).residual is not None


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("solver", [ig.CG, ig.MINRES, ig.NormalCG, ig.Neumann, ig.Exact])
def test_options_go_by_name(solver):
    with pytest.raises(TypeError, match="positional argument"):
        solver(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ig.MINRES(maxiter=0), r"MINRES\(maxiter=0\): expected None or an integer of at"),
        (lambda: ig.MINRES(rtol=2.0), r"MINRES\(rtol=2.0\)"),
        (lambda: ig.MINRES(atol=-1.0), r"MINRES\(atol=-1.0\)"),
        (lambda: ig.MINRES(damping=-1.0), r"MINRES\(damping=-1.0\): expected a finite"),
        (lambda: ig.CG(damping=math.nan), r"CG\(damping=nan\)"),
        (lambda: ig.CG(on_negative_curvature="ggn"), r'"stop" or "raise" or "minres" or "gauss'),
        (lambda: ig.CG(preconditioner=ig.Jacobi), r"CG\(preconditioner=<class .*Jacobi\(\)"),
        (lambda: ig.CG(preconditioner=3), r"CG\(preconditioner=3\): expected None, Jacobi\(\)"),
        (lambda: ig.CG(warm_start=True), r"CG\(warm_start=True\): expected None or a WarmStart"),
        (lambda: ig.Neumann(terms=0), r"Neumann\(terms=0\): expected an integer of at least 1"),
        (lambda: ig.Neumann(terms=True), r"Neumann\(terms=True\)"),
        (lambda: ig.Neumann(scale=0.0), r"Neumann\(scale=0.0\)"),
        (lambda: ig.Neumann(scale=math.inf), r"Neumann\(scale=inf\)"),
        (lambda: ig.Jacobi(probes=1), r"Jacobi\(probes=1\): expected None or an integer of at"),
        (lambda: ig.Nystrom(rank=0), r"Nystrom\(rank=0\): expected an integer of at least 1"),
        (lambda: ig.Cholesky(max_size=0), r"Cholesky\(max_size=0\): expected an integer of at"),
        (lambda: ig.Reuse(ig.Jacobi), r"Reuse\(<class .*expected Cholesky\(\), Nystrom\(rank="),
        (lambda: ig.Reuse(lambda r: r), r"Reuse\(<function"),
        (lambda: ig.Reuse(ig.Jacobi(), solves=0), r"Reuse\(solves=0\): expected an integer of at"),
        (lambda: ig.Exact(max_size=0), r"Exact\(max_size=0\): expected at least 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (ig.Exact(max_size=5), "dense 6 × 6 matrix; its max_size is 5"),
        (ig.CG(preconditioner=ig.Cholesky(max_size=5)), r"6 × 6 matrix.*5\. Use Nystrom"),
        (ig.CG(preconditioner=ig.Jacobi(max_size=5)), r"6 products for 6 unknowns.*probes=10"),
    ],
)
def test_systems_that_are_too_large_are_refused(solver, message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        solver.solve(operator(torch.eye(6, dtype=F64)), torch.ones(6, dtype=F64))


def test_results_of_equal_solves_are_equal():
    matrix, rhs = low_rank_plus_identity(0, 40)

    def once(row: Row) -> LinearSolution:
        return row.make(System(matrix, rhs)).solve(operator(matrix), rhs)

    for row in ROWS.values():
        one, other = once(row), once(row)
        assert torch.equal(one.x, other.x) and one.iterations == other.iterations
