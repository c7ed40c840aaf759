"""One call of an implicit solver: the solver runs, its φ is checked, and F is recorded there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from implicit_grad._conditions.base import Again, Call, Condition, Snapshot
from implicit_grad._conditions.batching import why_one_by_one
from implicit_grad._conditions.constrained_root import as_root
from implicit_grad._conditions.processes import Processes
from implicit_grad._curvature import check
from implicit_grad._curvature.probe import Probe
from implicit_grad._errors import (
    GraphError,
    InvalidArgumentError,
    InvalidSolutionError,
    Status,
    describe,
)
from implicit_grad._linear_solvers.base import Filter, LinearSolver
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._linear_solvers.warm_start import Slot, WarmStart
from implicit_grad._theorem.adjoint import solve_newton
from implicit_grad._theorem.implicit_function import Problem
from implicit_grad._theorem.linearization import Curvature, Finding, Linearization
from implicit_grad._theorem.report import OnFailure, Reporting, solve_and_report
from implicit_grad._torch import pytree
from implicit_grad._torch.captured import Lent, captured_tensors
from implicit_grad._torch.clone import kept_objects, kept_tensors
from implicit_grad._torch.graph import (
    Graph,
    graph_behind,
    leaves_among,
    leaves_behind,
    once_differentiable,
)
from implicit_grad._torch.isolation import Ambient, casting_anew, isolated, uncached
from implicit_grad._torch.module_form import frozen, kept, mark_of, marked
from implicit_grad._torch.products import own_precision, stand_ins, variables
from implicit_grad._torch.pytree import Tensors, Tree, length, versions
from implicit_grad._torch.spectral_norm import turned
from implicit_grad._torch.transforms import (
    has_tangent,
    is_batched,
    is_transformed,
    is_wrapped,
    layers,
    outside_forward_mode,
    taking_gradients,
)
from implicit_grad._warnings import users_line
from implicit_grad._wrapper.arguments import tell_of_arguments
from implicit_grad._wrapper.recorded import Method, Recorded
from implicit_grad._wrapper.solver_output import check_determined, checked, tell_of_phi
from implicit_grad._wrapper.warm import WarmCall

_numbers = itertools.count()  # of runs of solvers, which tell their arguments apart
_LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
_CALLED_WITHOUT_START = (
    "phi is a module like the first argument and is taken for it, trained, so that the function is "
    "called as f(phi, *the other arguments). If phi was not made of that argument, or if the "
    "function reads that argument too, pass it by keyword"
)


def newton_candidates(
    solver: LinearSolver, around: Linearization, reporting: Reporting
) -> Iterator[Tensors]:
    """φ + t d for A d = −F and ever shorter t; none where A has negative curvature.

    A step that lowers ‖F‖ brings ‖φ − φ*‖ from δ to O(δ²), and with it the error of the implicit
    gradient. Where A is not positive definite, Newton's method may go to a saddle or a maximum.
    """
    solved = solve_newton(solver, around)
    # at a kink there is a step to one side, and where it leads is looked at
    if not (status := solved.status(around)).ok and status is not Status.DEGENERATE:
        tell_unpolished(status, reporting)
        return
    for share in _LENGTHS:
        with torch.no_grad():
            yield tuple(
                torch.add(p, d, alpha=share).detach()
                for p, d in zip(around.phi, solved.x, strict=False)
            )


def tell_unpolished(why: Status, reporting: Reporting) -> None:
    """Tell that φ stays as the solver found it."""
    reporting.say(f"phi was not polished: {why.sentence}", why.anchor)


def is_better(there: Linearization, here: Linearization) -> bool:
    """Whether ‖F‖ is smaller there."""
    with torch.no_grad():
        return length(there.residual) < length(here.residual)


def among(processes: Processes, reporting: Reporting) -> Reporting:
    """Reporting that measures whatever one of the processes will read: that takes sums of all."""
    ways = get_args(OnFailure)
    mine = [reporting.monitor is not None, ways.index(reporting.on_failure)]
    rows = processes.numbers(mine, "a backward pass")
    listening, on_failure = ({row[i] for row in rows} for i in (0, 1))
    if len(on_failure) > 1 and ways.index("raise") in on_failure:
        raise InvalidArgumentError(
            'implicit: on_failure="raise" is for all processes of a group, or for none'
        )
    anyway = True in listening or len(on_failure) > 1
    return dataclasses.replace(reporting, measured_anyway=anyway)


def phi_replaces_first(condition: Condition, phi: Any, call: Call) -> bool:
    """Whether φ is the first argument, trained: a module of its class, or a container with some.

    The condition's function is then not handed that argument, of which it has φ; nor is it that
    of a proximal term, whose first argument is θ in any case.
    """
    if not call.args or condition.template(call) is not None:
        return False
    return pytree.are_alike(phi, call.args[0])


# Tensors that φ's modules keep as the solver was lent them, and the places of these arguments.
Given = list[tuple[Tensor, int]]


def _followed(outputs: Sequence[Tensor]) -> Tensors:
    """The leaves that the transforms around, or torch without any, differentiate outputs by."""
    return leaves_behind([layer for t in outputs for layer in layers(t)])


def _is_copy(tensor: Tensor, of: Tensor) -> bool:
    return tensor is of or (tensor.device == of.device and torch.equal(tensor, of))


def _check_buffers(modules: list[nn.Module], reachable: list[Tensor]) -> None:
    """Raise if the solver trained buffers, as modules from before torch.func keep their weights."""
    known = {id(t) for t in reachable}
    for module in modules:
        buffers = (pair for pair in module.named_buffers() if id(pair[1]) not in known)
        names = [name for name, b in buffers if b.requires_grad and b.is_leaf]
        if names:
            raise InvalidSolutionError(
                f"the solver returned {describe(module)} with buffers that require grad "
                f"({', '.join(names)}): phi is a module's parameters, and buffers are constants, "
                "so that no gradient would go through what was trained there. Keep weights as "
                "parameters (self.weight = torch.nn.Parameter(...)), or return a dict of them"
            )


def _same(phi: Tensors, others: Sequence[Tensor]) -> bool:
    return len(phi) == len(others) and all(map(torch.equal, phi, others))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(Method):
    """What is chosen once for all calls of an implicit solver; see `implicit`."""

    condition: Condition
    polish: int = 0
    has_aux: bool = False
    training: Callable[[Tensors], EarlyStopped | None] | None = None  # of a minimiser of ours
    warm_start: WarmStart | Slot | None = None

    def for_call(self) -> Setup:
        """The setup for one call, bound to the key that `WarmStart.at` has set now."""
        if self.warm_start is None:
            return super().for_call()
        slot, solver = self.warm_start.slot(), self.linear_solver
        if not self.condition.tasks:
            solver = solver.starting_from(slot)
        return dataclasses.replace(self, warm_start=slot, linear_solver=solver.for_call())

    def without_trace(self) -> Setup:
        """A setup that starts solves as this one does, and keeps nothing of them."""
        if not isinstance(self.warm_start, WarmStart):
            return self
        return dataclasses.replace(self, warm_start=self.warm_start.as_it_is())

    def why_one_by_one(self, if_small: bool) -> str | None:
        """Why calls cannot be one batch (`if_small`: if they are small); None if they can."""
        asked = self.reporting.rtol_gradient
        return why_one_by_one(self.linear_solver, self.curvature, self.polish, asked, if_small)


class Evaluation(Recorded):
    """One call of an implicit solver, as backward needs it: the solution and F's graph there.

    It never holds φ or the arguments with their graphs: they would keep their own node alive.
    """

    def __init__(
        self,
        run: Callable[[Call], Any],
        setup: Setup,
        tree: Tree,
        inputs: Tensors,
        solver: object = None,
    ) -> None:
        self.run, self.condition, self.tree = run, setup.condition, tree
        self.method: Setup = setup.for_call()
        slot = self.method.warm_start
        self.warm = None if slot is None else WarmCall(slot.slot())
        self.finding: Finding | None = None
        self.place = users_line()
        self.wanted = [t.requires_grad for t in inputs]
        self.devices = {t.device for t in inputs}
        self.captured: Tensors = ()
        self.unread: list[int] = []  # places of arguments that the condition's function ignores
        self._solver = solver
        self.replaces_first = False  # whether phi is a module that training made of args[0]
        self._lent: Lent | None = None  # while the solver runs, and F is not recorded
        # tensors of the arguments that objects refer to which a module among them keeps
        self._uncopied: list[tuple[str, Tensor]] = []
        self.phi_tree: Tree
        self.given: Given = []
        self._phi: Tensors | None = None
        self._at_phi: Tensors = ()
        self._record: tuple[Snapshot, Tensors] | None = None
        self._ambient: Ambient  # of when F was first evaluated

    def problem(self) -> Problem:
        """The problem whose F is recorded where the solver's φ is."""
        return Problem(
            self.solve_and_record,
            self.linearize,
            self.solve_adjoint,
            self.recorded,
            self.method.linear_solver.keeps_start,
            self._smooth if self.condition.constrained else None,
        )

    def solve(self, inputs: Tensors) -> Tensors:
        """Run the solver on tensors of its own with gradients on, as any training loop expects."""
        number = next(_numbers)
        lent = tuple(
            marked(t.detach().clone() if wanted else t.detach(), (number, place))
            for place, (t, wanted) in enumerate(zip(inputs, self.wanted, strict=True))
        )
        before = versions(lent)
        args, kwargs, parameters = self.tree.rebuild(lent, owned=True)
        call = Call(args, kwargs, parameters, warm=self.warm)
        modules = pytree.modules((call.args, call.kwargs))
        held = tuple(frozen(modules))
        held_before = versions(held)
        trains = {id(p): n for m in modules for n, p in m.named_parameters() if p.requires_grad}
        reachable = captured_tensors(self.condition, self._solver, *self.tree.others)
        through_modules = [
            (f"{place}.{name}", tensor)
            for module in modules
            for place, thing in kept_objects(module)
            for name, tensor in captured_tensors(thing)
        ]
        reachable += through_modules
        if through_modules:
            ids = {id(t) for t in inputs}
            self._uncopied = [(name, t) for name, t in through_modules if id(t) in ids]
        self._lent = Lent([t for _, t in reachable])
        with (
            torch.enable_grad(),
            self._lent.as_they_are(),
            outside_forward_mode(),
            uncached(),
            casting_anew(),
        ):
            returned = self._run(call, reachable)
        changed = zip(before, versions(lent), lent, self.wanted, strict=True)
        for old, new, tensor, wanted in changed:
            if new != old and not wanted:
                raise InvalidSolutionError(
                    f"the solver changed one of its arguments in place ({describe(tensor)}); it "
                    "must work on a copy: argument.clone()",
                    anchor="argument-changed",
                )
        for old, new, tensor in zip(held_before, versions(held), held, strict=True):
            if new != old:
                raise InvalidSolutionError(
                    "the solver changed a parameter of a module in place that did not require grad "
                    f"when the module was passed ({describe(tensor)}), and is shared with it for "
                    "that: let it require grad, or pass a copy of the module"
                )
        self.replaces_first = phi_replaces_first(self.condition, returned, call)
        modules = pytree.modules(returned)
        self._check_kept(modules)
        _check_buffers(modules, [t for _, t in reachable])
        self.given = self._given(modules, lent, before) or self.given
        phi, self.phi_tree = checked(returned, lent, self.condition.template(call))
        if self.phi_tree.in_pairs and self.method.linear_solver.keeps_start:
            raise InvalidArgumentError(
                f"implicit: {self.method.linear_solver!r} is for real phi, and the solver returned "
                f"{describe(returned)}: take another linear solver, or give phi as "
                "torch.view_as_real, and where it starts"
            )
        self._tell_of_frozen(modules, trains)
        self._check_trained(phi, inputs, [t for _, t in reachable])
        self.devices |= {t.device for t in phi}
        return phi

    def _check_kept(self, modules: list[nn.Module]) -> None:
        """Raise if a module among what was returned keeps what goes back to captured tensors."""
        assert self._lent is not None
        for module in modules:
            own = {id(p) for p in module.parameters()}
            for name, tensor in kept_tensors(module):
                if tensor.grad_fn is None:
                    continue
                leaves = leaves_behind([tensor])
                if any(id(leaf) in own for leaf in leaves):
                    continue  # made by a forward pass
                for leaf in leaves:
                    if leaf in self._lent:
                        raise InvalidSolutionError(
                            f"the solver returned a module that keeps {describe(tensor)} as "
                            f"{name}, with a history that goes back to a tensor which it captured "
                            f"({describe(leaf)}): no gradient would arrive there. Pass the module "
                            "to the solver as an argument, with all that it keeps, or the tensor"
                        )

    def _given(self, modules: list[nn.Module], lent: Tensors, before: list[int]) -> Given:
        """The arguments, unchanged, that returned modules keep, be it as deep copies."""
        if not modules:
            return []
        now = enumerate(zip(lent, before, versions(lent), strict=True))
        places = {mark_of(t): (t, place) for place, (t, old, new) in now if old == new}
        found = []
        for module in modules:
            for _, tensor in kept_tensors(module):
                argument, place = places.get(mark_of(tensor), (None, 0))
                if argument is not None and _is_copy(tensor, argument):
                    found.append((tensor, place))
        return found

    def container(self, phi: Tensors, inputs: Tensors, owned: bool = False) -> Any:
        """φ as the solver returned it; what its modules keep of the arguments is of `inputs`."""
        given = {id(kept): inputs[place] for kept, place in self.given}
        return self.phi_tree.rebuild(phi, owned, given)

    def _tell_of_frozen(self, modules: list[nn.Module], trains: dict[int, str]) -> None:
        """Warn of parameters that the solver froze: φ depends on them, and they get no gradient.

        `trains` names those that did train, by identity.
        """
        if not trains or not any(self.wanted):
            return
        names = [trains[id(p)] for p in frozen(modules) if id(p) in trains]
        if names and self.method.reporting.on_failure != "ignore":
            self.method.reporting.say(
                f"the solver froze {', '.join(names)} of a module that it was handed: they belong "
                "to no phi now, and no gradient arrives in them, though phi depends on them. "
                "Freeze them before the call if that is meant; else pass what they compute as an "
                "argument",
                anchor="frozen-by-the-solver",
            )

    def _check_trained(self, phi: Tensors, inputs: Tensors, reachable: list[Tensor]) -> None:
        """Raise if the solver returned a module as it was, and holds the original's parameters."""
        if not self.replaces_first:
            return
        held, first = {id(t) for t in reachable}, pytree.leaves(self._call(inputs).args[0])
        if first and all(id(t) in held for t in first) and _same(phi, [*map(pytree.real, first)]):
            raise InvalidSolutionError(
                "the solver returned its first argument, a module, as it was, and refers to the "
                "parameters of the module that was passed, of which it gets a copy (an optimizer "
                "that was made outside?): make the optimizer in the solver, for the module that it "
                "is handed",
                anchor="trained-elsewhere",
            )

    def _run(self, call: Call, reachable: list[tuple[str, Tensor]]) -> Any:
        """What the solver returns; it may not backpropagate through what functions captured."""
        try:
            return pytree.unwrapped(self.run(call))
        except (RuntimeError, AttributeError, TypeError) as error:
            tell_of_arguments(error, call)
            if "backward through the graph a second time" not in str(error):
                raise
            for name, tensor in reachable:
                if tensor.grad_fn is not None:
                    raise GraphError(
                        f"the solver's backward() went through the history of {name} "
                        f"({describe(tensor)}), which a function captured or an object keeps: "
                        "pass it to the solver as an argument, which arrives there detached",
                        anchor="captured-history",
                    ) from error
            raise

    def _tell_of_phi(self, error: Exception, phi: Tensors, inputs: Tensors) -> None:
        """Raise with what the condition's function was handed, if it cannot take φ."""
        if self._solver is None:
            return  # a trial of a batch
        call = self._call(inputs)
        handed = call.without_first() if self.replaces_first else call
        tell_of_phi(error, self.phi_tree.rebuild(phi), handed.args, call.args)

    def values(self, inputs: Tensors) -> Tensors:
        """φ for a caller who wants no gradient; polished, F is evaluated as well."""
        if self.method.polish:
            return self.solve_and_record(inputs)
        phi = self.solve(inputs)
        self._keep(phi, inputs)
        return phi

    def _keep(self, phi: Tensors, inputs: Tensors) -> None:
        """Let the next call start where this one ended, if it is to."""
        if self.warm is not None:
            self.warm.keep(phi, self.phi_tree, self._call(inputs))

    def solve_and_record(self, inputs: Tensors) -> Tensors:
        """Solve, and evaluate the user's function at φ while what it refers to is still there.

        A function may refer to variables of the caller (a loop's current batch) that have changed
        by the time backward runs; the graph recorded here does not change.
        """
        if self._phi is None:
            phi = self.solve(inputs)
            self._ambient = Ambient(self.devices, phi)
            a = stand_ins(inputs, self.wanted)
            try:
                with turned() as normed:
                    snapshot, at_phi = self._snapshot(phi, a)
            except (TypeError, AttributeError, RuntimeError) as error:
                self._tell_of_phi(error, phi, inputs)
                raise
            if normed and {id(t) for t in leaves_behind(normed)} & {id(t) for t in at_phi}:
                self.method.reporting.say(
                    "phi has a spectral norm in training mode, which takes a power iteration in "
                    "each evaluation: the implicit gradient does not know how its directions turn "
                    "with phi. Call .eval() on that module before it is handed to the solver, so "
                    "that they are constants in the solver and in the condition",
                    anchor="spectral-norm",
                )
            for _ in range(self.method.polish):
                with own_precision(self.devices):
                    phi, snapshot, at_phi = self._polished(phi, snapshot, at_phi, a)
            self._phi, self._at_phi, self._record = phi, at_phi, (snapshot, a)
            if is_transformed(snapshot.outputs):
                raise GraphError(
                    "the condition's function captured a tensor that forward mode looks at: pass "
                    "it to the solver as an argument",
                    anchor="captured-under-transforms",
                )
            graph = graph_behind(snapshot.outputs)
            if snapshot.objective is not None:
                snapshot.objective.look_among(graph)
            leaves = leaves_among(snapshot.outputs, graph)
            self._check_dependence(leaves, at_phi)
            if self.condition.must_depend_on_phi and len(at_phi) > 1:
                check_determined(self.phi_tree.rebuild(at_phi), leaves)
            behind = {id(t) for t in leaves}
            wanted = enumerate(zip(a, self.wanted, strict=True))
            self.unread = [i for i, (t, wants) in wanted if wants and id(t) not in behind]
            own = {id(t) for t in (*at_phi, *a)}
            self.captured = self._not_made_inside([t for t in leaves if id(t) not in own], a)
            self._check_captured(inputs)
            self.finding = self._found(2, self._checked, graph)
            self._keep(phi, inputs)
        return tuple(t.detach() for t in self._phi)

    def _from_record(self, curvature: Curvature) -> tuple[Linearization, Tensors]:
        assert self._record is not None
        snapshot, a = self._record
        around = snapshot.linearize(curvature)
        around.training, around.batches = lambda: self._filter, snapshot.batches
        if self.warm is not None:
            around.warm_started, around.evaluations = self.warm.started, self.warm.evaluations
        return around, (*a, *self.captured)

    @functools.cached_property
    def _filter(self) -> Filter | None:
        """The filter of the training that ended at φ, if it is known."""
        known = self.method.training
        training = None if known is None else known(self._at_phi)
        return None if training is None else training.weigh

    def solve_adjoint(self, around: Linearization, v: Tensors) -> Tensors:
        """u with Aᵀu = v, by all processes if there are several; what came of it is reported."""
        if self.condition.processes is None:
            return super().solve_adjoint(around, v)
        reporting = among(self.condition.processes, self.method.reporting)
        return solve_and_report(self.method.linear_solver, around, v, reporting, self.place)

    def _smooth(self, a: Tensors) -> Tensors:
        """φ as a function of the arguments, differentiable to any order."""
        self._check_twice()
        with torch.enable_grad():
            return as_root(*self.recorded(), self.solve_adjoint, a)

    def _third(self) -> Finding | None:
        return self._found(3, self._checked_third)

    def _found(
        self,
        order: int,
        look: Callable[[Snapshot, Probe], Finding | None],
        graph: Graph | None = None,
    ) -> Finding | None:
        """What a look finds, or found before, in the record, or in a sample of its data.

        `graph` is that behind the record's outputs, where it is known.
        """
        if self.method.checks.when == "never":
            return None
        assert self._record is not None
        snapshot, a = self._record
        condition = self.condition if snapshot.sample is None else snapshot.sample
        if snapshot.sample is not None:

            def value(moved: Tensors) -> Tensor:
                return self._evaluate(moved, a, condition=condition).outputs[0]

            snapshot, graph = self._evaluate(self._at_phi, a, value, condition), None
        probe = functools.partial(self._to_check, condition, snapshot)
        found = self.method.checks.finding(
            snapshot.outputs, self._at_phi, lambda: look(snapshot, probe()), order, graph
        )
        if self.condition.processes is None:
            return found
        return self.condition.processes.first(found, "a check of products")

    def _checked(self, snapshot: Snapshot, probe: Probe) -> Finding | None:
        """What is wrong with products around φ and with how F changes with the arguments."""
        method = self.method
        if snapshot.objective is None:
            around = snapshot.linearize(method.curvature)
            both = method.linear_solver.takes_both_products
            return check.check_residual(around, probe, both)
        if method.curvature == "finite_difference":
            return None
        if snapshot.lagrangian is not None:
            return check.check_lagrangian(snapshot.objective, probe, snapshot.lagrangian)
        return check.check_objective(snapshot.objective, probe, method.curvature)

    def _checked_third(self, snapshot: Snapshot, probe: Probe) -> Finding | None:
        """What is wrong with derivatives of products."""
        if snapshot.objective is None:
            return check.check_residual_twice(probe)
        return check.check_third(snapshot.objective, probe, snapshot.lagrangian)

    def _to_check(self, condition: Condition, snapshot: Snapshot) -> Probe:
        assert self._record is not None
        a = self._record[1]
        apart = {id(t) for t in pytree.leaves(self.condition.apart(self._call(a)))}

        def elsewhere(phi: Tensors, inputs: Tensors) -> Tensors:
            return self._evaluate(phi, inputs[: len(a)] or a, condition=condition).outputs

        movable = [i for i, t in enumerate(a) if id(t) not in apart]
        return Probe(snapshot.outputs, self._at_phi, (*a, *self.captured), elsewhere, movable)

    def apart(self) -> list[int] | None:
        """Which tasks of a batch cannot be linearised with the others; None if none can."""
        assert self._record is not None and self._phi is not None
        snapshot, _ = self._record
        unknowns = sum(p[0].numel() for p in self._phi) + snapshot.n_multipliers
        if not self.method.linear_solver.takes(len(self._phi[0]), unknowns):
            return None
        return [] if snapshot.apart is None else snapshot.apart().nonzero().flatten().tolist()

    def around(self, phi: Tensors, curvature: Curvature) -> Linearization:
        """F around another φ, on the recorded arguments."""
        assert self._record is not None
        snapshot, _ = self._snapshot(phi, self._record[1])
        with torch.enable_grad():
            return snapshot.linearize(curvature)

    def once_differentiable(self) -> bool:
        """Whether something that depends on φ is marked as differentiable once."""
        assert self._record is not None
        return once_differentiable(self._record[0].outputs, self._at_phi)

    def captured_transformed(self) -> bool:
        """Whether the user's function captured tensors that transforms at work look at.

        It is evaluated again, at φ. Random numbers under `vmap` look like a captured batch, and
        what it makes to take gradients by itself is there once only.
        """
        outputs, random = self._as_transforms_see()
        if any(map(has_tangent, outputs)) or (not random and any(map(is_batched, outputs))):
            return True
        leaves = _followed(outputs)
        return bool(leaves) and any(
            t is leaf for t in _followed(self._as_transforms_see()[0]) for leaf in leaves
        )

    def _as_transforms_see(self) -> tuple[Tensors, bool]:
        """The outputs of the user's function at φ under the transforms around, and if it is random.

        What torch.func cannot run, such as NumPy or most custom Functions, is looked into instead.
        """
        assert self._phi is not None and self._record is not None
        phi, a = (tuple(t.detach() for t in ts) for ts in (self._phi, self._record[1]))
        with isolated(self._ambient), taking_gradients():
            before = torch.get_rng_state()
            at_phi, condition = self.container(phi, a), self._record[0].sample or self.condition
            try:
                outputs = condition.at(at_phi, phi, self._seen(a), None).outputs
            except Exception:
                found = captured_tensors(self.condition, *self.tree.others)
                return tuple(t for _, t in found if is_wrapped(t) or has_tangent(t)), False
            return outputs, not torch.equal(before, torch.get_rng_state())

    def _polished(
        self, phi: Tensors, snapshot: Snapshot, at_phi: Tensors, a: Tensors
    ) -> tuple[Tensors, Snapshot, Tensors]:
        """φ after one safeguarded Newton step, evaluated there."""
        with torch.enable_grad():
            around = snapshot.linearize(self.method.curvature)
        for candidate in newton_candidates(
            self.method.linear_solver, around, self.method.reporting
        ):
            there, at_there = self._snapshot(candidate[: len(phi)], a)  # without multipliers
            with torch.enable_grad():
                moved = there.linearize(self.method.curvature)
            if not is_better(moved, around):
                continue
            if moved.degenerate is None:
                return candidate[: len(phi)], there, at_there
            # where more constraints are touched there are more multipliers, to explain any slope
            tell_unpolished(moved.degenerate, self.method.reporting)
            break
        return phi, snapshot, at_phi

    def _snapshot(self, phi: Tensors, a: Tensors) -> tuple[Snapshot, Tensors]:
        """The user's function at φ on tensors of its own, and these tensors."""
        with torch.enable_grad():
            at_phi = variables(phi)
        evaluation = weakref.ref(self)  # which holds the snapshot

        def value(moved: Tensors) -> Tensor:
            this = evaluation()
            assert this is not None
            objective, *_ = this._evaluate(moved, a).outputs
            return objective

        return self._evaluate(at_phi, a, again=value), at_phi

    def _evaluate(
        self,
        phi: Tensors,
        inputs: Tensors,
        again: Again | None = None,
        condition: Condition | None = None,
    ) -> Snapshot:
        condition, call = condition or self.condition, self._seen(inputs)
        with isolated(self._ambient):
            try:
                return condition.at(self.container(phi, inputs), phi, call, again)
            except TypeError as error:
                if call.start is None or "positional argument" not in str(error):
                    raise
                raise InvalidSolutionError(
                    f"the condition's function raised {error}. {_CALLED_WITHOUT_START}"
                ) from error

    def _call(self, inputs: Tensors) -> Call:
        return Call(*self.tree.rebuild(inputs))

    def _seen(self, inputs: Tensors) -> Call:
        """The call as the condition sees it."""
        call = self._call(inputs)
        return call.without_first() if self.replaces_first else call

    def starts(self, inputs: Tensors) -> set[int]:
        """Places of inputs that are only where φ started, or kept: F does not know of them."""
        if not self.unread:
            return set()
        call = self._call(inputs)
        known = {id(t) for t in pytree.leaves((call.args, call.kwargs, call.parameters))}
        if self.replaces_first:
            known -= {id(t) for t in pytree.leaves(call.args[0])}
        return {i for i in self.unread if id(inputs[i]) not in known}

    def kept(self, inputs: Tensors) -> set[int]:
        """Places of inputs that modules among the arguments keep besides their parameters."""
        found = {id(t) for module in self._modules_among(inputs) for t in kept(module).values()}
        return {i for i, t in enumerate(inputs) if id(t) in found}

    def _not_made_inside(self, found: list[Tensor], a: Tensors) -> Tensors:
        """The leaves but those that the user's function makes anew, to take gradients by itself."""
        assert self._lent is not None
        if self.condition.processes is not None or all(t in self._lent for t in found):
            return tuple(found)  # processes would have to evaluate it together
        again = leaves_behind(self._evaluate(self._at_phi, a).outputs)
        return tuple(t for t in found if t in self._lent or any(t is leaf for leaf in again))

    def _check_captured(self, inputs: Tensors) -> None:
        """Raise if the solver changed what the function captured; warn if that is not known."""
        assert self._lent is not None
        for tensor in self._lent.changed(self.captured):
            raise InvalidSolutionError(
                f"the solver changed a tensor in place that the condition's function refers to "
                f"({describe(tensor)}) and that requires grad; it must work on a copy: "
                "tensor.detach().clone()",
                anchor="captured-changed",
            )
        for name, tensor in self._uncopied:
            if any(tensor is t for t in self.captured):
                raise InvalidSolutionError(
                    "the condition's function computes with a parameter of a module that was "
                    f"passed ({describe(tensor)}), and not with that of its copy, of which phi "
                    f"was made: an object that the module keeps refers to it as {name}, and is "
                    "not copied. Make its class a dataclass, or let it be handed the module when "
                    "it is used",
                    anchor="trained-elsewhere",
                )
        unfound = [t for t in self.captured if t not in self._lent]
        uncopied = self._of_modules(inputs) if unfound else set()
        for tensor in unfound:
            if id(tensor) in uncopied:
                self.method.reporting.say(
                    "the condition's function computes with a parameter of a module that was "
                    f"passed ({describe(tensor)}), and not only with that of its copy, of which "
                    "phi was made. If that is not meant, a hook, a weak reference or an object "
                    "that the module keeps refers to the original: let it be handed the module "
                    "when it is used, or make the module in the solver",
                    anchor="trained-elsewhere",
                )
            elif tensor.grad is not None:
                self.method.reporting.say(
                    f"the condition's function captured a tensor ({describe(tensor)}) that could "
                    "not be found before the solver ran: if the solver calls backward(), what that "
                    "added to the tensor's .grad is still there. Pass it to the solver as an "
                    "argument",
                    anchor="found-too-late",
                )
        self._lent = None

    def _of_modules(self, inputs: Tensors) -> set[int]:
        """The identities of parameters of modules among the arguments."""
        return {id(p) for module in self._modules_among(inputs) for p in module.parameters()}

    def _modules_among(self, inputs: Tensors) -> list[nn.Module]:
        call = self._call(inputs)
        return pytree.modules((call.args, call.kwargs))

    def _check_dependence(self, leaves: Tensors, phi: Tensors) -> None:
        if not self.condition.must_depend_on_phi or not any(p.numel() for p in phi):
            return
        if not {id(t) for t in leaves} & {id(t) for t in phi}:
            name = type(self.condition).__name__
            is_module = bool(pytree.modules(self.phi_tree.rebuild(phi)))
            why = (
                "phi is a module, with which the function has to compute; or return "
                "dict(module.named_parameters()), and apply it by torch.func.functional_call"
                if is_module
                else "was phi detached, or converted to NumPy, inside it?"
            )
            raise InvalidArgumentError(
                f"{name}: the function's value does not depend on phi, its first argument, so it "
                f"does not define phi ({why})",
                anchor="phi-unread",
            )
