"""Minimisers for when you bring no solver: `minimize(objective, init) -> phi`, all differentiable code."""

from implicit_grad.solvers.gradient_descent import GradientDescent

__all__ = ["GradientDescent"]
