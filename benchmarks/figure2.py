"""The iMAML paper's Figure 2 and Table 1: how exact are meta-gradients, and what do they cost?

    python benchmarks/figure2.py --out benchmarks/results

(a) Linear regression with a proximal term, ill-conditioned (κ = 50), where the meta-gradient is
known in closed form: the relative error of each method's after some steps of gradient descent, the
median and quartiles over random problems; also on the paper's problem as it is stated. (b) Peak
memory and time of one task, 20-way 5-shot on learn2learn's OmniglotCNN, against adaptation steps,
on one thread; medians of CPU time over repeats taken in turn. (c) What the complexities of the
paper's Table 1 rest on: the steps of gradient descent, of Nesterov's method and of CG that reduce
the residual by 1e-6, against κ, for quadratics with the spectrum that is worst for CG (Chebyshev's
points). The exponents are fitted.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import learn2learn as l2l
import torch
from adaptation import learners, task
from rich.console import Console
from rich.progress import track
from scaling import exponent
from tables import Row, write
from timing import interleaved
from torch import Tensor

import implicit_grad as ig
from implicit_grad.testing import peak_memory

SIZE = 50  # parameters of the regressions
KAPPA = 50
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LAST = 10  # steps that truncated back-propagation keeps, terms of the Neumann series
SOLVERS: dict[str, ig.LinearSolver] = {
    "FOMAML": ig.CG(maxiter=0),
    "iMAML, CG 2": ig.CG(maxiter=2),
    "iMAML, CG 5": ig.CG(maxiter=5),
    "iMAML, CG 10": ig.CG(maxiter=10),
    "iMAML, CG 5, Nyström 10": ig.CG(maxiter=5, preconditioner=ig.Nystrom(rank=10)),
    "iMAML, CG 5, Jacobi": ig.CG(maxiter=5, preconditioner=ig.Jacobi()),
    f"iMAML, Neumann {LAST}": ig.Neumann(terms=LAST, scale=1.0),
}
COSTED = ("MAML", "FOMAML", "iMAML")
RTOL = 1e-6


class Regression:
    """½ mean (Xφ − y)² + λ/2 ‖φ − θ‖², curvatures from 1/κ to 1; an outer loss of the same kind.

    The features are of uneven scale, and nearly independent: what Jacobi's preconditioner is for.
    """

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=random)

        X, held_out, lam = self._features(normal)
        longest = torch.linalg.eigvalsh(X.T @ X / len(X))[-1] + lam  # errors know no units
        self.lam = float(lam / longest)
        self.X = X / longest.sqrt()
        self.y, self.theta = self.X @ normal(SIZE) + normal(len(X)) / 10, normal(SIZE)
        target = held_out @ normal(SIZE)
        self.outer_loss: Callable[[Tensor], Tensor] = lambda phi: (
            (held_out @ phi - target).square().mean() / 2
        )
        eye = torch.eye(SIZE, dtype=torch.float64)
        self.hessian = self.X.T @ self.X / len(X) + self.lam * eye
        pulled = self.X.T @ self.y / len(X) + self.lam * self.theta
        self.solution = torch.linalg.solve(self.hessian, pulled)
        v = torch.func.grad(self.outer_loss)(self.solution)
        self.exact = self.lam * torch.linalg.solve(self.hessian, v)

    def _features(self, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor | float]:
        """X, that of the outer loss, and λ."""
        scales = torch.logspace(0, -2, SIZE, dtype=torch.float64)
        X, held_out = normal(10 * SIZE, SIZE) * scales, normal(10 * SIZE, SIZE) * scales
        least, greatest = torch.linalg.eigvalsh(X.T @ X / len(X))[[0, -1]]
        return X, held_out, (greatest - KAPPA * least) / (KAPPA - 1)

    def loss(self, phi: Tensor) -> Tensor:
        """The inner loss, without the proximal term."""
        return (self.X @ phi - self.y).square().mean() / 2

    def implicit(self, steps: int, solver: ig.LinearSolver) -> float:
        """The error of the implicit meta-gradient after some steps of gradient descent."""
        condition = ig.proximal(self.loss, self.lam, convex=True)
        descend = functools.partial(self.descend, steps=steps)
        solve = ig.implicit(descend, condition, linear_solver=solver, on_failure="ignore")
        return self._error(solve)

    def unrolled(self, steps: int, last: int) -> float:
        """The error of the same steps' derivative, of which back-propagation sees the last."""
        return self._error(functools.partial(self.descend, steps=steps, last=last))

    def descend(self, theta: Tensor, steps: int, last: int | None = None) -> Tensor:
        """Gradient descent from θ, as the paper has it: the proximal term's gradient included."""
        phi = theta
        for step in range(steps):
            if last is not None and step == steps - last:
                phi = phi.detach()
            slope = self.X.T @ (self.X @ phi - self.y) / len(self.X)
            phi = phi - slope - self.lam * (phi - theta)
        return phi

    def _error(self, adapt: Callable[[Tensor], Tensor]) -> float:
        theta = self.theta.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.outer_loss(adapt(theta)), theta)
        return float((found - self.exact).norm() / self.exact.norm())


