"""The rows that need a GPU."""

from __future__ import annotations

import torch
from problems import normal
from torch import nn
from torch.autograd import grad

import implicit_grad as ig
from faults import ON_GPU, User, row
from faults.contract import refused
from faults.models import recurrent


@row(18, "random numbers on the device", ON_GPU)
def device_random_numbers(user: User) -> None:
    theta = normal(3, seed=1).detach().cuda().requires_grad_()
    noisy = ig.proximal(lambda phi: nn.functional.dropout(phi, 0.5).square().sum(), 1.0)
    user.owns(theta)
    phi = ig.implicit(torch.clone, noisy, on_failure="ignore")(theta)
    grad(phi.sum(), theta)


@row(28, "cuDNN's recurrent layers", ON_GPU)
def on_gpu(user: User) -> None:
    recurrent(user, "cuda")


@row(32, "autocast around backward on the device", ON_GPU)
def device_autocast(user: User) -> None:
    theta = normal(8, 8, seed=1, dtype=torch.float32).detach().cuda().requires_grad_()
    X = normal(8, 8, seed=2, grad=False, dtype=torch.float32).cuda()
    user.owns(theta, X)
    condition = ig.proximal(lambda p, X: torch.tanh(X @ p).square().sum(), 20.0)
    phi = ig.implicit(lambda t, X: 0.9 * t, condition, on_failure="ignore")(theta, X)
    plain = grad(phi.sum(), theta, retain_graph=True)[0]
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(grad(phi.sum(), theta)[0], plain)


@row(41, "phi on another device", ON_GPU)
def other_device(user: User) -> None:
    sentence = r"on cpu; the solver returned.*on cuda:0"
    refused(user, {"cuda": (torch.Tensor.cuda, sentence)})
