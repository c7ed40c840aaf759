"""How an `imaml` learner adapts: a step or a minimisation, and the inner problem kept of it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.proximal_term import ProximalObjective, ProximalTerm
from implicit_grad._curvature import check
from implicit_grad._curvature.auto import has_second_derivative, linearize
from implicit_grad._curvature.check import Checks
from implicit_grad._curvature.objective import Objective
from implicit_grad._errors import GraphError, InvalidArgumentError
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._theorem.implicit_function import ImplicitFunction, Problem
from implicit_grad._theorem.linearization import Curvature, Finding, Linearization
from implicit_grad._theorem.reattached import reattached
from implicit_grad._theorem.report import Reporting, solve_and_record
from implicit_grad._torch.captured import Lent, captured_tensors
from implicit_grad._torch.graph import leaves_behind, wrong_third
from implicit_grad._torch.isolation import Ambient, isolated
from implicit_grad._torch.products import plain_gradient, stand_ins, variables
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._wrapper.solver_output import checked
from implicit_grad.learn2learn.fast_weights import Gate, Weights
from implicit_grad.solvers._descent import Descent
from implicit_grad.solvers.gradient_descent import GradientDescent

_NO_GRAPH = (
    "adapt: the loss has no graph to the learner's weights; it was computed under "
    "torch.no_grad(), or detached"
)


@dataclasses.dataclass(frozen=True)
class Method:
    """How gradients of adapted weights are taken, and which parameters may be left out."""

    linear_solver: LinearSolver
    reporting: Reporting
    curvature: Curvature
    first_order: bool
    allow_unused: bool
    # whether the learners' loss has second derivatives, once that is known; shared by all clones
    verdict: list[bool]
    checks: Checks  # shared too

    def takes_differences(self, loss: Tensor, phi: Tensors, finding: Finding | None) -> bool:
        """Whether finite differences are asked for, or are the first kind of product that works.

        They need the learner, which then is freed by the garbage collector only: hence the trial.
        """
        if finding is not None and finding.differences_take_over:
            return True
        if self.curvature == "auto" and not self.verdict:
            self.verdict.append(has_second_derivative(Objective(loss, phi)))
        return self.curvature == "finite_difference" or self.verdict == [False]

    @property
    def needs_outputs(self) -> bool:
        """Whether a Gauss-Newton product may be taken."""
        return self.curvature == "gauss_newton" or self.linear_solver.needs_convex


class Replay:
    """Computes a learner's loss at other weights. The learner owns it, for a step must not."""

    def __init__(self, weights: Weights, closure: Callable[[], Tensor]) -> None:
        self._weights, self._closure = weights, closure
        self._ambient = Ambient({t.device for t in weights.theta}, weights.theta)

    def loss(self, phi: Tensors) -> Tensor:
        """The loss at φ, which is installed, with the random numbers of when this was made."""
        self._weights.install(phi)
        with isolated(self._ambient):
            return self._weights.total("adapt: the function's loss", self._called())

    def _called(self) -> Tensor:
        try:
            return self._closure()
        except (StopIteration, IndexError, KeyError) as error:
            raise InvalidArgumentError(
                "adapt: the function was called once more than there were steps, to linearise at "
                f"the solution, and raised {type(error).__name__}. It must be possible to call it "
                "steps + 1 times; a loss that takes a new batch at each call should take one batch "
                "there that stands for all of them"
            ) from error

    def loss_elsewhere(self, phi: Tensors) -> Tensor:
        """The loss at φ; afterwards the learner has the weights that it had."""
        before = self._weights.current
        try:
            return self.loss(phi)
        finally:
            self._weights.install(before)


