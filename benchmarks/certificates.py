"""Do the bounds hold, do the estimates tell the truth, and what do correction and polish gain?

    python benchmarks/certificates.py --out benchmarks/results

1. The linear solve: `Report.solve_error_bound` over the true error of dθ, on random strongly convex
   quadratics of 20 kinds of spectrum, for several numbers of CG iterations. The bound knows that
   the loss is convex and no more: it is as tight as λ is for the least curvature. So each spectrum
   is measured with a direction in which the loss is flat, and as it is.
2. The whole hypergradient: `certify(...).error` over the true error, on logistic regressions and
   small tanh networks whose inner problem was solved by a few steps of gradient descent.
3. The error of the plain, the corrected and the polished gradient against that of φ.

Everything is compared with dense float64 algebra and Newton's method run to rounding error.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor
from torch.func import grad, hessian
from torch.nn.functional import softplus

import implicit_grad as ig

ITERATIONS = (2, 5, 10, 20, 40)
STEPS = (2, 5, 10, 20, 40, 80, 160)
LAMS = (0.1, 1.0)


# ------------------------------------------------------------------ 1. the linear solve


def spectra(n: int, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Twenty kinds of eigenvalues, of the part of the Hessian that the loss makes."""
    uniform = torch.rand(n, dtype=torch.float64, generator=random)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    for size in (1.0, 10.0, 1e2, 1e3):
        yield f"uniform to {size:g}", size * uniform
        yield f"log-uniform to {size:g}", size ** (2 * uniform - 1)
        yield f"half zero, to {size:g}", size * uniform * (ramp > 0.5)
        yield f"few outliers, {size:g}", torch.where(ramp > 0.97, size, uniform)
        yield f"three clusters, to {size:g}", size * (3 * uniform).floor() / 3


def solve_rows(problems: int) -> list[Row]:
    """For each spectrum, dtype and number of iterations: the true error and its bound."""
    rows: list[Row] = []
    random = torch.Generator().manual_seed(0)
    n, lam = 60, 0.7
    for repeat in track(range(problems), "1. bounds of the linear solve"):
        basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random))
        v = torch.randn(n, dtype=torch.float64, generator=random)
        for flat, (name, eigenvalues) in itertools.product((True, False), spectra(n, random)):
            eigenvalues = torch.cat([eigenvalues[1:], eigenvalues[:1] * (not flat)])
            dense = basis @ torch.diag(eigenvalues) @ basis.T
            for dtype in (torch.float64, torch.float32):
                loss_matrix = ((dense + dense.T) / 2).to(dtype)
                exact = torch.linalg.solve(
                    loss_matrix.double() / lam + torch.eye(n, dtype=torch.float64),
                    v.to(dtype).double(),
                )
                for iterations in ITERATIONS:
                    theta = torch.zeros(n, dtype=dtype, requires_grad=True)
                    monitor = ig.Monitor()
                    solve = ig.implicit(
                        lambda theta: theta,  # the minimiser: both are 0
                        ig.proximal(lambda w, m=loss_matrix: w @ m @ w / 2, lam, convex=True),
                        linear_solver=ig.CG(maxiter=iterations),
                        monitor=monitor,
                    )
                    (solve(theta) @ v.to(dtype)).backward()
                    error = float((theta.grad.double() - exact).norm())
                    rows.append(
                        {
                            "spectrum": name,
                            "flat": flat,
                            "repeat": repeat,
                            "dtype": str(dtype).removeprefix("torch."),
                            "iterations": iterations,
                            "error": error / float(exact.norm()),
                            "bound": monitor.last.solve_error_bound / float(exact.norm()),
                        }
                    )
    return rows


# ------------------------------------------------------------------ 2. and 3. the whole gradient


