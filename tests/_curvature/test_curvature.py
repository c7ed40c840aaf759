"""What A is made of: each kind of product right, the ladder's choice, and what each one costs."""

import copy
import functools
import gc
import weakref

import optree
import pytest
import torch
from problems import minimize, normal, prox, wavy
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jacrev
from torch.nn.functional import mse_loss, scaled_dot_product_attention, softplus

import implicit_grad as ig
from implicit_grad._curvature.finite_difference import FiniteDifference
from implicit_grad._curvature.hessian import Hessian
from implicit_grad._curvature.objective import Objective

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    # of torch.compile
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
SOLVED = {"linear_solver": ig.CG(rtol=1e-12), "on_failure": "raise"}
QUIET = {"linear_solver": ig.Exact(), "on_failure": "ignore"}
FINITE = "finite_difference"
RUNS_EAGERLY = hasattr(torch.compiler, "set_stance")  # what torch.compile compiled, where asked to


@pytest.fixture(autouse=True)
def every_warning():
    """Those that torch gives once a process too: of a tensor with a graph made a number."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def close(actual, expected, tolerance=1e-9):
    """Equal relative to the size of all that is expected, none of it zero."""
    actual, expected = (torch.cat([t.double().flatten() for t in ts]) for ts in (actual, expected))
    assert expected.norm() > 1e-6
    assert (actual - expected).norm() <= tolerance * expected.norm()


def here(theta, *args):
    """A solver that stays where it is: what follows is linear algebra around that point."""
    return optree.tree_map(torch.clone, optree.tree_map(torch.detach, theta))


def hessian(function):
    """As a dense matrix, by reverse over reverse."""
    return jacrev(jacrev(function))


def gradients(phi, wanted, **options):
    """Of an outer loss without symmetry."""
    return torch.autograd.grad(wavy(phi), wanted, **options)


# ---------------------------------------------------------------- each kind, by dense algebra


def network(w, X):
    """A tanh network of 8 weights, and its weights, so that a penalty on them is part of a loss."""
    hidden = torch.tanh(X @ w[:6].view(3, 2))
    return hidden @ w[6:], w


def criterion(outputs, X, y):
    """A squared error far from zero and a quartic penalty."""
    prediction, weights = outputs
    return (prediction - 5 * y).square().mean() + (weights**4).sum() / 8


def full_loss(w, X, y):
    return criterion(network(w, X), X, y)


def dense_hessian(w, X, y):
    return hessian(full_loss)(w, X, y)


def dense_gauss_newton(w, X, y):
    """Jᵀ (∂²criterion/∂outputs²) J, formed."""
    n = len(X)

    def flat_loss(outputs):
        return criterion((outputs[:n], outputs[n:]), X, y)

    def flat_model(w):
        return torch.cat(network(w, X))

    J = jacrev(flat_model)(w)
    return J.T @ hessian(flat_loss)(flat_model(w)) @ J


KINDS = {
    "auto": (dense_hessian, 1e-10),
    "hessian": (dense_hessian, 1e-10),
    "gauss_newton": (dense_gauss_newton, 1e-10),
    FINITE: (dense_hessian, 1e-7),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", ["argmin", "proximal"])
def test_each_kind_is_its_dense_matrix(condition, kind):
    theta, X, y = normal(8, seed=1), normal(10, 3, seed=2), normal(10, seed=3)
    matrix, tolerance = KINDS[kind]
    A = matrix(theta.detach(), X, y) + 2 * torch.eye(8)
    cross = jacrev(jacrev(full_loss), argnums=(1, 2))(theta.detach(), X, y)
    u = torch.linalg.solve(A, torch.autograd.grad(wavy(theta), theta)[0])
    expected = [2 * u, *(-torch.tensordot(u, c, 1) for c in cross)]

    def model(w, *args):
        return network(w, args[-2]), w

    def penalised(outputs, theta, X, y):
        return criterion(outputs[0], X, y) + prox(outputs[1], theta, 2.0)

    made = (
        ig.proximal(criterion, 2.0, model=lambda w, X, y: network(w, X))
        if condition == "proximal"
        else ig.argmin(penalised, model=model)
    )
    monitor = ig.Monitor()
    solve = ig.implicit(here, made, curvature=kind, monitor=monitor, **QUIET)
    close(gradients(solve(theta, X, y), (theta, X, y)), expected, tolerance)
    assert monitor.last.curvature == ("hessian" if kind == "auto" else kind)
    least = torch.linalg.eigvalsh(A)[0]
    assert abs(monitor.last.min_curvature - least) <= 1e-6 * torch.linalg.matrix_norm(A)
    assert kind == "gauss_newton" or least < 0 or condition == "argmin"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("size", "length"), [(1e-3, 1.0), (1.0, 1.0), (1.0, 1e3)])
def test_differences_are_as_precise_as_is_said(size, length, dtype, tolerance):
    """For φ of any size, if the loss changes over a length of max(1, ‖φ‖); and for any v."""
    theta, X, c = (normal(*s, seed=i) for i, s in enumerate([(5,), (9, 5), (9,)]))
    inputs = [(t.detach() * k).to(dtype).requires_grad_() for t, k in ((theta, size), (X, 1))]
    inputs[0].data *= length

    def loss(w, X):
        return (softplus(X @ w / length + c.to(dtype)) * length**2).sum()

    worst = 0.0
    for weight in (1e-6, 1e6):
        found = []
        for kind in ("hessian", FINITE):
            solve = ig.implicit(here, ig.proximal(loss, 0.5), curvature=kind, **QUIET)
            v = weight * torch.linspace(-1, 2, 5, dtype=dtype)
            found.append(torch.autograd.grad(solve(*inputs), inputs, v))
        for exact, differences in zip(*found, strict=True):
            worst = max(worst, float((exact - differences).norm() / exact.norm()))
    print(f"{dtype}, size {size:g}, length {length:g}: relative error {worst:.1e}")
    assert worst <= tolerance


# ---------------------------------------------------------------- the ladder


class Cube(torch.autograd.Function):
    """x³/3, marked as differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors[0] ** 2 * g


