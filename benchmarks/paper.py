"""The paper's few-shot tables: every method of them, and ours, under one protocol.

    python benchmarks/paper.py --data DIR --method fomaml maml reptile imaml-gn --out out/paper

DIR holds images_background.zip and images_evaluation.zip; with --protocol photographs, for the
table on mini-ImageNet, it is a zip of train/CLASS/*.jpg and test/CLASS/*.jpg. Whatever is stopped
goes on with --resume, to the bit; finished runs are not run again. What comes out: a log and a
result for each run, one table and one picture over all.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import paper_tasks
import torch
from examples_path import characters
from paper_methods import IMAML, METHODS, Default, Halves, Setting
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import checkpoint  # isort: skip  # of the examples, on the path since examples_path
import learn2learn as l2l
import reporting
import runs
import workers

from implicit_grad.testing import peak_memory


class MetaLearner:
    """One method with its network and its meta-optimiser, as a run wants them."""

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        names = ("ways", "shots", "steps", "lr", "meta_lr", "lam")
        self.setting = Setting(**{name: getattr(options, name) for name in names})
        self.meta_batch = options.meta_batch
        self.model = network(options)
        self.method = METHODS[method](self.model, self.setting)
        self.optimiser = torch.optim.Adam(self.method.parameters(), lr=options.meta_lr)

    def step(self, tasks: paper_tasks.Tasks) -> dict[str, float]:
        """One meta-iteration; means over its tasks, and the share of linear solves that failed."""
        self.optimiser.zero_grad()
        found = [
            self.method.backward(Halves.of(tasks.sample(), self.setting), 1 / self.meta_batch)
            for _ in range(self.meta_batch)
        ]
        self.optimiser.step()
        loss, accuracy = (sum(parts) / self.meta_batch for parts in zip(*found, strict=True))
        news = {"loss": loss, "accuracy": accuracy}
        failed = getattr(self.method, "failed", None)
        return news if failed is None else news | {"failed_solves": failed()}

    def accuracies(self, tasks: list[paper_tasks.Batch]) -> list[float]:
        """The accuracy on each of the given tasks."""
        return [self.method.accuracy(Halves.of(task, self.setting)) for task in tasks]

    def state(self) -> dict[str, Any]:
        """Weights, a learned λ, and the optimiser."""
        learned = [p.detach() for p in self.method.parameters()]
        return {"parameters": learned, "optimiser": self.optimiser.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what `state` recorded."""
        with torch.no_grad():
            for parameter, value in zip(self.method.parameters(), state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])

    def sha256(self) -> str:
        """A fingerprint of the weights: equal runs have equal ones."""
        digest = hashlib.sha256()
        for weight in self.method.parameters():
            digest.update(weight.detach().numpy().tobytes())
        return digest.hexdigest()

    def peak_memory(self, tasks: paper_tasks.Tasks) -> int:
        """Bytes of tensors alive at once within one meta-iteration, above those before it."""
        return peak_memory(lambda: self.step(tasks))


def network(options: argparse.Namespace) -> torch.nn.Module:
    """What the paper's tasks of this kind are learned by."""
    if options.protocol != "photographs":
        return l2l.vision.models.OmniglotCNN(options.ways, options.hidden)
    left = (paper_tasks.SIDE // 2**4) ** 2  # pixels after four poolings
    size = left * options.hidden
    return l2l.vision.models.MiniImagenetCNN(options.ways, options.hidden, embedding_size=size)


def plan(options: argparse.Namespace) -> list[runs.Run]:
    """One run for each method and seed, after a look at what is there to go on from."""
    planned = []
    names = ["protocol", "ways", "shots", "steps", "lr", "meta_batch", "meta_lr", "hidden"]
    for method in dict.fromkeys(options.method):
        held = issubclass(METHODS[method], IMAML) and not issubclass(METHODS[method], Default)
        implicit = ["lam"] if held else []
        for seed in dict.fromkeys(options.seed):
            config = {"algorithm": method, "seed": seed}
            config |= {name: getattr(options, name) for name in names + implicit}
            planned.append(runs.Run(config, options, partial(MetaLearner, method, options)))
    if options.resume:
        for run in planned:
            run.check_resumable()
    return planned


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs asked for, then one table and one picture over all runs in the folder."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.protocol == "photographs" and options.official_runs is not None:
        parser.error("--official-runs: these are characters, and no test of photographs")
    options.device, options.workers = torch.device("cpu"), workers.Workers()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        train, test = paper_tasks.load(options.data, options.protocol)
        planned = plan(options)
    except characters.InputError as error:
        parser.error(str(error))
    turns = paper_tasks.PROTOCOLS[options.protocol]
    tasks = paper_tasks.Tasks(train, options.ways, options.shots, turns)
    with checkpoint.own_random_numbers(runs.TEST_SEED):
        supply = paper_tasks.Tasks(test, options.ways, options.shots, 1)
        test_tasks = [supply.sample() for _ in range(options.test_tasks)]
    if options.official_runs is not None:
        test_tasks = paper_tasks.official_runs(options.official_runs)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for run in planned:
            if options.resume and run.finished():
                console.print(f"{run.name}: finished before, {run.folder}")
            else:
                run.do(tasks, test_tasks, progress)
    finished = reporting.finished_runs(options.out)
    console.print(reporting.table(result for _, result in finished))
    console.print(f"{reporting.draw_curves(finished, options.out)}")


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of Omniglot's zips, or zip of photographs")
    add("--method", nargs="+", choices=METHODS, default=["fomaml"], help="one or several")
    add("--seed", nargs="+", type=int, default=[0], help="one or several")
    add("--protocol", choices=paper_tasks.PROTOCOLS, default="lake", help="what tasks are made of")
    add("--official-runs", type=Path, help="all_runs.zip: test on the 20 runs (20 ways, 1 shot)")
    add("--ways", type=int, default=5, help="classes in a task")
    add("--shots", type=int, default=1, help="drawings of each class to adapt on")
    add("--steps", type=int, default=5, help="adaptation steps")
    add("--lr", type=float, default=0.4, help="adaptation's learning rate")
    add("--lam", type=float, default=0.5, help="the implicit methods' proximal strength")
    add("--hidden", type=int, default=64, help="the network's width")
    add("--meta-batch", type=int, default=8, help="tasks in a meta-iteration")
    add("--meta-lr", type=float, default=1e-3, help="Adam's learning rate")
    add("--iterations", type=int, default=1_000, help="meta-iterations")
    add("--test-tasks", type=int, default=1_000, help="for the last test")
    add("--eval-tasks", type=int, default=200, help="for tests on the way")
    add("--eval-every", type=int, default=100, metavar="N", help="test every N iterations")
    add("--checkpoint-every", type=int, default=50, metavar="N", help="save every N iterations")
    add("--resume", action="store_true", help="go on from what is in --out")
    add("--out", type=Path, default=Path("out/paper"), help="folder for all results")
    add("--threads", type=int, default=1, help="CPU threads")
    return parser


if __name__ == "__main__":
    main()
