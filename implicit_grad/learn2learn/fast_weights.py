"""The fast weights of an `imaml` learner: where they live, and what they stand for in the graph."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from implicit_grad._conditions.batching import total
from implicit_grad._conditions.lam import proximal_term
from implicit_grad._conditions.proximal_term import ProximalSteps, ProximalTerm, gradient_step
from implicit_grad._errors import GraphError, InvalidArgumentError
from implicit_grad._torch import pytree
from implicit_grad._torch.graph import leaves_behind, walk
from implicit_grad._torch.handed_on import HandedOn
from implicit_grad._torch.modules import Layout, Places
from implicit_grad._torch.pytree import Tensors, Tree
from implicit_grad._torch.watched import Mark, marks_behind, watched
from implicit_grad.learn2learn.chosen import Names, adapting

# Calls of a learner that are remembered until it adapts, to find the one that its loss came from.
_REMEMBERED_CALLS = 4


@dataclasses.dataclass(eq=False)
class Gate:
    """Whether gradients may pass from one generation of fast weights to what they stand for.

    `shut` while a product is taken around these very weights, which then count as constants;
    `superseded` once a later step has dropped what backward would need. A gate is shut for the
    backward pass that shut it only, as others may pass at the same time: that is known from the
    thread-local state which autograd hands on to its own threads (on a GPU, backward runs there).
    """

    superseded: bool = False

    @property
    def shut(self) -> bool:
        """Whether this backward pass may not go through."""
        return self in _shut_gates.value

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Let nothing through."""
        before = _shut_gates.value
        _shut_gates.value = before | {self}
        try:
            yield
        finally:
            _shut_gates.value = before


_shut_gates: HandedOn[frozenset[Gate]] = HandedOn("implicit_grad: shut gates", frozenset())


