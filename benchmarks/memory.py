"""How much memory does one meta-gradient take, against adaptation steps and peers, and for what?

    python benchmarks/memory.py --out benchmarks/results

The peak is the most bytes of tensors alive at once in one task (adaptation and meta-gradient), as
torch's allocator counts them, above those alive before: θ and its .grad are not in it, the adapted
φ is. Peers that are not installed are named and left out.

The parts: Mem(∇L), the paper's unit, is the peak of one plain gradient of the inner loss, its
result included; `over_gradient` is what a task takes beyond its parameters φ, in this unit. Peaks
grow linearly with the images of a task, so two sizes tell what does not depend on them (vectors of
the size of the parameters, and their number) from what does (activations).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import learn2learn as l2l
import torch
from adaptation import STEPS, UNROLLED_STEPS, learners, task
from rich.console import Console
from rich.progress import track
from tables import Row, write
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.functional import cross_entropy

import implicit_grad as ig
from implicit_grad.testing import peak_memory

LR, LAM, CG_STEPS = 0.01, 2.0, 5  # as in `learners`
# one task on a network: adaptation in so many steps, and the meta-gradient
Method = Callable[[nn.Module, Tensor, Tensor, int], object]


def learned(name: str) -> Method:
    """One of `learners`."""
    return lambda net, images, labels, steps: task(learners(net)[name], images, labels, steps)


def finite_difference(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """iMAML whose products with the Hessian are differences of gradients."""
    maml = l2l.algorithms.MAML(net, lr=LR)
    learner = ig.imaml(maml, 2.0, curvature="finite_difference", on_failure="ignore").clone()
    learner.adapt(lambda: cross_entropy(learner(images), labels), steps=steps)
    cross_entropy(learner(images), labels).backward()


def torchopt_maml(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """TorchOpt's differentiable SGD, unrolled."""
    import torchopt

    optimizer = torchopt.MetaSGD(net, lr=LR)
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    for _ in range(steps):
        optimizer.step(cross_entropy(net(images), labels))
    cross_entropy(net(images), labels).backward()
    torchopt.recover_state_dict(net, start)


def torchopt_implicit(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """TorchOpt's implicit meta-gradient, as its iMAML example has it."""
    import torchopt

    solver = torchopt.linear_solve.solve_normal_cg(maxiter=CG_STEPS, atol=0)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):
        def __init__(self, theta: nn.Module) -> None:
            super().__init__()
            self.theta = theta
            self.net = torchopt.module_clone(theta, by="deepcopy", detach_buffers=True)

        def objective(self, images: Tensor, labels: Tensor) -> Tensor:
            pairs = zip(self.net.parameters(), self.theta.parameters(), strict=True)
            pull = sum((p - t).square().sum() for p, t in pairs)
            return cross_entropy(self.net(images), labels) + LAM / 2 * pull

        def solve(self, images: Tensor, labels: Tensor) -> Inner:
            phi = tuple(self.net.parameters())
            optimizer = torch.optim.SGD(phi, lr=LR)
            with torch.enable_grad():
                for _ in range(steps):
                    optimizer.zero_grad()
                    self.objective(images, labels).backward(inputs=phi)
                    optimizer.step()
            return self

    adapted = Inner(net).solve(images, labels)
    cross_entropy(adapted.net(images), labels).backward()


def higher_maml(net: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """higher's differentiable SGD, unrolled."""
    import higher

    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, descent):
        for _ in range(steps):
            descent.step(cross_entropy(fast(images), labels))
        cross_entropy(fast(images), labels).backward()


CONSTANT: dict[str, Method] = {
    "FOMAML": learned("FOMAML"),
    "iMAML": learned("iMAML"),
    "iMAML, Gauss-Newton": learned("iMAML, Gauss-Newton"),
    "iMAML, differences": finite_difference,
    "TorchOpt, implicit": torchopt_implicit,
}
UNROLLED: dict[str, Method] = {
    "MAML": learned("MAML"),
    "TorchOpt, unrolled": torchopt_maml,
    "higher, unrolled": higher_maml,
}


