"""Faults of the linear solve: curvature, magnitudes, NaN, precision."""

from __future__ import annotations

import pytest
import torch
from problems import normal
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import mse_loss

import implicit_grad as ig
from faults import (
    CONDITION,
    STYLES,
    Status,
    User,
    adapt,
    batch,
    diagonal,
    good,
    learner_of,
    near,
    network,
    problem,
    pulled,
    quadratic,
    row,
)


@row(1, "p·Ap = 0")
def vanishing_curvature(user: User) -> None:
    b, v = normal(2), torch.ones(2)
    user.owns(b, v)
    monitor = ig.Monitor()
    solve = quadratic(diagonal(-1, 1), monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature at phi"):
        found = pulled(solve, b, v)
    assert monitor.last.status == Status.NEGATIVE_CURVATURE and monitor.last.min_curvature <= 0
    near(found, v)  # what a training that has settled makes of curvatures of size 1
    # one good direction and then a vanishing one
    v = torch.tensor([1.0, 1.0, 4.0])
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature"):
        found = pulled(quadratic(diagonal(-1, 1, 2)), normal(3), v)
    assert found.isfinite().all() and v @ found > 0
    minres = quadratic(diagonal(-1, 1), linear_solver=ig.MINRES(), on_failure="ignore")
    near(pulled(minres, b, torch.ones(2)), torch.tensor([-1.0, 1.0]))


@row(2, "an indefinite A")
def indefinite(user: User) -> None:
    b, v, matrix = normal(3), torch.ones(3), diagonal(-1 + 1e-6, 1, 2)
    user.owns(b, v)
    monitor = ig.Monitor()
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature at phi"):
        found = pulled(quadratic(matrix, monitor=monitor), b, v)
    assert monitor.last.status == Status.NEGATIVE_CURVATURE and monitor.last.min_curvature < 0
    assert v @ found > 0 and found.norm() <= v.norm() * (1 + 1e-12)
    # one product alone cannot see it; then the residual tells
    one = quadratic(matrix, linear_solver=ig.CG(maxiter=1), monitor=monitor)
    near(pulled(one, b, v), torch.full((3,), 1.5), 1e-5)
    assert monitor.last.status == Status.TRUNCATED and monitor.last.linear_residual > 1
    refusing = quadratic(matrix, on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match=r"non-positive curvature.*min_curvature -"):
        pulled(refusing, b, v)


@row(3, "NaN in the incoming gradient")
def nan_comes_in(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model, x, y)
    v = torch.tensor([1.0, float("nan"), 1.0])
    monitor = ig.Monitor()
    solve = ig.implicit(good, CONDITION, monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match="incoming gradient holds NaN or Inf"):
        assert grad(solve(theta, X), theta, v)[0].isnan().all()
    assert monitor.last.status == Status.NONFINITE_RHS and monitor.last.products == 0
    for style in STYLES:
        learner = learner_of(model, on_failure="ignore")
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        found = grad(learner(x).sum() * float("nan"), list(model.parameters()))
        assert all(g.isnan().all() for g in found)


SIZES = {
    torch.float16: (300.0, 1e-4),  # the squares of these over- and underflow in these dtypes
    torch.float32: (1e20, 1e-23),
    torch.float64: (1e200, 1e-200),
}


def sized(user: User, which: int) -> None:
    for dtype, sizes in SIZES.items():
        b = torch.ones(2, dtype=dtype, requires_grad=True)
        v = torch.tensor([1.0, -1.0], dtype=dtype) * sizes[which]
        user.owns(b, v)
        assert v.square().sum() in (float("inf"), 0.0) or (dtype == torch.float16 and which)
        monitor = ig.Monitor()
        found = pulled(quadratic(diagonal(2, 3), monitor=monitor, on_failure="raise"), b, v)
        eps = torch.finfo(dtype).eps
        near(found, v / torch.tensor([2.0, 3.0], dtype=dtype), 4 * eps if which == 0 else 2e-3)
        assert monitor.last.status == Status.CONVERGED


@row(4, "Inf in the incoming gradient, or its square overflows")
def large(user: User) -> None:
    sized(user, 0)
    b = normal(2)
    user.owns(b)
    solve = quadratic(diagonal(2, 3), on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match="NaN or Inf") as caught:
        pulled(solve, b, torch.tensor([1.0, float("inf")]))
    assert caught.value.report.status == Status.NONFINITE_RHS


@row(5, "the square of the incoming gradient underflows")
def small(user: User) -> None:
    sized(user, 1)


@row(6, "a zero incoming gradient")
def zero_comes_in(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model)
    monitor = ig.Monitor()
    solve = ig.implicit(good, CONDITION, monitor=monitor, on_failure="raise")
    (found,) = grad(solve(theta, X), theta, torch.zeros(3))
    assert torch.equal(found, torch.zeros(3)) and not found.signbit().any()
    assert (monitor.last.status, monitor.last.products) == (Status.ZERO_RHS, 0)
    for style in STYLES:
        learner = learner_of(model, monitor=monitor)
        adapt(learner, lambda: mse_loss(learner(x), y), style)  # noqa: B023
        found = grad(0.0 * learner(x).sum(), list(model.parameters()))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in found)
        assert (monitor.last.status, monitor.last.products) == (Status.ZERO_RHS, 0)


