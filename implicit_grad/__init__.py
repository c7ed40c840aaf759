"""implicit_grad: wrap any solver; its backward pass is a linear solve."""

from implicit_grad import solvers
from implicit_grad._conditions import argmin, fixed_point, proximal, root
from implicit_grad._errors import (
    GraphError,
    ImplicitGradError,
    ImplicitGradWarning,
    InvalidArgumentError,
    InvalidSolutionError,
    LinearSolveError,
    Status,
)
from implicit_grad._implicit import implicit
from implicit_grad._krylov import CG, NormalCG
from implicit_grad._linear import Exact
from implicit_grad.learn2learn import imaml
from implicit_grad.monitor import Monitor, Report

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Exact",
    "GraphError",
    "ImplicitGradError",
    "ImplicitGradWarning",
    "InvalidArgumentError",
    "InvalidSolutionError",
    "LinearSolveError",
    "Monitor",
    "NormalCG",
    "Report",
    "Status",
    "argmin",
    "fixed_point",
    "imaml",
    "implicit",
    "proximal",
    "root",
    "solvers",
]
