"""After a short meta-training: is `imaml` without an option level with first-order MAML?

    python benchmarks/short_training.py --problem sinusoids --steps 50 --lr 0.02 --out out
    python benchmarks/short_training.py --problem characters --steps 10 --lr 0.1 --out out \
        --methods first lam=0.1 lam=0.5 lam=2 learned learned-per-tensor

Sinusoids are regressed by a small tanh network, points (around random centres, 5-way 1-shot)
classified by another, and characters (of fonts, 5-way 1-shot) by learn2learn's OmniglotCNN, the
whole of which adapts. Each method meta-trains from the same weights on the same tasks, a few seeds,
and is tested on the same tasks. The table has the mean loss (sinusoids) or accuracy in percent
after adaptation, each seed's, and the mean difference to the first method over tasks with its 95 %
interval. But for characters also, at the weights that the first method ends with: the median
cosine with second-order MAML's gradient, and the median of the lengths' ratio. With `learned`, λ
begins at 0.5 and takes Adam's steps of 0.03; `products=3` is the default but for their number.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import default_lam
import examples_path
import learn2learn as l2l
import torch
from examples_path import characters, checkpoint
from rich.console import Console
from tables import Row, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import implicit_grad as ig

assert examples_path.__all__
TASKS, META_LR, LAM_LR, TEST_SEED = 4, 1e-3, 0.03, 7
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support and query
Loss = Callable[[Tensor, Tensor], Tensor]


class Sinusoids:
    """Waves of random amplitudes and phases, by ten points of each."""

    loss: Loss = staticmethod(mse_loss)

    def __init__(self) -> None:
        self.unit, self.compared = "loss", True

    def model(self) -> nn.Module:
        """A network as initialised."""
        hidden = nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()
        return nn.Sequential(*hidden, nn.Linear(32, 1))

    def sample(self) -> Task:
        """A task to train on."""
        amplitude, phase = 0.5 + 1.5 * torch.rand(()), 3 * torch.rand(())
        x = 4 * torch.rand(20, 1) - 2
        y = amplitude * (2 * x + phase).sin()
        return x[:10], y[:10], x[10:], y[10:]

    def tests(self, count: int) -> list[Task]:
        """Tasks to test on."""
        return [self.sample() for _ in range(count)]

    def score(self, predictions: Tensor, y: Tensor) -> float:
        """The loss."""
        return mse_loss(predictions, y).item()


class Points:
    """Those of `default_lam.py` and its network, in single precision."""

    loss: Loss = staticmethod(cross_entropy)

    def __init__(self) -> None:
        self.unit, self.compared = "accuracy", True

    def model(self) -> nn.Module:
        """A network as initialised."""
        hidden = nn.Linear(default_lam.INPUTS, default_lam.HIDDEN), nn.Tanh()
        return nn.Sequential(*hidden, nn.Linear(default_lam.HIDDEN, default_lam.CLASSES))

    def sample(self) -> Task:
        """A task to train on."""
        (x, y), (query, target) = default_lam.task(int(torch.randint(2**62, ())))
        return x.float(), y, query.float(), target

    def tests(self, count: int) -> list[Task]:
        """Tasks to test on."""
        return [self.sample() for _ in range(count)]

    def score(self, predictions: Tensor, y: Tensor) -> float:
        """The accuracy in percent."""
        return _accuracy(predictions, y)


class Characters:
    """Characters of fonts that the machine needs not have: `examples/glyphs.py` has them."""

    loss: Loss = staticmethod(cross_entropy)

    def __init__(self) -> None:
        self.unit, self.compared = "accuracy", False
        known, held_out = characters.load("glyphs", None)
        train, test = known.split(held_out)
        self._train, self._test = (characters.taskset(part, 5, 1) for part in (train, test))

    def model(self) -> nn.Module:
        """A network as initialised."""
        return l2l.vision.models.OmniglotCNN(5, 16)

    def sample(self) -> Task:
        """A task to train on."""
        return _split(*self._train.sample())

    def tests(self, count: int) -> list[Task]:
        """Tasks to test on, of other alphabets."""
        return [_split(*self._test.sample()) for _ in range(count)]

    def score(self, predictions: Tensor, y: Tensor) -> float:
        """The accuracy in percent."""
        return _accuracy(predictions, y)


def _accuracy(predictions: Tensor, y: Tensor) -> float:
    return 100 * (predictions.argmax(1) == y).float().mean().item()


def _split(data: Tensor, labels: Tensor) -> Task:
    return data[::2], labels[::2], data[1::2], labels[1::2]


PROBLEMS: dict[str, Callable[[], Any]] = {
    "sinusoids": Sinusoids,
    "points": Points,
    "characters": Characters,
}


def wrapped(method: str, model: nn.Module, lr: float) -> Any:
    """The learner of a method."""
    maml = l2l.algorithms.MAML(model, lr=lr, first_order=method == "first")
    if method in ("first", "maml"):
        return maml
    lam: Any = None
    if method.startswith("lam="):
        lam = float(method.removeprefix("lam="))
    if method.startswith("learned"):
        lam = ig.LearnedLam(model, init=0.5, per="tensor" if "tensor" in method else "model")
    linear_solver: Any = {
        "minres": ig.MINRES(maxiter=5),
        "cg": ig.CG(maxiter=5),
        "midway": ig.EarlyStopped(maxiter=5),
    }.get(method)
    if method.startswith("products="):
        linear_solver = ig.PositivePart(maxiter=int(method.removeprefix("products=")))
    return ig.imaml(maml, lam, linear_solver=linear_solver, on_failure="ignore")


def adapted(maml: Any, task: Task, loss: Loss, steps: int) -> Any:
    """A copy that took some steps."""
    learner = maml.clone()
    for _ in range(steps):
        learner.adapt(loss(learner(task[0]), task[1]))
    return learner


def meta_train(problem: Any, method: str, seed: int, chosen: Any) -> tuple[Any, nn.Module, float]:
    """The learner, its model, and the CPU seconds of a meta-iteration."""
    checkpoint.seed_all(seed)
    model = problem.model()
    maml = wrapped(method, model, chosen.lr)
    own = {id(p) for p in model.parameters()}
    lam = [p for p in maml.parameters() if id(p) not in own]
    adam = torch.optim.Adam(
        [{"params": list(model.parameters())}, {"params": lam, "lr": LAM_LR}][: 1 + bool(lam)],
        META_LR,
    )
    began = time.process_time()
    for _ in range(chosen.iterations):
        adam.zero_grad()
        for _ in range(TASKS):
            task = problem.sample()
            learner = adapted(maml, task, problem.loss, chosen.steps)
            (problem.loss(learner(task[2]), task[3]) / TASKS).backward()
        adam.step()
    return maml, model, (time.process_time() - began) / chosen.iterations


def gradients(
    problem: Any, method: str, model: nn.Module, tasks: list[Task], chosen: Any
) -> Tensor:
    """Each task's meta-gradient."""
    maml, found = wrapped(method, model, chosen.lr), []
    for task in tasks:
        learner = adapted(maml, task, problem.loss, chosen.steps)
        slope = torch.autograd.grad(problem.loss(learner(task[2]), task[3]), model.parameters())
        found.append(torch.cat([part.flatten() for part in slope]))
    return torch.stack(found)


