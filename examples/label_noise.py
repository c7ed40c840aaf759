"""Which labels to believe: a weight for each training sample, learned by hypergradient.

    python examples/label_noise.py

Of 800 of scikit-learn's digits 40 % are labelled as the next digit; 80 more are known to be right.
Softmax regression, solved by L-BFGS, takes a weight for each sample; the hypergradient of the 80
samples' loss tells what each weight does to them. The baselines may train on the 80, too, and get
the L2 penalty of a grid that is best for them on each test set; the learned weights have e⁻⁵, one
of the better of four on two of the splits. Where wrong labels are spread evenly over the other
digits, softmax regression hardly minds them, and weights gained next to nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pictures import BLUE, GREY, RED, band, interval, options, panels, progress, save, show
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit_grad as ig

WRONG, LOG_LAM, LEARNED = 0.4, -5.0, "learned weights"
Part = tuple[Tensor, Tensor]
LBFGS = ig.solvers.TorchOptim(
    factory=lambda w: torch.optim.LBFGS(w, max_iter=20, line_search_fn="strong_wolfe"),
    tol=3e-5,
    steps=20,
)


class Data(NamedTuple):
    """Digits; `wrong` says which training labels are."""

    train: Part
    clean: Part
    test: Part
    wrong: Tensor

    def oracle(self) -> Part:
        """Only the training samples with right labels."""
        return self.train[0][~self.wrong], self.train[1][~self.wrong]

    def both(self) -> Part:
        """Training samples as they are, and the clean ones."""
        return torch.cat([self.train[0], self.clean[0]]), torch.cat([self.train[1], self.clean[1]])


def data(samples: int, seed: int) -> Data:
    """A split of the digits; a wrong label is the next digit, and 0 for 9."""
    from sklearn.datasets import load_digits

    random = np.random.default_rng(seed)
    X, y = load_digits(return_X_y=True)
    X = torch.tensor(np.c_[X / 16, np.ones(len(X))])  # a last feature for the intercept
    y = torch.tensor(y)
    train, clean, test = np.split(random.permutation(len(y)), [samples, samples + samples // 10])
    wrong = torch.tensor(random.random(samples) < WRONG)
    noisy = torch.where(wrong, (y[train] + 1) % 10, y[train])
    return Data((X[train], noisy), (X[clean], y[clean]), (X[test], y[test]), wrong)


def objective(W: Tensor, logits: Tensor, log_lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Softmax regression; a sample's weight is the sigmoid of its logit."""
    loss = logits.sigmoid() @ cross_entropy(X @ W, y, reduction="none") / len(y)
    return loss + log_lam.exp() / 2 * W.square().sum()


def start(logits: Tensor, log_lam: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Where L-BFGS begins."""
    return X.new_zeros(X.shape[1], 10)


def accuracy(W: Tensor, part: Part) -> float:
    """The share of digits recognised."""
    return ((part[0] @ W).argmax(1) == part[1]).double().mean().item()


def solver(**settings: Any) -> Any:
    """Softmax regression, differentiable in everything that it is given."""
    settings = {"linear_solver": ig.CG(rtol=1e-3), "init": start} | settings
    return ig.implicit(LBFGS, ig.argmin(objective), **settings)


def unweighted(train: Part, test: Part) -> float:
    """Test accuracy with all weights ½, of the best penalty."""
    logits, solve = train[0].new_zeros(len(train[1])), solver()
    grid = torch.linspace(-8, -3, 6, dtype=torch.float64)
    return max(accuracy(solve(logits, log_lam, *train), test) for log_lam in grid)


def learn(parts: Data, steps: int, monitor: ig.Monitor) -> tuple[Tensor, list[float]]:
    """Adam on the samples' logits by the clean ones' loss; the weights, and test accuracies."""
    solve, log_lam = solver(monitor=monitor), torch.tensor(LOG_LAM, dtype=torch.float64)
    logits = parts.train[0].new_zeros(len(parts.wrong)).requires_grad_()
    adam, accuracies = torch.optim.Adam([logits], lr=0.3), []
    for step in range(steps + 1):
        W = solve(logits, log_lam, *parts.train)
        accuracies.append(100 * accuracy(W.detach(), parts.test))
        if step < steps:
            adam.zero_grad()
            cross_entropy(parts.clean[0] @ W, parts.clean[1]).backward()
            adam.step()
    return logits.detach().sigmoid(), accuracies


def draw(
    curves: list[list[float]], weights: Tensor, wrong: Tensor, scores: dict[str, list[float]]
) -> Any:
    """Accuracy over the outer steps, and the weights of both kinds of samples."""
    figure, (left, right) = panels(2)
    band(left, range(len(curves[0])), curves, BLUE, LEARNED)
    baselines = [name for name in scores if name != LEARNED]
    for name, style in zip(baselines, ("-", "--", ":", "-."), strict=True):
        left.axhline(interval(scores[name])[0], color=GREY, linestyle=style, label=name)
    left.set(xlabel="outer step", ylabel="test accuracy, %")
    left.legend(frameon=False, fontsize=8)
    bins = np.linspace(0, 1, 30)
    right.hist(weights[~wrong], bins, color=BLUE, alpha=0.6, label="right label")
    right.hist(weights[wrong], bins, color=RED, alpha=0.6, label="wrong label")
    right.set(xlabel="learned weight of a sample", ylabel="samples")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Compare the methods on several splits; test accuracies by method."""
    chosen = options(__doc__, arguments, samples=800, steps=20, seeds=5)
    scores: dict[str, list[float]] = {}
    curves, weights, wrong, monitor = [], [], [], ig.Monitor()
    for seed in progress(range(chosen.seeds), "label_noise"):
        parts = data(chosen.samples, seed)
        learned, accuracies = learn(parts, chosen.steps, monitor)
        for name, train in (
            ("noisy samples", parts.train),
            ("noisy and clean samples", parts.both()),
            ("clean samples only", parts.clean),
            ("oracle: right labels only", parts.oracle()),
        ):
            scores.setdefault(name, []).append(100 * unweighted(train, parts.test))
        scores.setdefault(LEARNED, []).append(accuracies[-1])
        curves.append(accuracies)
        weights.append(learned)
        wrong.append(parts.wrong)
    print(f"test accuracy in %, mean ± 95 % interval over {chosen.seeds} splits")
    for name, values in scores.items():
        print(f"  {name:28}{show(values, 1)}")
    told = ((torch.cat(weights) < 0.5) == torch.cat(wrong)).double().mean()
    print(f"a weight below ½ tells wrong from right labels in {100 * told:.1f} % of samples")
    failed = sum(not report.status.ok for report in monitor.reports)
    print(f"{len(monitor.reports)} backward solves, {failed} of them failed")
    save(draw(curves, torch.cat(weights), torch.cat(wrong), scores), chosen.out, "label_noise")
    return scores


if __name__ == "__main__":
    main()
