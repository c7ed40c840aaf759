"""Batch norm's second derivative against plain operations, differences, and torch's own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._C._autograd import SavedTensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu
from torch.func import vmap
from torch.nn.functional import batch_norm, conv2d, instance_norm
from torch.utils.checkpoint import checkpoint

import implicit_grad as ig
from implicit_grad._torch import batch_norm as second_batch_norm
from implicit_grad._torch import own_backward
from implicit_grad._torch.graph import between, walk
from implicit_grad._torch.own_backward import own_backwards
from implicit_grad.testing import peak_memory

EPS = 0.1  # large enough to be noticed when it is forgotten
NODE = "NativeBatchNormBackward0"
SHAPES = [(6, 3), (4, 3, 5), (3, 3, 2, 4), (2, 3, 2, 2, 3)]
Norm = Callable[..., Tensor]


def plain_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Batch norm by its definition."""
    dims = [0, *range(2, x.dim())]
    away = x - x.mean(dims, keepdim=True)
    y = away / (away.square().mean(dims, keepdim=True) + EPS).sqrt()
    spread = (-1, *[1] * (x.dim() - 2))
    return y if w is None or b is None else y * w.view(spread) + b.view(spread)


def torch_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return batch_norm(x, None, None, w, b, training=True, eps=EPS)


def problem(shape: tuple[int, ...], affine: bool, norm: Norm) -> tuple[Tensor, list[Tensor]]:
    """A loss in which batch norm stands between two curved functions, and what it depends on."""
    torch.manual_seed(0)
    x, c = torch.randn(2, *shape, dtype=torch.float64)
    phi = [x, *(torch.randn(2, 3, dtype=torch.float64) if affine else ())]
    phi = [p.detach().clone().requires_grad_() for p in phi]
    return (norm(phi[0].tanh(), *phi[1:]).exp() * c).sum(), phi


def lean_slope(loss: Tensor, phi: list[Tensor]) -> tuple[Tensor, ...]:
    with own_backwards(between([loss], phi), lasting=True):
        return grad(loss, phi, create_graph=True)


