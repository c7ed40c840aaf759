"""Evaluate the user's functions again without changing anything that the user owns."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

from implicit_grad._torch.products import NOTHING, device_types, own_precision
from implicit_grad._torch.pytree import Tensors
from implicit_grad._torch.transforms import outside_forward_mode


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left alone by torch.compile: what that compiles has no second derivative."""
    eager: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # slow to import, and there if anything is compiled
            return function(*args, **kwargs)
        if not eager:
            eager.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return eager[0](*args, **kwargs)

    return call


class RandomState:
    """The state of the random generators that an evaluation may draw from (dropout masks)."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cuda = [d.index or 0 for d in devices if d.type == "cuda"]
        self._states = (torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self._cuda])

    def restore(self) -> None:
        """Put the generators back to where they were."""
        cpu, cuda = self._states
        torch.set_rng_state(cpu)
        for index, state in zip(self._cuda, cuda, strict=True):
            torch.cuda.set_rng_state(state, index)


class Ambient:
    """What an evaluation at φ sees besides its arguments: random generators, and autocast."""

    def __init__(self, devices: set[torch.device], phi: Tensors) -> None:
        self.devices, self.random = devices, RandomState(devices)
        wide = any(p.dtype == torch.float32 for p in phi)
        self._casting = [d for d in device_types(devices) if wide and torch.is_autocast_enabled(d)]

    def casts(self) -> AbstractContextManager[object]:
        """Autocast as it was, but to float32; off where it was off.

        So bfloat16 features still meet float32 weights, and products with derivatives are taken in
        the precision of φ nevertheless.
        """
        return self._cast() if self._casting else own_precision(self.devices)

    @contextlib.contextmanager
    def _cast(self) -> Iterator[None]:
        with own_precision(self.devices, changes=True):  # puts everything back
            for device_type in self._casting:
                torch.set_autocast_dtype(device_type, torch.float32)
                torch.set_autocast_enabled(device_type, True)
            yield


class _Setting:
    """Settings of the whole process while any thread is inside: the last to leave puts them back.

    Each is a function that reads it, one that writes it, and its value inside.
    """

    def __init__(self, *settings: tuple[Callable[[], Any], Callable[[Any], Any], Any]) -> None:
        self._settings, self._lock, self._inside = settings, threading.Lock(), 0
        self._changed: list[tuple[Callable[[Any], Any], Any]] = []  # what to write back

    def __enter__(self) -> None:
        with self._lock:
            for read, write, value in self._settings if self._inside == 0 else ():
                if (before := read()) is not value:
                    self._changed.append((write, before))
                    write(value)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            while self._inside == 0 and self._changed:
                write, before = self._changed.pop()
                write(before)


_STANCES = hasattr(torch.compiler, "set_stance")  # since torch 2.6
_attention = torch.backends.cuda  # the switches are there, and are those of CPUs as well
_checkpoints = torch.utils.checkpoint


class _Unchecked:
    """In the place of the Function that checkpoints with use_reentrant=True."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _unchecked(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what surrounds the function with use_reentrant=False."""
    yield


def _of_checkpoints(name: str, value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any], Any]:
    read = functools.partial(getattr, _checkpoints, name)
    return read, functools.partial(setattr, _checkpoints, name), value


_plain_layers = _Setting(
    (_attention.math_sdp_enabled, _attention.enable_math_sdp, True),
    (_attention.flash_sdp_enabled, _attention.enable_flash_sdp, False),
    (_attention.mem_efficient_sdp_enabled, _attention.enable_mem_efficient_sdp, False),
    (_attention.cudnn_sdp_enabled, _attention.enable_cudnn_sdp, False),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    _of_checkpoints("CheckpointFunction", _Unchecked),
    *(
        _of_checkpoints(name, _unchecked)  # by the first name until torch 2.13 or so
        for name in (
            "_checkpoint_without_reentrant_generator",
            "_checkpoint_without_reentrant_generator_impl",
        )
        if hasattr(_checkpoints, name)
    ),
)
_without_cudnn = _Setting((torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False))