class Then(nn.Module):
    """A layer, something special, and their mean over all but the batch."""

    def __init__(self, layer, special=lambda x: x):
        super().__init__()
        self.layer, self.special = layer, special

    def forward(self, x):
        output = self.special(self.layer(x))
        return torch.tanh(output[0] if isinstance(output, tuple) else output).flatten(1)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)


def attention(x):
    return scaled_dot_product_attention(*x.chunk(3, -1))


SEQUENCE = (2, 3, 4)  # batch, time, features
LADDER = {
    "EmbeddingBag": (lambda: Then(nn.EmbeddingBag(6, 3, mode="mean")), None, FINITE),
    "once_differentiable": (lambda: Then(nn.Linear(4, 2), Cube.apply), SEQUENCE, FINITE),
    "torch.compile": (
        lambda: Then(nn.Linear(4, 2), torch.compile(torch.sin, backend="aot_eager")),
        SEQUENCE,
        "hessian" if RUNS_EAGERLY else FINITE,
    ),
    "attention": (lambda: Then(nn.Linear(4, 6), attention), SEQUENCE, "hessian"),
    "MultiheadAttention": (
        lambda: Then(SelfAttention(4, 2, batch_first=True)),
        SEQUENCE,
        "hessian",
    ),
    "TransformerEncoderLayer": (
        lambda: Then(nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True)),
        SEQUENCE,
        "hessian",
    ),
    "LSTM": (lambda: Then(nn.LSTM(4, 2, batch_first=True)), SEQUENCE, "hessian"),
}
SECOND_RUNG = [name for name, (*_, rung) in LADDER.items() if rung == FINITE]
LAM, LR = 3.0, 0.25
DESCENT = ig.solvers.GradientDescent(lr=LR, tol=1e-13)


def error(output):
    """A loss whose targets are no minimum of anything."""
    return (output - torch.linspace(-1, 2, output.numel()).view_as(output)).square().mean()


def climb(name):
    """The model, its data, and which rung its products are found on."""
    torch.manual_seed(1)
    make, shape, rung = LADDER[name]
    x = torch.randint(0, 6, (5, 4)) if shape is None else normal(*shape, seed=2, grad=False)
    return make().train(), x, rung


def differences_of_the_solver(model, x, directions):
    """Derivatives of the outer loss along directions in θ: the inner problem solved each time."""
    theta = {n: p.detach() for n, p in model.named_parameters()}

    def outer(step):
        start = {n: t + d for (n, t), d in zip(theta.items(), step, strict=True)}

        def objective(phi):
            return error(functional_call(model, phi, (x,))) + prox(phi, start, LAM)

        return wavy(DESCENT.minimize(objective, start))

    def along(direction, h=2e-3):  # of fourth order
        ahead, behind = (
            [outer([s * k * h * t for t in direction]) for k in (1, 2)] for s in (1, -1)
        )
        return (8 * (ahead[0] - behind[0]) - (ahead[1] - behind[1])) / (12 * h)

    return [along(direction) for direction in directions]


def check_against_the_solver(found, model, x):
    """Gradients by θ against differences of the whole solver, along two random directions."""
    parameters = list(model.parameters())
    directions = [[normal(*p.shape, seed=9 + i, grad=False) for p in parameters] for i in range(2)]
    along = [
        torch.stack([(g * t).sum() for g, t in zip(found, direction, strict=True)]).sum()
        for direction in directions
    ]
    close(along, differences_of_the_solver(model, x, directions), 1e-7)


def meta(model, **options):
    return ig.imaml(model, lr=LR, lam=LAM, **options)


