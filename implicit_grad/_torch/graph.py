"""Walks through a recorded graph: which leaves and which operations are behind a value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from implicit_grad._torch.pytree import Tensors

# What torch's decorator makes of a backward method is recognised by the code that it shares, and
# what torch.compile makes of a function by where its class comes from.
_COMPILED = "torch._functorch._aot_autograd"
# F.linear_cross_entropy in chunks: its backward hands on gradients that forward has computed.
_CHUNKED = "GeneratedBackwardFor_torch_nn__linear_cross_entropy"
# As benchmarks/census.py found. Layer norm has a graph of our own, but not in a gradient that is
# the user's.
_WRONG_THIRD = {
    "LogcumsumexpBackward0",
    "PdistBackward0",
    "NativeLayerNormBackwardBackward0",
    "NativeBatchNormBackwardBackward0",  # in torch 2.4; missing in later ones
}
_LEAF = "torch::autograd::AccumulateGrad"
_CAST = "ToCopyBackward0"
_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def walk(roots: Iterable[Any], stop: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """The nodes of the graph behind the roots (tensors, or nodes themselves); not past `stop`."""
    pending = list(dict.fromkeys(getattr(r, "grad_fn", r) for r in roots))
    pending = [node for node in pending if node is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        if stop(node):
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


Graph = dict[Any, list[Any]]  # nodes, each with those whose results it uses, or None for constants


def graph_behind(roots: Iterable[Tensor]) -> Graph:
    """All the nodes of the graph behind the roots."""
    graph: Graph = {None: []}
    pending: list[Any] = [r.grad_fn for r in roots]
    while pending:
        if (node := pending.pop()) not in graph:
            graph[node] = used = [parent for parent, _ in node.next_functions]
            pending += used
    del graph[None]
    return graph


def leaves_behind(
    roots: Sequence[Tensor], stop: Callable[[Any], bool] = lambda _: False
) -> Tensors:
    """The distinct leaf tensors requiring grad that the roots depend on."""
    return leaves_among(roots, walk(roots, stop))


def leaves_among(roots: Sequence[Tensor], nodes: Iterable[Any]) -> Tensors:
    """Those of the roots themselves, and of nodes behind them."""
    found = {id(t): t for t in roots if t.requires_grad and t.grad_fn is None}
    for node in nodes:
        leaf = getattr(node, "variable", None)  # AccumulateGrad nodes have one
        if leaf is not None:
            found[id(leaf)] = leaf
    return tuple(found.values())


def between(values: Sequence[Tensor], phi: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph through which the values depend on φ."""
    ids, own = {id(p) for p in phi}, {p.grad_fn for p in phi} - {None}

    def is_phi(node: Any) -> bool:
        return node in own or id(getattr(node, "variable", None)) in ids

    users: dict[Any, list[Any]] = {}  # the nodes that use a node's result
    pending = []
    for node in walk(values, is_phi):
        if is_phi(node):
            pending.append(node)
            continue
        for parent, _ in node.next_functions:
            users.setdefault(parent, []).append(node)
    seen = set(pending)
    while pending:
        for node in users.get(pending.pop(), ()):
            if node not in seen:
                seen.add(node)
                pending.append(node)
                yield node


def coarsest(
    values: Sequence[Tensor], phi: Sequence[Tensor], nodes: Iterable[Any] | None = None
) -> float:
    """The relative precision of the coarsest numbers by which the values depend on φ.

    Autocast, or a cast, has some of them in half precision though neither end is. (Nodes of older
    torches do not tell: there it is that of the ends.) `nodes` are those behind the values, if
    somebody has walked there before.
    """
    dtypes = {t.dtype for t in (*values, *phi)}
    if _CAST in {type(node).__name__ for node in (walk(values) if nodes is None else nodes)}:
        for node in between(values, phi):
            dtypes |= {made.dtype for made in getattr(node, "_input_metadata", ())}
    numbers = (dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex)
    return max((torch.finfo(dtype).eps for dtype in numbers), default=0.0)


def coarsest_each(values: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[float]:
    """The same for each of the inputs: the precision of the values' gradient by it."""
    casts = [node for node in walk(values) if type(node).__name__ == _CAST]
    return [coarsest(values, [x], casts) for x in inputs]


def kind_of_graph(values: Sequence[Tensor]) -> frozenset[str]:
    """Which operations are behind the values."""
    return frozenset(node.name() for node in walk(values))


def edges_of_graph(graph: Graph, phi: Sequence[Tensor]) -> frozenset[Hashable]:
    """Which operations use results of which others, or which tensors of φ, and which do not.

    A place where a result was detached shows; how often the same is done, as in a loop, does not.
    """
    place = {id(p): i for i, p in enumerate(phi)}
    names: dict[Any, Hashable] = {}
    for node in graph:
        name = node.name()
        names[node] = place.get(id(node.variable), name) if name == _LEAF else name
    uses = ((name, map(names.get, graph[node])) for node, name in names.items())
    return frozenset([(name, *dict.fromkeys(used)) for name, used in uses])


def name_of(node: Any) -> str:
    """The operation's: a custom Function's own name, or torch's without "Backward"."""
    function = _below_vmap(getattr(node, "_forward_cls", None))
    return str(node.name().partition("Backward")[0] if function is None else function.__name__)


def custom_functions(values: Sequence[Tensor], phi: Sequence[Tensor]) -> tuple[str, ...]:
    """The names of custom Functions through which the values depend on φ."""
    functions = {_below_vmap(getattr(n, "_forward_cls", None)) for n in between(values, phi)}
    return tuple(sorted(f.__name__ for f in functions if f is not None))


def wrong_third(values: Sequence[Tensor], phi: Sequence[Tensor]) -> tuple[str, ...]:
    """The operations through which values depend on φ whose third derivatives torch gets wrong."""
    return tuple(sorted({node.name() for node in between(values, phi)} & _WRONG_THIRD))


def once_differentiable(values: Sequence[Tensor], phi: Sequence[Tensor]) -> bool:
    """Whether a custom Function between φ and the values is marked as differentiable once."""
    return any(map(is_once_differentiable, between(values, phi)))


def is_once_differentiable(node: Any) -> bool:
    """Whether the node is of a custom Function that is marked as differentiable once.

    Compiled functions count as marked, and so does torch's chunked cross-entropy: torch may take
    them, without a word, for functions without curvature.
    """
    function = getattr(node, "_forward_cls", None)
    if function is None:
        return False
    function = _below_vmap(function)
    code = getattr(getattr(function, "backward", None), "__code__", None)
    if code is _ONCE or getattr(function, "__name__", "").startswith(_CHUNKED):
        return True
    return getattr(function, "__module__", "").startswith(_COMPILED)


def _below_vmap(function: Any) -> Any:
    """The custom Function that torch.func.vmap made this one of."""
    while getattr(function, "__name__", "").startswith("Vmapped"):
        forward = function.forward
        cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        inner = next((c.cell_contents for name, c in cells if name == "autograd_function"), None)
        if inner is None:
            break
        function = inner
    return function


def unseen_by_saved_tensors_hooks() -> AbstractContextManager[object]:
    """What is saved for backward inside is not counted by a checkpoint that goes on around.

    Without hooks around there are none inside: tensors would be freed later.
    """
    if saved_tensors_are_seen():
        return saved_tensors_hooks(_as_it_is, _as_it_is)
    return contextlib.nullcontext()


def saved_tensors_are_seen() -> bool:
    """Whether there are hooks, a checkpoint's say, on what is saved for backward here."""
    try:
        with disable_saved_tensors_hooks("there are none"):  # else it raises this
            return False
    except RuntimeError:
        return True


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
