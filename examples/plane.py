"""Points in the plane that go to a hidden goal: the task of `navigation.py`, and its episodes."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

DISCOUNT = 0.95
REACH, SPEED = 0.5, 0.1

Numbers = np.ndarray[Any, np.dtype[np.float32]]


class Navigation:
    """`num_envs` points that start at 0 and see where they are, in gymnasium's vector interface.

    An action is a velocity, cut to -1 to 1 in both directions; the reward is minus the distance to
    the goal, the same for all points. Episodes have one length. (After Finn et al., 2017.)
    """

    def __init__(self, num_envs: int = 20, horizon: int = 15, seed: int = 0) -> None:
        self.num_envs, self.horizon = num_envs, horizon
        self.random = np.random.default_rng(seed)
        self.goal = np.zeros(2, dtype=np.float32)

    def sample_tasks(self, count: int) -> list[Numbers]:
        """Goals, uniform in a square."""
        goals = self.random.uniform(-REACH, REACH, (count, 2)).astype(np.float32)
        return list(goals)

    def set_task(self, goal: Numbers) -> None:
        """The goal of the next episodes."""
        self.goal = goal

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Numbers, dict[str, Any]]:
        """Begin new episodes; observations, and nothing else to know."""
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.position = np.zeros((self.num_envs, 2), dtype=np.float32)
        self.time = 0
        return self.position, {}

    def step(self, actions: Numbers) -> tuple[Numbers, Numbers, Any, Any, dict[str, Any]]:
        """Observations, rewards, whether terminated, whether truncated, and nothing else."""
        self.position = self.position + SPEED * np.clip(actions, -1, 1)
        self.time += 1
        rewards = -np.linalg.norm(self.position - self.goal, axis=1)
        never, now = np.zeros(self.num_envs, bool), np.full(self.num_envs, True)
        return self.position, rewards, never, now if self.time == self.horizon else never, {}


class Policy(nn.Module):
    """A Gaussian: `policy(observations)` are its mean and the logarithm of its deviation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        self.mean = nn.Sequential(*layers, nn.Linear(width, 2))
        self.log_deviation = nn.Parameter(torch.full((2,), -0.7))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """For each observation, and for all."""
        mean = self.mean(observations)
        return mean, self.log_deviation.expand_as(mean)


def density(policy: Any, observations: Tensor) -> Normal:
    """Of the actions, each element for itself."""
    mean, log_deviation = policy(observations)
    return Normal(mean, log_deviation.exp(), validate_args=False)


class Episodes(NamedTuple):
    """What a policy met; times along the first dimension, then episodes.

    `density` is that of the policy, of which `log_density` are the logarithms for the actions;
    `baseline` the return that a linear function of place and time predicts; `advantages` by how
    much the return was better, in units of its standard deviation, `scale`.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    density: Normal
    log_density: Tensor
    baseline: Tensor
    advantages: Tensor
    scale: Tensor


@torch.no_grad()
def episodes(policy: Any, navigation: Navigation, goal: Numbers) -> Episodes:
    """One episode of each point."""
    navigation.set_task(goal)
    observation, _ = navigation.reset()
    met: list[tuple[Tensor, ...]] = []
    over = False
    while not over:
        seen = torch.as_tensor(observation)
        actions = density(policy, seen).sample()
        observation, reward, _, truncated, _ = navigation.step(actions.numpy())
        met.append((seen, actions, torch.as_tensor(reward)))
        over = truncated.all()
    observations, actions, rewards = (torch.stack(part) for part in zip(*met, strict=True))
    of_policy = density(policy, observations)
    log_density = of_policy.log_prob(actions).sum(-1)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + DISCOUNT * following
    baseline = fitted(observations, returns)
    scale = (returns - baseline).std() + 1e-8
    advantages = (returns - baseline) / scale
    of_actions = of_policy, log_density
    return Episodes(observations, actions, rewards, *of_actions, baseline, advantages, scale)


def fitted(observations: Tensor, returns: Tensor) -> Tensor:
    """The least-squares fit of the returns by place and time."""
    time = torch.linspace(0, 1, len(returns))[:, None, None].expand(*returns.shape, 1)
    powers = [torch.ones_like(time), time, time**2, time**3]
    features = torch.cat([observations, observations**2, *powers], -1).flatten(0, 1).double()
    eye = 1e-5 * torch.eye(features.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(features.T @ features + eye, features.T @ returns.double().ravel())
    return (features @ weights).view_as(returns).to(returns.dtype)
