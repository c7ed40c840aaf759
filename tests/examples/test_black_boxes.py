"""Gradients through black boxes: the solvers of examples/black_boxes.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

import implicit_grad as ig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import black_boxes
from black_boxes import BLACK_BOXES, BlackBox

TOLERANCE = 1e-6
PACKAGES = {"lbfgs": "scipy", "gurobi": "gurobipy", "torchopt_sgd": "torchopt"}
LOGISTIC = [box for box in BLACK_BOXES if box.objective is black_boxes.logistic]


@pytest.fixture(params=BLACK_BOXES, ids=lambda box: box.name)
def box(request: pytest.FixtureRequest) -> BlackBox:
    """Each black box whose package is installed."""
    pytest.importorskip(PACKAGES.get(request.param.solver.__name__, "torch"))
    return request.param


def flat(objective, like):
    """The objective as a function of one vector in place of phi, and that function's inverse."""
    tensors = list(like.values()) if isinstance(like, dict) else [like]

    def unflat(vector: Tensor):
        parts = vector.split([t.numel() for t in tensors])
        parts = [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]
        return dict(zip(like, parts, strict=True)) if isinstance(like, dict) else parts[0]

    start = torch.cat([t.detach().flatten() for t in tensors])
    return start, unflat, lambda vector, *args: objective(unflat(vector), *args)


def newton(objective, start: Tensor, *args) -> Tensor:
    """The reference solver: Newton's method until the gradient is at rounding error."""
    w = start
    for _ in range(50):
        slope = grad(objective)(w, *args)
        if slope.norm() < 1e-14:
            break
        w = w - torch.linalg.solve(jacrev(grad(objective))(w, *args), slope)
    return w


def dense_hypergradient(box: BlackBox) -> dict[str, Tensor]:
    """The implicit function theorem with dense matrices, at the black box's own solution.

    A Newton step that starts at a solution has, with its graph kept, the right derivative.
    """
    arguments = box.arguments()
    phi = box.solver(*arguments.values())
    phi = phi if isinstance(phi, dict) else torch.as_tensor(phi)
    start, unflat, objective = flat(box.objective, phi)
    w = newton(objective, start, *arguments.values())
    assert torch.allclose(w, start, rtol=1e-6, atol=1e-7), "the black box found no minimum"
    tensors = {k: t.requires_grad_() for k, t in black_boxes.leaves(arguments).items()}
    args = tuple(black_boxes.replaced(arguments, tensors).values())
    w = w - torch.linalg.solve(jacrev(grad(objective))(w, *args), grad(objective)(w, *args))
    gradients = torch.autograd.grad(box.outer_loss(unflat(w)), list(tensors.values()))
    return dict(zip(tensors, gradients, strict=True))


def test_every_derivative_matches_the_dense_theorem(box):
    expected = dense_hypergradient(box)
    for name, gradient in black_boxes.hypergradient(box).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert expected[name].norm() > 1e-4
        assert error < TOLERANCE, name


def test_matches_finite_differences_of_the_whole_solver(box):
    gradients = black_boxes.hypergradient(box)
    names = ["theta", "X", "y", "lam"] if "theta" in gradients else ["0.weight", "lam"]
    for name in names:
        mine, reference = black_boxes.compared(box, name, gradients[name])
        assert abs(mine - reference) < TOLERANCE * abs(reference), name


def test_gurobi_matches_the_closed_form():
    pytest.importorskip("gurobipy")
    box = next(box for box in BLACK_BOXES if box.objective is black_boxes.ridge)
    arguments = {k: t.requires_grad_() for k, t in box.arguments().items()}
    theta, X, y, lam = arguments.values()
    eye = torch.eye(3, dtype=torch.float64)
    w = torch.linalg.solve(X.T @ X / len(y) + lam * eye, X.T @ y / len(y) + lam * theta)
    expected = torch.autograd.grad(box.outer_loss(w), list(arguments.values()))
    for name, exact in zip(arguments, expected, strict=True):
        error = (black_boxes.hypergradient(box)[name] - exact).norm() / exact.norm()
        assert error < 1e-9, name


@pytest.mark.parametrize("solver", [box.solver for box in LOGISTIC], ids=lambda f: f.__name__)
def test_the_gradient_does_not_depend_on_who_found_phi(solver):
    pytest.importorskip(PACKAGES.get(solver.__name__, "torch"))
    box = LOGISTIC[0]

    def reference(theta, X, y, lam):
        return newton(box.objective, theta, theta, X, y, lam)

    expected = black_boxes.hypergradient(box, reference)
    for name, gradient in black_boxes.hypergradient(box, solver).items():
        assert (gradient - expected[name]).norm() < TOLERANCE / 10 * expected[name].norm(), name


def test_our_gradient_descent_and_adam_agree_on_the_network():
    box = next(box for box in BLACK_BOXES if box.objective is black_boxes.regression)
    descent = ig.solvers.GradientDescent(lr=0.3, tol=1e-13)
    expected = black_boxes.hypergradient(box)
    for name, gradient in black_boxes.hypergradient(box, descent).items():
        assert (gradient - expected[name]).norm() < 1e-9 * expected[name].norm(), name


@pytest.mark.parametrize(("solver", "module"), PACKAGES.items())
def test_a_missing_package_is_named_by_its_extra(solver, module, monkeypatch, capsys):
    extra = "gurobi" if module == "gurobipy" else module
    box = next(box for box in BLACK_BOXES if box.solver.__name__ == solver)
    monkeypatch.setattr(black_boxes, "BLACK_BOXES", (box,))
    for name in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Refusing(module), *sys.meta_path])
    black_boxes.main()
    assert f"pip install 'implicit-grad[{extra}]'" in capsys.readouterr().out


class _Refusing:
    """An import hook for which one package is not there."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
