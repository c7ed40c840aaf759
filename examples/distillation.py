"""Ten made-up digits to train on, instead of 1,000 real ones.

    python examples/distillation.py

Dataset distillation: softmax regression is trained on one picture for each class, and the pictures
themselves are learned by the hypergradient of the loss on 1,000 of scikit-learn's digits. Training
is a minimum (with a ridge), so it may be by any solver, and how long it takes costs no memory.
Gradient descent has not settled after 1,600 steps, and its unrolled derivative is another one: both
are measured. Held against ten real digits (the
mean of 10 draws), the mean digit of each class, and all 1,000. Each has the best of three
ridges on the test set; the learned pictures have the smallest one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import quiet  # noqa: F401
import torch
from compared import costs
from pictures import BLUE, GREY, band, interval, options, progress, save, show
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit_grad as ig

Part = tuple[Tensor, Tensor]
LABELS, RIDGE, LEARNED = torch.arange(10), 1e-3, "ten learned pictures"
RIDGES = (1e-3, 1e-2, 1e-1)
LENGTHS = (100, 400, 1600)
NEWTON = ig.solvers.NewtonCG(maxiter=20, cg=30, tol=1e-7)


def data(samples: int, seed: int) -> tuple[Part, Part]:
    """Digits to learn from, and to test on; pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    inputs, labels = torch.tensor(X / 16)[order], torch.tensor(y)[order]
    return (inputs[:samples], labels[:samples]), (inputs[samples:], labels[samples:])


def logits(W: Tensor, X: Tensor) -> Tensor:
    """Softmax regression; the last row is the intercept."""
    return X @ W[:-1] + W[-1]


def objective(W: Tensor, X: Tensor, y: Tensor, ridge: float = RIDGE) -> Tensor:
    """What training on these pictures minimises."""
    return cross_entropy(logits(W, X), y) + ridge / 2 * W.square().sum()


def start(X: Tensor, *_: Any) -> Tensor:
    """Where training begins."""
    return X.new_zeros(X.shape[1] + 1, 10)


def solver(**settings: Any) -> Any:
    """Training, differentiable by its pictures."""
    settings = {"linear_solver": ig.CG(rtol=1e-3), "init": start} | settings
    return ig.implicit(NEWTON, ig.argmin(objective), **settings)


def unrolled(X: Tensor, y: Tensor, steps: int) -> Tensor:
    """The same training by gradient descent, its steps 1 over the curvature, all in the graph."""
    W = start(X).requires_grad_()
    inputs = torch.cat([X.detach(), torch.ones_like(X[:, :1])], 1)
    lr = 1 / (torch.linalg.matrix_norm(inputs, 2) ** 2 / (2 * len(y)) + RIDGE)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(objective(W, X, y), W, create_graph=True)
        W = W - lr * slope
    return W


def accuracy(W: Tensor, part: Part) -> float:
    """The share of digits recognised, in %."""
    return 100 * (logits(W, part[0]).argmax(1) == part[1]).double().mean().item()


def trained_on(part: Part, test: Part) -> float:
    """Test accuracy with the best of the ridges."""
    solve = solver()
    with torch.no_grad():
        return max(accuracy(solve(*part, ridge), test) for ridge in RIDGES)


def means(part: Part) -> Part:
    """The mean digit of each class."""
    return torch.stack([part[0][part[1] == k].mean(0) for k in LABELS]), LABELS


def one_of_each(part: Part, draws: int, random: torch.Generator) -> list[Part]:
    """Ten real digits, several times."""
    classes = [part[0][part[1] == k] for k in LABELS]
    picks = [
        [int(torch.randint(len(c), (), generator=random)) for c in classes] for _ in range(draws)
    ]
    pairs = [zip(classes, pick, strict=True) for pick in picks]
    return [(torch.stack([c[i] for c, i in pair]), LABELS) for pair in pairs]


def distill(train: Part, test: Part, steps: int) -> tuple[Tensor, list[float]]:
    """Adam on ten pictures, from noise; they, and test accuracies."""
    pictures = 0.5 + 0.1 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).double()
    pictures.requires_grad_()
    solve, accuracies = solver(warm_start=True), []
    adam = torch.optim.Adam([pictures], lr=0.1)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    for step in range(steps + 1):
        W = solve(pictures, LABELS)
        accuracies.append(accuracy(W.detach(), test))
        if step < steps:
            adam.zero_grad()
            cross_entropy(logits(W, train[0]), train[1]).backward()
            adam.step()
            rate.step()
    return pictures.detach(), accuracies


def gradients(pictures: Tensor, train: Part) -> dict[str, Callable[[], Tensor]]:
    """Ways to a hypergradient: to the end, ours, and unrolled for so many steps."""

    def gradient(train_on: Any) -> Tensor:
        X = pictures.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(logits(train_on(X), train[0]), train[1]), X)[0]

    exact = ig.CG(rtol=1e-10)
    ways = {
        "implicit, to 1e-10": lambda: gradient(lambda X: solver(linear_solver=exact)(X, LABELS)),
        "implicit": lambda: gradient(lambda X: solver()(X, LABELS)),
    }
    for steps in LENGTHS:
        ways[f"unrolled, {steps} steps"] = lambda steps=steps: gradient(
            lambda X: unrolled(X, LABELS, steps)
        )
    return ways


def draw(pictures: Tensor, curves: list[list[float]], scores: dict[str, list[float]]) -> Any:
    """The pictures, and accuracy over the outer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    extreme = float(pictures.abs().max())
    for digit, panel in enumerate(left.subplots(2, 5).flat):
        picture = pictures[digit]
        panel.set_title(str(digit), fontsize=9)
        panel.imshow(picture.view(8, 8).numpy(), cmap="RdBu_r", vmin=-extreme, vmax=extreme)
        panel.axis("off")
    panel = right.subplots()
    band(panel, range(len(curves[0])), curves, BLUE, LEARNED)
    others = [name for name in scores if name != LEARNED]
    for name, style in zip(others, (":", "--", "-"), strict=True):
        panel.axhline(interval(scores[name])[0], color=GREY, linestyle=style, label=name)
    panel.set(xlabel="outer step", ylabel="test accuracy, %")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Compare on several splits; test accuracies by what was trained on."""
    chosen = options(__doc__, arguments, samples=1000, steps=150, seeds=3)
    scores: dict[str, list[float]] = {}
    curves = []
    for seed in progress(range(chosen.seeds), "distillation"):
        train, test = data(chosen.samples, seed)
        pictures, accuracies = distill(train, test, chosen.steps)
        curves.append(accuracies)
        real = one_of_each(train, 10, torch.Generator().manual_seed(seed))
        for name, value in (
            ("ten real digits", sum(trained_on(part, test) for part in real) / len(real)),
            ("the mean of each class", trained_on(means(train), test)),
            (f"all {chosen.samples} digits", trained_on(train, test)),
            (LEARNED, accuracies[-1]),
        ):
            scores.setdefault(name, []).append(value)
    costs(gradients(pictures, train))
    print(f"test accuracy in %, mean ± 95 % interval over {chosen.seeds} splits, trained on")
    for name, values in scores.items():
        print(f"  {name:26}{show(values, 1)}")
    save(draw(pictures, curves, scores), chosen.out, "distillation")
    return scores


if __name__ == "__main__":
    main()
