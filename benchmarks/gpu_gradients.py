"""Are the gradients right on a device? Each against dense algebra in float64 on the CPU.

The gradient through φ of a proximal problem is λ(H + λ)⁻¹v, whatever made φ: H comes from torch's
dense Hessian (that of a ridge from its data). Errors are relative to what the theorem changes,
λ(H + λ)⁻¹v − v, so that a product that is wrong cannot hide behind λ.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from tables import Row
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import implicit_grad as ig

LAM = 5.0
Weights = dict[str, Tensor]
Context = Callable[[], contextlib.AbstractContextManager[object]]


class NotHere(Exception):
    """What a case needs and the device does not have; the message says it."""


class Attention(nn.Module):
    """Attention over four places, with heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """A recurrent layer, cuDNN's on CUDA."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def convolutions() -> nn.Module:
    """A network with batch norm; smooth, so that rounding decides nothing."""
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    return nn.Sequential(first, nn.Conv2d(4, 2, 3), nn.Flatten())


class Linear(nn.Module):
    """A matrix times weights: the loss is that of a ridge."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ridge": (Linear, (30, 8)),
    "convolutions, batch norm": (convolutions, (6, 3, 6, 6)),
    "attention": (Attention, (5, 4, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 6, 4)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 6, 4)),
}


class Problem:
    """A model, its data, and the gradient that is expected."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        make, shape = MODELS[name]
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            self.model, self.x = make(), torch.randn(shape)
            out = self.model(self.x)
            self.y = out.detach() + torch.randn_like(out)
        finally:
            torch.set_default_dtype(before)
        self.theta = {k: p.detach() for k, p in self.model.named_parameters()}
        self.v = torch.randn(sum(p.numel() for p in self.theta.values()), dtype=torch.float64)
        self.expected = self._expected()

    def loss(self, model: nn.Module, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        """Of some weights, on the device of the data."""
        return (functional_call(model, weights, (x,)).to(y.dtype) - y).square().sum() / 4

    def _expected(self) -> Tensor:
        if isinstance(self.model, Linear):
            H = self.x.T @ self.x / 2
        else:
            sizes = [p.numel() for p in self.theta.values()]

            def flat(vector: Tensor) -> Tensor:
                parts = vector.split(sizes)
                pairs = zip(self.theta.items(), parts, strict=True)
                weights = {k: part.view_as(p) for (k, p), part in pairs}
                return self.loss(self.model, weights, self.x, self.y)

            solution = 0.9 * torch.cat([p.flatten() for p in self.theta.values()])
            with sdpa_kernel(SDPBackend.MATH):  # the one whose second derivative torch has
                H = torch.autograd.functional.hessian(flat, solution)
        self.least = float(torch.linalg.eigvalsh(H)[0])
        self.lam = LAM + max(0.0, -self.least)  # positive definite, whatever the Hessian
        return torch.linalg.solve(
            H + self.lam * torch.eye(len(H), dtype=H.dtype), self.lam * self.v
        )

    def error(self, found: Tensor) -> float:
        """Relative to what the theorem changes."""
        change = self.expected - self.v
        return float((found - self.expected).norm() / change.norm())


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a gradient is taken, and the error that its arithmetic may leave."""

    dtype: torch.dtype
    tolerance: float
    within: Context = contextlib.nullcontext  # around the loss itself
    forward: Context = contextlib.nullcontext
    backward: Context = contextlib.nullcontext
    layout: torch.memory_format = torch.contiguous_format
    pinned: bool = False
    solver: ig.CG | ig.MINRES | ig.Exact | None = None


def gradient(problem: Problem, device: str, mode: Mode) -> Tensor:
    """λ(H + λ)⁻¹v by `implicit` on the device."""
    model = _copied(problem.model, device, mode)
    x, y = (_moved(t, device, mode) for t in (problem.x, problem.y))
    theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    v = problem.v.to(device, mode.dtype)

    def loss(phi: Weights) -> Tensor:
        with mode.within():
            return problem.loss(model, phi, x, y)

    solver = mode.solver or ig.CG(rtol=max(1e-12, 20 * torch.finfo(mode.dtype).eps))
    solve = ig.implicit(
        lambda t: {k: 0.9 * p for k, p in t.items()},
        ig.proximal(loss, problem.lam),
        linear_solver=solver,
        on_failure="ignore",
    )
    with mode.forward():
        phi = solve(theta)
        flat = torch.cat([p.flatten() for p in phi.values()])
    with mode.backward():
        found = torch.autograd.grad(flat, list(theta.values()), v)
    if device != "cpu":
        torch.cuda.synchronize()
    return torch.cat([t.flatten() for t in found]).cpu().double()


