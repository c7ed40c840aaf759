"""Products with Jacobians: the only file that calls `torch.autograd.grad`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_grad._errors import GraphError
from implicit_grad._tree import Tensors

# What torch's decorator makes of a backward method is recognised by the code that it shares, and
# what torch.compile makes of a function by where its class comes from.
_COMPILED = "torch._functorch._aot_autograd"
_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Tensors:
    """(∂outputs/∂inputs)ᵀ cotangents, zeros where nothing depends on an input.

    The graph is kept; the product is itself differentiable where gradients are enabled.
    """
    pairs = [
        (y, c)
        for y, c in zip(outputs, cotangents, strict=True)
        if isinstance(y, Tensor) and y.requires_grad
    ]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(x) for x in inputs)
    grads = torch.autograd.grad(
        [y for y, _ in pairs],
        list(inputs),
        [c for _, c in pairs],
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return tuple(
        torch.zeros_like(x) if g is None else dense(g) for g, x in zip(grads, inputs, strict=True)
    )


def gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensors:
    """∇value with respect to the inputs, zeros where it does not depend on one."""
    return vjp([value], inputs, [torch.ones_like(value)])


def plain_gradient(
    value: Tensor, inputs: Sequence[Tensor], keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """∇value without a graph of its own; None where the value does not depend on an input."""
    grads = torch.autograd.grad(value, list(inputs), retain_graph=keep_graph, allow_unused=True)
    return tuple(None if g is None else dense(g) for g in grads)


def dense(gradient: Tensor) -> Tensor:
    """A gradient to calculate with: embeddings may have sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def variables(tensors: Tensors) -> Tensors:
    """Detached copies that share memory and may be differentiated with respect to."""
    return tuple(
        t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors
    )


def stand_ins(tensors: Tensors, wanted: Sequence[bool]) -> Tensors:
    """The same, but of those that are not wanted there are no derivatives."""
    pairs = zip(variables(tensors), wanted, strict=True)
    return tuple(v if wants else v.detach() for v, wants in pairs)


class Force(NamedTuple):
    """F, made from the gradient of an objective's smooth part; see `Linearization`."""

    residual: Tensors | Callable[[], Tensors]
    pulled: Tensors = ()
    scale: Tensors | None = None
    held: Mapping[int, tuple[int, Tensor]] = MappingProxyType({})


