"""A pipeline that was written for learn2learn's MAML finds everything it uses in `imaml`."""

import copy
import io
import pickle

import learn2learn as l2l
import pytest
import torch
from problems import normal
from torch import nn
from torch.nn.functional import mse_loss

import implicit_grad as ig
from implicit_grad.testing import peak_memory

STYLES = ("tensor", "closure")
FIRST_ORDER = (False, True)


pytestmark = pytest.mark.usefixtures("double_precision")


def network():
    """A small network with a buffer of its own."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid())
    model.append(nn.Linear(6, 3))
    model.register_buffer("ruler", torch.arange(3.0))
    return model


def wrapped(model=None, lam=2.0, lr=0.2, first_order=False, **options):
    """The model as an imaml; MAML's options and imaml's together."""
    theirs = {k: options.pop(k) for k in ("allow_unused", "allow_nograd") if k in options}
    maml = l2l.algorithms.MAML(model or network(), lr=lr, first_order=first_order, **theirs)
    return ig.imaml(maml, lam=lam, **options)


def data(seed=1, inputs=4, outputs=3):
    """A support or query set."""
    return normal(8, inputs, seed=seed, grad=False), normal(8, outputs, seed=seed + 50, grad=False)


def error(learner, batch):
    """The loss of every task here."""
    return mse_loss(learner(batch[0]), batch[1])


def adapt(learner, batch, style, steps=1, **options):
    """Some gradient steps, in either style."""
    if style == "closure":
        learner.adapt(lambda: error(learner, batch), steps=steps, **options)
        return
    for _ in range(steps):
        learner.adapt(error(learner, batch), **options)


def gradients(loss, parameters):
    """The loss's derivatives, without touching .grad."""
    return torch.autograd.grad(loss, list(parameters))


def norms(learner):
    """A loss of the weights alone, with a gradient for each."""
    return sum(p.square().sum() + p.sum() for p in learner.parameters())


def close(actual, expected, tolerance=1e-12):
    """Equal relative to the size of what is expected, one by one."""
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= tolerance * e.norm()


