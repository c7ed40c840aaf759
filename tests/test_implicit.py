"""The gradients of `implicit`: right, for every condition, container and way to ask for them."""

import collections
import copy
import dataclasses

import numpy as np
import optree
import pytest
import torch
from problems import LINEAR_SOLVERS, PROBLEMS, minimize, normal, prox, tensors, unrolled, wavy
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.functional import softplus

import implicit_grad as ig

STRICT = {"linear_solver": ig.Exact(), "on_failure": "raise"}


def close(actual, expected, tolerance=1e-9):
    """Equal relative to the size of what is expected."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-3)


# ---------------------------------------------------------------- every problem, every solver


PAIRS = [
    pytest.param(make, solver, id=f"{make.__name__}-{name}")
    for make in PROBLEMS
    for name, solver in LINEAR_SOLVERS.items()
    if make().condition.symmetric or solver is None or not solver.symmetric_only
]


@pytest.mark.parametrize(("make", "linear_solver"), PAIRS)
def test_gradients_meet_the_reference(make, linear_solver):
    problem = make()
    solve = ig.implicit(
        problem.solver, problem.condition, linear_solver=linear_solver, on_failure="raise"
    )
    expected = problem.gradients(problem.reference)
    for actual, exact in zip(problem.gradients(solve), expected, strict=True):
        assert exact.norm() > 1e-3
        assert (actual - exact).norm() <= 1e-10 * exact.norm()


# ---------------------------------------------------------------- first and second derivatives


def bumpy(phi, X):
    """A convex loss over a container, each tensor of which it couples to X and to the others."""
    values = torch.cat([t.flatten() for t in tensors(phi)])
    return softplus(X @ values).sum() / 3 + (values**4).sum() / 20


def solved(theta, X, lam):
    """The minimum of `bumpy` near theta."""
    lam = [t.detach() if torch.is_tensor(t) else t for t in lam] if type(lam) is list else lam
    lam = lam.detach() if torch.is_tensor(lam) else lam
    return minimize(lambda phi: bumpy(phi, X) + prox(phi, theta, lam), theta)


def check_twice(function, *inputs):
    """First derivatives against finite differences, second ones along random directions."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    assert gradcheck(function, inputs, rtol=1e-6, atol=1e-8)
    assert gradgradcheck(function, inputs, rtol=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("linear_solver", [ig.Exact(), ig.CG(rtol=1e-14)], ids=["Exact", "CG"])
def test_argmin_twice(linear_solver):
    def objective(w, theta, X):
        return bumpy(w, X) + prox(w, theta, 0.7)

    def solver(theta, X):
        return solved(theta, X, 0.7)

    solve = ig.implicit(solver, ig.argmin(objective), linear_solver=linear_solver)
    check_twice(solve, normal(3, seed=1), normal(4, 3, seed=2))


LAMS = {
    "float": (0.6, lambda lam: lam),
    "scalar": (torch.tensor(0.6).double(), lambda lam: [lam, lam]),
    "per tensor": ((0.5, torch.tensor(0.9).double()), list),
    "per element": ((normal(2, seed=5).exp(), normal(2, 1, seed=6).exp()), list),
}


@pytest.mark.parametrize(
    ("form", "linear_solver"),
    [*((form, ig.Exact()) for form in LAMS), ("per element", ig.CG(rtol=1e-14))],
    ids=[*LAMS, "by CG"],
)
def test_proximal_twice(form, linear_solver):
    lam, spread = LAMS[form]
    learned = [t.detach() for t in tensors(lam)]

    def function(a, b, X, *learned):
        left = iter(learned)
        mine = optree.tree_map(lambda t: next(left) if torch.is_tensor(t) else t, lam)

        def solver(theta, X):
            return solved(theta, X, spread(mine))

        condition = ig.proximal(bumpy, mine)
        return ig.implicit(solver, condition, linear_solver=linear_solver)((a, b), X)

    inputs = normal(2, seed=1), normal(2, 1, seed=2), normal(3, 4, seed=3)
    check_twice(function, *inputs, *learned)


@pytest.mark.parametrize("linear_solver", [ig.Exact(), ig.NormalCG(rtol=1e-14)], ids=repr)
@pytest.mark.parametrize("make", PROBLEMS[3:5], ids=lambda make: make.__name__)
def test_root_and_fixed_point_twice(make, linear_solver):
    problem = make()
    solve = ig.implicit(problem.solver, problem.condition, linear_solver=linear_solver)
    check_twice(solve, *problem.args)


def test_third_derivative():
    def solver(a):
        return a.clone() ** (1 / 3)

    solve = ig.implicit(solver, ig.root(lambda phi, a: phi**3 - a), **STRICT)
    a = torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    for exact in (lambda a: a ** (-2 / 3) / 3, lambda a: -2 / 9 * a ** (-5 / 3)):
        first = grad(solve(a).sum(), a, create_graph=True)[0]
        derivative = first if exact(a)[0] > 0 else grad(first.sum(), a, create_graph=True)[0]
        close(derivative, exact(a), 1e-12)
    close(grad(derivative.sum(), a)[0], 10 / 27 * a ** (-8 / 3), 1e-12)


# ---------------------------------------------------------------- containers

Pair = collections.namedtuple("Pair", ["first", "second"])
TREES = {
    "tensor": lambda a, b: a,
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"z": a, "a": b},
    "ordered dict": lambda a, b: collections.OrderedDict(z=a, a=b),
    "namedtuple": Pair,
    "nested": lambda a, b: {"x": [a, (b, {})], "y": Pair(a.clone(), None)},
    "0-d": lambda a, b: (a[0, 0], b),
    "empty": lambda a, b: (a, a[:0], b),
    "all empty": lambda a, b: (a[:0], b[:0]),
    "None": lambda a, b: {"a": a, "b": None, "c": b},
}


