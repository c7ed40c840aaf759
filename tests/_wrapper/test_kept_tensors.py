"""Tensors that a module keeps besides its parameters, as what a hypernetwork wrote: arguments."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import operator
import types
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import swa_utils

import implicit_grad as ig

X, X_VAL = torch.randn(2, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y, Y_VAL = X.sum(1).sin(), X_VAL.sum(1)
RIDGE = 0.3
Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Record:
    scale: Tensor


class Holder:
    """An object that is no container."""

    def __init__(self, scale):
        self.scale = scale


class ReadOnly(dict):
    """A dict of settings, as configuration libraries have them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.frozen = True

    def __setitem__(self, key, value):
        raise TypeError("settings are read-only")


def ordered_read_only(scale):
    class InOrder(collections.OrderedDict):
        __slots__ = ()

        def __setitem__(self, key, value):
            raise TypeError("settings are read-only")

    made = InOrder()
    for key, value in (("other", 0), ("s", scale)):
        collections.OrderedDict.__setitem__(made, key, value)
    return made


def holding_itself(scale):
    made = {"s": scale, "around": [(0,)]}
    made["around"].append((made, Record(made["around"])))
    return made


def recursive(scale):
    """A function that refers to itself."""

    def found(depth):
        return found(depth - 1) if depth else scale

    return found


def found_around(model):
    """The scale, on the way through all that holds itself."""
    made, record = model.made["around"][1]
    assert made is model.made and record.scale is made["around"]
    return made["s"]


# how a module keeps the scale, and where it finds it
KEPT = {
    "attribute": (lambda m, s: setattr(m, "scale", s), lambda m: m.scale),
    "private": (lambda m, s: setattr(m, "_scale", s), lambda m: m._scale),
    "list": (lambda m, s: setattr(m, "made", [1, s]), lambda m: m.made[1]),
    "dict": (lambda m, s: setattr(m, "made", {"s": (s,)}), lambda m: m.made["s"][0]),
    "ordered": (
        lambda m, s: setattr(m, "made", collections.OrderedDict(s=s)),
        lambda m: m.made["s"],
    ),
    "named": (lambda m, s: setattr(m, "made", Pair(0, s)), lambda m: m.made.second),
    "read-only": (
        lambda m, s: setattr(m, "made", ReadOnly(s=s)),
        lambda m: m.made.frozen and m.made["s"],
    ),
    "read-only in order": (
        lambda m, s: setattr(m, "made", ordered_read_only(s)),
        lambda m: list(m.made.values())[1],
    ),
    "default": (
        lambda m, s: setattr(m, "made", collections.defaultdict(list, s=[s])),
        lambda m: m.made["s"][0],
    ),
    "deque": (
        lambda m, s: setattr(m, "made", collections.deque([s], maxlen=2)),
        lambda m: m.made[-1],
    ),
    "set": (lambda m, s: setattr(m, "made", {s}), lambda m: next(iter(m.made))),
    "frozen set": (lambda m, s: setattr(m, "made", frozenset([s])), lambda m: next(iter(m.made))),
    "key": (lambda m, s: setattr(m, "made", {0: {s: 1}}), lambda m: next(iter(m.made[0]))),
    "method in C": (lambda m, s: setattr(m, "made", s.clone), lambda m: m.made()),
    "record": (lambda m, s: setattr(m, "made", Record(s)), lambda m: m.made.scale),
    "namespace": (
        lambda m, s: setattr(m, "made", types.SimpleNamespace(s=s)),
        lambda m: m.made.s,
    ),
    "partial": (
        lambda m, s: setattr(m, "made", functools.partial(torch.clone, s)),
        lambda m: m.made(),
    ),
    "itself": (lambda m, s: setattr(m, "made", holding_itself(s)), found_around),
    "recursive": (lambda m, s: setattr(m, "made", recursive(s)), lambda m: m.made(2)),
    "default argument": (
        lambda m, s: setattr(m, "made", lambda x=s: x),
        lambda m: m.made(),
    ),
    "default by name": (
        lambda m, s: setattr(m, "made", lambda *, x=s: x),
        lambda m: m.made(),
    ),
    "part": (lambda m, s: setattr(m.part, "scale", s), lambda m: m.part.scale),
    "buffer": (lambda m, s: m.register_buffer("scale", s), lambda m: m.scale),
}


