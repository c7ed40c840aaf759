"""Data in batches: what may give them, and its passes, each of which is to give the same sum."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from implicit_grad._conditions.base import (
    Again,
    Call,
    Condition,
    Snapshot,
    check_callable,
    composed,
    scalar,
    seen,
)
from implicit_grad._conditions.dependence import scattered
from implicit_grad._conditions.processes import Processes
from implicit_grad._curvature.auto import linearize
from implicit_grad._curvature.objective import Objective
from implicit_grad._curvature.summed import GaussNewtonSum, Share, Term, Value
from implicit_grad._errors import GraphError, ImplicitGradError, InvalidArgumentError, describe
from implicit_grad._options import check_value, is_integer
from implicit_grad._theorem.linearization import Stationarity
from implicit_grad._torch import pytree
from implicit_grad._torch.isolation import Ambient, RandomState, isolated
from implicit_grad._torch.products import own_precision, variables
from implicit_grad._torch.pytree import Tensors

# Sums of the same terms in another order differ by rounding, of less than this power of eps.
_ROUNDING = 2 / 3
_TWICE = (
    "{}: the sum over batches is another one when it is evaluated again, {:.9g} and not {:.9g}:"
    " the loader augments at random (draws from torch's own generators are repeated, unless "
    "workers make them with persistent_workers=True; fix others in the data set, as by a "
    "generator that is seeded anew with the sample's index), it leaves out other samples each "
    "time (drop_last=True with shuffle=True), the objective averages over batches that are not "
    "of one size, or it refers to a variable that has changed since. A subset of the data has "
    "to be the same in each pass too"
)
# What user's code raises where a batch is not what it expects.
_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)
_COUNT = (
    "{}: batches gave {} batches when it was read first, and now {}: it has to give the same in "
    "each pass, as a list or a DataLoader does"
)
_ORDER = (
    "{}: keep={} keeps the first batches' graphs, but batch {} is another one now: with keep= a "
    "loader has to give its batches in the same order in each pass. Take shuffle=False, or give "
    "the DataLoader its generator= (which is set back for each pass)"
)


def check_batches(
    condition: str, batches: object, regularizer: object, keep: object, apart: Mapping[str, object]
) -> None:
    """Raise unless the loader can be read again and again, and goes with the other options."""
    check_value(condition, "keep", keep, is_integer(keep, 0), "a number of batches, at least 0")
    if batches is None:
        if regularizer is not None or keep:
            name = "regularizer" if regularizer is not None else "keep"
            raise InvalidArgumentError(
                f"{condition}: {name} goes with batches=, over which the objective is summed; "
                "without them add the regularizer to the objective"
            )
        return
    if regularizer is not None:
        check_callable(condition, "regularizer", regularizer)
    refusal = _refusal(batches)
    if refusal is not None:
        raise InvalidArgumentError(
            f"{condition}: batches must be an iterable of batches that can "
            f"be read many times, such as a DataLoader or a list; got {describe(batches)}{refusal}"
        )
    for name, given in apart.items():
        if given:
            raise InvalidArgumentError(f"{condition}: batches does not go with {name}")


def _refusal(batches: object) -> str | None:
    """What is wrong with a loader, if that shows before it is read."""
    if isinstance(batches, Iterator):
        return (
            ", which can be read only once: make it a list, or an object whose __iter__ starts anew"
        )
    if torch.is_tensor(batches):
        return ", whose rows would be the batches: take X.split(256), or a DataLoader"
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        return ", whose samples would be the batches: take DataLoader(dataset, batch_size=256)"
    if isinstance(batches, (str, bytes, Mapping)):
        return ""
    if not hasattr(batches, "__iter__"):
        return ", which is not iterable" + (": call it" if callable(batches) else "")
    with contextlib.suppress(TypeError):  # some loaders do not know how many there are
        if len(batches) == 0:  # type: ignore[arg-type]
            return ", which is empty"
    return None


@dataclasses.dataclass(frozen=True)
class Batches:
    """The objective of one call: the sum over a loader's batches, and the regularizer.

    Attributes:
        where: the condition and its function, for messages.
        function: `function(phi, batch, *args)`, behind `model(phi, batch, *args)` if there is one.
        call: the arguments after the batch.
        processes: those that have batches of the sum, if there are several.
    """

    where: str
    batches: Iterable[Any]
    function: Callable[..., Any]
    model: Callable[..., Any] | None
    regularizer: Callable[..., Any] | None
    keep: int
    call: Call
    processes: Processes | None

    def value(self, phi: Any) -> Tensor:
        """The sum at φ, for a minimiser."""
        return Value(Passes(self, phi, pytree.flatten(phi)[0]), pytree.flatten(phi)[0]).tensor()

    def snapshot(
        self,
        phi: Any,
        variables: Tensors,
        again: Again | None,
        stationarity: Callable[[Tensors], Stationarity],
        sample: Callable[[Callable[..., Tensor], Callable[..., Any] | None], Condition],
    ) -> Snapshot:
        """The sum as evaluated at φ; `sample` makes a condition of a function and a model."""
        passes = Passes(self, phi, variables)
        tensors = pytree.flatten((self.call.args, self.call.kwargs))[0]
        value = Value(passes, variables, tuple(t for t in tensors if t.requires_grad))
        objective = Objective(
            value.tensor(),
            variables,
            stationarity,
            again=again,
            once=value.once,
            precision_of_parts=value.precision,
            gauss_newton=None if self.model is None else GaussNewtonSum(value),
        )
        return Snapshot(
            (objective.value,),
            functools.partial(linearize, objective),
            objective,
            sample=sample(*self._of_one(passes.first)),
            batches=value.batches,
        )

    def evaluated(self, batch: Any, at: str, phi: Any) -> tuple[Tensor, Tensors | None]:
        """The value for one batch, and the model's outputs."""
        if any(torch.is_tensor(t) and t.requires_grad for t in pytree.leaves(batch)):
            raise InvalidArgumentError(
                f"{self.where}: {at} holds a tensor that requires grad, but data that a loader "
                "gives get no gradient: pass what is to have one as an argument, and the rest "
                "detached"
            )
        args, kwargs = self.call.args, self.call.kwargs
        try:
            value, outputs = composed(self.function, self.model, (batch, *args), kwargs)(phi)
        except (ImplicitGradError, torch.cuda.OutOfMemoryError):
            raise
        except _MISTAKES as error:
            raise InvalidArgumentError(
                f"{self.where} fails at {at}, {_form(batch)}: {type(error).__name__}: {error}"
            ) from error
        return _scalar(f"{self.where} at {at}", value), outputs

    def regularized(self, phi: Any) -> tuple[Tensor, Tensors | None]:
        """The regularizer's value, and φ as the outputs of a model that changes nothing."""
        assert self.regularizer is not None
        tensors, tree = pytree.flatten(phi)
        outputs = tuple(t.view_as(t) for t in tensors)
        value = self.regularizer(tree.rebuild(outputs), *self.call.args, **self.call.kwargs)
        return _scalar(f"{self.where.split(':')[0]}: regularizer", value), outputs

    def _of_one(self, batch: Any) -> tuple[Callable[..., Tensor], Callable[..., Any] | None]:
        """The objective of one batch and the regularizer, as a function and a model."""
        function, model, regularizer = self.function, self.model, self.regularizer

        def whole(phi: Any, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = function(outputs, batch, *args, **kwargs).reshape(())
            if regularizer is not None:
                value = value + regularizer(phi, *args, **kwargs).reshape(())
            return value

        if model is None or model is seen:
            return lambda phi, *a, **k: whole(phi, phi, *a, **k), model
        return (
            lambda pair, *a, **k: whole(*pair, *a, **k),
            lambda phi, *a, **k: (phi, model(phi, batch, *a, **k)),
        )


class Passes:
    """The terms of the sum at one φ, evaluated anew in each pass, but for those that are kept.

    A pass sees random generators as the first one did, so that it draws the same dropout masks;
    and its sum is held against the first one's, which costs nothing. Where all values are 0 (a
    perfect fit, φ = 0), that would tell nothing of the data, and values at another φ are compared.

    Attributes:
        count: how many batches there are.
        first: the first of them.
    """

    def __init__(self, data: Batches, phi: Any, variables: Tensors) -> None:
        self._data, self._phi = data, phi
        tensors = filter(torch.is_tensor, pytree.leaves((data.call.args, data.call.kwargs)))
        self._ambient = Ambient({t.device for t in (*variables, *tensors)}, variables)
        self._generators = [(g, g.get_state()) for g in _generators(data.batches)]
        self._kept: list[tuple[Any, Term, RandomState]] = []
        self._values: Tensor | None = None  # of all terms, in the first pass
        self._elsewhere: Any = None  # another φ, where values at this one are 0 whatever the data
        self._values_elsewhere: Tensor | None = None
        self.count = 0
        self.first: Any = None

    def together(self, add_up: Callable[[], Share]) -> tuple[Tensors, list[list[int]]]:
        """The sums over all processes, if there are several, and the numbers of each."""
        if self._data.processes is not None:
            return self._data.processes.total(add_up)
        share = add_up()
        return share.sums, [list(share.numbers)]

    def each(self, use: Callable[[Term], None]) -> int:
        """Call `use` with each batch's term, and then with the regularizer's.

        Of several processes only the first is to add the regularizer. The others look at it too,
        for they need to know what it depends on.

        Raises:
            GraphError: the loader gave another sum than the first time.
        """
        again, values, others, count = self._values is not None, list[Tensor](), list[Tensor](), 0
        with self._as_at_first(again):
            for count, batch in enumerate(self._data.batches, 1):
                if again and count > self.count:
                    break
                if count == 1 and not again:
                    self.first = batch
                values.append(self._with_batch(count - 1, batch, use))
                if self._elsewhere is not None:
                    others.append(self._value_elsewhere(count - 1, batch))
            if count and self._data.regularizer is not None:
                own = self._data.processes is None or self._data.processes.rank == 0
                term = Term(lambda: self._data.regularized(self._phi), own)
                values.append(self._with(term, use))
        if not count:
            raise InvalidArgumentError(
                f"{self._data.where}: batches gave no batch{' this time' * again}: is it an "
                "iterator that has been read to its end?"
            )
        self._compare(values, count)
        if others:
            self._compare_elsewhere(others)
        elif not again and not any(map(bool, values)):
            tensors, tree = pytree.flatten(self._phi)
            moved = [t.detach() + scattered(t) * (t.detach().abs().amax() or 1.0) for t in tensors]
            self._elsewhere = tree.rebuild(variables(tuple(moved)), owned=True)
        return count

    def _value_elsewhere(self, i: int, batch: Any) -> Tensor:
        """A batch's value at another φ; nothing is drawn from random generators."""
        with isolated(self._ambient), own_precision(self._ambient.devices):
            return self._data.evaluated(batch, f"batch {i}", self._elsewhere)[0].detach()

    def _compare_elsewhere(self, values: list[Tensor]) -> None:
        """Raise if they add up to another sum than the last ones."""
        found = torch.stack([v.to(values[0].device, torch.float64) for v in values])
        if self._values_elsewhere is None:
            self._values_elsewhere = found
            return
        eps = max(torch.finfo(v.dtype).eps for v in values)
        self._check_sums(self._values_elsewhere, found, eps)

    def _with_batch(self, i: int, batch: Any, use: Callable[[Term], None]) -> Tensor:
        if i < len(self._kept):
            held, term, after = self._kept[i]
            if not _same(batch, held):
                raise GraphError(_ORDER.format(self._data.where, self._data.keep, i))
            after.restore()  # to where its evaluation took the generators
        else:
            term = Term(lambda: self._data.evaluated(batch, f"batch {i}", self._phi))
            if i < self._data.keep and torch.is_grad_enabled():
                self._kept.append((batch, term, RandomState(self._ambient.devices)))
        return self._with(term, use)

    def _with(self, term: Term, use: Callable[[Term], None]) -> Tensor:
        with own_precision(self._ambient.devices):
            use(term)
        return term.value.detach()

    @contextlib.contextmanager
    def _as_at_first(self, again: bool) -> Iterator[None]:
        """Random generators as they were, and what the user owns left as it is."""
        before = [(g, g.get_state()) for g, _ in self._generators]
        for generator, state in self._generators:
            generator.set_state(state)
        try:
            with isolated(self._ambient) if again else contextlib.nullcontext():
                yield
        finally:
            for generator, state in before:
                generator.set_state(state)

    def _compare(self, values: list[Tensor], count: int) -> None:
        """Raise if the terms do not add up to what they did in the first pass."""
        found = torch.stack([v.to(values[0].device, torch.float64) for v in values])
        if self._values is None:
            self._values, self.count = found, count
            return
        if count != self.count:
            now = count if count < self.count else "more"
            raise GraphError(_COUNT.format(self._data.where, self.count, now))
        eps = max(torch.finfo(v.dtype).eps for v in values)
        for part in (slice(count), slice(count, None)):  # a regularizer may be far larger
            self._check_sums(self._values[part], found[part], eps)

    def _check_sums(self, first: Tensor, again: Tensor, eps: float) -> None:
        """Raise where two sums differ; never where one is NaN."""
        sums = torch.stack([first.sum(), again.sum(), first.abs().sum()]).tolist()
        if abs(sums[1] - sums[0]) > eps**_ROUNDING * sums[2]:
            raise GraphError(_TWICE.format(self._data.where, sums[1], sums[0]))


def _scalar(name: str, value: object) -> Tensor:
    """One number; in float16 the sum may overflow where no term does."""
    found = scalar(name, value).reshape(())
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _generators(loader: Any) -> list[torch.Generator]:
    """The distinct generators of its own that a DataLoader draws its order from."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _same(batch: Any, held: Any) -> bool:
    """Whether a batch holds the same tensors."""
    if batch is held:
        return True
    here, there = pytree.leaves(batch), pytree.leaves(held)
    return len(here) == len(there) and all(map(_equal, here, there))


def _equal(here: Any, there: Any) -> bool:
    if not (torch.is_tensor(here) and torch.is_tensor(there)):
        return torch.is_tensor(here) == torch.is_tensor(there)
    if here.shape != there.shape or here.dtype != there.dtype:
        return False
    return bool(((here == there) | ((here != here) & (there != there))).all())  # NaN may be data


def _form(batch: Any) -> str:
    """A batch in a few words, for error messages."""
    if isinstance(batch, (tuple, list)):
        return f"{describe(batch)} of {', '.join(map(describe, batch)) or 'nothing'}"
    if isinstance(batch, Mapping):
        return f"{describe(batch)} with the keys {', '.join(map(repr, batch))}"
    return describe(batch)
