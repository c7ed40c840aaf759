"""A LightningModule that its Trainer trains within the solver."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as misfit
from torch.utils.data import DataLoader, TensorDataset

import implicit_grad as ig

lightning = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Classifier(lightning.LightningModule):
    """Logistic regression, with what a module of Lightning's has besides."""

    def __init__(self, lr: float = 2.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(3, 1).double()

    def loss(self, batch: Any, log_decay: Tensor) -> Tensor:
        x, y = batch
        decay = log_decay.exp() * sum(p.square().sum() for p in self.parameters())
        return misfit(self.net(x)[:, 0], y) + decay

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch, self.log_decay)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 1000)
        return {"optimizer": sgd, "lr_scheduler": schedule}


def data(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=random).double()
    return x, (x[:, 0] + torch.randn(40, generator=random) > 0).double()


@pytest.mark.parametrize(("pieces", "epochs"), [(1, 150), (2, 15)])
def test_trainers_within_the_solver_have_the_gradient_of_differences(pieces, epochs):
    """Of a training to the end by the default, and of two in a row that are stopped."""
    loader, valid, start = DataLoader(TensorDataset(*data(0)), 40), data(1), Classifier()

    def train(model: Any, log_decay: Tensor) -> Any:
        model.log_decay = log_decay
        lightning.Trainer(max_epochs=epochs, **QUIET).fit(model, loader)
        return model

    options = {"linear_solver": ig.EarlyStopped(steps=epochs, lr=2.0)} if pieces > 1 else {}
    condition = ig.argmin(
        lambda model, batch, log_decay: model.loss(batch, log_decay), batches=loader
    )
    solve = ig.implicit(train, condition, on_failure="raise", **options)

    def outer(log_decay: Tensor) -> Tensor:
        model = start
        for _ in range(pieces):
            model = solve(model, log_decay)
        assert type(model) is Classifier
        return misfit(model.net(valid[0])[:, 0], valid[1])

    at = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(outer(at), at)
    step = 1e-4
    with torch.no_grad():
        expected = (outer(at + step) - outer(at - step)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert not hasattr(start, "log_decay")
