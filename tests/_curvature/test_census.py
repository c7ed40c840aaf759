"""What the census (benchmarks/census.py) finds wrong or missing in torch: right, or refused."""

import pytest
import torch
from problems import normal, wavy
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")
TOKENS = torch.tensor([[0, 2, 1], [2, 0, 1]])
CHUNKED = getattr(nn, "LinearCrossEntropyOptions", None)
LABELS = torch.tensor([0, 2, 1])


def unpooled(x):
    """Max pooling and back, at overlapping places."""
    pooled, places = F.max_pool2d(x.view(1, 1, 3, 4), 2, stride=1, return_indices=True)
    return F.max_unpool2d(pooled.sin(), places, 2, stride=1)


def attention(x):
    return F.scaled_dot_product_attention(*x.view(3, 1, 2, 2).sin())


# functions of 12 numbers
SECOND = {
    "weight_norm": lambda x: torch._weight_norm(x.view(3, 4), x.view(3, 4)[:, :1].exp(), 0),
    "embedding_bag": lambda x: F.embedding_bag(TOKENS, x.view(3, 4), mode="mean").sin(),
    "hardsigmoid": lambda x: F.hardsigmoid(x.sin()),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x.view(3, 4).sin(), LABELS, p=2),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(
        x.view(3, 4).sin(), torch.tensor([[1, 2, -1, 0]] * 3)
    ),
    "scaled_dot_product_attention": attention,
    "masked.logaddexp": lambda x: torch.masked.logaddexp(
        x[:6].sin(), x[6:].cos(), input_mask=torch.arange(6) < 4, other_mask=torch.arange(6) > 1
    ),
}
if CHUNKED is not None:
    SECOND["linear_cross_entropy"] = lambda x: F.linear_cross_entropy(
        x.view(3, 4).sin(), x.view(3, 4)[:3].cos(), LABELS, options=CHUNKED(allow_retain_graph=True)
    )
THIRD = {
    "layer_norm": lambda x: F.layer_norm(x.view(3, 4), (4,), eps=1.0),
    "batch_norm": lambda x: F.batch_norm(x.view(4, 3), None, None, training=True, eps=1.0),
    "instance_norm": lambda x: F.instance_norm(x.view(1, 3, 4), eps=1.0),
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "pdist": lambda x: F.pdist(x.view(3, 4)),
}


def objective(special, x, theta):
    y = special(x)
    weights = torch.arange(1.0, y.numel() + 1).view_as(y).cos()
    return (weights * y + y**2 / 2).sum() + 4 * (x - theta).square().sum()


def solver(theta):
    """Stays where it is: what follows is linear algebra around that point."""
    return theta.detach().clone()


def hessian_by_differences(special, at, h=1e-5):
    def slope(x):
        x = x.clone().requires_grad_()
        return grad(objective(special, x, at), x)[0]

    eye = h * torch.eye(len(at))
    return torch.stack([(slope(at + e) - slope(at - e)) / (2 * h) for e in eye])


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name):
    special, theta, monitor = SECOND[name], normal(12, seed=1), ig.Monitor()
    condition = ig.argmin(lambda x, theta: objective(special, x, theta))
    options = {"linear_solver": ig.Exact(), "on_failure": "ignore", "monitor": monitor}
    phi = ig.implicit(solver, condition, **options)(theta)
    (found,) = grad(wavy(phi), theta)
    at = theta.detach()
    v = grad(wavy(theta), theta)[0]
    expected = 8 * torch.linalg.solve(hessian_by_differences(special, at), v)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_unpooling_to_overlapping_places_is_told():
    """Torch's gradient there is that of a sum; its value is that of one of the terms."""
    theta, monitor = normal(12, seed=1), ig.Monitor()
    condition = ig.argmin(lambda x, theta: objective(unpooled, x, theta))
    phi = ig.implicit(solver, condition, on_failure="ignore", monitor=monitor)(theta)
    wavy(phi).backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT
    assert "not the derivative of its value" in monitor.last.check


@pytest.mark.parametrize("name", THIRD)
def test_third_derivatives(name):
    """Right, or refused."""
    special, theta = THIRD[name], normal(12, seed=1)
    condition = ig.argmin(lambda x, theta: objective(special, x, theta))
    refused = name in ("logcumsumexp", "pdist")  # an older torch has no second one of pdist
    solve = ig.implicit(
        solver if refused else ig.solvers.NewtonCG(tol=1e-12),
        condition,
        linear_solver=ig.Exact(),
        on_failure="ignore" if refused else "warn",
    )

    def hypergradient(theta, order=1):
        (found,) = grad(wavy(solve(theta)), theta, create_graph=order == 2)
        return found

    direction = normal(12, seed=2, grad=False)
    if refused:
        with pytest.raises(ig.GraphError, match=f"(?i)third derivative of {name}"):
            hypergradient(theta, 2)
        return
    (found,) = grad(hypergradient(theta, 2), theta, direction)
    h = 1e-4
    ahead, behind = (
        hypergradient((theta.detach() + s * h * direction).requires_grad_()) for s in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-5)
