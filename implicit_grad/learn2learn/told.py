"""What is said of an adaptation that does not adapt: once for a learner and all its clones."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from implicit_grad._conditions.proximal_term import ProximalTerm
from implicit_grad._theorem.report import Reporting
from implicit_grad._torch.transforms import is_wrapped

# lr·λ from which on φ never gets farther than 5 % of a single step without λ; and a sensible one.
_FREEZES, _SENSIBLE = 20.0, 5.0
# A loss has grown much if it is so many times as large as it was at the start. What rounding makes
# of a loss of 0 is not meant: it has to be larger than √eps besides.
_GROWN = 10.0


@dataclasses.dataclass
class Told:
    """What was said already, and the least λ, which is looked at once."""

    said: set[str] = dataclasses.field(default_factory=set)
    least: float | None = None

    def of_lam(self, pull: ProximalTerm | None, lr: float, reporting: Reporting) -> None:
        """Tell of a λ that holds all weights where they are.

        n proximal steps along a constant slope g lead Σₖ lr·g/(1 + lr·λ)ᵏ < g/λ away from θ.
        """
        if pull is None or "lam" in self.said:
            return
        if self.least is None:
            self.least = _least(pull)
        if lr * self.least <= _FREEZES:
            return
        self._say(
            "lam",
            f"adapt: lam (its least value is {self.least:.3g}) freezes adaptation: with lr = "
            f"{lr:.3g}, lr * lam is {lr * self.least:.3g}, and no number of steps leads farther "
            f"than {100 / (lr * self.least):.2g} % of a single step without lam. Take a lam of at "
            f"most {_SENSIBLE / lr:.3g} (lr * lam = {_SENSIBLE:g}), or lam=None",
            reporting,
            anchor="lam-freezes",
        )

    def of_losses(self, first: list[Tensor], last: Tensor, reporting: Reporting) -> None:
        """Tell of a loss that grew much, or is no number, from the first call to the last."""
        if "loss" in self.said or not first or is_wrapped(last):
            return
        start, end = torch.stack([t.detach().reshape(()).double() for t in (*first, last)]).tolist()
        rounding = torch.finfo(last.dtype).eps ** 0.5
        if math.isfinite(end) and end <= _GROWN * abs(start) + rounding:
            return
        self._say(
            "loss",
            f"adapt: the loss went from {start:.3g} to {end:.3g}. The steps were too long for its "
            "curvature (lower lr, or lam), or the function took another batch in the end",
            reporting,
            anchor="loss-grew",
        )

    def of_loss(self, loss: Tensor, reporting: Reporting) -> None:
        """Tell of a loss that is no number, where no device has to be waited for."""
        if "number" in self.said or loss.device.type != "cpu" or is_wrapped(loss):
            return
        if not math.isfinite(value := loss.item()):
            self._say(
                "number",
                f"adapt: the loss is {value}, and so the weights are no numbers from here on. An "
                "earlier step was too long for the loss's curvature (lower lr, or lam), or the "
                "loss is not defined where it led",
                reporting,
                anchor="loss-grew",
            )

    def _say(self, kind: str, sentence: str, reporting: Reporting, anchor: str) -> None:
        self.said.add(kind)
        reporting.say(sentence, anchor)


def _least(pull: ProximalTerm) -> float:
    """The least diagonal element of Λ; 0 where there is none."""
    if any(map(is_wrapped, pull.weights)):
        return 0.0
    least = {id(w): w.detach().amin().double() for w in pull.weights if w.numel()}
    there = [t.to(next(iter(least.values())).device) for t in least.values()]
    return float(torch.stack(there).min()) if there else 0.0
