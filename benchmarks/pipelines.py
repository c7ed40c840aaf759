"""Which pipelines of learn2learn's examples and tests switch to implicit gradients by one line?

    python benchmarks/pipelines.py --out benchmarks/results

All 21 of MAML's kind, as shapes in miniature (`pipeline_shapes.py`), on random data and in float64;
nothing is fetched. Each runs as it is, and with its line changed. Compared are all losses, of the
adaptation and of the meta-iteration, to the bit; and the meta-gradient with the formula's, by dense
matrices (`pipeline_reference.py`), for which the library solves by `Exact()`. For scale: how far
first-order MAML's gradient is from the formula's. The cosine is that of the changed line as it
stands with the gradient of the pipeline as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pipeline_shapes as shapes
import torch
from pipeline_reference import ByHand, by_hand, by_hand_context, by_hand_update, flat
from pipeline_shapes import Outcome
from rich.console import Console
from tables import Row, write
from torch import Tensor, nn

import implicit_grad as ig

Shape = Callable[[Callable[..., Any]], Outcome]
Ours = Callable[..., Callable[..., Any]]  # options of the library → what takes the line's place


def one_line(**needed: Any) -> Ours:
    """`maml = ig.imaml(maml)`."""
    return lambda **options: partial(ig.imaml, **needed, **options)


ONE_LINE = one_line()


def learned_lam(**options: Any) -> Callable[[Any], Any]:
    """In the place of a class that learns its steps: a λ is learned for each weight."""

    def made(learner: Any) -> Any:
        model = learner.module
        return ig.imaml(model, lr=0.1, lam=_lam(model), **options)

    return made


def learned_by_hand(learner: Any) -> Any:
    """The same by hand."""
    return ByHand(learner.module, 0.1, lam=_lam(learner.module))


def _lam(model: nn.Module) -> ig.LearnedLam:
    return ig.LearnedLam(model, init=2.0, per="element")


def update(**options: Any) -> Callable[..., Any]:
    """In the place of `maml_update(policy, lr, gradients)`."""

    def step(policy: Any, lr: float, gradients: Any, loss: Any, first_order: bool) -> Any:
        return ig.imaml(policy, lr=lr, **options).adapt(loss, first_order=first_order).module

    return step


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A pipeline, its shape, what is changed in it and what to compare that with."""

    name: str
    built_on: str
    lines: str
    shape: Shape | None
    ours: Ours = ONE_LINE
    reference: Callable[..., Any] = by_hand
    same_steps: bool = True
    remark: str = ""


