"""Every linear solver against dense algebra: what it must solve, and what it may say otherwise."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import pytest
import torch
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear import LinearSolution, LinearSolver, Operator

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
