"""What does the backward pass of many quadratic programs at once cost, against other packages?

    python benchmarks/batched_qps.py --out benchmarks/results

B strictly convex programs of n unknowns, n inequalities and n/4 equations, min ½xᵀQx + cᵀx under
G x ≤ h and A x = b, float64, one thread: gradients with respect to Q, c, G, h, A and b. The forward
pass is not timed, for `implicit` takes any solver's solution (here an interior point method's).
qpth and cvxpylayers are timed where they are installed; gradients are compared with those by
`Exact`, one program after another.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from tables import Row, write
from timing import interleaved
from torch import Tensor
from torch.func import vmap

import implicit_grad as ig

Programs = tuple[Tensor, ...]
Backward = Callable[[], tuple[Tensor, ...]]


def programs(count: int, n: int) -> Programs:
    """(Q, c, G, h, A, b); feasible, with some of the inequalities active."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    root, c = torch.randn(count, n, n, **options), 2 * torch.randn(count, n, **options)
    G, A = torch.randn(count, n, n, **options), torch.randn(count, n // 4, n, **options)
    inside = torch.randn(count, n, **options)
    h = (G @ inside[..., None])[..., 0] + torch.rand(count, n, **options)
    b = (A @ inside[..., None])[..., 0]
    Q = root @ root.mT / n + 0.1 * torch.eye(n, **options)
    return Q, c, G, h, A, b


@torch.no_grad()
def interior_point(Q: Tensor, c: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Newton steps on the conditions of optimality, with z·slack = μ and μ brought to 0."""
    n, k, m = len(c), len(h), len(b)
    x, nu, z, slack = c.new_zeros(n), c.new_zeros(m), c.new_ones(k), c.new_ones(k)
    while True:
        mu = float(z @ slack) / k
        residual = torch.cat([Q @ x + c + G.T @ z + A.T @ nu, A @ x - b, G @ x + slack - h])
        if mu < 1e-15 and float(residual.norm()) < 1e-10:
            return x
        system = c.new_zeros(n + m + k, n + m + k)
        system[:n, :n], system[:n, n : n + m], system[:n, n + m :] = Q, A.T, G.T
        system[n : n + m, :n], system[n + m :, :n] = A, G
        system[n + m :, n + m :] = torch.diag(-slack / z)
        rhs = -residual
        rhs[n + m :] -= (0.1 * mu - z * slack) / z
        dx, dnu, dz = torch.linalg.solve(system, rhs).split([n, m, k])
        dslack = (0.1 * mu - z * slack - slack * dz) / z
        ratios = torch.cat([-z / dz, -slack / dslack])
        length = min(1.0, 0.99 * float(ratios[ratios > 0].min())) if (ratios > 0).any() else 1.0
        x, nu, z, slack = (
            v + length * d for v, d in ((x, dx), (nu, dnu), (z, dz), (slack, dslack))
        )


def implicit(linear_solver: ig.Exact | None) -> Callable[..., Tensor]:
    """The program as a condition."""
    return ig.implicit(
        interior_point,
        ig.argmin(
            lambda x, Q, c, G, h, A, b: x @ Q @ x / 2 + c @ x,
            equality=lambda x, Q, c, G, h, A, b: A @ x - b,
            inequality=lambda x, Q, c, G, h, A, b: G @ x - h,
        ),
        linear_solver=linear_solver,
    )


def by_qpth(data: Programs) -> Tensor:
    from qpth.qp import QPFunction

    solution: Tensor = QPFunction(verbose=-1)(*data)
    return solution


def by_cvxpylayers(data: Programs) -> Tensor:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    # DPP asks for a root of Q: the gradient passes through its Cholesky factor
    shapes = [t.shape[1:] for t in data]
    R, c, G, h, A, b = (cp.Parameter(shape) for shape in shapes)
    x = cp.Variable(shapes[1])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ x) / 2 + c @ x), [G @ x <= h, A @ x == b])
    layer = CvxpyLayer(problem, [R, c, G, h, A, b], [x])
    root = torch.linalg.cholesky(data[0]).mT
    found: Tensor
    (found,) = layer(
        root, *data[1:], solver_args={"solve_method": "Clarabel", "n_jobs_backward": 1}
    )
    return found


FORWARD: dict[str, Callable[[Programs], Tensor]] = {
    "implicit_grad": lambda data: vmap(implicit(None))(*data),
    "implicit_grad, Exact": lambda data: vmap(implicit(ig.Exact()))(*data),
    "a loop of implicit_grad": lambda data: torch.stack(
        [implicit(None)(*row) for row in zip(*data, strict=True)]
    ),
    "qpth": by_qpth,
    "cvxpylayers": by_cvxpylayers,
}


def backward(phi: Tensor, data: Programs) -> Backward:
    """The backward pass, as often as one likes."""
    v = torch.cos(torch.arange(phi.numel(), dtype=phi.dtype)).view_as(phi)
    return lambda: torch.autograd.grad(phi, data, v, retain_graph=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--programs", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--unknowns", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each size")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for count in args.programs:
        rows += _measured(count, args.unknowns, args.seconds)
    write(rows, args.out / "batched_qps.csv", Console())


def _measured(count: int, n: int, seconds: float) -> list[Row]:
    data = tuple(t.requires_grad_() for t in programs(count, n))
    exact = torch.stack([implicit(ig.Exact())(*row) for row in zip(*data, strict=True)])
    expected = backward(exact, data)()
    methods: dict[str, Backward] = {}
    solutions: dict[str, Tensor] = {}
    for name, solve in FORWARD.items():
        try:
            solutions[name] = solve(data)
        except ImportError:
            print(f"{name} is not installed")
            continue
        methods[name] = backward(solutions[name], data)
    times = interleaved(methods, seconds, f"{count} programs")
    return [
        {
            "programs": count,
            "method": name,
            "backward, ms": 1e3 * statistics.median(times[name]),
            "solutions differ": _distance((phi,), (exact,)),
            "gradients differ": _distance(methods[name](), expected),
        }
        for name, phi in solutions.items()
    ]


def _distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Relative to all; Q's gradient as that of a symmetric matrix."""
    pairs = [
        ((f + f.mT, e + e.mT) if i == 0 and f.dim() == 3 else (f, e))
        for i, (f, e) in enumerate(zip(found, expected, strict=True))
    ]
    off = torch.cat([(f - e).detach().flatten() for f, e in pairs]).norm()
    return float(off / torch.cat([e.detach().flatten() for _, e in pairs]).norm())


if __name__ == "__main__":
    main()
