"""Sums over the batches of two processes: each has the gradient that one has on all the data."""

import datetime
import functools
import itertools
import os
import re
import sys
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from batched_problem import (
    BATCHES,
    NEWTON,
    START,
    Square,
    SquareOnce,
    X,
    Y,
    arguments,
    misfit,
    net,
    outer,
    penalty,
    trained,
    whole,
)
from forking import start_method
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import implicit_grad as ig
from implicit_grad._conditions.processes import _bits

if not dist.is_available() or sys.platform == "win32":
    pytest.skip("torch.distributed with gloo", allow_module_level=True)


# ---------------------------------------------------------------- two processes


def serve(rank, file, pipe):
    """Call what comes through the pipe, with a group of its own each time, and send what it gives.

    An exception is sent as its class and what it says.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning)  # torch's own
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    while True:
        function, arguments, timeout = pipe.recv()
        group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
        try:
            found = function(group, *arguments)
        except Exception as error:
            found = type(error), str(error)
        pipe.send(found)


class Pair:
    """Two processes that run functions side by side, forked after this file's imports."""

    def __init__(self, folder):
        self._folder, self._names = folder, itertools.count()
        self._processes, self._pipes = [], []

    def __call__(self, function, *arguments, timeout=20):
        """What the function returns, or raises, in each."""
        if not self._processes or not all(p.is_alive() for p in self._processes):
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments, timeout))
        return [self._answer(pipe, timeout + 30) for pipe in self._pipes]

    def _answer(self, pipe, timeout):
        try:
            return pipe.recv() if pipe.poll(timeout) else "hangs"
        except EOFError:
            return "lost"

    def _start(self):
        self.stop()
        context = torch.multiprocessing.get_context(start_method(__name__))
        file = self._folder / f"rendezvous{next(self._names)}"
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, str(file), there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    both = Pair(tmp_path_factory.mktemp("processes"))
    yield both
    both.stop()


# ---------------------------------------------------------------- a problem


def mine(group):
    """This process's batches: three of five, or two."""
    return BATCHES[:3] if dist.get_rank(group) == 0 else BATCHES[3:]


def alone(group=None, solver=trained, outer=outer, condition=None, **options):
    args = arguments()
    w = ig.implicit(solver, condition or ig.argmin(whole), **options)(*args)
    return torch.stack(torch.autograd.grad(outer(w), args))


def shared(group, batches=None, **options):
    batches = mine(group) if batches is None else batches
    return ig.argmin(misfit, batches=batches, regularizer=penalty, group=group, **options)


def together(group, keep=0, **options):
    return alone(condition=shared(group, keep=keep), **options)


def same(found, expected, **tolerances):
    """Both processes have the same bits, and what is expected."""
    torch.testing.assert_close(found[0], expected, **tolerances)
    assert torch.equal(found[0], found[1])


LINEAR_SOLVERS = (
    ig.CG(rtol=1e-11),
    ig.CG(maxiter=3),
    ig.CG(preconditioner=ig.Nystrom(rank=3), rtol=1e-11),
    ig.MINRES(rtol=1e-11),
    ig.Exact(),
    ig.GMRES(rtol=1e-11),
    ig.EarlyStopped(steps=50, lr=0.02),
)


def with_each_solver(group, make):
    found = []
    for linear_solver in LINEAR_SOLVERS:
        found.append(make(group, linear_solver=linear_solver, on_failure="ignore"))
    return torch.stack(found)


def test_the_gradient_is_that_of_one_process_on_all_the_data(pair):
    same(pair(with_each_solver, together), with_each_solver(None, alone))


def with_model(group, model, loss, **options):
    """The misfit as a loss of a model's outputs; the penalty counts once."""
    if group is None:
        return ig.argmin(
            lambda out, scale, lam: loss(out[0], Y, scale) + penalty(out[1], scale, lam),
            model=lambda w, scale, lam: (model(w, X), w),
        )
    return ig.argmin(
        lambda out, batch, scale, lam: loss(out, batch[1], scale),
        model=lambda w, batch, scale, lam: model(w, batch[0]),
        batches=mine(group),
        regularizer=penalty,
        group=group,
        **options,
    )


