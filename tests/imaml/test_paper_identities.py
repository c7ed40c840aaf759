"""What the paper proves (Rajeswaran et al., 2019), on problems where every term is known."""

from __future__ import annotations

import pytest
import torch
from problems import newton, normal
from torch import Tensor, nn

import implicit_grad as ig

LR = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


X = torch.linspace(-2, 2, 10, dtype=torch.float64)[:, None]


def squares(model: nn.Module, shift: float = 0.0) -> Tensor:
    return (model(X + shift) - (X + shift).sin()).square().mean() / 2


def adapted(steps: int, lam: float, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model and a learner of it, which has descended its loss and the pull to it."""
    model = network()
    maml = ig.imaml(model, lam=lam, lr=LR, linear_solver=ig.Exact(), on_failure="ignore")
    learner = maml.clone()
    learner.adapt(lambda: squares(learner), steps=steps, **options)
    return model, learner


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_reptile_is_first_order_maml_of_the_proximal_form_up_to_the_step():
    """Where ∇L(φ) + λ(φ − θ) = 0, FOMAML on the support set goes where Reptile goes, λ as far."""
    lam = 2.0
    model, learner = adapted(300, lam, first_order=True)
    squares(learner).backward()
    reptile = flat(model.parameters()) - flat(learner.parameters())
    assert apart(flat(p.grad for p in model.parameters()), lam * reptile) < 1e-9
    model, learner = adapted(5, lam, first_order=True)  # not before
    squares(learner).backward()
    reptile = flat(model.parameters()) - flat(learner.parameters())
    assert apart(flat(p.grad for p in model.parameters()), lam * reptile) > 1e-2


def unrolled(steps: int, lam: float) -> Tensor:
    """MAML's gradient through steps of the library's own proximal rule, by plain autograd."""
    model = network()
    theta = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], shift: float = 0.0) -> Tensor:
        return squares(lambda x: torch.func.functional_call(model, weights, (x,)), shift)

    phi = theta
    for _ in range(steps):
        slopes = torch.autograd.grad(loss(phi), list(phi.values()), create_graph=True)
        phi = {
            name: (p - LR * slope + LR * lam * theta[name]) / (1 + LR * lam)
            for (name, p), slope in zip(phi.items(), slopes, strict=True)
        }
    return flat(torch.autograd.grad(loss(phi, 0.2), list(theta.values())))


def test_implicit_is_unrolled_at_convergence():
    lam, differences = 2.0, []
    for steps in (4, 16, 64, 256):
        model, learner = adapted(steps, lam)
        squares(learner, 0.2).backward()
        differences.append(apart(flat(p.grad for p in model.parameters()), unrolled(steps, lam)))
    assert differences == sorted(differences, reverse=True)
    assert differences[0] > 1e-2 and differences[-1] < 1e-9


class Bounded:
    """An inner problem near θ, and what Theorem 1's proof needs to know of it.

    Let A = H + λ with H ≥ 0 and H ρ-Lipschitz, and M the Lipschitz constant of the outer loss's
    gradient v. At φ with ‖φ − φ*‖ ≤ δ, where the system is solved up to ‖g − λA⁻¹v‖ ≤ δ′,

        ‖g − g*‖ ≤ ‖λA⁻¹‖‖v − v*‖ + ‖λA⁻¹(H* − H)A*⁻¹v*‖ + δ′ ≤ (M + ρ‖v*‖/λ) δ + δ′.
    """

    def __init__(
        self, loss, lam: float, theta: Tensor, target: Tensor, *, smooth: float, rho: float
    ) -> None:
        self.loss, self.lam, self.theta, self.rho = loss, lam, theta, rho
        self.kappa = (smooth + lam) / lam
        self.outer = lambda phi: 1.5 * (phi - target).square().sum()  # M = 3
        self.solution = newton(lambda p: torch.func.grad(loss)(p) + lam * (p - theta), theta)
        self.exact = self.solved(self.solution)

    def descend(self, theta: Tensor, steps: int) -> Tensor:
        phi = theta = theta.detach()
        for _ in range(steps):
            (slope,) = torch.autograd.grad(self.loss(leaf := phi.clone().requires_grad_()), leaf)
            phi = phi - LR * (slope + self.lam * (phi - theta))
        return phi

    def solved(self, phi: Tensor) -> Tensor:
        A = torch.func.hessian(self.loss)(phi) + self.lam * torch.eye(len(phi), dtype=phi.dtype)
        return self.lam * torch.linalg.solve(A, torch.func.grad(self.outer)(phi))

    def terms(self, steps: int, products: int) -> tuple[float, float, float, float]:
        """The error, δ, δ′ and the bound of the library's gradient."""
        theta = self.theta.clone().requires_grad_()
        condition = ig.proximal(self.loss, self.lam, convex=True)
        solver = ig.CG(maxiter=products)
        solve = ig.implicit(
            lambda theta: self.descend(theta, steps),
            condition,
            linear_solver=solver,
            on_failure="ignore",
        )
        phi = solve(theta)
        (g,) = torch.autograd.grad(self.outer(phi), theta)
        delta = float((phi.detach() - self.solution).norm())
        linear = float((g - self.solved(phi.detach())).norm())
        v = float(torch.func.grad(self.outer)(self.solution).norm())
        bound = (3 + self.rho * v / self.lam) * delta + linear
        return float((g - self.exact).norm()), delta, linear, bound


def quadratic() -> Bounded:
    basis, _ = torch.linalg.qr(normal(8, 8, seed=1, grad=False))
    H = basis @ torch.diag(torch.linspace(0, 9, 8, dtype=torch.float64)) @ basis.T
    theta, target = normal(8, seed=2, grad=False), normal(8, seed=3, grad=False)
    return Bounded(
        lambda phi: phi @ H @ phi / 2 - phi @ target, 0.5, theta, target, smooth=9.0, rho=0.0
    )


def logistic() -> Bounded:
    features, y = normal(15, 4, seed=4, grad=False), (normal(15, seed=5, grad=False) > 0).double()
    steepest = 1 / (6 * 3**0.5)  # of the sigmoid's derivative
    rho = float(steepest * features.norm(dim=1).pow(3).mean())

    def loss(phi: Tensor) -> Tensor:
        z = features @ phi
        return (nn.functional.softplus(z) - y * z).mean()

    theta, target = normal(4, seed=6, grad=False), normal(4, seed=7, grad=False)
    smooth = float(torch.linalg.matrix_norm(features, 2) ** 2 / (4 * len(y)))
    return Bounded(loss, 0.3, theta, target, smooth=smooth, rho=rho)


@pytest.mark.parametrize("problem", [quadratic, logistic])
def test_theorem_1_bounds_the_error_by_the_inner_and_the_linear_one(problem):
    problem = problem()
    for steps in (1, 4, 16, 64):
        for products in (1, 2, 4, 8):
            error, delta, linear, bound = problem.terms(steps, products)
            assert error <= bound * (1 + 1e-9) + 1e-12
            # and both parts fall as fast as its complexities, κ and √κ, count on
            start = float((problem.theta - problem.solution).norm())
            assert delta <= (1 - LR * problem.lam) ** steps * start * (1 + 1e-9)
            solved = float(problem.solved(problem.descend(problem.theta, steps)).norm())
            root = problem.kappa**0.5
            assert linear <= 2 * root * ((root - 1) / (root + 1)) ** products * solved + 1e-12


@pytest.mark.parametrize("problem", [quadratic, logistic])
def test_each_error_of_theorem_1_comes_alone_and_linearly(problem):
    problem = problem()
    error, delta, linear, _ = problem.terms(steps=600, products=1)
    assert delta < 1e-9 < linear and error == pytest.approx(linear, rel=1e-6)  # δ′ itself
    ratios = []
    for steps in (64, 80):
        error, delta, linear, _ = problem.terms(steps, products=50)
        assert linear < 1e-6 * delta
        ratios.append(error / delta)
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)  # linear in δ