class Stated(Regression):
    """The paper's problem by its numbers: x ∈ ℝ⁵⁰, λ = 5, κ = 50, curvatures evenly between.

    That can be read in two ways; here κ is that of loss and proximal term together.
    """

    lam_stated = 5.0
    curvatures = torch.linspace(0, 5.0 * (KAPPA - 1), SIZE, dtype=torch.float64)

    def _features(self, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor | float]:
        basis = torch.linalg.qr(normal(SIZE, SIZE))[0]

        def drawn() -> Tensor:
            rows = torch.linalg.qr(normal(10 * SIZE, SIZE))[0] * (10 * SIZE) ** 0.5
            return rows * self.curvatures.sqrt() @ basis.T

        return drawn(), drawn(), self.lam_stated


class StatedOfLoss(Stated):
    """Here κ is that of the loss alone, whose least curvature is 1; with λ = 5 it is 9.2."""

    curvatures = torch.linspace(1, KAPPA, SIZE, dtype=torch.float64)


def measure_errors(problems: int, most: int, kind: type[Regression] = Regression) -> list[Row]:
    """One row for each method and number of steps."""
    methods: dict[str, Callable[[Regression, int], float]] = {
        "MAML": lambda problem, steps: problem.unrolled(steps, last=steps + 1),
        f"MAML, truncated to {LAST}": lambda problem, steps: problem.unrolled(steps, last=LAST),
    }
    for name, solver in SOLVERS.items():
        methods[name] = lambda problem, steps, solver=solver: problem.implicit(steps, solver)
    found = [kind(seed) for seed in range(problems)]
    rows: list[Row] = []
    for name, method in methods.items():
        for steps in track([s for s in STEPS if s <= most], f"error, {name}"):
            errors = [method(problem, steps) for problem in found]
            low, middle, high = statistics.quantiles(errors, n=4)
            rows.append({"method": name, "steps": steps, "error": middle, "low": low, "high": high})
    return rows


def measure_costs(ways: int, shots: int, most: int, repeats: int) -> list[Row]:
    """One row for each method and number of steps, which take turns."""
    images, labels = torch.rand(ways * shots, 1, 28, 28), torch.arange(ways).repeat(shots)
    methods = learners(l2l.vision.models.OmniglotCNN(ways))
    cases = [(m, steps) for steps in STEPS[::2] if steps <= most for m in COSTED]
    calls = {
        f"{m}, {steps}": functools.partial(task, methods[m], images, labels, steps)
        for m, steps in cases
    }
    times = interleaved(calls, repeats, "time")
    rows: list[Row] = []
    for (method, steps), (name, call) in zip(track(cases, "memory"), calls.items(), strict=True):
        rows.append(
            {
                "method": method,
                "steps": steps,
                "MiB": peak_memory(call) / 2**20,
                "seconds": statistics.median(times[name]),
                "least": min(times[name]),
                "greatest": max(times[name]),
            }
        )
    return rows


