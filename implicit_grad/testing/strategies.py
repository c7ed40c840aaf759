"""Hypothesis strategies: what implicit gradients are made of, in forms that shrink and read well.

Numbers are drawn by a seed, never one by one: an example that fails shrinks to small sizes, seed 0
and round spectra.

    from hypothesis import given, settings
    from implicit_grad.testing import strategies as draw

    @settings(deadline=None)
    @given(draw.problems())
    def test_all_problems(problem):
        check_implicit(my_implicit(problem.solver, problem.condition), problem.args)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from implicit_grad.testing.problems import (
    FAMILIES,
    Family,
    InnerProblem,
    Kind,
    Network,
    SpectralMatrix,
    Task,
    normal,
)

Nesting = Literal["tensor", "list", "tuple", "dict"]
NESTINGS: tuple[Nesting, ...] = ("tensor", "list", "tuple", "dict")
Problem, Operator = InnerProblem, SpectralMatrix  # their names before
__all__ = [
    "InnerProblem",
    "Network",
    "SpectralMatrix",
    "Task",
    "networks",
    "operators",
    "positive",
    "problems",
    "seeds",
    "shapes",
    "spectra",
    "tasks",
    "tensors",
    "trees",
]


def seeds() -> st.SearchStrategy[int]:
    """Seeds; 0 is the simplest."""
    return st.integers(0, 2**16)


def shapes(
    max_dims: int = 2, max_side: int = 3, min_side: int = 1
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of tensors, `()` the simplest.

    Args:
        max_dims: the most dimensions.
        max_side: the greatest size of one.
        min_side: the least; 0 lets tensors be empty.
    """
    return st.lists(st.integers(min_side, max_side), max_size=max_dims).map(tuple)


