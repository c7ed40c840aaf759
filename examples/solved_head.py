"""A backbone that learns for a head which is solved anew in each task, to the end.

    python examples/solved_head.py
    python examples/solved_head.py --iterations 3000 --width 64   # hours

As in R2-D2 and MetaOptNet (Bertinetto et al., 2019; Lee et al., 2019): convolutions make features,
and for each 5-way 1-shot task a logistic regression on them is solved by Newton's method, all
tasks in one batch. The implicit gradient of its solution goes into the backbone, through the
features that were trained on, and into the ridge. Held against the same head with that gradient
left out, and against five unrolled steps of gradient descent, as in ANIL. Letters are those of
matplotlib's fonts, drawn by a shaky hand; two alphabets are kept for the test.
"""

from collections.abc import Callable, Sequence
from typing import Any

import glyphs
import quiet  # noqa: F401
import torch
from compared import costs
from pictures import BLUE, GREY, ORANGE, options, panels, progress, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import implicit_grad as ig

WAYS, QUERIES, LOG_RIDGE = 5, 3, -5.0
LENGTHS = (5, 20, 80, 320)
EXACT = "solved to 1e-10"
SOLVED, DETACHED, UNROLLED = "solved, implicit gradient", "solved, detached", "5 unrolled steps"
LABELS = torch.arange(WAYS)
NEWTON = ig.solvers.NewtonCG(maxiter=10, cg=10, tol=1e-3)


