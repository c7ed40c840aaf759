"""Minima that are unique but for a change that nobody sees: the derivative is that of the rest.

φ solves each problem as far as a good optimiser gets, ‖F‖ about 1e-7, and not to rounding. The
curvature along what nobody sees is then of that order, and of any sign. What is right follows from
the dense pseudo-inverse at a solution that Newton's method has polished.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import Operator, Times
from implicit_grad._linear_solvers.cg import CG
from implicit_grad._linear_solvers.flat import told_flat, unknown_curvature
from implicit_grad._theorem.linearization import Linearization

F64 = torch.float64
AWAY = 1e-8
Objective = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]
Made = tuple[Objective, Loss, Loss, Loss]  # with a start, and outer losses


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def factors(seed: int) -> Made:
    """U Vᵀ near a matrix: any invertible Q may stand between U and V."""
    target = normal(8, 3, seed=seed) @ normal(3, 7, seed=seed + 1) + normal(8, 7, seed=seed + 2) / 4
    seen = normal(8, 7, seed=seed + 3)

    def product(phi: Tensor) -> Tensor:
        return phi[:24].view(8, 3) @ phi[24:].view(3, 7)

    def objective(phi: Tensor, a: Tensor) -> Tensor:
        return (a.exp() * (product(phi) - target).square()).sum()

    left, values, right = torch.linalg.svd(target)
    start = torch.cat([
        (left[:, :3] * values[:3].sqrt()).flatten(),
        (values[:3].sqrt()[:, None] * right[:3]).flatten(),
    ])  # fmt: skip
    return (
        objective,
        lambda a: start,
        lambda phi: (seen * product(phi)).sum(),
        lambda phi: phi[0] - phi[30],
    )


def directions(seed: int) -> Made:
    """The least eigenvector, as the minimum of Rayleigh's quotient, which no length changes."""
    values = torch.arange(1, 7, dtype=F64)
    basis = torch.linalg.qr(normal(6, 6, seed=seed)).Q

    def matrix(a: Tensor) -> Tensor:
        return basis @ torch.diag(values) @ basis.T + (a[:6, :6] + a[:6, :6].T) / 10

    def objective(phi: Tensor, a: Tensor) -> Tensor:
        return phi @ matrix(a) @ phi / phi.square().sum()

    return (
        objective,
        lambda a: 2 * torch.linalg.eigh(matrix(a))[1][:, 0],
        lambda phi: phi[1] / phi.norm(),
        lambda phi: phi.norm(),
    )


PROBLEMS = [factors, directions]


def polished(objective: Objective, phi: Tensor, a: Tensor) -> Tensor:
    """A minimum near φ, to rounding, by Newton's method on what is not flat; damped at first."""
    for damping in (3.0, 1.0, 0.3, *(12 * [0.0])):
        hessian = torch.func.hessian(objective)(phi, a)
        hessian = hessian + damping * torch.eye(len(phi), dtype=F64)
        inverse = torch.linalg.pinv(hessian, rtol=1e-6, hermitian=True)
        phi = phi - inverse @ torch.func.grad(objective)(phi, a)
    assert torch.func.grad(objective)(phi, a).norm() < 1e-12
    values = torch.linalg.eigvalsh(torch.func.hessian(objective)(phi, a))
    assert values[0] > -1e-9 and values[values > 1e-6][0] > 1e-2
    return phi


def right(objective: Objective, loss: Loss, phi: Tensor, a: Tensor) -> Tensor:
    """−(∂F/∂a)ᵀ H⁺ ∂loss/∂φ."""
    hessian = torch.func.hessian(objective)(phi, a)
    inverse = torch.linalg.pinv(hessian, rtol=1e-6, hermitian=True)
    mixed = torch.func.jacrev(torch.func.grad(objective), argnums=1)(phi, a)
    return -torch.einsum("i,i...->...", inverse @ torch.func.grad(loss)(phi), mixed)


def nearly(phi: Tensor, seed: int) -> Tensor:
    """φ as an optimiser leaves it."""
    return phi + AWAY * normal(*phi.shape, seed=seed)