class Linearization:
    """F(φ, a) as a graph at one point: products with A = ∂F/∂φ and with ∂F/∂a.

    F(φ) = curved(φ) + pulled(φ) + diagonal·φ + …: the parts of F that depend on φ. `scale`, the
    diagonal of a proximal term, is kept out of the graph: linear solvers add it themselves, and
    take it for the natural unit of A. `pulled` is linear in φ (what else λ adds when it is a
    matrix). F itself may be given by a function, so that it takes no memory while a linear solver
    works. `guard` is entered for the one product that goes past φ in the graph.

    `held` tells, by their ids, of tensors θ that enter F as −λθ and not otherwise: the place in φ
    that each holds back, and λ. Products with ∂F/∂θ then need no graph.
    """

    curvature = "jacobian"  # of what A is made, for reports
    is_hessian = False  # A is the second derivative of an objective, or stands for it
    precision: float | None = None  # relative, of the products; None: that of the tensors

    def __init__(
        self,
        residual: Tensors | Callable[[], Tensors],
        phi: Tensors,
        curved: Tensors | None = None,
        pulled: Tensors = (),
        scale: Tensors | None = None,
        guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.make_residual = residual if callable(residual) else lambda: residual
        self.phi = phi
        self.curved = self.residual if curved is None else curved
        self.pulled, self.scale = pulled, scale
        self.degenerate = False  # φ lies at a kink, where F has no derivative
        self.is_adjoint = False  # F is itself the residual of an adjoint problem
        self.held: Mapping[int, tuple[int, Tensor]] = {}
        self.tasks: int | None = None  # how many tasks there are along φ's first dimension
        # makes the same problem with an operator that is never indefinite, where there is one
        self.convex: Callable[[], Linearization] | None = None
        self._guard = guard
        self._pullback_of_dummy: tuple[Tensors, Tensors] | None = None

    @property
    def residual(self) -> Tensors:
        """F at φ, with its graph."""
        with torch.enable_grad():
            return self.make_residual()

    def extended(self, v: Tensors) -> Tensors:
        """The right-hand side of Aᵀu = v; longer than v where F has unknowns besides φ."""
        return v

    def completed(self, u: Tensors, v: Tensors) -> Tensors:
        """u with the parts that follow from the linear solver's without solving."""
        return u

    def transposed(self, u: Tensors) -> Tensors:
        """Aᵀu: one backward pass through the graph of F (reverse over reverse for a Hessian)."""
        return self.with_scale(self.smooth_transposed(u), u)

    def with_scale(self, product: Tensors, u: Tensors) -> Tensors:
        """The product plus scale·u."""
        if self.scale is None:
            return product
        return tuple(p + s * x for p, s, x in zip(product, self.scale, u, strict=True))

    def smooth_transposed(self, u: Tensors) -> Tensors:
        """Aᵀu without the scale's part."""
        return self._and_pulled(self.curved_transposed(u), u)

    def smooth_product(self, x: Tensors) -> Tensors:
        """A x without the scale's part."""
        return self._and_pulled(self.curved_product(x), x)

    def curved_transposed(self, u: Tensors) -> Tensors:
        """The part of Aᵀu that the functions' curvature makes."""
        return vjp(self.curved, self.phi, u)

    def curved_product(self, x: Tensors) -> Tensors:
        """The same of A x, as the derivative of the map w ↦ Aᵀw (double vjp)."""
        if self._pullback_of_dummy is None:
            if once_differentiable(self.curved, self.phi):
                raise GraphError(
                    "a product with A (not Aᵀ) differentiates the backward pass of F, in which a "
                    "custom Function is marked as once_differentiable, or a function is compiled: "
                    "use Neumann() or Exact()"
                )
            with torch.enable_grad():
                dummy = tuple(torch.zeros_like(f, requires_grad=True) for f in self.curved)
                self._pullback_of_dummy = dummy, vjp(self.curved, self.phi, dummy)
        dummy, pullback = self._pullback_of_dummy
        return vjp(pullback, dummy, x)

    def pullback(self, u: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """(∂F/∂inputs)ᵀu, for any tensors in F's graph."""
        if all(id(x) in self.held for x in inputs):
            places = ((x, *self.held[id(x)]) for x in inputs)
            return tuple((-lam * u[i]).to(x.dtype) for x, i, lam in places)
        with self._guard(), without_hooks(inputs):
            return vjp(self.residual, inputs, u)

    def _and_pulled(self, product: Tensors, u: Tensors) -> Tensors:
        """The product plus that with the linear part, which is symmetric."""
        if not self.pulled:
            return product
        return tuple(map(torch.add, product, vjp(self.pulled, self.phi, u)))


@contextlib.contextmanager
def own_precision(devices: Iterable[torch.device]) -> Iterator[None]:
    """Autocast off: products are taken in the tensors' own precision, whatever surrounds them."""
    with contextlib.ExitStack() as stack:
        for device_type in {"cpu", *(d.type for d in devices)}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Take the user's gradient hooks off leaves: autograd runs them when it accumulates."""
    hooks = [(t, t._backward_hooks) for t in tensors if t.is_leaf and t._backward_hooks]
    try:
        for tensor, _ in hooks:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, own in hooks:
            tensor._backward_hooks = own


def walk(roots: Iterable[Any], stop: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """The nodes of the graph behind the roots (tensors, or nodes themselves); not past `stop`."""
    pending = list(dict.fromkeys(getattr(r, "grad_fn", r) for r in roots))
    pending = [node for node in pending if node is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        if stop(node):
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


def leaves_behind(
    roots: Sequence[Tensor], stop: Callable[[Any], bool] = lambda _: False
) -> Tensors:
    """The distinct leaf tensors requiring grad that the roots depend on."""
    found = {id(t): t for t in roots if t.requires_grad and t.grad_fn is None}
    for node in walk(roots, stop):
        leaf = getattr(node, "variable", None)  # AccumulateGrad nodes have one
        if leaf is not None:
            found[id(leaf)] = leaf
    return tuple(found.values())


def between(values: Sequence[Tensor], phi: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph through which the values depend on φ."""
    ids, own = {id(p) for p in phi}, {p.grad_fn for p in phi} - {None}

    def is_phi(node: Any) -> bool:
        return node in own or id(getattr(node, "variable", None)) in ids

    users: dict[Any, list[Any]] = {}  # the nodes that use a node's result
    pending = []
    for node in walk(values, is_phi):
        if is_phi(node):
            pending.append(node)
            continue
        for parent, _ in node.next_functions:
            users.setdefault(parent, []).append(node)
    seen = set(pending)
    while pending:
        for node in users.get(pending.pop(), ()):
            if node not in seen:
                seen.add(node)
                pending.append(node)
                yield node


def once_differentiable(values: Sequence[Tensor], phi: Sequence[Tensor]) -> bool:
    """Whether a custom Function between φ and the values is marked as differentiable once.

    Or is compiled. torch may take it, without a word, for a function without curvature.
    """

    def is_marked(node: Any) -> bool:
        function = _below_vmap(getattr(node, "_forward_cls", None))
        code = getattr(getattr(function, "backward", None), "__code__", None)
        return code is _ONCE or getattr(function, "__module__", "").startswith(_COMPILED)

    return any(map(is_marked, between(values, phi)))


def _below_vmap(function: Any) -> Any:
    """The custom Function that torch.func.vmap made this one of."""
    while getattr(function, "__name__", "").startswith("Vmapped"):
        forward = function.forward
        cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        inner = next((c.cell_contents for name, c in cells if name == "autograd_function"), None)
        if inner is None:
            break
        function = inner
    return function
