"""A CVXPY problem as a solver, and the condition that its own objective and constraints make."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.cones import cone_argmin
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._options import require_options
from implicit_grad.solvers._cone_form import AUXILIARY, ConeForm, named
from implicit_grad.solvers._neighbours import needed_by

# So that active constraints can be told from the others.
_ACCURATE = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
# By these it reached them in two of three problems with exponential cones where it had not before.
_SHORTER_STEPS = {
    **_ACCURATE,
    "max_step_fraction": 0.9,
    "linesearch_backtrack_step": 0.9,
    "min_switch_step_length": 1e-3,
    "min_terminate_step_length": 1e-8,
    "static_regularization_constant": 1e-13,
    "static_regularization_proportional": 1e-30,
}


@dataclasses.dataclass(frozen=True, eq=False)
class CVXPY:
    """Solves a disciplined convex problem of CVXPY for values of its parameters, by Clarabel.

    A call takes a tensor for each parameter and returns a dict of the problem's variables by name,
    and under "auxiliary" those that CVXPY has added to it (for the absolute values of a 1-norm,
    say). `condition` describes them: CVXPY brings the problem to the form

        minimise xᵀP x/2 + cᵀx,    b − A x in a product of cones,

    whose data are affine in the parameters (Agrawal et al., 2019, Differentiable convex
    optimization layers), and that is an `argmin` under constraints: equations, inequalities, second
    order cones and exponential cones. They are differentiated one by one, so a problem should not
    have more than some hundred of them. A second-order cone at its apex (a group of a group lasso
    that is 0) is so many equations; where it may just be leaving it, the status is DEGENERATE. So
    it is for a weight of 0 and other arguments at which φ has no derivative; at a parameter that
    cannot be less, as the zeros of p in rel_entr(p, z), the derivative is that from above.

    Args:
        problem: of `cvxpy.Problem`, with `problem.is_dpp()`, without integers, complex numbers or
            matrices that are to be semi-definite. Its parameters have their old values afterwards.
        parameters: the problem's, all of them, in the order of the arguments.
        options: Clarabel's settings, such as {"max_iter": 500}; they have precedence over ours,
            tolerances of 1e-11. Where the objective is flat that leaves x with half the digits, and
            `implicit(..., polish=1)` finds the others. They are absolute, too: give problems in
            units in which their variables are not far below 1.

    The projection of y onto the simplex, with `layer = CVXPY(problem, [y])` for the problem of
    minimising `cvxpy.sum_squares(x - y)` with `x >= 0` and `cvxpy.sum(x) == 1`, is
    `implicit_grad.implicit(layer, layer.condition)(y)["x"]`.
    """

    problem: Any
    parameters: Sequence[Any]
    _: dataclasses.KW_ONLY
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        with needed_by(self):
            import cvxpy
        require_options(self, "options")
        if not isinstance(self.problem, cvxpy.Problem):
            raise InvalidArgumentError(
                f"CVXPY: problem must be a cvxpy.Problem, got {describe(self.problem)}"
            )
        given, known = [p.id for p in self.parameters], [p.id for p in self.problem.parameters()]
        if sorted(given) != sorted(known):
            raise InvalidArgumentError(
                "CVXPY: parameters must be all of the problem's, each once: it has "
                f"{named(self.problem.parameters())}, and {named(self.parameters)} were given"
            )
        if self.problem.is_mixed_integer() or not self.problem.is_dpp():
            raise InvalidArgumentError(
                "CVXPY: the problem must be continuous, convex and affine in its parameters by "
                "CVXPY's rules (problem.is_dpp()); see cvxpy.org/tutorial/dpp"
            )
        names = [v.name() for v in self.problem.variables()]
        if not names:
            raise InvalidArgumentError("CVXPY: the problem has no variables")
        if len({*names, AUXILIARY}) <= len(names):
            raise InvalidArgumentError(
                f"CVXPY: variables need names that differ, none of them {AUXILIARY!r}: "
                f"got {', '.join(names)}"
            )
        _ = self._form  # which has requests of its own

    @functools.cached_property
    def condition(self) -> argmin:
        """What a call's outcome solves, for `implicit`."""
        form = self._form
        equality = form.equations if form.zero else None
        inequality = form.inequalities if form.pushing else None
        if not form.soc and not form.exp:
            return argmin(form.objective, equality=equality, inequality=inequality)
        return cone_argmin(
            form.objective,
            equality=equality,
            inequality=inequality,
            second_order=form.second_order if form.soc else None,
            exponential=form.exponential if form.exp else None,
        )

    def __call__(self, *values: Tensor) -> dict[str, Tensor]:
        """The variables at the solution."""
        with self._set(values):
            found = self._found()
        if found.status not in ("optimal", "optimal_inaccurate"):
            raise InvalidSolutionError(
                f"CVXPY: the problem is {found.status} for these parameters; nothing is solved"
            )
        (x,) = found.primal_vars.values()
        floating = [v for v in values if v.is_floating_point()]
        dtypes = [v.dtype for v in floating] or [torch.get_default_dtype()]
        wide = functools.reduce(torch.promote_types, dtypes)
        device = floating[0].device if floating else "cpu"
        return self._form.split(torch.tensor(x, dtype=wide, device=device))

    def _found(self) -> Any:
        """What the solver finds, in shorter steps where it could not reach its tolerances."""
        first, again = ({**way, **(self.options or {})} for way in (_ACCURATE, _SHORTER_STEPS))
        data, chain, inverse = self.problem.get_problem_data("CLARABEL", solver_opts=first)
        found = None
        for options in (first, again):
            raw = chain.solve_via_data(self.problem, data, solver_opts=options)
            last = chain.solver.invert(raw, inverse[-1])
            if found is None or last.status == "optimal":
                found = last
            if found.status != "optimal_inaccurate":
                break
        return found

    @functools.cached_property
    def _form(self) -> ConeForm:
        return ConeForm(self.problem, self.parameters)

    @contextlib.contextmanager
    def _set(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The parameters have these values for a while."""
        shapes = [tuple(p.shape) for p in self.parameters]
        got = [tuple(v.shape) if torch.is_tensor(v) else None for v in values]
        if got != shapes:
            raise InvalidArgumentError(
                f"CVXPY: expected tensors of the parameters' shapes, {shapes}, got {got}"
            )
        before = [p.value for p in self.parameters]
        try:
            for parameter, value in zip(self.parameters, values, strict=True):
                try:
                    parameter.value = value.detach().cpu().double().numpy()
                except ValueError as error:
                    raise InvalidArgumentError(f"CVXPY: {parameter.name()}: {error}") from error
            yield
        finally:
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.value = value
