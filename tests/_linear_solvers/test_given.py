"""Functions of the user's as linear solvers: SciPy's, factorisations, and answers that are none."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status

F64 = torch.float64
N = 30


def tridiagonal(c: Tensor) -> Tensor:
    """Convection and diffusion: not symmetric."""
    n = len(c)
    above = torch.diag(torch.ones(n - 1, dtype=c.dtype), 1)
    return torch.diag(c) - 0.9 * above - 0.2 * above.T


def residual(phi, c, f):
    return tridiagonal(c) @ phi + 0.1 * phi**3 - f


def exact(c, f):
    phi = torch.zeros_like(f)
    for _ in range(30):
        jacobian = torch.func.jacrev(residual)(phi, c.detach(), f.detach())
        phi = phi - torch.linalg.solve(jacobian, residual(phi, c.detach(), f.detach()))
    return phi


def problem(dtype=F64):
    c = torch.linspace(2.0, 3.0, N, dtype=dtype, requires_grad=True)
    f = torch.linspace(-1.0, 2.0, N, dtype=dtype, requires_grad=True)
    return c, f, torch.linspace(1.0, -1.0, N, dtype=dtype)


def expected(c, f, v):
    """v·dφ/d(c, f) by dense algebra: F has derivatives φ and −1 with respect to c and f."""
    phi = exact(c, f)
    jacobian = torch.func.jacrev(residual)(phi, c.detach(), f.detach())
    u = torch.linalg.solve(jacobian.T, v)
    return -u * phi, u


def gradients(linear_solver, dtype=F64, **options):
    c, f, v = problem(dtype)
    solve = ig.implicit(exact, ig.root(residual), linear_solver=linear_solver, **options)
    return torch.autograd.grad(solve(c, f) @ v, (c, f))


def by_scipy(matvec, b):
    product = scipy.sparse.linalg.LinearOperator(
        (len(b), len(b)), matvec=lambda x: matvec(x).numpy(), dtype=b.numpy().dtype
    )
    return scipy.sparse.linalg.gmres(product, b.numpy(), rtol=1e-10)[0]


class Factorised:
    """A sparse factorisation of A, made where the system is solved, used as its transpose."""

    def solver(self, c, f):
        phi = exact(c, f)
        jacobian = torch.func.jacrev(residual)(phi, c, f)
        self.factors = scipy.sparse.linalg.splu(scipy.sparse.csc_matrix(jacobian.numpy()))
        return phi

    def transposed(self, matvec, b):
        return self.factors.solve(b.numpy(), trans="T")

    def not_transposed(self, matvec, b):
        return self.factors.solve(b.numpy())


def dense(matvec, b):
    """The matrix by its columns; a torch tensor comes back."""
    matrix = torch.stack([matvec(e) for e in torch.eye(len(b), dtype=b.dtype)], dim=1)
    return torch.linalg.solve(matrix, b)


# ---------------------------------------------------------------- it works


@pytest.mark.parametrize("function", [by_scipy, dense], ids=["scipy", "dense"])
def test_a_function_solves_the_adjoint_system(function):
    found = gradients(function, on_failure="raise")
    for actual, closed in zip(found, expected(*problem()), strict=True):
        torch.testing.assert_close(actual, closed, rtol=1e-8, atol=1e-9)


def test_a_factorisation_of_the_solver_s_own():
    c, f, v = problem()
    sparse, monitor = Factorised(), ig.Monitor()
    solve = ig.implicit(
        sparse.solver,
        ig.root(residual),
        linear_solver=sparse.transposed,
        on_failure="raise",
        monitor=monitor,
    )
    found = torch.autograd.grad(solve(c, f) @ v, (c, f))
    for actual, closed in zip(found, expected(c, f, v), strict=True):
        torch.testing.assert_close(actual, closed)
    assert monitor.last.status == Status.CONVERGED and monitor.last.linear_residual < 1e-12


def test_second_derivatives_go_through_a_function():
    c, f, v = problem()
    slopes = []
    for linear_solver in (dense, ig.Exact()):
        solve = ig.implicit(exact, ig.root(residual), linear_solver=linear_solver)
        (first,) = torch.autograd.grad(solve(c, f) @ v, c, create_graph=True)
        slopes.append(torch.autograd.grad(first.square().sum(), (c, f)))
    for actual, other in zip(*slopes, strict=True):
        assert actual.norm() > 1e-3
        torch.testing.assert_close(actual, other, rtol=1e-9, atol=1e-10)


def test_the_default_precision_of_other_packages_is_enough_in_float32():
    def loosely(matvec, b):
        product = scipy.sparse.linalg.LinearOperator(
            (len(b), len(b)), matvec=lambda x: matvec(x).numpy(), dtype=np.float32
        )
        return scipy.sparse.linalg.gmres(product, b.numpy())[0]

    found = gradients(loosely, dtype=torch.float32, on_failure="raise")
    for actual, closed in zip(found, expected(*problem()), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), closed, rtol=1e-2, atol=1e-3)


def test_phi_of_several_tensors_is_one_vector():
    seen = []

    def watched(matvec, b):
        seen.append(tuple(b.shape))
        return dense(matvec, b)

    theta = torch.tensor([[2.0, 3.0]], dtype=F64, requires_grad=True)
    solve = ig.implicit(
        lambda t: {"a": t.square(), "b": (2 * t)[0]},
        ig.root(lambda p, t: {"a": p["a"] - t.square(), "b": p["b"] - 2 * t[0]}),
        linear_solver=watched,
    )
    phi = solve(theta)
    (grad,) = torch.autograd.grad(phi["a"].sum() + phi["b"].sum(), theta)
    torch.testing.assert_close(grad, 2 * theta.detach() + 2)
    assert seen == [(4,)]


def test_the_function_may_write_into_b():
    def in_place(matvec, b):
        b /= 4.0
        return b

    theta = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    solve = ig.implicit(
        lambda t: t / 4,
        ig.root(lambda p, t: 4 * p - t),
        linear_solver=in_place,
        on_failure="raise",
    )
    solve(theta).sum().backward()
    torch.testing.assert_close(theta.grad, torch.full((2,), 0.25, dtype=F64))


# ---------------------------------------------------------------- answers that are none


def status(linear_solver) -> Status:
    monitor = ig.Monitor()
    gradients(linear_solver, monitor=monitor, on_failure="ignore")
    return monitor.last.status


@pytest.mark.parametrize(
    "function",
    [
        lambda matvec, b: b,
        lambda matvec, b: torch.zeros_like(b),
        lambda matvec, b: 1.01 * dense(matvec, b),
        lambda matvec, b: -dense(matvec, b),
        lambda matvec, b: torch.full_like(b, float("nan")),
        lambda matvec, b: np.full(len(b), np.inf),
    ],
    ids=["b", "zeros", "a percent off", "wrong sign", "nan", "inf"],
)
def test_a_wrong_answer_is_told(function):
    assert status(function) == Status.UNSOLVED
    with pytest.raises(ig.LinearSolveError, match="does not solve the system"):
        gradients(function, on_failure="raise")


def test_the_untransposed_factorisation_is_told():
    c, f, v = problem()
    sparse = Factorised()
    solve = ig.implicit(
        sparse.solver,
        ig.root(residual),
        linear_solver=sparse.not_transposed,
        on_failure="raise",
    )
    with pytest.raises(ig.LinearSolveError, match="transposed"):
        (solve(c, f) @ v).backward()


def test_products_that_are_not_finite_are_not_the_function_s_fault():
    theta = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    monitor = ig.Monitor()
    solve = ig.implicit(
        lambda t: t.detach().square(),
        ig.root(lambda p, t: p.sqrt() - t),  # its slope at 0 is infinite
        linear_solver=dense,
        monitor=monitor,
        on_failure="ignore",
        check="never",
    )
    solve(theta).sum().backward()
    assert monitor.last.status == Status.NONFINITE_OPERATOR


@pytest.mark.parametrize(
    "function",
    [
        lambda matvec, b: b[:-1],
        lambda matvec, b: b[:, None],
        lambda matvec, b: b.numpy().reshape(1, -1),
        lambda matvec, b: b * 1j,
        lambda matvec, b: None,
        lambda matvec, b: (b, 0),
        lambda matvec, b: "x",
    ],
    ids=["short", "column", "row", "complex", "None", "tuple", "text"],
)
def test_what_is_no_vector_like_b_is_refused(function):
    with pytest.raises(ig.InvalidArgumentError, match=r"linear_solver: .*shape \(30,\), as b is"):
        gradients(function)


def test_matvec_takes_vectors_like_b_only():
    with pytest.raises(ig.InvalidArgumentError, match=r"matvec got .*shape \(30,\)"):
        gradients(lambda matvec, b: matvec(b[:4]))


def test_an_exception_of_the_function_s_own_comes_through():
    def broken(matvec, b):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        gradients(broken)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (lambda b: b, "two arguments"),
        (ig.GMRES, r"write GMRES\(\)"),
        ("gmres", "'gmres'"),
        (3, "got 3"),
        (dict, "dict"),
    ],
)
def test_what_is_no_linear_solver_is_refused_before_any_work(given, sentence):
    with pytest.raises(ig.InvalidArgumentError, match=sentence) as caught:
        ig.implicit(exact, ig.root(residual), linear_solver=given)
    assert "linear_solver" in str(caught.value) and "solve(matvec, b)" in str(caught.value)


# ---------------------------------------------------------------- elsewhere


def test_imaml_takes_a_function():
    grads = []
    for linear_solver in (ig.Exact(), dense):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1).double()
        maml = ig.imaml(net, lr=0.1, lam=2.0, linear_solver=linear_solver)
        x, y = torch.randn(8, 3, dtype=F64), torch.randn(8, 1, dtype=F64)
        learner = maml.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ig.ImplicitGradWarning)  # 60 steps leave a little
            for _ in range(60):
                learner.adapt((learner(x) - y).square().mean())
            (learner(x) - 1).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert grads[0].norm() > 1e-3
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
