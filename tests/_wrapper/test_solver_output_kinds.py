"""What a solver returns: unknowns, things besides, and forms that need another way."""

import numpy as np
import pytest
import torch
from torch import nn

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")
ROOT = ig.root(lambda x, c: x * x - c)
MINIMUM = ig.argmin(lambda x, c: x**3 / 3 - c * x)


def newton(c):
    x, n = torch.ones(()), 0
    while (x * x - c).abs() > 1e-14:
        x, n = x - (x * x - c) / (2 * x), n + 1
    return x, n


def with_extras(c):
    """φ and an aux of all kinds, some of which have a graph."""
    x, n = newton(c)
    weight = nn.Parameter(torch.ones(2))
    return x, {"n": n, "residual": x * x - c, "tree": [weight * 2, "converged", None]}


@pytest.mark.parametrize("condition", [ROOT, MINIMUM], ids=["root", "argmin"])
def test_aux_comes_back_untouched_and_detached(condition):
    c = torch.tensor(2.0, requires_grad=True)
    x, aux = ig.implicit(with_extras, condition, has_aux=True)(c)
    (slope,) = torch.autograd.grad(x, c)
    assert slope.item() == pytest.approx(0.5 / 2**0.5)  # d√c/dc
    assert type(aux["n"]) is int and aux["n"] == newton(c.detach())[1]
    assert aux["tree"][1:] == ["converged", None]
    assert not aux["residual"].requires_grad and not aux["tree"][0].requires_grad
    assert torch.equal(aux["tree"][0], torch.full((2,), 2.0))


def test_aux_of_any_kind_is_the_very_object():
    thing = object()
    c = torch.tensor(2.0, requires_grad=True)
    solve = ig.implicit(lambda c: (newton(c)[0], thing), ROOT, has_aux=True)
    assert solve(c)[1] is thing
    with torch.no_grad():
        x, again = solve(c)
    assert again is thing and not x.requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_aux_under_transforms():
    solve = ig.implicit(newton, ROOT, has_aux=True)
    c, seen = torch.tensor(2.0), []

    def outer(c):
        x, n = solve(c)
        seen.append(n)
        return x

    want = 0.5 / 2**0.5
    assert torch.func.grad(outer)(c).item() == pytest.approx(want)
    assert torch.func.jacrev(outer)(c).item() == pytest.approx(want)
    assert torch.func.jacfwd(outer)(c).item() == pytest.approx(want)
    assert torch.func.jvp(outer, (c,), (c,))[1].item() == pytest.approx(2 * want)
    assert torch.func.grad(torch.func.grad(outer))(c).item() == pytest.approx(-0.25 / 2**1.5)
    assert set(map(type, seen)) == {int}
    with pytest.raises(ig.InvalidArgumentError, match=r"has_aux=True does not go with .*vmap"):
        torch.func.vmap(outer)(torch.tensor([2.0, 3.0]))


def test_aux_in_certify_and_as_a_method():
    c = torch.tensor(2.0, requires_grad=True)
    certificate = ig.certify(
        ig.implicit(newton, MINIMUM, has_aux=True), (c,), outer_loss=lambda x: x
    )
    assert certificate.gradients[0].item() == pytest.approx(0.5 / 2**0.5)

    class Model:
        @ig.implicit(condition=ROOT, has_aux=True)
        def solve(self, c):
            return newton(c)

    x, n = Model().solve(c)
    assert x.requires_grad and type(n) is int


BAD_AUX = {
    "it returned a float64 tensor of shape .. alone": lambda c: newton(c)[0],
    "it returned 3 things": lambda c: (*newton(c), 1.0),
    "it returned a list": lambda c: list(newton(c)),
}


@pytest.mark.parametrize("message", BAD_AUX)
def test_a_solver_without_a_pair_is_refused(message):
    solve = ig.implicit(BAD_AUX[message], ROOT, has_aux=True)
    with pytest.raises(ig.InvalidSolutionError, match=r"pair \(phi, aux\), " + message):
        solve(torch.tensor(2.0, requires_grad=True))