def backbone(width: int) -> nn.Sequential:
    """Three convolutions, each of half the size."""
    blocks: list[nn.Module] = []
    for channels in (1, width, width):
        conv = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        blocks += [conv, nn.BatchNorm2d(width, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Flatten())


class Learner(nn.Module):
    """A backbone, and the ridge of its heads."""

    def __init__(self, width: int, head: Callable[..., Tensor]) -> None:
        super().__init__()
        self.features, self.head = backbone(width), head
        self.log_ridge = nn.Parameter(torch.tensor(LOG_RIDGE))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (tasks, ways, queries, ways) of all drawings but the first of each way."""
        found = self.found(images)
        W = self.head(found[:, :, 0], self.log_ridge)
        return found[:, :, 1:] @ W[:, None]

    def found(self, images: Tensor) -> Tensor:
        """Features (tasks, ways, 1 + queries, number)."""
        found = self.features(images.flatten(0, 2)).view(*images.shape[:3], -1)
        return found / found.shape[-1] ** 0.5


def objective(W: Tensor, X: Tensor, log_ridge: Tensor) -> Tensor:
    """Softmax regression of each task, (tasks,), on one sample of each way."""
    losses = cross_entropy((X @ W).mT, LABELS.expand(len(X), -1), reduction="none").mean(1)
    return losses + log_ridge.exp() / 2 * W.square().sum((1, 2))


def zeros(X: Tensor, _: Tensor) -> Tensor:
    """Where a head begins."""
    return X.new_zeros(len(X), X.shape[2], WAYS)


def solved(solver: Any = NEWTON, **settings: Any) -> Callable[..., Tensor]:
    """A head that is the solution, differentiable in features and ridge."""
    settings = {"linear_solver": ig.CG(rtol=1e-3)} | settings
    return ig.implicit(solver, ig.argmin(objective, tasks=True), init=zeros, **settings)


def detached(X: Tensor, log_ridge: Tensor) -> Tensor:
    """The same, taken for a constant."""
    with torch.no_grad():
        return solved()(X, log_ridge)


@torch.enable_grad()
def unrolled(X: Tensor, log_ridge: Tensor, steps: int = 5) -> Tensor:
    """Gradient descent, its steps as long as the curvature allows, all in the graph."""
    W = zeros(X, log_ridge).requires_grad_()
    curvature = torch.linalg.matrix_norm(X.detach(), 2).square() / (2 * WAYS)
    lr = 1 / (curvature + log_ridge.detach().exp())
    for _ in range(steps):
        slope = torch.autograd.grad(objective(W, X, log_ridge).sum(), W, create_graph=True)[0]
        W = W - lr[:, None, None] * slope
    return W


HEADS: dict[str, Callable[..., Tensor]] = {
    SOLVED: solved(),
    DETACHED: detached,
    UNROLLED: unrolled,
}


class Letters:
    """Drawings of letters, and tasks from them."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images, self.random = images, torch.Generator().manual_seed(seed)

    def tasks(self, count: int) -> Tensor:
        """Images (tasks, ways, 1 + queries, 1, 28, 28)."""

        def some(of: int, number: int) -> Tensor:
            return torch.rand(of, generator=self.random).topk(number)[1]

        picked = [some(len(self.images), WAYS) for _ in range(count)]
        drawn = [some(self.images.shape[1], 1 + QUERIES) for _ in range(count)]
        pairs = zip(picked, drawn, strict=True)
        return torch.stack([self.images[letters[:, None], which] for letters, which in pairs])


def letters() -> tuple[Tensor, Tensor]:
    """Drawings (letters, drawings, 1, 28, 28) to learn from, and those of two other alphabets."""
    images, names = glyphs.render(seed=0)
    test = torch.tensor([alphabet in glyphs.HELD_OUT for alphabet, _ in names])
    return images[~test], images[test]


def loss(learner: nn.Module, images: Tensor) -> Tensor:
    """Of the queries."""
    logits = learner(images)
    right = LABELS[:, None].expand(logits.shape[:-1])
    return cross_entropy(logits.flatten(0, 2), right.flatten())


def accuracy(learner: nn.Module, images: Tensor) -> float:
    """The share of queries recognised, in %."""
    with torch.no_grad():
        return 100 * (learner(images).argmax(-1) == LABELS[:, None]).double().mean().item()


def learn(head: str, train: Tensor, test: Tensor, chosen: Any) -> tuple[list[int], list[float]]:
    """Adam on the backbone; test accuracies on the way, on the same tasks."""
    torch.manual_seed(0)
    learner, source = Learner(chosen.width, HEADS[head]), Letters(train, 0)
    trials, adam = Letters(test, 1).tasks(chosen.test), torch.optim.Adam(learner.parameters(), 3e-3)
    every, found = max(1, chosen.iterations // 8), {}
    for iteration in progress(range(chosen.iterations + 1), head):
        if iteration % every == 0:
            found[iteration] = accuracy(learner, trials)
        adam.zero_grad()
        loss(learner, source.tasks(chosen.tasks)).backward()
        adam.step()
    return list(found), list(found.values())


def gradients(train: Tensor, chosen: Any) -> dict[str, Callable[[], Tensor]]:
    """Ways through the heads of 8 tasks to the features; the first one is run to the end."""
    torch.manual_seed(0)
    learner, images = Learner(chosen.width, unrolled).double(), Letters(train, 0).tasks(8).double()
    with torch.no_grad():
        found = learner.found(images)
    log_ridge, right = (
        learner.log_ridge.detach(),
        LABELS[None, :, None].expand(len(found), -1, QUERIES),
    )

    def gradient(head: Any) -> Tensor:
        X = found[:, :, 0].clone().requires_grad_()
        logits = found[:, :, 1:] @ head(X, log_ridge)[:, None]
        return torch.autograd.grad(cross_entropy(logits.flatten(0, 2), right.flatten()), X)[0]

    exact = ig.solvers.NewtonCG(maxiter=50, cg=100, tol=1e-10)
    ways = {
        EXACT: lambda: gradient(solved(exact, linear_solver=ig.CG(rtol=1e-10))),
        SOLVED: lambda: gradient(solved()),
    }
    for steps in LENGTHS:
        ways[f"{steps} unrolled steps"] = lambda steps=steps: gradient(
            lambda X, log_ridge: unrolled(X, log_ridge, steps)
        )
    return ways


def draw(curves: dict[str, Any], told: dict[str, tuple[float, int, float]]) -> Any:
    """Accuracy over iterations; error and memory of a gradient."""
    figure, (left, right) = panels(2)
    for (name, (steps, scores)), color in zip(curves.items(), (BLUE, GREY, ORANGE), strict=True):
        left.plot(steps, scores, color=color, label=name)
    left.set(xlabel="iteration", ylabel="test accuracy, %")
    left.legend(frameon=False, fontsize=8)
    error, kib, _ = told[SOLVED]
    right.semilogy(kib / 1024, error, "o", color=BLUE, label=SOLVED)
    points = [told[f"{steps} unrolled steps"] for steps in LENGTHS]
    errors, kibs, _ = zip(*points, strict=True)
    label = ", ".join(map(str, LENGTHS)) + " unrolled steps"
    right.semilogy([k / 1024 for k in kibs], errors, "o-", color=ORANGE, label=label)
    right.set(xlabel="MiB of a gradient through the heads of 8 tasks", ylabel="its error")
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare the heads; test accuracies on the way, and what gradients cost."""
    chosen = options(__doc__, arguments, iterations=160, tasks=8, width=16, test=100)
    train, test = letters()
    told = costs(gradients(train, chosen))
    curves = {head: learn(head, train, test, chosen) for head in HEADS}
    for head, (_, scores) in curves.items():
        print(f"  {head:28} test accuracy {scores[-1]:.1f} %")
    save(draw(curves, told), chosen.out, "solved_head")
    return {"costs": told, **{head: scores for head, (_, scores) in curves.items()}}


if __name__ == "__main__":
    main()