@row(7, "NaN in the Hessian")
def nan_in_the_hessian(user: User) -> None:
    theta = normal(3)
    user.owns(theta)
    condition = ig.argmin(lambda phi, theta: (phi - theta).square().sum(dim=0).sqrt())
    monitor = ig.Monitor()
    solve = ig.implicit(torch.clone, condition, monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match=r"gave NaN or Inf.*sqrt or norm at 0"):
        assert grad(solve(theta).sum(), theta)[0].isnan().all()
    assert monitor.last.status == Status.NONFINITE_OPERATOR


@row(8, "condition number 1e6")
def badly_conditioned(user: User) -> None:
    """The status is honest in every dtype.

    Deviation: the default budget is min(10 n, 1000) iterations, and 5 for `imaml`; "10 to 20" is
    for the caller to ask for.
    """
    basis, _ = torch.linalg.qr(normal(200, 200, grad=False))
    matrix = basis @ torch.diag(torch.logspace(-6, 0, 200)) @ basis.T
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stored, v = matrix.to(dtype), normal(200, seed=1, grad=False).to(dtype)
        theta = torch.zeros(200, dtype=dtype, requires_grad=True)
        user.owns(theta, v)
        condition = ig.argmin(lambda phi, b: phi @ (stored @ phi) / 2 - b @ phi)  # noqa: B023
        for cg in (ig.CG(rtol=1e-5), ig.CG(rtol=1e-5, maxiter=20), ig.CG(maxiter=20)):
            monitor = ig.Monitor()
            solve = ig.implicit(
                torch.clone, condition, linear_solver=cg, monitor=monitor, on_failure="ignore"
            )
            (u,) = grad(solve(theta), theta, v)
            report = monitor.last
            if dtype != torch.bfloat16:  # there, u is rounded once more
                residual = stored.double() @ u.double() - v.double()
                true = float(residual.norm() / v.double().norm())
                floor = 20 * torch.finfo(dtype).eps * float(u.norm() / v.norm())
                assert abs(report.linear_residual - true) <= 1e-3 * true + floor
            assert report.iterations <= (cg.maxiter or 1000)
            if report.status == Status.CONVERGED:
                eps = torch.finfo(dtype).eps
                assert report.linear_residual <= 2 * max(1e-5, 10 * eps)
            else:
                assert report.status in (
                    Status.TRUNCATED if cg.rtol is None else Status.MAX_ITER,
                    Status.STAGNATED,
                    Status.NEGATIVE_CURVATURE,  # rounding in bfloat16 makes the matrix indefinite
                )
                assert dtype == torch.bfloat16 or report.status != Status.NEGATIVE_CURVATURE
        with pytest.warns(ig.ImplicitGradWarning, match="ran out of iterations|non-positive"):
            few = ig.CG(rtol=1e-5, maxiter=3)
            grad(ig.implicit(torch.clone, condition, linear_solver=few)(theta), theta, v)


@row(9, "a non-symmetric operator")
def not_symmetric(user: User) -> None:
    """CG is refused for it when the solver is wrapped.

    Deviation: no probe for symmetry in backward. ∂F/∂φ of an objective is symmetric as torch takes
    it; `root` and `fixed_point` are known to be general, and CG does not go with them.
    """
    matrix, b, v = torch.tensor([[1.0, 2.0], [-2.0, 1.0]]), normal(2), torch.tensor([1.0, 1.0])
    user.owns(matrix, b, v)
    condition = ig.root(lambda phi, b: matrix @ phi - b)

    def solver(b: Tensor) -> Tensor:
        return torch.linalg.solve(matrix, b)

    for linear_solver in (ig.CG(), ig.MINRES()):
        for general in (condition, ig.fixed_point(lambda phi, b: phi - matrix @ phi + b)):
            with pytest.raises(ig.InvalidArgumentError, match="needs a symmetric system"):
                ig.implicit(solver, general, linear_solver=linear_solver)
    for linear_solver in (None, ig.NormalCG(), ig.Exact()):
        solve = ig.implicit(solver, condition, linear_solver=linear_solver, on_failure="raise")
        near(pulled(solve, b, v), matrix.T.inverse() @ v)


