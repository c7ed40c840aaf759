"""A check of the first product: whether torch's second derivative is the derivative of the first.

Of some operations it silently is not: of custom Functions whose backward detaches, uses `.data` or
runs in NumPy, and of a few of torch's own. What is found has a sentence that names the operation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, ParamSpec, get_args

import torch
from torch import Tensor

from implicit_grad._curvature.comparison import changes_unseen, direction, is_wrong, units
from implicit_grad._curvature.culprit import culprit
from implicit_grad._curvature.finite_difference import FiniteDifference
from implicit_grad._curvature.hessian import GaussNewtonProduct, Hessian
from implicit_grad._curvature.objective import Objective
from implicit_grad._curvature.symmetric import SymmetricPart
from implicit_grad._errors import GraphError
from implicit_grad._options import check_one_of
from implicit_grad._theorem.linearization import Curvature, Finding, Linearization
from implicit_grad._torch.graph import (
    Graph,
    coarsest,
    coarsest_each,
    custom_functions,
    edges_of_graph,
    graph_behind,
    once_differentiable,
    unseen_by_saved_tensors_hooks,
    wrong_third,
)
from implicit_grad._torch.kinks import take_pieces
from implicit_grad._torch.padding import beside_padding
from implicit_grad._torch.products import gradient, own_precision, vjp, without_hooks
from implicit_grad._torch.pytree import Tensors, inner

P = ParamSpec("P")
_log = logging.getLogger(__name__)
Check = Literal["once", "always", "never"]
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
_COARSE = 1e-4  # eps of a dtype (bfloat16, float16) whose gradients are too coarse to be compared
_HARDLY = 0.05  # of the gradient's change from φ to there
_BESIDE = 0.125  # how far from φ, in sizes of φ
Elsewhere = Callable[[Tensors, Tensors], Tensors]


def check_option(check: object, where: str) -> None:
    """Raise unless this says when to check."""
    check_one_of(where, "check", check, get_args(Check))


@dataclasses.dataclass(frozen=True)
class Checks:
    """When products are checked, and what came of it for each kind of graph so far."""

    when: Check = "once"
    found: dict[Hashable, Finding | None] = dataclasses.field(default_factory=dict, compare=False)

    def finding(
        self,
        outputs: Tensors,
        phi: Tensors,
        look: Callable[[], Finding | None],
        order: int = 2,
        graph: Graph | None = None,
    ) -> Finding | None:
        """What `look` finds, or found the last time that a graph was of this kind.

        `graph` is that behind the outputs, if somebody has walked there before.
        """
        if self.when == "never":
            return None
        edges = edges_of_graph(graph_behind(outputs) if graph is None else graph, phi)
        return self.of_kind((order, edges, tuple(p.dtype for p in phi)), look, phi)

    def of_kind(
        self, kind: Hashable, look: Callable[[], Finding | None], phi: Tensors
    ) -> Finding | None:
        """What `look` finds for the kind, or found the last time; without autocast, as backward."""
        if self.asks(kind):
            with unseen_by_saved_tensors_hooks(), own_precision(p.device for p in phi):
                self.found[kind] = look()
        return self.found.get(kind)

    def asks(self, kind: Hashable) -> bool:
        """Whether a check of that kind would be made now."""
        return self.when == "always" or (self.when == "once" and kind not in self.found)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is evaluated again for a check.

    Attributes:
        outputs: those of the user's function, at φ.
        phi: the tensors that stand for φ in their graph.
        inputs: those that stand for arguments, and what the function captured.
        elsewhere: the outputs for other φ and other inputs; without inputs, for those at φ.
        movable: the places of those inputs that `elsewhere` takes.
    """

    outputs: Tensors
    phi: Tensors
    inputs: Tensors
    elsewhere: Elsewhere
    movable: Sequence[int] = ()

    @functools.cached_property
    def eps(self) -> float:
        """The relative precision of the coarsest numbers between φ and the outputs."""
        return coarsest(self.outputs, self.phi)

    @functools.cached_property
    def fine(self) -> list[int]:
        """The places of the inputs by which gradients are fine enough to be compared."""
        precisions = coarsest_each(self.outputs, self.inputs)
        together = enumerate(zip(self.inputs, precisions, strict=True))
        return [i for i, (t, eps) in together if t.requires_grad and eps <= _COARSE]

    @property
    def moving(self) -> list[int]:
        """The inputs along which there is something to check.

        Without custom Functions, an argument that is held constant was detached on purpose.
        """
        if not custom_functions(self.outputs, (*self.phi, *self.inputs)):
            return []
        return [i for i in self.movable if i in self.fine]

    def moved_inputs(self, away: Tensors, t: float) -> Tensors:
        """All inputs, those that are moving at t·away from where they are."""
        inputs = list(self.inputs)
        for i, d in zip(self.moving, away, strict=True):
            inputs[i] = torch.add(inputs[i].detach(), d, alpha=t)
        return tuple(inputs)

    @property
    def suspects(self) -> str:
        """Who may be to blame."""
        names = custom_functions(self.outputs, (*self.phi, *self.inputs))
        if names:
            return f"of what the value goes through, suspect {', '.join(names)}"
        return "suspect a .detach(), a hook on a tensor, or an operation of torch's own"


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
    if probe.eps > _COARSE or not probe.phi:
        return None
    if once_differentiable(probe.outputs, probe.phi):
        return None  # which `linearize` knows how to deal with
    return _Objective(objective, probe).finding_of_solutions(curvature)


