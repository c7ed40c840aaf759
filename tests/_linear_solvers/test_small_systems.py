"""Batches of small systems by one factorisation: each ends as it ends alone."""

import math

import pytest
import torch

from implicit_grad import GMRES, MINRES, Exact, NormalCG, Status
from implicit_grad._linear_solvers.base import Operator
from implicit_grad._linear_solvers.general import General

F32, F64 = torch.float32, torch.float64
N = 9
SOLVERS = {
    "Exact": Exact(),
    "MINRES": MINRES(),
    "damped": MINRES(damping=0.3),
    "GMRES": GMRES(),
    "NormalCG": NormalCG(),
    "General": General(),
}


def systems(dtype, symmetric):
    """Regular ones of several magnitudes, and all that is out of the ordinary."""
    random = torch.Generator().manual_seed(3)
    matrices, rows = [], []
    for power in (0, 0, 40, -40):
        left, right = (
            torch.linalg.qr(torch.randn(N, N, generator=random, dtype=F64))[0] for _ in range(2)
        )
        values = torch.linspace(1, 7, N, dtype=F64) * torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1, 1])
        matrix = left @ torch.diag(values) @ (left.T if symmetric else right)
        matrices.append((matrix + matrix.T) / 2 if symmetric else matrix)
        rows.append(torch.randn(N, generator=random, dtype=F64) * 2.0**power)
    singular = torch.diag(torch.cat([torch.zeros(2), torch.linspace(1, 3, N - 2)])).to(F64)
    special = {
        "singular": (singular, torch.ones(N, dtype=F64)),
        "consistent": (singular, singular @ torch.ones(N, dtype=F64)),
        "nearly singular": (singular + 1e-16 * torch.eye(N, dtype=F64), torch.ones(N, dtype=F64)),
        "no rhs": (matrices[0], torch.zeros(N, dtype=F64)),
        "NaN rhs": (matrices[0], torch.full((N,), math.nan, dtype=F64)),
        "NaN": (torch.full((N, N), math.nan, dtype=F64), torch.ones(N, dtype=F64)),
        "zero": (torch.zeros(N, N, dtype=F64), torch.ones(N, dtype=F64)),
    }
    matrices += [matrix for matrix, _ in special.values()]
    rows += [row for _, row in special.values()]
    return torch.stack(matrices).to(dtype), torch.stack(rows).to(dtype)


def operator(matrices, **known):
    def product(m):
        # row by row: no task's NaN is another's
        return lambda x: torch.stack([a @ b for a, b in zip(m, x, strict=True)])

    return Operator(product(matrices), product(matrices.mT), **known)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", SOLVERS)
def test_each_ends_as_it_ends_alone(name, dtype):
    solver = SOLVERS[name]
    matrices, rhs = systems(dtype, solver.symmetric_only)
    x, found = solver.solve_tasks(operator(matrices), rhs.clone(), True)
    for i, (matrix, row) in enumerate(zip(matrices, rhs, strict=True)):
        single = Operator(lambda v, m=matrix: m @ v, lambda v, m=matrix: m.T @ v)
        alone = solver.solve(single, row)
        assert found[i].status == alone.status, i
        size = alone.x.nan_to_num().abs().max().item()
        tolerance = torch.finfo(dtype).eps ** 0.55 * max(size, 1e-30)
        torch.testing.assert_close(x[i], alone.x, rtol=0.0, atol=tolerance, equal_nan=True)
        assert x[i].data_ptr() == found[i].x.data_ptr()
        assert (found[i].residual is None) == (alone.residual is None)


def test_one_factorisation_for_all():
    """The regular tasks take a product for each unknown and one that verifies, all together."""
    matrices, rhs = (t[:4] for t in systems(F64, symmetric=False))
    products = []

    def product(x):
        products.append(x)
        return (matrices @ x[:, :, None])[:, :, 0]

    x, found = GMRES().solve_tasks(Operator(product, product), rhs, True)
    assert len(products) == N + 1
    torch.testing.assert_close(x, torch.linalg.solve(matrices, rhs), rtol=1e-12, atol=0.0)
    for solution, norm in zip(found, torch.linalg.matrix_norm(matrices, 2).tolist(), strict=True):
        assert solution.status is Status.CONVERGED and solution.residual < 1e-14
        assert 0.7 * norm < solution.norm <= norm * (1 + 1e-12)


def test_an_objective_of_negative_curvature_is_told():
    matrices = torch.diag_embed(torch.tensor([[1.0, 2.0], [1.0, -2.0]], dtype=F64))
    known = operator(matrices, is_hessian=True)
    _, found = MINRES().solve_tasks(known, torch.ones(2, 2, dtype=F64), True)
    assert found[0].extremes[0] > 0 > found[1].extremes[0]


def test_which_batches_are_taken():
    assert GMRES().takes(256, 100) and Exact().takes(2, 1000)
    assert not GMRES().takes(256, 200)  # iterations would be fewer
    assert not GMRES().takes(2, 100)
    assert not Exact().takes(256, 1000)  # 2 GB
    assert not Exact(max_size=10).takes(2, 11)
    for chosen in (MINRES(maxiter=5), GMRES(preconditioner=torch.clone), NormalCG(maxiter=9)):
        assert not chosen.takes_small_tasks


def test_systems_without_unknowns():
    _, found = GMRES().solve_tasks(Operator(torch.clone, torch.clone), torch.zeros(3, 0), True)
    assert [s.status for s in found] == [Status.ZERO_RHS] * 3
