"""Deep copies of modules that keep solvers: their functions compute with the copies."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import pickle
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import swa_utils

import implicit_grad as ig

RIDGE = 0.5
X = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@dataclasses.dataclass
class Record:
    part: nn.Module

    def read(self) -> Tensor:
        return self.part.weight


@dataclasses.dataclass(frozen=True)
class Frozen:
    part: nn.Module


class Part(nn.Module):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def read(self) -> Tensor:
        return self.weight

    def closed(self, x: Tensor) -> Tensor:
        return (x * self.weight).detach() / (1 + RIDGE)


def squares(phi: Tensor, x: Tensor) -> Tensor:
    return (phi - x).square().sum() / 2 + RIDGE * phi.square().sum() / 2


def weight_of(part: nn.Module) -> Tensor:
    return part.weight


def nested(part: nn.Module) -> Callable[[], Tensor]:
    def outer():
        def inner():
            return part.weight

        return inner

    made = outer()
    return lambda: made()


def recursive(part: nn.Module) -> Callable[[], Tensor]:
    def read(depth=2):
        return read(depth - 1) if depth else part.weight

    return read


def holding_itself(part: nn.Module) -> Callable[[], Tensor]:
    made = [part]
    made.append(made)
    return lambda: made[1][0].weight


def by_a_solver(part: nn.Module) -> Callable[[], Tensor]:
    """Another solver, which no module keeps."""
    solve = solver_of([lambda: part.weight])
    return lambda: (1 + RIDGE) * solve(torch.ones(1, dtype=torch.float64))[0]


def called(made: object, read: Callable[[object], nn.Module]) -> Callable[[], Tensor]:
    return lambda: read(made).weight


class Settings(dict):
    """Whose `get` is not dict's, which it has, too."""

    def get(self, key: str) -> None:
        return None

    @property
    def stored(self) -> Callable[[str], object]:
        return super().get


def in_set(made: object) -> nn.Module:
    (part,) = (thing for thing in made if thing)
    return part


def looked_up(part: nn.Module) -> Callable[[], Tensor]:
    """What stands beside a key, found by the part that is in it."""
    of_part, rates = {(part, 0): [part]}, {part: 1.0}
    return lambda: of_part[part, 0][0].weight * rates[part]


# how a function gets the weight of a part
FORMS: dict[str, Callable[[nn.Module], Callable[[], Tensor]]] = {
    "cell": lambda part: lambda: part.weight,
    "default": lambda part: lambda p=part: p.weight,
    "default by name": lambda part: lambda *, p=part: p.weight,
    "tensor": lambda part: functools.partial(torch.clone, part.weight),
    "partial": lambda part: functools.partial(weight_of, part),
    "partial by name": lambda part: functools.partial(weight_of, part=part),
    "method": lambda part: part.read,
    "method of a record": lambda part: Record(part).read,
    "nested": nested,
    "recursive": recursive,
    "list": lambda part: called([part], lambda made: made[0]),
    "tuple": lambda part: called((0, part), lambda made: made[1]),
    "dict": lambda part: called({"p": [part]}, lambda made: made["p"][0]),
    "deque": lambda part: called(collections.deque([part]), lambda made: made[0]),
    "set": lambda part: called({part, 0}, in_set),
    "frozen set": lambda part: called(frozenset({0, part}), in_set),
    "key": lambda part: called({"lr": {part: 2.0}}, lambda made: next(iter(made["lr"]))),
    "tensor as key": lambda part: (
        lambda state={part.weight: {"step": 1}}: next(iter(state)).clone()
    ),
    "looked up": looked_up,
    "method in C": lambda part: part.weight.clone,
    "operator": lambda part: functools.partial(part.weight.__add__, 0.0),
    "method in C of a container": lambda part: called([part].__getitem__, lambda made: made(0)),
    "hidden method in C": lambda part: called(Settings(p=part).stored, lambda made: made("p")),
    "record": lambda part: called(Record(part), lambda made: made.part),
    "frozen": lambda part: called(Frozen(part), lambda made: made.part),
    "namespace": lambda part: called(types.SimpleNamespace(p=part), lambda made: made.p),
    "itself": holding_itself,
    "solver": by_a_solver,
    "weak reference": lambda part: called(weakref.ref(part), lambda made: made()),
    "proxy": lambda part: called(weakref.proxy(part), lambda made: made),
}