@harmless
def check_lagrangian(
    objective: Objective, probe: Probe, lagrangian: Callable[[Tensors], Tensor]
) -> Finding | None:
    """What is wrong with products around φ under constraints, which differences do not replace."""
    if probe.eps > _COARSE or once_differentiable(probe.outputs, probe.phi):
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


def _weighed_sum(blocks: Tensors, weights: Tensors) -> Tensor:
    """The inner product, with its graph."""
    parts = ((b * w).sum() for b, w in zip(blocks, weights, strict=True))
    return functools.reduce(torch.add, parts)


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
    if probe.eps > _COARSE or not custom_functions(probe.outputs, (*probe.phi, *probe.inputs)):
        return None
    if once_differentiable(probe.outputs, probe.phi):
        return None  # as above, and its graph may serve one backward pass only
    if lagrangian is not None:
        probe = _weighed(probe, lagrangian)
        objective = dataclasses.replace(objective, value=probe.outputs[0])
    return _Objective(objective, probe).third()


@harmless
def check_residual(around: Linearization, probe: Probe, both_products: bool) -> Finding | None:
    """What is wrong with products around φ, where F is given and no objective's gradient."""
    if probe.eps > _COARSE or not probe.phi:
        return None
    return _Residual(around, probe, both_products).finding_of_solutions()


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
    probe = _weighed(probe, lambda residual: _weighed_sum(residual, along))
    found = check_objective(Objective(probe.outputs[0], probe.phi), probe, "hessian")
    if found is None and not _turns_unseen(probe, lambda value, phi: value):
        return None
    what = "the second derivative of the residual is not the difference of its first"
    who = f"of torch's operations, suspect {', '.join(suspects)}" if suspects else probe.suspects
    return Finding(f"{what}: {who}", False)


def _turns_unseen(probe: Probe, of: Callable[[Tensor, Tensors], Tensor]) -> bool:
    """Whether a number's gradient by the arguments moves with them, and torch does not know it.

    The number is made of the output, and of φ.
    """
    targets = tuple(probe.inputs[i] for i in probe.moving)
    if not targets or probe.eps > _COARSE or once_differentiable(probe.outputs, targets):
        return False
    away = direction(targets)

    def slope(t: float) -> Tensors:
        phi, inputs = _moved(probe.phi, probe.phi, 0.0), probe.moved_inputs(away, t)
        moved = tuple(inputs[i].requires_grad_() for i in probe.moving)
        with torch.enable_grad():
            value = of(probe.elsewhere(phi, inputs)[0], phi)
        with torch.no_grad():
            return gradient(value, moved)

    with torch.enable_grad(), without_hooks(targets):
        here = gradient(of(probe.outputs[0], probe.phi), targets)

    def claimed(u: Tensors) -> float:
        with torch.no_grad(), without_hooks(targets):
            return inner(vjp(here, targets, u), away)

    return changes_unseen(slope, tuple(h.detach() for h in here), claimed, probe.eps)


