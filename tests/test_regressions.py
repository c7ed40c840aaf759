"""Wrong numbers that an expert's review found in drafts of this library, and must not come back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import implicit_grad as ig


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Outputs(nn.Module):
    """A regression whose forward returns its prediction, alone or with what it came from."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.form = form
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.body(x))
        prediction = self.head(hidden)
        forms = {"alone": (prediction,), "with hidden": (hidden, prediction)}
        return forms.get(self.form, (prediction, prediction))


def gauss_newton_gradient(form: str, x: Tensor, y: Tensor) -> Tensor:
    model = Outputs(form)
    maml = ig.imaml(
        model,
        lr=0.1,
        lam=0.3,
        linear_solver=ig.Exact(),
        curvature="gauss_newton",
    )
    learner = maml.clone()
    learner.adapt(mse_loss(learner(x)[-1], y))
    mse_loss(learner(x + 1)[-1], y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("form", ["with hidden", "twice"])
def test_gauss_newton_counts_an_output_behind_another_once(form):
    x, y = normal(5, 3), normal(5, 1)
    expected = gauss_newton_gradient("alone", x, y)
    torch.testing.assert_close(gauss_newton_gradient(form, x, y), expected, rtol=1e-12, atol=0)


def test_hooks_of_captured_leaves_run_once():
    theta, c = normal(3).requires_grad_(), normal(3).requires_grad_()
    plain = ig.implicit(
        lambda t: t - c.detach(),
        ig.argmin(lambda p, t: ((p - t + c) ** 2).sum()),
        on_failure="raise",
    )
    (expected,) = torch.autograd.grad(plain(theta).square().sum(), c)
    c.register_hook(lambda grad: 10 * grad)
    plain(theta).square().sum().backward()
    torch.testing.assert_close(c.grad, 10 * expected, rtol=1e-12, atol=0)


def test_a_solver_may_use_its_buffer_again():
    buffer = np.zeros(3)

    def solver(theta: Tensor) -> np.ndarray:
        buffer[:] = theta.numpy() / 2
        return buffer

    solve = ig.implicit(solver, ig.argmin(lambda p, t: (p**4 / 4 - p * t**3 / 8).sum()))
    first, second = normal(3).abs().add(1).requires_grad_(), normal(3)
    phi = solve(first)
    solve(second)
    torch.testing.assert_close(phi, first / 2, rtol=1e-12, atol=0)
    phi.sum().backward()
    torch.testing.assert_close(first.grad, torch.full_like(first, 0.5), rtol=1e-9, atol=0)


def test_a_changed_closure_does_not_change_second_derivatives():
    batch = [torch.tensor(1.0, dtype=torch.float64)]
    condition = ig.argmin(lambda p, t: batch[0] * ((p - t) ** 2 / 2).sum() + p.sum() * 0)
    theta = normal(2).requires_grad_()
    phi = ig.implicit(lambda t: t.clone(), condition)(theta)
    batch[0] = torch.tensor(3.0, dtype=torch.float64)
    first = torch.autograd.grad(phi.square().sum(), theta, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), theta)[0]
    torch.testing.assert_close(second, torch.full_like(second, 2.0))


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_an_unsolved_problem_is_noticed_at_any_size(size):
    c = torch.full((3,), size, dtype=torch.float64)
    solve = ig.implicit(torch.zeros_like, ig.argmin(lambda p, t: ((p - t) ** 2).sum()))
    with pytest.warns(ig.ImplicitGradWarning, match="does not solve the inner problem"):
        solve(c.requires_grad_()).sum().backward()


def test_complex_arguments_have_gradients():
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128, requires_grad=True)
    solve = ig.implicit(
        lambda z: z.abs() ** 2, ig.argmin(lambda p, z: ((p - z.abs() ** 2) ** 2).sum())
    )
    solve(z).sum().backward()
    torch.testing.assert_close(z.grad, 2 * z.detach(), rtol=1e-9, atol=0)


def test_a_clone_of_a_learner_adapts_without_gradients():
    model = nn.Linear(2, 1).double()
    maml, x = ig.imaml(model, lr=0.1), normal(4, 2)
    with torch.no_grad():
        learner = maml.clone().clone()
        before = learner.weight.clone()
        learner.adapt(lambda: learner(x).square().mean())
    assert not torch.equal(learner.weight, before)


def test_a_learned_step_length_is_refused():
    with pytest.raises(ig.InvalidArgumentError, match="lr must be a number"):
        ig.imaml(nn.Linear(2, 1), lr=nn.Parameter(torch.tensor(0.1)))


