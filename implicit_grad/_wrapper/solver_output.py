"""What a solver may return: checked, converted to tensors, and cut off from everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from implicit_grad._errors import ImplicitGradError, InvalidSolutionError, describe
from implicit_grad._torch import pytree
from implicit_grad._torch.pytree import Tensors, Tree


def checked(returned: Any, inputs: Tensors, template: Any | None) -> tuple[Tensors, Tree]:
    """φ as distinct detached real tensors and their tree, or an error that names the wrong part.

    NumPy arrays and Python's numbers become tensors of the dtype and device of the arguments.
    Integers beside them (a count of steps) are no unknowns and stay in the tree as they are; a
    float beside tensors in a tuple may be one or not, and is refused. Complex numbers are pairs.
    `template` is what φ has to look like, where the condition knows (θ of a proximal term).
    """
    if isinstance(returned, Iterator):
        raise InvalidSolutionError(f"the solver returned {describe(returned)}. {_PARAMETERS}")
    modules = pytree.modules(returned)
    leaves, tree = pytree.flatten(returned, _is_no_count if template is None else _is_any)
    if not leaves:
        leaves, tree = pytree.flatten(returned, _is_any)  # counts are nothing to stand beside
    if not leaves:
        if modules:
            raise InvalidSolutionError(
                f"the solver returned {describe(modules[0])} of which no parameter requires "
                "grad, so that nothing in it is phi: what was trained has to require grad when "
                "it is returned"
            )
        raise InvalidSolutionError(
            f"the solver returned {describe(returned)}; it must return phi: a tensor, "
            "a module, or a container of them"
        )
    if template is not None and tree.structure != pytree.structure(template):
        raise InvalidSolutionError(
            f"the solver returned phi of the form {tree.structure}; theta has the form "
            f"{pytree.structure(template)}, and phi must have the same",
            anchor="another-form",
        )
    likes = [None] * len(tree.slots) if template is None else pytree.leaves(template)
    found: dict[int, Tensor] = {}
    for place, (slot, like) in enumerate(zip(tree.slots, likes, strict=True)):
        if slot is None:
            continue
        leaf = leaves[slot]
        fault = _fault(leaf, like, returned)
        if fault is None and not torch.is_tensor(leaf):
            dtype, device = common(inputs) if like is None else (like.dtype, like.device)
            leaf = torch.as_tensor(leaf)
            if leaf.is_complex():
                dtype = torch.promote_types(dtype, torch.complex64)
            leaf = leaf.to(device, dtype)
        fault = fault or _unlike(leaf, like)
        if fault is not None:
            raise InvalidSolutionError(f"{pytree.names(returned, 'phi')[place]} {fault}")
        found.setdefault(slot, leaf)
    if not pytree.finite(list(found.values())):
        names = pytree.names(returned, "phi")
        places = ((n, s) for n, s in zip(names, tree.slots, strict=True) if s is not None)
        wrong = (name for name, slot in places if not pytree.finite([found[slot]]))
        raise InvalidSolutionError(
            f"{next(wrong)} holds NaN or Inf: the solver diverged, and there is no gradient to "
            "take",
            anchor="solver-diverged",
        )
    # copies: a solver may return its own buffer and write to it again, or one of its arguments
    phi = tuple(found[slot].detach().clone() for slot in range(len(leaves)))
    if modules:
        _, tree = pytree.flatten(tree.rebuild(phi, owned=True))
    return pytree.in_reals(phi, tree)


def _fault(leaf: Any, like: Tensor | None, returned: Any) -> str | None:
    """What keeps a leaf from being a part of φ, and what to do about it."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        good = leaf.dtype.kind in "fc"
    elif torch.is_tensor(leaf):
        good = pytree.is_continuous(leaf) and leaf.layout == torch.strided
    else:
        good = isinstance(leaf, (float, complex))
    if not good:
        advice = _AUX
        if isinstance(leaf, nn.Module):
            advice = _WHOLE
        elif _is_of_module(leaf, returned):
            advice = _PARAMETERS
        return (
            "must be a dense floating-point tensor (or a NumPy array), the solver returned "
            f"{describe(leaf)}. {advice}"
        )
    if like is None and _is_number(leaf) and _is_beside_tensors(returned):
        return (
            f"is {describe(leaf)} beside tensors. If it is a part of the solution, return a tensor "
            f"in its place. {_AUX}"
        )
    return None


def _unlike(leaf: Tensor, like: Tensor | None) -> str | None:
    """How a leaf differs from the θ in its place."""
    if like is None or (leaf.shape, leaf.dtype, leaf.device) == (
        like.shape,
        like.dtype,
        like.device,
    ):
        return None
    return (
        f"must be like theta, {describe(like)} on {like.device}; the solver returned "
        f"{describe(leaf)} on {leaf.device}"
    )


