"""A museum of wrong gradients: faults of other libraries and of everyday code, and their causes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchopt
from torch import Tensor

import implicit_grad as ig
from implicit_grad._errors import Status
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, relative_residual
from implicit_grad.testing import Cause
from implicit_grad.testing.problems import SpectralMatrix

F64 = torch.float64


@dataclasses.dataclass(frozen=True)
class Piece:
    """A faulty solver at its arguments; `options` are check_implicit's."""

    solve: Callable[..., Any]
    args: tuple[Any, ...]
    cause: Cause
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PIECES: dict[str, Callable[[], Piece]] = {}


def piece(function: Callable[[], Piece]) -> Callable[[], Piece]:
    PIECES[function.__name__] = function
    return function


def normal(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=random).requires_grad_(grad)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


# ---------------------------------------------------------------- ridge regression and its parts


def objective(w, X, y, lam):
    return (X @ w - y).square().sum() / 2 + lam / 2 * w.square().sum()


def ridge(X, y, lam):
    return torch.linalg.solve(X.T @ X + lam * torch.eye(X.shape[1], dtype=F64), X.T @ y)


def data() -> tuple[Tensor, Tensor, Tensor]:
    return normal(9, 4, seed=1), normal(9, seed=2), number(0.7)


def descent(steps: int, lr: float = 0.02):
    def solver(X, y, lam):
        w = torch.zeros(X.shape[1], dtype=F64)
        for _ in range(steps):
            w = w - lr * (X.T @ (X @ w - y) + lam * w)
        return w

    return solver


def of_ridge(solver, cause, condition=objective, **options) -> Piece:
    return Piece(ig.implicit(solver, ig.argmin(condition), **options), data(), cause)


def by_hand(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Tensor]:
    """Ridge regression with a backward pass written by hand: backward(v, w, H, X, y, lam)."""

    class Ridge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, X, y, lam):
            w = ridge(X, y, lam)
            ctx.save_for_backward(w, X, y, lam)
            return w

        @staticmethod
        def backward(ctx, v):
            w, X, y, lam = ctx.saved_tensors
            H = X.T @ X + lam * torch.eye(X.shape[1], dtype=F64)
            return backward(v, w, H, X, y, lam)

    return lambda X, y, lam: Ridge.apply(X, y, lam)


def right_parts(u, w, X, y):
    """−(∂F/∂a)ᵀu for F = Xᵀ(X w − y) + λ w."""
    r = X @ w - y
    return -(torch.outer(r, u) + torch.outer(X @ u, w)), X @ u, -(w @ u)


def of_hand(backward, cause, known: bool = True) -> Piece:
    options = {"condition": ig.argmin(objective)} if known else {}
    return Piece(by_hand(backward), data(), cause, options)


# ---------------------------------------------------------------- linear solvers of the peers


@dataclasses.dataclass(frozen=True)
class Peer(LinearSolver):
    """A loop that somebody wrote: rhs, matvec ↦ x."""

    loop: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    symmetric_only = True

    def _solve(self, operator, rhs, unit, verify) -> LinearSolution:
        x = self.loop(operator.matvec, rhs)
        return LinearSolution(x, Status.CONVERGED, 1, relative_residual(operator, x, rhs))


def cg(matvec, b, steps, previous=False, old_residual=False):
    x, r = torch.zeros_like(b), b.clone()
    p, last = r.clone(), x
    for _ in range(steps):
        last, rr, product = x, r @ r, matvec(p)
        if float(rr) < 1e-20:
            break
        alpha = rr / (p @ product)
        x, new = x + alpha * p, r - alpha * product
        p = (r if old_residual else new) + (new @ new) / rr * p
        r = new
    return last if previous else x


@piece
def hypertorch_returns_the_iterate_before_the_last():
    loop = Peer(lambda A, b: cg(A, b, len(b), previous=True))
    return of_ridge(ridge, Cause.LINEAR_SOLVE_NOT_CONVERGED, linear_solver=loop)