def same(actual, expected):
    """Bitwise equal, one by one."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# ---------------------------------------------------------------- what learn2learn tests of MAML


@pytest.mark.parametrize("first_order", FIRST_ORDER)
def test_clones_compute_what_the_model_computes(first_order):
    maml, (inputs, _) = wrapped(first_order=first_order), data()
    expected = maml.module(inputs)
    for learner in (maml, maml.clone(), maml.clone(), maml.clone().clone()):
        assert torch.equal(learner(inputs), expected)


@pytest.mark.parametrize("style", STYLES)
def test_the_first_order_gradient_is_the_one_at_the_adapted_weights(style):
    maml, support, query = wrapped(lam=0.7, first_order=True), data(1), data(2)
    learner = maml.clone()
    adapt(learner, support, style, steps=3)
    twin = copy.deepcopy(maml.module)
    with torch.no_grad():
        for mine, adapted in zip(twin.parameters(), learner.parameters(), strict=True):
            mine.copy_(adapted)
    expected = gradients(error(twin, query), twin.parameters())
    same(gradients(error(learner, query), maml.parameters()), expected)


@pytest.mark.parametrize("style", STYLES)
def test_first_order_adaptation_is_first_order_maml_on_the_loss_with_its_pull(style):
    lam, support, query = 0.7, data(1), data(2)
    maml = wrapped(lam=lam, first_order=True)
    learner = maml.clone()
    theirs = l2l.algorithms.MAML(maml.module, lr=0.2, first_order=True)
    reference = theirs.clone()
    for _ in range(4):
        adapt(learner, support, style)
        reference.adapt(error(reference, support))
        pairs = zip(reference.module.parameters(), theirs.parameters(), strict=True)
        with torch.no_grad():  # the pull, as a step of its own and without a gradient
            for p, t in pairs:
                p.lerp_(t, 0.2 * lam / (1 + 0.2 * lam))
        close(list(learner.parameters()), list(reference.parameters()))
        actual = gradients(error(learner, query), maml.parameters())
        close(actual, gradients(error(reference, query), theirs.parameters()))


def test_one_first_order_step_is_learn2learns():
    model, support, query = network(), data(1), data(2)
    outcomes = []
    for maml in (
        l2l.algorithms.MAML(model, lr=0.2, first_order=True),
        wrapped(model, lam=None, first_order=True),
    ):
        learner = maml.clone()
        learner.adapt(error(learner, support))
        outcomes.append(gradients(error(learner, query), maml.parameters()))
    close(*outcomes)


def test_gradients_reach_the_original_through_a_clone():
    maml = wrapped()
    error(maml.clone(), data()).backward()
    assert all(p.grad.norm() > 0 for p in maml.module.parameters())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("first_order", FIRST_ORDER)
def test_adaptation_lowers_the_loss_and_every_weight_gets_a_gradient(style, first_order):
    maml, batch = wrapped(first_order=first_order), data()
    learner = maml.clone()
    before = error(learner, batch)
    adapt(learner, batch, style)
    after = error(learner, batch)
    assert after < before
    after.backward()
    assert all(p.grad.norm() > 0 for p in maml.module.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_unused_weights_stay_and_count_as_unused_only_if_that_is_allowed(style):
    maml = wrapped(allow_unused=True)
    learner = maml.clone()

    def every_other():
        return sum(p.square().sum() for p in list(learner.parameters())[::2])

    with pytest.raises(ig.InvalidArgumentError, match=r"does not depend on 0\.bias, 2\.bias, 4\."):
        learner.adapt(every_other() if style == "tensor" else every_other, allow_unused=False)
    learner.adapt(every_other() if style == "tensor" else every_other)
    pairs = list(zip(learner.parameters(), maml.parameters(), strict=True))
    same([p for p, _ in pairs[1::2]], [t for _, t in pairs[1::2]])
    assert not any(torch.equal(p, t) for p, t in pairs[::2])
    norms(learner).backward()
    for index, (adapted, theta) in enumerate(pairs):
        v = 2 * adapted.detach() + 1
        # the loss's Hessian is 2 where it is used, and 0 elsewhere; λ is 2
        close([theta.grad], [v / 2 if index % 2 == 0 else v])


def test_unused_weights_default_to_what_maml_was_told():
    for options in ({"allow_nograd": True}, {"allow_unused": True}):
        learner = wrapped(**options).clone()
        learner.adapt(next(learner.parameters()).square().sum())
    learner = wrapped(allow_nograd=True, allow_unused=False).clone()
    with pytest.raises(ig.InvalidArgumentError, match="pass allow_unused=True"):
        learner.adapt(next(learner.parameters()).square().sum())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("given_to", ["maml", "clone", "adapt"])
def test_frozen_weights_need_allow_nograd(style, given_to):
    model = network()
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    learner = wrapped(model).clone()
    with pytest.raises(ig.InvalidArgumentError, match=r"2\.weight has requires_grad=False; pass"):
        adapt(learner, data(), style)
    same(learner.parameters(), model.parameters())
    maml = wrapped(model, **({"allow_nograd": True} if given_to == "maml" else {}))
    learner = maml.clone(**({"allow_nograd": True} if given_to == "clone" else {}))
    adapt(learner, data(), style, **({"allow_nograd": True} if given_to == "adapt" else {}))
    assert not torch.equal(learner.module[0].weight, model[0].weight)
    assert torch.equal(learner.module[2].weight, frozen)
    error(learner, data(2)).backward()
    assert torch.equal(model[2].weight, frozen)
    assert model[2].weight.grad is None
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("style", STYLES)
def test_something_must_be_trained(style):
    learner = wrapped(network().requires_grad_(False), allow_nograd=True).clone()
    with pytest.raises(ig.InvalidArgumentError, match="no parameter that requires grad"):
        adapt(learner, data(), style)


class Twice(nn.Module):
    """Submodules that are registered under two names, as in learn2learn's own networks."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(5, 3))
        self.whole = nn.Sequential(self.body, self.head)

    def forward(self, x):
        return self.whole(x)


