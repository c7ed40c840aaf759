"""The form of a CVXPY problem: data of a cone program, affine in the problem's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicit_grad._conditions.exponential_cones import ExponentialCones
from implicit_grad._errors import InvalidArgumentError

AUXILIARY = "auxiliary"


class ConeForm:
    """P, c, A and b as affine functions of the parameters, and where the variables lie in x."""

    def __init__(self, problem: Any, parameters: Sequence[Any]) -> None:
        variables = problem.variables()
        own = (*variables, *parameters)
        _refuse([t for t in own if t.is_complex() or t.attributes["diag"]])
        form, cones = _canonical(problem, parameters)
        self._rows = [cones.zero, cones.nonneg, sum(cones.soc), 3 * cones.exp]
        if sum(self._rows) < form.constr_size:
            raise InvalidArgumentError(
                "CVXPY: semi-definite and power cones have no derivatives here"
            )
        made = {v.id: _made_of(v, form.variables) for v in variables}
        made |= {p.id: _made_of(p, form.parameters) for p in parameters}
        _refuse([t for t in own if made[t.id] is None])
        columns, places = form.param_id_to_col, form.var_id_to_col
        self.size, self.rows = form.x.size, form.constr_size
        self.zero, self.soc, self.exp = cones.zero, list(cones.soc), cones.exp
        self._order = [columns[made[p.id].id] for p in parameters]
        self._last = columns[-1]  # of what no parameter changes
        self._maps = {name: _sparse(getattr(form, name)) for name in ("P", "q", "A")}
        self._shapes = {t.name(): t.shape for t in variables}
        taken = [torch.arange(t.size) + places[made[t.id].id] for t in variables]
        others = torch.ones(self.size, dtype=torch.bool)
        others[torch.cat(taken)] = False
        self._places = torch.cat([*taken, others.nonzero()[:, 0]])
        self._sizes = [*map(len, taken), int(others.sum())]
        self._counted, self._telling = self._only_counted(others), self._not_implied()
        self.pushing = len(self._telling)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """The variables by name; those that CVXPY has added last."""
        *parts, others = torch.split(x[self._places.to(x.device)], self._sizes)
        named = zip(self._shapes.items(), parts, strict=True)
        phi = {name: _by_columns(part, shape) for (name, shape), part in named}
        return {**phi, AUXILIARY: others} if len(others) else phi

    def joined(self, phi: dict[str, Tensor]) -> Tensor:
        """x again."""
        parts = [_in_columns(phi[name]) for name in self._shapes]
        x = torch.cat([*parts, *([phi[AUXILIARY]] if AUXILIARY in phi else [])])
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
        return self._slack(phi, values)[0][0]

    def inequalities(self, phi: dict[str, Tensor], *values: Tensor) -> Tensor:
        """Rows of −s that are to be at most 0."""
        positive = self._slack(phi, values)[1][0]
        return -positive[self._telling.to(positive.device)]

    def second_order(self, phi: dict[str, Tensor], *values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parts of s that lie in second-order cones, with the sizes of their rows."""
        both = (torch.split(t, self.soc) for t in self._slack(phi, values)[2])
        return list(zip(*both, strict=True))

    def exponential(self, phi: dict[str, Tensor], *values: Tensor) -> ExponentialCones:
        """The parts of s that lie in exponential cones."""
        parts, lengths = (t.view(-1, 3) for t in self._slack(phi, values)[3])
        return ExponentialCones(parts, lengths, self._counted.to(parts.device))

    def _slack(
        self, phi: dict[str, Tensor], values: Sequence[Tensor]
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """s for each kind of cone, and the sizes of its rows."""
        x = self.joined(phi)
        matrix, offset = self._affine(x, values)
        both = matrix @ x + offset, matrix.detach().norm(dim=1)
        return list(zip(*(torch.split(t, self._rows) for t in both), strict=True))

    def _affine(self, x: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """−A and b."""
        both = self._evaluated("A", values, x).view(self.size + 1, self.rows).mT
        return both[:, :-1], both[:, -1]

    def _only_counted(self, auxiliary: Tensor) -> Tensor:
        """In which exponential cones x is moved by an auxiliary variable that is else in c only."""
        rows = torch.zeros(self.size, self.rows, dtype=torch.bool)
        for row, entries in enumerate(self._entries()):
            rows[[column for column, *_ in entries if column < self.size], row] = True
        alone = auxiliary & (rows.sum(1) == 1)
        if (curved := self._maps["P"]) is not None:
            alone[curved.rows % self.size] = False
        of_x = rows[:, self.rows - 3 * self.exp :: 3]
        return (of_x & alone[:, None]).any(0)

    def _not_implied(self) -> Tensor:
        """Which rows of s ≥ 0 to keep: not those that are y or z of an exponential cone, too."""

        def up_to_scale(entries: list[tuple[int, int, float]]) -> frozenset[tuple[int, int, float]]:
            largest = max((abs(value) for *_, value in entries), default=1.0)
            return frozenset((i, j, round(value / largest, 12)) for i, j, value in entries)

        rows = [up_to_scale(entries) for entries in self._entries()]
        zero, nonneg, _, exponential = self._rows
        of_cones = rows[self.rows - exponential :]
        known = {*of_cones[1::3], *of_cones[2::3]}
        telling = [i for i in range(nonneg) if rows[zero + i] not in known]
        return torch.tensor(telling, dtype=torch.long)

    def _entries(self) -> list[list[tuple[int, int, float]]]:
        """For each row of −A and b, which is last: columns, what they are multiples of, by what."""
        found: list[list[tuple[int, int, float]]] = [[] for _ in range(self.rows)]
        if (matrix := self._maps["A"]) is not None:
            for place, *entry in zip(*(t.tolist() for t in matrix[:3]), strict=True):
                found[place % self.rows].append((place // self.rows, *entry))
        return found

    def _evaluated(self, name: str, values: Sequence[Tensor], like: Tensor) -> Tensor:
        """Data of the problem, column by column, for these parameters."""
        parts = {self._last: like.new_ones(1)}
        parts |= zip(self._order, (_in_columns(v).to(like) for v in values), strict=True)
        vector = torch.cat([parts[start] for start in sorted(parts)])
        matrix = self._maps[name]
        assert matrix is not None
        return matrix.times(vector)


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

    Where it is declared nonneg, newer versions make another of its name: `form` is of one kind, for
    a variable may have the name of a parameter.
    """
    same = [t for t in form if t.id == own.id] or [t for t in form if t.name() == own.name()]
    return same[0] if len(same) == 1 and same[0].size == own.size else None


def _refuse(reduced: Sequence[Any]) -> None:
    """Raise if there are variables or parameters that CVXPY makes of fewer, or other, numbers."""
    if reduced:
        raise InvalidArgumentError(
            f"CVXPY: {named(reduced)} must not be declared symmetric, diagonal, sparse, "
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


def named(things: Sequence[Any]) -> str:
    return ", ".join(thing.name() for thing in things) or "none"
