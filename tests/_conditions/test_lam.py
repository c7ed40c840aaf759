"""A λ that is learned, and a λ that is a matrix: gradients by closed forms and by unrolling."""

import copy
import math
import pickle

import learn2learn as l2l
import pytest
import torch
from problems import minimize, normal, tensors, unrolled, wavy
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import mse_loss, softplus

import implicit_grad as ig
from implicit_grad._conditions.lam import proximal_term

pytestmark = pytest.mark.usefixtures("double_precision")
EXACT = {"linear_solver": ig.Exact(), "on_failure": "raise"}
FORMS = [(per, rank) for per in ("model", "tensor", "element") for rank in (0, 2)]
EVERY_FORM = pytest.mark.parametrize(("per", "rank"), FORMS)


@pytest.fixture(autouse=True)
def every_warning():
    """Those that torch gives once a process too: of a tensor with a graph made a number."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def flat(tensors):
    """One vector, in the graph."""
    return torch.cat([t.flatten() for t in tensors])


def close(actual, expected, tolerance=1e-8):
    """Equal relative to the size of what is expected, one by one, none of it zero."""
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert e.norm() > 1e-6 and a.shape == e.shape
        assert (a - e).norm() <= tolerance * e.norm()


def uneven(lam):
    """The same module with every ρ and U moved somewhere else."""
    with torch.no_grad():
        for i, p in enumerate(lam.parameters()):
            p.add_(normal(*p.shape, seed=20 + i, grad=False) / 3)
    return lam


def matrix(lam, theta):
    """Λ formed, from what the module or the container of λ's says about flat weights."""
    factor = lam.factor if isinstance(lam, ig.LowRank) else None
    diagonal = lam.diagonal if isinstance(lam, ig.LowRank) else lam
    weights = tensors(diagonal) * (len(theta) if len(tensors(diagonal)) == 1 else 1)
    made = torch.diag(flat([w.expand_as(t) for w, t in zip(weights, theta, strict=True)]))
    if factor is None:
        return made
    U = torch.cat([u.flatten(0, -2) for u in tensors(factor)])
    return made + U @ U.T


# ---------------------------------------------------------------- implicit


def bumpy(phi, X):
    """A convex loss that couples the tensors of φ."""
    w = flat(phi.values())
    return softplus(X @ w).sum() + (w**4).sum() / 10


@EVERY_FORM
def test_implicit_meets_the_derivatives_of_the_solution(per, rank):
    """dθ, dρ, dU and dX, against a solution that is differentiated as it was found."""
    theta = {"a": normal(2, 2, seed=1), "b": normal(3, seed=2)}
    X = normal(4, 7, seed=3)
    lam = uneven(ig.LearnedLam(theta, 0.7, per=per, rank=rank))

    def reference(theta, X):
        away = lambda phi: flat(phi.values()) - flat(theta.values())  # noqa: E731
        L = matrix(lam(), list(theta.values()))
        return minimize(lambda phi: bumpy(phi, X) + away(phi) @ L @ away(phi) / 2, theta)

    def solver(theta, X):
        return {k: t.detach() for k, t in reference(theta, X).items()}

    wanted = [*theta.values(), *lam.parameters(), X]
    assert len(wanted) == 3 + {"model": 1, "tensor": 2, "element": 2}[per] + 2 * bool(rank)
    expected = torch.autograd.grad(wavy(reference(theta, X)), wanted)
    for linear_solver in (ig.Exact(), ig.CG(rtol=1e-13)):
        monitor = ig.Monitor()
        condition = ig.proximal(bumpy, lam, convex=True)
        solve = ig.implicit(
            solver, condition, linear_solver=linear_solver, monitor=monitor, on_failure="raise"
        )
        close(torch.autograd.grad(wavy(solve(theta, X)), wanted), expected)
    assert (monitor.last.solve_error_bound is None) == bool(rank)