def gauss_newton(group):
    condition = with_model(group, net, lambda out, y, scale: (scale * (out - y) ** 2).sum())
    return alone(condition=condition, curvature="gauss_newton")


def second_derivatives(group, times=1.0):
    args = arguments()
    condition = ig.argmin(whole) if group is None else shared(group)
    w = ig.implicit(trained, condition)(*args)
    first = torch.autograd.grad(times * outer(w), args, create_graph=True)
    return torch.stack(torch.autograd.grad(first[0] * 2 + first[1] ** 2, args))


def nearby(objective):
    """Not far from the minimum: on the way there, each product would take two messages."""
    return {k: v + 0.01 for k, v in NEWTON.minimize(objective, START).items()}


def proximal(group):
    theta = {k: v.clone().requires_grad_() for k, v in START.items()}
    strength = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    args = arguments()
    if group is None:
        condition = ig.proximal(whole, strength)
    else:
        condition = ig.proximal(
            misfit, strength, batches=mine(group), regularizer=penalty, group=group
        )
    start = nearby(
        lambda w: whole(w, *args) + 0.75 * sum((w[k] - START[k]).square().sum() for k in w)
    )
    w = ig.implicit(NEWTON, condition, init=lambda *_: start)(theta, *args)
    grads = torch.autograd.grad(outer(w), (*theta.values(), *args, strength))
    return torch.cat([g.flatten() for g in grads])


def captured(group):
    """Features and a penalty that functions refer to; the solver is a minimiser of ours."""
    torch.manual_seed(4)
    features = nn.Linear(4, 4).double()
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(w, batch, lam):
        return misfit(w, (features(batch[0]), batch[1]), 1.0, lam)

    def regularizer(w, lam):
        return weight * penalty(w, None, lam)

    def objective(w, lam):
        return loss(w, (X, Y), lam) + regularizer(w, lam)

    if group is None:
        condition = ig.argmin(objective)
    else:
        condition = ig.argmin(loss, batches=mine(group), regularizer=regularizer, group=group)
    lam = arguments()[1]
    start = nearby(lambda w: objective(w, lam))
    w = ig.implicit(NEWTON, condition, init=lambda lam: start)(lam)
    grads = torch.autograd.grad(outer(w), (lam, weight, *features.parameters()))
    return torch.cat([g.flatten() for g in grads])


def polished(group):
    def rough(scale, lam):
        return {k: v + 1e-2 for k, v in trained(scale, lam).items()}

    condition = ig.argmin(whole) if group is None else shared(group)
    return alone(solver=rough, condition=condition, polish=1)


def certified(group):
    def rough(scale, lam):
        return {k: v + 1e-3 for k, v in trained(scale, lam).items()}

    condition = ig.argmin(whole) if group is None else shared(group)
    found = ig.certify(ig.implicit(rough, condition), arguments(), outer)
    return torch.stack((*found.gradients, *found.corrected, torch.tensor(found.relative_error)))


def influence(group):
    """Weights of all points are an argument, and a batch says which of them are its own."""
    weights = torch.ones(len(X), dtype=torch.float64)

    def loss(w, batch, weights):
        x, y, i = batch
        return (weights[i] * (x @ w - y) ** 2).sum()

    def regularizer(w, weights):
        return w.square().sum()

    def fit(weights):
        matrix = X.T @ (weights[:, None] * X) + torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(matrix, X.T @ (weights * Y))

    batches = list(zip(X.split(5), Y.split(5), torch.arange(23).split(5), strict=True))
    if group is None:
        condition = ig.argmin(lambda w, weights: loss(w, (X, Y, range(23)), weights) + w @ w)
    else:
        batches = batches[:3] if dist.get_rank(group) == 0 else batches[3:]
        condition = ig.argmin(loss, batches=batches, regularizer=regularizer, group=group)
    found = ig.influence(
        ig.implicit(fit, condition), weights, lambda w: w.square().sum(), leave_one_out=[2, 20]
    )
    return torch.stack((found.removal, found.leverage.nan_to_num()))


