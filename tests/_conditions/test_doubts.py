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
TURNED = torch.linalg.qr(torch.stack([G, T, E], 1))[0].T  # G is its first row, or -G
TURNED *= (TURNED[0] @ G).sign()
BESIDE, INSIDE = 3e-6, 3e-7  # farther than what counts as touching, and nearer
NEARBY = 1e-4  # farther than solvers leave φ beside what it rests on


def verdict(*blocks, others=5.0, bounded=False):
    """The status at a φ some way before inequalities; the gradient is compared with the right one.

    Of each block: how far φ is from its inequality, and how many times that far a step along its
    gradient goes, to where φ would be without it. `others` is the largest of all forces. `bounded`
    turns the blocks until their inequalities are bounds, and the bounds inequalities.
    """
    before, times = torch.tensor(blocks).T
    step, size = before * times, 1e3  # that of the objective changes nothing
    limits = FREE @ G + before - step
    held = torch.linalg.solve(H, 1e-3 * E + LAST)  # by the equation and the bound
    a = (FREE + held).repeat(len(blocks), 1).requires_grad_()
    phi = FREE - step[:, None] / 0.3 * T
    turned = TURNED if bounded else torch.eye(3)

    def objective(x, a):
        off, rest = x["blocks"] @ turned - a, x["last"] - 1 - others
        return size * ((off @ H * off).sum() + rest.square()) / 2

    def inequality(x, a):
        rows = x["blocks"] @ turned[:, 2] - 1 if bounded else x["blocks"] @ G - limits
        return 50 * rows, x["last"] - 1

    monitor, upper = ig.Monitor(), torch.tensor([9.0, 9.0, 1.0]).repeat(len(blocks), 1)
    if bounded:
        upper[:, 0], upper[:, 2] = limits, 9.0
    condition = ig.argmin(
        objective,
        bounds=(None, {"blocks": upper, "last": 9.0}),
        equality=lambda x, a: (x["blocks"] @ turned - FREE) @ E,
        inequality=inequality,
    )
    solution = {"blocks": phi @ turned.T, "last": torch.tensor(1.0)}
    x = ig.implicit(lambda a: solution, condition, monitor=monitor, on_failure="ignore")(a)
    outer = torch.tensor([1.0, -2.0, 3.0])
    (found,) = torch.autograd.grad((x["blocks"] @ turned @ outer).sum(), a)
    moves = (before > INSIDE)[:, None]
    torch.testing.assert_close(found, moves * (outer @ T) * (H @ T) / (T @ H @ T))
    return monitor.last.status


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("times", [-0.2, 0.05, 0.2, 1.5])
def test_whether_a_step_comes_near_a_constraint_beside_phi(times, bounded):
    """Whether φ belongs on it: a tenth of the way is near."""
    assert verdict((BESIDE, 0.05), (BESIDE, times), bounded=bounded).ok == (times < 0.1)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("times", [-2.0, 0.8, 1.2])
def test_whether_a_step_leads_to_a_constraint_not_far_from_phi(times, bounded):
    """There only a whole step counts."""
    assert verdict((NEARBY, 0.8), (NEARBY, times), bounded=bounded).ok == (times < 1)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("times", [8.0, 12.0])
def test_whether_a_step_leads_far_beyond_a_constraint_that_phi_rests_on(times, bounded):
    """Ten times as far as φ is inside of it is far."""
    assert verdict((INSIDE / 2, 18.0), (INSIDE, times), bounded=bounded).ok == (times > 10)


def test_a_force_is_in_doubt_only_where_there_are_much_larger_ones():
    """A solver's error is relative to these. The force is 1.07 * 8 * 3e-7 / 0.3², here."""
    assert verdict((INSIDE, 8.0), others=1.5).ok


# x[0] ≤ 1 and x[1] ≤ 1
SAME = {
    "rows": {"inequality": lambda x, a: torch.stack([x[0] - 1, x[1] - 1])},
    "bounds": {"bounds": (None, 1.0)},
}


def in_a_batch(a, phi, constraints):
    """The gradient and the status for two tasks that are the same."""
    monitor = ig.Monitor()
    condition = ig.argmin(lambda x, a: (x - a).square().sum(), **constraints)
    solve = ig.implicit(lambda a: phi.clone(), condition, monitor=monitor, on_failure="ignore")
    a = a.repeat(2, 1).requires_grad_()
    found = torch.autograd.grad(torch.func.vmap(solve)(a).sum(), a)[0]
    (status,) = {report.status for report in monitor.reports}
    return found, status


