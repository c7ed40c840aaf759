"""What the examples hold an implicit gradient against, and what each way to a gradient costs."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicit_grad.testing import peak_memory


class _Of(nn.Module):
    """A function of a model, as a module whose weights may be others."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Tensor:
        return self.function(self.model, *args)


def unrolled(
    model: nn.Module,
    step_loss: Callable[[nn.Module, Any], Tensor],
    steps: Iterable[tuple[Any, float]],
    outer: Callable[[nn.Module], Tensor],
    momentum: float = 0.0,
) -> Tensor:
    """The outer loss after SGD on batches, each with its length of a step; all in one graph."""
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    phi = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def at(function: Callable[..., Tensor], *args: Any) -> Tensor:
        weights = dict(zip(names, phi, strict=True))
        value: Tensor = functional_call(_Of(model, function), weights, args)
        return value

    velocity: Sequence[Tensor] = [torch.zeros_like(p) for p in phi]
    for batch, lr in steps:
        slope = torch.autograd.grad(at(step_loss, batch), phi, create_graph=True)
        velocity = [momentum * v + g for v, g in zip(velocity, slope, strict=True)]
        phi = [p - lr * v for p, v in zip(phi, velocity, strict=True)]
    return at(outer)


def by_torchopt(
    model: nn.Module,
    objective: Callable[[nn.Module, Tensor], Tensor],
    outer: Callable[[nn.Module], Tensor],
    argument: Tensor,
) -> Tensor:
    """TorchOpt's implicit gradient of the outer loss of a model that was trained."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    names = [f"model.{name}" for name, _ in model.named_parameters()]
    phi = tuple(p.detach().clone() for p in model.parameters())

    def value(phi: tuple[Tensor, ...], argument: Tensor) -> Tensor:
        weights = dict(zip(names, phi, strict=True))
        return functional_call(_Of(model, objective), weights, (argument,))

    cg = solve_cg(maxiter=20, rtol=0.0, atol=0.0)

    @custom_root(torch.func.grad(value), argnums=1, solve=cg)
    def solve(start: tuple[Tensor, ...], argument: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.clone().requires_grad_() for p in start)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of functorch
        weights = dict(zip(names, solve(phi, argument), strict=True))
        return torch.autograd.grad(functional_call(_Of(model, outer), weights, ()), argument)[0]


def differences(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """The gradient by central differences: two calls of the loss for each number."""
    at = at.detach()
    units = step * torch.eye(at.numel()).to(at).view(-1, *at.shape)
    slopes = [(loss(at + unit) - loss(at - unit)).item() / (2 * step) for unit in units]
    return torch.tensor(slopes).to(at).view_as(at)


def costs(ways: dict[str, Callable[[], Tensor]]) -> dict[str, tuple[float, int, float]]:
    """Of each way to a gradient, the first of which is the reference for the others.

    Its distance from the reference, relative to that; the most KiB alive at once; CPU seconds.
    """
    found, reference = {}, None
    for name, way in ways.items():
        begin = process_time()
        gradient = way()
        seconds = process_time() - begin
        reference = gradient if reference is None else reference
        error = float((gradient - reference).norm() / reference.norm())
        kib = peak_memory(way) // 1024
        print(f"  {name:30} error {error:.1e}, {kib:7,} KiB, {seconds:6.3f} s")
        found[name] = error, kib, seconds
    return found
