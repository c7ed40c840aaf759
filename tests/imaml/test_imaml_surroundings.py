"""imaml leaves alone what is not its own: memory, buffers, random numbers."""

import copy
import weakref

import pytest
import torch
from learners import (
    CURVATURES,
    STYLES,
    adapt,
    close,
    data,
    error,
    flat,
    gradients,
    learn2learn,
    network,
    outer,
    weights_of,
    wrapped,
)
from problems import count_tensors, no_garbage_collector
from torch import nn
from torch.nn.functional import cross_entropy

import implicit_grad as ig
from implicit_grad.testing import peak_memory

pytestmark = pytest.mark.usefixtures("double_precision")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ending", ["nothing", "query", "backward"])
def test_a_learner_is_gone_with_its_last_reference(ending, style, curvature):
    maml = wrapped(network(), curvature=curvature, lam=nn.Parameter(torch.tensor(2.0)))
    support, query = data(1), data(2)
    for p in maml.parameters():
        p.grad = torch.zeros_like(p)

    def task():
        learner = maml.clone()
        adapt(learner, lambda it: error(it, support), style, steps=2)
        fast = next(learner.module.parameters())
        implicit = fast.grad_fn.next_functions[0][0]
        assert type(implicit).__name__ == "ImplicitFunctionBackward"
        watched = [weakref.ref(o) for o in (learner, learner.module, fast, implicit)]
        if ending != "nothing":
            loss = error(learner, query)
            if ending == "backward":
                loss.backward()
        return watched

    with no_garbage_collector():
        watched = task()
        assert [w() for w in watched] == [None] * 4
        before = count_tensors()
        for _ in range(8):
            task()
        assert count_tensors() == before


@pytest.mark.parametrize("style", STYLES)
def test_peak_memory_does_not_grow_with_the_steps(style):
    torch.set_default_dtype(torch.float32)
    model = learn2learn().vision.models.OmniglotCNN(5, hidden_size=8)
    maml = wrapped(model, lr=0.05, on_failure="ignore")
    images, labels = torch.rand(5, 28, 28), torch.arange(5)

    def peak(steps):
        def task():
            learner = maml.clone()
            adapt(learner, lambda it: cross_entropy(it(images), labels), style, steps=steps)
            cross_entropy(learner(images), labels).backward()

        return peak_memory(task)

    peak(1)  # allocates .grad
    peaks = {steps: peak(steps) for steps in (1, 2, 4, 64)}
    assert len({peaks[steps] for steps in (2, 4, 64)}) == 1, peaks
    assert 0.5 * peaks[2] < peaks[1] <= peaks[2]


# ---------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_running_statistics_are_those_of_mamls_forwards(mode, style):
    l2l = learn2learn()
    model = l2l.vision.models.OmniglotCNN(5, hidden_size=4)
    getattr(model, mode)()
    images, labels = torch.rand(5, 28, 28), torch.arange(5)
    buffers = []
    for ours in (True, False):
        twin = copy.deepcopy(model)
        maml = l2l.algorithms.MAML(twin, lr=0.05)
        if ours:
            maml = ig.imaml(maml, linear_solver=ig.CG(maxiter=2), on_failure="ignore")
        identity = [id(b) for b in twin.buffers()]
        for _ in range(2):
            learner = maml.clone()
            how = style if ours else "tensor"
            adapt(learner, lambda it: cross_entropy(it(images), labels), how, steps=3)
            cross_entropy(learner(images.flip(0)), labels).backward()
        assert [id(b) for b in twin.buffers()] == identity
        buffers.append([b.double() for b in twin.buffers()])
    assert (mode == "eval") == all(
        torch.equal(b.double(), now) for b, now in zip(model.buffers(), buffers[0], strict=True)
    )
    for mine, theirs in zip(*buffers, strict=True):
        assert (mine - theirs).norm() <= 1e-11 * theirs.norm()
    assert float(buffers[0][2]) == (8 if mode == "train" else 0)


def conjugate_gradients(product, b, iterations):
    """Conjugate gradients as in a textbook."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(iterations):
        Ap = product(p)
        alpha = (r @ r) / (p @ Ap)
        x, r_next = x + alpha * p, r - alpha * Ap
        p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
    return x


def test_dropout_keeps_the_mask_of_the_loss():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    maml, lam = wrapped(model, 3.0, linear_solver=ig.CG(maxiter=4)), 3.0
    learner = maml.clone()
    weights = list(learner.parameters())
    loss = error(learner, data())
    slope = torch.autograd.grad(loss, weights, create_graph=True)
    vector = torch.cat([g.flatten() for g in slope])

    def product(p):
        parts = torch.autograd.grad(vector, weights, p, retain_graph=True)
        return flat(parts) + lam * p

    learner.adapt(loss)
    v = torch.autograd.grad(outer(learner), weights_of(learner), retain_graph=True)
    expected = lam * conjugate_gradients(product, flat(v), 4)
    actual = flat(gradients(outer(learner), maml))
    close([actual], [expected], 1e-12)
    exact = torch.stack([product(column) for column in torch.eye(len(actual))])
    assert (actual - lam * torch.linalg.solve(exact, flat(v))).norm() > 1e-9 * actual.norm()


@pytest.mark.parametrize("style", STYLES)
def test_random_numbers_are_drawn_by_the_steps_only(style):
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    maml = wrapped(model, 3.0)
    torch.manual_seed(4)
    for _ in range(3):
        maml(data()[0])
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    learner = maml.clone()
    adapt(learner, lambda it: error(it, data()), style, steps=3)
    assert torch.equal(torch.get_rng_state(), expected)
    outer(learner).backward()
    assert torch.equal(torch.get_rng_state(), expected)
