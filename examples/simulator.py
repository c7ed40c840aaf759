"""What a plate is made of, from thermometers: the parameters of a simulator that SciPy solves.

    python examples/simulator.py
    python examples/simulator.py --size 64 --iterations 200   # minutes

A plate is heated at four places, one after the other; it conducts to its cooled rim and radiates.
The simulator is NumPy and SciPy: Newton's method with a sparse factorisation, where autograd sees
nothing. The equation that it solves is written once more in torch, and the factorisation that it
ends with also solves the adjoint system. So the gradient by the conductivity of every cell takes a
fraction of one simulation; differences take two for each cell. Heat runs around what is hidden, and
36 thermometers in 4 experiments, off by 1 %, tell where that is.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import quiet  # noqa: F401
import torch
from compared import costs, differences
from matplotlib.figure import Figure
from pictures import BLUE, GREY, options, save
from scipy.optimize import minimize
from scipy.sparse import block_diag, diags_array, eye_array, kron
from scipy.sparse.linalg import splu
from torch import Tensor
from torch.nn.functional import pad

import implicit_grad as ig

RADIATION, NOISE, SMOOTH, HEAT = 0.02, 0.01, 0.1, 4.0
LENGTHS = (250, 1000)


class Plate:
    """The simulator: temperatures (experiments, cells) from log conductivities and heat."""

    def __init__(self, size: int) -> None:
        """Differences over the faces between cells, and means, as sparse matrices."""
        one, self.simulations = eye_array(size), 0
        slope = diags_array([1.0, -1.0], offsets=[0, -1], shape=(size + 1, size))
        mean = (abs(slope) / 2).tolil()
        mean[0, 0] = mean[-1, -1] = 1.0  # at the rim, the cell's own
        self.slopes = kron(one, slope).tocsr(), kron(slope, one).tocsr()
        self.means = kron(one, mean.tocsr()).tocsr(), kron(mean.tocsr(), one).tocsr()

    def simulate(self, log_k: Tensor, heat: Tensor) -> Tensor:
        """Newton's method from a cold plate."""
        k, source = np.exp(log_k.numpy().ravel()), heat.numpy().reshape(len(heat), -1)
        pairs = zip(self.slopes, self.means, strict=True)
        conduction = sum(D.T @ diags_array(M @ k) @ D for D, M in pairs)
        u = np.zeros_like(source)
        for _ in range(20):
            residual = u @ conduction + RADIATION * ((1 + u) ** 4 - 1) - source
            slopes = 4 * RADIATION * (1 + u) ** 3
            matrix = block_diag([conduction + diags_array(slope) for slope in slopes])
            self.factors = splu(matrix.tocsc())
            step = self.factors.solve(residual.ravel()).reshape(u.shape)
            u = u - step
            if abs(step).max() < 1e-10:
                break
        self.simulations += 1
        return torch.from_numpy(u).view_as(heat)

    def adjoint(self, _: Any, b: Tensor) -> np.ndarray:
        """Solve the transposed system with the factors that the simulation has left."""
        return self.factors.solve(b.numpy(), trans="T")


def conducted(u: Tensor, k: Tensor) -> Tensor:
    """What leaves each cell along its row; beyond the ends of a row it is cold."""
    wide = torch.cat([k[:, :1], k, k[:, -1:]], 1)
    faces = (wide[:, 1:] + wide[:, :-1]) / 2
    return -(faces * pad(u, (1, 1)).diff(dim=-1)).diff(dim=-1)


def residual(u: Tensor, log_k: Tensor, heat: Tensor) -> Tensor:
    """What the simulator brings to zero: conduction and radiation, less the heat."""
    k = log_k.exp()
    along = conducted(u, k) + conducted(u.mT, k.mT).mT
    return along + RADIATION * ((1 + u) ** 4 - 1) - heat


