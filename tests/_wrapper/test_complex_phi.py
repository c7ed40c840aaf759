"""Complex φ: the gradients are those of torch's own complex arithmetic, through exact solutions."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import implicit_grad as ig
from implicit_grad import solvers

pytestmark = pytest.mark.usefixtures("double_precision")
C, N = torch.complex128, 3
STRICT = {"on_failure": "raise"}


def draw(*shape, seed):
    return torch.randn(shape, dtype=C, generator=torch.Generator().manual_seed(seed))


A = draw(N, N, seed=0) + 3 * torch.eye(N)
B = draw(N, seed=1)
LAM = torch.tensor(0.3, dtype=torch.float64)


def inputs():
    return tuple(t.clone().requires_grad_() for t in (A, B, LAM))


def linear(A, b, lam):
    return torch.linalg.solve(A, b * lam)


def ridge(A, b, lam):
    return torch.linalg.solve(A.mH @ A + lam.exp() * torch.eye(N, dtype=A.dtype), A.mH @ b)


def misfit(w, A, b, lam):
    return (A @ w - b).abs().square().sum() + lam.exp() * w.abs().square().sum()


def bent(A, b, lam):
    """A x + λ |x| x̄ = b, which is no holomorphic equation."""
    x = torch.linalg.solve(A, b)
    for _ in range(80):
        x = torch.linalg.solve(A, b - 0.1 * lam * x.abs() * x.conj())
    return x


def energy(x, A, b):
    """½ x* H x − Re x* b for Hermitian H."""
    return (x.conj() @ hermitian(A) @ x).real / 2 - (x.conj() @ b).real


def hermitian(A):
    return A @ A.mH + torch.eye(N)


CASES = {
    "root": (linear, ig.root(lambda x, A, b, lam: A @ x - lam * b)),
    "bent root": (
        bent,
        ig.root(lambda x, A, b, lam: A @ x + 0.1 * lam * x.abs() * x.conj() - b),
    ),
    "fixed_point": (
        bent,
        ig.fixed_point(
            lambda x, A, b, lam: torch.linalg.solve(A, b - 0.1 * lam * x.abs() * x.conj())
        ),
    ),
    "argmin": (ridge, ig.argmin(misfit)),
    "equality": (
        lambda A, b, lam: b / b.norm() * lam,
        ig.argmin(
            lambda x, A, b, lam: (x - b).abs().square().sum(),
            equality=lambda x, A, b, lam: x.abs().square().sum() - lam**2,
        ),
    ),
    "batches": (
        ridge,
        ig.argmin(
            lambda w, i, A, b, lam: (A[i] @ w - b[i]).abs().square().sum(),
            batches=[torch.tensor([0, 2]), torch.tensor([1])],
            regularizer=lambda w, A, b, lam: lam.exp() * w.abs().square().sum(),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives(name):
    exact, condition = CASES[name]
    solve = ig.implicit(lambda *args: exact(*args).detach(), condition, **STRICT)
    args = inputs()
    assert solve(*args).dtype == C
    assert gradcheck(solve, args) and gradgradcheck(solve, args, fast_mode=True)

    def slopes(function):
        outer = (function(*args) * B).real.sum() + function(*args).abs().sum()
        return torch.autograd.grad(outer, args, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(slopes(solve), slopes(exact))


@pytest.mark.parametrize("lam", [0.7, [0.5, 0.7, 0.9]], ids=str)
@pytest.mark.parametrize("solver", ["exact", solvers.NewtonCG(tol=1e-12)], ids=str)
def test_a_proximal_term(lam, solver):
    """By θ, by λ, one for all or one for each complex number, and by the rest."""
    A, b, _ = inputs()
    lam, theta = torch.tensor(lam).requires_grad_(), draw(N, seed=2).requires_grad_()

    def exact(theta, A, b, lam=lam):
        pull = torch.diag(lam.detach() * torch.ones(N)).to(C)
        return torch.linalg.solve(hermitian(A) + pull, b + lam.detach() * theta)

    def solve(theta, A, b, lam):
        condition = ig.proximal(energy, lam)
        mine = (lambda t, A, b: exact(t, A, b, lam)) if solver == "exact" else solver
        return ig.implicit(mine, condition, **STRICT)(theta, A, b)

    args = theta, A, b, lam
    torch.testing.assert_close(solve(*args), exact(theta, A, b))
    assert gradcheck(solve, args, fast_mode=True) and gradgradcheck(solve, args, fast_mode=True)


def test_containers_with_real_and_complex_parts():
    """A real scalar first: what follows begins at an odd place in memory."""
    args = inputs()
    root = ig.root(
        lambda p, A, b, lam: {"s": p["s"] - lam.sin(), "x": (A @ p["x"][0] - b * p["s"],)}
    )
    exact = lambda A, b, lam: {"s": lam.sin(), "x": (linear(A, b, lam.sin()),)}  # noqa: E731
    both = ig.argmin(
        lambda p, A, b, lam: misfit(p["x"][0], A, b, lam) + (p["s"] - lam.sin()).square()
    )
    least = lambda A, b, lam: {"s": lam.sin(), "x": (ridge(A, b, lam),)}  # noqa: E731
    for solver, condition in ((exact, root), (least, both)):
        solve = ig.implicit(solver, condition, **STRICT)

        def outputs(*args, solve=solve):
            phi = solve(*args)
            return phi["s"], phi["x"][0]

        assert gradcheck(outputs, args) and gradgradcheck(outputs, args, fast_mode=True)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.zeros(N, dtype=C)), nn.Parameter(torch.zeros(()))

    def forward(self, A):
        return A @ self.w + self.bias


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_module_with_complex_parameters(curvature):
    def fitted(A, b, lam):
        """By real numbers: the parts of w, and the real bias."""
        design = torch.cat([A, 1j * A, torch.ones(N, 1)], 1)
        pull = lam.exp() * torch.diag(torch.tensor([1.0] * 2 * N + [1.0]))
        return torch.linalg.solve((design.mH @ design).real + pull, (design.mH @ b).real)

    def train(module, *args):
        x = fitted(*args)
        with torch.no_grad():
            module.w.copy_(torch.complex(x[:N], x[N : 2 * N]))
            module.bias.copy_(x[2 * N])
        return module

    def loss(module, A, b, lam):
        pull = module.w.abs().square().sum() + module.bias.square()
        return (module(A) - b).abs().square().sum() + lam.exp() * pull

    solve = ig.implicit(train, ig.argmin(loss), curvature=curvature, **STRICT)

    def outputs(*args):
        module = solve(Weights(), *args)
        return module.w, module.bias

    assert gradcheck(outputs, inputs())


MINIMISERS = [
    solvers.NewtonCG(tol=1e-11),
    solvers.GradientDescent(lr=0.05, steps=5000, tol=1e-10),
    solvers.TorchOptim(
        factory=lambda p: torch.optim.LBFGS(p, max_iter=500, tolerance_grad=1e-10), steps=5
    ),
    solvers.SciPyMinimize(tol=1e-10),
]


@pytest.mark.parametrize("solver", MINIMISERS, ids=lambda s: type(s).__name__)
def test_minimisers_start_at_complex_numbers(solver):
    solve = ig.implicit(solver, ig.argmin(energy), init=lambda A, b: torch.zeros_like(b))
    expected = torch.linalg.solve(hermitian(A), B)
    torch.testing.assert_close(solve(*inputs()[:2]).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "solver", [solvers.Newton(), solvers.Broyden(), solvers.SciPyRoot()], ids=str
)
def test_root_finders_start_at_complex_numbers(solver):
    solve = ig.implicit(solver, CASES["bent root"][1], init=lambda A, b, lam: torch.zeros_like(b))
    torch.testing.assert_close(solve(*inputs()).detach(), bent(A, B, LAM))


def test_warm_starts():
    solver = solvers.NewtonCG(tol=1e-10)
    monitor = ig.Monitor()
    solve = ig.implicit(
        solver,
        ig.argmin(energy),
        init=lambda A, b: torch.zeros_like(b),
        warm_start=True,
        monitor=monitor,
    )
    for _ in range(2):
        solve(*inputs()[:2]).abs().sum().backward()
    assert [report.warm_started for report in monitor.reports] == [False, True]


@pytest.mark.parametrize("name", ["root", "bent root", "argmin", "equality"])
def test_transforms(name):
    exact, condition = CASES[name]
    solve = ig.implicit(lambda *args: exact(*args).detach(), condition, **STRICT)
    rows = draw(4, N, seed=3)

    def outer(function):
        return lambda b: (function(A, b, LAM) * B).real.sum() + function(A, b, LAM).abs().sum()

    found = vmap(grad(outer(solve)))(rows)
    torch.testing.assert_close(found, torch.stack([grad(outer(exact))(row) for row in rows]))
    tangents = (jvp(lambda b, f=f: f(A, b, LAM), (rows[0],), (rows[1],))[1] for f in (solve, exact))
    torch.testing.assert_close(*tangents)


def test_steps_for_a_batch_with_a_pull_for_each_task():
    loss, lam = lambda x, b: (x - b).abs().square().sum(), torch.tensor([0.5, 1.0, 2.0])
    rows, starts = draw(3, N, seed=4), draw(3, N, seed=5)

    def solve(start, b, lam):
        condition = ig.proximal(loss, lam)
        return ig.implicit(solvers.GradientDescent(lr=0.2, steps=300), condition)(start, b)

    expected = (2 * rows + lam[:, None] * starts) / (2 + lam[:, None])
    torch.testing.assert_close(vmap(solve)(starts, rows, lam), expected)


@pytest.mark.parametrize("given", [torch.tensor, lambda phi: torch.tensor(phi).numpy(), complex])
def test_numbers_of_other_kinds(given):
    """φ² = c: dφ/dc = 1/(2φ), of which torch's gradient is the conjugate."""
    c = torch.tensor(1.0 + 2.0j, requires_grad=True)
    solve = ig.implicit(lambda c: given(complex(c) ** 0.5), ig.root(lambda x, c: x * x - c))
    (found,) = torch.autograd.grad(solve(c).real, c)
    torch.testing.assert_close(found, (1 / (2 * c.detach().sqrt())).conj())


