"""Which training points do harm: influence, against training again without each of them.

    python examples/influence.py

Logistic regression tells 3s from 8s among scikit-learn's digits, and 30 % of its 200 labels are
wrong. `ig.influence` says for every point by how much a validation loss (80 digits with right
labels) would change without it: one linear solve for all, and one more for each of the 20 whose
removal is corrected. The truth is 200 more trainings. Then points are left out, the worst first;
those with the largest training loss, or any, are what one would leave out otherwise. The 80 are
also trained on alone, which here gives the best classifier of all: influence finds what is wrong,
it does not replace clean data. Of four penalties, plain training would do best with 0.1.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from pictures import BLUE, GREY, ORANGE, RED, band, options, panels, progress, save, show
from torch import Tensor
from torch.nn.functional import softplus

import implicit_grad as ig

PAIR, WRONG, DECAY, VALIDATION, CORRECTED = (3, 8), 0.3, 1e-2, 80, 20
Part = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Digits of two kinds, labelled 1 and −1; `wrong` says which training labels are."""

    train: Part
    valid: Part
    test: Part
    wrong: Tensor


def data(samples: int, seed: int) -> Data:
    """A split of the digits; a wrong label is the other one."""
    from sklearn.datasets import load_digits

    random = np.random.default_rng(seed)
    X, y = load_digits(return_X_y=True)
    X, y = X[np.isin(y, PAIR)], y[np.isin(y, PAIR)]
    inputs = torch.tensor(np.c_[X / 16, np.ones(len(X))])  # a last feature for the intercept
    labels = torch.tensor(np.where(y == PAIR[0], 1.0, -1.0))
    order = random.permutation(len(y))
    train, valid, test = np.split(order, [samples, samples + VALIDATION])
    wrong = torch.tensor(random.random(samples) < WRONG)
    noisy = torch.where(wrong, -labels[train], labels[train])
    return Data(
        (inputs[train], noisy), (inputs[valid], labels[valid]), (inputs[test], labels[test]), wrong
    )


def losses(w: Tensor, part: Part) -> Tensor:
    """The logistic loss of each point."""
    return softplus(-part[1] * (part[0] @ w))


