"""A check of the first product: whether torch's second derivative is the derivative of the first.

Of some operations it silently is not: of custom Functions whose backward detaches, uses `.data` or
runs in NumPy, and of a few of torch's own. What is found has a sentence that names the operation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from implicit_grad._curvature.checked_objective import CheckedObjective
from implicit_grad._curvature.checked_residual import CheckedResidual
from implicit_grad._curvature.comparison import direction, is_wrong
from implicit_grad._curvature.objective import Objective
from implicit_grad._curvature.probe import COARSE, Probe, turns_unseen, weighed_sum
from implicit_grad._theorem.linearization import Curvature, Finding, Linearization
from implicit_grad._torch.graph import custom_functions, once_differentiable, wrong_third
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Tensors, inner

P = ParamSpec("P")
_log = logging.getLogger(__name__)


def harmless(look: Callable[P, Finding | None]) -> Callable[P, Finding | None]:
    """A check that must not end what works without it: what is wrong comes again, where it counts.

    What it ran into is logged.
    """

    @functools.wraps(look)
    def looked(*args: P.args, **kwargs: P.kwargs) -> Finding | None:
        try:
            return look(*args, **kwargs)
        except Exception:
            _log.debug("a check of products came to no end", exc_info=True)
            return None

    return looked


@harmless
def check_objective(objective: Objective, probe: Probe, curvature: Curvature) -> Finding | None:
    """What is wrong with products around φ, if anything is."""
    if probe.eps > COARSE or not probe.phi:
        return None
    if once_differentiable(probe.outputs, probe.phi):
        return None  # which `linearize` knows how to deal with
    return CheckedObjective(objective, probe).finding_of_solutions(curvature)


@harmless
def check_lagrangian(
    objective: Objective, probe: Probe, lagrangian: Callable[[Tensors], Tensor]
) -> Finding | None:
    """What is wrong with products around φ under constraints, which differences do not replace."""
    if probe.eps > COARSE or once_differentiable(probe.outputs, probe.phi):
        return None
    weighed = _weighed(probe, lagrangian)
    of_all = dataclasses.replace(objective, value=weighed.outputs[0])
    found = check_objective(of_all, weighed, "hessian")
    if found is None and _constraints_are_wrong(probe, lagrangian):
        said = "how a constraint changes with an argument is not what differences say"
        found = Finding(f"{said}: {probe.suspects}", False)
    return found


def _weighed(probe: Probe, weigh: Callable[[Tensors], Tensor]) -> Probe:
    """What is evaluated again, with one number made of the outputs in their place."""

    def elsewhere(phi: Tensors, inputs: Tensors) -> Tensors:
        with torch.enable_grad():
            return (weigh(probe.elsewhere(phi, inputs)),)

    with torch.enable_grad():
        value = weigh(probe.outputs)
    return dataclasses.replace(probe, outputs=(value,), elsewhere=elsewhere)


def _constraints_are_wrong(probe: Probe, lagrangian: Callable[[Tensors], Tensor]) -> bool:
    """Whether their values move with arguments in a way that their derivatives do not know."""
    targets = tuple(probe.inputs[i] for i in probe.moving)
    if not targets:
        return False
    away = direction(targets)

    def pull(outputs: Tensors) -> Tensor:
        return lagrangian(outputs) - outputs[0]

    def moved(t: float) -> Tensors:
        with torch.enable_grad():
            outputs = probe.elsewhere(probe.phi, probe.moved_inputs(away, t))
        return (pull(outputs).detach(),)

    with torch.enable_grad():
        here = pull(probe.outputs)
    with torch.no_grad():
        claimed = inner(vjp((here,), targets, (torch.ones_like(here),)), away)
    return any(is_wrong(moved, (here.detach(),), (here.new_tensor(claimed),), probe.eps))


@harmless
def check_third(
    objective: Objective, probe: Probe, lagrangian: Callable[[Tensors], Tensor] | None = None
) -> Finding | None:
    """What is wrong with third derivatives by φ, where there is something to suspect."""
    wrong = wrong_third(probe.outputs, probe.phi)
    if wrong:
        return Finding(f"torch's third derivative of {', '.join(wrong)} is wrong", False)
    if probe.eps > COARSE or not custom_functions(probe.outputs, (*probe.phi, *probe.inputs)):
        return None
    if once_differentiable(probe.outputs, probe.phi):
        return None  # as above, and its graph may serve one backward pass only
    if lagrangian is not None:
        probe = _weighed(probe, lagrangian)
        objective = dataclasses.replace(objective, value=probe.outputs[0])
    return CheckedObjective(objective, probe).third()


@harmless
def check_residual(around: Linearization, probe: Probe, both_products: bool) -> Finding | None:
    """What is wrong with products around φ, where F is given and no objective's gradient."""
    if probe.eps > COARSE or not probe.phi:
        return None
    return CheckedResidual(around, probe, both_products).finding_of_solutions()


@harmless
def check_residual_twice(probe: Probe) -> Finding | None:
    """What is wrong with derivatives of products around φ, where F is given.

    Only where there is something to suspect: what is detached in F may well be meant, such as a
    preconditioner, whose derivative F = 0 cancels.
    """
    suspects = wrong_third(probe.outputs, probe.phi)
    if not (suspects or custom_functions(probe.outputs, (*probe.phi, *probe.inputs))):
        return None
    along = direction(tuple(map(torch.ones_like, probe.outputs)))
    probe = _weighed(probe, lambda residual: weighed_sum(residual, along))
    found = check_objective(Objective(probe.outputs[0], probe.phi), probe, "hessian")
    if found is None and not turns_unseen(probe, lambda value, phi: value):
        return None
    what = "the second derivative of the residual is not the difference of its first"
    who = f"of torch's operations, suspect {', '.join(suspects)}" if suspects else probe.suspects
    return Finding(f"{what}: {who}", False)