class FastWeights(torch.autograd.Function):
    """Given values that stand for their sources in the graph: the identity, with a gate."""

    @staticmethod
    def forward(gate: Gate, values: Tensors, *sources: Tensor) -> Tensors:
        return tuple(t.detach() for t in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.gate = inputs[0]

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gate.shut:
            return (None, None, *(None for _ in v))
        if ctx.gate.superseded:
            raise GraphError(
                "an outer loss reaches weights that a later adapt(loss) has replaced, and what "
                "their gradient needs is gone. It is kept for outer losses that come from a call "
                "of their own, learner(x), before that adapt; for others (of the weights, of a "
                "layer, of what was adapted to) pass keep_steps=True to imaml, or functions: "
                "learner.adapt(lambda: loss(...))",
                anchor="replaced-weights",
            )
        return None, None, *v


@dataclasses.dataclass(eq=False)
class Superseded:
    """A generation of weights that is no more in place, but that an outer loss may still reach."""

    gate: Gate
    release: Callable[[], None]
    calls: list[weakref.ref[Mark]]

    @property
    def wanted(self) -> bool:
        """Whether the graph of a call with these weights is still there."""
        return any(call() is not None for call in self.calls)

    def drop(self) -> None:
        """Free what their gradient needs."""
        self.gate.superseded = True
        self.release()


class Weights:
    """A learner's trainable weights: where they live, what they came from, what pulls them.

    `pull` holds the steps back, and stands in the inner problem that backward linearises. Without
    one, the steps are MAML's, and their end stands for the solution under the λ that gradient
    descent for as long a time is close to: λ = 1/t, t the sum of the steps' lengths (Ali, Kolter
    and Tibshirani, 2019, A Continuous-Time View of Early Stopping for Least Squares).
    """

    def __init__(
        self,
        module: nn.Module,
        theta: Tensors,
        pull: ProximalTerm | None,
        trainable: list[bool],
        n_tasks: int | None = None,
        adapts: Names | None = None,
    ) -> None:
        """With `n_tasks`, the tensors of θ are stacks with a first dimension of that many."""
        self.trainable, self.n_tasks, self._adapts = trainable, n_tasks, adapts
        named = self.named_in(module)
        kept = [i for i, trains in enumerate(trainable) if trains]
        adapted = {named[i][0] for i in kept}
        fixed = {n: p for n, p in (*named, *module.named_parameters()) if n not in adapted}
        meant = fixed if adapts is None else {n for n, _ in named}
        self.frozen, self._fixed = [n for n in fixed if n in meant], set(map(id, fixed.values()))
        self.names = [named[i][0] for i in kept]
        self.theta = tuple(theta[i] for i in kept)
        self.pull = None if pull is None else pull.of(kept)
        self.time, self.number = 0.0, 0
        self.halfway: Any = None  # the step in the middle, once it is taken
        self._places = Places(module, [named[i][1] for i in kept], anywhere=adapts is not None)
        self._layout: Layout | None = None
        # without a pull, a λ of 1 keeps the place of that which the steps' time will make
        term = proximal_term(1.0, self.theta, "imaml") if self.pull is None else self.pull
        self._inputs, self._inputs_tree = pytree.flatten((self.theta, term))
        self.gate = Gate()
        self.current, self._present = self.theta, self._fixed | {id(t) for t in self.theta}
        self._release: Callable[[], None] | None = None
        self._keeping: object = None
        self._outer_calls: list[weakref.ref[Mark]] = []
        self._superseded: list[Superseded] = []
        self.calls: deque[Tensors] = deque(maxlen=_REMEMBERED_CALLS)
        self.noted: deque[Any] = deque(maxlen=_REMEMBERED_CALLS)  # those that may be checked
        self.by_closure = False  # how they adapt: then no call of their own is checked

    @property
    def recurrent(self) -> bool:
        """Whether the module has recurrent layers."""
        return self._places.recurrent

    def named_in(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        """What is there in the place of these, with those that do not train."""
        return adapting(module, self._adapts)

    def are_in(self, module: nn.Module) -> bool:
        """Whether these, and those that do not train, are the weights that the module has."""
        if self._layout is None or not self._layout.is_of(module):
            self._layout = Layout(module)
        there = self._layout.ids()
        if self._adapts is not None:  # others than parameters may be among them
            there |= {id(t) for _, t in self.named_in(module)}
        return there == self._present

    def train(self, tensor: Tensor) -> bool:
        """Whether one of the module's weights trains: under no_grad, fast weights do not tell."""
        own = any(tensor is t for t in self.current)
        return own or (tensor.requires_grad and id(tensor) not in self._fixed)

    def total(self, name: str, loss: object) -> Tensor:
        """The loss, if it is one number, or the sum of one for each task."""
        return total(name, loss, self.n_tasks)

    def inputs(self, time: float, stopped: bool) -> tuple[Tensors, Tree]:
        """(θ, Λ), flat: what weights that were reached in that time depend on.

        Where a linear solver counts the steps itself (`stopped`), λ = 1/time would count them
        twice: without a pull λ is then as good as none.
        """
        if self.pull is not None:
            return self._inputs, self._inputs_tree
        lam = max(torch.finfo(t.dtype).eps for t in self.theta) / time if stopped else 1 / time
        own = {id(t) for t in self.theta}
        inputs = (t if id(t) in own else torch.full_like(t, lam) for t in self._inputs)
        return tuple(inputs), self._inputs_tree

    def stay(self, time: float) -> bool:
        """Whether weights that were reached in that time are θ, since no step had a length."""
        return self.pull is None and not time

    def start(self) -> None:
        """Begin at copies of θ."""
        self.attach(tuple(t.detach().clone() for t in self.theta), self.theta)

    def attach(
        self,
        values: Tensors,
        sources: Tensors,
        time: float = 0.0,
        number: int = 0,
        release: Callable[[], None] | None = None,
        keeping: object = None,
    ) -> None:
        """Install the values as weights whose gradients go to the sources.

        `time` is the sum of the lengths of the steps that led to them from θ, `number` how many
        they were, if they were counted. `release` frees
        what their gradient needs, once they are superseded; `keeping` is kept alive as long as
        they are in place.
        """
        self.time, self.number = time, number
        self.gate, self._release, self._keeping = Gate(), release, keeping
        self._outer_calls = []
        self.install(FastWeights.apply(self.gate, values, *sources))

    def supersede(self, loss: Tensor) -> None:
        """Free what the gradients of the weights up to now need, unless an outer loss is left.

        That is one from another call of the learner than the loss that they were adapted to.
        """
        if self._release is not None:
            there = {mark for call in self._outer_calls if (mark := call()) is not None}
            own = marks_behind(loss, there, self.is_own)
            calls = [call for call in self._outer_calls if call() not in own]
            self._superseded.append(Superseded(self.gate, self._release, calls))
        for past in self._superseded:
            if not past.wanted:
                past.drop()
        self._superseded = [past for past in self._superseded if past.wanted]

    def watch(self, output: Any) -> None:
        """Note a call's output: as long as its graph is there, an outer loss may be made of it."""
        if self._release is not None:
            tensors = [output] if torch.is_tensor(output) else pytree.leaves(output)
            for tensor in filter(torch.is_tensor, tensors):
                if tensor.grad_fn is not None and not self.is_own(tensor.grad_fn):
                    self._outer_calls.append(watched(tensor))

    def install(self, weights: Tensors) -> None:
        """Put the tensors into the module."""
        self.current, self._present = weights, self._fixed | {id(t) for t in weights}
        self._places.fill(weights)
        self.calls.clear()
        self.noted.clear()

    def remembered(self, output: Any) -> Any:
        """A call's output, noted: with Gauss-Newton, the loss must be a function of it.

        Its tensors become views, none of which is computed from another, or is itself a weight.
        """
        tensors, tree = pytree.flatten(output, lambda t: torch.is_tensor(t) and t.requires_grad)
        if not tensors:
            return output
        outputs = tuple(t.view_as(t) for t in tensors)
        self.calls.append(outputs)
        return tree.rebuild(outputs)

    def check_used(self, used: tuple[Tensor | None, ...], allow_unused: bool) -> None:
        """Raise if the loss leaves out a weight (None in `used`), unless that is allowed."""
        unused = [n for n, t in zip(self.names, used, strict=True) if t is None]
        if len(unused) == len(used):
            raise InvalidArgumentError(
                "adapt: the loss does not depend on the learner's present weights; compute it "
                "anew from this learner's output before each adapt. (A model whose layers are in "
                "compiled functions, or in objects of classes of their own, computes with the "
                "weights of the model that was cloned.)",
                anchor="loss-of-other-weights",
            )
        if unused and not allow_unused:
            raise InvalidArgumentError(
                f"adapt: the loss does not depend on {', '.join(unused)}; pass allow_unused=True "
                "to clone() or adapt() to leave them as they are. (If the model uses them "
                "otherwise than as its attributes, as a tensor in a list, a clone computes with "
                "the model's own: look them up when they are used.)",
                anchor="unused-weights",
            )

    def check_trainable(self, allow_nograd: bool) -> None:
        """Raise if some parameters are frozen, unless that is allowed."""
        if self.frozen and not allow_nograd:
            raise InvalidArgumentError(
                f"adapt: {', '.join(self.frozen)} has requires_grad=False; pass allow_nograd=True "
                "to clone() or adapt(), and the other parameters adapt"
            )
        if not self.theta:
            raise InvalidArgumentError("adapt: the model has no parameter that requires grad")

    def moved(self, slope: tuple[Tensor | None, ...], lr: float) -> Tensors:
        """One step from the present weights: MAML's own, or with a pull a proximal one."""
        if self.pull is None:
            return gradient_step(self.current, slope, lr)
        return ProximalSteps(self.pull, self.theta)(self.current, slope, lr)

    def captured_by(self, loss: Tensor) -> Tensors:
        """The other leaves that the loss depends on."""
        own = {id(t) for t in self.current}
        return tuple(t for t in leaves_behind([loss], stop=self.is_own) if id(t) not in own)

    def outputs_behind(self, loss: Tensor) -> Tensors:
        """The outputs of the one remembered call through which the loss depends on the weights."""
        for outputs in reversed(self.calls):
            if self._goes_through(loss, {t.grad_fn for t in outputs}):
                return outputs
        raise GraphError(
            'adapt: with curvature="gauss_newton" the loss must be a function of the output of one '
            "call of this learner and of no weights besides; this loss is not (it adds a penalty "
            "on the weights, sums over several calls, comes from learner.module, or the output is "
            "an object that is no dataclass, and registered neither in optree nor in "
            'torch.utils._pytree). Use curvature="hessian" for it',
            anchor="not-of-one-output",
        )

    def _goes_through(self, loss: Tensor, gates: set[Any]) -> bool:
        """Whether all paths from the loss to the weights pass one of the nodes, and some do."""
        own = {id(t) for t in self.current}
        visited = list(walk([loss], stop=lambda node: node in gates or self.is_own(node)))
        beyond = [node for node in visited if node not in gates]
        around = any(self.is_own(n) or id(getattr(n, "variable", None)) in own for n in beyond)
        return len(beyond) < len(visited) and not around

    def is_own(self, node: Any) -> bool:
        """Whether a node of the graph is the one that made the present weights."""
        return bool(self.current) and node is self.current[0].grad_fn