def differentiable_twice(recurrent: bool = False) -> AbstractContextManager[object]:
    """Attention as products and a softmax, no checkpoints, `recurrent` layers without cuDNN.

    Fused kernels have no second derivative, nor has what torch.compile made, which runs as it was
    written. A checkpoint would compute its layers again in backward, by when weights, switches and
    autocast are others; and the gradient's own graph, from which second derivatives are taken,
    keeps what it would save.
    """
    others = [_without_cudnn] if recurrent else []
    if _STANCES and "torch._dynamo" in sys.modules:  # slow to import, as above
        others.append(_eager())
    return _all_of([_plain_layers, *others]) if others else _plain_layers


@functools.cache
def _eager() -> _Setting:
    from torch._dynamo import eval_frame

    def set_stance(stance: Any) -> None:
        with contextlib.suppress(RuntimeError):  # within what is being compiled, all is
            eval_frame._set_stance(stance)

    eager = eval_frame.DynamoStance("force_eager")
    return _Setting((lambda: eval_frame._stance, set_stance, eager))


@contextlib.contextmanager
def _all_of(settings: list[_Setting]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield


@contextlib.contextmanager
def isolated(ambient: Ambient) -> Iterator[None]:
    """Run user code with gradients on, leaving random generators and module buffers as they were.

    It sees the state that `ambient` was made in, so that repeated evaluations draw the same dropout
    masks. Attention is computed step by step, because fused kernels have no second derivative.
    """
    before = RandomState(ambient.devices)
    ambient.random.restore()
    try:
        with (
            _private_buffers(),
            differentiable_twice(),
            uncached(),
            outside_forward_mode(),
            ambient.casts(),
            torch.enable_grad(),
        ):
            yield
    finally:
        before.restore()


def uncached() -> AbstractContextManager[object]:
    """Nothing that `torch.nn.utils.parametrize.cached` around has kept is seen inside, or kept.

    It knows modules by their ids only, which copies take over from one another, and not by weights,
    which change while a solver trains.
    """
    return _uncached() if parametrize._cache_enabled else NOTHING


def casting_anew() -> AbstractContextManager[object]:
    """Under autocast weights are cast each time: its cache does not see that a loop trains them.

    It is emptied where autocast ends, which may be around the loop and not within each step.
    """
    return _casting_anew() if torch.is_autocast_cache_enabled() else NOTHING


@contextlib.contextmanager
def _casting_anew() -> Iterator[None]:
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


_Buffers = dict[str, torch.Tensor | None]
_lent: dict[torch.nn.Module, tuple[list[tuple[torch.nn.Module, _Buffers]], int]] = {}
_lending = threading.Lock()


def _with_buffers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The module, if it has buffers; of a scripted one its parts too, whose calls no hook sees."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return [part for part in (module.modules() if scripted else (module,)) if part._buffers]


def _lend(module: torch.nn.Module, owners: list[torch.nn.Module]) -> None:
    """Give the buffers' owners copies, unless they have some from another thread already."""
    with _lending:
        originals, lenders = _lent.get(module, ([], 0))
        if not lenders:
            originals = [(part, dict(part._buffers)) for part in owners]
            for part, buffers in originals:
                for name, buffer in buffers.items():
                    part._buffers[name] = None if buffer is None else buffer.clone()
        _lent[module] = originals, lenders + 1


def _put_back(module: torch.nn.Module) -> None:
    """Give a module its own buffers again, when the last who lent it copies is done."""
    with _lending:
        originals, lenders = _lent[module]
        if lenders > 1:
            _lent[module] = originals, lenders - 1
            return
        for part, buffers in originals:
            for name, buffer in buffers.items():  # a scripted module's have no update()
                part._buffers[name] = buffer
        del _lent[module]


@contextlib.contextmanager
def _private_buffers() -> Iterator[None]:
    """Every module that runs inside writes its buffers (BatchNorm statistics) to copies.

    The module's own buffers are put back when its forward ends; they are never written to, so that
    graphs which hold them stay valid. Hooks are global in torch, hence the check of the thread.
    """
    thread = threading.get_ident()
    lent: list[torch.nn.Module] = []

    def lend_copies(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and (owners := _with_buffers(module)):
            _lend(module, owners)
            lent.append(module)

    def put_back(module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and lent and lent[-1] is module:
            _put_back(lent.pop())

    hooks = (
        register_module_forward_pre_hook(lend_copies),
        register_module_forward_hook(put_back, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while lent:  # only after an exception that no hook saw
            _put_back(lent.pop())
