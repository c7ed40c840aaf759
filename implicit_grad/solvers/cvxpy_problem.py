"""A CVXPY problem as a solver, and the condition that its own objective and constraints make."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.cones import cone_argmin
from implicit_grad._errors import InvalidArgumentError, InvalidSolutionError, describe
from implicit_grad._options import require_options
from implicit_grad.solvers._neighbours import needed_by

# So that active constraints can be told from the others.
_ACCURATE = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
_AUXILIARY = "auxiliary"


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
    that is 0) is so many equations; where it may just be leaving it, the status is DEGENERATE.

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
                f"{_named(self.problem.parameters())}, and {_named(self.parameters)} were given"
            )
        if self.problem.is_mixed_integer() or not self.problem.is_dpp():
            raise InvalidArgumentError(
                "CVXPY: the problem must be continuous, convex and affine in its parameters by "
                "CVXPY's rules (problem.is_dpp()); see cvxpy.org/tutorial/dpp"
            )
        names = [v.name() for v in self.problem.variables()]
        if not names:
            raise InvalidArgumentError("CVXPY: the problem has no variables")
        if len({*names, _AUXILIARY}) <= len(names):
            raise InvalidArgumentError(
                f"CVXPY: variables need names that differ, none of them {_AUXILIARY!r}: "
                f"got {', '.join(names)}"
            )
        _ = self._form  # which has requests of its own

    @functools.cached_property
    def condition(self) -> argmin:
        """What a call's outcome solves, for `implicit`."""
        form = self._form
        equality = form.equations if form.zero else None
        inequality = form.inequalities if form.pushing else None
        if not form.soc:
            return argmin(form.objective, equality=equality, inequality=inequality)
        return cone_argmin(
            form.objective, equality=equality, inequality=inequality, cones=form.second_order
        )

    def __call__(self, *values: Tensor) -> dict[str, Tensor]:
        """The variables at the solution."""
        options = {**_ACCURATE, **(self.options or {})}
        with self._set(values):
            data, chain, inverse = self.problem.get_problem_data("CLARABEL", solver_opts=options)
            raw = chain.solve_via_data(self.problem, data, solver_opts=options)
            found = chain.solver.invert(raw, inverse[-1])
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

    @functools.cached_property
    def _form(self) -> _ConeForm:
        return _ConeForm(self.problem, self.parameters)

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