def _copied(model: nn.Module, device: str, mode: Mode) -> nn.Module:
    copied = copy.deepcopy(model).to(device, mode.dtype)
    return (
        copied.to(memory_format=mode.layout)
        if mode.layout is not torch.contiguous_format
        else copied
    )


def _moved(data: Tensor, device: str, mode: Mode) -> Tensor:
    data = data.to(mode.dtype)
    if mode.pinned:
        data = data.pin_memory().to(device, non_blocking=True)
    layout = mode.layout if data.dim() == 4 else torch.contiguous_format
    return data.to(device).contiguous(memory_format=layout)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 matrices, and convolutions, in TF32."""
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextlib.contextmanager
def float32_only() -> Iterator[None]:
    """No TF32, not even in convolutions, where torch allows it by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def other_stream() -> Iterator[None]:
    """A stream that is not the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def modes(device: str) -> dict[str, Mode]:
    """All ways to take a gradient."""
    f32, f64 = torch.float32, torch.float64

    def amp() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device, torch.bfloat16)

    both = {"forward": float32_only, "backward": float32_only}
    return {
        "float64": Mode(f64, 1e-7),
        "float32": Mode(f32, 2e-3, **both),
        "float32, TF32": Mode(f32, 5e-2, forward=tf32, backward=tf32),
        "products in bfloat16": Mode(f32, 0.3, within=amp, solver=ig.CG(maxiter=20)),
        "AMP around the call": Mode(f32, 2e-3, forward=amp, backward=float32_only),
        "AMP around backward": Mode(f32, 2e-3, forward=float32_only, backward=amp),
        "channels-last": Mode(f64, 1e-7, layout=torch.channels_last),
        "MINRES": Mode(f64, 1e-7, solver=ig.MINRES(rtol=1e-12)),
        "dense": Mode(f64, 1e-7, solver=ig.Exact()),
        "Jacobi": Mode(f64, 1e-7, solver=ig.CG(rtol=1e-12, preconditioner=ig.Jacobi())),
        "another stream, forward": Mode(f64, 1e-7, forward=other_stream),
        "another stream, backward": Mode(f64, 1e-7, backward=other_stream),
        "pinned memory": Mode(f64, 1e-7, pinned=True),
    }


# What needs no model of every kind is tried on one.
ONE_MODEL = ("MINRES", "dense", "Jacobi", "pinned memory")


def batch(device: str) -> float:
    """Ridges under vmap, one for each task."""
    torch.manual_seed(2)
    X, v = torch.randn(7, 12, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    theta = torch.zeros(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    condition = ig.proximal(lambda phi, X: (X @ phi - 1).square().sum() / 2, LAM)
    solve = ig.implicit(lambda t, X: 0.9 * t, condition, linear_solver=ig.CG(rtol=1e-12),
                        on_failure="ignore")  # fmt: skip
    phi = vmap(solve)(theta, X.to(device))
    (found,) = torch.autograd.grad(phi, theta, v.to(device))
    A = X.mT @ X + LAM * torch.eye(5, dtype=torch.float64)
    expected = LAM * torch.linalg.solve(A, v)
    return float((found.cpu() - expected).norm() / (expected - v).norm())


def root(device: str, linear_solver: ig.GMRES | ig.NormalCG | ig.Exact) -> float:
    """A root of a linear system that is not symmetric."""
    torch.manual_seed(3)
    A = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, dtype=torch.float64)
    v = torch.randn(6, dtype=torch.float64)
    there = A.to(device)
    b = torch.ones(6, dtype=torch.float64, device=device, requires_grad=True)
    condition = ig.root(lambda phi, b: there @ phi - b)
    solve = ig.implicit(lambda b: torch.linalg.solve(there, b), condition,
                        linear_solver=linear_solver, on_failure="ignore")  # fmt: skip
    (found,) = torch.autograd.grad(solve(b), b, v.to(device))
    expected = torch.linalg.solve(A.T, v)
    return float((found.cpu() - expected).norm() / expected.norm())


def meta(device: str, tasks: int | None) -> float:
    """`imaml`: (I + tH)⁻¹v of a ridge after three steps of 0.1, alone or as a batch of tasks."""
    torch.manual_seed(4)
    count = tasks or 1
    X, v = torch.randn(count, 9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    theta = nn.Linear(4, 1, bias=False).to(device, torch.float64)
    learner = ig.imaml(theta, lr=0.1, linear_solver=ig.CG(rtol=1e-12)).clone(tasks=tasks)
    there = X.to(device) if tasks else X[0].to(device)

    def loss() -> Tensor:
        squares = learner(there).square()
        return squares.mean((1, 2)) if tasks else squares.mean()

    for _ in range(3):
        learner.adapt(loss())
    outer = (learner.module.weight * v.to(device)).sum()
    (found,) = torch.autograd.grad(outer, theta.weight)
    A = torch.eye(4, dtype=torch.float64) + 0.3 * 2 / 9 * X.mT @ X
    expected = torch.linalg.solve(A, v.expand(count, 4)).sum(0)
    return float((found.cpu()[0] - expected).norm() / (expected - count * v).norm())


def random_numbers(device: str) -> float:
    """0 if a stochastic loss leaves the device's generator as it was, and is the same each time."""
    if device == "cpu":
        state: Callable[[], Tensor] = torch.get_rng_state
    else:
        state = torch.cuda.get_rng_state
    noisy = ig.proximal(lambda phi: nn.functional.dropout(phi, 0.5).square().sum(), 1.0)
    theta = torch.ones(50, device=device, requires_grad=True)
    before, found = state(), []
    for _ in range(2):
        phi = ig.implicit(torch.clone, noisy, on_failure="ignore")(theta)
        found.append(torch.autograd.grad(phi.sum(), theta)[0])
    return float(not torch.equal(before, state())) + float((found[0] - found[1]).norm())


