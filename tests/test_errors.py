"""Bad input and numerical trouble: what is said, and that nothing was changed."""

import pickle
import re
import sys
import traceback
import warnings

import pytest
import torch
from problems import errors_of_torch, minimize, normal, prox

import implicit_grad as ig

LAM = 0.5


def loss(phi, X):
    return (X @ phi).square().sum() / 2 + (phi**4).sum() / 4


def good(theta, X):
    return minimize(lambda phi: loss(phi, X) + prox(phi, theta, LAM), theta)


def returning(change):
    """Call a solver whose solution is spoilt by `change`."""

    def call(theta, X):
        solver = ig.implicit(lambda theta, X: change(good(theta, X)), ig.proximal(loss, LAM))
        return solver(theta, X)

    return call


def with_lam(lam):
    """Call a good solver under another λ."""
    return lambda theta, X: ig.implicit(good, ig.proximal(loss, lam))(theta, X)


def with_condition(make):
    """Call a good solver under the condition that `make` returns."""
    return lambda theta, X: ig.implicit(good, make())(theta, X)


def made(**options):
    """Wrap a good solver with other options."""
    return lambda theta, X: ig.implicit(**{"solver": good, "condition": CONDITION, **options})


def called(**options):
    """Call what `made` wraps."""
    return lambda theta, X: made(**options)(theta, X)(theta, X)


def then_modify(theta, X):
    phi = ig.implicit(good, CONDITION)(theta * 1, X)
    with torch.no_grad():
        phi.add_(1.0)
    phi.sum().backward()


def theta_modified(theta, X):
    mine = theta.detach().clone().requires_grad_()
    phi = ig.implicit(good, CONDITION)(mine, X)
    with torch.no_grad():
        mine.sub_(0.1)
    phi.sum().backward()


def too_large(theta, X):
    ig.implicit(good, CONDITION, linear_solver=ig.Exact(max_size=2))(theta, X).sum().backward()


def edits_data(theta, X):
    def solver(theta, X):
        X.mul_(2.0)
        return good(theta, X)

    ig.implicit(solver, CONDITION)(theta, X.clone())


def called_by_keyword(theta, X):
    ig.implicit(good, CONDITION)(theta=theta, X=X)


def tied_root(theta, X):
    solver = ig.implicit(lambda theta: [theta.clone()] * 2, ig.root(lambda phi, theta: phi))
    solver(theta)


CONDITION = ig.proximal(loss, LAM)
DESCENT, ROOTS = ig.solvers.GradientDescent(lr=1, steps=1), ig.solvers.SciPyRoot()
ARGUMENT, SOLUTION = ig.InvalidArgumentError, ig.InvalidSolutionError

