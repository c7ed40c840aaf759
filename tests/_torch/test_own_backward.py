"""Derivatives of operations that torch gets wrong, against operations that it gets right."""

import pytest
import torch
from problems import normal
from torch.autograd import grad
from torch.nn import functional as F

from implicit_grad._torch.graph import between
from implicit_grad._torch.own_backward import own_backwards

EPS = 0.1


def plain_layer_norm(x, w, b, rows):
    within = list(range(x.dim() - rows, x.dim()))
    away = x - x.mean(within, keepdim=True)
    y = away * (away.square().mean(within, keepdim=True) + EPS).rsqrt()
    return y if w is None else y * w + (0 if b is None else b)


def layer_norm(x, w, b, rows):
    return F.layer_norm(x, x.shape[-rows:], w, b, EPS)


def plain_weight_norm(v, g, dim):
    others = [d for d in range(v.dim()) if d != dim]
    square = v.square().sum(others, keepdim=True) if others else v.square()
    return v * g / square.sqrt()


def layer_case(norm, rows, weight, bias):
    x = normal(4, 3, 5, seed=1)
    w = normal(*x.shape[-rows:], seed=2) if weight else None
    b = normal(*x.shape[-rows:], seed=3) if bias else None
    return norm(x.sin(), w, b, rows), [t for t in (x, w, b) if t is not None]


def weight_case(norm, shape, dim):
    v = normal(*shape, seed=1)
    g = normal(*(n if d == dim else 1 for d, n in enumerate(shape)), seed=2)
    return norm(v, g, dim), [v, g]


LAYERS = [(1, True, True), (2, True, True), (1, True, False), (1, False, False), (3, True, True)]
WEIGHTS = [((4, 3), 0), ((4, 3), 1), ((2, 4, 3), 0), ((4,), 0)]
CASES = {
    **{f"layer_norm {case}": (layer_case, layer_norm, plain_layer_norm, case) for case in LAYERS},
    **{
        f"weight_norm {c}": (weight_case, torch._weight_norm, plain_weight_norm, c) for c in WEIGHTS
    },
}


def tower(name, own):
    """First, second and third derivatives along fixed directions."""
    make, fast, plain, case = CASES[name]
    y, inputs = make(fast if own else plain, *case)
    loss = (y * torch.arange(y.numel()).view_as(y).cos()).sum() + (y**3).sum()
    found = []
    with own_backwards(between([loss], inputs), lasting=True):
        derivative = grad(loss, inputs, create_graph=True)
    for seed in range(3):
        found.append(torch.cat([d.flatten() for d in derivative]))
        along = [normal(*t.shape, seed=10 + seed, grad=False) for t in inputs]
        derivative = grad(derivative, inputs, along, create_graph=True, materialize_grads=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_three_derivatives(name):
    for order, (ours, right) in enumerate(zip(tower(name, True), tower(name, False), strict=True)):
        assert right.norm() > 1e-3
        assert (ours - right).norm() <= 1e-10 * right.norm(), f"derivative {order + 1}"


@pytest.mark.parametrize("name", CASES)
def test_products_without_a_graph(name):
    """The kernel that is taken where no third derivative is asked for."""
    products = []
    for own in (True, False):
        make, fast, plain, case = CASES[name]
        y, inputs = make(fast if own else plain, *case)
        loss = (y**3).sum()
        with own_backwards(between([loss], inputs), lasting=False):
            slope = grad(loss, inputs, create_graph=True)
        along = [normal(*t.shape, seed=5, grad=False) for t in inputs]
        product = grad(slope, inputs, along, materialize_grads=True)
        products.append(torch.cat([p.flatten() for p in product]))
    assert (products[0] - products[1]).norm() <= 1e-11 * products[1].norm()


def test_without_a_graph_nothing_changes():
    y, inputs = layer_case(layer_norm, 1, True, True)
    with own_backwards(between([y.sum()], inputs)):
        found = grad(y.square().sum(), inputs)
    assert not any(f.requires_grad for f in found)
