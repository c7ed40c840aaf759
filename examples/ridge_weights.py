"""A thousand hyperparameters: one L2 weight for each feature of a ridge regression.

    python examples/ridge_weights.py

Of 1,000 features 20 matter. One λ for all of them, the best of a grid, shrinks those as well as the
rest; a hypergradient of the validation error gives each feature a λ of its own. The weights come
from NumPy in closed form, which autograd never sees. Both baselines, one of them the lasso, which
was invented for this case, are cross-validated on all the samples that the hypergradient splits
into training and validation; in the end the learned λ are used with all of them, too. The lasso
wins: so many λ overfit the validation set, as the gap to the test error shows. (The split, 300 to
500, was picked from four on two of the seeds.)
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pictures import BLUE, GREEN, GREY, ORANGE, band, options, panels, progress, save, show
from torch import Tensor

import implicit_grad as ig

RELEVANT, NOISE = 20, 1.0
Part = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Samples and targets; the first `RELEVANT` features are those that matter."""

    train: Part
    valid: Part
    test: Part

    def both(self) -> Part:
        """Training and validation samples."""
        return torch.cat([self.train[0], self.valid[0]]), torch.cat([self.train[1], self.valid[1]])


def data(features: int, samples: int, seed: int) -> Data:
    """A sparse linear truth, seen through noise."""
    random = np.random.default_rng(seed)
    truth = np.zeros(features)
    truth[:RELEVANT] = random.choice([-1, 1], RELEVANT) * random.uniform(0.5, 1.5, RELEVANT)

    def part(n: int) -> Part:
        X = random.standard_normal((n, features))
        return torch.tensor(X), torch.tensor(X @ truth + NOISE * random.standard_normal(n))

    return Data(part(3 * samples // 8), part(5 * samples // 8), part(2000))


def error(w: Tensor, part: Part) -> Tensor:
    """The mean squared error."""
    return (part[0] @ w - part[1]).square().mean()


def half_squares(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """What ridge regression adds λ/2 ‖w‖² to."""
    return (X @ w - y).square().sum() / 2


def ridge(lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """The minimiser w = Λ⁻¹Xᵀ(XΛ⁻¹Xᵀ + I)⁻¹y, by one system of the samples' size in NumPy."""
    scaled = X.numpy() / lam.detach().numpy()
    gram = scaled @ X.numpy().T + np.eye(len(y))
    return torch.tensor(scaled.T @ np.linalg.solve(gram, y.numpy()))


def differentiable(lam: ig.LearnedLam, **settings: Any) -> Any:
    """`ridge` with gradients for λ: w is the point near 0 that has small squares."""
    near_zero = ig.proximal(half_squares, lam, convex=True)
    return ig.implicit(lambda _, X, y: ridge(lam(), X, y), near_zero, **settings)


def cross_validated(parts: Data) -> tuple[float, float]:
    """Ridge regression's best shared λ, leaving one sample out; the lasso's test error, 4 folds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV, RidgeCV

    X, y = (part.numpy() for part in parts.both())
    ridge_cv = RidgeCV(alphas=np.logspace(-1, 4, 31), fit_intercept=False).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the small end of the path
        lasso = LassoCV(eps=1e-2, cv=4, fit_intercept=False).fit(X, y)
    return float(ridge_cv.alpha_), error(torch.tensor(lasso.coef_), parts.test).item()


def descend(
    parts: Data, shared: float, steps: int, monitor: ig.Monitor
) -> tuple[Tensor, list[list[float]]]:
    """Adam on all log λ from a shared one; validation and test error of each step."""
    zero = torch.zeros(parts.train[0].shape[1], dtype=torch.float64)
    lam = ig.LearnedLam(zero, init=shared, per="element")
    solve = differentiable(lam, linear_solver=ig.CG(rtol=1e-4), monitor=monitor)
    adam, errors = torch.optim.Adam(lam.parameters(), lr=0.1), []
    for step in range(steps + 1):
        w = solve(zero, *parts.train)
        loss = error(w, parts.valid)
        errors.append([loss.item(), error(w.detach(), parts.test).item()])
        if step < steps:
            adam.zero_grad()
            loss.backward()
            adam.step()
    return lam().detach(), errors


def draw(lams: list[Tensor], curves: np.ndarray, scores: dict[str, list[float]]) -> Any:
    """Errors over the steps, and the λ of both kinds of features."""
    figure, (left, right) = panels(2)
    band(left, range(curves.shape[1]), curves[:, :, 0], BLUE, "validation", "--")
    band(left, range(curves.shape[1]), curves[:, :, 1], BLUE, "test")
    left.axhline(NOISE**2, color="black", linestyle=":", label="noise")
    for (name, values), colour in zip(scores.items(), (GREY, ORANGE, GREEN), strict=True):
        left.axhline(np.mean(values), color=colour, linestyle="-.", label=f"all samples: {name}")
    left.set(xlabel="outer step", ylabel="mean squared error", yscale="log", ylim=(0.6, 150))
    left.legend(frameon=False, fontsize=7, ncols=2, loc="upper right")
    log_lam = torch.stack(lams).log10().numpy()
    bins = np.linspace(log_lam.min(), log_lam.max(), 50)
    irrelevant, relevant = log_lam[:, RELEVANT:].ravel(), log_lam[:, :RELEVANT].ravel()
    right.hist(irrelevant, bins, density=True, color=GREY, alpha=0.7, label="irrelevant")
    right.hist(relevant, bins, density=True, color=GREEN, alpha=0.7, label="relevant")
    right.set(xlabel="log₁₀ λ of a feature", ylabel="density")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Learn the weights for several draws of the data; test errors by method."""
    chosen = options(__doc__, arguments, features=1000, samples=800, steps=40, seeds=5)
    lams, curves, monitor = [], [], ig.Monitor()
    names = "one λ, best of 31", "lasso, best of 100", f"{chosen.features} λ, hypergradient"
    scores: dict[str, list[float]] = {name: [] for name in names}
    for seed in progress(range(chosen.seeds), "ridge_weights"):
        parts = data(chosen.features, chosen.samples, seed)
        shared, lasso = cross_validated(parts)
        lam, errors = descend(parts, shared, chosen.steps, monitor)
        lams.append(lam)
        curves.append(errors)
        one, many = (
            error(ridge(x, *parts.both()), parts.test).item()
            for x in (torch.full_like(lam, shared), lam)
        )
        for name, value in zip(names, (one, lasso, many), strict=True):
            scores[name].append(value)
    print(f"test error, mean ± 95 % interval over {chosen.seeds} seeds; the noise is {NOISE**2:g}")
    for name, values in scores.items():
        print(f"  {name:28}{show(values)}")
    report = max(monitor.reports, key=lambda r: r.iterations)
    print(f"at most {report.iterations} CG iterations for the gradient by all λ; there the error")
    print(f"of u is at most {report.solve_error_bound:.1e}, relative residual ", end="")
    print(f"{report.linear_residual:.0e}")
    save(draw(lams, np.array(curves), scores), chosen.out, "ridge_weights")
    return scores


if __name__ == "__main__":
    main()
