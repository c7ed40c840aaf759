"""The iMAML paper's identities and its Theorem 1, in figures: where do they hold, and how tightly?

    python benchmarks/identities.py --out benchmarks/results

(a) Theorem 1: the meta-gradient's error against what is allowed to it by δ, the distance of φ from
the solution, and δ′, the linear solve's own error: M δ + δ′ on the paper's quadratic problem, where
M is the outer loss's greatest curvature. (b) Implicit is unrolled at convergence: the distance of
both from the gradient at the solution, and from each other, against steps, on a small network. (c)
Reptile is first-order MAML on the adaptation's own loss, where that is solved: ∇L(φ) = λ(θ − φ).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from figure2 import Regression, Stated, StatedOfLoss
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor

import implicit_grad as ig

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PRODUCTS = (1, 2, 3, 5, 8, 12, 20, 50)
LAM, LR = 2.0, 0.1


def theorem(problem: Regression, steps: int, products: int) -> Row:
    """δ, δ′, the error they cause, and what Theorem 1 allows: all absolute."""
    condition = ig.proximal(problem.loss, problem.lam, convex=True)
    solver = ig.CG(maxiter=products)
    descend = functools.partial(problem.descend, steps=steps)
    solve = ig.implicit(descend, condition, linear_solver=solver, on_failure="ignore")
    theta = problem.theta.clone().requires_grad_()
    adapted = solve(theta)
    (found,) = torch.autograd.grad(problem.outer_loss(adapted), theta)
    phi = adapted.detach()
    v = torch.func.grad(problem.outer_loss)(phi)
    solved = problem.lam * torch.linalg.solve(problem.hessian, v)
    inner = float((phi - problem.solution).norm())
    linear = float((found - solved).norm())
    outer = torch.linalg.eigvalsh(torch.func.hessian(problem.outer_loss)(phi))
    allowed = float(outer[-1]) * inner + linear
    error = float((found - problem.exact).norm())
    return {"delta": inner, "delta_linear": linear, "error": error, "allowed": allowed}


class Network:
    """Ten points of a sine, a tanh network of 31 weights, λ that makes the inner problem convex."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.theta = torch.randn(31, dtype=torch.float64, generator=random)
        self.x = torch.linspace(-2, 2, 10, dtype=torch.float64)

    def loss(self, phi: Tensor, shift: float = 0.0) -> Tensor:
        """Half the mean squared error on a sine."""
        x = self.x + shift
        hidden = torch.tanh(x[:, None] * phi[:10] + phi[10:20])
        return ((hidden @ phi[20:30] + phi[30] - x.sin()) ** 2).mean() / 2

    def outer_loss(self, phi: Tensor) -> Tensor:
        """On points between."""
        return self.loss(phi, shift=0.2)

    def descend(self, theta: Tensor, steps: int) -> Tensor:
        """Gradient descent from θ on the loss and the proximal term, differentiable."""
        phi = theta
        for _ in range(steps):
            given = phi if phi.requires_grad else phi.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(given), given, create_graph=True)
            phi = phi - LR * (slope + LAM * (phi - theta))
        return phi

    def unrolled(self, steps: int) -> Tensor:
        """MAML's gradient."""
        theta = self.theta.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.outer_loss(self.descend(theta, steps)), theta)
        return found

    def implicit(self, steps: int) -> Tensor:
        """iMAML's after as many steps, its linear system solved."""
        train = functools.partial(self.descend, steps=steps)
        solve = ig.implicit(
            lambda theta: train(theta).detach(),
            ig.proximal(self.loss, LAM),
            linear_solver=ig.Exact(),
            on_failure="ignore",
        )
        theta = self.theta.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.outer_loss(solve(theta)), theta)
        return found

    def first_order_and_reptile(self, steps: int) -> tuple[Tensor, Tensor]:
        """∇L(φ), FOMAML's gradient where the outer loss is the inner one, and λ(θ − φ)."""
        phi = self.descend(self.theta, steps).detach()
        return torch.func.grad(self.loss)(phi), LAM * (self.theta - phi)


def identities(steps: int) -> Row:
    """Relative differences after so many steps, of what is equal in the limit."""
    net = Network()
    limit = net.implicit(4 * STEPS[-1])
    implicit, unrolled = net.implicit(steps), net.unrolled(steps)
    first_order, reptile = net.first_order_and_reptile(steps)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    return {
        "steps": steps,
        "implicit, to the limit": apart(implicit, limit),
        "unrolled, to the limit": apart(unrolled, limit),
        "implicit to unrolled": apart(implicit, unrolled),
        "Reptile to FOMAML": apart(reptile, first_order),
    }


def draw(bounds: list[Row], limits: list[Row], path: Path) -> None:
    """Errors against what the theorem allows, and the limits against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bound, limit) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in dict.fromkeys(str(row["problem"]) for row in bounds):
        own = [row for row in bounds if row["problem"] == name]
        bound.plot([r["allowed"] for r in own], [r["error"] for r in own], ".", label=name)
    ends = sorted(float(str(row["allowed"])) for row in bounds)[:: len(bounds) - 1]
    bound.plot(ends, ends, "k--", linewidth=1, label="error = bound")
    bound.set(xlabel="allowed: M δ + δ′", ylabel="error of the meta-gradient")
    bound.set_title("(a) Theorem 1, quadratic problems", fontsize=10)
    rounding = torch.finfo(torch.float64).eps  # in the place of 0, which has no logarithm
    for name in list(limits[0])[1:]:
        differences = [max(float(r[name]), rounding) for r in limits]
        limit.plot([r["steps"] for r in limits], differences, "o-", label=name)
    limit.set(xlabel="steps", ylabel="relative difference")
    limit.set_title("(b), (c) what is equal in the limit, tanh network", fontsize=10)
    for panel in (bound, limit):
        panel.set(xscale="log", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, two tables, one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--problems", type=int, default=5, help="random quadratics of each kind")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    kinds = {
        "uneven features, κ = 50": Regression,
        "as stated, κ = 50": Stated,
        "as stated, κ = 9.2": StatedOfLoss,
    }
    bounds: list[Row] = [
        {"problem": name, "seed": seed, "steps": s, "products": k, **theorem(problem, s, k)}
        for name, kind in kinds.items()
        for seed in track(range(options.problems), name)
        for problem in (kind(seed),)
        for s in STEPS
        for k in PRODUCTS
    ]
    limits = [identities(steps) for steps in STEPS]
    console = Console(width=120)
    write(bounds, options.out / "identities_theorem.csv", Console(quiet=True))
    write(limits, options.out / "identities_limits.csv", console)
    ratios = sorted(float(str(r["error"])) / float(str(r["allowed"])) for r in bounds)
    console.print(f"error/allowed: median {statistics.median(ratios):.3g}, most {ratios[-1]:.3g}")
    draw(bounds, limits, options.out / "identities.png")


if __name__ == "__main__":
    main()
