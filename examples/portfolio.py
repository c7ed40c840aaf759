"""Predict what the decision needs: a portfolio layer that Gurobi solves.

    python examples/portfolio.py

Each period a linear model predicts the returns of ten assets from four signals, and Gurobi picks
the long-only portfolio with the best trade of risk and return. The true returns are not linear, so
the predictions must be wrong somewhere. Two-stage learning puts the errors where least squares
says; end-to-end learning differentiates the realised loss through the quadratic program, active
bounds and all, and puts them where they cost least. Regret is measured against an investor who
knows the mean returns of each period.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pictures import BLUE, GREY, band, interval, options, panels, progress, save, show
from torch import Tensor

import implicit_grad as ig

ASSETS, SIGNALS, BATCH = 10, 4, 16


class Market(NamedTuple):
    """Signals, realised and mean returns by period, and the covariance of the realised ones."""

    X: Tensor
    returns: Tensor
    means: Tensor
    covariance: Tensor


def market(periods: int, seed: int, sample: int) -> Market:
    """Mean returns are cubes of linear ones; `seed` draws the law, with `sample` the periods."""
    law, draw = np.random.default_rng(seed), np.random.default_rng([seed, sample])
    slopes = law.standard_normal((SIGNALS, ASSETS)) / SIGNALS**0.5
    loadings = 0.3 * law.standard_normal((ASSETS, 3))
    covariance = loadings @ loadings.T + 0.1 * np.eye(ASSETS)
    X = draw.standard_normal((periods, SIGNALS))
    means = 0.3 * (X @ slopes) ** 3
    noise = draw.multivariate_normal(np.zeros(ASSETS), covariance, periods)
    X = np.c_[X, np.ones(periods)]
    return Market(*(torch.tensor(t) for t in (X, means + noise, means, covariance)))


def cost(w: Tensor, returns: Tensor, covariance: Tensor) -> Tensor:
    """Risk less return, summed over periods; w holds one portfolio for each."""
    return ((w @ covariance) * w).sum() / 2 - (returns * w).sum()


def budget(w: Tensor, returns: Tensor, covariance: Tensor) -> Tensor:
    """0 where all money is invested."""
    return w.sum(1) - 1


def evenly(returns: Tensor, covariance: Tensor) -> Tensor:
    """Where Gurobi reads off the quadratic program."""
    return torch.full_like(returns, 1 / returns.shape[1])


def layer(**settings: Any) -> Any:
    """Predicted returns ↦ the best portfolios, long only."""
    condition = ig.argmin(cost, equality=budget, bounds=(0, None))
    return ig.implicit(ig.solvers.GurobiQP(), condition, init=evenly, **settings)


def expected_cost(predictions: Tensor, of: Market) -> float:
    """The mean cost of portfolios for these predictions, per period."""
    invest, total = layer(), 0.0
    for rows in torch.arange(len(of.X)).split(BATCH):
        w = invest(predictions[rows], of.covariance)
        total += cost(w, of.means[rows], of.covariance).item()
    return total / len(of.X)


def end_to_end(
    B: Tensor, train: Market, test: Market, epochs: int, monitor: ig.Monitor
) -> tuple[Tensor, list[float]]:
    """Adam on the realised cost from B; the new B, and the test regret before and after epochs."""
    invest, B = layer(monitor=monitor, on_failure="ignore"), B.clone().requires_grad_()
    adam, least = torch.optim.Adam([B], lr=0.02), expected_cost(test.means, test)
    regrets = [expected_cost(test.X @ B.detach(), test) - least]
    for _ in range(epochs):
        for rows in torch.randperm(len(train.X)).split(BATCH):
            adam.zero_grad()
            w = invest(train.X[rows] @ B, train.covariance)
            (cost(w, train.returns[rows], train.covariance) / len(rows)).backward()
            adam.step()
        regrets.append(expected_cost(test.X @ B.detach(), test) - least)
    return B.detach(), regrets


def squared_error(B: Tensor, of: Market) -> float:
    """The mean squared error of the predictions of mean returns."""
    return (of.X @ B - of.means).square().mean().item()


def draw(curves: list[list[float]], scores: dict[str, list[float]]) -> Any:
    """Regret over the epochs, and seed by seed."""
    figure, (left, right) = panels(2)
    band(left, range(len(curves[0])), curves, BLUE, "end to end")
    mean, half = interval(scores["two-stage"])
    left.axhline(mean, color=GREY, label="two-stage")
    left.axhspan(mean - half, mean + half, color=GREY, alpha=0.15, linewidth=0)
    left.set(xlabel="epoch", ylabel="test regret per period", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(scores["two-stage"], scores["end to end"], "o", color=BLUE)
    most = 1.05 * max(max(values) for values in scores.values())
    right.plot([0, most], [0, most], color=GREY, linestyle=":", label="equal")
    right.set(xlabel="regret, two-stage", ylabel="regret, end to end", xlim=(0, most))
    right.set(ylim=(0, most))
    right.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Learn both ways in several markets; test regrets by method."""
    chosen = options(__doc__, arguments, periods=320, epochs=4, seeds=6)
    scores: dict[str, list[float]] = {"two-stage": [], "end to end": []}
    errors: dict[str, list[float]] = {"two-stage": [], "end to end": []}
    curves, monitor = [], ig.Monitor()
    for seed in progress(range(chosen.seeds), "portfolio"):
        torch.manual_seed(seed)
        train, test = market(chosen.periods, seed, 0), market(192, seed, 1)
        least_squares = torch.linalg.lstsq(train.X, train.returns).solution
        learned, regrets = end_to_end(least_squares, train, test, chosen.epochs, monitor)
        curves.append(regrets)
        for name, B, value in (
            ("two-stage", least_squares, regrets[0]),
            ("end to end", learned, regrets[-1]),
        ):
            scores[name].append(value)
            errors[name].append(squared_error(B, test))
    print(f"mean ± 95 % interval over {chosen.seeds} markets{'':7}test regret{'':9}squared error")
    for name in scores:
        print(f"  {name:38}{show(scores[name])}{'':7}{show(errors[name])}")
    gains = [1 - new / old for old, new in zip(*scores.values(), strict=True)]
    print(f"end to end has less regret by {show([100 * gain for gain in gains], 1)} %")
    kinks = sum(report.status == ig.Status.DEGENERATE for report in monitor.reports)
    failed = sum(not report.status.ok for report in monitor.reports) - kinks
    print(f"{len(monitor.reports)} backward solves through active sets, {failed} failed, ", end="")
    print(f"{kinks} at a kink of the portfolio (a bound active by chance)")
    save(draw(curves, scores), chosen.out, "portfolio")
    return scores


if __name__ == "__main__":
    main()
