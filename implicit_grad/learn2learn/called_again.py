"""A learner's call, made again elsewhere: the check of the products of `adapt(loss)` of a tensor.

The loss of a tensor cannot be computed again, but the outputs that it was computed of can. What is
checked is the model: the second derivatives of cᵀ·outputs, c what the loss's gradient by them is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_grad._curvature.check import Checks, Probe, check_objective
from implicit_grad._curvature.objective import Objective
from implicit_grad._theorem.linearization import Curvature, Finding
from implicit_grad._torch import pytree
from implicit_grad._torch.isolation import Ambient, isolated
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


Function = Callable[..., Any]  # of a call's arguments; the learner's, with its present weights


def noted(weights: Weights, function: Function, args: Any, kwargs: Any) -> Any:
    """The call's output; the call is kept until the learner adapts."""
    ambient = Ambient({t.device for t in weights.theta}, weights.theta)
    output = function(*args, **kwargs)
    weights.last_call = Call(args, kwargs, ambient, _differentiable(output))
    return output


def finding(
    weights: Weights, function: Function, loss: Tensor, curvature: Curvature, checks: Checks
) -> Finding | None:
    """What is wrong with the products of the last call, or of the first that was checked."""
    last, weights.last_call = weights.last_call, None

    def look() -> Finding | None:
        if last is None or curvature == "finite_difference":
            return None
        try:
            found = _look(weights, function, loss, curvature, last)
        except Exception:  # a check must not end what works without it
            return None
        # differences would be those of the loss, which cannot be computed again
        return found and found._replace(differences_take_over=False)

    return checks.of_kind(_KIND, look)


def _look(
    weights: Weights, function: Function, loss: Tensor, curvature: Curvature, call: Call
) -> Finding | None:
    slope = torch.autograd.grad(loss, call.outputs, retain_graph=True, allow_unused=True)
    used = [(i, c) for i, c in enumerate(slope) if c is not None]
    before, remembered = weights.current, list(weights.calls)

    def outputs(phi: Tensors) -> Tensors:
        weights.install(phi)
        with isolated(call.ambient):
            return _differentiable(function(*call.args, **call.kwargs))

    def value(outputs: Tensors) -> Tensor:
        return torch.stack([(outputs[i] * c).sum() for i, c in used]).sum()

    def again(phi: Tensors) -> Tensor:
        return value(outputs(phi))

    try:
        phi = variables(before)
        here = outputs(phi)
        pairs = zip(here, call.outputs, strict=True)
        if not all(torch.allclose(a, b, rtol=1e-3) for a, b in pairs):
            return None  # its inputs were changed since, or it counts its calls
        objective = Objective(value(here), phi, outputs=here, again=again)
        probe = Probe((objective.value,), phi, (), lambda phi, _: (again(phi),))
        return check_objective(objective, probe, curvature)
    finally:
        weights.install(before)
        weights.calls.extend(remembered)


def _differentiable(output: Any) -> Tensors:
    """The tensors of a call's output that have a graph."""
    return tuple(t for t in pytree.leaves(output) if torch.is_tensor(t) and t.requires_grad)
