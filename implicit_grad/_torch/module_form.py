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
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from implicit_grad._errors import InvalidArgumentError
from implicit_grad._torch.clone import copied, kept_tensors, refresh_recurrent, replace_kept
from implicit_grad._torch.rebinding import Hole

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


def kept(module: nn.Module) -> dict[str, Tensor]:
    """The distinct other tensors in it through which a gradient flows, each by its first name.

    What a hypernetwork wrote there, an input, or what the last forward pass left.
    """
    known = {id(p) for p in module.parameters()}
    found: dict[str, Tensor] = {}
    for name, tensor in kept_tensors(module):
        if id(tensor) not in known and (tensor.requires_grad or _is_looked_at(tensor)):
            known.add(id(tensor))
            found[f"{name}[{len(found)}]" if name in found else name] = tensor
    return found


def _is_looked_at(tensor: Tensor) -> bool:
    """Whether transforms of torch.func, or forward mode, look at it."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class Argument:
    """A module among the arguments of a call, whose other tensors are arguments as well."""

    module: nn.Module
    kept: dict[str, Tensor]


class Form:
    """A module without its parameters that train; two are equal if these have the same names.

    It keeps no graph alive: a module may have come from another call of a wrapped solver. What has
    one is detached, unless it is taken out like the parameters.
    """

    def __init__(self, module: nn.Module, taken: dict[str, Tensor]) -> None:
        """`taken` are those of its tensors that are not to be in the form."""
        self.kind, self.names = type(module), tuple(taken)
        holes = {id(t): Hole(i) for i, t in enumerate(taken.values())}

        def put(x: Any, is_parameter: bool) -> Any:
            has_graph = not is_parameter and isinstance(x, Tensor) and x.grad_fn is not None
            return holes.get(id(x)) or (x.detach() if has_graph else x)

        self._skeleton = copied(module, put)
        self._normed = [
            name
            for name, part in self._skeleton.named_modules()
            if any(isinstance(h, _NORMS) for h in part._forward_pre_hooks.values())
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and (self.kind, self.names) == (other.kind, other.names)

    def __hash__(self) -> int:
        return hash((self.kind, self.names))

    def __repr__(self) -> str:
        return f"{self.kind.__name__}({', '.join(self.names)})"

    def filled(self, tensors: Iterable[Any]) -> nn.Module:
        """A module of this form with these tensors, as they are, in the place of its parameters."""
        found = list(tensors)
        module = copied(self._skeleton, lambda x, _: found[x.index] if type(x) is Hole else x)
        for name in self._normed:
            _normalise(module.get_submodule(name))
        return module


_NORMS = (WeightNorm, SpectralNorm, BasePruningMethod)


def _normalise(part: nn.Module) -> None:
    """Compute the weight that hooks of torch.nn.utils keep as an attribute, before they run."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            setattr(part, hook.name, hook.compute_weight(part))
        elif isinstance(hook, SpectralNorm):
            setattr(part, hook.name, hook.compute_weight(part, do_power_iteration=False))
        elif isinstance(hook, BasePruningMethod):
            setattr(part, hook._tensor_name, hook.apply_mask(part))  # type: ignore[no-untyped-call]


def marked(tensor: Tensor, mark: tuple[int, int]) -> Tensor:
    """The tensor with a mark, by which it is known in copies of modules, `copy.deepcopy`'s too."""
    tensor._implicit_grad_mark = mark  # type: ignore[attr-defined]
    return tensor


def mark_of(tensor: Tensor) -> tuple[int, int] | None:
    """The mark of a tensor, or of the one that it is a deep copy of."""
    mark: tuple[int, int] | None = getattr(tensor, "_implicit_grad_mark", None)
    return mark


def _is_left(buffer: Tensor) -> bool:
    return buffer.requires_grad or mark_of(buffer) is not None


def own(modules: Sequence[nn.Module]) -> None:
    """Give what `Form.filled` made parameters, buffers and lists of hooks of its own.

    Tensors without a gradient to pass on become parameters that train. The values of frozen ones
    stay shared: they may be large (what a LoRA adapts). Buffers
    through which a gradient flows are left, and marked ones.
    """
    made: dict[int, Tensor] = {}
    for part in itertools.chain(*(module.modules() for module in modules)):
        for name, buffer in part._buffers.items():
            if buffer is not None and not _is_left(buffer):
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
    for module in modules:
        replace_kept(module, lambda x, _: made.get(id(x), x))


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
