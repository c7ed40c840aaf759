"""Objectives that are sums over a loader's batches: equal to the same objective as one graph."""

import gc
import itertools
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
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
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import implicit_grad as ig
from implicit_grad.testing import peak_memory

Args = tuple[Tensor, Tensor]


def loader(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=5, **options)


def gradients(condition, **options):
    args = arguments()
    w = ig.implicit(trained, condition, **options)(*args)
    return torch.stack(torch.autograd.grad(outer(w), args))


def in_batches(batches=BATCHES, **options):
    return ig.argmin(misfit, batches=batches, regularizer=penalty, **options)


LINEAR_SOLVERS = (
    ig.CG(rtol=1e-11),
    ig.MINRES(rtol=1e-11),
    ig.Exact(),
    ig.GMRES(rtol=1e-11),
    ig.Neumann(terms=30, scale=0.05),
    ig.EarlyStopped(steps=50, lr=0.02),
    ig.CG(maxiter=3),
)


@pytest.mark.parametrize("linear_solver", LINEAR_SOLVERS, ids=repr)
def test_as_one_graph(linear_solver):
    options = {"linear_solver": linear_solver, "on_failure": "ignore"}
    torch.testing.assert_close(
        gradients(in_batches(), **options), gradients(ig.argmin(whole), **options)
    )