@piece
def hypertorch_returns_zero_for_the_identity():
    loop = Peer(lambda A, b: cg(A, b, 1, previous=True))
    condition = ig.argmin(lambda p, t: (p - t).square().sum() / 2)
    solve = ig.implicit(lambda t: t.clone(), condition, linear_solver=loop)
    return Piece(solve, (normal(3),), Cause.STRUCTURALLY_ZERO)


@piece
def hypergrad_builds_directions_from_the_old_residual():
    loop = Peer(lambda A, b: cg(A, b, 10, old_residual=True))
    return of_ridge(ridge, Cause.LINEAR_SOLVE_NOT_CONVERGED, linear_solver=loop)


@piece
def betty_is_right_for_cg_alpha_1_only():
    loop = Peer(lambda A, b: 0.3 * cg(A, b, 20))
    return of_ridge(ridge, Cause.WRONG_SCALE, linear_solver=loop)


def torchopt_root(residual, **options):
    """torchopt's custom_root, without the warnings of its own making."""

    def decorate(solver):
        wrapped = torchopt.diff.implicit.custom_root(residual, argnums=1, **options)(solver)

        def quiet(*args):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return wrapped(*args)

        return quiet

    return decorate


def coupled(p, b):
    x = torch.cat(p)
    matrix = SpectralMatrix((1.0, 2.0, 3.0, 4.0), seed=1).matrix
    return x @ matrix @ x / 2 - (b * x).sum()


@piece
def torchopt_solves_for_the_diagonal_blocks_only():
    @torchopt_root(torch.func.grad(coupled), solve=torchopt.linear_solve.solve_inv())
    def solver(init, b):
        x = torch.linalg.solve(SpectralMatrix((1.0, 2.0, 3.0, 4.0), seed=1).matrix, b)
        return x[:2].clone(), x[2:].clone()

    init = (torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64))
    options = {"condition": ig.argmin(coupled)}
    return Piece(lambda b: solver(init, b), (normal(4),), Cause.BLOCK_DIAGONAL, options)


@piece
def torchopt_has_no_gradient_for_scalars():
    def square(p, t):
        return (p - t) ** 2

    @torchopt_root(torch.func.grad(square))
    def solver(init, t):
        return t.detach().clone()

    options = {"condition": ig.argmin(square)}
    init = torch.tensor(0.0, dtype=F64)
    return Piece(lambda t: solver(init, t), (number(0.5),), Cause.STRUCTURALLY_ZERO, options)


@piece
def torchopt_hands_a_nonsymmetric_system_to_cg():
    matrix = SpectralMatrix((1.0, 2.0, 3.0), seed=1, skew=2.0).matrix

    def residual(p, b):
        return matrix @ p - b

    @torchopt_root(residual, solve=torchopt.linear_solve.solve_cg(maxiter=3))
    def solver(init, b):
        return torch.linalg.solve(matrix, b)

    init, options = torch.zeros(3, dtype=F64), {"condition": ig.root(residual)}
    return Piece(lambda b: solver(init, b), (normal(3),), Cause.ASYMMETRIC_OPERATOR, options)


@piece
def imaml_dev_binds_its_damping_elsewhere():
    H = SpectralMatrix((0.2, 1.0, 3.0, 7.0), seed=1).matrix
    eye = torch.eye(4, dtype=F64)

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, theta):
            return torch.linalg.solve(eye + H / 2, theta)

        @staticmethod
        def backward(ctx, v):
            return torch.linalg.solve(2 * eye + H / 12, v)

    options = {"condition": ig.proximal(lambda p: p @ H @ p / 2, 2.0)}
    return Piece(Solve.apply, (normal(4),), Cause.SHIFTED_OPERATOR, options)


@piece
def imaml_dev_forgets_the_proximal_term():
    H = SpectralMatrix((1.0, 2.0, 4.0), seed=1).matrix
    condition = ig.proximal(lambda p, b: p @ H @ p / 2 - b @ p, 2.0)
    solve = ig.implicit(lambda theta, b: torch.linalg.solve(H, b), condition)
    return Piece(solve, (normal(3, seed=1), normal(3, seed=2)), Cause.WRONG_CONDITION)


