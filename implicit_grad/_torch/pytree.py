"""Nested containers <-> flat tuples of tensors, and these <-> one flat vector; their norms.

Containers are those of Python, what is registered in optree or in torch.utils._pytree, dataclasses,
namespaces, and modules: their tensors are the parameters that train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as trees_of_torch

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._torch import module_form
from implicit_grad._torch.clone import replace_kept
from implicit_grad._torch.held import fields_of, is_record
from implicit_grad._torch.module_form import Argument, Form, can_be_opened, own, trained

Tensors = tuple[Tensor, ...]
NAMESPACE = "implicit_grad"
_WHOLE = "implicit_grad: modules are leaves"
# Types of leaves that have been seen: there is nothing to look into, or nobody does in modules.
_opaque: set[type] = {Tensor, nn.Parameter, int, float, bool, str}
_whole: set[type] = set(_opaque)
_containers: set[type] = set()  # those that optree looks into since it has learned them here
_learning = threading.Lock()


def _learn(leaves: list[Any]) -> None:
    """Have optree look into objects of these types from now on, where that can be done."""
    with _learning:
        for kind in set(map(type, leaves)) - _opaque - _containers:
            if kind in trees_of_torch.SUPPORTED_NODES:
                _register_as_torch(kind)
            elif is_record(kind):
                _register_record(kind)
            elif can_be_opened(kind):
                _register_module(kind)
            else:
                _opaque.add(kind)
                _whole.add(kind)


def _register(kind: Any, parts: Any, rebuilt: Any, **entry: Any) -> None:
    """Have optree look into a class, but in modules only where they are not leaves."""
    optree.register_pytree_node(kind, parts, rebuilt, namespace=NAMESPACE, **entry)
    if issubclass(kind, nn.Module):
        _whole.add(kind)
    else:
        optree.register_pytree_node(kind, parts, rebuilt, namespace=_WHOLE, **entry)
    _containers.add(kind)


def _register_as_torch(kind: type) -> None:
    node = trees_of_torch.SUPPORTED_NODES[kind]

    def rebuilt(context: Any, parts: Iterable[Any]) -> Any:
        return node.unflatten_fn(list(parts), context)

    _register(kind, node.flatten_fn, rebuilt)


def _register_record(kind: type) -> None:
    """By its fields, and what else its objects hold; rebuilt without a call of `__init__`."""

    def parts(record: Any) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
        names = fields_of(record)
        return [getattr(record, name) for name in names], names, names

    new: Any = object.__new__ if dataclasses.is_dataclass(kind) else kind.__new__

    def rebuilt(names: Any, parts: Iterable[Any]) -> Any:
        record = new(kind)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(record, name, part)  # of a frozen one as well
        return record

    _register(kind, parts, rebuilt, path_entry_type=optree.GetAttrEntry)


def _register_module(kind: type) -> None:
    """By its parameters that train; rebuilt as a copy with others in their places."""

    def parts(module: Any) -> tuple[list[Tensor], Form, tuple[str, ...]]:
        weights = trained(module)
        form = Form(module, weights)
        return list(weights.values()), form, form.names

    _register(kind, parts, Form.filled, path_entry_type=optree.GetAttrEntry)


def _of_argument(argument: Any) -> tuple[list[Tensor], Form, tuple[str, ...]]:
    taken = trained(argument.module) | argument.kept
    form = Form(argument.module, taken)
    return list(taken.values()), form, form.names


_register(Argument, _of_argument, Form.filled, path_entry_type=optree.GetAttrEntry)


def as_arguments(container: Any) -> tuple[Any, list[nn.Module]]:
    """The container with an `Argument` for each module that keeps tensors, and its modules."""
    leaves, structure = _with_modules_whole(container)
    found = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
    kept = {id(m): k for m in found if can_be_opened(type(m)) and (k := module_form.kept(m))}
    if not kept:
        return container, found
    leaves = [Argument(x, kept[id(x)]) if id(x) in kept else x for x in leaves]
    return optree.tree_unflatten(structure, leaves), found


def modules(container: Any) -> list[nn.Module]:
    """The modules in a container, but not those that they consist of."""
    return [leaf for leaf in _with_modules_whole(container)[0] if isinstance(leaf, nn.Module)]


def _with_modules_whole(container: Any) -> tuple[list[Any], Any]:
    """Leaves and structure, with modules as leaves."""
    leaves, structure = _parted(container, _WHOLE)
    while not _whole.issuperset(map(type, leaves)):
        _learn(leaves)
        leaves, structure = _parted(container, _WHOLE)
    return leaves, structure


def _parted(container: Any, namespace: str) -> tuple[list[Any], Any]:
    """Leaves and structure, as far as is known by now what is a container."""
    try:
        return optree.tree_flatten(container, namespace=namespace)
    except RecursionError as error:
        raise InvalidArgumentError(
            f"{_too_deep(container)} cannot be taken apart: something in it holds itself, or it is "
            "nested too deeply. Pass the tensors without what refers back to them"
        ) from error


def _too_deep(container: Any) -> str:
    """Which of a call's arguments it is, if it is one's (args, kwargs); else the container."""
    if isinstance(container, tuple) and len(container) == 2 and isinstance(container[1], dict):
        for name, part in (*enumerate(container[0]), *container[1].items()):
            try:
                optree.tree_flatten(part, namespace=_WHOLE)
            except RecursionError:
                return f"argument {name}, {describe(part)},"
    return describe(container)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def unwrapped(container: Any) -> Any:
    """The container with modules in the place of what trained them in parallel."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return container  # then there are none
    leaves, structure = _with_modules_whole(container)
    if not any(module_form.unwrapped(leaf) is not leaf for leaf in leaves):
        return container
    return optree.tree_unflatten(structure, map(module_form.unwrapped, leaves))