def solver_of(reads: list[Callable[[], Tensor]]):
    """x ↦ what minimises |φ − x·Σweights|²/2 + r|φ|²/2, in closed form."""

    def target(x: Tensor) -> Tensor:
        return x * sum(read() for read in reads)

    def value(phi: Tensor, x: Tensor) -> Tensor:
        return (phi - target(x)).square().sum() / 2 + RIDGE * phi.square().sum() / 2

    def solve(x: Tensor) -> Tensor:
        return target(x).detach() / (1 + RIDGE)

    return ig.implicit(solve, ig.argmin(value), on_failure="raise")


def outcome(solve, weights: list[Tensor]) -> list[Tensor]:
    """What a solver returns, and its gradients for some weights."""
    phi = solve(X)
    grads = torch.autograd.grad(phi.square().sum(), weights, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64)
    return [phi.detach(), *(zero if g is None else g for g in grads)]


def expected(total: float, weights: int) -> list[Tensor]:
    """φ = x·total/(1+r), and the derivative of its squares for each weight of the total."""
    phi = X * total / (1 + RIDGE)
    return [phi, *[(2 * phi * X / (1 + RIDGE)).sum()] * weights]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(-3).add_(0.7)


def pair(form: str, later: bool) -> nn.Module:
    """A module with a solver that refers to another, which stands after it or before."""
    root, b = nn.Module(), Part(2.0)
    if not later:
        root.b = b
    root.a = Part()
    root.b = b
    root.a.solve = solver_of([FORMS[form](b)])
    return root


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda m: swa_utils.AveragedModel(m).module,
    "twice": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "copy of the solver": lambda m: _with(copy.deepcopy(m), copy.copy),
}


def _with(root: nn.Module, how: Callable) -> nn.Module:
    root.a.solve = how(root.a.solve)
    return root


@pytest.mark.parametrize(("how", "later"), [("deepcopy", False), *((how, True) for how in COPIES)])
@pytest.mark.parametrize("form", FORMS)
def test_a_copied_solver_computes_with_the_copy(form, how, later):
    root = pair(form, later)
    twin = COPIES[how](root)
    scramble(root)  # before the first use
    close(outcome(twin.a.solve, [twin.b.weight]), expected(2.0, 1))
    scramble(root)
    close(outcome(twin.a.solve, [twin.b.weight]), expected(2.0, 1))
    close(outcome(root.a.solve, [root.b.weight]), expected(root.b.weight.item(), 1))
    scramble(twin)
    close(outcome(root.a.solve, [root.b.weight]), expected(root.b.weight.item(), 1))


@pytest.mark.parametrize("form", FORMS)
def test_a_learner_of_an_unused_copy_computes_with_it(form):
    root = pair(form, later=True)
    twin = copy.deepcopy(root)
    learner = ig.imaml(twin, lr=0.1).clone()
    scramble(root)
    close(outcome(learner.module.a.solve, [twin.b.weight]), expected(2.0, 1))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_copied_stays_shared(form):
    root = pair(form, later=True)
    for one in (root.a, root.a.solve):  # without b
        solve = getattr(copy.deepcopy(one), "solve", None) or copy.deepcopy(one)
        close(outcome(solve, [root.b.weight]), expected(root.b.weight.item(), 1))
        scramble(root)
        close(outcome(solve, [root.b.weight]), expected(root.b.weight.item(), 1))


def referred_to(function: Callable, name: str) -> object:
    return inspect.getclosurevars(function).nonlocals[name]


