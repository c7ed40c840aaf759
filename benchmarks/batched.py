"""What does it gain to run the tasks of a meta-batch as one?

    python benchmarks/batched.py --out benchmarks/results
    python benchmarks/batched.py --device cuda --out out

The same iMAML meta-gradient of B tasks, 5-way 1-shot, five adaptation steps, by a loop over
`maml.clone()` and by one `maml.clone(tasks=B)`, whose weights are stacked; and of B small problems
by `implicit`, in a loop and under `torch.func.vmap`. Both forms are timed in turn; the gradients'
relative difference is told as well. On a GPU, seconds are those of the clock, with what was
launched waited for; second-order MAML in a loop is added there, and TF32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import learn2learn as l2l
import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from timing import seconds_of
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, softplus

import implicit_grad as ig

Method = Callable[[], tuple[Tensor, ...]]
STEPS, WAYS = 5, 5
NETWORKS = {
    "OmniglotCNN": lambda: l2l.vision.models.OmniglotCNN(WAYS),
    "OmniglotFC": lambda: l2l.vision.models.OmniglotFC(28 * 28, WAYS),
}


def networks(name: str, tasks: int, device: str) -> dict[str, Method]:
    """The methods for one of learn2learn's networks."""
    torch.manual_seed(0)
    net = NETWORKS[name]().to(device)
    support, query = torch.randn(2, tasks, WAYS, 1, 28, 28, device=device)
    labels = torch.arange(WAYS, device=device).expand(tasks, WAYS)
    maml = l2l.algorithms.MAML(net, lr=0.05)
    imaml = ig.imaml(maml, lam=2.0, on_failure="ignore")
    theta = list(imaml.parameters())

    def loop(meta: nn.Module) -> tuple[Tensor, ...]:
        sums = [torch.zeros_like(t) for t in theta]
        for images, queries, targets in zip(support, query, labels, strict=True):
            learner = meta.clone()
            for _ in range(STEPS):
                learner.adapt(cross_entropy(learner(images), targets))
            loss = cross_entropy(learner(queries), targets)
            for total, gradient in zip(sums, torch.autograd.grad(loss, theta), strict=True):
                total += gradient
        return tuple(sums)

    def batch() -> tuple[Tensor, ...]:
        learner = imaml.clone(tasks=tasks)
        for _ in range(STEPS):
            learner.adapt(vmap(cross_entropy)(learner(support), labels))
        return torch.autograd.grad(vmap(cross_entropy)(learner(query), labels).sum(), theta)

    methods: dict[str, Method] = {"loop": lambda: loop(imaml), "batch": batch}
    if device != "cpu":
        methods["MAML, second order"] = lambda: loop(maml)
        methods["batch, TF32"] = lambda: _with_tf32(batch)
    return methods


def regressions(tasks: int, device: str) -> dict[str, Method]:
    """The methods for logistic regressions with 10 unknowns."""
    torch.manual_seed(0)
    X, theta = torch.randn(tasks, 20, 10, device=device), torch.randn(10, device=device)
    theta.requires_grad_()
    solve = ig.implicit(
        ig.solvers.GradientDescent(lr=0.1, steps=16),
        ig.proximal(lambda phi, X: softplus(X @ phi).mean(), lam=1.0),
        linear_solver=ig.CG(maxiter=5),
        on_failure="ignore",
    )

    def outer(phi: Tensor) -> Tensor:
        return phi.sin().sum()

    def loop() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(outer(solve(theta, x)) for x in X), theta)

    def batch() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outer(vmap(solve, in_dims=(None, 0))(theta, X)), theta)

    return {"loop": loop, "batch": batch}


def _with_tf32(method: Method) -> tuple[Tensor, ...]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return method()
    finally:
        torch.set_float32_matmul_precision(before)


def measured(job: str, tasks: int, methods: dict[str, Method], rounds: int, device: str) -> Row:
    """Milliseconds of each method, the gain within a round, and how far the gradients differ."""
    gradients = {name: method() for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            times[name].append(seconds_of(method, device))
    gains = [a / b for a, b in zip(times["loop"], times["batch"], strict=True)]
    row: Row = {"job": job, "tasks": tasks}
    for name, values in times.items():
        row[f"{name}, ms"] = 1e3 * statistics.median(values)
    row["times faster"], row["least"], row["most"] = (
        statistics.median(gains),
        min(gains),
        max(gains),
    )
    row["difference"] = _distance(gradients["batch"], gradients["loop"])
    if "batch, TF32" in gradients:
        row["difference, TF32"] = _distance(gradients["batch, TF32"], gradients["loop"])
    return row


def _distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    found_flat, expected_flat = (torch.cat([t.flatten() for t in ts]) for ts in (found, expected))
    return float((found_flat - expected_flat).norm() / expected_flat.norm())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--jobs", nargs="+", default=[*NETWORKS, "regressions"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        torch.set_num_threads(1)
    cases = [(job, tasks) for job in args.jobs for tasks in args.tasks]
    rows = []
    for job, tasks in track(cases, "tasks at once"):
        if job == "regressions":
            methods = regressions(tasks, args.device)
        else:
            methods = networks(job, tasks, args.device)
        rows.append(measured(job, tasks, methods, args.rounds, args.device))
    for job in args.jobs:  # the columns differ
        own = [row for row in rows if row["job"] == job]
        write(own, args.out / f"batched_{job}_{args.device}.csv", Console())
    _draw(rows, args.out / f"batched_{args.device}.png")


def _draw(rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
    for job in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == job]
        axis.plot([r["tasks"] for r in own], [r["times faster"] for r in own], "o-", label=job)
    axis.axhline(1.0, color="0.6", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="tasks", ylabel="times faster than the loop")
    counts = sorted({int(str(row["tasks"])) for row in rows})
    axis.set_xticks(counts, labels=[str(count) for count in counts])
    axis.set_yticks([0.5, 1, 2, 4, 8], labels=["½", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
