"""What a solver may return: checked, converted to tensors, and cut off from everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_grad._errors import InvalidSolutionError, describe
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors, Tree


def checked(returned: Any, inputs: Tensors, template: Any | None) -> tuple[Tensors, Tree]:
    """φ as distinct detached tensors and their tree, or an error that names the wrong part.

    NumPy arrays and Python numbers become tensors of the dtype and device of the arguments.
    `template` is what φ has to look like, where the condition knows (θ of a proximal term).
    """
    if not pytree.leaves(returned):
        raise InvalidSolutionError(
            f"the solver returned {describe(returned)}; it must return phi: a tensor, or a "
            "container of tensors"
        )
    if template is not None and pytree.structure(returned) != pytree.structure(template):
        raise InvalidSolutionError(
            f"the solver returned phi of the form {pytree.structure(returned)}; theta has the form "
            f"{pytree.structure(template)}, and phi must have the same"
        )
    leaves, tree = pytree.flatten(returned, is_variable=lambda _: True)
    dtype, device = _common(inputs)
    slots = [slot for slot in tree.slots if slot is not None]
    likes = [None] * len(slots) if template is None else pytree.leaves(template)
    found: dict[int, Tensor] = {}
    for index, (slot, like) in enumerate(zip(slots, likes, strict=True)):
        leaf = leaves[slot]
        if isinstance(leaf, (np.ndarray, np.generic, float, int)) and not isinstance(leaf, bool):
            place = (device, dtype) if like is None else (like.device, like.dtype)
            leaf = torch.as_tensor(leaf).to(*place)
        fault = _fault(leaf, like)
        if fault is not None:
            raise InvalidSolutionError(f"{pytree.names(returned, 'phi')[index]} {fault}")
        found.setdefault(slot, leaf)
    if not pytree.finite(list(found.values())):
        wrong = (i for i, slot in enumerate(slots) if not pytree.finite([found[slot]]))
        raise InvalidSolutionError(
            f"{pytree.names(returned, 'phi')[next(wrong)]} holds NaN or Inf: the solver diverged, "
            "and there is no gradient to take"
        )
    # copies: a solver may return its own buffer and write to it again, or one of its arguments
    return tuple(found[slot].detach().clone() for slot in range(len(leaves))), tree


def _fault(leaf: Any, like: Tensor | None) -> str | None:
    """What keeps a leaf from being a tensor of φ."""
    if not torch.is_tensor(leaf) or not leaf.is_floating_point() or leaf.layout != torch.strided:
        return (
            "must be a dense floating-point tensor (or a NumPy array), the solver returned "
            f"{describe(leaf)}"
        )
    if like is not None and (leaf.shape, leaf.dtype, leaf.device) != (
        like.shape,
        like.dtype,
        like.device,
    ):
        return (
            f"must be like theta, {describe(like)} on {like.device}; the solver returned "
            f"{describe(leaf)} on {leaf.device}"
        )
    return None


def _common(inputs: Sequence[Tensor]) -> tuple[torch.dtype, torch.device]:
    floating = [t for t in inputs if t.is_floating_point()]
    if not floating:
        return torch.get_default_dtype(), torch.device("cpu")
    dtype = floating[0].dtype
    for tensor in floating:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype, floating[0].device