@piece
def optimistix_has_no_isolated_solution():
    def least_norm(X, y):
        return torch.linalg.pinv(X) @ y

    condition = ig.argmin(lambda w, X, y: (X @ w - y).square().sum())
    return Piece(
        ig.implicit(least_norm, condition), (normal(2, 4, seed=1), normal(2)), Cause.NOT_ISOLATED
    )


@piece
def a_truss_may_lie_anywhere():
    """And where its joints meet, lengths have no slope by torch's word, so that F is 0 there."""
    ends = torch.triu_indices(4, 4, 1)
    matrix = torch.zeros(6, 4, dtype=F64)
    matrix[range(6), ends[0]], matrix[range(6), ends[1]] = 1.0, -1.0

    def energy(x, lengths):
        return ((matrix @ x).norm(dim=1) - lengths).square().sum()

    def relax(lengths):
        x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=F64)
        for _ in range(200):  # each spring turned to where it is, the joints fitted to all of them
            springs = matrix @ x
            x = torch.linalg.pinv(matrix) @ (
                lengths[:, None] * springs / springs.norm(dim=1)[:, None]
            )
        return x

    lengths = torch.tensor([1.0, 1.5, 1.1, 0.9, 1.3, 1.2], dtype=F64)
    return Piece(ig.implicit(relax, ig.argmin(energy)), (lengths,), Cause.NOT_ISOLATED)


# ---------------------------------------------------------------- the inner problem


@piece
def cvxpylayers_stops_too_early():
    return of_ridge(descent(15), Cause.INNER_NOT_SOLVED)


@piece
def the_solver_does_nothing():
    condition = ig.proximal(lambda p, y: (p - y).square().sum(), 1.0)
    solve = ig.implicit(lambda theta, y: theta.clone(), condition)
    return Piece(solve, (normal(3), normal(3, seed=1)), Cause.INNER_NOT_SOLVED)


@piece
def a_minimiser_of_ours_stops_too_early():
    solver = ig.solvers.GradientDescent(lr=0.02, steps=5)
    solve = ig.implicit(solver, ig.argmin(objective), init=lambda X, *_: torch.zeros_like(X[0]))
    return Piece(solve, data(), Cause.INNER_NOT_SOLVED)


@piece
def a_start_that_still_matters():
    H = SpectralMatrix((0.1, 1.0, 2.0), seed=1).matrix

    def solver(init, b):
        for _ in range(10):
            init = init - 0.3 * (H @ init - b)
        return init

    condition = ig.argmin(lambda p, init, b: p @ H @ p / 2 - b @ p)
    args = (normal(3, seed=1), normal(3, seed=2))
    return Piece(ig.implicit(solver, condition), args, Cause.INNER_NOT_SOLVED)


@piece
def half_the_lambda():
    return of_ridge(lambda X, y, lam: ridge(X, y, lam / 2), Cause.WRONG_CONDITION)


@piece
def a_mean_in_place_of_the_sum():
    def condition(w, X, y, lam):
        return (X @ w - y).square().mean() + lam * w.square().sum()

    return of_ridge(ridge, Cause.WRONG_CONDITION, condition)


@piece
def half_the_lambda_of_a_proximal_term():
    H = SpectralMatrix((1.0, 2.0, 4.0), seed=1).matrix
    eye = torch.eye(3, dtype=F64)
    solve = ig.implicit(
        lambda theta: torch.linalg.solve(H + eye, theta),
        ig.proximal(lambda p: p @ H @ p / 2, lam=0.5),
    )
    return Piece(solve, (normal(3),), Cause.WRONG_CONDITION)


@piece
def the_solver_returns_the_negative():
    return of_ridge(lambda *args: -ridge(*args), Cause.WRONG_CONDITION)


@piece
def a_solver_that_depends_on_more_than_the_condition():
    y0 = data()[1].detach() + 0  # what the condition expects at this point only
    lam0 = 0.7

    def solver(X, y, lam):
        return ridge(X, y + (lam - lam0) * (1 + y0), lam)

    return of_ridge(solver, Cause.WRONG_CONDITION)


@piece
def a_saddle_point():
    H = SpectralMatrix((-1.0, 0.5, 2.0), seed=1).matrix
    condition = ig.argmin(lambda p, b: p @ H @ p / 2 - b @ p)
    solve = ig.implicit(lambda b: torch.linalg.solve(H, b), condition)
    return Piece(solve, (normal(3),), Cause.NEGATIVE_CURVATURE)


