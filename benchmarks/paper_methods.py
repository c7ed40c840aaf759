"""Every method of the paper's tables, and ours: how each adapts to a task, and its meta-gradient.

A method changes the gradient, or what is learned, and not the rest: the network, the steps' length
and number, the meta-optimiser and the tasks are the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import learn2learn as l2l
import torch
from paper_tasks import Batch
from torch import Tensor, nn

import implicit_grad as ig


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    ways: int
    shots: int
    steps: int
    lr: float
    meta_lr: float
    lam: float


@dataclasses.dataclass
class Halves:
    """A task's support drawings, to adapt on, and its query drawings."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    @classmethod
    def of(cls, batch: Batch, setting: Setting) -> Halves:
        """Split a task."""

        def split(part: Tensor) -> list[Tensor]:
            rows = part.unflatten(0, (setting.ways, 2 * setting.shots)).split(setting.shots, 1)
            return [half.flatten(0, 1) for half in rows]

        (support, query), (labels, query_labels) = map(split, batch)
        return cls(support, labels, query, query_labels)

    def support_loss(self, learner: Callable[[Tensor], Tensor]) -> Tensor:
        """What adaptation lowers."""
        return nn.functional.cross_entropy(learner(self.support), self.support_labels)

    def query_loss(self, learner: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What the meta-optimiser lowers, and the accuracy."""
        predictions = learner(self.query)
        accuracy = (predictions.argmax(-1) == self.query_labels).float().mean()
        return nn.functional.cross_entropy(predictions, self.query_labels), accuracy


class MAML:
    """Gradient steps, differentiated (Finn et al., 2017); or not, to first order."""

    first_order = False

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self.learner = self._wrapped(l2l.algorithms.MAML(model, setting.lr, self.first_order))

    def _wrapped(self, maml: nn.Module) -> nn.Module:
        return maml

    def parameters(self) -> list[Tensor]:
        """What the meta-optimiser moves."""
        return list(self.learner.parameters())

    def adapt(self, learner: Any, task: Halves) -> None:
        """Steps on the support drawings."""
        for _ in range(self.setting.steps):
            learner.adapt(task.support_loss(learner))

    def backward(self, task: Halves, weight: float) -> tuple[float, float]:
        """Add the task's meta-gradient, times `weight`, to .grad; its loss and accuracy."""
        learner = self.learner.clone()
        self.adapt(learner, task)
        loss, accuracy = task.query_loss(learner)
        (weight * loss).backward()
        return loss.item(), accuracy.item()

    def accuracy(self, task: Halves) -> float:
        """After adapting, without a meta-gradient."""
        learner = self.learner.clone()
        self.adapt(learner, task)
        with torch.no_grad():
            return task.query_loss(learner)[1].item()


class FOMAML(MAML):
    """MAML without the derivative of its steps."""

    first_order = True


class Reptile(FOMAML):
    """θ moves towards the adapted weights (Nichol et al., 2018); all of the task's drawings serve.

    Steps see the two halves in turn: on the same drawings in each there would be nothing in the way
    that asks gradients of different drawings to agree, which is what Reptile learns from. The
    meta-gradient is (θ − φ) over the length of the way, steps · lr.
    """

    def backward(self, task: Halves, weight: float) -> tuple[float, float]:
        learner = self.learner.clone()
        for step in range(self.setting.steps):
            loss = task.query_loss(learner)[0] if step % 2 else task.support_loss(learner)
            learner.adapt(loss)
        share = weight / (self.setting.steps * self.setting.lr)
        with torch.no_grad():
            pairs = zip(self.model.parameters(), learner.parameters(), strict=True)
            for theta, phi in pairs:
                away = share * (theta - phi)
                theta.grad = away if theta.grad is None else theta.grad + away
            loss, accuracy = task.query_loss(learner)
        return loss.item(), accuracy.item()


class Truncated(MAML):
    """Back-propagation through the last steps only (Shaban et al., 2019)."""

    last = 2

    def adapt(self, learner: Any, task: Halves) -> None:
        for step in range(self.setting.steps):
            early = step < self.setting.steps - self.last
            learner.adapt(task.support_loss(learner), first_order=early)


class NesterovMAML(MAML):
    """MAML whose steps are Nesterov's, differentiated."""

    momentum = 0.5

    def adapt(self, learner: Any, task: Halves) -> None:
        """φ⁺ = y − lr ∇L(y), y⁺ = φ⁺ + momentum (φ⁺ − φ); the learner holds y."""
        before = list(learner.parameters())
        for _ in range(self.setting.steps):
            here = list(learner.parameters())
            slope = torch.autograd.grad(task.support_loss(learner), here, create_graph=True)
            after = [y - self.setting.lr * g for y, g in zip(here, slope, strict=True)]
            ahead = [p + self.momentum * (p - q) for p, q in zip(after, before, strict=True)]
            l2l.update_module(learner, [p - y for p, y in zip(ahead, here, strict=True)])
            before = after


class IMAML(MAML):
    """The implicit gradient, by 5 CG steps with the Hessian; φ by gradient steps."""

    options: ClassVar[dict[str, Any]] = {"linear_solver": ig.CG(maxiter=5), "curvature": "hessian"}

    def _wrapped(self, maml: nn.Module) -> nn.Module:
        self.monitor = ig.Monitor()
        watched = {"monitor": self.monitor, "on_failure": "ignore"}  # the log counts failures
        return ig.imaml(maml, lam=self.lam(maml), **watched, **self.options)

    def lam(self, maml: nn.Module) -> Any:
        """λ of the proximal term."""
        return self.setting.lam

    def failed(self) -> float:
        """The share of linear solves that failed since the last call."""
        reports = list(self.monitor.reports)
        self.monitor.clear()
        return sum(not r.status.ok for r in reports) / max(1, len(reports))


class GaussNewton(IMAML):
    """iMAML with the Gauss-Newton matrix in the place of the Hessian."""

    options: ClassVar[dict[str, Any]] = {
        "linear_solver": ig.CG(maxiter=5),
        "curvature": "gauss_newton",
    }


class Neumann(IMAML):
    """The implicit gradient by a truncated Neumann series (Lorraine et al., 2020)."""

    options: ClassVar[dict[str, Any]] = {
        "linear_solver": ig.Neumann(terms=5),
        "curvature": "hessian",
    }


class HessianFree(IMAML):
    """The paper's iMAML, Hessian-free: three rounds of Newton-CG with 5 CG steps (appendix F.2)."""

    options: ClassVar[dict[str, Any]] = {
        "linear_solver": ig.CG(maxiter=5),
        "curvature": "hessian",
        "solver": ig.solvers.NewtonCG(maxiter=3),
    }

    def adapt(self, learner: Any, task: Halves) -> None:
        learner.adapt(lambda: task.support_loss(learner))


class LearnedLam(GaussNewton):
    """Gauss-Newton, with a λ for each tensor that is learned."""

    def lam(self, maml: nn.Module) -> Any:
        return ig.LearnedLam(maml.module, init=self.setting.lam, per="tensor")


class Default(IMAML):
    """`ig.imaml(maml)` and nothing else: MAML's own steps, λ = 1/(steps · lr)."""

    options: ClassVar[dict[str, Any]] = {}

    def lam(self, maml: nn.Module) -> Any:
        return None


class DefaultCG(Default):
    """The default by 5 steps of CG, which negative curvature stops: what it was at first."""

    options: ClassVar[dict[str, Any]] = {"linear_solver": ig.CG(maxiter=5)}


class MidwayMAML(Default):
    """The power of one step's Jacobian, the middle one's, in the place of MAML's product of all."""

    options: ClassVar[dict[str, Any]] = {"linear_solver": ig.EarlyStopped(maxiter=5)}


class PaperCode(FOMAML):
    """What the authors published: plain steps, one pull to θ, 5 textbook CG steps on 2I + H/12.

    Read from github.com/aravindr93/imaml_dev, with the options of its examples/README: λ = 2, and
    12 is λ + 10; at test time λ = 0, so nothing pulls there.
    """

    lam, damping, products = 2.0, 10.0, 5

    def backward(self, task: Halves, weight: float) -> tuple[float, float]:
        learner = self.learner.clone()
        self.adapt(learner, task)
        pull = self.setting.lr * self.lam
        theta = dict(self.model.named_parameters())
        adapted = zip(theta.items(), learner.parameters(), strict=True)
        phi = {n: (p - pull * (p - t)).detach().requires_grad_() for (n, t), p in adapted}

        def call(images: Tensor) -> Tensor:  # tied, phi would stay in a layer that stands twice
            return torch.func.functional_call(self.model, phi, (images,), tie_weights=False)

        def slope(loss: Tensor, **options: Any) -> Tensor:
            found = torch.autograd.grad(loss, list(phi.values()), **options)
            return torch.cat([g.flatten() for g in found])

        loss, accuracy = task.query_loss(call)
        v = slope(loss)
        inner = slope(task.support_loss(call), create_graph=True)

        def product(p: Tensor) -> Tensor:
            hessian = slope(inner, grad_outputs=p, retain_graph=True)
            return 2 * p + hessian / (self.lam + self.damping)

        direction = textbook_cg(product, v, self.products).split(
            [t.numel() for t in theta.values()]
        )
        for t, d in zip(theta.values(), direction, strict=True):
            share = weight * d.view_as(t)
            t.grad = share if t.grad is None else t.grad + share
        return loss.item(), accuracy.item()


def textbook_cg(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Conjugate gradients that do not look at the sign of pᵀAp."""
    x, r = torch.zeros_like(b), b
    p, rr = r, r @ r
    for _ in range(steps):
        ap = product(p)
        alpha = rr / (p @ ap)
        x, r = x + alpha * p, r - alpha * ap
        rr, before = r @ r, rr
        if rr < 1e-10:
            break
        p = r + rr / before * p
    return x


METHODS: dict[str, type[MAML]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "truncated": Truncated,
    "nesterov": NesterovMAML,
    "neumann": Neumann,
    "imaml": IMAML,
    "imaml-hf": HessianFree,
    "imaml-gn": GaussNewton,
    "imaml-lam": LearnedLam,
    "imaml-default": Default,
    "imaml-cg": DefaultCG,
    "imaml-midway": MidwayMAML,
    "paper-code": PaperCode,
}
