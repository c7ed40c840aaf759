"""Conditions whose function returns (value, aux): as those without aux, with every solver."""

import pytest
import torch
from problems import normal

import implicit_grad as ig

v = normal(3, seed=5, grad=False)


def objective(x, c):
    return (x - c).cosh().log().sum() + x.square().sum(), {"why": "not", "slope": x - c}


def residual(x, c):
    return (x - c).tanh() + 2 * x, [x]


def image(x, c):
    return x - 0.25 * residual(x, c)[0], None


MAKE = {
    "argmin": (ig.argmin, objective, ig.solvers.NewtonCG(tol=1e-12)),
    "argmin, model": (
        lambda f, **o: ig.argmin(f, model=lambda x, c: x * 1, **o),
        objective,
        ig.solvers.NewtonCG(tol=1e-12),
    ),
    "proximal": (
        lambda f, **o: ig.proximal(lambda x: f(x, 1.0), lam=0.7, **o),
        objective,
        ig.solvers.NewtonCG(tol=1e-12),
    ),
    "prox_gradient": (
        lambda f, **o: ig.prox_gradient(f, ig.prox.soft_threshold(0.1), **o),
        objective,
        ig.solvers.ProximalGradient(),
    ),
    "root": (ig.root, residual, ig.solvers.Newton()),
    "fixed_point": (ig.fixed_point, image, ig.solvers.FixedPoint()),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("in_vmap", [False, True], ids=["plain", "vmap"])
def test_aux_changes_nothing(kind, in_vmap):
    make, function, solver = MAKE[kind]

    def outer(condition, c):
        return ig.implicit(solver, condition)(c) @ v

    def without(*args):
        value, _ = function(*args)
        return value

    with_aux, plain = make(function, has_aux=True), make(without)
    if in_vmap:
        c = normal(2, 3, seed=1, grad=False)
        slopes = [
            torch.func.vmap(torch.func.grad(lambda c, k=k: outer(k, c)))(c)
            for k in (with_aux, plain)
        ]
    else:
        c = normal(3, seed=1)
        slopes = [torch.autograd.grad(outer(k, c), c)[0] for k in (with_aux, plain)]
    torch.testing.assert_close(*slopes, rtol=0, atol=0)
    assert bool(slopes[0].abs().sum() > 0.1)


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_no_pair_is_named(kind):
    make, function, solver = MAKE[kind]
    condition = make(lambda *args: function(*args)[0], has_aux=True)
    with pytest.raises(ig.InvalidArgumentError, match=r"must return a pair \(value, aux\)"):
        ig.implicit(solver, condition)(normal(3, seed=1))
    with pytest.raises(ig.InvalidArgumentError, match=r"has_aux=1\): expected True or False"):
        make(function, has_aux=1)
