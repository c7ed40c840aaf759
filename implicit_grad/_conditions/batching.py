"""Functions of one task as functions of a batch, whose tensors have the tasks along dimension 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from implicit_grad._conditions.base import Condition, scalar
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._theorem.linearization import Curvature
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors, Tree


def n_tasks_of(condition: Condition, phi: Any) -> int | None:
    """How many problems there are, if φ is a batch: the length of its first dimension."""
    if not condition.tasks:
        return None
    tensors = tuple(filter(torch.is_tensor, pytree.leaves(phi)))
    return number_of_tasks(type(condition).__name__, tensors)


def number_of_tasks(name: str, tensors: Tensors) -> int:
    """The length of the first dimension, if it is the same for all."""
    lengths = {len(t) if t.dim() else 0 for t in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise InvalidArgumentError(
            f"{name}: with tasks=True, the first dimension of each tensor of phi counts the tasks; "
            f"got {', '.join(map(describe, tensors))}"
        )
    return lengths.pop()


def why_one_by_one(
    linear_solver: LinearSolver,
    curvature: Curvature,
    polish: int = 0,
    rtol_gradient: float | None = None,
    if_small: bool = False,
) -> str | None:
    """Why problems, with these options, cannot be one batch; None if they can.

    The one rule on that, for conditions with tasks=True, `torch.func.vmap` and `clone(tasks=)`.
    `if_small` says that they may be taken one by one after all, where their systems are large.
    """
    if not (linear_solver.takes_tasks or (if_small and linear_solver.takes_small_tasks)):
        return (
            "a batch of tasks is solved by MINRES, EarlyStopped, PositivePart, or CG without "
            'preconditioner and warm start and with on_negative_curvature "stop" or "raise"; got '
            f"{linear_solver!r}"
        )
    if curvature == "finite_difference":
        return "finite differences are taken for one task at a time"
    if polish or rtol_gradient is not None:
        return "polish and rtol_gradient are for one task at a time"
    return None


def batched_model(model: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The model for a batch, where there is one."""
    return None if model is None else batched(model)


def batched(function: Callable[..., Any], as_number: str = "") -> Callable[..., Any]:
    """The function, for all tasks at once; each draws random numbers of its own.

    With a name `as_number`, what it returns for a task has to be one number.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors, tree = pytree.flatten((args, kwargs))
        returned: list[Tree] = []

        def one(tensors: Tensors) -> Tensors:
            args, kwargs = tree.rebuild(tensors)
            value = function(*args, **kwargs)
            if as_number:
                value = scalar(as_number, value).reshape(())
            outputs, output_tree = pytree.flatten(value)
            returned.append(output_tree)
            return outputs

        outputs = vmap(one, randomness="different")(tensors)
        return returned[0].rebuild(outputs)

    return call


def total(name: str, losses: object, n_tasks: int | None) -> Tensor:
    """The loss, or the sum of the tasks' losses, none of which depends on another task's φ."""
    if n_tasks is None:
        return scalar(name, losses)
    if not torch.is_tensor(losses) or losses.shape != (n_tasks,) or not losses.is_floating_point():
        raise InvalidArgumentError(
            f"{name} must be one number for each of {n_tasks} tasks, a floating-point tensor of "
            f"shape ({n_tasks},), such as torch.func.vmap(loss)(outputs, y); got {describe(losses)}"
        )
    # in float16 the sum may overflow where no task's loss does
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))


def aligned(values: Any, like: Any) -> Any:
    """Values for each task, which broadcast against each task's `like`, as values for the batch.

    A number for each of 3 tasks gets the shape (3, 1, 1) to go with a batch of matrices.
    """
    spread = optree.broadcast_prefix(values, like, namespace=pytree.NAMESPACE)
    leaves, structure = optree.tree_flatten(like, namespace=pytree.NAMESPACE)
    shaped = [
        v.reshape(len(v), *[1] * (t.dim() - v.dim()), *v.shape[1:]) if torch.is_tensor(v) else v
        for v, t in zip(spread, leaves, strict=True)
    ]
    return optree.tree_unflatten(structure, shaped)
