"""Arguments that require grad and that the condition never reads are told, and only those."""

import warnings

import pytest
import torch

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")


def fit(s, lr):
    return s.detach().clone()


def value(number):
    return torch.tensor(number, requires_grad=True)


def told(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in said if issubclass(w.category, ig.ImplicitGradWarning)]


UNREAD = {
    "a step length": (lambda w, s, lr: (w - s) ** 2, (value(1.0), value(0.5)), ["args[1]"]),
    "through item()": (
        lambda w, s, lr: (w - s.item()) ** 2,
        (value(1.0), value(0.5)),
        ["args[0]", "args[1]"],
    ),
    "in a container": (
        lambda w, s, h: (w - s) ** 2 + h["decay"] * w**2,
        (value(1.0), {"decay": value(0.0), "lr": value(0.5)}),
        ["args[1]['lr']"],
    ),
    "in a ParameterDict": (
        lambda w, s, h: (w - s) ** 2 + h["decay"] * w**2,
        (value(1.0), torch.nn.ParameterDict({"decay": value(0.0), "lr": value(0.5)})),
        ["args[1].lr"],
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_they_are_named_at_the_call(case):
    objective, args, names = UNREAD[case]
    (message,) = told(lambda: ig.implicit(fit, ig.argmin(objective))(*args))
    assert "gradient is 0" in message and "argmin" in message
    for name in ("args[0]", "args[1]", "args[1]['lr']", "args[1].lr"):
        assert (f"{name}, a float" in message) == (name in names)


def test_by_keyword_and_with_root():
    solve = ig.implicit(fit, ig.root(lambda w, s, lr: w - s))
    (message,) = told(lambda: solve(value(1.0), lr=value(0.5)))
    assert "kwargs['lr'], a float" in message and message.startswith("root")


def test_the_derivative_is_zero_indeed():
    s, lr = value(1.0), value(0.5)
    with pytest.warns(ig.ImplicitGradWarning, match="does not depend on args.1., "):
        w = ig.implicit(fit, ig.argmin(lambda w, s, lr: (w - s) ** 2))(s, lr)
    w.backward()
    assert (s.grad, lr.grad) == (1, 0)


READ = {
    "read": lambda: ig.implicit(fit, ig.argmin(lambda w, s, lr: (w - s * lr) ** 2))(
        value(1.0), value(1.0)
    ),
    "without grad": lambda: ig.implicit(fit, ig.argmin(lambda w, s, lr: (w - s) ** 2))(
        value(1.0), torch.tensor(0.5)
    ),
    "detached": lambda: ig.implicit(fit, ig.argmin(lambda w, s, lr: (w - s) ** 2))(
        value(1.0), value(0.5).detach()
    ),
    "theta, which lam holds": lambda: ig.implicit(
        lambda theta, x: theta.detach() * 1.0, ig.proximal(lambda w, x: 0 * x * w, value(1.0))
    )(value(1.0), value(1.0)),
    "a part of theta that the loss leaves out": lambda: ig.implicit(
        lambda theta: {k: t.detach().clone() for k, t in theta.items()},
        ig.proximal(lambda w: (w["a"] ** 2).sum(), 1.0),
    )({"a": value(0.0), "b": value(1.0)}),
    "a bound that is not active": lambda: ig.implicit(
        lambda s, top: s.detach().clone(),
        ig.argmin(lambda w, s, top: (w - s) ** 2, bounds=lambda s, top: (None, top)),
    )(value(1.0), value(2.0)),
    "parameters where phi starts": lambda: ig.implicit(
        lambda start, s: [s.detach().clone()], ig.argmin(lambda w, start, s: (w[0] - s) ** 2)
    )(torch.nn.ParameterList([value(0.0)]), value(1.0)),
    "zero for these values": lambda: ig.implicit(
        fit, ig.argmin(lambda w, s, lr: (w - s) ** 2 + (0 * lr).relu() * w)
    )(value(1.0), value(0.5)),
    "ignored": lambda: ig.implicit(
        fit, ig.argmin(lambda w, s, lr: (w - s) ** 2), on_failure="ignore"
    )(value(1.0), value(0.5)),
    "without gradients": lambda: torch.no_grad()(
        ig.implicit(fit, ig.argmin(lambda w, s, lr: (w - s) ** 2))
    )(value(1.0), value(0.5)),
}


@pytest.mark.parametrize("case", READ)
def test_no_false_alarm(case):
    assert told(READ[case]) == []


def test_under_transforms():
    solve = ig.implicit(fit, ig.argmin(lambda w, s, lr: (w - s) ** 2))
    s, lr = torch.tensor(1.0), torch.tensor(0.5)
    assert told(lambda: torch.func.grad(solve)(s, lr)) == []
    assert torch.func.grad(solve, argnums=1)(s, lr) == 0


# ------------------------------------------------- outputs that a Gauss-Newton product leaves out

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sum(1) + 1


def ridge(lam):
    return torch.linalg.solve(X.T @ X + lam * torch.eye(3, dtype=X.dtype), X.T @ Y)


def gauss_newton(objective, model, **options):
    lam = torch.tensor(5.0, requires_grad=True)
    condition = ig.argmin(objective, model=model)
    solve = ig.implicit(ridge, condition, curvature="gauss_newton", **options)
    said = told(lambda: solve(lam).sum().backward())
    right = torch.autograd.grad(ridge(x := lam.detach().requires_grad_()).sum(), x)[0]
    return said, (lam.grad / right).item()


def misfit(prediction):
    return ((prediction - Y) ** 2).sum() / 2


PENALTY = {
    "its value": (
        lambda out, lam: misfit(out[0]) + out[1],
        lambda w, lam: (X @ w, lam / 2 * (w @ w)),
    ),
    "its value, weighted outside": (
        lambda out, lam: misfit(out[0]) + lam * out[1],
        lambda w, lam: (X @ w, w @ w / 2),
    ),
    "its terms": (
        lambda out, lam: misfit(out["y"]) + lam * out["decay"].sum(),
        lambda w, lam: {"y": X @ w, "decay": w**2 / 2},
    ),
}


@pytest.mark.parametrize("case", PENALTY)
def test_a_penalty_among_the_outputs_is_told(case):
    said, ratio = gauss_newton(*PENALTY[case])
    assert abs(ratio - 1) > 0.05  # it is wrong
    assert len(said) == 1 and "enters the loss linearly" in said[0]


def test_a_penalty_among_the_outputs_follows_on_failure():
    said, _ = gauss_newton(*PENALTY["its value"], on_failure="ignore")
    assert said == []
    monitor = ig.Monitor()
    with pytest.raises(ig.LinearSolveError, match="enters the loss linearly"):
        gauss_newton(*PENALTY["its value"], on_failure="raise", monitor=monitor)
    assert monitor.last.status.ok


@pytest.mark.parametrize("a", [1.0, -1.0])
def test_a_penalty_is_told_where_gauss_newton_products_take_over(a):
    """a x² - t x, a share of which is the model's second output: bent down where a is negative."""
    instead = ig.CG(on_negative_curvature="gauss_newton")
    condition = ig.argmin(
        lambda out, t: out[0].square().sum() / 2 - t * out[0].sum() + out[1],
        model=lambda x, t: (x, (a - 0.5) * x.square().sum()),
    )
    t = torch.tensor(1.0, requires_grad=True)
    solve = ig.implicit(lambda t: t.detach()[None] / (2 * a), condition, linear_solver=instead)
    said = told(lambda: solve(t).sum().backward())
    assert any("enters the loss linearly" in s for s in said) == (a < 0)


def test_phi_itself_among_the_outputs_is_right():
    said, ratio = gauss_newton(
        lambda out, lam: misfit(out[0]) + lam / 2 * (out[1] @ out[1]), lambda w, lam: (X @ w, w)
    )
    assert said == [] and ratio == pytest.approx(1)


def test_an_output_that_is_linear_in_phi_loses_nothing():
    """Σw enters linearly, but has no curvature."""
    said, _ = gauss_newton(
        lambda out, lam: misfit(out[0]) + lam / 2 * (out[1] @ out[1]) + 0 * out[2],
        lambda w, lam: (X @ w, w, w.sum()),
    )
    assert said == []


def test_an_output_that_the_loss_does_not_look_at_is_nothing_lost():
    said, ratio = gauss_newton(
        lambda out, lam: misfit(out[0]) + lam / 2 * (out[1] @ out[1]),
        lambda w, lam: (X @ w, w, w**3),
    )
    assert said == [] and ratio == pytest.approx(1)


def test_what_a_read_argument_was_made_of_is_not_told():
    def fit(log, weight, lr):
        return weight.detach().clone()

    def objective(w, log, weight, lr):
        return (w - weight) ** 2

    def call(log, lr):
        ig.implicit(fit, ig.argmin(objective))(log, log.exp(), lr).backward()

    log, lr = value(0.3), value(0.1)
    (said,) = told(lambda: call(log, lr))
    assert "args[2]" in said and "args[0]" not in said
    torch.testing.assert_close(log.grad, log.detach().exp())
    (said,) = told(lambda: call(log.sin(), lr))
    assert "args[0]" not in said