def cases(device: str, quick: bool) -> Iterator[tuple[str, str, float, Callable[[], float]]]:
    """What is differentiated, how, the error that is allowed, and the measurement of it."""
    ways = modes(device)
    for name in MODELS:
        problem = Problem(name)
        for way, mode in ways.items():
            elsewhere = (
                quick and (name in ("GRU", "attention")) and way not in ("float64", "float32")
            )
            if elsewhere or (way in ONE_MODEL and name != "ridge"):
                continue
            if way == "channels-last" and not name.startswith("conv"):
                continue
            # cuDNN has no second derivatives of these: products are differences of gradients
            rough = 100 if device != "cpu" and name in ("LSTM", "GRU") else 1
            allowed = rough * mode.tolerance
            yield name, way, allowed, lambda p=problem, m=mode: _error(p, device, m)
    yield "ridges", "vmap", 1e-7, lambda: batch(device)
    for solver in (ig.GMRES(), ig.NormalCG(), ig.Exact()):
        yield "root", type(solver).__name__, 1e-7, lambda s=solver: root(device, s)
    yield "imaml", "one task", 1e-7, lambda: meta(device, None)
    yield "imaml", "clone(tasks=3)", 1e-7, lambda: meta(device, 3)
    yield "dropout", "random numbers", 0.0, lambda: random_numbers(device)


def _error(problem: Problem, device: str, mode: Mode) -> float:
    if device == "cpu" and (mode.pinned or other_stream in (mode.forward, mode.backward)):
        raise NotHere("a CPU has neither streams nor pinned memory")
    return problem.error(gradient(problem, device, mode))


def measured(device: str, quick: bool) -> list[Row]:
    """A row for each case; one that fails is told, and the others go on."""
    rows: list[Row] = []
    for name, way, tolerance, call in cases(device, quick):
        row: Row = {"problem": name, "how": way, "error": "", "allowed": tolerance, "right": "yes"}
        try:
            row["error"] = error = call()
            if not error <= tolerance:
                row["right"] = "NO"
        except NotHere as reason:
            row["right"] = f"skipped: {reason}"
        except Exception as error:  # on a machine that is lent, all that is wrong is to be seen
            row["right"] = f"NO: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        rows.append(row)
    return rows
