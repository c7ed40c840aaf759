"""scikit-learn's LogisticRegression, its C tuned by gradient descent on the validation loss.

    python examples/logistic_regression.py

The data are measurements of 569 tumours, which ship with scikit-learn. scikit-learn finds the
weights, in code that autograd never sees; `implicit` only needs to know what they minimise. The
hypergradient is compared with finite differences of whole fits; the picture shows losses on a grid
of C, which takes one fit for each point, and the path of the descent, from both sides.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

import implicit_grad as ig

Data = tuple[Tensor, Tensor]
STARTS = (1e-4, 1e3)
GRID = np.logspace(-4.5, 4, 52)


def load(seed: int) -> tuple[Data, Data, Data]:
    """Training, validation and test sets: 171, 199 and 199 tumours, features standardised."""
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    parts = np.split(order, [171, 370])
    mean, spread = X[parts[0]].mean(0), X[parts[0]].std(0)
    X = (X - mean) / spread
    train, valid, test = ((torch.tensor(X[p]), torch.tensor(y[p]).double()) for p in parts)
    return train, valid, test


def log_loss(w: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
    """The mean negative log-likelihood of labels y in {0, 1}."""
    z = X @ w["coefficients"] + w["intercept"]
    return (softplus(z) - y * z).mean()


def objective(w: dict[str, Tensor], log_C: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """What scikit-learn's documentation says that LogisticRegression minimises, over C."""
    return log_loss(w, X, y) * len(y) + w["coefficients"].square().sum() / (2 * log_C.exp())


def fit(log_C: Tensor, X: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """scikit-learn, as anyone would call it, but for a tolerance that is worth a gradient."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=math.exp(log_C), solver="newton-cholesky", tol=1e-10)
    model.fit(X.numpy(), y.numpy())
    return {"coefficients": model.coef_[0], "intercept": model.intercept_[0]}


def descend(C: float, train: Data, valid: Data, steps: int) -> list[dict[str, float]]:
    """Gradient descent on the validation loss as a function of log C; one row for each step.

    The step length is that of Barzilai and Borwein (1988), at most a factor e² in C.
    """
    solve = ig.implicit(fit, ig.argmin(objective), on_failure="raise")
    log_C, rows = torch.tensor(math.log(C), dtype=torch.float64), []
    length = math.inf
    for _ in range(steps):
        log_C = log_C.detach().requires_grad_()
        loss = log_loss(solve(log_C, *train), *valid)
        (slope,) = torch.autograd.grad(loss, [log_C])
        rows.append({"log_C": log_C.item(), "loss": loss.item(), "slope": slope.item()})
        if len(rows) > 1:
            before, here = rows[-2:]
            change = here["slope"] - before["slope"]
            curvature = change / (here["log_C"] - before["log_C"])
            length = 1 / curvature if curvature > 0 else math.inf
        if abs(slope) < 1e-8:
            break
        step = -min(length * abs(slope.item()), 2.0) * math.copysign(1.0, slope.item())
        log_C = log_C + step
    return rows


def finite_difference(log_C: float, train: Data, valid: Data, step: float = 1e-3) -> float:
    """The same slope from four fits of scikit-learn, to fourth order."""

    def loss(shift: float) -> float:
        at = torch.tensor(log_C + shift, dtype=torch.float64)
        w = {name: torch.as_tensor(value) for name, value in fit(at, *train).items()}
        return log_loss(w, *valid).item()

    near, far = loss(step) - loss(-step), loss(2 * step) - loss(-2 * step)
    return (8 * near - far) / (12 * step)


def curves(train: Data, valid: Data, test: Data) -> dict[str, list[float]]:
    """Validation and test loss for each C of the grid."""
    losses: dict[str, list[float]] = {"validation": [], "test": []}
    for C in GRID:
        fitted = fit(torch.tensor(math.log(C)).double(), *train)
        w = {name: torch.as_tensor(value) for name, value in fitted.items()}
        losses["validation"].append(log_loss(w, *valid).item())
        losses["test"].append(log_loss(w, *test).item())
    return losses


def draw(losses: dict[str, list[float]], paths: list[list[dict[str, float]]], path: Path) -> None:
    """Losses against C, and the descents on the validation curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name, style in (("validation", "-"), ("test", "--")):
        axes.plot(GRID, losses[name], style, color="0.35", label=f"{name} loss, 52 fits")
    for rows, colour, marker in zip(paths, ("tab:blue", "tab:orange"), "os", strict=True):
        C = [math.exp(row["log_C"]) for row in rows]
        label = f"descent from C = {C[0]:g}, {len(C)} fits"
        axes.plot(C, [row["loss"] for row in rows], marker, ms=5, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="C", ylabel="mean log loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Tune C from both sides; print each step, and save the picture."""
    parser = argparse.ArgumentParser(description="Tune C of LogisticRegression by hypergradients.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--steps", type=int, default=25, help="the most steps of a descent")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the data")
    options = parser.parse_args()
    train, valid, test = load(options.seed)
    start = time.perf_counter()
    paths = [descend(C, train, valid, options.steps) for C in STARTS]
    seconds = time.perf_counter() - start
    losses = curves(train, valid, test)
    for rows in paths:
        print(f"{'C':>12}{'validation loss':>18}{'d loss/d log C':>18}{'finite difference':>20}")
        for row in rows:
            reference = finite_difference(row["log_C"], train, valid)
            print(f"{math.exp(row['log_C']):12.5g}{row['loss']:18.8f}", end="")
            print(f"{row['slope']:18.10f}{reference:20.10f}")
    best = int(np.argmin(losses["validation"]))
    tuned = " and ".join(f"{math.exp(rows[-1]['log_C']):.4f}" for rows in paths)
    print(
        f"descents end at C = {tuned} after {sum(map(len, paths))} fits in {seconds:.1f} s; ",
        end="",
    )
    print(f"the best of {len(GRID)} on the grid is {GRID[best]:.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "logistic_regression.png"
    draw(losses, paths, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
