"""Arguments whose gradient is 0 because the condition never reads them: told, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_grad._conditions.base import Call, Condition
from implicit_grad._errors import (
    ImplicitGradError,
    InvalidArgumentError,
    describe,
)
from implicit_grad._torch import pytree
from implicit_grad._torch.graph import leaves_among, walk
from implicit_grad._warnings import warn


def tell_unread(condition: Condition, call: Call, unread: Sequence[Tensor]) -> None:
    """Warn of those of the tensors that are arguments, unless F holds them in its own way.

    Nothing is said of modules: they are where φ starts, or have layers that are not used. (Lists
    and dicts of parameters are no such modules.) Nor is it of what another argument was made of, as
    the fields of an object are of each other: what is read hands its gradient on.
    """
    first = call.args[0] if call.args else None
    modules = [
        module
        for module in pytree.modules((call.args, call.kwargs))
        if module is first or not isinstance(module, (nn.ParameterDict, nn.ParameterList))
    ]
    known = {id(t) for t in pytree.leaves((condition.held(call), modules))}
    names = {id(t): name for name, t in _named(call)}
    ignored = {id(t) for t in unread}
    read = [t for _, t in _named(call) if torch.is_tensor(t) and id(t) not in ignored]
    behind = {node for t in read for node in walk([t])}
    leaves = {id(t) for t in leaves_among(read, behind)}
    known |= {id(t) for t in unread if id(t) in leaves or t.grad_fn in behind}
    told = [f"{names[id(t)]}, {describe(t)}" for t in unread if id(t) in names.keys() - known]
    if told:
        said = (
            f"{type(condition).__name__}: the function does not depend on {' and '.join(told)}, "
            "which requires grad: by this condition phi does not depend on it either, and the "
            "gradient is 0. If it should, the function has to compute with the tensor itself (not "
            "with .item(), .detach() or NumPy). What only steers the solver, such as a step length "
            "or a starting point, has no implicit gradient: pass it detached"
        )
        warn(said, anchor="unread")


def tell_of_arguments(error: Exception, call: Call) -> None:
    """Raise with advice if the solver stumbled over what all solvers are handed: detached tensors.

    `call` is the solver's.
    """
    if isinstance(error, ImplicitGradError):
        return
    said = f"the solver raised {type(error).__name__} ({error})"
    lists = [a for a in call.args if isinstance(a, (list, tuple)) and a]
    if isinstance(error, AttributeError) and any(type(a).__name__ in str(error) for a in lists):
        raise InvalidArgumentError(
            f"{said}, and was handed {describe(lists[0])} of {describe(lists[0][0])}: parameters "
            "arrive as detached tensors. If it trains a module, pass the module itself"
        ) from error
    if isinstance(error, RuntimeError) and "does not require grad" in str(error):
        raise InvalidArgumentError(
            f"{said}: tensors arrive in it detached, and so do a module's buffers. What it trains "
            "has to be argument.clone().requires_grad_(), or parameters of a module that is passed "
            "itself"
        ) from error


def _named(call: Call) -> list[tuple[str, Any]]:
    """The arguments' leaves with readable names."""
    pairs: list[tuple[str, Any]] = []
    for root, container in (("args", call.args), ("kwargs", call.kwargs)):
        names, leaves = pytree.names(container, root), pytree.leaves(container)
        pairs += zip(names, leaves, strict=True)
    return pairs