# ---------------------------------------------------------------- the linear system


@piece
def one_iteration_of_cg():
    linear_solver = ig.CG(maxiter=1, rtol=None)
    return of_ridge(ridge, Cause.LINEAR_SOLVE_NOT_CONVERGED, linear_solver=linear_solver)


@piece
def a_short_neumann_series():
    W = SpectralMatrix((0.9, 0.5, 0.1), seed=1, skew=0.3).matrix
    solve = ig.implicit(
        lambda b: torch.linalg.solve(torch.eye(3, dtype=F64) - W, b),
        ig.fixed_point(lambda p, b: W @ p + b),
        linear_solver=ig.Neumann(terms=4),
    )
    return Piece(solve, (normal(3),), Cause.LINEAR_SOLVE_NOT_CONVERGED)


@piece
def damping():
    return of_ridge(ridge, Cause.APPROXIMATION, linear_solver=ig.CG(damping=0.5))


@piece
def no_negative_curvature():
    """A minimum near θ of what bends down, without what is negative in its curvature."""
    h, theta = torch.tensor([-1.0, 0.5, 3.0], dtype=F64), normal(3)
    condition = ig.proximal(lambda p: (h * p * p).sum() / 2, 2.0)
    linear_solver = ig.PositivePart()
    solve = ig.implicit(lambda t: 2 * t / (2 + h), condition, linear_solver=linear_solver)
    return Piece(solve, (theta,), Cause.APPROXIMATION)


@piece
def a_training_that_stopped():
    linear_solver = ig.EarlyStopped(time=0.1)
    return of_ridge(ridge, Cause.APPROXIMATION, linear_solver=linear_solver)


@piece
def gauss_newton():
    X, y = normal(6, 3, seed=1, grad=False), normal(6, seed=2)

    def loss(outputs, y):
        return (outputs - y).square().sum()

    def model(w, y):
        return torch.tanh(X @ w)

    def solver(theta, y):
        w = theta.detach().clone()
        for _ in range(400):
            w = w.requires_grad_()
            value = loss(model(w, y), y) + 2 * (w - theta).square().sum()
            (slope,) = torch.autograd.grad(value, w)
            w = (w - 0.05 * slope).detach()
        return w

    solve = ig.implicit(solver, ig.proximal(loss, 4.0, model=model), curvature="gauss_newton")
    return Piece(solve, (normal(3, seed=3), y), Cause.APPROXIMATION)


class Twisted(torch.autograd.Function):
    """Half of wᵀw, with M w for its gradient: no objective has that one."""

    @staticmethod
    def forward(ctx, w, matrix):
        ctx.save_for_backward(w, matrix)
        return (w * w).sum() / 2

    @staticmethod
    def backward(ctx, v):
        w, matrix = ctx.saved_tensors
        return v * (matrix @ w), None


@piece
def an_objective_with_an_asymmetric_hessian():
    matrix = SpectralMatrix((1.0, 2.0, 3.0), seed=1, skew=1.5).matrix
    condition = ig.argmin(lambda p, b: Twisted.apply(p, matrix) - b @ p)
    solve = ig.implicit(lambda b: torch.linalg.solve(matrix, b), condition, check="never")
    return Piece(solve, (normal(3),), Cause.ASYMMETRIC_OPERATOR)


# ---------------------------------------------------------------- backward passes written by hand


@piece
def the_wrong_sign():
    def backward(v, w, H, X, y, lam):
        return tuple(-g for g in right_parts(torch.linalg.solve(H, v), w, X, y))

    return of_hand(backward, Cause.WRONG_SIGN)


@piece
def the_wrong_sign_seen_from_outside():
    def backward(v, w, H, X, y, lam):
        return tuple(-g for g in right_parts(torch.linalg.solve(H, v), w, X, y))

    return of_hand(backward, Cause.WRONG_SIGN, known=False)


