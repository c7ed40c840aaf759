"""A solver whose output carries implicit gradients, and what may stand for a solver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from implicit_grad._conditions.base import Call, Condition
from implicit_grad._errors import GraphError, ImplicitGradError, InvalidArgumentError, describe
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._linear_solvers.cg import CG
from implicit_grad._linear_solvers.general import General
from implicit_grad._linear_solvers.minres import MINRES
from implicit_grad._theorem.implicit_function import ImplicitFunction
from implicit_grad._torch import pytree
from implicit_grad._torch.captured import captured_tensors
from implicit_grad._torch.deep_copies import Followed
from implicit_grad._torch.held import opened
from implicit_grad._torch.isolation import uncompiled
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._torch.transforms import (
    CannotBatch,
    in_forward_mode,
    is_batched,
    is_transformed,
)
from implicit_grad._warnings import said_by
from implicit_grad._wrapper.arguments import tell_unread
from implicit_grad._wrapper.auxiliary import WithAux, check_not_batched
from implicit_grad._wrapper.completed import completed
from implicit_grad._wrapper.evaluation import Evaluation, Setup, phi_replaces_first
from implicit_grad._wrapper.solver_output import checked, speaks_of_form
from implicit_grad._wrapper.under_transforms import CAPTURED, Transformed
from implicit_grad._wrapper.warm import asks_for_start


@runtime_checkable
class Minimizer(Protocol):
    """A solver that is handed the objective and where to start (see `implicit_grad.solvers`).

    For constrained problems it also takes the keywords `bounds`, `equality` and `inequality`.
    """

    def minimize(self, objective: Callable[[Any], Tensor], init: Any) -> Any:
        """Return phi, in the form of init, that minimises objective(phi)."""
        ...


@runtime_checkable
class RootFinder(Protocol):
    """A solver of root and fixed-point problems that is handed the residual and where to start."""

    def find_root(self, residual: Callable[[Any], Any], init: Any) -> Any:
        """Return phi, in the form of init, with residual(phi) = 0."""
        ...


Solver = Callable[..., Any] | Minimizer | RootFinder


@opened("solver", "setup", "init", "__wrapped__")
class ImplicitSolver(Followed):
    """A solver whose output carries implicit gradients; made by `implicit`."""

    def __init__(self, solver: Solver, setup: Setup, init: Callable[..., Any] | None) -> None:
        if callable(solver):
            functools.update_wrapper(self, solver, updated=())  # its attributes are not ours
        self.solver, self.setup, self.init = solver, setup, init
        self._asks = setup.warm_start is not None and callable(solver) and asks_for_start(solver)

    def __get__(self, instance: Any, owner: type | None = None) -> ImplicitSolver:
        """As a method: the solver is handed its object, the condition is not."""
        if instance is None or not hasattr(self.solver, "__get__"):
            return self
        return ImplicitSolver(self.solver.__get__(instance, owner), self.setup, self.init)

    def __repr__(self) -> str:
        name = getattr(self.solver, "__qualname__", None) or repr(self.solver)
        condition, linear_solver = self.setup.condition, self.setup.linear_solver
        return f"implicit({name}, {type(condition).__name__}, {linear_solver})"

    def without_trace(self) -> ImplicitSolver:
        """A solver that starts as this one does, and keeps nothing for its next call."""
        setup = self.setup.without_trace()
        return self if setup is self.setup else ImplicitSolver(self.solver, setup, self.init)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the solver; the phi it returns has gradients with respect to all its arguments."""
        inputs, tree = self._inputs(args, kwargs)
        if not self.setup.has_aux:
            return self._returned(self._phi(inputs, tree, self.run), inputs, tree)
        run = WithAux(self.run)
        returned = self._returned(self._phi(inputs, tree, run), inputs, tree)
        return returned, run.taken()

    def _returned(self, phi: Any, inputs: Tensors, tree: Tree) -> Any:
        """φ, and what follows from it where the condition returns more."""
        condition = self.setup.condition
        return completed(condition, phi, inputs, tree) if condition.returns_more else phi

    def _phi(self, inputs: Tensors, tree: Tree, run: Callable[[Call], Any]) -> Any:
        if is_transformed(inputs):
            return self._under_transforms(inputs, tree, run)
        evaluation = self._evaluation(inputs, tree, run)
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            with torch.inference_mode(False):
                phi = evaluation.values(inputs)
                return evaluation.container(phi, inputs, owned=True)
        problem = evaluation.problem()
        phi = ImplicitFunction.apply(problem, *inputs)
        starts = evaluation.starts(inputs)
        unread = [inputs[i] for i in evaluation.unread if i not in starts]
        if unread and self.setup.reporting.on_failure != "ignore":
            tell_unread(self.setup.condition, Call(*tree.rebuild(inputs)), unread)
        # a Function's forward does not see the tangents of what the user's function captured
        if in_forward_mode() and evaluation.captured_transformed():
            raise GraphError(CAPTURED, anchor="captured-under-transforms")
        if self.setup.linear_solver.keeps_start:
            starts &= evaluation.kept(inputs)
        if evaluation.captured or starts:
            # Only at φ do we learn which tensors the user's function captured, to be attached too,
            # and which modules φ started from: their graph, maybe of another call, is let go.
            known = [
                t.new_zeros(()).expand(t.shape) if i in starts else t for i, t in enumerate(inputs)
            ]
            phi = ImplicitFunction.apply(problem, *known, *evaluation.captured)
        if self.setup.condition.processes is not None:
            phi = self.setup.condition.processes.shared(phi)
        return evaluation.container(phi, inputs, owned=True)

    def evaluation(self, args: Any, kwargs: Any) -> tuple[Evaluation, Tensors]:
        """One call, checked but not yet run, and the tensors that it depends on."""
        inputs, tree = self._inputs(args, kwargs)
        run = WithAux(self.run) if self.setup.has_aux else self.run
        return self._evaluation(inputs, tree, run), inputs

    def _inputs(self, args: Any, kwargs: Any) -> tuple[Tensors, Tree]:
        """The tensors of a call, none of which autograd refuses to save."""
        opened, modules = pytree.as_arguments((args, kwargs))
        inputs, tree = pytree.flatten((*opened, self.setup.condition.parameters))
        if tree.has_others:
            check_objects(tree.others, [p for m in modules for p in m.parameters()])
        if not any([t.is_inference() for t in inputs]):
            return inputs, tree
        with torch.inference_mode(False):
            return tuple(t.clone() if t.is_inference() else t for t in inputs), tree

    def _evaluation(self, inputs: Tensors, tree: Tree, run: Callable[[Call], Any]) -> Evaluation:
        self.setup.condition.check_call(Call(*tree.rebuild(inputs)))
        return Evaluation(run, self.setup, tree, inputs, self.solver)

    def _under_transforms(self, inputs: Tensors, tree: Tree, run: Callable[[Call], Any]) -> Any:
        """A call with tensors that torch.func or forward mode look at."""
        if self.setup.condition.processes is not None:
            self.setup.condition.processes.check_plain(inputs)
        if self.setup.has_aux:
            check_not_batched(inputs)
        condition, at_once, setup = self.setup.condition.for_tasks(), None, self.setup
        if any(map(is_batched, inputs)):  # one φ is no start for many problems
            setup = dataclasses.replace(setup, warm_start=None)
        # modules are taken one by one: in a batch, parameters do not tell whether they train
        modules = pytree.modules(tree.rebuild(inputs))
        can = self.setup.why_one_by_one(if_small=True) is None and not modules
        if condition is not None and can:
            together = dataclasses.replace(setup, condition=condition)
            at_once = together, functools.partial(self._run_for_tasks, condition)
        return Transformed(setup, run, tree, self.solver).phi(inputs, at_once)

    def _run_for_tasks(self, condition: Condition, call: Call) -> Any:
        """The solver's output for a batch: at once if it works element by element."""
        if self.init is None and getattr(self.solver, "elementwise", False):
            try:
                return self._run(condition, call)
            except ImplicitGradError:
                raise
            except RuntimeError as reason:  # the objective cannot run for a batch, or at all
                raise CannotBatch from reason
        tensors, tree = pytree.flatten((call.args, call.kwargs, call.parameters))
        rows = zip(*(t.unbind() for t in tensors), strict=True)
        solved = []
        for row in rows:
            one = Call(*tree.rebuild(row))
            phi, phi_tree = checked(self.run(one), row, self.setup.condition.template(one))
            solved.append(phi)
        return phi_tree.rebuild(tuple(map(torch.stack, zip(*solved, strict=True))), owned=True)

    def run(self, call: Call) -> Any:
        """The solver's own output."""
        try:
            return self._run(self.setup.condition, call)
        except (TypeError, AttributeError, RuntimeError) as error:
            self._tell_of_start(error, call)
            raise

    def _tell_of_start(self, error: Exception, call: Call) -> None:
        """Raise with advice if a minimiser started at an argument that cannot be φ."""
        if callable(self.solver) or self.init is not None or isinstance(error, ImplicitGradError):
            return
        if isinstance(error, RuntimeError) and not speaks_of_form(error):
            return
        if self.setup.condition.template(call) is not None:
            return  # phi is like the first argument in any case
        raise InvalidArgumentError(
            f"implicit: {type(self.solver).__name__} starts at the first argument, "
            f"{describe(call.args[0])}, as there is no init=, and the condition's function raised "
            f"{type(error).__name__} ({error}). If phi is not like that argument, give init=, a "
            "function of the arguments that returns where to start"
        ) from error

    def _run(self, condition: Condition, call: Call) -> Any:
        with said_by(self.setup.reporting.say):
            return self._runs(condition, call)

    def _runs(self, condition: Condition, call: Call) -> Any:
        method = _method(self.solver, condition)
        if method is None:
            assert callable(self.solver)
            if not self._asks:
                return self.solver(*call.args, **call.kwargs)
            return self._from_start(condition, call)
        if self.init is None and not call.args:
            raise InvalidArgumentError(
                "implicit: without a positional argument to start from, this solver needs init="
            )
        init = call.args[0] if self.init is None else self.init(*call.args, **call.kwargs)
        if call.warm is not None:
            init = call.warm.init(init)
        if phi_replaces_first(condition, init, call):
            call = call.without_first()
        function, constraints = condition.problem_for(method, call)
        if call.warm is not None:
            function = call.warm.counted(function)
        try:
            return getattr(self.solver, method)(function, init, **constraints)
        except TypeError as error:
            if not any(
                f"unexpected keyword argument '{name}'" in str(error) for name in constraints
            ):
                raise
            what, others = f"constraints ({', '.join(constraints)})", "SciPyMinimize or GurobiQP"
            if "prox" in constraints:
                what, others = "a prox", "ProximalGradient"
            raise InvalidArgumentError(
                f"implicit: {self.solver!r} does not take {what}: use {others} of "
                "implicit_grad.solvers, or a solver function"
            ) from error

    def _from_start(self, condition: Condition, call: Call) -> Any:
        """What a function returns that asks where the last call ended."""
        assert callable(self.solver)
        if "start" in call.kwargs:
            raise InvalidArgumentError(
                "implicit: with warm_start, the solver's argument start is where the last call "
                "ended; it was also given in this call: leave it out, or warm_start"
            )
        like, start = condition.template(call), None
        if like is None and call.args and pytree.modules(call.args[0]):
            like = call.args[0]
        if call.warm is not None:  # it is where one problem is solved, and not a batch
            start = call.warm.start(call, like)
        return self.solver(*call.args, **call.kwargs, start=start)