@pytest.mark.parametrize("form", TREES)
def test_containers(form):
    a, b, X = normal(2, 2, seed=1), normal(3, seed=2), normal(5, seed=3)
    theta = TREES[form](a, b)
    X = normal(4, sum(t.numel() for t in tensors(theta)), seed=3)
    solve = ig.implicit(lambda t, X: solved(t, X, 0.5), ig.proximal(bumpy, 0.5), **STRICT)
    phi = solve(theta, X)
    assert type(phi) is type(theta)
    assert [t.shape for t in tensors(phi)] == [t.shape for t in tensors(theta)]
    exact = minimize(lambda phi: bumpy(phi, X) + prox(phi, theta, 0.5), theta)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    expected = grad(wavy(exact), (a, b, X), **options)
    close(grad(wavy(phi), (a, b, X), **options), expected)


def elementwise(phi, c):
    """A loss without coupling, c in the dtype of each tensor."""
    return sum(softplus(c * t).sum().double() for t in tensors(phi))


def slope_of_phi(phi, c, lam):
    """dphi/dtheta for `elementwise`, which is diagonal."""
    s = torch.sigmoid(c * phi.detach())
    return lam / (lam + c * c * s * (1 - s))


def test_two_dtypes_in_one_tree():
    theta = {"wide": normal(3, seed=1), "narrow": normal(4, seed=2, dtype=torch.float32)}

    def solver(theta):
        return minimize(lambda phi: elementwise(phi, 2.0) + prox(phi, theta, 0.5), theta)

    condition = ig.proximal(lambda phi: elementwise(phi, 2.0), 0.5)
    phi = ig.implicit(solver, condition, **STRICT)(theta)
    (phi["wide"].sum() + phi["narrow"].sum().double()).backward()
    for name, tolerance in (("wide", 1e-12), ("narrow", 1e-5)):
        assert theta[name].grad.dtype == theta[name].dtype
        close(theta[name].grad, slope_of_phi(phi[name], 2.0, 0.5), tolerance)


