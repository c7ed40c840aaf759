"""Without a lam, how near is `imaml` to second-order MAML's own gradient?

    python benchmarks/default_lam.py --out benchmarks/results

5-way 1-shot classification of points around random centres, by a tanh network, as initialised, that
is adapted by a few steps of gradient descent as MAML takes them. The reference is the meta-gradient
of the same steps, differentiated by torch. For each task and each choice: the cosine with the
reference, and the error relative to the reference's length; the table has the medians over tasks,
and the worst cosine.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import implicit_grad as ig

SETTINGS = ((5, 0.5), (16, 0.1), (16, 0.5))  # steps and their length
PRODUCTS = 5
CLASSES, INPUTS, HIDDEN = 5, 10, 20


class Task(NamedTuple):
    """Samples to adapt to, and others for the outer loss."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def task(seed: int) -> Task:
    """Points around a centre for each class: one of each class to adapt to, three for the rest."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, INPUTS, dtype=torch.float64, generator=random)

    def samples(shots: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(CLASSES).repeat(shots)
        noise = torch.randn(len(labels), INPUTS, dtype=torch.float64, generator=random)
        return centres[labels] + 0.5 * noise, labels

    return Task(samples(1), samples(3))


def network() -> nn.Module:
    """A hidden layer of tanh."""
    torch.manual_seed(0)
    layers = nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
    return nn.Sequential(*layers).double()


def flat(tensors: Any) -> Tensor:
    """One vector."""
    return torch.cat([t.flatten() for t in tensors])


def reference(model: nn.Module, task: Task, steps: int, lr: float) -> Tensor:
    """Second-order MAML's gradient: every step in the graph."""
    theta = dict(model.named_parameters())
    phi = theta
    for _ in range(steps):
        loss = cross_entropy(functional_call(model, phi, task.support[:1]), task.support[1])
        slope = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {k: p - lr * g for (k, p), g in zip(phi.items(), slope, strict=True)}
    outer = cross_entropy(functional_call(model, phi, task.query[:1]), task.query[1])
    return flat(torch.autograd.grad(outer, list(theta.values())))


def choices(steps: int, lr: float) -> dict[str, dict[str, Any]]:
    """Options of `imaml` by the name of a row."""
    stopped = ig.EarlyStopped(steps=steps, lr=lr, maxiter=PRODUCTS)
    middle = ig.EarlyStopped(maxiter=PRODUCTS)
    cg, positive = ig.CG(maxiter=PRODUCTS), ig.PositivePart(maxiter=PRODUCTS)
    return {
        "first-order MAML": {"linear_solver": ig.CG(maxiter=0)},
        "lam=None, the default": {},
        "lam=None, the default with five products": {"linear_solver": positive},
        "lam=None, MINRES": {"linear_solver": ig.MINRES(maxiter=PRODUCTS)},
        "lam=None, Gauss-Newton": {"linear_solver": cg, "curvature": "gauss_newton"},
        "lam=None, EarlyStopped(steps, lr), at the end": {"linear_solver": stopped},
        "lam=None, EarlyStopped(), in the middle": {"linear_solver": middle},
    }


def implicit(
    model: nn.Module, task: Task, steps: int, lr: float, options: dict[str, Any]
) -> Tensor:
    """The same meta-gradient by `imaml`, linearised where the steps ended."""
    maml = ig.imaml(model, lr=lr, check="never", on_failure="ignore", **options)
    learner = maml.clone()
    learner.adapt(lambda: cross_entropy(learner(task.support[0]), task.support[1]), steps=steps)
    outer = cross_entropy(learner(task.query[0]), task.query[1])
    return flat(torch.autograd.grad(outer, list(model.parameters())))


def measure(tasks: int) -> list[Row]:
    """One row for each setting and choice."""
    model, rows = network(), []
    for steps, lr in SETTINGS:
        sampled = [task(seed) for seed in track(range(tasks), f"{steps} steps of {lr}")]
        exact = [reference(model, t, steps, lr) for t in sampled]
        for name, options in choices(steps, lr).items():
            found = [implicit(model, t, steps, lr, options) for t in sampled]
            pairs = list(zip(found, exact, strict=True))
            cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
            errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
            rows.append(
                {
                    "steps": steps,
                    "lr": lr,
                    "choice": name,
                    "cosine": statistics.median(cosines),
                    "least_cosine": min(cosines),
                    "error": statistics.median(errors),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, then a table and a CSV file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tasks", type=int, default=8)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error", ig.ImplicitGradWarning)
    write(measure(options.tasks), options.out / "default_lam.csv", Console(width=120))


if __name__ == "__main__":
    main()
