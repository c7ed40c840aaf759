"""What cannot work is told with what was handed to whom and with the remedy, not by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import implicit_grad as ig

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
Y, LOG_WD = X.sum(1), torch.tensor(0.0)


def objective(model, X, y, log_wd):
    weights = sum(p.square().sum() for p in model.parameters())
    return (model(X)[:, 0] - y).square().mean() + log_wd.exp() * weights


def train(model, X, y, log_wd):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(model, X, y, log_wd)
        loss.backward()
        optimizer.step()
    return model, loss


RETURNED = {
    "state_dict": lambda model, loss: model.state_dict(),
    "named": lambda model, loss: dict(model.named_parameters()),
    "list": lambda model, loss: list(model.parameters()),
    "loss": lambda model, loss: loss,
}


@pytest.mark.parametrize("kind", RETURNED)
def test_a_loop_that_is_handed_a_module_and_returns_something_else(kind):
    solve = ig.implicit(lambda *args: RETURNED[kind](*train(*args)), ig.argmin(objective))
    with pytest.raises(ig.InvalidSolutionError, match="return the module itself") as caught:
        solve(nn.Linear(3, 1), X, Y, LOG_WD)
    assert "a Linear" in str(caught.value) and "phi" in str(caught.value)
    assert isinstance(caught.value.__cause__, (TypeError, AttributeError))


def test_a_module_that_is_not_the_first_argument():
    solve = ig.implicit(lambda X, y, w, model: train(model, X, y, w)[0], ig.argmin(objective))
    with pytest.raises(ig.InvalidSolutionError, match="pass the module first"):
        solve(X, Y, LOG_WD, nn.Linear(3, 1))


def test_parameters_in_the_place_of_their_module():
    net = nn.Linear(3, 1)
    solve = ig.implicit(train, ig.argmin(objective))
    with pytest.raises(ig.InvalidArgumentError, match=r"solver raised .*pass the module itself"):
        solve(list(net.parameters()), X, Y, LOG_WD)
    with pytest.raises(ig.InvalidArgumentError, match=r"parameters\(\).*pass the module itself"):
        solve(net.parameters(), X, Y, LOG_WD)


def test_an_argument_that_a_loop_wants_to_train_in_place():
    def descend(w, X, y):
        (X @ w - y).square().sum().backward()
        return w - 0.1 * w.grad

    solve = ig.implicit(descend, ig.argmin(lambda w, start, X, y: (X @ w - y).square().sum()))
    with pytest.raises(ig.InvalidArgumentError, match=r"detached.*requires_grad_\(\)"):
        solve(torch.zeros(3, requires_grad=True), X, Y)


@pytest.mark.parametrize(
    "minimiser", [ig.solvers.GradientDescent(lr=0.1, steps=3), ig.solvers.NewtonCG()]
)
def test_a_minimiser_that_starts_at_data(minimiser):
    def ridge(w, X, y):
        return (X @ w - y).square().sum() + w.square().sum()

    solve = ig.implicit(minimiser, ig.argmin(ridge))
    with pytest.raises(
        ig.InvalidArgumentError, match=r"first argument, .*\(8, 3\).*init="
    ) as caught:
        solve(X, Y)
    assert type(minimiser).__name__ in str(caught.value)


def test_an_objective_that_fails_for_its_own_reasons_says_so():
    def broken(w, X):
        raise RuntimeError("no license")

    with pytest.raises(RuntimeError, match=r"^no license$"):
        ig.implicit(lambda X: X[0], ig.argmin(broken))(X)


@pytest.mark.parametrize("make", [ig.prox_gradient, lambda *fs: ig.argmin(fs[1])])
def test_a_class_in_the_place_of_what_it_makes(make):
    with pytest.raises(ig.InvalidArgumentError, match=r"class soft_threshold.*soft_threshold\("):
        make(lambda w: w.square().sum(), ig.prox.soft_threshold)


def test_all_linear_solvers_are_on_offer():
    with pytest.raises(ig.InvalidArgumentError, match="EarlyStopped"):
        ig.implicit(train, ig.argmin(objective), linear_solver="cg")


def test_a_word_for_lam_is_no_sequence():
    with pytest.raises(ig.InvalidArgumentError, match=r"lam.*'auto'"):
        ig.imaml(nn.Linear(3, 1), lam="auto", lr=0.1)
    with pytest.raises(ig.InvalidArgumentError, match=r"lam.*'auto'"):
        ig.proximal(objective, "auto")


def ridge(w, X, y):
    return (X @ w - y).square().sum() + w.square().sum()


def solved(phi):
    return ig.implicit(lambda X, y: phi, ig.argmin(ridge))(X, Y)


def test_phi_of_the_wrong_length():
    with pytest.raises(ig.InvalidSolutionError, match=r"phi.*float32 tensor of shape \(4,\)"):
        solved(torch.zeros(4))


def test_arrays_are_described_with_dtype_and_shape():
    with pytest.raises(ig.InvalidSolutionError, match=r"an int64 array of shape \(3,\)"):
        solved(np.zeros(3, dtype=np.int64))


def test_a_list_of_numbers():
    with pytest.raises(ig.InvalidSolutionError, match=r"list of numbers.*torch.tensor"):
        solved([0.0, 0.0, 0.0])


def test_a_decorated_method():
    class Layer:
        @ig.implicit(condition=ig.argmin(lambda w, self, a: (w - a).square().sum()))
        def solve(self, a):
            return a

    with pytest.raises(ig.InvalidSolutionError, match="but no self: where a method is the solver"):
        Layer().solve(torch.ones(2, requires_grad=True))


def test_an_inequality_of_the_other_sign():
    """As SciPy has it, at least 0."""
    condition = ig.argmin(lambda x, q: (x - q) @ (x - q), inequality=lambda x, q: x - 1)
    q = torch.tensor([0.0, 3.0], dtype=torch.float64, requires_grad=True)
    with pytest.warns(ig.ImplicitGradWarning, match="inequality is to be at most 0"):
        ig.implicit(lambda q: q.clamp(min=1), condition)(q).sum().backward()


def test_a_utility_that_is_maximised():
    q = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    solve = ig.implicit(lambda q: q, ig.argmin(lambda x, q: -(x - q) @ (x - q)))
    with pytest.warns(ig.ImplicitGradWarning, match="maximum, give argmin the negative"):
        solve(q).sum().backward()


def test_a_root_of_another_form_than_the_first_argument():
    solve = ig.implicit(ig.solvers.Newton(), ig.root(lambda t, x: (x - t).sum() - 1))
    with pytest.raises(ig.InvalidArgumentError, match=r"init\(\*args\), by default the solver's"):
        solve(torch.ones(3, requires_grad=True))