def objective(w: Tensor, weights: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """What `fit` minimises: each point with its weight."""
    return weights @ losses(w, (X, y)) / len(y) + DECAY / 2 * w.square().sum()


def fit(weights: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Newton's method by hand; any other solver would do."""
    w = X.new_zeros(X.shape[1])
    for _ in range(12):
        p = torch.sigmoid(-y * (X @ w))
        slope = DECAY * w - X.T @ (weights * y * p) / len(y)
        curvature = X.T @ ((weights * p * (1 - p))[:, None] * X) / len(y)
        w = w - torch.linalg.solve(curvature + DECAY * torch.eye(len(w)).to(w), slope)
    return w


def without(points: Sequence[int], parts: Data) -> Tensor:
    """Trained without these points."""
    weights = torch.ones_like(parts.train[1])
    weights[points] = 0
    return fit(weights, *parts.train)


def found(parts: Data, **settings: Any) -> ig.Influence:
    """The influence of every point on the validation loss."""
    weights = torch.ones_like(parts.train[1])
    solve = ig.implicit(fit, ig.argmin(objective), linear_solver=ig.CG(rtol=1e-8))
    outer = lambda w: losses(w, parts.valid).mean()  # noqa: E731
    return ig.influence(solve, weights, outer, args=(weights, *parts.train), **settings)


def retrained(parts: Data) -> Tensor:
    """The truth: by how much the validation loss changes where each point is left out."""
    whole = losses(without([], parts), parts.valid).mean()
    points = progress(range(len(parts.wrong)), "training again")
    return torch.stack([losses(without([i], parts), parts.valid).mean() - whole for i in points])


def accuracies(order: Tensor, parts: Data) -> list[float]:
    """Test accuracy in % after the first of these points are left out, 5 % at a time."""
    steps = range(0, len(order) // 2 + 1, max(1, len(order) // 20))
    left = [without(order[:k].tolist(), parts) for k in steps]
    return [accuracy(w, parts.test) for w in left]


def accuracy(w: Tensor, part: Part) -> float:
    """The share of digits recognised, in %."""
    return 100 * (part[0] @ w * part[1] > 0).double().mean().item()


def timed(call: Any, *args: Any, **settings: Any) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    start = perf_counter()
    result = call(*args, **settings)
    return result, perf_counter() - start


def draw(guesses: dict[str, tuple[Tensor, Tensor]], curves: dict[str, list[list[float]]]) -> Any:
    """Predicted changes against true ones, and accuracy as points are left out."""
    figure, (left, right) = panels(2)
    for (name, (truth, guess)), color in zip(guesses.items(), (ORANGE, BLUE), strict=True):
        left.plot(1e3 * truth, 1e3 * guess, ".", color=color, alpha=0.7, label=name)
    left.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    left.set(xlabel="trained again without the point", ylabel="predicted")
    left.set_title("change of the validation loss, × 1000", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    for (name, rows), color in zip(curves.items(), (BLUE, RED, GREY), strict=True):
        share = np.linspace(0, 50, len(rows[0]))
        band(right, share, rows, color, name)
    right.axvline(100 * WRONG, color=GREY, linestyle=":", linewidth=0.8)
    right.set(xlabel="points left out, %", ylabel="test accuracy, %")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Compare on several splits; accuracies with 30 % of the points left out, and errors."""
    chosen = options(__doc__, arguments, samples=200, seeds=5)
    curves: dict[str, list[list[float]]] = {}
    scores: dict[str, list[float]] = {}
    told = []
    for seed in progress(range(chosen.seeds), "influence"):
        parts = data(chosen.samples, seed)
        first, alone = timed(found, parts)
        worst = first.removal.argsort()
        if not seed:
            corrected, more = timed(found, parts, leave_one_out=worst[:CORRECTED].tolist())
            truth, again = timed(retrained, parts)
            guesses = {
                "first order": (truth, first.removal),
                f"the {CORRECTED} worst, corrected": (
                    truth[worst[:CORRECTED]],
                    corrected.removal[worst[:CORRECTED]],
                ),
            }
        weights = torch.ones_like(parts.train[1])
        own = losses(fit(weights, *parts.train), parts.train)
        random = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        for name, order in (
            ("by influence", worst),
            ("by own loss", own.argsort(descending=True)),
            ("at random", random),
        ):
            curves.setdefault(name, []).append(accuracies(order, parts))
            scores.setdefault(name, []).append(curves[name][-1][round(100 * WRONG / 5)])
        alike = worst[: int(parts.wrong.sum())]
        told.append(100 * parts.wrong[alike].double().mean().item())
        clean = fit(torch.ones_like(parts.valid[1]), *parts.valid)
        scores.setdefault("the 80 alone", []).append(accuracy(clean, parts.test))
    for name, (true, guess) in guesses.items():
        error = (guess - true).norm() / true.norm()
        print(f"{name:24} {100 * error:5.1f} % off the changes by training again")
        scores[name] = [float(error)]
    print(
        f"seconds: {alone:.3f} for all, {more:.2f} with corrections, {again:.2f} by training again"
    )
    print(f"test accuracy in % with {100 * WRONG:.0f} % of the points left out, and with none:")
    scores["none"] = [rows[0] for rows in curves["at random"]]
    for name in ("by influence", "by own loss", "at random", "none", "the 80 alone"):
        print(f"  {name:14}{show(scores[name], 1)}")
    print(f"wrong labels among as many points of worst influence: {show(told, 0)} %")
    save(draw(guesses, curves), chosen.out, "influence")
    return scores


if __name__ == "__main__":
    main()