class _ConeForm:
    """P, c, A and b as affine functions of the parameters, and where the variables lie in x."""

    def __init__(self, problem: Any, parameters: Sequence[Any]) -> None:
        variables = problem.variables()
        own = (*variables, *parameters)
        _refuse([t for t in own if t.is_complex() or t.attributes["diag"]])
        form, cones = _canonical(problem, parameters)
        self._rows = [cones.zero, cones.nonneg, sum(cones.soc), 3 * cones.exp]
        bounded = form.lower_bounds is not None or form.upper_bounds is not None
        if sum(self._rows) < form.constr_size or bounded:
            raise InvalidArgumentError(
                "CVXPY: semi-definite and power cones, and variables with bounds= of their own, "
                "have no derivatives here; write bounds as constraints"
            )
        made = {t.id: _made_of(t, (*form.variables, *form.parameters)) for t in own}
        _refuse([t for t in own if made[t.id] is None])
        columns, places = form.param_id_to_col, form.var_id_to_col
        self.size, self.rows = form.x.size, form.constr_size
        self.zero, self.soc = cones.zero, list(cones.soc)
        self.pushing = cones.nonneg + cones.exp
        self._order = [columns[made[p.id].id] for p in parameters]
        self._last = columns[-1]  # of what no parameter changes
        self._maps = {name: _sparse(getattr(form, name)) for name in ("P", "q", "A")}
        self._shapes = {t.name(): t.shape for t in variables}
        taken = [torch.arange(t.size) + places[made[t.id].id] for t in variables]
        others = torch.ones(self.size, dtype=torch.bool)
        others[torch.cat(taken)] = False
        self._places = torch.cat([*taken, others.nonzero()[:, 0]])
        self._sizes = [*map(len, taken), int(others.sum())]

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """The variables by name; those that CVXPY has added last."""
        *parts, others = torch.split(x[self._places.to(x.device)], self._sizes)
        named = zip(self._shapes.items(), parts, strict=True)
        phi = {name: _by_columns(part, shape) for (name, shape), part in named}
        return {**phi, _AUXILIARY: others} if len(others) else phi

    def joined(self, phi: dict[str, Tensor]) -> Tensor:
        """x again."""
        parts = [_in_columns(phi[name]) for name in self._shapes]
        x = torch.cat([*parts, *([phi[_AUXILIARY]] if _AUXILIARY in phi else [])])
        return x[self._places.argsort().to(x.device)]

    def objective(self, phi: dict[str, Tensor], *values: Tensor) -> Tensor:
        """xᵀP x/2 + cᵀx."""
        x = self.joined(phi)
        linear = self._evaluated("q", values, x)[: self.size] @ x
        if self._maps["P"] is None:
            return linear
        P = self._evaluated("P", values, x).view(self.size, self.size)
        return x @ P @ x / 2 + linear

    def equations(self, phi: dict[str, Tensor], *values: Tensor) -> Tensor:
        """Rows of s = b − A x that are to be 0."""
        return self._slack(phi, values)[0]

    def inequalities(self, phi: dict[str, Tensor], *values: Tensor) -> Tensor:
        """Functions of rows of s that are at most 0 where s is in its cones."""
        _, positive, _, exponential = self._slack(phi, values)
        return torch.cat([-positive, _beyond(*exponential.view(-1, 3).unbind(1))])

    def second_order(self, phi: dict[str, Tensor], *values: Tensor) -> list[Tensor]:
        """The parts of s that lie in second-order cones, in the units of x."""
        matrix, _ = self._affine(self.joined(phi), values)
        lengths = torch.split(matrix.detach().norm(dim=1), self._rows)[2]
        parts = torch.split(self._slack(phi, values)[2], self.soc)
        units = (of_one.amax() for of_one in torch.split(lengths, self.soc))
        return [s / torch.where(u > 0, u, 1.0) for s, u in zip(parts, units, strict=True)]

    def _slack(self, phi: dict[str, Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """s for each kind of cone."""
        x = self.joined(phi)
        matrix, offset = self._affine(x, values)
        return torch.split(matrix @ x + offset, self._rows)

    def _affine(self, x: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """−A and b."""
        both = self._evaluated("A", values, x).view(self.size + 1, self.rows).mT
        return both[:, :-1], both[:, -1]

    def _evaluated(self, name: str, values: Sequence[Tensor], like: Tensor) -> Tensor:
        """Data of the problem, column by column, for these parameters."""
        parts = {self._last: like.new_ones(1)}
        parts |= zip(self._order, (_in_columns(v).to(like) for v in values), strict=True)
        vector = torch.cat([parts[start] for start in sorted(parts)])
        matrix = self._maps[name]
        assert matrix is not None
        return matrix.times(vector)


def _beyond(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """At most 0 where y exp(x/y) ≤ z, the exponential cone, or x ≤ 0 where y is 0.

    That is a parameter at its bound, as the zeros of p in rel_entr(p, z), where x ≤ y log(z/y): of
    its terms −y log z varies with z as y does, and y log y is of no concern to any z.
    """
    inside = y > 0
    height = torch.where(inside, y, 1.0)
    base = torch.where(inside | (z <= 0), 1.0, z)
    return torch.where(inside, height * torch.exp(x / height) - z, x - y * base.log())


def _canonical(problem: Any, parameters: Sequence[Any]) -> tuple[Any, Any]:
    """CVXPY's form with parameters in it, and its cones."""
    before = [p.value for p in parameters]
    try:
        for p in parameters:  # values that its rules allow; the form does not depend on them
            p.value = p.project(np.ones(p.shape))
        data, _, _ = problem.get_problem_data("CLARABEL")
    finally:
        for p, value in zip(parameters, before, strict=True):
            p.value = value
    return data["param_prob"], data["dims"]


def _made_of(own: Any, form: Sequence[Any]) -> Any:
    """What CVXPY's form has in the place of a variable or parameter; None if it has fewer numbers.

    Where it is declared nonneg, newer versions make another of its name.
    """
    made = {t.name(): t for t in form} | {t.id: t for t in form}
    found = made.get(own.id, made.get(own.name()))
    return found if found is not None and found.size == own.size else None


def _refuse(reduced: Sequence[Any]) -> None:
    """Raise if there are variables or parameters that CVXPY makes of fewer, or other, numbers."""
    if reduced:
        raise InvalidArgumentError(
            f"CVXPY: {_named(reduced)} must not be declared symmetric, diagonal, sparse, "
            "semi-definite or complex: write that as constraints"
        )


class _Sparse(NamedTuple):
    """A matrix by its entries, whose products `vmap` and derivatives of any order go through."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    height: int

    def times(self, vector: Tensor) -> Tensor:
        """The product."""
        rows, columns = self.rows.to(vector.device), self.columns.to(vector.device)
        terms = self.values.to(vector) * vector[columns]
        return vector.new_zeros(self.height).index_add(0, rows, terms)


def _sparse(matrix: Any) -> _Sparse | None:
    if matrix is None:
        return None
    entries = matrix.tocoo()
    rows, columns = (torch.as_tensor(i.astype(np.int64)) for i in (entries.row, entries.col))
    values = torch.as_tensor(entries.data.astype(np.float64))
    return _Sparse(rows, columns, values, entries.shape[0])


def _in_columns(tensor: Tensor) -> Tensor:
    """All elements, the first index fastest, as CVXPY lists them."""
    return tensor.permute(tuple(range(tensor.dim() - 1, -1, -1))).reshape(-1)


def _by_columns(vector: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape, whose elements are listed so."""
    return vector.reshape(shape[::-1]).permute(tuple(range(len(shape) - 1, -1, -1)))


def _named(things: Sequence[Any]) -> str:
    return ", ".join(thing.name() for thing in things) or "none"
