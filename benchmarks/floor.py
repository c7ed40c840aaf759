"""How near is a meta-gradient to the time of the operations that it cannot do without?

    python benchmarks/floor.py --out benchmarks/results

The floor is the sum of the raw operations, each timed by itself: 16 gradients of the inner loss,
the outer gradient, one gradient with its graph, and 5 Hessian-vector products with that graph kept.
Everything else (inner updates, CG's vectors, checks, Python) counts as overhead. All are timed in
turn within one process on one thread, as CPU time: medians and quartiles of the ratios in a round.

Where tensors are tiny, Python is all there is: for a logistic regression of 10 unknowns, the time
of one more CG iteration less that of a raw product, next to torchopt's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import learn2learn as l2l
import torch
from rich.console import Console
from tables import Row, write
from timing import Times, interleaved, ratios, sums
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import implicit_grad as ig

RAW = ("gradients", "outer gradient", "graph", "products")
Tensors = tuple[Tensor, ...]
Method = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Job:
    """One task of few-shot learning: steps of gradient descent, then CG on what they end at."""

    net: nn.Module
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    lr: float = 0.01
    lam: float = 5.0  # enough for a definite Hessian, so that all take 5 iterations
    steps: int = 16
    iterations: int = 5

    @property
    def theta(self) -> Tensors:
        """The meta-parameters."""
        return tuple(self.net.parameters())

    def loss(self, phi: Sequence[Tensor]) -> Tensor:
        """The inner loss, without the proximal term."""
        return self._loss(phi, *self.support)

    def outer(self, phi: Sequence[Tensor]) -> Tensor:
        """The outer loss."""
        return self._loss(phi, *self.query)

    def descend(self, theta: Sequence[Tensor]) -> Tensors:
        """Proximal gradient steps on loss + lam/2 ‖phi − theta‖², as anybody would write them."""
        phi = [t.detach().clone().requires_grad_() for t in theta]
        share = self.lr * self.lam / (1 + self.lr * self.lam)
        for _ in range(self.steps):
            slope = grad(self.loss(phi), phi)
            with torch.no_grad():
                for p, t, g in zip(phi, theta, slope, strict=True):
                    p.sub_(g, alpha=self.lr).lerp_(t, share)
        return tuple(p.detach() for p in phi)

    def _loss(self, phi: Sequence[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        names = (name for name, _ in self.net.named_parameters())
        weights = dict(zip(names, phi, strict=True))
        return cross_entropy(functional_call(self.net, weights, (inputs,)), labels)


def conv_net(ways: int) -> nn.Module:
    """MAML's network for Omniglot: 4 strided convolutions of 64 filters."""
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(channels, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, ways))


def few_shot(ways: int, shots: int) -> Job:
    """Random images of Omniglot's size."""
    labels = torch.arange(ways).repeat(shots)
    support, query = torch.rand(2, len(labels), 1, 28, 28)
    return Job(conv_net(ways), (support, labels), (query, labels))


