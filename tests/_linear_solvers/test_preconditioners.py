"""Preconditioners: what they save, what they keep, and what is said of bad ones."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle

import pytest
import torch
from systems import F64, low_rank_plus_identity, operator, symmetric
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._theorem.linearization import Linearization


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
