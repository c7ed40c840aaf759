"""Seven solvers that autograd cannot look into, and exact gradients through what they return.

    python examples/black_boxes.py

Each finds a minimiser w of its objective for a prior theta, data X and y, and a weight lam; the
outer loss is w's error on held-out data. Its derivatives with respect to all four arguments are
compared with finite differences of the whole solver, run again from the start for each difference.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import softplus

import implicit_grad as ig

EXTRAS = {"scipy": "scipy", "gurobipy": "gurobi", "torchopt": "torchopt"}
NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
Arguments = dict[str, Any]


def logistic(w: Tensor, theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """Logistic regression on soft labels y in [0, 1], held near a prior theta."""
    z = X @ w
    return (softplus(z) - y * z).mean() + lam / 2 * (w - theta).square().sum()


def ridge(w: Tensor, theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """Least squares, held near a prior theta."""
    return (X @ w - y).square().mean() / 2 + lam / 2 * (w - theta).square().sum()


def regression(w: Arguments, theta: Arguments, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """A small network's squared error, its weights held near theta."""
    error = (functional_call(NETWORK, w, (X,))[:, 0] - y).square().mean() / 2
    return error + lam / 2 * sum((w[k] - theta[k]).square().sum() for k in theta)


def line_search(theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """A hand-written loop: it branches on `.item()`, halves long steps, and stops early."""
    slope = grad(lambda w: logistic(w, theta, X, y, lam))
    w, step = theta, 1.0
    for _ in range(1000):
        downhill = -slope(w)
        if downhill.norm().item() < 1e-13:
            break
        step *= 2
        while (slope(w + step * downhill) @ downhill).item() > 0:
            step /= 2
        w = w + step * downhill
    return w


def lbfgs(theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> np.ndarray:
    """SciPy's L-BFGS-B: compiled code, on an objective and a gradient written in NumPy."""
    from scipy.optimize import minimize

    theta, X, y, lam = theta.numpy(), X.numpy(), y.numpy(), lam.item()

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        z, away = X @ w, w - theta
        value = np.mean(np.logaddexp(0, z) - y * z) + lam / 2 * away @ away
        return value, X.T @ (1 / (1 + np.exp(-z)) - y) / len(y) + lam * away

    options = {"ftol": 0, "gtol": 1e-12, "maxcor": 30}
    return minimize(objective, theta, jac=True, method="L-BFGS-B", options=options).x


def gurobi(theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> np.ndarray:
    """A commercial QP solver, which is handed the problem as symbols and not as a function."""
    import gurobipy

    quiet = {"OutputFlag": 0}
    with gurobipy.Env(params=quiet) as env, gurobipy.Model(env=env) as model:
        w = model.addMVar(len(theta), lb=-gurobipy.GRB.INFINITY)
        error, away = X.numpy() @ w - y.numpy(), w - theta.numpy()
        model.setObjective(error @ error / (2 * len(y)) + lam.item() / 2 * (away @ away))
        model.optimize()
        return w.X


def cross_entropy(theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """Random search: resample around the best tenth; Newton's method settles the last digits."""

    def objective(w: Tensor) -> Tensor:
        return logistic(w, theta, X, y, lam)

    slope = grad(objective)
    mean, spread = theta, torch.ones_like(theta)
    for _ in range(15):
        samples = mean + spread * torch.randn(100, len(theta), dtype=theta.dtype)
        elite = samples[vmap(objective)(samples).argsort()[:10]]
        mean, spread = elite.mean(0), elite.std(0)
    for _ in range(4):
        mean = mean - torch.linalg.solve(jacrev(slope)(mean), slope(mean))
    return mean


def adam(theta: Arguments, X: Tensor, y: Tensor, lam: Tensor) -> Arguments:
    """torch.optim.Adam on a network's weights, a dict of tensors, as in any training script."""
    w = {name: t.clone().requires_grad_() for name, t in theta.items()}
    optimizer = torch.optim.Adam(w.values(), lr=0.1, betas=(0.8, 0.9), eps=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        regression(w, theta, X, y, lam).backward()
        optimizer.step()
    return w


def torchopt_sgd(theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """TorchOpt's functional SGD with Nesterov momentum: state in, updates out."""
    import torchopt

    transform = torchopt.sgd(lr=1.0, momentum=0.6, nesterov=True)
    w = (theta.clone().requires_grad_(),)
    state = transform.init(w)
    for _ in range(200):
        slope = torch.autograd.grad(logistic(*w, theta, X, y, lam), w)
        updates, state = transform.update(slope, state, params=w, inplace=False)
        w = torchopt.apply_updates(w, updates, inplace=False)
    return w[0]


OTHER_PROGRAM = """
import json, math, sys
theta, X, y, lam = json.load(sys.stdin)
w = theta
for _ in range(300):
    errors = [1 / (1 + math.exp(-sum(map(float.__mul__, x, w)))) - t for x, t in zip(X, y)]
    slope = [sum(map(float.__mul__, errors, column)) / len(y) for column in zip(*X)]
    w = [a - 1.5 * (s + lam * (a - b)) for a, s, b in zip(w, slope, theta)]
json.dump(w, sys.stdout)
"""


def other_process(theta: Tensor, X: Tensor, y: Tensor, lam: Tensor) -> np.ndarray:
    """Another program, without torch or NumPy: it reads numbers as text and writes numbers."""
    question = json.dumps([t.tolist() for t in (theta, X, y, lam)])
    command = [sys.executable, "-I", "-c", OTHER_PROGRAM]
    answer = subprocess.run(command, input=question, capture_output=True, text=True, check=True)
    return np.array(json.loads(answer.stdout))


@dataclass(frozen=True)
class BlackBox:
    """A solver and the objective that it minimises, by means of its own."""

    name: str
    solver: Callable[..., Any]
    objective: Callable[..., Tensor]

    def arguments(self) -> Arguments:
        """Where the solver is differentiated."""
        random = torch.Generator().manual_seed(1)
        X = torch.randn(20, 3, dtype=torch.float64, generator=random)
        y = torch.rand(20, dtype=torch.float64, generator=random)
        theta = torch.randn(3, dtype=torch.float64, generator=random)
        if self.objective is regression:
            shapes = NETWORK.state_dict().items()
            theta = {k: torch.randn(w.shape, generator=random).to(w) for k, w in shapes}
        return {"theta": theta, "X": X, "y": y, "lam": torch.tensor(0.3, dtype=torch.float64)}

    def outer_loss(self, w: Any) -> Tensor:
        """The objective on held-out data, without the prior."""
        random = torch.Generator().manual_seed(2)
        X = torch.randn(30, 3, dtype=torch.float64, generator=random)
        y = torch.rand(30, dtype=torch.float64, generator=random)
        return self.objective(w, w, X, y, torch.zeros(()))


BLACK_BOXES = (
    BlackBox("hand-written line search", line_search, logistic),
    BlackBox("SciPy L-BFGS-B", lbfgs, logistic),
    BlackBox("Gurobi QP", gurobi, ridge),
    BlackBox("cross-entropy method", cross_entropy, logistic),
    BlackBox("torch.optim.Adam, network", adam, regression),
    BlackBox("TorchOpt SGD", torchopt_sgd, logistic),
    BlackBox("another process", other_process, logistic),
)


def leaves(arguments: Arguments) -> dict[str, Tensor]:
    """The tensors among the arguments, by name."""
    theta = arguments["theta"]
    named = theta if isinstance(theta, dict) else {"theta": theta}
    return {**named, **{name: arguments[name] for name in ("X", "y", "lam")}}


def replaced(arguments: Arguments, tensors: dict[str, Tensor]) -> Arguments:
    """The arguments with other tensors in the places of those that `leaves` names."""
    theta = arguments["theta"]
    theta = {k: tensors[k] for k in theta} if isinstance(theta, dict) else tensors["theta"]
    return {"theta": theta, **{name: tensors[name] for name in ("X", "y", "lam")}}


def hypergradient(box: BlackBox, solver: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The outer loss's implicit gradient with respect to every argument."""
    solve = ig.implicit(solver or box.solver, ig.argmin(box.objective), on_failure="raise")
    tensors = {name: t.requires_grad_() for name, t in leaves(box.arguments()).items()}
    w = solve(*replaced(box.arguments(), tensors).values())
    gradients = torch.autograd.grad(box.outer_loss(w), list(tensors.values()))
    return dict(zip(tensors, gradients, strict=True))


def finite_difference(box: BlackBox, name: str, direction: Tensor, step: float = 0.01) -> float:
    """The derivative of the outer loss along a direction in one argument, to sixth order."""

    def loss(length: float) -> float:
        arguments = box.arguments()
        tensors = leaves(arguments)
        moved = replaced(arguments, {**tensors, name: tensors[name] + length * direction})
        w = box.solver(*moved.values())
        w = {k: t.detach() for k, t in w.items()} if isinstance(w, dict) else torch.as_tensor(w)
        return box.outer_loss(w).item()

    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return sum(c * (loss(k * step) - loss(-k * step)) for k, c in weights.items()) / step


def compared(box: BlackBox, name: str, gradient: Tensor) -> tuple[float, float]:
    """Its derivative along a random direction of length 1: the implicit one and the reference."""
    random = torch.Generator().manual_seed(len(name))
    direction = torch.randn(gradient.shape, dtype=gradient.dtype, generator=random)
    direction /= direction.norm()
    return (gradient * direction).sum().item(), finite_difference(box, name, direction)


def main() -> None:
    """Compare the solvers' hypergradients with finite differences, and print a table."""
    print(f"{'solver':26}{'d/d lam':>14}{'reference':>14}{'worst relative error':>22}{'time':>8}")
    for box in BLACK_BOXES:
        start = time.perf_counter()
        try:
            pairs = {k: compared(box, k, g) for k, g in hypergradient(box).items()}
        except ModuleNotFoundError as missing:
            extra = EXTRAS[str(missing.name).partition(".")[0]]
            print(f"{box.name:26}  not installed: pip install 'implicit-grad[{extra}]'")
            continue
        error = max(abs(mine / reference - 1) for mine, reference in pairs.values())
        mine, reference = pairs["lam"]
        seconds = time.perf_counter() - start
        print(f"{box.name:26}{mine:14.9f}{reference:14.9f}{error:22.1e}{seconds:6.1f} s")


if __name__ == "__main__":
    main()