@piece
def the_wrong_sign_for_lambda():
    def backward(v, w, H, X, y, lam):
        dX, dy, dlam = right_parts(torch.linalg.solve(H, v), w, X, y)
        return dX, dy, -dlam

    return of_hand(backward, Cause.WRONG_SIGN)


def not_finite(value: float, known: bool) -> Piece:
    def backward(v, w, H, X, y, lam):
        dX, dy, dlam = right_parts(torch.linalg.solve(H, v), w, X, y)
        return dX, torch.cat([dy[:-1], torch.full((1,), value, dtype=F64)]), dlam

    return of_hand(backward, Cause.NOT_FINITE, known)


@piece
def an_infinite_element():
    return not_finite(float("inf"), known=True)


@piece
def an_infinite_element_seen_from_outside():
    return not_finite(float("inf"), known=False)


@piece
def an_element_that_is_not_a_number():
    return not_finite(float("nan"), known=True)


@piece
def a_dropped_cross_term():
    def backward(v, w, H, X, y, lam):
        u = torch.linalg.solve(H, v)
        _, dy, dlam = right_parts(u, w, X, y)
        return -torch.outer(X @ u, w), dy, dlam

    return of_hand(backward, Cause.MISSING_CROSS_DERIVATIVE)


@piece
def first_order_only():
    return of_hand(
        lambda v, w, H, X, y, lam: right_parts(v, w, X, y), Cause.LINEAR_SOLVE_NOT_CONVERGED
    )


@piece
def a_factor_two():
    def backward(v, w, H, X, y, lam):
        return tuple(2 * g for g in right_parts(torch.linalg.solve(H, v), w, X, y))

    return of_hand(backward, Cause.WRONG_SCALE)


@piece
def a_factor_two_seen_from_outside():
    def backward(v, w, H, X, y, lam):
        return tuple(2 * g for g in right_parts(torch.linalg.solve(H, v), w, X, y))

    return of_hand(backward, Cause.WRONG_SCALE, known=False)


@piece
def a_factor_two_for_one_argument_seen_from_outside():
    def backward(v, w, H, X, y, lam):
        dX, dy, dlam = right_parts(torch.linalg.solve(H, v), w, X, y)
        return dX, 2 * dy, dlam

    return of_hand(backward, Cause.WRONG_SCALE, known=False)


@piece
def the_wrong_lambda_in_the_system():
    def backward(v, w, H, X, y, lam):
        wrong = H - lam / 2 * torch.eye(len(v), dtype=F64)
        return right_parts(torch.linalg.solve(wrong, v), w, X, y)

    return of_hand(backward, Cause.SHIFTED_OPERATOR)


@piece
def no_gradient_for_lambda():
    def backward(v, w, H, X, y, lam):
        dX, dy, _ = right_parts(torch.linalg.solve(H, v), w, X, y)
        return dX, dy, None

    return of_hand(backward, Cause.STRUCTURALLY_ZERO)


@piece
def a_wrong_factor_for_one_of_two_numbers():
    X, y, lam = (t.detach() for t in data())
    eye = torch.eye(4, dtype=F64)

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lam, size):
            w = size * torch.linalg.solve(X.T @ X + lam * eye, X.T @ y)
            ctx.save_for_backward(lam, w)
            return w

        @staticmethod
        def backward(ctx, v):
            lam, w = ctx.saved_tensors
            u = torch.linalg.solve(X.T @ X + lam * eye, v)
            return -(w @ u), 2 * (X @ u) @ y

    condition = ig.argmin(lambda w, lam, size: objective(w, X, size * y, lam))
    args = (lam.clone().requires_grad_(), number(1.5))
    return Piece(Solve.apply, args, Cause.MISSING_CROSS_DERIVATIVE, {"condition": condition})


@piece
def a_missing_transpose():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, M, b):
            x = torch.linalg.solve(M, b)
            ctx.save_for_backward(M, x)
            return x

        @staticmethod
        def backward(ctx, v):
            M, x = ctx.saved_tensors
            u = torch.linalg.solve(M, v)
            return -torch.outer(u, x), u

    matrix = SpectralMatrix((1.0, 2.0, 3.0), seed=1, skew=1.0).matrix.requires_grad_()
    options = {"condition": ig.root(lambda x, M, b: M @ x - b)}
    return Piece(Root.apply, (matrix, normal(3)), Cause.MISSING_TRANSPOSE, options)


