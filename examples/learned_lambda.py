"""How far may a task pull each weight? λ learned as a number, by tensor, by element, as a matrix.

    python examples/learned_lambda.py

Tasks are linear regressions from ten points. Their intercepts differ widely, half of their slopes
differ, the other half hardly do, and along six directions askew to the axes none moves far.
iMAML's λ is the strength of the prior that holds a task's weights near the meta-parameters; learned
by hypergradients together with them, it can say as much of this as its form allows. Bayes' rule
with the true prior is the best that any λ can do. Inner problems and their errors are quadratic, so
all adaptation at test time is one batch of linear systems.

With four directions and fewer tasks (240 in all, now 300) the matrix gained nothing over a λ for
each element. The fixed λ is the best of a grid for the meta-parameters that the scalar one learned.
"""

import quiet  # isort: skip  # noqa: F401 (before those that it keeps quiet)

from collections.abc import Sequence
from typing import Any, NamedTuple

import learn2learn as l2l
import numpy as np
import torch
from matplotlib.colors import LogNorm
from pictures import BLUE, GREY, ORANGE, interval, options, panels, progress, save, show
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import implicit_grad as ig

SLOPES, STIFF, SHOTS, NOISE, INIT = 16, 6, 10, 0.3, 0.1
FORMS: dict[str, dict[str, Any]] = {
    "scalar": {"per": "model"},
    "per tensor": {"per": "tensor"},
    "per element": {"per": "element"},
    "element + low rank": {"per": "element", "rank": STIFF},
}


class Tasks(NamedTuple):
    """Weights of tasks (slopes, then the intercept), and inputs and outputs of their points."""

    weights: Tensor
    X: Tensor
    y: Tensor


class World(NamedTuple):
    """Where tasks come from: the mean and the covariance of their weights."""

    mean: Tensor
    covariance: Tensor

    def tasks(self, count: int, points: int, random: torch.Generator) -> Tasks:
        """Some tasks and points of each."""
        root = torch.linalg.cholesky(self.covariance)
        weights = self.mean + normal(random, count, SLOPES + 1) @ root.T
        X = normal(random, count, points, SLOPES)
        y = torch.einsum("tpi,ti->tp", X, weights[:, :-1]) + weights[:, -1:]
        return Tasks(weights, X, y + NOISE * normal(random, count, points))


def normal(random: torch.Generator, *shape: int) -> Tensor:
    """Normal random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=random)


def world(random: torch.Generator) -> World:
    """Slopes of standard deviation 1 and 0.1, next to nothing along the stiff ones."""
    spread = torch.tensor([1.0] * (SLOPES // 2) + [0.1] * (SLOPES // 2)).double()
    stiff = torch.linalg.qr(normal(random, SLOPES, STIFF)).Q
    free = torch.eye(SLOPES).double() - stiff @ stiff.T
    slopes = free @ spread.square().diag() @ free + 1e-3 * torch.eye(SLOPES)
    covariance = torch.block_diag(slopes, torch.tensor([[9.0]]).double())
    return World(normal(random, SLOPES + 1), covariance)


def meta_train(lam: nn.Module, model: nn.Module, of: World, chosen: Any, seed: int) -> ig.Monitor:
    """Learn the model's initial weights and λ on tasks from a world."""
    monitor, random = ig.Monitor(), torch.Generator().manual_seed(100 + seed)
    learner = ig.imaml(
        l2l.algorithms.MAML(model, lr=0.1),
        lam=lam,
        solver=ig.solvers.NewtonCG(maxiter=1, cg=SLOPES + 1),
        linear_solver=ig.CG(maxiter=SLOPES + 1),
        monitor=monitor,
    )
    adam = torch.optim.Adam(learner.parameters(), lr=0.1)
    for _ in range(chosen.iterations):
        adam.zero_grad()
        for X, y in zip(*of.tasks(chosen.tasks, 2 * SHOTS, random)[1:], strict=True):
            loss = query_loss(learner.clone(), X, y) / chosen.tasks
            loss.backward()
        adam.step()
    return monitor


def query_loss(learner: Any, X: Tensor, y: Tensor) -> Tensor:
    """Adapt to the first points of a task; the loss on the others."""
    learner.adapt(lambda: mse_loss(learner(X[:SHOTS])[:, 0], y[:SHOTS]))
    return mse_loss(learner(X[SHOTS:])[:, 0], y[SHOTS:])


