"""A use of the installed package in ten lines: d(2 x*)/dy of x* = y / 2, with nothing but it."""

import torch

import implicit_grad as ig

solve = ig.implicit(lambda y: y / 2, ig.argmin(lambda x, y: ((x - y) ** 2 + x**2).sum()))
y = torch.tensor([1.0, -2.0], requires_grad=True)
(2 * solve(y)).sum().backward()
torch.testing.assert_close(y.grad, torch.ones(2))
print(f"implicit_grad {ig.__version__} from {ig.__file__}")
