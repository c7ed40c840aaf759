"""What did the expert want? A reward learned through fitted Q-iteration.

    python examples/fitted_q.py

Somebody walks over a square to a goal and around a swamp, and we see a few walks. We know neither
goal nor swamp, but have 1,000 transitions of random actions. Fitted Q-iteration (Ernst et al.,
2005; by averages, which cannot diverge: Ormoneit and Sen, 2002) turns a reward into values of
actions by those transitions. Where it ends is a fixed point, through which the theorem
differentiates; the reward is learned so that the walks become likely (inverse reinforcement
learning). The gradient is compared with that of the iteration, unrolled to its end. The baseline is
cloning: a softmax regression of the actions that were seen, on the same features and with the best
penalty of a grid in test. It learns what to do where the expert was, and nothing of elsewhere.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.colors import CenteredNorm
from pictures import BLUE, GREY, ORANGE, band, options, panels, progress, save, show
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import implicit_grad as ig

GAMMA, SOFT, STEP = 0.9, 0.05, 0.1
PENALTY, WALKS, LEARNED, CLONED = 1e-3, (2, 5, 10), "learned reward", "cloned"
MOVES = STEP * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]).double()
CENTRES = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 7).double()])
GOAL, SWAMP = torch.tensor([0.8, 0.8]).double(), torch.tensor([0.5, 0.45]).double()


def features(s: Tensor) -> Tensor:
    """Bumps at a grid of centres that sum to 1, at each place."""
    return (-(s[..., None, :] - CENTRES).square().sum(-1) / 0.01).softmax(-1)


def reward(s: Tensor) -> Tensor:
    """What the expert gets: near the goal, and less than nothing in the swamp."""
    bump = lambda at, width: (-(s - at).square().sum(-1) / width**2).exp()  # noqa: E731
    return bump(GOAL, 0.15) - bump(SWAMP, 0.2)


def moved(s: Tensor, a: Tensor) -> Tensor:
    """Where an action leads, with some chance."""
    return (s + MOVES[a] + 0.03 * torch.randn_like(s)).clamp(0, 1)


class Log:
    """Transitions of random actions."""

    def __init__(self, transitions: int) -> None:
        """For each action and centre, the shares of the transitions in the average there."""
        s, a = torch.rand(transitions, 2).double(), torch.randint(4, (transitions,))
        self.after = features(moved(s, a))
        taken = one_hot(a, 4).to(s)
        near = features(s).T[:, None, :] * taken.T
        self.fit = near / (near.sum(-1, keepdim=True) + 1e-6)

    def averaged(self, q: Tensor, theta: Tensor) -> Tensor:
        """Values of actions at the centres, from those before: one round of fitted Q-iteration."""
        best = SOFT * (self.after @ q / SOFT).logsumexp(-1)
        return self.fit @ (self.after @ theta + GAMMA * best)

    def iterated(self, theta: Tensor, tol: float = 1e-10) -> Tensor:
        """The fixed point; a black box, or, if gradients are on, unrolled."""
        q = torch.zeros(len(CENTRES), 4).double()
        while True:
            before, q = q, self.averaged(q, theta)
            if (q - before).abs().max() < tol:
                return q

    def values(self, theta: Tensor, **settings: Any) -> Tensor:
        """The same with a gradient, by the theorem."""
        return ig.implicit(self.iterated, ig.fixed_point(self.averaged), **settings)(theta)


def walks(q: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Places and actions of walks from anywhere; actions are as likely as their values say."""
    s, places, actions = torch.rand(count, 2).double(), [], []
    for _ in range(length):
        a = torch.distributions.Categorical(logits=features(s) @ q / SOFT).sample()
        places.append(s)
        actions.append(a)
        s = moved(s, a)
    return torch.stack(places), torch.stack(actions)


def learned(log: Log, s: Tensor, a: Tensor, updates: int) -> Tensor:
    """Values by the reward that makes the actions likely, learned by Adam."""
    theta = torch.zeros(len(CENTRES)).double().requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.15)
    for _ in range(updates):
        adam.zero_grad()
        unlikely = cross_entropy(features(s) @ log.values(theta) / SOFT, a)
        (unlikely + PENALTY * theta.square().sum()).backward()
        adam.step()
    return theta.detach()