def weights(learner):
    return list(learner.module.parameters())


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_finds_the_first_rung_that_works(name):
    model, x, rung = climb(name)
    theta, monitor = dict(model.named_parameters()), ig.Monitor()

    def loss(phi, scale=1.0):
        return scale * error(functional_call(model, phi, (x,)))

    solve = ig.implicit(DESCENT, ig.proximal(loss, LAM), monitor=monitor, **SOLVED)
    found = gradients(solve(theta), list(theta.values()))
    assert monitor.last.curvature == rung and monitor.last.min_curvature > 0
    check_against_the_solver(found, model, x)

    maml = meta(model, solver=DESCENT, monitor=monitor, **SOLVED)
    learner = maml.clone()
    learner.adapt(lambda: error(learner(x)))
    # in the order in which dicts of parameters are read
    outer = wavy(dict(learner.module.named_parameters()))
    close(torch.autograd.grad(outer, list(theta.values())), found, 1e-8)
    assert monitor.last.curvature == rung

    learner = meta(model, monitor=monitor, **SOLVED).clone()
    for _ in range(60):
        learner.adapt(error(learner(x)))
    outer = wavy(dict(learner.module.named_parameters()))
    if rung == FINITE:
        with pytest.raises(ig.GraphError, match=r"no second derivative.*learner\.adapt\(lambda"):
            outer.backward()
    else:
        close(torch.autograd.grad(outer, list(theta.values())), found, 1e-8)


@pytest.mark.parametrize("name", SECOND_RUNG)
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_pinned_rung_is_not_left(name, kind):
    model, x, _ = climb(name)
    theta = dict(model.named_parameters())

    def output(phi):
        return functional_call(model, phi, (x,))

    solve = ig.implicit(here, ig.proximal(error, LAM, model=output), curvature=kind, **QUIET)
    with pytest.raises(RuntimeError):
        gradients(solve(theta), list(theta.values()))


def test_a_general_solver_takes_a_pinned_hessian():
    """Whose products with A and Aᵀ are the same."""
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    found = []
    for linear_solver in (ig.NormalCG(rtol=1e-13), ig.Exact()):
        options = {"linear_solver": linear_solver, "curvature": "hessian"}
        condition = ig.proximal(lambda phi, X: softplus(X @ phi).sum(), LAM)
        found.append(gradients(ig.implicit(here, condition, **QUIET | options)(theta, X), theta))
    close(*found, 1e-11)


def test_a_general_solver_needs_the_derivative_of_the_backward_pass():
    theta = normal(3, seed=1)
    condition = ig.root(lambda phi, theta: Cube.apply(phi) + phi - theta)
    phi = ig.implicit(here, condition, linear_solver=ig.NormalCG(), on_failure="ignore")(theta)
    with pytest.raises(ig.GraphError, match=r"marked as once_diff.*use .*Neumann\(\) or Exact\(\)"):
        phi.sum().backward()
    phi = ig.implicit(here, condition, **QUIET)(theta)
    close(torch.autograd.grad(phi.sum(), theta), [1 / (theta.detach() ** 2 + 1)])


@pytest.mark.parametrize("cotangent", [0.0, float("nan")])
def test_differences_along_no_direction(cotangent):
    theta = normal(3, seed=1)
    condition = ig.proximal(lambda phi: (phi**4).sum(), LAM)
    phi = ig.implicit(here, condition, curvature=FINITE, **QUIET)(theta)
    found = torch.autograd.grad(phi, theta, torch.full_like(phi, cotangent))[0]
    torch.testing.assert_close(found, torch.full_like(found, cotangent), equal_nan=True)


@pytest.mark.parametrize("name", SECOND_RUNG)
def test_no_second_derivatives_off_the_first_rung(name):
    model, x, _ = climb(name)
    theta = dict(model.named_parameters())
    condition = ig.proximal(lambda phi: error(functional_call(model, phi, (x,))), LAM)
    phi = ig.implicit(here, condition, **QUIET)(theta)
    with pytest.raises(RuntimeError):
        gradients(gradients(phi, list(theta.values()), create_graph=True), list(theta.values()))


def test_a_model_may_return_more_than_its_outputs():
    theta, X, found = normal(3, seed=1), normal(4, 3, seed=2), []

    def more(w, X):
        return {"y": X @ w, "labels": torch.arange(4), "data": X.detach(), "name": "linear"}

    def criterion(y, X):
        if isinstance(y, dict):
            assert y["name"] == "linear" and y["labels"].sum() == 6
            y = y["y"] + 0 * y["data"].sum(1)
        return softplus(y).sum()

    for model in (lambda w, X: X @ w, more):
        condition = ig.proximal(criterion, LAM, model=model)
        phi = ig.implicit(here, condition, curvature="gauss_newton", **QUIET)(theta, X)
        found.append(gradients(phi, (theta, X)))
    close(*found, 1e-12)


def test_what_lies_behind_phi_does_not_matter():
    """Features from a function that is differentiable once: ∇²loss does not go through it."""
    raw, labels = normal(6, 4, seed=2), normal(6, 2, seed=3, grad=False)
    found = []
    for features in (Cube.apply(raw), raw**3 / 3):
        torch.manual_seed(1)
        learner = meta(nn.Linear(4, 2), **SOLVED).clone()
        learner.adapt(mse_loss(learner(features), labels))
        found.append(gradients(weights(learner), raw))
    close(*found, 1e-12)


