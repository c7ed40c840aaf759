"""How many Hessian-vector products does `rtol_gradient` save, at equal error?

    python benchmarks/adaptive.py --out benchmarks/results

Logistic regressions near θ of very different condition (λ from 1e-3 to 1, features of even and
uneven scale), solved exactly; the error is that of dθ, relative to the exact one. A fixed number of
CG iterations has to be chosen for all of them: the least that brings the error below the tolerance
in 95 % of the problems. The adaptive solve stops by its bound (the loss is said to be convex) or by
its estimate (it is not). Products count all that the solve takes, the final check included.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor
from torch.func import grad, hessian
from torch.nn.functional import softplus

import implicit_grad as ig

TOLERANCES = (0.3, 0.1, 1e-2, 1e-3, 1e-4)
SIZE = 60


class Problem:
    """min loss(w) + λ/2 ‖w − θ‖², its solution, and the exact hypergradient for a random v."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=random)

        X = normal(120, SIZE) * torch.logspace(0, -(seed % 3), SIZE, dtype=torch.float64)
        y = torch.bernoulli(torch.sigmoid(X @ normal(SIZE)), generator=random)
        self.loss: Callable[[Tensor], Tensor] = lambda w: (softplus(X @ w) - y * (X @ w)).mean()
        self.lam = 10 ** (-3 * float(torch.rand((), generator=random)))
        self.theta, self.v = normal(SIZE), normal(SIZE)
        w, prior = self.theta, self.theta

        def objective(w: Tensor) -> Tensor:
            return self.loss(w) + self.lam / 2 * (w - prior).square().sum()

        for _ in range(50):  # damped Newton: half steps until the slope falls
            step = torch.linalg.solve(hessian(objective)(w), grad(objective)(w))
            length = 1.0
            while length > 1e-3 and grad(objective)(w - length * step).norm() > grad(objective)(
                w
            ).norm() * (1 - length / 4):
                length /= 2
            w = w - length * step
        self.phi = w
        self.exact = self.lam * torch.linalg.solve(hessian(objective)(w), self.v)

    def solve(self, convex: bool, **options: Any) -> tuple[float, int]:
        """The relative error and the products of one backward solve."""
        theta, monitor = self.theta.clone().requires_grad_(), ig.Monitor()
        condition = ig.proximal(self.loss, self.lam, convex=convex)
        phi = ig.implicit(lambda theta: self.phi, condition, monitor=monitor, **options)(theta)
        (gradient,) = torch.autograd.grad(phi @ self.v, theta)
        assert monitor.last is not None
        error = float((gradient - self.exact).norm() / self.exact.norm())
        return error, monitor.last.products


def quantile(values: list[float], share: float) -> float:
    """The least value that this share of all does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def measure(problems: list[Problem], most: int) -> list[Row]:
    """One row for each tolerance and rule."""
    fixed = {
        k: [p.solve(True, linear_solver=ig.CG(maxiter=k)) for p in problems]
        for k in track(range(1, most + 1), "fixed numbers of iterations")
    }
    rows: list[Row] = []
    for rtol in TOLERANCES:
        enough = [k for k, runs in fixed.items() if quantile([e for e, _ in runs], 0.95) <= rtol]
        rules = {
            "adaptive, bound": [p.solve(True, rtol_gradient=rtol) for p in problems],
            "adaptive, estimate": [p.solve(False, rtol_gradient=rtol) for p in problems],
        }
        if enough:
            rules = {f"fixed, CG(maxiter={enough[0]})": fixed[enough[0]], **rules}
        for rule, runs in rules.items():
            rows.append(
                {
                    "rtol": rtol,
                    "rule": rule,
                    "mean_products": statistics.mean(n for _, n in runs),
                    "most_products": max(n for _, n in runs),
                    "median_error": statistics.median(e for e, _ in runs),
                    "error_95": quantile([e for e, _ in runs], 0.95),
                    "within": sum(e <= rtol for e, _ in runs) / len(runs),
                }
            )
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Mean products against the error that 95 % of the problems keep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for kind in ("fixed", "adaptive, bound", "adaptive, estimate"):
        chosen = [r for r in rows if str(r["rule"]).startswith(kind)]
        axes.plot(
            [r["error_95"] for r in chosen], [r["mean_products"] for r in chosen], "o-", label=kind
        )
    axes.set(xscale="log", xlabel="relative error of dθ (95 % of problems)", ylabel="mean products")
    axes.invert_xaxis()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, then a table, a CSV file and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--most", type=int, default=100, help="most fixed iterations to try")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    problems = [Problem(seed) for seed in track(range(options.problems), "problems")]
    rows = measure(problems, options.most)
    write(rows, options.out / "adaptive.csv", Console(width=120))
    draw(rows, options.out / "adaptive.png")


if __name__ == "__main__":
    main()
