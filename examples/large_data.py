"""Which sources of large data to trust: a weight for each, learned over batches and processes.

    python examples/large_data.py
    torchrun --nproc-per-node 2 examples/large_data.py

Samples come from eight sources, and three of them label wrongly. They are drawn again, batch by
batch, in each pass, so that no more than a batch is ever in memory. Softmax regression is solved by
L-BFGS on the sum over all batches; the hypergradient of a clean validation loss moves the sources'
weights. Under torchrun each process has its share of the batches, and of the validation data: one
process alone finds the same weights, up to rounding.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pictures import BLUE, GREY, RED, options, panels, progress, save
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit_grad as ig

BATCH, FEATURES, CLASSES, SOURCES, WRONG = 1000, 50, 10, 8, 3
Batch = tuple[Tensor, Tensor, Tensor]
LBFGS = ig.solvers.TorchOptim(
    factory=lambda w: torch.optim.LBFGS(w, max_iter=20, line_search_fn="strong_wolfe"),
    tol=1e-3,
    steps=20,
)


def draw(seed: int, clean: bool = False) -> Batch:
    """Samples, their labels and their sources; a wrong label is the next class."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(BATCH, FEATURES, generator=random).double()
    y = (x @ truth + 2 * torch.randn(BATCH, CLASSES, generator=random)).argmax(1)
    source = torch.randint(SOURCES, (BATCH,), generator=random)
    return x, y if clean else torch.where(source < WRONG, (y + 1) % CLASSES, y), source


@dataclass(frozen=True)
class Share:
    """The batches of one process, drawn anew whenever they are iterated over."""

    rank: int
    count: int
    batches: int

    def __iter__(self) -> Iterator[Batch]:
        return (draw(1 + i) for i in range(self.rank, self.batches, self.count))

    def validation(self) -> tuple[Tensor, Tensor]:
        """Clean samples: as many in each process, and the same in all of them together."""
        x, y, _ = draw(10**6, clean=True)
        size = BATCH // self.count
        return x.split(size)[self.rank], y.split(size)[self.rank]


def misfit(W: Tensor, batch: Batch, logits: Tensor) -> Tensor:
    """A batch's part of softmax regression; a source's weight is the sigmoid of its logit."""
    x, y, source = batch
    weights = logits.sigmoid()[source]
    return weights @ cross_entropy(x @ W, y, reduction="none") / BATCH


def penalty(W: Tensor, logits: Tensor) -> Tensor:
    """Counted once, whatever the number of batches and processes."""
    return W.square().sum() / 20


def regression(share: Share, group: Any, solver: Any = LBFGS, **settings: Any) -> Any:
    """Softmax regression over all batches of all processes, differentiable in the logits."""
    condition = ig.argmin(misfit, batches=share, regularizer=penalty, group=group)
    settings = {"linear_solver": ig.CG(rtol=1e-3), "warm_start": True} | settings
    return ig.implicit(solver, condition, init=zeros, **settings)


def zeros(like: Tensor) -> Tensor:
    """Where L-BFGS begins."""
    return like.new_zeros(FEATURES, CLASSES)


@contextlib.contextmanager
def processes() -> Iterator[Any]:
    """The group of those that torchrun started; None for a process alone."""
    if not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
        dist.barrier()
    finally:
        dist.destroy_process_group()


def picture(accuracies: list[float], weights: Tensor) -> Any:
    """Validation accuracy over the outer steps, and what each source is worth."""
    figure, (left, right) = panels(2)
    left.plot(range(len(accuracies)), accuracies, color=BLUE)
    left.set(xlabel="outer step", ylabel="validation accuracy, %")
    right.bar(range(SOURCES), weights.tolist(), color=[RED] * WRONG + [BLUE] * (SOURCES - WRONG))
    right.axhline(0.5, color=GREY, linestyle=":")
    right.set(xlabel="source (red: wrong labels)", ylabel="learned weight")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Learn the weights; accuracies and weights."""
    chosen = options(__doc__, arguments, batches=30, steps=10)
    with processes() as group:
        rank, count = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
        monitor = ig.Monitor()
        share, first = Share(rank, count, chosen.batches), rank == 0
        x, y = share.validation()
        solve = regression(share, group, monitor=monitor)
        logits = torch.zeros(SOURCES, dtype=torch.float64, requires_grad=True)
        adam, accuracies, began = torch.optim.Adam([logits], lr=0.6), [], time.perf_counter()
        steps = range(chosen.steps + 1)
        for step in progress(steps, "large_data") if first else steps:
            W = solve(logits)
            accuracy = 100 * (x @ W.detach()).argmax(1).eq(y).double().mean()
            if group:
                dist.all_reduce(accuracy, group=group)
            accuracies.append(float(accuracy) / count)
            if step < chosen.steps:
                adam.zero_grad()
                cross_entropy(x @ W, y).backward()  # of this process's validation data
                adam.step()
        seconds = time.perf_counter() - began
    weights = logits.detach().sigmoid()
    if first:
        batch = 8 * BATCH * (FEATURES + 2) / 2**20
        print(f"{chosen.batches} batches of {batch:.1f} MiB in {count} process{'es' * (count > 1)}")
        print(
            f"validation accuracy {accuracies[0]:.1f} % with equal weights, {accuracies[-1]:.1f} %"
        )
        print(f"weights {', '.join(f'{w:.3f}' for w in weights)}; the first {WRONG} label wrongly")
        products = sum(report.products for report in monitor.reports)
        print(f"{len(monitor.reports)} backward passes, {products} products, {seconds:.0f} s")
        save(picture(accuracies, weights), chosen.out, "large_data")
    return {"accuracies": accuracies, "weights": weights}


if __name__ == "__main__":
    main()
    gc.collect()  # what holds the group still: gloo aborts a process that ends before its threads