def matrix(lam: nn.Module) -> Tensor:
    """A λ as the matrix that it stands for."""
    value = lam()
    diagonal, factor = value if isinstance(value, ig.LowRank) else (value, None)
    shapes = (1, SLOPES), (1,)
    flat = [w.detach().expand(shape).reshape(-1) for w, shape in zip(diagonal, shapes, strict=True)]
    Lam = torch.cat(flat).diag()
    if factor is not None:
        U = torch.cat([u.detach().flatten(0, -2) for u in factor])
        Lam = Lam + U @ U.T
    return Lam


def errors(theta: Tensor, Lam: Tensor, tasks: Tasks) -> Tensor:
    """‖φ − weights‖² of each task: what inputs of unit variance make the error above the noise."""
    X = torch.cat([tasks.X, torch.ones_like(tasks.X[:, :, :1])], dim=2)
    residual = tasks.y - X @ theta
    A = 2 / SHOTS * X.mT @ X + Lam
    phi = theta + torch.linalg.solve(A, 2 / SHOTS * (X.mT @ residual[:, :, None])[:, :, 0])
    return (phi - tasks.weights).square().sum(1)


def best_of_grid(theta: Tensor, valid: Tasks) -> Tensor:
    """The multiple of the identity that other tasks like best."""
    grid = [lam * torch.eye(SLOPES + 1).double() for lam in np.logspace(-4, 1, 26)]
    return min(grid, key=lambda Lam: errors(theta, Lam, valid).mean())


def flat(model: nn.Module) -> Tensor:
    """The model's weights as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def compare(chosen: Any, seed: int) -> tuple[dict[str, float], dict[str, Tensor], list[ig.Monitor]]:
    """Mean test error of each form of λ in one world, and what was learned."""
    random = torch.Generator().manual_seed(seed)
    of = world(random)
    valid, test = (of.tasks(1000, SHOTS, random) for _ in range(2))
    scores, learned, monitors = {}, {}, []
    for name, form in FORMS.items():
        model = nn.Linear(SLOPES, 1).double()
        nn.init.zeros_(model.weight)
        lam = ig.LearnedLam(model, init=INIT, **form)
        monitors.append(meta_train(lam, model, of, chosen, seed))
        learned[name] = matrix(lam)
        if name == "scalar":  # the same initial weights, with the best λ for other tasks
            best = best_of_grid(flat(model), valid)
            scores["fixed, best of 26"] = errors(flat(model), best, test).mean().item()
        scores[name] = errors(flat(model), learned[name], test).mean().item()
    learned["Bayes"] = 2 * NOISE**2 / SHOTS * torch.linalg.inv(of.covariance)
    scores["Bayes, true prior"] = errors(of.mean, learned["Bayes"], test).mean().item()
    return scores, learned, monitors


def draw(scores: dict[str, list[float]], learned: dict[str, Tensor]) -> Any:
    """Errors by form, and the λ of the first world as matrices."""
    figure, (left, middle, right) = panels(3, 3.7)
    for row, values in enumerate(scores.values()):
        mean, half = interval(values)
        colour = {0: GREY, len(scores) - 1: ORANGE}.get(row, BLUE)
        left.barh(row, mean, xerr=half, color=colour, alpha=0.8)
    left.set(yticks=range(len(scores)), yticklabels=list(scores), xlabel="excess test error")
    left.invert_yaxis()
    for panel, name in ((middle, "element + low rank"), (right, "Bayes")):
        image = panel.imshow(learned[name].abs().clamp_min(1e-2).numpy(), norm=LogNorm(1e-2, 1e1))
        panel.set(title=f"|Λ|, {name}", xticks=[], yticks=[])
        panel.grid(False)
    figure.colorbar(image, ax=right, shrink=0.8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Learn all forms in several worlds; test errors by form."""
    chosen = options(__doc__, arguments, iterations=150, tasks=2, seeds=3)
    scores: dict[str, list[float]] = {}
    results = [compare(chosen, seed) for seed in progress(range(chosen.seeds), "learned_lambda")]
    for found, _, _ in results:
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
    print(f"excess test error, mean ± 95 % interval over {chosen.seeds} worlds of 1,000 test tasks")
    for name, values in scores.items():
        print(f"  {name:22}{show(values)}")
    reports = [report for _, _, monitors in results for m in monitors for report in m.reports]
    print(f"{len(reports)} backward solves, {sum(not r.status.ok for r in reports)} failed")
    save(draw(scores, results[0][1]), chosen.out, "learned_lambda")
    return scores


if __name__ == "__main__":
    main()