@dataclasses.dataclass
class Step:
    """The inner problem around one generation of weights, kept for backward.

    `phi` are the weights in the graph of `loss`; `values` the adapted ones, which are the same if
    they were `minimised`, and one gradient step on after `adapt(tensor)`. The learner's `Weights`
    must not be held here: they hold tensors whose graph holds this step, and autograd's graph is
    invisible to Python's garbage collector.
    """

    loss: Tensor
    phi: Tensors
    values: Tensors
    inputs: Tensors
    inputs_tree: Tree
    method: Method
    captured: Tensors
    outputs: Tensors | None
    gate_of_phi: Gate
    minimised: bool
    tasks: int | None
    replay: weakref.ref[Replay] | None = None
    finding: Finding | None = None

    def sources(self) -> Tensors:
        """The values in the graph, with the implicit gradient behind them."""
        keeps_start = self.method.linear_solver.keeps_start
        problem = Problem(self._values, self._linearize, self._solve, self._recorded, keeps_start)
        attached: Tensors = ImplicitFunction.apply(problem, *self.inputs, *self.captured)
        return attached

    def checked(self, replay: Replay) -> Finding | None:
        """What is wrong with products around φ, where the loss can be computed again."""
        if self.method.curvature == "finite_difference":
            return None

        def look() -> Finding | None:
            again = replay.loss_elsewhere
            objective = Objective(
                self.loss, self.phi, outputs=self.outputs, again=again, tasks=self.tasks
            )
            probe = check.Probe((self.loss,), self.phi, self.captured, lambda phi, _: (again(phi),))
            return check.check_objective(objective, probe, self.method.curvature)

        return self.method.checks.finding((self.loss,), self.phi, look)

    def drop(self) -> None:
        """Forget the loss and its graph, so that memory does not grow with the steps."""
        self.loss = self.loss.detach()
        self.phi, self.captured, self.outputs = (), (), None

    def _values(self, _: Tensors) -> Tensors:
        return tuple(t.detach() for t in self.values)  # objects of their own: no cycle through them

    def _linearize(self, phi: Tensors, inputs: Tensors) -> Linearization:
        """F around φ as recorded, differentiable with respect to φ and the inputs."""
        if not self.minimised:
            raise GraphError(
                "second derivatives through adapt(loss) of a tensor are not available (backward "
                "was called with create_graph=True): its loss has derivatives before the step, and "
                "not where it led. Pass a function: learner.adapt(lambda: loss(...))"
            )
        wrong = wrong_third([self.loss], self.phi)
        if self.finding is not None or wrong:
            found = self.finding.sentence if self.finding else f"torch's of {wrong} are wrong"
            raise GraphError(f"second derivatives are not available: {found}")
        return reattached(self._recorded, self.method.curvature, phi, inputs)

    def _recorded(self, curvature: Curvature | None = None) -> tuple[Linearization, Tensors]:
        inputs = stand_ins(self.inputs, [t.requires_grad for t in self.inputs])
        theta, pull = self.inputs_tree.rebuild(inputs)
        objective = Objective(
            self.loss,
            self.phi,
            stationarity=lambda slope: pull.stationarity(slope, self._place(pull), theta),
            outputs=self.outputs,
            again=None if self.replay is None else self._again,
            guard=self.gate_of_phi.closed,
            tasks=self.tasks,
            own=self.minimised,
        )
        around = linearize(objective, curvature or self.curvature)
        around.finding = self.finding
        return around, (*inputs, *self.captured)

    @property
    def curvature(self) -> Curvature:
        """The kind of products: that asked for, or differences if it was found to be wrong."""
        if self.finding is not None and self.finding.differences_take_over:
            return "finite_difference"
        return self.method.curvature

    def _place(self, pull: ProximalTerm) -> Tensors:
        """The adapted weights; where F's linear part is taken from its graph, in terms of φ."""
        if self.minimised:
            return self.phi
        if not pull.factors:
            return self.values
        return tuple(p + (w - p).detach() for p, w in zip(self.phi, self.values, strict=True))

    def _again(self, phi: Tensors) -> Tensor:
        assert self.replay is not None
        replay = self.replay()
        if replay is None:
            raise GraphError(
                "the adapted learner is gone, and finite-difference products need it to compute "
                "its loss: keep the learner until backward() is done"
            )
        return replay.loss_elsewhere(phi)

    def _solve(self, around: Linearization, v: Tensors) -> Tensors:
        return solve_and_record(self.method.linear_solver, around, v, self.method.reporting)


