"""Times of methods that do the same job: measured in turn within one process, told as ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.progress import track

Times = dict[str, list[float]]

LEAST_ROUNDS, MOST_ROUNDS = 5, 200


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call.

    With one thread that is the time on a quiet machine; other processes do not count.
    """
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(methods: dict[str, Callable[[], object]], seconds: float, label: str) -> Times:
    """CPU seconds of each method, once a round; each round begins with another method.

    As many rounds as fit into `seconds`, but some in any case.
    """
    names = list(methods)
    for name in names:
        methods[name]()  # first calls allocate and compile
    gc.collect()
    gc.freeze()  # the collector need not walk through all imported modules in somebody's turn
    round_seconds = sum(cpu_seconds(method) for method in methods.values())
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_seconds)))
    times: Times = {name: [] for name in names}
    for i in track(range(rounds), label):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(cpu_seconds(methods[name]))
    return times


def ratios(times: Sequence[float], reference: Sequence[float]) -> tuple[float, str]:
    """Median and quartiles of the ratios within each round."""
    low, middle, high = statistics.quantiles(
        [t / r for t, r in zip(times, reference, strict=True)], n=4
    )
    return middle, f"{low:.3f} {high:.3f}"


def sums(*parts: Sequence[float]) -> list[float]:
    """Round by round, what several methods took together."""
    return [sum(together) for together in zip(*parts, strict=True)]


def seconds_of(call: Callable[[], object], device: str) -> float:
    """CPU time of one call; on a GPU, the clock's, with all that was launched waited for."""
    if device == "cpu":
        return cpu_seconds(call)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
