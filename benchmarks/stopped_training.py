"""How right is the gradient of a training that was stopped, by every method?

    python benchmarks/stopped_training.py --out benchmarks/results

Eight small loops (`stopped_loops.py`), and the gradient of an outer loss by what they depend on.
The reference is exact: autograd through all steps. `error` is the distance relative to it, `length`
the ratio of the norms. `unsettled` tells how far a training is from its end: by how much the
reference changes where the loop goes on for twice as long. `ms` is the CPU time of a hypergradient:
of the backward pass alone, where the weights are there; of training and backward pass, unrolled.
Medians over seeds, and the worst.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from stopped_loops import ALL, LOOPS, Loop, Weights
from tables import Row, write
from timing import cpu_seconds
from torch import Tensor

import implicit_grad as ig

SETTLED = 0.05
LEAST_DRAWN = 0.01
Found = dict[str, Any]


def methods(loop: Loop) -> dict[str, dict[str, Any]]:
    """Those that fit this loop: steps are known where they are equal, and plain for Neumann."""
    sgd = loop.optimizer([torch.zeros(1)])
    time = ig.training_time(sgd, loop.schedule, steps=loop.steps, every=loop.every)
    solvers = {"EarlyStopped, time": ig.EarlyStopped(time=time), "CG 20": ig.CG(maxiter=20)}
    if not loop.cosine:
        steps = ig.EarlyStopped(steps=loop.steps, lr=loop.lr, momentum=loop.momentum)
        solvers["EarlyStopped, steps"] = steps
    if not loop.cosine and not loop.momentum:
        solvers["Neumann"] = ig.Neumann(terms=loop.steps, scale=loop.lr)
    return {"default": {}} | {name: {"linear_solver": solver} for name, solver in solvers.items()}


def implicit(loop: Loop, weights: Weights, **options: Any) -> Tensor:
    """The hypergradient by one method, where the loop has found these weights."""
    argument = loop.argument.clone().requires_grad_()
    if loop.lam:
        condition = ig.proximal(lambda phi: loop.objective(phi, loop.argument, ALL), loop.lam)
    else:
        condition = ig.argmin(lambda phi, a: loop.objective(phi, a, ALL))
    solve = ig.implicit(lambda _: weights, condition, on_failure="ignore", **options)
    phi = solve(loop.start(argument) if loop.lam else argument)
    return torch.autograd.grad(loop.outer(phi), argument)[0]


def unrolled(loop: Loop) -> Tensor:
    """The derivative of the whole loop."""
    argument = loop.argument.clone().requires_grad_()
    return torch.autograd.grad(loop.outer(loop.unrolled(argument)), argument)[0]


def timed(loop: Loop, weights: Weights, options: dict[str, Any]) -> tuple[Tensor, float, ig.Report]:
    """The gradient of one method, its time (the second call's), and its report."""
    monitor, gradients = ig.Monitor(), []

    def call() -> None:
        gradients.append(implicit(loop, weights, monitor=monitor, **options))

    call()
    seconds = cpu_seconds(call)
    assert monitor.last is not None
    return gradients[-1], seconds, monitor.last


def compare(loop: Loop) -> dict[str, Found]:
    """What each method finds and takes, on one seed."""
    weights, references = loop.train(), []
    seconds = cpu_seconds(lambda: references.append(unrolled(loop)))
    size = float(references[0].norm())

    def distance(gradient: Tensor) -> float:
        return float((gradient - references[0]).norm()) / size

    unsettled = distance(unrolled(loop.times(2)))
    exact = {"error": 0.0, "length": 1.0, "ms": 1e3 * seconds, "status": "", "products": 0}
    found: dict[str, Found] = {"unrolled": {"unsettled": unsettled, **exact}}
    for name, options in methods(loop).items():
        gradient, seconds, report = timed(loop, weights, options)
        found[name] = {
            "unsettled": unsettled,
            "error": distance(gradient),
            "length": float(gradient.norm()) / size,
            "ms": 1e3 * seconds,
            "status": report.status.name,
            "products": report.products,
        }
    return found


def summary(loop: str, length: int, method: str, runs: list[Found]) -> Row:
    """One row: medians over the seeds, and the worst."""
    lengths = [run["length"] for run in runs]
    return {
        "loop": loop,
        "length_of_training": length,
        "unsettled": statistics.median(run["unsettled"] for run in runs),
        "method": method,
        "error": statistics.median(run["error"] for run in runs),
        "worst_error": max(run["error"] for run in runs),
        "length": statistics.median(lengths),
        "least_length": min(lengths),
        "greatest_length": max(lengths),
        "ms": statistics.median(run["ms"] for run in runs),
        "products": statistics.median(run["products"] for run in runs),
        "status": " ".join(sorted({run["status"] for run in runs})),
    }


def measure(loops: Sequence[str], lengths: Sequence[int], seeds: int) -> list[Row]:
    """One row for each loop, length and method."""
    rows: list[Row] = []
    for name in loops:
        for length in lengths:
            label = f"{name}, {length} x its epochs"
            runs = [compare(LOOPS[name](seed).times(length)) for seed in track(range(seeds), label)]
            rows += [
                summary(name, length, method, [run[method] for run in runs]) for method in runs[0]
            ]
    return rows


def goals(rows: Sequence[Row]) -> list[Row]:
    """Over all loops, and over those that have nearly settled: each method's errors and lengths."""
    told: list[Row] = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]
        settled = [row["error"] for row in mine if row["unsettled"] <= SETTLED]
        told.append(
            {
                "method": method,
                "trainings": len(mine),
                "median_error": statistics.median(row["error"] for row in mine),
                "settled_trainings": len(settled),
                "settled_error": max(settled, default=float("nan")),
                "least_length": min(row["least_length"] for row in mine),
                "greatest_length": max(row["greatest_length"] for row in mine),
            }
        )
    return told


def draw(rows: Sequence[Row], path: Path) -> None:
    """Errors and lengths of each method, training by training, the most settled first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    order = sorted(rows, key=lambda row: row["unsettled"])
    places = list(dict.fromkeys(f"{row['loop']}, × {row['length_of_training']}" for row in order))
    names = [m for m in dict.fromkeys(str(row["method"]) for row in rows) if m != "unrolled"]
    for method, marker in zip(names, "oDs^v", strict=False):
        mine = [row for row in rows if row["method"] == method]
        at = [places.index(f"{row['loop']}, × {row['length_of_training']}") for row in mine]
        for panel, value in zip(panels, ("error", "length"), strict=True):
            panel.plot(
                [max(row[value], LEAST_DRAWN) for row in mine],
                at,
                marker,
                fillstyle="none",
                label=method,
            )
    for panel in panels:
        panel.axvline(1, color="black", linewidth=0.8)  # the error of no gradient at all
        panel.set_xscale("log")
        panel.grid(axis="y", linewidth=0.3)
    panels[0].set_xlabel("error against the unrolled gradient")
    panels[1].set_xlabel("length over that of the unrolled gradient")
    panels[0].set_yticks(range(len(places)), places, fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then two tables and files, and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS), metavar="LOOP")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 4], help="times the epochs")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console(width=160)
    rows = measure(options.loops, options.lengths, options.seeds)
    write(rows, options.out / "stopped_training.csv", console)
    write(goals(rows), options.out / "stopped_training_goals.csv", console)
    draw(rows, options.out / "stopped_training.png")


if __name__ == "__main__":
    main()
