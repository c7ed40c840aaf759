"""A learned λ stays in its range: whatever the optimiser does, with right gradients, and told."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import normal
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("double_precision")
DATA = normal(6, 3, seed=1, grad=False), normal(6, 2, seed=2, grad=False)
AT_END = "LearnedLam. lam has come to an end of its range"
OPTIMISERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
}


def values_of(lam):
    """All λ, flat, and the trace of U Uᵀ."""
    found = lam()
    diagonal, factor = (found.diagonal, found.factor) if lam.rank else (found, ())
    trace = sum(float(u.detach().square().sum()) for u in factor)
    return torch.cat([t.detach().flatten() for t in diagonal]), trace


@pytest.mark.filterwarnings(f"ignore:{AT_END}")
@given(
    gradients=st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6),
    lr=st.floats(1e-3, 1e3),
    init=st.floats(1e-3, 1e3),
    within=st.floats(1.5, 1e6),
    per=st.sampled_from(["model", "tensor", "element"]),
    rank=st.integers(0, 2),
    optimiser=st.sampled_from(sorted(OPTIMISERS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_step_leaves_the_range(gradients, lr, init, within, per, rank, optimiser, dtype):
    model = nn.Linear(3, 2).to(dtype)
    lam = ig.LearnedLam(model, init, per=per, rank=rank, within=within)
    optimizer = OPTIMISERS[optimiser](lam.parameters(), lr)
    slack = 1 + 50 * torch.finfo(dtype).eps
    for g in gradients:
        for p in lam.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.step()
        found, trace = values_of(lam)
        assert (found >= init / within / slack).all() and (found <= init * within * slack).all()
        assert trace <= init * within * slack


@pytest.mark.filterwarnings(f"ignore:{AT_END}")
@pytest.mark.parametrize("gradient", [1e20, -1e20, math.inf, -math.inf])
def test_it_comes_back_from_an_end_as_it_would_from_anywhere(gradient):
    lam = ig.LearnedLam(torch.ones(2), 0.5, within=100)
    optimizer = torch.optim.SGD(lam.parameters(), lr=0.1)
    lam.log_lam[0].grad = torch.tensor(gradient)
    optimizer.step()
    end = lam().item()
    assert end == pytest.approx(0.005 if gradient > 0 else 50)
    lam.log_lam[0].grad = torch.tensor(math.copysign(1.0, -gradient))
    optimizer.step()
    assert lam().item() == pytest.approx(end * math.exp(math.copysign(0.1, gradient)))


@pytest.mark.filterwarnings(f"ignore:{AT_END}")
@pytest.mark.parametrize("rho", [0.0, 1.5, math.log(0.5 * 100), math.log(0.5 / 100)])
def test_its_gradient_is_that_of_the_exponential(rho):
    """By differences, from the inside where that is an end."""
    model, h = nn.Linear(3, 2), 1e-6
    lam = ig.LearnedLam(model, 0.5, per="model", within=100)
    maml = ig.imaml(model, lam, lr=0.1, linear_solver=ig.Exact(), solver=ig.solvers.NewtonCG())

    def loss_at(rho):
        nn.init.constant_(lam.log_lam[0], rho)
        learner = maml.clone()
        learner.adapt(lambda: mse_loss(learner(DATA[0]), DATA[1]))
        return mse_loss(learner(DATA[0]), 2 * DATA[1])

    (found,) = torch.autograd.grad(loss_at(rho), lam.log_lam)
    inward = -math.copysign(h, rho - math.log(0.5))
    ahead = [loss_at(rho + k * inward).item() for k in range(3)]
    expected = (4 * ahead[1] - 3 * ahead[0] - ahead[2]) / (2 * inward)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    (of_lam,) = torch.autograd.grad(lam()[0], lam.log_lam)
    assert of_lam.item() == pytest.approx(lam()[0].item())


def test_where_nothing_is_out_of_range_no_graph_is_disturbed():
    """A penalty on log λ, which is kept for backward, before λ is computed."""
    lam = ig.LearnedLam(nn.Linear(3, 2), 0.5, rank=1)
    penalty = sum(p.square().sum() for p in lam.parameters())
    expected = [2 * p.detach() for p in lam.parameters()]
    lam()
    found = torch.autograd.grad(penalty, list(lam.parameters()))
    torch.testing.assert_close(found, tuple(expected), rtol=0, atol=0)


def test_what_was_computed_is_cut_off_and_not_written_to():
    """Learned by a differentiable optimiser, or under a transform."""
    lam = ig.LearnedLam(torch.ones(2), 1.0, within=10)
    rho = torch.tensor(3.0, requires_grad=True)
    stepped = rho * 2
    with pytest.warns(ig.ImplicitGradWarning, match="that of theta: 10"):
        value = functional_call(lam, {"log_lam.0": stepped}, ())
    assert value.item() == pytest.approx(10) and stepped.item() == 6
    assert torch.autograd.grad(value, rho)[0] == 0
    slope = torch.func.grad(lambda r: functional_call(lam, {"log_lam.0": r}, ()))
    assert slope(torch.tensor(1.0)).item() == pytest.approx(math.e)
    assert slope(torch.tensor(3.0)) == 0


def test_states_of_before_load():
    lam = ig.LearnedLam(nn.Linear(3, 2), 0.5)
    lam.load_state_dict({"log_lam.0": torch.tensor(1.25), "log_lam.1": torch.tensor(-2.0)})
    assert [t.item() for t in lam()] == pytest.approx([math.exp(1.25), math.exp(-2)])
    lam.load_state_dict({"log_lam.0": torch.tensor(1.25), "log_lam.1": torch.tensor(13.5)})
    with pytest.warns(ig.ImplicitGradWarning, match=r"0\.0005 to 500 .*bias: 500"):
        assert lam()[1].item() == pytest.approx(500)


# ---------------------------------------------------------------- what is said


def pushed(lam, index, rho):
    with torch.no_grad():
        lam.log_lam[index].fill_(rho)


def test_each_end_is_told_once_at_clone_in_numbers():
    model = nn.Linear(3, 2)
    lam = ig.LearnedLam(model, 0.5, within=100)
    maml = ig.imaml(model, lam, lr=0.1)
    pushed(lam, 1, 30.0)
    with pytest.warns(ig.ImplicitGradWarning, match=r"0\.005 to 50 .*that of bias: 50\.") as caught:
        learner = maml.clone()
    assert len(caught) == 1
    learner.adapt(mse_loss(learner(DATA[0]), DATA[1]))  # the same λ is not news
    pushed(lam, 1, 31.0)
    maml.clone()
    pushed(lam, 0, -30.0)
    with pytest.warns(ig.ImplicitGradWarning, match=r"that of weight: 0\.005\."):
        maml.clone()


@pytest.mark.parametrize(
    ("theta", "options", "expected"),
    [
        ({"a": [torch.ones(2)]}, {}, r"theta\['a'\]\[0\]: 1e\+03"),
        (torch.ones(2), {"per": "element"}, "theta: 1e"),
        (nn.Linear(3, 2), {"per": "model"}, "all: 1e"),
        (
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(3))),
            {},
            r"0\.weight: 1e\+03, .*1\.bias: 1e\+03 and 2 more",
        ),
    ],
)
def test_names(theta, options, expected):
    lam = ig.LearnedLam(theta, **options)
    for rho in lam.log_lam:
        nn.init.constant_(rho, 50.0)
    with pytest.warns(ig.ImplicitGradWarning, match=expected):
        lam()


def test_one_element_at_an_end_is_enough():
    lam = ig.LearnedLam(torch.ones(4), 1.0, per="element")
    with torch.no_grad():
        lam.log_lam[0][2] = -20.0
    with pytest.warns(ig.ImplicitGradWarning, match=r"theta: 0\.001"):
        lam()


def test_so_is_a_matrix_that_was_shortened():
    lam = ig.LearnedLam([torch.ones(4)], 1.0, rank=2)
    nn.init.zeros_(lam.factor[0])
    values_of(lam)
    nn.init.constant_(lam.factor[0], -1e3)
    with pytest.warns(ig.ImplicitGradWarning, match=r"that of the trace of U Uᵀ: 1e\+03"):
        assert values_of(lam)[1] == pytest.approx(1e3)


@pytest.mark.parametrize("rho", [6.8, -6.8, 0.0])
def test_nothing_is_said_inside(rho):
    lam = ig.LearnedLam(nn.Linear(3, 2), within=1e3)
    pushed(lam, 0, rho)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lam()


def test_what_is_unchanged_is_not_looked_at(monkeypatch):
    lam = ig.LearnedLam(nn.Linear(3, 2))
    lam()
    looks = []
    monkeypatch.setattr(torch, "aminmax", lambda t: looks.append(t))
    lam(), lam()
    assert not looks