def perceptron(width: int = 680) -> Job:
    """A network of 1,000,000 weights on 256 images."""
    layers = [nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    labels = torch.arange(256) % 10
    support, query = torch.rand(2, 256, 784)
    return Job(nn.Sequential(*layers, nn.Linear(width, 10)), (support, labels), (query, labels))


JOBS: dict[str, Callable[[], Job]] = {
    "conv net, 5-way 1-shot": lambda: few_shot(5, 1),
    "conv net, 20-way 5-shot": lambda: few_shot(20, 5),
    "MLP, 1M weights": perceptron,
}


def raw_operations(job: Job) -> dict[str, Callable[[], object]]:
    """What no method can do without, a part of the floor each."""
    phi = [t.detach().clone().requires_grad_() for t in job.theta]
    slope = grad(job.loss(phi), phi, create_graph=True)
    v = grad(job.outer(phi), phi)
    parts: tuple[Callable[[], object], ...] = (
        lambda: [grad(job.loss(phi), phi) for _ in range(job.steps)],
        lambda: grad(job.outer(phi), phi),
        lambda: grad(job.loss(phi), phi, create_graph=True),
        lambda: [grad(slope, phi, v, retain_graph=True) for _ in range(job.iterations)],
    )
    return dict(zip(RAW, parts, strict=True))


def floor_of(times: Times) -> list[float]:
    """The floor in each round."""
    return sums(*(times[part] for part in RAW))


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """One vector, to compare gradients by."""
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def by_hand(job: Job) -> Method:
    """A careful user's own loop: conjugate gradients on flat vectors, no checks."""
    sizes = [t.numel() for t in job.theta]

    def meta_gradient() -> Tensor:
        phi = [p.requires_grad_() for p in job.descend(job.theta)]
        r = flat(grad(job.outer(phi), phi))
        slope = grad(job.loss(phi), phi, create_graph=True)
        u, p, rr = torch.zeros_like(r), r.clone(), r @ r
        for _ in range(job.iterations):
            parts = [x.view_as(t) for x, t in zip(p.split(sizes), phi, strict=True)]
            product = flat(grad(slope, phi, parts, retain_graph=True)).add_(p, alpha=job.lam)
            alpha = rr / (p @ product)
            u += alpha * p
            r -= alpha * product
            rr, before = r @ r, rr
            p = r + (rr / before) * p
        return job.lam * u

    return meta_gradient


def ours(job: Job) -> dict[str, Method]:
    """Both entry points, each in two ways."""
    cg, theta = ig.CG(maxiter=job.iterations), job.theta

    def through(solver: ig.solvers.GradientDescent | Callable[..., Tensors]) -> Method:
        condition = ig.proximal(lambda phi: job.loss(phi), job.lam)
        solve = ig.implicit(solver, condition, linear_solver=cg, on_failure="ignore")
        return lambda: flat(grad(job.outer(solve(theta)), theta))

    maml = ig.imaml(
        l2l.algorithms.MAML(job.net, lr=job.lr), job.lam, linear_solver=cg, on_failure="ignore"
    )

    def adapted(by_closure: bool) -> Tensor:
        (inputs, labels), learner = job.support, maml.clone()
        if by_closure:
            learner.adapt(lambda: cross_entropy(learner(inputs), labels), steps=job.steps)
        else:
            for _ in range(job.steps):
                learner.adapt(cross_entropy(learner(inputs), labels))
        return flat(grad(cross_entropy(learner(job.query[0]), job.query[1]), theta))

    return {
        "implicit, own loop": through(job.descend),
        "implicit, GradientDescent": through(
            ig.solvers.GradientDescent(lr=job.lr, steps=job.steps)
        ),
        "imaml, adapt(loss)": lambda: adapted(False),
        "imaml, adapt(closure)": lambda: adapted(True),
    }


def compare(job: Job, methods: dict[str, Method], seconds: float, label: str) -> list[Row]:
    """One row for each method: milliseconds, and how many times the floor that is."""
    times = interleaved({**raw_operations(job), **methods}, seconds, label)
    floor, exact = floor_of(times), by_hand(job)()
    rows: list[Row] = []
    for name, method in methods.items():
        middle, quartiles = ratios(times[name], floor)
        rows.append(
            {
                "method": name,
                "ms": 1e3 * statistics.median(times[name]),
                "over_floor": middle,
                "quartiles": quartiles,
                "difference": float((method() - exact).norm() / exact.norm()),
            }
        )
    return rows


def measure(seconds: float, names: Sequence[str]) -> list[Row]:
    """The rows of all jobs."""
    rows: list[Row] = []
    for name in names:
        job = JOBS[name]()
        methods = {"by hand": by_hand(job), **ours(job)}
        rows += [{"job": name, **row} for row in compare(job, methods, seconds, name)]
    return rows


class Logistic:
    """A logistic regression of 10 unknowns, solved beforehand: only backward is of interest."""

    few, many = 1, 9  # CG iterations, both short of convergence

    def __init__(self) -> None:
        X = torch.randn(50, 10) * torch.logspace(0, -1, 10)
        y = (torch.rand(50) < 0.5).float()
        self.loss: Callable[[Tensor], Tensor] = lambda w: binary_cross_entropy_with_logits(X @ w, y)
        self.lam, self.v = 0.01, torch.randn(10)
        self.phi = torch.zeros(10)
        self.theta = torch.zeros(10, requires_grad=True)

    def backward(self, phi: Tensor, times: int) -> None:
        """The hypergradient, several times over."""
        for _ in range(times):
            grad(phi, self.theta, self.v, retain_graph=True)

    def product(self) -> Callable[[], object]:
        """One raw product with the Hessian."""
        phi = self.phi.clone().requires_grad_()
        (slope,) = grad(self.loss(phi), phi, create_graph=True)
        return lambda: grad(slope, phi, self.v, retain_graph=True)

    def ours(self, iterations: int) -> Callable[[], Tensor]:
        """The solution, attached by implicit."""
        cg = ig.CG(maxiter=iterations)
        condition = ig.proximal(self.loss, self.lam)
        solve = ig.implicit(
            lambda theta: self.phi, condition, linear_solver=cg, on_failure="ignore"
        )
        return lambda: solve(self.theta)

    def torchopt(self, iterations: int) -> Callable[[], Tensor]:
        """The same by torchopt's custom_root."""
        from torchopt.diff.implicit import custom_root
        from torchopt.linear_solve import solve_cg

        def objective(phi: Tensor, theta: Tensor) -> Tensor:
            return self.loss(phi) + self.lam / 2 * (phi - theta).square().sum()

        linear_solver = solve_cg(maxiter=iterations, rtol=0.0, atol=0.0)
        attach = custom_root(torch.func.grad(objective), argnums=1, solve=linear_solver)
        solve = attach(lambda phi, theta: self.phi)
        return lambda: solve(self.phi, self.theta)


def measure_iteration(seconds: float) -> list[Row]:
    """Microseconds of one more CG iteration where tensors are tiny."""
    job, together = Logistic(), 20  # calls timed together, for the clock's sake
    makers: dict[str, Callable[[int], Callable[[], Tensor]]] = {"implicit": job.ours}
    if find_spec("torchopt"):
        makers["torchopt custom_root"] = job.torchopt
    product = job.product()
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: [product() for _ in range(together)]
    }
    for name, make in makers.items():
        for k in (job.few, job.many):
            phi = make(k)()
            calls[f"{name} {k}"] = functools.partial(job.backward, phi, together)
    times = interleaved(calls, seconds, "one CG iteration")
    rows: list[Row] = []
    for name in makers:
        few, many = (
            [1e6 * t / together for t in times[f"{name} {k}"]] for k in (job.few, job.many)
        )
        raw = [1e6 * t / together for t in times["product"]]
        iteration = [(m - f) / (job.many - job.few) for f, m in zip(few, many, strict=True)]
        overhead = [t - r for t, r in zip(iteration, raw, strict=True)]
        low, middle, high = statistics.quantiles(overhead, n=4)
        rows.append(
            {
                "method": name,
                "iteration_us": statistics.median(iteration),
                "product_us": statistics.median(raw),
                "overhead_us": middle,
                "quartiles": f"{low:.1f} {high:.1f}",
                "rest_of_backward_us": statistics.median(few)
                - job.few * statistics.median(iteration),
            }
        )
    if "torchopt custom_root" not in makers:
        rows.append({**dict.fromkeys(rows[0], ""), "method": "torchopt: not installed"})
    return rows