def warm(group):
    found = []
    condition = ig.argmin(whole) if group is None else shared(group)
    start = nearby(lambda w: whole(w, *arguments()))
    solve = ig.implicit(NEWTON, condition, init=lambda *_: start, warm_start=True)
    for shift in (0.0, 0.05):
        args = [a.detach().add(shift).requires_grad_() for a in arguments()]
        found.extend(torch.autograd.grad(outer(solve(*args)), args))
    return torch.stack(found)


WAYS = (
    functools.partial(together, keep=2),
    gauss_newton,
    second_derivatives,
    proximal,
    captured,
    polished,
    certified,
    influence,
    warm,
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: getattr(way, "__name__", "kept"))
def test_whatever_else_works_over_batches_works_over_processes(pair, way):
    expected = alone() if isinstance(way, functools.partial) else way(None)
    same(pair(way), expected, rtol=1e-6, atol=1e-8)


def differences(group):
    return together(group, curvature="finite_difference", on_failure="ignore")


def test_differences_of_gradients(pair):
    same(pair(differences), alone(), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- what only one process has


def of_any_strides(group):
    """What arrives at φ is one number for all elements; an argument skips every other one."""
    skipping = torch.tensor([0.7, 9.0, 1.3, 9.0], dtype=torch.float64)[::2].requires_grad_()

    def loss(w, batch, pair):
        return misfit(w, batch, *pair)

    def regularizer(w, pair):
        return penalty(w, *pair)

    if group is None:
        condition = ig.argmin(lambda w, pair: whole(w, *pair))
    else:
        condition = ig.argmin(loss, batches=mine(group), regularizer=regularizer, group=group)
    w = ig.implicit(lambda pair: trained(*pair), condition)(skipping)
    (found,) = torch.autograd.grad(sum(p.sum() for p in w.values()), skipping)
    return found


def test_tensors_may_have_any_strides(pair):
    same(pair(of_any_strides), of_any_strides(None))


def sparse(group):
    """An embedding's gradient arrives at φ, and data in rows and columns are an argument."""
    table, args = torch.eye(3, dtype=torch.float64).to_sparse(), arguments()

    def fitted(table, scale, lam):
        return trained(scale, lam)

    if group is None:
        condition = ig.argmin(lambda w, table, *a: whole(w, *a))
    else:
        condition = ig.argmin(
            lambda w, batch, table, *a: misfit(w, batch, *a),
            batches=mine(group),
            regularizer=lambda w, table, *a: penalty(w, *a),
            group=group,
        )
    w = ig.implicit(fitted, condition)(table, *args)
    seen = nn.functional.embedding(torch.tensor([0, 2]), w["a"], sparse=True)
    return torch.stack(torch.autograd.grad(seen.square().sum(), args))


def test_tensors_may_be_sparse(pair):
    same(pair(sparse), sparse(None))


def own_outer(group):
    """Each process has an outer loss of its own."""
    times = 1 + 2 * dist.get_rank(group)
    return alone(condition=shared(group), outer=lambda w: times * outer(w))


def test_outer_losses_are_averaged_as_data_parallel_training_does_it(pair):
    same(pair(own_outer), 2 * alone())


def second_derivatives_of_own_outer(group):
    return second_derivatives(group, times=1.0 + 2 * dist.get_rank(group))


def test_so_are_their_second_derivatives(pair):
    same(pair(second_derivatives_of_own_outer), second_derivatives(None, times=2.0))


def certified_with_own_outer(group):
    times = 1 + 2 * dist.get_rank(group)
    found = ig.certify(ig.implicit(trained, shared(group)), arguments(), lambda w: times * outer(w))
    return torch.stack(found.gradients)


def test_so_does_certify(pair):
    same(pair(certified_with_own_outer), 2 * alone())


def heard(group, rank, on_failure="ignore", steps=1):
    """A monitor on one process only, for a solution that is far from one."""
    monitor = ig.Monitor() if dist.get_rank(group) == rank else None
    start = {k: v + 0.3 for k, v in START.items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        alone(
            solver=lambda scale, lam: start,
            condition=shared(group),
            monitor=monitor,
            on_failure=on_failure if monitor else "ignore",
            linear_solver=ig.MINRES(maxiter=8),
        )
    return (monitor and (monitor.last.batches, monitor.last.inner_residual)), len(told)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_alone_may_listen(pair, rank):
    found = pair(heard, rank, "warn")
    (batches, residual), told = found[rank]
    assert (batches, told) == (5, 1)
    assert residual > 0
    assert found[1 - rank] == (None, 0)


class Squared(torch.autograd.Function):
    """x², of which torch finds out in a product only that there is no second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(ctx.saved_tensors[0], g)


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        return 2 * x * g

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("derivative for aten::odd is not implemented")


def odd_operation(group, square, rank):
    """Only one process's data go through it."""
    monitor = ig.Monitor()
    there = dist.get_rank(group) == rank

    def loss(w, batch, scale, lam):
        off = net(w, batch[0]) - batch[1]
        return (scale * (square.apply(off) if there else off**2)).sum()

    condition = ig.argmin(loss, batches=mine(group), regularizer=penalty, group=group)
    return alone(condition=condition, monitor=monitor), monitor.last.curvature


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("square", [Square, SquareOnce, Squared])
def test_products_that_are_wrong_or_missing_in_one_process_are_replaced_in_all(pair, square, rank):
    (first, kind), (second, other) = pair(odd_operation, square, rank)
    assert kind == other == "finite_difference"
    same((first, second), alone(), rtol=1e-6, atol=0)


def argument_of_one(group):
    """An argument that only the last batch reads, and one that nobody does."""
    bias, unread = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(w, batch, bias, unread):
        x, y = batch
        return ((net(w, x) - y - (bias if len(x) < 5 else 0)) ** 2).sum()

    def regularizer(w, bias, unread):
        return penalty(w, 1.0, 1.3)

    batches = BATCHES if group is None else mine(group)
    solution = NEWTON.minimize(lambda w: whole(w, 1.0, 1.3), START)
    condition = ig.argmin(loss, batches=batches, regularizer=regularizer, group=group)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        w = ig.implicit(lambda *_: solution, condition)(bias, unread)
    assert ["args[1]" in str(w.message) for w in told] == [True]
    return torch.stack(torch.autograd.grad(outer(w), (bias, unread)))


def test_arguments_that_only_one_process_reads(pair):
    same(pair(argument_of_one), argument_of_one(None))


# ---------------------------------------------------------------- messages


def messages(group):
    """How many numbers the messages of one product hold."""
    sent = []
    for name in ("all_reduce", "all_gather"):
        original = getattr(dist, name)

        def noted(*args, original=original, **kwargs):
            sent.append((args[0] if torch.is_tensor(args[0]) else args[1]).numel())
            return original(*args, **kwargs)

        setattr(dist, name, noted)

    def during(products):
        sent.clear()
        together(group, linear_solver=ig.CG(maxiter=products))
        return list(sent)

    try:
        fewer, more = during(3), during(4)
    finally:
        for name in ("all_reduce", "all_gather"):
            original = getattr(dist, name).__kwdefaults__["original"]
            setattr(dist, name, original)
    return more[: len(more) - len(fewer)] and sorted(
        size for size in set(more) for _ in range(more.count(size) - fewer.count(size))
    )


def test_a_product_is_one_message_of_the_size_of_phi_and_one_of_three_numbers(pair):
    size = sum(p.numel() for p in START.values())
    assert pair(messages) == [[3, size]] * 2


# ---------------------------------------------------------------- errors


def other_phi(group, rank):
    def solver(scale, lam):
        w = trained(scale, lam)
        return w if dist.get_rank(group) != rank else {**w, "b": w["b"] + 1e-12}

    return alone(solver=solver, condition=shared(group))


def other_shape(group, rank):
    width = 3 + (dist.get_rank(group) == rank)
    start = {"a": torch.ones(4, width).double(), "b": torch.ones(width).double()}
    return alone(solver=lambda scale, lam: start, condition=shared(group))


def other_argument(group, rank):
    lam = torch.tensor(1.3 + (dist.get_rank(group) == rank), requires_grad=True)
    return ig.implicit(trained, shared(group))(arguments()[0], lam.double())


def other_order(group, rank):
    """Weights of two samples, of which each process leaves one out."""
    out = torch.eye(5, dtype=torch.float64)[int(dist.get_rank(group) == rank)]
    solve = ig.implicit(lambda weights, scale, lam: trained(scale, lam), shared(group))
    return solve(1 - out, *arguments())


def other_gradients(group, rank):
    args = arguments() if dist.get_rank(group) == rank else [a.detach() for a in arguments()]
    return ig.implicit(trained, shared(group))(*args)


def no_gradients(group, rank):
    with torch.set_grad_enabled(dist.get_rank(group) == rank):
        return ig.implicit(trained, shared(group))(*arguments())


def other_name(group, rank):
    """Containers that differ in a key."""
    scale, lam = arguments()
    given = {"scale" if dist.get_rank(group) == rank else "rate": scale}
    solve = ig.implicit(lambda given, lam: trained(*given.values(), lam), shared(group))
    return solve(given, lam)


def other_number(group, rank):
    return ig.implicit(trained, shared(group))(0.7 if dist.get_rank(group) == rank else 0.8, 1.3)


def other_budget(group, rank):
    maxiter = 3 + (dist.get_rank(group) == rank)
    return together(group, linear_solver=ig.CG(maxiter=maxiter))


def other_curvature(group, rank):
    odd = dist.get_rank(group) == rank
    return together(group, curvature="finite_difference" if odd else "hessian")


def other_check(group, rank):
    return together(group, check="never" if dist.get_rank(group) == rank else "once")


def other_vector(group, rank):
    """A preconditioner that is another one in one process."""
    scale = 2.0 + (torch.arange(15).double() if dist.get_rank(group) == rank else 0)
    return together(group, linear_solver=ig.CG(preconditioner=lambda r: r / scale))


def other_answer(group, rank):
    odd = dist.get_rank(group) == rank
    return together(group, on_failure="raise" if odd else "warn")


def failing(group, rank):
    calls = itertools.count()

    def loss(w, batch, scale, lam):
        if dist.get_rank(group) == rank and next(calls) > 7:
            raise ValueError("a file that is gone")
        return misfit(w, batch, scale, lam)

    condition = ig.argmin(loss, batches=mine(group), regularizer=penalty, group=group)
    return alone(condition=condition, check="never")


def without_batches(group, rank):
    return alone(condition=shared(group, iter_anew() if dist.get_rank(group) == rank else None))


class iter_anew:
    def __iter__(self):
        return iter(())


def changing(group, rank):
    noise = itertools.count() if dist.get_rank(group) == rank else itertools.repeat(0)

    class Loader:
        def __iter__(self):
            return ((x, y + 0.1 * next(noise)) for x, y in mine(group))

    return alone(condition=shared(group, Loader()), check="never")


ERRORS = (
    (other_phi, r"phi is not .*: a float64 tensor of shape \(3,\) differs .*\.broadcast"),
    (other_shape, r"do not do the same: .*\[4, [34]\].*, and process 1 at .*\[4, [34]\]"),
    (other_argument, r"an argument is not the same .*belong into batches"),
    (other_order, r"an argument is not the same .*belong into batches"),
    (other_gradients, r"do not do the same: .* with gradients of \[(0, 1)?\], and"),
    (no_gradients, r"do not do the same: .* without gradients.*same calls"),
    (other_name, r"do not do the same: process 0 is at a call with 2 arguments"),
    (other_number, r"do not do the same: .*0\.[78], 1\.3"),
    (other_budget, r"a vector is not the same|do not do the same"),
    (other_curvature, "do not do the same"),
    (other_check, "do not do the same"),
    (other_vector, "a vector is not the same .*preconditioner"),
    (other_answer, "is for all processes of a group, or for none"),
    (failing, "a file that is gone"),
    (without_batches, "batches gave no batch"),
    (changing, "the sum over batches is another one"),
)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("way", "expected"), ERRORS, ids=lambda x: getattr(x, "__name__", ""))
def test_processes_that_differ_or_fail_end_in_an_error_in_all(pair, way, expected, rank):
    before = time.monotonic()
    found = pair(way, rank)
    assert time.monotonic() - before < 20  # nobody waits for a timeout
    for kind, said in found:
        assert issubclass(kind, ig.ImplicitGradError)
        assert re.search(expected, said), said
    if way in (failing, without_batches, changing):
        assert found[1 - rank][1].startswith(f"process {rank} of the group failed: ")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([torch.tensor([1.0, 0.0, 0.0, 1.0])], [torch.tensor([0.0, 1.0, 1.0, 0.0])]),
        ([torch.arange(9000.0)], [torch.arange(9000.0).roll(2**12)]),
        ([torch.zeros(9000)], [torch.zeros(9000).index_fill(0, torch.tensor(7777), -0.0)]),
        ([torch.zeros(3).bool(), torch.ones(3)], [torch.ones(3), torch.zeros(3).bool()]),
        (list(torch.tensor([1.0, 0.0, 0.0, 1.0])), list(torch.tensor([0.0, 1.0, 1.0, 0.0]))),
    ],
    ids=["places", "many places", "a sign", "tensors", "numbers"],
)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.complex128], ids=str
)
def test_bits_tell_places_apart(one, other, dtype):
    sides = [[t if t.dtype is torch.bool else t.to(dtype) for t in side] for side in (one, other)]
    assert _bits(sides[0]) == _bits([t.clone() for t in sides[0]]) != _bits(sides[1])


