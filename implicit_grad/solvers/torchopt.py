"""Any of TorchOpt's functional transformations as a minimiser."""

from __future__ import annotations

import dataclasses
from typing import Any

from implicit_grad._errors import InvalidArgumentError, describe
from implicit_grad._torch.pytree import Tensors
from implicit_grad.solvers._descent import Stepwise, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchOpt(Stepwise):
    """φ ← φ + update, where the transformation makes the update from ∇objective(φ).

    Args:
        transform: a gradient transformation such as `torchopt.adam(0.1)`, or a `torchopt.chain` of
            them: `init(params)` returns a state, `update(gradient, state, params=, inplace=)` an
            update and the next state.
        steps: the most steps to take; None means 10,000.
        tol: stop when ‖∇objective‖₂ is at most this, in the objective's units over φ's.
        rtol: or when it is at most `rtol` times its value at init, 0 < rtol < 1.

    >>> import torch, torchopt
    >>> sgd = TorchOpt(transform=torchopt.sgd(lr=0.5), steps=3)
    >>> sgd.minimize(lambda phi: (phi * phi).sum() / 2, torch.tensor([8.0]))
    tensor([1.])
    """

    transform: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(callable(getattr(self.transform, name, None)) for name in ("init", "update")):
            raise InvalidArgumentError(
                "TorchOpt: transform must be a gradient transformation such as torchopt.adam(0.1), "
                f"with init and update, got {describe(self.transform)}"
            )

    def _descend(self, watch: Watch, start: Tensors) -> Tensors:
        phi, state = start, self.transform.init(start)
        for step in range(self.most_steps):
            slope = watch.at(phi, step).slope
            updates, state = self.transform.update(slope, state, params=phi, inplace=False)
            phi = tuple(p + u for p, u in zip(phi, updates, strict=True))
        return phi
