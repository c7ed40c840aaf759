"""Wrong numbers that an expert's review found in drafts of this library, and must not come back."""

from __future__ import annotations

import learn2learn as l2l
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
        l2l.algorithms.MAML(model, lr=0.1),
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


def test_a_changed_closure_with_the_same_value_is_noticed():
    batch = [torch.tensor(1.0, dtype=torch.float64)]
    condition = ig.argmin(lambda p, t: batch[0] * ((p - t) ** 2 / 2).sum() + p.sum() * 0)
    theta = normal(2).requires_grad_()
    phi = ig.implicit(lambda t: t.clone(), condition)(theta)
    batch[0] = torch.tensor(3.0, dtype=torch.float64)
    with pytest.raises(ig.GraphError, match="other derivatives"):
        torch.autograd.grad(phi.square().sum(), theta, create_graph=True)


def test_first_order_solves_keep_their_unit_in_second_derivatives():
    lam = 0.1
    condition = ig.proximal(lambda p, y: (p * y).sum(), lam)
    solve = ig.implicit(
        lambda t, y: t - y / lam, condition, linear_solver=ig.CG(maxiter=0), on_failure="ignore"
    )
    theta, y = normal(2).requires_grad_(), normal(2).requires_grad_()
    (grad,) = torch.autograd.grad(solve(theta, y).square().sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), y)
    torch.testing.assert_close(second, torch.full_like(y, 2 / lam**2), rtol=1e-12, atol=0)


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
    maml, x = ig.imaml(l2l.algorithms.MAML(model, lr=0.1)), normal(4, 2)
    with torch.no_grad():
        learner = maml.clone().clone()
        before = learner.weight.clone()
        learner.adapt(lambda: learner(x).square().mean())
    assert not torch.equal(learner.weight, before)


def test_a_learned_step_length_is_refused():
    maml = l2l.algorithms.MAML(nn.Linear(2, 1), lr=nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(ig.InvalidArgumentError, match="lr must be a number"):
        ig.imaml(maml)
