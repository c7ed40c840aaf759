"""A λ that is learned: a module whose λ is positive, and stays in a range around its start."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from implicit_grad._conditions.lam import LowRank, check_lam
from implicit_grad._errors import ImplicitGradWarning, InvalidArgumentError, describe
from implicit_grad._options import is_integer, is_number
from implicit_grad._torch import pytree
from implicit_grad._torch.modules import named_weights
from implicit_grad._torch.transforms import is_transformed

Per = Literal["model", "tensor", "element"]
# λ is at an end of its range if it is so near to it, relative; and no more than so many are listed.
_NEAR = 1e-2
_LISTED = 4


class LearnedLam(nn.Module):
    """A λ for `imaml` or `proximal` that is learned: λ = exp(ρ), or diag(exp(ρ)) + U Uᵀ.

    The parameters are ρ, the logarithms, and U: any step of an optimiser leaves λ positive, and a
    step in ρ is a relative one in λ. Pass the module itself as `lam`, and its parameters to the
    outer optimiser (`imaml` shows them among its own); λ is computed anew at each call.

    λ stays between init/within and init·within: each call first puts a ρ that a step has taken out
    of this range back to its end, and U likewise to a trace of U Uᵀ of at most init·within (the
    projected gradient method). So gradients are those of exp(ρ) everywhere, and lead back from an
    end. Without this, the λ of a bias that the outer loss hardly sees goes wherever the noise of
    its gradient takes it. That a λ has come to an end is an `ImplicitGradWarning`, once for each.

    Args:
        theta: what λ holds φ near to: a module, a tensor or a container of tensors.
        init: λ at the start, a number > 0.
        per: one ρ for the "model", for each "tensor" (a layer's weights or bias), or "element".
        rank: columns of U; 0 leaves U away. They start at random, because at U = 0 there is no
            gradient, and small: U Uᵀ has the trace `init`.
        seed: of these random numbers.
        within: the factor > 1 by which λ may become greater or less than init.

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
        within: float = 1e3,
    ) -> None:
        super().__init__()
        init = _one_number(init)
        _check_options(per, rank, within)
        container = _container(theta)
        leaves, self._tree = pytree.flatten(container, _is_variable)
        if not leaves:
            raise InvalidArgumentError("LearnedLam: theta holds no floating-point tensors")
        like = leaves[:1] if per == "model" else leaves
        self.per, self.rank, self._size = per, rank, len(leaves)
        self.init, self.within = init, float(within)
        self._names = ["all"] if per == "model" else _names(theta, container, leaves)
        self.log_lam = nn.ParameterList(
            torch.full_like(t.detach(), math.log(init))
            if per == "element"
            else torch.full((), math.log(init), dtype=t.dtype, device=t.device)
            for t in like
        )
        self.factor = nn.ParameterList(_directions(leaves, rank, init, seed) if rank else [])
        self._seen: list[int] = []  # the versions of ρ that were looked at
        self._told: set[str] = set()

    def forward(self) -> Any:
        """λ in the form of θ (for a module: of the tuple of its parameters)."""
        weights = [_projected(rho, self.init, self.within).exp() for rho in self.log_lam]
        self._look()
        diagonal = self._tree.rebuild(weights * self._size if self.per == "model" else weights)
        if not self.rank:
            return diagonal
        factors = list(self.factor)
        _shorten(factors, math.sqrt(self.init * self.within))
        return LowRank(diagonal, self._tree.rebuild(factors))

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return f"per={self.per!r}, rank={self.rank}, within={self.within:g}"

    def _look(self) -> None:
        """Tell of what has come to an end of its range, with one look at the device."""
        if is_transformed(self.log_lam):
            return
        before, self._seen = self._seen, pytree.versions(list(self.log_lam))
        if before == self._seen:
            return
        told = {n: v for n, v in self._at_ends().items() if n not in self._told}
        if not told:
            return
        self._told.update(told)
        listed = [f"{name}: {value:.3g}" for name, value in list(told.items())[:_LISTED]]
        more = f" and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
        warnings.warn(
            f"LearnedLam: lam has come to an end of its range, {self.init / self.within:.3g} to "
            f"{self.init * self.within:.3g} (init={self.init:g}, within={self.within:g}), and "
            "stays there for as long as its gradient points outward. It is that of "
            f"{', '.join(listed)}{more}. If the outer loss "
            "hardly depends on it, that gradient is noise: learn at a lower rate, or one lam "
            'per="model"; else choose another init or a greater within',
            ImplicitGradWarning,
            stacklevel=2,
        )

    @torch.no_grad()
    def _at_ends(self) -> dict[str, float]:
        """λ by name, for those of which an element is at an end."""
        named = [(n, rho) for n, rho in zip(self._names, self.log_lam, strict=True) if rho.numel()]
        ends = [end.double().exp() for _, rho in named for end in torch.aminmax(rho)]
        values = torch.stack([end.to(ends[0].device) for end in ends]).tolist() if ends else []
        found = {}
        for (name, rho), low, high in zip(named, values[::2], values[1::2], strict=True):
            near = 1 + max(_NEAR, self._rounding(rho.dtype))
            least, most = self.init / self.within, self.init * self.within
            if high * near >= most:
                found[name] = min(high, most)
            elif low <= least * near:
                found[name] = max(low, least)
        return found

    def _rounding(self, dtype: torch.dtype) -> float:
        """The relative error of λ at the ends, where ρ is rounded."""
        return torch.finfo(dtype).eps * (abs(math.log(self.init)) + math.log(self.within))