# ---------------------------------------------------------------- differences, and their manners


def in_clamps(scores, labels):
    """multi_margin_loss in operations that have second derivatives."""
    margins = (1 - scores.gather(1, labels[:, None]) + scores).clamp(min=0)
    return margins.scatter(1, labels[:, None], 0.0).sum(1).mean() / scores.shape[1]


F = torch.nn.functional
SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772  # selu's
PAIRS = torch.combinations(torch.arange(2500))[::150]  # of scores, many of them nearly equal
EACH, TWOS = torch.arange(len(PAIRS)), torch.full((len(PAIRS),), 2)


def pairs(x):
    return x.flatten()[PAIRS]


PIECES = {
    "hardsigmoid": (
        lambda x, y: F.hardsigmoid(x).square().mean(),
        lambda x, y: (x / 6 + 0.5).clamp(0, 1).square().mean(),
    ),
    "multi_margin_loss": (F.multi_margin_loss, in_clamps),
    "multilabel_margin_loss": (
        lambda x, y: F.multilabel_margin_loss(x, F.pad(y[:, None], (0, 4), value=-1)),
        in_clamps,
    ),
    "cummax": (
        lambda x, y: x.cummax(1).values.square().mean(),
        lambda x, y: torch.stack([x[:, : i + 1].amax(1) for i in range(5)]).square().mean(),
    ),
    "fmax": (
        lambda x, y: torch.fmax(x, x.flip(1)).square().mean(),
        lambda x, y: torch.maximum(x, x.flip(1)).square().mean(),
    ),
    "nanmedian": (
        lambda x, y: x.nanmedian(1).values.mean(),
        lambda x, y: x.sort(1).values[:, 2].mean(),
    ),
    "quantile": (
        lambda x, y: x.quantile(0.25, dim=1).mean(),
        lambda x, y: x.sort(1).values[:, 1].mean(),
    ),
    "1-norm": (
        lambda x, y: x.norm(p=1, dim=1).square().mean(),
        lambda x, y: x.abs().sum(1).square().mean(),
    ),
    "maximum norm": (
        lambda x, y: x.norm(p=torch.inf, dim=1).square().mean(),
        lambda x, y: x.abs().amax(1).square().mean(),
    ),
    "cdist": (
        lambda x, y: torch.cdist(x[:9], x[9:18], p=1).square().mean(),
        lambda x, y: (x[:9, None] - x[9:18]).abs().sum(2).square().mean(),
    ),
    "pdist": (
        lambda x, y: F.pdist(x[:40], p=1).mean(),
        lambda x, y: (x[:40, None] - x[:40]).abs().sum(2).sum() / 1560,
    ),
    "distance": (
        lambda x, y: torch.dist(*pairs(x).T, 1) / len(PAIRS),
        lambda x, y: pairs(x).diff().abs().sum() / len(PAIRS),
    ),
    "pairwise distance": (
        lambda x, y: F.pairwise_distance(*pairs(x)[..., None].unbind(1), p=1, eps=0).mean(),
        lambda x, y: pairs(x).diff().abs().mean(),
    ),
    "prelu": (
        lambda x, y: F.prelu(x, x.mean()).mean(),
        lambda x, y: torch.where(x > 0, x, x.mean() * x).mean(),
    ),
    "selu": (
        lambda x, y: F.selu(x).mean(),
        lambda x, y: torch.where(x > 0, SCALE * x, SCALE * ALPHA * x.expm1()).mean(),
    ),
    "elu, in place": (
        lambda x, y: F.elu(1 * x, 2.0, inplace=True).mean(),
        lambda x, y: torch.where(x > 0, x, 2 * x.expm1()).mean(),
    ),
    "hardswish": (
        lambda x, y: F.hardswish(x).mean(),
        lambda x, y: torch.where(x > -3, torch.where(x > 3, x, x * (x + 3) / 6), 0).mean(),
    ),
    "rrelu": (lambda x, y: F.rrelu(x, 0.1, 0.3).mean(), lambda x, y: F.leaky_relu(x, 0.2).mean()),
    "rrelu, in place": (
        lambda x, y: F.rrelu(1 * x, 0.1, 0.3, inplace=True).mean(),
        lambda x, y: F.leaky_relu(x, 0.2).mean(),
    ),
    "leaky_relu, in place": (
        lambda x, y: F.leaky_relu(1 * x, 0.2, inplace=True).mean(),
        lambda x, y: F.leaky_relu(x, 0.2).mean(),
    ),
    "threshold, in place": (
        lambda x, y: F.threshold(1 * x, 0.0, 0.0, inplace=True).mean(),
        lambda x, y: x.relu().mean(),
    ),
    "embedding_bag": (
        lambda x, y: F.embedding_bag(PAIRS, x.view(-1, 1), mode="max").mean(),
        lambda x, y: pairs(x).amax(1).mean(),
    ),
    "scatter_reduce": (
        lambda x, y: pairs(x)[:, 0].scatter_reduce(0, EACH, pairs(x)[:, 1], "amax").mean(),
        lambda x, y: pairs(x).amax(1).mean(),
    ),
    "scatter_reduce, products": (
        lambda x, y: pairs(x)[:, 0].scatter_reduce(0, EACH, pairs(x)[:, 1], "prod").mean(),
        lambda x, y: pairs(x).prod(1).mean(),
    ),
    "segment_reduce": (
        lambda x, y: torch.segment_reduce(pairs(x).view(-1), "max", lengths=TWOS).mean(),
        lambda x, y: pairs(x).amax(1).mean(),
    ),
    "a label of its own": (
        lambda x, y: F.cross_entropy(pairs(x), pairs(x).argmax(1)),
        lambda x, y: (pairs(x).logsumexp(1) - pairs(x).amax(1)).mean(),
    ),
    "labels of pixels": (
        lambda x, y: F.cross_entropy(pairs(x).T[None, :, None], pairs(x).argmax(1)[None, None]),
        lambda x, y: (pairs(x).logsumexp(1) - pairs(x).amax(1)).mean(),
    ),
}
made_by = torch.aminmax(torch.ones(2, requires_grad=True)).min.grad_fn
if type(made_by).__name__ != "NotImplemented":  # as in torch 2.4
    PIECES["aminmax"] = (
        lambda x, y: torch.stack(torch.aminmax(x, dim=1)).mean(),
        lambda x, y: torch.stack([x.amin(1), x.amax(1)]).mean(),
    )


