"""Runs of an iteration for a batch of systems, side by side: one product serves all of them.

Tasks that share no unknowns have a block-diagonal matrix. Each run is the one that would solve its
system alone, stopped where it wants a product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._linear_solvers.base import LinearSolution, Operator, prepared
from implicit_grad._linear_solvers.iterative import Stepwise

MakeRun = Callable[[Operator, Tensor, float], Stepwise]


def solve_abreast(
    make: MakeRun, operator: Operator, rhs: Tensor, verify: bool
) -> tuple[Tensor, list[LinearSolution]]:
    """Solve operator · x = rhs, where both have a row for each task.

    `make` makes the run for a task, from its operator, its right-hand side and the unit of that.
    """
    ready = [prepared(row) for row in rhs]
    going = {i: it for i, it in enumerate(ready) if not isinstance(it, LinearSolution)}
    runs = {i: make(_of_row(operator, i, rhs), b, unit) for i, (b, unit) in going.items()}
    steps = {i: run.steps() for i, run in runs.items()}
    wanted = {i: v for i, it in steps.items() if (v := next(it, None)) is not None}
    while wanted:
        products = _products(operator, wanted, rhs)
        for i in list(wanted):
            try:
                wanted[i] = steps[i].send(products[i])
            except StopIteration:
                del wanted[i]
    residuals: dict[int, float] = {}
    again = {i: run.x for i, run in runs.items() if verify or not run.budget.fixed}
    if again:
        products = _products(operator, again, rhs)
        residuals = {i: runs[i].refine(products[i]) for i in again}
    found = [
        it
        if isinstance(it, LinearSolution)
        else runs[i].solution(residuals.get(i)).in_units_of(it[1])
        for i, it in enumerate(ready)
    ]
    return torch.stack([solution.x for solution in found]), found


def _products(operator: Operator, vectors: dict[int, Tensor], like: Tensor) -> Tensor:
    """Those of some tasks, in the rows of all."""
    rows = torch.zeros_like(like)
    for i, vector in vectors.items():
        rows[i] = vector
    return operator.matvec(rows)


def _of_row(operator: Operator, i: int, like: Tensor) -> Operator:
    """One task's operator, which takes a product of all for one of its own."""

    def matvec(x: Tensor) -> Tensor:
        return _products(operator, {i: x}, like)[i]

    scale = operator.scale
    row = scale[i] if isinstance(scale, Tensor) and scale.dim() == like.dim() else scale
    return dataclasses.replace(operator, matvec=matvec, rmatvec=matvec, scale=row)
