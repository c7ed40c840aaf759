"""One table of inner problems, each differentiated twice by differences; and closed forms."""

import pytest
import torch
from problems import normal
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import softplus

import implicit_grad as ig
from implicit_grad.solvers import NewtonCG

F64 = torch.float64
SOLVER = NewtonCG(maxiter=60, cg=40, tol=1e-13)
OPTIONS = {"linear_solver": ig.CG(rtol=1e-12), "on_failure": "raise"}
X, Y = normal(5, 3, seed=7, grad=False), normal(5, seed=8, grad=False)
LAM = torch.tensor(0.8, dtype=F64)


def proximal(loss, lam=0.8):
    return ig.implicit(SOLVER, ig.proximal(loss, lam), **OPTIONS)


def network(phi, X):
    W, b, w = phi
    return (torch.tanh(X @ W + b) @ w - Y).square().mean()


def tied(theta):
    """One tensor in two places of θ."""
    phi = proximal(lambda p: (X @ p["a"] - Y).square().sum() + (p["b"] ** 4).sum())
    return phi({"a": theta, "b": theta})["a"]


def frozen(theta, other):
    def loss(p):
        return softplus(X @ p[0]).sum() + ((p[0] - p[1]) ** 4).sum()

    return proximal(loss)((theta, other.detach()))[0]


def unused(theta, other):
    return proximal(lambda p: softplus(X @ p[0]).sum())((theta, other))


def empty(theta, nothing):
    return proximal(lambda p: softplus(p[0]).sum() + p[1].sum())((theta, nothing))


def learned(theta, lam):
    return ig.implicit(SOLVER, ig.proximal(lambda p: softplus(X @ p).sum(), lam), **OPTIONS)(theta)


SAMPLES = {
    "quadratic": (proximal(lambda p, X: (X @ p - Y).square().sum()), (3,), (5, 3)),
    "quartic": (proximal(lambda p: (p**4).sum() / 4), (3,)),
    "logistic": (proximal(lambda p, X: softplus(X @ p).sum()), (3,), (5, 3)),
    "network": (lambda *t: proximal(network, 3.0)(t, X), (3, 2), (2,), (2,)),
    "tied": (tied, (3,)),
    "unused": (unused, (3,), (2,)),
    "frozen": (frozen, (3,), (3,)),
    "zero-size": (empty, (3,), (0,)),
    "0-dim": (proximal(lambda p: softplus(p)), ()),
    "a lam for each element": (learned, (3,), "λ of (3,)"),
    "a lam": (learned, (3,), "λ of ()"),
    "bounds": (
        ig.implicit(
            lambda a: a.clamp(-0.5, 0.5),
            ig.argmin(lambda p, a: (p - a).square().sum(), bounds=(-0.5, 0.5)),
            **OPTIONS,
        ),
        (4,),
    ),
}  # fmt: skip
FIRST_ONLY = {"bounds", "frozen"}


def inputs(shapes):
    made = []
    for i, shape in enumerate(shapes):
        if isinstance(shape, str):
            size = (3,) if "3" in shape else ()
            made.append((normal(*size, seed=i, grad=False).abs() + 0.5).requires_grad_())
        else:
            made.append(normal(*shape, seed=i))
    return tuple(made)


@pytest.mark.parametrize("name", SAMPLES)
def test_by_differences(name):
    function, *shapes = SAMPLES[name]
    args = inputs(shapes)
    if name == "frozen":
        args = (args[0], args[1].detach())
    checks = {"check_undefined_grad": True, "check_grad_dtypes": True, "nondet_tol": 0.0}
    assert gradcheck(function, args, **checks)
    if name not in FIRST_ONLY:
        assert gradgradcheck(function, args, nondet_tol=0.0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("seed", range(5))
def test_closed_form_in_every_precision(dtype, tolerance, seed):
    """θ of ridge regression towards θ: dθ = λ (XᵀX + λ)⁻¹ v."""
    features = 0.3 * normal(12, 4, seed=seed, grad=False)  # well conditioned
    v = normal(4, seed=seed + 50, grad=False)
    A = features.T @ features + torch.eye(4, dtype=F64)
    exact = torch.linalg.solve(A, v)

    def solver(theta):
        return torch.linalg.solve(A, theta.double()).to(dtype)

    X = features.to(dtype)
    solve = ig.implicit(
        solver, ig.proximal(lambda p: (X @ p).square().sum() / 2, 1.0), on_failure="ignore"
    )
    theta = normal(4, seed=seed + 9, grad=False).to(dtype).requires_grad_()
    (found,) = torch.autograd.grad(solve(theta), theta, v.to(dtype))
    assert float((found - exact).norm()) <= tolerance * float(exact.norm())