def tensors(
    *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> st.SearchStrategy[Tensor]:
    """Normal numbers of one shape, requiring grad.

    Args:
        shape: as `torch.randn` takes it.
        dtype: of the tensor.
        scale: their standard deviation.
    """
    return seeds().map(
        lambda seed: (scale * normal(*shape, seed=seed, dtype=dtype)).requires_grad_()
    )


def positive(
    least: float = 0.1, greatest: float = 10.0, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[Tensor]:
    """A positive number in a tensor of shape () that requires grad, such as a λ.

    Args:
        least, greatest: ends of its range, in which it is spread evenly by its logarithm.
        dtype: of floating point.
    """
    return _logarithmic(least, greatest).map(
        lambda x: torch.tensor(x, dtype=dtype).requires_grad_()
    )


@st.composite
def trees(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    nestings: Sequence[Nesting] = NESTINGS,
    max_parts: int = 3,
    max_dims: int = 2,
    max_side: int = 3,
    depth: int = 2,
) -> Any:
    """Containers of tensors that require grad; one number is the simplest.

    Args:
        dtypes: of which each tensor has one.
        nestings: of "tensor", "list", "tuple" and "dict", what there may be at any depth.
        max_parts: the most entries of a container.
        max_dims, max_side: as for `shapes`.
        depth: the most containers within each other.
    """
    nesting: Nesting = draw(st.sampled_from(list(nestings))) if depth else "tensor"
    if nesting == "tensor":
        dtype, shape = draw(st.sampled_from(list(dtypes))), draw(shapes(max_dims, max_side))
        return normal(*shape, seed=draw(seeds()), dtype=dtype).requires_grad_()
    smaller = trees(dtypes, nestings, max_parts, max_dims, max_side, depth - 1)
    parts = draw(st.lists(smaller, min_size=1, max_size=max_parts))
    if nesting == "dict":
        return {"abcdefgh"[k % 8] * (1 + k // 8): part for k, part in enumerate(parts)}
    return tuple(parts) if nesting == "tuple" else parts


@st.composite
def spectra(
    draw: st.DrawFn,
    kind: Kind = "definite",
    sizes: st.SearchStrategy[int] | None = None,
    condition_number: float = 10.0,
) -> tuple[float, ...]:
    """Eigenvalues between 1 and `condition_number` in size.

    Args:
        kind: "definite", "indefinite" (of both signs, where there are two) or "nonsymmetric"
            (positive).
        sizes: a strategy of how many; by default 1 to 4.
        condition_number: the greatest size, at least 1.
    """
    size = draw(st.integers(1, 4) if sizes is None else sizes)
    values = draw(st.lists(_logarithmic(1.0, condition_number), min_size=size, max_size=size))
    if kind == "indefinite":
        negative = draw(st.integers(1, max(size - 1, 1)))
        values = [-x if k < negative else x for k, x in enumerate(values)]
    return tuple(values)


@st.composite
def operators(
    draw: st.DrawFn,
    kind: Kind = "definite",
    sizes: st.SearchStrategy[int] | None = None,
    condition_number: float = 10.0,
    dtype: torch.dtype = torch.float64,
) -> SpectralMatrix:
    """Matrices with a drawn spectrum: a diagonal one is the simplest.

    Args:
        kind, sizes, condition_number: as for `spectra`; "nonsymmetric" ones have at least 2 rows.
        dtype: of the matrix.
    """
    if kind == "nonsymmetric" and sizes is None:
        sizes = st.integers(2, 4)  # one number is symmetric
    spectrum = draw(spectra(kind, sizes, condition_number))
    skew = draw(st.sampled_from([1.0, 0.5, 2.0])) if kind == "nonsymmetric" else 0.0
    return SpectralMatrix(spectrum, draw(seeds()), skew, dtype)


@st.composite
def problems(
    draw: st.DrawFn,
    families: Sequence[Family] = FAMILIES,
    sizes: st.SearchStrategy[int] | None = None,
    condition_number: float = 10.0,
    dtype: torch.dtype = torch.float64,
) -> InnerProblem:
    """Inner problems with exact solutions and hypergradients; the objectives are convex.

    Args:
        families: of which each problem is one: see `InnerProblem`.
        sizes, condition_number, dtype: of its matrix, as for `operators`.
    """
    family = draw(st.sampled_from(list(families)))
    general = family in ("root", "fixed_point") and draw(st.booleans())
    kind: Kind = "nonsymmetric" if general else "definite"
    operator = draw(operators(kind, sizes, condition_number, dtype))
    lam = draw(st.sampled_from([1.0, 0.1, 0.5, 2.0, 10.0]))
    form: Literal["vector", "dict"] = draw(st.sampled_from(["vector", "dict"]))
    return InnerProblem(family, operator, draw(seeds()), lam, form)


def tasks(
    max_ways: int = 4, max_shots: int = 3, max_features: int = 4, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[Task]:
    """Few-shot tasks; the simplest has two classes and one example of each.

    Args:
        max_ways: the most classes, at least 2.
        max_shots: the most examples of a class, to adapt on and to test on.
        max_features: the most inputs.
        dtype: of the inputs.
    """
    few = functools.partial(st.integers, 1)
    return st.builds(
        Task,
        ways=st.integers(2, max_ways),
        shots=few(max_shots),
        queries=few(max_shots),
        features=few(max_features),
        seed=seeds(),
        dtype=st.just(dtype),
    )


def networks(
    inputs: int | None = None,
    outputs: int | None = None,
    max_layers: int = 3,
    max_width: int = 4,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Network]:
    """Small smooth networks; the simplest is one linear layer.

    Args:
        inputs, outputs: how many; None: drawn, at most `max_width`.
        max_layers: the most linear layers.
        max_width: the most units of a hidden layer.
        dtype: of the weights.
    """
    width = st.integers(1, max_width)
    hidden = st.lists(width, max_size=max_layers - 1)
    ends = [width if n is None else st.just(n) for n in (inputs, outputs)]
    widths = st.tuples(ends[0], hidden, ends[1]).map(lambda w: (w[0], *w[1], w[2]))
    return st.builds(
        Network,
        widths=widths,
        activation=st.sampled_from(["tanh", "softplus", "sigmoid"]),
        bias=st.booleans(),
        seed=seeds(),
        dtype=st.just(dtype),
    )


def _logarithmic(least: float, greatest: float) -> st.SearchStrategy[float]:
    """Numbers in a range, evenly by their logarithm, of three digits; the least is simplest."""
    steps = max(1, round(16 * math.log10(greatest / least)))
    return st.integers(0, steps).map(
        lambda k: float(f"{least * (greatest / least) ** (k / steps):.3g}")
    )
