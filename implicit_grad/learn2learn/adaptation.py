"""How an `imaml` learner adapts: a step or a minimisation, and the inner problem kept of it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from implicit_grad._conditions.proximal_term import ProximalObjective, ProximalTerm
from implicit_grad._curvature import check
from implicit_grad._curvature.auto import has_second_derivative, linearize
from implicit_grad._curvature.objective import Objective
from implicit_grad._curvature.probe import Probe
from implicit_grad._errors import GraphError, InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._theorem.implicit_function import ImplicitFunction, Problem
from implicit_grad._theorem.linearization import Curvature, Finding, Linearization
from implicit_grad._torch.captured import Lent, captured_tensors
from implicit_grad._torch.graph import kind_of_graph, leaves_behind
from implicit_grad._torch.isolation import Ambient, isolated
from implicit_grad._torch.products import plain_gradient, stand_ins, variables
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._warnings import Place, said_by, users_line
from implicit_grad._wrapper.recorded import Method, Recorded
from implicit_grad._wrapper.solver_output import checked
from implicit_grad.learn2learn import called_again
from implicit_grad.learn2learn.fast_weights import Gate, Weights
from implicit_grad.learn2learn.midway import Midway, middle_of
from implicit_grad.learn2learn.told import Told
from implicit_grad.solvers._descent import Descent
from implicit_grad.solvers.gradient_descent import GradientDescent

_NO_GRAPH = (
    "adapt: the loss has no graph to the learner's weights; it was computed under "
    "torch.no_grad(), detached, or computed in inference mode (Lightning validates without it if "
    "asked to: Trainer(inference_mode=False))"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMethod(Method):
    """How gradients of adapted weights are taken, and which parameters may be left out."""

    first_order: bool
    allow_unused: bool
    # whether losses of a kind have second derivatives, once that is known; shared by all clones
    twice: dict[Hashable, bool]
    told: Told  # likewise
    midway: Midway  # likewise
    keeps_steps: bool

    @property
    def counts_steps(self) -> bool:
        """Whether the gradient is that of the steps themselves, around the one in the middle."""
        return isinstance(self.linear_solver, EarlyStopped) and self.linear_solver.counts_nothing

    def of_steps(self, steps: int, time: float) -> StepMethod:
        """The method for the backward pass of weights that so many steps led to."""
        if not self.counts_steps:
            return self.for_call()
        assert isinstance(self.linear_solver, EarlyStopped)
        bound = self.linear_solver.of_steps(steps, time / steps)
        return dataclasses.replace(self, linear_solver=bound)

    def takes_differences(self, loss: Tensor, phi: Tensors, finding: Finding | None) -> bool:
        """Whether finite differences are asked for, or are the first kind of product that works.

        They need the learner, which then is freed by the garbage collector only: hence the trial.
        """
        if finding is not None and finding.differences_take_over:
            return True
        if self.curvature != "auto":
            return self.curvature == "finite_difference"
        kind = kind_of_graph([loss])
        if kind not in self.twice:
            self.twice[kind] = has_second_derivative(Objective(loss, phi))
        return not self.twice[kind]


def needs_outputs(curvature: Curvature, linear_solver: LinearSolver) -> bool:
    """Whether a Gauss-Newton product may be taken, around what the model put out."""
    return curvature == "gauss_newton" or linear_solver.needs_convex


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
class Step(Recorded):
    """The inner problem around one generation of weights, kept for backward.

    `phi` are the weights in the graph of `loss`; `values` the adapted ones, which are the same if
    they were `minimised`, one gradient step on after `adapt(tensor)`, and half of the steps on if
    those were counted. The learner's `Weights`
    must not be held here: they hold tensors whose graph holds this step, and autograd's graph is
    invisible to Python's garbage collector.
    """

    loss: Tensor
    phi: Tensors
    values: Tensors
    inputs: Tensors
    inputs_tree: Tree
    method: StepMethod
    captured: Tensors
    outputs: Tensors | None
    gate_of_phi: Gate
    minimised: bool
    n_tasks: int | None
    number: int  # of steps since clone()
    replay: weakref.ref[Replay] | None = None
    finding: Finding | None = None
    third: Finding | None = None  # what is wrong with the loss's third derivatives
    place: Place = dataclasses.field(default_factory=users_line)

    def sources(self) -> Tensors:
        """The values in the graph, with the implicit gradient behind them."""
        keeps_start = self.method.linear_solver.keeps_start
        problem = Problem(
            self._values, self.linearize, self.solve_adjoint, self.recorded, keeps_start
        )
        attached: Tensors = ImplicitFunction.apply(problem, *self.inputs, *self.captured)
        return attached

    def checked(self, replay: Replay) -> Step:
        """The step, and what is wrong with products around φ; the loss can be computed again."""
        if self.method.curvature == "finite_difference":
            return self
        again, outputs, checks = replay.loss_elsewhere, (self.loss,), self.method.checks
        objective = Objective(
            self.loss, self.phi, outputs=self.outputs, again=again, n_tasks=self.n_tasks
        )
        probe = Probe(outputs, self.phi, self.captured, lambda phi, _: (again(phi),))

        def second() -> Finding | None:
            return check.check_objective(objective, probe, self.method.curvature)

        def third() -> Finding | None:
            return check.check_third(objective, probe)

        finding = checks.finding(outputs, self.phi, second)
        return dataclasses.replace(
            self, finding=finding, third=checks.finding(outputs, self.phi, third, order=3)
        )

    def ending_at(self, last: Step) -> Step:
        """This inner problem for the weights that a later step led to."""
        theirs = ("values", "inputs", "inputs_tree", "method", "number", "place")
        return dataclasses.replace(self, **{name: getattr(last, name) for name in theirs})

    def drop(self) -> None:
        """Forget the loss and its graph, so that memory does not grow with the steps."""
        self.loss = self.loss.detach()
        self.phi, self.captured, self.outputs = (), (), None

    def _values(self, _: Tensors) -> Tensors:
        return tuple(t.detach() for t in self.values)  # objects of their own: no cycle through them

    def _refusal(self) -> str | None:
        if self.method.linear_solver.keeps_start:
            return (
                "second derivatives through EarlyStopped are not available: use CG(rtol=...) and "
                "the inner problem's solution"
            )
        if self.minimised:
            return None
        return (
            "second derivatives through adapt(loss) of a tensor are not available (backward was "
            "called with create_graph=True): its loss has derivatives before the step, and not "
            "where it led. Pass a function: learner.adapt(lambda: loss(...))"
        )

    def _third(self) -> Finding | None:
        return self.third

    def _from_record(self, curvature: Curvature) -> tuple[Linearization, Tensors]:
        self.method.midway.steps = self.number
        inputs = stand_ins(self.inputs, [t.requires_grad for t in self.inputs])
        theta, pull = self.inputs_tree.rebuild(inputs)
        objective = Objective(
            self.loss,
            self.phi,
            stationarity=lambda slope: pull.stationarity(slope, self._place(pull), theta),
            outputs=self.outputs,
            again=None if self.replay is None else self._again,
            guard=self.gate_of_phi.closed,
            n_tasks=self.n_tasks,
            own=self.minimised,
        )
        return linearize(objective, curvature), (*inputs, *self.captured)

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


def _step(
    weights: Weights,
    loss: Tensor,
    phi: Tensors,
    values: Tensors,
    gate_of_phi: Gate,
    method: StepMethod,
    time: float,
    number: int,
    minimised: bool = False,
) -> Step:
    inputs, inputs_tree = weights.inputs(time, method.linear_solver.keeps_start)
    wants_outputs = needs_outputs(method.curvature, method.linear_solver)
    return Step(
        loss=loss,
        phi=phi,
        values=values,
        inputs=inputs,
        inputs_tree=inputs_tree,
        method=method.of_steps(number, time),
        captured=weights.captured_by(loss),
        outputs=weights.outputs_behind(loss) if wants_outputs else None,
        gate_of_phi=gate_of_phi,
        minimised=minimised,
        n_tasks=weights.n_tasks,
        number=number,
    )


def step_on_tensor(
    weights: Weights,
    loss: Tensor,
    lr: float,
    method: StepMethod,
    module: nn.Module,
    call: Callable[..., Any],
) -> None:
    """φ ← φ − lr ∇loss, pulled to θ if λ is given; the loss's graph is what backward linearises.

    `call` is what the learner's forward runs, of its `module` of the moment, for the check.
    """
    phi, theta = weights.current, weights.theta
    loss = weights.total("adapt: the loss", loss)
    if torch.is_grad_enabled() and not any(t.requires_grad for t in phi):
        raise GraphError(
            "adapt: the learner was cloned, or adapted, under torch.no_grad(), and a loss has no "
            "gradient at its weights: clone it with gradients on, or pass a function: "
            "learner.adapt(lambda: loss(...))"
        )
    if not loss.requires_grad:
        raise GraphError(
            f"{_NO_GRAPH}. Compute it with gradients on, or pass a function: "
            "learner.adapt(lambda: loss(...))",
            anchor="no-graph",
        )
    method.told.of_loss(loss, method.reporting)
    slope = plain_gradient(loss, phi, keep_graph=not method.first_order)
    weights.check_used(slope, method.allow_unused)
    values = weights.moved(slope, lr)
    time, number = weights.time + lr, weights.number + 1
    if method.first_order or weights.stay(time):
        weights.attach(values, theta, time=time, number=number)
        return
    step = _step(weights, loss, phi, values, weights.gate, method, time, number)
    step.finding = called_again.finding(
        weights, module, call, loss, method.curvature, method.checks
    )
    if method.counts_steps:
        if method.midway.is_middle(number):
            weights.halfway = dataclasses.replace(step)  # the next step empties the original
        if method.midway.is_last(number) and weights.halfway is not None:
            step, weights.halfway = weights.halfway.ending_at(step), None
    weights.supersede(loss)
    release = None if method.keeps_steps else step.drop
    weights.attach(values, step.sources(), time=time, number=number, release=release)


def minimise_closure(
    weights: Weights,
    closure: Callable[[], Tensor],
    minimiser: Minimiser,
    method: StepMethod,
) -> None:
    """φ = argmin loss + λ/2 ‖φ − θ‖² by any minimiser; backward linearises at φ itself.

    Or, where steps are counted, at the one in their middle.
    """
    before, theta, weights.by_closure = weights.current, weights.theta, True
    first: list[Tensor] = []

    def loss_at(phi: Tensors) -> Tensor:
        weights.install(tuple(phi))
        loss = weights.total("adapt: the function's loss", closure())
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in phi)
        if wanted and not loss.requires_grad:
            raise GraphError(_NO_GRAPH, anchor="no-graph")
        if not first:
            first.append(loss.detach())
        return loss

    theta_values = tuple(t.detach() for t in theta)
    objective: Callable[[Tensors], Tensor] = loss_at
    if weights.pull is not None:
        objective = ProximalObjective(loss_at, weights.pull.detached(), theta_values)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            start = tuple(t.detach().clone() for t in before)
            reached = [start]
            for run in minimiser.runs(weights.number if method.counts_steps else None):
                with said_by(method.reporting.say):
                    returned = run(objective, reached[-1])
                reached.append(checked(returned, theta_values, template=start)[0])
        values = reached[-1]
        place = reached[-2] if method.counts_steps else values
        time, number = weights.time + minimiser.time, weights.number + minimiser.steps
        if not torch.is_grad_enabled():
            before, weights.time, weights.number = values, time, number
            return
        if method.first_order or weights.stay(time):
            weights.attach(values, theta, time=time, number=number)
            before = weights.current
            return
        phi, replay = variables(place), Replay(weights, closure)
        loss = replay.loss(phi)
        method.told.of_losses(first, loss, method.reporting)
        behind = {id(t) for t in leaves_behind([loss])}
        weights.check_used(tuple(p if id(p) in behind else None for p in phi), method.allow_unused)
        step = _step(weights, loss, phi, values, Gate(), method, time, number, True)
        step = step.checked(replay)
        needed = replay if method.takes_differences(loss, phi, step.finding) else None
        if needed is not None:
            step = dataclasses.replace(step, replay=weakref.ref(needed))
        weights.attach(values, step.sources(), time=time, number=number, keeping=needed)
        before = weights.current
    finally:
        weights.install(before)


class Minimiser(NamedTuple):
    """What minimises in `adapt(closure)`.

    Attributes:
        run: from an objective and a start.
        descent: gradient descent for a number of steps, if it is that.
    """

    run: Callable[[Any, Any], Any]
    descent: GradientDescent | None = None

    @property
    def time(self) -> float:
        """The sum of its steps' lengths, or 0 if that is not known."""
        return time_of(self.descent) or 0.0

    @property
    def steps(self) -> int:
        """How many it takes, or 0 if that is not known."""
        return 0 if self.descent is None else self.descent.most_steps

    def runs(self, before: int | None) -> tuple[Callable[[Any, Any], Any], ...]:
        """One run, or two that meet in the middle of the steps of all runs, so many `before`."""
        if self.descent is None or before is None:
            return (self.run,)
        first = max(0, middle_of(before + self.steps) - before)
        parts = (first, self.steps - first)
        return tuple(dataclasses.replace(self.descent, steps=n).minimize for n in parts)


