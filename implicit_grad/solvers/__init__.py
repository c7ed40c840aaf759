"""Solvers for when you bring none: `minimize(objective, init)` or `find_root(residual, init)`.

One file each. Of `_conditions` they know the proximal term and bounds only; they may import from
there and from what that may import, and other people's packages only where they are used.
"""

from implicit_grad._errors import MissingPackageError
from implicit_grad.solvers.bisection import Bisection
from implicit_grad.solvers.broyden import Broyden
from implicit_grad.solvers.cvxpy_problem import CVXPY
from implicit_grad.solvers.fixed_point import FixedPoint
from implicit_grad.solvers.gradient_descent import GradientDescent
from implicit_grad.solvers.gurobi_qp import GurobiQP
from implicit_grad.solvers.nesterov import Nesterov
from implicit_grad.solvers.newton import Newton
from implicit_grad.solvers.newton_cg import NewtonCG
from implicit_grad.solvers.proximal_gradient import ProximalGradient
from implicit_grad.solvers.scipy_minimize import SciPyMinimize
from implicit_grad.solvers.scipy_root import SciPyRoot
from implicit_grad.solvers.torch_optim import TorchOptim
from implicit_grad.solvers.torchopt import TorchOpt

__all__ = [
    "CVXPY",
    "Bisection",
    "Broyden",
    "FixedPoint",
    "GradientDescent",
    "GurobiQP",
    "MissingPackageError",
    "Nesterov",
    "Newton",
    "NewtonCG",
    "ProximalGradient",
    "SciPyMinimize",
    "SciPyRoot",
    "TorchOpt",
    "TorchOptim",
]
