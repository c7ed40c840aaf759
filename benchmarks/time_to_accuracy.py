"""How soon is a hypergradient right: seconds to 10 %, 1 % and 0.1 % of the exact one?

    python benchmarks/time_to_accuracy.py --out benchmarks/results

Problems min loss(φ) + λ/2 ‖φ − θ‖² in float64 whose exact dθ comes from Newton's method and a dense
solve. Each method has two budgets, one for the inner problem and one for the linear system; all
pairs are tried, the cheapest that reaches a tolerance is kept for it, and these are timed again in
turn, on one thread. Step lengths and momenta are the best for the true extreme curvatures, for the
peers too. Passes are backward passes through the loss: gradients and products alike.

Meta-gradients come in pairs, at two θ that are 1 % apart, as in meta-training: "warm" methods start
from the other's φ. The error is the greater of the two. What is built once for many of them counts
by its share: a kept preconditioner for 100.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from timing import cpu_seconds, interleaved
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import cross_entropy

import implicit_grad as ig

TOLERANCES = (0.1, 0.01, 0.001)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS = tuple(2**k for k in range(2, 12))
POLISHES = (1, 2, 3, 4)
KEPT = 100  # hypergradients that a kept preconditioner serves
ACCURACIES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
LONGEST = 0.4  # seconds for one meta-gradient; what takes longer is not tried further
Run = Callable[[int], Tensor]


class Passes(torch.autograd.Function):
    """The identity; counts how often backward passes through it."""

    count = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        Passes.count += 1
        return v


class Problem:
    """An inner problem on a flat φ, an outer loss, and the exact hypergradients at two θ."""

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        outer: Callable[[Tensor], Tensor],
        lam: float,
        theta: Tensor,
    ) -> None:
        self._loss, self.outer, self.lam = loss, outer, lam
        self.counting = False
        nearby = theta + 0.01 * theta.norm() * torch.randn_like(theta) / theta.numel() ** 0.5
        self.thetas = tuple(t.requires_grad_() for t in (theta, nearby))
        solved = [self._solve(t.detach()) for t in self.thetas]
        self.solutions, self.exact = zip(*solved, strict=True)
        largest = [torch.linalg.eigvalsh(self._hessian(t.detach())).max() for t in self.thetas]
        self.lr = 1 / float(1.1 * max(*largest, self.largest))
        root = math.sqrt(1 / (self.lr * self.smallest))
        self.momentum = (root - 1) / (root + 1)

    def loss(self, phi: Tensor) -> Tensor:
        """The inner loss, without the proximal term."""
        return self._loss(Passes.apply(phi) if self.counting else phi)

    def objective(self, phi: Tensor, theta: Tensor) -> Tensor:
        """With it."""
        return self.loss(phi) + self.lam / 2 * (phi - theta).square().sum()

    def error(self, run: Run, warm: bool) -> float:
        """The relative error of the worse of the two hypergradients; if warm, after two of each."""
        for point in (0, 1, 0, 1) if warm else ():
            run(point)
        found = [run(0), run(1)]
        pairs = zip(found, self.exact, strict=True)
        return max(float((g - e).norm() / e.norm()) for g, e in pairs)

    def _hessian(self, phi: Tensor) -> Tensor:
        curved = torch.func.jacrev(torch.func.grad(self._loss))(phi)
        return curved + self.lam * torch.eye(len(phi))

    def _solve(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        fit = ig.solvers.NewtonCG(maxiter=200, cg=200, tol=1e-12)
        phi = fit.minimize(lambda phi: self.objective(phi, theta), theta)
        hessian = self._hessian(phi)
        curvatures = torch.linalg.eigvalsh(hessian)
        self.smallest, self.largest = float(curvatures.min()), float(curvatures.max())
        assert self.smallest > 0, "not a minimum: λ is too small"
        return phi, self.lam * torch.linalg.solve(hessian, torch.func.grad(self.outer)(phi))


def digits(images: int = 400) -> tuple[Tensor, Tensor]:
    """Images of digits (scikit-learn's, which come with it) and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target))[:images]
    return torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]


