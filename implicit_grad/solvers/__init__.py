"""Minimisers for when you bring no solver of your own: `minimize(objective, init) -> phi`."""

from implicit_grad.solvers.gradient_descent import GradientDescent

__all__ = ["GradientDescent"]
