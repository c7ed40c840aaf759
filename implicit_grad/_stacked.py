"""A module with a stack of weights: one call for a batch of tasks, each with weights of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.func import functional_call, vmap

from implicit_grad import _tree
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear import LinearSolver
from implicit_grad._proximal import LowRank
from implicit_grad._stopping import is_integer
from implicit_grad._tree import Tensors


def check_tasks(tasks: object, already: int | None, solver: LinearSolver, lam: object) -> None:
    """Raise unless a learner with these options can be one for a batch of tasks."""
    if not is_integer(tasks, 1):
        raise InvalidArgumentError(
            f"clone(tasks={tasks!r}): expected None or an integer of at least 1"
        )
    if already is not None:
        raise InvalidArgumentError(
            f"clone(tasks={tasks}): this learner has {already} tasks already"
        )
    if not solver.takes_tasks:
        raise InvalidArgumentError(
            f"clone(tasks={tasks}): a batch of tasks is solved by CG without preconditioner and "
            f'warm start, and with on_negative_curvature "stop" or "raise"; got {solver!r}'
        )
    if isinstance(lam, LowRank):
        raise InvalidArgumentError(f"clone(tasks={tasks}): lam must not be a LowRank matrix")


def stack_buffers(module: nn.Module, tasks: int) -> None:
    """Give each task a copy of the module's buffers, such as BatchNorm's statistics."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.expand(tasks, *buffer.shape).clone()


def stacked_call(module: nn.Module, stacked: Tensors, args: Any, kwargs: Any) -> Any:
    """module(*args, **kwargs) for each task, with its own weights, buffers and inputs.

    All tensors have the tasks along their first dimension, except for parameters that are not among
    the `stacked`.
    """
    tasks, own = len(stacked[0]), {id(t) for t in stacked}
    inputs, tree = _tree.flatten((args, kwargs))
    for tensor in inputs:
        if tensor.dim() == 0 or len(tensor) != tasks:
            raise InvalidArgumentError(
                f"learner: with tasks={tasks}, the first dimension of each input counts the tasks, "
                f"got {describe(tensor)}"
            )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))

    def one(parameters: Any, buffers: Any, inputs: Tensors) -> Any:
        args, kwargs = tree.rebuild(inputs)
        return functional_call(module, (parameters, buffers), args, kwargs, tie_weights=False)

    shared = {name: 0 if id(p) in own else None for name, p in parameters.items()}
    return vmap(one, in_dims=(shared, 0, 0), randomness="different")(parameters, buffers, inputs)
