"""What to do where the inner Hessian is indefinite? Every choice against the unrolled gradient.

    python benchmarks/indefinite.py --data omniglot:PATH --out benchmarks/results

Few-shot tasks (5-way 1-shot) on learn2learn's OmniglotCNN, as initialised and after meta-training:
gradient descent on loss + λ/2 ‖φ − θ‖², then the meta-gradient by each choice of operator and
solver. The reference is second-order MAML's: the same steps, differentiated. It is the derivative
of what the steps did; the implicit gradient is that of where they lead, so the two agree only as
far as the steps have converged (‖F‖/‖v‖ tells). For each choice: the median cosine with the
reference, the share of tasks in which it descends (positive inner product), and the largest norm
relative to the reference's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import warnings
from pathlib import Path
from typing import Any, ClassVar

import learn2learn as l2l
import torch
from examples_path import characters
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import implicit_grad as ig
from implicit_grad._linear_solvers.base import LinearSolution, LinearSolver, Operator

LAMS = (0.1, 0.5, 2.0)
CASES = (("initial", 16), ("trained", 16), ("trained", 64))
LR = 0.1
Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainCG(LinearSolver):
    """Conjugate gradients as in textbooks, which do not look at the sign of pᵀAp.

    `paper` solves with the paper's code's operator, 2I + H/(λ + 10), instead of I + H/λ.
    """

    maxiter: int
    paper: bool = False
    symmetric_only: ClassVar[bool] = True

    def _solve(self, operator: Operator, rhs: Tensor, unit: float, verify: bool) -> LinearSolution:
        lam = float(operator.scale)  # type: ignore[arg-type]

        def product(p: Tensor) -> Tensor:
            full = operator.matvec(p)
            return 2 * p + (full - lam * p) / (lam + 10) if self.paper else full / lam

        x, r = torch.zeros_like(rhs), rhs / lam
        p, rr = r, r @ r
        for _ in range(self.maxiter):
            ap = product(p)
            alpha = rr / (p @ ap)
            x, r = x + alpha * p, r - alpha * ap
            rr, before = r @ r, rr
            p = r + rr / before * p
        return LinearSolution(x, ig.Status.TRUNCATED, self.maxiter)


CHOICES: dict[str, dict[str, Any]] = {
    "first order": {"linear_solver": ig.CG(maxiter=0)},
    "plain CG 10": {"linear_solver": PlainCG(maxiter=10)},
    "the paper's code (CG 5)": {"linear_solver": PlainCG(maxiter=5, paper=True)},
    "CG 10, stop": {"linear_solver": ig.CG(maxiter=10)},
    "CG 10, else MINRES": {"linear_solver": ig.CG(maxiter=10, on_negative_curvature="minres")},
    "CG 10, else Gauss-Newton": {
        "linear_solver": ig.CG(maxiter=10, on_negative_curvature="gauss_newton")
    },
    "MINRES 10": {"linear_solver": ig.MINRES(maxiter=10)},
    "Gauss-Newton CG 10": {"linear_solver": ig.CG(maxiter=10), "curvature": "gauss_newton"},
}


def network() -> nn.Module:
    """The paper's network, with batch statistics throughout, as in learn2learn's examples."""
    return l2l.vision.models.OmniglotCNN(5)


def descend(
    net: nn.Module, theta: Weights, task: Any, lam: float, steps: int, unrolled: bool
) -> Weights:
    """Gradient descent on loss + λ/2 ‖φ − θ‖²; unrolled, all of it stays in the graph."""
    images, labels = task
    phi = theta
    for _ in range(steps):
        phi = phi if unrolled else {k: p.detach().requires_grad_() for k, p in phi.items()}
        loss = cross_entropy(functional_call(net, phi, (images,)), labels)
        slope = torch.autograd.grad(loss, list(phi.values()), create_graph=unrolled)
        phi = {
            k: p - LR * (g + lam * (p - theta[k]))
            for (k, p), g in zip(phi.items(), slope, strict=True)
        }
    return phi


def meta_gradients(
    net: nn.Module, theta: Weights, task: tuple[Any, Any], lam: float, steps: int
) -> tuple[Tensor, dict[str, Tensor], float, bool]:
    """The unrolled gradient, each choice's, ‖F‖/‖v‖, and whether negative curvature was met."""
    support, (images, labels) = task

    def outer(phi: Weights) -> Tensor:
        return cross_entropy(functional_call(net, phi, (images,)), labels)

    def gradient(phi: Weights) -> Tensor:
        grads = torch.autograd.grad(outer(phi), list(theta.values()))
        return torch.cat([g.flatten() for g in grads])

    reference = gradient(descend(net, theta, support, lam, steps, unrolled=True))
    detached = {k: t.detach() for k, t in theta.items()}
    found = descend(net, detached, support, lam, steps, unrolled=False)
    condition = ig.proximal(
        lambda outputs, labels: cross_entropy(outputs, labels),
        lam,
        model=lambda w, labels: functional_call(net, w, (support[0],)),
    )
    gradients, monitor = {}, ig.Monitor()
    for name, options in CHOICES.items():
        solve = ig.implicit(
            lambda theta, labels: found, condition, monitor=monitor, on_failure="ignore", **options
        )
        gradients[name] = gradient(solve(theta, support[1]))
    v = torch.autograd.grad(
        outer(leaves := {k: p.detach().requires_grad_() for k, p in found.items()}),
        list(leaves.values()),
    )
    v_norm = float(torch.cat([t.flatten() for t in v]).norm())
    indefinite = any((r.min_curvature or 0.0) < 0 for r in monitor.reports)
    return reference, gradients, monitor.reports[0].inner_residual / v_norm, indefinite


