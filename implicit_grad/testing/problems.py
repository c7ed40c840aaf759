"""Problems with known answers: matrices, inner problems in closed form, few-shot tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_grad._conditions.argmin import argmin
from implicit_grad._conditions.base import Condition
from implicit_grad._conditions.proximal import proximal
from implicit_grad._conditions.root import fixed_point, root
from implicit_grad._implicit import implicit
from implicit_grad._wrapper.implicit_solver import ImplicitSolver

Kind = Literal["definite", "indefinite", "nonsymmetric"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A few-shot task: classes as clouds around random centres, to adapt on and to test on.

    Args:
        ways: how many classes.
        shots: examples of each class to adapt on.
        queries: examples of each class to test on.
        features: inputs of an example.
        seed: of the centres and clouds.
        dtype: of the inputs; labels are integers.
    """

    ways: int = 2
    shots: int = 1
    queries: int = 1
    features: int = 2
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to adapt on, `shots` for each class."""
        return self._examples(self.shots, self.seed + 1)

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to test on, `queries` for each class."""
        return self._examples(self.queries, self.seed + 1_000_003)

    def _examples(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        centres = normal(self.ways, self.features, seed=self.seed, dtype=self.dtype)
        labels = torch.arange(self.ways).repeat_interleave(number)
        noise = normal(len(labels), self.features, seed=seed, dtype=self.dtype)
        return centres[labels] + noise / 2, labels


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers; drawn in float64, so that a seed means the same in every dtype."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=random).to(dtype)


@dataclasses.dataclass(frozen=True)
class Network:
    """A small fully connected network; `module` makes it, the same one each time.

    Args:
        widths: inputs, units of the hidden layers, outputs.
        activation: between the layers, "tanh", "softplus" or "sigmoid".
        bias: whether layers have one.
        seed: of the weights.
        dtype: of the weights.
    """

    widths: tuple[int, ...] = (1, 1)
    activation: Literal["tanh", "softplus", "sigmoid"] = "tanh"
    bias: bool = True
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def module(self) -> torch.nn.Sequential:
        """The network; its activation is smooth, and its output linear."""
        activations = {
            "tanh": torch.nn.Tanh,
            "softplus": torch.nn.Softplus,
            "sigmoid": torch.nn.Sigmoid,
        }
        layers: list[torch.nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layer = torch.nn.Linear(inputs, outputs, bias=self.bias, dtype=self.dtype)
            layers += [layer, activations[self.activation]()]
        module = torch.nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for k, parameter in enumerate(module.parameters()):
                numbers = normal(*parameter.shape, seed=self.seed + k, dtype=self.dtype)
                parameter.copy_(numbers / max(parameter.shape[-1], 1) ** 0.5)
        return module


@dataclasses.dataclass(frozen=True)
class SpectralMatrix:
    """A square matrix with the given eigenvalues.

    Q (Λ + N) Qᵀ, with Λ the diagonal of `spectrum`, N strictly upper triangular and 0 but for
    `skew` next to the diagonal, and Q orthogonal, from `seed`; seed 0 stands for Q = I, so that the
    simplest operator is a diagonal matrix.

    >>> SpectralMatrix((1.0, 3.0)).matrix
    tensor([[1., 0.],
            [0., 3.]], dtype=torch.float64)
    """

    spectrum: tuple[float, ...]
    seed: int = 0
    skew: float = 0.0
    dtype: torch.dtype = torch.float64

    def __repr__(self) -> str:
        parts = [str(self.spectrum)]
        parts += [f"seed={self.seed}"] if self.seed else []
        parts += [f"skew={self.skew}"] if self.skew else []
        parts += [f"dtype={self.dtype}"] if self.dtype != torch.float64 else []
        return f"SpectralMatrix({', '.join(parts)})"

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.spectrum)

    @property
    def symmetric(self) -> bool:
        """Whether the matrix is."""
        return not self.skew or self.size < 2

    @property
    def matrix(self) -> Tensor:
        """The matrix, dense."""
        core = torch.diag(torch.tensor(self.spectrum, dtype=torch.float64))
        core += self.skew * torch.diag(torch.ones(max(self.size - 1, 0), dtype=torch.float64), 1)
        if self.seed:
            basis, _ = torch.linalg.qr(normal(self.size, self.size, seed=self.seed))
            core = basis @ core @ basis.T
        return ((core + core.T) / 2 if self.symmetric else core).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The product with a vector."""
        return self.matrix @ x


Family = Literal["quadratic", "logarithmic", "proximal", "root", "fixed_point"]
FAMILIES: tuple[Family, ...] = ("quadratic", "logarithmic", "proximal", "root", "fixed_point")
SYMMETRIC: tuple[Family, ...] = FAMILIES[:3]


@dataclasses.dataclass(frozen=True)
class InnerProblem:
    """An inner problem, its arguments, and its solution as a differentiable function of them.

    With M the operator's matrix, all of it among the arguments, φ is

    - "quadratic": the minimum of φᵀMφ/2 − bᵀφ + λ/2 ‖φ‖² (arguments b, M, λ);
    - "logarithmic": that of Σ exp(Mφ) − yᵀMφ with y = exp(b), which is not quadratic (b, M);
    - "proximal": that of φᵀMφ/2 − bᵀφ near θ (θ, b, M, and λ in the condition);
    - "root": the root of M(φ + b) + tanh(M(φ + b)) (b, M), nonsymmetric if M is;
    - "fixed_point": that of φ ↦ M φ/(2‖M‖) + b (b, M).

    Args:
        family: one of these.
        operator: M, of shape (n, n).
        seed: of b, of θ and of what else is drawn, of shape (n,).
        lam: λ > 0, where there is one.
        form: φ's: one "vector" of shape (n,), or a "dict" of a vector and a number where there is
            room for two.
    """

    family: Family
    operator: SpectralMatrix
    seed: int = 0
    lam: float = 1.0
    form: Literal["vector", "dict"] = "vector"

    @property
    def args(self) -> tuple[Tensor, ...]:
        """New tensors each time, which require grad."""
        dtype = self.operator.dtype
        n, lam = self.operator.size, torch.tensor(self.lam, dtype=dtype)
        b = normal(n, seed=self.seed + 1, dtype=dtype)
        theta = normal(n, seed=self.seed + 2, dtype=dtype)
        chosen = {
            "quadratic": (b, self.operator.matrix, lam),
            "proximal": (self._form(theta), b, self.operator.matrix),
        }.get(self.family, (b, self.operator.matrix))
        return tuple(_requiring_grad(a) for a in chosen)

    def exact(self, *args: Any) -> Any:
        """The solution in closed form, differentiable."""
        if self.family == "quadratic":
            b, M, lam = args
            return self._form(torch.linalg.solve(_symmetric(M) + lam * torch.eye(len(b)).to(b), b))
        if self.family == "proximal":
            theta, b, M = args
            shifted = _symmetric(M) + self.lam * torch.eye(len(b)).to(b)
            return self._form(torch.linalg.solve(shifted, b + self.lam * self._vector(theta)))
        b, M = args
        if self.family == "logarithmic":
            return self._form(torch.linalg.solve(M, b))
        if self.family == "root":
            return self._form(-b)
        scaled = torch.eye(len(b)).to(b) - M / (2 * torch.linalg.matrix_norm(M))
        return self._form(torch.linalg.solve(scaled, b))

    def solver(self, *args: Any) -> Any:
        """The solution, without a graph: as black as a box can be."""
        with torch.no_grad():
            return self.exact(*args)

    @property
    def condition(self) -> Condition:
        """What the solution satisfies."""
        if self.family == "quadratic":
            return argmin(self._ridge)
        if self.family == "logarithmic":
            return argmin(self._logarithmic)
        if self.family == "proximal":
            return proximal(self._quadratic, self.lam)
        if self.family == "root":
            return root(self._residual)
        return fixed_point(self._map)

    def implicit(self, **options: Any) -> ImplicitSolver:
        """The solver made differentiable by `implicit`, with options of your choice."""
        return implicit(self.solver, self.condition, **options)

    def hypergradient(
        self, outer: Callable[[Any], Tensor], args: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The exact gradients of outer(φ), by autograd through the closed form."""
        wanted = [t for a in args for t in (a.values() if isinstance(a, dict) else (a,))]
        found = torch.autograd.grad(outer(self.exact(*args)), wanted, allow_unused=True)
        return tuple(
            torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)
        )

    def _ridge(self, phi: Any, b: Tensor, M: Tensor, lam: Tensor) -> Tensor:
        return self._quadratic(phi, b, M) + lam / 2 * self._vector(phi).square().sum()

    def _quadratic(self, phi: Any, b: Tensor, M: Tensor) -> Tensor:
        x = self._vector(phi)
        return x @ (M @ x) / 2 - b @ x

    def _logarithmic(self, phi: Any, b: Tensor, M: Tensor) -> Tensor:
        z = M @ self._vector(phi)
        return (z.exp() - b.exp() * z).sum()

    def _residual(self, phi: Any, b: Tensor, M: Tensor) -> Any:
        z = M @ (self._vector(phi) + b)
        return self._form(z + torch.tanh(z))

    def _map(self, phi: Any, b: Tensor, M: Tensor) -> Any:
        return self._form(M @ self._vector(phi) / (2 * torch.linalg.matrix_norm(M)) + b)

    def _form(self, x: Tensor) -> Any:
        return {"rest": x[1:], "first": x[0]} if self._is_dict else x

    def _vector(self, phi: Any) -> Tensor:
        return torch.cat([phi["first"][None], phi["rest"]]) if self._is_dict else phi

    @property
    def _is_dict(self) -> bool:
        return self.form == "dict" and self.operator.size > 1


def _symmetric(matrix: Tensor) -> Tensor:
    """The part that a quadratic form knows of."""
    return (matrix + matrix.mT) / 2


def _requiring_grad(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: t.clone().requires_grad_() for k, t in value.items()}
    return value.clone().requires_grad_()
