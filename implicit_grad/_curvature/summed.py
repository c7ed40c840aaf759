"""A sum over batches, and its derivatives of every order: one batch's graph is alive at a time.

With G(φ, a) = Σ_b g_b(φ, a) the gradient is Σ_b ∇g_b, a product with the Hessian Σ_b ∇²g_b u, and
so on: every derivative of a sum over batches is a sum over batches too, of what is evaluated,
differentiated and let go, batch by batch. So one Function serves them all: its backward pass is
such a sum again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from implicit_grad._curvature.hessian import GaussNewtonProduct
from implicit_grad._torch.graph import between, coarsest, leaves_behind, once_differentiable
from implicit_grad._torch.own_backward import own_backwards
from implicit_grad._torch.products import gradient, variables, vjp, without_hooks
from implicit_grad._torch.pytree import Tensors

T = TypeVar("T")
Same = Sequence[tuple[str, Tensors]]  # what has to be the same in all processes, and what it is


class Term:
    """One batch's part of the sum: the value with its graph, and the model's outputs if any.

    A term that does not count is another process's to add.
    """

    def __init__(
        self, evaluate: Callable[[], tuple[Tensor, Tensors | None]], counts: bool = True
    ) -> None:
        self.value, self.outputs = evaluate()
        self.counts = counts
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, made once for as long as this term is kept."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


class Share(NamedTuple):
    """What one process adds, at what is the same in all; and what the others need to know."""

    sums: Tensors
    at: Same
    numbers: Sequence[int] = ()


class Terms(Protocol):
    """The terms of a sum, one after another, as often as they are asked for."""

    def each(self, use: Callable[[Term], None]) -> int:
        """Call `use` with each term; a term that is not kept has to go before the next comes.

        Returns how many batches there were.
        """

    def together(self, add_up: Callable[[], Share]) -> tuple[Tensors, list[list[int]]]:
        """The sums of all processes that have terms, and the numbers of each process."""


Part = Callable[[Term, Tensors], Tensors]


class Sum:
    """Tensors that are sums over terms, as a function of the terms' inputs and of other tensors.

    Attributes:
        inputs: what the terms' graphs end at: φ, and all else that requires grad.
    """

    def __init__(
        self, terms: Terms, inputs: Tensors, part: Part, others: int = 0, key: Hashable = None
    ) -> None:
        self.terms, self.inputs = terms, inputs
        self._part, self._others, self._key = part, others, key
        self.known: Tensors | None = None

    def __call__(self, *others: Tensor) -> Tensors:
        if not torch.is_grad_enabled():
            return self.total(others)
        there: Tensors = _Summed.apply(self, *self.inputs, *others)
        return there

    def total(self, others: Tensors) -> Tensors:
        """The sums, without a graph."""
        if self.known is not None:
            return tuple(t.detach() for t in self.known)

        def add_up() -> Share:
            sums = Sums()

            def add(term: Term) -> None:
                if term.counts:
                    with torch.no_grad():
                        sums.add(self._part(term, others))

            with without_hooks(self.inputs):
                self.terms.each(add)
            return Share(sums.tensors, [("a vector", others)])

        return self.terms.together(add_up)[0]

    def pull(self, places: Sequence[int], others: Tensors, v: Tensors) -> Tensors:
        """(∂sums/∂x)ᵀv, for the x at these places among the inputs and the others."""
        count = self._others

        def part(term: Term, given: Tensors) -> Tensors:
            with torch.enable_grad():
                own, v = _variables(given[:count]), given[count:]
                if self._key is None:
                    sums = self._part(term, own)
                else:
                    sums = term.once(self._key, lambda: self._part(term, own))
            xs = (*self.inputs, *own)
            return vjp(sums, [xs[i] for i in places], v)

        return Sum(self.terms, self.inputs, part, count + len(v))(*others, *v)

    def alone(self, inputs: Sequence[Tensor], others: Tensors, v: Tensors | None) -> Tensors | None:
        """`pull` for these inputs only (v is None: 1), if nothing leads to them by another way."""
        xs = (*self.inputs, *others)
        place = {id(x): i for i, x in enumerate(xs)}
        if any(x.grad_fn is not None for x in xs):
            return None
        places = [place[id(t)] for t in inputs if id(t) in place]
        found = iter(self._alone(places, others, v))
        return tuple(next(found) if id(t) in place else torch.zeros_like(t) for t in inputs)

    def _alone(self, places: Sequence[int], others: Tensors, v: Tensors | None) -> Tensors:
        return self.pull(places, others, v or ())


class Value(Sum):
    """The sum itself, a scalar; `slope` is known for φ from the pass in which it was evaluated.

    `arguments` are those tensors of which other processes may have a term that depends on them.

    Attributes:
        once: whether a term has no second derivative, by what its graph says.
        precision: of the coarsest term, see `coarsest`.
        batches: how many there are, in all processes.
    """

    def __init__(self, terms: Terms, phi: Tensors, arguments: Tensors = ()) -> None:
        self.phi = tuple(p for p in phi if p.requires_grad)
        graded = torch.is_grad_enabled()
        own, behind = {p.grad_fn for p in self.phi} - {None}, dict[int, Tensor]()
        named = {id(t) for t in (*self.phi, *arguments)}

        def captured() -> Tensors:
            return tuple(t for i, t in behind.items() if i not in named)

        def add_up() -> Share:
            value, slope = Sums(), Sums()
            once = depends = False
            eps = torch.finfo(torch.float64).eps

            def first(term: Term) -> None:
                nonlocal once, depends, eps
                if term.counts:
                    value.add((term.value,))
                if not graded or not term.value.requires_grad:
                    return
                depends = True
                leaves = leaves_behind([term.value], lambda node: node in own)
                behind.update((id(t), t) for t in leaves)
                once = once or once_differentiable([term.value], self.phi)
                eps = max(eps, coarsest([term.value], self.phi))
                if term.counts:
                    with torch.no_grad(), without_hooks(leaves):
                        slope.add(gradient(term.value, self.phi))

            count = terms.each(first)
            slopes = slope.tensors or tuple(map(torch.zeros_like, self.phi if graded else ()))
            same = [("phi", self.phi), ("what the function refers to", captured())]
            digits = -math.frexp(eps)[1]  # eps is a power of 2, and numbers are integers
            numbers = [count, once, depends, digits, *(id(t) in behind for t in arguments)]
            return Share((*value.tensors, *slopes), same, numbers)

        (value, *slope), rows = terms.together(add_up)
        counts, once, depends, digits, *read = zip(*rows, strict=True)
        self.precision = math.ldexp(0.5, -min(digits))
        self.batches, self.once, self._depends = sum(counts), any(once), any(depends)
        leaves = [t for t, by in zip(arguments, read, strict=True) if any(by)]
        super().__init__(terms, (*self.phi, *leaves, *captured()), lambda term, _: (term.value,))
        self.known, self._slope = (value,), tuple(slope)

    def tensor(self) -> Tensor:
        """The value, whose graph is one node."""
        (value,) = self() if self._depends else self.total(())
        return value

    def slope(self, places: Sequence[int]) -> Tensors:
        """The gradient by the inputs at these places."""
        targets = [self.inputs[i] for i in places]

        def part(term: Term, _: Tensors) -> Tensors:
            with own_backwards(between([term.value], self.phi), lasting=True):
                return gradient(term.value, targets)

        found = Sum(self.terms, self.inputs, part, key=("slope", *places))
        if list(places) == list(range(len(self.phi))):
            found.known = self._slope
        return found()

    def pull(self, places: Sequence[int], others: Tensors, v: Tensors) -> Tensors:
        """The gradient times v."""
        return tuple(v[0] * g for g in self.slope(places))

    def _alone(self, places: Sequence[int], others: Tensors, v: Tensors | None) -> Tensors:
        return self.slope(places) if v is None else self.pull(places, others, v)


class GaussNewtonSum:
    """Jᵀ (∂²loss/∂output²) J u of a sum, as in `GaussNewton`."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self._remark: tuple[str | None, ...] = ()  # of the first term

    def __call__(self, u: Tensors) -> Tensors:
        def part(term: Term, u: Tensors) -> Tensors:
            return term.once("gauss_newton", lambda: self._product(term))(u)

        return Sum(self._value.terms, self._value.inputs, part, len(u))(*u)

    def remark(self) -> str | None:
        """That on the first term, once there was a product."""
        return self._remark[0] if self._remark else None

    def _product(self, term: Term) -> GaussNewtonProduct:
        assert term.outputs is not None
        product = GaussNewtonProduct(term.value, term.outputs, self._value.phi)
        self._remark = self._remark or (product.remark(),)
        return product