def measure(problem: Any, chosen: Any) -> list[Row]:
    """One row for each method."""
    with checkpoint.own_random_numbers(TEST_SEED):
        tests = problem.tests(chosen.tests)
    scores: dict[str, list[list[float]]] = {method: [] for method in chosen.methods}
    seconds: dict[str, float] = {}
    last: dict[str, nn.Module] = {}
    lams: dict[str, str] = {}
    for seed in range(chosen.seeds):
        for method in chosen.methods:
            maml, last[method], seconds[method] = meta_train(problem, method, seed, chosen)
            scores[method].append([])
            for task in tests:
                with checkpoint.own_random_numbers(TEST_SEED):
                    learner = adapted(maml, task, problem.loss, chosen.steps)
                    scores[method][-1].append(problem.score(learner(task[2]), task[3]))
            if method.startswith("learned"):
                values = torch.cat([t.detach().flatten() for t in maml.lam()])
                lams[method] = f"{values.min():.2g} to {values.max():.2g}"
            print(method, seed, f"{torch.tensor(scores[method][-1]).mean():.3f}", flush=True)
    rows = []
    base, reference = torch.tensor(scores[chosen.methods[0]]), None
    if problem.compared:
        weights = last[chosen.methods[0]]
        reference = gradients(problem, "maml", weights, tests[:20], chosen)
    for method in chosen.methods:
        found = torch.tensor(scores[method])
        difference = found - base
        cosine = ratio = ""
        if reference is not None and not method.startswith(("lam=", "learned")):
            own = gradients(problem, method, weights, tests[:20], chosen)
            cosine = f"{torch.cosine_similarity(own, reference, dim=1).median():.2f}"
            ratio = f"{(own.norm(dim=1) / reference.norm(dim=1)).median():.2f}"
        rows.append(
            {
                "problem": chosen.problem,
                "steps": chosen.steps,
                "lr": chosen.lr,
                "method": method,
                problem.unit: float(found.mean()),
                "seeds": " / ".join(f"{x:.3g}" for x in found.mean(1).tolist()),
                "difference": float(difference.mean()),
                "interval": 1.96 * float(difference.mean(0).std()) / chosen.tests**0.5,
                "cosine": cosine,
                "length": ratio,
                "lam": lams.get(method, ""),
                "s/iteration": seconds[method],
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then a table and a CSV file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", choices=list(PROBLEMS), default="sinusoids")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--methods", nargs="+", default=["first", "default", "maml"])
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out"))
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    problem = PROBLEMS[chosen.problem]()
    kind = "_lam" if any("l" == m[0] for m in chosen.methods) else ""
    name = f"short_training_{chosen.problem}_{chosen.steps}x{chosen.lr:g}{kind}.csv"
    write(measure(problem, chosen), chosen.out / name, Console(width=160))


if __name__ == "__main__":
    main()
