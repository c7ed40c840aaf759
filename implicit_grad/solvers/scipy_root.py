"""scipy.optimize.root, all its methods, with the Jacobian by autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError
from implicit_grad._options import require, require_options, require_tolerance
from implicit_grad._warnings import tell
from implicit_grad.solvers._flat import Coordinates
from implicit_grad.solvers._neighbours import needed_by
from implicit_grad.solvers._objective import Variables

_WITH_JACOBIAN = ("hybr", "lm")
_WITHOUT_JACOBIAN = (
    "broyden1",
    "broyden2",
    "anderson",
    "linearmixing",
    "diagbroyden",
    "excitingmixing",
    "krylov",
    "df-sane",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SciPyRoot:
    """`scipy.optimize.root` on φ as one flat float64 vector: residual(φ) = 0.

    The dense Jacobian for hybr and lm is autograd's, one product a row. Where SciPy calls a
    run unsuccessful, an `ImplicitGradWarning` passes its message on, unless the residual is small.

    Args:
        method: any of SciPy's, by name.
        tol: as SciPy's: relative to φ for hybr and lm, the residual's greatest element, in its own
            units, for the others. None: SciPy's own default.
        options: the method's, such as {"maxfev": 1000}; they have precedence over `tol`.

    >>> import torch
    >>> SciPyRoot(tol=1e-6).find_root(lambda phi: phi**2 - 4, torch.tensor([1.0]))
    tensor([2.])
    """

    method: str = "hybr"
    tol: float | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        methods = (*_WITH_JACOBIAN, *_WITHOUT_JACOBIAN)
        known = isinstance(self.method, str) and self.method.lower() in methods
        require(self, "method", known, f"one of {', '.join(methods)}")
        require_tolerance(self, "tol")
        require_options(self, "options")

    def find_root(self, residual: Callable[[Any], Any], init: Any) -> Any:
        """The root near init; phi has the form of init, and so has residual(phi)."""
        with needed_by(self):
            from scipy.optimize import root
        method = self.method.lower()
        with torch.inference_mode(False), torch.no_grad():
            at = Coordinates(Variables(self, init))
            if not len(at.start):
                return at.result(at.start)
            function = at.function("residual", residual)
            first = function(at.start)
            if first.shape != at.start.shape:
                raise InvalidArgumentError(
                    f"SciPyRoot: residual returned {len(first)} numbers for the {len(at.start)} of "
                    "phi; there must be as many equations as unknowns"
                )
            if not np.isfinite(first).all():
                raise InvalidSolutionError(
                    "SciPyRoot: at step 0 the residual holds NaN or Inf: it is not defined at init"
                )
            jacobian = function.jacobian if method in _WITH_JACOBIAN else None
            found = root(
                function, at.start, method=method, jac=jacobian, tol=self.tol, options=self.options
            )
            phi = at.result(found.x)
            last = function(found.x)
            if not found.success and not at.negligible(last, first):
                said = (
                    f"SciPyRoot: {method} stopped without success, at a residual of "
                    f"{np.linalg.norm(last):.1e}: {found.message}"
                )
                tell(said, anchor="solver-missed", of=type(self).__name__)
            return phi
