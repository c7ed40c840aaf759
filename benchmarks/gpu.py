"""What works on a GPU, and how fast? All of it in under ten minutes, with torch alone.

    python benchmarks/gpu.py --out out            # the CPU, where there is no GPU
    python benchmarks/gpu.py --quick --out out    # a miniature, in seconds

Needs what the library needs (torch, optree, numpy), and neither learn2learn nor a network. The
tables carry the device's name. In turn: gradients against dense algebra (`gpu_gradients.py`); how
often a solve waits for the device; batches of tasks against a loop over them, and against MAML by
hand; memory against steps; the product as a CUDA graph; the inner step compiled. What the device
does not have is skipped, and said so. Seconds are the clock's, with what was launched waited for.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import gpu_gradients
import torch
from tables import Row, write
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import implicit_grad as ig
from implicit_grad.testing import peak_memory

WAYS, STEPS, LR = 5, 5, 0.05


def network(channels: int, device: str) -> nn.Module:
    """The few-shot literature's: four convolutions with batch norm, and a linear layer."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(
            nn.Conv2d(1 if i == 0 else channels, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
        )
        for i in range(4)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * channels, WAYS)).to(device)


class Tasks:
    """5-way 1-shot tasks of random images, and the meta-gradients of all."""

    def __init__(self, count: int, channels: int, device: str) -> None:
        self.net = network(channels, device)
        self.images, self.queries = torch.randn(2, count, WAYS, 1, 28, 28, device=device)
        self.labels = torch.arange(WAYS, device=device)
        self.imaml = ig.imaml(self.net, lr=LR, on_failure="ignore")
        self.theta = list(self.net.parameters())
        self.count = count

    def loop(self) -> list[Tensor]:
        """iMAML, a task at a time."""
        return self._summed(self._learned)

    def batch(self) -> list[Tensor]:
        """iMAML, all tasks at once."""
        learner, labels = self.imaml.clone(tasks=self.count), self.labels.expand(self.count, WAYS)
        for _ in range(STEPS):
            learner.adapt(vmap(cross_entropy)(learner(self.images), labels))
        return list(grad(vmap(cross_entropy)(learner(self.queries), labels).sum(), self.theta))

    def maml(self) -> list[Tensor]:
        """MAML by hand, a task at a time, as learn2learn's: the steps are differentiated."""
        return self._summed(lambda task: self.unrolled(task, STEPS))

    def unrolled(self, task: int, steps: int) -> list[Tensor]:
        """One task's gradient through its steps."""
        phi = dict(self.net.named_parameters())
        for _ in range(steps):
            slopes = grad(self._loss(phi, self.images[task]), list(phi.values()), create_graph=True)
            phi = {k: p - LR * g for (k, p), g in zip(phi.items(), slopes, strict=True)}
        return list(grad(self._loss(phi, self.queries[task]), self.theta))

    def implicit(self, task: int, steps: int) -> list[Tensor]:
        """One task's implicit gradient."""
        learner = self.imaml.clone()
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(self.images[task]), self.labels))
        return list(grad(cross_entropy(learner(self.queries[task]), self.labels), self.theta))

    def _learned(self, task: int) -> list[Tensor]:
        return self.implicit(task, STEPS)

    def _loss(self, phi: dict[str, Tensor], images: Tensor) -> Tensor:
        return cross_entropy(functional_call(self.net, phi, (images,)), self.labels)

    def _summed(self, one: Callable[[int], list[Tensor]]) -> list[Tensor]:
        sums = [torch.zeros_like(t) for t in self.theta]
        for task in range(self.count):
            torch._foreach_add_(sums, one(task))
        return sums


# ------------------------------------------------------------------------------------- waiting


class Reads(TorchDispatchMode):
    """Counts, on a CPU, what would wait for a device: numbers and lists that are read."""

    count = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple = (),
        kwargs: object = None,
    ) -> object:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextmanager
def as_if_waited_for() -> Iterator[Reads]:
    """On a CPU, run the code that is for devices, and count what it reads."""
    names = ("base", "cg", "cg_batched")
    modules = [importlib.import_module(f"implicit_grad._linear_solvers.{name}") for name in names]
    tolist, reads = Tensor.tolist, Reads()

    def counted(x: Tensor) -> object:
        reads.count += 1
        return tolist(x)

    patches = [mock.patch.object(module, "waited_for", lambda x: True) for module in modules]
    for patch in [*patches, mock.patch.object(Tensor, "tolist", counted)]:
        patch.start()
    try:
        with reads:
            yield reads
    finally:
        mock.patch.stopall()


def waits(call: Callable[[], object], device: str) -> int:
    """How often a call waits for the device."""
    if device == "cpu":
        with as_if_waited_for() as reads:
            call()
        return reads.count
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in told)


