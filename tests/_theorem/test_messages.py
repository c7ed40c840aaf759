"""Warnings name the solver that was used, the tensors' own dtype and the cause."""

import dataclasses

import pytest
import torch

import implicit_grad as ig

INDEFINITE = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))


def saddle(solver):
    b = torch.ones(3, dtype=torch.float64, requires_grad=True)
    condition = ig.argmin(lambda x, b: x @ INDEFINITE @ x / 2 - b @ x)
    solve = ig.implicit(
        lambda b: torch.linalg.solve(INDEFINITE, b), condition, linear_solver=solver
    )
    with pytest.warns(ig.ImplicitGradWarning, match="non-positive curvature") as said:
        solve(b).backward(torch.arange(1.0, 4.0, dtype=torch.float64))
    (message,) = (str(w.message) for w in said)
    return message, b.grad


def test_negative_curvature_names_the_solver_that_met_it():
    message, _ = saddle(ig.CG())
    assert "CG gave the derivative of a training that was stopped" in message
    assert "a time of |phi|/|F|, of 1 to 200 over the greatest curvature" in message
    assert "EarlyStopped(time=...)" in message and "CG stops" not in message
    message, gradient = saddle(ig.MINRES())
    assert "MINRES goes on there" in message and "CG stops" not in message
    exact = torch.linalg.solve(INDEFINITE, torch.arange(1.0, 4.0, dtype=torch.float64))
    torch.testing.assert_close(gradient, exact)
    message, _ = saddle(ig.Exact())
    assert "CG" not in message and "MINRES" not in message


@pytest.mark.parametrize("linear_solver", [ig.CG(), ig.MINRES(), ig.Exact()])
def test_an_unsolved_problem_is_named_before_its_curvature(linear_solver):
    """Between two minima, on the way to one."""
    a = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.3, 0.4], dtype=torch.float64)
    condition = ig.argmin(lambda w, a: (w**4 / 4 - w**2 / 2 - a * w).sum())
    solve = ig.implicit(lambda a: start.clone(), condition, linear_solver=linear_solver)
    with pytest.warns(ig.ImplicitGradWarning) as said:
        solve(a).sum().backward()
    (message,) = (str(w.message) for w in said)
    first, second = "First: phi does not solve the inner problem", "non-positive curvature"
    assert 0 <= message.find(first) < message.find(second)
    assert "First" not in saddle(linear_solver)[0]  # of which only the second is true


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_curvature_of_zero_is_told_for_what_it_is(dtype):
    """x₀ alone is determined; a gradient along x₁ meets a curvature of exactly 0."""
    b = torch.ones(2, dtype=dtype, requires_grad=True)
    condition = ig.argmin(lambda x, b: (x[0] - b[0]) ** 2 + 0 * x[1])
    v = torch.tensor([0.0, 1.0], dtype=dtype)
    with pytest.warns(ig.ImplicitGradWarning, match=r"zero curvature.*MINRES\(\)") as said:
        ig.implicit(torch.clone, condition)(b).backward(v)
    assert "lam" not in str(said[0].message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stagnating(ig.CG):
    """CG that says of itself that it stagnated."""

    def solve(self, operator, rhs, verify=False):
        return dataclasses.replace(super().solve(operator, rhs, verify), status=STAGNATED)


STAGNATED = ig.Status.STAGNATED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_is_advised_where_it_helps(dtype):
    a = torch.ones(3, dtype=dtype, requires_grad=True)
    solve = ig.implicit(
        torch.clone, ig.argmin(lambda x, a: ((x - a) ** 2).sum()), linear_solver=Stagnating()
    )
    with pytest.warns(ig.ImplicitGradWarning, match="stopped improving above rtol") as said:
        solve(a).sum().backward()
    assert ("use float64" in str(said[0].message)) == (dtype == torch.float32)


def test_a_class_for_a_condition_is_to_be_called():
    with pytest.raises(ig.InvalidArgumentError, match=r"got the class argmin: call it .* argmin\("):
        ig.implicit(lambda b: b, ig.argmin)
