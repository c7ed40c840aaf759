"""Policies: how near is `imaml` without a lam to MAML's own gradient, and is it ever much longer?

    python benchmarks/policy_gradients.py --out out

The task, the policies and the three algorithms of `examples/navigation.py`. A policy learns by MAML
for some meta-iterations; then each method's gradient is taken on the same episodes of new tasks.
A policy's loss has as much negative curvature as positive, and is what the episodes say of the
policy that met them: where the step led they say less of it ("after the step", what `adapt` takes
when it is given a function). The table has, over all seeds' tasks, the median cosine with MAML's
gradient, the median error relative to its length, and the greatest length relative to its; and over
seeds the mean cosine of the tasks' *mean* gradients, which is what an outer step sees.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import learn2learn as l2l
import torch
from examples_path import navigation, plane
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor

import implicit_grad as ig

OUTER = {
    "TRPO": navigation.ratio,
    "ProMP": navigation.clipped_ratio,
    "DiCE": navigation.dice,
}
SOLVERS = {
    "default": None,
    "MINRES(maxiter=5)": ig.MINRES(maxiter=5),
    "CG(maxiter=5)": ig.CG(maxiter=5),
    "EarlyStopped(maxiter=5)": ig.EarlyStopped(maxiter=5),
}
FIRST = "first-order MAML"
METHODS = (FIRST, *SOLVERS, "default, after the step")


class Trained(NamedTuple):
    """A policy, its algorithm's losses, and episodes of tasks that it has not seen."""

    policy: plane.Policy
    inner: navigation.Loss
    outer: navigation.Loss
    tasks: list[navigation.Task]


def trained(algorithm: str, seed: int, chosen: argparse.Namespace) -> Trained:
    """By second-order MAML."""
    torch.manual_seed(seed)
    policy, world = plane.Policy(chosen.width), plane.Navigation(chosen.episodes, seed=seed)
    maml = l2l.algorithms.MAML(policy, lr=navigation.LR)
    update, inner = navigation.ALGORITHMS[algorithm]
    adam = torch.optim.Adam(policy.parameters(), navigation.META_LR)

    def met(goals: Any) -> list[navigation.Task]:
        found = []
        for goal in goals:
            before = plane.episodes(maml, world, goal)
            after = plane.episodes(navigation.adapted(maml, inner, before), world, goal)
            found.append(navigation.Task(before, after))
        return found

    for _ in track(range(chosen.iterations), f"{algorithm}, seed {seed}"):
        update(maml, met(world.sample_tasks(5)), adam)
    return Trained(policy, inner, OUTER[algorithm], met(world.sample_tasks(chosen.tasks)))


def gradients(method: str, found: Trained) -> Tensor:
    """One row for each task."""
    maml: Any = l2l.algorithms.MAML(found.policy, lr=navigation.LR, first_order=method == FIRST)
    after = method.endswith("after the step")
    if method not in (FIRST, "MAML"):
        solver = None if after else SOLVERS[method]
        maml = ig.imaml(maml, linear_solver=solver, check="never", on_failure="ignore")
    rows = []
    for task in found.tasks:
        learner = navigation.adapted(maml, found.inner, task.before, twice=after)
        loss = found.outer(learner, task.after)
        rows.append(navigation.flat(torch.autograd.grad(loss, list(found.policy.parameters()))))
    return torch.stack(rows)


def measure(chosen: argparse.Namespace) -> list[Row]:
    """One row for each algorithm and method."""
    rows: list[Row] = []
    for algorithm in OUTER:
        policies = [trained(algorithm, seed, chosen) for seed in range(chosen.seeds)]
        exact = [gradients("MAML", found) for found in policies]
        for method in METHODS:
            pairs = [(gradients(method, p), e) for p, e in zip(policies, exact, strict=True)]
            each, reference = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            size = reference.norm(dim=1)
            means = [torch.cosine_similarity(a.mean(0), b.mean(0), dim=0) for a, b in pairs]
            rows.append(
                {
                    "algorithm": algorithm,
                    "method": method,
                    "cosine": torch.cosine_similarity(each, reference).median().item(),
                    "error": ((each - reference).norm(dim=1) / size).median().item(),
                    "longest": (each.norm(dim=1) / size).max().item(),
                    "cosine_of_means": statistics.mean(float(mean) for mean in means),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then a table and a CSV file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    for name, default in {
        "iterations": 15,
        "tasks": 60,
        "episodes": 20,
        "width": 32,
        "seeds": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write(measure(chosen), chosen.out / "policy_gradients.csv", Console(width=120))


if __name__ == "__main__":
    main()