def waiting(device: str, quick: bool) -> list[Row]:
    """Waits and microseconds of one more iteration of a backward pass, by each linear solver."""
    few, many, size = 2, 10, 200
    torch.manual_seed(0)
    X = torch.randn(size, size, device=device) / size**0.5
    theta = torch.randn(size, device=device, requires_grad=True)
    several = torch.randn(8, size, device=device, requires_grad=True)

    def solve(solver: object) -> Callable[[Tensor], Tensor]:
        condition = ig.proximal(lambda phi: 40 * torch.tanh(X @ phi).square().sum(), 1.0)
        return ig.implicit(lambda t: 0.02 * t, condition, linear_solver=solver, on_failure="ignore")

    solvers = {
        "CG, fixed budget (goal 1)": lambda k: (solve(ig.CG(maxiter=k)), theta),
        "CG, to a tolerance": lambda k: (solve(ig.CG(maxiter=k, rtol=1e-6)), theta),
        "CG, preconditioned": lambda k: (
            solve(ig.CG(maxiter=k, preconditioner=lambda r: r / 2)), theta),
        "CG, 8 tasks at once": lambda k: (vmap(solve(ig.CG(maxiter=k))), several),
        "MINRES": lambda k: (solve(ig.MINRES(maxiter=k)), theta),
    }  # fmt: skip
    rows: list[Row] = []
    for name, make in solvers.items():
        found = {}
        for k in (few, many):
            solver, argument = make(k)
            phi = solver(argument)
            v = torch.ones_like(phi)
            back = lambda phi=phi, v=v, t=argument: grad(phi, t, v, retain_graph=True)  # noqa: E731
            back()
            found[k] = waits(back, device), seconds(back, device, 0.05 if quick else 0.5)
        (w, t), (w_many, t_many) = found[few], found[many]
        rows.append({
            "linear solver": name,
            "waits, an iteration": (w_many - w) / (many - few),
            "waits, the rest": w - few * (w_many - w) / (many - few),
            "µs, an iteration": 1e6 * (t_many - t) / (many - few),
        })  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------- time


def seconds(call: Callable[[], object], device: str, budget: float) -> float:
    """The median time of a call, of as many as fit into a budget of seconds."""
    times: list[float] = []
    end = time.perf_counter() + budget
    while not times or (time.perf_counter() < end and len(times) < 100):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: str) -> None:
    """For all that was launched."""
    if device != "cpu":
        torch.cuda.synchronize()


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference, relative."""
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (found, expected))
    return float((a - b).norm() / b.norm())


def batches(device: str, quick: bool) -> list[Row]:
    """Tasks at once against a task at a time: iMAML's and, by hand, MAML's."""
    counts = (1, 2) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    if device == "cpu" and not quick:
        counts = counts[:5]  # there, no more are any faster
    rows: list[Row] = []
    for count in counts:
        tasks = Tasks(count, 8 if quick else 64, device)
        together, apart = tasks.batch(), tasks.loop() if count <= 32 else None
        if count == 1:
            tasks.maml()  # first calls choose algorithms
        budget = 0.0 if quick else 2.0
        batch, loop, maml = (seconds(f, device, budget) for f in
                             (tasks.batch, tasks.loop, tasks.maml))  # fmt: skip
        rows.append({
            "tasks": count,
            "at once, ms": 1e3 * batch,
            "loop, ms": 1e3 * loop,
            "MAML by hand, ms": 1e3 * maml,
            "times faster than the loop": loop / batch,
            "times faster than MAML": maml / batch,
            "difference from the loop": "" if apart is None else distance(together, apart),
        })  # fmt: skip
    return rows


# -------------------------------------------------------------------------------------- memory


def peak(call: Callable[[], object], device: str) -> float:
    """MiB of tensors alive at once during a call, above those alive before."""
    call()
    if device == "cpu":
        return peak_memory(call) / 2**20
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory(device: str, quick: bool) -> list[Row]:
    """Peaks of one task's meta-gradient against the number of steps."""
    tasks = Tasks(1, 8 if quick else 64, device)
    rows: list[Row] = []
    for steps in (1, 4) if quick else (1, 4, 16, 64):
        row: Row = {"steps": steps}
        for name, method in {"iMAML": tasks.implicit, "MAML by hand": tasks.unrolled}.items():
            row[f"{name}, MiB"] = peak(lambda m=method, s=steps: m(0, s), device)
        rows.append(row)
    return rows


# ----------------------------------------------------------------- graphs and compiled functions