class Measured:
    """A plate with something hidden in it, its thermometers, and how well a guess explains them."""

    def __init__(self, size: int) -> None:
        self.plate = Plate(size)
        x, y = torch.meshgrid(*[torch.linspace(0, 1, size).double()] * 2, indexing="xy")
        inside = ((x - 0.55) ** 2 + (y - 0.5) ** 2).sqrt()
        ring = (inside - 0.25).abs() < 0.07
        self.truth = torch.where(ring & (x < 0.7), -2.5, 0.0).double()
        corners = [(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.55, 0.5)]
        spots = [(-((x - a) ** 2 + (y - b) ** 2) / 0.01).exp() for a, b in corners]
        self.heat = HEAT * torch.stack([spot / spot.sum() for spot in spots])
        rows = torch.linspace(0.08, 0.92, 6) * size
        self.where = rows.long()[:, None], rows.long()
        exact = self.at_thermometers(self.plate.simulate(self.truth, self.heat))
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).double()
        self.seen = exact * (1 + NOISE * noise)

    def at_thermometers(self, u: Tensor) -> Tensor:
        """Temperatures where they are measured."""
        return u[:, self.where[0], self.where[1]]

    def loss(self, log_k: Tensor, **settings: Any) -> Tensor:
        """The misfit in units of the noise, and a price for what is not smooth."""
        settings = {"linear_solver": self.plate.adjoint} | settings
        solve = ig.implicit(self.plate.simulate, ig.root(residual), **settings)
        return self.cost(solve(log_k, self.heat), log_k)

    def cost(self, u: Tensor, log_k: Tensor) -> Tensor:
        """The same of temperatures."""
        misfit = ((self.at_thermometers(u) / self.seen - 1) / NOISE).square().mean()
        rough = sum((log_k.diff(dim=dim).square() + 1e-2).sqrt().sum() for dim in (0, 1))
        return misfit + SMOOTH * rough / len(log_k)

    def relaxed(self, log_k: Tensor, steps: int) -> Tensor:
        """The same of temperatures that so many steps of time lead to, all of them in the graph."""
        u = torch.zeros_like(self.heat)
        for _ in range(steps):
            u = u - 0.1 * residual(u, log_k, self.heat)
        return self.cost(u, log_k)


def gradient(loss: Any, at: Tensor) -> Tensor:
    """Of a loss by log conductivities."""
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def fitted(measured: Measured, iterations: int, by_adjoint: bool) -> tuple[Tensor, Any]:
    """SciPy's L-BFGS; the best conductivities, and the loss after each number of simulations."""
    size, curve = len(measured.truth), []

    def value(flat: np.ndarray) -> Any:
        at = torch.tensor(flat).view(size, size).requires_grad_(by_adjoint)
        loss = measured.loss(at)
        curve.append((measured.plate.simulations, loss.item()))
        if not by_adjoint:
            return loss.item()
        return loss.item(), torch.autograd.grad(loss, at)[0].numpy().ravel()

    measured.plate.simulations = 0
    limits = {"maxiter": iterations, "eps": 1e-5}
    found = minimize(
        value, np.zeros(size**2), jac=by_adjoint or None, method="L-BFGS-B", options=limits
    )
    best = np.minimum.accumulate([loss for _, loss in curve])
    return torch.tensor(found.x).view(size, size), ([n for n, _ in curve], best)


def draw(measured: Measured, found: Tensor, curves: dict[str, Any]) -> Any:
    """What is hidden, what was found, and the loss over simulations."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    truth, guess, right = figure.subplots(1, 3)
    for panel, field, title in ((truth, measured.truth, "hidden"), (guess, found, "found")):
        image = panel.imshow(field.numpy(), cmap="viridis", vmin=-2.5, vmax=0.5)
        panel.set_title(title, fontsize=9)
        panel.axis("off")
    rows, columns = torch.broadcast_tensors(*measured.where)
    truth.plot(columns.ravel(), rows.ravel(), ".", color="white", markersize=3)
    for spot in measured.heat:
        row, column = divmod(int(spot.argmax()), len(found))
        truth.plot(column, row, "x", color="red")
    figure.colorbar(image, ax=guess, label="log conductivity", shrink=0.8)
    for (name, (count, losses)), color in zip(curves.items(), (BLUE, GREY), strict=True):
        right.loglog(count, losses, color=color, label=name)
    right.set(xlabel="simulations", ylabel="loss")
    right.spines[["top", "right"]].set_visible(False)
    right.grid(alpha=0.25)
    right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Find what is hidden; the correlation with it, losses, and what gradients cost."""
    chosen = options(__doc__, arguments, size=12, iterations=150)
    measured = Measured(chosen.size)
    guess = torch.zeros_like(measured.truth)
    ways = {
        "differences": lambda: differences(measured.loss, guess),
        "implicit, the factors reused": lambda: gradient(measured.loss, guess),
        "implicit, GMRES": lambda: gradient(lambda k: measured.loss(k, linear_solver=None), guess),
    }
    for steps in LENGTHS:
        ways[f"unrolled, {steps} steps of time"] = lambda steps=steps: gradient(
            lambda k: measured.relaxed(k, steps), guess
        )
    told = costs(ways)
    curves = {}
    _, curves["by differences"] = fitted(measured, 2, by_adjoint=False)
    found, curves["by the implicit gradient"] = fitted(measured, chosen.iterations, by_adjoint=True)
    for name, (count, losses) in curves.items():
        print(f"{name}: loss {losses[-1]:.3f} after {count[-1]} simulations")
    alike = torch.corrcoef(torch.stack([found.ravel(), measured.truth.ravel()]))[0, 1].item()
    print(f"correlation of what was found with what is hidden: {alike:.2f}")
    save(draw(measured, found, dict(reversed(curves.items()))), chosen.out, "simulator")
    return {"costs": told, "correlation": alike, **{k: c[1][-1] for k, c in curves.items()}}


if __name__ == "__main__":
    main()
