"""Which operations of torch have right second and third derivatives, and which do not?

    python benchmarks/census.py --out benchmarks/results

Goes through torch's own lists of operations (OpInfo) and modules (ModuleInfo), in float64 on small
samples, and compares products with second and third derivatives to central differences of the
derivatives one order below: right, missing (torch says so), or wrong without a word. Where two
step sizes do not agree, or the derivative jumps, a sample sits at a kink and is left out. The lists
need the package expecttest. tests/_torch/test_own_backward.py and tests/_curvature/test_check.py
hold the library to the table that this writes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.parameter import is_lazy

Tensors = list[Tensor]
Scalar = Callable[[Tensors], Tensor]
SAMPLES, LARGEST, CLOSE, SEED = 12, 600, 1e-4, 7
ROUNDS = {"half", "bfloat16", "chalf"}  # to a precision in which differences say nothing
VERDICTS = ("right", "missing", "wrong", "undecided")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A scalar function of some tensors, at one point."""

    name: str
    function: Scalar
    inputs: Tensors


def operations() -> Iterator[Sample]:
    """Of OpInfo: those that torch differentiates in float64 at all."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if op.name in ROUNDS or not op.supports_autograd:
            continue
        if torch.float64 not in op.supported_dtypes("cpu"):
            continue
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        torch.manual_seed(SEED)
        for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):

            def call(args: Any, kwargs: Any, op: Any = op, sample: Any = sample) -> Any:
                returned = op.gradcheck_wrapper(op.op, *args, **kwargs)
                return sample.output_process_fn_grad(returned)

            yield from sampled(name, call, (sample.input, *sample.args), sample.kwargs)


def modules() -> Iterator[Sample]:
    """Of torch.nn, in training mode: functions of their inputs and their parameters."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        torch.manual_seed(SEED)
        cases = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
        )
        for case in cases:
            if case.forward_input is None:
                continue
            make, run = case.constructor_input, case.forward_input
            module = info.module_cls(*make.args, **make.kwargs).double().train()
            if any(map(is_lazy, module.parameters())):
                continue
            names = [n for n, p in module.named_parameters() if p.requires_grad]
            weights = [p for p in module.parameters() if p.requires_grad]

            def call(args: Any, kwargs: Any, module: Any = module, names: Any = names) -> Any:
                inputs, parameters = args
                given = dict(zip(names, parameters, strict=True))
                return torch.func.functional_call(module, given, inputs, kwargs)

            yield from sampled(info.name, call, (run.args, weights), run.kwargs)


def others() -> Iterator[Sample]:
    """What neither list has, and people use."""
    v, g = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind()
    args = (v.detach().requires_grad_(), g[:, :1].detach().requires_grad_(), 0)
    yield from sampled("_weight_norm", lambda args, _: torch._weight_norm(*args), args, {})


def sampled(name: str, call: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Iterator[Sample]:
    """The operation, followed by a smooth function of its outputs, where that can be had."""
    leaves, structure = optree.tree_flatten((args, kwargs), none_is_leaf=True)
    places = [
        i for i, x in enumerate(leaves) if torch.is_tensor(x) and x.requires_grad and x.numel()
    ]
    inputs = [leaves[i].detach().clone() for i in places]
    if not inputs or sum(x.numel() for x in inputs) > LARGEST or any(map(torch.is_complex, inputs)):
        return

    def function(xs: Tensors) -> Tensor:
        moved = list(leaves)
        for i, x in zip(places, xs, strict=True):
            moved[i] = x.clone()  # some operations work in place
        torch.manual_seed(SEED)
        args, kwargs = optree.tree_unflatten(structure, moved)
        total = torch.zeros((), dtype=torch.float64)
        for y in optree.tree_leaves(call(args, kwargs)):
            if not torch.is_tensor(y) or not y.requires_grad:
                continue
            y = (torch.view_as_real(y) if y.is_complex() else y).to_dense().double().flatten()
            weights = torch.cos(torch.arange(len(y), dtype=y.dtype))
            total = total + (weights * y + torch.sin(y + weights) / 3).sum()
        return total

    yield Sample(name, function, inputs)


def slope(function: Scalar, at: Tensors, graph: bool = False) -> Tensors:
    """Its gradient."""
    value = function(at)
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in at]
    found = grad(value, at, create_graph=graph, allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else g.to_dense() for g, x in zip(found, at, strict=True)
    ]


