"""The processes that torchrun starts, as one: each takes its share of the tasks.

All of them draw all tasks, with the same random numbers, and each adapts to some. Gradients and
scores are put together, so that each has what one process alone would have, up to rounding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from characters import InputError
from torch import nn

T = TypeVar("T")
_NOTHING: Any = object()


@dataclass(frozen=True)
class Workers:
    """This process among `count`; by default the only one."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes files, and to the terminal."""
        return self.rank == 0

    def share(self, tasks: Iterable[T]) -> Iterator[T]:
        """This worker's tasks; the iterable is gone through to its end, for its random numbers."""
        return islice(tasks, self.rank, None, self.count)

    def together(self, found: list[T]) -> list[T]:
        """What all workers found for their shares, in the order of the tasks."""
        if self.count == 1:
            return found
        shares: list[list[T]] = [[]] * self.count
        dist.all_gather_object(shares, found)
        turns = zip_longest(*shares, fillvalue=_NOTHING)
        return [item for item in chain.from_iterable(turns) if item is not _NOTHING]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of all workers' gradients, in one message."""
        if self.count == 1:
            return
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(total)
        for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)


@contextmanager
def workers(device: torch.device) -> Iterator[tuple[Workers, torch.device]]:
    """Those that torchrun started, and this one's device: of several GPUs each has its own."""
    if not dist.is_torchelastic_launched():
        yield Workers(), device
        return
    backend = "gloo"
    if device.type == "cuda":
        index, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= there:
            raise InputError(f"torchrun: more processes than this machine's {there} GPUs")
        backend, device = "nccl", torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