def test_a_matrix_twice():
    """First and second derivatives by θ, the diagonal and U, against finite differences."""

    def function(theta, rho, U):
        def solver(theta):
            L = torch.diag(rho.detach().exp()) + U.detach() @ U.detach().T
            return minimize(lambda w: softplus(w).sum() + (w - theta) @ L @ (w - theta) / 2, theta)

        condition = ig.proximal(lambda w: softplus(w).sum(), ig.LowRank(rho.exp(), U))
        return ig.implicit(solver, condition, linear_solver=ig.Exact())(theta)

    inputs = normal(3, seed=1), normal(3, seed=2), normal(3, 2, seed=3)
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(function, inputs, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_stands_in_two_places_of_phi():
    """Both of its θ's pull at it, the matrix along what they have in common."""
    theta = {"a": normal(3, seed=1), "b": normal(3, seed=2)}
    lam = uneven(ig.LearnedLam(theta, 0.7, rank=2))

    def objective(w, theta):
        away = flat([w, w]) - flat(theta.values())
        L = matrix(lam(), list(theta.values()))
        return softplus(w).sum() + away @ L @ away / 2

    def solver(theta):
        w = minimize(lambda w: objective(w, theta), theta["a"] * 0).detach()
        return {"a": w, "b": w}

    solve = ig.implicit(solver, ig.proximal(lambda phi: softplus(phi["a"]).sum(), lam), **EXACT)
    exact = minimize(lambda w: objective(w, theta), theta["a"].detach() * 0)
    wanted = [*theta.values(), *lam.parameters()]
    close(
        torch.autograd.grad(wavy(solve(theta)["b"]), wanted),
        torch.autograd.grad(wavy(exact), wanted),
    )


# ---------------------------------------------------------------- imaml

DATA = normal(6, 3, seed=5, grad=False), normal(6, 2, seed=6, grad=False)


def meta(model, lam, lr=0.2, **options):
    return ig.imaml(l2l.algorithms.MAML(model, lr=lr, allow_nograd=True), lam=lam, **options)


def loss_of(learner):
    return mse_loss(learner(DATA[0]), DATA[1])


def adapted(maml, style, steps):
    learner = maml.clone()
    if style == "function":
        learner.adapt(lambda: loss_of(learner), steps=steps)
    else:
        for _ in range(steps):
            learner.adapt(loss_of(learner))
    return learner


def outer(learner):
    return wavy([p for p in learner.module.parameters() if p.requires_grad])


def output_at(model, names=None):
    """The outputs as a function of the flat weights of these names."""
    theta = dict(model.named_parameters())
    names = list(theta) if names is None else names

    def output(w):
        parts = w.split([theta[n].numel() for n in names])
        moved = {n: p.view_as(theta[n]) for n, p in zip(names, parts, strict=True)}
        fixed = {n: t.detach() for n, t in theta.items()}
        return functional_call(model, fixed | moved, DATA[0]).flatten()

    return output


def loss_at(model, names=None):
    """The loss likewise."""
    output = output_at(model, names)
    return lambda w: mse_loss(output(w), DATA[1].flatten())


@EVERY_FORM
@pytest.mark.parametrize("style", ["tensor", "function"])
def test_imaml_meets_the_closed_form(style, per, rank):
    """(H + Λ) φ = c + Λθ for a linear model."""
    model = nn.Linear(3, 2)
    lam = uneven(ig.LearnedLam(model, 0.7, per=per, rank=rank))
    maml = meta(model, lam, **EXACT)
    learner = adapted(maml, style, 400)
    loss, zero, theta = loss_at(model), torch.zeros(8), flat(model.parameters())
    H, slope = jacrev(jacrev(loss))(zero), jacrev(loss)(zero)
    L = matrix(lam(), list(model.parameters()))
    solution = torch.linalg.solve(H + L, L @ theta - slope)
    close([flat(learner.module.parameters())], [solution])
    expected = torch.autograd.grad(wavy(solution), list(maml.parameters()))
    close(torch.autograd.grad(outer(learner), list(maml.parameters())), expected)


@pytest.mark.parametrize("style", ["tensor", "function"])
def test_imaml_meets_unrolled_differentiation(style):
    """Plain MAML's gradient after many steps, through a network, with respect to all."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    lam = uneven(ig.LearnedLam(model, 2.0, per="element", rank=1))
    maml = meta(model, lam, 0.1, **EXACT)
    loss, theta = loss_at(model), flat(model.parameters())
    L = matrix(lam(), list(model.parameters()))
    phi = unrolled(lambda w: loss(w) + (w - theta) @ L @ (w - theta) / 2, theta, 0.1, 250)
    expected = torch.autograd.grad(wavy(phi), list(maml.parameters()))
    learner = adapted(maml, style, 250)
    close(torch.autograd.grad(outer(learner), list(maml.parameters())), expected)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@EVERY_FORM
def test_one_step_on_a_tensor(per, rank, curvature):
    """Far from a solution: A where the loss was computed, Λ's part where the step led."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    lam = uneven(ig.LearnedLam(model, 1.5, per=per, rank=rank))
    maml = meta(model, lam, 0.1, curvature=curvature, **EXACT)
    before = flat(adapted(maml, "tensor", 2).module.parameters()).detach()
    learner = adapted(maml, "tensor", 3)
    after = flat(learner.module.parameters()).detach()
    loss, theta = loss_at(model), flat(model.parameters())
    L = matrix(lam(), list(model.parameters()))
    inward = before - 0.1 * jacrev(loss)(before) + 0.1 * L @ theta
    step = torch.linalg.solve(torch.eye(len(L)) + 0.1 * L, inward)
    close([after], [step.detach()], 1e-12)
    H = jacrev(jacrev(loss))(before)
    if curvature == "gauss_newton":
        J = jacrev(output_at(model))(before)
        H = J.T @ J / 6
    v = torch.autograd.grad(outer(learner), list(learner.module.parameters()), retain_graph=True)
    u = torch.linalg.solve((H + L).detach(), flat(v))
    expected = torch.autograd.grad(-u @ (L @ (after - theta)), list(maml.parameters()))
    close(torch.autograd.grad(outer(learner), list(maml.parameters())), expected)


@pytest.mark.parametrize("style", ["tensor", "function"])
def test_frozen_parameters_take_no_part(style):
    """Λ's rows and columns of frozen weights are left out."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    lam = uneven(ig.LearnedLam(model, 0.7, rank=2))
    maml = meta(model, lam, **EXACT)
    learner = adapted(maml, style, 400)
    loss, zero = loss_at(model, ["weight"]), torch.zeros(6)
    H, slope = jacrev(jacrev(loss))(zero), jacrev(loss)(zero)
    L = matrix(lam(), list(model.parameters()))[:6, :6]
    solution = torch.linalg.solve(H + L, L @ model.weight.flatten() - slope)
    wanted = [model.weight, lam.log_lam[0], lam.factor[0]]
    close(torch.autograd.grad(outer(learner), wanted), torch.autograd.grad(wavy(solution), wanted))


def test_a_fixed_matrix():
    """A LowRank of constants is λ like any other, by `implicit` and by `imaml`."""
    model = nn.Linear(3, 2)
    random = ig.LearnedLam(model, 0.7, rank=1)()
    fixed = ig.LowRank(0.7, tuple(u.detach() for u in random.factor))
    found = []
    for lam in (fixed, ig.LearnedLam(model, 0.7, rank=1)):
        maml = meta(model, lam, **EXACT)
        learner = adapted(maml, "function", 100)
        found.append(torch.autograd.grad(outer(learner), list(model.parameters())))
    close(*found)


# ---------------------------------------------------------------- the module


def test_its_parameters_are_the_metalearners_once():
    model = nn.Linear(3, 2)
    lam = ig.LearnedLam(model, rank=1)
    maml = meta(model, lam)
    expected = [*model.parameters(), *lam.parameters()]
    assert [id(p) for p in maml.parameters()] == [id(p) for p in expected]
    learner = maml.clone()
    assert learner.lam is lam
    learner.adapt(loss_of(learner))
    loss_of(learner).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in expected)


@pytest.mark.filterwarnings("ignore:LearnedLam. lam has come to an end")
@EVERY_FORM
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam], ids=lambda o: o.__name__)
def test_any_step_leaves_lam_positive(optimiser, per, rank):
    """Huge steps up and down; the matrix has no eigenvalue below the least of its diagonal."""
    model = nn.Linear(3, 2)
    lam = ig.LearnedLam(model, 0.1, per=per, rank=rank)
    optimizer = optimiser(lam.parameters(), lr=20.0)
    for sign in (1, -1, -1, -1, 1):
        optimizer.zero_grad()
        L = matrix(lam(), list(model.parameters()))
        (sign * L.trace().log()).backward()
        optimizer.step()
        values = torch.linalg.eigvalsh(matrix(lam(), list(model.parameters())).detach())
        least = min(float(rho.detach().min().exp()) for rho in lam.log_lam)
        assert least > 0 and torch.isfinite(values).all()
        assert values[0] >= least - 1e-13 * values[-1]
        meta(model, lam).clone()  # accepted


def test_learning_moves_lam_the_right_way():
    """Noisy labels and a θ that is right: λ has to grow, in a loop as it is written."""
    truth = nn.Linear(3, 2)
    lam = ig.LearnedLam(truth, 0.1)
    maml = meta(truth, lam, 0.05)
    optimizer = torch.optim.Adam(lam.parameters(), lr=0.1)
    start = [t.item() for t in lam()]
    for _ in range(20):
        x = torch.randn(6, 3)
        labels = (truth(x) + torch.randn(6, 2)).detach()
        learner = maml.clone()
        learner.adapt(lambda: mse_loss(learner(x), labels), steps=20)  # noqa: B023
        optimizer.zero_grad()
        mse_loss(learner(DATA[0]), truth(DATA[0]).detach()).backward()
        optimizer.step()
    assert all(t.item() > 1.5 * s for t, s in zip(lam(), start, strict=True))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda lam: pickle.loads(pickle.dumps(lam)),
    "state_dict": lambda lam: _loaded(lam),
}


def _loaded(lam):
    other = ig.LearnedLam(
        {"a": torch.ones(2), "b": torch.ones(3, 1)}, 5.0, per=lam.per, rank=lam.rank, seed=9
    )
    other.load_state_dict(lam.state_dict())
    return other


@EVERY_FORM
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_equal_and_apart(way, per, rank):
    theta = {"a": torch.ones(2), "b": torch.ones(3, 1)}
    lam = uneven(ig.LearnedLam(theta, per=per, rank=rank))
    other = COPIES[way](lam)
    torch.testing.assert_close(other(), lam(), rtol=0, atol=0)
    with torch.no_grad():
        other.log_lam[0].add_(1)
    expected = matrix(lam(), list(theta.values()))[0, 0]
    assert matrix(other(), list(theta.values()))[0, 0] > expected * 1.5
    assert repr(lam).startswith(f"LearnedLam(\n  per={per!r}, rank={rank}")


@EVERY_FORM
def test_another_precision(per, rank):
    model = nn.Linear(3, 2)
    lam = ig.LearnedLam(model, 0.7, per=per, rank=rank)
    wide = adapted(meta(model, lam, **EXACT), "function", 30)
    expected = torch.autograd.grad(outer(wide), [*model.parameters(), *lam.parameters()])
    model.float(), lam.float()
    theta = [*model.parameters(), *lam.parameters()]
    narrow = meta(model, lam, **EXACT).clone()
    narrow.adapt(lambda: mse_loss(narrow(DATA[0].float()), DATA[1].float()), steps=30)
    found = torch.autograd.grad(outer(narrow), theta)
    assert all(g.dtype == torch.float32 for g in found)
    close([g.double() for g in found], expected, 1e-4)


def test_how_it_starts():
    model = nn.Linear(3, 2)
    for rank in (1, 3):
        lam = ig.LearnedLam(model, 2.5, rank=rank)
        U = torch.cat([u.flatten(0, -2) for u in lam().factor]).detach()
        assert U.shape == (8, rank) and torch.linalg.matrix_rank(U) == rank
        assert (U @ U.T).trace().item() == pytest.approx(2.5)
        assert all(t.item() == pytest.approx(2.5) for t in lam().diagonal)
        same, other = (ig.LearnedLam(model, 2.5, rank=rank, seed=s) for s in (0, 1))
        assert all(map(torch.equal, same.factor, lam.factor))
        assert not any(map(torch.equal, other.factor, lam.factor))
    before = torch.get_rng_state()
    ig.LearnedLam(model, torch.tensor(2.5), rank=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_lam_follows_theta_to_its_device_once():
    theta = [torch.empty(3, device="meta"), torch.empty(2, 2, device="meta")]
    one, other = proximal_term(torch.tensor(2.0), theta, "here").weights
    assert one is other and one.device.type == "meta"


def test_tied_weights_have_one_lam():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    lam = uneven(ig.LearnedLam(model, 0.8, rank=1))
    assert len(lam.log_lam) == len(lam.factor) == 5
    found = []
    for theta in (model, list(model.parameters()), model.parameters()):
        other = ig.LearnedLam(theta, rank=1)
        other.load_state_dict(lam.state_dict())
        other = other if theta is model else lambda o=other: _as_tuple(o())
        learner = adapted(meta(model, other, 0.05), "function", 20)
        found.append(torch.autograd.grad(outer(learner), list(model.parameters())))
    close(found[1], found[0], 1e-12)
    t = torch.ones(2)
    assert len(ig.LearnedLam({"a": t, "b": [t]}).log_lam) == 1


def _as_tuple(lam):
    return ig.LowRank(tuple(lam.diagonal), tuple(lam.factor))


# ---------------------------------------------------------------- bad arguments


def solving(lam):
    """One call under this λ."""
    theta = {"a": torch.ones(2), "b": torch.ones(3)}
    return ig.implicit(lambda t: t, ig.proximal(lambda p: p["a"].sum(), lam))(theta)


def low_rank(a, b, diagonal=1.0):
    return lambda: solving(ig.LowRank(diagonal, {"a": a, "b": b}))


def not_a_number():
    lam = ig.LearnedLam(nn.Linear(3, 2))
    nn.init.constant_(lam.log_lam[0], math.nan)
    return meta(nn.Linear(3, 2), lam).clone()


NAN = torch.full((2, 1), math.nan)
BAD = {
    r"LearnedLam\(per='layer'\): expected \"model\", \"tensor\" or \"element\"": lambda: (
        ig.LearnedLam(nn.Linear(1, 1), per="layer")
    ),
    r"LearnedLam\(rank=-1\): expected an integer": lambda: ig.LearnedLam(nn.Linear(1, 1), rank=-1),
    r"LearnedLam\(within=1\): expected a finite": lambda: ig.LearnedLam(nn.ReLU(), within=1),
    r"LearnedLam\(within=inf\)": lambda: ig.LearnedLam(nn.Linear(1, 1), within=math.inf),
    r"LearnedLam\(rank=True\): exp": lambda: ig.LearnedLam(nn.Linear(1, 1), rank=True),
    r"LearnedLam\(rank=1.5\): exp": lambda: ig.LearnedLam(nn.Linear(1, 1), rank=1.5),
    "LearnedLam: lam must be .*greater than 0, got 0": lambda: ig.LearnedLam(nn.Linear(1, 1), 0.0),
    "LearnedLam: lam must be .*got inf": lambda: ig.LearnedLam(nn.Linear(1, 1), math.inf),
    "LearnedLam: lam must be .*got '1'": lambda: ig.LearnedLam(nn.Linear(1, 1), "1"),
    "LearnedLam: init must be one number, got a float": lambda: ig.LearnedLam(
        nn.Linear(1, 1), torch.ones(2)
    ),
    "theta holds no floating-point tensors": lambda: ig.LearnedLam({"a": torch.arange(3)}),
    "theta holds no floating": lambda: ig.LearnedLam(nn.ReLU()),
    "imaml: lam must be .* finite and greater than 0, got nan": not_a_number,
    "imaml: the factor of a low-rank lam must have theta's form": lambda: meta(
        nn.Linear(3, 2), ig.LowRank(1.0, torch.ones(3, 1))
    ),
    "imaml: a LowRank lam that is to be learned must be a LearnedLam": lambda: meta(
        nn.Linear(3, 2), ig.LowRank(1.0, [torch.ones(2, 3, 1).requires_grad_(), torch.ones(2, 1)])
    ),
    "imaml: lam of shape .* does not fit|imaml: lam must be": lambda: meta(
        nn.Linear(3, 2), ig.LearnedLam(nn.Linear(4, 2), per="element")
    ),
    r"the factor of a low-rank.*theta\['b'\] of shape \(3,\), the same rank": low_rank(
        torch.ones(2, 1), torch.ones(4, 1)
    ),
    r"the same rank for all tensors; got a float32": low_rank(torch.ones(2, 1), torch.ones(3, 2)),
    r"one more dimension than theta\['a'\]": low_rank(1.0, torch.ones(3, 2)),
    r"one more dimension.*int64": low_rank(torch.ones(2, 1), torch.ones(3, 1).long()),
    "the factor of lam holds NaN or Inf": low_rank(NAN, torch.ones(3, 1)),
    "proximal: lam must be .*got -1": low_rank(torch.ones(2, 1), torch.ones(3, 1), -1.0),
    "proximal: lam must be .*got None": lambda: solving(lambda: None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ig.InvalidArgumentError, match=message):
        BAD[message]()