def no_backward(group, rank):
    w = ig.implicit(trained, shared(group))(*arguments())
    if dist.get_rank(group) == rank:
        return "nothing"
    outer(w).backward()
    return "a gradient"


def test_a_process_that_takes_no_part_in_a_backward_pass_is_told_of(pair):
    found = pair(no_backward, 1, timeout=1)
    assert found[1] == "nothing"
    assert issubclass(found[0][0], ig.GraphError)
    assert "process 0 of 2 waited for the others in vain" in found[0][1]


# ---------------------------------------------------------------- data-parallel training


def layers():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)
    ).double()


def fit(module, batch, decay):
    x, y = batch
    return (module(x)[:, 0] - y).square().sum()


def decay_of(module, decay):
    return decay * sum(p.square().sum() for p in module.parameters())


def in_parallel(module, decay, group, batches):
    """Train as one would: a module in DistributedDataParallel, over own batches."""
    parallel = DistributedDataParallel(module, process_group=group)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
    for _ in range(2):
        for batch in batches[:2]:
            optimizer.zero_grad()
            (fit(parallel, batch, decay) + decay_of(module, decay)).backward()
            optimizer.step()
    return parallel.eval()


def data_parallel(group):
    module, decay = layers(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    monitor = ig.Monitor()
    condition = ig.argmin(fit, batches=mine(group), regularizer=decay_of, group=group)
    solve = ig.implicit(
        lambda module, decay: in_parallel(module, decay, group, mine(group)),
        condition,
        curvature="gauss_newton",
        monitor=monitor,
        on_failure="ignore",
    )
    trained = solve(module, decay)
    assert type(trained) is nn.Sequential
    assert trained.state_dict().keys() == module.state_dict().keys()
    assert not trained.training
    (gradient,) = torch.autograd.grad(outer(dict(trained.named_parameters())), decay)
    return gradient, {k: v.detach() for k, v in trained.state_dict().items()}


def test_a_module_trained_in_parallel(pair):
    (first, weights), (second, others) = pair(data_parallel)
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    # each process's batches are normalised as its own training left the statistics
    states = (
        {k: v for k, v in weights.items() if "running" in k},
        {k: v for k, v in others.items() if "running" in k},
    )
    assert not torch.equal(states[0]["1.running_mean"], states[1]["1.running_mean"])
    module = layers().eval()
    batches = [(states[i > 2], x, y) for i, (x, y) in enumerate(BATCHES)]

    def predict(w, batch, decay):
        return torch.func.functional_call(module, {**w, **batch[0]}, (batch[1],))[:, 0]

    phi = {k: weights[k] for k, _ in layers().named_parameters()}
    solve = ig.implicit(
        lambda decay: phi,
        ig.argmin(
            lambda out, batch, decay: (out - batch[2]).square().sum(),
            model=predict,
            batches=batches,
            regularizer=lambda w, decay: decay * sum(p.square().sum() for p in w.values()),
        ),
        curvature="gauss_newton",
        on_failure="ignore",
    )
    (expected,) = torch.autograd.grad(outer(solve(decay)), decay)
    same((first, second), expected)


def parallel_argument(group):
    module = DistributedDataParallel(layers(), process_group=group)
    return ig.implicit(lambda module: module, shared(group))(module)


def test_a_parallel_module_is_no_argument(pair):
    for kind, said in pair(parallel_argument):
        assert issubclass(kind, ig.InvalidArgumentError)
        assert "pass its .module" in said


def in_shards(group):
    """φ in shards, without a sum of ours: by the operations of DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    x, y = (distribute_tensor(t, mesh, [Replicate()]) for t in (X, Y))
    a, b = (distribute_tensor(t, mesh, [Shard(0)]) for t in ridge(0.3).split(2))
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def objective(w, lam):
        off = x[:, :2] @ w[0] + x[:, 2:] @ w[1] - y
        return off.square().sum() + lam * (w[0].square().sum() + w[1].square().sum())

    w = ig.implicit(lambda lam: [a, b], ig.argmin(objective))(lam)
    (w[0].square().sum() + w[1].square().sum()).backward()
    return lam.grad.full_tensor()


def ridge(lam):
    return torch.linalg.solve(X.T @ X + lam * torch.eye(4, dtype=torch.float64), X.T @ Y)


def test_phi_may_be_tensors_in_shards(pair):
    tensor = pytest.importorskip("torch.distributed.tensor", exc_type=ImportError)
    if not hasattr(tensor, "DTensor"):
        pytest.skip("public since torch 2.5")
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ridge(lam).square().sum(), lam)
    same(pair(in_shards), expected)


# ---------------------------------------------------------------- one process


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one(group):
    condition = ig.argmin(misfit, batches=BATCHES, regularizer=penalty, group=group)
    torch.testing.assert_close(alone(condition=condition), alone())


def test_what_does_not_go_with_a_group_is_refused(group):
    with pytest.raises(ig.InvalidArgumentError, match=r"group must be .* got a list"):
        ig.argmin(misfit, batches=BATCHES, group=[0, 1])
    with pytest.raises(ig.InvalidArgumentError, match=r"proximal: group goes with batches="):
        ig.proximal(misfit, 1.0, group=group)
    others = dist.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ig.InvalidArgumentError, match=r"is a member of.* got that of others"):
        ig.argmin(misfit, batches=BATCHES, group=others)
    solve, args = ig.implicit(trained, shared(group)), arguments()
    with pytest.raises(ig.InvalidArgumentError, match=r"group does not go with torch\.func"):
        torch.func.grad(lambda a, b: outer(solve(a, b)))(*(a.detach() for a in args))
    b, eye = solve(*args)["b"], torch.eye(3, dtype=torch.float64)
    with pytest.raises(ig.InvalidArgumentError, match=r"group does not go with torch\.func"):
        torch.func.vmap(lambda v: torch.autograd.grad(b, args, v, retain_graph=True))(eye)
    with pytest.raises(ig.GraphError, match=r"is_grads_batched=True"):
        torch.autograd.grad(b, args, eye, is_grads_batched=True)


# ---------------------------------------------------------------- the last: a process is lost


def lost(group, rank):
    calls = itertools.count()

    def loss(w, batch, scale, lam):
        if dist.get_rank(group) == rank and next(calls) > 7:
            os._exit(1)
        return misfit(w, batch, scale, lam)

    condition = ig.argmin(loss, batches=mine(group), regularizer=penalty, group=group)
    return alone(condition=condition)


@pytest.mark.parametrize(("rank", "other"), [(1, 0)])
def test_a_lost_process_is_told_of(pair, rank, other):
    found = pair(lost, rank, timeout=5)
    assert found[rank] == "lost"
    kind, said = found[other]
    assert issubclass(kind, ig.GraphError)
    assert "A process was lost" in said
