"""An inner problem whose objective is a sum over batches; functions with bad second derivatives."""

import functools

import torch

import implicit_grad as ig

X, Y = torch.randn(2, 23, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = Y[:, 0]
BATCHES = list(zip(X.split(5), Y.split(5), strict=True))
START = {
    "a": torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "b": torch.ones(3, dtype=torch.float64),
}
NEWTON = ig.solvers.NewtonCG(maxiter=50, cg=20, tol=1e-9)


def net(w, x):
    return torch.tanh(x @ w["a"]) @ w["b"]


def misfit(w, batch, scale, lam):
    x, y = batch
    return (scale * (net(w, x) - y) ** 2).sum()


def penalty(w, scale, lam):
    return lam * sum(p.square().sum() for p in w.values())


def whole(w, scale, lam):
    return misfit(w, (X, Y), scale, lam) + penalty(w, scale, lam)


def arguments():
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 1.3))


def trained(scale, lam):
    """The minimum, found on all the data at once."""
    return minimum(float(scale), float(lam))


@functools.cache
def minimum(scale, lam):
    return NEWTON.minimize(lambda w: whole(w, scale, lam), START)


def outer(w):
    return sum((p - 1).square().sum() for p in w.values())


class Square(torch.autograd.Function):
    """x², whose backward detaches."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0].detach() * g


class SquareOnce(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g