class Scaled(nn.Module):
    """x ↦ xᵀ(w·scale)."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.keep, self.find = KEPT[kept]
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.part = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.find(self))


def objective(model: Scaled, X: Tensor, y: Tensor) -> Tensor:
    return (model(X) - y).square().sum() / 2 + RIDGE * model.weight.square().sum() / 2


def minimum(scale: Tensor, X: Tensor) -> Tensor:
    """The weights that minimise the objective, in closed form."""
    made = X * scale
    return torch.linalg.solve(made.T @ made + RIDGE * torch.eye(3, dtype=X.dtype), made.T @ Y)


def train(model: Scaled, X: Tensor, y: Tensor) -> Scaled:
    """As a loop does, through the graph of each loss; then the last step, in closed form."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        objective(model, X, y).backward()
        optimizer.step()
    with torch.no_grad():
        model.weight.copy_(minimum(model.find(model), X))
    return model


def outer(model: Scaled) -> Tensor:
    return (model(X_VAL) - Y_VAL).square().sum()


def expected(theta: Tensor, scale: Tensor) -> Tensor:
    """The derivative of the outer loss by theta, through the scale and through the weights."""
    value = (X_VAL @ (minimum(scale, X) * scale) - Y_VAL).square().sum()
    return torch.autograd.grad(value, theta)[0]


def new_theta() -> Tensor:
    return torch.tensor([0.5, 1.0, -0.7], dtype=torch.float64, requires_grad=True)


SOLVES = {
    "argmin": lambda: ig.implicit(train, ig.argmin(objective)),
    "minimiser": lambda: ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(objective)),
    "gauss_newton": lambda: ig.implicit(train, ig.argmin(objective), curvature="gauss_newton"),
}


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("kept", KEPT)
def test_a_tensor_with_a_history_has_its_gradient(kept, solve):
    theta = new_theta()
    model = Scaled(kept)
    scale = theta.square() * 2
    model.keep(model, scale)
    solved = SOLVES[solve]()(model, X, Y)
    outer(solved).backward()
    left = KEPT[kept][1](model)  # the module is left alone
    assert left is scale or kept in ("partial", "method in C")
    torch.testing.assert_close(left, scale)
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there.square() * 2))


@pytest.mark.parametrize("kept", KEPT)
def test_a_leaf_has_its_gradient_and_none_of_the_solvers(kept):
    theta, model = new_theta(), Scaled(kept)
    model.keep(model, theta)
    solved = ig.implicit(train, ig.argmin(objective))(model, X, Y)
    assert theta.grad is None
    outer(solved).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there))


def test_an_object_may_hold_a_leaf_which_gets_none_of_the_solvers_gradients():
    theta, model = new_theta(), Scaled("attribute")
    model.find, model.holder = lambda m: m.holder.scale, Holder(theta)
    solved = ig.implicit(train, ig.argmin(objective))(model, X, Y)
    assert theta.grad is None
    outer(solved).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there))


@pytest.mark.parametrize(
    ("hold", "find"),
    [
        (Holder, lambda m: m.holder.scale),
        (lambda s: {0: s}.values(), lambda m: next(iter(m.holder))),
    ],
    ids=["object", "view"],
)
def test_an_object_may_hold_a_tensor_with_a_history_but_solvers_may_not_go_through_it(hold, find):
    theta, model = new_theta(), Scaled("attribute")
    model.find, model.holder = find, hold(theta * 2)
    outer(SOLVES["minimiser"]()(model, X, Y)).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))
    with pytest.raises(ig.GraphError, match=r"history of holder\S+ .* an object keeps"):
        SOLVES["argmin"]()(model, X, Y)