_AUX = (
    "What a solver returns besides the solution (a count of steps, a residual) goes with "
    "implicit(..., has_aux=True), for which it returns (phi, aux)"
)
_PARAMETERS = (
    "For a module's parameters return the module itself: the condition's function is handed it "
    "with phi in their place, and the call returns one whose parameters carry the gradient. Or "
    "return dict(module.named_parameters()), and apply it by torch.func.functional_call"
)
_WHOLE = (
    "Of a scripted module, or one in DistributedDataParallel, return the module that it was made of"
)


def _is_count(leaf: Any) -> bool:
    """Whether it is an integer or a truth value, which cannot be an unknown."""
    return isinstance(leaf, (int, np.integer, np.bool_))


def _is_no_count(leaf: Any) -> bool:
    return not _is_count(leaf)


def _is_any(leaf: Any) -> bool:
    return True


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (float, complex, np.inexact))


def _is_beside_tensors(returned: Any) -> bool:
    """Whether what was returned is a tuple or list in which some are tensors or arrays."""
    arrays = (Tensor, np.ndarray)
    return isinstance(returned, (tuple, list)) and any(
        isinstance(leaf, arrays) for leaf in pytree.leaves(returned)
    )


def _is_of_module(leaf: Any, returned: Any) -> bool:
    """Whether it comes from a module, its `state_dict()`, or `list(named_parameters())`."""
    named = isinstance(returned, Mapping) and all(isinstance(name, str) for name in returned)
    if isinstance(leaf, str):
        return isinstance(returned, list)
    return torch.is_tensor(leaf) and named


def tell_of_phi(error: Exception, phi: Any, handed: Sequence[Any], args: Sequence[Any]) -> None:
    """Where the condition's function cannot take φ, raise with what it was and what to return.

    It was handed φ and what is `handed`; the solver was called with `args`.
    """
    advice = _advice(error, phi, args)
    if advice is None:
        return
    others = "".join(f", {describe(arg)}" for arg in handed)
    raise InvalidSolutionError(
        f"the condition's function raised {type(error).__name__} ({error}) when it was called "
        f"as f(phi, *arguments), with phi as the solver returned it, {_in_full(phi)}{others}. "
        f"{advice}"
    ) from error


def _in_full(phi: Any) -> str:
    if torch.is_tensor(phi) or isinstance(phi, nn.Module):
        return describe(phi)
    return f"{describe(phi)} of {', '.join(map(describe, pytree.leaves(phi)))}"


def _advice(error: Exception, phi: Any, args: Sequence[Any]) -> str | None:
    """What to return in the place of φ; None if nothing says that φ is to blame."""
    if isinstance(error, ImplicitGradError):
        return None
    if isinstance(error, RuntimeError) and not speaks_of_form(error):
        return None
    modules, miscalled = pytree.modules(args), "positional argument" in str(error)
    if isinstance(phi, nn.Module):
        alike = any(type(phi) is type(module) for module in modules)
        return (_FIRST if alike else _ALL) if miscalled else None
    if modules and not pytree.modules(phi):
        return _TRAINED.format(describe(modules[0]))
    if isinstance(phi, list) and all(torch.is_tensor(p) and not p.dim() for p in phi):
        return "A list of numbers is no vector: return torch.tensor(phi), or a NumPy array"
    if isinstance(phi, (tuple, list)):
        return _AUX
    if isinstance(error, RuntimeError):
        return "If that is not the shape or dtype that it computes with, return phi in another"
    return _ALL if miscalled else None


def speaks_of_form(error: RuntimeError) -> bool:
    """Whether it is one of torch's about tensors that do not fit together."""
    words = ("size", "shape", "dimension", "dtype", "1D", "2D")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


_FIRST = (
    "phi is a module like one among the arguments. Only a module that is the first argument is "
    "left out of the call, as what phi was trained from: pass the module first, or by keyword"
)
_ALL = (
    "It is handed phi, and then everything that the solver was called with (but no self: where a "
    "method is the solver, wrap self.method in __init__, with a condition of another method)"
)
_TRAINED = (
    "The solver was handed {}: if that is what it trains, return the module itself (not its "
    "parameters, its state_dict() or a loss). The function is then handed it with phi in it, in "
    "the place of the one that was passed"
)


def check_determined(phi: Any, behind: Tensors) -> None:
    """Raise if one of several things returned is a number that the condition does not look at.

    `behind` are the tensors that the condition's value depends on.
    """
    if not isinstance(phi, (tuple, list)) or len(phi) < 2:
        return
    read = {id(t) for t in behind}
    for index, part in enumerate(phi):
        if not torch.is_tensor(part) or part.is_complex():
            continue  # what is complex is made of what is read
        if part.dim() == 0 and id(part) not in read:
            raise InvalidSolutionError(
                f"phi[{index}] is a number that the condition's function does not depend on, so it "
                f"is not determined by it. {_AUX}"
            )


def common(inputs: Sequence[Tensor]) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device that numbers among arguments are taken to have."""
    floating = [t for t in inputs if pytree.is_continuous(t)]
    if not floating:
        return torch.get_default_dtype(), torch.device("cpu")
    dtype = floating[0].dtype.to_real()
    for tensor in floating:
        dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    return dtype, floating[0].device
