"""Whether products with an objective's second derivative are differences of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._curvature.comparison import changes_unseen, direction, is_wrong, units
from implicit_grad._curvature.culprit import culprit
from implicit_grad._curvature.finite_difference import FiniteDifference
from implicit_grad._curvature.hessian import GaussNewtonProduct, Hessian
from implicit_grad._curvature.objective import Objective
from implicit_grad._curvature.probe import Probe, moved_along, turns_unseen, weighed_sum
from implicit_grad._curvature.symmetric import SymmetricPart
from implicit_grad._errors import GraphError
from implicit_grad._theorem.linearization import Curvature, Finding
from implicit_grad._torch.graph import custom_functions
from implicit_grad._torch.kinks import take_pieces
from implicit_grad._torch.padding import beside_padding
from implicit_grad._torch.products import gradient, vjp, without_hooks
from implicit_grad._torch.pytree import Tensors, inner

_SHOWS_AT = (
    "on the way back it first shows at {}: its backward, or what it was given, takes for constant "
    "what is not (.detach(), .data, NumPy, a hook), or torch's own derivative of it is wrong"
)
_HELD = (
    "the gradient of the objective is not the derivative of its value: something that depends on "
    "phi is held constant in it (.detach(), torch.no_grad(), a target network, the directions of a "
    "spectral norm in training mode, for which .eval() is the cure). A solver that "
    "makes the value smallest and one that stops where this gradient is zero end at different phi, "
    "and the implicit gradient is that of neither. For the first let nothing be held; for the "
    "second give ig.root the gradient, written out. An estimator that means it, such as DiCE, "
    'takes check="never"'
)
_HARDLY = 0.05  # of the gradient's change from φ to there
_BESIDE = 0.125  # how far from φ, in sizes of φ


class CheckedObjective:
    """∇value along lines through φ and through the arguments."""

    def __init__(self, objective: Objective, probe: Probe, along: Tensors | None = None) -> None:
        self._objective, self._probe = objective, probe
        self._inputs = tuple(probe.inputs[i] for i in probe.fine)
        self._phi, self._guard = objective.phi, objective.guard
        self._units = units(self._phi) + units(self._inputs)
        if along is None:
            along = beside_padding(direction(self._phi), objective.value, self._phi)
        self._along = along
        self._hessian = Hessian(objective)
        self._slope = self._hessian.smooth
        self._product, self._cross = self._products(along)

    def finding_of_solutions(self, curvature: Curvature) -> Finding | None:
        """The finding, unless it is about directions in which no solution moves."""
        found = self.finding(curvature)
        part = SymmetricPart(self._phi, self._probe.eps)
        if found is None or not part.has_solutions(self._along, self._products):
            return found
        term = self._objective.stationarity(self._slope)
        if term.linear_part or term.scale is not None:
            return found  # φ is held near a θ, which may move it in any direction
        along = part.of(self._along)
        return CheckedObjective(self._objective, self._probe, along).finding(curvature)

    def finding(self, curvature: Curvature) -> Finding | None:
        slope = gradient_at(self._objective.value, self._all, self._guard)
        along = slope[0].new_tensor(inner(self._slope, self._along))
        wrong = is_wrong(
            self._moved_phi,
            (self._objective.value.detach(), *self._scaled(slope)),
            (along, *self._scaled((*self._product, *self._cross))),
            self._probe.eps,
            self._claimed_at,
        )
        if wrong[0]:
            return Finding(_HELD, False, complete=True)
        in_phi = any(wrong[1 : 1 + len(self._phi)])
        in_inputs = any(wrong[1 + len(self._phi) :])
        if curvature == "gauss_newton":
            in_phi = in_phi and self._gauss_newton_is_wrong()
        held = not in_inputs and self._inputs_are_held(self._crossed)
        if not (in_phi or in_inputs or held):
            return None
        if in_phi and self._gradient_is_another_beside():
            return Finding(_HELD, False, complete=True)
        return Finding(self._sentence(in_phi), curvature == "auto" and self._differences_hold())

    def _gradient_is_another_beside(self) -> bool:
        """Whether the gradient is not the derivative of the value beside φ; at φ, both may be 0."""

        def value(t: float) -> Tensor:
            return self._value(moved_along(self._phi, self._along, _BESIDE + t), ())

        phi = moved_along(self._phi, self._along, _BESIDE)
        there = self._value(phi, ())
        slope = inner(gradient_at(there, phi, self._guard), self._along)
        wrong = is_wrong(
            lambda t: (value(t).detach(),),
            (there.detach(),),
            (there.detach().new_tensor(slope),),
            self._probe.eps,
        )
        if not wrong[0]:
            return False
        step, here = self._probe.eps ** (1 / 3), inner(self._slope, self._along)
        rise = (value(step).item() - value(-step).item()) / (2 * step)
        # directions of a spectral norm that have been found are held, and hardly turn
        return bool(abs(rise - slope) > _HARDLY * abs(slope - here))

    def third(self) -> Finding | None:
        """Whether products with the second derivative have a wrong derivative of their own."""

        def product(t: float) -> Tensors:
            phi = moved_along(self._phi, self._along, t)
            with torch.enable_grad():
                slope = gradient(self._value(phi, ()), phi)
            with torch.no_grad(), self._guard():
                return self._scaled(vjp(slope, phi, self._along))

        with torch.enable_grad():
            here = vjp(self._slope, self._phi, self._along)
        with torch.no_grad():
            claimed = self._scaled(vjp(here, self._phi, self._along))
        wrong = is_wrong(product, self._scaled(here), claimed, self._probe.eps)
        if not any(wrong) and not turns_unseen(self._probe, self._rise):
            return None
        what = "the third derivative of the objective is not the difference of its second"
        return Finding(f"{what}: {self._probe.suspects}", False)

    def _rise(self, value: Tensor, phi: Tensors) -> Tensor:
        """How steeply a value rises along the line."""
        return weighed_sum(gradient(value, phi), self._along)

    @property
    def _all(self) -> Tensors:
        return (*self._phi, *self._inputs)

    def _scaled(self, blocks: Tensors) -> Tensors:
        """In units that are comparable; inputs come after φ, if at all."""
        return tuple(b.detach() * u for b, u in zip(blocks, self._units, strict=False))

    def _moved_phi(self, t: float) -> Tensors:
        """The value, and its gradient by φ and by the inputs, at φ + t·along."""
        phi = moved_along(self._phi, self._along, t)
        value = self._value(phi, ())
        slope = gradient_at(value, (*phi, *self._inputs), self._guard)
        return value.detach(), *self._scaled(slope)

    def _claimed_at(self, t: float) -> Tensors:
        """What torch says that these change by, at φ + t·along."""
        phi = moved_along(self._phi, self._along, t)
        there = Hessian(Objective(self._value(phi, ()), phi, guard=self._guard))
        with torch.no_grad():
            product = there.smooth_transposed(self._along)
        along = product[0].new_tensor(inner(there.smooth, self._along))
        cross = self._crossed(self._along, there.smooth)
        return along, *self._scaled((*product, *cross))

    def _value(self, phi: Tensors, inputs: Tensors) -> Tensor:
        with torch.enable_grad():
            value, *_ = self._probe.elsewhere(phi, inputs)
        take_pieces(value, self._objective.value)
        return value

    def _products(self, u: Tensors) -> tuple[Tensors, Tensors]:
        """The second derivative times u, and (∂∇value/∂inputs)ᵀu."""
        with torch.no_grad():
            return self._hessian.smooth_transposed(u), self._crossed(u)

    def _crossed(self, u: Tensors, slope: Tensors | None = None) -> Tensors:
        """(∂∇value/∂inputs)ᵀu, where ∇value was recorded or where it is another slope."""
        with torch.no_grad(), self._guard(), without_hooks(self._inputs):
            return vjp(self._slope if slope is None else slope, self._inputs, u)

    def _inputs_are_held(self, crossed: Callable[[Tensors], Tensors]) -> bool:
        """Whether ∇value moves with the arguments, and (∂∇value/∂inputs)ᵀ does not know it."""
        probe = self._probe
        targets = tuple(probe.inputs[i] for i in probe.moving)
        if not targets:
            return False
        away = direction(targets)
        own = {id(t): i for i, t in enumerate(self._inputs)}

        def slope(t: float) -> Tensors:
            phi = moved_along(self._phi, self._along, 0.0)
            value = self._value(phi, probe.moved_inputs(away, t))
            return gradient_at(value, phi, self._guard)

        def claimed(u: Tensors) -> float:
            found = crossed(u)
            return inner([found[own[id(t)]] for t in targets], away)

        return changes_unseen(slope, self._slope, claimed, probe.eps)

    def _gauss_newton_is_wrong(self) -> bool:
        """Whether it is the loss that has a wrong second derivative, or the model's Jacobian."""
        outputs = self._objective.outputs
        assert outputs is not None
        in_loss = custom_functions([self._objective.value], outputs)
        if in_loss or not custom_functions(outputs, self._phi):
            return True
        product = GaussNewtonProduct(self._objective.value, outputs, self._phi)
        return product.jacobian_is_inconsistent(self._along)

    def _differences_hold(self) -> bool:
        """Whether differences of gradients can take over."""
        try:
            differences = FiniteDifference(self._objective)
        except GraphError:
            return False

        def crossed(u: Tensors) -> Tensors:
            return differences.smooth_pullback(u, self._inputs)

        return not self._inputs_are_held(crossed)

    def _sentence(self, in_phi: bool) -> str:
        what = (
            "a product with the second derivative of the objective is not the difference of its "
            "gradients"
            if in_phi
            else "how the objective's gradient changes with an argument is not what differences say"
        )
        name = self._culprit() if in_phi else None
        return f"{what}: {self._probe.suspects if name is None else _SHOWS_AT.format(name)}"

    def _culprit(self) -> str | None:
        """The operation at which the second derivative begins to be wrong, if one shows."""

        def line(t: float) -> tuple[Tensor, Tensors]:
            phi = moved_along(self._phi, self._along, t)
            return self._value(phi, ()), phi

        with self._guard():
            return culprit(line, self._along, self._probe.eps)


def gradient_at(value: Tensor, inputs: Tensors, guard: Callable[[], Any]) -> Tensors:
    """∇value, without a graph."""
    with torch.no_grad(), guard(), without_hooks(inputs):
        return gradient(value, inputs)
