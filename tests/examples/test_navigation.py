"""Navigation in the plane: the task, DiCE, TRPO's products and all of it in miniature."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call

import implicit_grad as ig

for neighbour in ("learn2learn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(neighbour)

pytestmark = pytest.mark.usefixtures("examples_on_path")


@pytest.fixture
def met() -> Iterator[tuple[Any, Any]]:
    """A small policy in double precision, and episodes that it met."""
    import plane

    torch.manual_seed(0)
    policy = plane.Policy(3)
    found = plane.episodes(policy, plane.Navigation(5, horizon=6), np.float32([0.3, -0.2]))
    policy = policy.double()
    doubles = [t.double() for t in found if torch.is_tensor(t)]
    observations, actions, rewards, _, *rest = doubles
    density = plane.density(policy, observations)
    density = type(density)(density.mean.detach(), density.stddev.detach())
    log_density = density.log_prob(actions).sum(-1)
    return policy, plane.Episodes(observations, actions, rewards, density, log_density, *rest)


def test_a_point_that_heads_for_the_goal_arrives_and_stays() -> None:
    import plane

    navigation = plane.Navigation(num_envs=2, horizon=12, seed=3)
    goals = navigation.sample_tasks(50)
    assert np.abs(goals).max() <= plane.REACH and np.abs(goals).max() > 0.8 * plane.REACH
    navigation.set_task(goals[0])
    place, _ = navigation.reset(seed=0)
    assert not place.any()
    for step in range(12):
        actions = (goals[0] - place) / plane.SPEED
        both = np.stack([actions[0], -actions[1]])
        place, rewards, terminated, truncated, _ = navigation.step(both)
        assert not terminated.any() and truncated.all() == (step == 11)
    assert rewards[0] == pytest.approx(0, abs=1e-6)
    assert rewards[1] == pytest.approx(-np.linalg.norm(place[1] - goals[0])) and rewards[1] < -1


def test_dice_has_the_policy_gradient_and_the_value_of_the_returns(met: tuple[Any, Any]) -> None:
    import navigation
    from plane import DISCOUNT

    policy, found = met
    value = navigation.dice(policy, found)
    discount = DISCOUNT ** torch.arange(6.0, dtype=torch.float64)[:, None]
    assert value.item() == pytest.approx(-(discount * found.rewards).mean() / found.scale)
    weights = list(policy.parameters())
    slope = torch.autograd.grad(value, weights)
    following = (discount * found.rewards).flip(0).cumsum(0).flip(0)
    better = (following - discount * found.baseline) / found.scale
    expected = torch.autograd.grad(
        -(navigation.log_density(policy, found) * better).mean(), weights
    )
    assert navigation.flat(slope) @ navigation.flat(slope) > 0
    for one, other in zip(slope, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["policy_gradient", "ratio", "dice"])
def test_early_stopped_after_one_step_is_maml(loss: str, met: tuple[Any, Any]) -> None:
    """Where no curvature is beyond 2 / lr."""
    import navigation

    policy, found = met
    inner = getattr(navigation, loss)

    def gradient(method: str) -> Tensor:
        learner = navigation.adapted(navigation.wrapped(method, policy, None), inner, found)
        outer = navigation.clipped_ratio(learner, found)
        return navigation.flat(torch.autograd.grad(outer, list(policy.parameters())))

    maml = gradient("MAML")
    torch.testing.assert_close(gradient("iMAML, EarlyStopped"), maml, rtol=1e-6, atol=1e-9)
    assert (gradient("first-order MAML") - maml).norm() > 1e-2 * maml.norm()


def test_trpos_products_are_those_of_the_dense_matrices(met: tuple[Any, Any]) -> None:
    """Behind φ = θ − lr ∇L, the KL divergence's Hessian at 0 is Jᵀ F J with J = (I + lr ∇²L)⁻¹."""
    import navigation
    import plane

    policy, found = met
    shapes = {name: p.detach() for name, p in policy.named_parameters()}

    def as_dict(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in shapes.values()])
        return {k: part.view_as(p) for (k, p), part in zip(shapes.items(), parts, strict=True)}

    maml = navigation.wrapped("iMAML", policy, ig.Monitor())
    learner = navigation.adapted(maml, navigation.policy_gradient, found, twice=True)
    phi = navigation.flat([p.detach() for p in learner.module.parameters()])

    def of(vector: Tensor) -> Any:
        return lambda x: functional_call(policy, as_dict(vector), (x,))

    was = plane.density(of(phi), found.observations)
    weights = list(policy.parameters())
    divergence = kl_divergence(was, plane.density(learner, found.observations)).mean()
    slope = navigation.flat(torch.autograd.grad(divergence, weights, create_graph=True))
    v = torch.randn_like(slope)
    product = navigation.flat(torch.autograd.grad(slope @ v, weights))

    hessian = torch.autograd.functional.hessian
    H = hessian(lambda p: navigation.policy_gradient(of(p), found), phi)
    F = hessian(lambda p: kl_divergence(was, plane.density(of(p), found.observations)).mean(), phi)
    J = torch.linalg.inv(torch.eye(len(phi), dtype=torch.float64) + navigation.LR * H)
    assert torch.linalg.eigvalsh(J).min() > 0  # else the solves stop early, by choice
    torch.testing.assert_close(product, J.T @ F @ J @ v, rtol=1e-3, atol=1e-5)
    assert (product - F @ v).norm() > 1e-2 * product.norm()


def test_each_algorithm_by_each_method_in_miniature(tmp_path: Path) -> None:
    import navigation

    sizes = {"iterations": 2, "tasks": 2, "episodes": 4, "test": 2, "width": 4, "seeds": 1}
    options = [part for k, v in sizes.items() for part in (f"--{k}", str(v))]
    runs = navigation.main(["--out", str(tmp_path), *options])
    assert len(runs) == 11
    for (_, method), (run,) in runs.items():
        assert len(run.after) == 3 and np.isfinite(run.after).all()
        assert len({*run.before}) == 3  # the weights moved
        assert bool(run.reports) == method.startswith("iMAML")
    assert 5_000 < (tmp_path / "navigation.png").stat().st_size < 150_000
