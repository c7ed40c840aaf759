"""The memory that a call takes: the most bytes of tensors alive at once."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from implicit_grad._torch.unrecorded import operations_unrecorded


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes of CPU tensors alive at once during a call, above those alive before it.

    Counts what torch's allocator hands out and takes back, as the profiler records it, so the
    figure does not depend on the machine or on what ran before.

    >>> import torch
    >>> peak_memory(lambda: torch.ones(1000, dtype=torch.float32))
    4000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with operations_unrecorded():
            call()
    events = record.profiler.kineto_results.events()  # as JSON they are large, and slow to read
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    alive = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        peak = max(peak, alive)
    return peak
