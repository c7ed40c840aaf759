"""One run: train, log, test and save on the way, and be able to go on from any checkpoint."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import checkpoint
import learn2learn as l2l
import torch
from characters import Batch, InputError
from reporting import LOG, RESULT, Log, Result, Score
from rich.progress import Progress

CHECKPOINT = "checkpoint.pt"
TEST_SEED = 2019  # one set of test tasks for all algorithms and seeds


class Learner(Protocol):
    """What a run needs of the thing that learns."""

    def step(self, tasks: l2l.data.Taskset) -> dict[str, float]:
        """One meta-iteration; the loss, the accuracy and more for the log."""
        ...

    def accuracies(self, tasks: list[Batch]) -> list[float]:
        """The accuracy on each of the given tasks."""
        ...

    def state(self) -> dict[str, Any]:
        """Weights and optimiser."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what `state` recorded."""
        ...

    def sha256(self) -> str:
        """A fingerprint of the weights: equal runs have equal ones."""
        ...

    def peak_memory(self, tasks: l2l.data.Taskset) -> int:
        """Bytes of tensors alive at once within one meta-iteration."""
        ...


@dataclass(frozen=True)
class Run:
    """An algorithm with a seed; `config` is all its weights depend on but the iterations."""

    config: dict[str, Any]
    options: argparse.Namespace
    build: Callable[[], Learner]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.config['algorithm']}-seed{self.config['seed']}"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.options.out / self.name

    @property
    def writes(self) -> bool:
        """Whether this worker writes there; of several, which have the same news, the first."""
        return self.options.workers.is_first

    def finished(self) -> bool:
        """Whether an earlier call has done all that is asked for."""
        result, options = Result.load(self.folder), self.options
        asked = (self.config, options.iterations, options.test_tasks)
        return result is not None and asked == (result.config, result.iterations, result.test_tasks)

    def check_resumable(self) -> None:
        """Refuse to go on from a checkpoint that other options have made."""
        if not (self.folder / CHECKPOINT).exists():
            return
        state = checkpoint.read(self.folder / CHECKPOINT, torch.device("cpu"))
        for name, value in self.config.items():
            if state["config"].get(name) != value:
                was = state["config"].get(name)
                raise InputError(f"--resume: {self.name} began with {name} {was}, not {value}")
        if state["iteration"] > self.options.iterations:
            asked, done = self.options.iterations, state["iteration"]
            raise InputError(f"--iterations {asked}: {self.name} has already done {done}")

    def do(self, tasks: l2l.data.Taskset, test_tasks: list[Batch], progress: Progress) -> Result:
        """Train to the last iteration and test on all test tasks."""
        options = self.options
        # On a learner of its own, so that the measurement leaves no trace in the run.
        with checkpoint.own_random_numbers(TEST_SEED):
            memory = self.build().peak_memory(tasks)
        learner, start, seconds = self._begin()
        with Log(self.folder, start, writes=self.writes) as log:
            if start == 0:
                test(learner, test_tasks[: options.eval_tasks], log, 0, seconds)
            bar = progress.add_task(self.name, total=options.iterations, completed=start, news="")
            for iteration in range(start + 1, options.iterations + 1):
                began = time.perf_counter()
                row = learner.step(tasks)
                took = time.perf_counter() - began
                seconds += took
                log.write(iteration=iteration, seconds=seconds, **row)
                news = f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.2f}  {took:.2f} s/it"
                progress.update(bar, completed=iteration, news=news)
                last = iteration == options.iterations
                if iteration % options.eval_every == 0 and not last:
                    test(learner, test_tasks[: options.eval_tasks], log, iteration, seconds)
                if iteration % options.checkpoint_every == 0 or last:
                    self._save(learner, iteration, seconds)
            score = test(learner, test_tasks, log, options.iterations, seconds)
        progress.update(bar, news=f"test accuracy {score}")
        result = Result(
            config=self.config,
            iterations=options.iterations,
            test_tasks=len(test_tasks),
            score=score,
            seconds_per_iteration=seconds / options.iterations,
            peak_memory=memory,
            model_sha256=learner.sha256(),
        )
        if self.writes:
            result.save(self.folder)
        return result

    def _begin(self) -> tuple[Learner, int, float]:
        """A learner, the iterations behind it and their seconds: of the checkpoint, or fresh."""
        path = self.folder / CHECKPOINT
        resume = self.options.resume and path.exists()
        if self.writes:
            for stale in (RESULT,) if resume else (RESULT, LOG, CHECKPOINT):
                (self.folder / stale).unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.seed_all(self.config["seed"])
        learner = self.build()
        if not resume:
            return learner, 0, 0.0
        state = checkpoint.restore(path, self.options.device)
        learner.load_state(state["learner"])
        return learner, state["iteration"], state["seconds"]

    def _save(self, learner: Learner, iteration: int, seconds: float) -> None:
        """Write a checkpoint."""
        if self.writes:
            checkpoint.save(
                self.folder / CHECKPOINT,
                config=self.config,
                iteration=iteration,
                seconds=seconds,
                learner=learner.state(),
            )


def test(learner: Learner, tasks: list[Batch], log: Log, iteration: int, seconds: float) -> Score:
    """Score the learner, leaving the run's random numbers alone, and log it."""
    with checkpoint.own_random_numbers(TEST_SEED):
        score = Score.of(learner.accuracies(tasks))
    row = {"test_accuracy": score.accuracy, "test_interval": score.interval}
    log.write(iteration=iteration, seconds=seconds, **row)
    return score
