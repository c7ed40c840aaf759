"""A weight decay for each layer of a CNN, learned through a loop that shuffles and stops early.

    python examples/layer_decay.py
    python examples/layer_decay.py --samples 1000 --epochs 150   # minutes

The loop is as people have it: SGD with momentum and a cosine over a DataLoader, a group of
parameters for each layer, with its own `weight_decay`. `differentiable` has the lines that change:
what the loop minimises, by batches; the penalty that `weight_decay` stands for; how long it trains.
Of 200 of scikit-learn's digits 30 % have a label drawn at random; 200 others tell which decays are
good. Held against the best of a grid of one decay for all layers, chosen by the same 200; and the
gradient against the derivative of all steps, unrolled.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import quiet  # noqa: F401
import torch
from compared import by_torchopt, costs, unrolled
from pictures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    band,
    interval,
    options,
    panels,
    progress,
    save,
    show,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import implicit_grad as ig

WRONG, VALID, BATCH, LR, MOMENTUM, START = 0.3, 200, 50, 0.1, 0.9, -7.0
GRID = torch.arange(-7, -2.9, 0.5).double()
DEFAULT = {"linear_solver": None, "on_failure": "ignore"}
LAYERS = ("first convolution", "second convolution", "last layer")
Part = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Digits to train on, shuffled in each epoch; to choose decays by; and to test on."""

    loader: DataLoader[Any]
    valid: Part
    test: Part


def data(samples: int, seed: int) -> Data:
    """A split of the digits; a wrong label is any."""
    from sklearn.datasets import load_digits

    random = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = random.permutation(len(labels))
    X, y = torch.tensor(images)[order].view(-1, 1, 8, 8), torch.tensor(labels)[order]
    X = (X - X.mean()) / X.std()
    wrong = torch.tensor(random.random(samples) < WRONG)
    noisy = torch.where(wrong, torch.tensor(random.integers(10, size=samples)), y[:samples])
    shuffle = torch.Generator()
    loader = DataLoader(TensorDataset(X[:samples], noisy), BATCH, shuffle=True, generator=shuffle)
    end = samples + VALID
    return Data(loader, (X[samples:end], y[samples:end]), (X[end:], y[end:]))


def network(seed: int) -> nn.Sequential:
    """Two convolutions and a linear layer."""
    torch.manual_seed(seed)
    features = nn.Conv2d(1, 6, 3), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(6, 12, 3), nn.GELU()
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(12, 10)).double()


def layers(model: nn.Module) -> list[nn.Module]:
    """Those with parameters."""
    return [layer for layer in model.children() if list(layer.parameters())]


def train(model: nn.Module, log_decays: Tensor, loader: Any, epochs: int) -> nn.Module:
    """An existing loop."""
    decays = zip(layers(model), log_decays.exp().tolist(), strict=True)
    groups = [{"params": layer.parameters(), "weight_decay": w} for layer, w in decays]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    loader.generator.manual_seed(0)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    return model


def misfit(model: nn.Module, batch: Part, _: Tensor, loader: Any, *__: Any) -> Tensor:
    """A batch's share of the mean loss."""
    return cross_entropy(model(batch[0]), batch[1], reduction="sum") / len(loader.dataset)


def penalty(model: nn.Module, log_decays: Tensor, *_: Any) -> Tensor:
    """What `weight_decay` is the gradient of."""
    pairs = zip(layers(model), log_decays.exp(), strict=True)
    return sum((w / 2 * p.square().sum() for layer, w in pairs for p in layer.parameters()))


def differentiable(loader: Any, epochs: int, solver: Any = train, **settings: Any) -> Any:
    """The loop, wrapped."""
    sgd, every = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=MOMENTUM), len(loader)
    schedule = lambda optimizer: CosineAnnealingLR(optimizer, epochs)  # noqa: E731
    time = ig.training_time(sgd, schedule, steps=epochs * every, every=every)
    condition = ig.argmin(misfit, batches=loader, regularizer=penalty)
    settings = {"linear_solver": ig.EarlyStopped(time=time)} | settings
    return ig.implicit(solver, condition, **settings)


def loss(model: nn.Module, part: Part) -> Tensor:
    """On digits that were not trained on."""
    return cross_entropy(model(part[0]), part[1])


def accuracy(model: nn.Module, part: Part) -> float:
    """The share of digits recognised, in %."""
    with torch.no_grad():
        return 100 * (model(part[0]).argmax(1) == part[1]).double().mean().item()


def learn(parts: Data, start: nn.Module, epochs: int, steps: int) -> tuple[nn.Module, Tensor]:
    """Adam on the logs of the decays; the last model, and the decays on the way."""
    solve, path = differentiable(parts.loader, epochs), []
    logs = torch.full((len(LAYERS),), START).double().requires_grad_()
    adam = torch.optim.Adam([logs], lr=0.4)
    for step in range(steps + 1):
        model = solve(start, logs, parts.loader, epochs)
        path.append(logs.detach().clone())
        if step < steps:
            adam.zero_grad()
            loss(model, parts.valid).backward()
            adam.step()
    return model, torch.stack(path)


