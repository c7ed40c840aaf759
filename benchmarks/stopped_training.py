"""How right is the gradient of a training that was stopped, by every method?

    python benchmarks/stopped_training.py --out benchmarks/results

Sixteen small loops (`stopped_loops.py`), and the gradient of an outer loss by what they depend on.
The reference is exact: autograd through all steps. `error` is the distance relative to it, `length`
the ratio of the norms. `unsettled` tells how far a training is from its end: by how much the
reference changes where the loop goes on for twice as long. `ms` is the CPU time of a hypergradient:
of the backward pass alone, where the weights are there; of training and backward pass, unrolled.
`KiB` is the most memory alive at once in it, for some methods, the first seed and each loop's own
length. Medians over seeds, and the worst.

φ is a module, trained from the one that is handed in (with `lam`, a dict that is trained from θ).
"Pieces" are as many calls that make one training, each from the module that the last one returned.
"TorchOpt" is its `custom_root` with 20 iterations of CG, where it is installed and does not fail.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from stopped_loops import ALL, LOOPS, Loop, Weights
from tables import Row, write
from timing import cpu_seconds
from torch import Tensor, nn

import implicit_grad as ig
from implicit_grad.testing import peak_memory

DEFAULT = "default"
PIECES = 4, 16
WEIGHED = DEFAULT, "EarlyStopped, time", "EarlyStopped, 16 pieces", "TorchOpt"
SETTLED = 0.05
LEAST_DRAWN = 0.01
Found = dict[str, Any]


def filters(loop: Loop) -> dict[str, Any]:
    """The linear solvers that fit this loop: steps are known where equal, plain for Neumann."""
    sgd = loop.optimizer([torch.zeros(1)])
    time = ig.training_time(sgd, loop.schedule, steps=loop.steps, every=loop.every)
    solvers = {"EarlyStopped, time": ig.EarlyStopped(time=time), "CG 20": ig.CG(maxiter=20)}
    if not loop.cosine:
        steps = ig.EarlyStopped(steps=loop.steps, lr=loop.lr, momentum=loop.momentum)
        solvers["EarlyStopped, steps"] = steps
    if not loop.cosine and not loop.momentum:
        solvers["Neumann"] = ig.Neumann(terms=loop.steps, scale=loop.lr)
    return {DEFAULT: DEFAULT, **solvers}


class Held(nn.Module):
    """Weights as a module."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.names = list(weights)
        self.tensors = nn.ParameterList(p.detach().clone() for p in weights.values())

    def weights(self) -> Weights:
        """By their names."""
        return dict(zip(self.names, self.tensors, strict=True))


def from_module(
    loop: Loop, solver: Any, path: Sequence[tuple[Weights, float]], monitor: ig.Monitor
) -> Tensor:
    """The hypergradient of trainings in a row, each of the module that the last one returned."""
    argument = loop.argument.clone().requires_grad_()
    start = loop.start(argument)
    first = held = Held(start)
    condition = ig.argmin(lambda held, a: loop.whole(held.weights(), a, ALL))
    for weights, time in path:
        solve = ig.implicit(
            lambda *_, weights=weights: Held(weights),
            condition,
            on_failure="ignore",
            monitor=monitor,
            **options(solver or ig.EarlyStopped(time=time)),
        )
        held = solve(held, argument)
    outer = loop.outer(held.weights())
    gradient, *rest = torch.autograd.grad(outer, [argument, *first.parameters()], allow_unused=True)
    if rest[0] is None or not next(iter(start.values())).requires_grad:
        return gradient
    return gradient + torch.autograd.grad(list(start.values()), argument, rest)[0]


def from_dict(loop: Loop, solver: Any, weights: Weights, monitor: ig.Monitor) -> Tensor:
    """The same where nothing is known of the start; with `lam`, of a proximal minimum near θ."""
    argument = loop.argument.clone().requires_grad_()
    if loop.lam:
        condition = ig.proximal(lambda phi: loop.objective(phi, loop.argument, ALL), loop.lam)
    else:
        condition = ig.argmin(lambda phi, a: loop.objective(phi, a, ALL))
    solve = ig.implicit(
        lambda _: weights, condition, on_failure="ignore", monitor=monitor, **options(solver)
    )
    phi = solve(loop.start(argument) if loop.lam else argument)
    return torch.autograd.grad(loop.outer(phi), argument)[0]


def options(solver: Any) -> dict[str, Any]:
    """Of `implicit`."""
    return {} if solver == DEFAULT else {"linear_solver": solver}