@row(10, "an absolute tolerance and a scaled loss")
def scaled_loss(user: User) -> None:
    theta, X = problem()
    model, (x, y) = network(), batch()
    user.owns(theta, X, model)
    solve = ig.implicit(good, CONDITION, on_failure="raise")
    phi, v = solve(theta, X), normal(3, seed=9, grad=False)
    learner = learner_of(model, linear_solver=ig.CG(maxiter=5))
    adapt(learner, lambda: mse_loss(learner(x), y), "tensor")
    outer, parameters = mse_loss(learner(x + 1), y), list(model.parameters())
    for k in (-40, -16, 16, 40):
        scale = 2.0**k
        first, second = (grad(phi, theta, s * v, retain_graph=True)[0] for s in (1.0, scale))
        assert torch.equal(scale * first, second)
        first, second = (grad(s * outer, parameters, retain_graph=True) for s in (1.0, scale))
        assert all(torch.equal(scale * a, b) for a, b in zip(first, second, strict=True))


@row(11, "a parameter without dimensions")
def without_dimensions(user: User) -> None:
    theta = torch.tensor(2.0, requires_grad=True)
    user.owns(theta)
    condition = ig.proximal(lambda phi: 1.5 * phi**2, 1.0)  # φ = θ/4
    for linear_solver in (ig.CG(), ig.NormalCG(), ig.MINRES(), ig.Exact()):
        solve = ig.implicit(
            lambda t: t / 4, condition, linear_solver=linear_solver, on_failure="raise"
        )
        near(grad(solve(theta), theta)[0], torch.tensor(0.25), 1e-13)


@row(12, "complex parameters")
def complex_parameters(user: User) -> None:
    """Refused by name as θ of imaml; complex φ and data have their gradient."""
    z = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    model = nn.Linear(2, 1, dtype=torch.complex128)
    user.owns(z, model)
    modulus = ig.argmin(lambda p, z: ((p - z.abs() ** 2) ** 2).sum())
    half = ig.argmin(lambda p, z: (2 * p - z).abs().square().sum())
    near(
        grad(ig.implicit(lambda z: z / 2, half)(z).real.sum(), z)[0],
        torch.tensor([0.5 + 0j, 0.5 + 0j]),
    )
    with pytest.raises(ig.InvalidArgumentError, match=r"theta must be real.*complex"):
        ig.imaml(model, lr=0.1).clone()
    near(grad(ig.implicit(lambda z: z.abs() ** 2, modulus)(z).sum(), z)[0], 2 * z.detach())


@row(13, "a loss linear in phi")
def linear_loss(user: User) -> None:
    """g = v after one product: CG does not know beforehand that H = 0, and says CONVERGED."""
    theta, c, v = normal(3, seed=1), normal(3, seed=2), normal(3, seed=3, grad=False)
    user.owns(theta, c, v)
    cases = {
        "linear": lambda phi, c: c @ phi,
        "constant": lambda phi, c: c.sum(),
        "without a graph": lambda phi, c: torch.tensor(1.0),
    }
    for function in cases.values():
        monitor = ig.Monitor()
        solve = ig.implicit(
            lambda t, c, f=function: t - (c if f is cases["linear"] else 0) / 2,
            ig.proximal(function, 2.0),
            monitor=monitor,
            on_failure="raise",
        )
        argument = c.detach() if function is cases["without a graph"] else c
        near(grad(solve(theta, argument), theta, v)[0], v, 1e-13)
        assert monitor.last.status == Status.CONVERGED and monitor.last.products <= 2


@row(14, "tolerances below the precision of the dtype")
def below_the_floor(user: User) -> None:
    """rtol counts as at least 10 eps; a residual above that is STAGNATED, not CONVERGED."""
    b = torch.zeros(30, dtype=torch.float32, requires_grad=True)
    user.owns(b)
    eps, errors, statuses = torch.finfo(torch.float32).eps, [], set()
    for seed in range(20):
        basis, _ = torch.linalg.qr(normal(30, 30, seed=seed, grad=False))
        matrix = (basis @ torch.diag(torch.logspace(-2, 0, 30)) @ basis.T).float()
        v, monitor = normal(30, seed=seed, grad=False).float(), ig.Monitor()
        solve = quadratic(
            (matrix + matrix.T) / 2,
            linear_solver=ig.CG(rtol=1e-15),
            monitor=monitor,
            on_failure="ignore",
        )
        u = pulled(solve, b, v).double()
        report = monitor.last
        assert report.status in (Status.CONVERGED, Status.STAGNATED)
        statuses.add(report.status)
        if report.status == Status.CONVERGED:
            assert report.linear_residual <= 2 * 10 * eps
        exact = torch.linalg.solve((matrix + matrix.T).double() / 2, v.double())
        errors.append(float((u - exact).norm() / exact.norm()))
    assert max(errors) < 100 * 10 * eps and Status.CONVERGED in statuses