def test_has_aux_is_for_functions():
    with pytest.raises(ig.InvalidArgumentError, match="has_aux=True is for solver functions"):
        ig.implicit(ig.solvers.NewtonCG(), MINIMUM, has_aux=True)
    with pytest.raises(ig.InvalidArgumentError, match=r"has_aux=1.: expected True or False"):
        ig.implicit(newton, ROOT, has_aux=1)


# ------------------------------------------------------------ extra outputs without has_aux


def test_integers_are_no_unknowns():
    c = torch.tensor(2.0, requires_grad=True)
    first = ig.argmin(lambda p, c: p[0] ** 3 / 3 - c * p[0])
    for count in (5, True, np.int64(5)):
        x, n = ig.implicit(lambda c, count=count: (newton(c)[0], count), first)(c)
        assert n is count
        assert torch.autograd.grad(x, c)[0].item() == pytest.approx(0.5 / 2**0.5)
    pair = ig.root(lambda p, c: (p[0] * p[0] - c, 0))
    assert torch.autograd.grad(ig.implicit(newton, pair)(c)[0], c)[0].item() == pytest.approx(
        0.5 / 2**0.5
    )
    with pytest.raises(ig.InvalidSolutionError, match=r"under torch.func.vmap, phi holds an int"):
        torch.func.vmap(lambda c: ig.implicit(newton, first)(c)[0])(torch.tensor([2.0, 3.0]))


X = torch.ones((), dtype=torch.float64)
EXTRAS = {
    "a function that wants x alone": (lambda c: newton(c), "TypeError.*all|has_aux=True"),
    "a float residual": (lambda c: (X.clone(), 1e-15), r"phi\[1\] is a float beside.*has_aux"),
    "NumPy's": (lambda c: (np.ones(2), np.float64(0.1)), r"phi\[1\] is a float64 beside.*has_aux"),
    "an integer tensor": (lambda c: (X.clone(), torch.tensor(5)), r"phi\[1\] must.*has_aux=True"),
    "an integer array": (lambda c: (X.clone(), np.arange(3)), r"phi\[1\] must.*has_aux=True"),
    "a message": (lambda c: (X.clone(), "converged"), r"phi\[1\] must.*a str.*has_aux=True"),
    "a number alone": (lambda c: 5, "phi must .*an int.*has_aux=True"),
}


@pytest.mark.parametrize("case", EXTRAS)
@pytest.mark.parametrize("condition", [ROOT, MINIMUM], ids=["root", "argmin"])
def test_extra_outputs_are_named(condition, case):
    solver, message = EXTRAS[case]
    with pytest.raises(ig.InvalidSolutionError, match=message):
        ig.implicit(solver, condition)(torch.tensor(2.0, requires_grad=True))


def test_a_number_that_the_objective_does_not_read_is_no_unknown():
    def solver(c):
        x, _ = newton(c)
        return x, (x * x - c).abs()

    condition = ig.argmin(lambda p, c: p[0] ** 3 / 3 - c * p[0])
    with pytest.raises(ig.InvalidSolutionError, match=r"phi\[1\] is a number that .*has_aux=True"):
        ig.implicit(solver, condition)(torch.tensor(2.0, requires_grad=True))


def test_numbers_stay_legitimate_solutions():
    """A float as φ, floats from SciPy in a tuple, and a dict with a float among arrays."""
    c = torch.tensor(2.0, requires_grad=True)
    x = ig.implicit(lambda c: float(c) ** 0.5, ROOT)(c)
    assert torch.autograd.grad(x, c)[0].item() == pytest.approx(0.5 / 2**0.5)
    both = ig.root(lambda p, c: (p[0] ** 2 - c, p[1] - c))
    x, y = ig.implicit(lambda c: (np.float64(float(c) ** 0.5), float(c)), both)(c)
    assert torch.autograd.grad(x + y, c)[0].item() == pytest.approx(0.5 / 2**0.5 + 1)
    named = ig.argmin(lambda p, c: ((p["w"] - c) ** 2).sum() + (p["b"] - 2 * c) ** 2)
    phi = ig.implicit(lambda c: {"w": np.full(2, float(c)), "b": 2 * float(c)}, named)(c)
    assert torch.autograd.grad(phi["b"] + phi["w"].sum(), c)[0].item() == pytest.approx(4)