@pytest.mark.parametrize("goes_on", [True, False], ids=["with the trained one", "anew"])
def test_an_object_may_hold_what_the_last_pass_left(goes_on):
    class Noting(Scaled):
        def forward(self, x):
            self.holder.scale = super().forward(x)
            return self.holder.scale

    model = Noting("attribute")
    model.holder, model.scale = Holder(None), torch.ones(3, dtype=torch.float64)
    ridge = torch.tensor(RIDGE, dtype=torch.float64, requires_grad=True)

    def value(model, ridge):
        return (model(X) - Y).square().sum() / 2 + ridge * model.weight.square().sum() / 2

    solve = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(value))
    for _ in range(2):
        trained = solve(model, ridge)
        trained(X)  # the holder is one for both
        model = trained if goes_on else model
    torch.testing.assert_close(trained.weight.detach(), minimum(X.new_ones(3), X))


@pytest.mark.parametrize("make", [holding_itself, lambda s: types.SimpleNamespace(a=s)])
def test_an_argument_that_holds_itself_is_refused_by_name(make):
    made = make(new_theta())
    if isinstance(made, types.SimpleNamespace):
        made.itself = made
    solve = ig.implicit(lambda X, made: X, ig.argmin(lambda w, X, made: w.square().sum()))
    with pytest.raises(ig.InvalidArgumentError, match=r"argument 1, .* holds itself"):
        solve(X, made)
    with pytest.raises(ig.InvalidArgumentError, match=r"argument made, .* holds itself"):
        solve(X, made=made)


def test_a_namespace_among_the_arguments_is_looked_into():
    def fit(given):
        assert not given.scale.grad_fn
        with torch.no_grad():
            return minimum(given.scale, given.X)

    def value(w, given):
        return (given.X @ (w * given.scale) - Y).square().sum() / 2 + RIDGE * w @ w / 2

    theta = new_theta()
    given = types.SimpleNamespace(scale=theta * 2, X=X, name="ridge")
    ig.implicit(fit, ig.argmin(value))(given).square().sum().backward()
    there = new_theta()
    by_theta = torch.autograd.grad(minimum(there * 2, X).square().sum(), there)[0]
    torch.testing.assert_close(theta.grad, by_theta)


def test_what_is_one_thing_in_the_module_is_one_in_the_copy():
    model, scale = Scaled("attribute"), new_theta() * 2
    model.scale, model.made = scale, [scale, Record(model)]
    model.again, model.config = model.made, Record(0)
    solved = ig.implicit(train, ig.argmin(objective))(model, X, Y)
    assert solved.again is solved.made and solved.made[1].scale is solved
    assert solved.config is model.config  # nothing in it is another


def test_functions_and_methods_that_a_module_keeps_are_of_its_copy():
    class Closed(nn.Module):
        def __init__(self, theta):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            scale = theta * 2
            self.first = lambda x, *, by=scale: x @ (self.weight * scale)
            self.rest = functools.partial(torch.mul, self.weight)
            self.bound = self.second

        def second(self):
            return self.rest(self.weight).sum()

        def forward(self, x):
            return self.first(x)

    def value(model, X, y):
        return (model(X) - y).square().sum() / 2 + RIDGE * model.bound() / 2

    theta = new_theta()
    model = Closed(theta)
    solved = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(value))(model, X, Y)
    assert not model.weight.any() and solved.first.__kwdefaults__.keys() == {"by"}
    outer(solved).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))


