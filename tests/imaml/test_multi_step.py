"""Outer losses after several steps on tensors (MAML++, ProMP): the gradient of each step."""

import weakref

import pytest
import torch
from learners import (
    CURVATURES,
    EXACT,
    close,
    data,
    error,
    gradients,
    network,
    wrapped,
)
from problems import no_garbage_collector, normal, wavy
from torch import nn
from torch.func import vmap
from torch.nn.functional import mse_loss

from implicit_grad.testing import peak_memory

pytestmark = pytest.mark.usefixtures("double_precision")

WEIGHTS = (0.2, 0.5, 0.3, 1.0)


def through(learner, batch):
    """An outer loss of a call, as MAML++ has it."""
    return error(learner, batch)


def past(learner, batch):
    """An outer loss of the layers, which the learner does not see."""
    return mse_loss(learner.module(batch[0]), batch[1])


def of_weights(learner, batch):
    """An outer loss of no call at all."""
    return wavy(list(learner.module.parameters()))


# and whether it needs keep_steps
LOSSES = {
    "call": (through, False),
    "kept call": (through, True),
    "layers": (past, True),
    "weights": (of_weights, True),
}


def multi_step(maml, outer, first_order=(False,) * 4):
    """The weighted sum of outer losses after each step."""
    learner, total = maml.clone(), 0.0
    for weight, order in zip(WEIGHTS, first_order, strict=True):
        learner.adapt(error(learner, data(1)), first_order=order)
        total = total + weight * outer(learner, data(2))
    return total


def alone(maml, outer, steps, first_order=(False,) * 4):
    """The gradient of the outer loss after so many steps only."""
    learner = maml.clone()
    for order in first_order[:steps]:
        learner.adapt(error(learner, data(1)), first_order=order)
    return gradients(outer(learner, data(2)), maml)


def summed(parts):
    """Σ weight · gradient."""
    pairs = zip(WEIGHTS, parts, strict=True)
    scaled = [[w * g for g in part] for w, part in pairs]
    return [sum(gs) for gs in zip(*scaled, strict=True)]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["number", "learned", "default"])
def test_each_step_has_the_gradient_it_has_alone(form, loss, curvature):
    outer, keep = LOSSES[loss]
    lam = {"number": 2.0, "learned": nn.Parameter(torch.tensor(2.0)), "default": None}[form]
    maml = wrapped(network(), lam, keep_steps=keep, curvature=curvature)
    expected = summed([alone(maml, outer, steps) for steps in (1, 2, 3, 4)])
    close(gradients(multi_step(maml, outer), maml), expected, 1e-12)


@pytest.mark.parametrize("loss", ["call", "weights"])
def test_first_order_steps_may_be_among_them(loss):
    outer, keep = LOSSES[loss]
    maml = wrapped(network(), keep_steps=keep)
    for orders in ((True, False, True, False), (False, False, True, True)):
        expected = summed([alone(maml, outer, steps, orders) for steps in (1, 2, 3, 4)])
        close(gradients(multi_step(maml, outer, orders), maml), expected, 1e-12)


def test_features_outside_get_their_part_at_each_step():
    """ANIL: the body's gradient is the sum of the cross-derivatives of all steps."""
    body, maml = network(outputs=4), wrapped(nn.Linear(4, 2), 0.9, 0.5, **EXACT)
    (x, y), (far, away) = data(1), data(2)
    wanted = [*body.parameters(), *maml.parameters()]

    def losses(kept):
        learner, features = maml.clone(), body(x)
        for _ in WEIGHTS:
            learner.adapt(mse_loss(learner(features), y))
            if kept:
                yield mse_loss(learner(body(far)), away)
        yield mse_loss(learner(body(far)), away)

    *each, last = losses(kept=True)
    total = sum(w * loss for w, loss in zip(WEIGHTS, each, strict=True))
    actual = torch.autograd.grad(total, wanted, retain_graph=True)
    apart = [torch.autograd.grad(loss, wanted, retain_graph=True) for loss in each]
    close(actual, summed(apart), 1e-12)
    (only,) = losses(kept=False)
    close(torch.autograd.grad(last, wanted), torch.autograd.grad(only, wanted), 1e-14)


