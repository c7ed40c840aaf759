"""Few-shot classification with learn2learn; implicit MAML is one changed line of its pipeline.

    python examples/few_shot.py --algorithm imaml fomaml --curvature gauss_newton --out runs/glyphs

Without a download it learns the characters of some twenty alphabets, drawn from matplotlib's fonts,
and is tested on alphabets it never saw; `--data omniglot:PATH` reads Omniglot's folders or zips. A
character turned by 0, 90, 180 or 270 degrees is four classes, in training and in testing. Batch
normalisation uses the batch's own statistics throughout, as in learn2learn's examples, so the
drawings of a query are classified together.

`--batched` lets implicit MAML adapt to all tasks of a meta-batch at once, with the same numbers up
to rounding: on a GPU, one task alone keeps little of it busy.

Under `torchrun --nproc-per-node 2 examples/few_shot.py ...` two processes share each meta-batch
and the test tasks, with the numbers of one process up to rounding; all must see the same --out.
"""

import quiet  # isort: skip  # noqa: F401 (before those that it keeps quiet)

import argparse
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import checkpoint
import learn2learn as l2l
import reporting
import torch
from characters import Batch, InputError, load, taskset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from runs import TEST_SEED, Run
from torch import Tensor, nn
from workers import workers

import implicit_grad as ig
from implicit_grad.learn2learn import ImplicitMAML
from implicit_grad.testing import peak_memory

ALGORITHMS = ("imaml", "maml", "fomaml", "anil", "anil-imaml")

Loss = Callable[[Tensor, Tensor], Tensor]
Number = TypeVar("Number", int, float)


