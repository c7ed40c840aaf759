"""How do the time and the memory of one meta-gradient grow, with whatever may grow?

    python benchmarks/scaling.py --out benchmarks/results

One factor at a time: the parameters of a network, the iterations of CG, the tasks of a batch, the
images of a task (ways × shots). Each is one `ig.imaml` task or batch: four adaptation steps, CG
with five iterations unless they are the factor, and the meta-gradient, on one thread. Times are
medians of CPU time over repeats taken in turn, with the least and the greatest. The exponent of a
factor is the slope of log cost over log factor, fitted to the upper half of the factor's values,
where fixed costs count least.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import learn2learn as l2l
import torch
from adaptation import task
from rich.console import Console
from rich.progress import track
from tables import Row, write
from timing import interleaved
from torch import Tensor, nn

import implicit_grad as ig
from implicit_grad.testing import peak_memory

STEPS = 4
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)  # about as many parameters
ITERATIONS = (1, 2, 8, 32, 128)
TASKS = (1, 2, 4, 8, 16)
WAYS_SHOTS = ((5, 1), (20, 1), (5, 5), (20, 5))


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch of tasks, and what the factor under study is there."""

    factor: str
    value: int
    net: nn.Module
    images: Tensor
    labels: Tensor
    iterations: int = 5
    tasks: int = 1

    def learner(self, monitor: ig.Monitor | None = None) -> nn.Module:
        """The meta-learner; Gauss-Newton, so that CG takes all its iterations."""
        return ig.imaml(
            l2l.algorithms.MAML(self.net, lr=0.01),
            lam=1e-4,  # so ill-conditioned that CG has something to do to the end
            linear_solver=ig.CG(maxiter=self.iterations),
            curvature="gauss_newton",
            monitor=monitor,
            on_failure="ignore",
        )

    def run(self, learner: nn.Module) -> None:
        """The batch, whose meta-gradients add up in .grad."""
        for _ in range(self.tasks):
            task(learner, self.images, self.labels, STEPS)


def perceptron(size: int) -> nn.Module:
    """Two hidden layers of equal width, about `size` parameters in all."""
    width = round(math.sqrt(size + 19**2) - 19)  # width² + 38 width: 32 inputs, 5 classes, biases
    return nn.Sequential(
        nn.Linear(32, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)
    )


def cases(largest: int, most_shots: int) -> list[Case]:
    """All factors, each over its values."""
    vectors, classes = torch.randn(200, 32), torch.arange(5).repeat(40)
    few = vectors[:20], classes[:20]
    middle = perceptron(min(100_000, largest))
    nets = [perceptron(size) for size in SIZES if size <= largest]
    found = [
        *(Case("parameters", sum(p.numel() for p in net.parameters()), net, *few) for net in nets),
        *(Case("CG iterations", k, middle, vectors, classes, iterations=k) for k in ITERATIONS),
        *(Case("tasks", k, middle, *few, tasks=k) for k in TASKS),
    ]
    for ways, shots in [(ways, shots) for ways, shots in WAYS_SHOTS if shots <= most_shots]:
        net = l2l.vision.models.OmniglotCNN(ways)
        images, labels = torch.rand(ways * shots, 1, 28, 28), torch.arange(ways).repeat(shots)
        found.append(Case("ways × shots", ways * shots, net, images, labels))
    return found


def measure(found: Sequence[Case], repeats: int) -> list[Row]:
    """One row for each case; the cases take turns."""
    calls = {f"{c.factor} {c.value}": functools.partial(c.run, c.learner()) for c in found}
    times = interleaved(calls, repeats, "time")
    rows: list[Row] = []
    for case, (name, call) in zip(track(found, "memory"), calls.items(), strict=True):
        case.run(case.learner(monitor := ig.Monitor()))
        assert monitor.last is not None
        rows.append(
            {
                "factor": case.factor,
                "value": case.value,
                "iterations": monitor.last.iterations,
                "ms": 1e3 * statistics.median(times[name]),
                "least_ms": 1e3 * min(times[name]),
                "greatest_ms": 1e3 * max(times[name]),
                "MiB": peak_memory(call) / 2**20,
            }
        )
    return rows


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """k in y ~ xᵏ, by least squares over the upper half of the xs."""
    upper = sorted(zip(xs, ys, strict=True))[(len(xs) - 1) // 2 :]
    x, y = torch.tensor(upper, dtype=torch.float64).log().T
    away = x - x.mean()
    return round(float((away * y).sum() / (away * away).sum()), 3) + 0.0  # not −0


def exponents(rows: Sequence[Row]) -> list[Row]:
    """One row for each factor."""
    found: list[Row] = []
    for factor in dict.fromkeys(row["factor"] for row in rows):
        own = [row for row in rows if row["factor"] == factor]
        xs = [float(row["value"]) for row in own]
        found.append(
            {
                "factor": factor,
                "from": min(xs),
                "to": max(xs),
                "time": exponent(xs, [row["ms"] for row in own]),
                "memory": exponent(xs, [row["MiB"] for row in own]),
            }
        )
    return found


def draw(rows: Sequence[Row], found: Sequence[Row], path: Path) -> None:
    """Time above, memory below, one column for each factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(found), figsize=(13, 5.4), layout="constrained")
    for column, total in zip(panels.T, found, strict=True):
        own = [row for row in rows if row["factor"] == total["factor"]]
        for panel, quantity, cost in zip(column, ("ms", "MiB"), ("time", "memory"), strict=True):
            xs, ys = [row["value"] for row in own], [row[quantity] for row in own]
            panel.plot(xs, ys, "o-", color="C0" if cost == "time" else "C1")
            panel.set(xscale="log", yscale="log", ylim=(min(ys) / 3, max(ys) * 3))
            panel.set_title(f"{cost} ~ {total['factor']}^{total[cost]:.2f}", fontsize=10)
        column[0].fill_between(
            xs, [row["least_ms"] for row in own], [row["greatest_ms"] for row in own], alpha=0.2
        )
        column[1].set_xlabel(str(total["factor"]))
    panels[0, 0].set_ylabel("milliseconds")
    panels[1, 0].set_ylabel("peak memory (MiB)")
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then a table for the cases, one for the exponents, and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="most parameters, about")
    parser.add_argument("--shots", type=int, default=5, help="most images of a class")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(cases(options.largest, options.shots), options.repeats)
    found, console = exponents(rows), Console(width=120)
    write(rows, options.out / "scaling.csv", console)
    write(found, options.out / "scaling_exponents.csv", console)
    draw(rows, found, options.out / "scaling.png")


if __name__ == "__main__":
    main()
