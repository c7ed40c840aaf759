"""Rates from theory: gradient descent and Nesterov's method."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from minimisers import ill_conditioned, slope_at

from implicit_grad.solvers import GradientDescent, Nesterov


def steps_taken(solver: Any, kappa: float) -> int:
    """Gradients until the gradient has fallen a thousandfold from that of the slowest direction."""
    objective, init = ill_conditioned(kappa)
    count = itertools.count()

    def counted(x):
        next(count)
        return objective(x)

    phi = dataclasses.replace(solver(kappa), tol=1e-3 / kappa, steps=10**6).minimize(counted, init)
    assert slope_at(objective, phi).norm() <= 1e-3 / kappa
    return next(count)


def exponent(counts: dict[float, int]) -> float:
    """p in steps ∝ κᵖ, from the least squares line in logarithms."""
    return float(np.polyfit(*np.log10([list(counts), list(counts.values())]), 1)[0])


def test_nesterov_takes_root_kappa_where_gradient_descent_takes_kappa():
    plain = {k: steps_taken(lambda _: GradientDescent(lr=1, steps=1), k) for k in (10, 100, 1000)}
    many = (10, 100, 1000, 10_000)
    known = {k: steps_taken(lambda k: Nesterov(lr=1, kappa=k, steps=1), k) for k in many}
    unknown = {k: steps_taken(lambda _: Nesterov(lr=1, steps=1), k) for k in many}
    assert 0.93 < exponent(plain) < 1.07
    assert 0.43 < exponent(known) < 0.57
    assert 0.4 < exponent(unknown) < 0.6
    assert known[1000] < plain[1000] / 10
    for kappa, steps in known.items():  # one over the rate: ln(κ-fold less than it was) √κ
        assert steps < 1.7 * math.sqrt(kappa) * math.log(1e3) + 10


def test_nesterovs_constant_momentum_has_the_rate_of_the_theory():
    """On x²/2κ with lr = 1 the iteration has the double eigenvalue 1 − 1/√κ: errors are known."""
    kappa, steps = 100.0, 60
    rate = 1 - 1 / math.sqrt(kappa)
    phi = Nesterov(lr=1, kappa=kappa, steps=steps).minimize(
        lambda x: x.square().sum() / (2 * kappa), torch.ones(1, dtype=torch.float64)
    )
    # x₀ = 1 and x₁ = 1 − 1/κ fix a and b in x_k = (a + b k) rateᵏ
    slope = (1 - 1 / kappa) / rate - 1
    assert float(phi) == pytest.approx((1 + slope * steps) * rate**steps, rel=1e-10)


def test_nesterov_restarts_where_the_general_sequence_swings():
    """Without restarts the t_k sequence needs many times more steps on a strongly convex bowl."""
    objective, x = ill_conditioned(100.0)
    count, y, t = 0, x, 1.0
    while slope_at(objective, y).norm() > 1e-8:
        before, x = x, y - slope_at(objective, y)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        y, count = x + (last - 1) / t * (x - before), count + 1
    phi = Nesterov(lr=1, tol=1e-8, steps=count // 3).minimize(objective, torch.ones_like(x))
    assert slope_at(objective, phi).norm() <= 1e-8