def differentiated(objective, start, loss, seed, solver, **options):
    """The gradient at a φ that is nearly solved, the right one, and how the solve ended."""
    a = 0.3 * normal(8, 7, seed=seed + 1000)
    phi, monitor = polished(objective, start(a), a), ig.Monitor()
    options |= {"linear_solver": solver, "monitor": monitor}
    solve = ig.implicit(lambda a: nearly(phi, seed), ig.argmin(objective), **options)
    exact = right(objective, loss, phi, a)
    (gradient,) = torch.autograd.grad(loss(solve(a.requires_grad_())), a)
    assert monitor.last is not None
    return gradient, exact, monitor.last.status


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", PROBLEMS)
@pytest.mark.parametrize(
    "solver",
    [ig.CG(), ig.CG(maxiter=300), ig.CG(preconditioner=lambda r: 0.5 * r)],
    ids=["CG", "CG, 300 products", "preconditioned"],
)
def test_what_nobody_sees_does_not_count(solver, make, seed):
    objective, start, unseeing, _ = make(10 * seed)
    gradient, exact, status = differentiated(objective, start, unseeing, seed, solver)
    assert (gradient - exact).norm() <= 1e-5 * exact.norm()
    assert status.ok


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", PROBLEMS)
@pytest.mark.parametrize("solver", [ig.CG(), ig.MINRES()], ids=["CG", "MINRES"])
def test_what_the_outer_loss_sees_is_told(solver, make, seed):
    objective, start, _, seeing = make(10 * seed)
    *_, status = differentiated(objective, start, seeing, seed, solver, on_failure="ignore")
    assert not status.ok


def second(objective, start, loss, solver):
    """(∂/∂a)(way · gradient), and how the three solves ended."""
    a, way = 0.3 * normal(8, 7, seed=1000), normal(8, 7, seed=5)
    phi, monitor = polished(objective, start(a), a), ig.Monitor()
    options = {"linear_solver": solver, "monitor": monitor, "on_failure": "ignore"}
    solve = ig.implicit(lambda a: nearly(phi, 0), ig.argmin(objective), **options)
    variable = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(solve(variable)), variable, create_graph=True)
    (found,) = torch.autograd.grad((gradient * way).sum(), variable)
    h, exact = 1e-4, []
    for moved in (a + h * way, a - h * way):  # the mixed derivatives are symmetric
        exact.append(right(objective, loss, polished(objective, phi, moved), moved))
    return found, (exact[0] - exact[1]) / (2 * h), [r.status for r in monitor.reports]


@pytest.mark.parametrize("make", PROBLEMS)
def test_second_derivatives_do_not_see_it_either(make):
    objective, start, unseeing, _ = make(20)
    found, exact, statuses = second(objective, start, unseeing, ig.CG())
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    assert len(statuses) == 3 and all(status.ok for status in statuses)


@pytest.mark.parametrize("make", PROBLEMS)
def test_what_only_second_derivatives_see_is_told(make):
    objective, start, unseeing, seeing = make(20)

    def loss(phi):  # its first derivative is that of the first term
        away = seeing(phi) - seeing(phi.detach()), unseeing(phi) - unseeing(phi.detach())
        return unseeing(phi) + away[0] * away[1]

    *_, statuses = second(objective, start, loss, ig.CG())
    assert [status.ok for status in statuses] == [True, True, False]


