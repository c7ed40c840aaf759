"""One call of an implicit solver with tensors that torch.func or forward mode look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from implicit_grad._conditions.base import Call
from implicit_grad._errors import GraphError, ImplicitGradError, InvalidSolutionError
from implicit_grad._theorem.implicit_function import ImplicitFunction
from implicit_grad._torch import pytree
from implicit_grad._torch.captured import captured_tensors
from implicit_grad._torch.isolation import RandomState
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._torch.transforms import CannotBatch, Plain, is_batched, lifted
from implicit_grad._wrapper.evaluation import Evaluation, Setup

CAPTURED = (
    "under torch.func and forward mode, the condition's function must not have captured a tensor "
    "that requires grad or that they look at: pass it to the solver as an argument"
)

BATCHED = (
    "under torch.func.vmap, the solver or the condition's function must not have captured a tensor "
    "of which there is one for each sample: pass it to the solver as an argument"
)


class Transformed:
    """The call, made of plain calls: of single problems, or of batches of them."""

    def __init__(
        self, setup: Setup, run: Callable[[Call], Any], tree: Tree, solver: object
    ) -> None:
        self.setup, self.run, self.tree, self.solver = setup, run, tree, solver
        self._first: Evaluation | None = None
        self._phi_tree: Tree | None = None

    def phi(self, inputs: Tensors, at_once: tuple[Setup, Callable[[Call], Any]] | None) -> Any:
        """The solver's φ; `at_once` are a setup and a run for batches, where there are such."""
        batched = None
        if at_once is not None:
            batched = Plain(lambda xs, known: self._batch(*at_once, xs, known))
        try:
            phi = lifted(Plain(self._single, batched), inputs)
        except ImplicitGradError:
            raise
        except RuntimeError as error:  # torch's, maybe, of a batch where there is none
            reached = captured_tensors(self.setup.condition, self.solver, *self.tree.others)
            if any(is_batched(t) for _, t in reached):
                raise GraphError(BATCHED, anchor="captured-under-transforms") from error
            raise
        assert self._first is not None and self._phi_tree is not None
        # below, in the plain calls, what a transform looks at passes for a number without a history
        if self._first.captured_transformed():
            raise GraphError(CAPTURED, anchor="captured-under-transforms")
        if self._phi_tree.has_others and any(map(is_batched, inputs)):
            raise InvalidSolutionError(
                "under torch.func.vmap, phi holds an integer, of which there is one for each "
                "sample: let the solver return the solution alone"
            )
        given = {id(kept): inputs[place] for kept, place in self._first.given}
        return self._phi_tree.rebuild(phi, True, given)

    def _single(self, xs: Tensors, known: Tensors) -> Tensors:
        """One problem, which is solved if its φ is not known."""
        if known:
            return self._attached(
                self._known(dataclasses.replace(self.setup, polish=0), xs, known), xs
            )
        self.setup.condition.check_call(Call(*self.tree.rebuild(xs)))
        return self._attached(Evaluation(self.run, self.setup, self.tree, xs, self.solver), xs)

    def _batch(
        self, setup: Setup, run: Callable[[Call], Any], xs: Tensors, known: Tensors
    ) -> Tensors:
        """Many problems at once. Their solver runs only once, whatever comes of it."""
        first = not known
        if first:
            finder = Evaluation(run, setup, self.tree, xs, self.solver)
            random = RandomState(finder.devices)
            try:
                setup.condition.check_call(Call(*self.tree.rebuild(xs)))
                known = finder.solve(xs)
            except CannotBatch:
                random.restore()
                raise
            self._phi_tree = finder.phi_tree
            unknowns = sum(p[0].numel() for p in known)
            if not setup.linear_solver.takes(len(known[0]), unknowns):
                raise CannotBatch(known)
        assert self._phi_tree is not None
        if pytree.modules(self._phi_tree.rebuild(known)):
            raise CannotBatch(known)  # in a batch, parameters do not tell whether they train
        evaluation = self._known(setup, xs, known)
        try:
            evaluation.solve_and_record(xs)
        except ImplicitGradError:
            raise
        except RuntimeError as reason:  # the user's functions cannot run for a batch, or at all
            raise CannotBatch(known) from reason
        if setup.curvature == "auto" and evaluation.once_differentiable():
            raise CannotBatch(known)  # differences are taken for one problem at a time
        apart = evaluation.apart()
        if apart or (first and apart is None):  # later, it is the cotangents that are many
            raise CannotBatch(known, apart)
        return self._attached(evaluation, xs)

    def _known(self, setup: Setup, xs: Tensors, known: Tensors) -> Evaluation:
        assert self._phi_tree is not None
        phi = self._phi_tree.rebuild(known, owned=True)
        evaluation = Evaluation(lambda _: phi, setup, self.tree, xs)
        if self._first is not None:
            evaluation.given = self._first.given
        return evaluation

    def _attached(self, evaluation: Evaluation, xs: Tensors) -> Tensors:
        # F is evaluated also where no gradient is taken: to find out what it captured
        phi: Tensors = ImplicitFunction.apply(evaluation.problem(), *xs)
        if evaluation.captured:
            raise GraphError(CAPTURED, anchor="captured-under-transforms")
        self._first = self._first or evaluation
        self._phi_tree = self._phi_tree or evaluation.phi_tree
        return phi