def are_alike(one: Any, other: Any) -> bool:
    """Whether both are modules of one class with the same parameters, or containers with such."""
    first, form = _with_modules_whole(one)
    if not any(map(_is_module, first)):
        return False
    second, other_form = _with_modules_whole(other)
    return bool(form == other_form) and all(map(_leaves_are_alike, first, second))


def _leaves_are_alike(one: Any, other: Any) -> bool:
    if _is_module(one) and _is_module(other):
        return module_form.are_alike(one, other)
    return torch.is_tensor(one) and torch.is_tensor(other) and one.shape == other.shape


def opened(container: Any, values: Any) -> tuple[Any, Any]:
    """Both with a tuple of parameters in the place of each module in the container.

    There, values may be given by name, or in the parameters' order.
    """
    leaves, form = _with_modules_whole(container)
    if not any(map(_is_module, leaves)):
        return container, values
    with contextlib.suppress(ValueError):  # values for whole branches, or of another form
        pairs = zip(leaves, form.flatten_up_to(values), strict=True)
        values = optree.tree_unflatten(form, [_in_order(v, of) for of, v in pairs])
    parts = [tuple(trained(x).values()) if _is_module(x) else x for x in leaves]
    return optree.tree_unflatten(form, parts), values


def _in_order(values: Any, of: Any) -> Any:
    """Values for a module's parameters as a tuple in their order, where they are of such a form."""
    if not _is_module(of):
        return values
    names = trained(of)
    values = trained(values) if can_be_opened(type(values)) else values
    if isinstance(values, dict) and values.keys() == names.keys():
        return tuple(values[name] for name in names)
    return tuple(values) if type(values) is list else values


def _flattened(container: Any) -> tuple[list[Any], Any]:
    """optree's leaves and structure, with all objects in it looked into."""
    leaves, structure = _parted(container, NAMESPACE)
    while not _opaque.issuperset(map(type, leaves)):
        _learn(leaves)
        leaves, structure = _parted(container, NAMESPACE)
    return leaves, structure


