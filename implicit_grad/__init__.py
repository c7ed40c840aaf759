"""implicit_grad: wrap any solver; its backward pass is a linear solve."""

from implicit_grad import prox, solvers, testing
from implicit_grad._certify import Certificate, certify
from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.lagrangian import Multipliers
from implicit_grad._conditions.lam import LowRank
from implicit_grad._conditions.learned_lam import LearnedLam
from implicit_grad._conditions.prox_gradient import prox_gradient
from implicit_grad._conditions.proximal import proximal
from implicit_grad._conditions.root import fixed_point, root
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
from implicit_grad._influence import Influence, influence
from implicit_grad._linear_solvers.cg import CG
from implicit_grad._linear_solvers.early_stopped import EarlyStopped
from implicit_grad._linear_solvers.exact import Exact
from implicit_grad._linear_solvers.gmres import GMRES
from implicit_grad._linear_solvers.minres import MINRES
from implicit_grad._linear_solvers.neumann import Neumann
from implicit_grad._linear_solvers.normal_cg import NormalCG
from implicit_grad._linear_solvers.positive_part import PositivePart
from implicit_grad._linear_solvers.preconditioners import Cholesky, Jacobi, Nystrom, Reuse
from implicit_grad._linear_solvers.warm_start import WarmStart
from implicit_grad.learn2learn.maml import imaml
from implicit_grad.monitor import Monitor, Report
from implicit_grad.solvers.training_time import training_time

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Certificate",
    "Cholesky",
    "EarlyStopped",
    "Exact",
    "GraphError",
    "ImplicitGradError",
    "ImplicitGradWarning",
    "Influence",
    "InvalidArgumentError",
    "InvalidSolutionError",
    "Jacobi",
    "LearnedLam",
    "LinearSolveError",
    "LowRank",
    "MissingPackageError",
    "Monitor",
    "Multipliers",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "PositivePart",
    "Report",
    "Reuse",
    "Status",
    "WarmStart",
    "argmin",
    "certify",
    "fixed_point",
    "imaml",
    "implicit",
    "influence",
    "prox",
    "prox_gradient",
    "proximal",
    "root",
    "solvers",
    "testing",
    "training_time",
]