def _step(
    weights: Weights,
    loss: Tensor,
    phi: Tensors,
    values: Tensors,
    gate_of_phi: Gate,
    method: Method,
    minimised: bool = False,
) -> Step:
    return Step(
        loss=loss,
        phi=phi,
        values=values,
        inputs=weights.inputs,
        inputs_tree=weights.inputs_tree,
        method=dataclasses.replace(method, linear_solver=method.linear_solver.for_call()),
        captured=weights.captured_by(loss),
        outputs=weights.outputs_behind(loss) if method.needs_outputs else None,
        gate_of_phi=gate_of_phi,
        minimised=minimised,
        tasks=weights.tasks,
    )


def step_on_tensor(
    weights: Weights,
    loss: Tensor,
    lr: float,
    method: Method,
) -> None:
    """φ ← φ − lr (∇loss + λ(φ − θ)); the loss's graph, kept, is what backward linearises."""
    phi, theta = weights.current, weights.theta
    loss = weights.total("adapt: the loss", loss)
    if not loss.requires_grad:
        raise GraphError(
            f"{_NO_GRAPH}. Compute it with gradients on, or pass a function: "
            "learner.adapt(lambda: loss(...))"
        )
    slope = plain_gradient(loss, phi, keep_graph=not method.first_order)
    weights.check_used(slope, method.allow_unused)
    values = weights.moved(slope, lr)
    if method.first_order:
        weights.attach(values, theta)
        return
    one_step = dataclasses.replace(method.reporting, inner_solved=False)  # whatever `solver` is
    method = dataclasses.replace(method, reporting=one_step)
    step = _step(weights, loss, phi, values, weights.gate, method)
    weights.supersede()
    weights.attach(values, step.sources(), release=step.drop)


def minimise_closure(
    weights: Weights,
    closure: Callable[[], Tensor],
    minimise: Callable[[Callable[[Tensors], Tensor], Tensors], Tensors],
    method: Method,
) -> None:
    """φ = argmin loss + λ/2 ‖φ − θ‖² by any minimiser; backward linearises at φ itself."""
    before, theta = weights.current, weights.theta

    def loss_at(phi: Tensors) -> Tensor:
        weights.install(tuple(phi))
        loss = weights.total("adapt: the function's loss", closure())
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in phi)
        if wanted and not loss.requires_grad:
            raise GraphError(_NO_GRAPH)
        return loss

    theta_values = tuple(t.detach() for t in theta)
    objective = ProximalObjective(loss_at, weights.pull.detached(), theta_values)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            start = tuple(t.detach().clone() for t in before)
            values, _ = checked(minimise(objective, start), theta_values, template=start)
        if not torch.is_grad_enabled():
            before = values
            return
        if method.first_order:
            weights.attach(values, theta)
            before = weights.current
            return
        phi, replay = variables(values), Replay(weights, closure)
        loss = replay.loss(phi)
        behind = {id(t) for t in leaves_behind([loss])}
        weights.check_used(tuple(p if id(p) in behind else None for p in phi), method.allow_unused)
        step = _step(weights, loss, phi, values, Gate(), method, True)
        finding = step.checked(replay)
        needed = replay if method.takes_differences(loss, phi, finding) else None
        again = None if needed is None else weakref.ref(needed)
        step = dataclasses.replace(step, finding=finding, replay=again)
        weights.attach(values, step.sources(), keeping=needed)
        before = weights.current
    finally:
        weights.install(before)


def minimiser(solver: Any, lr: float, steps: int | None) -> Callable[[Any, Any], Any]:
    """What minimises in `adapt(closure)`: the solver, or gradient steps if there is none."""
    if solver is None:
        return GradientDescent(lr=lr, steps=1 if steps is None else steps).minimize
    if steps is not None:
        raise InvalidArgumentError(
            "adapt: steps is for the default gradient descent; this learner has solver="
            f"{solver!r}, which decides itself when to stop"
        )
    minimise: Callable[[Any, Any], Any] = getattr(solver, "minimize", solver)

    def minimised(objective: Any, init: Any) -> Any:
        lent = Lent([t for _, t in captured_tensors(objective, minimise)])
        with lent.as_they_are():
            return minimise(objective, init)

    return minimised


def means_to_solve(solver: Any) -> bool:
    """Whether φ counts as unsolved if it is far from a solution: not after a number of steps."""
    counted = isinstance(solver, Descent) and not solver.has_tolerance
    return solver is not None and not counted
