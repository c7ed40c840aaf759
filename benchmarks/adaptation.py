"""What does an adaptation step cost, in time and memory, next to learn2learn's own MAML?

    python benchmarks/adaptation.py --out benchmarks/results

Times are ratios to learn2learn's first-order MAML, of a step and of a whole task (adaptation and
meta-gradient), measured in turn within one process on one thread: medians over all repeats, and the
quartiles of a step's. Memory is the most bytes of
tensors alive at once in one task (adaptation and meta-gradient), as torch's allocator counts them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import learn2learn as l2l
import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor, nn

import implicit_grad as ig
from implicit_grad.testing import peak_memory

NETS: dict[str, Callable[[], nn.Module]] = {
    "OmniglotCNN": lambda: l2l.vision.models.OmniglotCNN(5),
    "OmniglotFC": lambda: l2l.vision.models.OmniglotFC(28 * 28, 5),
}
STEPS = (1, 4, 16, 64, 256)
UNROLLED_STEPS = (1, 4, 16)  # the unrolled graph of more would only make the same point


def learners(net: nn.Module) -> dict[str, nn.Module]:
    """The methods compared, each with the same network and step length."""

    def maml(first_order: bool = False) -> nn.Module:
        return l2l.algorithms.MAML(net, lr=0.01, first_order=first_order)

    return {
        "FOMAML": maml(first_order=True),
        "MAML": maml(),
        "iMAML": ig.imaml(maml(), lam=2.0, on_failure="ignore"),
        "iMAML, Gauss-Newton": ig.imaml(
            maml(), lam=2.0, curvature="gauss_newton", on_failure="ignore"
        ),
        "iMAML, no lam": ig.imaml(maml()),
    }


def task(learner: nn.Module, images: Tensor, labels: Tensor, steps: int) -> tuple[float, float]:
    """Adapt and take the meta-gradient; seconds for one step and for the meta-gradient."""
    adapted = learner.clone()
    start = time.perf_counter()
    for _ in range(steps):
        adapted.adapt(nn.functional.cross_entropy(adapted(images), labels))
    middle = time.perf_counter()
    nn.functional.cross_entropy(adapted(images), labels).backward()
    return (middle - start) / steps, time.perf_counter() - middle


def measure_time(repeats: int, steps: int) -> list[Row]:
    """One row for each network and method."""
    rows: list[Row] = []
    images, labels = torch.rand(5, 1, 28, 28), torch.arange(5)
    for name, make in NETS.items():
        methods = learners(make())
        for method in methods.values():
            task(method, images, labels, steps)  # warm up
        runs = [
            {m: task(learner, images, labels, steps) for m, learner in methods.items()}
            for _ in track(range(repeats), f"time, {name}")
        ]
        for method in methods:
            ratios = [run[method][0] / run["FOMAML"][0] for run in runs]
            whole = [_whole(run[method], steps) / _whole(run["FOMAML"], steps) for run in runs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "network": name,
                    "steps": steps,
                    "method": method,
                    "step_ms": 1e3 * statistics.median(run[method][0] for run in runs),
                    "step_over_fomaml": middle,
                    "quartiles": f"{low:.3f} {high:.3f}",
                    "meta_gradient_ms": 1e3 * statistics.median(run[method][1] for run in runs),
                    "task_over_fomaml": statistics.median(whole),
                }
            )
    return rows


def _whole(times: tuple[float, float], steps: int) -> float:
    return steps * times[0] + times[1]


def measure_memory() -> list[Row]:
    """One row for each method and number of steps, on the convolutional network."""
    images, labels = torch.rand(5, 1, 28, 28), torch.arange(5)
    net = NETS["OmniglotCNN"]()
    rows: list[Row] = []
    for method, learner in learners(net).items():
        task(learner, images, labels, 1)  # so that .grad is there before
        for steps in track(UNROLLED_STEPS if method == "MAML" else STEPS, f"memory, {method}"):

            def call(learner: nn.Module = learner, steps: int = steps) -> object:
                return task(learner, images, labels, steps)

            rows.append({"method": method, "steps": steps, "MiB": peak_memory(call) / 2**20})
    return rows


def draw(times: list[Row], memory: list[Row], path: Path) -> None:
    """Step time over first-order MAML's, and memory against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    methods = list(dict.fromkeys(str(row["method"]) for row in times))
    colours = {m: f"C{i}" for i, m in enumerate(methods)}
    for i, row in enumerate(times):
        position = i + i // len(methods)
        left.bar(position, row["step_over_fomaml"], color=colours[str(row["method"])])
    left.axhline(1, color="black", linewidth=0.8)
    centres = [(len(methods) + 1) * i + (len(methods) - 1) / 2 for i in range(len(NETS))]
    left.set_xticks(centres, list(NETS))
    left.set_ylabel("time of one step / first-order MAML's")
    for method in methods:
        points = [(row["steps"], row["MiB"]) for row in memory if row["method"] == method]
        right.plot(*zip(*points, strict=True), "o-", color=colours[method], label=method)
    right.set(xscale="log", yscale="log", xlabel="adaptation steps", ylabel="peak memory (MiB)")
    right.set_xticks(STEPS, [str(s) for s in STEPS], minor=False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, then one table and one file for each question, and one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--repeats", type=int, default=40, help="interleaved repeats")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[5, 16], help="adaptation steps when timing"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times = [row for steps in options.steps for row in measure_time(options.repeats, steps)]
    memory = measure_memory()
    console = Console()
    write(times, options.out / "adaptation_time.csv", console)
    write(memory, options.out / "adaptation_memory.csv", console)
    longest = [row for row in times if row["steps"] == options.steps[-1]]
    draw(longest, memory, options.out / "adaptation.png")


if __name__ == "__main__":
    main()