@pytest.mark.parametrize("tied_phi", [True, False])
def test_a_tensor_twice_in_theta(tied_phi):
    t, lam = normal(3, seed=1), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def loss(phi):
        return (softplus(phi["a"]) + phi["b"] ** 4 / 4 + phi["a"] * phi["b"] / 5).sum()

    def exact(t):
        def objective(x):
            phi = {"a": x[0], "b": x[-1]}
            return loss(phi) + prox(phi, {"a": t, "b": t}, lam)

        return unrolled(objective, (t * 1,) if tied_phi else (t * 1, t * 1), 0.2, 300)

    def solver(theta):
        assert theta["a"] is theta["b"]
        phi = [x.detach() for x in exact(theta["a"])]
        return {"a": phi[0], "b": phi[-1]}

    phi = ig.implicit(solver, ig.proximal(loss, lam), **STRICT)({"a": t, "b": t})
    assert (phi["a"] is phi["b"]) == tied_phi
    x = exact(t)
    expected = grad(wavy([x[0], 2 * x[-1]]), (t, lam))
    close(grad(wavy([phi["a"], 2 * phi["b"]]), (t, lam)), expected)


def test_an_argument_given_twice_has_one_gradient():
    a = normal(3, seed=1)
    solve = ig.implicit(lambda a, b: a * b, ig.argmin(lambda phi, a, b: ((phi - a * b) ** 2).sum()))
    solve(a, a).sum().backward()
    close(a.grad, 2 * a.detach(), 1e-12)


@pytest.mark.parametrize(
    "entangled", ["not", "also data", "captured", "its own lam", "lam of it", "twice in theta"]
)
def test_theta_that_enters_by_more_ways_than_the_proximal_term(entangled):
    """Where it enters by no other, its gradient is −λu, and needs no graph."""
    own = normal(3, seed=5)

    def solution(theta):
        inner = theta if entangled == "captured" else torch.ones(3, dtype=torch.float64)

        def loss(phi, *data):
            phi = phi[0] * phi[1] if entangled == "twice in theta" else phi
            return (phi.cosh() + phi * (data[0] if data else inner).sin()).sum()

        lam, args = 1.5, (theta,)
        if entangled == "also data":
            args = (theta, theta)
        elif entangled == "its own lam":
            lam = theta
        elif entangled == "lam of it":
            lam = lambda: theta.exp()  # noqa: E731
        elif entangled == "twice in theta":
            args = ([theta, theta],)
        newton = ig.solvers.NewtonCG(maxiter=50, cg=20, tol=1e-12)
        return ig.implicit(newton, ig.proximal(loss, lam), linear_solver=ig.CG(rtol=1e-12))(*args)

    theta = own.detach().abs().add(0.5).requires_grad_()

    def outer(theta):
        phi = solution(theta)
        return torch.stack([wavy(p) for p in phi]).sum() if isinstance(phi, list) else wavy(phi)

    assert gradcheck(outer, theta)
    assert gradgradcheck(outer, theta)


def test_arguments_that_need_no_gradient_and_labels_and_strings():
    theta, X, labels = normal(3, 2, seed=1), normal(5, 3, seed=2, grad=False), torch.arange(5) % 2

    def loss(w, X, labels, kind):
        assert labels.dtype == torch.int64 and kind == "cross entropy"
        return nn.functional.cross_entropy(X @ w, labels)

    def solver(theta, *rest):
        return minimize(lambda w: loss(w, *rest) + prox(w, theta, 1.0), theta)

    rest = (X, labels, "cross entropy")
    phi = ig.implicit(solver, ig.proximal(loss, 1.0), **STRICT)(theta, *rest)
    expected = minimize(lambda w: loss(w, *rest) + prox(w, theta, 1.0), theta)
    wavy(phi).backward()
    close(theta.grad, grad(wavy(expected), theta)[0])
    assert X.grad is None and labels.grad is None


@pytest.mark.parametrize("first", ["a name", 2.0, np.ones(3), object()], ids=type)
def test_a_minimum_by_a_first_argument_that_is_no_tensor(first):
    a = normal(3, seed=1)
    objective = ig.argmin(lambda w, first, a: (2 * w - a).square().sum())
    ig.implicit(lambda first, a: a / 2, objective)(first, a).sum().backward()
    close(a.grad, torch.full_like(a, 1 / 2))


def test_part_of_phi_in_the_outer_loss():
    theta, X = (normal(2, seed=1), normal(2, seed=2)), normal(3, 4, seed=3)
    solve = ig.implicit(lambda t, X: solved(t, X, 0.5), ig.proximal(bumpy, 0.5), **STRICT)
    _, phi = solve(theta, X)
    _, exact = minimize(lambda phi: bumpy(phi, X) + prox(phi, theta, 0.5), theta)
    close(grad(wavy(phi), (*theta, X)), grad(wavy(exact), (*theta, X)))


