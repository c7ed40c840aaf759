"""The memory that a call takes: the most bytes of tensors alive at once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

_CPU = 0


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes of CPU tensors alive at once during a call, above those alive before it.

    Counts what torch's allocator hands out and takes back, as the profiler records it, so the
    figure does not depend on the machine or on what ran before.

    >>> import torch
    >>> peak_memory(lambda: torch.ones(1000, dtype=torch.float32))
    4000
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        record.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == _CPU
    ]
    alive = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        peak = max(peak, alive)
    return peak