def classification(network: Callable[[Tensor, Tensor], Tensor], size: int, lam: float) -> Problem:
    """Half of the digits for the inner loss, half for the outer one."""
    X, y = digits()
    half = len(y) // 2

    def loss(part: slice, phi: Tensor) -> Tensor:
        return cross_entropy(network(X[part], phi), y[part])

    inner, outer = (functools.partial(loss, p) for p in (slice(half), slice(half, None)))
    return Problem(inner, outer, lam, 0.3 * torch.randn(size))


def softmax_regression() -> Problem:
    """Convex, 640 unknowns."""
    return classification(lambda X, phi: X @ phi.view(64, 10), 640, lam=1e-3)


def perceptron() -> Problem:
    """A network of 8 hidden units, 592 unknowns; λ makes it convex around the solution."""

    def network(X: Tensor, phi: Tensor) -> Tensor:
        hidden, head = phi.split([512, 80])
        return torch.tanh(X @ hidden.view(64, 8)) @ head.view(8, 10)

    return classification(network, 592, lam=0.1)


def ridge() -> Problem:
    """200 unknowns in scales from 1 to 1/30."""
    X = torch.randn(400, 200) * torch.logspace(0, -1.5, 200)
    y = X @ torch.randn(200) + 0.1 * torch.randn(400)
    half = len(y) // 2

    def loss(part: slice, phi: Tensor) -> Tensor:
        return (X[part] @ phi - y[part]).square().mean() / 2

    inner, outer = (functools.partial(loss, p) for p in (slice(half), slice(half, None)))
    return Problem(inner, outer, 1e-3, torch.randn(200))


