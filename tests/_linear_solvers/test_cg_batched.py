"""CG for many systems at once against CG alone: the same solutions, statuses and refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import normal

import implicit_grad as ig
from implicit_grad import CG, Status
from implicit_grad._linear_solvers.base import Operator

F32, F64 = torch.float32, torch.float64


# What the matrix of a task may be like: its eigenvalues, for n unknowns. With n >= 6 no three
# iterations exhaust it, so that what happens is not for rounding errors to decide.
SPECTRA = {
    "definite": lambda n: torch.linspace(1, 7, n),
    "indefinite": lambda n: torch.linspace(-2, 5, n),
    "negative": lambda n: -torch.linspace(3, 9, n),
    "singular": lambda n: torch.cat([torch.zeros(n // 2), torch.linspace(1, 5, n - n // 2)]),
}
TROUBLE = ("no rhs", "NaN rhs", "Inf rhs", "NaN", "Inf")
SCALES = [None, 0.5, 2.0, "tensor"]


class Systems:
    """A batch of systems of several sorts and magnitudes; `alone` gives one of them."""

    def __init__(self, sorts, n, dtype, seed, scale=None, powers=None):
        random = torch.Generator().manual_seed(seed)
        self.count, self.n, self.powers = len(sorts), n, powers or [0] * len(sorts)
        matrices = [self._matrix(sort, random) for sort in sorts]
        self.rhs = torch.randn(len(sorts), n, generator=random, dtype=F64)
        per_element = torch.rand(len(sorts), n, generator=random, dtype=F64) + 0.5
        self.scale = per_element.to(dtype) if scale == "tensor" else scale
        for task, (sort, power) in enumerate(zip(sorts, self.powers, strict=True)):
            matrices[task] *= 2.0**power
            self.rhs[task] *= 2.0 ** (-power) if sort != "no rhs" else 0.0
            if sort in ("NaN rhs", "Inf rhs"):
                self.rhs[task, 0] = float(sort[:3])
        self.matrices, self.rhs = torch.stack(matrices).to(dtype), self.rhs.to(dtype)

    def _matrix(self, sort, random):
        draw = torch.randn(self.n, self.n, generator=random, dtype=F64)
        if sort in ("NaN", "Inf"):
            return torch.full_like(draw, float(sort))
        basis = torch.linalg.qr(draw)[0]
        eigenvalues = SPECTRA.get(sort, SPECTRA["definite"])(self.n).to(F64)
        matrix = basis @ torch.diag(eigenvalues) @ basis.T
        return (matrix + matrix.T) / 2

    def operator(self, task=None):
        """Of all tasks, or of one: with the same rounding errors in its products."""
        matrices = self.matrices if task is None else self.matrices[task]
        scale = self.scale
        if task is not None and torch.is_tensor(scale):
            scale = scale[task]

        def product(x):
            curved = torch.stack([m @ r for m, r in zip(matrices, x, strict=True)])
            return curved if scale is None else curved + scale * x

        if task is None:
            return Operator(product, product, scale)

        def alone(x):
            curved = matrices @ x
            return curved if scale is None else curved + scale * x

        return Operator(alone, alone, scale)

    def together(self, solver, verify=True):
        """All solutions from one run."""
        x, solutions = solver.solve_tasks(self.operator(), self.rhs.clone(), verify)
        assert len(solutions) == self.count
        assert all(s.x.data_ptr() == row.data_ptr() for s, row in zip(solutions, x, strict=True))
        return solutions

    def apart(self, solver, verify=True):
        """All solutions from runs of their own."""
        return [solver.solve(self.operator(t), self.rhs[t], verify) for t in range(self.count)]


def near(actual, expected, tolerance):
    """Equal relative to the size of what is expected, NaN and None where that is."""
    if expected is None or actual is None:
        return actual is expected
    a, e = (torch.as_tensor(t).double() for t in (actual, expected))
    kept = torch.isfinite(e)
    if not torch.equal(kept, torch.isfinite(a)) or a.shape != e.shape:
        return False
    size = e[kept].abs().max() if kept.any() else 0.0
    return bool(((a - e)[kept].abs() <= tolerance * size).all())


def equal_solutions(found, expected, tolerance=None):
    """Fields alike; rounding errors grow with the length of the steps."""
    if tolerance is None:
        eps = torch.finfo(expected.x.dtype).eps
        tolerance = 1e4 * eps * max([1.0, *sum(expected.coefficients, ())]) ** 2
    assert found.status == expected.status
    assert found.iterations == expected.iterations
    assert near(found.x, expected.x, tolerance)
    assert near(found.extremes, expected.extremes, tolerance)
    assert near(found.coefficients or None, expected.coefficients or None, tolerance)
    for name in ("residual", "residual_norm", "gap", "filter_error"):
        actual, alone = getattr(found, name), getattr(expected, name)
        assert (actual is None) == (alone is None), name
        if alone is not None:
            assert math.isnan(actual) == math.isnan(alone), name
            assert math.isnan(alone) or abs(actual - alone) <= tolerance * max(alone, 1.0), name
    assert found.substitute == expected.substitute


@given(
    st.lists(st.sampled_from([*SPECTRA, *TROUBLE]), min_size=1, max_size=5),
    st.integers(6, 9),
    st.integers(0, 2**31),
    st.sampled_from(SCALES),
    st.sampled_from([F32, F64]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.25]),
    st.booleans(),
)
def test_a_budget_gives_each_task_what_it_would_get_alone(
    sorts, n, seed, scale, dtype, maxiter, damping, verify
):
    systems = Systems(sorts, n, dtype, seed, scale)
    solver = CG(maxiter=maxiter, damping=damping)
    pairs = zip(systems.together(solver, verify), systems.apart(solver, verify), strict=True)
    for found, expected in pairs:
        equal_solutions(found, expected)


@given(
    st.lists(
        st.sampled_from(["definite", "indefinite", "negative", *TROUBLE]), min_size=1, max_size=5
    ),
    st.integers(6, 9),
    st.integers(0, 2**31),
    st.sampled_from(SCALES),
    st.sampled_from([F32, F64]),
    st.sampled_from([{"rtol": 1e-3}, {}, {"atol": 1e-3}, {"rtol": 1e-3, "maxiter": 4}]),
    st.sampled_from([0.0, 0.25]),
)
def test_a_tolerance_gives_each_task_what_it_would_get_alone(
    sorts, n, seed, scale, dtype, options, damping
):
    systems, solver = Systems(sorts, n, dtype, seed, scale), CG(damping=damping, **options)
    pairs = zip(systems.together(solver), systems.apart(solver), strict=True)
    for found, expected in pairs:
        if expected.status == Status.CONVERGED:
            # a residual that is a hair from the tolerance may take one more iteration, or one less
            assert found.status == expected.status
            assert abs(found.iterations - expected.iterations) <= 1
            assert found.residual <= 2e-3
        else:
            equal_solutions(found, expected)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [None, 0.5, "tensor"])
@pytest.mark.parametrize("n", [12, 9000])
def test_a_budget_is_met_to_the_last_number(n, scale, dtype):
    """Short rows, and rows that are long enough to be multiplied one by one."""
    eigenvalues = torch.linspace(1, 5, n, dtype=dtype)
    rhs = torch.randn(4, n, dtype=dtype)
    scales = torch.rand(4, n, dtype=dtype) + 0.5 if scale == "tensor" else scale

    def operator(own):
        def product(x):
            return eigenvalues * x + (0 if own is None else own) * x

        return Operator(product, product, own)

    solver = CG(maxiter=5)
    x, solutions = solver.solve_tasks(operator(scales), rhs, True)
    for task, found in enumerate(solutions):
        own = scales[task] if scale == "tensor" else scales
        expected = solver.solve(operator(own), rhs[task])
        equal_solutions(found, expected, 1e-13 if dtype == F64 else 2e-5)
        assert torch.equal(x[task], found.x)
        assert (found.status, found.iterations) == (Status.TRUNCATED, 5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [None, 2.0, "tensor"])
def test_magnitudes_do_not_matter(scale, dtype):
    powers = [-100, -60, 0, 60, 100] if scale is None else [0] * 5
    systems = Systems(["definite"] * 5, 6, dtype, 3, scale, powers)
    if scale is not None:
        systems.rhs *= 10.0 ** torch.tensor([-30.0, -10.0, 0.0, 10.0, 30.0])[:, None].to(dtype)
    if dtype == F32 and scale is None:  # squares must not overflow in CG alone either
        systems = Systems(["definite"] * 5, 6, dtype, 3, scale, [-40, -20, 0, 20, 40])
    for solver in (CG(maxiter=3), CG(rtol=1e-4), CG(maxiter=3, damping=0.0)):
        pairs = zip(systems.together(solver), systems.apart(solver), strict=True)
        for found, expected in pairs:
            equal_solutions(found, expected)


def test_right_hand_sides_of_any_magnitude():
    rhs = normal(5, 4, seed=1, grad=False)
    sizes = torch.tensor([1e-300, 1e-200, 1.0, 1e200, 1e300], dtype=F64)
    triple = Operator(lambda x: 3 * x, lambda x: 3 * x)
    x, solutions = CG(maxiter=2).solve_tasks(triple, rhs * sizes[:, None], True)
    assert torch.allclose(x / sizes[:, None], rhs / 3, rtol=1e-14)
    assert [s.status for s in solutions] == [Status.CONVERGED] * 5


@pytest.mark.parametrize("solver", [CG(maxiter=3), CG(), CG(rtol=1e-2), CG(maxiter=4, rtol=1e-9)])
@pytest.mark.parametrize("bad", ["indefinite", "singular", *TROUBLE])
def test_a_bad_task_changes_no_bit_of_the_others(bad, solver):
    for dtype in (F32, F64):
        clean = Systems(["definite"] * 4, 7, dtype, 5, 0.5)
        mixed = Systems(["definite"] * 4, 7, dtype, 5, 0.5)
        trouble = Systems([bad] * 4, 7, dtype, 6, 0.5)
        mixed.matrices[2], mixed.rhs[2] = trouble.matrices[2], trouble.rhs[2]
        expected, found = clean.together(solver), mixed.together(solver)
        for task in (0, 1, 3):
            assert torch.equal(found[task].x, expected[task].x)
            assert repr(found[task]) == repr(expected[task])
        wanted = {
            "indefinite": Status.NEGATIVE_CURVATURE,
            "no rhs": Status.ZERO_RHS,
            "NaN rhs": Status.NONFINITE_RHS,
            "Inf rhs": Status.NONFINITE_RHS,
            "NaN": Status.NONFINITE_OPERATOR,
            "Inf": Status.NONFINITE_OPERATOR,
        }
        if bad in wanted:
            assert found[2].status == wanted[bad]
        assert torch.isnan(found[2].x).any() == (bad in ("NaN rhs", "Inf rhs", "NaN", "Inf"))


def test_a_restart_is_of_its_task_only():
    """A product that changes after some calls leaves one carried residual wrong."""
    calls = 0

    def product(x):
        nonlocal calls
        calls += 1
        return x * torch.tensor([[1.0], [2.0 if calls <= 3 else 2.5]], dtype=F64) * spread

    spread = torch.linspace(1, 3, 3, dtype=F64)
    rhs = torch.ones(2, 3, dtype=F64)
    x, (steady, drifting) = CG(rtol=1e-10).solve_tasks(Operator(product, product), rhs, True)
    assert torch.allclose(x, rhs / spread / torch.tensor([[1.0], [2.5]]), rtol=1e-9)
    assert [s.status for s in (steady, drifting)] == [Status.CONVERGED] * 2
    assert (steady.iterations, len(steady.coefficients)) == (3, 3)
    assert (drifting.iterations, drifting.coefficients) == (6, ())
    assert 0 < steady.gap < 1e-12


def test_first_order_and_refusals():
    systems = Systems(["definite", "indefinite"], 5, F64, 1, 2.0)
    solver = CG(maxiter=0)
    for found, expected in zip(systems.together(solver), systems.apart(solver), strict=True):
        equal_solutions(found, expected, 0.0)
    with pytest.raises(ig.LinearSolveError, match="CG met negative curvature"):
        Systems(["definite", "negative"], 5, F64, 1, 2.0).together(
            CG(on_negative_curvature="raise")
        )
    kept = Systems(["definite", "definite"], 5, F64, 1, 2.0)
    assert all(s.status.ok for s in kept.together(CG(on_negative_curvature="raise")))


@pytest.mark.parametrize("count", [1, 3])
def test_systems_without_unknowns(count):
    x, solutions = CG().solve_tasks(Operator(torch.clone, torch.clone), torch.zeros(count, 0), True)
    assert x.shape == (count, 0)
    assert [s.status for s in solutions] == [Status.ZERO_RHS] * count