# what is done, the exception, and a part of its sentence
BAD = {
    "phi in another container": (returning(lambda phi: [phi]), SOLUTION, "must have the same"),
    "phi of another shape": (
        returning(lambda phi: phi[:, None]),
        SOLUTION,
        r"phi must be like theta, a float64 tensor of shape \(3,\).*of shape \(3, 1\)",
    ),
    "phi of another dtype": (
        returning(torch.Tensor.float),
        SOLUTION,
        "must be like theta, a float64 tensor.*returned a float32 tensor",
    ),
    "phi of integers": (returning(torch.Tensor.long), SOLUTION, "dense floating-point.*an? int64"),
    "phi complex": (returning(lambda phi: phi + 0j), SOLUTION, "like theta, a float64.*complex128"),
    "phi sparse": (returning(torch.Tensor.to_sparse), SOLUTION, "dense floating-point"),
    "phi of NaN": (returning(lambda phi: phi / 0 - phi / 0), SOLUTION, "NaN or Inf.*diverged"),
    "phi of Inf": (returning(lambda phi: phi / 0), SOLUTION, "NaN or Inf.*diverged"),
    "phi None": (returning(lambda phi: None), SOLUTION, "returned None; it must return phi"),
    "phi an object": (returning(lambda phi: object()), SOLUTION, "returned an object"),
    "phi an empty list": (returning(lambda phi: []), SOLUTION, "returned a list; it must return"),
    "data edited": (edits_data, SOLUTION, r"changed one of its arguments in place.*clone\(\)"),
    "tied phi of a root": (tied_root, SOLUTION, "holds one tensor more than once"),
    "tied phi under constraints": (
        lambda theta, X: ig.implicit(
            lambda theta: [theta.clone()] * 2,
            ig.argmin(lambda phi, theta: (phi[0] - theta).square().sum(), bounds=(0, None)),
        )(theta),
        SOLUTION,
        "argmin: phi holds one tensor more than once",
    ),
    "lam 0": (with_lam(0), ARGUMENT, "lam must be a number.*greater than 0, got 0$"),
    "lam < 0": (with_lam(-0.5), ARGUMENT, "finite and greater than 0, got -0.5$"),
    "lam NaN": (with_lam(float("nan")), ARGUMENT, "greater than 0, got nan$"),
    "lam Inf": (with_lam(float("inf")), ARGUMENT, "greater than 0, got inf$"),
    "lam a negative tensor": (with_lam(torch.tensor(-1.0)), ARGUMENT, "greater than 0, got -1$"),
    "lam partly 0": (
        with_lam(torch.tensor([1.0, 0, 1])),
        ARGUMENT,
        "got a tensor with other values$",
    ),
    "lam a NaN tensor": (
        with_lam(torch.tensor(float("nan"))),
        ARGUMENT,
        "greater than 0, got nan$",
    ),
    "lam of another shape": (
        with_lam(torch.ones(2).double()),
        ARGUMENT,
        r"lam of shape \(2,\) does not fit theta of shape \(3,\)",
    ),
    "lam of too many dimensions": (with_lam(torch.ones(1, 3)), ARGUMENT, r"\(1, 3\) does not fit"),
    "lam a string": (with_lam("0.5"), ARGUMENT, "greater than 0, got '0.5'$"),
    "lam a bool": (with_lam(True), ARGUMENT, "greater than 0, got a bool$"),
    "lam of integers": (
        with_lam(torch.tensor(1)),
        ARGUMENT,
        "greater than 0, got an int64 tensor",
    ),
    "lam in another container": (with_lam({"a": 1.0}), ARGUMENT, "container in the form of theta"),
    "theta by keyword": (called_by_keyword, ARGUMENT, "called without positional arguments"),
    "theta of integers": (
        lambda theta, X: ig.implicit(good, CONDITION)(theta.long(), X),
        ARGUMENT,
        "theta.*floating-point tensors only.*int64",
    ),
    "objective not scalar": (
        with_condition(lambda: ig.argmin(lambda phi, theta, X: X @ phi)),
        ARGUMENT,
        r"objective must return a scalar.*float64 tensor of shape \(4,\)",
    ),
    "objective without an argument": (
        with_condition(lambda: ig.argmin(lambda phi, theta: phi @ theta)),
        SOLUTION,
        "as f\\(phi, \\*arguments\\).*It is handed phi, and then everything",
    ),
    "objective without an argument, of a module of another type": (
        lambda theta, X: ig.implicit(
            lambda net, X: torch.nn.Sequential(net), ig.argmin(lambda net, X: net(X).sum())
        )(torch.nn.LayerNorm(3).double(), X),
        SOLUTION,
        "as f\\(phi, \\*arguments\\).*It is handed phi, and then everything",
    ),
    "objective that reads the module that was trained": (
        lambda theta, X: ig.implicit(
            lambda net, X: net, ig.argmin(lambda net, start, X: net(X).sum())
        )(torch.nn.LayerNorm(3).double(), X),
        SOLUTION,
        "or if the function reads that argument too, pass it by keyword",
    ),
    "loss not scalar": (
        with_condition(lambda: ig.proximal(lambda phi, X: X @ phi, LAM)),
        ARGUMENT,
        "proximal: loss must return a scalar",
    ),
    "objective a float": (
        with_condition(lambda: ig.argmin(lambda phi, theta, X: phi.sum().item())),
        ARGUMENT,
        "scalar floating-point tensor, got a float",
    ),
    "objective None": (
        with_condition(lambda: ig.argmin(lambda phi, theta, X: None)),
        ARGUMENT,
        "scalar floating-point tensor, got None",
    ),
    "objective without phi": (
        with_condition(lambda: ig.argmin(lambda phi, theta, X: (X @ theta).sum())),
        ARGUMENT,
        "argmin: the function's value does not depend on phi",
    ),
    "objective of detached phi": (
        with_condition(lambda: ig.argmin(lambda phi, theta, X: (X @ phi.detach()).sum())),
        ARGUMENT,
        "does not depend on phi.*was phi detached",
    ),
    "residual without phi": (
        with_condition(lambda: ig.root(lambda phi, theta, X: theta)),
        ARGUMENT,
        "root: the function's value does not depend on phi",
    ),
    "residual of another shape": (
        with_condition(lambda: ig.root(lambda phi, theta, X: X @ phi)),
        ARGUMENT,
        r"root: residual: for phi, a float64 tensor of shape \(3,\), it returned.*\(4,\)",
    ),
    "map of another form": (
        with_condition(lambda: ig.fixed_point(lambda phi, theta, X: (phi,))),
        ARGUMENT,
        "fixed_point: map must return the form of phi",
    ),
    "loss not callable": (with_condition(lambda: ig.proximal(3, LAM)), ARGUMENT, "proximal: loss"),
    "residual not callable": (with_condition(lambda: ig.root(3)), ARGUMENT, "root: residual must"),
    "map not callable": (with_condition(lambda: ig.fixed_point(3)), ARGUMENT, "fixed_point: map"),
    "model of argmin not callable": (
        with_condition(lambda: ig.argmin(loss, model=3)),
        ARGUMENT,
        "argmin: model must be a function",
    ),
    "model of proximal not callable": (
        with_condition(lambda: ig.proximal(loss, LAM, model=3)),
        ARGUMENT,
        "proximal: model must be a function",
    ),
    "objective not callable": (
        with_condition(lambda: ig.argmin(3)),
        ARGUMENT,
        "function of.*an int",
    ),
    "strong_convexity inf": (
        with_condition(lambda: ig.argmin(loss, strong_convexity=float("inf"))),
        ARGUMENT,
        r"argmin\(strong_convexity=inf\): expected None or a number > 0",
    ),
    "strong_convexity 0": (
        with_condition(lambda: ig.argmin(loss, strong_convexity=0.0)),
        ARGUMENT,
        r"argmin\(strong_convexity=0.0\): expected None or a number > 0",
    ),
    "no condition": (made(condition=loss), ARGUMENT, "condition must be argmin.*got a function"),
    "condition None": (made(condition=None), ARGUMENT, "condition must be argmin.*got None"),
    "solver not callable": (made(solver=3), ARGUMENT, "solver must be callable.*got an int"),
    "linear_solver a string": (
        made(linear_solver="CG"),
        ARGUMENT,
        r"linear_solver must be CG\(\).*got 'CG'",
    ),
    "linear_solver a class": (made(linear_solver=ig.CG), ARGUMENT, r"linear_solver must be CG\(\)"),
    "CG with root": (
        made(condition=ig.root(loss), linear_solver=ig.CG()),
        ARGUMENT,
        r"CG needs a symmetric system.*root is general: use .*NormalCG\(\).*symmetric=True",
    ),
    "CG with fixed_point": (
        made(condition=ig.fixed_point(loss), linear_solver=ig.CG()),
        ARGUMENT,
        "CG needs a symmetric system.*fixed_point is general",
    ),
    "on_failure misspelt": (made(on_failure="rise"), ARGUMENT, "on_failure='rise': expected"),
    "monitor a class": (made(monitor=ig.Monitor), ARGUMENT, "monitor must be an implicit_grad"),
    "a condition as the solver": (
        lambda *_: ig.implicit(CONDITION),
        ARGUMENT,
        "as a decorator, pass the condition as condition=",
    ),
    "rtol_gradient without CG": (
        made(rtol_gradient=0.1, linear_solver=ig.MINRES()),
        ARGUMENT,
        "rtol_gradient=0.1 is for CG.*MINRES stops by its own options",
    ),
    "Gauss-Newton without a model": (
        called(curvature="gauss_newton"),
        ARGUMENT,
        r"theta is a float64 tensor of shape \(3,\) and no module.*model=model",
    ),
    "Gauss-Newton instead without a model": (
        lambda theta, X: made(linear_solver=ig.CG(on_negative_curvature="gauss_newton"))(theta, X)(
            theta, X
        ),
        ARGUMENT,
        r"theta is a float64 tensor of shape \(3,\) and no module.*model=model",
    ),
    "nothing to start from": (
        lambda theta, X: ig.implicit(DESCENT, ig.argmin(loss))(X=X),
        ARGUMENT,
        "without a positional argument to start from, this solver needs init=",
    ),
    "init with a function": (made(init=good), ARGUMENT, "init is for solvers"),
    "minimiser of a root": (
        lambda theta, X: ig.implicit(DESCENT, ig.root(loss))(X),
        ARGUMENT,
        "root has not an objective to minimise",
    ),
    "minimiser of a fixed point": (
        lambda theta, X: ig.implicit(DESCENT, ig.fixed_point(loss))(X),
        ARGUMENT,
        "fixed_point has not an objective to minimise",
    ),
    "root finder of a minimum": (
        lambda theta, X: ig.implicit(ROOTS, ig.argmin(loss))(theta, X),
        ARGUMENT,
        "argmin has not a residual to bring to 0.*one with `find_root` with root and fixed_point",
    ),
    "root finder of a minimum near theta": (
        lambda theta, X: ig.implicit(ROOTS, CONDITION)(theta, X),
        ARGUMENT,
        "proximal has not a residual to bring to 0",
    ),
    "CG maxiter < 0": (lambda *_: ig.CG(maxiter=-1), ARGUMENT, r"CG\(maxiter=-1\): expected None"),
    "CG maxiter a float": (lambda *_: ig.CG(maxiter=5.0), ARGUMENT, r"CG\(maxiter=5.0\)"),
    "CG maxiter a bool": (lambda *_: ig.CG(maxiter=True), ARGUMENT, r"CG\(maxiter=True\)"),
    "CG rtol 0": (lambda *_: ig.CG(rtol=0.0), ARGUMENT, r"rtol=0.0\): expected.*between 0 and 1"),
    "CG rtol 1": (lambda *_: ig.CG(rtol=1.0), ARGUMENT, r"CG\(rtol=1.0\)"),
    "CG rtol NaN": (lambda *_: ig.CG(rtol=float("nan")), ARGUMENT, r"CG\(rtol=nan\)"),
    "CG atol < 0": (lambda *_: ig.CG(atol=-1.0), ARGUMENT, r"CG\(atol=-1.0\)"),
    "CG damping < 0": (lambda *_: ig.CG(damping=-0.1), ARGUMENT, r"CG\(damping=-0.1\)"),
    "CG on_negative_curvature": (
        lambda *_: ig.CG(on_negative_curvature="halt"),
        ARGUMENT,
        "on_negative_curvature='halt'",
    ),
    "NormalCG maxiter 0": (lambda *_: ig.NormalCG(maxiter=0), ARGUMENT, "integer of at least 1"),
    "NormalCG rtol < 0": (lambda *_: ig.NormalCG(rtol=-1.0), ARGUMENT, r"NormalCG\(rtol=-1.0\)"),
    "Exact max_size 0": (lambda *_: ig.Exact(max_size=0), ARGUMENT, r"Exact\(max_size=0\)"),
    "GradientDescent lr": (lambda *_: ig.solvers.GradientDescent(lr=0, steps=1), ARGUMENT, "lr=0"),
    "GradientDescent without an end": (
        lambda *_: ig.solvers.GradientDescent(lr=1),
        ARGUMENT,
        "give steps, tol or both",
    ),
    "too large for Exact": (too_large, ARGUMENT, "a dense 3 × 3 matrix; its max_size is 2"),
    "theta modified": (theta_modified, ig.GraphError, "modified in place between forward and back"),
    "phi modified": (then_modify, ig.GraphError, "modified in place between forward and backward"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case):
    action, exception, sentence = BAD[case]
    theta, X = normal(3, seed=1), normal(4, 3, seed=2, grad=False)
    theta.grad = torch.ones(3, dtype=torch.float64)
    hooks = torch.nn.modules.module._global_forward_hooks

    def fingerprint():
        return [theta.detach().clone(), theta.grad.clone(), X.clone(), torch.get_rng_state()]

    before, modes = fingerprint(), (torch.is_grad_enabled(), len(hooks))
    with pytest.raises(exception) as caught:
        action(theta, X)
    assert type(caught.value) is exception
    assert isinstance(caught.value, ig.ImplicitGradError)
    assert re.search(sentence, str(caught.value), re.DOTALL), str(caught.value)
    assert all(map(torch.equal, before, fingerprint()))
    assert modes == (torch.is_grad_enabled(), len(hooks))


def test_bad_arguments_are_value_errors():
    assert issubclass(ig.InvalidArgumentError, ValueError)
    assert issubclass(ig.ImplicitGradError, RuntimeError)


@pytest.mark.parametrize(
    "lam", [0.0, [1.0, -1.0], torch.tensor(-1.0), ig.LowRank(-1.0, torch.ones(3, 1))], ids=str
)
def test_lam_is_checked_when_it_is_given(lam):
    with pytest.raises(ARGUMENT, match="proximal: lam must be a number"):
        ig.proximal(loss, lam)
    ig.proximal(loss, lambda: lam)  # a function is asked at each call


# ---------------------------------------------------------------- allowed, and done right


@pytest.mark.parametrize("alias", [lambda t: t, lambda t: t.view(3), lambda t: t.mul_(1.0)])
def test_a_solver_may_return_its_input(alias):
    theta = normal(3, seed=1)
    before = theta.detach().clone()
    condition = ig.argmin(lambda phi, theta: (phi - theta).square().sum())
    phi = ig.implicit(lambda theta: alias(theta), condition)(theta)
    assert phi is not theta and phi.data_ptr() != theta.data_ptr()
    phi.square().sum().backward()
    torch.testing.assert_close(theta.grad, 2 * before, rtol=1e-14, atol=0)
    assert torch.equal(theta, before)


def test_a_solver_may_return_its_data_as_phi():
    data = normal(3, seed=1, grad=False)
    phi = ig.implicit(lambda data: data, ig.argmin(lambda phi, x: (phi - x).square().sum()))(data)
    phi.data.zero_()
    assert data.norm() > 0


def test_a_solver_may_edit_arguments_that_are_differentiated():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    before = theta.detach().clone(), X.detach().clone()

    def careless(theta, X):
        phi = good(theta, X)
        theta.zero_(), X.zero_()
        return phi

    def gradients(solver):
        return torch.autograd.grad(ig.implicit(solver, CONDITION)(theta, X).sum(), (theta, X))

    assert all(map(torch.equal, gradients(careless), gradients(good)))
    assert all(map(torch.equal, (theta, X), before))


def test_a_solvers_own_exception_comes_through():
    class OwnError(Exception):
        pass

    def a_name_to_look_for():
        raise OwnError("out of memory")

    rng = torch.get_rng_state()
    with pytest.raises(OwnError, match=r"^out of memory$") as caught:
        ig.implicit(lambda theta, X: a_name_to_look_for(), CONDITION)(normal(3), normal(4, 3))
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].name == "a_name_to_look_for"
    assert torch.is_grad_enabled() and torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("bounds", [None, (0, None)])
