"""Meta-reinforcement learning with iMAML in MAML's place: TRPO, ProMP and DiCE on 2-D navigation.

    python examples/navigation.py

A policy takes 20 episodes to a goal that it does not see, adapts by one step of its policy
gradient, and is judged by the next 20 (Finn et al., 2017). What is learned are the weights it
starts from, by the outer loss of

- TRPO, as in learn2learn's maml_trpo: a natural gradient, with products of the Hessian of the mean
  KL divergence behind adaptation. That takes second derivatives through the adapted weights, which
  `imaml` has for `adapt(closure)`, by default solving on for them.
- ProMP (Rothfuss et al., 2019): several steps of Adam on a clipped ratio, in the outer loss, and
  a KL divergence that is measured before adaptation.
- DiCE (Foerster et al., 2018): an estimator of the return whose derivatives of every order are
  estimates of those of the return. They are not derivatives of its value, which does not depend on
  the weights: imaml's check would find that and warn, so it is told `check="never"`.

What the episodes say of the policy they say of the one that met them. So the curvature is taken
before the step, as MAML does, which is what `adapt(tensor)` means, and not where the step ended.

Each by MAML, by first-order MAML, and by `ig.imaml(maml)` with its default and, but for TRPO, with
`EarlyStopped(maxiter=5)`. A policy's loss is far from convex: I + lr·H comes to have eigenvalues
near 0 and below, where its inverse is too long, or of the opposite sign. The default lets negative
curvature count as none, so that there it is first-order MAML. EarlyStopped has MAML's own I − lr·H,
but for curvatures that a step overshoots, beyond 2/lr: there it is 0. DiCE's estimates of H have
such (lr·h from −14 to 14), which MAML's gradients multiply.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import learn2learn as l2l
import numpy as np
import torch
from pictures import BLUE, GREEN, ORANGE, RED, band, options, panels, progress, save, show
from plane import DISCOUNT, Episodes, Navigation, Numbers, Policy, density, episodes
from torch import Tensor, nn
from torch.distributions import kl_divergence

import implicit_grad as ig
from implicit_grad.learn2learn import ImplicitMAML

LR, META_LR = 0.1, 1e-2
MAX_KL, CG_STEPS, DAMPING = 0.02, 4, 1e-3
EPOCHS, CLIP, KL_WEIGHT = 4, 0.2, 5e-4
COLOURS = {
    "MAML": ORANGE,
    "first-order MAML": GREEN,
    "iMAML": BLUE,
    "iMAML, EarlyStopped": RED,
}

Loss = Callable[[Any, Episodes], Tensor]


class Task(NamedTuple):
    """Episodes before and after adaptation."""

    before: Episodes
    after: Episodes


Update = Callable[[Any, list[Task], torch.optim.Optimizer], None]


def wrapped(method: str, policy: nn.Module, monitor: ig.Monitor) -> Any:
    """MAML, or what stands in its place."""
    maml = l2l.algorithms.MAML(policy, lr=LR, first_order=method == "first-order MAML")
    if not method.startswith("iMAML"):
        return maml
    solver = ig.EarlyStopped(maxiter=5) if method.endswith("EarlyStopped") else None
    settings = {"check": "never", "monitor": monitor, "on_failure": "ignore"}
    return ig.imaml(maml, linear_solver=solver, **settings)


def adapted(maml: Any, loss: Loss, found: Episodes, twice: bool = False) -> Any:
    """A copy that took one step on the episodes; with derivatives of second order, if `twice`."""
    learner = maml.clone()
    if twice and isinstance(learner, ImplicitMAML):
        learner.adapt(lambda: loss(learner, found))
    else:
        learner.adapt(loss(learner, found))
    return learner


# ---------------------------------------------------------------- losses of episodes


def log_density(policy: Any, found: Episodes) -> Tensor:
    """Of the actions that were taken, by time and episode."""
    return density(policy, found.observations).log_prob(found.actions).sum(-1)


def policy_gradient(policy: Any, found: Episodes) -> Tensor:
    """The loss of an actor with advantages."""
    return -(log_density(policy, found) * found.advantages).mean()


def ratio(policy: Any, found: Episodes) -> Tensor:
    """The advantages, weighted by how much likelier the actions have become."""
    return -(importance(policy, found) * found.advantages).mean()


def clipped_ratio(policy: Any, found: Episodes) -> Tensor:
    """The same without reward for going far."""
    weight = importance(policy, found)
    cut = weight.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(weight * found.advantages, cut * found.advantages).mean()


def importance(policy: Any, found: Episodes) -> Tensor:
    """By how much likelier the actions have become."""
    return (log_density(policy, found) - found.log_density).exp()


def dice(policy: Any, found: Episodes) -> Tensor:
    """Rewards and baselines, each times a 1 with the derivatives of what it depends on."""

    def one(log_probability: Tensor) -> Tensor:
        return (log_probability - log_probability.detach()).exp()

    log_densities = log_density(policy, found)
    discount = DISCOUNT ** torch.arange(len(log_densities))[:, None]
    returns = one(log_densities.cumsum(0)) * discount * found.rewards
    baselines = (1 - one(log_densities)) * discount * found.baseline
    return -(returns + baselines).mean() / found.scale


# ---------------------------------------------------------------- updates of the start


def trpo(maml: Any, tasks: list[Task], _: torch.optim.Optimizer) -> None:
    """A natural gradient, and a search along it within a trust region."""
    parameters = list(maml.parameters())

    def measured() -> tuple[Tensor, Tensor]:
        """The mean loss and the mean divergence from the policies that met `after`."""
        losses, divergences = [], []
        for task in tasks:
            learner = adapted(maml, policy_gradient, task.before, twice=True)
            losses.append(ratio(learner, task.after))
            now = density(learner, task.after.observations)
            divergences.append(kl_divergence(task.after.density, now).mean())
        return torch.stack(losses).mean(), torch.stack(divergences).mean()

    loss, divergence = measured()
    gradient = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
    slope = flat(torch.autograd.grad(divergence, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        curved = torch.autograd.grad(slope @ v, parameters, retain_graph=True)
        return flat(curved) + DAMPING * v

    step = conjugate_gradients(product, gradient)
    length = (2 * MAX_KL / (step @ product(step)).clamp(min=1e-12)).sqrt()
    start = flat(parameters).detach()
    for shorter in (1.0, 0.5, 0.25, 0.125, 0.0):
        nn.utils.vector_to_parameters(start - shorter * length * step, parameters)
        found, far = (value.item() for value in measured())
        if found < loss.item() and far < MAX_KL:
            return


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """A few of them, up to the first direction of no positive curvature."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r, r @ r
    for _ in range(CG_STEPS):  # behind a solve that stopped early, the matrix is not symmetric
        Ap = product(p)
        if p @ Ap <= 0:
            break
        alpha = rr / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def promp(maml: Any, tasks: list[Task], adam: torch.optim.Optimizer) -> None:
    """Some steps on the clipped ratio, held near the policies that met `before`."""
    for _ in range(EPOCHS):
        adam.zero_grad()
        for task in tasks:
            learner = maml.clone()
            divergence = kl_divergence(
                task.before.density, density(learner, task.before.observations)
            )
            learner.adapt(ratio(learner, task.before))
            loss = clipped_ratio(learner, task.after) + KL_WEIGHT * divergence.mean()
            (loss / len(tasks)).backward()
        adam.step()


