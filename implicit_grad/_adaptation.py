"""How an `imaml` learner adapts: a step or a minimisation, and the inner problem kept of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from implicit_grad._ad import (
    GaussNewton,
    Linearization,
    gradient,
    leaves_behind,
    plain_gradient,
)
from implicit_grad._conditions import scalar
from implicit_grad._errors import GraphError
from implicit_grad._function import ImplicitFunction, Problem, variables
from implicit_grad._linear import LinearSolver
from implicit_grad._proximal import add_proximal, proximal_term
from implicit_grad._solution import checked
from implicit_grad._state import undisturbed
from implicit_grad._tree import Tensors, Tree
from implicit_grad._weights import Gate, Weights
from implicit_grad.monitor import Reporting

_NO_GRAPH = (
    "adapt: the loss has no graph to the learner's weights; it was computed under "
    "torch.no_grad(), or detached"
)


@dataclasses.dataclass
class Step:
    """The inner problem around one generation of weights, kept for backward.

    `phi` are the weights in the graph of `loss`; `values` the adapted ones, which are the same
    after a minimisation, and one gradient step on after `adapt(tensor)`. The learner's `Weights`
    must not be held here: they hold tensors whose graph holds this step, and autograd's graph is
    invisible to Python's garbage collector.
    """

    loss: Tensor
    phi: Tensors
    values: Tensors
    inputs: Tensors
    inputs_tree: Tree
    linear_solver: LinearSolver
    reporting: Reporting
    captured: Tensors
    outputs: Tensors | None
    gate_of_phi: Gate

    def sources(self) -> Tensors:
        """The values in the graph, with the implicit gradient behind them."""
        problem = Problem(self._values, _no_second_order, self._solve, self._recorded)
        attached: Tensors = ImplicitFunction.apply(problem, *self.inputs, *self.captured)
        return attached

    def drop(self) -> None:
        """Forget the loss and its graph, so that memory does not grow with the steps."""
        self.loss = self.loss.detach()
        self.phi, self.captured, self.outputs = (), (), None

    def _values(self, _: Tensors) -> Tensors:
        return tuple(t.detach() for t in self.values)  # objects of their own: no cycle through them

    def _recorded(self) -> tuple[Linearization, Tensors]:
        inputs = variables(self.inputs)
        theta, lam = self.inputs_tree.rebuild(inputs)
        smooth = gradient(self.loss, self.phi)
        residual, diagonal = add_proximal(smooth, self.values, range(len(theta)), theta, lam)
        parts = (residual, self.phi, smooth, diagonal, self.gate_of_phi.closed)
        around = (
            Linearization(*parts)
            if self.outputs is None
            else GaussNewton(self.loss, self.outputs, *parts)
        )
        return around, (*inputs, *self.captured)

    def _solve(self, around: Linearization, v: Tensors) -> Tensors:
        return self.reporting.solve(self.linear_solver, around, v)


def _step(
    weights: Weights,
    loss: Tensor,
    phi: Tensors,
    values: Tensors,
    gate_of_phi: Gate,
    linear_solver: LinearSolver,
    reporting: Reporting,
) -> Step:
    return Step(
        loss=loss,
        phi=phi,
        values=values,
        inputs=weights.inputs,
        inputs_tree=weights.inputs_tree,
        linear_solver=linear_solver,
        reporting=reporting,
        captured=weights.captured_by(loss),
        outputs=weights.outputs_behind(loss) if reporting.curvature == "gauss_newton" else None,
        gate_of_phi=gate_of_phi,
    )


def step_on_tensor(
    weights: Weights,
    loss: Tensor,
    lr: float,
    linear_solver: LinearSolver,
    reporting: Reporting,
    first_order: bool,
    allow_unused: bool,
) -> None:
    """φ ← φ − lr (∇loss + λ(φ − θ)); the loss's graph, kept, is what backward linearises."""
    phi, theta = weights.current, weights.theta
    if not scalar("adapt: the loss", loss).requires_grad:
        raise GraphError(
            f"{_NO_GRAPH}. Compute it with gradients on, or pass a function: "
            "learner.adapt(lambda: loss(...))"
        )
    slope = plain_gradient(loss, phi, keep_graph=not first_order)
    weights.check_used(slope, allow_unused)
    values = weights.moved(slope, lr)
    if first_order:
        weights.attach(values, theta)
        return
    reporting = dataclasses.replace(reporting, inner_solved=False)  # one step, whatever `solver` is
    step = _step(weights, loss, phi, values, weights.gate, linear_solver, reporting)
    weights.supersede()
    weights.attach(values, step.sources(), release=step.drop)


def minimise_closure(
    weights: Weights,
    closure: Callable[[], Tensor],
    minimise: Callable[[Callable[[Tensors], Tensor], Tensors], Tensors],
    linear_solver: LinearSolver,
    reporting: Reporting,
    first_order: bool,
    allow_unused: bool,
) -> None:
    """φ = argmin loss + λ/2 ‖φ − θ‖² by any minimiser; backward linearises at φ itself."""
    before, theta = weights.current, weights.theta

    def objective(phi: Tensors) -> Tensor:
        weights.install(tuple(phi))
        loss = scalar("adapt: the function's loss", closure())
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in phi)
        if wanted and not loss.requires_grad:
            raise GraphError(_NO_GRAPH)
        return loss + proximal_term(phi, theta_values, weights.lam_values())

    theta_values = tuple(t.detach() for t in theta)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            start = tuple(t.detach().clone() for t in before)
            values, _ = checked(minimise(objective, start), theta_values, template=start)
        if not torch.is_grad_enabled():
            before = values
            return
        if first_order:
            weights.attach(values, theta)
            before = weights.current
            return
        phi = variables(values)
        weights.install(phi)
        with undisturbed({t.device for t in values}):
            loss = scalar("adapt: the function's loss", closure())
        behind = {id(t) for t in leaves_behind([loss])}
        weights.check_used(tuple(p if id(p) in behind else None for p in phi), allow_unused)
        step = _step(weights, loss, phi, values, Gate(), linear_solver, reporting)
        weights.attach(values, step.sources())
        before = weights.current
    finally:
        weights.install(before)


def _no_second_order(phi: Tensors, inputs: Tensors) -> Linearization:
    raise GraphError(
        "second derivatives through an adapted imaml learner are not available: backward was "
        "called with create_graph=True. Use implicit(solver, proximal(loss, lam)) with functional "
        "calls of the model, whose gradients are differentiable to every order"
    )
