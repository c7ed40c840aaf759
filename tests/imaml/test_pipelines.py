"""learn2learn's pipelines of MAML's kind, in miniature: switched, or refused with a reason."""

from typing import Any

import learn2learn as l2l
import pytest
import torch
from torch import nn

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture
def pipelines(benchmarks_on_path: None) -> Any:
    """The script."""
    import pipelines

    return pipelines


def test_all_21_are_there_and_19_of_them_switch_by_one_line(pipelines: Any) -> None:
    lines = {p.name: p.lines for p in pipelines.PIPELINES}
    assert len(lines) == len(pipelines.PIPELINES) == 21
    assert sum(count == "1" for count in lines.values()) == 19
    on_maml = [p.lines for p in pipelines.PIPELINES if "MAML" in p.built_on or "ANIL" in p.built_on]
    assert on_maml == ["1"] * 14
    assert all(p.remark for p in pipelines.PIPELINES if p.lines != "1")


@pytest.mark.parametrize("index", range(21))
def test_it_adapts_as_before_and_has_the_formulas_gradient(index: int, pipelines: Any) -> None:
    pipeline = pipelines.PIPELINES[index]
    if pipeline.name == "examples/rl/maml_trpo_metaworld":  # the same, in another world
        assert pipeline.shape is pipelines.shapes.trpo
        return
    row = pipelines.measurements([pipeline])[0]
    if pipeline.shape is None:
        assert row["lines"] == "no" and row["error"] == ""
        return
    assert row["error"] < 1e-12
    if pipeline.same_steps:
        assert row["losses"].endswith("the same")
        # but for steps of 0.5 that overshoot batch norm's curvature: there nothing is near MAML's
        assert row["cosine"] > 0.8 or "maml_omniglot" in pipeline.name
    if pipeline.reference is pipelines.by_hand and pipeline.name != "examples/maml_toy":
        assert row["first order's"] > 1e-3  # so that the comparison says something


def test_promp_is_told_which_option_it_needs(pipelines: Any) -> None:
    with pytest.raises(ig.GraphError, match="keep_steps=True"):
        pipelines.run(pipelines.shapes.promp, ig.imaml)


def test_maml_plus_plus_has_first_order_epochs(pipelines: Any) -> None:
    def shape(switch: Any) -> Any:
        return pipelines.shapes.maml_plus_plus(switch, first_order=True)

    before, after = (pipelines.run(shape, switch) for switch in (lambda m: m, ig.imaml))
    assert before.losses == after.losses
    assert pipelines.relative(*map(pipelines.gradient, (after, before))) < 1e-14


class MAMLpp(nn.Module):
    """What MAML++'s own class looks like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.lr, self.first_order = module, 0.1, False
        self.allow_unused = self.allow_nograd = False
        self.lrs = nn.ParameterDict({"weight": torch.ones(3)})

    def clone(self) -> "MAMLpp":
        return self

    def adapt(self, loss: torch.Tensor, step: int) -> None:
        pass


def test_what_learns_its_steps_is_refused_with_the_line_that_takes_its_place() -> None:
    model, algorithms = nn.Linear(2, 1), l2l.algorithms
    transform = l2l.optim.MetaCurvatureTransform
    learners = algorithms.MetaSGD(model), algorithms.GBML(model, transform=transform), MAMLpp(model)
    for learner in learners:
        with pytest.raises(ig.InvalidArgumentError, match=r'lam=ig\.LearnedLam\(model, per="elem'):
            ig.imaml(learner)


def test_an_adapted_learner_is_returned_which_is_no_subclass_of_maml() -> None:
    learner = ig.imaml(l2l.algorithms.MAML(nn.Linear(2, 1), lr=0.1)).clone()
    assert not isinstance(learner, l2l.algorithms.MAML)  # as the README says
    assert learner.adapt(learner(torch.ones(3, 2)).square().mean()) is learner
    assert learner.adapt(lambda: learner(torch.ones(3, 2)).square().mean()) is learner