# ------------------------------------------------------------ modules, complex numbers, dtypes

NET = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
OF_A_MODULE = {
    "state_dict": NET.state_dict,
    "parameters": NET.parameters,
    "named_parameters": NET.named_parameters,
    "a list of pairs": lambda: list(NET.named_parameters()),
}


@pytest.mark.parametrize("form", OF_A_MODULE)
@pytest.mark.parametrize("proximal", [False, True])
def test_forms_of_a_module_are_refused_with_what_to_return(form, proximal):
    condition = ig.proximal(lambda p: 0, 1.0) if proximal else ig.argmin(lambda p, a: a)
    if proximal and form not in ("parameters", "named_parameters"):
        return  # another form than θ's: that is named
    with pytest.raises(ig.InvalidSolutionError, match="return the module itself"):
        ig.implicit(lambda a: OF_A_MODULE[form](), condition)(torch.ones((), requires_grad=True))


@pytest.mark.parametrize("kind", ["argmin", "proximal", "fixed_point", "a minimiser of ours"])
def test_complex_phi_in_pairs_under_every_condition(kind):
    """M φ = c for Hermitian M: the gradient is that of torch's own complex solve."""
    pairs, whole = torch.view_as_real, torch.view_as_complex
    noise = torch.randn(3, 3, dtype=torch.complex128)
    M = noise @ noise.mH + torch.eye(3)

    def energy(phi, c):
        phi = whole(phi)
        return (phi.conj() @ (M @ phi)).real / 2 - (phi.conj() @ c).real

    def exact(c):
        if kind != "proximal":
            return torch.linalg.solve(M, c)
        return torch.linalg.solve(M + torch.eye(3), 2 * c)  # λ = 1, θ = c

    solver, condition = lambda *args: pairs(exact(args[-1])), ig.argmin(energy)
    call, options = lambda solve, c: solve(c), {}
    if kind == "proximal":
        condition = ig.proximal(energy, 1.0)
        call = lambda solve, c: solve(pairs(c), c)  # noqa: E731
    elif kind == "fixed_point":
        step = 0.05
        condition = ig.fixed_point(
            lambda phi, c: pairs(whole(phi) - step * (M @ whole(phi) - c)), symmetric=True
        )
    elif kind == "a minimiser of ours":
        solver = ig.solvers.NewtonCG(maxiter=5, tol=1e-12)
        options = {"init": lambda c: pairs(torch.zeros_like(c))}
    solve = ig.implicit(solver, condition, linear_solver=ig.CG(rtol=1e-12), **options)
    c = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    weights = torch.randn(3, dtype=torch.complex128)
    found, want = (
        torch.autograd.grad((phi * weights).real.sum() + phi.abs().square().sum(), c)[0]
        for phi in (whole(call(solve, c)), exact(c))
    )
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=str)
def test_the_side_with_the_wrong_dtype_is_named(wide):
    narrow = torch.float32
    a = torch.tensor(2.0, dtype=wide, requires_grad=True)
    if wide == narrow:
        solve = ig.implicit(lambda a: (a**0.5).double(), ig.root(lambda x, a: (x**2 - a).float()))
        owner = "residual has to return it as torch.float64"
    else:
        solve = ig.implicit(
            lambda a: torch.tensor(a.item() ** 0.5, dtype=narrow), ig.root(lambda x, a: x**2 - a)
        )
        owner = "the solver has to return it as torch.float64"
    with pytest.raises(ig.InvalidArgumentError, match=f"the solver returned phi as .*{owner}"):
        solve(a)
