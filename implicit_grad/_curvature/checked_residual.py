"""Whether products with a residual's Jacobian are differences of residuals."""

from __future__ import annotations

import torch

from implicit_grad._curvature.comparison import changes_unseen, direction, is_wrong
from implicit_grad._curvature.probe import Probe, moved_along
from implicit_grad._curvature.symmetric import SymmetricPart
from implicit_grad._theorem.linearization import Finding, Linearization
from implicit_grad._torch.products import vjp
from implicit_grad._torch.pytree import Tensors, inner


class CheckedResidual:
    """F along lines through φ and through the arguments."""

    def __init__(
        self,
        around: Linearization,
        probe: Probe,
        both_products: bool,
        along: Tensors | None = None,
    ) -> None:
        self._around, self._probe, self._both = around, probe, both_products
        self._along = direction(probe.phi) if along is None else along
        self._here = tuple(f.detach() for f in probe.outputs)

    def finding_of_solutions(self) -> Finding | None:
        """The finding, unless it is about directions in which no solution moves."""
        found = self.finding()
        part = SymmetricPart(self._probe.phi, self._probe.eps)
        if found is None or not part.has_solutions(self._along, self._products):
            return found
        return CheckedResidual(
            self._around, self._probe, self._both, part.of(self._along)
        ).finding()

    def _products(self, u: Tensors) -> tuple[Tensors, Tensors]:
        inputs = tuple(self._probe.inputs[i] for i in self._probe.fine)
        with torch.no_grad():
            return self._around.transposed(u), self._around.pullback(u, inputs)

    def finding(self) -> Finding | None:
        if self._is_wrong_in_phi():
            what = "a product with the residual's Jacobian is not the difference of residuals"
        elif self._is_wrong_in_inputs():
            what = "how the residual changes with an argument is not what differences say"
        else:
            return None
        return Finding(f"{what}: {self._probe.suspects}", False)

    def _is_wrong_in_phi(self) -> bool:
        phi, eps = self._probe.phi, self._probe.eps

        def moved(t: float) -> Tensors:
            return self._residual(moved_along(phi, self._along, t), ())

        def transposed(u: Tensors) -> float:
            with torch.no_grad():
                return inner(self._around.transposed(u), self._along)

        def transposed_at(u: Tensors, t: float) -> float:
            there = moved_along(phi, self._along, t)
            with torch.enable_grad():
                outputs = self._probe.elsewhere(there, ())
            with torch.no_grad():
                return inner(vjp(outputs, there, u), self._along)

        if changes_unseen(moved, self._here, transposed, eps, transposed_at):
            return True
        if not self._both:
            return False
        with torch.no_grad():
            product = self._around.smooth_product(self._along)
        return any(is_wrong(moved, self._here, product, eps))

    def _is_wrong_in_inputs(self) -> bool:
        probe = self._probe
        targets = tuple(probe.inputs[i] for i in probe.moving)
        if not targets:
            return False
        away = direction(targets)

        def moved(t: float) -> Tensors:
            return self._residual(probe.phi, probe.moved_inputs(away, t))

        def claimed(u: Tensors) -> float:
            with torch.no_grad():
                return inner(self._around.pullback(u, targets), away)

        return changes_unseen(moved, self._here, claimed, probe.eps)

    def _residual(self, phi: Tensors, inputs: Tensors) -> Tensors:
        with torch.enable_grad():
            outputs = self._probe.elsewhere(phi, inputs)
        return tuple(f.detach() for f in outputs)