@pytest.mark.parametrize("style", STYLES)
def test_modules_registered_under_several_names_adapt_as_one(style):
    twice = Twice()
    once = nn.Sequential(copy.deepcopy(twice.body), copy.deepcopy(twice.head))
    outcomes = []
    for model in (twice, once):
        maml = wrapped(model)
        learner = maml.clone()
        adapt(learner, data(1), style, steps=2)
        adapted = list(learner.parameters())
        assert len(adapted) == 4
        outcomes.append((adapted, gradients(error(learner, data(2)), maml.parameters())))
    (adapted, actual), (expected_weights, expected) = outcomes
    same(adapted, expected_weights)
    same(actual, expected)
    learner = wrapped(twice).clone()
    adapt(learner, data(1), style)
    assert learner.module.body[0].weight is learner.module.whole[0][0].weight
    norms(learner).backward()


@pytest.mark.parametrize("style", STYLES)
def test_memory_stays_constant_over_tasks(style):
    maml = wrapped(nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), lr=1e-3)
    batch = normal(16, 64, seed=1, grad=False), normal(16, 64, seed=2, grad=False)

    def task():
        learner = maml.clone()
        adapt(learner, batch, style, steps=5)

    task()
    peaks = {peak_memory(task) for _ in range(4)}
    assert len(peaks) == 1


# ---------------------------------------------------------------- clone and adapt


def test_clone_takes_mamls_arguments_by_position_and_by_name():
    maml = wrapped()
    options = ("first_order", "allow_unused", "allow_nograd")
    for given in (maml.clone(True, True, True), maml.clone(**dict.fromkeys(options, True))):
        assert [getattr(given, name) for name in options] == [True, True, True]
    assert [getattr(maml.clone(), name) for name in options] == [False, False, False]
    changed = wrapped(first_order=True, allow_unused=True, allow_nograd=True)
    assert [getattr(changed.clone(), name) for name in options] == [True, True, True]
    back = changed.clone(False, False, False)
    assert [getattr(back, name) for name in options] == [False, False, False]
    assert [getattr(back.clone(), name) for name in options] == [False, False, False]
    assert maml.clone().lr == maml.lr == 0.2


@pytest.mark.parametrize("style", STYLES)
def test_adapt_takes_first_order_by_position_and_by_name(style):
    maml = wrapped()

    def outcome(*args, clone=(), **kwargs):
        learner = maml.clone(*clone)
        loss = error(learner, data(1)) if style == "tensor" else lambda: error(learner, data(1))
        learner.adapt(loss, *args, **kwargs)
        return gradients(error(learner, data(2)), maml.parameters())

    first, second = outcome(first_order=True), outcome()
    assert not torch.allclose(first[0], second[0])
    same(outcome(True), first)
    same(outcome(True, None, None), first)
    same(outcome(clone=(True,)), first)
    same(outcome(clone=(True,), first_order=False), second)
    same(outcome(False, False, False), second)
    same(outcome(None, True, True), second)


@pytest.mark.parametrize("style", STYLES)
def test_first_order_steps_mix_with_others(style):
    """A first-order step carries v on to θ: it takes part in no solve, nor keeps one from it."""
    maml = wrapped()
    learner = maml.clone()
    losses = []
    for first_order in (False, True, False, True):
        adapt(learner, data(1), style, first_order=first_order)
        losses.append(error(learner, data(2)))
    alone = [gradients(loss, maml.parameters()) for loss in losses]
    twin = maml.clone()
    with torch.no_grad():
        for p, adapted in zip(twin.parameters(), learner.parameters(), strict=True):
            p.copy_(adapted)
    same(alone[3], gradients(error(twin, data(2)), maml.parameters()))
    learner = maml.clone()
    adapt(learner, data(1), style)
    close(alone[0], gradients(error(learner, data(2)), maml.parameters()))