def test_each_outer_loss_may_go_backward_by_itself():
    maml = wrapped(network(), **EXACT)
    learner, losses = maml.clone(), []
    for weight in WEIGHTS:
        learner.adapt(error(learner, data(1)))
        losses.append(weight * error(learner, data(2)))
    maml.zero_grad()
    for loss in reversed(losses):
        loss.backward()
    close([p.grad for p in maml.parameters()], gradients(multi_step(maml, through), maml), 1e-12)


def stacked(batches):
    """One for all tasks."""
    return [torch.stack(parts) for parts in zip(*batches, strict=True)]


def test_batches_of_tasks_keep_theirs_too():
    maml, count = wrapped(network()), 3
    batches = [stacked([data(seed + k) for k in range(count)]) for seed in (1, 20)]

    def total(learner, each):
        loss = 0.0
        for weight in WEIGHTS:
            learner.adapt(each(learner, batches[0]))
            loss = loss + weight * each(learner, batches[1]).sum()
        return loss

    def of_one(k):
        return lambda it, batch: mse_loss(it(batch[0][k]), batch[1][k])

    together = total(maml.clone(tasks=count), lambda it, b: vmap(mse_loss)(it(b[0]), b[1]))
    apart = sum(total(maml.clone(), of_one(k)) for k in range(count))
    close(gradients(together, maml), gradients(apart, maml), 1e-10)


# ---------------------------------------------------------------- memory


def wide(**options):
    """Weights and activations of some size."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    return wrapped(model, lr=1e-3, on_failure="ignore", **options)


BATCH = (16, 64)


def peak(task):
    """Bytes, after a first time."""
    task()
    return peak_memory(task)


@pytest.mark.parametrize("looks", ["none", "one at a time", "without gradients", "numbers"])
def test_memory_stays_constant_unless_outer_losses_are_kept(looks):
    maml = wide()
    x, y = normal(*BATCH, seed=1, grad=False), normal(*BATCH, seed=2, grad=False)

    def task(steps):
        learner, history = maml.clone(), []
        for _ in range(steps):
            learner.adapt(mse_loss(learner(x), y))
            if looks == "one at a time":
                loss = mse_loss(learner(x), y)  # replaced by the next
            elif looks == "without gradients":
                with torch.no_grad():
                    loss = mse_loss(learner(x), y)  # noqa: F841
            elif looks == "numbers":
                history.append(mse_loss(learner(x), y).item())
        mse_loss(learner(x), y).backward()

    few, many = (peak(lambda steps=steps: task(steps)) for steps in (4, 32))
    assert many <= few + 32 * 64, (few, many)  # of the history's numbers


def test_kept_steps_cost_a_graph_of_their_loss_each():
    x, y = normal(*BATCH, seed=1, grad=False), normal(*BATCH, seed=2, grad=False)

    def task(maml, steps):
        learner, total = maml.clone(), 0.0
        for _ in range(steps):
            learner.adapt(mse_loss(learner(x), y))
            total = total + mse_loss(learner(x), y)
        total.backward()

    peaks = [peak(lambda steps=steps: task(wide(), steps)) for steps in (4, 8, 16)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)
    weights = sum(p.numel() for p in wide().parameters()) * 8
    activations = 2 * 16 * 64 * 8
    assert (peaks[1] - peaks[0]) / 4 <= 2 * weights + 4 * activations


@pytest.mark.parametrize("keep", [False, True])
def test_kept_steps_are_gone_with_what_holds_them(keep):
    maml = wide(keep_steps=keep)
    x, y = normal(*BATCH, seed=1, grad=False), normal(*BATCH, seed=2, grad=False)
    with no_garbage_collector():
        learner, total, nodes = maml.clone(), 0.0, []
        for _ in range(3):
            learner.adapt(mse_loss(learner(x), y))
            total = total + mse_loss(learner(x), y)
            nodes.append(weakref.ref(next(learner.module.parameters()).grad_fn))
        assert all(node() is not None for node in nodes)
        total = None
        if not keep:
            learner.adapt(mse_loss(learner(x), y))
            assert [node() is None for node in nodes] == [True, True, False]
        learner = None
        assert all(node() is None for node in nodes)


def test_thousands_of_kept_steps_overflow_no_stack_when_they_go():
    maml = wrapped(nn.Linear(3, 2), 0.1, 1e-3, keep_steps=True)
    learner, (x, y) = maml.clone(), data()
    for _ in range(3_000):
        learner.adapt(mse_loss(learner(x), y))
    first = weakref.ref(learner.module.weight.grad_fn)
    del learner
    assert first() is None
