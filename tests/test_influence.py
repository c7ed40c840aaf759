"""`ig.influence` against refits without each point."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import implicit_grad as ig

N, D = 30, 4
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(N, D, dtype=torch.float64, generator=RANDOM)
X[0] *= 5  # a point of high leverage
Y = X @ torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
Y += 0.5 * torch.randn(N, dtype=torch.float64, generator=RANDOM)
LABELS = (Y > 0).double()
X_VAL = torch.randn(15, D, dtype=torch.float64, generator=RANDOM)
ONES = torch.ones(N, dtype=torch.float64)
LAM = 0.3


def ridge(w, weights, X=X):
    return (weights * (X @ w - Y) ** 2).sum() / 2 + LAM * (w @ w) / 2


def logistic(w, weights, X=X):
    losses = nn.functional.binary_cross_entropy_with_logits(X @ w, LABELS, reduction="none")
    return (weights * losses).sum() + LAM * (w @ w) / 2


def newton_step(objective, w, weights):
    """By hand, from which the library takes nothing."""
    if objective is ridge:
        slope, curvature = X @ w - Y, ONES
    else:
        p = torch.sigmoid(X @ w)
        slope, curvature = p - LABELS, p * (1 - p)
    H = X.T @ ((weights * curvature)[:, None] * X) + LAM * torch.eye(D, dtype=torch.float64)
    return torch.linalg.solve(H, X.T @ (weights * slope) + LAM * w)


def minimum(objective, weights):
    w = torch.zeros(D, dtype=torch.float64)
    for _ in range(1 if objective is ridge else 12):
        w = w - newton_step(objective, w, weights)
    return w


def outer(w):
    return (X_VAL @ w - 1).square().mean() + w.exp().sum()


def refits(objective):
    """The outer loss without each point, less that with all."""
    without = [minimum(objective, ONES.index_fill(0, torch.tensor(i), 0)) for i in range(N)]
    return torch.stack([outer(w) for w in without]) - outer(minimum(objective, ONES))


def solver(objective):
    return ig.implicit(lambda weights: minimum(objective, weights), ig.argmin(objective))


def test_ridge_is_exact_and_leverages_are_the_hat_matrix():
    found = ig.influence(solver(ridge), ONES, outer, leave_one_out=True)
    torch.testing.assert_close(found.removal, refits(ridge), rtol=1e-8, atol=1e-10)
    gram = X.T @ X + LAM * torch.eye(D, dtype=torch.float64)
    hat = X @ torch.linalg.solve(gram, X.T)
    torch.testing.assert_close(found.leverage, hat.diagonal(), rtol=1e-8, atol=1e-10)
    assert found.leverage[0] > 0.5 and found.status.ok
    plain = ig.influence(solver(ridge), ONES, outer)
    torch.testing.assert_close(plain.removal, -plain.gradient)
    assert plain.leverage.isnan().all()
    # what it is for: at the point of high leverage, first order is far off
    assert plain.removal[0].abs() < 0.6 * refits(ridge)[0].abs()


def test_logistic_regression_is_a_newton_step_from_each_refit():
    truth = refits(logistic)
    found = ig.influence(solver(logistic), ONES, outer, leave_one_out=True)
    w = minimum(logistic, ONES)
    for i in range(N):
        step = newton_step(logistic, w, ONES.index_fill(0, torch.tensor(i), 0))
        torch.testing.assert_close(found.removal[i], outer(w - step) - outer(w))
    first = ig.influence(solver(logistic), ONES, outer).removal
    error, error_of_first = ((r - truth).norm() / truth.norm() for r in (found.removal, first))
    assert error < 0.1 and error < 0.5 * error_of_first


def test_the_gradient_is_that_of_autograd_and_weights_count():
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64)
    tensor = weights.clone().requires_grad_()
    (expected,) = torch.autograd.grad(outer(solver(ridge)(tensor)), tensor)
    found = ig.influence(solver(ridge), weights, outer, leave_one_out=[3, 7])
    torch.testing.assert_close(found.gradient, expected)
    torch.testing.assert_close(found.removal[0], -weights[0] * expected[0])
    for i in (3, 7):
        without = minimum(ridge, weights.index_fill(0, torch.tensor(i), 0))
        torch.testing.assert_close(
            found.removal[i], outer(without) - outer(minimum(ridge, weights))
        )
    assert found.leverage.isfinite().nonzero().flatten().tolist() == [3, 7]


def test_modules_proximal_terms_and_other_arguments():
    def train(net, data, weights):
        gram = (weights[:, None] * data).T @ data + torch.eye(D, dtype=torch.float64)
        with torch.no_grad():
            right = (weights[:, None] * data).T @ Y + net.weight[0]
            net.weight.copy_(torch.linalg.solve(gram, right)[None])
        return net

    def loss(net, data, weights):
        return (weights * (net(data)[:, 0] - Y) ** 2).sum() / 2

    net = nn.Linear(D, 1, bias=False).double()
    solve = ig.implicit(train, ig.proximal(loss, 1.0))
    on = lambda net: net(X_VAL).square().sum()  # noqa: E731
    found = ig.influence(solve, ONES, on, args=(net, X, ONES), leave_one_out=[0, 5])
    for i in (0, 5):
        change = on(solve(net, X, ONES.index_fill(0, torch.tensor(i), 0))) - on(solve(net, X, ONES))
        torch.testing.assert_close(found.removal[i], change.detach())
    assert all(p.grad is None for p in net.parameters())


def test_a_point_that_alone_holds_phi_has_no_removal():
    one = torch.ones(1, dtype=torch.float64)
    linear = ig.argmin(lambda m, w: (w * (m - torch.tensor([2.0]).double()) ** 2).sum())
    solve = ig.implicit(lambda w: torch.full((), 2.0001, dtype=torch.float64), linear)
    found = ig.influence(solve, one, lambda m: m, leave_one_out=True)
    assert found.removal.isnan().all() and found.leverage[0] >= 1


def test_refusals():
    solve = solver(ridge)
    for options, sentence in (
        ({"weights": 3.0}, "weights must be a floating-point tensor"),
        ({"outer": 3}, "outer must be"),
        ({"leave_one_out": [N]}, "indices of weights, of which there are 30"),
        ({"leave_one_out": "all"}, "expected True, False or indices"),
        ({"args": ONES}, "args must be a tuple"),
        ({"args": (ONES.clone(),)}, "very tensor"),
        ({"solve": minimum}, "solve must be"),
    ):
        with pytest.raises(ig.InvalidArgumentError, match=sentence):
            ig.influence(**{"solve": solve, "weights": ONES, "outer": outer, **options})
    with pytest.raises(ig.InvalidArgumentError, match="does not depend on weights"):
        unread = ig.argmin(lambda w, weights: ridge(w, ONES))
        ig.influence(ig.implicit(lambda w: minimum(ridge, w), unread), ONES, outer)
    with pytest.raises(ig.InvalidArgumentError, match="without constraints"):
        root = ig.root(lambda w, weights: X.T @ (weights * (X @ w - Y)) + LAM * w)
        ig.influence(
            ig.implicit(lambda w: minimum(ridge, w), root), ONES, outer, leave_one_out=True
        )
    differences = ig.implicit(
        lambda w: minimum(ridge, w), ig.argmin(ridge), curvature="finite_difference"
    )
    with pytest.raises(ig.GraphError, match="finite_difference"):
        ig.influence(differences, ONES, outer, leave_one_out=True)


@pytest.mark.parametrize("kind", ["mean", "power", "softmax"])
def test_weights_that_are_no_weights_of_a_sum_are_told(kind):
    as_weights = {
        "mean": lambda w: w / w.sum(),
        "power": lambda w: w**2,
        "softmax": lambda w: torch.softmax(w, 0),
    }[kind]

    def objective(w, weights):
        return (as_weights(weights) * (X @ w - Y) ** 2).sum() / 2 + LAM * (w @ w) / 2

    solve = ig.implicit(lambda weights: minimum(ridge, as_weights(weights)), ig.argmin(objective))
    with pytest.warns(ig.ImplicitGradWarning, match="not linear in the weights"):
        found = ig.influence(solve, ONES, outer, leave_one_out=[0, 1])
    torch.testing.assert_close(found.removal, -found.gradient)
    assert found.leverage.isnan().all()
    plain = ig.influence(solve, ONES, outer)  # whose gradients are right in any case
    weights = ONES.clone().requires_grad_()
    outer(solve(weights)).backward()
    torch.testing.assert_close(plain.gradient, weights.grad)