class Equilibrium(nn.Module):
    """z = tanh(a·z + x·b)/2 for each element, solved by what it made when it was made itself."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), 0.3, dtype=torch.float64))
        self.b = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
        self.solve = ig.implicit(self.iterate, ig.fixed_point(lambda z, x: self.step(z, x)))

    def step(self, z, x):
        return (self.a * z + x * self.b).tanh() / 2

    def iterate(self, x):
        z = torch.zeros_like(x)
        for _ in range(60):
            z = self.step(z, x)
        return z.detach()

    def forward(self, x):
        return self.solve(x).sum(1)


def test_a_solver_that_a_module_keeps_is_of_its_copy():
    def value(model, ridge):
        weights = model.a.square().sum() + model.b.square().sum()
        return (model(X) - Y / 4).square().sum() / 2 + ridge * weights / 2

    def solved(ridge):
        solve = ig.implicit(ig.solvers.NewtonCG(tol=1e-11), ig.argmin(value))
        return solve(Equilibrium(), ridge).b.square().sum()

    ridge = torch.tensor(RIDGE, dtype=torch.float64, requires_grad=True)
    solved(ridge).backward()
    with torch.no_grad():
        difference = (solved(ridge + 1e-4) - solved(ridge - 1e-4)) / 2e-4
    torch.testing.assert_close(ridge.grad, difference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("average", [copy.deepcopy, lambda m: swa_utils.AveragedModel(m).module])
def test_a_solver_that_a_module_keeps_is_deeply_copied_with_it(average):
    model = Equilibrium()
    twin = average(model)
    with torch.no_grad():
        model.a.fill_(0.9)
    assert torch.equal(twin(X), Equilibrium()(X))
    twin(X).sum().backward()
    assert model.a.grad is None and twin.a.grad is not None
    assert copy.deepcopy(model.solve)(X).shape == X.shape  # which has no module to follow


# how a part may refer to the whole without keeping it alive
WEAK_TIES = {
    "reference": (weakref.ref, lambda part: part.whole()),
    "proxy": (weakref.proxy, lambda part: part.whole),  # as which torch registers a module
    "in a list": (lambda whole: [weakref.ref(whole)], lambda part: part.whole[0]()),
    "proxy in a dict": (lambda whole: {"w": weakref.proxy(whole)}, lambda part: part.whole["w"]),
    "in a function": (lambda whole: weakly(weakref.ref(whole)), lambda part: part.whole()),
}


def weakly(reference):
    return lambda: reference()


class Tied(nn.Module):
    """x ↦ xᵀw, as a part computes it that has its weights from the whole."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        made, self.find = WEAK_TIES[tie]
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.part = nn.Module()
        self.part.whole = made(self)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.find(self.part).weight


@pytest.mark.parametrize("tie", WEAK_TIES)
def test_weak_references_to_a_module_are_to_its_copy(tie):
    def value(model, X, y, ridge):
        return (model(X) - y).square().sum() / 2 + ridge * model.weight.square().sum() / 2

    def in_closed_form(ridge):
        return torch.linalg.solve(X.T @ X + ridge * torch.eye(3, dtype=X.dtype), X.T @ Y)

    ridge, model = torch.tensor(RIDGE, dtype=torch.float64, requires_grad=True), Tied(tie)
    solved = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(value))(model, X, Y, ridge)
    outer(solved).backward()
    there = ridge.detach().clone().requires_grad_()
    loss = (X_VAL @ in_closed_form(there) - Y_VAL).square().sum()
    torch.testing.assert_close(ridge.grad, torch.autograd.grad(loss, there)[0])

    learner = ig.imaml(model, lr=0.1).clone()
    assert learner.module.find(learner.module.part).weight is learner.module.weight


def test_weak_references_to_what_is_gone_stay():
    model, gone = Scaled("attribute"), Holder(0)
    model.scale = torch.ones(3, dtype=torch.float64)
    model.ties = [weakref.ref(gone), weakref.proxy(gone)]
    del gone
    gc.collect()
    solved = ig.implicit(train, ig.argmin(objective))(model, X, Y)
    assert all(map(operator.is_, solved.ties, model.ties))


def test_an_object_that_computes_with_the_original_is_refused():
    class Penalty:
        def __init__(self, model):
            self.model = model

        def value(self):
            return self.model.weight.square().sum()

    def objective_of(model, X, y):
        value = (model(X) - y).square().sum() / 2
        return value + RIDGE / 2 * (model.penalty.value() + model.weight.square().sum())

    model = Scaled("attribute")
    model.scale, model.penalty = torch.ones(3, dtype=torch.float64), Penalty(model)
    kept = r"and not with that of its copy.* as penalty\.model\.weight"
    with pytest.raises(ig.InvalidSolutionError, match=kept):
        ig.implicit(train, ig.argmin(objective_of))(model, X, Y)

    def to_the_original(model, X, y):  # which is no accident
        return objective(model, X, y) + (model.weight - original.weight).square().sum()

    original = Scaled("attribute")
    original.scale = torch.ones(3, dtype=torch.float64)
    descent = ig.solvers.NewtonCG(tol=1e-12)
    solved = ig.implicit(descent, ig.argmin(to_the_original))(original, X, Y)
    solved.weight.sum().backward()
    assert original.weight.grad is not None