def steps_to_solve(kappa: float, size: int) -> Row:
    """What each method needs where all directions have an equal share in the first residual."""
    points = torch.linspace(0, torch.pi, size, dtype=torch.float64).cos()
    curvatures = ((1 + 1 / kappa) + (1 - 1 / kappa) * points) / 2
    calls = 0

    def objective(phi: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (curvatures * phi * phi).sum() / 2

    found: Row = {"kappa": kappa}
    for name, solver in {
        "gradient descent": ig.solvers.GradientDescent(lr=1.0, steps=10**6, rtol=RTOL),
        "Nesterov": ig.solvers.Nesterov(lr=1.0, kappa=kappa, steps=10**6, rtol=RTOL),
    }.items():
        calls = 0
        solver.minimize(objective, 1 / curvatures)
        found[name] = calls
    minimum, monitor = torch.zeros(size, dtype=torch.float64).requires_grad_(), ig.Monitor()
    solve = ig.implicit(
        lambda phi: phi.detach().clone(),
        ig.proximal(lambda phi: objective(phi) - phi.square().sum() / kappa / 2, 1 / kappa),
        linear_solver=ig.CG(rtol=RTOL, maxiter=10**6),
        monitor=monitor,
    )
    solve(minimum).sum().backward()
    assert monitor.last is not None
    found["CG"] = monitor.last.iterations
    return found


def exponents(costs: Sequence[Row], iterations: Sequence[Row]) -> list[Row]:
    """Table 1, as measured: each growth with its exponent."""
    found: list[Row] = []
    for method in COSTED:
        own = [row for row in costs if row["method"] == method]
        for cost in ("MiB", "seconds"):
            fitted = exponent([row["steps"] for row in own], [row[cost] for row in own])
            found.append({"of": f"{method}, {cost}", "in": "steps", "exponent": fitted})
    kappas = [row["kappa"] for row in iterations]
    for method in ("gradient descent", "Nesterov", "CG"):
        fitted = exponent(kappas, [row[method] for row in iterations])
        found.append({"of": f"{method}, iterations", "in": "kappa", "exponent": fitted})
    return found


def draw(errors: list[Row], costs: list[Row], iterations: list[Row], path: Path) -> None:
    """The four panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    error, kappa, memory, seconds = panels.flat
    for panel in panels.flat:
        panel.set(xscale="log", yscale="log")
    for method in dict.fromkeys(str(row["method"]) for row in errors):
        own = [row for row in errors if row["method"] == method]
        steps = [row["steps"] for row in own]
        # on a quadratic, truncated back-propagation is the Neumann series: dots on its line
        style = "o" if "truncated" in method else "--" if "MAML" == method[-4:] else "-"
        (line,) = error.plot(steps, [row["error"] for row in own], style, label=method)
        error.fill_between(
            steps,
            [row["low"] for row in own],
            [row["high"] for row in own],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    error.set(ylabel="relative error of the meta-gradient")
    error.set_title(f"(a) linear regression, κ = {KAPPA}", fontsize=10)
    for method in ("gradient descent", "Nesterov", "CG"):
        points = [(row["kappa"], row[method]) for row in iterations]
        kappa.plot(*zip(*points, strict=True), "o-", label=method)
    kappa.set(xlabel="condition number κ", ylabel="iterations")
    kappa.set_title(f"(c) iterations to a residual of {RTOL:g}", fontsize=10)
    for method in COSTED:
        own = [row for row in costs if row["method"] == method]
        for panel, cost in ((memory, "MiB"), (seconds, "seconds")):
            panel.plot(
                [row["steps"] for row in own], [row[cost] for row in own], "o-", label=method
            )
    memory.set(ylabel="peak memory (MiB)")
    seconds.set(ylabel="CPU seconds for one task")
    for panel in (memory, seconds):
        panel.set_title("(b) OmniglotCNN, one task", fontsize=10)
    for panel in (error, memory, seconds):
        panel.set(xlabel="adaptation steps")
    for panel in panels.flat:
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then a table and a file for each question, and one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--problems", type=int, default=20, help="random regressions for (a)")
    parser.add_argument("--ways", type=int, default=20, help="classes of a task for (b)")
    parser.add_argument("--shots", type=int, default=5, help="images of a class for (b)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats for (b)")
    parser.add_argument("--steps", type=int, default=256, help="most steps for (a)")
    parser.add_argument("--unrolled", type=int, default=64, help="most steps for (b)")
    parser.add_argument("--kappa", type=int, default=1000, help="greatest condition number for (c)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    errors = measure_errors(options.problems, options.steps)
    stated: list[Row] = [
        {"kappa of": of, **row}
        for of, kind in (("loss and proximal term", Stated), ("loss", StatedOfLoss))
        for row in measure_errors(options.problems, options.steps, kind)
    ]
    kappas = [k for k in (10, 30, 100, 300, 1000, 3000) if k <= options.kappa]
    iterations = [steps_to_solve(k, size=1000) for k in track(kappas, "iterations")]
    costs = measure_costs(options.ways, options.shots, options.unrolled, options.repeats)
    console = Console(width=120)
    write(errors, options.out / "figure2_error.csv", console)
    write(stated, options.out / "figure2_stated.csv", console)
    write(costs, options.out / "figure2_cost.csv", console)
    write(iterations, options.out / "figure2_iterations.csv", console)
    write(exponents(costs, iterations), options.out / "figure2_exponents.csv", console)
    draw(errors, costs, iterations, options.out / "figure2.png")


if __name__ == "__main__":
    main()