def draw(rows: list[Row], iteration: list[Row], path: Path) -> None:
    """Ratios to the floor, and the overhead of an iteration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = {"width_ratios": (3, 1)}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.6), layout="constrained", gridspec_kw=widths
    )
    jobs = list(dict.fromkeys(str(row["job"]) for row in rows))
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    for i, method in enumerate(methods):
        heights = [row["over_floor"] for row in rows if row["method"] == method]
        places = [j * (len(methods) + 1) + i for j in range(len(jobs))]
        left.bar(places, [float(h) - 1 for h in heights], 1, bottom=1, label=method, color=f"C{i}")
    left.axhline(1, color="black", linewidth=0.8)
    centres = [j * (len(methods) + 1) + (len(methods) - 1) / 2 for j in range(len(jobs))]
    left.set_xticks(centres, jobs)
    left.set(ylabel="time / floor")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper left", ncols=5, frameon=False
    )
    measured = [row for row in iteration if row["overhead_us"] != ""]
    names = [str(r["method"]).replace(" ", "\n") for r in measured]
    right.bar(names, [r["overhead_us"] for r in measured])
    right.set_ylabel("overhead of a CG iteration (µs)")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then two tables and files, and one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--seconds", type=float, default=60, help="time to measure each job for")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)  # torchopt's
    torch.set_num_threads(1)
    torch.manual_seed(1)  # with 0, rounding decides on which side of a ReLU kink a descent ends
    iteration = measure_iteration(options.seconds / 4)
    rows = measure(options.seconds, options.jobs)
    console = Console()
    write(rows, options.out / "floor.csv", console)
    write(iteration, options.out / "floor_iteration.csv", console)
    draw(rows, iteration, options.out / "floor.png")


if __name__ == "__main__":
    main()