class Loss:
    """An object that is not looked into."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, phi: Tensor, x: Tensor) -> Tensor:
        return squares(phi, x * self.part.weight)


class Minimizer:
    def __init__(self, read: Callable[[], Tensor]) -> None:
        self.read = read

    def minimize(self, objective, init):
        return (init * self.read()).detach() / (1 + RIDGE)


@pytest.mark.parametrize("later", [True, False])
def test_an_object_that_refers_to_the_original_is_told_of(later):
    def referring(solve):
        root = pair("cell", later)
        root.a.solve = solve(root.b)
        return root

    def of_loss(b):
        loss = Loss(b)
        return ig.implicit(b.closed, ig.argmin(lambda phi, x: loss(phi, x)))

    def of_minimizer(b):
        return ig.implicit(Minimizer(lambda: b.weight), ig.argmin(lambda phi, x: Loss(b)(phi, x)))

    for solve, name in (
        (of_loss, r"Loss.* as part\.weight"),
        (of_minimizer, r"Minimizer.* as read"),
    ):
        root = referring(solve)
        with pytest.warns(ig.ImplicitGradWarning, match=name) as told:
            copy.deepcopy(root).a.solve(X)
        assert [w.filename for w in told] == [__file__]

    root = referring(of_loss)  # what is copied too is no reason
    root.kept = referred_to(root.a.solve.setup.condition.objective, "loss")
    twin = copy.deepcopy(root)
    scramble(root)
    close(outcome(twin.a.solve, [twin.b.weight]), expected(2.0, 1))
    root = referring(lambda b: ig.implicit(b.closed, ig.argmin(Loss(b))))
    twin = copy.deepcopy(root)
    scramble(root)
    close(outcome(twin.a.solve, [twin.b.weight]), expected(2.0, 1))
    elsewhere = Loss(Part(2.0))  # and what is not copied at all
    root = referring(lambda b: solver_of([lambda: elsewhere.part.weight]))
    close(outcome(copy.deepcopy(root).a.solve, [elsewhere.part.weight]), expected(2.0, 1))


def by_a_generator(part: nn.Module) -> Callable[[], Tensor]:
    def parts():
        while True:
            yield part

    made = parts()
    return lambda: next(made).weight


def started(part: nn.Module) -> Callable[[], Tensor]:
    read = by_a_generator(part)
    read()
    return read


def by_an_object(part: nn.Module) -> Callable[[], Tensor]:
    holder = Loss(part)
    return lambda: holder.part.weight


def by_a_weak_method(part: nn.Module) -> Callable[[], Tensor]:
    made = weakref.WeakMethod(part.read)
    return lambda: made()()


# through what a function gets the weight of a part where it does not follow to a copy
TOLD: dict[str, Callable[[nn.Module], Callable[[], Tensor]]] = {
    "object": by_an_object,
    "cycle": lambda part: called(itertools.cycle([part]), next),
    "its method": lambda part: called(itertools.cycle([part]).__next__, lambda made: made()),
    "generator": by_a_generator,
    "started generator": started,
    "view": lambda part: called({0: part}.values(), lambda made: next(iter(made))),
    "view of keys": lambda part: called({part: 0}.items(), lambda made: next(iter(made))[0]),
    "in a tuple": lambda part: called(({part: 0}.keys(),), lambda made: next(iter(made[0]))),
    "proxy of a dict": lambda part: called(types.MappingProxyType({0: part}), lambda m: m[0]),
    "object with keys": lambda part: called(Loss({part: 0}), lambda made: next(iter(made.part))),
    "weak keys": lambda part: called(weakref.WeakKeyDictionary({part: 0}), lambda m: next(iter(m))),
    "weak method": by_a_weak_method,
}


@pytest.mark.parametrize("form", TOLD)
def test_what_does_not_follow_is_told(form):
    def pair_of(form):
        root, b = nn.Module(), Part(2.0)
        root.a, root.b = Part(), b
        root.a.solve = solver_of([TOLD[form](b)])
        return root

    root = pair_of(form)
    twin = copy.deepcopy(root)
    with pytest.warns(ig.ImplicitGradWarning, match="may compute with the original") as told:
        twin.a.solve(X)
    assert len(told) == 1 and told[0].filename == __file__
    solve = copy.deepcopy(root.a).solve  # of which b is no part
    close(outcome(solve, [root.b.weight]), expected(2.0, 1))


# what a function refers to that is part of a tensor of a module, and has no graph
PARTS: dict[str, Callable[[Tensor], object]] = {
    "detached": lambda weights: weights.detach(),
    "data": lambda weights: weights.data,
    "column": lambda weights: weights.detach()[:, 1],
    "in a list": lambda weights: [weights.detach()[1]],
    "turned": lambda weights: weights.detach().T,
}


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("form", PARTS)
def test_parts_of_what_was_copied_are_parts_of_the_copy(form, buffer):
    part = Part(2.0)
    weights = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    part.weights = weights[:, 1:] if buffer else nn.Parameter(weights)
    made = PARTS[form](part.weights)

    def read() -> Tensor:
        return part.weight * (made[0] if isinstance(made, list) else made).sum()

    part.solve = solver_of([read])
    twin, after = copy.deepcopy(part), copy.deepcopy(part)
    with torch.no_grad():
        twin.weights.mul_(2.0)
        part.weights.zero_()
    held = PARTS[form](after.weights)
    total = (held[0] if isinstance(held, list) else held).sum()
    for one, times in ((twin, 2), (after, 1)):
        close(one.solve(X), times * 2.0 * total * X / (1 + RIDGE))


# and what has one, or is not looked into
MADE: dict[str, Callable[[Tensor], object]] = {
    "view": lambda weight: weight.view(1)[0],
    "product": lambda weight: weight * 1.0,
    "leaf": lambda weight: weight.detach().requires_grad_(),
    "in an object": lambda weight: Loss(weight.detach()),
    "in bits": lambda weight: weight.detach().view(torch.int64),
}


@pytest.mark.parametrize("form", MADE)
def test_tensors_made_of_what_was_copied_are_told(form):
    part = Part(2.0)
    made = MADE[form](part.weight)
    part.solve = solver_of([lambda: made.part if isinstance(made, Loss) else made])
    twin = copy.deepcopy(part)
    with pytest.warns(ig.ImplicitGradWarning, match="made of a tensor that was copied") as told:
        twin.solve(X)
    assert [w.filename for w in told] == [__file__]


def test_tensors_of_their_own_are_no_reason_to_tell():
    part, one, other = Part(2.0), torch.ones((), requires_grad=True), nn.Parameter(torch.zeros(0))
    product = one * 2
    part.solve = solver_of([lambda: part.weight, lambda: one + other.sum(), lambda: product])
    copy.deepcopy(part).solve(X)


class Keeping(Part):
    """A model with a solver that is its own method, under the condition of another."""

    def __init__(self) -> None:
        super().__init__(2.0)
        self.solve = ig.implicit(self.closed, ig.argmin(lambda phi, x: self.value(phi, x)))

    def value(self, phi: Tensor, x: Tensor) -> Tensor:
        return (phi - x * self.weight).square().sum() / 2 + RIDGE * phi.square().sum() / 2


def test_the_copy_of_a_solver_alone_is_one_graph():
    model = Keeping()
    solve = copy.deepcopy(model.solve)
    twin = solve.solver.__self__
    assert twin is not model and twin.solve is solve
    scramble(model)
    close(outcome(solve, [twin.weight]), expected(2.0, 1))


def test_one_solver_in_two_places_is_one_in_the_copy():
    root, b = nn.Module(), Part(2.0)
    root.a, root.c, root.b = Part(), Part(), b
    root.a.solve = root.c.solve = solver_of([lambda: b.weight])
    twin = copy.deepcopy(root)
    assert twin.a.solve is twin.c.solve is not root.a.solve


def test_solvers_that_refer_to_each_other():
    """By a list that their module keeps, too: it is that of the copy."""
    root, both, one = nn.Module(), [], torch.ones(1, dtype=torch.float64)
    root.a, root.c, root.b = Part(), Part(), Part(2.0)
    b = root.b
    root.a.solve = solver_of([lambda: (1 + RIDGE) * both[1](one)[0]])
    root.c.solve = solver_of([lambda: b.weight * len(both) / 2])
    both += [root.a.solve, root.c.solve]
    root.kept = both
    twin = copy.deepcopy(root)
    scramble(root)
    close(outcome(twin.a.solve, [twin.b.weight]), expected(2.0, 1))
    close(outcome(twin.c.solve, [twin.b.weight]), expected(2.0, 1))
    assert twin.kept[0] is twin.a.solve and twin.kept[1] is twin.c.solve
    twin.kept[1] = lambda x: 0 * x
    assert not twin.a.solve(X).any()
    close(outcome(root.a.solve, [root.b.weight]), expected(root.b.weight.item(), 1))


def test_what_two_solvers_refer_to_is_one_in_the_copy():
    root, record = nn.Module(), types.SimpleNamespace()
    root.a, root.c, root.b = Part(), Part(), Part(2.0)
    record.part = root.b
    root.a.solve, root.c.solve = (
        ig.implicit(lambda x: record.part(x), ig.argmin(squares)) for _ in range(2)
    )
    twin = copy.deepcopy(root)
    found = [referred_to(part.solve.solver, "record") for part in (twin.a, twin.c)]
    assert found[0] is found[1] is not record and found[0].part is twin.b


def test_an_unused_copy_goes_through_all_that_looks_into_it():
    """Whatever asks a copied solver for something first gets what is of the copy."""
    for ask in (
        repr,
        inspect.signature,
        lambda s: s.solver,
        lambda s: s.setup,
        lambda s: s.__wrapped__,
        lambda s: s.__reduce_ex__(4),
        lambda s: s.without_trace(),
    ):
        root = pair("cell", later=True)
        twin = copy.deepcopy(root)
        ask(twin.a.solve)
        scramble(root)
        close(outcome(twin.a.solve, [twin.b.weight]), expected(2.0, 1))
    twin = copy.deepcopy(pair("cell", later=True))
    assert twin.a.solve.__name__ == "solve" and not hasattr(twin.a.solve, "minimize")


def test_a_copy_is_pickled_with_what_it_refers_to():
    root = nn.Module()
    root.a, root.b = Part(), Part(2.0)
    root.a.solve = ig.implicit(root.b.closed, ig.argmin(squares))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(root)))
    assert twin.a.solve.solver.__self__ is twin.b
    scramble(root)
    torch.testing.assert_close(twin.a.solve(X), expected(2.0, 0)[0])


def test_a_solver_around_a_copied_one_knows_what_it_captured():
    twin = copy.deepcopy(pair("cell", later=True))
    inner = twin.a.solve
    outer = ig.implicit(lambda x: inner(x).detach(), ig.root(lambda phi, x: phi - inner(x)))
    close(outcome(outer, [twin.b.weight]), expected(2.0, 1))


@pytest.mark.parametrize("form", ["cell", "method"])
def test_a_used_copy_keeps_nothing_of_the_original(form):
    root = pair(form, later=True)
    twin, gone = copy.deepcopy(root), weakref.ref(root.b.weight)
    twin.a.solve(X)
    del root
    gc.collect()
    assert gone() is None


def test_a_copy_of_functions_that_refer_to_their_own_module_keeps_nothing():
    model = Keeping()
    twin, gone = copy.deepcopy(model), weakref.ref(model.weight)
    del model
    gc.collect()
    assert gone() is None and twin.weight is not None


def test_threads_that_use_a_copy_first_find_the_same():
    for _ in range(20):
        root = pair("list", later=True)
        twin = copy.deepcopy(root)
        scramble(root)
        start, found = threading.Barrier(4), []

        def use(twin=twin, start=start, found=found):
            start.wait()
            found.append(outcome(twin.a.solve, [twin.b.weight]))

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for one in found:
            close(one, expected(2.0, 1))


# ---------------------------------------------------------------- random trees


@st.composite
def trees(draw, kept: bool = True) -> list[Part]:
    """A tree of modules, some of which keep solvers that refer to any of them.

    The first one keeps the names of the forms in which they do.
    """
    forms = FORMS | TOLD if draw(st.booleans()) else FORMS
    parts = [Part(draw(st.floats(0.5, 2.0)))]
    parts[0].forms = set()
    for _ in range(draw(st.integers(1, 6))):
        part = Part(draw(st.floats(0.5, 2.0)))
        draw(st.sampled_from(parts)).add_module(f"part{len(parts)}", part)
        parts.append(part)
    solvers = []
    for part in draw(st.lists(st.sampled_from(parts), min_size=1, unique=True)):
        if solvers and draw(st.booleans()):
            part.solve = draw(st.sampled_from(solvers))
            continue
        reads = []
        for one in draw(st.lists(st.sampled_from(parts), min_size=1, max_size=3)):
            form = draw(st.sampled_from(sorted(forms)))
            parts[0].forms.add(form)
            reads.append(forms[form](one))
        if kept and draw(st.booleans()):  # kept by a module, too
            draw(st.sampled_from(parts)).kept = reads
        solvers.append(solver_of(reads))
        part.solve = solvers[-1]
    return parts


def outcomes(root: nn.Module, weights: list[Tensor] | None = None) -> list[Tensor]:
    weights = list(root.parameters()) if weights is None else weights
    solvers = [part.solve for part in root.modules() if hasattr(part, "solve")]
    return [found for solve in solvers for found in outcome(solve, weights)]


T = TypeVar("T")


def telling(work: Callable[[], T]) -> tuple[T, bool]:
    """What comes of it, and whether something was told on the way."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ig.ImplicitGradWarning)
        return work(), bool(told)