PROBLEMS = {
    "softmax regression": softmax_regression,
    "network": perceptron,
    "ridge": ridge,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to a hypergradient; `make(problem, inner budget, linear budget)`."""

    name: str
    package: str
    make: Callable[[Problem, Any, Any], Run]
    inner: Sequence[float]
    linear: Sequence[float]

    @property
    def warm(self) -> bool:
        """Whether it starts from where the last hypergradient was taken."""
        return "warm" in self.name


def ours(
    minimiser: Callable[[Problem, Any], Any],
    linear: Callable[[Any], ig.CG] = lambda k: ig.CG(maxiter=k),
    warm: bool = False,
    **options: Any,
) -> Callable[[Problem, Any, Any], Run]:
    """`implicit` with a minimiser, if `warm` from the last φ, and a linear solver."""

    def make(problem: Problem, inner: Any, budget: Any) -> Run:
        last = [problem.solutions[1]]
        wrapped = ig.implicit(
            minimiser(problem, inner),
            ig.proximal(problem.loss, problem.lam),
            linear_solver=linear(budget),
            init=(lambda theta: last[0]) if warm else None,
            on_failure="ignore",
            **options,
        )

        def run(point: int) -> Tensor:
            theta = problem.thetas[point]
            phi = wrapped(theta)
            last[0] = phi.detach()
            return grad(problem.outer(phi), theta)[0]

        return run

    return make


def polished(linear: Callable[[Any], ig.CG]) -> Callable[[Problem, Any, Any], Run]:
    """No minimiser: the last φ, polished."""

    def make(problem: Problem, polish: Any, budget: Any) -> Run:
        return ours(_stay, linear, warm=True, polish=polish)(problem, 0, budget)

    return make


def _stay(problem: Problem, steps: int) -> Any:
    return ig.solvers.GradientDescent(lr=problem.lr, steps=steps)


def kept(preconditioner: Any) -> Callable[[Any], ig.CG]:
    """CG with a preconditioner that serves as many hypergradients as `KEPT` says."""
    solves = 2 * KEPT  # one to polish, one for the adjoint
    return lambda k: ig.CG(maxiter=k, preconditioner=ig.Reuse(preconditioner, solves=solves))


def adaptive(problem: Problem, rtol: Any, _: Any) -> Run:
    """`rtol_gradient` decides how long the minimiser and CG run."""
    solver = ours(
        lambda problem, rtol: ig.solvers.NewtonCG(maxiter=100, cg=20),
        lambda _: ig.CG(),
        rtol_gradient=rtol,
    )
    return solver(problem, rtol, None)


def gradient_descent(problem: Problem, steps: int) -> Any:
    """With the best fixed step length."""
    return ig.solvers.GradientDescent(lr=problem.lr, steps=steps)


def nesterov(problem: Problem, steps: int) -> Any:
    """With the best momentum too."""
    return ig.solvers.Nesterov(lr=problem.lr, momentum=problem.momentum, steps=steps)


def newton(problem: Problem, steps: int) -> Any:
    """Hessian-free."""
    return ig.solvers.NewtonCG(maxiter=steps, cg=20)


def lbfgs(problem: Problem, steps: int) -> Any:
    """SciPy's, until its steps are used up."""
    return ig.solvers.SciPyMinimize(
        method="L-BFGS-B", options={"maxiter": steps, "gtol": 0.0, "ftol": 0.0}
    )


def descend(problem: Problem, start: Tensor, theta: Tensor, steps: int, kind: str) -> Tensor:
    """The peers' inner loop, which they leave to the user: no slower than need be."""
    phi = start.detach().clone().requires_grad_()
    theta = theta.detach()
    if kind == "L-BFGS":
        optimizer = torch.optim.LBFGS([phi], max_iter=steps, tolerance_grad=0, tolerance_change=0)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = problem.objective(phi, theta)
            value.backward()
            return value

        optimizer.step(closure)
        return phi.detach()
    momentum, before = (problem.momentum if kind == "Nesterov" else 0.0), phi.detach().clone()
    for _ in range(steps):
        (slope,) = grad(problem.loss(phi), phi)
        with torch.no_grad():
            after = torch.lerp(phi, theta, problem.lr * problem.lam).sub_(slope, alpha=problem.lr)
            phi.copy_(after).add_(after - before, alpha=momentum)
            before = after
    return before


def torchopt(kind: str, linear: str, warm: bool = False) -> Callable[[Problem, Any, Any], Run]:
    """custom_root around the loop; CG, or CG on the normal equations (its default)."""

    def make(problem: Problem, steps: Any, budget: Any) -> Run:
        from torchopt import linear_solve
        from torchopt.diff.implicit import custom_root

        exact = {"rtol": 0.0, "atol": 0.0, "maxiter": budget}
        solvers = {
            "CG": lambda: linear_solve.solve_cg(**exact),
            "normal CG": lambda: linear_solve.solve_normal_cg(**exact),
        }
        last = [problem.solutions[1]]

        @custom_root(torch.func.grad(problem.objective), argnums=1, solve=solvers[linear]())
        def solve(start: Tensor, theta: Tensor) -> Tensor:
            with torch.enable_grad():
                return descend(problem, start, theta, steps, kind)

        def run(point: int) -> Tensor:
            theta = problem.thetas[point]
            phi = solve(last[0] if warm else theta, theta)
            last[0] = phi.detach()
            return grad(problem.outer(phi), theta)[0]

        return run

    return make


def unrolled(problem: Problem, steps: Any, _: Any) -> Run:
    """Nesterov's method differentiated step by step, as higher and learn2learn do."""

    def run(point: int) -> Tensor:
        theta = problem.thetas[point]
        phi = before = theta
        for _ in range(steps):
            (slope,) = grad(problem.objective(phi, theta), phi, create_graph=True)
            after = phi - problem.lr * slope
            phi, before = after + problem.momentum * (after - before), after
        return grad(problem.outer(before), theta)[0]

    return run


METHODS = (
    Method("Nesterov + CG", "ours", ours(nesterov), STEPS, COUNTS),
    Method("SciPy L-BFGS + CG", "ours", ours(lbfgs), COUNTS, COUNTS),
    Method("NewtonCG + CG", "ours", ours(newton), COUNTS[:6], COUNTS),
    Method("Nesterov, polish + CG", "ours", ours(nesterov, polish=1), STEPS, COUNTS),
    Method("L-BFGS, polish + CG", "ours", ours(lbfgs, polish=1), COUNTS, COUNTS),
    Method("NewtonCG + CG, rtol_gradient", "ours", adaptive, ACCURACIES, (0,)),
    Method("Nesterov + CG, warm", "ours", ours(nesterov, warm=True), STEPS, COUNTS),
    Method(
        "Nesterov + CG, warm, Cholesky kept",
        "ours",
        ours(nesterov, kept(ig.Cholesky()), warm=True),
        STEPS,
        COUNTS,
    ),
    Method("polish + CG, warm", "ours", polished(lambda k: ig.CG(maxiter=k)), POLISHES, COUNTS),
    Method(
        "polish + CG, warm, Nyström kept",
        "ours",
        polished(kept(ig.Nystrom(rank=50))),
        POLISHES,
        COUNTS,
    ),
    Method(
        "polish + CG, warm, Cholesky kept",
        "ours",
        polished(kept(ig.Cholesky())),
        POLISHES,
        COUNTS,
    ),
    Method("gradient descent + CG", "torchopt", torchopt("SGD", "CG"), STEPS, COUNTS),
    Method("Nesterov + CG", "torchopt", torchopt("Nesterov", "CG"), STEPS, COUNTS),
    Method("Nesterov + normal CG", "torchopt", torchopt("Nesterov", "normal CG"), STEPS, COUNTS),
    Method("torch L-BFGS + CG", "torchopt", torchopt("L-BFGS", "CG"), COUNTS, COUNTS),
    Method("Nesterov + CG, warm", "torchopt", torchopt("Nesterov", "CG", True), STEPS, COUNTS),
    Method("torch L-BFGS + CG, warm", "torchopt", torchopt("L-BFGS", "CG", True), COUNTS, COUNTS),
    Method("Nesterov, unrolled", "torch", unrolled, STEPS, (0,)),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cheapest budgets of a method that reach a tolerance."""

    seconds: float
    budgets: tuple[Any, Any]
    error: float


def search(problem: Problem, method: Method) -> dict[float, Choice]:
    """The choice for each tolerance that can be reached; more of a budget never costs less."""
    found: dict[float, Choice] = {}
    tightest = min(TOLERANCES)
    for inner in method.inner:
        last, least = math.inf, math.inf
        for linear in method.linear:
            run = method.make(problem, inner, linear)
            error = problem.error(run, method.warm)
            seconds = cpu_seconds(lambda run=run: run(0))
            least = min(least, seconds)
            for tolerance in TOLERANCES:
                known = found.get(tolerance)
                if error <= tolerance and (known is None or seconds < known.seconds):
                    found[tolerance] = Choice(seconds, (inner, linear), error)
            # what is left is the inner error; near 1, CG may just not have got going
            settled = 0.98 * last < error < 1.02 * last < 0.9
            limit = found[tightest].seconds if tightest in found else LONGEST
            if error <= tightest or settled or seconds > limit or not math.isfinite(error):
                break
            last = error
        if least > (found[tightest].seconds if tightest in found else LONGEST):
            break
    return found


def passes(problem: Problem, run: Run) -> int:
    """Backward passes through the loss in one meta-gradient."""
    run(1)  # where warm methods start from
    problem.counting, Passes.count = True, 0
    run(0)
    problem.counting = False
    return Passes.count


def share_of_setup(run: Run, method: Method) -> float:
    """Seconds of a hypergradient's share in what is built in the first call and kept."""
    if "kept" not in method.name:
        return 0.0
    first, *others = (cpu_seconds(functools.partial(run, point)) for point in (0, 1, 0, 1, 0))
    return max(0.0, first - statistics.median(others)) / KEPT


def alternating(run: Run, points: Iterator[int]) -> Tensor:
    """The hypergradient at the other θ than the last time."""
    return run(next(points))


def measure(name: str, problem: Problem, methods: Sequence[Method], seconds: float) -> list[Row]:
    """A row for each tolerance and method that reaches it."""
    choices: dict[tuple[str, float], tuple[Method, Choice]] = {}
    for method in track(methods, f"{name}: budgets"):
        for tolerance, choice in search(problem, method).items():
            choices[f"{method.package}, {method.name}", tolerance] = method, choice
    runs = {key: m.make(problem, *c.budgets) for key, (m, c) in choices.items()}
    shares = {key: share_of_setup(run, choices[key][0]) for key, run in runs.items()}
    calls = {
        str(key): functools.partial(alternating, run, cycle((0, 1))) for key, run in runs.items()
    }
    times = interleaved(calls, seconds, f"{name}: time")
    rows: list[Row] = []
    for tolerance in TOLERANCES:
        for key, (method, choice) in choices.items():
            if key[1] != tolerance:
                continue
            low, middle, high = statistics.quantiles(times[str(key)], n=4)
            rows.append(
                {
                    "problem": name,
                    "tolerance": tolerance,
                    "package": method.package,
                    "method": method.name,
                    "ms": 1e3 * (middle + shares[key]),
                    "its_share_of_setup": 1e3 * shares[key],
                    "quartiles": f"{1e3 * low:.3g} {1e3 * high:.3g}",
                    "passes": passes(problem, runs[key]),
                    "inner": choice.budgets[0],
                    "linear": choice.budgets[1],
                    "error": choice.error,
                }
            )
    return rows


def best(rows: list[Row]) -> list[Row]:
    """For each problem and tolerance, the fastest of ours and of the peers."""
    summary: list[Row] = []
    for key in dict.fromkeys((row["problem"], row["tolerance"]) for row in rows):
        here = [row for row in rows if (row["problem"], row["tolerance"]) == key]
        fastest: Callable[[Any], Any] = lambda chosen: min(chosen, key=lambda r: r["ms"])  # noqa: E731
        mine = [row for row in here if row["package"] == "ours"]
        theirs = [row for row in here if row["package"] != "ours"]
        if not mine or not theirs:
            continue
        us, them = fastest(mine), fastest(theirs)
        summary.append(
            {
                "problem": key[0],
                "tolerance": key[1],
                "ours": us["method"],
                "ms": us["ms"],
                "passes": us["passes"],
                "peer": f"{them['package']}, {them['method']}",
                "peer_ms": them["ms"],
                "peer_passes": them["passes"],
                "times_faster": them["ms"] / us["ms"],
            }
        )
    return summary


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds against the tolerance: each method a line, ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems = list(dict.fromkeys(row["problem"] for row in rows))
    methods = list(dict.fromkeys((str(row["package"]), str(row["method"])) for row in rows))
    methods.sort(key=lambda method: method[0] != "ours")  # ours first, in colours of their own
    own = sum(package == "ours" for package, _ in methods)
    colours = plt.get_cmap("turbo")
    figure, all_axes = plt.subplots(
        1, len(problems), figsize=(4 * len(problems) + 2, 4), layout="constrained", squeeze=False
    )
    for axes, problem in zip(all_axes[0], problems, strict=True):
        for i, (package, name) in enumerate(methods):
            points = [
                (row["tolerance"], row["ms"])
                for row in rows
                if (row["problem"], row["package"], row["method"]) == (problem, package, name)
            ]
            style: dict[str, Any] = {"color": "grey", "ls": "--"}
            if package == "ours":
                style = {"color": colours(i / own)}
            marker = "o" if package == "ours" else "x+*^vsDP"[i % 8]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker=marker, label=f"{package}: {name}", **style
                )
        axes.set(xscale="log", yscale="log", title=problem, xlabel="relative error of dθ")
        axes.invert_xaxis()
    all_axes[0][0].set_ylabel("time of one hypergradient (ms)")
    handles = {
        label: handle
        for axes in all_axes[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="x-small")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then two tables and files, and one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument(
        "--seconds", type=float, default=20, help="time to measure each problem for"
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="*", help="only those with these names; default: all")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)  # torchopt's
    warnings.filterwarnings("ignore", category=ig.ImplicitGradWarning)  # budgets are to run out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    wanted = [m for m in METHODS if options.methods is None or m.name in options.methods]
    methods = [m for m in wanted if m.package == "ours" or find_spec(m.package)]
    rows: list[Row] = []
    for name in options.problems:
        rows += measure(name, PROBLEMS[name](), methods, options.seconds)
    console = Console(width=140)
    for package in {m.package for m in wanted} - {m.package for m in methods}:
        console.print(f"{package}: not installed")
    write(rows, options.out / "time_to_accuracy.csv", console)
    write(best(rows), options.out / "time_to_accuracy_best.csv", console)
    draw(rows, options.out / "time_to_accuracy.png")


if __name__ == "__main__":
    main()
