"""A learner's call, made again elsewhere: the check of the products of `adapt(loss)` of a tensor.

The loss of a tensor cannot be computed again, but the outputs that it was computed of can. What is
checked is the model: the second derivatives of cᵀ·outputs, c what the loss's gradient by them is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from implicit_grad._curvature.check import check_objective, harmless
from implicit_grad._curvature.checks import Checks
from implicit_grad._curvature.objective import Objective
from implicit_grad._curvature.probe import Probe
from implicit_grad._theorem.linearization import Curvature, Finding
from implicit_grad._torch import pytree
from implicit_grad._torch.isolation import Ambient, isolated
from implicit_grad._torch.modules import attributes_put_back
from implicit_grad._torch.products import variables
from implicit_grad._torch.pytree import Tensors
from implicit_grad.learn2learn.fast_weights import Weights

_KIND = "a learner's call"  # one verdict for all of them: to walk each graph again takes time


def asked_for(checks: Checks) -> bool:
    """Whether the next call's products are to be checked."""
    return checks.asks(_KIND)


class Call(NamedTuple):
    """A call of a learner, the surroundings it was made in, and what came out."""

    args: Any
    kwargs: Any
    ambient: Ambient
    outputs: Tensors


Cotangents = dict[int, Tensor]  # of some outputs, by their places
Function = Callable[..., Any]  # of a call's arguments; the learner's, with its present weights


def noted(weights: Weights, function: Function, args: Any, kwargs: Any) -> Any:
    """The call's output; the call is kept until the learner adapts."""
    ambient = Ambient({t.device for t in weights.theta}, weights.theta)
    output = function(*args, **kwargs)
    weights.noted.append(Call(args, kwargs, ambient, _differentiable(output)))
    return output


def finding(
    weights: Weights,
    module: nn.Module,
    function: Function,
    loss: Tensor,
    curvature: Curvature,
    checks: Checks,
) -> Finding | None:
    """What is wrong with the products of the call behind the loss, or of the first so checked."""
    if not asked_for(checks):
        return checks.of_kind(_KIND, lambda: None, ())
    behind = _behind(weights, loss)
    if behind is None:
        return None  # and the next one is looked at

    def look() -> Finding | None:
        if curvature == "finite_difference":
            return None
        with attributes_put_back(module):
            found = _look(weights, function, curvature, *behind)
        # differences would be those of the loss, which cannot be computed again
        return found and found._replace(differences_take_over=False)

    return checks.of_kind(_KIND, look, weights.current)


def _behind(weights: Weights, loss: Tensor) -> tuple[Call, Cotangents] | None:
    """The newest call that the loss depends on, and how it depends on each output."""
    for call in reversed(weights.noted):
        if not call.outputs:
            continue
        slope = torch.autograd.grad(loss, call.outputs, retain_graph=True, allow_unused=True)
        used = {i: c for i, c in enumerate(slope) if c is not None}
        if used:
            return call, used
    return None


@harmless
def _look(
    weights: Weights, function: Function, curvature: Curvature, call: Call, slope: Cotangents
) -> Finding | None:
    before, remembered = weights.current, list(weights.calls)

    def outputs(phi: Tensors) -> Tensors:
        weights.install(phi)
        with isolated(call.ambient):
            return _differentiable(function(*call.args, **call.kwargs))

    def value(outputs: Tensors) -> Tensor:
        return torch.stack([(outputs[i] * c).sum() for i, c in slope.items()]).sum()

    def again(phi: Tensors) -> Tensor:
        return value(outputs(phi))

    try:
        phi = variables(before)
        here = outputs(phi)
        if len(here) != len(call.outputs) or not all(map(_is_same, here, call.outputs)):
            return None  # its inputs were changed since, or it counts its calls
        objective = Objective(value(here), phi, outputs=here, again=again)
        probe = Probe((objective.value,), phi, (), lambda phi, _: (again(phi),))
        return check_objective(objective, probe, curvature)
    finally:
        weights.install(before)
        weights.calls.extend(remembered)


def _is_same(again: Tensor, noted: Tensor) -> bool:
    """Whether two outputs are equal but for rounding, in the dtype that autocast gave the first."""
    close = max(1e-3, 8 * torch.finfo(noted.dtype).eps)
    distance = (again.detach().to(noted.dtype) - noted.detach()).norm()
    return bool(distance <= close * noted.detach().norm())


def _differentiable(output: Any) -> Tensors:
    """The tensors of a call's output that have a graph."""
    return tuple(t for t in pytree.leaves(output) if torch.is_tensor(t) and t.requires_grad)
