"""How long do other packages take for the same meta-gradient?

    python benchmarks/peers.py --out benchmarks/results

One job: MAML's convolutional network, 5-way 1-shot, 16 steps of gradient descent on
loss + λ/2 ‖φ − θ‖², then 5 CG iterations; the same network, weights, images, lr and λ for all, in
turn within one process on one thread. Times are over the floor (see floor.py). `difference` is that
of the meta-gradient to the one by hand, relative: methods that differentiate the steps themselves,
or none of them, compute another quantity, and the table says so. Missing peers are named; they are

    pip install torchopt higher jax jaxopt betty-ml      # the last with pip < 24.1
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learn2learn as l2l
import torch
from floor import Job, Method, Tensors, by_hand, compare, few_shot, flat, ours
from rich.console import Console
from tables import Row, write
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy

IMPLICIT, UNROLLED, FIRST_ORDER = "implicit", "unrolled", "first order"
NOT_ON_PYPI = {
    "hypertorch": "not on PyPI (hypertorch and hypergrad there are other projects)",
    "the paper's code (imaml_dev)": "not a package",
}


def penalised(job: Job, phi: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
    """The inner objective, as one writes it where no package knows of the proximal term."""
    pull = sum((p - t).square().sum() for p, t in zip(phi, theta, strict=True))
    return job.loss(phi) + job.lam / 2 * pull


def torchopt_root(job: Job) -> Method:
    """custom_root around the same inner loop; CG, not its default on the normal equations."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    optimality = torch.func.grad(functools.partial(penalised, job))
    linear_solver = solve_cg(maxiter=job.iterations, rtol=0.0, atol=0.0)

    @custom_root(optimality, argnums=1, solve=linear_solver)
    def solve(start: Tensors, theta: Tensors) -> Tensors:
        with torch.enable_grad():
            return job.descend(theta)

    return lambda: flat(grad(job.outer(solve(job.theta, job.theta)), job.theta))


def torchopt_module(job: Job) -> Method:
    """ImplicitMetaGradientModule, in the way of torchopt's own iMAML example."""
    import torchopt

    linear_solver = torchopt.linear_solve.solve_cg(maxiter=job.iterations, rtol=0.0, atol=0.0)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=linear_solver):  # type: ignore
        def __init__(self, theta: nn.Module) -> None:  # its arguments are the meta-parameters
            super().__init__()
            self.theta = theta
            self.phi = torchopt.module_clone(theta, by="deepcopy", detach_buffers=True)

        def objective(self, inputs: Tensor, labels: Tensor) -> Tensor:
            pairs = zip(self.parameters(), self.meta_parameters(), strict=True)
            pull = sum((p - t).square().sum() for p, t in pairs)
            return cross_entropy(self.phi(inputs), labels) + job.lam / 2 * pull

        def solve(self, inputs: Tensor, labels: Tensor) -> Inner:
            phi = tuple(self.parameters())
            optimizer = torch.optim.SGD(phi, job.lr)
            with torch.enable_grad():
                for _ in range(job.steps):
                    optimizer.zero_grad()
                    self.objective(inputs, labels).backward(inputs=phi)
                    optimizer.step()
            return self

    def meta_gradient() -> Tensor:
        inner = Inner(job.net).solve(*job.support)
        return flat(grad(cross_entropy(inner.phi(job.query[0]), job.query[1]), job.theta))

    return meta_gradient


def betty(job: Job) -> Method:
    """Betty's CG hypergradient by itself, without its engine and training loop."""
    from betty.hypergradient.cg import cg

    def meta_gradient() -> Tensor:
        phi = tuple(p.requires_grad_() for p in job.descend(job.theta))
        inner = SimpleNamespace(
            paths=(),
            cur_batch=None,
            config=SimpleNamespace(cg_iterations=job.iterations, cg_alpha=1.0),
            training_step_exec=lambda batch: penalised(job, phi, job.theta),
            parameters=lambda: phi,
            trainable_parameters=lambda: phi,
        )
        outer = SimpleNamespace(trainable_parameters=lambda: job.theta)
        return flat(cg(grad(job.outer(phi), phi), inner, outer))

    return meta_gradient


def learn2learn(job: Job, first_order: bool) -> Method:
    """MAML on the loss alone, as its pipelines have it."""
    maml = l2l.algorithms.MAML(job.net, lr=job.lr, first_order=first_order)

    def meta_gradient() -> Tensor:
        learner = maml.clone()
        for _ in range(job.steps):
            learner.adapt(cross_entropy(learner(job.support[0]), job.support[1]))
        return flat(grad(cross_entropy(learner(job.query[0]), job.query[1]), job.theta))

    return meta_gradient


def higher(job: Job) -> Method:
    """Differentiates through the steps on the same objective."""
    import higher

    optimizer = torch.optim.SGD(job.net.parameters(), job.lr)

    def meta_gradient() -> Tensor:
        with higher.innerloop_ctx(job.net, optimizer, copy_initial_weights=False) as (net, steps):
            for _ in range(job.steps):
                loss = cross_entropy(net(job.support[0]), job.support[1])
                pairs = zip(net.parameters(), job.theta, strict=True)
                pull = sum((p - t).square().sum() for p, t in pairs)
                steps.step(loss + job.lam / 2 * pull)
            return flat(grad(cross_entropy(net(job.query[0]), job.query[1]), job.theta))

    return meta_gradient


