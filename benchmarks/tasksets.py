"""MAML, first-order MAML and iMAML on all task sets that learn2learn has by name.

    python benchmarks/tasksets.py --data ~/data --tasksets mini-imagenet --device cuda --out out
    python benchmarks/tasksets.py --data synthetic --iterations 20 --out out

`learn2learn.vision.benchmarks.get_tasksets` gives training, validation and test tasks of omniglot,
mini-imagenet, tiered-imagenet (12 GB), cifarfs and fc100, and downloads into --data what is not
there. With `--data synthetic` it reads random patterns instead, written into a temporary folder:
the same path, but no measure of a method. Networks are those of learn2learn's own scripts.
The algorithms differ in one line and take the same tasks; the weights with the best accuracy on the
validation tasks are tested. iMAML has no option of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learn2learn as l2l
import synthetic_tasksets
import torch
from examples_path import checkpoint, reporting
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import implicit_grad as ig

ALGORITHMS = ("maml", "fomaml", "imaml")
NAMES = tuple(l2l.vision.benchmarks.list_tasksets())
SEEDS = {"split": 1, "validation": 2, "test": 3}  # the same tasks for all algorithms and seeds

Batch = tuple[Tensor, Tensor]


def network(taskset: str, ways: int, hidden: int) -> nn.Module:
    """The network that learn2learn's scripts take for images of this size."""
    models = l2l.vision.models
    if taskset == "omniglot":  # 28 x 28
        return models.OmniglotCNN(ways, hidden_size=hidden)
    if taskset.endswith("imagenet"):  # 84 x 84
        return models.MiniImagenetCNN(ways, hidden_size=hidden)
    return models.CNN4(ways, hidden_size=hidden, embedding_size=4 * hidden)  # 32 x 32


@contextlib.contextmanager
def folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where learn2learn reads, or downloads to."""
    if options.data == "synthetic":
        with tempfile.TemporaryDirectory() as name:
            root, images = Path(name), 2 * options.shots + 2
            with synthetic_tasksets.there(root, options.tasksets, images):
                yield root
        return
    root = Path(options.data).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    yield root


def tasksets(name: str, root: Path, options: argparse.Namespace) -> Any:
    """Tasks to train, to validate and to test on: half of a class's images to adapt to."""
    return l2l.vision.benchmarks.get_tasksets(
        name,
        train_ways=options.ways,
        train_samples=2 * options.shots,
        test_ways=options.ways,
        test_samples=2 * options.shots,
        root=str(root),
        data_augmentation="normalize",  # mini-ImageNet's pixels are 0 to 255 otherwise
    )


class Pipeline:
    """One algorithm on one task set."""

    def __init__(self, name: str, algorithm: str, options: argparse.Namespace) -> None:
        self.options, self.monitor = options, ig.Monitor()
        self.model = network(name, options.ways, options.hidden).to(options.device)
        maml = l2l.algorithms.MAML(self.model, options.lr, first_order=algorithm == "fomaml")
        if algorithm == "imaml":
            maml = ig.imaml(maml, monitor=self.monitor, on_failure="ignore")
        self.maml = maml
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=options.meta_lr)

    def evaluated(self, batch: Batch) -> tuple[Tensor, float]:
        """Loss and accuracy on every other image, after adaptation to the rest."""
        data, labels = (part.to(self.options.device) for part in batch)
        learner = self.maml.clone()
        for _ in range(self.options.steps):
            learner.adapt(cross_entropy(learner(data[::2]), labels[::2]))
        predictions, labels = learner(data[1::2]), labels[1::2]
        right = (predictions.argmax(1) == labels).float().mean()
        return cross_entropy(predictions, labels), right.item()

    def step(self, tasks: Any) -> None:
        """One meta-iteration."""
        self.optimiser.zero_grad()
        for _ in range(self.options.meta_batch):
            loss, _ = self.evaluated(tasks.sample())
            (loss / self.options.meta_batch).backward()
        self.optimiser.step()

    def score(self, tasks: list[Batch]) -> Any:
        """Mean accuracy with its 95 % interval."""
        return reporting.Score.of([self.evaluated(task)[1] for task in tasks])


def run(name: str, algorithm: str, seed: int, tasks: Any, options: argparse.Namespace) -> Row:
    """Train, keep the best weights, test."""
    fixed = {}
    for part in ("validation", "test"):
        with checkpoint.own_random_numbers(SEEDS[part]):
            count = getattr(options, f"{part}_tasks")
            fixed[part] = [getattr(tasks, part).sample() for _ in range(count)]
    checkpoint.seed_all(seed)
    pipeline = Pipeline(name, algorithm, options)
    untrained, seconds, best = pipeline.score(fixed["test"]), 0.0, (-1.0, pipeline.model)
    for iteration in track(range(1, options.iterations + 1), f"{name}, {algorithm}, seed {seed}"):
        began = time.perf_counter()
        pipeline.step(tasks.train)
        seconds += time.perf_counter() - began
        if iteration % options.validate_every == 0 or iteration == options.iterations:
            accuracy = pipeline.score(fixed["validation"]).accuracy
            if accuracy > best[0]:
                best = accuracy, copy.deepcopy(pipeline.model)
    pipeline.model.load_state_dict(best[1].state_dict())
    tested, reports = pipeline.score(fixed["test"]), pipeline.monitor.reports
    return {
        "taskset": name,
        "algorithm": algorithm,
        "seed": seed,
        "untrained": untrained.accuracy,
        "validation": best[0],
        "test": tested.accuracy,
        "interval": tested.interval,
        "seconds": seconds / options.iterations,
        "failed_solves": sum(not r.status.ok for r in reports) / max(1, len(reports)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run all that is asked for, then a table and a CSV file."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="synthetic, or the folder that learn2learn keeps data in")
    add("--tasksets", nargs="+", choices=NAMES, default=list(NAMES), help="one or several")
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--ways", type=int, default=5, help="classes in a task")
    add("--shots", type=int, default=1, help="images of each class to adapt to")
    add("--steps", type=int, default=5, help="adaptation steps")
    add("--lr", type=float, default=0.1, help="adaptation's learning rate")
    add("--hidden", type=int, default=32, help="the network's width")
    add("--meta-batch", type=int, default=4, help="tasks in a meta-iteration")
    add("--meta-lr", type=float, default=1e-3, help="Adam's learning rate")
    add("--iterations", type=int, default=1000, help="meta-iterations")
    add("--validate-every", type=int, default=100, metavar="N")
    add("--validation-tasks", type=int, default=100)
    add("--test-tasks", type=int, default=600)
    add("--device", type=torch.device, default="cpu")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--out", type=Path, default=Path("out"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    with folder(options) as root:
        for name in options.tasksets:
            with checkpoint.own_random_numbers(SEEDS["split"]):  # Omniglot's classes are shuffled
                tasks = tasksets(name, root, options)
            for algorithm in options.algorithms:
                rows += [run(name, algorithm, s, tasks, options) for s in options.seeds]
    write(rows, options.out / "tasksets.csv", Console(width=120))


if __name__ == "__main__":
    main()
