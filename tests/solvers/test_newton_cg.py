"""Newton's method: its rate, its directions, its line search."""

from __future__ import annotations

import itertools

import pytest
import torch
from minimisers import flat, ill_conditioned, logistic, shapes, slope_at

from implicit_grad.solvers import NewtonCG


def test_newton_is_quadratic_near_the_minimum():
    problem = logistic()
    errors = [
        float(slope_at(problem.objective, NewtonCG(maxiter=n, cg=3).minimize(
            problem.objective, problem.init)).norm())
        for n in range(6)
    ]  # fmt: skip
    assert errors[3] < 0.5 * errors[2] ** 1.5 and errors[4] < 1e-12


def test_newton_with_full_cg_takes_one_step_on_a_quadratic():
    problem = shapes()
    phi = NewtonCG(maxiter=1, cg=11).minimize(problem.objective, problem.init)
    assert (flat(phi) - flat(problem.minimum)).norm() < 1e-13


def test_newton_direction_has_the_given_number_of_products():
    """cg=1 is steepest descent with the exact length for a quadratic."""
    objective, init = ill_conditioned(100.0)
    slope = slope_at(objective, init)
    curved = slope_at(objective, slope)  # the gradient is linear: it multiplies by the Hessian
    expected = init - (slope @ slope) / (slope @ curved) * slope
    found = NewtonCG(maxiter=1, cg=1).minimize(objective, init)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("start", [(x, y) for x in (-3, -0.5, 1e-3, 2) for y in (-2, 1e-3, 0.7)])
def test_newton_descends_from_negative_curvature(start):
    """Two double wells with a bump between them: minima have x = ±1 and y = ±1."""

    def objective(p):
        return ((p * p - 1) ** 2).sum() + 0.1 * (p[0] * p[1]) ** 2

    init, values = torch.tensor(start, dtype=torch.float64), []
    for n in range(25):
        values.append(float(objective(NewtonCG(maxiter=n, cg=2).minimize(objective, init))))
    slack = 16 * torch.finfo(torch.float64).eps
    assert all(b <= a * (1 + slack) for a, b in itertools.pairwise(values))
    end = NewtonCG(maxiter=60, cg=2).minimize(objective, init)
    assert slope_at(objective, end).norm() < 1e-10
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(objective, end)).min() > 0


@pytest.mark.parametrize("places", [1, 4, 7])
def test_newton_ends_at_its_tolerance_though_values_are_off_in_their_last_places(places):
    """As sums of many numbers are: near the minimum, all that they tell is rounding."""
    objective, init = logistic().objective, logistic().init
    eps = torch.finfo(torch.float64).eps
    random = torch.Generator().manual_seed(0)

    def off(phi):
        value = objective(phi)
        draw = float(torch.rand((), generator=random, dtype=torch.float64)) * 2 - 1
        return value + draw * places * eps * value.detach()

    for tol in (1e-10, 1e-12):
        found = NewtonCG(maxiter=40, cg=3, tol=tol).minimize(off, init)  # warnings are errors
        assert slope_at(objective, found).norm() <= tol


@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
def test_newton_goes_down_the_gradient_if_the_first_curvature_is_negative(c):
    """Where −cos is concave, Newton's own step climbs to π; this one descends, by a training's.

    Its time is ‖φ‖/‖slope‖, whatever the units: see `EarlyStopped`.
    """
    init = torch.tensor([2.5], dtype=torch.float64)
    step = NewtonCG(maxiter=1).minimize(lambda x: -c * torch.cos(x).sum(), init)
    slope, curvature = torch.sin(init), torch.cos(init).abs()
    length = (1 - torch.exp(-init / slope * curvature)) / curvature
    assert torch.allclose(step, init - length * slope, rtol=1e-12)


def test_newton_halves_steps_that_overshoot():
    """√(1 + x²) from 2: Newton's own step leads to −8, and diverges from there."""

    def objective(x):
        return torch.sqrt(1 + x * x).sum()

    init = torch.tensor([2.0], dtype=torch.float64)
    assert float(NewtonCG(maxiter=1).minimize(objective, init)) == pytest.approx(-0.5)
    assert abs(float(NewtonCG(maxiter=10).minimize(objective, init))) < 1e-12


def test_newton_halves_steps_that_gain_too_little():
    """From just below 1 its own step leads to just above −1, and to hardly less."""
    init = torch.tensor([1 - 1e-6], dtype=torch.float64)
    end = NewtonCG(maxiter=1).minimize(lambda x: torch.sqrt(1 + x * x).sum(), init)
    assert abs(float(end)) < 1e-5


def test_newton_ends_where_the_objective_is_not_defined():
    """Trial points with NaN are too far; the minimum of x − ln x is 1."""
    init = torch.tensor([1e-3], dtype=torch.float64)
    end = NewtonCG(maxiter=60).minimize(lambda x: (x - torch.log(x)).sum(), init * 0 + 3.0)
    assert float(end) == pytest.approx(1.0, abs=1e-10)


def test_newton_reaches_rounding_level_despite_a_large_constant():
    """Near the minimum the values are all 1e4, and only slopes can tell; float32 alike."""
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        minimum = torch.linspace(-1, 1, 5, dtype=dtype)

        def objective(x, minimum=minimum):
            return torch.cosh(x - minimum).sum() + 1e4

        end = NewtonCG(maxiter=30).minimize(objective, torch.zeros_like(minimum))
        assert (end - minimum).norm() < limit


def test_newton_without_a_hessian_goes_down_the_gradient():
    """∇²|x|^1.5 is infinite at 0; y's part of the objective can be lowered all the same."""

    def objective(p):
        return p[0].abs() ** 1.5 + (p[1] - 1) ** 2

    init = torch.zeros(2, dtype=torch.float64)
    end = NewtonCG(maxiter=20).minimize(objective, init)
    assert (end - torch.tensor([0.0, 1.0])).norm() < 1e-6


def test_newton_takes_differences_where_torch_has_no_second_derivative():
    """The CTC loss has none; with a ridge it has one minimum."""
    labels, lengths = torch.tensor([[1, 2]]), (torch.tensor([5]), torch.tensor([2]))

    def objective(w):
        scores = w.reshape(5, 1, 3).log_softmax(2)
        return torch.nn.functional.ctc_loss(scores, labels, *lengths) + w.square().sum()

    init = torch.zeros(15, dtype=torch.float64)
    phi = NewtonCG(tol=1e-7).minimize(objective, init)
    assert slope_at(objective, phi).norm() <= 1e-7 < slope_at(objective, init).norm()
