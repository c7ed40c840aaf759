"""What does the check of products cost, in a solver's first call and in later ones?

    python benchmarks/check_cost.py --out benchmarks/results

CPU ms of a call with its backward pass, for solvers that are made anew in each round, with
check="once" (the default), "never" and "always" in turn: medians over rounds. The conv net is
OmniglotCNN's size, 5-way 1-shot; the ridge problem has 10 unknowns, float64, and is also given
bounds, and as a root.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from timing import cpu_seconds
from torch import Tensor, nn

import implicit_grad as ig

CHECKS = ("once", "never", "always")
Call = Callable[[], object]
cross_entropy = nn.functional.cross_entropy


def ridge(check: Any, condition: Callable[..., ig.Condition]) -> Call:
    """A call of a solver whose solution is known in closed form."""
    X, y = torch.randn(50, 10, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def solver(lam: Tensor) -> Tensor:
        return torch.linalg.solve(X.T @ X + lam * torch.eye(10, dtype=X.dtype), X.T @ y)

    solve = ig.implicit(solver, condition(X, y), check=check)
    return lambda: solve(lam).sum().backward()


def minimum(X: Tensor, y: Tensor, **constraints: Any) -> ig.Condition:
    """That of the ridge problem."""
    return ig.argmin(
        lambda w, lam: (X @ w - y).square().sum() + lam * w.square().sum(), **constraints
    )


def zero(X: Tensor, y: Tensor) -> ig.Condition:
    """That of its gradient."""
    return ig.root(lambda w, lam: X.T @ (X @ w - y) + lam * w)


def conv_net(width: int) -> nn.Module:
    """Four blocks of convolution, batch norm, ReLU and pooling."""

    def block(channels: int) -> nn.Module:
        convolution = nn.Conv2d(channels, width, 3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))

    blocks = [block(channels) for channels in (1, width, width, width)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, 5))


def few_shot(check: Any, adapt: Callable[..., object], width: int = 64) -> Call:
    """A call that adapts the network to five drawings."""
    net, images, labels = conv_net(width), torch.randn(5, 1, 28, 28), torch.arange(5)
    query, learner = torch.randn(5, 1, 28, 28), ig.imaml(net, lr=0.1, check=check)

    def call() -> None:
        adapted = learner.clone()
        adapt(adapted, lambda: cross_entropy(adapted(images), labels))
        cross_entropy(adapted(query), labels).backward()

    return call


def by_tensors(adapted: Any, loss: Callable[[], Tensor]) -> None:
    """As learn2learn's pipelines adapt."""
    for _ in range(5):
        adapted.adapt(loss())


def by_function(adapted: Any, loss: Callable[[], Tensor]) -> None:
    """With the loss as a function."""
    adapted.adapt(loss, steps=5)


JOBS: dict[str, Callable[[str], Call]] = {
    "ridge": lambda check: ridge(check, minimum),
    "ridge, bounds": lambda check: ridge(check, lambda X, y: minimum(X, y, bounds=(-9.0, 9.0))),
    "ridge, root": lambda check: ridge(check, zero),
    "conv net, adapt(loss)": lambda check: few_shot(check, by_tensors),
    "conv net, adapt(function)": lambda check: few_shot(check, by_function),
}


def measured(name: str, rounds: int) -> list[Row]:
    """A row for each way to check."""
    times: dict[str, list[tuple[float, float]]] = {check: [] for check in CHECKS}
    JOBS[name]("never")()  # imports and allocates
    for i in track(range(rounds), name):
        for check in CHECKS[i % 3 :] + CHECKS[: i % 3]:
            call = JOBS[name](check)
            times[check].append((cpu_seconds(call), cpu_seconds(call)))
    return [
        {
            "job": name,
            "check": check,
            "first call, ms": 1e3 * statistics.median(first for first, _ in times[check]),
            "later call, ms": 1e3 * statistics.median(later for _, later in times[check]),
        }
        for check in CHECKS
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the table")
    parser.add_argument("--rounds", type=int, default=20, help="for each job")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for name in args.jobs for row in measured(name, args.rounds)]
    write(rows, args.out / "check_cost.csv", Console())


if __name__ == "__main__":
    main()
