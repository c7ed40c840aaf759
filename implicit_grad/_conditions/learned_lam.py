"""A λ that is learned: a module whose λ is positive, and stays in a range around its start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from implicit_grad._conditions.lam import LowRank, check_lam
from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._options import check_one_of, check_value, is_integer, is_number
from implicit_grad._torch import pytree
from implicit_grad._torch.modules import named_weights
from implicit_grad._torch.transforms import is_transformed
from implicit_grad._warnings import warn

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
    its gradient takes it. The first time that a λ comes to an end of its range, an
    `ImplicitGradWarning` says so.

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
        factors = list(self.factor)
        if factors:
            _shorten(factors, math.sqrt(self.init * self.within))
        self._look()
        diagonal = self._tree.rebuild(weights * self._size if self.per == "model" else weights)
        return LowRank(diagonal, self._tree.rebuild(factors)) if factors else diagonal

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return f"per={self.per!r}, rank={self.rank}, within={self.within:g}"

    def _look(self) -> None:
        """Tell of what has come to an end of its range, with one look at the device."""
        if is_transformed(self.parameters()):
            return
        before, self._seen = self._seen, pytree.versions(list(self.parameters()))
        if before == self._seen:
            return
        told = {n: v for n, v in self._at_ends().items() if n not in self._told}
        if not told:
            return
        self._told.update(told)
        listed = [f"{name}: {value:.3g}" for name, value in list(told.items())[:_LISTED]]
        more = f" and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
        said = (
            f"LearnedLam: lam has come to an end of its range, {self.init / self.within:.3g} to "
            f"{self.init * self.within:.3g} (init={self.init:g}, within={self.within:g}), and "
            "stays there for as long as its gradient points outward. It is that of "
            f"{', '.join(listed)}{more}. If the outer loss "
            "hardly depends on it, that gradient is noise: learn at a lower rate, or one lam "
            'per="model"; else choose another init or a greater within'
        )
        warn(said, anchor="lam-at-an-end")

    @torch.no_grad()
    def _at_ends(self) -> dict[str, float]:
        """λ by name, for those of which an element is at an end."""
        named = zip(self._names, self.log_lam, strict=True)
        spans = {n: torch.stack(torch.aminmax(r)).double().exp() for n, r in named if r.numel()}
        if self.rank:  # has no least size
            trace = pytree.norm(list(self.factor)).square()
            spans["the trace of U Uᵀ"] = torch.stack([trace.clamp(min=self.init), trace])
        together = [span.to(next(iter(spans.values())).device) for span in spans.values()]
        values = torch.stack(together).tolist() if together else []
        least, most, near = self.init / self.within, self.init * self.within, 1 + self._nearness
        found = {}
        for name, (low, high) in zip(spans, values, strict=True):
            if high * near >= most:
                found[name] = min(high, most)
            elif low <= least * near:
                found[name] = max(low, least)
        return found

    @property
    def _nearness(self) -> float:
        """How near to an end is at the end, relative: at least what rounding makes of ρ there."""
        coarsest = max(torch.finfo(p.dtype).eps for p in self.parameters())
        return max(_NEAR, coarsest * (abs(math.log(self.init)) + math.log(self.within)))


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
    for u in data:
        u.mul_((longest / size).clamp(max=1).to(u))


def _one_number(init: Any) -> float:
    check_lam(init, "LearnedLam")
    if not torch.is_tensor(init):
        return float(init)
    if init.numel() != 1:
        raise InvalidArgumentError(f"LearnedLam: init must be one number, got {describe(init)}")
    return float(init)


def _check_options(per: Any, rank: Any, within: Any) -> None:
    check_one_of("LearnedLam", "per", per, get_args(Per))
    check_value("LearnedLam", "rank", rank, is_integer(rank, 0), "an integer >= 0")
    good = is_number(within) and 1 < within < math.inf
    check_value("LearnedLam", "within", within, good, "a finite number > 1")


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
