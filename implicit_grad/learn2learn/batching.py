"""A module with a stack of weights: one call for a batch of tasks, each with weights of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from implicit_grad._conditions.batching import why_one_by_one
from implicit_grad._conditions.proximal_term import ProximalTerm
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._options import is_integer
from implicit_grad._theorem.linearization import Curvature
from implicit_grad._torch import pytree
from implicit_grad._torch.modules import Contents, replace_buffers
from implicit_grad._torch.pytree import Tensors


def check_tasks(
    tasks: object,
    already: int | None,
    solver: LinearSolver,
    curvature: Curvature,
    module: nn.Module,
) -> None:
    """Raise unless a learner with these options can be one for a batch of tasks."""
    if not is_integer(tasks, 1):
        raise InvalidArgumentError(
            f"clone(tasks={tasks!r}): expected None or an integer of at least 1"
        )
    if already is not None:
        raise InvalidArgumentError(
            f"clone(tasks={tasks}): this learner has {already} tasks already"
        )
    one_by_one = why_one_by_one(solver, curvature)
    if one_by_one is not None:
        raise InvalidArgumentError(f"clone(tasks={tasks}): {one_by_one}")
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            raise InvalidArgumentError(
                f"clone(tasks={tasks}): torch.func.vmap, which calls the model for all tasks at "
                f"once, has no rule for nn.{type(part).__name__}; clone it for each task instead"
            )


def stack_parameters(theta: Tensors, pull: ProximalTerm | None, n_tasks: int) -> Tensors:
    """θ once for each task, without a copy."""
    if pull is not None and pull.factors:
        raise InvalidArgumentError(f"clone(tasks={n_tasks}): lam must not be a LowRank matrix")
    return tuple(t.expand(n_tasks, *t.shape) for t in theta)


def stack_buffers(module: nn.Module, n_tasks: int) -> None:
    """Give each task a copy of the module's buffers, such as BatchNorm's statistics."""
    replace_buffers(module, lambda buffer: buffer.expand(n_tasks, *buffer.shape).clone())


def stacked_call(module: nn.Module, stacked: Tensors, n_tasks: int, args: Any, kwargs: Any) -> Any:
    """module(*args, **kwargs) for each task, with its own weights, buffers and inputs.

    All tensors have the tasks along their first dimension, except for parameters that are not among
    the `stacked`.
    """
    for tensor in filter(torch.is_tensor, pytree.leaves((args, kwargs))):
        if tensor.dim() == 0 or len(tensor) != n_tasks:
            raise InvalidArgumentError(
                f"learner: with tasks={n_tasks}, the first dimension of each input counts the "
                f"tasks, got {describe(tensor)}"
            )
    contents = Contents(module)
    inputs, tree = pytree.flatten((contents.tensors, args, kwargs))
    shared = {id(p) for p in module.parameters()} - {id(t) for t in stacked}
    output_tree = tree

    def one(*inputs: Tensor) -> tuple[Tensors, dict[int, Tensor]]:
        nonlocal output_tree
        tensors, args, kwargs = tree.rebuild(inputs)
        with contents.replaced_by(tensors) as assigned:
            output = module(*args, **kwargs)
        outputs, output_tree = pytree.flatten(output)
        return outputs, assigned

    # one flat tuple: vmap walks containers slowly
    dims = tuple(None if id(t) in shared else 0 for t in inputs)
    outputs, assigned = vmap(one, in_dims=dims, randomness="different")(*inputs)
    for index, buffer in assigned.items():
        contents.put(index, buffer)
    return output_tree.rebuild(outputs)