class Sums:
    """Sums of tuples of tensors; the tensors of the first are copied, as are all that are kept."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    @torch.no_grad()
    def add(self, parts: Tensors) -> None:
        """One tuple more."""
        if self._tensors:
            for total, part in zip(self._tensors, parts, strict=True):
                total.add_(part.detach())
        else:
            self._tensors = [part.detach().clone() for part in parts]

    @property
    def tensors(self) -> Tensors:
        """The sums so far."""
        return tuple(self._tensors)


class _Summed(torch.autograd.Function):
    """A sum's tensors, whose backward pass is another sum."""

    @staticmethod
    def forward(ctx: Any, summed: Sum, *tensors: Tensor) -> Tensors:
        others = tensors[len(summed.inputs) :]
        ctx.summed = summed
        ctx.save_for_backward(*others)
        # what asks for some of the derivatives only finds this (see `vjp`)
        ctx.alone = functools.partial(_alone, summed)
        sums = summed.total(others)
        ctx.size = len(sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        places = [i for i, needed in enumerate(needs) if needed]
        found = iter(ctx.summed.pull(places, ctx.saved_tensors, v))
        return None, *(next(found) if needed else None for needed in needs)


def _alone(summed: Sum, node: Any, inputs: Sequence[Tensor], v: Tensors | None) -> Tensors | None:
    if v is not None and len(v) != node.size:
        return None
    return summed.alone(inputs, node.saved_tensors, v)


def _variables(tensors: Tensors) -> Tensors:
    """New nodes to differentiate by, which stay connected to what they come from."""
    return tuple(t.view_as(t) if t.requires_grad else variables((t,))[0] for t in tensors)
