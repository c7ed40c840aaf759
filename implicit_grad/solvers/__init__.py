"""Solvers for when you bring none: `minimize(objective, init)` or `find_root(residual, init)`.

One file each; they know neither conditions nor gradients of φ (but for the proximal term, whose
gradient they take without a graph), may import from `_conditions` and what is below, and other
people's packages only where they are used.
"""

from implicit_grad._errors import MissingPackageError
from implicit_grad.solvers.gradient_descent import GradientDescent
from implicit_grad.solvers.gurobi_qp import GurobiQP
from implicit_grad.solvers.nesterov import Nesterov
from implicit_grad.solvers.newton_cg import NewtonCG
from implicit_grad.solvers.scipy_minimize import SciPyMinimize
from implicit_grad.solvers.scipy_root import SciPyRoot
from implicit_grad.solvers.torch_optim import TorchOptim
from implicit_grad.solvers.torchopt import TorchOpt

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
