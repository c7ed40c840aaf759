"""Design the rules of a game: gradients through an equilibrium that rotates.

    python examples/equilibrium_game.py

A polluter picks one of twelve sites and an inspector visits one, both by softmax of their payoffs
(a quantal response equilibrium). One runs, the other follows: learning to play circles around the
equilibrium, as GANs do, and is no descent on anything. The regulator splits a budget of fines among
the sites so that the least damage is done. SciPy finds the equilibrium as a root, and the implicit
gradient does not care how; unrolling the learning dynamics has to store all its turns.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pictures import BLUE, GREEN, GREY, ORANGE, RED, options, panels, progress, save
from torch import Tensor

import implicit_grad as ig
from implicit_grad.testing import peak_memory

BUDGET = 1.0
Play = tuple[Tensor, Tensor]


class Game(NamedTuple):
    """Gain of the polluter and damage to the others by site, and the players' temperature."""

    gain: Tensor
    damage: Tensor
    temperature: float = 0.05

    def fines(self, shares: Tensor) -> Tensor:
        """The budget, split among the sites by softmax."""
        return BUDGET * len(self.gain) * shares.softmax(0)

    def residual(self, play: Play, shares: Tensor) -> Play:
        """Each player's logits less the answer to the other's strategy: 0 at the equilibrium."""
        polluter, inspector = play
        p, q = polluter.softmax(0), inspector.softmax(0)
        fines = self.fines(shares)
        pollute = self.gain * (1 - q) - fines * q
        inspect = (self.damage + fines) * p * len(p)
        return polluter - pollute / self.temperature, inspector - inspect / self.temperature

    def loss(self, play: Play) -> Tensor:
        """The expected damage at sites that nobody inspects."""
        p, q = (logits.softmax(0) for logits in play)
        return (self.damage * p * (1 - q)).sum()


def game(sites: int, seed: int) -> Game:
    """Gains and damages at random."""
    random = torch.Generator().manual_seed(seed)
    gain, damage = 0.5 + torch.rand(2, sites, dtype=torch.float64, generator=random)
    return Game(gain, damage)


def at_rest(shares: Tensor) -> Play:
    """Both players start by playing all sites alike."""
    return torch.zeros_like(shares), torch.zeros_like(shares)


def learning(game: Game, shares: Tensor, *, steps: int, length: float, ahead: bool) -> list[Play]:
    """All plays of a learning run: by steps along −F, or as seen one step ahead (extragradient)."""

    def moved(play: Play, force: Play) -> Play:
        return tuple(x - length * f for x, f in zip(play, force, strict=True))

    path = [at_rest(shares)]
    for _ in range(steps):
        seen = moved(path[-1], game.residual(path[-1], shares)) if ahead else path[-1]
        path.append(moved(path[-1], game.residual(seen, shares)))
    return path


def differentiable(game: Game, solver: Any, **settings: Any) -> Any:
    """Shares of the fines ↦ the play that a solver finds, with the equilibrium's gradient."""
    linear_solver = ig.NormalCG(rtol=1e-10, maxiter=500)
    return ig.implicit(solver, ig.root(game.residual), linear_solver=linear_solver, **settings)


def equilibrium(game: Game, **settings: Any) -> Any:
    """The same with SciPy's hybrid method, which finds the equilibrium itself."""
    return differentiable(game, ig.solvers.SciPyRoot(tol=1e-12), init=at_rest, **settings)


def finite_difference(game: Game, shares: Tensor, direction: Tensor, step: float = 1e-3) -> float:
    """The loss's derivative by whole equilibria, to fourth order."""
    solve = equilibrium(game)

    def loss(k: int) -> float:
        return game.loss(solve(shares.detach() + k * step * direction)).item()

    return (8 * (loss(1) - loss(-1)) - (loss(2) - loss(-2))) / (12 * step)


class Run(NamedTuple):
    """Errors of gradients after learning runs of several lengths; KiB after the longest."""

    errors: list[float]
    kib: float


def gradient(game: Game, shares: Tensor, steps: int, kind: dict[str, Any], unroll: bool) -> Tensor:
    """The loss's gradient after some steps of learning, unrolled or implicit at the last play."""

    def last(shares: Tensor) -> Play:
        return learning(game, shares, steps=steps, **kind)[-1]

    solve = last if unroll else differentiable(game, last, on_failure="ignore")
    return torch.autograd.grad(game.loss(solve(shares)), [shares])[0]