@pytest.mark.parametrize("kind", ["array", "NumPy scalar", "float", "float32 array"])
def test_solvers_that_return_numbers(kind):
    a = torch.tensor(2.25 if kind in ("float", "NumPy scalar") else [2.25], dtype=torch.float64)
    a.requires_grad_()

    def solver(a):
        value = np.sqrt(a.numpy())
        forms = {"array": value, "NumPy scalar": np.float64(value.item()), "float": value.item()}
        return forms.get(kind, value.astype(np.float32))

    phi = ig.implicit(solver, ig.root(lambda phi, a: phi * phi - a))(a)
    assert phi.dtype == torch.float64 and phi.shape == a.shape
    phi.sum().backward()
    close(a.grad, torch.full_like(a, 1 / 3), 1e-10)


# ---------------------------------------------------------------- ways to call


def test_keyword_arguments_and_decorator():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)

    def objective(phi, theta, *, X):
        return bumpy(phi, X) + prox(phi, theta, 0.5)

    @ig.implicit(condition=ig.argmin(objective), linear_solver=ig.Exact())
    def adapt(theta, *, X):
        """Adapt theta."""
        return solved(theta, X, 0.5)

    assert adapt.__name__ == "adapt" and adapt.__doc__ == "Adapt theta."
    exact = minimize(lambda phi: objective(phi, theta, X=X), theta)
    close(grad(wavy(adapt(theta, X=X)), (theta, X)), grad(wavy(exact), (theta, X)))


KEYWORDS = {
    "argmin": ig.argmin(lambda phi, a, *, c: (phi - a * c).square().sum()),
    "argmin of a model": ig.argmin(
        lambda y, a, *, c: (y - a * c * c).square().sum(), model=lambda phi, a, *, c: phi * c
    ),
    "root": ig.root(lambda phi, a, *, c: phi - a * c),
    "fixed point": ig.fixed_point(lambda phi, a, *, c: (phi + a * c) / 2),
}


@pytest.mark.parametrize("form", KEYWORDS)
@pytest.mark.parametrize("handed", [False, True], ids=["function", "handed"])
def test_keyword_arguments_of_every_condition(form, handed):
    a, c = normal(3, seed=1), (1 + normal(3, seed=2, grad=False).square()).requires_grad_()
    solver = lambda a, *, c: a * c  # noqa: E731
    if handed:
        descent = ig.solvers.GradientDescent(lr=0.05, tol=1e-13)
        solver = descent if "argmin" in form else ig.solvers.SciPyRoot(tol=1e-13)
    init = {"init": lambda a, *, c: torch.zeros_like(a)} if handed else {}
    phi = ig.implicit(solver, KEYWORDS[form], **init, **STRICT)(a, c=c)
    close(phi, a * c)
    close(grad(phi.sum(), (a, c)), (c, a))


def test_our_minimiser_starts_at_init():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    starts = []

    def init(theta, X):
        starts.append(theta)
        return torch.zeros_like(theta)

    descent = ig.solvers.GradientDescent(lr=0.2, tol=1e-13)
    solve = ig.implicit(descent, ig.proximal(bumpy, 0.5), init=init, on_failure="raise")
    exact = minimize(lambda phi: bumpy(phi, X) + prox(phi, theta, 0.5), theta)
    close(grad(wavy(solve(theta, X)), (theta, X)), grad(wavy(exact), (theta, X)))
    assert len(starts) == 1 and torch.equal(starts[0], theta)


