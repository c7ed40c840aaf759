"""Exponential cones by themselves: their surface, what counts as small, and the corners at tips."""

import math

import pytest
import torch
from torch.func import grad, jacrev

from implicit_grad._conditions.exponential_cones import Corner, ExponentialCones

pytestmark = pytest.mark.usefixtures("double_precision")
EDGE, TIP, INSIDE = (-1.0, 0.0, 2.0), (0.0, 0.0, 0.0), (-1.0, 1.0, 2.0)


def cones(parts, lengths=(1.0, 1.0, 1.0)):
    parts = torch.as_tensor(parts).view(-1, 3)
    sizes = torch.as_tensor(lengths).expand_as(parts)
    return ExponentialCones(parts, sizes, torch.zeros(len(parts), dtype=torch.bool))


def surface(point):
    return cones(point).surface()[0]


@pytest.mark.parametrize("y", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("ratio", [-300.0, -40.0, -1.0, 0.0, 0.5, 40.0, 300.0])
def test_the_surface_and_its_normal(ratio, y):
    power = math.exp(ratio)
    point = torch.tensor([ratio * y, y, power * y])
    torch.testing.assert_close(surface(point), torch.tensor(0.0), rtol=0, atol=1e-12 * y)
    normal, slope = torch.tensor([power, power * (1 - ratio), -1.0]), grad(surface)(point)
    torch.testing.assert_close(slope / slope.norm(), normal / normal.norm(), rtol=1e-9, atol=1e-12)
    inside = point - 1e-3 * normal / normal.norm() * point.abs().max()
    assert surface(inside) < 0 < surface(2 * point - inside)


@pytest.mark.parametrize("noise", [1e-13, -1e-13])
def test_noise_of_a_solver_spoils_no_distance(noise):
    """Where z is 0 to its digits, and where y is and x has fewer."""
    for point in ((-40.0, 1.0, noise), (1e-9, abs(noise), 1.0)):
        point = torch.tensor(point)
        distance = surface(point) / grad(surface)(point).norm()
        assert distance.abs() < 1e-8


@pytest.mark.parametrize("point", [EDGE, TIP, (1e-8, -1e-12, 0.0), (0.0, -1e-12, -1e-13)])
def test_at_edges_and_tips_nothing_moves_the_surface_of_a_batch(point):
    size = torch.tensor(1.0)

    def smooth(point):
        return cones(torch.stack([point, torch.tensor(INSIDE)])).smooth(size)

    values, slopes = torch.func.vmap(lambda p: (smooth(p), jacrev(smooth)(p)))(
        torch.tensor([point, INSIDE])
    )
    at_corner, elsewhere = values[:, 0]
    assert at_corner == 0 and not slopes[0].any()
    inside = torch.tensor(INSIDE)
    torch.testing.assert_close(elsewhere, surface(inside))
    torch.testing.assert_close(slopes[1, 0], grad(surface)(inside))
    rows, corners = cones([point, INSIDE]).divided(size)  # alone, they are told apart
    assert len(rows) == len(corners) == 1 and corners[0].is_tip == (point is not EDGE)
    torch.testing.assert_close(rows[0], surface(inside))


def test_what_counts_as_small():
    """By the size of φ; of what does not move with it, only 0; but at a tip, all that is."""
    for size in (1e-3, 1.0, 1e6):
        near, apart = (torch.tensor([0.0, e * size, size]) for e in (1e-9, 1e-7))
        low, zero = cones(torch.stack([near, apart])).small(torch.tensor(size))
        assert low.tolist() == [True, False] and not zero.any()
    constant = torch.tensor([[0.0, 1e-9, 1.0], [0.0, 0.0, 1.0], [0.0, 1e-9, 0.0]])
    low, zero = cones(constant, (1.0, 0.0, 1.0)).small(torch.tensor(1.0))
    assert low.tolist() == [False, True, True] and zero.tolist() == [False, False, True]


# ---------------------------------------------------------------- tips


def rows(u, of_parts, moves, point=TIP):
    """A tip's inequalities at a point, given multipliers and which of y and z φ moves."""
    return torch.stack(Corner(*point, True, *moves, False).tip(u, of_parts))


@pytest.mark.parametrize("rho", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("u", [0.5, 3.0])
@pytest.mark.parametrize("moves", [(True, True), (False, True), (True, False)])
def test_a_tip_leads_along_the_ray_whose_normal_its_multipliers_are(moves, u, rho):
    ray = torch.tensor([math.log(rho), 1.0, rho])
    normal = grad(surface)(ray)
    normal = u * normal / normal[0]
    v, m = -normal[1], -normal[2]
    of_parts = [force for force, moved in zip((v, m), moves, strict=True) if moved]
    assert len(Corner(*ray, True, *moves, False).parts()) == len(of_parts)

    def at(point):
        return rows(u, list(map(float, of_parts)), moves, point)

    torch.testing.assert_close(at(ray)[:2], torch.zeros(2))
    slopes = jacrev(at)(ray)
    across = m * rho if moves[1] else normal[1] + u * math.log(rho)
    forces = torch.stack([torch.tensor(u), across / slopes[1, 1]])
    torch.testing.assert_close(forces @ slopes[:2], normal)
    assert slopes[2:].tolist() == ([[0.0, -1.0, 0.0]] if moves == (True, True) else [])


@pytest.mark.parametrize("moves", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("u", [1.0, 1e-300, 0.0, -1e-9])
def test_a_tip_without_a_force_holds_all_parts(moves, u):
    """Or with forces that are no numbers for a ray: nothing but numbers comes of them."""
    for force in (0.0, 1.0, -1.0, 1e5):
        of_parts = [force] * sum(moves)
        slopes = jacrev(rows, 3)(u, of_parts, moves, torch.tensor(TIP))
        assert slopes.isfinite().all() and slopes[0, 0] == 1
        if u <= 0:
            others = {tuple(row) for row in slopes[1:].tolist()}
            held = {(0.0, -1.0, 0.0)} if moves[0] or not moves[1] else set()
            assert others == held | ({(0.0, 0.0, -1.0)} if moves[1] else set())
