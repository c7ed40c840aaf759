"""Any sequence of a MAML pipeline's calls of `imaml`, against a small model that is plainly right.

The model is linear regression, whose Hessian is a constant matrix: what a learner's weights are,
and their Jacobian by θ and by those of the learner it was cloned from, follow from dense algebra.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fingerprint import surroundings
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import implicit_grad as ig

IN, SIZE = 2, 3  # inputs; parameters, with the bias
LR, LAMS = 0.1, (1.5, None)


class Line(nn.Module):
    """A linear model that counts its calls in train mode, and is off by one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, 1)
        self.shift = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (0.0 if self.training else self.shift)


class Task:
    """A quadratic loss ½ wᵀHw − cᵀw + …, from data; the linear model's mean squared error."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.x = torch.randn(4, IN, generator=random)
        self.y = torch.randn(4, 1, generator=random)

    def of(self, learner: Any) -> Tensor:
        return mse_loss(learner(self.x), self.y)

    def dense(self, training: bool) -> tuple[Tensor, Tensor]:
        design = torch.cat([self.x, torch.ones(4, 1)], dim=1)
        target = self.y.flatten() - (0.0 if training else 1.0)
        return 2 / 4 * design.T @ design, 2 / 4 * design.T @ target

    def slope(self, w: Tensor, training: bool) -> Tensor:
        hessian, c = self.dense(training)
        return hessian @ w - c


class Reference:
    """What a learner is: weights, their Jacobian by θ, and what pulls them where.

    For a step or a minimisation, ∂φ/∂θ' = (H + λ)⁻¹λ with θ' the weights of the learner that this
    one was cloned from, as they were then; the chain rule through θ' does the rest. Without a λ,
    nothing pulls the steps, and λ = 1/(the sum of their lengths).
    """

    def __init__(self, weights: Tensor, jacobian: Tensor, lam: float | None) -> None:
        self.lam, self.time = lam, 0.0
        self.weights = self.anchor = weights.clone()
        self.jacobian = self.anchor_jacobian = jacobian.clone()

    def step(self, task: Task, training: bool, steps: int, first_order: bool) -> None:
        w = self.weights
        for _ in range(steps):
            pull = 0.0 if self.lam is None else LR * self.lam
            w = (w - LR * task.slope(w, training) + pull * self.anchor) / (1 + pull)
        self.weights, self.time = w, self.time + LR * steps
        lam = 1 / self.time if self.lam is None else self.lam
        hessian, _ = task.dense(training)
        implicit = torch.linalg.solve(hessian + lam * torch.eye(SIZE), lam * torch.eye(SIZE))
        self.jacobian = self.anchor_jacobian if first_order else implicit @ self.anchor_jacobian


def vector(module: Any) -> Tensor:
    return torch.cat([p.flatten() for p in module.parameters()])


@dataclasses.dataclass(eq=False)
class Version:
    """One generation of a learner's weights, and what decides whether backward may pass it.

    A step on a tensor drops what the gradient of the weights before it needs, if they came from
    such a step too; then whoever was cloned from them is cut off.
    """

    anchor: Version | None
    by_tensor: bool = False
    implicit: bool = False  # its gradient is taken at θ, which must not have changed
    dropped: bool = False

    def next(self, style: str, first_order: bool) -> Version:
        by_tensor = style == "tensor" and not first_order
        self.dropped = self.dropped or (by_tensor and self.by_tensor)
        return Version(self.anchor, by_tensor, not first_order)

    @property
    def line(self) -> Iterator[Version]:
        """This one, what it was cloned from, and so on."""
        yield self
        if self.anchor is not None:
            yield from self.anchor.line


class Learner:
    """A learner and its reference, side by side."""

    def __init__(self, real: Any, parent: Learner | None, theta: Tensor, generation: int) -> None:
        self.real, self.generation = real, generation
        if parent is None:
            self.ideal, anchor = Reference(theta, torch.eye(SIZE), real.lam), None
        else:
            self.ideal = Reference(parent.ideal.weights, parent.ideal.jacobian, real.lam)
            anchor = parent.version
        self.version = Version(anchor)

    def adapted(self, task: Task, style: str, steps: int, first_order: bool) -> None:
        self.ideal.step(task, self.real.training, steps, first_order)
        self.version = self.version.next(style, first_order)

    @property
    def cut_off(self) -> bool:
        """Whether what its gradient needs has been dropped."""
        return any(version.dropped for version in self.version.line)

    @property
    def needs_theta(self) -> bool:
        """Whether the model's own weights are saved for backward; a clone's are copies."""
        *_, root = self.version.line
        return root.implicit


seeds = st.integers(0, 30)
picks = st.integers(0, 1000)


class Calls(RuleBasedStateMachine):
    """MAML's calls, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        self.learners: list[Learner] = []

    @initialize(
        seed=seeds,
        lam=st.sampled_from(LAMS),
        backend=st.sampled_from([ig.CG(rtol=1e-14), ig.Exact(), ig.MINRES()]),
    )
    def begin(self, seed: int, lam: float | None, backend: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Line()
        self.monitor = ig.Monitor()
        options = {"linear_solver": backend, "monitor": self.monitor, "on_failure": "raise"}
        self.maml = ig.imaml(model, lam, lr=LR, **options)
        self.training = True
        self.gradient: Tensor | None = None  # what .grad has to be
        self.generation = 0  # of θ: graphs do not survive an optimizer's step
        self.theta = vector(model).detach().clone()
        self.state = surroundings()

    # ------------------------------------------------------------ choices

    def learner(self, pick: int) -> Learner:
        return self.learners[pick % len(self.learners)]

    @property
    def live(self) -> list[Learner]:
        """Those whose graph backward may still go through."""
        return [k for k in self.learners if k.generation == self.generation]

    # ------------------------------------------------------------ the calls

    @rule()
    @precondition(lambda self: len(self.learners) < 6)
    def clone(self) -> None:
        real = self.maml.clone()
        assert real.training == self.training
        self.learners.append(Learner(real, None, self.theta, self.generation))

    @rule(pick=picks)
    @precondition(lambda self: 0 < len(self.live) and len(self.learners) < 6)
    def clone_of_a_learner(self, pick: int) -> None:
        parent = self.live[pick % len(self.live)]
        real = parent.real.clone()
        self.learners.append(Learner(real, parent, self.theta, parent.generation))

    @rule(pick=picks, seed=seeds, first_order=st.booleans(), steps=st.integers(1, 3))
    @precondition(lambda self: self.live)
    def adapt_by_tensor(self, pick: int, seed: int, first_order: bool, steps: int) -> None:
        learner, task = self.live[pick % len(self.live)], Task(seed)
        for _ in range(steps):
            learner.real.adapt(task.of(learner.real), first_order=first_order)
            learner.adapted(task, "tensor", 1, first_order)

    @rule(pick=picks, seed=seeds, first_order=st.booleans(), steps=st.integers(1, 4))
    @precondition(lambda self: self.live)
    def adapt_by_closure(self, pick: int, seed: int, first_order: bool, steps: int) -> None:
        learner, task = self.live[pick % len(self.live)], Task(seed)
        learner.real.adapt(lambda: task.of(learner.real), first_order=first_order, steps=steps)
        learner.adapted(task, "closure", steps, first_order)

    @rule(pick=picks, seed=seeds, between=st.booleans())
    @precondition(lambda self: 0 < len(self.live) and len(self.learners) < 6)
    def steps_around_a_clone(self, pick: int, seed: int, between: bool) -> None:
        """The clone is cut off by the second step, if it is one on a tensor."""
        self.adapt_by_tensor(pick, seed, False, 1)
        self.clone_of_a_learner(pick)
        child, parent = self.learners[-1], self.live[pick % (len(self.live) - 1)]
        before = parent.cut_off
        assert child.cut_off is before
        if between:
            parent.real.adapt(lambda: Task(seed).of(parent.real), first_order=False)
            parent.adapted(Task(seed), "closure", 1, False)
        else:
            parent.real.adapt(Task(seed).of(parent.real))
            parent.adapted(Task(seed), "tensor", 1, False)
        assert parent.cut_off is before and child.cut_off is (before or not between)
        for learner in (child, parent):
            self.outer_backward([self.live.index(learner)], seed)

    @rule(pick=picks, seed=seeds)
    @precondition(lambda self: self.learners)
    def forward(self, pick: int, seed: int) -> None:
        learner, task = self.learner(pick), Task(seed)
        design = torch.cat([task.x, torch.ones(4, 1)], dim=1)
        expected = design @ learner.ideal.weights + (0.0 if learner.real.training else 1.0)
        torch.testing.assert_close(
            learner.real(task.x).flatten().detach(), expected, rtol=1e-10, atol=1e-12
        )

    @rule(pick=st.lists(picks, min_size=1, max_size=3), seed=seeds)
    @precondition(lambda self: self.live)
    def outer_backward(self, pick: list[int], seed: int) -> None:
        chosen = {id(k): k for k in (self.live[p % len(self.live)] for p in pick)}.values()
        task, outer, gradient = Task(seed), torch.zeros(()), torch.zeros(SIZE)
        for weight, learner in enumerate(chosen, start=1):
            outer = outer + weight * task.of(learner.real)
            slope = task.slope(learner.ideal.weights, learner.real.training)
            gradient = gradient + weight * learner.ideal.jacobian.T @ slope
        if any(learner.cut_off for learner in chosen):
            with pytest.raises(ig.GraphError, match="a later adapt\\(loss\\) has replaced"):
                torch.autograd.grad(outer, list(self.maml.parameters()), retain_graph=True)
            return
        outer.backward(retain_graph=True)
        old = torch.zeros(SIZE) if self.gradient is None else self.gradient
        self.gradient = old + gradient

    @rule(pick=picks, seed=seeds, steps=st.integers(2, 4))
    @precondition(lambda self: self.live)
    def outer_losses_at_each_step(self, pick: int, seed: int, steps: int) -> None:
        """MAML++: what their gradients need is kept for as long as they are there."""
        learner, task = self.live[pick % len(self.live)], Task(seed)
        outer, gradient = torch.zeros(()), torch.zeros(SIZE)
        for weight in range(1, steps + 1):
            learner.real.adapt(task.of(learner.real), first_order=False)
            learner.adapted(task, "tensor", 1, False)
            outer = outer + weight * task.of(learner.real)
            slope = task.slope(learner.ideal.weights, learner.real.training)
            gradient = gradient + weight * learner.ideal.jacobian.T @ slope
        if not learner.cut_off:
            outer.backward(retain_graph=True)
            old = torch.zeros(SIZE) if self.gradient is None else self.gradient
            self.gradient = old + gradient

    @rule()
    def zero_grad(self) -> None:
        self.maml.zero_grad()
        self.gradient = None

    @rule(pick=picks, mode=st.booleans())
    @precondition(lambda self: self.learners)
    def mode_of_a_learner(self, pick: int, mode: bool) -> None:
        self.learner(pick).real.train(mode)

    @rule(mode=st.booleans())
    def mode(self, mode: bool) -> None:
        modes = [k.real.training for k in self.learners]
        assert self.maml.train(mode) is self.maml if mode else self.maml.eval() is self.maml
        self.training = mode
        assert modes == [k.real.training for k in self.learners]

    @rule()
    @precondition(lambda self: self.gradient is not None)
    def optimizer_step(self) -> None:
        torch.optim.SGD(self.maml.parameters(), lr=0.05).step()
        self.theta = self.theta - 0.05 * self.gradient
        self.theta_has_changed()

    @rule(seed=seeds)
    def load_state_dict(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + seed)
            other = ig.imaml(Line(), self.maml.lam, lr=LR)
        stream = io.BytesIO()
        torch.save(other.state_dict(), stream)
        stream.seek(0)
        self.maml.load_state_dict(torch.load(stream, weights_only=True))
        self.theta = vector(other).detach().clone()
        self.theta_has_changed()

    @rule(how=st.sampled_from([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]))
    def go_on_with_a_copy(self, how: Any) -> None:
        """The copy is another model, with the same weights and none of the learners."""
        old = self.maml
        self.maml = how(old)
        self.monitor = self.maml.reporting.monitor
        assert not {id(p) for p in old.parameters()} & {id(p) for p in self.maml.parameters()}
        self.learners, self.gradient = [], None  # torch's copies of parameters have no .grad

    @rule(pick=picks)
    @precondition(lambda self: self.learners)
    def forget(self, pick: int) -> None:
        self.learners.pop(pick % len(self.learners))

    @rule(pick=picks, seed=seeds)
    @precondition(lambda self: len(self.live) < len(self.learners))
    def backward_after_theta_has_changed(self, pick: int, seed: int) -> None:
        """An error, or right where θ itself is not needed (first order); no .grad is touched."""
        stale = [k for k in self.learners if k.generation < self.generation]
        learner, parameters = stale[pick % len(stale)], list(self.maml.parameters())
        outer = Task(seed).of(learner.real)
        if learner.needs_theta or learner.cut_off:
            with pytest.raises(ig.GraphError, match=r"in place between|has replaced"):
                torch.autograd.grad(outer, parameters, retain_graph=True)
            return
        found = torch.autograd.grad(outer, parameters, retain_graph=True)
        slope = Task(seed).slope(learner.ideal.weights, learner.real.training)
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in found]),
            learner.ideal.jacobian.T @ slope,
            rtol=1e-8,
            atol=1e-10,
        )

    def theta_has_changed(self) -> None:
        """Graphs of learners made before do not survive it."""
        self.generation += 1

    # ------------------------------------------------------------ what always holds

    @invariant()
    def weights_agree(self) -> None:
        if not hasattr(self, "maml"):
            return
        torch.testing.assert_close(vector(self.maml).detach(), self.theta, rtol=1e-9, atol=1e-11)
        for learner in self.learners:
            torch.testing.assert_close(
                vector(learner.real).detach(), learner.ideal.weights, rtol=1e-9, atol=1e-11
            )
            assert [n for n, _ in learner.real.named_parameters()] == [
                n for n, _ in self.maml.named_parameters()
            ]

    @invariant()
    def gradients_agree(self) -> None:
        if not hasattr(self, "maml"):
            return
        if self.gradient is None:
            assert all(p.grad is None for p in self.maml.parameters())
            return
        torch.testing.assert_close(gradient_of(self.maml), self.gradient, rtol=1e-8, atol=1e-10)

    @invariant()
    def nothing_else_moves(self) -> None:
        if hasattr(self, "maml"):
            assert surroundings() == self.state
            assert all(report.status.ok for report in self.monitor.reports)

    def teardown(self) -> None:
        torch.set_default_dtype(self.dtype)


def gradient_of(maml: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in maml.parameters()])


LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
TestCalls = Calls.TestCase
TestCalls.settings = settings(
    max_examples=2_500 if LONG else 100, stateful_step_count=40 if LONG else 25, deadline=None
)
TestCalls.pytestmark = [pytest.mark.timeout(3_600 if LONG else 120)]