def test_second_backward_is_bitwise_equal():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    solve = ig.implicit(lambda t, X: solved(t, X, 0.5), ig.proximal(bumpy, 0.5))
    outer = wavy(solve(theta, X))
    first = grad(outer, (theta, X), retain_graph=True)
    assert all(map(torch.equal, first, grad(outer, (theta, X))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_phi_is_plain(mode):
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    calls = []

    def loss(phi, X):
        calls.append(phi)
        return bumpy(phi, X)

    def solver(theta, X):
        assert torch.is_grad_enabled()
        return solved(theta, X, 0.5)

    solve = ig.implicit(solver, ig.proximal(loss, 0.5))
    with mode():
        phi = solve(theta, X)
    assert not phi.requires_grad and not calls
    assert torch.equal(phi, solve(theta, X))


@pytest.mark.parametrize("lam", [0.5, 0.3, 7.0])
def test_no_iterations_are_first_order_maml(lam):
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    solver = ig.CG(maxiter=0)
    condition = ig.proximal(bumpy, lam)
    phi = ig.implicit(lambda t, X: solved(t, X, lam), condition, linear_solver=solver)(theta, X)
    v = normal(3, seed=9, grad=False)
    (actual,) = grad(phi, theta, v)
    if lam == 0.5:
        assert torch.equal(actual, v)
    close(actual, v, 4e-16)


def test_func_grad():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    descent = ig.solvers.GradientDescent(lr=0.2, tol=1e-13)
    solve = ig.implicit(descent, ig.proximal(bumpy, 0.5), linear_solver=ig.Exact())
    expected = grad(wavy(solve(theta, X)), (theta, X))

    def outer(theta, X):
        return wavy(solve(theta, X))

    close(torch.func.grad(outer, argnums=(0, 1))(theta.detach(), X.detach()), expected)


# ---------------------------------------------------------------- captured tensors


def captured_and_passed(source):
    """The same loss with c captured or passed, both applied to `source()`."""
    theta, here, there = normal(3, seed=1), source(), source()

    def loss(phi, c):
        return softplus(c @ phi).sum() + (phi**4).sum() / 20

    def solver(theta, *rest):
        fixed = here.detach()
        return minimize(lambda phi: loss(phi, fixed) + prox(phi, theta, 0.5), theta)

    captured = ig.implicit(solver, ig.proximal(lambda phi: loss(phi, here), 0.5), **STRICT)(theta)
    passed = ig.implicit(solver, ig.proximal(loss, 0.5), **STRICT)(theta, there)
    # The outer loss depends on the tensor directly, too.
    return theta, wavy(captured) + wavy(here @ captured), wavy(passed) + wavy(there @ passed)


def test_captured_leaf():
    leaf = normal(4, 3, seed=2)
    theta, captured, passed = captured_and_passed(lambda: leaf)
    close(grad(captured, (theta, leaf)), grad(passed, (theta, leaf)), 1e-12)


def test_captured_features_of_an_encoder():
    encoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data, weights = normal(4, 2, seed=2), list(encoder.parameters())
    theta, captured, passed = captured_and_passed(lambda: encoder(data))
    expected = grad(passed, (theta, data, *weights))
    close(grad(captured, (theta, data, *weights)), expected, 1e-12)


def test_captured_module():
    encoder = nn.Linear(2, 3).double()
    theta, data = normal(3, seed=1), normal(4, 2, seed=2)
    weights = dict(encoder.named_parameters())

    def loss(phi, data, weights=None):
        features = encoder(data) if weights is None else functional_call(encoder, weights, (data,))
        return softplus(features @ phi).sum()

    def solver(theta, data, *rest):
        objective = copy.deepcopy(encoder)(data).detach()
        return minimize(lambda w: softplus(objective @ w).sum() + prox(w, theta, 0.5), theta)

    wanted = (theta, data, *weights.values())
    solve = ig.implicit(solver, ig.proximal(loss, 0.5), **STRICT)
    expected = grad(wavy(solve(theta, data, weights)), wanted)
    close(grad(wavy(solve(theta, data)), wanted), expected, 1e-12)


def test_captured_lam():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def solver(theta, X, lam=lam):
        return solved(theta, X, lam)

    def objective(phi, theta, X, lam=lam):
        return bumpy(phi, X) + prox(phi, theta, lam)

    wanted = (theta, X, lam)
    solve = ig.implicit(solver, ig.argmin(objective), **STRICT)
    expected = grad(wavy(solve(theta, X, lam)), wanted)
    close(grad(wavy(solve(theta, X)), wanted), expected, 1e-12)
    solve = ig.implicit(solver, ig.proximal(bumpy, lam), **STRICT)
    close(grad(wavy(solve(theta, X)), wanted), expected, 1e-12)


def test_a_loop_with_one_backward_at_its_end():
    thetas = [normal(3, seed=i) for i in range(4)]
    batches = [normal(4, 3, seed=10 + i) for i in range(4)]
    total, expected = 0.0, []
    for theta, X in zip(thetas, batches, strict=True):
        # The functions refer to this loop's X: on purpose.
        solve = ig.implicit(
            lambda theta: solved(theta, X.detach(), 0.5),  # noqa: B023
            ig.proximal(lambda phi: bumpy(phi, X), 0.5),  # noqa: B023
            **STRICT,
        )
        total = total + wavy(solve(theta))
        exact = minimize(lambda phi: bumpy(phi, X) + prox(phi, theta, 0.5), theta)  # noqa: B023
        expected.append(grad(wavy(exact), (theta, X)))
    total.backward()
    for theta, X, exact in zip(thetas, batches, expected, strict=True):
        close((theta.grad, X.grad), exact)


def test_second_derivatives_by_captured_tensors():
    leaf = normal(4, 3, seed=2)
    theta, captured, passed = captured_and_passed(lambda: leaf)
    wanted, found = (theta, leaf), []
    for outer in (captured, passed):
        first = grad(outer, wanted, create_graph=True)
        found.append(grad(wavy(first), wanted))
    close(*found, 1e-10)


def test_second_derivatives_are_of_the_function_as_it_was():
    theta, weight = normal(3, seed=1), [1.0]

    def quartic(phi):
        return weight[0] * (phi**4).sum()

    def solver(theta):
        return minimize(lambda phi: quartic(phi) + prox(phi, theta, 0.5), theta)

    first = []
    for changed in (1.0, 2.0):
        weight[0] = 1.0
        phi = ig.implicit(solver, ig.proximal(quartic, 0.5), **STRICT)(theta)
        weight[0] = changed
        first.append(grad(wavy(phi), theta, create_graph=True)[0])
    close(grad(wavy(first[1]), theta), grad(wavy(first[0]), theta), 1e-12)


# ---------------------------------------------------------------- what the user owns


def test_nothing_else_changes():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model.double().train()
    model[3].eval()
    theta, data = dict(model.named_parameters()), normal(6, 3, seed=1)
    theta["0.weight"].grad = torch.ones_like(theta["0.weight"])

    def fingerprint():
        hooks = nn.modules.module
        return (
            copy.deepcopy(dict(model.state_dict())),
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [m.training for m in model.modules()],
            [id(b) for b in model.buffers()],
            torch.get_rng_state(),
            (dict(hooks._global_forward_hooks), dict(hooks._global_forward_pre_hooks)),
            (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        )

    def loss(phi, data):
        return functional_call(model, phi, (data,)).square().mean()

    def solver(theta, data):
        return {k: t * 0.9 for k, t in theta.items()}

    before = fingerprint()
    solve = ig.implicit(solver, ig.proximal(loss, 50.0), on_failure="ignore")
    phi = solve(theta, data)
    torch.testing.assert_close(fingerprint(), before, rtol=0, atol=0)
    outer = wavy(phi)
    first = grad(outer, (data, *theta.values()), create_graph=True)
    assert all(g.norm() > 0 for g in (first[0], first[1]))
    torch.testing.assert_close(fingerprint(), before, rtol=0, atol=0)


def test_the_same_buffers_also_when_the_module_is_called_itself():
    norm = nn.BatchNorm1d(3).double().train()
    theta, data = normal(3, seed=1), normal(6, 3, seed=2)
    before, identities = copy.deepcopy(norm.state_dict()), [id(b) for b in norm.buffers()]

    def loss(phi, data):
        return softplus(norm(data) @ phi).mean()

    solve = ig.implicit(
        lambda theta, data: theta * 0.9, ig.proximal(loss, 1.0), on_failure="ignore"
    )
    wavy(solve(theta, data)).backward()
    assert [id(b) for b in norm.buffers()] == identities
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert norm.weight.grad is not None and data.grad.norm() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # newer torches say that it is deprecated
@pytest.mark.parametrize("within", [False, True])
def test_and_those_of_scripted_modules(within):
    norm = nn.BatchNorm1d(2).double()
    net = torch.jit.script(nn.Sequential(norm) if within else norm)
    a, before = normal(4, 2, seed=1), [b.clone() for b in net.buffers()]
    solve = ig.implicit(lambda a: a, ig.argmin(lambda w, a: (w - a + 0 * net(w)).square().sum()))
    solve(a).sum().backward()
    close(a.grad, torch.ones_like(a))
    assert all(map(torch.equal, net.buffers(), before))


def test_dropout_uses_one_mask_a_call():
    theta, seen = normal(8, seed=1), []

    def loss(phi):
        mask = nn.functional.dropout(torch.ones(8, dtype=torch.float64), 0.5)
        seen.append(mask)
        return (mask * phi**4).sum()

    options = {"linear_solver": ig.Exact(), "on_failure": "ignore"}
    again = {"curvature": "finite_difference"}  # evaluates the loss in backward, too
    solve = ig.implicit(torch.clone, ig.proximal(loss, 0.5), **again, **options)
    masks = []
    for _ in range(4):
        seen.clear()
        phi = solve(theta)
        torch.rand(1)  # what is drawn between forward and backward does not matter
        found = grad(phi.sum(), theta)[0]
        assert len(seen) > 1 and all(torch.equal(mask, seen[0]) for mask in seen)
        close(found, 0.5 / (0.5 + 12 * seen[0] * theta.detach() ** 2), 1e-7)
        masks.append(seen[0])
        torch.rand(1)
    assert not all(torch.equal(mask, masks[0]) for mask in masks)


def test_a_random_solver_keeps_its_stream():
    def solver(theta):
        return theta + torch.rand(3, dtype=torch.float64)

    def loss(phi):
        return nn.functional.dropout(phi, 0.5).square().sum()

    solve = ig.implicit(solver, ig.proximal(loss, 1.0), on_failure="ignore")
    theta = normal(3, seed=1)
    torch.manual_seed(5)
    expected = [solver(theta.detach()) for _ in range(2)]
    torch.manual_seed(5)
    actual = []
    for _ in range(2):
        phi = solve(theta)
        phi.sum().backward()
        actual.append(phi.detach())
    assert all(map(torch.equal, actual, expected)) and not torch.equal(*actual)


class Ignoring(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, v):
        return None


def test_where_no_gradient_arrives_nothing_is_solved():
    theta, X, monitor = normal(3, seed=1), normal(4, 3, seed=2), ig.Monitor()
    condition = ig.proximal(bumpy, 0.5)
    phi = ig.implicit(lambda t, X: solved(t, X, 0.5), condition, monitor=monitor)(theta, X)
    Ignoring.apply(phi).sum().backward()
    assert theta.grad is None and X.grad is None and not monitor.reports


def test_complex_arguments_twice():
    c = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128, requires_grad=True)

    def plain(c):
        return (c * c).real

    implicit = ig.implicit(plain, ig.argmin(lambda phi, c: (phi - plain(c)).square().sum()))
    second = []
    for solve in (implicit, plain):
        (first,) = grad(wavy(solve(c)), c, create_graph=True)
        second.append((first, *grad(first.abs().square().sum(), c)))
    close(*second, 1e-12)


@pytest.mark.parametrize(
    "condition", [ig.proximal(lambda phi: torch.zeros(()).double(), 0.5), ig.fixed_point(torch.sin)]
)
def test_what_does_not_depend_on_phi(condition):
    """A loss that is constant leaves θ where it is, and a map may be a formula for φ."""
    a = normal(3, seed=1)
    if isinstance(condition, ig.fixed_point):
        condition = ig.fixed_point(lambda phi, a: a * 1)
    phi = ig.implicit(torch.clone, condition)(a)
    close(grad(phi, a, torch.arange(3.0).double()), [torch.arange(3.0).double()], 1e-14)


@pytest.mark.parametrize(
    "make", [ig.argmin, lambda f: ig.proximal(f, [1.0]), ig.root, ig.fixed_point]
)
def test_conditions_are_themselves_for_ever(make):
    one, other = make(bumpy), make(bumpy)
    assert one == one and one != other and len({one, other}) == 2
    field = dataclasses.fields(one)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, field, bumpy)
