"""A module as φ, as θ and as an argument: trained by a loop as it stands, and returned."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import implicit_grad as ig

X, Y, X_VAL, Y_VAL = torch.randn(
    4, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)
Y, Y_VAL = Y[:, 0], Y_VAL[:, 0]


def misfit(model, x=X, y=Y):
    return (model(x)[:, 0] - y).square().mean()


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def objective(model, log_wd):
    return misfit(model) + log_wd.exp() * sum(p.square().sum() for p in trained(model))


def outer(model):
    return misfit(model, X_VAL, Y_VAL)


def settle(model: nn.Module, loss) -> None:
    """Train in place, to rounding: LBFGS, then Newton's method with a dense Hessian."""
    weights = trained(model)
    lbfgs = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        value = loss(model)
        value.backward()
        return value

    lbfgs.step(closure)
    for _ in range(4):
        slope = torch.autograd.grad(loss(model), weights, create_graph=True)
        flat = torch.cat([g.flatten() for g in slope])
        rows = [torch.autograd.grad(g, weights, retain_graph=True) for g in flat]
        matrix = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
        step = torch.linalg.solve(matrix, flat.detach())
        with torch.no_grad():
            parts = step.split([w.numel() for w in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight -= part.view_as(weight)


class Net(nn.Module):
    """Two layers and a head; the layers may be one, or share a weight."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first if kind == "two names" else nn.Linear(3, 3)
        if kind == "tied":
            self.second.weight = self.first.weight
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


class LoRA(nn.Module):
    """A frozen layer, and a correction of rank 1 that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 1).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[:, :, None])[0][:, -1])


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    return model


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model.double()(X)
    return model


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 1))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 1))


def with_lengths(v):
    """The length of v has no part in what the module computes, and so needs a term of its own."""

    def whole(model, log_wd):
        return objective(model, log_wd) + (v(model[0]).square().sum(1) - 1).square().sum()

    return whole