def minimiser_of(solver: Any, lr: float, steps: int | None) -> Minimiser:
    """The solver, or gradient steps if there is none."""
    if solver is None:
        descent = GradientDescent(lr=lr, steps=1 if steps is None else steps)
        return Minimiser(descent.minimize, descent)
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

    return Minimiser(minimised, None if time_of(solver) is None else solver)


def check_solver(solver: Any, lam: Any) -> None:
    """Raise unless it minimises, and without a lam is known to take steps of known lengths."""
    if solver is not None and not callable(getattr(solver, "minimize", solver)):
        raise InvalidArgumentError(
            "imaml: solver must have minimize(objective, init) or be such a function, got "
            f"{describe(solver)}"
        )
    if lam is None and solver is not None and time_of(solver) is None:
        raise InvalidArgumentError(
            f"imaml: with solver={solver!r} a lam is needed, the pull towards theta, such as "
            "lam=2.0: without it a minimum does not depend on theta. (By default lam is 1 over "
            "the sum of the step lengths, known for MAML's own steps and for "
            "GradientDescent(lr=..., steps=...) without a tolerance.)"
        )


def time_of(solver: Any) -> float | None:
    """The sum of a minimiser's step lengths, if it is gradient descent for a number of steps."""
    counted = isinstance(solver, GradientDescent) and solver.counts_steps
    return solver.lr * solver.most_steps if counted else None


def means_to_solve(solver: Any) -> bool:
    """Whether φ counts as unsolved if it is far from a solution: not after a number of steps."""
    counted = isinstance(solver, Descent) and not solver.has_tolerance
    return solver is not None and not counted
