"""`python -m implicit_grad`: what is installed here, whether it works, what a bug report needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import implicit_grad as ig
from implicit_grad._wrapper.implicit_solver import Minimizer

_UNKNOWNS = 100
# The relative error of a gradient above which a device is said to compute it wrongly.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_FOR_A_REPORT = """\
For a bug report: all lines above; the smallest code that shows the trouble, with a seed; the whole
message or traceback; and of a gradient the one that you trust instead, or what this prints:
  from implicit_grad.testing import check_implicit
  print(check_implicit(solve, args, raise_on_failure=False))"""


class Finding(NamedTuple):
    """A line of the report, and whether what it tells of works."""

    line: str
    ok: bool = True


def main() -> int:
    """Print the report; 0 if all that is installed works, else 1."""
    found = list(_findings())
    print("\n".join(finding.line for finding in found))
    wrong = sum(not finding.ok for finding in found)
    print(f"\n{f'{wrong} of these do not work' if wrong else 'All of these work'}.")
    print(_FOR_A_REPORT)
    return 1 if wrong else 0


def _findings() -> Iterator[Finding]:
    yield Finding(f"implicit_grad {ig.__version__}")
    yield Finding(f"Python {platform.python_version()}, {platform.platform()}")
    versions = [f"{name} {_version(name)}" for name in ("torch", "numpy", "optree")]
    yield Finding(", ".join(versions))
    yield Finding(f"torch is built for {_built_for()}")
    yield Finding(
        f"CPU: {os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    yield Finding("\nOptional neighbours:")
    for name, check in _NEIGHBOURS.items():
        yield _neighbour(name, check)
    yield Finding("\nGradients against their closed form (a logistic regression):")
    for device in _devices():
        for dtype, tolerance in _TOLERANCES.items():
            if not (device == "mps" and dtype == torch.float64):  # which it does not have
                yield _gradients(device, dtype, tolerance)


def _built_for() -> str:
    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return next((f"{name} {version}" for name, version in built.items() if version), "the CPU")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minimises(solver: Minimizer) -> bool:
    """Whether it finds the minimum of ‖φ − 1‖²."""
    found = solver.minimize(lambda phi: (phi - 1).square().sum(), torch.zeros(2))
    return bool((found - 1).abs().max() < 1e-4)


def _torchopt() -> bool:
    import torchopt

    return _minimises(ig.solvers.TorchOpt(transform=torchopt.sgd(lr=0.5), steps=5))


def _learn2learn() -> bool:
    learn2learn = importlib.import_module("learn2learn")  # it has no types
    theta = nn.Linear(2, 1)
    maml = ig.imaml(learn2learn.algorithms.MAML(theta, lr=0.1))
    learner = maml.clone()
    learner.adapt(learner(torch.ones(3, 2)).square().mean())
    learner(torch.ones(3, 2)).sum().backward()
    return all(p.grad is not None for p in theta.parameters())


def _imports(name: str) -> Callable[[], bool]:
    return lambda: importlib.import_module(name) is not None


_NEIGHBOURS: dict[str, Callable[[], bool]] = {
    "learn2learn": _learn2learn,
    "torchopt": _torchopt,
    "scipy": lambda: _minimises(ig.solvers.SciPyMinimize()),
    "cvxpy": _imports("cvxpy"),
    "gurobipy": lambda: _minimises(ig.solvers.GurobiQP()),
    "matplotlib": _imports("matplotlib.figure"),
    "hypothesis": _imports("implicit_grad.testing.strategies"),
    "pytest": _imports("implicit_grad.testing.plugin"),
}


def _neighbour(name: str, check: Callable[[], bool]) -> Finding:
    """Installed or not; and if it is, whether a small problem comes out right."""
    version = _version(name)
    if version is None:
        return Finding(f"  {name:<12} not installed")
    nowhere = io.StringIO()  # their own warnings and banners, of which a report need not tell
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            right = check()
    except Exception as error:  # whatever another package raises is what the report is for
        said = (str(error).strip().splitlines() or [""])[0]
        return Finding(f"  {name:<12} {version:<10} FAILS: {type(error).__name__}: {said}", False)
    if not right:
        return Finding(f"  {name:<12} {version:<10} FAILS: a wrong solution", False)
    return Finding(f"  {name:<12} {version:<10} works")


def _devices() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _gradients(device: str, dtype: torch.dtype, tolerance: float) -> Finding:
    """How far products, CG and the derivative by the targets are from what algebra says."""
    name = f"  {device:<7} {str(dtype).removeprefix('torch.'):<8}"
    start = time.perf_counter()
    try:
        error, status = _error_of_gradients(device, dtype)
    except Exception as failure:  # out of memory, a driver: a line like the others
        said = (str(failure).strip().splitlines() or [""])[0]
        return Finding(f"{name} FAILS: {type(failure).__name__}: {said}", False)
    took = time.perf_counter() - start
    ok = error <= tolerance and status.ok
    told = f"relative error {error:.1e} (at most {tolerance:.0e}), {status.name}, {took:.2f} s"
    if device.startswith("cuda"):
        told += f", {torch.cuda.get_device_name(device)}"
    return Finding(f"{name} {'' if ok else 'FAILS: '}{told}", ok)


def _error_of_gradients(device: str, dtype: torch.dtype) -> tuple[float, ig.Status]:
    """The relative error of dy, and how the solve ended.

    With p = σ(Xw), the objective Σ(softplus(Xw) − y∘Xw) + ‖w‖²/2 has F = Xᵀ(p − y) + w,
    A = Xᵀ diag(p(1 − p)) X + I and ∂F/∂y = −Xᵀ: so dy = X A⁻¹v.
    """
    random = torch.Generator().manual_seed(0)
    X = torch.randn(3 * _UNKNOWNS, _UNKNOWNS, generator=random, dtype=torch.float64) / 10
    v, w = (torch.randn(_UNKNOWNS, generator=random, dtype=torch.float64) for _ in range(2))
    p = (X @ w).sigmoid()
    # targets for which w is the minimum: Xᵀ(p − y) = −w, by the least change
    y = p + torch.linalg.lstsq(X.T, w[:, None], driver="gelsd").solution[:, 0]
    identity = torch.eye(_UNKNOWNS, dtype=torch.float64)
    exact = X @ torch.linalg.solve(X.T @ ((p * (1 - p))[:, None] * X) + identity, v)

    def objective(phi: Tensor, X: Tensor, y: Tensor) -> Tensor:
        z = X @ phi
        return (softplus(z) - y * z).sum() + phi.square().sum() / 2

    monitor = ig.Monitor()
    solution = w.to(device, dtype)
    solve = ig.implicit(
        lambda X, y: solution.clone(), ig.argmin(objective), monitor=monitor, on_failure="ignore"
    )
    y = y.to(device, dtype).requires_grad_()
    (solve(X.to(device, dtype), y) @ v.to(device, dtype)).backward()
    assert y.grad is not None and monitor.last is not None
    return float((y.grad.cpu().double() - exact).norm() / exact.norm()), monitor.last.status


if __name__ == "__main__":
    sys.exit(main())