def policy_gradients(maml: Any, tasks: list[Task], adam: torch.optim.Optimizer) -> None:
    """One step on DiCE's estimator after a step on it."""
    adam.zero_grad()
    for task in tasks:
        (dice(adapted(maml, dice, task.before), task.after) / len(tasks)).backward()
    adam.step()


# outer update, and the loss that adaptation takes its step on
ALGORITHMS: dict[str, tuple[Update, Loss]] = {
    "TRPO": (trpo, policy_gradient),
    "ProMP": (promp, ratio),
    "DiCE": (policy_gradients, dice),
}


def pairs() -> list[tuple[str, str]]:
    """Algorithms and methods, but for what has no second derivatives."""
    every = [(algorithm, method) for algorithm in ALGORITHMS for method in COLOURS]
    return [pair for pair in every if pair != ("TRPO", "iMAML, EarlyStopped")]


# ---------------------------------------------------------------- the whole


class Run(NamedTuple):
    """Mean returns of test tasks before and after adaptation, as learning goes on."""

    before: list[float]
    after: list[float]
    seconds: float
    reports: list[ig.Report]


def meta_train(algorithm: str, method: str, seed: int, chosen: Any) -> Run:
    """Learn from new goals in every iteration; test on the same ones now and then."""
    torch.manual_seed(seed)
    policy, monitor = Policy(chosen.width), ig.Monitor()
    maml = wrapped(method, policy, monitor)
    update, loss = ALGORITHMS[algorithm]
    adam = torch.optim.Adam(policy.parameters(), META_LR)
    navigation = Navigation(chosen.episodes, seed=seed)
    goals = Navigation(seed=10_000).sample_tasks(chosen.test)

    def met(goal: Numbers) -> Task:
        before = episodes(maml, navigation, goal)
        return Task(before, episodes(adapted(maml, loss, before), navigation, goal))

    returns: list[tuple[float, float]] = []
    seconds, every = 0.0, max(1, chosen.iterations // 5)
    for iteration in progress(range(chosen.iterations + 1), f"{algorithm}, {method}"):
        if iteration % every == 0:
            tasks = [met(goal) for goal in goals]
            both = [[part.rewards.sum(0).mean().item() for part in task] for task in tasks]
            returns.append(tuple(np.mean(both, 0)))
        began = time.perf_counter()
        if iteration < chosen.iterations:
            update(maml, [met(goal) for goal in navigation.sample_tasks(chosen.tasks)], adam)
        seconds += time.perf_counter() - began
    before, after = (list(column) for column in zip(*returns, strict=True))
    return Run(before, after, seconds / chosen.iterations, monitor.reports)


def draw(runs: dict[tuple[str, str], list[Run]], iterations: int) -> Any:
    """Returns after adaptation, and before it (dotted)."""
    figure, axes = panels(len(ALGORITHMS), 3.6)
    for panel, algorithm in zip(axes, ALGORITHMS, strict=True):
        for name, method in pairs():
            if name != algorithm:
                continue
            found, colour = runs[name, method], COLOURS[method]
            x = np.linspace(0, iterations, len(found[0].after))
            band(panel, x, [run.after for run in found], colour, method)
            panel.plot(x, np.mean([run.before for run in found], 0), ":", color=colour)
        panel.set(title=algorithm, xlabel="meta-iteration")
    axes[0].set_ylabel("return of an episode")
    axes[-1].legend(frameon=False, fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[tuple[str, str], list[Run]]:
    """All algorithms by all methods over seeds, one table, one picture."""
    defaults = {"iterations": 15, "tasks": 5, "episodes": 20, "test": 16, "width": 32, "seeds": 3}
    chosen = options(__doc__, arguments, **defaults)
    runs = {
        pair: [meta_train(*pair, seed, chosen) for seed in range(chosen.seeds)] for pair in pairs()
    }
    print(f"return of an episode on {chosen.test} test goals: before and after adaptation; s per")
    print("meta-iteration; linear solves that met negative curvature")
    for (algorithm, method), found in runs.items():
        print(f"  {algorithm:6}{method:21}", end="")
        print(f"{show([run.before[-1] for run in found], 2):>16}", end="")
        print(f"{show([run.after[-1] for run in found], 2):>16}", end="")
        print(f"{np.mean([run.seconds for run in found]):7.2f} s", end="")
        reports = [report for run in found for report in run.reports]
        bad = sum(not report.status.ok for report in reports)
        print(f"{bad:8} of {len(reports)}" if reports else "")
    save(draw(runs, chosen.iterations), chosen.out, "navigation")
    return runs


if __name__ == "__main__":
    main()
