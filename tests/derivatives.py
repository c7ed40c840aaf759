"""Functions whose derivatives are wrong from some order on."""

import torch


class CubeTwice(torch.autograd.Function):
    """x³, with a right second derivative and a wrong third one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return CubeSlope.apply(g, *ctx.saved_tensors)


class CubeSlope(torch.autograd.Function):
    """3 g x²."""

    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return 3 * g * x**2

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        return v * 3 * x**2, v * 6 * (g * x).detach()
