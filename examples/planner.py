"""An obstacle that nobody sees, found from the paths around it: iLQR as a black box.

    python examples/planner.py

Six drivers steer around something, each to the same place. We know how a car moves, and that a
driver trades distance from it against effort; not where it is, how strongly it repels, or what
effort costs. Plans come from iLQR, a loop of small linear systems with a line search that branches,
which starts here at the paths that were seen. The gradient of the distance between plans and paths
goes through the planner by the implicit function theorem, from the cost of a plan alone. It is
compared with differences of whole plans; the descent with BFGS on differences, and Nelder-Mead.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Circle
from pictures import BLUE, GREY, ORANGE, options, panels, progress, save
from scipy.optimize import minimize
from torch import Tensor

import implicit_grad as ig

DT, GOAL, WIDTH = 0.16, (4.0, 0.0), 0.8
METHODS = HYPERGRADIENT, _, SIMPLEX = "BFGS, hypergradient", "BFGS, differences", "Nelder-Mead"
# the obstacle, its strength and the price of effort, both as logarithms
TRUE = torch.tensor([2.1, 0.2, 1.5, -1.0]).double()
GUESS = torch.tensor([1.5, -0.3, 0.0, -2.0]).double()


def moved(x: Tensor, u: Tensor) -> Tensor:
    """A car, at x, y, with a heading and a speed, after a step of acceleration and turning."""
    heading, speed = x[..., 2], x[..., 3]
    velocity = [speed * heading.cos(), speed * heading.sin(), u[..., 1], u[..., 0]]
    return x + DT * torch.stack(velocity, -1)


def running(x: Tensor, u: Tensor, taste: Tensor) -> Tensor:
    """What a moment costs: being near the obstacle, and effort."""
    near = (-(x[..., :2] - taste[:2]).square().sum(-1) / (2 * WIDTH**2)).exp()
    return DT * (taste[2].exp() * near + taste[3].exp() * u.square().sum(-1))


def final(x: Tensor) -> Tensor:
    """What it costs to be off the goal in the end, or to be moving."""
    return 10 * (x[..., :2] - x.new_tensor(GOAL)).square().sum(-1) + x[..., 3].square()


def path(u: Tensor, start: Tensor) -> Tensor:
    """The states that controls lead through; times along the first dimension, then cars."""
    states = [start]
    for control in u:
        states.append(moved(states[-1], control))
    return torch.stack(states)


def objective(u: Tensor, start: Tensor, taste: Tensor) -> Tensor:
    """All cars' costs; what iLQR minimises, car by car."""
    x = path(u, start)
    return running(x[:-1], u, taste).sum() + final(x[-1]).sum()


