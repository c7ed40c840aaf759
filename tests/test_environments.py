"""Where a layer may find itself: checkpoints, processes, threads, compilers, a Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprint import untouched
from forking import start_method
from problems import in_threads, minimize, normal, prox
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import implicit_grad as ig
from implicit_grad._torch.isolation import RandomState, uncompiled

pytestmark = pytest.mark.usefixtures("double_precision")

STYLES = ("tensor", "closure")
LAM = 0.5
LONG = "IMPLICIT_GRAD_LONG" in os.environ


def loss(phi: Tensor, X: Tensor) -> Tensor:
    return (X @ phi).square().sum() / 2 + (phi**4).sum() / 4


def solver(theta: Tensor, X: Tensor) -> Tensor:
    """Newton's method, without torch.func, which saved-tensor hooks (checkpoints) forbid."""
    phi, one = theta.detach().clone(), torch.eye(len(theta))
    for _ in range(15):
        hessian = X.T @ X + torch.diag(3 * phi**2) + LAM * one
        slope = X.T @ (X @ phi) + phi**3 + LAM * (phi - theta)
        phi = phi - torch.linalg.solve(hessian, slope)
    return phi.detach()


def layer(**options: Any) -> ig.ImplicitSolver:
    options = {"linear_solver": ig.CG(rtol=1e-13), "on_failure": "raise", **options}
    return ig.implicit(solver, ig.proximal(loss, LAM), **options)


def arguments() -> tuple[Tensor, Tensor]:
    return normal(3, seed=1), normal(4, 3, seed=2)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def batch(seed: int = 5) -> tuple[Tensor, Tensor]:
    return normal(6, 3, seed=seed, grad=False), normal(6, 1, seed=seed + 50, grad=False)


def wrapped(model: nn.Module, lam: float = 100.0, lr: float = 0.005, **options: Any) -> Any:
    options = {"linear_solver": ig.CG(rtol=1e-13), "on_failure": "raise", **options}
    return ig.imaml(model, lr=lr, lam=lam, **options)


def adapted(maml: Any, style: str, steps: int = 2, data: Any = None) -> Any:
    x, y = batch() if data is None else data
    learner = maml.clone()
    if style == "closure":
        learner.adapt(lambda: mse_loss(learner(x), y), steps=steps)
    else:
        for _ in range(steps):
            learner.adapt(mse_loss(learner(x), y))
    return learner


def outer_gradient(maml: Any, style: str, data: Any = None) -> tuple[Tensor, ...]:
    x, y = batch(9)
    value = mse_loss(adapted(maml, style, data=data)(x), y)
    return grad(value, list(maml.module.parameters()))


def near(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.cat([t.flatten() for t in ts]) for ts in (actual, expected))
    assert (actual - expected).norm() <= tolerance * expected.norm(), (actual, expected)