@dataclass(frozen=True)
class Problem:
    """min loss(w) + λ/2 ‖w − θ‖², an outer loss, and the step length of gradient descent."""

    name: str
    loss: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor], Tensor]
    theta: Tensor
    lam: float
    lr: float

    def objective(self, w: Tensor, theta: Tensor) -> Tensor:
        """What the inner solver minimises."""
        return self.loss(w) + self.lam / 2 * (w - theta).square().sum()

    def iterates(self, steps: Sequence[int]) -> Iterator[Tensor]:
        """Gradient descent from θ, after each of these numbers of steps."""
        w = self.theta
        for before, after in itertools.pairwise((0, *steps)):
            for _ in range(after - before):
                w = w - self.lr * grad(self.objective)(w, self.theta)
            yield w

    def exact(self) -> tuple[Tensor, Tensor] | None:
        """The minimiser that gradient descent leads to, and the hypergradient there."""
        theta = self.theta
        (w,) = self.iterates([2000])
        for _ in range(20):
            slope = grad(self.objective)(w, theta)
            w = w - torch.linalg.solve(hessian(self.objective)(w, theta), slope)
        matrix = hessian(self.objective)(w, theta)
        if float(grad(self.objective)(w, theta).norm()) > 1e-11 or not _definite(matrix):
            return None
        return w, self.lam * torch.linalg.solve(matrix, grad(self.outer)(w))


def _definite(matrix: Tensor) -> bool:
    return float(torch.linalg.eigvalsh(matrix)[0]) > 0


