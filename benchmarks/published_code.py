"""What the paper's published code does differently, and what each difference does.

    python benchmarks/published_code.py --data DIR --checkpoint out/paper/fomaml-seed0/checkpoint.pt

From weights that `paper.py` has trained. (a) The meta-gradient by 2I + H/12, beside those of the
other methods: medians over tasks of the cosines with second-order MAML's and first-order MAML's.
(b) Accuracy where the characters are drawn as by that code: training shuffles all 1,623 with one
seed, testing with another, so that 310 of the 423 test characters were trained on; and its test
turns characters by 90, 180 and 270 degrees too.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import paper
import paper_tasks
import torch
from examples_path import characters
from paper_methods import METHODS, Halves
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor

import checkpoint  # isort: skip  # of the examples, on the path since examples_path
import reporting

assert characters
TRAINING_SEED, TEST_SEED, CHARACTERS = 123, 12345, 1_623  # of imaml_dev's two scripts


def shuffled(seed: int) -> list[int]:
    """Which 1,200 come first: as `random.shuffle` has it in that code."""
    order = list(range(CHARACTERS))
    random.Random(seed).shuffle(order)
    return order


def shared() -> tuple[int, int]:
    """How many of the test characters were trained on, and how many there are."""
    trained = set(shuffled(TRAINING_SEED)[: paper_tasks.FINN_TRAINS_ON])
    tested = set(shuffled(TEST_SEED)[paper_tasks.FINN_TRAINS_ON :])
    return len(trained & tested), len(tested)


def gradient(learner: paper.MetaLearner, name: str, task: Halves) -> Tensor:
    """A method's meta-gradient at the learner's weights."""
    learner.model.zero_grad()
    METHODS[name](learner.model, learner.setting).backward(task, 1.0)
    return torch.cat([p.grad.flatten() for p in learner.model.parameters()])


def measure_gradients(learner: paper.MetaLearner, tasks: list[Halves]) -> list[Row]:
    """Medians over tasks, one row for each method."""
    names = ("maml", "fomaml", "paper-code", "imaml-cg", "imaml-default")
    names += ("imaml-midway", "imaml-gn")
    found = {
        name: [gradient(learner, name, task) for task in track(tasks, f"gradient, {name}")]
        for name in names
    }

    def cosine(name: str, other: str) -> float:
        pairs = zip(found[name], found[other], strict=True)
        return statistics.median(float(torch.cosine_similarity(a, b, 0)) for a, b in pairs)

    def length(name: str) -> float:
        pairs = zip(found[name], found["fomaml"], strict=True)
        return statistics.median(float(a.norm() / b.norm()) for a, b in pairs)

    return [
        {
            "method": name,
            **{f"cosine, {other}": cosine(name, other) for other in ("maml", "fomaml")},
            "cosine, imaml-cg": cosine(name, "imaml-cg"),
            "length, over fomaml": length(name),
        }
        for name in names
    ]


def measure_classes(
    learner: paper.MetaLearner, train: Tensor, test: Tensor, tasks: int
) -> list[Row]:
    """Accuracies on characters that were trained on, that were not, and as that code mixes them."""
    seen, of = shared()
    mixed = torch.cat([train[torch.randperm(len(train))[:seen]], test[: of - seen]])
    supplies = {
        "not trained on": (test, 1),
        "not trained on, turned": (test, paper_tasks.TURNS),
        "trained on": (train, 1),
        f"{seen} trained on, {of - seen} not": (mixed, 1),
        f"{seen} trained on, {of - seen} not, turned": (mixed, paper_tasks.TURNS),
    }
    rows: list[Row] = []
    for name, (images, turns) in supplies.items():
        supply = paper_tasks.Tasks(images, learner.setting.ways, learner.setting.shots, turns)
        drawn = [supply.sample() for _ in track(range(tasks), name)]
        score = reporting.Score.of(learner.accuracies(drawn))
        rows.append({"characters": name, "accuracy": score.accuracy, "interval": score.interval})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of Omniglot's two zip files")
    add("--checkpoint", type=Path, required=True, help="of a run of paper.py, protocol lake")
    add("--out", type=Path, default=Path("out"), help="folder for all results")
    add("--gradients", type=int, default=20, help="tasks for (a)")
    add("--tasks", type=int, default=600, help="tasks for each row of (b)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    state = checkpoint.read(options.checkpoint, torch.device("cpu"))
    config = argparse.Namespace(**{"lam": 0.5, **state["config"]})
    learner = paper.MetaLearner(config.algorithm, config)
    learner.load_state(state["learner"])
    torch.manual_seed(0)
    train, test = paper_tasks.load(options.data, config.protocol)
    supply = paper_tasks.Tasks(train, config.ways, config.shots, paper_tasks.TURNS)
    tasks = [Halves.of(supply.sample(), learner.setting) for _ in range(options.gradients)]
    console = Console(width=120)
    gradients = measure_gradients(learner, tasks)
    write(gradients, options.out / "published_code_gradients.csv", console)
    classes = measure_classes(learner, train, test, options.tasks)
    write(classes, options.out / "published_code_classes.csv", console)


if __name__ == "__main__":
    main()
