"""Minima too near to a constraint's edge, on problems whose minima without it are known."""

import pytest
import torch

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")

# φ has blocks of three elements, the last of which is held at its bound 1. An equation leaves the
# others one direction, t, which has 0.3 in common with the gradient of the block's inequality.
T, E, LAST = torch.tensor([[-0.6, 0.8, 0], [0.8, 0.6, 0], [0, 0, 1]], dtype=torch.float64)
G = 0.3 * T + 0.7 * E + 0.42**0.5 * LAST
H = torch.tensor([[2, 0.3, 0.5], [0.3, 1, -0.4], [0.5, -0.4, 3]], dtype=torch.float64)
FREE = 0.3 * T - 0.2 * E + LAST  # where it would be without the inequality
BESIDE, INSIDE = 3e-6, 3e-7  # farther than what counts as touching, and nearer


def verdict(*blocks, others=5.0):
    """The status at a φ some way before inequalities; the gradient is compared with the right one.

    Of each block: how far φ is from its inequality, and how many times that far a step along its
    gradient goes, to where φ would be without it. `others` is the largest of all forces.
    """
    before, times = torch.tensor(blocks).T
    step, size = before * times, 1e3  # that of the objective changes nothing
    limits = FREE @ G + before - step
    held = torch.linalg.solve(H, 1e-3 * E + LAST)  # by the equation and the bound
    a = (FREE + held).repeat(len(blocks), 1).requires_grad_()
    phi = FREE - step[:, None] / 0.3 * T

    def objective(x, a):
        off, rest = x["blocks"] - a, x["last"] - 1 - others
        return size * ((off @ H * off).sum() + rest.square()) / 2

    monitor, upper = ig.Monitor(), torch.tensor([9.0, 9.0, 1.0])
    condition = ig.argmin(
        objective,
        bounds=(None, {"blocks": upper, "last": 9.0}),
        equality=lambda x, a: (x["blocks"] - FREE) @ E,
        inequality=lambda x, a: (50 * (x["blocks"] @ G - limits), x["last"] - 1),
    )
    solution = {"blocks": phi, "last": torch.tensor(1.0)}
    x = ig.implicit(lambda a: solution, condition, monitor=monitor, on_failure="ignore")(a)
    outer = torch.tensor([1.0, -2.0, 3.0])
    (found,) = torch.autograd.grad((x["blocks"] @ outer).sum(), a)
    moves = (before > INSIDE)[:, None]
    torch.testing.assert_close(found, moves * (outer @ T) * (H @ T) / (T @ H @ T))
    return monitor.last.status


@pytest.mark.parametrize("times", [-0.2, 0.05, 0.2, 1.5])
def test_whether_a_step_comes_near_a_constraint_beside_phi(times):
    """Whether φ belongs on it: a tenth of the way is near."""
    assert verdict((BESIDE, 0.05), (BESIDE, times)).ok == (times < 0.1)


@pytest.mark.parametrize("times", [8.0, 12.0])
def test_whether_a_step_leads_far_beyond_a_constraint_that_phi_rests_on(times):
    """Ten times as far as φ is inside of it is far."""
    assert verdict((INSIDE / 2, 18.0), (INSIDE, times)).ok == (times > 10)


def test_a_force_is_in_doubt_only_where_there_are_much_larger_ones():
    """A solver's error is relative to these. The force is 1.07 * 8 * 3e-7 / 0.3², here."""
    assert verdict((INSIDE, 8.0), others=1.5).ok


@pytest.mark.parametrize("beyond", [1e-6, 1e-3])
def test_forces_in_doubt_in_a_batch(beyond):
    """3e-7 off, x[0] may be on the other side of the kink as well."""
    monitor = ig.Monitor()
    condition = ig.argmin(
        lambda x, a: (x - a).square().sum(),
        inequality=lambda x, a: torch.stack([x[0] - 1, x[1] - 1]),
    )
    phi = torch.tensor([1 - INSIDE, 1.0])
    solve = ig.implicit(lambda a: phi.clone(), condition, monitor=monitor, on_failure="ignore")
    a = torch.tensor([[1 + beyond, 5.0]] * 2, requires_grad=True)
    found = torch.autograd.grad(torch.func.vmap(solve)(a).sum(), a)[0]
    torch.testing.assert_close(found, torch.zeros(2, 2))
    assert monitor.last.status.ok == (beyond == 1e-3)


def test_a_concave_objective_presses_the_more_the_nearer():
    """However faint the force: a step would lead away from where it ends."""
    condition = ig.argmin(
        lambda x, a: (x[1] - 5).square() - (x[0] - a).square(),
        inequality=lambda x, a: torch.stack([x[0] - 1, x[1] - 1]),
    )
    phi = torch.tensor([1 - INSIDE, 1.0])
    solve = ig.implicit(lambda a: phi.clone(), condition, on_failure="raise")
    a = torch.tensor(1 - 8 * INSIDE, requires_grad=True)
    assert torch.autograd.grad(solve(a)[0], a)[0].abs() < 1e-12


def test_two_constraints_with_no_room_between_them():
    """They stand for an equation, and hold φ however faint the force on them."""
    normal = torch.tensor([1 / 3, 0.7, 0.0])

    def inequality(x, a):
        return torch.stack([normal @ x - 1, 7 * (1 - 1e-9 - normal @ x), x[2] - 1])

    condition = ig.argmin(lambda x, a: (x - a).square().sum(), inequality=inequality)
    phi = (1 - 5e-10) * normal / (normal @ normal) + torch.tensor([0.0, 0.0, 1.0])
    solve = ig.implicit(lambda a: phi.clone(), condition, on_failure="raise")
    a = (phi + 8 * INSIDE * normal + torch.tensor([0.0, 0.0, 4.0])).requires_grad_()
    assert torch.autograd.grad(normal @ solve(a), a)[0].norm() < 1e-12


def test_what_nothing_pulls_on_may_lie_beside_a_constraint():
    """The objective does not see x[1]."""
    condition = ig.argmin(lambda x, a: (x[0] - a).square(), inequality=lambda x, a: x[1] - 1)
    phi = torch.tensor([0.5, 1 - BESIDE])
    solve = ig.implicit(lambda a: phi.clone(), condition, on_failure="raise")
    a = torch.tensor(0.5, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(solve(a)[0], a)[0], torch.tensor(1.0))


def test_a_vertex_is_not_moved_by_rounding():
    """A linear program, where 30 rows that the others imply lie beside φ, held by these."""
    random = torch.Generator().manual_seed(0)
    rows, sums = (torch.rand(k, 6, generator=random) for k in (6, 30))
    slope, phi = -rows.sum(0), torch.linspace(-1, 1, 6)
    implied = sums @ rows
    implied /= implied.norm(dim=1, keepdim=True)
    condition = ig.argmin(
        lambda x, a: slope @ x,
        inequality=lambda x, a: (rows @ x - a, implied @ (x - phi) - BESIDE),
    )
    solve = ig.implicit(lambda a: phi.clone(), condition, on_failure="raise")
    a = (rows @ phi).requires_grad_()
    found = torch.autograd.grad(solve(a) @ phi, a)[0]
    torch.testing.assert_close(found, torch.linalg.solve(rows.T, phi))
