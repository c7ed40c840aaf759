"""learn2learn's Lightning modules hold a MAML; `imaml` switches it."""

import copy

import pytest
import torch
from learners import data, error, gradients, learn2learn, network, same
from torch import nn
from torch.nn.functional import mse_loss

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


class LightningMAML(nn.Module):
    """What imaml looks at, where there is no Lightning."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lr = learn2learn().algorithms.MAML(model, lr=0.2), 1e-3

    def meta_learn(self):
        learner = self.model.clone()
        for _ in range(2):
            learner.adapt(error(learner, data(1)))
        return error(learner, data(2))


class LightningANIL(nn.Module):
    """Features, and a classifier that adapts."""

    def __init__(self, features, classifier):
        super().__init__()
        self.features = features
        self.classifier = learn2learn().algorithms.MAML(classifier, lr=0.2)

    def meta_learn(self):
        learner, (x, y), (far, away) = self.classifier.clone(), data(1), data(2)
        features = self.features(x)
        for _ in range(2):
            learner.adapt(mse_loss(learner(features), y))
        return mse_loss(learner(self.features(far)), away)


class Own(LightningMAML):
    """A user's, with more to it."""


def test_the_maml_in_it_is_switched():
    model = network()
    for kind in (LightningMAML, Own):
        theirs = kind(model)
        ours = ig.imaml(theirs, 2.0)
        assert type(ours) is kind and ours is not theirs
        assert type(theirs.model).__name__ == "MAML"
        expected = ig.imaml(model, 2.0, lr=0.2).clone()
        for _ in range(2):
            expected.adapt(error(expected, data(1)))
        same(gradients(ours.meta_learn(), ours), gradients(error(expected, data(2)), ours))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_the_features_are_meta_learned_too():
    body = network(outputs=4)
    anil = ig.imaml(LightningANIL(body, nn.Linear(4, 2)), 2.0)
    assert anil.features is body and len(list(anil.parameters())) == 6
    assert all(g.norm() > 0 for g in gradients(anil.meta_learn(), anil))


def test_its_step_length_is_its_own():
    with pytest.raises(ig.InvalidArgumentError, match=r"lr=0\.1 is for a model.*lr=0\.2"):
        ig.imaml(LightningMAML(network()), lr=0.1)


@pytest.mark.parametrize("kind", ["MAML", "ANIL"])
@pytest.mark.filterwarnings("ignore")  # of Lightning's
def test_lightning_trains_it(kind, tmp_path):
    lightning, algorithms = pytest.importorskip("pytorch_lightning"), learn2learn().algorithms
    torch.set_default_dtype(torch.float32)
    body, head = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 5)
    options = {"adaptation_steps": 2, "adaptation_lr": 0.3, "lr": 0.01}
    if kind == "MAML":
        module = algorithms.LightningMAML(nn.Sequential(body, head), **options)
    else:
        module = algorithms.LightningANIL(body, head, **options)
    labels = torch.arange(5).repeat_interleave(2)
    centres = torch.randn(20, 5, 8).repeat_interleave(2, dim=1)
    tasks = [(c + torch.randn(10, 8) / 3, labels) for c in centres]
    loader = torch.utils.data.DataLoader(tasks, batch_size=None)
    ours, losses = ig.imaml(copy.deepcopy(module), 0.5, on_failure="ignore"), []
    for epochs in (0, 4):
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            inference_mode=False,  # MAML needs that too
        )  # fmt: skip
        trainer.fit(ours, loader)
        losses += [metrics["valid_loss"] for metrics in trainer.validate(ours, loader)]
    assert losses[1] < losses[0]
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    saved = torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(saved)
    ours.load_state_dict(module.state_dict())