def model(x: Tensor, taste: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At each state, the dynamics' Jacobian, and the cost's slope and positive curvature."""
    A = torch.eye(4).to(x).repeat(*x.shape[:-1], 1, 1)
    sin, cos, speed = x[..., 2].sin(), x[..., 2].cos(), x[..., 3]
    A[..., 0, 2], A[..., 1, 2] = -DT * speed * sin, DT * speed * cos
    A[..., 0, 3], A[..., 1, 3] = DT * cos, DT * sin
    slope, bend = torch.zeros_like(x), torch.zeros_like(A)
    away = x[..., :2] - taste[:2]
    square = away.square().sum(-1, keepdim=True) / WIDTH**2
    force = DT * taste[2].exp() * (-square / 2).exp() / WIDTH**2
    slope[..., :2] = -force * away
    share = force * (1 - 1 / square).clamp(min=0) / WIDTH**2  # of the direction away from it
    bend[..., :2, :2] = share[..., None] * away[..., None] * away[..., None, :]
    return A, slope, bend


def ilqr(start: Tensor, taste: Tensor, u: Tensor, tol: float = 1e-6) -> Tensor:
    """Iterative LQR (Li and Todorov, 2004), of several cars at once, from the controls u."""
    lengths = torch.tensor([0.0, *(2.0**-k for k in range(8))]).to(u)[:, None, None]
    B = DT * torch.tensor([[0, 0], [0, 0], [0, 1], [1, 0]]).to(u)
    price, at_goal = 2 * DT * taste[3].exp(), torch.tensor([20, 20, 0, 2]).to(u)
    for _ in range(200):
        x = path(u, start)
        A, slope, bend = model(x[:-1], taste)
        v, V = at_goal * (x[-1] - torch.tensor([*GOAL, 0, 0])), at_goal.diag()
        law: list[tuple[Tensor, Tensor]] = []
        for t in reversed(range(len(u))):  # Riccati's recursion: the best step is k + K (x - x_t)
            Qu, Qux = price * u[t] + v @ B, B.mT @ V @ A[t]
            inverse = torch.linalg.inv(price * torch.eye(2) + B.mT @ V @ B)
            k, K = -times(inverse, Qu), -inverse @ Qux
            v = slope[t] + times(A[t].mT, v) + times(Qux.mT, k)
            V = bend[t] + A[t].mT @ V @ A[t] + Qux.mT @ K
            law.insert(0, (k, K))
        if max(k.abs().max() for k, _ in law) < tol:
            break
        tried, states = [], [start.expand(len(lengths), *start.shape)]
        for (k, K), before, control in zip(law, x, u, strict=False):
            tried.append(control + lengths * k + times(K, states[-1] - before))
            states.append(moved(states[-1], tried[-1]))
        controls = torch.stack(tried)
        moments = running(torch.stack(states[:-1]), controls, taste)
        costs = moments.sum(0) + final(states[-1])
        u = controls[:, costs.argmin(0), torch.arange(len(start))]  # each car's best length
    return u


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices times vectors, one by one."""
    return (matrices @ vectors[..., None])[..., 0]


class Seen:
    """Paths that were seen, and how far plans are from them."""

    def __init__(self, cars: int, steps: int) -> None:
        """Cars side by side, on their way to the goal."""
        y = torch.linspace(-1.2, 1.2, cars).double()
        self.start = torch.stack([0 * y, y, -0.3 * y, 0 * y + 1], -1)
        self.controls = ilqr(self.start, TRUE, torch.zeros(steps, cars, 2).double())
        self.path, self.plans = path(self.controls, self.start), 0

    def plan(self, start: Tensor, taste: Tensor) -> Tensor:
        """What iLQR makes of a taste; it starts at the controls that were seen."""
        self.plans += 1
        return ilqr(start, taste, self.controls)

    def miss(self, controls: Tensor) -> Tensor:
        """The mean square distance between the plans' places and those that were seen."""
        away = path(controls, self.start) - self.path
        return away[..., :2].square().sum(-1).mean()

    def loss(self, taste: Tensor, **settings: Any) -> Tensor:
        """The same of the plans for a taste, with its gradient."""
        solve = ig.implicit(self.plan, ig.argmin(objective), **settings)
        return self.miss(solve(self.start, taste))


def gradient_error(seen: Seen, step: float = 3e-3) -> float:
    """Of the implicit gradient at the guess, relative to fourth-order differences of plans."""
    at = GUESS.clone().requires_grad_()
    (implicit,) = torch.autograd.grad(seen.loss(at), [at])
    reference = torch.zeros(4).double()
    for length, weight in ((1, 8), (2, -1)):
        for sign in (1, -1):
            for i, e in enumerate(torch.eye(4).double()):
                value = seen.loss(GUESS + sign * length * step * e)
                reference[i] += sign * weight * value / (12 * step)
    return ((implicit - reference).norm() / reference.norm()).item()


def descended(seen: Seen, method: str, plans: int) -> tuple[Tensor, list[float]]:
    """SciPy's way from the guess: the best taste, and the least error after each plan."""
    errors: list[float] = []
    best, with_gradient, seen.plans = GUESS, method == HYPERGRADIENT, 0

    def value(taste: np.ndarray) -> Any:
        nonlocal best
        if seen.plans >= plans:
            raise StopIteration
        at = torch.tensor(taste, requires_grad=with_gradient)
        loss = seen.loss(at)
        if not errors or loss.item() < errors[-1]:
            best = at.detach()
        errors.append(min([loss.item(), *errors[-1:]]))
        if with_gradient:
            return loss.item(), torch.autograd.grad(loss, [at])[0].numpy()
        return loss.item()

    known = {"jac": True} if with_gradient else {"options": {"eps": 1e-4}}
    known = {"method": "Nelder-Mead"} if method == SIMPLEX else {"method": "BFGS", **known}
    with suppress(StopIteration):
        minimize(value, GUESS.numpy(), **known)
    return best, errors


def draw(seen: Seen, found: Tensor, curves: dict[str, list[float]]) -> Any:
    """The paths that were seen and those planned, and the error over the plans that it took."""
    figure, (left, right) = panels(2)
    for taste, color, label in ((GUESS, ORANGE, "first guess"), (found, BLUE, "found")):
        x = path(seen.plan(seen.start, taste), seen.start)
        lines = left.plot(*x[..., :2].unbind(-1), color=color, linewidth=1.5)
        lines[0].set_label(label)
        left.plot(*taste[:2], "x", color=color, markersize=10, markeredgewidth=2)
    dots = left.plot(*seen.path[..., :2].unbind(-1), ".", color="black", markersize=3)
    dots[0].set_label("seen")
    left.add_patch(Circle(tuple(TRUE[:2].tolist()), WIDTH, color=GREY, alpha=0.3))
    left.set(xlabel="x", ylabel="y", aspect="equal", xlim=(-0.3, 6))
    left.legend(frameon=False, fontsize=8, loc="center right")
    for (method, errors), color in zip(curves.items(), (BLUE, ORANGE, GREY), strict=True):
        right.semilogy(range(1, len(errors) + 1), errors, color=color, label=method)
    right.set(xlabel="plans", ylabel="mean square distance from the paths")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Find the obstacle in three ways; the errors after each plan, and the gradient's."""
    chosen = options(__doc__, arguments, cars=6, steps=25, plans=60)
    seen = Seen(chosen.cars, chosen.steps)
    error = gradient_error(seen)
    print(f"the implicit gradient is that of differences of plans to {error:.1e}")
    curves, found = {}, {}
    for method in progress(METHODS, "planner"):
        found[method], curves[method] = descended(seen, method, chosen.plans)
        away = (found[method] - TRUE).abs()
        print(
            f"  {method:26} {len(curves[method]):3} plans: mean square distance "
            f"{curves[method][-1]:.1e}, obstacle off by {away[:2].norm():.1e}, "
            f"log strength by {away[2]:.1e}, log price by {away[3]:.1e}"
        )
    save(draw(seen, found[HYPERGRADIENT], curves), chosen.out, "planner")
    return {"gradient": error, **curves}


if __name__ == "__main__":
    main()