def without_norm(net: nn.Module) -> nn.Module:
    """The network with its batch norms taken out."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return net


NETS: dict[str, Callable[[int], nn.Module]] = {
    "OmniglotCNN": l2l.vision.models.OmniglotCNN,
    "OmniglotCNN, no norm": lambda ways: without_norm(l2l.vision.models.OmniglotCNN(ways)),
    "OmniglotFC": lambda ways: l2l.vision.models.OmniglotFC(28 * 28, ways),
}


def batch(ways: int, shots: int) -> tuple[Tensor, Tensor]:
    """Random images of a task, and their labels."""
    return torch.rand(ways * shots, 1, 28, 28), torch.arange(ways).repeat(shots)


def peak(
    method: Method, net: nn.Module, images: Tensor, labels: Tensor, steps: int = STEPS[0]
) -> float:
    """MiB."""
    method(net, images, labels, 1)  # so that .grad is there before
    return peak_memory(lambda: method(net, images, labels, steps)) / 2**20


def measure_steps(most: int, console: Console) -> list[Row]:
    """One row for each method and number of steps, 5-way 1-shot on OmniglotCNN."""
    rows: list[Row] = []
    images, labels = batch(5, 1)
    # without running statistics, which TorchOpt's implicit gradient cannot write
    net = replace_all_batch_norm_modules_(NETS["OmniglotCNN"](5))
    for name, method in {**CONSTANT, **UNROLLED}.items():
        steps = UNROLLED_STEPS if name in UNROLLED else STEPS
        try:
            rows += [
                {"method": name, "steps": k, "MiB": peak(method, net, images, labels, k)}
                for k in track([k for k in steps if k <= most], name)
            ]
        except ModuleNotFoundError as error:
            console.print(f"{name}: left out, {error.name} is not installed")
    return rows


def gradient(net: nn.Module, images: Tensor, labels: Tensor, _: int) -> object:
    """∇L."""
    return torch.autograd.grad(cross_entropy(net(images), labels), list(net.parameters()))


def product(net: nn.Module, images: Tensor, labels: Tensor, _: int) -> object:
    """One product with the Hessian, whose graph is kept for the next."""
    weights = list(net.parameters())
    slope = torch.autograd.grad(cross_entropy(net(images), labels), weights, create_graph=True)
    return torch.autograd.grad(slope, weights, weights, retain_graph=True)


def measure_parts(tasks: Sequence[tuple[int, int]]) -> list[Row]:
    """One row for each network, size of the task, and method."""
    tasked = {name: CONSTANT[name] for name in ("FOMAML", "iMAML", "iMAML, differences")}
    methods = {"gradient": gradient, "product": product, **tasked}
    rows: list[Row] = []
    for name, make in NETS.items():
        for ways, shots in track(tasks, f"parts, {name}"):
            net = make(ways)
            parameters = sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20
            images, labels = batch(ways, shots)
            # each image twice has the same Hessian, so that CG takes the same way
            twice = images.repeat(2, 1, 1, 1), labels.repeat(2)
            for method, call in methods.items():
                small = peak(call, net, images, labels)
                activations = peak(call, net, *twice) - small
                if method == "gradient":
                    unit = small
                beyond = small - parameters if method in tasked else small
                rows.append(
                    {
                        "network": name,
                        "task": f"{ways}-way {shots}-shot",
                        "method": method,
                        "MiB": small,
                        "vectors": (small - activations) / parameters,
                        "activations_MiB": activations,
                        "over_gradient": beyond / unit,
                    }
                )
    return rows


def draw(steps: Sequence[Row], parts: Sequence[Row], path: Path) -> None:
    """Peaks against steps, and what they consist of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for method in dict.fromkeys(str(row["method"]) for row in steps):
        points = [(row["steps"], row["MiB"]) for row in steps if row["method"] == method]
        style = "s--" if method in UNROLLED else "o-"  # dashed, as they lie on one another
        left.plot(*zip(*points, strict=True), style, markersize=5, label=method)
    left.set(xscale="log", yscale="log", xlabel="adaptation steps", ylabel="peak memory (MiB)")
    left.set_ylim(bottom=0.4)  # room for the legend
    left.set_xticks(STEPS, [str(s) for s in STEPS], minor=False)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    last = [row for row in parts if row["task"] == parts[-1]["task"]]
    places = [i + i // (len(last) // len(NETS)) for i in range(len(last))]
    vectors = [row["MiB"] - row["activations_MiB"] for row in last]
    right.barh(places, vectors, label="vectors of the parameters' size")
    right.barh(places, [row["activations_MiB"] for row in last], left=vectors, label="activations")
    right.set_yticks(places, [f"{row['network']}: {row['method']}" for row in last], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel=f"peak memory (MiB), {last[0]['task']}")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then a table and a file for each question, and one picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    parser.add_argument("--steps", type=int, default=STEPS[-1], help="most adaptation steps")
    parser.add_argument("--shots", type=int, default=5, help="of the larger, 20-way task")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=120)
    steps = measure_steps(options.steps, console)
    parts = measure_parts([(5, 1), (20, options.shots)])
    write(steps, options.out / "memory_steps.csv", console)
    write(parts, options.out / "memory_parts.csv", console)
    draw(steps, parts, options.out / "memory.png")


if __name__ == "__main__":
    main()
