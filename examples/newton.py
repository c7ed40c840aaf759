"""Newton's method for many convex problems at once: a solver that knows nothing of autograd."""

from collections.abc import Callable

import torch
from torch import Tensor


def newton(model: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The minima, from x on; `model` returns slopes (problems, n) and Hessians (problems, n, n).

    Steps are damped while they are long: such do not overshoot for a self-concordant loss
    (Nesterov and Nemirovskii, 1994).
    """
    size = torch.ones(1)
    while size.max() > 1e-9:
        slope, hessian = model(x)
        step = torch.linalg.solve(hessian, slope)
        size = (slope * step).sum(-1, keepdim=True).clamp(min=0).sqrt()
        x = x - step / torch.where(size < 0.3, 1, 1 + size)
    return x
