"""Solvers for when you bring none: `minimize(objective, init)` or `find_root(residual, init)`."""

from implicit_grad._errors import MissingPackageError
from implicit_grad.solvers.gradient_descent import GradientDescent
from implicit_grad.solvers.gurobi_qp import GurobiQP
from implicit_grad.solvers.nesterov import Nesterov
from implicit_grad.solvers.newton_cg import NewtonCG
from implicit_grad.solvers.scipy_minimize import SciPyMinimize
from implicit_grad.solvers.scipy_root import SciPyRoot
from implicit_grad.solvers.torch_opt import TorchOpt
from implicit_grad.solvers.torch_optim import TorchOptim

__all__ = [
    "GradientDescent",
    "GurobiQP",
    "MissingPackageError",
    "Nesterov",
    "NewtonCG",
    "SciPyMinimize",
    "SciPyRoot",
    "TorchOpt",
    "TorchOptim",
]