def test_a_minimisers_own_type_error_comes_through(bounds):
    class Broken:
        def minimize(self, objective, init, **constraints):
            raise TypeError("unsupported operand")

    solve = ig.implicit(Broken(), ig.argmin(loss, bounds=bounds), init=lambda *_: normal(3))
    with pytest.raises(TypeError, match=r"^unsupported operand$"):
        solve(normal(4, 3))


def test_torchs_own_error_at_a_second_backward_comes_through():
    phi = ig.implicit(good, CONDITION)(normal(3, seed=1), normal(4, 3, seed=2))
    phi.sum().backward()
    with errors_of_torch():
        phi.sum().backward()


def test_an_interrupt_within_a_module_gives_its_buffers_back():
    class Interrupted(torch.nn.BatchNorm1d):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt  # torch calls no hooks after it

    norm = Interrupted(3).double()
    buffers = list(norm.buffers())
    with pytest.raises(KeyboardInterrupt):
        ig.implicit(good, ig.proximal(lambda phi, X: norm(X).sum(), LAM))(normal(3), normal(4, 3))
    assert all(b is a for b, a in zip(norm.buffers(), buffers, strict=True))
    assert int(norm.num_batches_tracked) == 0


def test_the_objectives_own_exception_comes_through_and_buffers_go_back():
    norm = torch.nn.BatchNorm1d(3).double()
    buffers = [id(b) for b in norm.buffers()]
    hooks = torch.nn.modules.module._global_forward_hooks

    def broken(phi, X):
        norm(X)
        return norm(X[:, :2]).sum()

    with errors_of_torch():
        ig.implicit(good, ig.proximal(broken, LAM))(normal(3), normal(4, 3))
    assert [id(b) for b in norm.buffers()] == buffers
    assert int(norm.num_batches_tracked) == 0 and not hooks


