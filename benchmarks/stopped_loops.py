"""Training loops as people write them, small, in float64, on data made here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, softplus

F64 = torch.float64
Weights = dict[str, Tensor]
Rows = Tensor | slice
ALL = slice(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """SGD on `objective(φ, argument, rows)` from `start(argument)`.

    `batch` of `data` rows make a step (0: all of them), in another order each epoch. With `lam` the
    inner problem has λ/2 ‖φ − start‖² besides.
    """

    argument: Tensor
    start: Callable[[Tensor], Weights]
    objective: Callable[[Weights, Tensor, Rows], Tensor]
    outer: Callable[[Weights], Tensor]
    lr: float
    epochs: int
    momentum: float = 0.0
    data: int = 0
    batch: int = 0
    cosine: bool = False
    lam: float = 0.0

    @property
    def every(self) -> int:
        """Steps in an epoch."""
        return self.data // self.batch if self.batch else 1

    @property
    def steps(self) -> int:
        """All of them."""
        return self.epochs * self.every

    def times(self, length: int) -> Loop:
        """The loop with so many times the epochs."""
        return dataclasses.replace(self, epochs=length * self.epochs)

    def optimizer(self, weights: Iterable[Tensor]) -> torch.optim.SGD:
        """Of these weights."""
        return torch.optim.SGD(list(weights), lr=self.lr, momentum=self.momentum)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Steps of one length, or of one that falls to 0 along a cosine; once an epoch."""

        def factor(epoch: int) -> float:
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2 if self.cosine else 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def batches(self, epoch: int) -> list[Rows]:
        """The rows of each step."""
        if not self.batch:
            return [ALL]
        order = torch.randperm(self.data, generator=torch.Generator().manual_seed(epoch))
        return list(order.split(self.batch)[: self.every])

    def whole(self, phi: Weights, argument: Tensor, rows: Rows) -> Tensor:
        """The objective, with the proximal term."""
        value = self.objective(phi, argument, rows)
        if not self.lam:
            return value
        start = self.start(argument)
        return value + self.lam / 2 * sum((phi[k] - start[k]).square().sum() for k in phi)

    def train(self) -> Weights:
        """The weights that torch's optimizer leaves."""
        return self.path(1)[-1][0]

    def path(self, pieces: int) -> list[tuple[Weights, float]]:
        """What it leaves after each of so many pieces, and the time Σ lr/(1 − momentum) of each."""
        phi = {k: p.detach().clone().requires_grad_() for k, p in self.start(self.argument).items()}
        optimizer = self.optimizer(phi.values())
        scheduler = self.schedule(optimizer)
        ends = [round(self.steps * (k + 1) / pieces) for k in range(pieces)]
        found: list[tuple[Weights, float]] = []
        step, time = 0, 0.0
        for epoch in range(self.epochs):
            for rows in self.batches(epoch):
                optimizer.zero_grad()
                self.whole(phi, self.argument, rows).backward()
                optimizer.step()
                step, time = step + 1, time + optimizer.param_groups[0]["lr"] / (1 - self.momentum)
                if step in ends:
                    found.append(({k: p.detach().clone() for k, p in phi.items()}, time))
                    time = 0.0
            scheduler.step()
        return found

    def unrolled(self, argument: Tensor) -> Weights:
        """The same steps, all of them in the graph."""
        start = self.start(argument)
        phi = {k: p if p.requires_grad else p.clone().requires_grad_() for k, p in start.items()}
        velocity = {k: torch.zeros_like(p) for k, p in phi.items()}
        clock = self.optimizer([torch.zeros(1)])
        scheduler = self.schedule(clock)
        for epoch in range(self.epochs):
            lr = clock.param_groups[0]["lr"]
            for rows in self.batches(epoch):
                value = self.whole(phi, argument, rows)
                slope = torch.autograd.grad(value, list(phi.values()), create_graph=True)
                velocity = {
                    k: self.momentum * v + g
                    for (k, v), g in zip(velocity.items(), slope, strict=True)
                }
                phi = {k: p - lr * velocity[k] for k, p in phi.items()}
            clock.step()
            scheduler.step()
        return phi


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def network(seed: int, *layers: nn.Module) -> tuple[Callable[[Weights, Tensor], Tensor], Weights]:
    """A network as a function of its weights, and those it starts with, PyTorch's own."""
    net = nn.Sequential(*layers).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.reset_parameters()
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    return lambda phi, X: functional_call(net, phi, (X,)), start


