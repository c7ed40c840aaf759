"""Other people's packages, imported where they are used; one that is missing is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from implicit_grad._errors import MissingPackageError

_EXTRAS = {"scipy": "scipy", "gurobipy": "gurobi", "cvxpy": "cvxpy"}


@contextlib.contextmanager
def needed_by(owner: object) -> Iterator[None]:
    """Around an import: say which extra brings the package, if it is not there."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        if package not in _EXTRAS:
            raise
        error = MissingPackageError(
            f"{type(owner).__name__} needs {package}: "
            f"pip install 'implicit-grad[{_EXTRAS[package]}]'"
        )
        error.name = package
        raise error from missing
