"""Under constraints, products are checked as elsewhere: the constraints' own curvature, too."""

import pytest
import torch
from derivatives import CubeTwice
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
        right = torch.allclose(found, grad(solver(a)[0], a)[0], rtol=0.0, atol=1e-6)
        statuses.append((monitor.last.status.name, right))
    assert statuses == [("CONVERGED", True), ("WRONG_PRODUCT", False)]
    solve = ig.implicit(solver, condition)
    with pytest.warns(ig.ImplicitGradWarning, match="only to write it in operations of torch"):
        grad(solve(a)[0], a)


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


class HalfOfTheCube(torch.autograd.Function):
    """Σ w - b³, whose derivative by b is half of what it should be, or None."""

    @staticmethod
    def forward(ctx, w, b, knows):
        ctx.save_for_backward(b)
        ctx.knows = knows
        return w.sum() - b**3

    @staticmethod
    def backward(ctx, g):
        (b,) = ctx.saved_tensors
        return g.expand(3), -1.5 * g * b**2 if ctx.knows else None, None


@pytest.mark.parametrize("name", ["equality", "inequality"])
@pytest.mark.parametrize("knows", [True, False])
def test_a_wrong_derivative_of_a_constraint_by_an_argument_is_told(name, knows):
    b, monitor = torch.tensor(-1.2, requires_grad=True), ig.Monitor()
    plane = {name: lambda w, b: HalfOfTheCube.apply(w, b, knows)}
    least = ig.argmin(lambda w, b: w.square().sum(), **plane)
    solve = ig.implicit(
        lambda b: (b**3 / 3).expand(3).clone(), least, monitor=monitor, on_failure="ignore"
    )
    solve(b).sum().backward()
    assert monitor.last.status is ig.Status.WRONG_PRODUCT
    assert "how a constraint changes" in monitor.last.check


def speech(w):
    """An operation whose second derivative torch does not have."""
    targets, lengths = torch.tensor([[1, 2]]), (torch.tensor([6]), torch.tensor([2]))
    scores = torch.linspace(0, 1, 24).sin().view(6, 1, 4) + w
    return torch.nn.functional.ctc_loss(scores.log_softmax(2), targets, *lengths)


@pytest.mark.parametrize("kind", ["bounds", "equality"])
def test_an_operation_without_second_derivative_is_said_with_advice(kind):
    a, known = torch.full((4,), 0.1, requires_grad=True), speech(torch.zeros(4))

    def distance(w, a):
        return (w - a).square().sum()

    conditions = {
        "bounds": ig.argmin(lambda w, a: distance(w, a) + speech(w), bounds=(0, None)),
        "equality": ig.argmin(distance, equality=lambda w, a: speech(w) - known),
    }
    w = ig.implicit(lambda a: torch.zeros(4), conditions[kind])(a)
    with pytest.raises(ig.GraphError, match="another form of the operation"):
        w.sum().backward()


def test_a_wrong_third_derivative_of_a_constraint_is_refused():
    w = torch.tensor([0.6, 0.5, 0.4])
    nearest = w / (w**3).sum() ** (1 / 3)
    a = (nearest + nearest.square() / 2).requires_grad_()  # along the surface's normal

    def second(cube):
        surface = ig.argmin(
            lambda w, a: (w - a).square().sum(), equality=lambda w, a: cube(w).sum() - 1
        )
        w = ig.implicit(lambda a: nearest.clone(), surface)(a)
        (first,) = grad(w[0], a, create_graph=True)
        return grad(first.sum(), a)

    second(lambda x: x**3)
    with pytest.raises(ig.GraphError, match="third derivative"):
        second(CubeTwice.apply)
