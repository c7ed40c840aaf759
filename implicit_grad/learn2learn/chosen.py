"""Which of a model's tensors adapt, where these are not all of its parameters: `adapts`.

A classifier whose features do not adapt (ANIL, Raghu et al., 2020), adapters, a context that the
model holds as a plain tensor (CAVIA, Zintgraf et al., 2019). The others are to the inner problem
what its data are: gradients arrive in them through both losses.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._torch.modules import named_weights

Names = tuple[str, ...]  # as they were given


def checked_names(adapts: Any, module: nn.Module) -> Names | None:
    """The names, as a tuple, if each leads to something that can adapt."""
    if adapts is None:
        return None
    names = (adapts,) if isinstance(adapts, str) else adapts
    good = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    if not good or not names:
        raise InvalidArgumentError(
            "imaml: adapts must be the name of a parameter, of a part, or of a tensor of the "
            f"model, or a list of such names, got {describe(adapts)}"
        )
    for name in names:
        _check(name, module)
    return tuple(names)


def adapting(module: nn.Module, names: Names | None) -> list[tuple[str, Tensor]]:
    """What adapts, each once: all floating-point parameters, or what the names lead to."""
    weights = named_weights(module)
    if names is None:
        return weights
    found = {name: _at(module, name) for name in names}
    parts = [part for part in found.values() if isinstance(part, nn.Module)]
    chosen = {id(p) for part in parts for p in part.parameters()} | set(map(id, found.values()))
    of_model = {id(p) for p in module.parameters()}
    tensors = {id(t): (n, t) for n, t in found.items() if torch.is_tensor(t)}
    others = [pair for key, pair in tensors.items() if key not in of_model]
    return [(n, p) for n, p in weights if id(p) in chosen] + others


def check_stackable(names: Names | None, module: nn.Module, tasks: int) -> None:
    """Raise if something adapts that is no parameter: a batch of tasks has stacks of these only."""
    parameters = {id(p) for p in module.parameters()}
    plain = [name for name, t in adapting(module, names) if id(t) not in parameters]
    if plain:
        raise InvalidArgumentError(
            f"clone(tasks={tasks}): {', '.join(plain)} adapts and is no parameter, of which there "
            "is one for each task only if it is; clone for each task instead"
        )


def _at(module: nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(module)


def _check(name: str, module: nn.Module) -> None:
    try:
        found = _at(module, name)
    except AttributeError:
        known = [n for n, _ in module.named_children()] + [n for n, _ in module.named_parameters()]
        raise InvalidArgumentError(
            f"imaml: adapts={name!r}: the model has nothing of that name. Among its parts and "
            f"parameters are {', '.join(known[:12])}"
        ) from None
    held = named_weights(found) if isinstance(found, nn.Module) else [(name, found)]
    if not held or not all(torch.is_tensor(t) and t.is_floating_point() for _, t in held):
        raise InvalidArgumentError(
            f"imaml: adapts={name!r}: expected a floating-point tensor, or a part of the model "
            f"with parameters that are, found {describe(found)}"
        )
    if found is not _at(module, name):
        raise InvalidArgumentError(
            f"imaml: adapts={name!r}: it is computed anew each time that it is looked up (a "
            "parametrization, a property). Name the part, or the parameters that it is made from"
        )
    if not isinstance(found, (nn.Module, nn.Parameter)) and not found.requires_grad:
        raise InvalidArgumentError(
            f"imaml: adapts={name!r}: this tensor of the model does not require grad, and would "
            "stay where it is: let it, by requires_grad_(), or make it a parameter"
        )