def kinds(roots: tuple[Tensor, ...]) -> set[str]:
    return {node.name() for node in walk(roots)}


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tol: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tol * (1 + b.norm()), (a, b)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_definition(shape: tuple[int, ...], affine: bool):
    slopes, products = [], []
    for norm, slope_of in ((torch_norm, lean_slope), (plain_norm, grad)):
        loss, phi = problem(shape, affine, norm)
        options = {"create_graph": True} if slope_of is grad else {}
        slopes.append(slope_of(loss, phi, **options))
        v = [torch.randn_like(p) for p in phi]
        products.append(grad(slopes[-1], phi, v))
    assert "NativeBatchNormBackwardBackward0" not in kinds(slopes[0])
    assert_close(slopes[0], slopes[1], 1e-13)
    assert_close(products[0], products[1], 1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_the_same_with_a_graph_of_its_own(shape: tuple[int, ...], affine: bool):
    loss, phi = problem(shape, affine, torch_norm)
    slope = lean_slope(loss, phi)
    v = [torch.randn_like(p) for p in phi]
    plain = grad(slope, phi, v, retain_graph=True)
    assert_close(grad(slope, phi, v, create_graph=True), plain, 1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_derivatives_of_higher_order(affine: bool):
    _, phi = problem((4, 3, 2), affine, torch_norm)

    def slope(*phi: Tensor) -> tuple[Tensor, ...]:
        loss = (torch_norm(phi[0].tanh(), *phi[1:]).exp() * torch.arange(24.0).view(4, 3, 2)).sum()
        return lean_slope(loss, list(phi))

    assert gradcheck(slope, phi)
    assert gradgradcheck(slope, phi)  # torch's batch norm has no third derivative

    def second(*phi: Tensor) -> tuple[Tensor, ...]:
        parts = slope(*phi)
        return grad(sum(p.square().sum() for p in parts), phi, create_graph=True)

    assert gradgradcheck(second, phi, atol=1e-3, rtol=1e-3)  # of fourth order


def test_a_weight_of_zero_and_a_constant_channel():
    x = torch.randn(5, 3, dtype=torch.float64)
    x[:, 1] = 2.0
    w = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    v = torch.randn(5, 3, dtype=torch.float64)
    products = []
    for norm in (torch_norm, plain_norm):
        phi = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = (norm(phi[0], phi[1], torch.ones_like(w)) ** 3).sum()
        slope = lean_slope(loss, phi)
        products.append(grad(slope, phi, [v, torch.ones_like(w)]))
    assert_close(products[0], products[1], 1e-12)


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_what_is_frozen(frozen: str):
    products = []
    for norm in (torch_norm, plain_norm):
        _, (x, w, b) = problem((4, 3, 5), True, norm)
        x.requires_grad_(frozen == "weight")
        w.requires_grad_(frozen == "input")
        phi = [t for t in (x, w, b) if t.requires_grad]
        slope = lean_slope(norm(x, w, b).exp().sum(), phi)
        products.append(grad(slope, phi, [torch.ones_like(p) for p in phi]))
    assert_close(products[0], products[1], 1e-12)


@pytest.mark.parametrize("kind", ["shared", "instance", "vmap", "channels last", "running"])
def test_other_ways_to_call_it(kind: str):
    torch.manual_seed(1)
    x, v = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    statistics = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def value(x: Tensor, norm: Norm) -> Tensor:
        if kind == "shared":
            return norm(norm(x).tanh())
        if kind == "instance" and norm is torch_norm:
            return instance_norm(x, eps=EPS)
        if kind == "instance":
            return torch.cat([norm(sample[None]) for sample in x])
        if kind == "vmap":
            return vmap(lambda x: norm(x[None]))(x)
        if kind == "channels last":
            return norm(x.to(memory_format=torch.channels_last))
        if norm is torch_norm:
            return batch_norm(x, *statistics, training=True, eps=EPS)
        return norm(x)

    products = []
    for norm in (torch_norm, plain_norm):
        phi = [x.clone().requires_grad_()]
        slope = lean_slope(value(phi[0].sin(), norm).exp().sum(), phi)
        products.append(grad(slope, phi, [v]))
    assert_close(products[0], products[1], 1e-12)


def test_gradients_without_a_graph_stay_as_they_are():
    loss, phi = problem((4, 3), True, torch_norm)
    expected = grad(loss, phi, retain_graph=True)
    with own_backwards(between([loss], phi)):
        found = grad(loss, phi, retain_graph=True)
    assert not any(g.requires_grad for g in found)
    assert_close(found, expected, 0.0)


def test_what_does_not_last_ends():
    loss, phi = problem((4, 3), True, torch_norm)
    before = kinds(grad(loss, phi, create_graph=True))
    with own_backwards(between([loss], phi)):
        inside = kinds(grad(loss, phi, create_graph=True))
    assert inside != before == kinds(grad(loss, phi, create_graph=True))
    with pytest.raises(ZeroDivisionError), own_backwards(between([loss], phi)):
        raise ZeroDivisionError
    assert kinds(grad(loss, phi, create_graph=True)) == before


def test_batch_norms_upstream_of_phi_are_left_alone():
    """Their graph is the user's, and may be freed or changed."""
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    features = encoder(torch.randn(6, 3, dtype=torch.float64))
    features.square().sum().backward()
    (node,) = [node for node in walk([features]) if node.name() == NODE]

    def objective(w: Tensor) -> Tensor:
        return (features @ w - 1).square().sum() + w.square().sum()

    found = ig.solvers.NewtonCG().minimize(objective, torch.zeros(4, dtype=torch.float64))
    f = features.detach()
    exact = torch.linalg.solve(f.mT @ f + torch.eye(4, dtype=torch.float64), f.sum(0))
    torch.testing.assert_close(found, exact)
    assert "implicit_grad" not in node.metadata


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_users_on_the_same_node(when: str):
    """What they make of a gradient is differentiated as they made it."""

    def double(results: tuple[Tensor, ...], _: object) -> tuple[Tensor, ...]:
        return results[0] * results[0].square().mean(), *results[1:]

    products = []
    for own in (False, True):
        loss, phi = problem((4, 3), True, torch_norm)
        (node,) = [node for node in walk([loss]) if node.name() == NODE]
        if when == "before":
            node.register_hook(double)
        if own:
            slope = lean_slope(loss, phi)  # the hook on the node lasts
        if when == "after":
            node.register_hook(double)
        slope = grad(loss, phi, create_graph=True)
        products.append(grad(slope, phi, [torch.ones_like(p) for p in phi]))
    assert_close(products[1], products[0], 1e-12)


def test_a_graph_is_seen_to_once(monkeypatch: pytest.MonkeyPatch):
    loss, phi = problem((4, 3), True, torch_norm)
    counts, hooks, replacing = [], [], second_batch_norm.replacement
    replacements = own_backward._REPLACEMENTS
    monkeypatch.setitem(replacements, NODE, lambda n: hooks.append(n) or replacing(n))
    for _ in range(3):
        slope = lean_slope(loss, phi)
        counts.append(sum(node.name() == "_BackwardBackward" for node in walk(slope)))
    assert counts == [1, 1, 1] and len(hooks) == 1


def test_graphs_are_freed_without_the_garbage_collector():
    _, phi = problem((4, 3), False, torch_norm)
    kept = phi[0] * 1.0
    loss = torch_norm(kept).exp().sum()
    alive = weakref.ref(kept)
    slope = lean_slope(loss, [kept])
    gc.disable()
    try:
        del kept, loss, slope
        assert alive() is None
    finally:
        gc.enable()


def test_statistics_that_are_given_and_half_precision_stay_with_torch():
    x = torch.randn(4, 3, requires_grad=True)
    given = batch_norm(x, torch.zeros(3), torch.ones(3), training=False).exp().sum()
    half = batch_norm(x.bfloat16(), None, None, training=True).exp().sum()
    for loss in (given, half):
        assert kinds(lean_slope(loss, [x])) == kinds(grad(loss, [x], create_graph=True))


@pytest.mark.parametrize("kept", ["checkpoint", "on another device"])
def test_inside_of_what_keeps_tensors_in_its_own_way(kept: str):
    (x, v), calls = torch.randn(2, 4, 3, 5, dtype=torch.float64), []

    def block(x: Tensor) -> Tensor:
        calls.append(x)
        return torch_norm(x.sin()).exp()

    products = []
    for own in (False, True):
        phi = [x.clone().requires_grad_()]
        if own and kept == "checkpoint":
            loss = checkpoint(block, phi[0], use_reentrant=False).sum()
        elif own:
            with save_on_cpu():
                loss = block(phi[0]).sum()
        else:
            loss = block(phi[0]).sum()
        slope, before = lean_slope(loss, phi), len(calls)
        # a checkpoint is computed once more for the gradient, and not to look into it, if torch
        # tells what it keeps from what lies at hand
        if kept != "checkpoint" or hasattr(SavedTensor, "unpack_hook"):
            assert before == 1 + own + (own and kept == "checkpoint")
        products.append(grad(slope, phi, [v]))
    assert_close(products[1], products[0], 1e-12)


def test_a_product_needs_less_memory():
    torch.manual_seed(0)
    x, w = torch.randn(8, 16, 32, 32), torch.randn(16, 16, 3, 3, requires_grad=True)
    loss = torch_norm(conv2d(x, w)).relu().square().sum()
    v, slopes = [torch.randn_like(w)], {}
    slopes["torch"] = grad(loss, [w], create_graph=True)
    slopes["ours"] = lean_slope(loss, [w])
    peaks = {
        name: peak_memory(lambda slope=slope: grad(slope, [w], v, retain_graph=True))
        for name, slope in slopes.items()
    }
    assert peaks["ours"] <= 0.75 * peaks["torch"]


def test_hypergradients_through_networks_with_batch_norm_have_derivatives():
    torch.manual_seed(0)
    X, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def loss(phi: Tensor) -> Tensor:
        w, head = phi.split([9, 6])
        return (torch_norm(X @ w.view(3, 3)).tanh() @ head.view(3, 2) - y).square().mean()

    solve = ig.implicit(
        ig.solvers.NewtonCG(maxiter=50, cg=30, tol=1e-13),
        ig.proximal(loss, lam=2.0),
        linear_solver=ig.CG(rtol=1e-13),
    )
    theta = torch.randn(15, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: solve(t).sin(), theta)
    assert gradgradcheck(lambda t: solve(t).sin(), theta)


def test_adapting_a_module_leaves_its_statistics_and_graph_as_they_were():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    loss = net(x).square().sum()
    phi = tuple(net.parameters())
    statistics = [b.clone() for b in net.buffers()]
    expected = grad(loss, phi, retain_graph=True)
    slope = lean_slope(loss, list(phi))
    grad(slope, phi, [s.detach() for s in slope], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(statistics, net.buffers(), strict=True))
    assert_close(grad(loss, phi), expected, 0.0)