def gradients(game: Game, counts: Sequence[int]) -> dict[str, Run]:
    """Errors and costs of such gradients, by evaluations of F while learning."""
    shares = torch.zeros_like(game.gain).requires_grad_()
    (exact,) = torch.autograd.grad(game.loss(equilibrium(game)(shares)), [shares])
    runs = {}
    for name, length, ahead, unroll in (
        ("unrolled simultaneous, step 0.03", 0.03, False, True),
        ("unrolled simultaneous, step 0.003", 0.003, False, True),
        ("unrolled extragradient, step 0.03", 0.03, True, True),
        ("implicit, extragradient as black box", 0.03, True, False),
    ):
        kind = {"length": length, "ahead": ahead}
        calls = [partial(gradient, game, shares, n // (1 + ahead), kind, unroll) for n in counts]
        errors = [((call() - exact).norm() / exact.norm()).item() for call in calls]
        runs[name] = Run(errors, peak_memory(calls[-1]) / 2**10)
    return runs


def regulate(game: Game, steps: int, monitor: ig.Monitor) -> tuple[list[float], Tensor]:
    """Adam on the shares of the fines: the damage at each step, and the fines at the end."""
    shares = torch.zeros_like(game.gain).requires_grad_()
    adam, damages = torch.optim.Adam([shares], lr=0.1), []
    solve = equilibrium(game, monitor=monitor, on_failure="raise")
    for _ in progress(range(steps), "equilibrium_game"):
        adam.zero_grad()
        loss = game.loss(solve(shares))
        loss.backward()
        adam.step()
        damages.append(loss.item())
    return damages, game.fines(shares).detach()


def draw(game: Game, runs: dict[str, Run], counts: Sequence[int], damages: list[float]) -> Any:
    """The dynamics, the errors of unrolled gradients, the regulator's progress."""
    figure, (left, middle, right) = panels(3, 3.7)
    shares = torch.zeros_like(game.gain)
    centre = equilibrium(game)(shares)
    for length, ahead, colour, name in (
        (0.003, False, ORANGE, "simultaneous"),
        (0.03, True, BLUE, "extragradient"),
    ):
        path = learning(game, shares, steps=int(4 / length), length=length, ahead=ahead)
        p, q = (torch.stack(side).softmax(1)[:, 0] for side in zip(*path, strict=True))
        left.plot(p, q, color=colour, linewidth=1, label=name)
    left.plot(*(side.softmax(0)[0] for side in centre), "k*", label="equilibrium")
    left.set(xlabel="pollution at site 1", ylabel="inspection of site 1")
    for (name, run), colour in zip(runs.items(), (RED, ORANGE, BLUE, GREEN), strict=True):
        shown = [error if error < 1e6 else math.nan for error in run.errors]
        middle.plot(counts, shown, ".-", color=colour, label=name)
    middle.set(xlabel="evaluations of F while learning", ylabel="relative error of the gradient")
    middle.set(xscale="log", yscale="log", ylim=(1e-9, 1e6))
    right.plot(damages, color=GREEN, label="fines by hypergradient")
    right.axhline(damages[0], color=GREY, linestyle=":", label="even fines")
    right.set(xlabel="outer step", ylabel="expected damage")
    for panel in (left, middle, right):
        panel.legend(frameon=False, fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Check the gradient, unroll the dynamics, set the fines; the figures."""
    chosen = options(__doc__, arguments, sites=12, steps=100, unroll=1600, seed=0)
    rules, monitor = game(chosen.sites, chosen.seed), ig.Monitor()
    shares = torch.zeros_like(rules.gain).requires_grad_()

    def implicit() -> Tensor:
        loss = rules.loss(equilibrium(rules, monitor=monitor)(shares))
        return torch.autograd.grad(loss, [shares])[0]

    direction = torch.randn(shares.shape, generator=torch.Generator().manual_seed(1)).to(shares)
    mine, reference = (implicit() @ direction).item(), finite_difference(rules, shares, direction)
    error, kib = abs(mine / reference - 1), peak_memory(implicit) / 2**10
    print(f"implicit gradient {mine:.10f}, finite differences {reference:.10f}")
    products, residual = monitor.last.products, monitor.last.linear_residual
    print(f"  {products} products with the Jacobian, residual {residual:.0e}, {kib:.0f} KiB")
    counts = [n for n in (25, 50, 100, 200, 400, 800, 1600, 3200) if n <= chosen.unroll]
    runs = gradients(rules, counts)
    print(f"relative error of the gradient and peak memory after {counts[-1]} evaluations of F")
    for name, run in runs.items():
        print(f"  {name:38}{run.errors[-1]:10.1e}{run.kib:8.0f} KiB")
    damages, fines = regulate(rules, chosen.steps, monitor)
    print(f"damage {damages[0]:.4f} with even fines, {damages[-1]:.4f} with learned ones,")
    print(f"  which are {fines.min():.2f} to {fines.max():.2f} per site")
    save(draw(rules, runs, counts, damages), chosen.out, "equilibrium_game")
    return {"error": error, "before": damages[0], "after": damages[-1]} | {
        name: run.kib for name, run in runs.items()
    }


if __name__ == "__main__":
    main()
