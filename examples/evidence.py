"""λ as a learned precision: a penalty is a prior, and the evidence says which, without validation.

    python examples/evidence.py

Tasks are logistic regressions from 20 points. Their weights are drawn from normal distributions, of
precision 0.1 for the first feature up to 10 for the last. A penalty ½ Σ λᵢwᵢ² is −log of such a
prior: penalised weights are the most probable ones (MAP), and the right λ is the precision. It is
learned from the labels alone, by the gradient of their evidence as Laplace approximates it. Part of
it goes through the weights, on which a logistic loss's curvature depends; else λ becomes too large.
"""

from collections.abc import Sequence
from typing import Any

import torch
from newton import newton
from pictures import BLUE, GREY, ORANGE, interval, options, panels, progress, save, show
from torch import Tensor
from torch.nn.functional import softplus

import implicit_grad as ig

FEATURES, POINTS, TEST = 8, 20, 200
TRUE = torch.logspace(-1, 1, FEATURES).double()
LEARNED, PART, ONE = "evidence", "evidence, weights held fixed", "best single λ"
COLORS = {LEARNED: BLUE, PART: ORANGE, ONE: GREY}


def world(tasks: int) -> tuple[tuple[Tensor, ...], ...]:
    """Inputs (tasks, points, features) and labels 1 or −1, to learn from and to test with."""
    X = torch.randn(tasks, POINTS + TEST, FEATURES).to(TRUE)
    w = torch.randn(tasks, FEATURES) / TRUE.sqrt()
    y = 2 * torch.bernoulli(torch.sigmoid(margins(w, X, torch.ones(1)))) - 1
    return (X[:, :POINTS], y[:, :POINTS]), (X[:, POINTS:], y[:, POINTS:])


def margins(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """By how much each point is on the right side."""
    return y * (X @ w[..., None])[..., 0]


def objective(w: Tensor, lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """For each task −log of the labels' probability and the prior's density, up to a constant."""
    return softplus(-margins(w, X, y)).sum(-1) + (lam * w.square()).sum(-1) / 2


def curvature(w: Tensor, lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """The Hessian of each task's objective."""
    chance = torch.sigmoid(margins(w, X, y))
    return X.mT @ ((chance * (1 - chance))[..., None] * X) + lam.diag()


def fit(lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """The MAP weights of all tasks."""

    def model(w: Tensor) -> tuple[Tensor, Tensor]:
        pull = y * torch.sigmoid(-margins(w, X, y))
        return lam * w - (pull[:, None] @ X)[:, 0], curvature(w, lam, X, y)

    return newton(model, X.new_zeros(len(X), FEATURES))


def surprise(w: Tensor, lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """The mean over tasks of −log evidence by Laplace's approximation."""
    volume = torch.logdet(curvature(w, lam, X, y)) - lam.log().sum()
    return (objective(w, lam, X, y) + volume / 2).mean()


def learn(data: tuple[Tensor, ...], steps: int, *, implicit: bool) -> Tensor:
    """λ of most evidence, by Adam; or where that ends with weights held fixed in its gradient."""
    solve = ig.implicit(fit, ig.argmin(objective, tasks=True), linear_solver=ig.CG(rtol=1e-3))
    log_lam = torch.zeros_like(TRUE, requires_grad=True)
    adam = torch.optim.Adam([log_lam], lr=0.3)
    rate = torch.optim.lr_scheduler.LinearLR(adam, 1, 0.05, steps)
    for _ in range(steps):
        adam.zero_grad()
        w = solve(log_lam.exp(), *data)
        surprise(w if implicit else w.detach(), log_lam.exp(), *data).backward()
        adam.step()
        rate.step()
    return log_lam.detach().exp()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Learn λ in several worlds; the losses above that of the true λ, and what was learned."""
    chosen = options(__doc__, arguments, tasks=60, steps=40, seeds=6)
    excess: dict[str, list[float]] = {name: [] for name in COLORS}
    found: dict[str, list[Tensor]] = {name: [] for name in COLORS}
    for seed in progress(range(chosen.seeds), "evidence"):
        torch.manual_seed(seed)
        train, test = world(chosen.tasks)
        loss = lambda lam: softplus(-margins(fit(lam, *train), *test)).mean().item()  # noqa: B023, E731
        ways = (LEARNED, True), (PART, False)
        lams = {name: learn(train, chosen.steps, implicit=way) for name, way in ways}
        singles = [torch.full_like(TRUE, 10 ** (k / 4)) for k in range(-6, 7)]
        lams[ONE] = min(singles, key=loss)
        for name, lam in lams.items():
            found[name].append(lam)
            excess[name].append(loss(lam) - loss(TRUE))
    figure, (left, right) = panels(2)
    print(
        "log loss in test above that of the true λ, and λ over the precision, median of features;"
    )
    print(f"mean ± 95 % interval over {chosen.seeds} worlds")
    for name, color in COLORS.items():
        learned, (mean, half) = torch.stack(found[name]), interval(excess[name])
        print(f"  {name:30}{show(excess[name])}   {show((learned / TRUE).median(1).values, 2)}")
        right.barh(name.replace(", ", ",\n"), mean, xerr=half, color=color)
        left.plot(TRUE, learned.T, ".", color=color, alpha=0.5)
        left.plot(TRUE, learned.median(0).values, color=color, label=name)
    left.axline((1, 1), slope=1, color="black", linestyle=":", label="the precision")
    left.set(xscale="log", yscale="log", xlabel="precision", ylabel="learned λ")
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("log loss above that of the true λ")
    save(figure, chosen.out, "evidence")
    return {"excess": excess, "found": found}


if __name__ == "__main__":
    main()
