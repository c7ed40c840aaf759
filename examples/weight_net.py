"""Which losses to believe: a small net that weighs samples by their loss, under label noise.

    python examples/weight_net.py
    python examples/weight_net.py --epochs 100 --steps 60 --seeds 10   # minutes

Meta-Weight-Net (Shu et al., 2019): training goes along the sum of w(l) ∇l, where l is a sample's
loss and w a small net. There w is learned by what the next step does to the loss on clean samples;
here by what a whole training does, of which nothing is kept. Of 800 of scikit-learn's digits 40 %
have a label drawn at random; 80 are known to be right (label_noise.py learns a weight for each
sample). A step along w(l) ∇l is one down W(l), W' = w, so that is what the condition says: w is
made of sigmoids, and W of their integrals.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import quiet  # noqa: F401
import torch
from compared import costs, unrolled
from label_noise import Data, Part, data
from pictures import BLUE, GREY, ORANGE, band, interval, options, panels, progress, save, show
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

import implicit_grad as ig

LR, MOMENTUM, BATCH, DECAY, UNITS = 0.1, 0.9, 50, 1e-3, 8
LEARNED, PUBLISHED = "learned by whole trainings", "learned by single steps"


class WeightNet(nn.Module):
    """w(l), a mean of sigmoids, from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.linspace(-2, 2, UNITS).double())
        self.shifts = nn.Parameter(torch.zeros(UNITS).double())
        self.shares = nn.Parameter(torch.zeros(UNITS).double())

    def forward(self, losses: Tensor) -> Tensor:
        """The weight of each sample."""
        return self._inside(losses).sigmoid() @ self.shares.softmax(0)

    def integral(self, losses: Tensor) -> Tensor:
        """W(l) with W' = w."""
        return softplus(self._inside(losses)) / self.slopes @ self.shares.softmax(0)

    def _inside(self, losses: Tensor) -> Tensor:
        return losses[:, None] * self.slopes + self.shifts


def classifier(seed: int) -> nn.Sequential:
    """Of digits with 64 pixels and a 1."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(65, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def losses(model: nn.Module, part: Part) -> Tensor:
    """Of each sample."""
    return cross_entropy(model(part[0]), part[1], reduction="none")


def batches(part: Part, epochs: int) -> Iterator[Part]:
    """Those of a training, in another order in each epoch."""
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(part[1]), generator=order).split(BATCH):
            yield part[0][rows], part[1][rows]


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer, with its weight decay."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def step(model: nn.Module, net: nn.Module, batch: Part, optimizer: torch.optim.SGD) -> None:
    """Along w(l) ∇l: the weights are constants."""
    optimizer.zero_grad()
    each = losses(model, batch)
    (net(each).detach() * each).mean().backward()
    optimizer.step()


def train(model: nn.Module, net: nn.Module, part: Part, epochs: int) -> nn.Module:
    """An existing loop."""
    optimizer = sgd(model)
    for batch in batches(part, epochs):
        step(model, net, batch, optimizer)
    return model


def objective(model: nn.Module, net: WeightNet, part: Part, *_: Any) -> Tensor:
    """What its steps go down on."""
    decay = DECAY / 2 * sum(p.square().sum() for p in model.parameters())
    return net.integral(losses(model, part)).mean() + decay


def differentiable(samples: int, epochs: int, solver: Any = train, **settings: Any) -> Any:
    """The loop, wrapped."""
    time = ig.training_time(sgd(nn.Linear(1, 1)), steps=epochs * -(-samples // BATCH))
    settings = {"linear_solver": ig.EarlyStopped(time=time)} | settings
    return ig.implicit(solver, ig.argmin(objective), **settings)


def learn(parts: Data, start: nn.Module, epochs: int, steps: int) -> tuple[WeightNet, list[float]]:
    """Adam on the net by what a whole training does; the net, and test accuracies."""
    net, accuracies = WeightNet(), []
    solve = differentiable(len(parts.wrong), epochs)
    adam = torch.optim.Adam(net.parameters(), lr=0.3)
    for outer in range(steps + 1):
        model = solve(start, net, parts.train, epochs)
        accuracies.append(recognised(model, parts.test))
        if outer < steps:
            adam.zero_grad()
            losses(model, parts.clean).mean().backward()
            adam.step()
    return net, accuracies


def first_step(model: nn.Module, net: nn.Module, batch: Part) -> nn.Module:
    """Of the loop."""
    step(model, net, batch, sgd(model))
    return model


def as_published(parts: Data, model: nn.Module, epochs: int) -> tuple[WeightNet, nn.Module]:
    """The net and the classifier side by side: before each step, the net learns by what it does."""
    net, optimizer = WeightNet(), sgd(model)
    ahead = ig.EarlyStopped(steps=1, lr=LR)
    solve = ig.implicit(first_step, ig.argmin(objective), linear_solver=ahead)
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    for batch in batches(parts.train, epochs):
        adam.zero_grad()
        losses(solve(model, net, batch), parts.clean).mean().backward()
        adam.step()
        step(model, net, batch, optimizer)
    return net, model


def recognised(model: nn.Module, part: Part) -> float:
    """The share of digits recognised, in %."""
    with torch.no_grad():
        return 100 * (model(part[0]).argmax(1) == part[1]).double().mean().item()


def noisy(samples: int, seed: int) -> Data:
    """A split in which a wrong label is any."""
    parts = data(samples, seed)
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(10, parts.wrong.shape, generator=random)
    labels = torch.where(parts.wrong, drawn, parts.train[1])
    return parts._replace(train=(parts.train[0], labels))


def gradients(parts: Data, start: nn.Module, epochs: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to the gradient by the net's parameters; the first one is exact."""
    net = WeightNet()
    outer = lambda model: losses(model, parts.clean).mean()  # noqa: E731

    def by_steps() -> Tensor:
        steps = ((batch, LR) for batch in batches(parts.train, epochs))
        return unrolled(start, lambda m, batch: objective(m, net, batch), steps, outer, MOMENTUM)

    def implicit(**settings: Any) -> Tensor:
        solve = differentiable(len(parts.wrong), epochs, **settings)
        return outer(solve(start, net, parts.train, epochs))

    def flat(loss: Callable[[], Tensor]) -> Tensor:
        return torch.cat(torch.autograd.grad(loss(), list(net.parameters())))

    return {"unrolled": lambda: flat(by_steps), "EarlyStopped": lambda: flat(implicit)}