class Tree:
    """A container without its tensors: `rebuild` puts others in their places.

    Leaves that are not variables (labels, strings, modules) stay in the tree as they are. Places
    that are `in_pairs` are given pairs of reals, and have complex numbers in the container.
    """

    def __init__(self, leaves: list[Any], slots: list[int | None], structure: Any) -> None:
        self._leaves, self.slots, self.structure = leaves, slots, structure
        self.in_pairs: frozenset[int] = frozenset()

    @property
    def has_others(self) -> bool:
        """Whether there are leaves that are not variables."""
        return None in self.slots

    @property
    def others(self) -> list[Any]:
        """The leaves that are not variables."""
        places = zip(self._leaves, self.slots, strict=True)
        return [leaf for leaf, slot in places if slot is None]

    def rebuild(
        self, tensors: Sequence[Any], owned: bool = False, swap: dict[int, Tensor] | None = None
    ) -> Any:
        """The container again, with `tensors` in the places of the distinct tensors.

        Where it is `owned` by someone who may write to it, its modules share no state with others.
        `swap` has others, by identity, for what its modules keep besides parameters.
        """
        if self.in_pairs:
            tensors = [
                _complex(t) if slot in self.in_pairs else t for slot, t in enumerate(tensors)
            ]
        leaves = [
            leaf if slot is None else tensors[slot]
            for leaf, slot in zip(self._leaves, self.slots, strict=True)
        ]
        container = optree.tree_unflatten(self.structure, leaves)
        found = modules(container) if owned or swap else []
        if swap:
            for module in found:
                replace_kept(module, lambda x, _: swap.get(id(x), x))
        if owned and found:
            own(found)
        return container


def flatten(
    container: Any,
    is_variable: Callable[[Any], bool] = torch.is_tensor,
    whole_modules: bool = False,
) -> tuple[tuple[Any, ...], Tree]:
    """Split a container into its distinct variables and the tree that holds their places.

    A tensor that occurs several times (tied weights) is listed once, so that it is one variable
    with one gradient. Modules stay in the tree if they are to stay whole.
    """
    leaves, structure = (_with_modules_whole if whole_modules else _flattened)(container)
    slot_of: dict[int, int] = {}
    variables: list[Any] = []
    slots: list[int | None] = []
    for index, leaf in enumerate(leaves):
        if not is_variable(leaf):
            slots.append(None)
            continue
        if id(leaf) not in slot_of:
            slot_of[id(leaf)] = len(variables)
            variables.append(leaf)
        slots.append(slot_of[id(leaf)])
        leaves[index] = None  # the tree must not keep tensors, and so their graphs, alive
    return tuple(variables), Tree(leaves, slots, structure)


def unknowns(container: Any) -> tuple[Tensors, Tree]:
    """The distinct tensors of a φ, complex ones as pairs of reals, and its tree.

    What is solved are equations between reals. Torch's gradients agree with that: the gradient by a
    complex tensor is the pair of those by its two parts.
    """
    return in_reals(*flatten(container))


def in_reals(tensors: Tensors, tree: Tree) -> tuple[Tensors, Tree]:
    """Tensors with pairs of reals for complex numbers, and the tree that undoes that."""
    tree.in_pairs = frozenset([i for i, t in enumerate(tensors) if t.is_complex()])
    return (tuple(map(real, tensors)) if tree.in_pairs else tensors), tree


def is_continuous(tensor: Tensor) -> bool:
    """Whether there are derivatives by it, as there are none by labels."""
    return tensor.is_floating_point() or tensor.is_complex()


def real(tensor: Tensor) -> Tensor:
    """The tensor, a complex one as pairs of reals."""
    # no views, by which gradients that begin at an odd place in memory could not pass
    return torch.stack([tensor.real, tensor.imag], -1) if tensor.is_complex() else tensor


def _complex(pairs: Tensor) -> Tensor:
    return torch.complex(pairs[..., 0], pairs[..., 1])


