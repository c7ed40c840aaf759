"""Hessian-free implicit MAML on MAML's toy task: sinusoids of any amplitude and phase.

    python examples/sinusoids.py

A network sees ten points of A sin(x − φ) and adapts. `adapt(closure)` hands the inner problem to
any minimiser: gradient descent, or the paper's Newton-CG steps, which need no learning rate
(Rajeswaran et al., 2019). First-order MAML is the baseline. All see the same tasks and take as many
meta-iterations; the table tells the seconds, too, because Newton's steps cost more. Of λ and the
learning rate two pairs were tried, and the better one for all three is the default.
"""

import quiet  # isort: skip  # noqa: F401 (before those that it keeps quiet)

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import learn2learn as l2l
import numpy as np
import torch
from pictures import BLUE, GREEN, GREY, ORANGE, interval, options, panels, progress, save, show
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import implicit_grad as ig
from implicit_grad.learn2learn import ImplicitMAML

SHOTS, LR, LAM, STEPS = 10, 0.02, 0.5, 16
COLOURS = {"FOMAML": ORANGE, "iMAML, descent": GREEN, "iMAML, Hessian-free": BLUE}
GRID = torch.linspace(-5, 5, 200)[:, None]
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def task(random: torch.Generator) -> Task:
    """Support and query points of a sinusoid."""
    amplitude = 0.1 + 4.9 * torch.rand((), generator=random)
    phase = np.pi * torch.rand((), generator=random)
    x = 10 * torch.rand(2 * SHOTS, 1, generator=random) - 5
    y = amplitude * torch.sin(x - phase)
    return x[:SHOTS], y[:SHOTS], x[SHOTS:], y[SHOTS:]


def network(width: int) -> nn.Module:
    """Two hidden layers; smooth, for Newton's method."""
    layers = nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(width, 1))


def wrapped(name: str, model: nn.Module, **settings: Any) -> Any:
    """The learner of a method; other settings are those of `imaml`."""
    maml = l2l.algorithms.MAML(model, lr=LR, first_order=name == "FOMAML")
    if name == "FOMAML":
        return maml
    solver = ig.solvers.NewtonCG(maxiter=5) if name.endswith("free") else None
    settings = {"solver": solver, "curvature": "gauss_newton", "on_failure": "ignore"} | settings
    return ig.imaml(maml, lam=LAM, **settings)


def adapted(learner: Any, x: Tensor, y: Tensor) -> Any:
    """A copy of the learner that adapted to the support points."""
    learner = learner.clone()
    if not isinstance(learner, ImplicitMAML):
        for _ in range(STEPS):
            learner.adapt(mse_loss(learner(x), y))
    else:
        steps = STEPS if learner.solver is None else None
        learner.adapt(lambda: mse_loss(learner(x), y), steps=steps)
    return learner


class Run(NamedTuple):
    """What one method arrived at."""

    losses: list[float]
    seconds: float
    errors: list[float]
    fits: list[Tensor]
    reports: list[ig.Report]


def meta_train(name: str, chosen: Any, seed: int) -> Run:
    """Adam on the query loss; then the errors on test tasks, and the fits of the first one."""
    torch.manual_seed(seed)
    model, monitor = network(chosen.width), ig.Monitor()
    learner, random = wrapped(name, model, monitor=monitor), torch.Generator().manual_seed(seed)
    adam, losses, start = torch.optim.Adam(model.parameters(), lr=3e-3), [], time.perf_counter()
    for _ in progress(range(chosen.iterations), name):
        adam.zero_grad()
        total = 0.0
        for _ in range(chosen.tasks):
            x, y, query, target = task(random)
            loss = mse_loss(adapted(learner, x, y)(query), target) / chosen.tasks
            loss.backward()
            total += loss.item()
        adam.step()
        losses.append(total)
    seconds = time.perf_counter() - start
    reports = list(monitor.reports)
    random, errors = torch.Generator().manual_seed(10_000), []
    fits = []
    for _ in range(chosen.test):
        x, y, query, target = task(random)
        learned = adapted(learner, x, y)
        with torch.no_grad():
            errors.append(mse_loss(learned(query), target).item())
            fits.append(learned(GRID))
    return Run(losses, seconds, errors, fits, reports)


def draw(runs: dict[str, Run], shown: int) -> Any:
    """Fits of one test task, and the loss by meta-iterations and by seconds."""
    figure, (left, middle, right) = panels(3, 3.7)
    random = torch.Generator().manual_seed(10_000)
    for _ in range(shown + 1):
        x, y, query, target = task(random)
    left.plot(x, y, "k^", label="support")
    left.plot(query, target, ".", color=GREY, label="query")
    for name, run in runs.items():
        left.plot(GRID, run.fits[shown], color=COLOURS[name])
        window = max(1, len(run.losses) // 10)
        smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
        iterations = np.arange(window, len(run.losses) + 1)
        middle.plot(iterations, smooth, color=COLOURS[name], label=name)
        right.plot(iterations * run.seconds / len(run.losses), smooth, color=COLOURS[name])
    left.set(xlabel="x", ylabel="y", title="first-order MAML's median test task")
    middle.set(xlabel="meta-iteration", ylabel="query loss, running mean", yscale="log")
    right.set(xlabel="seconds of training", ylabel="query loss, running mean", yscale="log")
    for panel in (left, middle):
        panel.legend(frameon=False, fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Meta-train by each method; mean test errors by method."""
    chosen = options(__doc__, arguments, iterations=150, tasks=4, test=100, width=40, seed=0)
    runs = {name: meta_train(name, chosen, chosen.seed) for name in COLOURS}
    print(f"error on {chosen.test} test tasks with 95 % interval; s per meta-iteration; ", end="")
    print("reports of trouble")
    for name, run in runs.items():
        print(f"  {name:22}{show(run.errors, 2)}{run.seconds / chosen.iterations:8.2f} s", end="")
        bad = [report.status.name for report in run.reports if not report.status.ok]
        print(f"{len(bad):6} of {len(run.reports)}", *sorted(set(bad)))
    typical = int(np.argsort(runs["FOMAML"].errors)[chosen.test // 2])
    save(draw(runs, typical), chosen.out, "sinusoids")
    return {name: interval(run.errors)[0] for name, run in runs.items()}


if __name__ == "__main__":
    main()
