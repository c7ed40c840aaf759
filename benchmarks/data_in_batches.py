"""Does a hypergradient over batches stay in the memory of one, and what does a product cost?

    python benchmarks/data_in_batches.py --out benchmarks/results

The inner problem is a convolutional network's, on 28 x 28 images in batches of 500, with a weight
decay that is differentiated. Memory is the peak of one hypergradient (a product, and what the decay
changes), above the data and the weights; of the same objective as one graph, as far as that goes.

The time of a product is that of a solve with six less that of one with one, over the time of the
same batches' raw products: evaluation, gradient with its graph, product, by hand. All are timed in
turn within one process on one thread, as CPU time: medians and quartiles of the ratios in a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from tables import Row, write
from timing import interleaved, ratios
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import implicit_grad as ig
from implicit_grad.testing import peak_memory

BATCH, CLASSES, PRODUCTS = 500, 10, 6
Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, CLASSES),
    )


class Problem:
    """A network on so many random images, and hypergradients of its weight decay."""

    def __init__(self, images: int) -> None:
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (images, 1, 28, 28), generator=random, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (images,), generator=random)
        self.data = pixels, labels
        self.batches = list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
        torch.manual_seed(0)
        self.net = network()
        self.phi = {name: p.detach() for name, p in self.net.named_parameters()}

    def loss(self, w: Weights, batch: Batch, decay: Tensor) -> Tensor:
        """The sum over the samples of a batch."""
        pixels, labels = batch
        logits = functional_call(self.net, w, (pixels / 255,))
        return cross_entropy(logits, labels, reduction="sum")

    def penalty(self, w: Weights, decay: Tensor) -> Tensor:
        """Strong enough for a definite Hessian."""
        size = torch.stack([p.square().sum() for p in w.values()]).sum()
        return decay.exp() * len(self.data[1]) * size

    def hypergradient(self, condition: ig.argmin, products: int) -> Callable[[], Tensor]:
        """A call that takes so many products and one with the decay."""
        options = {"linear_solver": ig.CG(maxiter=products), "on_failure": "ignore"}
        solve = ig.implicit(lambda decay: self.phi, condition, check="never", **options)

        def call() -> Tensor:
            decay = torch.zeros((), requires_grad=True)
            outer = self.loss(solve(decay), self.batches[0], decay)
            return grad(outer, decay)[0]

        return call

    def one_graph(self) -> ig.argmin:
        """All data at once."""
        return ig.argmin(lambda w, decay: self.loss(w, self.data, decay) + self.penalty(w, decay))

    def in_batches(self, keep: int = 0) -> ig.argmin:
        """One batch after another."""
        return ig.argmin(self.loss, batches=self.batches, regularizer=self.penalty, keep=keep)

    def raw_product(self, kept: bool) -> Callable[[], None]:
        """The product's operations for each batch by hand; with graphs at hand if they are kept."""
        phi = {name: p.clone().requires_grad_() for name, p in self.phi.items()}
        weights, decay = list(phi.values()), torch.zeros(())
        u = [torch.randn_like(p) for p in weights]

        def slope(batch: Batch) -> tuple[Tensor, ...]:
            return grad(self.loss(phi, batch, decay), weights, create_graph=True)

        graphs = [slope(batch) for batch in self.batches] if kept else []

        def call() -> None:
            for i, batch in enumerate(self.batches):
                grad(graphs[i] if kept else slope(batch), weights, u, retain_graph=kept)

        return call


def memory(images: Sequence[int], most_in_one: int) -> list[Row]:
    """Peaks of one hypergradient each."""
    rows: list[Row] = []
    for count in images:
        problem = Problem(count)
        methods = {"batches": problem.in_batches(), "batches, keep=2": problem.in_batches(keep=2)}
        if count <= most_in_one:
            methods["one graph"] = problem.one_graph()
        for name, condition in methods.items():
            peak = peak_memory(problem.hypergradient(condition, 1)) / 2**20
            rows.append({"images": count, "method": name, "peak_MiB": peak})
    return rows


def time(images: int, seconds: float) -> list[Row]:
    """Products over raw ones, graphs kept and not."""
    problem, rows = Problem(images), []
    for name, kept in (("batches", False), ("batches, all kept", True)):
        condition = problem.in_batches(keep=len(problem.batches) if kept else 0)
        methods = {
            "one": problem.hypergradient(condition, 1),
            "many": problem.hypergradient(condition, PRODUCTS),
            "raw": problem.raw_product(kept),
        }
        times = interleaved(methods, seconds, name)
        pairs = zip(times["many"], times["one"], strict=True)
        product = [(many - one) / (PRODUCTS - 1) for many, one in pairs]
        over_raw, quartiles = ratios(product, times["raw"])
        rows.append(
            {
                "images": images,
                "method": name,
                "product_ms": 1e3 * statistics.median(product),
                "raw_ms": 1e3 * statistics.median(times["raw"]),
                "over_raw": over_raw,
                "quartiles": quartiles,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 8_000, 30_000, 60_000])
    parser.add_argument("--one-graph-to", type=int, default=8_000, help="images in one graph")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timing of each method")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    rows = memory(options.images, options.one_graph_to)
    write(rows, options.out / "large_data.csv", console)
    rows = time(min(options.images), options.seconds)
    write(rows, options.out / "large_data_time.csv", console)


if __name__ == "__main__":
    main()