def cloned(s: Tensor, a: Tensor, penalty: float) -> Tensor:
    """What stands for values in a softmax regression of the actions."""
    q = torch.zeros(len(CENTRES), 4).double().requires_grad_()
    lbfgs = torch.optim.LBFGS([q], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        unlikely = cross_entropy(features(s) @ q / SOFT, a) + penalty * q.square().sum()
        unlikely.backward()
        return unlikely

    lbfgs.step(closure)
    return q.detach()


def gained(q: Tensor) -> float:
    """The mean reward of a moment, over many walks."""
    return reward(walks(q, 1000, 30)[0]).mean().item()


def compared(log: Log, theta: Tensor, s: Tensor, a: Tensor) -> tuple[float, float]:
    """The gradient's distance from the unrolled one, relative, and how many times faster it is."""
    gradients, seconds = [], []
    for values in (log.values, log.iterated):
        at, start = theta.clone().requires_grad_(), time.perf_counter()
        cross_entropy(features(s) @ values(at) / SOFT, a).backward()
        seconds.append(time.perf_counter() - start)
        gradients.append(at.grad)
    implicit, unrolled = gradients
    return ((implicit - unrolled).norm() / unrolled.norm()).item(), seconds[1] / seconds[0]


def draw(theta: Tensor, places: Tensor, gains: dict[str, list[list[float]]], shown: Any) -> Any:
    """The true reward and the learned one, and what is gained after so many walks."""
    figure, (left, middle, right) = panels(3, width=3.6)
    grid = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 60).double()])
    for panel, values in ((left, reward(grid)), (middle, features(grid) @ theta)):
        image = values.reshape(60, 60).T.numpy()
        panel.imshow(image, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu", norm=CenteredNorm())
        panel.grid(visible=False)
    left.plot(*places.unbind(-1), color="black", linewidth=1)
    left.set(title="true reward, and the walks")
    middle.set(title="learned reward")
    looks = (GREY, "--"), (BLUE, "-"), (ORANGE, "-"), (GREY, ":")
    for (name, values), (color, style) in zip(gains.items(), looks, strict=True):
        band(right, shown, values, color, name, style)
    right.set(xlabel="walks that were seen", ylabel="reward gained")
    right.set_xticks(shown, [str(count) for count in shown])
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Learn from more and more walks; what is gained, and the gradient's error."""
    chosen = options(__doc__, arguments, transitions=1000, updates=40, seeds=4)
    gains: dict[str, list[list[float]]] = {}
    for seed in progress(range(chosen.seeds), "fitted_q"):
        torch.manual_seed(seed)
        log, anywhere = Log(chosen.transitions), torch.rand(4000, 2).double()
        true = torch.linalg.lstsq(features(anywhere), reward(anywhere)[:, None]).solution[:, 0]
        expert = log.iterated(true)
        places, actions = walks(expert, max(WALKS), 12)
        found: dict[str, list[float]] = {}
        for count in WALKS:
            s, a = places[:, :count].flatten(0, 1), actions[:, :count].flatten()
            theta = learned(log, s, a, chosen.updates)
            clones = [gained(cloned(s, a, penalty)) for penalty in (1e-4, 1e-3, 1e-2)]
            for name, gain in (
                ("the expert", gained(expert)),
                (LEARNED, gained(log.iterated(theta))),
                (CLONED, max(clones)),
                ("at random", gained(torch.zeros_like(expert))),
            ):
                found.setdefault(name, []).append(gain)
        for name, values in found.items():
            gains.setdefault(name, []).append(values)
    error, times = compared(log, theta, s, a)
    print(f"the implicit gradient is the unrolled one to {error:.1e}, {times:.1f} times faster")
    print(f"reward gained, mean ± 95 % interval over {chosen.seeds} seeds, after {WALKS} walks")
    for name, values in gains.items():
        columns = zip(*values, strict=True)
        print(f"  {name:12}" + "".join(f"{show(column, 2):>16}" for column in columns))
    save(draw(theta, places, gains, WALKS), chosen.out, "fitted_q")
    return {"gradient": error, **gains}


if __name__ == "__main__":
    main()