def check_objects(objects: Iterable[object], in_modules: Iterable[Tensor]) -> None:
    """Raise if objects among the arguments hold tensors with a history, which no one detaches.

    Or parameters of a module among the arguments, which an optimizer would train in its place.
    """
    parameters = {id(t) for t in in_modules}
    for thing in objects:
        code = getattr(thing, "gi_code", None)
        if code is not None and code in _OF_PARAMETERS:
            raise InvalidArgumentError(
                f"implicit: an argument is the generator {code.co_name}(), which can be read once "
                "only, and in which no one finds the tensors: pass the module itself"
            )
        if isinstance(thing, torch.nn.Module) or callable(thing):
            continue  # like functions that captured tensors
        for name, tensor in captured_tensors(thing):
            if id(tensor) in parameters:
                raise InvalidArgumentError(
                    f"implicit: an argument, {describe(thing)}, holds {describe(tensor)} of "
                    "a module among them, of which the solver gets a copy, so that it would train "
                    "the original. Make it where the copy is: ig.implicit(lambda model: "
                    "train(model, SGD(model.parameters(), lr=...)), ...)"
                )
            if tensor.grad_fn is not None:
                raise InvalidArgumentError(
                    f"implicit: an argument, {describe(thing)}, holds a tensor with a history as "
                    f"{name} ({describe(tensor)}), which must not reach the solver: pass the "
                    "tensor itself, make the class a dataclass, or register it in "
                    "torch.utils._pytree or optree"
                )


_OF_PARAMETERS = [
    function.__code__ for function in (torch.nn.Module.parameters, torch.nn.Module.named_parameters)
]


def default_linear_solver(condition: Condition) -> LinearSolver:
    """The one that suits the condition's A, to a tolerance near rounding error."""
    if not condition.symmetric:
        return General()
    return CG() if condition.definite and condition.is_minimum else MINRES()


def _method(solver: Solver, condition: Condition) -> str | None:
    """The method by which a solver is handed the problem; None for a function."""
    names = [name for name in ("minimize", "find_root") if hasattr(solver, name)]
    if len(names) == 2:
        return "minimize" if condition.is_minimum else "find_root"
    return names[0] if names else None
