"""Solvers that are objects: their attributes, their methods, what they captured."""

from __future__ import annotations

import pytest
import torch

import implicit_grad as ig

F64 = torch.float64


def objective(phi, theta):
    return (phi - 2 * theta).square().sum()


class Remembering:
    """A solver with attributes that happen to have names of ours."""

    def __init__(self):
        self._phi, self.run, self.evaluation, self.setup = None, "run 7", 3, {}

    def __call__(self, theta):
        self._phi = 2 * theta.detach()
        return self._phi.clone()


def test_attributes_of_a_solver_stay_its_own():
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    solver = Remembering()
    solve = ig.implicit(solver, ig.argmin(objective))
    (gradient,) = torch.autograd.grad(solve(theta).sum(), theta)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0))
    assert solver.run == "run 7" and solver.evaluation == 3 and solver._phi is not None


def test_a_class_in_the_place_of_a_solver_is_refused_before_the_call():
    with pytest.raises(ig.InvalidArgumentError, match=r"class NewtonCG.*NewtonCG\(\.\.\.\)"):
        ig.implicit(ig.solvers.NewtonCG, ig.argmin(objective))


def test_an_init_that_is_no_function_is_refused_before_the_call():
    with pytest.raises(ig.InvalidArgumentError, match="init must be a function"):
        ig.implicit(ig.solvers.NewtonCG(), ig.argmin(objective), init=torch.zeros(2))


class Both:
    """Minimises and finds roots, each by one Newton step with the identity."""

    def minimize(self, objective, init):
        x = init.detach().requires_grad_()
        return init - torch.autograd.grad(objective(x), x)[0] / 2

    def find_root(self, residual, init):
        return init - residual(init)


@pytest.mark.parametrize(
    "condition", [ig.argmin(objective), ig.root(lambda phi, theta: phi - 2 * theta)]
)
def test_a_solver_of_both_kinds_is_handed_what_the_condition_has(condition):
    theta = torch.ones(3, dtype=F64, requires_grad=True)
    phi = ig.implicit(Both(), condition)(theta)
    torch.testing.assert_close(phi.detach(), torch.full_like(theta, 2.0).detach())
    (gradient,) = torch.autograd.grad(phi.sum(), theta)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0))


def test_under_transforms_too_what_a_solver_captured_keeps_its_grad():
    weight = torch.ones(2, dtype=F64, requires_grad=True)

    def solver(theta):
        (weight * theta).sum().backward()  # as a training loop of another model does
        return 2 * theta.detach()

    solve = ig.implicit(solver, ig.argmin(objective))
    theta = torch.ones(2, dtype=F64)
    jacobian = torch.func.jacrev(solve)(theta)
    torch.testing.assert_close(jacobian, 2 * torch.eye(2, dtype=F64))
    assert weight.grad is None