@pytest.mark.parametrize("lam", [0.7, None], ids=["float", "Parameter"])
def test_a_clone_of_a_clone_is_a_composition(lam):
    """θ ↦ φ₁ ↦ φ₂ on a quadratic, for which each step's Jacobian is λ (H + λ)⁻¹ by hand."""
    lam = nn.Parameter(torch.tensor(0.7)) if lam is None else lam
    model = nn.Linear(3, 1, bias=False)
    maml = wrapped(model, lam=lam, lr=0.1, linear_solver=ig.Exact())
    roots = [normal(5, 3, seed=s, grad=False) for s in (1, 2)]
    target = normal(5, 1, seed=3, grad=False)
    first = maml.clone()
    first.adapt(mse_loss(first(roots[0]), target))
    second = first.clone()
    assert torch.equal(second.module.weight, first.module.weight)
    before = first.module.weight.detach().clone()
    second.adapt(mse_loss(second(roots[1]), target))
    assert torch.equal(first.module.weight, before)
    v = normal(1, 3, seed=4, grad=False)
    (second.module.weight * v).sum().backward()
    expected = v
    for X in reversed(roots):
        hessian = 2 / 5 * X.T @ X
        expected = 0.7 * torch.linalg.solve(hessian + 0.7 * torch.eye(3), expected.T).T
    close([model.weight.grad], [expected])


@pytest.mark.parametrize("style", STYLES)
def test_the_original_may_adapt_itself(style):
    outcomes = []
    for clone in (True, False):
        torch.manual_seed(3)
        maml = wrapped()
        theta = list(maml.parameters())
        learner = maml.clone() if clone else maml
        adapt(learner, data(1), style, steps=3)
        assert not any(torch.equal(p, t) for p, t in zip(learner.parameters(), theta, strict=True))
        error(learner, data(2)).backward()
        outcomes.append([*learner.parameters(), *(t.grad for t in theta)])
    same(*outcomes)


def test_a_refused_adaptation_of_the_original_leaves_it_alone():
    maml = wrapped()
    theta = list(maml.parameters())
    for bad in (None, torch.zeros(3), torch.zeros(())):
        with pytest.raises(ig.ImplicitGradError):
            maml.adapt(bad)
    assert all(p is t for p, t in zip(maml.parameters(), theta, strict=True))
    with pytest.raises(ZeroDivisionError):
        maml.adapt(lambda: 1 / 0)
    assert all(p is t for p, t in zip(maml.parameters(), theta, strict=True))


# ---------------------------------------------------------------- without gradients


