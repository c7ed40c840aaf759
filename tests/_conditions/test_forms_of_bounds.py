"""Bounds in all forms: the same for minimisers and for conditions, wrong ones named at once."""

import math

import pytest
import torch

import implicit_grad as ig
from implicit_grad._conditions.bounds import spread

pytestmark = pytest.mark.usefixtures("double_precision")
NAN = math.nan


def phi():
    return {"u": torch.tensor([-1.0, 0.5, 2.0]), "v": [torch.tensor([[0.3], [-0.7]])], "w": None}


FORMS = {
    "None": (None, {}, {}),
    "numbers": ((0, 1.5), {"u": 0.0, "v": 0.0}, {"u": 1.5, "v": 1.5}),
    "a list": ([0.0, None], {"u": 0.0, "v": 0.0}, {}),
    "a None leaf": (({"u": 0.0, "v": None, "w": None}, None), {"u": 0.0}, {}),
    "None leaves in a list": ((None, {"u": None, "v": [0.1], "w": None}), {}, {"v": 0.1}),
    "a prefix": (({"u": -0.5, "v": 0.2, "w": None}, 1), {"u": -0.5, "v": 0.2}, {"u": 1, "v": 1}),
    "tensors": (
        ({"u": torch.tensor([0.0, 0.625, -9.0]), "v": torch.tensor(0.0), "w": None}, None),
        {"u": [0.0, 0.625, -9.0], "v": 0.0},
        {},
    ),
    "infinite": ((-math.inf, {"u": 1.0, "v": math.inf, "w": None}), {}, {"u": 1.0}),
}


@pytest.mark.parametrize("form", FORMS)
def test_conditions_and_minimisers_read_the_same(form):
    pytest.importorskip("scipy")
    bounds, lower, upper = FORMS[form]
    target = phi()

    def distance(z, shift):
        pairs = (z["u"], target["u"]), (z["v"][0], target["v"][0])
        return sum((t - s - shift).square().sum() for t, s in pairs)

    def clamped(name, t):
        low, up = (torch.as_tensor(b.get(name, x)) for b, x in ((lower, -9.0), (upper, 9.0)))
        return torch.minimum(torch.maximum(t, low), up)

    expected = {"u": clamped("u", target["u"]), "v": clamped("v", target["v"][0])}
    free = sum(
        int((expected[k] == t).sum()) for k, t in (("u", target["u"]), ("v", target["v"][0]))
    )
    minimiser = ig.solvers.SciPyMinimize(tol=1e-12, bounds=bounds)
    for solver, given in (
        (minimiser, {}),  # the condition takes them from the minimiser
        (ig.solvers.SciPyMinimize(tol=1e-12), {"bounds": bounds}),
        (ig.solvers.SciPyMinimize(tol=1e-12), {"bounds": lambda shift: bounds or (None, None)}),
    ):
        shift = torch.tensor(0.0, requires_grad=True)
        solve = ig.implicit(solver, ig.argmin(distance, **given), init=lambda _: phi())
        z = solve(shift)
        for found, name in ((z["u"], "u"), (z["v"][0], "v")):
            torch.testing.assert_close(found.detach(), expected[name], rtol=0, atol=1e-8)
        (grad,) = torch.autograd.grad(z["u"].sum() + z["v"][0].sum(), shift)
        assert abs(grad.item() - free) < 1e-9


def test_a_tensor_that_occurs_twice_has_its_first_bound():
    t = torch.ones(2)
    lower, upper = spread("argmin", ([0.0, 1.0, 2.0], None), [t, t, torch.ones(1)])
    assert [b.tolist() for b in lower] == [[0.0, 0.0], [2.0]] and upper == [None, None]


WRONG = {
    "no pair of numbers": (3.0, "bounds must be a pair .*, got a float"),
    "three": ([0, 1, 2], "bounds must be a pair .*, got a list"),
    "lower above upper": ((1.0, 0.0), "no lower bound greater.*1 of 1 elem.*from 1 to 0"),
    "in one element": (
        (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.5])),
        "no lower bound greater than the upper, as for 1 of 2 elements.*from 2 to 1.5",
    ),
    "against a number": ((torch.tensor([0.0, 2.0]), 1), "1 of 2 elements.*from 2 to 1"),
    "in a container": (({"a": 0.0, "b": 3}, {"a": None, "b": 2}), "no lower.*from 3 to 2"),
    "a number for a container": ((3, {"a": None, "b": 2}), "no lower.*from 3 to 2"),
    "NaN": ((None, NAN), "bounds must not be NaN.*for instance nan"),
    "NaN beside a bound": ((torch.tensor([0.0, NAN]), 1.0), "must not be NaN.*from nan to 1"),
}


@pytest.mark.parametrize("given", ["at once", "by a function", "by the minimiser"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_bounds_are_named_before_any_work(case, given):
    bounds, message = WRONG[case]
    ran = []

    def solver(a):
        ran.append(1)
        return a.clone()

    def attempt():
        a = torch.ones(2, requires_grad=True)
        if given == "by the minimiser":
            minimiser = ig.solvers.SciPyMinimize(bounds=bounds)
            return ig.implicit(minimiser, ig.argmin(lambda z, a: ran.append(1)))(a)
        where = bounds if given == "at once" else (lambda a: bounds)
        condition = ig.argmin(lambda z, a: (z - a).square().sum(), bounds=where)
        return ig.implicit(solver, condition)(a)

    with pytest.raises(ig.InvalidArgumentError, match=f"argmin: .*{message}"):
        attempt()
    assert not ran


MISFITS = {
    "a shape": ((torch.zeros(3), None), "the lower bound must be None, a number.*size"),
    "a container": ((None, {"x": 0.0}), "the upper bound must be None, a number.*dict"),
    "a string": (("x", None), "the lower bound must be"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_bounds_in_another_form_than_phi(case):
    bounds, message = MISFITS[case]
    a = torch.ones(2, requires_grad=True)
    solve = ig.implicit(torch.clone, ig.argmin(lambda z, a: (z - a).sum() ** 2, bounds=bounds))
    with pytest.raises(ig.InvalidArgumentError, match=f"argmin: .*{message}"):
        solve(a)


def test_a_function_in_the_pair_is_told_where_it_belongs():
    with pytest.raises(ig.InvalidArgumentError, match=r"bounds=lambda \*args: \(lower, upper\)"):
        ig.argmin(lambda z, a: (z - a).sum() ** 2, bounds=(0.0, lambda a: a))


def test_a_module_bounds_a_module_although_it_can_be_called():
    low = torch.nn.Linear(2, 1)
    with torch.no_grad():
        low.weight.copy_(torch.tensor([[0.0, 2.0]]))
        low.bias.fill_(-1.0)

    def fit(a):
        module = torch.nn.Linear(2, 1)
        with torch.no_grad():
            module.weight.copy_(torch.maximum(a, low.weight))
            module.bias.zero_()
        return module

    def objective(module, a):
        return (module.weight - a).square().sum() + module.bias.square().sum()

    a = torch.ones(2, requires_grad=True)
    phi = ig.implicit(fit, ig.argmin(objective, bounds=(low, None)))(a)
    (grad,) = torch.autograd.grad(phi.weight.sum(), a)
    assert grad.tolist() == [1.0, 0.0]


def test_a_function_of_the_arguments_that_returns_no_pair():
    a = torch.ones(2, requires_grad=True)
    condition = ig.argmin(lambda z, a: (z - a).sum() ** 2, bounds=lambda a: a)
    with pytest.raises(ig.InvalidArgumentError, match=r"must be a pair.*got a float64 tensor"):
        ig.implicit(torch.clone, condition)(a)
