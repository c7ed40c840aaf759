"""Under constraints, products are checked as elsewhere: the constraints' own curvature, too."""

import pytest
import torch
from torch.autograd import grad
from torch.autograd.function import once_differentiable

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


class Squares(torch.autograd.Function):
    """Σ x², in whose backward x is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square().sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0].detach()


class SquaresOnce(Squares):
    """Said to be differentiable once."""

    generate_vmap_rule = False

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def squares(x):
    return x.square().sum()


def nearest(a):
    """The point of the sphere."""
    return a / a.norm()


def above(a):
    """The least of |w|² - aw for w ≥ 0."""
    return a.clamp(min=0) / 2


def problem(kind, squares):
    """A solver and its condition, in which squares bend."""
    if kind in ("equality", "inequality"):
        sphere = {kind: lambda w, a: squares(w) - 1}
        return nearest, ig.argmin(lambda w, a: (w - a).square().sum(), **sphere)

    def bent(w, a):
        return squares(w) - a @ w

    if kind == "bounds":
        return above, ig.argmin(bent, bounds=(0, None))
    return above, ig.argmin(bent, inequality=lambda w, a: -w)


KINDS = ["equality", "inequality", "bounds", "rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_second_derivative_is_told(kind):
    statuses = []
    for function in (squares, Squares.apply):
        a = torch.tensor([3.0, 1.0, -2.0], requires_grad=True)
        monitor = ig.Monitor()
        solver, condition = problem(kind, function)
        solve = ig.implicit(solver, condition, monitor=monitor, on_failure="ignore")
        (found,) = grad(solve(a)[0], a)
        right = torch.equal(found.round(decimals=6), grad(solver(a)[0], a)[0].round(decimals=6))
        statuses.append((monitor.last.status.name, right))
    assert statuses == [("CONVERGED", True), ("WRONG_PRODUCT", False)]


@pytest.mark.parametrize("kind", ["equality", "inequality"])
def test_it_is_told_of_a_batch(kind):
    a = torch.tensor([[3.0, 1.0, 2.0], [1.0, -2.0, 2.0]], requires_grad=True)
    for function, ok in ((squares, True), (Squares.apply, False)):
        monitor = ig.Monitor()
        solver, condition = problem(kind, function)
        solve = ig.implicit(solver, condition, monitor=monitor, on_failure="ignore")
        torch.vmap(solve)(a).sum().backward()
        assert [report.status.ok for report in monitor.reports] == [ok, ok]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_second_derivative_is_refused(kind):
    a = torch.tensor([3.0, 1.0, -2.0], requires_grad=True)
    w = ig.implicit(*problem(kind, SquaresOnce.apply))(a)
    with pytest.raises(ig.GraphError, match="under constraints no differences"):
        w.sum().backward()