def test_an_adapted_learner_evaluates_without_gradients():
    maml = wrapped()
    learner = maml.clone()
    adapt(learner, data(1), "tensor", steps=2)
    with torch.no_grad():
        value = error(learner, data(2))
    assert not value.requires_grad
    with_gradients = error(learner, data(2))
    assert torch.equal(value, with_gradients)
    with_gradients.backward()
    assert all(p.grad.norm() > 0 for p in maml.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_function_adapts_and_a_tensor_cannot(mode):
    maml, batch = wrapped(), data()
    reference = maml.clone()
    adapt(reference, batch, "closure", steps=4)
    with mode():
        learner = maml.clone()
        for _ in range(2):
            adapt(learner, batch, "closure", steps=2)
        assert not error(learner, batch).requires_grad
        close(list(learner.parameters()), list(reference.parameters()))
        with pytest.raises(ig.GraphError, match=r"computed under torch\.no_grad.*adapt\(lambda"):
            learner.adapt(error(learner, batch))
    same(maml.clone().parameters(), maml.parameters())


# ---------------------------------------------------------------- the module's interface


def test_the_interface_is_that_of_the_wrapped_maml():
    theirs = l2l.algorithms.MAML(network(), lr=0.2)
    mine = ig.imaml(theirs, lam=2.0)
    assert mine.module is theirs.module
    assert [id(p) for p in mine.parameters()] == [id(p) for p in theirs.parameters()]
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in mine.named_buffers()] == ["module.ruler"]
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same(mine.state_dict().values(), theirs.state_dict().values())
    assert (mine.lr, mine.first_order) == (0.2, False)
    assert (mine.allow_unused, mine.allow_nograd) == (False, False)
    clone = mine.clone()
    assert [n for n, _ in clone.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_the_defaults_are_five_products_and_one_step():
    maml, once = ig.imaml(l2l.algorithms.MAML(network(), lr=0.2)), []
    assert maml.linear_solver == ig.PositivePart(maxiter=3) and maml.lam is None
    assert ig.imaml(network(), lam=2.0, lr=0.2).linear_solver == ig.CG(maxiter=5)
    for steps in ({}, {"steps": 1}):
        learner = maml.clone()
        learner.adapt(lambda: error(learner, data()), **steps)  # noqa: B023
        once.append(list(learner.parameters()))
    same(*once)


def test_the_model_takes_keywords():
    maml, (X, _) = wrapped(nn.Linear(4, 3)), data()
    for learner in (maml, maml.clone()):
        assert torch.equal(learner(input=X), maml.module(X))


def test_checkpoints_pass_between_maml_and_imaml():
    source, target = l2l.algorithms.MAML(network(), lr=0.2), wrapped()
    assert not torch.equal(source(data()[0]), target(data()[0]))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(data()[0]), target(data()[0]))
    back = l2l.algorithms.MAML(network(), lr=0.2)
    back.load_state_dict(target.state_dict())
    assert torch.equal(source(data()[0]), back(data()[0]))


def test_attributes_of_the_model_are_reached_through_the_wrapper():
    model = network()
    model.anything = object()
    maml = wrapped(model)
    learner = maml.clone()
    assert maml.anything is learner.anything is model.anything
    assert maml.ruler is model.ruler
    assert learner.append.__self__ is learner.module
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = maml.nothing_of_this_name


def test_train_and_eval_reach_the_model_and_its_clones():
    maml = wrapped()
    for training in (False, True):
        maml.train(training)
        for learner in (maml, maml.clone(), maml.clone().clone()):
            assert all(m.training is training for m in learner.modules())
    learner = maml.clone()
    learner.eval()
    assert not learner.module[0].training
    assert maml.training and maml.module[0].training


def test_to_moves_the_model_and_everything_that_belongs_to_it():
    lams = {
        "float": 2.0,
        "tensor": torch.tensor(2.0),
        "Parameter": nn.Parameter(torch.tensor(2.0)),
        "list": [nn.Parameter(torch.tensor(2.0)), 2.0, torch.tensor(2.0), 2.0, 2.0, 2.0],
    }
    for name, lam in lams.items():
        maml = wrapped(lam=lam).to(torch.float32)
        assert {p.dtype for p in maml.parameters()} == {torch.float32}, name
        batch = tuple(t.float() for t in data())
        learner = maml.clone()
        adapt(learner, batch, "tensor", steps=2)
        error(learner, batch).backward()
        trained = [p for p in maml.parameters() if p.requires_grad]
        assert all(p.grad.dtype == torch.float32 and p.grad.norm() > 0 for p in trained), name
    assert next(wrapped().to("meta").parameters()).is_meta
    assert next(wrapped().double().cpu().parameters()).dtype == torch.float64


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("style", STYLES)
def test_lam_may_have_another_precision_than_the_model(dtypes, style):
    model = network().to(dtypes[1])
    lam = [nn.Parameter(torch.ones_like(p, dtype=dtypes[0])) for p in model.parameters()]
    maml = wrapped(model, lam=lam)
    learner = maml.clone()
    batch = tuple(t.to(dtypes[1]) for t in data())
    adapt(learner, batch, style, steps=2)
    error(learner, batch).backward()
    assert all(p.grad.dtype == p.dtype for p in maml.parameters())
    assert {p.dtype for p in learner.module.parameters()} == {dtypes[1]}