def jaxopt(job: Job) -> Method:
    """custom_root, all of it compiled; compilation is not timed."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # one thread, like the others
    import jax
    import jaxopt
    import numpy as np
    from jax import numpy as jnp

    layers = [type(layer) for layer in job.net if list(layer.parameters())]  # type: ignore

    def network(phi: Any, inputs: Any) -> Any:
        x = inputs
        for kind, (weight, bias) in zip(layers, phi, strict=True):
            if kind is nn.Conv2d:
                same = ((1, 1), (1, 1))
                names = ("NCHW", "OIHW", "NCHW")
                x = jax.lax.conv_general_dilated(x, weight, (2, 2), same, dimension_numbers=names)
                x = x + bias[:, None, None]
            elif kind is nn.BatchNorm2d:
                mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
                x = (x - mean) / jnp.sqrt(var + 1e-5)
                x = jax.nn.relu(x * weight[:, None, None] + bias[:, None, None])
            else:
                x = x.reshape(len(x), -1) @ weight.T + bias
        return x

    def loss(phi: Any, inputs: Any, labels: Any) -> Any:
        log_p = jax.nn.log_softmax(network(phi, inputs))
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    def objective(phi: Any, theta: Any) -> Any:
        pairs = zip(jax.tree.leaves(phi), jax.tree.leaves(theta), strict=True)
        return loss(phi, *support) + job.lam / 2 * sum(((p - t) ** 2).sum() for p, t in pairs)

    slope = jax.grad(objective)
    cg = functools.partial(jaxopt.linear_solve.solve_cg, maxiter=job.iterations, tol=0.0)

    @jaxopt.implicit_diff.custom_root(slope, solve=cg)
    def solve(start: Any, theta: Any) -> Any:
        def step(_: int, phi: Any) -> Any:
            return jax.tree.map(lambda p, g: p - job.lr * g, phi, slope(phi, theta))

        return jax.lax.fori_loop(0, job.steps, step, start)

    support, query = ([jnp.asarray(t.numpy()) for t in data] for data in (job.support, job.query))
    arrays = [jnp.asarray(t.detach().numpy()) for t in job.theta]
    theta = list(zip(arrays[::2], arrays[1::2], strict=True))
    compiled = jax.jit(jax.grad(lambda theta: loss(solve(theta, theta), *query)))

    def meta_gradient() -> Tensor:
        gradient = jax.block_until_ready(compiled(theta))
        return flat([torch.from_numpy(np.array(g)) for g in jax.tree.leaves(gradient)])

    return meta_gradient


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another package's way to a meta-gradient; `module` is what it is imported as."""

    name: str
    module: str
    make: Callable[[Job], Method]
    computes: str = IMPLICIT


PEERS = (
    Peer("torchopt custom_root", "torchopt", torchopt_root),
    Peer("torchopt ImplicitMetaGradientModule", "torchopt", torchopt_module),
    Peer("Betty", "betty", betty),
    Peer("jaxopt custom_root, jit", "jaxopt", jaxopt),
    Peer("learn2learn MAML", "learn2learn", lambda job: learn2learn(job, False), UNROLLED),
    Peer("higher", "higher", higher, UNROLLED),
    Peer(
        "learn2learn MAML, first order",
        "learn2learn",
        lambda job: learn2learn(job, True),
        FIRST_ORDER,
    ),
)


def measure(seconds: float, peers: Sequence[Peer]) -> list[Row]:
    """A row for each method, then the missing peers."""
    job = few_shot(5, 1)
    present = [peer for peer in peers if find_spec(peer.module)]
    computes = {peer.name: peer.computes for peer in present}
    methods = {"by hand": by_hand(job), **ours(job), **{p.name: p.make(job) for p in present}}
    rows: list[Row] = [
        {**row, "computes": computes.get(str(row["method"]), IMPLICIT)}
        for row in compare(job, methods, seconds, "conv net, 5-way 1-shot")
    ]
    absent = {peer.name: "not installed" for peer in peers if peer not in present}
    for name, reason in {**absent, **NOT_ON_PYPI}.items():
        rows.append({**dict.fromkeys(rows[0], ""), "method": name, "computes": reason})
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [row for row in rows if row["over_floor"] != ""][::-1]
    colours = {IMPLICIT: "C0", UNROLLED: "C1", FIRST_ORDER: "C2"}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for computes, colour in colours.items():
        chosen = [(i, r) for i, r in enumerate(measured) if r["computes"] == computes]
        places, lengths = [i for i, _ in chosen], [r["over_floor"] for _, r in chosen]
        axes.barh(places, lengths, color=colour, label=computes)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(measured)), [str(row["method"]) for row in measured])
    axes.set_xlabel("time of one meta-gradient / floor")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then a table, a CSV file and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--seconds", type=float, default=120, help="time to measure for")
    parser.add_argument("--modules", nargs="*", help="only these peers; default: all")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)  # torchopt's
    torch.set_num_threads(1)
    torch.manual_seed(1)  # with 0, rounding decides on which side of a ReLU kink a descent ends
    peers = [p for p in PEERS if options.modules is None or p.module in options.modules]
    rows = measure(options.seconds, peers)
    write(rows, options.out / "peers.csv", Console())
    draw(rows, options.out / "peers.png")


if __name__ == "__main__":
    main()
