"""What a run leaves behind: a log, a result, and one table and one picture over all runs."""

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from checkpoint import write_whole
from matplotlib.figure import Figure
from rich.table import Table

LOG, RESULT, PICTURE = "log.csv", "result.json", "learning_curves.png"
TRAINING = ("loss", "accuracy", "failed_solves")
TESTING = ("test_accuracy", "test_interval")
COLUMNS: tuple[str, ...] = ("iteration", "seconds", *TRAINING, *TESTING)


@dataclass(frozen=True)
class Score:
    """Mean accuracy over tasks, and half the width of its 95 % interval."""

    accuracy: float
    interval: float

    @classmethod
    def of(cls, accuracies: list[float]) -> "Score":
        """The score of one accuracy per task."""
        interval = 1.96 * stdev(accuracies) / math.sqrt(len(accuracies))
        return cls(fmean(accuracies), interval)

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.interval:.1f} %"


@dataclass(frozen=True)
class Result:
    """How one run ended."""

    config: dict[str, Any]
    iterations: int
    test_tasks: int
    score: Score
    seconds_per_iteration: float
    peak_memory: int
    model_sha256: str

    def save(self, folder: Path) -> None:
        """Write the result; a folder that holds one is a finished run."""
        write_whole(folder / RESULT, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> "Result | None":
        """The result of a finished run, None where there is none."""
        try:
            fields = json.loads((folder / RESULT).read_text())
        except FileNotFoundError:
            return None
        return cls(**{**fields, "score": Score(**fields["score"])})


class Log:
    """A CSV that grows by one row an iteration and can be taken up again at any of them."""

    def __init__(self, folder: Path, iteration: int, *, writes: bool = True) -> None:
        """Open the log, keeping of an older one the rows up to `iteration` (negative: none)."""
        path = folder / LOG if writes else Path(os.devnull)
        before = read_log(folder) if writes else []
        kept = [row for row in before if int(row["iteration"]) <= iteration]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.writer.writeheader()
        self.writer.writerows(kept)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, **row: float) -> None:
        """Add a row, of training or of testing."""
        self.writer.writerow(row)
        self.file.flush()


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log, none where there is no log."""
    try:
        with (folder / LOG).open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def finished_runs(out: Path) -> list[tuple[Path, Result]]:
    """Every finished run under the output folder."""
    folders = sorted(path.parent for path in out.glob(f"*/{RESULT}"))
    found = ((folder, Result.load(folder)) for folder in folders)
    return [(folder, result) for folder, result in found if result is not None]


def table(results: Iterable[Result]) -> Table:
    """One line a run, and one for the mean over seeds where an algorithm has several."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        key = (result.config["algorithm"], result.config["steps"])
        groups.setdefault(key, []).append(result)
    lines = Table()
    for name in ("algorithm", "steps", "seed", "iterations", "test accuracy", "s/iteration", "MiB"):
        lines.add_column(name, justify="left" if name == "algorithm" else "right")
    for (algorithm, steps), runs in groups.items():
        for run in runs:
            _add(lines, algorithm, steps, str(run.config["seed"]), [run], str(run.score))
        if len(runs) > 1:
            accuracy = fmean(run.score.accuracy for run in runs)
            _add(lines, algorithm, steps, "mean", runs, f"{100 * accuracy:.1f} %")
    return lines


def _add(
    lines: Table, algorithm: str, steps: int, seed: str, runs: list[Result], accuracy: str
) -> None:
    """Add the line of one run, or of several with their mean costs."""
    iterations = "/".join(sorted({str(run.iterations) for run in runs}))
    seconds = fmean(run.seconds_per_iteration for run in runs)
    memory = fmean(run.peak_memory for run in runs) / 2**20
    costs = f"{seconds:.3f}", f"{memory:.1f}"
    lines.add_row(algorithm, str(steps), seed, iterations, accuracy, *costs)


def draw_curves(runs: Iterable[tuple[Path, Result]], out: Path) -> Path:
    """Test accuracy against meta-iterations and against seconds, with 95 % intervals."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours: dict[str, Any] = {}
    for folder, result in runs:
        rows = [row for row in read_log(folder) if row["test_accuracy"]]
        label = f"{result.config['algorithm']}, {result.config['steps']} steps"
        first = label not in colours
        colour = colours.setdefault(label, matplotlib.colormaps["tab10"](len(colours) % 10))
        score = [100 * float(row["test_accuracy"]) for row in rows]
        spread = [100 * float(row["test_interval"]) for row in rows]
        low = [s - i for s, i in zip(score, spread, strict=True)]
        high = [s + i for s, i in zip(score, spread, strict=True)]
        for panel, column in zip(panels, ("iteration", "seconds"), strict=True):
            x = [float(row[column]) for row in rows]
            panel.plot(x, score, color=colour, label=label if first else None)
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for panel, name in zip(panels, ("meta-iterations", "seconds of training"), strict=True):
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend()
    figure.savefig(out / PICTURE, dpi=150)
    return out / PICTURE