def products(device: str, quick: bool) -> list[Row]:
    """One product with the Hessian: called, and as a CUDA graph."""
    tasks = Tasks(1, 8 if quick else 64, device)
    phi = {k: p.detach().requires_grad_() for k, p in tasks.net.named_parameters()}
    weights = list(phi.values())
    slopes = grad(tasks._loss(phi, tasks.images[0]), weights, create_graph=True)
    v = [torch.randn_like(p) for p in weights]

    def product() -> tuple[Tensor, ...]:
        return grad(slopes, weights, v, retain_graph=True)

    budget = 0.1 if quick else 2.0
    expected = [t.clone() for t in product()]
    called = seconds(product, device, budget)
    row: Row = {"product": "called", "ms": 1e3 * called, "times faster": 1.0, "difference": 0.0}
    as_graph: Row = {**row, "product": "as a CUDA graph"}
    if device == "cpu":
        return [row, {**as_graph, "ms": "skipped: a CPU has none", **_blank}]
    try:
        # The graph has to be made on the stream that captures: backward runs where forward ran.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            slopes = grad(tasks._loss(phi, tasks.images[0]), weights, create_graph=True)
            for _ in range(3):
                product()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = product()
        replayed = seconds(graph.replay, device, budget)
        found = distance(list(result), expected)
        as_graph.update({"ms": 1e3 * replayed, "times faster": called / replayed})
        as_graph["difference"] = found
    except Exception as error:
        as_graph.update({"ms": f"failed: {_sentence(error)}", **_blank})
    return [row, as_graph]


_blank: Row = {"times faster": "", "difference": ""}


def compiled(device: str, quick: bool) -> list[Row]:
    """The inner step as it is, and by torch.compile, within a solver that is differentiated."""
    tasks = Tasks(1, 8 if quick else 64, device)
    theta = dict(tasks.net.named_parameters())
    images = tasks.images[0]

    def step(phi: dict[str, Tensor]) -> dict[str, Tensor]:
        slopes = torch.func.grad(lambda phi: tasks._loss(phi, images))(phi)
        return {k: p - LR * slopes[k] for k, p in phi.items()}

    def gradient(step: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> list[Tensor]:
        def descend(theta: dict[str, Tensor]) -> dict[str, Tensor]:
            for _ in range(STEPS):
                theta = step(theta)
            return theta

        condition = ig.proximal(lambda phi: tasks._loss(phi, images), 1 / (STEPS * LR))
        phi = ig.implicit(descend, condition, linear_solver=ig.CG(maxiter=5),
                          on_failure="ignore")(theta)  # fmt: skip
        return list(grad(tasks._loss(phi, tasks.queries[0]), tasks.theta))

    budget = 0.1 if quick else 2.0
    start = {k: p.detach() for k, p in theta.items()}
    plain = seconds(lambda: step(start), device, budget)
    row: Row = {
        "inner step": "as it is",
        "ms": 1e3 * plain,
        "times faster": 1.0,
        "first call, s": "",
    }
    row["difference"] = 0.0
    faster: Row = {**row, "inner step": "torch.compile"}
    try:
        # the miniature only traces: compilers may be missing, and take a minute
        fast = torch.compile(step, backend="eager" if quick else "inductor")
        begun = time.perf_counter()
        fast(start)
        wait(device)
        faster["first call, s"] = time.perf_counter() - begun
        faster["ms"] = 1e3 * (taken := seconds(lambda: fast(start), device, budget))
        faster["times faster"] = plain / taken
        faster["difference"] = distance(gradient(fast), gradient(step))
    except Exception as error:
        faster.update({"ms": f"skipped: {_sentence(error)}", **_blank, "first call, s": ""})
    return [row, faster]


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# ---------------------------------------------------------------------------------------- main


def device_name(device: str) -> str:
    """The name that tables carry."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        told = None
    return told[1] if told else platform.processor() or platform.machine()


TABLES = {
    "gradients": gpu_gradients.measured,
    "waits": waiting,
    "memory": memory,
    "graph": products,
    "batches": batches,
    "compile": compiled,
}


def main(arguments: list[str] | None = None) -> int:
    """The tables, one after another; 1 if a gradient was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="a miniature, in seconds")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no GPU here")
    if args.device == "cpu":
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    name = device_name(args.device)
    print(f"{name}, torch {torch.__version__}")
    wrong, begun = [], time.perf_counter()
    for table in args.only:
        rows = TABLES[table](args.device, args.quick)
        wrong += [row for row in rows if str(row.get("right", "")).startswith("NO")]
        named = [{**row, "device": name, "torch": torch.__version__} for row in rows]
        write(named, args.out / f"gpu_{table}_{args.device}.csv")
    print(f"\n{time.perf_counter() - begun:.0f} s; wrong gradients: {len(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
