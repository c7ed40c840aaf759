"""λ: the forms in which it may be given, one weight for each tensor of θ, and a λ to be learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor, nn

from implicit_grad._conditions.proximal_term import ProximalTerm
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import is_integer, is_number
from implicit_grad._torch import pytree
from implicit_grad._torch.modules import named_weights
from implicit_grad._torch.transforms import is_wrapped


class LowRank(NamedTuple):
    """Λ = diag(diagonal) + U Uᵀ: a λ that also holds φ back along a few directions at once.

    Args:
        diagonal: λ > 0 in any of its other forms: a number, a tensor, or a container of them.
        factor: U, in the form of θ, each tensor with one more dimension at its end, the rank.

    >>> lam = LowRank(0.5, torch.ones(3, 1))  # for a theta of shape (3,): 0.5 I + 1 1ᵀ
    >>> proximal_term(lam, torch.zeros(3), "here").term([torch.ones(3)], [torch.zeros(3)])
    tensor(5.2500)
    """

    diagonal: Any
    factor: Any


def evaluated(lam: Any) -> Any:
    """λ, or what it returns if it is a function (a module with parameters to be learned)."""
    return lam() if callable(lam) else lam


def proximal_term(lam: Any, theta: Any, where: str) -> ProximalTerm:
    """The pull of λ on each leaf of θ; λ may be given for whole branches of θ at once."""
    check_theta(theta, where)
    if isinstance(lam, LowRank):
        return ProximalTerm(
            _weights(lam.diagonal, theta, where), _factors(lam.factor, theta, where)
        )
    return ProximalTerm(_weights(lam, theta, where))


def check_theta(theta: Any, where: str) -> None:
    """Raise unless all leaves of θ are floating-point tensors."""
    for leaf in pytree.leaves(theta):
        if not (torch.is_tensor(leaf) and leaf.is_floating_point()):
            raise InvalidArgumentError(
                f"{where}: theta, the solver's first argument, must hold floating-point tensors "
                f"only; it holds {describe(leaf)}"
            )


def _weights(lam: Any, theta: Any, where: str) -> tuple[Tensor, ...]:
    if not pytree.leaves(lam):
        check_lam(lam, where)
    try:
        spread = optree.broadcast_prefix(lam, theta, namespace=pytree.NAMESPACE)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{where}: lam must be a number, a tensor, or a container in the form of theta: {error}"
        ) from None
    made: dict[Any, Tensor] = {}
    for distinct in {id(value): value for value in spread}.values():
        check_lam(distinct, where)

    def weight(value: Any, i: int, t: Tensor) -> Any:
        # one tensor for one λ, so that a λ for all of θ is seen to be one number
        if not torch.is_tensor(value):
            key: Any = (value, t.dtype, t.device)
            if key not in made:
                made[key] = torch.full((), value, dtype=t.dtype, device=t.device)
            value = made[key]
        elif value.device != t.device:
            value = made.setdefault((id(value), t.device), value.to(t.device))
        if value.dim() > t.dim() or any(
            a not in (1, b) for a, b in zip(reversed(value.shape), reversed(t.shape), strict=False)
        ):
            raise InvalidArgumentError(
                f"{where}: lam of shape {tuple(value.shape)} does not fit "
                f"{pytree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}"
            )
        return value

    return _for_each_leaf(weight, spread, theta)


def _factors(factor: Any, theta: Any, where: str) -> tuple[Tensor, ...]:
    if pytree.structure(factor) != pytree.structure(theta):
        raise InvalidArgumentError(
            f"{where}: the factor of a low-rank lam must have theta's form, "
            f"{pytree.structure(theta)}, got {pytree.structure(factor)}"
        )
    ranks = {u.shape[-1] for u in pytree.leaves(factor) if torch.is_tensor(u) and u.dim()}

    def part(u: Any, i: int, t: Tensor) -> Any:
        good = torch.is_tensor(u) and u.is_floating_point() and u.shape[:-1] == t.shape
        if not good or u.dim() != t.dim() + 1 or len(ranks) != 1:
            raise InvalidArgumentError(
                f"{where}: the factor of a low-rank lam must have one more dimension than "
                f"{pytree.names(theta, 'theta')[i]} of shape {tuple(t.shape)}, the same rank for "
                f"all tensors; got {describe(u)}"
            )
        if not bool(torch.isfinite(u).all()):
            raise InvalidArgumentError(f"{where}: the factor of lam holds NaN or Inf")
        return u

    return _for_each_leaf(part, pytree.leaves(factor), theta)


def _for_each_leaf(
    make: Callable[[Any, int, Tensor], Any], values: Sequence[Any], theta: Any
) -> tuple[Tensor, ...]:
    pairs = zip(values, pytree.leaves(theta), strict=True)
    return tuple(make(value, i, t) for i, (value, t) in enumerate(pairs))


def check_lam(lam: Any, where: str) -> None:
    """λ must be a positive finite number or a floating-point tensor of such."""
    if torch.is_tensor(lam) and is_wrapped(lam):
        return  # under a transform nothing is known of its values; the plain calls look at them
    if torch.is_tensor(lam) and lam.is_floating_point():
        good = bool((lam > 0).all()) and bool(torch.isfinite(lam).all())
        shown = "a tensor with other values" if lam.numel() != 1 else f"{lam.item():g}"
    elif is_number(lam):
        good, shown = 0 < lam < math.inf, f"{lam:g}"
    else:
        good, shown = False, describe(lam)
    if not good:
        raise InvalidArgumentError(
            f"{where}: lam must be a number or a floating-point tensor, finite and greater than 0, "
            f"got {shown}"
        )


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
        if not is_integer(rank, 0):
            raise InvalidArgumentError(f"LearnedLam(rank={rank!r}): expected an integer >= 0")
        leaves, self._tree = pytree.flatten(_container(theta), _is_variable)
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


def _container(theta: Any) -> Any:
    if isinstance(theta, nn.Module):
        return tuple(t for _, t in named_weights(theta))
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