def test_numbers_among_learned_lams_keep_their_precision():
    lam = [nn.Parameter(torch.tensor(0.1)), *[0.1] * 5]
    torch.set_default_dtype(torch.float32)
    maml = wrapped(network().double(), lam=lam)
    learner = maml.clone()
    adapt(learner, data(), "tensor", steps=2)
    torch.set_default_dtype(torch.float64)
    twin = wrapped(maml.module, lam=0.1).clone()
    adapt(twin, data(), "tensor", steps=2)
    same(learner.module.parameters(), twin.module.parameters())


def copied(maml):
    return copy.deepcopy(maml)


def pickled(maml):
    return pickle.loads(pickle.dumps(maml))


def saved(maml):
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copied, pickled, saved])
@pytest.mark.parametrize("form", ["float", "Parameter", "list"])
def test_copies_adapt_alike_and_share_nothing(copy_of, form):
    lam = {
        "float": 0.7,
        "Parameter": nn.Parameter(torch.tensor(0.7)),
        "list": [nn.Parameter(torch.tensor(0.7)), 0.7, torch.tensor(0.7), 0.7, 0.7, 0.7],
    }[form]
    maml = wrapped(
        lam=lam,
        linear_solver=ig.CG(maxiter=3),
        solver=ig.solvers.GradientDescent(lr=0.2, tol=1e-6),
        monitor=ig.Monitor(),
        first_order=False,
    ).eval()
    twin = copy_of(maml)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in maml.parameters()}
    assert list(twin.state_dict()) == list(maml.state_dict())
    assert not twin.training
    outcomes = []
    for one in (maml, twin):
        learner = one.clone()
        adapt(learner, data(1), "tensor", steps=2)
        learner.adapt(lambda learner=learner: error(learner, data(1)))
        trained = [p for p in one.parameters() if p.requires_grad]
        outcomes.append(gradients(error(learner, data(2)), trained))
        assert len(one.reporting.monitor.reports) == 1
    same(*outcomes)
    with torch.no_grad():
        next(twin.module.parameters()).zero_()
    assert next(maml.module.parameters()).norm() > 0


# ---------------------------------------------------------------- a training loop


def meta_train(maml, optimizer, iterations=4, tasks=3):
    """The loop of learn2learn's few-shot examples."""
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        total = 0.0
        for task in range(tasks):
            learner = maml.clone()
            for _ in range(2):
                learner.adapt(error(learner, data(task)))
            loss = error(learner, data(task + 10))
            loss.backward()
            total += loss.item()
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / tasks)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize("form", ["float", "Parameter", "mixed list"])
def test_the_training_loop_runs_as_it_is_and_lowers_the_loss(form):
    lam = {
        "float": 2.0,
        "Parameter": nn.Parameter(torch.tensor(2.0)),
        "mixed list": [nn.Parameter(torch.tensor(2.0)), *[2.0] * 5],
    }[form]
    maml = wrapped(lam=lam)
    optimizer = torch.optim.Adam(maml.parameters(), 0.02)
    before = [p.detach().clone() for p in maml.parameters()]
    losses = meta_train(maml, optimizer, iterations=12)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(maml.parameters(), before, strict=True))
    assert len(before) == 6 + (form != "float")


def test_an_optimizer_of_the_bare_model_trains_it_too():
    outcomes = []
    for own in (True, False):
        torch.manual_seed(5)
        model = network()
        maml = wrapped(model)
        parameters = model.parameters() if own else maml.parameters()
        outcomes.append(meta_train(maml, torch.optim.SGD(parameters, 0.1)))
        same(model.parameters(), maml.parameters())
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][-1] < outcomes[0][0]


def test_the_gradient_of_summed_tasks_is_the_sum_of_gradients():
    maml = wrapped()

    def task(index):
        learner = maml.clone()
        adapt(learner, data(index), "tensor", steps=2)
        return error(learner, data(index + 10))

    together = gradients(task(1) + task(2), maml.parameters())
    apart = zip(*(gradients(task(i), maml.parameters()) for i in (1, 2)), strict=True)
    close(together, [a + b for a, b in apart], 1e-14)