@settings(max_examples=30)
@given(parts=trees(), times=st.integers(1, 3), used=st.booleans())
def test_copies_of_any_tree_are_independent_or_told(parts, times, used):
    root = parts[0]

    def copied() -> nn.Module:
        twin = root
        for _ in range(times):
            twin = copy.deepcopy(twin)
            if used:
                outcomes(twin)
        return twin

    before = outcomes(root)
    twin, told = telling(copied)
    scramble(root)
    found, later = telling(lambda: outcomes(twin))
    assert (told or later) == bool(root.forms & set(TOLD))
    if told or later:
        return
    close(found, before)
    now = outcomes(root)
    scramble(twin)
    close(outcomes(root), now)


@settings(max_examples=30)
@given(parts=trees(kept=False), data=st.data())
def test_the_copy_of_a_branch_shares_what_stands_outside(parts, data):
    branch = data.draw(st.sampled_from(parts))
    copied = copy.deepcopy(branch)
    outside = [part.weight for part in parts if part not in set(branch.modules())]
    weights, others = [*branch.parameters(), *outside], [*copied.parameters(), *outside]
    found, told = telling(lambda: outcomes(copied, others))
    if told:
        assert parts[0].forms & set(TOLD)
    else:
        close(found, outcomes(branch, weights))
