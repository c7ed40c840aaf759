"""A module as a container: its parameters that train, and the form that makes a module of others.

What does not train (frozen parameters, buffers, modes, hooks, attributes) belongs to the form.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from implicit_grad._errors import InvalidArgumentError
from implicit_grad._torch.clone import copied, refresh_recurrent

# What these hold besides Python's modules cannot be copied.
_WHOLE = (torch.jit.ScriptModule, DistributedDataParallel)


def can_be_opened(kind: type) -> bool:
    """Whether modules of this class can be taken apart and put together again."""
    return issubclass(kind, nn.Module) and not issubclass(kind, _WHOLE)


def unwrapped(module: Any) -> Any:
    """The module within DistributedDataParallel, which trained it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The distinct parameters that require grad, in the order of `named_parameters`."""
    found: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, p in found.items():
        if isinstance(p, nn.UninitializedParameter):
            raise InvalidArgumentError(
                f"{type(module).__name__}: the parameter {name} is not initialized yet: apply the "
                "module to a batch first"
            )
    return found


@dataclasses.dataclass(frozen=True)
class _Hole:
    """Stands in the place of a tensor that trains."""

    index: int


class Form:
    """A module without its parameters that train; two are equal if these have the same names.

    It keeps no graph alive: a module may have come from another call of a wrapped solver.
    """

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """`weights` are those of the module that train."""
        self.kind, self.names = type(module), tuple(weights)
        index = {id(t): _Hole(i) for i, t in enumerate(weights.values())}
        self._skeleton = copied(module, lambda x, _: index.get(id(x), x), rebind=True)
        self._normed: list[str] = []
        for name, part in self._skeleton.named_modules():
            held = vars(part)
            for key, value in held.items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    held[key] = value.detach()
            if any(isinstance(h, _NORMS) for h in part._forward_pre_hooks.values()):
                self._normed.append(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and (self.kind, self.names) == (other.kind, other.names)

    def __hash__(self) -> int:
        return hash((self.kind, self.names))

    def __repr__(self) -> str:
        return f"{self.kind.__name__}({', '.join(self.names)})"

    def filled(self, tensors: Iterable[Any]) -> nn.Module:
        """A module of this form with these tensors, as they are, in the place of its parameters."""
        found = list(tensors)
        module = copied(
            self._skeleton, lambda x, _: found[x.index] if type(x) is _Hole else x, rebind=True
        )
        for name in self._normed:
            _normalise(module.get_submodule(name))
        return module


_NORMS = (WeightNorm, SpectralNorm)


def _normalise(part: nn.Module) -> None:
    """Compute the weight that hooks of torch.nn.utils keep as an attribute, before they run."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            setattr(part, hook.name, hook.compute_weight(part))
        elif isinstance(hook, SpectralNorm):
            setattr(part, hook.name, hook.compute_weight(part, do_power_iteration=False))


def own(modules: Sequence[nn.Module]) -> None:
    """Give what `Form.filled` made parameters, buffers and lists of hooks of its own.

    Tensors without a gradient to pass on become parameters that train. The values of frozen ones
    stay shared: they may be large (what a LoRA adapts).
    """
    made: dict[int, Tensor] = {}
    for part in itertools.chain(*(module.modules() for module in modules)):
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = made.setdefault(id(buffer), buffer.detach().clone())
        for name, p in part._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = _own_parameter(p)
            if p is not None:
                part._parameters[name] = made[id(p)]  # type: ignore[assignment]
        held = vars(part)
        hooks = {n: v for n, v in held.items() if n.endswith("_hooks") and isinstance(v, dict)}
        held.update({name: registered.copy() for name, registered in hooks.items()})
        if isinstance(part, nn.RNNBase):
            refresh_recurrent(part)


def _own_parameter(p: Tensor) -> Tensor:
    if p.requires_grad or type(p) not in (Tensor, nn.Parameter):
        return p
    if type(p) is nn.Parameter:
        return nn.Parameter(p.detach(), requires_grad=False)
    # of what torch.func and forward mode look at, a parameter would be another tensor
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return p
    tangent = forward_ad.unpack_dual(p).tangent  # type: ignore[no-untyped-call]
    return nn.Parameter(p) if tangent is None else p


def frozen(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """The parameters that do not train."""
    for module in modules:
        yield from (p for _, p in module.named_parameters() if not p.requires_grad)


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one class and have the same parameters, frozen or not."""
    first, second = (
        {name: p.shape for name, p in module.named_parameters()} for module in (one, other)
    )
    return type(one) is type(other) and first == second
