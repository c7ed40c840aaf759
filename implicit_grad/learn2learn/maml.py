"""`imaml`: a MAML pipeline with implicit gradients, by wrapping one object.

MAML differentiates through its adaptation steps. Here the adapted weights φ are taken as the
solution of the inner problem min loss(φ) + λ/2 ‖φ − θ‖², and backward is one linear solve around
it, (∇²loss(φ) + λ) u = v, dθ = λu: no step is kept (Rajeswaran et al., 2019, Meta-Learning with
Implicit Gradients).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_grad._conditions.lam import check_theta, evaluated, proximal_term
from implicit_grad._conditions.proximal_term import ProximalTerm
from implicit_grad._curvature.auto import check_curvature
from implicit_grad._curvature.checks import Check, Checks, check_option
from implicit_grad._errors import InvalidArgumentError, describe, in_pairs
from implicit_grad._linear_solvers.base import LinearSolver
from implicit_grad._linear_solvers.cg import CG
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._linear_solvers.given import SolveFunction, as_linear_solver
from implicit_grad._linear_solvers.positive_part import PositivePart
from implicit_grad._theorem.linearization import Curvature
from implicit_grad._theorem.report import Monitor, OnFailure, Reporting
from implicit_grad._torch.clone import cloned
from implicit_grad._torch.isolation import differentiable_twice, uncompiled
from implicit_grad._torch.modules import has_forward_hooks, with_part
from implicit_grad._torch.pytree import Tensors
from implicit_grad.learn2learn import called_again
from implicit_grad.learn2learn.accepted import accepted, check_lr, has_own_forward, held_maml
from implicit_grad.learn2learn.adaptation import (
    StepMethod,
    check_solver,
    means_to_solve,
    minimise_closure,
    minimiser_of,
    needs_outputs,
    step_on_tensor,
)
from implicit_grad.learn2learn.batching import (
    check_tasks,
    stack_buffers,
    stack_parameters,
    stacked_call,
)
from implicit_grad.learn2learn.chosen import Names, adapting, check_stackable, checked_names
from implicit_grad.learn2learn.fast_weights import Weights
from implicit_grad.learn2learn.midway import Midway
from implicit_grad.learn2learn.registered_lam import registrable
from implicit_grad.learn2learn.replaced import (
    check_assigned,
    check_moved,
    check_names,
    check_replaced,
)
from implicit_grad.learn2learn.told import Told


def imaml(
    module_or_maml: nn.Module,
    lam: Any = None,
    *,
    lr: float | None = None,
    adapts: str | Sequence[str] | None = None,
    linear_solver: LinearSolver | SolveFunction | None = None,
    solver: Any = None,
    curvature: Curvature = "auto",
    check: Check = "once",
    monitor: Monitor | None = None,
    on_failure: OnFailure = "warn",
    keep_steps: bool = False,
) -> ImplicitMAML:
    """Give a model, or a learn2learn MAML, MAML's interface with implicit gradients (iMAML).

    A pipeline that was written for MAML stays as it is; learn2learn is not needed. The result has
    MAML's interface (`clone`, `adapt`, calls, attributes) and shares the model's parameters.
    By default adaptation is MAML's own, to the bit, and backward through the adapted learner solves
    (H₊ + λ) u = v for dθ = λu, H = ∇²loss, with λ = 1/t, t the sum of the lengths of the steps
    since `clone`: gradient descent that stops at time t is close to a ridge of strength 1/t (Ali,
    Kolter and Tibshirani, 2019). So dφ/dθ = (I + t H₊)⁻¹, where MAML has the product of (I − lr·H)
    over the steps: the same to first order in t where H is positive, and bounded. H₊ is H without
    negative curvature, under which 1/(1 + t·h) would grow without bound and change its sign. A
    tensor is all that `adapt(loss)` is given, so H is taken where that loss was computed, at the
    last iterate but one. `learner.adapt(closure, steps=16)` takes a function that computes the loss
    instead (as in `torch.optim`) and linearises at the solution itself.

    Choosing: with a `lam` of your own, φ is the minimum of loss + λ/2 ‖φ − θ‖² and steps are
    φ ← (φ − lr ∇loss(φ) + lr·λ·θ)/(1 + lr·λ), stable for every λ; but the pull to θ adds up, so
    keep steps · lr · λ around 1 or below (beyond lr·λ = 20 nothing moves, which is told). A few
    steps do not solve the inner problem, and H is often indefinite there. Without a `lam`, negative
    curvature counts as none, and dθ is never longer than what arrives. With one, it is reported
    (`monitor`), and CG stops early, towards first-order MAML. "gauss_newton" is never indefinite,
    but further from MAML's gradient than the Hessian, which is the default.

    With create_graph=True (second derivatives, as in TRPO; of `adapt(closure)` only) a solve for a
    fixed number of iterations goes on to the default tolerance, and without a `lam` it is one of
    (H + λ) u = v: negative curvature counts, and is told of.

    Args:
        module_or_maml: a model; or a `learn2learn.algorithms.MAML`, or a subclass without an
            adaptation or parameters of its own, whose lr, first_order, allow_unused and
            allow_nograd then apply here too. (For a model, these three are False; they are
            attributes of the result, and options of `clone` and `adapt`.) Of learn2learn's
            LightningMAML or LightningANIL, a copy is returned whose MAML is switched.
        lam: None, the default, takes 1/t (see above); `solver` must then be a `GradientDescent`
            for a number of steps, if one is given. Or λ > 0, the pull towards θ, in the units of
            the loss's curvature: a number, a tensor, a `torch.nn.Parameter` (learned; it appears in
            `parameters()`), or a sequence or a dict by parameter name of these, one for each
            floating-point parameter of the model; `LearnedLam(model)`, learned and positive, for
            each tensor or element; or `LowRank`, a matrix.
        lr: the length of the adaptation's steps, for a model. A MAML has its own.
        adapts: what adapts, by name: a parameter, a part of the model with all its parameters
            (the classifier: ANIL), a plain tensor that it holds (a context: CAVIA), or several of
            these; by default all parameters. The others have the gradients that they owe to both
            losses, as in ANIL. λ for each parameter is then one for each of these:
            `LearnedLam(model.classifier)`.
        linear_solver: by default `PositivePart(maxiter=3)`, which leaves out what negative
            curvature the Hessian has, as it often does after a few steps (more products bring no
            gradient that is nearer to MAML's: docs/benchmarks.md#without-a-lam); with a `lam`
            `CG(maxiter=5)`, the paper's.
            `EarlyStopped(maxiter=5)` is nearest to MAML's own gradient, the product over the steps,
            which it takes as a power around the step in the middle, whose graph is kept besides the
            last (with losses given as tensors, from the second learner on: the first says how many
            steps there are). What else the loss depends on gets its gradient around that step too,
            which is nearly that of all steps if these are few or short. Or a function
            `solve(matvec, b)`, see `implicit`.
        solver: minimises the inner objective in `adapt(closure)`: an object with
            `minimize(objective, init)` (see `implicit_grad.solvers`), or such a function. By
            default gradient descent with MAML's lr.
        curvature: "auto" (the default) takes the Hessian, as the paper does, and differences of
            gradients in `adapt(closure)` where an operation has no second derivative in torch.
            "hessian" and "finite_difference" insist on one of them; "gauss_newton" leaves out the
            model's own curvature and is never indefinite for the usual losses.
        check: whether the products of `adapt(closure)` are held against differences of gradients:
            "once" for all clones and each kind of graph, "always" or "never" (for estimators whose
            gradient is not the derivative of their value, such as DiCE); see `implicit`. The
            closure is then called a few times more. Of `adapt(loss)` of a tensor the model is
            checked, by the call behind it made again (unless it has forward hooks); the loss
            itself, which cannot be computed again, is not.
        monitor: collects a `Report` for each backward solve.
        on_failure: on numerical trouble "warn", "raise" or "ignore".
        keep_steps: whether each step keeps the graph of its loss. Without, a step frees that of the
            one before, unless an outer loss of a call, `loss(learner(x), y)`, is left from between
            them (MAML++). Outer losses of anything else (the weights, a layer, a method such as
            `learner.density(x)` in ProMP, what was adapted to) need it.

    Raises:
        InvalidArgumentError: it is neither a model with an lr nor a MAML, or an option cannot work.

    >>> maml = imaml(nn.Linear(2, 1), lr=0.1)
    >>> learner = maml.clone()
    >>> _ = learner.adapt(learner(torch.ones(3, 2)).square().mean())
    >>> learner(torch.ones(3, 2)).sum().backward()
    >>> [p.grad is not None for p in maml.parameters()]
    [True, True]
    """
    if linear_solver is None:
        linear_solver = PositivePart(maxiter=3) if lam is None else CG(maxiter=5)
    check_option(check, "imaml")
    linear_solver = as_linear_solver(
        linear_solver, "imaml", "CG(), EarlyStopped(), MINRES(), Neumann(), Exact()"
    )
    _check(module_or_maml, lam, solver, curvature, linear_solver)
    held = held_maml(module_or_maml)
    given = accepted(module_or_maml if held is None else getattr(module_or_maml, held), lr)
    names = checked_names(adapts, given.module)
    learner = ImplicitMAML(
        given.module,
        lr=given.lr,
        adapts=names,
        first_order=given.first_order,
        allow_unused=given.allow_unused,
        allow_nograd=given.allow_nograd,
        lam=registrable(lam, adapting(given.module, names)),
        linear_solver=linear_solver,
        solver=solver,
        reporting=Reporting(
            monitor=monitor,
            on_failure=on_failure,
            inner_solved=means_to_solve(solver),
        ),
        curvature=curvature,
        checks=Checks(check),
        keep_steps=keep_steps,
        wrapped=given.wrapped,
    )
    if held is not None:  # learn2learn has no types
        return with_part(module_or_maml, held, learner)  # type: ignore[return-value]
    return learner


class ImplicitMAML(nn.Module):
    """What `imaml` returns: MAML, except for its gradients."""

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        adapts: Names | None,
        first_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
        lam: Any,
        linear_solver: LinearSolver,
        solver: Any,
        reporting: Reporting,
        curvature: Curvature,
        checks: Checks,
        keep_steps: bool,
        wrapped: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.lr, self.adapts, self.first_order = lr, adapts, first_order
        self.allow_unused, self.allow_nograd = allow_unused, allow_nograd
        self.lam = lam
        self.linear_solver, self.solver = linear_solver, solver
        self.reporting, self.curvature = reporting, curvature
        # a step of adapt(tensor) is not meant to solve anything, whatever `solver` is
        self._of_one_step = dataclasses.replace(reporting, inner_solved=False)
        self.tasks: int | None = None
        self._weights: Weights | None = None
        self._outside: Weights | None = None  # before others were put in
        self._twice: dict[Hashable, bool] = {}
        self._told, self._midway = Told(), Midway()
        self._checks, self.keep_steps = checks, keep_steps
        self._wrapped: tuple[nn.Module, ...] = (
            () if wrapped is None else (wrapped,)
        )  # a subclass of MAML

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__["_modules"]["module"]
            for wrapped in self.__dict__.get("_wrapped", ()):  # what a subclass adds
                return getattr(with_part(wrapped, "module", module), name)
            return getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output."""
        if self._weights is None:
            return self._called(args, kwargs)
        if torch.is_grad_enabled():
            self._take_in(self._weights)
        if self._notes_calls(self._weights) and torch.is_grad_enabled():
            output = called_again.noted(self._weights, self._output, args, kwargs)
        else:
            output = self._output(*args, **kwargs)
        if needs_outputs(self.curvature, self.linear_solver):
            output = self._weights.remembered(output)
        self._weights.watch(output)
        return output

    def _notes_calls(self, weights: Weights) -> bool:
        """Whether the next step may want to repeat the call that its loss comes from."""
        asked = not (self.first_order or weights.by_closure) and called_again.asked_for(
            self._checks
        )
        return asked and not has_forward_hooks(self.module)

    def _output(self, *args: Any, **kwargs: Any) -> Any:
        """With the fast weights of one task, or of each."""
        assert self._weights is not None
        with differentiable_twice(self._weights.recurrent):
            if self.tasks is None:
                return self._called(args, kwargs)
            stacked = self._weights.current
            return stacked_call(self.module, stacked, self.tasks, args, kwargs)

    def _called(self, args: Any, kwargs: Any) -> Any:
        for wrapped in self._wrapped:
            learner = with_part(wrapped, "module", self.module)
            learner.training = self.training
            return learner(*args, **kwargs)
        return self.module(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        tasks: int | None = None,
    ) -> ImplicitMAML:
        """A learner to adapt to one task; gradients of its losses arrive in this one's parameters.

        Layers and weights that are put into its `module` (a new head for each task) are its own
        from its next call on, as if it were cloned then: gradients arrive in what was put in.

        Args:
            first_order, allow_unused, allow_nograd: override those of the MAML that was wrapped.
            tasks: make it a learner for a batch of so many tasks, each with weights and a linear
                solve of its own. Every input, output and loss then has the tasks along its first
                dimension: `adapt` takes one loss for each, such as
                `torch.func.vmap(loss)(learner(x), y)`. Each task has copies of the buffers, and
                the model's own (running statistics) stay as they are.

        Raises:
            InvalidArgumentError: tasks is not a number of tasks, or an option does not go with it.
        """
        if tasks is not None and any(map(has_own_forward, self._wrapped)):
            raise InvalidArgumentError(
                f"clone(tasks={tasks}): {describe(self._wrapped[0])} has a forward of its own, "
                "which knows one task at a time; put it into the model"
            )
        if tasks is not None:
            check_tasks(tasks, self.tasks, self.linear_solver, self.curvature, self.module)
            check_stackable(self.adapts, self.module, tasks)
        learner = ImplicitMAML(
            cloned(self.module),
            lr=self.lr,
            adapts=self.adapts,
            first_order=_either(first_order, self.first_order),
            allow_unused=_either(allow_unused, self.allow_unused),
            allow_nograd=_either(allow_nograd, self.allow_nograd),
            lam=self.lam,
            linear_solver=self.linear_solver,
            solver=self.solver,
            reporting=self.reporting,
            curvature=self.curvature,
            checks=self._checks,
            keep_steps=self.keep_steps,
            wrapped=next(iter(self._wrapped), None),
        )
        learner.training = self.training
        learner._twice, learner._told, learner._midway = self._twice, self._told, self._midway
        learner.tasks = self.tasks if tasks is None else tasks
        learner._weights = self._weights_of(learner.module, tasks)
        if tasks is not None:
            stack_buffers(learner.module, tasks)
        learner._weights.start()
        return learner

    @uncompiled
    def adapt(
        self,
        loss: Tensor | Callable[[], Tensor],
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        steps: int | None = None,
    ) -> ImplicitMAML:
        """Adapt the learner's weights to a loss, in place.

        Args:
            loss: the loss of this learner's output, for one gradient step; or a function without
                arguments that computes it, for `steps` gradient steps or a whole minimisation. It
                is called once more at the end, `steps` + 1 times in all: the gradient is that of
                the solution of what it computes there. If it takes a new batch at each call, let
                the last one stand for all of them.
            first_order: take the gradient of first-order MAML, dθ = v, for this step.
            allow_unused: parameters that the loss does not depend on are only pulled to θ, instead
                of being an error.
            allow_nograd: parameters with requires_grad=False stay where they are, likewise.
            steps: with a function, the number of gradient steps; by default 1.

        Returns:
            The learner itself. So `maml_update(model, lr, gradients)`, a step of a model that no
            MAML holds, is `imaml(model, lr=lr).adapt(lambda: loss(model)).module`.

        Raises:
            InvalidArgumentError: the loss is not a scalar, or does not depend on the weights.
            GraphError: the loss has no graph, or with curvature="gauss_newton" does not come
                from one output of this learner.
        """
        first_order = _either(first_order, self.first_order)
        allow_nograd = _either(allow_nograd, self.allow_nograd)
        allow_unused = _either(allow_unused, self.allow_unused)
        if self._weights is None:  # adapting the original itself, as MAML allows
            self._weights = self._weights_of(self.module, None)
        check_assigned(self)
        check_moved(self._weights)
        self._take_in(self._weights, past_call=torch.is_tensor(loss))
        self._weights.check_trainable(allow_nograd)
        check_lr("adapt", self.lr)
        method = self._method(first_order, allow_unused, one_step=torch.is_tensor(loss))
        if torch.is_tensor(loss) or self.solver is None:
            self._told.of_lam(self._weights.pull, self.lr, self.reporting)
        if torch.is_tensor(loss):
            if steps is not None:
                raise InvalidArgumentError("adapt: steps needs a function that computes the loss")
            step_on_tensor(self._weights, loss, self.lr, method, self.module, self._output)
        elif callable(loss):
            minimise_closure(self._weights, loss, minimiser_of(self.solver, self.lr, steps), method)
        else:
            raise InvalidArgumentError(
                "adapt: loss must be a scalar tensor, or a function without arguments that "
                f"returns one, got {describe(loss)}"
            )
        return self

    def _take_in(self, weights: Weights, past_call: bool = False) -> None:
        """Go on from the weights that the module has now, if others were put into it.

        As a clone does: they are new fast weights, whose gradients go to what was put in.
        """
        if weights.are_in(self.module):
            return
        if self._outside is not None and self._outside.are_in(self.module):
            self._weights, self._outside = self._outside, None  # back from functional_call
            return
        if check_replaced(weights, self.module, past_call):
            self._weights, self._outside = self._weights_of(self.module, None), weights
            self._weights.start()

    def _method(self, first_order: bool, allow_unused: bool, *, one_step: bool) -> StepMethod:
        return StepMethod(
            linear_solver=self.linear_solver,
            reporting=self._of_one_step if one_step else self.reporting,
            curvature=self.curvature,
            first_order=first_order,
            allow_unused=allow_unused,
            twice=self._twice,
            told=self._told,
            midway=self._midway,
            checks=self._checks,
            keeps_steps=self.keep_steps,
        )

    def _weights_of(self, module: nn.Module, tasks: int | None) -> Weights:
        """The weights of `module`, which come from this module's, as often as there are tasks."""
        if self._weights is not None:
            check_names(self._weights, self.module, self.lam)
        theta: Tensors = tuple(t for _, t in adapting(self.module, self.adapts))
        pull = self._pull_on(theta)
        trainable = [t.requires_grad for t in theta]
        if self._weights is not None:
            trainable = [self._weights.train(t) for t in theta]
        if tasks is not None:
            theta = stack_parameters(theta, pull, tasks)
        n_tasks = self.tasks if tasks is None else tasks
        return Weights(module, theta, pull, trainable, n_tasks, self.adapts)

    def _pull_on(self, theta: Tensors) -> ProximalTerm | None:
        check_theta(theta, "imaml")
        for t in theta:
            if t.is_complex():
                raise InvalidArgumentError(
                    f"imaml: theta must be real; the module holds {describe(t)}{in_pairs(t)}"
                )
        if self.lam is None:
            return None
        lam = tuple(self.lam) if isinstance(self.lam, nn.ParameterList) else self.lam
        with torch.inference_mode(False):  # adapt(closure) needs tensors that autograd may save
            return proximal_term(evaluated(lam), theta, "imaml")


def _either(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _check(
    module_or_maml: Any, lam: Any, solver: Any, curvature: str, linear_solver: LinearSolver
) -> None:
    """Raise unless `imaml` can work with its arguments."""
    if isinstance(module_or_maml, ImplicitMAML):
        raise InvalidArgumentError("imaml: the first argument is wrapped by imaml already")
    check_solver(solver, lam)
    check_curvature(curvature, "imaml")
    if lam is not None and isinstance(linear_solver, EarlyStopped) and linear_solver.counts_nothing:
        raise InvalidArgumentError(
            f"imaml: EarlyStopped() is the derivative of MAML's own steps, which lam=None takes; "
            f"with lam={lam!r} give EarlyStopped(steps=..., lr=...), or take CG()"
        )