def perceptron(seed: int, *widths: int) -> tuple[Callable[[Weights, Tensor], Tensor], Weights]:
    """A tanh network with one hidden layer."""
    inputs, hidden, outputs = widths
    return network(seed, nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def decay(phi: Weights, logs: Tensor) -> Tensor:
    """Σ e^w/2 ‖p‖², with a w for each tensor p."""
    return sum((w / 2 * p.square().sum() for w, p in zip(logs.exp(), phi.values(), strict=True)))


def classes(
    seed: int, rows: int, spread: float, size: int = 20, ways: int = 5
) -> tuple[Tensor, ...]:
    """Noisy copies of one prototype for each class, and which class each is of."""
    labels = torch.arange(rows) % ways
    return normal(ways, size, seed=1000)[labels] + spread * normal(rows, size, seed=seed), labels


def with_decay(
    net: Callable[[Weights, Tensor], Tensor],
    start: Weights,
    seen: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    **options: float,
) -> Loop:
    """A classifier with one log-decay for each tensor."""
    (X, y), (Z, z) = seen, held_out
    return Loop(
        argument=torch.full((len(start),), -5.0, dtype=F64),
        start=lambda _: start,
        objective=lambda phi, a, rows: cross_entropy(net(phi, X[rows]), y[rows]) + decay(phi, a),
        outer=lambda phi: cross_entropy(net(phi, Z), z),
        **options,  # type: ignore[arg-type]
    )


def mlp(seed: int) -> Loop:
    """25 epochs of batches, momentum and a cosine, as in many scripts."""
    net, start = perceptron(seed, 20, 32, 5)
    data = classes(seed, 400, 1.5), classes(seed + 50, 300, 1.5)
    return with_decay(
        net, start, *data, lr=0.1, momentum=0.9, epochs=25, data=400, batch=50, cosine=True
    )


def cnn(seed: int) -> Loop:
    """Two convolutions with ReLU, on images of 8 × 8."""
    net, start = network(
        seed,
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    data = classes(seed, 200, 1.5, size=64), classes(seed + 50, 200, 1.5, size=64)
    return with_decay(net, start, *data, lr=0.05, momentum=0.9, epochs=15, data=200, batch=25)


def data_weights(seed: int) -> Loop:
    """A weight for each of 200 points, of whose labels 3 in 10 are wrong."""
    net, start = perceptron(seed, 20, 16, 5)
    (X, y), (Z, z) = classes(seed, 200, 1.0), classes(seed + 50, 200, 1.0)
    y = torch.where(torch.arange(200) % 10 < 3, (y + 1) % 5, y)

    def objective(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        losses = cross_entropy(net(phi, X), y, reduction="none")
        return (a.sigmoid() * losses).mean() + 5e-4 * sum(p.square().sum() for p in phi.values())

    return Loop(
        argument=torch.zeros(200, dtype=F64),
        start=lambda _: start,
        objective=objective,
        outer=lambda phi: cross_entropy(net(phi, Z), z),
        lr=0.1,
        momentum=0.9,
        epochs=150,
    )


def distillation(seed: int) -> Loop:
    """Two made-up points for each class, on which a network is trained for 60 steps."""
    net, start = perceptron(seed, 20, 16, 5)
    (X, y), (Z, z) = classes(seed, 10, 0.5), classes(seed + 50, 300, 1.0)
    return Loop(
        argument=X,
        start=lambda _: start,
        objective=lambda phi, a, rows: cross_entropy(net(phi, a), y),
        outer=lambda phi: cross_entropy(net(phi, Z), z),
        lr=0.2,
        epochs=60,
    )


def logistic(seed: int) -> Loop:
    """Logistic regression with a log-decay for each feature, trained long."""
    X, Z = normal(150, 15, seed=seed), normal(150, 15, seed=seed + 50)
    truth = normal(15, seed=seed + 100)
    y, z = (
        (x @ truth + 2 * normal(150, seed=seed + shift) > 0).to(F64)
        for x, shift in ((X, 150), (Z, 200))
    )

    def loss(phi: Weights, x: Tensor, y: Tensor) -> Tensor:
        return (softplus(x @ phi["w"]) - y * (x @ phi["w"])).mean()

    return Loop(
        argument=torch.full((15,), -4.0, dtype=F64),
        start=lambda _: {"w": torch.zeros(15, dtype=F64)},
        objective=lambda phi, a, rows: loss(phi, X, y) + (a.exp() * phi["w"] ** 2).sum() / 2,
        outer=lambda phi: loss(phi, Z, z),
        lr=1.0,
        epochs=400,
    )


def factorisation(seed: int) -> Loop:
    """U Vᵀ of rank 3 for 30 × 20 entries, of which half are seen; by the values seen."""
    matrix = normal(30, 3, seed=seed) @ normal(3, 20, seed=seed + 50)
    seen = normal(30, 20, seed=seed + 100) > 0
    start = {"U": 0.3 * normal(30, 3, seed=seed + 150), "V": 0.3 * normal(20, 3, seed=seed + 200)}

    def misfit(phi: Weights, values: Tensor, where: Tensor) -> Tensor:
        return ((phi["U"] @ phi["V"].T - values)[where]).square().mean()

    return Loop(
        argument=matrix + 0.3 * normal(30, 20, seed=seed + 250),
        start=lambda _: start,
        objective=lambda phi, a, rows: misfit(phi, a, seen),
        outer=lambda phi: misfit(phi, matrix, ~seen),
        lr=1.0,
        epochs=300,
    )


def fine_tuning(seed: int) -> Loop:
    """20 steps away from θ, with λ/2 ‖φ − θ‖²; by θ."""
    net, start = perceptron(seed, 20, 16, 5)
    (X, y), (Z, z) = classes(seed, 25, 1.0), classes(seed + 50, 100, 1.0)
    shapes = {k: p.shape for k, p in start.items()}
    sizes = [p.numel() for p in start.values()]

    def unflatten(theta: Tensor) -> Weights:
        return {
            k: t.view(shape)
            for (k, shape), t in zip(shapes.items(), theta.split(sizes), strict=True)
        }

    return Loop(
        argument=torch.cat([p.flatten() for p in start.values()]),
        start=unflatten,
        objective=lambda phi, a, rows: cross_entropy(net(phi, X), y),
        outer=lambda phi: cross_entropy(net(phi, Z), z),
        lr=0.1,
        epochs=20,
        lam=0.1,
    )


def regression(seed: int) -> Loop:
    """A tanh network on 120 points of a sine, with a log-decay for each tensor."""
    net, start = perceptron(seed, 1, 10, 1)
    X, Z = 2 * normal(120, 1, seed=seed), 2 * normal(120, 1, seed=seed + 50)
    y = (2 * X).sin() + 0.2 * normal(120, 1, seed=seed + 100)
    return Loop(
        argument=torch.full((4,), -6.0, dtype=F64),
        start=lambda _: start,
        objective=lambda phi, a, rows: (net(phi, X) - y).square().mean() + decay(phi, a),
        outer=lambda phi: (net(phi, Z) - (2 * Z).sin()).square().mean(),
        lr=0.1,
        epochs=400,
    )


def weight_net(seed: int) -> Loop:
    """Meta-Weight-Net (Shu et al., 2019): a small net w gives each point a weight by its loss l.

    Training goes along Σ w(l) ∇l, with w held fixed in each step. That is the gradient of Σ W(l),
    W' = w; here w is a mean of sigmoids, and W one of softplus.
    """
    net, start = perceptron(seed, 20, 16, 5)
    (X, y), (Z, z) = classes(seed, 200, 1.0), classes(seed + 50, 200, 1.0)
    y = torch.where(torch.arange(200) % 10 < 3, (y + 1) % 5, y)

    def objective(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        losses = cross_entropy(net(phi, X[rows]), y[rows], reduction="none")
        shift, slope = a.view(2, -1)
        total = softplus(losses[:, None] * slope + shift) / slope
        return total.mean() + 5e-4 * sum(p.square().sum() for p in phi.values())

    slopes = torch.tensor([-2.0, -1.0, 0.5, 1.0], dtype=F64)
    return Loop(
        argument=torch.cat([torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=F64), slopes]),
        start=lambda _: start,
        objective=objective,
        outer=lambda phi: cross_entropy(net(phi, Z), z),
        lr=0.1,
        momentum=0.9,
        epochs=15,
        data=200,
        batch=20,
    )


def augmentation(seed: int) -> Loop:
    """How strong the noise on each input is to be in training; the draws are kept."""
    net, start = perceptron(seed, 20, 16, 5)
    (X, y), (Z, z) = classes(seed, 100, 1.5), classes(seed + 50, 300, 1.5)
    noise = normal(100, 20, seed=seed + 100)

    def objective(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        return cross_entropy(net(phi, X[rows] + a.exp() * noise[rows]), y[rows])

    return Loop(
        argument=torch.full((20,), -1.0, dtype=F64),
        start=lambda _: start,
        objective=objective,
        outer=lambda phi: cross_entropy(net(phi, Z), z),
        lr=0.05,
        momentum=0.9,
        epochs=20,
        data=100,
        batch=20,
    )


def mixed_operations(seed: int) -> Loop:
    """DARTS (Liu et al., 2019): four operations on each of two edges, mixed by a softmax of a."""
    _, start = perceptron(seed, 20, 12, 5)
    _, more = perceptron(seed + 10, 12, 12, 5)
    start = {**start, "1.weight": more["0.weight"], "1.bias": more["0.bias"]}
    (X, y), (Z, z) = classes(seed, 200, 1.5), classes(seed + 50, 200, 1.5)

    def mixed(x: Tensor, a: Tensor) -> Tensor:
        operations = x, x.tanh(), softplus(x), torch.zeros_like(x)
        return sum(w * op for w, op in zip(a.softmax(0), operations, strict=True))  # type: ignore

    def logits(phi: Weights, a: Tensor, x: Tensor) -> Tensor:
        x = mixed(x @ phi["0.weight"].T + phi["0.bias"], a[:4])
        x = mixed(x @ phi["1.weight"].T + phi["1.bias"], a[4:])
        return x @ phi["2.weight"].T + phi["2.bias"]

    def objective(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        penalty = 1.5e-4 * sum(p.square().sum() for p in phi.values())
        return cross_entropy(logits(phi, a, X[rows]), y[rows]) + penalty

    argument = 0.1 * normal(8, seed=seed + 100)
    return Loop(
        argument=argument,
        start=lambda _: start,
        objective=objective,
        # the outer loss's own part of the gradient is known: only that through φ is looked at
        outer=lambda phi: cross_entropy(logits(phi, argument, Z), z),
        lr=0.025,
        momentum=0.9,
        epochs=20,
        data=200,
        batch=25,
    )


def virtual_step(seed: int) -> Loop:
    """DARTS as its code has it, second order: one plain step from where the weights are."""
    loop = mixed_operations(seed)
    there = dataclasses.replace(loop, epochs=5).train()
    return dataclasses.replace(
        loop, start=lambda _: there, epochs=1, momentum=0.0, data=0, batch=0, lr=0.025
    )


def adapters(seed: int) -> Loop:
    """LoRA: a frozen network and pairs of rank 2 for two layers; by one log-decay for each."""
    net, base = perceptron(seed, 20, 32, 5)
    (X, y), (Z, z) = classes(seed, 60, 1.5), classes(seed + 50, 300, 1.5)
    start = {
        "0.A": 0.3 * normal(2, 20, seed=seed + 100),
        "0.B": torch.zeros(32, 2, dtype=F64),
        "2.A": 0.3 * normal(2, 32, seed=seed + 150),
        "2.B": torch.zeros(5, 2, dtype=F64),
    }

    def logits(phi: Weights, x: Tensor) -> Tensor:
        moved = {f"{i}.weight": base[f"{i}.weight"] + phi[f"{i}.B"] @ phi[f"{i}.A"] for i in (0, 2)}
        return net({**base, **moved}, x)

    return Loop(
        argument=torch.full((4,), -5.0, dtype=F64),
        start=lambda _: start,
        objective=lambda phi, a, rows: cross_entropy(logits(phi, X[rows]), y[rows]) + decay(phi, a),
        outer=lambda phi: cross_entropy(logits(phi, Z), z),
        lr=0.02,
        momentum=0.9,
        epochs=40,
        data=60,
        batch=20,
    )


def influence(seed: int) -> Loop:
    """What each training point of a logistic regression owes to the outer loss."""
    loop = logistic(seed)
    X = normal(150, 15, seed=seed)
    truth, noise = normal(15, seed=seed + 100), normal(150, seed=seed + 150)
    y = (X @ truth + 2 * noise > 0).to(F64)

    def objective(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        losses = softplus(X @ phi["w"]) - y * (X @ phi["w"])
        return (a * losses).mean() + 0.01 * phi["w"].square().sum() / 2

    return dataclasses.replace(loop, argument=torch.ones(150, dtype=F64), objective=objective)


def conductivity(seed: int) -> Loop:
    """-(k u')' = f, u by descent on its energy; by log k of each cell, from what was measured."""
    n, k = 15, (0.5 * normal(16, seed=seed)).exp()
    f, h = 1 + normal(n, seed=seed + 50).abs(), 1 / 16

    def energy(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        edges = torch.zeros(1, dtype=F64)
        slopes = torch.cat([edges, phi["u"], edges]).diff() / h
        return h * ((a.exp() * slopes.square()).sum() / 2 - (f * phi["u"]).sum())

    stiffness = torch.autograd.functional.hessian(
        lambda u: energy({"u": u}, k.log(), ALL), torch.zeros(n, dtype=F64)
    )
    measured = torch.linalg.solve(stiffness, h * f) * (1 + 0.05 * normal(n, seed=seed + 100))
    return Loop(
        argument=torch.zeros(16, dtype=F64),
        start=lambda _: {"u": torch.zeros(n, dtype=F64)},
        objective=energy,
        outer=lambda phi: (phi["u"] - measured).square().sum() / measured.square().sum(),
        lr=0.012,
        momentum=0.9,
        epochs=200,
    )


def reweighting(seed: int) -> Loop:
    """Learning to reweight (Ren et al., 2018): one step along Σ ε l(φ), at ε = 0; by ε."""
    loop = data_weights(seed)
    there = dataclasses.replace(loop, epochs=10).train()
    net, _ = perceptron(seed, 20, 16, 5)
    X, y = classes(seed, 200, 1.0)
    y = torch.where(torch.arange(200) % 10 < 3, (y + 1) % 5, y)

    def objective(phi: Weights, a: Tensor, rows: Rows) -> Tensor:
        return (a * cross_entropy(net(phi, X), y, reduction="none")).sum()

    return dataclasses.replace(
        loop,
        argument=torch.zeros(200, dtype=F64),
        start=lambda _: there,
        objective=objective,
        lr=0.1,
        momentum=0.0,
        epochs=1,
    )


LOOPS: dict[str, Callable[[int], Loop]] = {
    "MLP, decay per tensor": mlp,
    "CNN, decay per tensor": cnn,
    "weight net": weight_net,
    "distillation": distillation,
    "augmentation": augmentation,
    "DARTS": mixed_operations,
    "LoRA, decay per tensor": adapters,
    "influence": influence,
    "PDE": conductivity,
    "data weights": data_weights,
    "logistic regression": logistic,
    "factorisation": factorisation,
    "fine-tuning": fine_tuning,
    "tanh regression": regression,
    "DARTS, one step": virtual_step,
    "reweighting, one step": reweighting,
}