def test_a_cotangent_with_a_history_does_not_count_twice(double_precision):
    X, theta = torch.randn(4, 3, requires_grad=True), torch.randn(3)

    def objective(w, theta, X):
        return torch.nn.functional.softplus(X @ w).sum() + (w - theta).square().sum()

    def newton(theta, X):
        w = theta
        for _ in range(15):
            slope = torch.func.jacrev(objective)(w, theta, X)
            curvature = torch.func.jacrev(torch.func.jacrev(objective))(w, theta, X)
            w = w - torch.linalg.solve(curvature, slope)
        return w

    solve = ig.implicit(lambda theta, X: newton(theta.detach(), X.detach()), ig.argmin(objective))

    def mixed(solver):
        slope = torch.func.grad(lambda t: solver(t, X).square().sum())(theta)
        return torch.autograd.grad(slope.sum(), X)[0]

    torch.testing.assert_close(mixed(solve), mixed(newton), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("phi", "upper"), [((0.5, 0.5, 0.0, 0.0), 0.5), ((1.0, 0.0, 0.0, 0.0), 1.0)]
)
@pytest.mark.parametrize("size", [1.0, 0.003])
def test_a_corner_of_bounds_and_a_budget_does_not_move(double_precision, phi, upper, size):
    returns = torch.tensor([4.5, 3.0, 1.0, 0.5]) * size

    def objective(w, returns):
        return w.square().sum() / 2 * size - returns @ w

    returns.requires_grad_()
    condition = ig.argmin(objective, bounds=(0, upper), equality=lambda w, _: w.sum() - 1)
    solve = ig.implicit(lambda _: torch.tensor(phi), condition, on_failure="raise")
    (solve(returns) @ torch.tensor([1.0, 2.0, 3.0, 4.0])).backward()
    torch.testing.assert_close(returns.grad, torch.zeros(4), rtol=0, atol=1e-12)


def ridge_at(shift, **options):
    """A ridge-like problem, solved but for a shift, and its exact gradient's function."""
    matrix = torch.diag(torch.tensor([1.0, 3.0, 9.0]))
    condition = ig.proximal(lambda w: w @ matrix @ w / 2, 0.5)
    whole = matrix / 0.5 + torch.eye(3)
    theta = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    solve = ig.implicit(
        lambda t: torch.linalg.solve(whole, t) + shift, condition, on_failure="ignore", **options
    )
    exact = torch.linalg.solve(whole, torch.linalg.solve(whole, theta.detach()))
    return solve, theta, exact


@pytest.mark.parametrize(
    "linear_solver", [ig.CG(maxiter=0), ig.CG(maxiter=1), ig.CG(damping=1.0), ig.Exact()], ids=str
)
def test_a_certificate_judges_the_solver_that_was_chosen(double_precision, linear_solver):
    solve, theta, exact = ridge_at(1e-3, linear_solver=linear_solver)
    certificate = ig.certify(solve, (theta,), lambda w: w.square().sum() / 2)
    error = (certificate.gradients[0] - exact).norm().item()
    torch.testing.assert_close(certificate.corrected[0], exact, rtol=1e-9, atol=1e-12)
    assert certificate.error == pytest.approx(error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("linear_solver", [ig.CG(maxiter=0), ig.CG(damping=0.5)])
def test_second_derivatives_of_another_solve_are_refused(double_precision, linear_solver):
    solve, theta, _ = ridge_at(0.0, linear_solver=linear_solver)
    slope = torch.autograd.grad(solve(theta).square().sum(), theta, create_graph=True)[0]
    with pytest.raises(ig.GraphError, match="truncated or damped"):
        torch.autograd.grad(slope.sum(), theta)


def test_a_finished_call_is_freed_by_reference_counting(double_precision):
    gc.collect()
    gc.disable()
    try:
        solve, theta, _ = ridge_at(0.0)
        evaluation, inputs = solve.evaluation((theta,), {})
        evaluation.solve_and_record(inputs)
        alive = weakref.ref(evaluation)
        del evaluation
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("linear_solver", [ig.Exact(), ig.Neumann(terms=200)], ids=str)
def test_unsolved_fixed_points_are_noticed_by_every_linear_solver(double_precision, linear_solver):
    a = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    mix = torch.tensor([[0.1, 0.3, 0.0], [-0.2, 0.1, 0.1], [0.0, 0.2, -0.1]])
    solve = ig.implicit(
        lambda a: torch.full((3,), 5.0),
        ig.fixed_point(lambda x, a: mix @ x + a),
        linear_solver=linear_solver,
    )
    with pytest.warns(ig.ImplicitGradWarning, match="does not solve the inner problem"):
        solve(a).sum().backward()


def test_a_maximum_is_called_negative_curvature_by_minres_too(double_precision):
    a = torch.ones(3, requires_grad=True)
    solve = ig.implicit(
        lambda a: a.clone(),
        ig.argmin(lambda w, a: -(w - a).square().sum()),
        linear_solver=ig.MINRES(),
    )
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature"):
        solve(a).sum().backward()


def test_inference_tensors_are_taken_for_what_they_are(double_precision):
    with torch.inference_mode():
        data = torch.randn(3)
    theta = torch.ones(3, requires_grad=True)
    solve = ig.implicit(
        lambda t, d: (t + d) / 2,
        ig.argmin(lambda w, t, d: (w - t).square().sum() + (w - d).square().sum()),
        polish=1,
    )
    solve(theta, data).sum().backward()
    torch.testing.assert_close(theta.grad, torch.full((3,), 0.5))


class Scaled:
    """A solver that is a method."""

    scale = 2.0

    @ig.implicit(condition=ig.argmin(lambda p, t: ((p - 2 * t) ** 2).sum()))
    def solve(self, t: Tensor) -> Tensor:
        return self.scale * t


def test_methods_are_solvers_of_their_object():
    t = normal(3).requires_grad_()
    assert torch.equal(Scaled().solve(t), 2 * t.detach())
    (found,) = torch.autograd.grad(Scaled().solve(t).sum(), t)
    torch.testing.assert_close(found, torch.full_like(t, 2.0))
    assert isinstance(Scaled.solve, type(Scaled().solve))