def fast_adapt(
    batch: Batch,
    learner: l2l.algorithms.MAML | ImplicitMAML,
    features: Callable[[Tensor], Tensor],
    loss: Loss,
    steps: int,
    shots: int,
    ways: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Adapt to the task's support drawings; the loss and the accuracy on its query drawings.

    A learner for several tasks has them along the first dimension of all this.
    """
    data, labels = (part.to(device) for part in batch)
    drawings = labels.dim() - 1

    def split(part: Tensor) -> list[Tensor]:
        halves = part.unflatten(drawings, (ways, 2 * shots)).split(shots, drawings + 1)
        return [half.flatten(drawings, drawings + 1) for half in halves]

    (support, query), (support_labels, query_labels) = split(features(data)), split(labels)
    for _ in range(steps):
        learner.adapt(loss(learner(support), support_labels))
    predictions = learner(query)
    accuracy = (predictions.argmax(-1) == query_labels).float().mean(-1)
    return loss(predictions, query_labels), accuracy


class MetaLearner:
    """A network, the part of it that adapts to a task, and the meta-optimiser of the whole."""

    def __init__(self, algorithm: str, options: argparse.Namespace) -> None:
        self.options, self.workers = options, options.workers
        self.model = l2l.vision.models.OmniglotCNN(options.ways, options.hidden).to(options.device)
        head_only = algorithm.startswith("anil")
        self.features = self.model.features if head_only else nn.Identity()
        module = self.model.classifier if head_only else self.model
        maml = l2l.algorithms.MAML(module, lr=options.lr, first_order=algorithm == "fomaml")
        self.monitor = ig.Monitor() if algorithm.endswith("imaml") else None
        if self.monitor is not None:
            maml = ig.imaml(
                maml,
                lam=options.lam,
                linear_solver=ig.CG(maxiter=options.cg_steps),
                curvature=options.curvature,
                monitor=self.monitor,
                on_failure="ignore",  # the log counts them instead
            )
        self.learner = maml
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=options.meta_lr)

    def adapt(self, tasks: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Losses and accuracies of copies of the learner that adapted to tasks, one by one.

        With --batched, of copies that adapted to as many tasks at once as a meta-batch has.
        """
        options, tasks = self.options, iter(tasks)
        rest = (options.steps, options.shots, options.ways, options.device)
        loss, features = nn.functional.cross_entropy, self.features
        if not options.batched:
            for task in tasks:
                yield fast_adapt(task, self.learner.clone(), features, loss, *rest)
            return

        def each(data: Tensor) -> Tensor:  # batch normalisation is by task
            return torch.stack([features(task) for task in data])

        while group := list(islice(tasks, options.meta_batch)):
            data, labels = (torch.stack(parts) for parts in zip(*group, strict=True))
            learner = self.learner.clone(tasks=len(group))
            yield fast_adapt((data, labels), learner, each, torch.func.vmap(loss), *rest)

    def step(self, tasks: l2l.data.Taskset) -> dict[str, float]:
        """One meta-iteration; means over its tasks, and the share of linear solves that failed."""
        count = self.options.meta_batch
        share = self.workers.share(tasks.sample() for _ in range(count))
        scores: list[tuple[float, float]] = []
        self.optimiser.zero_grad()
        for losses, accuracies in self.adapt(share):
            (losses.sum() / count).backward()
            scores += zip(losses.flatten().tolist(), accuracies.flatten().tolist(), strict=True)
        self.workers.add_gradients(self.model.parameters())
        self.optimiser.step()
        scores = self.workers.together(scores)
        total_loss, total_accuracy = (sum(column) for column in zip(*scores, strict=True))
        news = {"loss": total_loss / count, "accuracy": total_accuracy / count}
        if self.monitor is not None:
            reports = self.workers.together(self.monitor.reports)
            news["failed_solves"] = sum(not r.status.ok for r in reports) / count
            self.monitor.clear()
        return news

    def accuracies(self, tasks: list[Batch]) -> list[float]:
        """The accuracy on each of the given tasks."""
        found = [a for _, some in self.adapt(self.workers.share(tasks)) for a in some.flatten()]
        return self.workers.together([a.item() for a in found])

    def state(self) -> dict[str, Any]:
        """Weights and optimiser."""
        return {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what `state` recorded."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])

    def sha256(self) -> str:
        """A fingerprint of the weights: equal runs have equal ones."""
        digest = hashlib.sha256()
        for weight in self.model.parameters():
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def peak_memory(self, tasks: l2l.data.Taskset) -> int:
        """Bytes of tensors alive at once within one meta-iteration, above those before it."""
        if self.options.device.type != "cuda":
            return peak_memory(lambda: self.step(tasks))
        torch.cuda.reset_peak_memory_stats(self.options.device)
        before = torch.cuda.memory_allocated(self.options.device)
        self.step(tasks)
        return torch.cuda.max_memory_allocated(self.options.device) - before


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs asked for, then one table and one picture over all runs in the folder."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        with workers(options.device) as (options.workers, options.device):
            do_all(options, Console(quiet=not options.workers.is_first))
    except InputError as error:
        parser.error(str(error))


def do_all(options: argparse.Namespace, console: Console) -> None:
    """The runs, with bars of progress; what came out, from the first worker."""
    tasks, test_tasks = load_tasks(options)
    runs = plan(options)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for run in runs:
            if options.resume and run.finished():
                console.print(f"{run.name}: finished before, {run.folder}")
            else:
                run.do(tasks, test_tasks, progress)
    if options.workers.is_first:
        finished = reporting.finished_runs(options.out)
        console.print(reporting.table(result for _, result in finished))
        console.print(f"{reporting.draw_curves(finished, options.out)}")


def load_tasks(options: argparse.Namespace) -> tuple[l2l.data.Taskset, list[Batch]]:
    """Training tasks without end, and the test tasks, from alphabets held out of training."""
    characters, held_out = load(options.data, options.root)
    options.test_alphabets = sorted(set(options.test_alphabets or held_out))
    train, test = characters.split(options.test_alphabets)
    tasks = taskset(train, options.ways, options.shots)
    test_source = taskset(test, options.ways, options.shots)
    with checkpoint.own_random_numbers(TEST_SEED):
        return tasks, [test_source.sample() for _ in range(options.test_tasks)]


def plan(options: argparse.Namespace) -> list[Run]:
    """One run for each algorithm and seed, after a look at what is there to go on from."""
    for algorithm in options.algorithm:
        if options.batched and not algorithm.endswith("imaml"):
            raise InputError(f"--batched: {algorithm} adapts to one task at a time, imaml to many")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}") from None
    runs = []
    for algorithm in dict.fromkeys(options.algorithm):
        names = ["data", "test_alphabets", "ways", "shots", "steps", "lr"]
        names += ["meta_batch", "meta_lr", "hidden"]
        names += ["lam", "curvature", "cg_steps"] if algorithm.endswith("imaml") else []
        for seed in dict.fromkeys(options.seed):
            config = {"algorithm": algorithm, "seed": seed}
            config |= {name: getattr(options, name) for name in names}
            config |= {"batched": True} if options.batched else {}
            runs.append(Run(config, options, partial(MetaLearner, algorithm, options)))
    if options.resume:
        for run in runs:
            run.check_resumable()
    return runs


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    whole, real = number(int, least=1), number(float, above=0.0)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--algorithm", nargs="+", choices=ALGORITHMS, default=["imaml"], help="one or several")
    add("--seed", nargs="+", type=number(int, least=0), default=[0], help="one or several")
    add("--data", default="glyphs", help="glyphs, omniglot or omniglot:PATH[,PATH...]")
    add("--root", type=Path, help="where --data omniglot downloads to")
    add("--test-alphabets", nargs="+", metavar="NAME", help="alphabets held out of training")
    add("--ways", type=number(int, least=2), default=5, help="classes in a task")
    add("--shots", type=whole, default=1, help="drawings of each class to adapt on")
    add("--steps", type=whole, default=5, help="adaptation steps")
    add("--lr", type=real, default=0.4, help="adaptation's learning rate")
    add("--lam", type=real, help="imaml: proximal strength; by default 1 / (steps * lr)")
    add("--cg-steps", type=number(int, least=0), default=5, help="imaml: CG iterations")
    add(
        "--curvature",
        choices=("hessian", "gauss_newton"),
        default="gauss_newton",
        help="imaml: the linear system's matrix",
    )
    add("--hidden", type=whole, default=64, help="the network's width")
    add("--meta-batch", type=whole, default=8, help="tasks in a meta-iteration")
    add("--batched", action="store_true", help="imaml: adapt to a meta-batch's tasks at once")
    add("--meta-lr", type=real, default=1e-3, help="Adam's learning rate")
    add("--iterations", type=whole, default=400, help="meta-iterations")
    add("--test-tasks", type=number(int, least=2), default=600, help="for the last test")
    add("--eval-tasks", type=number(int, least=2), default=100, help="for tests on the way")
    add("--eval-every", type=whole, default=50, metavar="N", help="test every N iterations")
    add("--checkpoint-every", type=whole, default=50, metavar="N", help="save every N iterations")
    add("--resume", action="store_true", help="go on from what is in --out")
    add("--out", type=Path, default=Path("runs"), help="folder for all results")
    add("--threads", type=whole, default=1, help="CPU threads; small networks gain little")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, ...")
    return parser


def number(
    kind: type[Number], *, least: float = -math.inf, above: float = -math.inf
) -> Callable[[str], Number]:
    """A parser of finite numbers from `least` on, or above `above`."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not (math.isfinite(value) and value >= least and value > above):
            bound = f"at least {least}" if least > above else f"above {above:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def device(name: str) -> torch.device:
    """A device that this machine has."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"this machine has no device {name!r}") from None
    return found


if __name__ == "__main__":
    main()