KINDS = {
    "plain": lambda: nn.Linear(3, 1),
    "tied": lambda: Net("tied"),
    "two names": lambda: Net("two names"),
    "frozen": frozen,
    "batch norm in eval mode": lambda: normed().eval(),
    "batch norm in train mode": normed,
    "weight_norm": weight_norm,
    "weight_norm by hooks": old_weight_norm,
    "LoRA": LoRA,
    "recurrent": Recurrent,
}
OBJECTIVES = {
    "batch norm in train mode": with_lengths(lambda layer: layer.weight),
    "weight_norm": with_lengths(lambda layer: layer.parametrizations.weight.original1),
    "weight_norm by hooks": with_lengths(lambda layer: layer.weight_v),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return KINDS[kind]().double()


def log_of(wd: float) -> Tensor:
    return torch.tensor(wd, dtype=torch.float64).log().requires_grad_()


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    loss, model, log_wd = OBJECTIVES.get(kind, objective), made(kind), log_of(0.3)

    def train(model, log_wd):
        settle(model, lambda m: loss(m, log_wd))
        return model

    solve = ig.implicit(train, ig.argmin(loss))
    before, modes = state(model), [m.training for m in model.modules()]
    phi = solve(model, log_wd)
    (found,) = torch.autograd.grad(outer(phi), log_wd)

    near = made(kind)  # of several minima, the one that was found
    near.load_state_dict(phi.state_dict())

    def value(step):
        with torch.no_grad():
            return outer(solve(near, log_wd + step))

    expected = (value(1e-4) - value(-1e-4)) / 2e-4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert type(phi) is type(model) and [m.training for m in phi.modules()] == modes
    assert_same(before, state(model))
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


def test_a_closed_form_in_every_parameter():
    """φ = (XᵀX/n + wd)⁻¹ Xᵀy/n, and its derivative by wd."""
    model, log_wd = nn.Linear(3, 1, bias=False).double(), log_of(0.2)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    phi = ig.implicit(train, ig.argmin(objective))(model, log_wd)
    matrix = X.T @ X / len(X) + log_wd.exp() * torch.eye(3)
    weight = torch.linalg.solve(matrix, X.T @ Y / len(X))
    torch.testing.assert_close(phi.weight[0], weight)
    for i in range(3):
        found = torch.autograd.grad(phi.weight[0, i], log_wd, retain_graph=True, create_graph=True)
        want = torch.autograd.grad(weight[i], log_wd, retain_graph=True, create_graph=True)
        torch.testing.assert_close(found, want)
        second = [torch.autograd.grad(x[0], log_wd, retain_graph=True) for x in (found, want)]
        torch.testing.assert_close(*second)


def test_weights_that_hooks_make_are_there_before_a_call():
    model, log_wd = made("weight_norm by hooks"), log_of(0.3)
    loss = OBJECTIVES["weight_norm by hooks"]

    def train(model, log_wd):
        settle(model, lambda m: loss(m, log_wd))
        return model

    phi = ig.implicit(train, ig.argmin(loss))(model, log_wd)

    def slope():
        return torch.autograd.grad(phi[0].weight.square().sum(), log_wd, retain_graph=True)

    before = slope()
    phi(X)
    torch.testing.assert_close(before, slope())


def test_modules_that_share_a_weight_share_it_in_the_solver_and_after():
    first, second = made("plain"), made("plain")
    second.weight = first.weight
    aux = made("plain")

    def loss(phi, log_wd):
        a, b = phi
        penalty = sum(p.square().sum() for p in (a.weight, a.bias, b.bias))
        return misfit(a) + misfit(lambda x: b(x).tanh()) + log_wd.exp() * penalty

    def train(parts, log_wd):
        assert parts[0].weight is parts[1].weight
        settle(nn.ModuleList(parts), lambda m: loss(list(m), log_wd))
        return parts, aux

    log_wd = log_of(0.3)
    solve = ig.implicit(train, ig.argmin(loss), has_aux=True)
    phi, same = solve([first, second], log_wd)
    assert phi[0].weight is phi[1].weight and same is aux
    (found,) = torch.autograd.grad(outer(phi[1]), log_wd)
    with torch.no_grad():
        there, here = (outer(solve([first, second], log_wd + h)[0][1]) for h in (1e-4, -1e-4))
    torch.testing.assert_close(found, (there - here) / 2e-4, rtol=1e-6, atol=0)


class Counting(nn.Module):
    """A container's parts need not be of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_containers_with_modules_and_tensors():
    log_wd, parts = log_of(0.1), {"net": nn.Linear(3, 1).double(), "out": Counting().double()}

    def loss(phi, shift, log_wd):
        net, out = phi["net"], phi["out"]
        penalty = sum(p.square().sum() for m in (net, out) for p in m.parameters())
        return misfit(lambda x: out(net(x)) + phi["b"] + shift) + log_wd.exp() * (
            penalty + phi["b"] ** 2
        )

    def solver(parts, shift, log_wd):
        b = nn.Parameter(torch.zeros((), dtype=torch.float64))
        whole = nn.ModuleDict(parts)
        whole.b = b
        settle(whole, lambda m: loss({**parts, "b": m.b}, shift, log_wd))
        return {**parts, "b": b}

    shift = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    solve = ig.implicit(
        lambda parts, shift, log_wd: solver(parts, shift, log_wd),
        ig.argmin(lambda phi, _, shift, log_wd: loss(phi, shift, log_wd)),
    )

    def value(shift, log_wd):
        phi = solve(parts, shift, log_wd)
        return misfit(lambda x: phi["out"](phi["net"](x)) + phi["b"], X_VAL, Y_VAL)

    found = torch.autograd.grad(value(shift, log_wd), (shift, log_wd))
    with torch.no_grad():
        h = 1e-4
        by_shift = (value(shift + h, log_wd) - value(shift - h, log_wd)) / (2 * h)
        by_wd = (value(shift, log_wd + h) - value(shift, log_wd - h)) / (2 * h)
    torch.testing.assert_close(found, (by_shift, by_wd), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("holds", [False, True], ids=["module", "container"])
def test_where_phi_started_is_not_handed_to_the_function_again(holds):
    """Whether it was trained in place or copied; a module of another class is an argument."""
    seen = []

    def loss(phi, *rest):
        seen.append([type(r).__name__ for r in rest])
        model = phi["m"] if holds else phi
        shift = phi["b"] if holds else 0
        return misfit(lambda x: model(x) + shift) + sum(p.square().sum() for p in trained(model))

    start = made("plain")
    if holds:
        start = {"m": start, "b": torch.zeros((), dtype=torch.float64, requires_grad=True)}
    for train in (lambda start, *_: start, lambda start, *_: copy.deepcopy(start)):
        ig.implicit(train, ig.argmin(loss))(start, torch.ones(()))
        assert all(rest == ["Tensor"] for rest in seen) and seen
        seen.clear()
    other = {"m": made("frozen"), "b": torch.zeros(())} if holds else made("frozen")
    ig.implicit(lambda *_: start, ig.argmin(loss))(other, torch.ones(()))
    assert all(len(rest) == 2 for rest in seen) and seen


def test_theta_may_be_a_module():
    """φ = (XᵀX/n + λ)⁻¹ (Xᵀy/n + λθ): dθ is λ times the inverse, dλ as differentiated."""
    theta, lam = nn.Linear(3, 1, bias=False).double(), log_of(0.7)

    def adapt(model):
        start = model.weight.detach().clone()
        settle(model, lambda m: misfit(m) + lam.exp() * (m.weight - start).square().sum() / 2)
        return model

    def closed(weight):
        matrix = 2 * X.T @ X / len(X) + lam.exp() * torch.eye(3)
        return torch.linalg.solve(matrix, 2 * X.T @ Y / len(X) + lam.exp() * weight[0])

    want = torch.autograd.grad(closed(theta.weight).square().sum(), (theta.weight, lam))
    for form in (lambda x: x, lambda x: {"weight": x}, lambda x: (x,), lambda x: [x]):
        phi = ig.implicit(adapt, ig.proximal(misfit, form(lam.exp())))(theta)
        found = torch.autograd.grad(phi.weight.square().sum(), (theta.weight, lam))
        torch.testing.assert_close(found, want)
    learned = ig.LearnedLam(theta, 0.7)
    phi = ig.implicit(adapt, ig.proximal(misfit, learned))(theta)
    phi.weight.square().sum().backward()
    torch.testing.assert_close(theta.weight.grad, want[0])
    torch.testing.assert_close(learned.log_lam[0].grad.double(), want[1], rtol=1e-5, atol=0)
    with pytest.raises(ig.InvalidArgumentError, match="in the form of theta"):
        ig.implicit(adapt, ig.proximal(misfit, {"weigth": lam.exp()}))(theta)


@pytest.mark.parametrize("kind", ["tied", "two names", "frozen", "LoRA"])
def test_gradients_by_a_module_theta_are_those_of_finite_differences(kind):
    theta = made(kind)
    solve = ig.implicit(ig.solvers.NewtonCG(tol=1e-11), ig.proximal(misfit, 0.5))
    weights = trained(theta)
    way = [torch.randn_like(w) for w in weights]
    found = torch.autograd.grad(outer(solve(theta)), weights)
    slope = sum((g * d).sum() for g, d in zip(found, way, strict=True))

    def value(step):
        moved = copy.deepcopy(theta)
        with torch.no_grad():
            for w, d in zip(trained(moved), way, strict=True):
                w += step * d
            return outer(solve(moved))

    torch.testing.assert_close(slope, (value(1e-4) - value(-1e-4)) / 2e-4, rtol=1e-6, atol=1e-9)


MINIMISERS = {
    "NewtonCG": ig.solvers.NewtonCG(tol=1e-10),
    "GradientDescent": ig.solvers.GradientDescent(lr=0.3, tol=1e-9),
    "TorchOptim": ig.solvers.TorchOptim(factory=lambda ts: torch.optim.SGD(ts, lr=0.3), tol=1e-9),
    "SciPyMinimize": ig.solvers.SciPyMinimize(method="BFGS", tol=1e-9),
}


@pytest.mark.parametrize("name", MINIMISERS)
def test_minimisers_start_at_a_module(name):
    if name == "SciPyMinimize":
        pytest.importorskip("scipy")
    model, log_wd = made("plain"), log_of(0.2)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    before = state(model)
    gradients = []
    for solver in (train, MINIMISERS[name]):
        phi = ig.implicit(solver, ig.argmin(objective))(model, log_wd)
        assert isinstance(phi, nn.Linear)
        gradients.append(torch.autograd.grad(outer(phi), log_wd)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)
    assert_same(before, state(model))
    by_init = ig.implicit(
        MINIMISERS[name], ig.argmin(objective), init=lambda _: copy.deepcopy(model)
    )
    (found,) = torch.autograd.grad(outer(by_init(log_wd)), log_wd)
    torch.testing.assert_close(found, gradients[0], rtol=1e-6, atol=0)


def test_roots_and_fixed_points_of_modules():
    """Values for φ's parameters by name, in their order, or as a module."""
    model, log_wd = made("plain"), log_of(0.2)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    def slope(model, log_wd):
        weights = list(model.parameters())
        return torch.autograd.grad(objective(model, log_wd), weights, create_graph=True)

    def named(model, log_wd):
        names = [name for name, _ in model.named_parameters()]
        return dict(reversed(list(zip(names, slope(model, log_wd), strict=True))))

    def step(model, log_wd):
        slopes = slope(model, log_wd)
        return [p - 0.3 * g for p, g in zip(model.parameters(), slopes, strict=True)]

    def found(condition):
        phi = ig.implicit(train, condition)(model, log_wd)
        return torch.autograd.grad(outer(phi), log_wd)

    want = found(ig.argmin(objective))
    for condition in (ig.root(slope), ig.root(named), ig.fixed_point(step)):
        torch.testing.assert_close(found(condition), want)


def test_batch_norm_as_trained_and_not_trained_on():
    """Statistics are those that the loop left, not the user's, and our evaluations add none."""
    model, log_wd = made("batch norm in train mode"), log_of(0.5)
    left = {}

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        left.update(state(model))
        return model

    before = state(model)
    phi = ig.implicit(train, ig.argmin(objective), polish=1, on_failure="ignore")(model, log_wd)
    phi[2].weight.sum().backward()
    assert_same(before, state(model))
    found, names = state(phi), [name for name, _ in phi.named_buffers()]
    assert_same({n: found[n] for n in names}, {n: left[n] for n in names})
    assert int(found["1.num_batches_tracked"]) > int(before["1.num_batches_tracked"])
    phi(X)  # collects statistics of its own
    assert_same(before, state(model))
    phi.eval()
    assert model.training and model[1].training


def test_what_comes_back_can_be_saved_moved_and_evaluated(tmp_path):
    model, log_wd = made("batch norm in eval mode"), log_of(0.5)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    solve = ig.implicit(train, ig.argmin(objective))
    phi = solve(model, log_wd)
    other = made("batch norm in eval mode")
    other.load_state_dict(phi.state_dict())
    torch.testing.assert_close(other(X_VAL), phi(X_VAL))
    again = pickle.loads(pickle.dumps(phi))
    torch.testing.assert_close(again(X_VAL), phi(X_VAL))
    torch.save(phi.state_dict(), tmp_path / "phi.pt")
    (want,) = torch.autograd.grad(outer(phi), log_wd)
    with pytest.warns(UserWarning, match="not a leaf"):  # torch looks for a .grad
        narrow = solve(model, log_wd).float()
    (got,) = torch.autograd.grad(misfit(narrow, X_VAL.float(), Y_VAL.float()), log_wd)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_where_no_gradient_is_asked_for_parameters_come_back():
    model, log_wd = made("frozen"), log_of(0.5)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    solve = ig.implicit(train, ig.argmin(objective))
    with torch.no_grad():
        without = solve(model, log_wd)
    for phi in (without, solve(model, log_wd.detach()), copy.deepcopy(without)):
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in phi.parameters())
        assert [p.requires_grad for p in phi.parameters()] == [False, False, True, True]