# ---------------------------------------------------------------- numerical trouble


def indefinite(theta, X):
    """A saddle point in place of a minimum."""
    condition = ig.argmin(lambda phi, theta, X: (phi - theta) @ saddle @ (phi - theta) / 2)
    saddle = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    return lambda **options: ig.implicit(lambda t, X: t.clone(), condition, **options)(theta, X)


def indefinite_exact(theta, X):
    solve = indefinite(theta, X)
    return lambda **options: solve(linear_solver=ig.Exact(), **options)


def nan_cotangent(theta, X):
    return lambda **options: ig.implicit(good, CONDITION, **options)(theta, X) * float("nan")


def unsolved(theta, X):
    return lambda **options: ig.implicit(lambda t, X: t + 1.0, CONDITION, **options)(theta, X)


def out_of_iterations(theta, X):
    cg = {"linear_solver": ig.CG(maxiter=1, rtol=1e-8)}
    return lambda **options: ig.implicit(good, CONDITION, **cg, **options)(theta, X)


def singular(theta, X):
    condition = ig.argmin(lambda phi, theta, X: (phi - theta)[0] ** 2)
    exact = {"linear_solver": ig.Exact()}
    solver = ig.implicit
    return lambda **options: solver(lambda t, X: t.clone(), condition, **exact, **options)(theta, X)