def best_of_grid(parts: Data, start: nn.Module, epochs: int) -> tuple[nn.Module, list[float]]:
    """The model of the one decay that is best on the digits to choose by; and the losses of all."""
    grid = [log.expand(len(LAYERS)) for log in GRID]
    models = [train(copy.deepcopy(start), logs, parts.loader, epochs) for logs in grid]
    losses = [loss(model, parts.valid).item() for model in models]
    return models[int(np.argmin(losses))], losses


def gradients(parts: Data, start: nn.Module, epochs: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to the gradient by the decays, on the way to the best; the first one is exact."""
    at = torch.full((len(LAYERS),), -5.0).double().requires_grad_()
    outer = lambda model: loss(model, parts.valid)  # noqa: E731
    whole = parts.loader.dataset.tensors

    def steps() -> Iterator[tuple[Part, float]]:
        parts.loader.generator.manual_seed(0)
        for epoch in range(epochs):
            lr = LR * (1 + np.cos(np.pi * epoch / epochs)) / 2
            yield from ((batch, lr) for batch in parts.loader)

    def objective(model: nn.Module, logs: Tensor) -> Tensor:
        return loss(model, whole) + penalty(model, logs)

    def by_steps() -> Tensor:
        step_loss = lambda model, batch: loss(model, batch) + penalty(model, at)  # noqa: E731
        return unrolled(start, step_loss, steps(), outer, MOMENTUM)

    def implicit(**settings: Any) -> Tensor:
        return outer(
            differentiable(parts.loader, epochs, **settings)(start, at, parts.loader, epochs)
        )

    def torchopt() -> Tensor:
        model = train(copy.deepcopy(start), at.detach(), parts.loader, epochs)
        return by_torchopt(model, objective, outer, at)

    ways = {
        "unrolled": lambda: torch.autograd.grad(by_steps(), at)[0],
        "EarlyStopped": lambda: torch.autograd.grad(implicit(), at)[0],
        "CG, the default": lambda: torch.autograd.grad(implicit(**DEFAULT), at)[0],
    }
    return ways | ({"TorchOpt, data in one graph": torchopt} if find_spec("torchopt") else {})


def draw(curves: list[list[float]], found: list[float], paths: Tensor) -> Any:
    """The loss along the grid, above the best there, and where the decays of the layers went."""
    figure, (left, right) = panels(2)
    best = np.min(curves, 1)
    band(left, GRID, np.array(curves) - best[:, None], GREY, "one decay for all layers")
    left.axhline(interval(found - best)[0], color=BLUE, label="learned, one for each")
    left.set(xlabel="log of the decay", ylabel="loss above the best of the grid")
    left.set(ylim=(-0.05, 0.5))
    left.legend(frameon=False, fontsize=8)
    for layer, color, name in zip(paths.unbind(-1), (BLUE, GREEN, ORANGE), LAYERS, strict=True):
        band(right, range(layer.shape[1]), layer, color, name)
    right.set(xlabel="outer step", ylabel="log of the decay")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare on several splits: test accuracies, and the errors of the gradients."""
    chosen = options(__doc__, arguments, samples=200, epochs=60, steps=10, seeds=3)
    scores: dict[str, list[float]] = {}
    curves, found, paths = [], [], []
    for seed in progress(range(chosen.seeds), "layer_decay"):
        parts, start = data(chosen.samples, seed), network(seed)
        learned, path = learn(parts, start, chosen.epochs, chosen.steps)
        gridded, losses = best_of_grid(parts, start, chosen.epochs)
        undecayed = train(copy.deepcopy(start), path[0] - 20, parts.loader, chosen.epochs)
        for name, model in (
            ("no decay", undecayed),
            (f"one decay, the best of {len(GRID)}", gridded),
            ("a learned decay for each layer", learned),
        ):
            scores.setdefault(name, []).append(accuracy(model, parts.test))
        curves.append(losses)
        found.append(loss(learned, parts.valid).item())
        paths.append(path)
    print(f"test accuracy in %, mean ± 95 % interval over {chosen.seeds} splits")
    for name, values in scores.items():
        print(f"  {name:32}{show(values, 1)}")
    print("a gradient by the decays, against that of all steps")
    ways = gradients(parts, start, chosen.epochs)
    errors = costs(ways)
    save(draw(curves, found, torch.stack(paths)), chosen.out, "layer_decay")
    return {**scores, "losses": {"learned": found, "grid": curves}, "costs": errors}


if __name__ == "__main__":
    main()