def split(batch: Any) -> tuple[Any, Any]:
    """A task's drawings for adaptation and for the outer loss, one of each class."""
    images, labels = batch
    return (images[::2], labels[::2]), (images[1::2], labels[1::2])


def trained(net: nn.Module, tasks: Any, iterations: int) -> Weights:
    """The network after some meta-iterations of first-order MAML."""
    maml = l2l.algorithms.MAML(net, lr=0.4, first_order=True)
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    for _ in track(range(iterations), "meta-training"):
        optimizer.zero_grad()
        for _ in range(4):
            (images, labels), (queries, answers) = split(tasks.sample())
            learner = maml.clone()
            for _ in range(5):
                learner.adapt(cross_entropy(learner(images), labels))
            cross_entropy(learner(queries), answers).backward()
        optimizer.step()
    return {k: p.detach().clone() for k, p in net.named_parameters()}


def measure(tasks: Any, options: argparse.Namespace) -> list[Row]:
    """One row for each case, λ and choice."""
    torch.manual_seed(0)
    net = network()
    stages = {"initial": {k: p.detach().clone() for k, p in net.named_parameters()}}
    stages["trained"] = trained(net, tasks, options.iterations)
    net.zero_grad()
    sampled = [split(tasks.sample()) for _ in range(options.tasks)]
    rows: list[Row] = []
    for stage, steps in CASES:
        theta = {k: t.clone().requires_grad_() for k, t in stages[stage].items()}
        for lam in LAMS:
            runs = [
                meta_gradients(net, theta, task, lam, steps)
                for task in track(sampled, f"{stage}, {steps} steps, lam {lam}")
            ]
            for name in CHOICES:
                pairs = [(reference, found[name]) for reference, found, _, _ in runs]
                cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
                rows.append(
                    {
                        "weights": stage,
                        "steps": steps,
                        "lam": lam,
                        "choice": name,
                        "cosine": statistics.median(cosines),
                        "least_cosine": min(cosines),
                        "descends": sum(c > 0 for c in cosines) / len(cosines),
                        "largest_norm_ratio": max(float(b.norm() / a.norm()) for a, b in pairs),
                        "indefinite": sum(r[3] for r in runs) / len(runs),
                        "F_over_v": statistics.median(r[2] for r in runs),
                    }
                )
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """The median cosine of each choice, one panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(CASES), figsize=(13, 4), sharey=True, layout="constrained")
    for panel, (stage, steps) in zip(panels, CASES, strict=True):
        for i, lam in enumerate(LAMS):
            chosen = [
                r for r in rows if (r["weights"], r["steps"], r["lam"]) == (stage, steps, lam)
            ]
            places = [j + 0.25 * (i - 1) for j in range(len(chosen))]
            panel.barh(places, [r["cosine"] for r in chosen], height=0.22, label=f"λ = {lam:g}")
            panel.plot([r["least_cosine"] for r in chosen], places, "k|", markersize=7)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(CHOICES)), list(CHOICES))
        panel.set_title(f"{stage} weights, {steps} steps", fontsize=10)
        panel.set_xlabel("cosine with the unrolled gradient")
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle("Median over tasks (bars) and the worst task (ticks)", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, then a table, a CSV file and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="glyphs", help="glyphs, or omniglot:PATH[,PATH...]")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tasks", type=int, default=20, help="tasks for each case")
    parser.add_argument("--iterations", type=int, default=100, help="of meta-training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error", ig.ImplicitGradWarning)
    loaded, _ = characters.load(options.data, None)
    rows = measure(characters.taskset(loaded, ways=5, shots=1), options)
    write(rows, options.out / "indefinite.csv", Console())
    draw(rows, options.out / "indefinite.png")


if __name__ == "__main__":
    main()