def test_the_users_module_is_left_alone_by_whatever_the_loop_does_to_it():
    model = made("frozen")
    model.register_forward_hook(lambda *_: None)
    before, ids = state(model), [id(p) for p in model.parameters()]

    def train(model, log_wd):
        model.eval().register_forward_hook(lambda *_: None)
        model[0].requires_grad_(True)
        model[2].weight = nn.Parameter(torch.ones_like(model[2].weight))
        model.extra = nn.Parameter(torch.zeros(1))
        model[0].requires_grad_(False)
        settle(nn.ModuleList([model[2]]), lambda _: objective_without_extra(model, log_wd))
        return model

    def objective_without_extra(model, log_wd):
        return (
            misfit(model)
            + log_wd.exp()
            * (model[2].weight.square().sum() + model[2].bias.square().sum() + model.extra**2).sum()
        )

    solve = ig.implicit(train, ig.argmin(objective_without_extra))
    phi = solve(model, log_of(0.5))
    outer(phi).backward()
    assert_same(before, state(model)) and not hasattr(model, "extra")
    assert ids == [id(p) for p in model.parameters()] and model.training
    assert not any(p.requires_grad for p in model[0].parameters())
    assert len(model._forward_hooks) == 1 and len(phi._forward_hooks) == 2


def test_a_module_that_is_captured_is_trained_by_the_loop_and_keeps_its_parameters():
    model, log_wd = made("batch norm in train mode"), log_of(0.3)

    def train(log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    ids = [id(p) for p in model.parameters()]
    phi = ig.implicit(train, ig.argmin(objective))(log_wd)
    assert phi is not model and ids == [id(p) for p in model.parameters()]
    assert_same(state(phi), state(model))
    (found,) = torch.autograd.grad(outer(phi), log_wd)
    with torch.no_grad():
        model[0].weight.zero_()
        model(X)
    assert phi[0].weight.abs().sum() > 0
    assert not torch.equal(phi[1].running_mean, model[1].running_mean)
    assert found.isfinite() and found != 0


def test_warm_starts_in_a_row_keep_no_graphs():
    log_wd, kept = log_of(0.3), []

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    solve, model = ig.implicit(train, ig.argmin(objective)), made("plain")
    for _ in range(4):
        model = solve(model, log_wd)
        kept.append(weakref.ref(model.weight.grad_fn))
    gc.collect()
    assert [node() is not None for node in kept] == [False, False, False, True]
    (found,) = torch.autograd.grad(outer(model), log_wd)
    fresh = solve(made("plain"), log_wd)
    torch.testing.assert_close(found, torch.autograd.grad(outer(fresh), log_wd)[0])


def test_modules_among_the_arguments_have_their_gradients():
    """A feature extractor of which the condition's function makes use, and one that it ignores."""
    features, unused, log_wd = made("frozen")[:2], made("plain"), log_of(0.1)
    features.requires_grad_(True)

    def solver(features, unused, log_wd):
        z = features(X).detach()
        wd = len(X) * log_wd.exp() * torch.eye(4)
        return torch.linalg.solve(z.T @ z + wd, z.T @ Y)

    def loss(w, features, unused, log_wd):
        return (features(X) @ w - Y).square().mean() + log_wd.exp() * w.square().sum()

    phi = ig.implicit(solver, ig.argmin(loss))(features, unused, log_wd)
    found = torch.autograd.grad(phi.sum(), list(features.parameters()))
    z = features(X)
    wd = len(X) * log_wd.exp() * torch.eye(4)
    want = torch.linalg.solve(z.T @ z + wd, z.T @ Y).sum()
    torch.testing.assert_close(found, torch.autograd.grad(want, list(features.parameters())))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_torch_func_sees_through_modules():
    model, log_wd = made("plain"), log_of(0.3)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    def value(log_wd):
        return outer(ig.implicit(train, ig.argmin(objective))(model, log_wd))

    (want,) = torch.autograd.grad(value(log_wd), log_wd)
    at = log_wd.detach()
    torch.testing.assert_close(torch.func.grad(value)(at), want)
    torch.testing.assert_close(torch.func.jacfwd(value)(at), want)
    both = torch.func.vmap(torch.func.grad(value))(torch.stack([at, at + 1]))
    torch.testing.assert_close(both[0], want)


def test_curvature_of_the_outputs_and_certificates():
    model, log_wd = made("plain"), log_of(0.3)

    def train(model, log_wd):
        settle(model, lambda m: objective(m, log_wd))
        return model

    def seen(model, *_):
        return model(X)[:, 0], torch.cat([p.flatten() for p in model.parameters()])

    def loss(out, log_wd):
        return (out[0] - Y).square().mean() + log_wd.exp() * out[1].square().sum()

    solve = ig.implicit(train, ig.argmin(loss, model=seen), curvature="gauss_newton")
    (found,) = torch.autograd.grad(outer(solve(model, log_wd)), log_wd)
    exact = ig.implicit(train, ig.argmin(objective))
    (want,) = torch.autograd.grad(outer(exact(model, log_wd)), log_wd)
    torch.testing.assert_close(found, want)
    certificate = ig.certify(exact, (model, log_wd), outer)
    assert certificate.relative_error < 1e-9
    torch.testing.assert_close(certificate.gradients[-1], want)


class InBuffers(nn.Module):
    """A layer that keeps its weights as modules from before torch.func do, and learned scales."""

    def __init__(self, weight, scale):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.last = nn.Linear(1, 1, dtype=torch.float64)

    def forward(self, x):
        return self.last((x * self.scale) @ self.weight[:, None])


def test_weights_that_are_trained_in_buffers_are_refused():
    def train(model, a):
        model.weight = model.weight.clone().requires_grad_()
        return model

    model, a = InBuffers(torch.ones(2), torch.ones(2)), log_of(1.0)
    with pytest.raises(ig.InvalidSolutionError, match=r"buffers that require grad \(weight\)"):
        ig.implicit(train, ig.argmin(objective))(model, a)
    bare = nn.Module()
    bare.register_buffer("weight", torch.ones(2, requires_grad=True))
    with pytest.raises(ig.InvalidArgumentError, match="and so do a module's buffers"):
        ig.implicit(lambda m: m.weight.sum().backward(), ig.argmin(objective))(bare)


@pytest.mark.parametrize("made_inside", [False, True])
def test_buffers_that_the_outer_loop_trains_are_none_of_them(made_inside):
    x, weight, scale = X[:, :2], Y[:2], torch.ones_like(Y[:2]).requires_grad_()

    def loss(model):
        return misfit(model, x) + sum(p.square().sum() for p in model.parameters())

    def train(model):
        model = InBuffers(weight, scale) if made_inside else model
        settle(model, loss)
        return model

    def closed(scale):
        z = torch.stack([(x * scale) @ weight, torch.ones_like(Y)], 1)
        matrix = z.mT @ z / len(x) + torch.eye(2, dtype=torch.float64)
        return (z @ torch.linalg.solve(matrix, z.mT @ Y / len(x))).square().mean()

    trained = ig.implicit(train, ig.argmin(loss))(InBuffers(weight, scale))
    (found,) = torch.autograd.grad(trained(x).square().mean(), scale)
    torch.testing.assert_close(found, torch.func.grad(closed)(scale.detach()))


def test_what_cannot_be_is_refused():
    solve = ig.implicit(lambda m, a: m.requires_grad_(False), ig.argmin(objective))
    with pytest.raises(ig.InvalidSolutionError, match="no parameter requires grad"):
        solve(made("plain"), log_of(1.0))
    with pytest.raises(ig.InvalidArgumentError, match="weight is not initialized"):
        solve(nn.LazyLinear(1), log_of(1.0))

    def unfreezes(model, a):
        model.requires_grad_(True)
        settle(model, lambda m: objective(m, a))
        return model

    model = made("frozen")
    with pytest.raises(ig.InvalidSolutionError, match="did not require grad"):
        ig.implicit(unfreezes, ig.argmin(objective))(model, log_of(0.5))
    assert not any(p.requires_grad for p in model[0].parameters())
    with pytest.raises(ig.InvalidSolutionError, match="have the same"):
        ig.implicit(lambda m: m[2], ig.proximal(misfit, 1.0))(made("frozen"))

    def diverges(model, a):
        with torch.no_grad():
            model.bias.fill_(torch.nan)
        return model

    with pytest.raises(ig.InvalidSolutionError, match=r"phi\.bias holds NaN"):
        ig.implicit(diverges, ig.argmin(objective))(made("plain"), log_of(1.0))


def test_an_optimizer_of_the_original_is_refused():
    """The solver gets a copy, which such an optimizer does not know."""
    model, log_wd = made("plain"), log_of(1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1)

    def train(model, log_wd, optimizer=sgd):
        objective(model, log_wd).backward()
        optimizer.step()
        return model

    condition = ig.argmin(lambda model, log_wd, *_: objective(model, log_wd))
    before = state(model)
    for optimizer in (sgd, schedule):
        with pytest.raises(ig.InvalidArgumentError, match="would train the original"):
            ig.implicit(train, condition)(model, log_wd, optimizer)
    with pytest.raises(ig.InvalidSolutionError, match="make the optimizer in the solver"):
        ig.implicit(train, condition)(model, log_wd)
    assert_same(before, state(model))


def test_references_to_the_original_do_no_harm_where_the_copy_is_trained():
    model, log_wd = made("plain"), log_of(0.3)

    def train(start, log_wd):
        assert start is not model
        settle(start, lambda m: objective(m, log_wd))
        return start

    phi = ig.implicit(train, ig.argmin(objective))(model, log_wd)
    assert torch.autograd.grad(outer(phi), log_wd)[0] != 0


@pytest.mark.parametrize("in_batches", [False, True])
def test_the_start_of_a_training_that_was_stopped_has_its_gradient(in_batches):
    """Gradient steps on a quadratic: EarlyStopped's derivative is that of the steps themselves.

    So is that of several trainings in a row, each from where the last one ended.
    """
    model, log_wd, steps, lr = nn.Linear(3, 1, bias=False).double(), log_of(0.2), 7, 0.1
    whole = ig.argmin(objective)
    if in_batches:
        whole = ig.argmin(
            lambda model, rows, log_wd: (model(X[rows])[:, 0] - Y[rows]).square().sum() / len(Y),
            batches=[slice(4), slice(4, None)],
            regularizer=lambda model, log_wd: log_wd.exp() * model.weight.square().sum(),
        )

    def train(model, log_wd):
        sgd = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(steps):
            sgd.zero_grad()
            objective(model, log_wd).backward()
            sgd.step()
        return model

    stopped = ig.EarlyStopped(steps=steps, lr=lr)
    solve, phi = ig.implicit(train, whole, linear_solver=stopped), model
    for _ in range(3):
        phi = solve(phi, log_wd)
    found = torch.autograd.grad(outer(phi), model.weight)
    w = model.weight
    for _ in range(3 * steps):
        value = (X @ w[0] - Y).square().mean() + log_wd.exp() * w.square().sum()
        w = w - lr * torch.autograd.grad(value, w, create_graph=True)[0]
    torch.testing.assert_close(phi.weight, w)
    want = torch.autograd.grad((X_VAL @ w[0] - Y_VAL).square().mean(), model.weight)
    torch.testing.assert_close(found, want)


def test_a_hook_on_what_comes_back_is_not_the_originals():
    net, lam = nn.Linear(2, 1), torch.tensor(1.0, requires_grad=True)
    solve = ig.implicit(
        lambda net, lam: net,
        ig.argmin(lambda net, lam: sum((p - lam).square().sum() for p in net.parameters())),
        on_failure="ignore",
    )
    solve(net, lam).register_forward_hook(lambda *_: None)
    assert not net._forward_hooks and not solve(net, lam)._forward_hooks


class ListedTwice(nn.Module):
    """Computes by a plain list of its layers, and by a bound method that it keeps."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(2, 1)
        self.order, self.last = [self.one], {"last": self._last}

    def _last(self, x):
        return self.other(x)

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return self.last["last"](x)


def test_copies_compute_with_their_own_layers_however_they_hold_them():
    torch.set_default_dtype(torch.float64)
    X, y = torch.randn(20, 3), torch.randn(20, 1)
    lam = torch.tensor(0.3, requires_grad=True)

    def objective(net, lam):
        return (net(X) - y).square().mean() + lam * sum(p.square().sum() for p in net.parameters())

    def value(net, lam):
        solve = ig.implicit(
            ig.solvers.NewtonCG(tol=1e-9), ig.argmin(objective), init=lambda net, lam: net
        )
        return (solve(net, lam)(X) ** 2).mean()

    listed = ListedTwice()
    plain = nn.Sequential(listed.one, listed.other)
    found, expected = value(listed, lam), value(plain, lam)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, lam)[0] for v in (found, expected)))
    torch.set_default_dtype(torch.float32)


def test_what_the_solver_freezes_is_told():
    def solve(net, lam):
        net[0].requires_grad_(False)
        return net

    def objective(net, lam):
        return sum(p.square().sum() for p in net.parameters()) + lam * net(torch.ones(1, 2)).sum()

    wrapped = ig.implicit(solve, ig.argmin(objective))
    net, lam = (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)),
        torch.tensor(1.0, requires_grad=True),
    )
    with pytest.warns(ig.ImplicitGradWarning, match="the solver froze 0.weight, 0.bias"):
        wrapped(net, lam)


def test_a_module_that_only_looks_like_the_first_argument_is_explained():
    teacher, X = nn.Linear(3, 1), torch.ones(2, 3)
    solve = ig.implicit(lambda t, X: nn.Linear(3, 1), ig.argmin(lambda s, t, X: s(X).sum()))
    with pytest.raises(ig.InvalidSolutionError, match="taken for it, trained"):
        solve(teacher, X.requires_grad_())


@pytest.mark.parametrize("solver", ["FixedPoint", "Newton", "Broyden"])
def test_root_finders_say_what_to_give_for_a_module(solver):
    with pytest.raises(ig.InvalidArgumentError, match="named_parameters"):
        getattr(ig.solvers, solver)().find_root(lambda net: net, nn.Linear(2, 1))


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


class Growing(nn.Module):
    """x ↦ x·exp(weight), by a parametrization."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        parametrize.register_parametrization(self, "weight", Exponential(), unsafe=True)

    def forward(self, x):
        return x * self.weight


def test_cached_parametrizations_are_those_of_no_other_copy():
    """torch's cache knows modules by ids, which the copies that we make take from one another."""
    model, y = Growing(), torch.arange(1.0, 4.0, dtype=torch.float64)

    def objective(w, model):
        return (model(w) - y).square().sum() / 2

    def solved(model):
        return (y / model.weight).detach()

    with parametrize.cached():
        w = ig.implicit(solved, ig.argmin(objective))(model)
        w.sum().backward()
    by_weight = model.parametrizations.weight.original.grad
    expected = -y / model.weight  # of y·exp(−original)
    torch.testing.assert_close(by_weight, expected.detach())


def test_minimisers_train_what_a_cache_around_would_have_kept():
    y, lam = torch.arange(1.0, 4.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)

    def objective(model, lam):
        return (model.weight - y).square().sum() / 2 + lam * model.weight.square().sum() / 2

    lam.requires_grad_()
    with parametrize.cached():
        model = ig.implicit(ig.solvers.NewtonCG(tol=1e-12), ig.argmin(objective))(Growing(), lam)
    model.weight.sum().backward()
    torch.testing.assert_close(model.weight.detach(), y / 1.5)
    torch.testing.assert_close(lam.grad, -(y / 1.5**2).sum())