@pytest.mark.parametrize("make", PROBLEMS)
def test_tasks_end_as_they_would_alone(make):
    objective, start, unseeing, seeing = make(0)
    each = [0.3 * normal(8, 7, seed=seed + 1000) for seed in range(4)]
    minima = torch.stack([nearly(polished(objective, start(a), a), seed=3) for a in each])
    losses = [unseeing, unseeing, seeing, unseeing]

    def gradients(solve, phi, a):
        total = sum((loss(p) for loss, p in zip(losses, solve(a), strict=True)), torch.zeros(()))
        return torch.autograd.grad(total, a)[0]

    monitors = ig.Monitor(), ig.Monitor()
    a = torch.stack(each).requires_grad_()
    together = ig.implicit(
        lambda a: minima,
        ig.argmin(torch.vmap(objective), tasks=True),
        monitor=monitors[0],
        on_failure="ignore",
    )
    alone = ig.implicit(
        lambda a, phi: phi,
        ig.argmin(lambda phi, a, _: objective(phi, a)),
        monitor=monitors[1],
        on_failure="ignore",
    )
    batch = gradients(together, minima, a)
    loop = gradients(lambda a: [alone(b, p) for b, p in zip(a, minima, strict=True)], minima, a)
    statuses = [[r.status for r in monitor.reports] for monitor in monitors]
    assert [s.ok for s in statuses[0]] == [True, True, False, True]
    assert sorted(statuses[0]) == sorted(statuses[1])  # the loop's backward passes come last first
    for mine, other in zip(batch[[0, 1, 3]], loop[[0, 1, 3]], strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def saddle(least: float, slope: float) -> Operator:
    """A matrix with one small negative curvature, at a φ with ‖φ‖ = 1 and ‖F‖ = slope."""
    matrix = torch.diag(torch.cat([torch.linspace(1, 2, 9, dtype=F64), torch.tensor([least])]))
    spans = [Times(bend=slope)]
    product = matrix.to(F64).matmul
    return Operator(product, product, spans=lambda _: spans, is_hessian=True)


@pytest.mark.parametrize(
    ("least", "slope", "flat"),
    [
        (-1e-8, 1e-7, True),
        (-1e-6, 1e-7, False),  # a curvature that F does not explain
        (-1e-8, 0.0, False),  # a saddle itself
        (-1e-4, 1e-3, False),  # nor does a phi that solves nothing explain it
    ],
)
def test_a_saddle_is_one_still(least, slope, flat):
    operator = saddle(least, slope)
    rhs = torch.ones(10, dtype=F64)
    rhs[-1] = 1e-9
    found = CG().solve(operator, rhs)
    assert (found.status is Status.CONVERGED) == flat
    told = told_flat([ig.MINRES().solve(operator, rhs)], operator, rhs)[0]
    assert told.extremes is not None and told.extremes[0] < 0
    assert told.is_flat == flat


def test_a_tolerance_that_was_asked_for_is_kept():
    operator = saddle(-1e-8, 1e-7)
    rhs = torch.ones(10, dtype=F64)
    rhs[-1] = 1e-9
    assert CG(rtol=1e-12).solve(operator, rhs).status is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("seen", [1e-6, 1e-5])
def test_what_flatness_has_grown_large_is_told(seen):
    operator = saddle(-1e-8, 1e-7)
    rhs = torch.ones(10, dtype=F64)
    rhs[-1] = seen
    found = ig.MINRES().solve(operator, rhs)
    assert found.x[-1].abs() > 10 * found.x[:-1].norm()
    assert not told_flat([found], operator, rhs)[0].is_flat


def test_no_condition_but_that_of_a_minimum_has_flat_directions():
    operator = dataclasses.replace(saddle(-1e-8, 1e-7), is_hessian=False, either_sign=True)
    rhs = torch.ones(10, dtype=F64)
    rhs[-1] = 1e-9
    alone = CG().solve(operator, rhs)
    rows = dataclasses.replace(
        operator, matvec=lambda x: torch.stack([operator.matvec(row) for row in x])
    )
    _, (together,) = CG().solve_tasks(rows, rhs[None], verify=False)
    assert not alone.status.ok
    assert not together.status.ok


def test_a_short_way_explains_no_more_curvature():
    """A φ that was trained from near by is as long as any: its slope bends no more for that."""
    phi, start = torch.ones(4, dtype=F64), torch.ones(4, dtype=F64) - 1e-3
    slope = torch.full((4,), 1e-7, dtype=F64)
    around = Linearization((slope,), (phi,), starts=(start,))
    product = torch.Tensor.clone
    operator = Operator(product, product, spans=around.training_times, is_hessian=True)
    (unknown,) = unknown_curvature(operator, 1)
    assert math.isclose(unknown, 1e-7)
