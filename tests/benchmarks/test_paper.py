"""The paper's methods in miniature: known relations between their meta-gradients, and a run."""

from __future__ import annotations

import copy
import dataclasses
import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


class Twice(torch.nn.Module):
    """A small network that holds a layer under two names, as learn2learn's do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(64, 5)
        self.features = torch.nn.Sequential(torch.nn.Flatten(), self.base, torch.nn.Tanh())
        self.classifier = torch.nn.Linear(5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


@pytest.fixture
def paper(benchmarks_on_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import paper_methods
    import paper_tasks

    class Small:
        setting = paper_methods.Setting(ways=3, shots=2, steps=3, lr=0.1, meta_lr=1e-3, lam=0.5)
        methods, Halves = paper_methods.METHODS, paper_methods.Halves
        tasks = paper_tasks.Tasks(torch.rand(4, 6, 1, 8, 8), ways=3, shots=2, turns=4)

        def gradient(self, name, **changes):
            """The meta-gradient of one task, by a method with other attributes than usual."""
            torch.manual_seed(1)
            model = Twice()
            method = type("Changed", (self.methods[name],), changes)(model, self.setting)
            loss, accuracy = method.backward(self.Halves.of(self.tasks.sample(), self.setting), 0.5)
            assert loss > 0 and 0 <= accuracy <= 1
            return torch.cat([p.grad.flatten() for p in model.parameters()])

    return Small()


def test_a_task_has_its_classes_drawings_in_a_row(paper):
    data, labels = paper.tasks.sample()
    assert data.shape == (12, 1, 8, 8) and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    task = paper.Halves.of((data, labels), paper.setting)
    assert torch.equal(task.support[2:4], data[4:6]) and torch.equal(task.query[2:4], data[6:8])
    assert task.support_labels.tolist() == task.query_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_all_of_maml_is_its_limits(paper):
    maml = paper.gradient("maml")
    torch.testing.assert_close(paper.gradient("truncated", last=3), maml)
    torch.testing.assert_close(paper.gradient("truncated", last=0), paper.gradient("fomaml"))
    torch.testing.assert_close(paper.gradient("nesterov", momentum=0.0), maml)
    assert not torch.allclose(paper.gradient("nesterov"), maml, rtol=1e-3)
    assert not torch.allclose(paper.gradient("truncated"), maml, rtol=1e-3)


def test_reptile_moves_to_the_adapted_weights(paper):
    """After a step on each half, (θ − φ)/(2 lr) is the mean of the two steps' gradients."""
    paper.setting = dataclasses.replace(paper.setting, steps=2)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    method = paper.methods["reptile"](model, paper.setting)
    task = paper.Halves.of(paper.tasks.sample(), paper.setting)
    method.backward(task, 1.0)

    def slope(loss, at):
        return torch.autograd.grad(loss, list(at.parameters()))

    first = slope(task.support_loss(model), model)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), first, strict=True):
            p.sub_(paper.setting.lr * g)
    second = slope(task.query_loss(moved)[0], moved)
    for p, g, h in zip(model.parameters(), first, second, strict=True):
        torch.testing.assert_close(p.grad, (g + h) / 2, rtol=1e-4, atol=1e-6)


def test_implicit_gradients_lie_between_first_order_and_unrolled_ones(paper):
    maml, fomaml = paper.gradient("maml"), paper.gradient("fomaml")
    cosine = torch.nn.functional.cosine_similarity
    for name in paper.methods:
        if "imaml" not in name and name != "neumann":
            continue
        found = paper.gradient(name)
        assert cosine(found, maml, dim=0) > 0.5 and cosine(found, fomaml, dim=0) > 0.5
        assert not torch.equal(found, fomaml)


def test_the_published_code_is_near_to_first_order(paper):
    """2I + H/12 is twice the identity, nearly: Adam, which knows no lengths, sees first order."""
    fomaml = paper.gradient("fomaml")
    found = paper.gradient("paper-code", lam=0.0, damping=1e9)
    torch.testing.assert_close(2 * found, fomaml, rtol=1e-4, atol=1e-6)
    found = paper.gradient("paper-code", lam=0.0)
    assert not torch.allclose(2 * found, fomaml, rtol=1e-3)
    assert torch.nn.functional.cosine_similarity(found, fomaml, dim=0) > 0.99


def test_a_run_is_resumed_and_finished(paper, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import paper as script

    drawings = torch.rand(4, 4, 1, 28, 28)
    monkeypatch.setattr(script.paper_tasks, "load", lambda data, protocol: (drawings, drawings))
    sizes = "--ways 3 --steps 1 --hidden 4 --meta-batch 1 --eval-tasks 2 --test-tasks 2"
    call = ["--data", str(tmp_path), "--out", str(tmp_path), "--resume", *sizes.split()]
    for iterations in ("1", "2", "2"):
        script.main([*call, "--method", "fomaml", "imaml-default", "--iterations", iterations])
    assert "finished before" in capsys.readouterr().out
    for method in ("fomaml", "imaml-default"):
        log = (tmp_path / f"{method}-seed0" / "log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in log[1:]] == ["0", "1", "1", "2", "2"]


def test_photographs_are_read_class_by_class_and_fit_their_network(paper, tmp_path):
    import paper as script
    from PIL import Image

    pictures = tmp_path / "pictures.zip"
    with zipfile.ZipFile(pictures, "w") as archive:
        for place, shade in {
            "train/a/1": 0,
            "train/b/1": 51,
            "train/b/2": 102,
            "test/c/1": 255,
        }.items():
            content = io.BytesIO()
            Image.new("RGB", (84, 84), (shade, shade, 0)).save(content, "jpeg")
            archive.writestr(f"{place}.jpg", content.getvalue())
    train, test = script.paper_tasks.load(pictures, "photographs")
    assert [images.shape for images in train + test] == [(n, 3, 42, 42) for n in (1, 2, 1)]
    torch.testing.assert_close(
        train[1][:, 0].mean((1, 2)), torch.tensor([0.2, 0.4]), atol=0.02, rtol=0
    )
    sizes = "--protocol photographs --ways 3 --hidden 4 --data"
    options = script.argument_parser().parse_args([*sizes.split(), str(pictures)])
    assert script.network(options)(train[1]).shape == (2, 3)
    with pytest.raises(SystemExit):  # before hours of training, after which they do not fit
        script.main([*sizes.split(), str(pictures), "--official-runs", str(pictures)])
    for wrong in (tmp_path, pictures):
        with pytest.raises(script.characters.InputError, match="--data"):
            script.paper_tasks.photographs(wrong, "validation")
