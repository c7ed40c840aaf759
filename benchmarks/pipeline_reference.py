"""MAML's interface with implicit gradients by hand: dense matrices and hooks, no library.

With A = H + λ, H = ∇²loss where the last step began, and v what arrives at the adapted weights:

    Au = v,   dθ = λu,   d(what else the loss depends on) = −Jᵀu,   dλ = −u·(φ − θ),

J being the mixed derivatives of the loss. Without a λ it is 1/t, t the sum of the steps' lengths.
H and J are taken row by row at each step, so nothing is shared with the library but torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def add_to_grad(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """What backward does at a leaf."""
    for p, g in zip(parameters, gradients, strict=True):
        if g is not None:
            p.grad = g.clone() if p.grad is None else p.grad + g


def leaves_behind(loss: Tensor, own: set[int]) -> list[Tensor]:
    """What else a loss depends on (the features' weights, in ANIL), but for the weights' leaves."""
    found: dict[int, Tensor] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own and not hasattr(leaf, "of_weights"):
            found[id(leaf)] = leaf
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


def second_derivatives(
    slope: Tensor, present: list[Tensor], others: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Those of one entry of the slope, with respect to the weights and to the others."""
    sources = [*present, *others]
    found: Iterable[Tensor | None] = [None] * len(sources)
    if slope.requires_grad:
        found = torch.autograd.grad(slope, sources, retain_graph=True, allow_unused=True)
    pairs = zip(sources, found, strict=True)
    filled = [torch.zeros_like(s) if g is None else g for s, g in pairs]
    count = len(present)
    return flat(filled[:count]), flat([slope.new_zeros(0), *filled[count:]])


class ByHand(nn.Module):
    """A learner whose weights are one flat leaf, cut into views."""

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        *,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        lam: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.lr, self.first_order = module, lr, first_order
        self.lam = lam
        self._theta: list[Tensor] | None = None
        self._time = 0.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["module"], name)

    def forward(self, *inputs: Any) -> Any:
        """The module's output, at the present weights."""
        return self.module(*inputs)

    def clone(self) -> ByHand:
        """A copy, whose first weights are θ."""
        learner = ByHand(
            copy.deepcopy(self.module),
            self.lr,
            first_order=self.first_order,
            lam=self.lam,
        )
        learner._theta = self._trained()
        learner._put(flat(learner._theta), lambda v: learner._send(v))
        if self.lam is not None:
            like = zip(self.lam(), learner._theta, strict=True)
            learner._lam = flat(value.expand_as(t) for value, t in like)
        return learner

    def adapt(self, loss: Tensor, first_order: bool | None = None, **_: Any) -> None:
        """One step; what backward will need of it is computed at once."""
        first_order = self.first_order or bool(first_order)
        present = self._trained()
        if self._theta is None:  # the original itself
            self._theta = present
        slopes = torch.autograd.grad(loss, present, create_graph=True, allow_unused=True)
        pairs = zip(present, slopes, strict=True)
        slope = flat(torch.zeros_like(p) if g is None else g for p, g in pairs)
        phi, theta = flat(present).detach(), flat(self._theta).detach()
        self._time += self.lr
        lam = getattr(self, "_lam", None)
        if lam is None:
            new = phi - self.lr * slope.detach()
        else:
            pull = self.lr * lam.detach()
            new = (phi - self.lr * slope.detach() + pull * theta) / (1 + pull)
        if first_order:
            self._put_each(new)
            return
        others = leaves_behind(loss, {id(p) for p in present})
        rows = [second_derivatives(s, present, others) for s in slope]
        H, J = (torch.stack(part) for part in zip(*rows, strict=True))
        strength = torch.full_like(theta, 1 / self._time) if lam is None else lam

        def backward(v: Tensor) -> None:
            u = torch.linalg.solve(H + strength.detach().diag(), v)
            self._send(strength.detach() * u)
            if others:
                parts = (-J.T @ u).split([p.numel() for p in others])
                pairs = zip(parts, others, strict=True)
                add_to_grad(others, [part.view_as(p) for part, p in pairs])
            if lam is not None:
                assert isinstance(self.lam, nn.Module)
                own = list(self.lam.parameters())
                seen = torch.autograd.grad(lam, own, -u * (new - theta), retain_graph=True)
                add_to_grad(own, seen)

        self._put(new, backward)

    def _send(self, v: Tensor) -> None:
        """A gradient on to θ."""
        assert self._theta is not None
        parts = v.split([t.numel() for t in self._theta])
        pairs = zip(parts, self._theta, strict=True)
        add_to_grad(self._theta, [part.view_as(t) for part, t in pairs])

    def _trained(self) -> list[Tensor]:
        """The weights that train, each once."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def _put(self, values: Tensor, backward: Callable[[Tensor], None]) -> None:
        """New weights in all places of the old; `backward` gets what loss.backward() brings."""
        old = self._trained()
        leaf = values.detach().clone().requires_grad_()
        leaf.of_weights = True  # type: ignore[attr-defined]

        def hook(arrived: Tensor) -> None:
            assert arrived.grad is not None
            backward(arrived.grad)
            arrived.grad = None

        leaf.register_post_accumulate_grad_hook(hook)
        parts = leaf.split([p.numel() for p in old])
        self._fill(old, [part.view_as(p) for part, p in zip(parts, old, strict=True)])

    def _put_each(self, values: Tensor) -> None:
        """New weights, each a leaf (that can be detached in place), whose gradient is θ's."""
        old, theta = self._trained(), self._theta
        assert theta is not None
        parts = values.detach().split([p.numel() for p in old])
        leaves = [part.view_as(p).clone() for part, p in zip(parts, old, strict=True)]
        for leaf, t in zip(leaves, theta, strict=True):

            def hook(arrived: Tensor, t: Tensor = t) -> None:
                add_to_grad([t], [arrived.grad])

            leaf.requires_grad_().register_post_accumulate_grad_hook(hook)
        self._fill(old, leaves)

    def _fill(self, old: list[Tensor], values: Iterable[Tensor]) -> None:
        new = {id(p): value for p, value in zip(old, values, strict=True)}
        for part in self.module.modules():
            for name, p in part._parameters.items():
                if p is not None and id(p) in new:
                    part._parameters[name] = new[id(p)]  # type: ignore[assignment]


