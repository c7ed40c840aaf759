"""Small networks as imaml's learners, and the outer problem of most tests."""

import pytest
import torch
from problems import minimize, normal, wavy
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn.functional import mse_loss

import implicit_grad as ig

STYLES = ("tensor", "closure")


CURVATURES = ("hessian", "gauss_newton")


EXACT = {"linear_solver": ig.Exact(), "on_failure": "raise"}


def wrapped(model, lam=2.0, lr=0.2, **options):
    """The model as an imaml; MAML's options, which are attributes, and imaml's together."""
    names = ("first_order", "allow_unused", "allow_nograd")
    theirs = {k: options.pop(k) for k in names if k in options}
    maml = ig.imaml(model, lam, lr=lr, **options)
    vars(maml).update(theirs)
    return maml


def learn2learn():
    """learn2learn, for tests that compare with it or need its networks; they wait for it else."""
    return pytest.importorskip("learn2learn", reason="learn2learn is not installed")


def network(inputs=3, hidden=4, outputs=2):
    """A small network that is not linear in its weights."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def data(seed=1, inputs=3, outputs=2, size=6):
    """A support or query set."""
    X = normal(size, inputs, seed=seed, grad=False)
    return X, normal(size, outputs, seed=seed + 50, grad=False)


def error(learner, batch):
    """The loss of most tasks here."""
    return mse_loss(learner(batch[0]), batch[1])


def adapt(learner, loss, style, steps=1, **options):
    """Some gradient steps on loss(learner), in either style."""
    if style == "closure":
        learner.adapt(lambda: loss(learner), steps=steps, **options)
        return
    for _ in range(steps):
        learner.adapt(loss(learner), **options)


def outer(learner):
    """A function of all the learner's weights, with no symmetry."""
    return wavy(list(learner.module.parameters()))


def gradients(loss, maml):
    """The loss's derivatives with respect to all that is trained."""
    trained = [p for p in maml.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, retain_graph=True)


def close(actual, expected, tolerance=1e-8):
    """Equal relative to the size of what is expected, one by one, none of it zero."""
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert e.norm() > 1e-6
        assert (a - e).norm() <= tolerance * e.norm()


def same(actual, expected):
    """Bitwise equal, one by one."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def flat(tensors):
    """One vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def dense(model, values, loss, v, lam, curved=None):
    """λ (∇²loss + λ)⁻¹ v with dense matrices; `loss(call)` gets the model as a function.

    `curved(flat function of the weights)` replaces the Hessian.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in trained.values()]

    def unflat(vector):
        parts = vector.split([s.numel() for s in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return dict(zip(trained, parts, strict=True))

    def call_at(vector):
        return lambda *args: functional_call(model, unflat(vector), args)

    point = flat(values)
    if curved is None:
        matrix = jacrev(grad(lambda w: loss(call_at(w))))(point)
    else:
        matrix = curved(call_at, point)
    u = torch.linalg.solve(matrix + lam * torch.eye(len(point)), flat(v))
    return list(unflat(lam * u).values()), matrix


def weights_of(learner):
    """The learner's present weights, those that are trained."""
    return [p for p in learner.module.parameters() if p.requires_grad]


def newton(objective, init):
    """A solver for imaml: Newton's method."""
    return minimize(objective, init)


def gauss_newton(inputs, criterion):
    """Jᵀ (∂²loss/∂output²) J, for `dense`."""

    def matrix(call_at, point):
        output = call_at(point)(inputs)
        jacobian = jacrev(lambda w: call_at(w)(inputs))(point).flatten(0, 1)
        curved = jacrev(grad(lambda o: criterion(o.view_as(output))))(output.flatten())
        return jacobian.T @ curved @ jacobian

    return matrix


def moved(tensors, direction, step):
    for t, d in zip(tensors, direction, strict=True):
        t.data.add_(d, alpha=step)
