"""How long a training was, and which of our minimisers can say so."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

import implicit_grad as ig
from implicit_grad.solvers import GradientDescent, Nesterov, NewtonCG, TorchOptim

F64 = torch.float64


def sgd(**options):
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)], **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_constant_length_is_counted(momentum):
    assert ig.training_time(sgd(lr=0.1, momentum=momentum), steps=40) == pytest.approx(
        4.0 / (1 - momentum)
    )


@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: CosineAnnealingLR(o, 25),
        lambda o: ExponentialLR(o, 0.9),
        lambda o: OneCycleLR(o, max_lr=0.3, total_steps=420),  # momentum changes as well
    ],
)
def test_a_schedule_is_followed_as_in_a_loop(schedule, every):
    optimizer, lengths = sgd(lr=0.1, momentum=0.9), []
    scheduler = schedule(optimizer)
    for step in range(400):
        (group,) = optimizer.param_groups
        lengths.append(group["lr"] / (1 - group["momentum"]))
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    fresh = sgd(lr=0.1, momentum=0.9)
    told = ig.training_time(fresh, schedule, steps=400, every=every)
    assert told == pytest.approx(math.fsum(lengths))
    assert fresh.param_groups[0]["lr"] == 0.1 and "initial_lr" not in fresh.param_groups[0]


def test_after_training_the_first_length_is_known_still():
    optimizer = sgd(lr=0.1)
    schedule = lambda o: CosineAnnealingLR(o, 10)  # noqa: E731
    scheduler = schedule(optimizer)
    expected = ig.training_time(optimizer, schedule, steps=10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert ig.training_time(optimizer, schedule, steps=10) == pytest.approx(expected)
    with pytest.raises(ig.InvalidArgumentError, match=r"lr from 0\.1 to 0: .* as schedule"):
        ig.training_time(optimizer, steps=10)


def test_what_has_no_time_is_told():
    parameters = [torch.zeros(2, requires_grad=True)]
    for optimizer in (torch.optim.Adam(parameters), torch.optim.LBFGS(parameters)):
        name = type(optimizer).__name__
        with pytest.raises(ig.InvalidArgumentError, match=rf"{name} is another optimizer"):
            ig.training_time(optimizer, steps=3)
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.2)]
    with pytest.raises(ig.InvalidArgumentError, match=r"from 0\.1 to 0\.2: no one time"):
        ig.training_time(torch.optim.SGD(groups, lr=0.1), steps=3)
    with pytest.raises(ig.InvalidArgumentError, match="ReduceLROnPlateau goes by the losses"):
        ig.training_time(sgd(lr=0.1), ReduceLROnPlateau, steps=3)
    with pytest.raises(ig.InvalidArgumentError, match="steps=0"):
        ig.training_time(sgd(lr=0.1), steps=0)
    with pytest.raises(ig.InvalidArgumentError, match=r"every=1\.5"):
        ig.training_time(sgd(lr=0.1), steps=3, every=1.5)
    with pytest.raises(ig.InvalidArgumentError, match="optimizer must be"):
        ig.training_time("sgd", steps=3)
    optimizer = sgd(lr=0.1)
    with pytest.raises(ig.InvalidArgumentError, match="schedule must be None or a function"):
        ig.training_time(optimizer, ExponentialLR(optimizer, 0.9), steps=3)


def quadratic(spectrum):
    h = torch.tensor(spectrum, dtype=F64)
    return lambda phi, a: (h * phi * phi).sum() / 2 - phi @ a


MINIMISERS = {
    "gradient descent": GradientDescent(lr=0.3, steps=7),
    "Nesterov": Nesterov(lr=0.3, momentum=0.6, steps=7),
    "Nesterov by kappa": Nesterov(lr=0.3, kappa=16.0, steps=7),
    "SGD": TorchOptim(factory=lambda ts: torch.optim.SGD(ts, lr=0.3), steps=7),
    "SGD with momentum": TorchOptim(
        factory=lambda ts: torch.optim.SGD(ts, lr=0.3, momentum=0.6), steps=7
    ),
}


@pytest.mark.parametrize("minimiser", MINIMISERS.values(), ids=MINIMISERS)
def test_minimisers_that_count_steps_say_what_they_did(minimiser):
    """The derivative of what they return, for it is linear in a: by solving for unit vectors."""
    objective, start = quadratic([0.01, 0.5, 2.0]), torch.zeros(3, dtype=F64)

    def solver(a):
        return minimiser.minimize(lambda phi: objective(phi, a), start)

    jacobian = torch.stack([solver(row) for row in torch.eye(3, dtype=F64)], dim=1)
    training = minimiser.training((start,))
    solve = ig.implicit(solver, ig.argmin(objective), linear_solver=training)
    found = torch.autograd.functional.jacobian(solve, torch.ones(3, dtype=F64))
    assert torch.allclose(found, jacobian, rtol=1e-10)


@pytest.mark.parametrize(
    "minimiser",
    [
        TorchOptim(
            factory=lambda ts: torch.optim.SGD(ts, lr=0.3),
            scheduler=lambda o: ExponentialLR(o, 0.5),
            steps=20,
        ),
        TorchOptim(
            factory=lambda ts: torch.optim.SGD(ts, lr=0.06, momentum=0.9, nesterov=True), steps=1
        ),
        TorchOptim(
            factory=lambda ts: torch.optim.SGD(ts, lr=0.12, momentum=0.9, dampening=0.5), steps=1
        ),
    ],
)
def test_steps_of_other_kinds_are_known_by_their_time(minimiser):
    assert minimiser.training((torch.zeros(3),)).time == pytest.approx(0.6, rel=1e-4)


@pytest.mark.parametrize(
    "minimiser",
    [
        GradientDescent(lr=0.3, tol=1e-3),
        GradientDescent(lr=0.3, steps=9, rtol=1e-3),
        Nesterov(lr=0.3, steps=9),
        NewtonCG(),
        TorchOptim(factory=lambda ts: torch.optim.Adam(ts), steps=9),
        TorchOptim(factory=lambda ts: torch.optim.SGD(ts, lr=0.1), tol=1e-3),
        TorchOptim(
            factory=lambda ts: torch.optim.SGD([{"params": [t], "lr": 0.1 * len(t)} for t in ts]),
            steps=9,
        ),
    ],
)
def test_others_say_nothing(minimiser):
    assert minimiser.training((torch.zeros(3), torch.zeros(2))) is None