@pytest.mark.parametrize("backward", [True, False])
def test_a_hook_that_computes_with_the_original_is_told(backward):
    model = Scaled("attribute")
    model.scale, model.other = torch.ones(3, dtype=torch.float64), nn.Linear(3, 3).double()
    other = model.other
    model.part.register_forward_hook(lambda module, args, output: output + other(args[0]))

    def value(model, X, y):
        return objective(model, model.part(X), y) + model.other.weight.square().sum()

    def fit(model, X, y):
        weights = list(model.parameters())
        optimizer = torch.optim.SGD(weights, lr=0.01)
        loss = value(model, X, y)
        if backward:
            loss.backward()
        else:
            slopes = torch.autograd.grad(loss, weights, allow_unused=True)
            for p, slope in zip(weights, slopes, strict=True):
                p.grad = slope
        optimizer.step()
        return model

    solve = ig.implicit(fit, ig.argmin(value), on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match="a hook, a weak reference or an object"):
        solve(model, X, Y)


def test_theta_of_a_proximal_term_keeps_it_too():
    def loss(model, X, y):
        return (model(X) - y).square().sum() / 2

    theta, model = new_theta(), Scaled("attribute")
    model.scale = theta * 2
    solved = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.proximal(loss, RIDGE))(model, X, Y)
    outer(solved).backward()  # the weights start at zero: the ridge is the proximal term
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))


def test_beside_a_phi_of_another_form():
    def by_hand(model, X):
        with torch.no_grad():
            return minimum(model.scale, X)

    def value(w, model, X):
        return (X @ (w * model.scale) - Y).square().sum() / 2 + RIDGE * w.square().sum() / 2

    theta, model = new_theta(), Scaled("attribute")
    model.scale = theta.exp()
    w = ig.implicit(by_hand, ig.argmin(value))(model, X)
    w.square().sum().backward()
    there = new_theta()
    (by_theta,) = torch.autograd.grad(minimum(there.exp(), X).square().sum(), there)
    torch.testing.assert_close(theta.grad, by_theta)


def test_an_argument_that_the_solver_keeps_on_its_module_is_that_argument():
    """As Gaussian processes keep the inputs that they were fitted to."""

    def fit(scale, X):
        model = Scaled("attribute")
        model.scale = scale
        return train(model, X, Y)

    def value(model, scale, X):
        return objective(model, X, Y)  # which knows the scale by the module alone

    theta = new_theta()
    outer(ig.implicit(fit, ig.argmin(value))(theta * 2, X)).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))


@pytest.mark.parametrize("kept", ["attribute", "list", "buffer"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: swa_utils.AveragedModel(m).module])
def test_a_solver_may_train_a_copy(copied, kept):
    theta, model = new_theta(), Scaled(kept)
    model.keep(model, theta * 2)
    solve = ig.implicit(lambda model, X, y: train(copied(model), X, y), ig.argmin(objective))
    outer(solve(model, X, Y)).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))


def test_what_the_solver_changed_is_a_number():
    def fit(model, X, y):
        model.scale.fill_(2.0)
        return train(model, X, y)

    theta, model = new_theta(), Scaled("attribute")
    model.scale = theta * 2
    solved = ig.implicit(fit, ig.argmin(objective))(model, X, Y)
    assert not solved.scale.requires_grad and (solved.scale == 2).all()


def test_under_torch_func():
    def value(theta, model):
        model.keep(model, theta * 2)
        return outer(ig.implicit(train, ig.argmin(objective))(model, X, Y))

    for model in (Scaled("attribute"), Scaled("buffer")):
        there = new_theta()
        found = torch.func.grad(value)(there.detach(), model)
        torch.testing.assert_close(found, expected(there, there * 2))
        rows = torch.func.vmap(torch.func.grad(value), (0, None))(
            torch.stack([there.detach(), there.detach() + 1]), model
        )
        torch.testing.assert_close(rows[0], found)
        torch.testing.assert_close(rows[1], expected(there, (there + 1) * 2))


