"""learn2learn's pipelines of MAML's kind in miniature, in our own words: what each does with MAML.

A shape is a function of `switch`, which is applied where the pipeline's line is changed, and does
one meta-iteration on random data. Networks and data are small; what is kept is whatever a learner
could stumble over: how it is called, what is copied, divided in place, detached, adapted twice,
summed over steps. learn2learn's license is MIT; nothing of its text is here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import learn2learn as l2l
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, mse_loss, nll_loss, relu

TASKS, WAYS = 2, 3
Switch = Callable[[Any], Any]
Data = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Outcome:
    """All losses in their order, and the leaves whose .grad the meta-optimiser would see.

    Where an outer step is taken as well, the first `inner` losses are those before it.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    leaves: list[Tensor] = dataclasses.field(default_factory=list)
    inner: int | None = None

    def note(self, loss: Tensor) -> Tensor:
        """The loss, noted."""
        self.losses.append(float(loss.detach()))
        return loss


# ------------------------------------------------------------------------------- classification


def images(shots: int) -> Data:
    """Small images and their classes, sorted by class, to be halved into support and query."""
    labels = torch.arange(WAYS).repeat_interleave(2 * shots)
    return torch.randn(len(labels), 1, 6, 6) + labels.view(-1, 1, 1, 1), labels


def halves(task: Data) -> tuple[Data, Data]:
    """Every second sample to adapt on, by a boolean mask, and the rest."""
    mask = torch.arange(len(task[1])) % 2 == 0
    return (task[0][mask], task[1][mask]), (task[0][~mask], task[1][~mask])


def perceptron() -> nn.Module:
    """In the place of OmniglotFC: batch norm and flattened images."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, WAYS)
    )


class Convolutional(nn.Module):
    """In the place of CNN4 and MiniImagenetCNN: features that batch norm sees, and a classifier.

    The convolution is registered under two names, as in learn2learn's networks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(1, 2, 3, stride=2)
        layers = self.base, nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x))