def leaves(container: Any) -> list[Any]:
    """All leaves of a container, repeated ones included; of its modules nothing is copied."""
    found, _ = _with_modules_whole(container)
    parts = (trained(x).values() if can_be_opened(type(x)) else (x,) for x in found)
    return list(itertools.chain.from_iterable(parts))


def reals(container: Any) -> list[Tensor]:
    """All leaves of a container of tensors, complex ones as pairs of reals."""
    return list(map(real, leaves(container)))


def structure(container: Any) -> Any:
    """The form of a container without its leaves; two of them compare with ==."""
    return _flattened(container)[1]


def names(container: Any, root: str) -> list[str]:
    """A readable name for every leaf, such as `phi['weight']`, for error messages."""
    _flattened(container)
    return [a.codify(root) for a in optree.tree_accessors(container, namespace=NAMESPACE)]


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether there is neither NaN nor Inf, in as few looks at the devices as there are."""
    if not tensors:
        return True
    if len(tensors) == 1:
        norm_of_one = torch.linalg.vector_norm(tensors[0].detach()).item()
        if math.isfinite(norm_of_one):
            return True
    norms = torch._foreach_norm(list(tensors))
    if bool(torch.isfinite(torch.stack([n.to(norms[0].device) for n in norms])).all()):
        return True
    # a norm may overflow where no element does
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ over all tensors, in float64 and still on their device."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    parts = torch._foreach_norm(list(tensors))
    together = torch.stack([p.to(parts[0].device).double() for p in parts])
    length: Tensor = torch.linalg.vector_norm(together)
    return length


def length(tensors: Sequence[Tensor]) -> float:
    """‖·‖₂ over all tensors, as a number."""
    tensors = [t.detach() for t in tensors]
    found = float(norm(tensors))
    if 0 < found < math.inf:
        return found
    # squares may overflow, or vanish, where what they are summed for does not
    return float(norm([real(t).double() for t in tensors]))


def inner(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """xᵀy over all tensors, in double precision."""
    pairs = zip(map(real, xs), map(real, ys), strict=True)
    return sum(float((x.detach().double() * y.detach().double()).sum()) for x, y in pairs)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each has been written to: a later list tells which were changed since."""
    return [t._version for t in tensors]


class Flat:
    """One flat vector for a tuple of tensors, in a dtype wide enough for Krylov recurrences.

    With `n_tasks`, the tensors have that many tasks along their first dimension, and the vector is
    a matrix with a row for each.
    """

    def __init__(self, like: Tensors, n_tasks: int | None = None) -> None:
        self._like, self._rows = like, () if n_tasks is None else (n_tasks,)
        self._sizes = [t.shape[len(self._rows) :].numel() for t in like]
        self.device = like[0].device if like else torch.device("cpu")
        self.dtype, self.eps = torch.float32, 0.0  # eps is that of the coarsest tensor
        for dtype in {t.dtype for t in like}:
            self.dtype = torch.promote_types(self.dtype, dtype)
            self.eps = max(self.eps, torch.finfo(dtype).eps)

    def ravel(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate; narrower dtypes (bfloat16, float16) are widened to float32."""
        if not tensors:
            return torch.zeros((*self._rows, 0), dtype=self.dtype, device=self.device)
        if not self._rows:
            return torch.cat([t.flatten().to(self.device, self.dtype) for t in tensors])
        rows = self._rows  # in a batch, gradients come transposed: copy them once, not twice
        vector = torch.empty((*rows, sum(self._sizes)), dtype=self.dtype, device=self.device)
        for part, tensor in zip(torch.split(vector, self._sizes, dim=-1), tensors, strict=True):
            part.view(tensor.shape).copy_(tensor)
        return vector

    def unravel(self, vector: Tensor) -> Tensors:
        """The parts of the vector in the original shapes and dtypes (views where they can be)."""
        one = len(self._like) == 1
        parts = (vector,) if one else torch.split(vector, self._sizes, dim=-1)
        # views as those of others: to read a shape takes longer than to make a view
        return tuple([part.view_as(t).to(t) for part, t in zip(parts, self._like, strict=True)])