def by_torchopt(loop: Loop, weights: Weights) -> Tensor | None:
    """TorchOpt's implicit gradient, by 20 iterations of CG."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    names = list(weights)

    def value(phi: tuple[Tensor, ...], argument: Tensor) -> Tensor:
        return loop.whole(dict(zip(names, phi, strict=True)), argument, ALL)

    solver = solve_cg(maxiter=20, rtol=0.0, atol=0.0)

    @custom_root(torch.func.grad(value), argnums=1, solve=solver)
    def solve(start: tuple[Tensor, ...], argument: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.clone().requires_grad_() for p in weights.values())

    argument = loop.argument.clone().requires_grad_()
    phi = solve(tuple(weights.values()), argument)
    outer = loop.outer(dict(zip(names, phi, strict=True)))
    try:
        return torch.autograd.grad(outer, argument)[0]
    except ZeroDivisionError:  # its CG where the curvature along a direction is 0
        return None


def unrolled(loop: Loop) -> Tensor:
    """The derivative of the whole loop."""
    argument = loop.argument.clone().requires_grad_()
    return torch.autograd.grad(loop.outer(loop.unrolled(argument)), argument)[0]


Method = Callable[[ig.Monitor], Tensor | None]


def methods(loop: Loop) -> dict[str, Method]:
    """All that fit, each a hypergradient at the weights that the loop leaves."""
    (whole,) = loop.path(1)
    found: dict[str, Method] = {}
    for name, solver in filters(loop).items():
        if loop.lam:
            found[name] = functools.partial(from_dict, loop, solver, whole[0])
        else:
            found[name] = functools.partial(from_module, loop, solver, [whole])
    if not loop.lam:
        found["default, of a dict"] = functools.partial(from_dict, loop, DEFAULT, whole[0])
    for pieces in PIECES:
        path = loop.path(min(pieces, loop.steps))
        found[f"EarlyStopped, {pieces} pieces"] = functools.partial(from_module, loop, None, path)
    if find_spec("torchopt"):
        found["TorchOpt"] = lambda _: by_torchopt(loop, whole[0])
    return found


def timed(method: Method, memory: bool) -> tuple[Tensor | None, Found]:
    """The gradient of one method, its time (the second call's), and what its report says."""
    monitor, gradients = ig.Monitor(), []

    def call() -> None:
        gradients.append(method(monitor))

    call()
    monitor.reports.clear()
    seconds, reports = cpu_seconds(call), monitor.reports.copy()
    return gradients[-1], {
        "ms": 1e3 * seconds,
        "KiB": peak_memory(call) / 2**10 if memory else math.nan,
        "status": " ".join(sorted({report.status.name for report in reports})),
        "products": sum(report.products for report in reports),
    }


def compare(loop: Loop, memory: bool) -> dict[str, Found]:
    """What each method finds and takes, on one seed."""
    references: list[Tensor] = []
    seconds = cpu_seconds(lambda: references.append(unrolled(loop)))
    size = float(references[0].norm())

    def distance(gradient: Tensor) -> float:
        return float((gradient - references[0]).norm()) / size

    unsettled = distance(unrolled(loop.times(2)))
    peak = peak_memory(lambda: unrolled(loop)) / 2**10 if memory else math.nan
    exact = {"ms": 1e3 * seconds, "KiB": peak, "status": "", "products": 0}
    found: dict[str, Found] = {"unrolled": {"error": 0.0, "length": 1.0, **exact}}
    for name, method in methods(loop).items():
        gradient, told = timed(method, memory and name in WEIGHED)
        if gradient is None:
            continue
        lengths = {"error": distance(gradient), "length": float(gradient.norm()) / size}
        found[name] = {**lengths, **told}
    return {name: {"unsettled": unsettled, **told} for name, told in found.items()}


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
        "KiB": runs[0]["KiB"],
        "products": statistics.median(run["products"] for run in runs),
        "status": " ".join(sorted({run["status"] for run in runs})),
    }


def measure(loops: Sequence[str], lengths: Sequence[int], seeds: int) -> list[Row]:
    """One row for each loop, length and method."""
    rows: list[Row] = []
    for name in loops:
        for length in lengths:
            label = f"{name}, {length} x its epochs"
            runs = [
                compare(LOOPS[name](seed).times(length), memory=seed == 0 and length == 1)
                for seed in track(range(seeds), label)
            ]
            rows += [
                summary(name, length, method, [run[method] for run in runs if method in run])
                for method in runs[0]
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

    figure, panels = plt.subplots(1, 2, figsize=(12, 7), sharey=True, layout="constrained")
    order = sorted(rows, key=lambda row: row["unsettled"])
    places = list(dict.fromkeys(f"{row['loop']}, × {row['length_of_training']}" for row in order))
    names = [m for m in dict.fromkeys(str(row["method"]) for row in rows) if m != "unrolled"]
    for method, marker in zip(names, "oDs^vP*X", strict=False):
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
    warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)  # torchopt's
    console = Console(width=160)
    rows = measure(options.loops, options.lengths, options.seeds)
    write(rows, options.out / "stopped_training.csv", console)
    write(goals(rows), options.out / "stopped_training_goals.csv", console)
    draw(rows, options.out / "stopped_training.png")


if __name__ == "__main__":
    main()