def _projected(rho: Tensor, init: float, within: float) -> Tensor:
    """ρ in its range: a parameter itself is put there, anything else is cut off, with gradient 0.

    What has been computed from a parameter, to be differentiated, is not in the way of that (hence
    `data`): in the range nothing changes, and outside the projected step is the step.
    """
    least, most = math.log(init) - math.log(within), math.log(init) + math.log(within)
    if not rho.is_leaf or is_transformed([rho]):
        return rho.clamp(least, most)
    rho.data.clamp_(least, most)
    return rho


def _shorten(factors: Sequence[Tensor], longest: float) -> None:
    """Parameters put where ‖U‖ is at most this; what was computed by a transform stays."""
    if not all(u.is_leaf for u in factors) or is_transformed(factors):
        return
    data = [u.data.clamp_(-longest, longest) for u in factors]  # so that no square overflows
    size = pytree.norm(data)
    torch._foreach_mul_(data, [(longest / size).clamp(max=1).to(u) for u in data])


def _one_number(init: Any) -> float:
    check_lam(init, "LearnedLam")
    if not torch.is_tensor(init):
        return float(init)
    if init.numel() != 1:
        raise InvalidArgumentError(f"LearnedLam: init must be one number, got {describe(init)}")
    return float(init)


def _check_options(per: Any, rank: Any, within: Any) -> None:
    if per not in ("model", "tensor", "element"):
        raise InvalidArgumentError(
            f'LearnedLam(per={per!r}): expected "model", "tensor" or "element"'
        )
    if not is_integer(rank, 0):
        raise InvalidArgumentError(f"LearnedLam(rank={rank!r}): expected an integer >= 0")
    if not (is_number(within) and 1 < within < math.inf):
        raise InvalidArgumentError(f"LearnedLam(within={within!r}): expected a finite number > 1")


def _container(theta: Any) -> Any:
    if isinstance(theta, nn.Module):
        return tuple(t for _, t in named_weights(theta))
    return tuple(theta) if isinstance(theta, Iterator) else theta  # such as module.parameters()


def _names(theta: Any, container: Any, leaves: Sequence[Tensor]) -> list[str]:
    """The names of distinct tensors, as the user knows them."""
    if isinstance(theta, nn.Module):
        names = [name for name, _ in named_weights(theta)]
    else:
        names = pytree.names(container, "theta")
    found = {id(t): name for t, name in zip(pytree.leaves(container), names, strict=True)}
    return [found[id(t)] for t in leaves]


def _is_variable(leaf: Any) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point()


def _directions(leaves: Sequence[Tensor], rank: int, init: float, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*t.shape, rank, generator=random) for t in leaves]
    length = math.sqrt(sum(float(part.square().sum()) for part in parts))
    return [
        (part * (math.sqrt(init) / length)).to(t) for part, t in zip(parts, leaves, strict=True)
    ]
