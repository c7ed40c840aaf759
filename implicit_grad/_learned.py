"""λ with parameters of its own, to be learned by the outer optimiser and always positive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from implicit_grad import _tree
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._proximal import LowRank, check_lam, evaluated, proximal_pull

Per = Literal["model", "tensor", "element"]


class LearnedLam(nn.Module):
    """A λ for `imaml` or `proximal` that is learned: λ = exp(ρ), or diag(exp(ρ)) + U Uᵀ.

    The parameters are ρ, the logarithms, and U: any step of an optimiser leaves λ positive, and a
    step in ρ is a relative one in λ. Pass the module itself as `lam`, and its parameters to the
    outer optimiser (`imaml` shows them among its own); λ is computed anew at each call.

    Args:
        theta: what λ holds φ near to: a module, a tensor or a container of tensors.
        init: λ at the start, a number > 0.
        per: one ρ for the "model", for each "tensor" (a layer's weights or bias), or "element".
        rank: columns of U; 0 leaves U away. They start at random, because at U = 0 there is no
            gradient, and small: U Uᵀ has the trace `init`.
        seed: of these random numbers.

    >>> lam = LearnedLam(nn.Linear(3, 1), init=2.0, per="tensor")
    >>> [round(value.item(), 4) for value in lam()]
    [2.0, 2.0]
    """

    def __init__(
        self,
        theta: nn.Module | Any,
        init: float = 1.0,
        *,
        per: Per = "tensor",
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_lam(init, "LearnedLam")
        if torch.is_tensor(init):
            if init.numel() != 1:
                raise InvalidArgumentError(
                    f"LearnedLam: init must be one number, got {describe(init)}"
                )
            init = init.item()
        if per not in ("model", "tensor", "element"):
            raise InvalidArgumentError(
                f'LearnedLam(per={per!r}): expected "model", "tensor" or "element"'
            )
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise InvalidArgumentError(f"LearnedLam(rank={rank!r}): expected an integer >= 0")
        leaves, self._tree = _tree.flatten(_container(theta), _is_variable)
        if not leaves:
            raise InvalidArgumentError("LearnedLam: theta holds no floating-point tensors")
        like = leaves[:1] if per == "model" else leaves
        self.per, self.rank, self._size = per, rank, len(leaves)
        self.log_lam = nn.ParameterList(
            torch.full_like(t.detach(), math.log(init))
            if per == "element"
            else torch.full((), math.log(init), dtype=t.dtype, device=t.device)
            for t in like
        )
        self.factor = nn.ParameterList(_directions(leaves, rank, init, seed) if rank else [])

    def forward(self) -> Any:
        """λ in the form of θ (for a module: of the tuple of its parameters)."""
        weights = [rho.exp() for rho in self.log_lam]
        diagonal = self._tree.rebuild(weights * self._size if self.per == "model" else weights)
        return LowRank(diagonal, self._tree.rebuild(list(self.factor))) if self.rank else diagonal

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return f"per={self.per!r}, rank={self.rank}"


def registrable(lam: Any, module: nn.Module) -> Any:
    """λ, checked against the model, in a form that nn.Module registers if it is to be learned."""
    if callable(lam) or isinstance(lam, LowRank):
        held = [] if callable(lam) else _tree.leaves(lam)
        if any(torch.is_tensor(t) and t.requires_grad for t in held):
            raise InvalidArgumentError(
                "imaml: a LowRank lam that is to be learned must be a LearnedLam(model, rank=...), "
                "so that its tensors appear in parameters()"
            )
        proximal_pull(evaluated(lam), tuple(module.parameters()), "imaml")
        return lam
    names = [name for name, _ in module.named_parameters()]
    if isinstance(lam, Mapping):
        if set(lam) != set(names):
            raise InvalidArgumentError(
                f"imaml: lam must have one entry for each parameter, {names}; got {list(lam)}"
            )
        lam = [lam[name] for name in names]
    several = isinstance(lam, (Sequence, nn.ParameterList))
    values = tuple(lam) if several else (lam,)
    if several and len(values) != len(names):
        raise InvalidArgumentError(
            f"imaml: lam must have one entry for each of the {len(names)} parameters, got "
            f"{len(values)}"
        )
    for value in values:
        if torch.is_tensor(value) and value.requires_grad and not isinstance(value, nn.Parameter):
            raise InvalidArgumentError(
                "imaml: a lam that is to be learned must be a torch.nn.Parameter, so that it "
                "appears in parameters()"
            )
    proximal_pull(values if several else lam, tuple(module.parameters()), "imaml")
    if several and any(isinstance(value, nn.Parameter) for value in values):
        fixed = [torch.is_tensor(v) and not isinstance(v, nn.Parameter) for v in values]
        return nn.ParameterList(  # it would make a parameter to be learned of any tensor
            nn.Parameter(v, requires_grad=False) if stays else v
            for v, stays in zip(values, fixed, strict=True)
        )
    return values if several else lam


def _container(theta: Any) -> Any:
    if isinstance(theta, nn.Module):
        return tuple(theta.parameters())
    return tuple(theta) if isinstance(theta, Iterator) else theta  # such as module.parameters()


def _is_variable(leaf: Any) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point()


def _directions(leaves: Sequence[Tensor], rank: int, init: float, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*t.shape, rank, generator=random) for t in leaves]
    length = math.sqrt(sum(float(part.square().sum()) for part in parts))
    return [
        (part * (math.sqrt(init) / length)).to(t) for part, t in zip(parts, leaves, strict=True)
    ]