def test_two_numbers_and_conjugates():
    c = torch.tensor(1.0 + 2.0j, requires_grad=True)
    root = ig.root(lambda x, c: ((x[0] * x[0] - c).conj(), x[1] - 2 * c.conj()))
    solve = ig.implicit(lambda c: (c.sqrt(), (2 * c).conj()), root, **STRICT)
    assert gradcheck(solve, (c,)) and gradgradcheck(solve, (c,))


def test_single_precision():
    args = tuple(t.detach().to(torch.complex64) for t in (A, B))
    lam = torch.tensor(0.3, dtype=torch.float32, requires_grad=True)
    solve = ig.implicit(lambda *args: ridge(*args).detach(), ig.argmin(misfit), **STRICT)
    phi = solve(*args, lam)
    assert phi.dtype == torch.complex64
    (found,) = torch.autograd.grad(phi.real.sum(), lam)
    (expected,) = torch.autograd.grad(ridge(*args, lam).real.sum(), lam)
    torch.testing.assert_close(found, expected)


def test_beamforming_through_a_unit_response():
    """min w*Rw with w*a = 1, in two real equations: w = R⁻¹a/(a*R⁻¹a) (Capon, 1969)."""
    response = lambda w, R, a: torch.view_as_real(w.conj() @ a - 1)  # noqa: E731
    condition = ig.argmin(lambda w, R, a: (w.conj() @ R @ w).real, equality=response)

    def capon(R, a):
        x = torch.linalg.solve(R, a)
        return x / (a.conj() @ x)

    solve = ig.implicit(lambda *args: capon(*args).detach(), condition, **STRICT)
    root = draw(N, N, seed=6).requires_grad_()
    R = root @ root.mH + torch.eye(N)
    a = draw(N, seed=7).requires_grad_()

    def twice(function):
        first = torch.autograd.grad(function(R, a).real.sum(), a, create_graph=True)[0]
        return torch.autograd.grad(first.abs().sum(), (root, a), retain_graph=True)

    torch.testing.assert_close(twice(solve), twice(capon))