@pytest.mark.parametrize("keep", [0, 2, 99])
@pytest.mark.parametrize(
    "batches",
    [
        BATCHES,
        loader(),
        loader(shuffle=True),
        loader(shuffle=True, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["list", "loader", "shuffled", "shuffled by its own generator"],
)
def test_any_loader_and_any_graphs_kept(batches, keep):
    torch.testing.assert_close(
        gradients(in_batches(batches, keep=keep)), gradients(ig.argmin(whole))
    )


def test_differences_of_gradients():
    options = {"curvature": "finite_difference", "on_failure": "ignore"}
    found = gradients(in_batches(), **options)
    torch.testing.assert_close(found, gradients(ig.argmin(whole)), rtol=1e-6, atol=0)


def with_models(keep):
    """The misfit as a loss of the model's outputs, as one graph and over batches."""
    one = ig.argmin(
        lambda out, scale, lam: (scale * (out[0] - Y) ** 2).sum() + penalty(out[1], scale, lam),
        model=lambda w, scale, lam: (net(w, X), w),
    )
    many = ig.argmin(
        lambda out, batch, scale, lam: (scale * (out - batch[1]) ** 2).sum(),
        model=lambda w, batch, scale, lam: net(w, batch[0]),
        batches=BATCHES,
        regularizer=penalty,
        keep=keep,
    )
    return one, many


@pytest.mark.parametrize("keep", [0, 2])
def test_gauss_newton(keep):
    one, many = with_models(keep)
    found = gradients(many, curvature="gauss_newton")
    torch.testing.assert_close(found, gradients(one, curvature="gauss_newton"))
    assert not torch.allclose(found, gradients(one))


def test_gauss_newton_tells_of_outputs_that_enter_linearly_once():
    many = ig.argmin(
        lambda out, batch, scale, lam: (out[0] - batch[1]).square().sum() + out[1],
        model=lambda w, batch, scale, lam: (net(w, batch[0]), lam * w["a"].square().sum()),
        batches=BATCHES,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gradients(many, curvature="gauss_newton", on_failure="warn")
    assert sum("linearly" in str(w.message) for w in told) == 1


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("keep", [0, 2])
def test_second_derivatives(curvature, keep):
    def second(condition):
        args = arguments()
        w = ig.implicit(trained, condition, curvature=curvature)(*args)
        first = torch.autograd.grad(outer(w), args, create_graph=True)
        return torch.stack(torch.autograd.grad(first[0] * 2 + first[1] ** 2, args))

    one, many = with_models(keep)
    torch.testing.assert_close(second(many), second(one))


def theta():
    return {k: v.clone().requires_grad_() for k, v in START.items()}


@pytest.mark.parametrize(
    ("make_lam", "keep"),
    [
        (lambda lam: lam, 2),
        (lambda lam: 2.0, 0),
        (lambda lam: ig.LowRank(lam, {k: v.unsqueeze(-1) for k, v in START.items()}), 0),
    ],
    ids=["tensor", "number", "matrix"],
)
def test_proximal(make_lam, keep):
    def found(make):
        args = (theta(), *arguments())
        strength = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        condition = make(make_lam(strength))
        w = ig.implicit(NEWTON, condition)(*args)
        tensors = (*args[0].values(), *args[1:], strength)
        return torch.autograd.grad(outer(w), tensors, allow_unused=True, materialize_grads=True)

    one = found(lambda lam: ig.proximal(whole, lam))
    many = found(
        lambda lam: ig.proximal(misfit, lam, batches=BATCHES, regularizer=penalty, keep=keep)
    )
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_function_captured_gets_its_gradient():
    features = nn.Linear(4, 4).double()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    history = scale.exp()

    def loss(w, batch, lam):
        return history * misfit(w, (features(batch[0]), batch[1]), 1.0, lam)

    def found(condition):
        lam = arguments()[1]
        solve = ig.implicit(NEWTON, condition, init=lambda lam: START)
        tensors = (lam, scale, *features.parameters())
        return torch.autograd.grad(outer(solve(lam)), tensors, retain_graph=True)

    def regularizer(w, lam):
        return penalty(w, None, lam)

    one = found(ig.argmin(lambda w, lam: loss(w, (X, Y), lam) + regularizer(w, lam)))
    many = found(ig.argmin(loss, batches=BATCHES, regularizer=regularizer))
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_under_transforms():
    def value(condition):
        solve = ig.implicit(trained, condition)
        return lambda scale, lam: outer(solve(scale, lam))

    one, many = value(ig.argmin(whole)), value(in_batches(loader(shuffle=True)))
    scales = torch.tensor([0.5, 0.9], dtype=torch.float64)
    lam = torch.tensor(1.3, dtype=torch.float64)
    for transformed in (
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(scales, lam),
        lambda f: torch.func.jvp(f, (scales[0], lam), (lam, lam))[1],
    ):
        torch.testing.assert_close(transformed(many), transformed(one))


@pytest.mark.parametrize(
    "minimiser",
    [
        ig.solvers.GradientDescent(lr=0.01, steps=5),
        ig.solvers.Nesterov(lr=0.01, steps=5),
        ig.solvers.TorchOptim(factory=lambda p: torch.optim.LBFGS(p, lr=0.1), steps=2),
        ig.solvers.NewtonCG(maxiter=2),
        ig.solvers.SciPyMinimize(method="L-BFGS-B"),
        ig.solvers.SciPyMinimize(method="trust-ncg"),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_our_minimisers_minimise_the_sum(minimiser):
    found = [
        ig.implicit(minimiser, condition, init=lambda *_: START, on_failure="ignore")(*arguments())
        for condition in (ig.argmin(whole), in_batches())
    ]
    torch.testing.assert_close(*found)


def test_a_minimiser_of_ones_own_may_compute_phi():
    class Flat:
        def minimize(self, objective, init):
            flat = torch.cat([p.flatten() for p in init.values()]).requires_grad_()

            def phi():
                return {"a": flat[:12].view(4, 3), "b": flat[12:]}

            for _ in range(3):
                (slope,) = torch.autograd.grad(objective(phi()), flat)
                flat = (flat - 0.01 * slope).detach().requires_grad_()
            return phi()

    found = [
        ig.implicit(Flat(), condition, init=lambda *_: START)(*(a.detach() for a in arguments()))
        for condition in (ig.argmin(whole), in_batches())
    ]
    torch.testing.assert_close(*found)


def test_certificates_and_polished_solutions():
    def rough(scale, lam):
        return {k: v + 1e-3 for k, v in trained(scale, lam).items()}

    certificates = [
        ig.certify(ig.implicit(rough, condition), arguments(), outer)
        for condition in (ig.argmin(whole), in_batches())
    ]
    one, many = certificates
    for a, b in zip(
        (*one.gradients, *one.corrected), (*many.gradients, *many.corrected), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert many.relative_error == pytest.approx(one.relative_error)
    polished = [
        ig.implicit(rough, condition, polish=1)(*arguments())
        for condition in (ig.argmin(whole), in_batches())
    ]
    torch.testing.assert_close(*polished)


def test_the_report_counts_batches():
    monitor = ig.Monitor()
    gradients(in_batches(), monitor=monitor)
    gradients(in_batches(BATCHES[:2]), monitor=monitor, on_failure="ignore")
    gradients(ig.argmin(whole), monitor=monitor)
    assert [report.batches for report in monitor.reports] == [5, 2, None]


def test_arguments_that_only_the_regularizer_reads_are_not_told_of():
    unread = ig.implicit(trained, ig.argmin(misfit, batches=BATCHES))
    with pytest.warns(ig.ImplicitGradWarning, match=r"does not depend on args\[1\]"):
        unread(*arguments())
    ig.implicit(trained, in_batches())(*arguments())  # a warning would be an error


def test_where_averages_were_meant_the_warning_says_that_it_is_a_sum():
    """The regularizer weighs too little in it. Of one batch nothing is said."""
    x = torch.randn(12, 3, dtype=torch.float64)
    lam = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def misfit(w, batch, lam):
        return (w - batch).square().sum(-1).mean()

    def penalty(w, lam):
        return lam * w.square().sum()

    for batches in (x.split(4), [x]):
        solve = ig.implicit(
            lambda lam: x.mean(0) / (3 + lam),  # a minimum of neither
            ig.argmin(misfit, batches=batches, regularizer=penalty),
        )
        with pytest.warns(ig.ImplicitGradWarning, match="does not solve") as said:
            solve(lam).sum().backward()
        assert ("a sum over batches" in str(said[0].message)) == (len(batches) > 1)


class Noisy(Dataset):
    """Samples that change by draws of one's own choice."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * self.draw(), Y[i]


def own_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn((), dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, own_generator()], ids=["random", "numpy", "own"]
)
def test_loaders_that_augment_at_random_are_refused(draw):
    with pytest.raises(ig.GraphError, match=r"augments at random .*seeded anew with the sample"):
        gradients(in_batches(DataLoader(Noisy(draw), batch_size=5)))
    with pytest.raises(ig.GraphError, match="augments at random needs seeds"):
        gradients(in_batches(DataLoader(Noisy(draw), batch_size=5)), curvature="finite_difference")


def draw_from_torch():  # a function that can be sent to a worker process
    return torch.randn((), dtype=torch.float64)


@pytest.mark.parametrize(("workers", "keep"), [(0, 0), (0, 2), (1, 2)])
def test_draws_from_torchs_generator_are_repeated_in_each_pass(keep, workers):
    noisy = DataLoader(Noisy(draw_from_torch), batch_size=5, num_workers=workers)
    torch.manual_seed(3)
    (x, y), state = map(torch.cat, zip(*noisy, strict=True)), torch.get_rng_state()

    def fixed(w, scale, lam):
        return misfit(w, (x, y), scale, lam) + penalty(w, scale, lam)

    solution = NEWTON.minimize(lambda w: fixed(w, 0.7, 1.3), START)
    args = arguments()
    torch.manual_seed(3)
    w = ig.implicit(lambda scale, lam: solution, in_batches(noisy, keep=keep))(*args)
    found = torch.stack(torch.autograd.grad(outer(w), args))
    w = ig.implicit(lambda scale, lam: solution, ig.argmin(fixed))(*args)
    torch.testing.assert_close(found, torch.stack(torch.autograd.grad(outer(w), args)))
    assert not torch.equal(torch.get_rng_state(), state)  # nothing of it is the user's


def test_a_large_regularizer_hides_no_augmentation():
    def large(w, scale, lam):
        return 1e12 * penalty(w, scale, lam)

    condition = ig.argmin(
        misfit, batches=DataLoader(Noisy(random.random), batch_size=5), regularizer=large
    )
    with pytest.raises(ig.GraphError, match="augments at random"):
        gradients(condition, on_failure="ignore")


@pytest.mark.parametrize("changes", [True, False])
def test_other_data_in_each_pass_show_where_the_objective_is_zero_on_all(changes):
    """A perfect fit is one of all data, and its Hessian is not."""
    draws = np.random.default_rng(0)

    class Anew:
        def __iter__(self):
            factor = draws.random() + 1 if changes else 1.0
            return ((factor * x, 0 * y) for x, y in BATCHES)

    def perfect(w, batch, scale, lam):
        x, y = batch
        return (x @ (w - scale * START["a"][:, 0]) - y).square().sum()

    solve = ig.implicit(
        lambda scale, lam: scale.detach() * START["a"][:, 0], ig.argmin(perfect, batches=Anew())
    )
    args = arguments()[0], torch.tensor(1.3)
    if changes:
        with pytest.raises(ig.GraphError, match="augments at random"):
            solve(*args).sum().backward()
    else:
        solve(*args).sum().backward()
        torch.testing.assert_close(args[0].grad, START["a"][:, 0].sum())


def test_subsets_that_change_are_refused():
    changing = itertools.count()

    class Subset:
        def __iter__(self):
            return iter(BATCHES[next(changing) % 3 :][:2])

    with pytest.raises(ig.GraphError, match="A subset of the data has to be the same"):
        gradients(in_batches(Subset()), on_failure="ignore")


def test_averages_over_batches_of_other_sizes_are_refused_where_they_change():
    def average(w, batch, scale, lam):
        return misfit(w, batch, scale, lam) / len(batch[0])

    class Shuffled:
        def __iter__(self):
            order = np.random.permutation(len(X))
            return ((X[i], Y[i]) for i in map(torch.as_tensor, np.split(order, range(5, 23, 5))))

    torch.testing.assert_close(gradients(in_batches(Shuffled())), gradients(ig.argmin(whole)))
    with pytest.raises(ig.GraphError, match="averages over batches that are not of one size"):
        gradients(ig.argmin(average, batches=Shuffled()), on_failure="ignore")
    with pytest.raises(ig.GraphError, match=r"same order in each pass\. Take shuffle=False"):
        gradients(in_batches(Shuffled(), keep=2))


def test_loaders_that_give_fewer_or_more_batches_later_are_refused():
    lengths = iter((3, 5, 3, 2, 3, 0))

    class Uneven:
        def __iter__(self):
            return iter(BATCHES[: next(lengths)])

    for seen in ("gave 3 batches when it was read first, and now more", "3 .* now 2", "no batch"):
        with pytest.raises(ig.ImplicitGradError, match=seen):
            gradients(in_batches(Uneven()), on_failure="ignore")


def test_the_loaders_generator_and_torchs_are_left_as_they_were():
    generator = torch.Generator().manual_seed(0)
    batches = loader(shuffle=True, generator=generator)
    states = generator.get_state(), torch.get_rng_state()
    gradients(in_batches(batches, keep=2))
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_the_loader_may_be_read_between_forward_and_backward():
    generator, args = torch.Generator().manual_seed(0), arguments()
    batches = loader(shuffle=True, generator=generator)
    w = ig.implicit(trained, in_batches(batches, keep=2))(*args)
    assert list(batches)  # in an order of its own
    found = torch.stack(torch.autograd.grad(outer(w), args))
    torch.testing.assert_close(found, gradients(ig.argmin(whole)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(BATCHES)


def test_streams_and_tensors_as_batches():
    found = gradients(in_batches(DataLoader(Stream(), batch_size=None)))
    torch.testing.assert_close(found, gradients(ig.argmin(whole)))
    rows = torch.cat([X, Y[:, None]], dim=1)

    def loss(w, batch, scale, lam):
        return misfit(w, (batch[:, :4], batch[:, 4]), scale, lam)

    found = gradients(ig.argmin(loss, batches=rows.split(5), regularizer=penalty))
    torch.testing.assert_close(found, gradients(ig.argmin(whole)))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (iter(BATCHES), "a list_iterator, which can be read only once: make it a list"),
        (((x, y) for x, y in BATCHES), "a generator, which can be read only once"),
        (X, r"shape \(23, 4\), whose rows would be the batches: take X.split"),
        (TensorDataset(X, Y), "a TensorDataset, whose samples would be the batches: take DataLoad"),
        ({"x": X}, "got a dict$"),
        (lambda: BATCHES, "a function, which is not iterable: call it"),
        (3, "an int, which is not iterable$"),
        ([], "a list, which is empty"),
        (loader(sampler=[]), "a DataLoader, which is empty"),
    ],
    ids=lambda it: type(it).__name__ if not isinstance(it, str) else "",
)
def test_what_cannot_be_read_again_and_again_is_refused(batches, said):
    for make in (in_batches, lambda b: ig.proximal(misfit, 1.0, batches=b)):
        with pytest.raises(ig.InvalidArgumentError, match=f"batches must be an iterable.*{said}"):
            make(batches)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regularizer": penalty}, "argmin: regularizer goes with batches="),
        ({"keep": 2}, "argmin: keep goes with batches="),
        ({"batches": BATCHES, "keep": -1}, r"argmin\(keep=-1\): expected a number of batches"),
        ({"batches": BATCHES, "keep": True}, r"argmin\(keep=True\): expected"),
        ({"batches": BATCHES, "regularizer": 0.1}, "regularizer must be a function"),
        ({"batches": BATCHES, "bounds": (0, None)}, "batches does not go with constraints"),
        ({"batches": BATCHES, "tasks": True}, "batches does not go with tasks"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(ig.InvalidArgumentError, match=said):
        ig.argmin(misfit, **options)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (
            [*BATCHES[:2], X],
            r"argmin: objective fails at batch 2, a float64 tensor of shape \(23, 4",
        ),
        ([{"x": X, "y": Y}], "fails at batch 0, a dict with the keys 'x', 'y': .*Error: "),
        (
            [BATCHES[0], (X, Y, Y)],
            "fails at batch 1, a tuple of a float64 tensor .*ValueError: too",
        ),
        (
            [BATCHES[0], (X.clone().requires_grad_(), Y)],
            "batch 1 holds a tensor that requires grad",
        ),
    ],
)
def test_batches_of_the_wrong_form_are_named(batches, said):
    with pytest.raises(ig.InvalidArgumentError, match=said):
        gradients(in_batches(batches))


def test_functions_that_return_no_number_are_named():
    wrong = ig.argmin(lambda w, b, *_: net(w, b[0]), batches=BATCHES, regularizer=penalty)
    with pytest.raises(ig.InvalidArgumentError, match="objective at batch 0 must return a scalar"):
        gradients(wrong)
    wrong = ig.argmin(misfit, batches=BATCHES, regularizer=lambda w, *_: w["a"])
    with pytest.raises(ig.InvalidArgumentError, match="argmin: regularizer must return a scalar"):
        gradients(wrong)


def test_an_empty_pass_is_named():
    class Empty:
        def __iter__(self):
            return iter(())

    with pytest.raises(ig.InvalidArgumentError, match="argmin: objective: batches gave no batch:"):
        gradients(in_batches(Empty()))


def test_what_changes_after_the_solve_is_seen():
    shift = [1.0]

    def loss(w, batch, scale, lam):
        return shift[0] * misfit(w, batch, scale, lam)

    args = arguments()
    w = ig.implicit(trained, ig.argmin(loss, batches=BATCHES, regularizer=penalty))(*args)
    shift[0] = 2.0
    with pytest.raises(ig.GraphError, match="refers to a variable that has changed since"):
        outer(w).backward()


@pytest.mark.parametrize("square", [Square, SquareOnce])
def test_wrong_and_missing_second_derivatives_are_seen_within_batches(square):
    def loss(w, batch, scale, lam):
        return (scale * square.apply(net(w, batch[0]) - batch[1])).sum()

    monitor = ig.Monitor()
    found = gradients(ig.argmin(loss, batches=BATCHES, regularizer=penalty), monitor=monitor)
    torch.testing.assert_close(found, gradients(ig.argmin(whole)), rtol=1e-6, atol=0)
    assert monitor.last.curvature == "finite_difference"
    assert (monitor.last.check is None) == (square is SquareOnce)


def layers():
    return nn.Sequential(
        nn.Linear(4, 32),
        nn.LayerNorm(32),
        nn.Dropout(0.3),
        nn.BatchNorm1d(32),
        nn.Tanh(),
        nn.Linear(32, 1),
    ).double()


def of_module(module, batches, keep=0):
    """Gradients of a penalty's weight at the module as it is, and the solver that gives them."""
    phi = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss(w, batch, decay):
        return (functional_call(module, w, (batch[0],))[:, 0] - batch[1]).square().sum()

    def regularizer(w, decay):
        return decay.exp() * sum(p.square().sum() for p in w.values())

    condition = ig.argmin(loss, batches=batches, regularizer=regularizer, keep=keep)
    solve = ig.implicit(
        lambda decay: phi, condition, linear_solver=ig.CG(maxiter=3), on_failure="ignore"
    )

    def run():
        decay = torch.zeros((), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(outer(solve(decay)), decay)[0]

    return run


def test_dropout_draws_the_same_masks_and_buffers_are_left_alone():
    module = layers()
    before = {name: b.clone() for name, b in module.named_buffers()}
    found = []
    for keep in (0, 2, 99):
        torch.manual_seed(5)
        found.append(of_module(module, BATCHES, keep)())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)


def test_memory_is_that_of_one_batch():
    module, x = layers(), torch.randn(64, 4, dtype=torch.float64)
    peaks = [
        peak_memory(of_module(module, [(x, x[:, 0])] * count, keep))
        for count, keep in ((2, 0), (16, 0), (16, 1), (16, 4))
    ]
    assert peaks[1] < 1.01 * peaks[0]
    assert peaks[0] < peaks[2] < peaks[3]  # what is kept takes memory, and nothing else


def test_nothing_is_left_for_the_garbage_collector():
    args = arguments()
    gc.collect()
    gc.disable()
    try:
        data = [(x.clone(), y.clone()) for x, y in BATCHES]
        gone = [weakref.ref(x) for x, _ in data]
        w = ig.implicit(trained, in_batches(data, keep=2))(*args)
        outer(w).backward()
        del w, data
        assert not [ref for ref in gone if ref() is not None]
    finally:
        gc.enable()


def test_kept_graphs_are_not_evaluated_again():
    calls = []

    def counting(w, batch, scale, lam):
        calls.append(len(batch[0]))
        return misfit(w, batch, scale, lam)

    def evaluated(keep):
        calls.clear()
        condition = ig.argmin(counting, batches=BATCHES, regularizer=penalty, keep=keep)
        gradients(condition, check="never", linear_solver=ig.CG(maxiter=3), on_failure="ignore")
        return len(calls)

    passes = 1 + 3 + 1  # the first, products, what the arguments change
    assert [evaluated(keep) for keep in (0, 2, 5)] == [5 * passes, 3 * passes + 2, 5]


class Counted(torch.autograd.Function):
    """The identity, which counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Counted.passes += 1
        return Counted.apply(g)


def test_products_leave_out_what_nobody_asked_for():
    def loss(w, batch, scale, lam):
        return misfit(w, batch, Counted.apply(scale), lam)

    def passes(products):
        Counted.passes = 0
        options = {"linear_solver": ig.CG(maxiter=products), "check": "never"}
        gradients(ig.argmin(loss, batches=BATCHES, regularizer=penalty), **options)
        return Counted.passes

    assert passes(1) == passes(4) > 0


def test_gradients_of_kept_graphs_are_not_taken_again():
    def loss(w, batch, scale, lam):
        x, y = batch
        return (scale * (Counted.apply(net(w, x)) - y) ** 2).sum()

    def passes(keep, products):
        Counted.passes = 0
        options = {"linear_solver": ig.CG(maxiter=products), "check": "never"}
        gradients(ig.argmin(loss, batches=BATCHES, regularizer=penalty, keep=keep), **options)
        return Counted.passes

    product, with_kept = (passes(keep, 4) - passes(keep, 3) for keep in (0, 5))
    assert product - with_kept == 5  # one for each batch's gradient


def test_second_derivatives_of_layers_whose_graphs_are_our_own():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    phi = {name: p.detach().clone() for name, p in module.named_parameters()}

    def loss(w, batch, scale, lam):
        return (scale * functional_call(module, w, (batch[0],))[:, 0] - batch[1]).square().sum()

    def second(condition):
        args = arguments()
        solve = ig.implicit(
            lambda *_: phi, condition, linear_solver=ig.Exact(), on_failure="ignore"
        )
        first = torch.autograd.grad(outer(solve(*args)), args, create_graph=True)
        return torch.stack(torch.autograd.grad(first[0] + first[1], args))

    found = second(ig.argmin(loss, batches=BATCHES, regularizer=penalty))
    one = second(ig.argmin(lambda w, *a: loss(w, (X, Y), *a) + penalty(w, *a)))
    torch.testing.assert_close(found, one)
