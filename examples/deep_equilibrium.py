"""A network of endless depth: a deep equilibrium layer learns scikit-learn's digits.

    python examples/deep_equilibrium.py

The layer's output is the fixed point z = tanh(Wz + Ux + b) of a map, found by Anderson's method, a
loop that autograd never sees (Bai, Kolter and Koltun, 2019, Deep equilibrium models). Backward is
one linear solve at z, so memory does not depend on how many iterations were taken; unrolling the
loop keeps all of them. The table compares with a single layer of the same width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pictures import BLUE, GREEN, GREY, ORANGE, band, options, panels, progress, save, show
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import implicit_grad as ig
from implicit_grad.testing import peak_memory

DEPTHS = (5, 10, 20, 40, 80)


class Layer(nn.Module):
    """z ↦ tanh(Wz + Ux + b) with ‖W‖₂ at most 0.9: a contraction, whatever the training does."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.outer = nn.Linear(inputs, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        W = 0.9 * self.inner / torch.linalg.matrix_norm(self.inner, 2).clamp_min(0.9)
        return torch.tanh(z @ W.T + self.outer(x))


def start(layer: Layer, x: Tensor) -> Tensor:
    """Where iterations begin."""
    return x.new_zeros(len(x), len(layer.inner))


def iteration(layer: Layer, x: Tensor, *, depth: int) -> Tensor:
    """Plain iteration; unrolled, it is a recurrent network of that depth."""
    z = start(layer, x)
    for _ in range(depth):
        z = layer(z, x)
    return z


@torch.no_grad()
def anderson(
    layer: Layer, x: Tensor, *, memory: int = 5, tol: float = 1e-4, depth: int = 50
) -> Tensor:
    """Anderson's method: the mix of the last images that makes their residuals cancel best."""
    z = start(layer, x)
    zs, images = [], []
    for _ in range(depth):
        zs, images = [*zs, z][-memory:], [*images, layer(z, x)][-memory:]
        residuals = torch.stack([f - z for f, z in zip(images, zs, strict=True)]).flatten(1)
        if residuals[-1].norm().item() <= tol * images[-1].norm().item():
            break
        gram = residuals @ residuals.T
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(zs)).to(gram)
        weights = torch.linalg.solve(gram, gram.new_ones(len(zs)))
        z = torch.tensordot(weights / weights.sum(), torch.stack(images), 1)
    return images[-1]


def equilibrium(layer: Layer, solver: Callable[..., Tensor], **settings: Any) -> Any:
    """The layer's fixed point as a function of x, differentiable in x and in the weights."""
    settings = {"linear_solver": ig.NormalCG(rtol=1e-3, maxiter=50)} | settings
    return ig.implicit(partial(solver, layer), ig.fixed_point(layer), **settings)


def digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Training and test digits: 1,347 and 450."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    X, y = torch.tensor(X[order] / 16).float(), torch.tensor(y[order])
    return [(X[:1347], y[:1347]), (X[1347:], y[1347:])]


def train(
    features: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], width: int, epochs: int
) -> Callable[[int], list[float]]:
    """Train features and a linear head; the test accuracy after each epoch, by seed."""

    def run(seed: int) -> list[float]:
        (X, y), (X_test, y_test) = digits(seed)
        head = nn.Linear(width, 10)
        adam = torch.optim.Adam([*parameters, *head.parameters()], lr=3e-3)
        accuracies = []
        for _ in range(epochs):
            for batch in torch.randperm(len(y)).split(64):
                adam.zero_grad()
                cross_entropy(head(features(X[batch])), y[batch]).backward()
                adam.step()
            with torch.no_grad():
                right = head(features(X_test)).argmax(1) == y_test
            accuracies.append(100 * right.double().mean().item())
        return accuracies

    return run


def memory(layer: Layer, x: Tensor) -> dict[str, list[float]]:
    """Peak KiB of a gradient after some numbers of iterations, implicit and unrolled."""

    def peak(features: Callable[[Tensor], Tensor]) -> float:
        return peak_memory(lambda: features(x).square().mean().backward()) / 2**10

    kinds: dict[str, list[float]] = {"implicit": [], "unrolled": []}
    for depth in DEPTHS:
        loop = partial(iteration, depth=depth)
        unrecorded = torch.no_grad()(loop)  # else the weights' graph grows while it runs
        kinds["implicit"].append(peak(equilibrium(layer, unrecorded, on_failure="ignore")))
        kinds["unrolled"].append(peak(partial(loop, layer)))
    return kinds


def draw(curves: dict[str, list[list[float]]], peaks: dict[str, list[float]]) -> Any:
    """Accuracy over the epochs, memory over the depth."""
    figure, (left, right) = panels(2)
    for (name, runs), colour in zip(curves.items(), (BLUE, GREY), strict=True):
        band(left, range(1, len(runs[0]) + 1), runs, colour, name)
    left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(85, 100))
    left.legend(frameon=False, loc="lower right")
    for (name, values), colour in zip(peaks.items(), (GREEN, ORANGE), strict=True):
        right.plot(DEPTHS, values, "o-", color=colour, label=name)
    right.set(xlabel="iterations of the layer", ylabel="peak memory of a gradient, KiB")
    right.set(xticks=DEPTHS, xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train both networks, weigh the gradients; the last test accuracies and the peaks."""
    chosen = options(__doc__, arguments, width=64, epochs=15, seeds=3)
    curves: dict[str, list[list[float]]] = {"equilibrium": [], "one layer": []}
    monitor = ig.Monitor()
    for seed in progress(range(chosen.seeds), "deep_equilibrium"):
        for name, runs in curves.items():
            torch.manual_seed(seed)
            layer = Layer(64, chosen.width)
            if name == "equilibrium":
                features, parameters = equilibrium(layer, anderson, monitor=monitor), layer
            else:
                features, parameters = nn.Sequential(layer.outer, nn.Tanh()), layer.outer
            runs.append(
                train(features, list(parameters.parameters()), chosen.width, chosen.epochs)(seed)
            )
    print(f"test accuracy in %, mean ± 95 % interval over {chosen.seeds} seeds")
    for name, runs in curves.items():
        print(f"  {name:14}{show([run[-1] for run in runs], 1)}")
    mean = np.mean([report.iterations for report in monitor.reports])
    failed = sum(not report.status.ok for report in monitor.reports)
    print(f"{len(monitor.reports)} backward solves, {mean:.1f} iterations each, {failed} failed")
    peaks = memory(Layer(64, chosen.width), digits(0)[0][0][:64])
    print(f"peak KiB of a gradient{'':10}" + "".join(f"{depth:8}" for depth in DEPTHS))
    for name, values in peaks.items():
        print(f"  {name:30}" + "".join(f"{value:8.0f}" for value in values))
    save(draw(curves, peaks), chosen.out, "deep_equilibrium")
    return {name: [run[-1] for run in runs] for name, runs in curves.items()} | peaks


if __name__ == "__main__":
    main()