def test_outer_losses_of_the_testing_kit_see_both_parts():
    lam = LAM.clone().requires_grad_()
    wrong = lambda w, A, b, lam: misfit(w, A, b, lam) + (1j * w * lam).real.sum()  # noqa: E731
    for objective, right in ((misfit, True), (wrong, False)):
        solve = ig.implicit(lambda *args: ridge(*args).detach(), ig.argmin(objective))
        if right:
            ig.testing.check_implicit(solve, (A, B, lam))
        else:
            with pytest.raises(ig.testing.GradientCheckError):
                ig.testing.check_implicit(solve, (A, B, lam))


REFUSED = {
    "bounds": (
        lambda b: ig.implicit(
            lambda b: b.detach(), ig.argmin(lambda x, b: x.abs().sum(), bounds=(0, None))
        )(b),
        "bound must be .*complex numbers have no order",
    ),
    "EarlyStopped": (
        lambda b: ig.implicit(
            lambda b: b.detach(),
            ig.proximal(lambda x: x.abs().square().sum(), 1.0),
            linear_solver=ig.EarlyStopped(time=1.0),
        )(b),
        "EarlyStopped.* is for real phi.*view_as_real",
    ),
    "LowRank": (
        lambda b: ig.implicit(
            torch.clone,
            ig.proximal(lambda x: x.abs().sum(), ig.LowRank(1.0, torch.ones(N, 1))),
        )(b),
        "low-rank lam is for real numbers",
    ),
    "a real residual": (
        lambda b: ig.implicit(lambda b: b.detach(), ig.root(lambda x, b: (x - b).abs()))(b),
        "residual has to return it as torch.complex128",
    ),
    "a complex objective": (
        lambda b: ig.implicit(lambda b: b.detach(), ig.argmin(lambda x, b: (x - b).sum()))(b),
        "must return a scalar floating-point tensor, got a complex128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_for_real_numbers_only(name):
    call, why = REFUSED[name]
    with pytest.raises(ig.ImplicitGradError, match=why):
        call(B.clone().requires_grad_())
