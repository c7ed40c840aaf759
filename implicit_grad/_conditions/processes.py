"""A sum over the processes of a group: each adds what it has, and all get the same, to the bit.

What decides how a solve goes on (steps, stopping, negative curvature) is computed from these sums
and from what was the same before, so that all processes decide alike, and none is left waiting for
a message. That is not taken for granted: a message of three integers goes ahead of each sum. It
tells whether a process has failed, what it is about to sum, and the bits of what it takes the sum
at. Where these differ, all processes raise.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from implicit_grad._curvature.summed import Same, Share
from implicit_grad._errors import (
    GraphError,
    ImplicitGradError,
    InvalidArgumentError,
    describe,
)
from implicit_grad._torch import pytree
from implicit_grad._torch.module_form import unwrapped
from implicit_grad._torch.products import dense
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.transforms import is_transformed

T = TypeVar("T")
_LOST = (
    "group: process {} of {} waited for the others in vain: {} A process was lost, or took "
    "another way: all have to make the same calls, and to go backward through the same of their "
    "results in the same order"
)
_FAILED = "process {} of the group failed: {}"
_APART = (
    "group: the processes do not do the same: process 0 is at {}, and process {} at {}. All need "
    "the same options (linear_solver, curvature, check), arguments of the same shapes that require "
    "grad alike, and the same calls in the same order"
)
_DIFFER = "group: {} is not the same in all processes: {} differs between process 0 and process {}."
_WHY = {
    "an argument": (
        "Arguments have to be equal to the bit. Data that each process has of its own belong into "
        "batches"
    ),
    "phi": (
        "The solver has to return the same phi in each, to the bit, as training by "
        "DistributedDataParallel does; or hand on that of one process by "
        "torch.distributed.broadcast"
    ),
    "what the function refers to": (
        "Tensors that require grad, and are no arguments, have to be equal to the bit as well"
    ),
    "a vector": (
        "Their linear solvers have come apart: they need the same options, preconditioner and "
        "warm starts, on processors of one kind with the same number of threads. Or first "
        "derivatives are differentiated again, of which each makes something else"
    ),
}


def check_group(condition: str, group: object, batches: object) -> None:
    """Raise unless this is a group of processes, of which this one is a member."""
    if group is None:
        return
    kind = getattr(dist, "ProcessGroup", ())
    if not isinstance(group, kind):
        outside = dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER
        raise InvalidArgumentError(
            f"{condition}: group must be a torch.distributed process group that this process is a "
            "member of, such as torch.distributed.group.WORLD after init_process_group(), got "
            + ("that of others" if outside else describe(group))
        )
    if batches is None:
        raise InvalidArgumentError(
            f"{condition}: group goes with batches=, of which each process has its own"
        )


class Processes:
    """The processes of a group, of which this is one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def total(self, add_up: Callable[[], Share]) -> tuple[Tensors, list[list[int]]]:
        """The sums of all processes' parts, and the numbers of each.

        Raises:
            ImplicitGradError: a process failed to add up its part, or is not where the others are.
        """
        try:
            share = add_up()
        except Exception as error:
            self._raise_failures(self._met(1), error)
            raise
        form = _form("a sum", share.sums, share.numbers, share.at)
        self._check_same(form, share.at)
        return self._summed(share.sums), self._gathered(share.numbers)

    def numbers(self, numbers: Sequence[int], what: str) -> list[list[int]]:
        """Those of all processes."""
        self._check_same(f"{what}, {len(numbers)} numbers", ())
        return self._gathered(numbers)

    def first(self, found: T | None, what: str) -> T | None:
        """What the first process has that has something."""
        if not any(row[0] for row in self.numbers([found is not None], what)):
            return None
        return next(other for other in self._objects(found) if other is not None)

    def mean(self, tensors: Tensors) -> Tensors:
        """The mean over all processes; the tensors themselves where they are the same in all."""
        tensors = tuple(map(dense, tensors))
        self._check_same(_form("a mean", tensors, (), ()), ())
        rows = self._gathered([_bits([t]) for t in tensors])
        if all(row == rows[0] for row in rows):
            return tensors
        return tuple(t / self.count for t in self._summed(tensors))

    def shared(self, phi: Tensors) -> Tensors:
        """φ, in whose backward pass what arrives in all processes is averaged."""
        there: Tensors = _Shared.apply(self, *phi)
        return there

    def check_plain(self, tensors: Tensors) -> None:
        """Raise if a transform looks at these, or at all that is done now."""
        if is_transformed(tensors):
            raise InvalidArgumentError(
                "implicit: group does not go with torch.func or forward mode: use backward()"
            )

    def check_arguments(self, arguments: Any) -> None:
        """Raise unless all processes have the same arguments, in a container."""
        leaves, names = pytree.leaves(arguments), pytree.names(arguments, "")
        if any(unwrapped(leaf) is not leaf for leaf in leaves):
            raise InvalidArgumentError(
                "implicit: an argument is a module in DistributedDataParallel: pass its .module. "
                "The solver is handed a copy of that, and may train it in one of its own"
            )
        others = [repr(x) for x in leaves if isinstance(x, (int, float, complex, str))]
        tensors = [t for t in leaves if torch.is_tensor(t)]
        graded = [i for i, t in enumerate(tensors) if t.requires_grad]
        self._check_same(
            f"a call with {len(leaves)} arguments ({', '.join(_kinds(tensors))}; "
            f"{', '.join(others)}; {zlib.crc32(repr(names).encode()):x}) "
            + (f"with gradients of {graded}" if torch.is_grad_enabled() else "without gradients"),
            [("an argument", tuple(tensors))],
        )

    def _check_same(self, form: str, at: Same) -> None:
        """Raise unless all processes do what this form says, at tensors of the same bits."""
        rows = self._met(0, zlib.crc32(form.encode()), _bits([t for _, ts in at for t in ts]))
        self._raise_failures(rows, None)
        if any(row[1] != rows[0][1] for row in rows):
            forms = self._objects(form)
            rank = next(i for i, other in enumerate(forms) if other != forms[0])
            raise GraphError(_APART.format(forms[0], rank, forms[rank]))
        if any(row[2] != rows[0][2] for row in rows):
            raise GraphError(self._difference(at))

    def _difference(self, at: Same) -> str:
        """Which of the tensors, that are to be the same, is not."""
        found = self._objects([[_bits([t]) for t in tensors] for _, tensors in at])
        for i, (name, tensors) in enumerate(at):
            for j, tensor in enumerate(tensors):
                for rank, bits in enumerate(found):
                    if bits[i][j] != found[0][i][j]:
                        return f"{_DIFFER.format(name, describe(tensor), rank)} {_WHY[name]}"
        return _DIFFER.format("the order of tensors", "one", "another")

    def _raise_failures(self, rows: list[list[int]], own: Exception | None) -> None:
        """Raise what another process raised, if one did, as an error of the same kind."""
        if not any(row[0] for row in rows):
            return
        failures = self._objects(None if own is None else (_kind(own), str(own)))
        if own is None:
            rank, (kind, text) = next((i, x) for i, x in enumerate(failures) if x is not None)
            raise kind(_FAILED.format(rank, text))

    def _met(self, failed: int, form: int = 0, bits: int = 0) -> list[list[int]]:
        """The message ahead of all others, which has the same size whatever comes then."""
        return self._gathered([failed, form, bits])

    def _gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        if not numbers:
            return [[] for _ in range(self.count)]
        own = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        rows = [torch.empty_like(own) for _ in range(self.count)]
        self._sent(lambda: dist.all_gather(rows, own, group=self._group))
        return [row.tolist() for row in rows]

    def _objects(self, own: T) -> list[T]:
        found: list[Any] = [None] * self.count
        self._sent(lambda: dist.all_gather_object(found, own, group=self._group))
        return found

    def _summed(self, tensors: Tensors) -> Tensors:
        """The sums over processes: one message for each dtype."""
        found: dict[int, Tensor] = {}
        for place in {(t.dtype, t.device): None for t in tensors}:
            chosen = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == place]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in chosen])
            self._sent(functools.partial(dist.all_reduce, flat, group=self._group))
            parts = torch.split(flat, [tensors[i].numel() for i in chosen])
            found.update(zip(chosen, parts, strict=True))
        return tuple(found[i].view(t.shape) for i, t in enumerate(tensors))

    def _sent(self, message: Callable[[], object]) -> None:
        """Send a message, with an error of ours where it does not get through."""
        try:
            message()
        except ImplicitGradError:
            raise
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            text = said[0].rstrip(".") + "."
            raise GraphError(_LOST.format(self.rank, self.count, text)) from error

    @property
    def _device(self) -> torch.device:
        """Where integers travel: over the CPU, if the group can."""
        if "cpu:" in dist.get_backend_config(self._group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


class _Shared(torch.autograd.Function):
    """The identity, into whose backward pass the mean over processes goes.

    So an outer loss on each process's own validation data is averaged, as DistributedDataParallel
    does it, and from here on all have the same.
    """

    @staticmethod
    def forward(ctx: Any, processes: Processes, *tensors: Tensor) -> Tensors:
        ctx.processes = processes
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_averaged(ctx.processes, v)


class _Mean(torch.autograd.Function):
    """The mean over processes, which is its own transpose: so are means of their outer losses."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, *tensors: Tensor) -> Tensors:
        ctx.processes = processes
        return tuple(
            t.clone() if t is own else t
            for own, t in zip(tensors, processes.mean(tensors), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_averaged(ctx.processes, v)


def _averaged(processes: Processes, v: Tensors) -> Tensors:
    processes.check_plain(v)
    mean: Tensors = _Mean.apply(processes, *v)
    return mean


def _kind(error: Exception) -> type[Exception]:
    """As what other processes raise it: what the library answers to keeps its class."""
    kinds = (InvalidArgumentError, GraphError, ImplicitGradError, NotImplementedError, RuntimeError)
    return next((kind for kind in kinds if isinstance(error, kind)), GraphError)


def _form(what: str, tensors: Tensors, numbers: Sequence[int], at: Same) -> str:
    """What is about to be done, in words."""
    places = [f"{name} of {', '.join(_kinds(ts))}" for name, ts in at if ts]
    given = f" at {' and '.join(places)}" if places else ""
    return f"{what} of {', '.join(_kinds(tensors))} with {len(numbers)} numbers{given}"


def _kinds(tensors: Iterable[Tensor]) -> list[str]:
    """Each tensor in a few letters; many of them by a few more."""
    found = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors]
    if len(found) <= 4:
        return found
    return [*found[:3], f"{len(found) - 3} more ({zlib.crc32(repr(found).encode()):x})"]


def _bits(tensors: Iterable[Tensor]) -> int:
    """A number that hardly stays the same where one bit of the tensors changes, or their order."""
    found = [dense(t.detach()) for t in tensors if t.numel()]
    if not found:
        return 0
    sizes = [t.numel() * t.element_size() for t in found]
    counts = [2 * -(-size // 16) for size in sizes]  # each begins where complex128 may
    words = torch.zeros(sum(counts), dtype=torch.int64, device=found[0].device)
    for part, size, t in zip(torch.split(words, counts), sizes, found, strict=True):
        part.view(torch.uint8)[:size].view(t.dtype).copy_(t.reshape(-1))
    return int(_digest(words))


def _digest(words: Tensor) -> Tensor:
    """One integer of many: row by row a sum, modulo 2⁶⁴, with a random weight for each place.

    Each is added to its upper half before: in floating-point numbers, the lower is often zero.
    """
    weights = _weights(words.device)
    while len(words) > 1:
        rows = pad(words, (0, -len(words) % len(weights))).view(-1, len(weights))
        words = rows.add_(rows >> 32).mul_(weights).sum(1)
    return words[0]


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """The same odd integers in all processes."""
    random = torch.Generator().manual_seed(0)
    found = torch.randint(-(2**63), 2**63 - 1, (2**8,), generator=random, device="cpu")
    return found.to(device) | 1
