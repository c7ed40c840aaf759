"""The two drawings of the guide: `python docs/pictures/draw.py` writes them next to itself."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#c4622a", "#3a7d5a", "#6b6b6b"
matplotlib.rcParams.update({"svg.hashsalt": "implicit_grad", "font.size": 10})


def save(figure: Figure, name: str) -> None:
    """As a vector picture that is the same each time."""
    path = Path(__file__).with_name(f"{name}.svg")
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    print(path.name)


def objective(phi: np.ndarray, a: np.ndarray) -> np.ndarray:
    """A valley whose bottom moves with a."""
    return (phi - np.sin(1.5 * a) - 0.4 * a) ** 2 + 0.15 * phi**4


def solution(a: np.ndarray) -> np.ndarray:
    """The bottom, by Newton's method on F = 0."""
    phi = np.zeros_like(a)
    for _ in range(60):
        slope = 2 * (phi - np.sin(1.5 * a) - 0.4 * a) + 0.6 * phi**3
        phi = phi - slope / (2 + 1.8 * phi**2)
    return phi


def idea() -> None:
    """Left: a solver walks to the curve F = 0. Right: the gradient needs the curve's slope only."""
    figure = Figure(figsize=(8.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    a, phi = np.linspace(-0.2, 2.2, 200), np.linspace(-0.6, 2.1, 200)
    curve, here = solution(a), 0.55
    phi_here = float(solution(np.array([here]))[0])
    A = 2 + 1.8 * phi_here**2
    slope = (2 * (1.5 * np.cos(1.5 * here) + 0.4)) / A
    for panel in (left, right):
        panel.contour(
            a, phi, objective(phi[:, None], a[None]), 12, colors=GREY, linewidths=0.5, alpha=0.4
        )
        panel.plot(a, curve, color=BLUE, linewidth=2)
        panel.text(1.62, 1.47, "F(φ, a) = 0", color=BLUE)
        panel.set_xlabel("argument a (data, λ, θ, …)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(a[0], a[-1]), panel.set_ylim(phi[0], phi[-1])
    left.set_ylabel("solution φ")
    left.set_title("forward: any solver walks to a solution", fontsize=10)
    steps = phi_here + (-0.45 - phi_here) * 0.62 ** np.arange(9)
    left.plot(np.full_like(steps, here), steps, "o-", color=ORANGE, markersize=4, linewidth=1)
    line = {"arrowstyle": "-", "color": ORANGE}
    told = "its steps: not kept,\nnot differentiated"
    left.annotate(told, (here, steps[1]), (0.85, -0.45), color=ORANGE, arrowprops=line)
    right.set_title("backward: the slope of the curve at that point", fontsize=10)
    run = np.array([here - 0.5, here + 0.6])
    right.plot(run, phi_here + slope * (run - here), color=GREEN, linewidth=2)
    line, told = {"arrowstyle": "-", "color": GREEN}, "dφ/da = −A⁻¹ ∂F/∂a,\nA = ∂F/∂φ"
    touched = (here + 0.33, phi_here + 0.33 * slope)
    right.annotate(told, touched, (1.0, 0.25), color=GREEN, arrowprops=line)
    for panel in (left, right):
        panel.plot([here], [phi_here], "o", color="black", markersize=6, zorder=5)
    save(figure, "idea")


def choose() -> None:
    """From what is known about φ to the condition and the linear solver."""
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1, 101), ylim=(-3, 72)), axes.axis("off")

    def box(
        x: float, y: float, text: str, color: str, width: float = 27, height: float = 7
    ) -> None:
        corner = (x - width / 2, y - height / 2)
        style = "round,pad=0,rounding_size=1.2"
        axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc="white", ec=color))
        axes.text(x, y, text, ha="center", va="center", color=color, fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY})
        axes.text(start[0] + 1, (start[1] + end[1]) / 2, text, color=GREY, fontsize=8, va="center")

    columns = {
        14: ("a minimum", "argmin(objective)\nproximal(loss, lam)", "constraints: MINRES()", "CG()",
             "many alike", "CG(preconditioner=\nReuse(Cholesky()))"),
        50: ("a training that was stopped", "argmin, proximal; for MAML\nimaml(maml) without a lam",
             "weight decay: EarlyStopped()", "CG()", "few-shot, indefinite Hessian",
             'curvature=\n"gauss_newton"'),
        86: ("a root, a fixed point", "root(residual)\nfixed_point(map)", "symmetric: MINRES()",
             "GMRES()", "small", "Exact()"),
    }  # fmt: skip
    box(50, 68, "What is φ?", "black", 16, 5)
    for x, (kind, condition, *others) in columns.items():
        arrow((50 + (x - 50) * 0.2, 65.2), (x, 59.8))
        box(x, 57, kind, BLUE, height=5)
        arrow((x, 54.2), (x, 47.8))
        box(x, 44, condition, BLUE)
        arrow((x, 40.2), (x, 31.8), others[0])
        box(x, 28, others[1], GREEN)
        arrow((x, 24.2), (x, 15.8), others[2])
        box(x, 12, others[3], GREEN)
        arrow((x, 8.2), (50 + (x - 50) * 0.7, 2.9))
    box(50, 0, "Monitor()   →   certify()   →   check_implicit() in your tests", ORANGE, 70, 5)
    save(figure, "choose")


if __name__ == "__main__":
    idea()
    choose()
