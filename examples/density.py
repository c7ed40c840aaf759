"""Where will the next dot fall? Densities from 16 dots, with a regulariser learned on other tasks.

    python examples/density.py

A task is an image of scikit-learn's digits, seen as a distribution over its 64 pixels, of which we
see a few dots. The estimate is e^φ, normalised, where φ minimises the dots' negative log likelihood
and ½‖Fᵀ(φ − θ)‖². The vector θ and the matrix F are learned on other digits: estimates from 16 dots
shall diverge little from the truth. The others are not learned, but their best setting (a kernel's
width, the strength of smoothness around the mean image) is chosen by the truth, for any number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from newton import newton
from pictures import BLUE, GREY, ORANGE, band, options, panels, progress, save, show, tiles
from torch import Tensor
from torch.distributions import Multinomial

import implicit_grad as ig

PIXELS, SHOTS, DOTS, TASKS, LEARNED = 64, 16, (4, 8, 16, 32, 64), 32, "learned"
SQUARES = torch.cdist(*2 * [torch.cartesian_prod(*2 * [torch.arange(8.0).double()])]).square()
NEIGHBOURS = (SQUARES.round() == 1).double()
ROUGHNESS = NEIGHBOURS.sum(1).diag() - NEIGHBOURS + 0.01 * torch.eye(PIXELS)


def objective(phi: Tensor, counts: Tensor, theta: Tensor, factor: Tensor) -> Tensor:
    """How unlikely the dots of each task and its log density are."""
    far = (phi - theta) @ factor
    return far.square().sum(-1) / 2 - (counts * phi.log_softmax(-1)).sum(-1)


def fit(counts: Tensor, theta: Tensor, factor: Tensor) -> Tensor:
    """The log densities of several tasks."""
    dots, precision = counts.sum(-1, keepdim=True), factor @ factor.T

    def model(phi: Tensor) -> tuple[Tensor, Tensor]:
        p = phi.softmax(-1)
        spread = p.diag_embed() - p[..., None] * p[:, None]
        slope = (phi - theta) @ precision + dots * p - counts
        return slope, precision + dots[..., None] * spread

    return newton(model, theta.expand_as(counts))


def divergence(truth: Tensor, log_density: Tensor) -> Tensor:
    """The mean Kullback-Leibler divergence of densities from the truth, in nats."""
    return (torch.special.xlogy(truth, truth) - truth * log_density.log_softmax(-1)).sum(-1).mean()


def learn(images: Tensor, theta: Tensor, updates: int) -> list[Tensor]:
    """θ and F by Adam, from the mean image and plain smoothness on."""
    solve = ig.implicit(fit, ig.argmin(objective, tasks=True), linear_solver=ig.CG(rtol=0.01))
    learned = [t.clone().requires_grad_() for t in (theta, torch.linalg.cholesky(ROUGHNESS))]
    adam = torch.optim.Adam(learned, lr=0.03)
    rate = torch.optim.lr_scheduler.LinearLR(adam, 1, 0.05, updates)
    for _ in range(updates):
        some = images[torch.randint(len(images), (TASKS,))]
        adam.zero_grad()
        divergence(some, solve(Multinomial(SHOTS, some).sample(), *learned)).backward()
        adam.step()
        rate.step()
    return [t.detach() for t in learned]


def estimates(counts: Tensor, truth: Tensor, mean: Tensor, learned: list[Tensor]) -> dict[str, Any]:
    """Log densities in three ways, two of them with the best of their settings."""
    share, kernels = counts / counts.sum(-1, keepdim=True), []
    for width in (0.5, 0.7, 0.9, 1.1, 1.4, 2):
        kernel = (-SQUARES / (2 * width**2)).softmax(-1)
        kernels += [((1 - e) * share @ kernel + e / PIXELS).log() for e in (0.01, 0.03, 0.1)]
    roots = [torch.linalg.cholesky(10**k * ROUGHNESS) for k in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    smooth = [fit(counts, mean, root) for root in roots]
    ways = {"kernel": kernels, "smooth": smooth, LEARNED: [fit(counts, *learned)]}
    return {way: min(found, key=lambda log: divergence(truth, log)) for way, found in ways.items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Learn on several splits; the divergences, for each number of dots."""
    from sklearn.datasets import load_digits

    chosen = options(__doc__, arguments, updates=60, seeds=3, test=300)
    digits = torch.tensor(load_digits().images).flatten(1)
    ways = ("kernel", "smooth", LEARNED)
    scores: dict[str, Any] = {way: [[] for _ in range(chosen.seeds)] for way in ways}
    for seed in progress(range(chosen.seeds), "density"):
        torch.manual_seed(seed)
        shuffled = digits[torch.randperm(len(digits))]
        images = shuffled / shuffled.sum(1, keepdim=True)
        truth, train = images[: chosen.test], images[chosen.test :]
        mean = (train.mean(0) + 1e-4).log()
        learned = learn(train, mean, chosen.updates)
        for count in DOTS:
            counts = Multinomial(count, truth).sample()
            found = estimates(counts, truth, mean, learned)
            for way, log in found.items():
                scores[way][seed].append(divergence(truth, log).item())
            if count == SHOTS:
                densities = {way: log.softmax(-1) for way, log in found.items()}
                shown = {f"{count} dots": counts, **densities, "truth": truth}
    print(f"divergence in nats, mean ± 95 % interval over {chosen.seeds} splits; {DOTS} dots")
    figure, (left, right) = panels(2)
    for (way, rows), color in zip(scores.items(), (GREY, ORANGE, BLUE), strict=True):
        print(f"  {way:8}" + "   ".join(show(column, 3) for column in np.transpose(rows)))
        band(right, range(len(DOTS)), rows, color, way)
    tiles(left, {name: part[:8].unflatten(1, (8, 8)) for name, part in shown.items()})
    right.set(xlabel="dots", ylabel="divergence from the truth, nats")
    right.set_xticks(range(len(DOTS)), [str(count) for count in DOTS])
    right.legend(frameon=False, fontsize=8)
    save(figure, chosen.out, "density")
    return scores


if __name__ == "__main__":
    main()
