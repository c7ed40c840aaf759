"""What torch says where an operation has no further derivative, told in a sentence of ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from implicit_grad._errors import GraphError

_MISSING = re.compile(
    r"derivative for .* is not implemented|double backward|once_differentiable|3rd\+ order"
)


def lacks_derivative(error: Exception) -> bool:
    """Whether torch says that an operation cannot be differentiated as often as that."""
    return not isinstance(error, GraphError) and bool(_MISSING.search(str(error)))


@contextlib.contextmanager
def missing_told(sentence: str, anchor: str = "no-second-derivative") -> Iterator[None]:
    """Inside, that is said in this sentence.

    Raises:
        GraphError: an operation has no further derivative.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if lacks_derivative(error):
            raise GraphError(f"{sentence} ({error})", anchor=anchor) from error
        raise