@pytest.mark.parametrize("name", PIECES)
def test_differences_stay_on_the_piece_of_each_operation(name):
    torch.manual_seed(0)
    x, y = torch.randn(500, 6).float(), torch.arange(500) % 5
    w, v = torch.randn(6, 5).float().requires_grad_(), torch.randn(6, 5).float()

    def product(loss, curvature):
        def objective(phi):
            return loss(4 * torch.tanh(x @ phi), y)

        solver = {"linear_solver": ig.CG(maxiter=1), "on_failure": "ignore"}
        solve = ig.implicit(torch.clone, ig.proximal(objective, 1.0), curvature=curvature, **solver)
        return gradients([solve(w) * v], w)

    of_torch, by_hand = PIECES[name]
    close(product(of_torch, FINITE), product(by_hand, "hessian"), 5e-4)


CHOICES = {
    "mask": lambda x: ((x > 0) * x.exp()).sum() / (x > 0).sum(),
    "elements": lambda x: pairs(x)[pairs(x)[:, 0] > pairs(x)[:, 1]].mean(),
    "assignment": lambda x: x.exp().index_put((x < 0,), torch.tensor(0.0)).mean(),
    "argmax": lambda x: pairs(x)[EACH, pairs(x).argmax(1)].mean(),
    "argsort": lambda x: (x[x[:, 0].argsort()] * torch.linspace(0, 1, 500)[:, None]).tanh().mean(),
    "sign": lambda x: (x.sign() * x).mean(),
    "round": lambda x: ((2 * x).round() * x.exp()).mean(),
    "vmap": lambda x: torch.func.vmap(lambda row: ((row > 0) * row.exp()).sum())(x).mean(),
}


@pytest.mark.parametrize("name", CHOICES)
def test_differences_choose_what_was_chosen_at_phi(name):
    torch.manual_seed(0)
    x, phi = torch.randn(500, 6).float(), torch.randn(6, 5).float().requires_grad_()
    u = (torch.randn(6, 5).float(),)

    def again(phi):
        return CHOICES[name](4 * torch.tanh(x @ phi[0]))

    objective = Objective(again((phi,)), (phi,), again=again)
    products = [kind(objective).smooth_transposed(u) for kind in (FiniteDifference, Hessian)]
    close(*products, 1e-3)


def test_differences_choose_anew_in_checkpoints():
    """A checkpoint that goes forward again in backward has to find what it found before."""
    torch.manual_seed(0)
    x, phi = torch.randn(5000, 6).float(), torch.randn(6, 5).float().requires_grad_()

    def part(phi):
        scores = 4 * torch.tanh(x @ phi)
        return scores[scores > 0.5].mean()

    def again(phi):
        return torch.utils.checkpoint.checkpoint(part, *phi, use_reentrant=False)

    objective = Objective(again((phi,)), (phi,), again=again)
    (product,) = FiniteDifference(objective).smooth_transposed((torch.randn(6, 5).float(),))
    assert product.isfinite().all()


