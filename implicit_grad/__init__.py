"""implicit_grad: wrap any solver; its backward pass is a linear solve."""

from implicit_grad import solvers, testing
from implicit_grad._certify import Certificate, certify
from implicit_grad._conditions import argmin, fixed_point, proximal, root
from implicit_grad._dense import Exact
from implicit_grad._errors import (
    GraphError,
    ImplicitGradError,
    ImplicitGradWarning,
    InvalidArgumentError,
    InvalidSolutionError,
    LinearSolveError,
    MissingPackageError,
    Status,
)
from implicit_grad._implicit import implicit
from implicit_grad._krylov import CG
from implicit_grad._learned import LearnedLam
from implicit_grad._minres import MINRES
from implicit_grad._neumann import Neumann
from implicit_grad._normal import NormalCG
from implicit_grad._preconditioners import Cholesky, Jacobi, Nystrom, Reuse
from implicit_grad._proximal import LowRank
from implicit_grad._warm_start import WarmStart
from implicit_grad.learn2learn import imaml
from implicit_grad.monitor import Monitor, Report

__version__ = "0.1.0"

__all__ = [
    "CG",
    "MINRES",
    "Certificate",
    "Cholesky",
    "Exact",
    "GraphError",
    "ImplicitGradError",
    "ImplicitGradWarning",
    "InvalidArgumentError",
    "InvalidSolutionError",
    "Jacobi",
    "LearnedLam",
    "LinearSolveError",
    "LowRank",
    "MissingPackageError",
    "Monitor",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Report",
    "Reuse",
    "Status",
    "WarmStart",
    "argmin",
    "certify",
    "fixed_point",
    "imaml",
    "implicit",
    "proximal",
    "root",
    "solvers",
    "testing",
]