@piece
def state_kept_outside_of_the_graph():
    last: dict[str, Tensor] = {}

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            last["x"] = a.sqrt()
            return last["x"].clone()

        @staticmethod
        def backward(ctx, v):
            return v / (2 * last["x"])

    options = {"condition": ig.root(lambda x, a: x * x - a)}
    args = (normal(3).detach().abs().add(0.5).requires_grad_(),)
    return Piece(Solve.apply, args, Cause.STALE_STATE, options)


@piece
def a_linearisation_kept_from_the_first_call():
    first: dict[str, Tensor] = {}

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            x = a.sqrt()
            first.setdefault("x", x)
            return x.clone()

        @staticmethod
        def backward(ctx, v):
            return v / (2 * first["x"])

    options = {"condition": ig.root(lambda x, a: x * x - a)}
    args = (normal(3).detach().abs().add(0.5).requires_grad_(),)
    return Piece(Solve.apply, args, Cause.STALE_STATE, options)


# ---------------------------------------------------------------- lost on the way


@piece
def a_detached_argument_in_the_objective():
    def detached(w, X, y, lam):
        return objective(w, X.detach(), y, lam)

    return of_ridge(ridge, Cause.MISSING_CROSS_DERIVATIVE, detached)


@piece
def half_of_an_argument_detached():
    def detached(w, X, y, lam):
        return (X @ w).square().sum() / 2 - (X.detach() @ w) @ y + lam / 2 * w.square().sum()

    return of_ridge(ridge, Cause.MISSING_CROSS_DERIVATIVE, detached)


@piece
def lambda_as_an_item():
    def item(w, X, y, lam):
        return objective(w, X, y, lam.item())

    return of_ridge(ridge, Cause.MISSING_CROSS_DERIVATIVE, item)


@piece
def phi_detached_in_the_objective():
    def detached(w, X, y, lam):
        return objective(w, X, y, 0.0) + lam * (w.detach() * w).sum()

    return of_ridge(ridge, Cause.WRONG_JACOBIAN, detached, check="never")


@piece
def a_detached_solution():
    return Piece(lambda *args: ridge(*args).detach(), data(), Cause.STRUCTURALLY_ZERO)


@piece
def an_argument_converted_on_the_way():
    solve = ig.implicit(ridge, ig.argmin(objective))
    return Piece(
        lambda X, y, lam: solve(X, y, lam.item() * torch.ones((), dtype=F64)),
        data(),
        Cause.STRUCTURALLY_ZERO,
    )


@piece
def a_captured_tensor_detached():
    W = normal(9, 4, seed=3)

    def condition(w, y, lam):
        return objective(w, W.detach(), y, lam)

    solve = ig.implicit(lambda y, lam: ridge(W.detach(), y, lam), ig.argmin(condition))
    return Piece(solve, data()[1:], Cause.CAPTURED_TENSOR)


@piece
def a_captured_tensor_that_a_function_cannot_see():
    W = normal(4, seed=3)

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a * W.detach()

        @staticmethod
        def backward(ctx, v):
            return v * W.detach()

    def solve(a):
        return Solve.apply(a) + 0 * W.sum().detach()

    return Piece(solve, (normal(4),), Cause.CAPTURED_TENSOR)


@piece
def a_copy_of_an_argument_captured():
    X, y, lam = data()
    copy = X.detach().clone()
    solve = ig.implicit(ridge, ig.argmin(lambda w, X, y, lam: objective(w, copy, y, lam)))
    return Piece(solve, (X, y, lam), Cause.CAPTURED_TENSOR)


# ---------------------------------------------------------------- the black box itself


@piece
def noise():
    def solver(X, y, lam):
        return ridge(X, y, lam) + 1e-3 * torch.randn(X.shape[1], dtype=F64)

    return of_ridge(solver, Cause.NON_DETERMINISTIC)


@piece
def rounding():
    def solver(X, y, lam):
        return torch.round(ridge(X, y, lam), decimals=2)

    return of_ridge(solver, Cause.REFERENCE_TOO_NOISY)