def same(actual: Any, expected: Any) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def numerical(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function."""
    slope = torch.zeros_like(x)
    for i in range(x.numel()):
        d = torch.zeros_like(x)
        d.view(-1)[i] = step
        with torch.no_grad():
            slope.view(-1)[i] = (function(x + d) - function(x - d)) / (2 * step)
    return slope.detach()


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_within_an_activation_checkpoint(reentrant):
    theta, X = arguments()
    solve, runs = layer(), []

    def block(theta: Tensor, X: Tensor) -> Tensor:
        runs.append(1)
        return torch.tanh(solve(theta * 2, X)).square().sum()

    expected = grad(block(theta, X), (theta, X))
    runs.clear()
    checkpoint(block, theta, X, use_reentrant=reentrant).backward()
    # without reentrance, torch computes the block anew for each product in backward
    assert len(runs) == 2 if reentrant else len(runs) >= 2
    near((theta.grad, X.grad), expected, 1e-13)


def noisy_loss(phi: Tensor, X: Tensor) -> Tensor:
    return nn.functional.dropout(phi, 0.5).square().sum() + loss(phi, X)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_masks_of_forward_again(reentrant):
    theta, X = arguments()
    solve = ig.implicit(lambda t, X: t * 1, ig.proximal(noisy_loss, LAM), on_failure="ignore")
    torch.manual_seed(4)
    expected = grad(solve(theta, X).sum(), theta)[0]
    torch.manual_seed(4)
    value = checkpoint(lambda t: solve(t, X.detach()).sum(), theta, use_reentrant=reentrant)
    torch.rand(1)
    value.backward()
    near([theta.grad], [expected], 1e-13)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_task_of_imaml_within_a_checkpoint(style, reentrant):
    model = network().eval()
    maml, (x, y) = wrapped(model), batch(9)
    expected = outer_gradient(maml, style)

    def task(x: Tensor) -> Tensor:
        return mse_loss(adapted(maml, style)(x), y)

    if reentrant and style == "tensor":  # it runs forward under no_grad first
        with pytest.raises(ig.GraphError, match=r"torch\.no_grad\(\).*or pass a function"):
            checkpoint(task, x.requires_grad_(), use_reentrant=True)
        return
    checkpoint(task, x.requires_grad_(), use_reentrant=reentrant).backward()
    same([p.grad for p in model.parameters()], expected)


# ---------------------------------------------------------------- processes


def processes(rank: int, address: str, file: str) -> None:
    """One of two processes: a layer behind a DistributedDataParallel encoder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    encoder = shared_encoder()
    data_parallel = nn.parallel.DistributedDataParallel(encoder)
    inner = network().eval()  # each process's own: the solver is never handed a parallel module
    found = []
    for step in range(2):
        data_parallel.zero_grad()
        behind_a_layer(data_parallel, inner, 10 * step + rank).backward()
        found.append([p.grad.clone() for p in encoder.parameters()])
    torch.save((found, [meta_gradient(wrap, rank) for wrap in META_WRAPPERS]), f"{file}.{rank}")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads, where they are slow to end, would abort an ordinary end


class MetaLoss(nn.Module):
    """A meta-loss as a module's forward, so that what wraps a module can wrap it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network().eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(adapted(wrapped(self.model), "tensor")(x), y)


def sharded(module: nn.Module) -> nn.Module:
    """As a whole; torch before 2.6 has no fully_shard, and data-parallel processes stand in."""
    from torch.distributed import device_mesh, fsdp

    fully_shard = getattr(fsdp, "fully_shard", None)
    if fully_shard is None:
        return nn.parallel.DistributedDataParallel(module)
    mesh = device_mesh.init_device_mesh("cpu", (2,))
    return fully_shard(module, mesh=mesh)


META_WRAPPERS = (nn.parallel.DistributedDataParallel, sharded)


def meta_gradient(wrap: Callable[[nn.Module], nn.Module], rank: int) -> Tensor:
    """The meta-gradient that a process has in the end."""
    module = MetaLoss()
    parallel = wrap(module)  # it must live until backward() is done
    parallel(*batch(rank)).backward()
    found = [p.grad for p in module.parameters()]
    return torch.cat([getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in found])


def shared_encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return nn.Linear(3, 3)


def behind_a_layer(encoder: nn.Module, inner: nn.Module, seed: int) -> Tensor:
    """An outer loss of a ridge regression on the features, and of an adapted learner on them."""
    x, y = batch(seed)
    features = torch.tanh(encoder(x))

    def ridge(features: Tensor) -> Tensor:
        normal_matrix = features.T @ features + torch.eye(3)
        return torch.linalg.solve(normal_matrix, features.T @ y)

    def objective(w: Tensor, features: Tensor) -> Tensor:
        return (features @ w - y).square().sum() / 2 + w.square().sum() / 2

    w = ig.implicit(ridge, ig.argmin(objective), linear_solver=ig.CG(rtol=1e-13))(features)
    learner = wrapped(inner).clone()
    learner.adapt(lambda: mse_loss(learner(features), y), steps=2)
    return w.square().sum() + mse_loss(learner(features), y)


def test_data_parallel_processes_average_the_gradients(tmp_path):
    address, file = f"file://{tmp_path}/rendezvous", str(tmp_path / "found")
    context = torch.multiprocessing.start_processes(
        processes, (address, file), nprocs=2, join=False, start_method=start_method(__name__)
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    encoder, inner = shared_encoder(), network().eval()
    saved = [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]
    ranks, wrappers = zip(*saved, strict=True)
    for step in range(2):
        each = [
            grad(behind_a_layer(encoder, inner, 10 * step + rank), list(encoder.parameters()))
            for rank in range(2)
        ]
        average = [(a + b) / 2 for a, b in zip(*each, strict=True)]
        assert not torch.allclose(each[0][0], each[1][0], rtol=1e-2)
        for found in ranks:
            near(found[step], average, 1e-12)
    alone = MetaLoss()
    mean = (alone(*batch(0)) + alone(*batch(1))) / 2
    expected = torch.cat([g.flatten() for g in grad(mean, list(alone.parameters()))])
    for found in wrappers:
        for gradient in found:
            near([gradient], [expected], 1e-12)


# ---------------------------------------------------------------- nested layers


def inner_layer() -> ig.ImplicitSolver:
    """z(w, a) = argmin (z − w)² + z⁴/4 + a z², elementwise."""

    def objective(z: Tensor, w: Tensor, a: Tensor) -> Tensor:
        return (z - w).square().sum() + (z**4).sum() / 4 + a * z.square().sum()

    def solve(w: Tensor, a: Tensor) -> Tensor:
        return minimize(lambda z: objective(z, w.detach(), a.detach()), torch.zeros_like(w))

    return ig.implicit(
        solve, ig.argmin(objective), linear_solver=ig.CG(rtol=1e-13), on_failure="raise"
    )


def test_a_layer_in_the_inner_problem_of_another():
    theta, a = normal(3, seed=1), torch.tensor(0.3, requires_grad=True)
    low = inner_layer()

    def upper(w: Tensor, a: Tensor) -> Tensor:
        return (low(w, a) - 1).square().sum() + w.square().sum() / 2

    def descent(theta: Tensor, a: Tensor) -> Tensor:
        """Newton's steps with a Hessian by differences of the layer's own gradients."""
        w = theta.clone()
        for _ in range(8):
            with torch.enable_grad():
                at = w.detach().requires_grad_()
                value = upper(at, a) + prox(at, theta, LAM)
                (slope,) = grad(value, at, create_graph=True)
                hessian = torch.stack([grad(s, at, retain_graph=True)[0] for s in slope])
            w = (at - torch.linalg.solve(hessian, slope)).detach()
        return w

    solve = ig.implicit(
        descent, ig.proximal(upper, LAM), linear_solver=ig.CG(rtol=1e-12), on_failure="raise"
    )

    def outer(theta: Tensor, a: Tensor) -> Tensor:
        return torch.sin(solve(theta, a)).sum()

    with untouched(theta, a):
        found = grad(outer(theta, a), (theta, a))
    near([found[0]], [numerical(lambda t: outer(t, a), theta.detach())], 1e-7)
    near([found[1]], [numerical(lambda s: outer(theta, s), a.detach())], 1e-7)
    # products by differences evaluate the inner layer again, within backward
    rough = ig.implicit(
        descent, ig.proximal(upper, LAM), curvature="finite_difference", on_failure="ignore"
    )
    near(grad(torch.sin(rough(theta, a)).sum(), (theta, a)), found, 1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_a_layer_in_the_loss_of_an_imaml_learner(style):
    model = nn.Linear(3, 1, bias=False)
    low, (x, y) = inner_layer(), batch()
    a = torch.tensor(0.3, requires_grad=True)
    maml = wrapped(model, lam=5.0, lr=0.02)
    weight = model.weight.detach().clone()

    def criterion(w: Tensor, a: Tensor) -> Tensor:
        return mse_loss(low((x @ w.T), a), y)

    learner = maml.clone()
    if style == "closure":
        learner.adapt(lambda: criterion(learner.weight, a), steps=5)
    else:
        learner.adapt(criterion(learner.weight, a))
    at = weight if style == "tensor" else learner.weight.detach()
    v = normal(1, 3, seed=6, grad=False)
    found = grad(learner.weight, (model.weight, a), v)

    def slope(w: Tensor, a: Tensor) -> Tensor:
        w, a = w.detach().requires_grad_(), a.detach()
        return grad(criterion(w, a), w)[0].detach()

    directions = 1e-6 * torch.eye(3)
    hessian = torch.stack(
        [(slope(at + d, a) - slope(at - d, a)).flatten() / 2e-6 for d in directions[:, None]]
    )
    u = torch.linalg.solve(hessian + 5.0 * torch.eye(3), v.flatten())
    by_a = (slope(at, a + 1e-6) - slope(at, a - 1e-6)).flatten() / 2e-6
    near([found[0]], [5.0 * u], 1e-7)
    near([found[1]], [-by_a @ u], 1e-6)


# ---------------------------------------------------------------- threads, and backward in backward


def test_threads_share_a_module_in_the_condition():
    """Its buffers, and torch's choice of attention kernels, are the user's again afterwards."""
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).requires_grad_(False).train()
    monitor = ig.Monitor()
    condition = ig.proximal(lambda phi, X: (norm(X) @ phi).square().sum(), 30.0)
    solve = ig.implicit(lambda t, X: t * 0.9, condition, monitor=monitor, on_failure="ignore")
    tasks = [(normal(3, seed=i), normal(6, 3, seed=20 + i, grad=False)) for i in range(8)]
    expected = [grad(solve(*task).sum(), task[0])[0] for task in tasks]
    monitor.clear()

    def work(i: int) -> list[Tensor]:
        return [grad(solve(*tasks[i]).sum(), tasks[i][0])[0] for _ in range(15)]

    with untouched(norm):
        found = in_threads(work)
    for each, one in zip(found, expected, strict=True):
        same(each, [one] * 15)
    assert len(monitor.reports) == 8 * 15


@pytest.mark.parametrize("style", STYLES)
def test_threads_share_the_model_of_their_learners(style):
    model = network().eval()
    model.requires_grad_(True)
    maml, tasks = wrapped(model), [batch(3 * i) for i in range(8)]
    expected = [outer_gradient(maml, style, task) for task in tasks]
    with untouched(model):
        found = in_threads(lambda i: [outer_gradient(maml, style, tasks[i]) for _ in range(4)])
    for each, one in zip(found, expected, strict=True):
        for again in each:
            same(again, one)


@pytest.mark.parametrize("style", STYLES)
def test_threads_go_backward_through_the_same_learner(style):
    """The product around its weights shuts them for one backward pass, not for the others."""
    encoder, model = nn.Linear(3, 3), nn.Linear(3, 1)
    x, y = batch()
    maml = wrapped(model)
    learner = maml.clone()
    for _ in range(2):
        features = torch.tanh(encoder(x))  # captured: its path crosses the learner's weights
        if style == "tensor":
            learner.adapt(mse_loss(learner(features), y))
        else:
            learner.adapt(lambda f=features: mse_loss(learner(f), y))
    parameters = [*model.parameters(), *encoder.parameters()]
    outer = mse_loss(learner(torch.tanh(encoder(x + 1))), y)
    theta, X = arguments()
    phi = layer()(theta, X)

    def work(_: int = 0) -> list[Any]:
        return [
            (
                *grad(outer, parameters, retain_graph=True, allow_unused=True),
                *grad(phi.sum(), (theta, X), retain_graph=True),
            )
            for _ in range(30)
        ]

    expected = work()[0]
    with untouched(encoder, model, theta, X, learner.module):
        found = in_threads(work)
    for each in found:
        for again in each:
            assert not any(g is None for g in again)
            same(again, expected)
    same(work()[0], expected)


class Reentrant(torch.autograd.Function):
    """The identity, whose backward pass takes another backward pass on its way."""

    @staticmethod
    def forward(ctx: Any, within: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.within = within
        return x.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[None, Tensor]:
        return None, ctx.within(v)


def test_backward_within_backward():
    theta, X = arguments()
    solve, deep = layer(), 70  # torch moves to other threads beyond a depth of 60
    expected = grad(solve(theta, X).sum(), theta)[0]

    def within(v: Tensor, depth: int = deep) -> Tensor:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            if depth == 0:
                value = solve(leaf, X.detach())
            else:
                value = Reentrant.apply(lambda v: within(v, depth - 1), leaf)
        return grad(value, leaf, v)[0]

    assert torch.equal(within(torch.ones(3)), expected)
    assert torch.equal(grad(Reentrant.apply(within, theta).sum(), theta)[0], expected)


# ---------------------------------------------------------------- compilers


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before; warnings of torch's own tracing are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_callers_get_the_same_numbers(backend, fresh_dynamo):
    theta, X = arguments()
    monitor = ig.Monitor()
    solve = layer(monitor=monitor)

    def caller(theta: Tensor, X: Tensor) -> Tensor:
        hidden = torch.sin(theta * 1.0) + theta - torch.sin(theta)
        return (solve(hidden, X) * 3.0).square().sum() + X.sum()

    expected = grad(caller(theta, X), (theta, X))
    compiled = torch.compile(caller, backend=backend)
    for _ in range(2):
        near(grad(compiled(theta, X), (theta, X)), expected, 1e-12)
        assert monitor.last.curvature == "hessian"  # of what was not compiled with the rest


def test_compiled_tasks_and_outer_losses_of_a_learner(fresh_dynamo):
    model = nn.Linear(3, 1)
    maml, (x, y) = wrapped(model), batch()
    task = torch.compile(lambda x: mse_loss(adapted(maml, "closure")(x), y), backend="aot_eager")
    eager = mse_loss(adapted(maml, "closure")(x + 1), y)
    parameters = list(model.parameters())
    near(grad(task(x + 1), parameters), grad(eager, parameters), 1e-12)
    outer = torch.compile(lambda w, b: mse_loss(x @ w.T + b, y), backend="aot_eager")
    found = []
    for criterion in (outer, lambda w, b: mse_loss(x @ w.T + b, y)):
        learner = adapted(maml, "tensor")
        found.append(grad(criterion(learner.weight, learner.bias), list(model.parameters())))
    near(*found, 1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_a_compiled_inner_loss_is_not_taken_for_linear(style, fresh_dynamo):
    """torch gives what it compiled a second derivative of 0, without a word."""
    x, y = batch()
    criterion = torch.compile(
        lambda w, b: mse_loss(torch.tanh(x @ w.T + b), y), backend="aot_eager"
    )
    model = nn.Linear(3, 1)
    found = []
    for function in (criterion, lambda w, b: mse_loss(torch.tanh(x @ w.T + b), y)):
        maml = wrapped(model, lam=2.0, on_failure="ignore")
        learner = maml.clone()
        if style == "tensor":
            learner.adapt(function(learner.weight, learner.bias))
        else:
            learner.adapt(lambda f=function, k=learner: f(k.weight, k.bias), steps=3)
        if style == "tensor" and function is criterion:
            with pytest.raises(ig.GraphError, match="no second derivative"):
                grad(learner.weight.sum(), list(model.parameters()))
            return
        found.append(grad(learner.weight.sum(), list(model.parameters())))
    near(*found, 1e-8)


def test_a_compiled_part_of_an_objective_that_a_training_uses_too(fresh_dynamo):
    """Its graph may serve one backward pass only, and here it serves none."""
    theta, X, y = normal(3, seed=1), normal(6, 3, seed=2, grad=False), normal(6, seed=3, grad=False)
    compiled = torch.compile(lambda z, y: mse_loss(z.tanh(), y), backend="aot_eager")
    found = []
    for criterion in (compiled, lambda z, y: mse_loss(z.tanh(), y)):

        def objective(w: Tensor, theta: Tensor, criterion: Any = criterion) -> Tensor:
            return criterion(X @ w, y) + 0.1 * (w - theta).square().sum()

        def train(theta: Tensor, objective: Any = objective) -> Tensor:
            w = torch.zeros_like(theta, requires_grad=True)
            for _ in range(300):
                (slope,) = torch.autograd.grad(objective(w, theta), w)
                w = (w - 0.5 * slope).detach().requires_grad_()
            return w.detach()

        phi = ig.implicit(train, ig.argmin(objective))(theta)
        found.append(grad(phi.square().sum(), theta))
    near(*found, 1e-6)


# ---------------------------------------------------------------- autocast


def test_a_training_within_one_autocast_trains():
    """Its cache has a weight as it was cast first, for as long as autocast goes on."""
    x = torch.ones(2, 3, dtype=torch.float32)

    def train(theta: Tensor) -> Tensor:
        w = theta.detach().clone().requires_grad_()
        for _ in range(20):
            ((x @ w).float() - 1).square().mean().backward()
            with torch.no_grad():
                w -= 0.1 * w.grad
            w.grad = None
        return w.detach()

    solve = ig.implicit(train, ig.argmin(lambda w, theta: (w.sum() - 1).square() + 0 * theta.sum()))
    with torch.autocast("cpu", torch.bfloat16):
        phi = solve(torch.zeros(3, 1, dtype=torch.float32, requires_grad=True))
        assert torch.is_autocast_cache_enabled()
    assert abs(phi.sum() - 1) < 0.02


# ---------------------------------------------------------------- copies


def test_copies_of_a_wrapped_solver_give_the_same_gradients():
    theta, X = arguments()
    monitor = ig.Monitor()
    solve = layer(monitor=monitor, polish=1)
    expected = grad(solve(theta, X).sum(), (theta, X))
    for other in (pickle.loads(pickle.dumps(solve)), copy.deepcopy(solve), copy.copy(solve)):
        same(grad(other(theta, X).sum(), (theta, X)), expected)
        assert repr(other) == repr(solve) and other.__name__ == "solver"
    assert len(monitor.reports) == 2  # deep copies have a monitor of their own
    minimiser = ig.implicit(
        ig.solvers.NewtonCG(tol=1e-12), ig.proximal(loss, LAM), linear_solver=ig.CG(rtol=1e-13)
    )
    near(grad(pickle.loads(pickle.dumps(minimiser))(theta, X).sum(), (theta, X)), expected, 1e-9)


def test_a_state_dict_goes_through_a_file():
    model = network().train()
    lam = nn.Parameter(torch.tensor(50.0))
    maml = ig.imaml(model, lr=0.005, lam=lam, on_failure="ignore")
    x, y = batch()
    learner = adapted(maml, "tensor")
    mse_loss(learner(x), y).backward()
    torch.optim.SGD(maml.parameters(), lr=0.1).step()
    stream = io.BytesIO()
    torch.save(maml.state_dict(), stream)
    stream.seek(0)
    other = ig.imaml(
        network(),
        lr=0.005,
        lam=nn.Parameter(torch.tensor(1.0)),
        on_failure="ignore",
    )
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert other.state_dict().keys() == maml.state_dict().keys()
    same(other.state_dict().values(), maml.state_dict().values())
    maml.zero_grad()
    for each in (maml, other):
        mse_loss(adapted(each, "tensor")(x), y).backward()
    same([p.grad for p in other.parameters()], [p.grad for p in maml.parameters()])


# ---------------------------------------------------------------- Ctrl-C


class Interrupt:
    """Raises KeyboardInterrupt at the k-th call."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted_layer(interrupt: Interrupt, where: str) -> tuple[Any, nn.Module]:
    """A layer with a module in its condition that is interrupted in one place."""
    module = network().train()

    def condition(phi: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(module, phi, (x,))
        if where == "in F":
            interrupt()
        if where == "in a product" and output.requires_grad:
            output.register_hook(interrupt)
        return mse_loss(nn.functional.dropout(output, 0.2), y)

    def solve(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        torch.rand(2)
        if where == "in the solver":
            interrupt()
        return {k: 0.9 * t for k, t in theta.items()}

    layer = ig.implicit(
        solve,
        ig.proximal(condition, 100.0),
        linear_solver=ig.CG(maxiter=6),
        on_failure="ignore",
    )
    return layer, module


@pytest.mark.parametrize("where", ["in the solver", "in F", "in a product"])
def test_an_interrupted_layer_works_afterwards(where):
    interrupt = Interrupt()
    solve, module = interrupted_layer(interrupt, where)
    theta = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    x, y = batch()
    leaves = list(theta.values())

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        return grad(sum(t.sum() for t in solve(theta, x, y).values()), leaves)

    expected, interrupted = gradients(), 0
    for k in range(1, 9 if where == "in a product" else 2):
        torch.manual_seed(2)
        interrupt.left = 0
        if where == "in a product":
            phi = solve(theta, x, y)
            with untouched(module, theta, x, y):
                interrupt.left = k
                try:
                    grad(sum(t.sum() for t in phi.values()), leaves)
                except KeyboardInterrupt:
                    interrupted += 1
        else:
            state = torch.get_rng_state()
            torch.rand(2)  # the solver's own draws remain drawn
            with untouched(module, theta, x, y):
                torch.set_rng_state(state)
                interrupt.left = 1
                with pytest.raises(KeyboardInterrupt):
                    solve(theta, x, y)
                interrupted += 1
        interrupt.left = 0
        same(gradients(), expected)
    assert interrupted == (7 if where == "in a product" else 1)


@pytest.mark.parametrize("where", ["in the closure", "in the last closure", "in a product"])
def test_an_interrupted_learner_works_afterwards(where):
    model, interrupt = network().eval(), Interrupt()
    maml, (x, y) = wrapped(model, linear_solver=ig.CG(maxiter=6)), batch()

    def criterion(learner: Any) -> Tensor:
        if "closure" in where:
            interrupt()
        output = learner(x)
        if where == "in a product" and output.requires_grad:
            output.register_hook(interrupt)
        return mse_loss(output, y)

    def gradients(learner: Any, weights: int = 0) -> tuple[Tensor, ...]:
        return grad(
            sum(p.square().sum() for p in learner.parameters()),
            list(model.parameters()),
            retain_graph=True,
        )

    def ready() -> Any:
        learner = maml.clone()
        learner.adapt(lambda: criterion(learner), steps=3)
        return learner

    expected = gradients(ready())
    learner = maml.clone()
    if "closure" in where:
        with untouched(model, learner.module):
            interrupt.left = 2 if where == "in the closure" else 4
            with pytest.raises(KeyboardInterrupt):
                learner.adapt(lambda: criterion(learner), steps=3)
        interrupt.left = 0
        learner.adapt(lambda: criterion(learner), steps=3)
        same(gradients(learner), expected)
        return
    learner = ready()
    for k in range(1, 6):
        with untouched(model, learner.module):
            interrupt.left = k
            with pytest.raises(KeyboardInterrupt):
                gradients(learner)
            interrupt.left = 0
            same(gradients(learner), expected)


# ---------------------------------------------------------------- many cycles


def live_bytes() -> int:
    """What the tensors alive take, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):  # isinstance would ask lazy modules, which warn
            with contextlib.suppress(NotImplementedError):  # vmap's have none of their own
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


CYCLES = 10_000 if LONG else 200


@pytest.mark.parametrize("style", [*STYLES, "implicit"])
def test_memory_stays_flat_over_many_cycles(style):
    """Without the garbage collector's help: a cycle through a graph would never be found."""
    model = nn.Linear(2, 1)
    maml = wrapped(model, lam=2.0, lr=0.1, linear_solver=ig.CG(maxiter=2))
    x, y = normal(4, 2, grad=False), normal(4, 1, seed=1, grad=False)
    condition = ig.proximal(lambda w, x: (x @ w).square().sum(), 2.0)
    solve = ig.implicit(
        lambda w, x: w / 2, condition, linear_solver=ig.CG(maxiter=2), on_failure="ignore"
    )
    theta, last = normal(2), None

    def cycle() -> Any:
        if style == "implicit":
            phi = solve(theta, x)
            phi.sum().backward()
            return weakref.ref(phi)
        learner = maml.clone()
        if style == "closure":
            learner.adapt(lambda: mse_loss(learner(x), y))
        else:
            learner.adapt(mse_loss(learner(x), y))
        mse_loss(learner(x), y).backward()
        return weakref.ref(learner.weight)

    for _ in range(50):
        cycle()
    gc.collect()
    before = live_bytes()  # takes memory itself, hence the cycles between this and the next line
    for _ in range(50 + CYCLES // 10):
        cycle()
    gc.collect()
    resident = resident_bytes()
    for _ in range(CYCLES):
        last = cycle()
    gc.collect()
    grown = resident_bytes() - resident
    assert last() is None
    assert live_bytes() - before < 10_000
    assert grown < 1_000_000


def test_without_a_compiler_in_the_process_nothing_is_kept_from_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "disable", None)
    assert uncompiled(lambda x, y=1: x + y)(1, y=2) == 3


def test_the_random_state_of_every_device_comes_back(monkeypatch):
    states = {0: "state of 0", 2: "state of 2"}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    restored = {}
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, i: restored.update({i: s}))
    devices = {torch.device("cpu"), torch.device("cuda"), torch.device("cuda:2")}
    state, expected = RandomState(devices), torch.rand(3)
    state.restore()
    assert restored == states and torch.equal(torch.rand(3), expected)