def test_what_a_forward_pass_left_keeps_no_graph_of_another_call():
    class Noting(Scaled):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    def fit(model, X, y):
        with torch.no_grad():
            model.weight.copy_(minimum(torch.ones(3, dtype=torch.float64), X))
        return model

    solve, model = ig.implicit(fit, ig.argmin(objective)), Noting("attribute")
    model.scale = torch.ones(3, dtype=torch.float64)
    first = None
    for _ in range(3):
        model = solve(model, X, Y)
        model(X_VAL)  # notes a tensor with the history of this call
        first = first or weakref.ref(model.seen)
    model.seen = None
    gc.collect()
    assert first() is None


def test_a_list_of_the_modules_own_weights_is_of_the_copys():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.all = [self.weight]

        def forward(self, x):
            return x @ self.all[0]

    model = Listed()
    solved = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(objective))(model, X, Y)
    torch.testing.assert_close(solved.all[0].detach(), minimum(X.new_ones(3), X))
    assert solved.all[0] is solved.weight and model.all[0] is model.weight


def test_pruned_weights_are_computed_from_what_trains():
    def value(layer, log_ridge):
        penalty = layer.weight.square().sum()  # as it is kept since the last forward pass
        return (layer(X)[:, 0] - Y).square().sum() / 2 + log_ridge.exp() * penalty / 2

    def fit(layer, log_ridge):
        left = X[:, 1:]
        with torch.no_grad():
            matrix = left.T @ left + log_ridge.exp() * torch.eye(2, dtype=X.dtype)
            layer.weight_orig[0, 1:] = torch.linalg.solve(matrix, left.T @ Y)
        return layer

    layer = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 1, 1]]))
    log_ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def weighed(layer):
        return (layer(X_VAL)[:, 0] - Y_VAL).square().sum()

    condition = ig.argmin(lambda m, r: value(m, r) + 1e-3 * m.weight_orig[0, 0] ** 2)
    weighed(ig.implicit(fit, condition)(layer, log_ridge)).backward()
    there, left = log_ridge.detach().requires_grad_(), X[:, 1:]
    matrix = left.T @ left + there.exp() * torch.eye(2, dtype=X.dtype)
    w = torch.linalg.solve(matrix, left.T @ Y)
    (by_ridge,) = torch.autograd.grad((X_VAL[:, 1:] @ w - Y_VAL).square().sum(), there)
    torch.testing.assert_close(log_ridge.grad, by_ridge)


def test_a_captured_module_that_keeps_one_is_refused():
    theta, model = new_theta(), Scaled("attribute")
    model.scale = theta + 2
    solve = ig.implicit(lambda X: train(model, X, Y), ig.argmin(lambda m, X: objective(m, X, Y)))
    with pytest.raises(ig.InvalidSolutionError, match=r"keeps .* as scale.*Pass the module"):
        solve(X.clone().requires_grad_())


def test_a_warm_start_keeps_what_is_kept_now():
    def fit(model, X, y, start=None):
        return train(model if start is None else start, X, y)

    solve = ig.implicit(fit, ig.argmin(objective), warm_start=True)
    theta = new_theta()
    for factor in (1, 2):
        model = Scaled("list")
        model.keep(model, theta * factor)
        solved = solve(model, X, Y)
    outer(solved).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))


def test_what_a_forward_pass_made_of_a_captured_tensor_is_no_obstacle():
    class Noting(Scaled):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    data = X.clone().requires_grad_()  # learned, as in distillation
    model = Noting("attribute")
    model.scale = torch.ones(3, dtype=torch.float64)

    def fit(X_now):
        fitted = train(copy.deepcopy(model), data, Y)
        fitted(data)
        return fitted

    def value(model, X_now):
        return objective(model, data, Y) + 0 * X_now.sum()

    with torch.no_grad():
        model.weight.zero_()
    solved = ig.implicit(fit, ig.argmin(value))(X)
    outer(solved).backward()
    there = X.clone().requires_grad_()
    loss = (X_VAL @ minimum(torch.ones(3, dtype=X.dtype), there) - Y_VAL).square().sum()
    torch.testing.assert_close(data.grad, torch.autograd.grad(loss, there)[0])