def nonfinite_operator(theta, X):
    condition = ig.argmin(lambda phi, theta, X: ((phi - theta) ** 2).sum(dim=0).sqrt())
    return lambda **options: ig.implicit(lambda t, X: t.clone(), condition, **options)(theta, X)


TROUBLE = {
    indefinite: (ig.Status.NEGATIVE_CURVATURE, "non-positive curvature at phi"),
    indefinite_exact: (ig.Status.NEGATIVE_CURVATURE, "non-positive curvature at phi"),
    nan_cotangent: (ig.Status.NONFINITE_RHS, "incoming gradient holds NaN or Inf"),
    unsolved: (ig.Status.INNER_NOT_STATIONARY, "phi does not solve the inner problem"),
    out_of_iterations: (ig.Status.MAX_ITER, "ran out of iterations"),
    singular: (ig.Status.SINGULAR, "singular to working precision"),
    nonfinite_operator: (ig.Status.NONFINITE_OPERATOR, "Jacobian gave NaN or Inf"),
}


@pytest.fixture(params=TROUBLE, ids=lambda make: make.__name__)
def trouble(request):
    theta, X = normal(3, seed=1), normal(4, 3, seed=2, grad=False)
    return theta, request.param(theta, X), *TROUBLE[request.param]


def test_trouble_can_raise(trouble):
    theta, solve, status, sentence = trouble
    phi = solve(on_failure="raise")
    with pytest.raises(ig.LinearSolveError, match=sentence) as caught:
        (phi * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert caught.value.report.status == status and theta.grad is None


def test_trouble_warns_and_is_recorded(trouble):
    _theta, solve, status, sentence = trouble
    monitor = ig.Monitor()
    phi = solve(monitor=monitor)
    with pytest.warns(ig.ImplicitGradWarning, match=sentence) as caught:
        (phi * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert len(caught) == 1
    assert monitor.last.status == status and len(monitor.reports) == 1


def test_trouble_can_be_ignored(trouble):
    theta, solve, status, _sentence = trouble
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (solve(on_failure="ignore") * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    nonfinite = status in (
        ig.Status.NONFINITE_RHS,
        ig.Status.NONFINITE_OPERATOR,
        ig.Status.SINGULAR,
    )
    assert bool(theta.grad.isnan().any()) == nonfinite


def test_negative_curvature_can_raise_by_itself():
    theta, X = normal(3, seed=1), normal(4, 3, seed=2)
    solver = ig.CG(on_negative_curvature="raise")
    phi = indefinite(theta, X)(linear_solver=solver, on_failure="ignore")
    with pytest.raises(ig.LinearSolveError, match="CG met negative curvature"):
        phi.sum().backward()


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_trouble_names_the_place_that_says_more(on_failure):
    """A warning in its text, an exception in a note below it; both as `anchor`, and pickled too."""
    a = torch.ones(3, dtype=torch.float64, requires_grad=True)
    condition = ig.argmin(lambda x, a: ((x - a) ** 2).sum())
    solve = ig.implicit(lambda a: a + 1, condition, on_failure=on_failure)
    kinds = {"warn": pytest.warns, "raise": pytest.raises}
    kind = {"warn": ig.ImplicitGradWarning, "raise": ig.LinearSolveError}[on_failure]
    with kinds[on_failure](kind, match="does not solve the inner problem") as seen:
        solve(a).sum().backward()
    said = seen.value if on_failure == "raise" else seen[0].message
    assert said.anchor == ig.Status.INNER_NOT_STATIONARY.anchor == "inner-not-stationary"
    for each in (said, pickle.loads(pickle.dumps(said))):
        lines = "".join(traceback.format_exception_only(each)).splitlines()
        if on_failure == "warn" or sys.version_info >= (3, 11):
            assert sum("see docs/why.md#inner-not-stationary" in line for line in lines) == 1
        assert each.anchor == said.anchor


def test_a_message_that_says_it_all_has_no_note():
    with pytest.raises(ig.InvalidArgumentError) as caught:
        ig.CG(maxiter=-1)
    assert caught.value.anchor == "invalid-argument-error"
    assert "why.md" not in "".join(traceback.format_exception(caught.value)[-1])