def by_hand(maml: Any) -> Any:
    """The same for a MAML, or for a copy of a module that holds one."""
    if hasattr(maml, "adapt"):
        return ByHand(maml.module, maml.lr, first_order=maml.first_order)
    whole = copy.copy(maml)
    whole._modules = dict(maml._modules)
    for name, part in maml.named_children():
        if hasattr(part, "adapt"):
            whole._modules[name] = by_hand(part)
    return whole


class _Update(torch.autograd.Function):
    """Weights after one step of a length, for which dθ = (1 + lr·H)⁻¹v."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, new: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(A)
        return new.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[None, None, Tensor]:
        (A,) = ctx.saved_tensors
        return None, None, torch.linalg.solve(A, v)


def by_hand_update(
    policy: nn.Module, lr: float, gradients: Any, loss: Callable[[], Tensor], first_order: bool
) -> nn.Module:
    """A step of `maml_update`'s kind, with the gradient of the solution where it led."""
    names = [name for name, _ in policy.named_parameters()]
    theta = list(policy.parameters())
    new = flat(p.detach() - lr * g.detach() for p, g in zip(theta, gradients, strict=True))

    def put(values: Tensor) -> None:
        parts = values.split([p.numel() for p in theta])
        for name, part, like in zip(names, parts, theta, strict=True):
            owner, _, last = name.rpartition(".")
            policy.get_submodule(owner)._parameters[last] = part.view_as(like)  # type: ignore[assignment]

    phi = new.clone().requires_grad_()
    put(phi)
    (slope,) = torch.autograd.grad(loss(), phi, create_graph=True)
    rows = [torch.autograd.grad(s, phi, retain_graph=True)[0] for s in slope]
    A = torch.eye(len(new)) + lr * torch.stack(rows)
    put(new if first_order else _Update.apply(A, new, flat(theta)))
    return policy


def by_hand_context(
    policy: Any, lr: float, gradients: Any, loss: Callable[[], Tensor], first_order: bool
) -> Any:
    """One step on a context; what it changes by is −(H + 1/lr)⁻¹ times the change of ∇loss."""
    (slope,) = gradients
    led = (policy.context - lr * slope).detach().requires_grad_()
    policy.context = led
    if first_order:
        return policy
    (there,) = torch.autograd.grad(loss(), led, create_graph=True)
    rows = [torch.autograd.grad(s, led, retain_graph=True)[0] for s in there]
    A = torch.stack(rows) + torch.eye(len(rows)) / lr
    policy.context = led.detach() - torch.linalg.solve(A.detach(), there - there.detach())
    return policy