def logistic(seed: int, lam: float) -> Problem:
    """Logistic regression, 30 weights on 60 points of uneven scale."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.5, -1, 30, dtype=torch.float64)
    X, Z = (torch.randn(60, 30, dtype=torch.float64, generator=random) * scale for _ in range(2))
    truth = torch.randn(30, dtype=torch.float64, generator=random)
    y, t = (torch.bernoulli(torch.sigmoid(A @ truth), generator=random) for A in (X, Z))

    def error(A: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda w: (softplus(A @ w) - labels * (A @ w)).mean()

    theta = torch.randn(30, dtype=torch.float64, generator=random)
    smoothness = float(torch.linalg.matrix_norm(X, 2) ** 2) / (4 * len(X)) + lam
    return Problem("logistic", error(X, y), error(Z, t), theta, lam, 1 / smoothness)


def network(seed: int, lam: float) -> Problem:
    """A tanh network 1-8-1 on twelve points of a sine."""
    random = torch.Generator().manual_seed(seed)
    x, z = (4 * torch.rand(12, dtype=torch.float64, generator=random) - 2 for _ in range(2))
    phase = 3 * torch.rand((), dtype=torch.float64, generator=random)

    def output(w: Tensor, x: Tensor) -> Tensor:
        a, b, c = w[:8], w[8:16], w[16:24]
        return torch.tanh(x[:, None] * a + b) @ c + w[24]

    def error(x: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda w: (output(w, x) - torch.sin(x + phase)).square().mean()

    theta = torch.randn(25, dtype=torch.float64, generator=random) / 2
    return Problem("network", error(x), error(z), theta, lam, 0.1)


def gradient_rows(problems: int) -> list[Row]:
    """For each problem and number of steps: true errors and the estimate."""
    rows: list[Row] = []
    cases = [
        make(seed, lam) for make in (logistic, network) for lam in LAMS for seed in range(problems)
    ]
    for index, problem in enumerate(track(cases, "2. estimates of the whole error")):
        if (reference := problem.exact()) is None:
            continue  # a saddle, or not solved: there is no exact gradient to compare with
        w, exact = reference
        for steps, iterate in zip(STEPS, problem.iterates(STEPS), strict=True):
            theta = problem.theta.clone().requires_grad_()
            condition = ig.proximal(problem.loss, problem.lam)

            def solver(theta: Tensor, iterate: Tensor = iterate) -> Tensor:
                return iterate

            plain = ig.implicit(solver, condition, on_failure="ignore")
            polished = ig.implicit(solver, condition, polish=1, on_failure="ignore")
            certificate = ig.certify(plain, (theta,), problem.outer)
            if not certificate.status.ok:
                continue  # negative curvature at φ: nothing is promised, and it says so
            phi = polished(theta)
            (from_polished,) = torch.autograd.grad(problem.outer(phi), theta)
            size = float(exact.norm())

            def relative(gradient: Tensor, size: float = size, exact: Tensor = exact) -> float:
                return float((gradient - exact).norm()) / size

            rows.append(
                {
                    "problem": problem.name,
                    "index": index,
                    "lam": problem.lam,
                    "steps": steps,
                    "inner_error": float((iterate - w).norm()),
                    "error": relative(certificate.gradients[0]),
                    "estimate": certificate.error / size,
                    "corrected": relative(certificate.corrected[0]),
                    "polished": relative(from_polished),
                }
            )
    return rows


# ------------------------------------------------------------------ summaries


def ratios(rows: list[Row], over: str, under: str, floor: float, ceiling: float) -> list[float]:
    """row[over] / row[under] where the latter is neither rounding error nor hopeless."""
    return [r[over] / r[under] for r in rows if floor < r[under] <= ceiling]  # type: ignore


def summary(name: str, values: list[float]) -> Row:
    """Quantiles of a ratio."""
    values = sorted(values)
    low, high = (values[round(q * (len(values) - 1))] for q in (0.05, 0.95))
    return {
        "ratio": name,
        "cases": len(values),
        "min": values[0],
        "5 %": low,
        "median": statistics.median(values),
        "95 %": high,
        "max": values[-1],
    }


def slopes(rows: list[Row], column: str) -> list[float]:
    """d log(error) / d log(inner error) for each problem, where φ is close and not at rounding."""
    found = []
    for index in sorted({r["index"] for r in rows}):
        points = [
            (math.log(r["inner_error"]), math.log(r[column]))
            for r in rows
            if r["index"] == index and r["inner_error"] < 0.03 and r[column] > 1e-9
        ]
        if len(points) >= 3 and points[0][0] - points[-1][0] > math.log(10):
            found.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return found


def draw(solves: list[Row], gradients: list[Row], path: Path) -> None:
    """Histograms of bound and estimate over the truth; errors against the inner error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    bins = [10 ** (k / 20) for k in range(-10, 41)]
    for dtype, floor in (("float64", 1e-13), ("float32", 1e-4)):
        chosen = [r for r in solves if r["dtype"] == dtype and r["flat"]]
        values = ratios(chosen, "bound", "error", floor, math.inf)
        left.hist(values, bins, alpha=0.6, label=f"{dtype}, {len(values)} solves")
    left.set(xscale="log", xlabel="bound / true error", title="linear solve: a bound (loss flat)")
    for name in ("logistic", "network"):
        chosen = [r for r in gradients if r["problem"] == name]
        values = ratios(chosen, "estimate", "error", 1e-10, 0.4)
        middle.hist(values, bins, alpha=0.6, label=f"{name}, {len(values)} gradients")
    middle.set(xscale="log", xlabel="estimate / true error", title="whole gradient: an estimate")
    for column, label in (("error", "plain"), ("corrected", "corrected"), ("polished", "polish=1")):
        points = [(r["inner_error"], r[column]) for r in gradients if r[column] > 1e-14]
        right.plot(*zip(*points, strict=True), ".", markersize=2.5, label=label)
    right.set(xscale="log", yscale="log", xlabel="‖φ − φ*‖", title="relative error of the gradient")
    for panel in (left, middle, right):
        panel.legend(frameon=False, markerscale=4)
    for panel in (left, middle):
        panel.axvline(1, color="black", linewidth=0.8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, then one table and file for each question, and one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--repeats", type=int, default=5, help="quadratics of each spectrum")
    parser.add_argument("--problems", type=int, default=60, help="of each kind and lam")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    solves, gradients = solve_rows(options.repeats), gradient_rows(options.problems)
    rows = [
        summary(
            f"bound / error, {dtype}, {'flat' if flat else 'as it is'}",
            ratios(
                [r for r in solves if r["dtype"] == dtype and r["flat"] == flat],
                "bound",
                "error",
                floor,
                math.inf,
            ),
        )
        for flat in (True, False)
        for dtype, floor in (("float64", 1e-13), ("float32", 1e-4))
    ]
    rows += [
        summary(
            f"estimate / error, {name}",
            ratios([r for r in gradients if r["problem"] == name], "estimate", "error", 1e-10, 0.4),
        )
        for name in ("logistic", "network")
    ]
    rows += [
        summary(f"slope, {c}", slopes(gradients, c)) for c in ("error", "corrected", "polished")
    ]
    console = Console(width=120)
    violations = sum(r["bound"] < r["error"] for r in solves)  # type: ignore[operator]
    console.print(f"{len(solves)} solves, {violations} violations of the bound")
    write(rows, options.out / "certificates.csv", console)
    for name, detail in (("certificates_solve", solves), ("certificates_gradient", gradients)):
        write(detail, options.out / f"{name}.csv", Console(quiet=True))
    draw(solves, gradients, options.out / "certificates.png")


if __name__ == "__main__":
    main()