def draw(nets: dict[str, list[WeightNet]], curves: Any, scores: dict[str, list[float]]) -> Any:
    """The weight of each loss, and accuracy over the outer steps."""
    figure, (left, right) = panels(2)
    grid = torch.linspace(0, 6, 100).double()
    for (name, found), color in zip(nets.items(), (BLUE, ORANGE), strict=True):
        with torch.no_grad():
            band(left, grid, torch.stack([net(grid) for net in found]), color, name)
    left.set(xlabel="loss of a sample", ylabel="its weight")
    left.legend(frameon=False, fontsize=8)
    band(right, range(len(curves[0])), curves, BLUE, LEARNED)
    others = [name for name in scores if name != LEARNED]
    for name, style in zip(others, (":", "-.", "--"), strict=True):
        color = ORANGE if name == PUBLISHED else GREY
        right.axhline(interval(scores[name])[0], color=color, linestyle=style, label=name)
    right.set(xlabel="outer step", ylabel="test accuracy, %")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare on several splits: test accuracies, and what gradients cost."""
    chosen = options(__doc__, arguments, samples=800, epochs=30, steps=10, seeds=3)
    scores: dict[str, list[float]] = {}
    nets: dict[str, list[WeightNet]] = {LEARNED: [], PUBLISHED: []}
    curves = []
    for seed in progress(range(chosen.seeds), "weight_net"):
        parts, start = noisy(chosen.samples, seed), classifier(seed)
        net, accuracies = learn(parts, start, chosen.epochs, chosen.steps)
        other, model = as_published(parts, copy.deepcopy(start), chosen.epochs)
        alone = train(copy.deepcopy(start), WeightNet(), parts.clean, 10 * chosen.epochs)
        for name, value in (
            ("all weights 1/2", accuracies[0]),
            ("clean samples only", recognised(alone, parts.test)),
            (PUBLISHED, recognised(model, parts.test)),
            (LEARNED, accuracies[-1]),
        ):
            scores.setdefault(name, []).append(value)
        curves.append(accuracies)
        nets[LEARNED].append(net)
        nets[PUBLISHED].append(other)
    print(f"test accuracy in %, mean ± 95 % interval over {chosen.seeds} splits")
    for name, values in scores.items():
        print(f"  {name:28}{show(values, 1)}")
    print("a gradient by the net, against that of all steps")
    told = costs(gradients(parts, start, chosen.epochs))
    save(draw(nets, curves, scores), chosen.out, "weight_net")
    return {**scores, "costs": told}


if __name__ == "__main__":
    main()
