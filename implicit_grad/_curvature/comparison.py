"""Whether a derivative is what differences say, by a test that knows its own errors.

With f⁺ and f⁻ the values at ±t along a line, (f⁺ − f⁻)/2t is off by rounding, as 1/t, by
truncation, as t², and by kinks in between, which no two steps meet alike. So a derivative is
believed as soon as one step confirms it. It is taken for wrong only where three steps, a factor of
4 apart, agree with each other ten times better than with it, and where what a kink, or a function
that has changed, would leave in (f⁺ + f⁻ − 2f)/2t is as small. (A curve leaves something, too, but
that falls as t does, and is extrapolated away.) And only by elements of which as much is claimed
within the finest step: f may bend in less than that, as √(φ² + 1e-12) does at 0. (Unless what is
claimed for φ is not so beside it: |φ|² by torch's word bends at 0 in no time.) Between the two,
nothing is said.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from implicit_grad._torch.pytree import Tensors, inner, length

_FACTOR = 4.0
_POWERS = (0, 1, -1, 2, -2)  # of it, for steps in the order in which they are tried
_TIMES = 10.0  # how much better steps have to agree with each other
_BESIDE = 2.0  # roundings: hardly nearer could φ be moved
_ROUNDINGS = 30.0  # a gradient may be off by so many roundings


@dataclasses.dataclass(frozen=True)
class _Difference:
    """(f⁺ − f⁻)/2t, (f⁺ + f⁻ − 2f)/2t, and how far rounding may take the first, for each block."""

    slope: Tensors
    bend: Tensors
    rounding: list[float]


def is_wrong(
    at: Callable[[float], Tensors],
    here: Tensors,
    claimed: Tensors,
    eps: float,
    claimed_at: Callable[[float], Tensors] | None = None,
) -> list[bool]:
    """Of which blocks of `at` the derivative at 0 is certainly not the claimed one.

    All blocks are in comparable units; `here` is at(0) as it was when the derivative was recorded.
    `claimed_at`, if it is known, is what is claimed for other places than 0.
    """
    found: dict[int, _Difference] = {}
    for power in _POWERS:
        found[power] = _difference(at, here, eps ** (1 / 3) * _FACTOR**power, eps)
        off = _off(found[power], claimed, eps)
        if not any(off):
            return off
    wrong = _certain(found, claimed, eps)
    if claimed_at is None or not any(wrong):
        return wrong
    finest = min(_POWERS)
    there, beside = claimed_at(eps ** (1 / 3) * _FACTOR**finest), claimed_at(_BESIDE * eps)
    blocks = zip(claimed, found[finest].slope, there, beside, strict=True)
    kept = [
        ~((4 * (a - c).abs() > (d - c).abs()) & (2 * (b - c).abs() < (a - c).abs()))
        for c, d, a, b in blocks
    ]
    lost = _ROUNDINGS * eps * length(claimed)
    left = {power: _only(difference, kept, lost) for power, difference in found.items()}
    return _certain(left, _kept(claimed, kept), eps)


def _certain(found: dict[int, _Difference], claimed: Tensors, eps: float) -> list[bool]:
    """Which blocks are off, by three steps that agree."""
    wrong = [False] * len(claimed)
    for middle in (0, 1, -1):
        three = [found[middle + k] for k in (-1, 0, 1)]
        off = _off(three[1], claimed, eps)
        wrong = [
            w or (o and s) for w, o, s in zip(wrong, off, _steady(three, claimed), strict=True)
        ]
    return wrong


def _only(found: _Difference, kept: Sequence[Tensor], lost: float) -> _Difference:
    """Differences of the elements that are kept, of which so much is lost beside the others."""
    slope, bend = _kept(found.slope, kept), _kept(found.bend, kept)
    return _Difference(slope, bend, [r + lost for r in found.rounding])


def _kept(blocks: Tensors, kept: Sequence[Tensor]) -> Tensors:
    """The blocks, with 0 in the other elements."""
    return tuple(b.where(k, torch.zeros_like(b)) for b, k in zip(blocks, kept, strict=True))


def _difference(
    at: Callable[[float], Tensors], here: Tensors, step: float, eps: float
) -> _Difference:
    ahead, behind = at(step), at(-step)
    triples = list(zip(ahead, behind, here, strict=True))
    return _Difference(
        tuple((a - b) / (2 * step) for a, b, _ in triples),
        tuple((a + b - 2 * f) / (2 * step) for a, b, f in triples),
        [_ROUNDINGS * eps * _size(a) / step for a, _, _ in triples],
    )


def _off(found: _Difference, claimed: Tensors, eps: float) -> list[bool]:
    """Which blocks are farther from what is claimed than precision alone explains."""
    relative, absolute = 2 * eps ** (1 / 3), 3 * eps**0.5
    total = max(length(found.slope), length(claimed))
    return [
        not _size(d - c) <= relative * max(_size(d), _size(c)) + absolute * total + rounding
        for d, c, rounding in zip(found.slope, claimed, found.rounding, strict=True)
    ]


def _steady(three: Sequence[_Difference], claimed: Tensors) -> Iterator[bool]:
    """In which blocks the steps agree with each other, and not with what is claimed."""
    for i, c in enumerate(claimed):
        slopes = [found.slope[i] for found in three]
        if not bool(torch.isfinite(c).all()):
            c = torch.zeros_like(c)  # where differences are steady, there is a derivative
        errors = [_size(d - c) for d in slopes]
        spread = [_size(slopes[j] - slopes[k]) for j, k in ((0, 1), (1, 2), (0, 2))]
        kinks = [_size(_FACTOR * near.bend[i] - far.bend[i]) for near, far in pairwise(three)]
        noise = [*spread, *(kink / (_FACTOR - 1) for kink in kinks)]
        yield all(_TIMES * n < e for n in noise for e in errors)  # never so where one is NaN


def _size(tensor: Tensor) -> float:
    return length([tensor])


def changes_unseen(
    at: Callable[[float], Tensors],
    here: Tensors,
    claimed: Callable[[Tensors], float],
    eps: float,
    claimed_at: Callable[[Tensors, float], float] | None = None,
) -> bool:
    """Whether uᵀ(derivative of `at`) is certainly not claimed(u), for one u near that derivative.

    A random part keeps u from being blind to what is claimed beyond the derivative. Where nothing
    can be said, the elements that jump near 0 may be why, and it is tried without them.
    """
    at, step = functools.cache(at), eps ** (1 / 3)
    change = _difference(at, here, step, eps).slope
    u = tuple(map(torch.add, change, direction(change)))
    seen = _is_seen_along(u, at, here, claimed, eps, claimed_at)
    if seen is None:
        steady = _steady_elements(at, here, eps)
        if not all(bool(kept.all()) for kept in steady):
            seen = _is_seen_along(_kept(u, steady), at, here, claimed, eps, claimed_at)
    return seen is False


def _is_seen_along(
    u: Tensors,
    at: Callable[[float], Tensors],
    here: Tensors,
    claimed: Callable[[Tensors], float],
    eps: float,
    claimed_at: Callable[[Tensors, float], float] | None,
) -> bool | None:
    """Whether uᵀ(derivative of `at`) is claimed(u); None where nothing can be said."""
    size = length(u)
    if size == 0:
        return None
    u = tuple(x / size for x in u)

    def number(value: float) -> Tensors:
        return (torch.tensor(value, dtype=torch.float64),)

    def along(t: float) -> Tensors:
        return number(inner(at(t), u))

    def elsewhere(t: float) -> Tensors:
        assert claimed_at is not None
        return number(claimed_at(u, t))

    one, said = number(inner(here, u)), number(claimed(u))
    if not any(_off(_difference(along, one, eps ** (1 / 3), eps), said, eps)):
        return True
    known = None if claimed_at is None else elsewhere
    return False if any(is_wrong(along, one, said, eps, known)) else None


def _steady_elements(
    at: Callable[[float], Tensors], here: Tensors, eps: float
) -> tuple[Tensor, ...]:
    """The elements of whose derivative steps a factor of 4 apart say nearly the same."""
    steps = [eps ** (1 / 3) * _FACTOR**power for power in (-1, 0, 1)]
    slopes = zip(*(_difference(at, here, step, eps).slope for step in steps), strict=True)
    return tuple(
        _TIMES * ((a - b).abs() + (b - c).abs()) <= a.abs().maximum(c.abs()) for a, b, c in slopes
    )


def units(tensors: Tensors) -> list[float]:
    """The root mean square of each; of all, where it is zero."""
    count = max(1, sum(t.numel() for t in tensors))
    all_of_them = length(tensors) / count**0.5
    return [_size(t) / max(1, t.numel()) ** 0.5 or all_of_them or 1.0 for t in tensors]


def direction(tensors: Tensors) -> Tensors:
    """A fixed random direction, as large as the tensors are."""
    random = torch.Generator().manual_seed(0)
    return tuple(
        (torch.randn(t.shape, generator=random) * unit).to(t.device, t.dtype)
        for t, unit in zip(tensors, units(tensors), strict=True)
    )