def classify(
    out: Outcome,
    learner: Any,
    task: Data,
    steps: int,
    divided: bool = False,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Adapt to one half of a task, and the loss on the other; `divided`: in place, by the count."""
    data = task[0] if features is None else features(task[0])
    (x, y), (far, away) = halves((data, task[1]))

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(learner(x), y)
        if divided:
            loss /= len(x)
        return out.note(loss)

    for _ in range(steps):
        learner.adapt(loss_of(x, y))
    return loss_of(far, away)


def few_shot(
    switch: Switch, model: nn.Module, *, shots: int, lr: float, divided: bool = False
) -> Outcome:
    """Train and validation tasks in turn; only the former are differentiated. Means in place."""
    out = Outcome(leaves=list(model.parameters()))
    maml = switch(l2l.algorithms.MAML(model, lr=lr, first_order=False))
    adam = torch.optim.Adam(maml.parameters(), 3e-3)
    adam.zero_grad()
    for _ in range(TASKS):
        classify(out, maml.clone(), images(shots), 1, divided).backward()
        classify(out, maml.clone(), images(shots), 1, divided)
    for p in maml.parameters():
        p.grad.data.mul_(1.0 / TASKS)
    return out


def omniglot(switch: Switch, divided: bool = False) -> Outcome:
    """5-way 1-shot by a perceptron, one step of 0.5."""
    return few_shot(switch, perceptron(), shots=1, lr=0.5, divided=divided)


def mini_imagenet(switch: Switch, divided: bool = False) -> Outcome:
    """5-way 5-shot by convolutions."""
    return few_shot(switch, Convolutional(), shots=5, lr=0.5, divided=divided)


def distributed(switch: Switch) -> Outcome:
    """The same tasks' halves on two workers, each with its own MAML; gradients are averaged."""
    models = [Convolutional() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    workers = [few_shot_by(switch, model) for model in models]
    for mine, other in zip(*(worker.leaves for worker in workers), strict=True):
        mine.grad = (mine.grad + other.grad) / 2
    return Outcome([loss for worker in workers for loss in worker.losses], workers[0].leaves)


def few_shot_by(switch: Switch, model: nn.Module) -> Outcome:
    """One worker's part."""
    return few_shot(switch, model, shots=2, lr=0.5)


def meta_mnist(switch: Switch) -> Outcome:
    """Log-probabilities; outer losses divided in place, summed, one backward for all tasks."""
    model = nn.Sequential(Convolutional(), nn.LogSoftmax(1))
    out, error = Outcome(leaves=list(model.parameters())), torch.zeros(())
    maml = switch(l2l.algorithms.MAML(model, lr=0.1))
    for _ in range(TASKS):
        learner, ((x, y), (far, away)) = maml.clone(), halves(images(1))
        for _ in range(5):
            learner.adapt(out.note(nll_loss(learner(x), y)))
        valid = nll_loss(learner(far), away)
        valid /= len(far)
        error = error + out.note(valid)
    error /= TASKS
    error.backward()
    return out


def anil(switch: Switch) -> Outcome:
    """Only the head adapts; features are computed once, outside, and learned as well."""
    model = Convolutional()
    head = switch(l2l.algorithms.MAML(model.classifier, lr=0.1))
    parameters = [*model.features.parameters(), *head.parameters()]
    out = Outcome(leaves=parameters)
    for _ in range(TASKS):
        classify(out, head.clone(), images(2), 5, features=model.features).backward()
        classify(out, head.clone(), images(2), 5, features=model.features)
    for p in parameters:
        p.grad.data.mul_(1.0 / TASKS)
    return out


class LightningMAML(nn.Module):
    """A module that makes a MAML of its model by itself, and is trained from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = l2l.algorithms.MAML(model, lr=0.1, first_order=False)

    @torch.enable_grad()
    def meta_learn(self, out: Outcome, task: Data) -> Tensor:
        """Adapt a copy, put to training, and the loss of it."""
        learner = self.model.clone()
        learner.train()
        return classify(out, learner, task, 2)


class LightningANIL(nn.Module):
    """The same with features that do not adapt."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = l2l.algorithms.MAML(classifier, lr=0.1)

    @torch.enable_grad()
    def meta_learn(self, out: Outcome, task: Data) -> Tensor:
        """Adapt a copy of the classifier, and the loss of it."""
        self.features.train()
        learner = self.classifier.clone()
        learner.train()
        return classify(out, learner, task, 2, features=self.features)


def lightning(switch: Switch, module: nn.Module) -> Outcome:
    """Gradients are accumulated over tasks, and validation differentiates inside no_grad."""
    out, module = Outcome(leaves=list(module.parameters())), switch(module)
    for _ in range(TASKS):
        (module.meta_learn(out, images(1)) / TASKS).backward()
    module.eval()
    with torch.no_grad():
        module.meta_learn(out, images(1))
    return out


def lightning_maml(switch: Switch) -> Outcome:
    """`--algorithm maml`."""
    return lightning(switch, LightningMAML(Convolutional()))


def lightning_anil(switch: Switch) -> Outcome:
    """`--algorithm anil`."""
    model = Convolutional()
    return lightning(switch, LightningANIL(model.features, model.classifier))


# ----------------------------------------------------------------------------------- regression


def sines(switch: Switch) -> Outcome:
    """ReLU regression, five steps, one backward for all tasks; unused weights are allowed."""
    model = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    out, total = Outcome(leaves=list(model.parameters())), 0.0
    options = {"first_order": False, "allow_unused": True}
    maml = switch(l2l.algorithms.MAML(model, lr=0.01, **options))
    for _ in range(TASKS):
        learner, x = maml.clone(), 5 * torch.rand(20, 1)
        y = (x + torch.rand(1)).sin()
        for _ in range(5):
            learner.adapt(out.note(mse_loss(learner(x[::2]), y[::2])))
        total = total + out.note(mse_loss(learner(x[1::2]), y[1::2]))
    (total / TASKS).backward()
    return out


class Bell(nn.Module):
    """A model that is called without an input, and returns a distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = nn.Parameter(torch.randn(3)), nn.Parameter(torch.rand(3) + 0.5)

    def forward(self) -> Normal:
        """A normal distribution."""
        return Normal(self.mu, self.sigma)


def toy(switch: Switch) -> Outcome:
    """The outer loss is of what was returned before the step, which so is not in it."""
    model = Bell()
    out, total = Outcome(leaves=list(model.parameters())), 0.0
    maml = switch(l2l.algorithms.MAML(model, lr=0.01))
    for _ in range(TASKS):
        mean, variance = torch.randn(3), torch.randn(3)
        learner = maml.clone()
        proposal = learner()

        def loss(p: Normal = proposal, mean: Tensor = mean, variance: Tensor = variance) -> Tensor:
            return out.note((mean - p.mean).pow(2).sum() + (variance - p.variance).pow(2).sum())

        learner.adapt(loss())
        total = total + loss()
    (total / TASKS).backward()
    return out


# ------------------------------------------------------------------------ reinforcement learning


class Policy(nn.Module):
    """A Gaussian, whose mean is a small network's; asked by `density` and `log_prob` as well."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(2 + more, 4), nn.Tanh(), nn.Linear(4, 2))
        self.sigma = nn.Parameter(torch.zeros(2))

    def density(self, state: Tensor) -> Normal:
        """The distribution of actions."""
        return Normal(self.mean(state), self.sigma.clamp(min=-10.0).exp())

    def log_prob(self, state: Tensor, action: Tensor) -> Tensor:
        """Log-probabilities, averaged over an action's components."""
        return self.density(state).log_prob(action).mean(dim=1, keepdim=True)

    def forward(self, state: Tensor) -> Tensor:
        """An action."""
        return self.density(state).sample()


class Walks(NamedTuple):
    """Some walks towards a goal, step after step: where, what, and how much better than usual."""

    states: Tensor
    actions: Tensor
    advantages: Tensor


def walk(policy: Any, goal: Tensor, walks: int = 5, length: int = 4) -> Walks:
    """Walk in the plane; the reward is the nearness to the goal."""
    place, states, actions, rewards = torch.zeros(walks, 2), [], [], []
    for _ in range(length):
        states.append(place)
        actions.append(policy(place))
        place = place + 0.1 * actions[-1].clamp(-1, 1)
        rewards.append(-(place - goal).norm(dim=1))
    to_go = torch.stack(rewards).flip(0).cumsum(0).flip(0)
    advantages = ((to_go - to_go.mean(1, keepdim=True)) / to_go.std()).detach()
    return Walks(torch.cat(states), torch.cat(actions), advantages.reshape(-1, 1))


def goal() -> Tensor:
    """Somewhere around."""
    return torch.rand(2) - 0.5


def policy_loss(policy: Any, walks: Walks) -> Tensor:
    """Log-probabilities by advantages."""
    return -(policy.log_prob(walks.states, walks.actions) * walks.advantages).mean()


def ratio_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float | None = None) -> Tensor:
    """Advantages by ratios of probabilities, clipped or not."""
    ratio = (new - old).exp()
    if clip is None:
        return -(ratio * advantages).mean()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def policy_gradient(switch: Switch, loss_of: Callable[[Any, Walks], Tensor], make: Any) -> Outcome:
    """One step on walks of the learner itself, then others with the adapted one; one backward."""
    policy = Policy()
    out, total, learner_of = Outcome(leaves=list(policy.parameters())), 0.0, switch(make(policy))
    if extra := [p for p in learner_of.parameters() if all(p is not q for q in out.leaves)]:
        out.leaves += extra
    for _ in range(TASKS):
        learner, there = learner_of.clone(), goal()
        learner.adapt(out.note(loss_of(learner, walk(learner, there))))
        total = total + out.note(loss_of(learner, walk(learner, there)))
    (total / TASKS).backward()
    return out


def dice_loss(policy: Any, walks: Walks) -> Tensor:
    """The DiCE estimator: the box of summed log-probabilities, summed in place."""
    values = policy.log_prob(walks.states, walks.actions)
    for i in range(1, len(values)):
        values[i] += 0.5 * values[i - 1]
    return -(l2l.magic_box(values) * walks.advantages).mean()


def dice(switch: Switch) -> Outcome:
    """Any-order estimator inside and outside."""
    return policy_gradient(switch, dice_loss, lambda p: l2l.algorithms.MAML(p, lr=0.1))


def promp(switch: Switch, again: bool = False) -> Outcome:
    """Walks by deep copies that adapt by first order; then an outer loss after each of the steps.

    Outer losses come from `density`, not from a call of the learner. `again`: in the distributed
    form surrogate and outer loss each compute the advantages.
    """
    policy = Policy()
    out, total = Outcome(leaves=list(policy.parameters())), torch.zeros(())
    maml = switch(l2l.algorithms.MAML(policy, lr=0.05))
    for _ in range(TASKS):
        there, clone, replays, before = goal(), copy.deepcopy(maml), [], []
        for _ in range(3):
            for p in clone.parameters():
                p.detach_().requires_grad_()
            before.append(copy.deepcopy(clone))
            replays.append(walk(clone, there))
            clone.adapt(out.note(policy_loss(clone, replays[-1])), first_order=True)
        for p in clone.parameters():
            p.detach_().requires_grad_()
        before.append(copy.deepcopy(clone))
        replays.append(walk(clone, there))
        learner = maml.clone()
        old, new, old_logs, new_logs = densities(before[0], learner, replays[0])
        for k in range(3):
            penalty = kl_divergence(old, new).mean()
            advantages = replays[k if again else 0].advantages
            learner.adapt(out.note(ratio_loss(new_logs, old_logs, advantages)))
            old, new, old_logs, new_logs = densities(before[k + 1], learner, replays[k + 1])
            clipped = ratio_loss(new_logs, old_logs, replays[k + 1].advantages, clip=0.3)
            total = total + out.note(clipped + 5e-4 * penalty)
    (total / (3 * TASKS)).backward(retain_graph=True)
    return out


def densities(before: Any, learner: Any, walks: Walks) -> tuple[Normal, Normal, Tensor, Tensor]:
    """What the old policy and the new one think of some walks."""
    old, new = before.density(walks.states), learner.density(walks.states)
    logs = [d.log_prob(walks.actions).mean(dim=1, keepdim=True) for d in (old, new)]
    return old, new, logs[0].detach(), logs[1]


def distributed_promp(switch: Switch) -> Outcome:
    """A worker's part."""
    return promp(switch, again=True)


def one_step(
    policy: Any, lr: float, gradients: Iterable[Tensor], loss: Any, first_order: bool
) -> Any:
    """What maml_trpo does in the place of a MAML; its gradients are taken before, by the caller."""
    return l2l.algorithms.maml.maml_update(policy, lr, list(gradients))


def trpo(switch: Switch) -> Outcome:
    """No MAML: gradients by hand and `maml_update`."""
    return natural_gradient(switch(one_step), Policy(), lambda policy: list(policy.parameters()))


class Contextual(Policy):
    """A policy that sees a context beside the state: a tensor, and no parameter."""

    def __init__(self) -> None:
        super().__init__(more=2)
        self.context = torch.zeros(2, requires_grad=True)

    def density(self, state: Tensor) -> Normal:
        """The distribution of actions."""
        return super().density(torch.cat([state, self.context.expand(len(state), 2)], dim=1))


def one_context(
    policy: Any, lr: float, gradients: Iterable[Tensor], loss: Any, first_order: bool
) -> Any:
    """A step of cavia_trpo, whose gradients are the context's alone."""
    (slope,) = gradients
    policy.context = policy.context - lr * slope
    return l2l.utils.update_module(policy)


def cavia(switch: Switch) -> Outcome:
    """No MAML: a context, which the policy sees beside the state, is all that adapts."""
    return natural_gradient(switch(one_context), Contextual(), lambda policy: [policy.context])


def natural_gradient(
    step: Callable[..., Any], policy: Policy, adapting: Callable[[Any], list[Tensor]]
) -> Outcome:
    """The policy is adapted by `step`, which was switched; the outer step is TRPO's.

    The outcome's gradients are those of the surrogate; its last losses are the surrogate before
    and after the accepted step.
    """
    out, replays, olds = Outcome(leaves=list(policy.parameters())), [], []

    def fast_adapt(clone: Any, walks: Walks, first_order: bool) -> Any:
        loss = out.note(policy_loss(clone, walks))
        second = not first_order
        gradients = torch.autograd.grad(
            loss, adapting(clone), retain_graph=second, create_graph=second
        )
        return step(clone, 0.1, gradients, lambda: policy_loss(clone, walks), first_order)

    def surrogate(policy: Any) -> tuple[Tensor, Tensor]:
        losses, kls = [], []
        for (support, query), old in zip(replays, olds, strict=True):
            new = fast_adapt(l2l.clone_module(policy), support, first_order=False)
            then, now, old_logs, new_logs = densities(old, new, query)
            kls.append(kl_divergence(now, Normal(then.loc.detach(), then.scale.detach())).mean())
            losses.append(ratio_loss(new_logs, old_logs, query.advantages))
        return out.note(torch.stack(losses).mean()), torch.stack(kls).mean()

    for _ in range(TASKS):
        there, clone = goal(), copy.deepcopy(policy)
        support = walk(clone, there)
        clone = fast_adapt(clone, support, first_order=True)
        replays.append((support, walk(clone, there)))
        olds.append(clone)
    loss, kl = surrogate(policy)
    out.inner = len(out.losses)
    gradient = torch.autograd.grad(loss, out.leaves, retain_graph=True)
    slope = torch.autograd.grad(kl, out.leaves, create_graph=True)

    def fisher(v: Tensor) -> Tensor:
        inner = nn.utils.parameters_to_vector(slope) @ v
        product = torch.autograd.grad(inner, out.leaves, retain_graph=True)
        return nn.utils.parameters_to_vector(product) + 0.1 * v

    flat = nn.utils.parameters_to_vector(gradient)
    direction = conjugate_gradients(fisher, flat)
    direction = direction / (direction @ fisher(direction) / 2 / 0.01).sqrt()
    for halvings in range(15):
        trial = copy.deepcopy(policy)
        moved = nn.utils.parameters_to_vector(policy.parameters()) - 0.5**halvings * direction
        nn.utils.vector_to_parameters(moved.detach(), trial.parameters())
        new_loss, new_kl = surrogate(trial)
        if new_loss < loss and new_kl < 0.01:
            break
    else:
        raise AssertionError("the line search found nothing")
    for p, g in zip(out.leaves, gradient, strict=True):
        p.grad = g
    return out


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Ten iterations for product(x) = b."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), b @ b
    for _ in range(10):
        q = product(p)
        alpha = rr / (p @ q)
        x, r = x + alpha * p, r - alpha * q
        p, rr = r + (r @ r) / rr * p, r @ r
    return x


# ------------------------------------------------------- what learns more than where to start


def meta_sgd(switch: Switch) -> Outcome:
    """A policy whose step lengths are learned, one for each weight."""
    return policy_gradient(switch, policy_loss, lambda p: l2l.algorithms.MetaSGD(p, lr=0.1))


def meta_curvature(switch: Switch) -> Outcome:
    """Images, and a learned transform of the steps."""
    model, transform = Convolutional(), l2l.optim.transforms.MetaCurvatureTransform
    out = Outcome()
    gbml = switch(l2l.algorithms.GBML(model, transform=transform, lr=0.1, adapt_transform=False))
    out.leaves = list(gbml.parameters())
    for _ in range(TASKS):
        classify(out, gbml.clone(), images(1), 3).backward()
        classify(out, gbml.clone(), images(1), 3)
    for p in gbml.parameters():
        p.grad.data.mul_(1.0 / TASKS)
    return out


class PerStep(nn.Module):
    """MAML++'s batch norm: scales and shifts for each step, and statistics as frozen parameters."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(steps, width))
        self.bias = nn.Parameter(torch.zeros(steps, width))
        self.mean = nn.Parameter(torch.zeros(steps, width), requires_grad=False)
        self.var = nn.Parameter(torch.ones(steps, width), requires_grad=False)

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Normalise by the batch, and note its statistics in place."""
        rest = self.weight[step], self.bias[step], True
        return nn.functional.batch_norm(x, self.mean[step], self.var[step], *rest)


class Stepwise(nn.Module):
    """A network that is told which step it is in."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(36, 3), PerStep(3, steps)
        self.last = nn.Linear(3, WAYS)

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Logits."""
        return self.last(relu(self.norm(self.first(x.flatten(1)), step)))


def maml_plus_plus(switch: Switch, first_order: bool = False) -> Outcome:
    """An outer loss after each step, weighted; frozen parameters; the order of derivatives changes.

    After four changed lines: the learner is made by `switch` (in training and in testing), and
    `adapt` is not told the step, of which step lengths would be learned.
    """
    model, steps = Stepwise(3), 3
    out = Outcome(leaves=[p for p in model.parameters() if p.requires_grad])
    maml = switch(l2l.algorithms.MAML(model, lr=0.1, allow_nograd=True, allow_unused=True))
    for _ in range(TASKS):
        (x, y), (far, away) = halves(images(2))
        learner, total = maml.clone(), torch.zeros(())
        for step in range(steps):
            loss = out.note(cross_entropy(learner(x, step), y))
            learner.adapt(loss, first_order=first_order)
            total = total + (step + 1) / 6 * out.note(cross_entropy(learner(far, step), away))
        total.backward()
    return out