_MAML, _PATCH = "MAML", "maml_update"
_STEPS = (
    "what it learns of its steps has no implicit gradient: a λ for each weight is learned instead"
)
_FUNCTIONAL = "adapt(function) in the place of maml_update; the gradients taken before it can go"
PIPELINES = (
    Pipeline("examples/maml_sine", _MAML, "1", shapes.sines),
    Pipeline("examples/maml_toy", _MAML, "1", shapes.toy),
    Pipeline("examples/rl/maml_dice", _MAML, "1", shapes.dice),
    Pipeline(
        "examples/rl/promp",
        _MAML,
        "1",
        shapes.promp,
        one_line(keep_steps=True),
        remark="keep_steps=True: outer losses come from policy.density(states), not from a call",
    ),
    Pipeline(
        "examples/rl/dist_promp",
        _MAML,
        "1",
        shapes.distributed_promp,
        one_line(keep_steps=True),
        remark="likewise",
    ),
    Pipeline("examples/vision/anil_fc100", _MAML, "1", shapes.anil),
    Pipeline("examples/vision/distributed_maml", _MAML, "1", shapes.distributed),
    Pipeline("examples/vision/maml_miniimagenet", _MAML, "1", shapes.mini_imagenet),
    Pipeline("examples/vision/maml_omniglot", _MAML, "1", shapes.omniglot),
    Pipeline("examples/vision/meta_mnist", _MAML, "1", shapes.meta_mnist),
    Pipeline("examples/vision/lightning (maml)", "LightningMAML", "1", shapes.lightning_maml),
    Pipeline("examples/vision/lightning (anil)", "LightningANIL", "1", shapes.lightning_anil),
    Pipeline(
        "tests/integration/maml_miniimagenet",
        _MAML,
        "1",
        partial(shapes.mini_imagenet, divided=True),
    ),
    Pipeline("tests/integration/maml_omniglot", _MAML, "1", partial(shapes.omniglot, divided=True)),
    Pipeline(
        "examples/rl/maml_trpo",
        _PATCH,
        "1",
        shapes.trpo,
        lambda **options: lambda _: update(**options),
        lambda _: by_hand_update,
        remark=_FUNCTIONAL,
    ),
    Pipeline(
        "examples/rl/maml_trpo_metaworld",
        _PATCH,
        "1",
        shapes.trpo,
        lambda **options: lambda _: update(**options),
        lambda _: by_hand_update,
        remark="likewise",
    ),
    Pipeline(
        "examples/rl/metasgd_a2c",
        "MetaSGD",
        "1",
        shapes.meta_sgd,
        lambda **options: learned_lam(**options),
        learned_by_hand,
        same_steps=False,
        remark=_STEPS,
    ),
    Pipeline(
        "examples/vision/metacurvature_fc100",
        "GBML",
        "1",
        shapes.meta_curvature,
        lambda **options: learned_lam(**options),
        learned_by_hand,
        same_steps=False,
        remark="likewise",
    ),
    Pipeline(
        "examples/vision/maml++_miniimagenet",
        "a class of its own",
        "4",
        shapes.maml_plus_plus,
        remark="made in two places, and adapt is told the step in two: it learns a length for "
        "each, which has no implicit gradient",
    ),
    Pipeline(
        "examples/rl/cavia_trpo",
        "update_module",
        "1",
        shapes.cavia,
        lambda **options: lambda _: update(adapts="context", **options),
        lambda _: by_hand_context,
        remark="adapts=, the name of the tensor that adapts; the function's other lines can go",
    ),
    Pipeline(
        "examples/vision/anilkfo_cifarfs",
        "ParameterUpdate",
        "no",
        None,
        remark="it learns the transform of its steps, and adapts that too; a solution does not "
        "depend on it. What remains without is anil_fc100",
    ),
)


def run(shape: Shape, switch: Callable[..., Any]) -> Outcome:
    """One meta-iteration from the same random numbers."""
    torch.manual_seed(0)
    return shape(switch)


def gradient(outcome: Outcome) -> Tensor:
    """All that the meta-optimiser sees, as one vector."""
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in outcome.leaves)


def measure(pipeline: Pipeline) -> Row:
    """What came of it as it was, with its line changed, and by hand."""
    row: Row = {"pipeline": pipeline.name, "built on": pipeline.built_on, "lines": pipeline.lines}
    losses, error, first, cosine = "", "", "", ""
    if pipeline.shape is not None:
        before = run(pipeline.shape, lambda maml: maml)
        after = run(pipeline.shape, pipeline.ours())
        exact = run(pipeline.shape, pipeline.ours(linear_solver=ig.Exact()))
        expected = gradient(run(pipeline.shape, pipeline.reference))
        error = relative(gradient(exact), expected)
        if pipeline.reference is by_hand:
            first = relative(gradient(run(pipeline.shape, of_first_order)), expected)
        if pipeline.same_steps:
            count = before.inner or len(before.losses)
            same = before.losses[:count] == after.losses[:count] == exact.losses[:count]
            losses = f"{count} the same" if same else "differ"
            cosine = float(torch.cosine_similarity(gradient(before), gradient(after), dim=0))
    return row | {
        "losses": losses,
        "error": error,
        "first order's": first,
        "cosine": cosine,
        "remark": pipeline.remark,
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative error."""
    return float((found - expected).norm() / expected.norm())


def of_first_order(maml: Any) -> Any:
    """By hand, and by first order."""
    learner = by_hand(maml)
    for part in learner.modules():
        if isinstance(part, ByHand):
            part.first_order = True
    return learner


def measurements(pipelines: Iterable[Pipeline] = PIPELINES) -> list[Row]:
    """A row for each pipeline, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():  # of negative curvature: the solution is exact all the same
            warnings.simplefilter("ignore", ig.ImplicitGradWarning)
            return [measure(pipeline) for pipeline in pipelines]
    finally:
        torch.set_default_dtype(before)


def main(arguments: list[str] | None = None) -> None:
    """Measure, then a table and a CSV file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write(measurements(), options.out / "pipelines.csv", Console(width=140))


if __name__ == "__main__":
    main()