@pytest.mark.parametrize("start_kept", [True, False])
def test_what_the_last_pass_left_is_no_start(start_kept):
    """A training that was stopped depends on its starting weights, and not on old activations."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.left = nn.Linear(3, 1).double(), None

        def forward(self, x: Tensor) -> Tensor:
            features = self.layer(x).tanh()
            self.left = features if start_kept else None
            return features[:, 0]

    def loss(model: Net, wd: Tensor) -> Tensor:
        return (model(X) - Y).square().mean() + wd * model.layer.weight.square().sum()

    def step(model: Net, wd: Tensor) -> Net:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        loss(model, wd).backward()
        optimizer.step()
        return model

    torch.manual_seed(0)
    model, wd = Net(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (model(X) - Y).square().mean().backward()  # what it left has a graph that is gone
    model.zero_grad()
    stopped = ig.EarlyStopped(steps=1, lr=0.1)
    found = ig.implicit(step, ig.argmin(loss), linear_solver=stopped)(model, wd)
    weight = found.layer.weight.detach().clone()
    found.layer.weight.sum().backward()
    # one step of 0.1: φ = φ₀ − 0.1 (… + 2 wd w), around where it led
    torch.testing.assert_close(wd.grad, -0.1 * 2 * weight.sum())
    assert model.layer.weight.grad is not None  # of the start


def test_long_plain_lists_are_not_gone_through(monkeypatch):
    from implicit_grad._torch.rebinding import Rebinding

    model, seen, own = Scaled("attribute"), [], Rebinding._step
    model.scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    model.ids, model.vocabulary = list(range(1000)), {str(i): i for i in range(1000)}
    model.pairs = [(i, str(i), {"near": [i - 1, i + 1]}) for i in range(1000)]
    monkeypatch.setattr(Rebinding, "_step", lambda self, x: seen.append(x) or own(self, x))
    found = ig.implicit(train, ig.argmin(objective))(model, X, Y)
    assert found.ids == model.ids and found.vocabulary == model.vocabulary
    assert found.pairs == model.pairs
    seen = list(map(type, seen))
    assert int not in seen and tuple not in seen


LINKS = {
    "record": (Record, lambda link: link.scale),
    "list": (lambda link: [link], lambda link: link[0]),
    "tuple": (lambda link: (link, 0), lambda link: link[0]),
    "dict": (lambda link: {"next": link}, lambda link: link["next"]),
    "partial": (lambda link: functools.partial(torch.clone, link), lambda link: link.args[0]),
    "function": (lambda link: lambda: link, lambda link: link()),
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_tensor_at_the_end_of_a_long_chain_is_found(kind):
    theta, model = new_theta(), Scaled("attribute")
    (link, follow), model.chain = LINKS[kind], theta * 2
    for _ in range(1_200):
        model.chain = link(model.chain)

    def end_of(model):
        end = model.chain
        while not torch.is_tensor(end):
            end = follow(end)
        return end

    model.find = end_of
    outer(ig.implicit(train, ig.argmin(objective))(model, X, Y)).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))
    learner = ig.imaml(model, lr=0.1).clone()
    assert end_of(learner.module) is end_of(model)


def test_a_tensor_among_lists_that_hold_each_other_is_found():
    nodes = [{"id": i, "near": []} for i in range(100)]
    for node in nodes:
        node["near"] += nodes
    theta, model = new_theta(), Scaled("attribute")
    model.nodes = nodes  # 100 ** 2 ways through two of them
    nodes[-1]["scale"] = theta * 2
    model.find = lambda m: m.nodes[0]["near"][-1]["scale"]
    outer(ig.implicit(train, ig.argmin(objective))(model, X, Y)).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))


@pytest.mark.parametrize("levels", range(7))
def test_a_tensor_deep_in_lists_of_numbers_is_found(levels):
    def nested(depth, end):
        return [0, {"n": (1, end)}] if depth == 0 else [0, {"n": (1, nested(depth - 1, end))}]

    def within(made, depth):
        return made[1]["n"][1] if depth < 0 else within(made[1]["n"][1], depth - 1)

    theta, model = new_theta(), Scaled("attribute")
    model.made = nested(levels, theta * 2)
    model.find = lambda m: within(m.made, levels - 1)
    outer(ig.implicit(train, ig.argmin(objective))(model, X, Y)).backward()
    there = new_theta()
    torch.testing.assert_close(theta.grad, expected(there, there * 2))
