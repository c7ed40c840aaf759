"""Optimizers of torch and TorchOpt do here what they do in a training loop."""

from __future__ import annotations

import pytest
import torch
from minimisers import OPTIMIZERS, logistic, slope_at
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau

import implicit_grad as ig
from implicit_grad.solvers import TorchOpt, TorchOptim


def by_hand(optimizer_of, objective, init, steps, scheduler_of=None):
    """The usual training loop."""
    w = init.clone().requires_grad_()
    optimizer = optimizer_of([w])
    scheduler = scheduler_of(optimizer) if scheduler_of else None
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = objective(w)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.detach())
        elif scheduler:
            scheduler.step()
    return w.detach()


SCHEDULERS = {
    "none": None,
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.7),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "plateau": lambda optimizer: ReduceLROnPlateau(
        optimizer, factor=0.1, patience=0, threshold=0.3
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torch_optimizers_do_what_they_do_in_a_training_loop(optimizer, scheduler):
    problem, steps = logistic(), 7
    factory, schedule = OPTIMIZERS[optimizer], SCHEDULERS[scheduler]
    solver = TorchOptim(factory=factory, scheduler=schedule, steps=steps)
    expected = by_hand(factory, problem.objective, problem.init + 1, steps, schedule)
    for _ in range(2):  # no state is left from one run to the next
        found = solver.minimize(problem.objective, problem.init + 1)
        assert torch.equal(found, expected)


class LookAhead(torch.optim.Optimizer):
    """Evaluates at a trial point before it takes a step of gradient descent."""

    def __init__(self, params, trial):
        super().__init__(params, {})
        self.trial = trial

    @torch.no_grad()
    def step(self, closure):
        (p,) = self.param_groups[0]["params"]
        loss, before = closure(), p.clone()
        slope = p.grad.clone()
        p.fill_(self.trial)
        closure()
        p.copy_(before - 0.5 * slope)
        return loss


@pytest.mark.parametrize("trial", [-1.0, 0.0], ids=["where the objective is NaN", "at the minimum"])
def test_only_the_points_before_steps_are_watched(trial):
    """A line search may try where the objective is not defined, or the gradient small."""

    def objective(p):
        return (p * p / 2 + torch.where(p < 0, torch.nan, 0.0)).sum()

    solver = TorchOptim(factory=lambda params: LookAhead(params, trial), steps=3, tol=1e-6)
    with pytest.warns(ig.ImplicitGradWarning, match="tol=1e-06 was asked for and is not reached"):
        assert solver.minimize(objective, torch.tensor([8.0])) == 1.0


def test_torchopt_does_what_it_does_by_hand():
    torchopt = pytest.importorskip("torchopt")
    problem = logistic()
    decay = torchopt.schedule.polynomial_schedule(0.5, 0.1, 1.0, 10, 0)
    for transform in (torchopt.adam(0.1), torchopt.rmsprop(0.1), torchopt.sgd(decay, momentum=0.5)):
        clipped = torchopt.combine.chain(torchopt.clip.clip_grad_norm(0.05), transform)
        for rule in (transform, clipped):
            w = (problem.init + 1,)
            state = rule.init(w)
            for _ in range(5):
                g = (slope_at(problem.objective, w[0]),)
                updates, state = rule.update(g, state, params=w, inplace=False)
                w = torchopt.apply_updates(w, updates, inplace=False)
            solver = TorchOpt(transform=rule, steps=5)
            for _ in range(2):
                found = solver.minimize(problem.objective, problem.init + 1)
                assert torch.allclose(found, w[0], rtol=1e-14)