def test_differences_may_meet_other_numbers_of_elements():
    """Of those that a mask takes, there are more or fewer as φ moves: NumPy's are not held."""
    torch.manual_seed(0)
    x, w = torch.randn(300, 6).float(), torch.randn(6, 5).float().requires_grad_()

    def objective(phi):
        scores = torch.tanh(x @ phi)
        return scores[torch.from_numpy(scores.detach().numpy() > 0)].relu().square().mean()

    solver = {"linear_solver": ig.CG(maxiter=1), "on_failure": "ignore"}
    found = []
    for curvature in FINITE, "hessian":
        solve = ig.implicit(torch.clone, ig.proximal(objective, 1.0), curvature=curvature, **solver)
        found.append(gradients([solve(w).sum()], w))
    close(*found, 0.1)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_differences_stay_on_the_piece_that_phi_is_on(seed):
    """In float32, steps cross kinks, of each of which a difference makes a jump over the step."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(200, 40), nn.ReLU(), nn.Linear(40, 5)).float()
    x, y = torch.randn(10, 1, 12, 12).float(), torch.arange(10) % 5

    def loss(model):
        return torch.nn.functional.cross_entropy(model(x), y)

    def products(curvature):
        solver = {"linear_solver": ig.CG(maxiter=1), "on_failure": "ignore"}
        solve = ig.implicit(copy.deepcopy, ig.proximal(loss, 1.0), curvature=curvature, **solver)
        weights = list(model.parameters())
        return gradients(list(solve(model).parameters()), weights)

    close(products(FINITE), products("hessian"), 5e-4)


@pytest.mark.parametrize("seed", [0, 2])
def test_differences_see_how_networks_bend(seed):
    """Batch norm of few images bends over a short way: float32's longest step goes beyond."""
    torch.manual_seed(seed)
    blocks = (
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 16, 3),
    )
    model = nn.Sequential(*blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    model, x, y = model.float(), torch.randn(5, 1, 14, 14).float(), torch.arange(5)

    def loss(model):
        return torch.nn.functional.cross_entropy(model(x), y)

    def products(curvature):
        solver = {"linear_solver": ig.CG(maxiter=3), "on_failure": "ignore"}
        solve = ig.implicit(copy.deepcopy, ig.proximal(loss, 0.02), curvature=curvature, **solver)
        return gradients(list(solve(model).parameters()), list(model.parameters()))

    close(products(FINITE), products("hessian"), 1e-2)


def test_differences_refuse_data_that_have_changed():
    data = [normal(4, 3, seed=2, grad=False)]
    theta, model = normal(3, seed=1), nn.Linear(3, 2)

    def loss(phi):
        return softplus(data[0] @ phi).sum()

    phi = ig.implicit(here, ig.proximal(loss, 0.5), curvature=FINITE, **QUIET)(theta)
    maml = meta(model, curvature=FINITE)
    learner = maml.clone()
    learner.adapt(lambda: learner(data[0]).square().sum())
    gradients(phi, theta, retain_graph=True)
    data[0] = data[0] + 1
    for outcome in (phi, weights(learner)):
        with pytest.raises(ig.GraphError, match="a variable that has changed since"):
            wavy(outcome).backward()


@pytest.mark.parametrize("way", ["implicit", "imaml"])
def test_differences_leave_everything_as_it_was(way):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x = normal(8, 3, seed=2, grad=False)
    masks = []
    model[2].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    if way == "imaml":
        learner = meta(model, curvature=FINITE, on_failure="ignore").clone()
        learner.adapt(lambda: learner(x).square().mean(), steps=2)
        phi, module = weights(learner), learner.module
    else:
        theta, module = dict(model.named_parameters()), model
        condition = ig.proximal(lambda w: functional_call(model, w, (x,)).square().mean(), 1.0)
        phi = ig.implicit(here, condition, curvature=FINITE, **QUIET)(theta)

    def fingerprint():
        return (
            copy.deepcopy(list(module.buffers())),
            [p.detach().clone() for p in module.parameters()],
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        )

    drawn = len(masks) - 1
    torch.rand(3)  # what is drawn between forward and backward does not matter
    before = fingerprint()
    installed = [id(p) for p in module.parameters()]
    found = gradients(phi, list(model.parameters()))
    torch.testing.assert_close(fingerprint(), before, rtol=0, atol=0)
    assert [id(p) for p in module.parameters()] == installed
    assert all(torch.isfinite(g).all() for g in found) and len(masks) > drawn + 2
    # units that die or come to life by a step of 1e-5 are not expected: the masks are the same
    assert all(torch.equal(mask, masks[drawn]) for mask in masks[drawn:])


def test_differences_need_the_learner():
    model, x = nn.Linear(3, 2), normal(4, 3, seed=2, grad=False)
    learner = meta(model, curvature=FINITE).clone()

    def loss(learner=learner):
        return learner(x).square().sum()

    learner.adapt(loss)
    adapted = weights(learner)
    del learner, loss
    gc.collect()
    with pytest.raises(ig.GraphError, match="keep the learner until backward"):
        wavy(adapted).backward()


def test_differences_need_a_function():
    learner = meta(nn.Linear(3, 2), curvature=FINITE).clone()
    learner.adapt(learner(normal(4, 3, seed=2, grad=False)).square().sum())
    with pytest.raises(ig.GraphError, match=r"needs the inner objective as a function"):
        wavy(weights(learner)).backward()


@pytest.mark.parametrize(("kind", "freed"), [("auto", True), ("hessian", True), (FINITE, False)])
def test_only_differences_leave_learners_to_the_garbage_collector(kind, freed):
    gc.disable()
    try:
        learner = meta(nn.Linear(3, 2), curvature=kind).clone()
        x, gone = normal(4, 3, seed=2, grad=False), weakref.ref(learner.module)

        def loss(learner=learner):
            return learner(x).square().sum()

        learner.adapt(loss)
        wavy(weights(learner)).backward()
        del learner, loss
        assert (gone() is None) == freed
    finally:
        gc.enable()
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("kind", ["auto", "hessian", "gauss_newton"])
def test_second_derivatives_of_each_kind(kind):
    """The model is linear in φ: then Gauss-Newton is the Hessian, at every φ."""

    def solver(theta, X):
        return minimize(lambda w: softplus(X @ w).sum() + prox(w, theta, 0.7), theta)

    condition = ig.proximal(lambda z, X: softplus(z).sum(), 0.7, model=lambda w, X: X @ w)
    solve = ig.implicit(solver, condition, curvature=kind, linear_solver=ig.Exact())
    inputs = normal(3, seed=1), normal(4, 3, seed=2)
    assert torch.autograd.gradgradcheck(solve, inputs, rtol=1e-6, atol=1e-7)


def test_no_second_derivatives_by_differences():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    condition = ig.proximal(lambda w, X: softplus(X @ w).sum(), 0.7)
    phi = ig.implicit(here, condition, curvature=FINITE, **QUIET)(theta, X)
    with pytest.raises(ig.GraphError, match="first derivatives only"):
        gradients(phi, theta, create_graph=True)


# ---------------------------------------------------------------- negative curvature


@pytest.mark.parametrize("style", ["implicit", "function", "tensor"])
@pytest.mark.parametrize("substitute", ["minres", "gauss_newton"])
def test_what_takes_the_place_of_an_indefinite_system(substitute, style):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    x, lam, monitor = normal(5, 3, seed=2, grad=False), 0.1, ig.Monitor()
    shapes = [p.shape for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    solver = ig.CG(rtol=1e-12, on_negative_curvature=substitute)
    options = {"linear_solver": solver, "monitor": monitor, "on_failure": "ignore"}

    def far_off(output):
        return (output - 20).square().mean()

    def output(w):
        parts = w.split([s.numel() for s in shapes])
        return functional_call(
            model, {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}, (x,)
        )

    start = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    if style == "implicit":
        phi = ig.implicit(here, ig.proximal(far_off, lam, model=output), **options)(start)
        found = torch.autograd.grad(wavy(phi), start)
    else:
        maml = ig.imaml(model, lr=1e-9, lam=lam, **options)
        learner = maml.clone()
        learner.adapt((lambda: far_off(learner(x))) if style == "function" else far_off(learner(x)))
        found = gradients(weights(learner), list(model.parameters()))
    at, eye = start.detach(), lam * torch.eye(len(start))
    full = hessian(lambda w: far_off(output(w)))(at)
    J = jacrev(lambda w: output(w).flatten())(at)
    curved = {"minres": full, "gauss_newton": J.T @ J * 2 / len(x)}[substitute]
    v = torch.autograd.grad(wavy(start), start)[0]
    assert torch.linalg.eigvalsh(full)[0] < -1
    close(found, [lam * torch.linalg.solve(curved + eye, v)], 1e-6)
    assert monitor.last.substitute == substitute and monitor.last.min_curvature < 0
    assert monitor.last.solve_error_bound is None


# ---------------------------------------------------------------- what a solve costs


class Square(torch.autograd.Function):
    """x², counting the products with its second derivative."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(*ctx.saved_tensors, g)


class Slope(torch.autograd.Function):
    """2 x g."""

    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 2 * x * g

    @staticmethod
    def backward(ctx, w):
        Square.count += 1
        x, g = ctx.saved_tensors
        return 2 * g * w, 2 * x * w


@pytest.mark.parametrize(
    "solver",
    [
        ig.CG(),
        ig.CG(maxiter=3),
        ig.CG(maxiter=0),
        ig.CG(preconditioner=ig.Jacobi()),
        ig.MINRES(),
        ig.Neumann(),
        ig.Exact(),
        ig.CG(on_negative_curvature="minres"),
        ig.CG(on_negative_curvature="gauss_newton"),
    ],
    ids=repr,
)
def test_every_product_is_counted(solver):
    substitute = getattr(solver, "on_negative_curvature", "stop") != "stop"
    theta, X = normal(6, seed=1), normal(9, 6, seed=2, grad=False)
    target = 30.0 if substitute else 0.0
    condition = ig.proximal(
        lambda z: Square.apply(z - target).sum() / 9, 2.0, model=lambda w: torch.tanh(X @ w)
    )
    monitor, runs = ig.Monitor(), []
    for quiet in (False, True):
        options = {"linear_solver": solver, "on_failure": "ignore"}
        if not quiet:
            options["monitor"] = monitor
        phi = ig.implicit(here, condition, **options)(theta)
        Square.count = 0
        gradients(phi, theta)
        runs.append(Square.count)
    assert monitor.last.products == runs[0] >= runs[1]
    assert bool(monitor.last.substitute) == substitute


def test_a_difference_takes_two_gradients():
    theta, calls = normal(6, seed=1), []

    def loss(w):
        calls.append(w)
        return softplus(w).sum() ** 2

    monitor = ig.Monitor()
    solve = ig.implicit(here, ig.proximal(loss, 2.0), curvature=FINITE, monitor=monitor, **QUIET)
    phi = solve(theta)
    calls.clear()
    gradients(phi, theta)
    # the products, the cross-derivative, the check that the function is still the same, and how
    # much of F the arguments make, for φ is no solution
    assert len(calls) == 2 * monitor.last.products + 2 + 1 + 2 and monitor.last.products >= 6


# ---------------------------------------------------------------- the adaptive mode


LEAST, PROBLEMS = 0.01, 50


def spread_out(seed):
    """A least-squares problem with curvatures over up to four decades, and a v."""
    random = torch.Generator().manual_seed(seed)
    n = int(torch.randint(5, 30, (), generator=random))
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=random))
    decades, places = torch.rand(n + 1, generator=random).tensor_split([1])
    X = 10 ** (2 * decades * (places - 0.7))[:, None] * basis
    theta, v = torch.randn(2, n, generator=random)
    return theta.requires_grad_(), X, v


def half_square(w, X):
    return (X @ w).square().sum() / 2


ADAPTIVE = {
    "proximal": (ig.proximal(half_square, LEAST, convex=True), True),
    "argmin": (
        ig.argmin(lambda w, theta, X: half_square(w, X) + prox(w, theta, LEAST), LEAST),
        True,
    ),
    "estimate": (ig.proximal(half_square, LEAST), False),
}


def adaptive(form, seed, tolerance):
    """A problem's gradient with a tolerance, and what was reported."""
    theta, X, v = spread_out(seed)
    monitor = ig.Monitor()
    options = {"rtol_gradient": tolerance, "monitor": monitor, "on_failure": "ignore"}
    phi = ig.implicit(here, ADAPTIVE[form][0], **options)(theta, X)
    return torch.autograd.grad(phi, theta, v)[0], monitor.last


@functools.cache
def without_a_tolerance(form, seed):
    """What was reported; the same for all tolerances that it is compared with."""
    return adaptive(form, seed, None)[1]


@pytest.mark.parametrize("form", ADAPTIVE)
@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-5])
def test_the_adaptive_mode_stops_where_the_gradient_is_good_enough(rtol, form):
    """Under a bound always; under an estimate nearly always."""
    is_bound = ADAPTIVE[form][1]
    kept, products, default_products = 0, 0, 0
    for seed in range(PROBLEMS):
        (found, report), default = adaptive(form, seed, rtol), without_a_tolerance(form, seed)
        _, X, v = spread_out(seed)
        exact = LEAST * torch.linalg.solve(X.T @ X + LEAST * torch.eye(len(v)), v)
        assert report.error_is_bound in (is_bound, None) and default.error_is_bound is None
        assert report.products <= default.products
        kept += bool((found - exact).norm() <= rtol * found.norm() * (1 + 1e-9))
        products += report.products
        default_products += default.products
    print(f"{form}, rtol {rtol:g}: kept {kept}/{PROBLEMS}, products {products}/{default_products}")
    assert kept == PROBLEMS if is_bound else kept >= 0.9 * PROBLEMS
    assert products <= (0.8 if rtol > 1e-4 else 0.95) * default_products


@pytest.mark.parametrize(
    "minimiser",
    [
        ig.solvers.GradientDescent(lr=0.2, steps=1000),
        ig.solvers.Nesterov(lr=0.2, steps=1000),
        ig.solvers.NewtonCG(maxiter=100),
    ],
    ids=lambda minimiser: type(minimiser).__name__,
)
def test_the_adaptive_mode_stops_minimisers(minimiser):
    theta, X, _ = spread_out(3)
    calls = []

    def loss(w, X):
        calls.append(w)
        return softplus(X @ w).sum()

    def slope(w):
        return torch.func.grad(lambda w: loss(w, X) + prox(w, theta.detach(), 0.1))(w).norm()

    counts = {}
    for tolerance in (1e-2, None):
        calls.clear()
        phi = ig.implicit(minimiser, ig.proximal(loss, 0.1), rtol_gradient=tolerance)(theta, X)
        counts[tolerance] = len(calls)
        if tolerance:
            reached = slope(phi.detach()) / slope(theta.detach())
            assert 1e-6 < reached <= tolerance
    assert counts[1e-2] < counts[None] / 2