class _Objective:
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
        return _Objective(self._objective, self._probe, along).finding(curvature)

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
            return self._value(_moved(self._phi, self._along, _BESIDE + t), ())

        phi = _moved(self._phi, self._along, _BESIDE)
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
            phi = _moved(self._phi, self._along, t)
            with torch.enable_grad():
                slope = gradient(self._value(phi, ()), phi)
            with torch.no_grad(), self._guard():
                return self._scaled(vjp(slope, phi, self._along))

        with torch.enable_grad():
            here = vjp(self._slope, self._phi, self._along)
        with torch.no_grad():
            claimed = self._scaled(vjp(here, self._phi, self._along))
        wrong = is_wrong(product, self._scaled(here), claimed, self._probe.eps)
        if not any(wrong) and not _turns_unseen(self._probe, self._rise):
            return None
        what = "the third derivative of the objective is not the difference of its second"
        return Finding(f"{what}: {self._probe.suspects}", False)

    def _rise(self, value: Tensor, phi: Tensors) -> Tensor:
        """How steeply a value rises along the line."""
        return _weighed_sum(gradient(value, phi), self._along)

    @property
    def _all(self) -> Tensors:
        return (*self._phi, *self._inputs)

    def _scaled(self, blocks: Tensors) -> Tensors:
        """In units that are comparable; inputs come after φ, if at all."""
        return tuple(b.detach() * u for b, u in zip(blocks, self._units, strict=False))

    def _moved_phi(self, t: float) -> Tensors:
        """The value, and its gradient by φ and by the inputs, at φ + t·along."""
        phi = _moved(self._phi, self._along, t)
        value = self._value(phi, ())
        slope = gradient_at(value, (*phi, *self._inputs), self._guard)
        return value.detach(), *self._scaled(slope)

    def _claimed_at(self, t: float) -> Tensors:
        """What torch says that these change by, at φ + t·along."""
        phi = _moved(self._phi, self._along, t)
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
            phi = _moved(self._phi, self._along, 0.0)
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
            phi = _moved(self._phi, self._along, t)
            return self._value(phi, ()), phi

        with self._guard():
            return culprit(line, self._along, self._probe.eps)


class _Residual:
    """F along lines through φ and through the arguments."""

    def __init__(
        self,
        around: Linearization,
        probe: Probe,
        both_products: bool,
        along: Tensors | None = None,
    ) -> None:
        self._around, self._probe, self._both = around, probe, both_products
        self._along = direction(probe.phi) if along is None else along
        self._here = tuple(f.detach() for f in probe.outputs)

    def finding_of_solutions(self) -> Finding | None:
        """The finding, unless it is about directions in which no solution moves."""
        found = self.finding()
        part = SymmetricPart(self._probe.phi, self._probe.eps)
        if found is None or not part.has_solutions(self._along, self._products):
            return found
        return _Residual(self._around, self._probe, self._both, part.of(self._along)).finding()

    def _products(self, u: Tensors) -> tuple[Tensors, Tensors]:
        inputs = tuple(self._probe.inputs[i] for i in self._probe.fine)
        with torch.no_grad():
            return self._around.transposed(u), self._around.pullback(u, inputs)

    def finding(self) -> Finding | None:
        if self._is_wrong_in_phi():
            what = "a product with the residual's Jacobian is not the difference of residuals"
        elif self._is_wrong_in_inputs():
            what = "how the residual changes with an argument is not what differences say"
        else:
            return None
        return Finding(f"{what}: {self._probe.suspects}", False)

    def _is_wrong_in_phi(self) -> bool:
        phi, eps = self._probe.phi, self._probe.eps

        def moved(t: float) -> Tensors:
            return self._residual(_moved(phi, self._along, t), ())

        def transposed(u: Tensors) -> float:
            with torch.no_grad():
                return inner(self._around.transposed(u), self._along)

        def transposed_at(u: Tensors, t: float) -> float:
            there = _moved(phi, self._along, t)
            with torch.enable_grad():
                outputs = self._probe.elsewhere(there, ())
            with torch.no_grad():
                return inner(vjp(outputs, there, u), self._along)

        if changes_unseen(moved, self._here, transposed, eps, transposed_at):
            return True
        if not self._both:
            return False
        with torch.no_grad():
            product = self._around.smooth_product(self._along)
        return any(is_wrong(moved, self._here, product, eps))

    def _is_wrong_in_inputs(self) -> bool:
        probe = self._probe
        targets = tuple(probe.inputs[i] for i in probe.moving)
        if not targets:
            return False
        away = direction(targets)

        def moved(t: float) -> Tensors:
            return self._residual(probe.phi, probe.moved_inputs(away, t))

        def claimed(u: Tensors) -> float:
            with torch.no_grad():
                return inner(self._around.pullback(u, targets), away)

        return changes_unseen(moved, self._here, claimed, probe.eps)

    def _residual(self, phi: Tensors, inputs: Tensors) -> Tensors:
        with torch.enable_grad():
            outputs = self._probe.elsewhere(phi, inputs)
        return tuple(f.detach() for f in outputs)


def gradient_at(value: Tensor, inputs: Tensors, guard: Callable[[], Any]) -> Tensors:
    """∇value, without a graph."""
    with torch.no_grad(), guard(), without_hooks(inputs):
        return gradient(value, inputs)


def _moved(tensors: Tensors, along: Tensors, t: float) -> Tensors:
    return tuple(
        torch.add(p.detach(), d, alpha=t).requires_grad_()
        for p, d in zip(tensors, along, strict=True)
    )