@pytest.mark.parametrize("constraints", SAME.values(), ids=SAME)
@pytest.mark.parametrize("beyond", [1e-6, 1e-3])
def test_forces_in_doubt_in_a_batch(beyond, constraints):
    """3e-7 off, x[0] may be on the other side of the kink as well."""
    phi = torch.tensor([1 - INSIDE, 1.0])
    found, status = in_a_batch(torch.tensor([1 + beyond, 5.0]), phi, constraints)
    torch.testing.assert_close(found, torch.zeros(2, 2))
    assert status.ok == (beyond == 1e-3)


@pytest.mark.parametrize("constraints", SAME.values(), ids=SAME)
@pytest.mark.parametrize("before", [BESIDE, NEARBY])
@pytest.mark.parametrize("times", [-1.2, 0.05, 1.2])
def test_steps_to_a_constraint_in_a_batch(times, before, constraints):
    phi = torch.tensor([1 - before, 0.3])
    found, status = in_a_batch(phi + torch.tensor([times * before, 0.0]), phi, constraints)
    torch.testing.assert_close(found, torch.ones(2, 2))
    assert status.ok == (times < 1)


def test_rounding_sends_no_task_its_own_way():
    """A limit to which only rounding pushes φ is for the batch as one that is far away."""
    random = torch.Generator().manual_seed(0)
    rows, a = (torch.randn(k, 6, generator=random) for k in (8, 50))
    phi, calls = a - (a.sum(1, keepdim=True) - 1) / 6, []  # the nearest with a sum of 1

    def evaluations(before):
        condition = ig.argmin(
            lambda x, a, limits: calls.append(1) or (x - a).square().sum(),
            equality=lambda x, a, limits: x.sum() - 1,
            inequality=lambda x, a, limits: rows @ x - limits,
        )
        solve = ig.implicit(lambda a, limits: a - (a.sum() - 1) / 6, condition)
        calls.clear()
        torch.func.vmap(torch.func.grad(lambda *args: solve(*args)[0]))(
            a, phi @ rows.T + before * rows.norm(dim=1)
        )
        return len(calls)

    assert evaluations(NEARBY) == evaluations(1.0)


def test_as_many_bounds_as_unknowns_cost_no_more_products():
    """All 300 elements lie beside a bound, with hardly a force: five are looked at."""
    products = []
    condition = ig.argmin(
        lambda x, a: Counted.apply(x - a, products).square().sum(), bounds=(None, 1.0)
    )
    phi = torch.full((300,), 1 - BESIDE)
    solve = ig.implicit(lambda a: phi.clone(), condition, check="never")
    a = phi + torch.linspace(0.001, 0.05, 300) * BESIDE
    solve(a.requires_grad_()).sum().backward()
    torch.testing.assert_close(a.grad, torch.ones(300))
    assert len(products) < 20


class Counted(torch.autograd.Function):
    """The identity, which notes that it is differentiated."""

    @staticmethod
    def forward(ctx, x, products):
        ctx.products = products
        return x.clone()

    @staticmethod
    def backward(ctx, v):
        ctx.products.append(1)
        return v.clone(), None


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


@pytest.mark.parametrize("constraints", SAME.values(), ids=SAME)
def test_a_face_is_no_more_to_one_side_for_rounding(constraints):
    """A linear program's minima are a face: φ may lie on it at any distance from other limits."""
    random = torch.Generator().manual_seed(0)
    row, phi = torch.rand(2, 6, generator=random)
    other = constraints.get("inequality", lambda x, a: torch.zeros(0))
    condition = ig.argmin(
        lambda x, a: -0.7 * row @ x,
        **constraints | {"inequality": lambda x, a: (row @ x - a, other(x, a))},
    )
    for before in torch.logspace(-6, -3.1, 20):
        phi[:2] = 1 - before
        solve = ig.implicit(lambda a: phi.clone(), condition, on_failure="raise")
        a = (row @ phi).requires_grad_()
        found = torch.autograd.grad(row @ solve(a), a)[0]
        torch.testing.assert_close(found, torch.tensor(1.0))