def along(function: Scalar, direction: Tensors) -> Scalar:
    """Its derivative along the direction, with a graph."""

    def derivative(at: Tensors) -> Tensor:
        products = zip(slope(function, at, graph=True), direction, strict=True)
        return torch.stack([(g * d).sum() for g, d in products]).sum()

    return derivative


def fresh(tensors: Sequence[Tensor]) -> Tensors:
    """Leaves of the same values."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def verdict(function: Scalar, inputs: Tensors, seed: int) -> str:
    """Whether ∇(dᵀ∇function) is what differences of ∇function along d say."""
    random = torch.Generator().manual_seed(seed)
    d = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in inputs]

    def difference(h: float) -> tuple[Tensor, Tensor]:
        behind, here, ahead = (
            flat(slope(function, fresh([x + s * h * w for x, w in zip(inputs, d, strict=True)])))
            for s in (-1, 0, 1)
        )
        return (ahead - behind) / (2 * h), (ahead + behind - 2 * here) / (2 * h)

    (coarse, _), (fine, jump) = difference(2e-6), difference(1e-6)
    size = fine.norm() + slope_size(function, inputs) * 1e-3 + 1e-9
    if not max((coarse - fine).norm(), jump.norm()) <= CLOSE / 4 * size:
        return "undecided"
    try:
        product = flat(slope(along(function, d), fresh(inputs)))
    except (RuntimeError, NotImplementedError):
        return "missing"
    return "right" if (product - fine).norm() <= CLOSE * size else "wrong"


def slope_size(function: Scalar, inputs: Tensors) -> float:
    return float(flat(slope(function, fresh(inputs))).norm())


def orders(sample: Sample) -> tuple[str, str]:
    """The verdicts on its second and its third derivative."""
    try:
        second = verdict(sample.function, sample.inputs, 1)
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError):
        return "undecided", "undecided"  # no first derivative here
    if second != "right":
        return second, "undecided"
    random = torch.Generator().manual_seed(2)
    d = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in sample.inputs]
    try:
        return second, verdict(along(sample.function, d), sample.inputs, 3)
    except (RuntimeError, NotImplementedError):
        return second, "missing"


def worst(verdicts: Sequence[str]) -> str:
    """Of all samples of one operation."""
    return next((v for v in ("wrong", "missing", "right") if v in verdicts), "undecided")


def census() -> dict[str, tuple[str, str]]:
    """Second and third derivative of each operation and module."""
    found: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for samples in (operations(), modules(), others()):
        for sample in samples:
            if len(found[sample.name]) < SAMPLES:
                found[sample.name].append(orders(sample))
    return {n: (worst([a for a, _ in v]), worst([b for _, b in v])) for n, v in found.items()}


def table(found: dict[str, tuple[str, str]]) -> str:
    """Counts, and the operations that are not right, in Markdown."""
    lines = [
        f"# Derivatives of torch {torch.__version__.split('+')[0]}'s operations (float64, CPU)",
        "",
        "Made by `benchmarks/census.py`: derivatives against differences of those one order",
        "below, on small samples, of which the worst counts. Missing: torch raises an error.",
        "Wrong: it says nothing, and returns another number. Undecided: nothing to compare with,",
        "as at a kink. The list is of what is missing or wrong.",
        "",
        "| derivative | " + " | ".join(VERDICTS) + " |",
        "|---|" + "--:|" * len(VERDICTS),
    ]
    for order, name in enumerate(("second", "third")):
        counts = collections.Counter(v[order] for v in found.values())
        lines.append(f"| {name} | " + " | ".join(str(counts[v]) for v in VERDICTS) + " |")
    lines += ["", "| operation | second | third |", "|---|---|---|"]
    for name, verdicts in sorted(found.items()):
        if {"wrong", "missing"} & set(verdicts):
            cells = (v if v in ("right", "wrong", "missing") else "" for v in verdicts)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for census.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    text = table(census())
    print(text)
    if options.out is not None:
        (options.out / "census.md").write_text(text)


if __name__ == "__main__":
    main()
