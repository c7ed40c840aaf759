"""Gurobi's quadratic programs: against SLSQP and KKT conditions, and its refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from minimisers import (
    ARGUMENT,
    NEEDS_SCIPY,
    SOLUTION,
    constrained_projection,
    flat,
    shapes,
    single,
    tied,
)
from problems import normal

import implicit_grad as ig
from implicit_grad.solvers import GurobiQP, SciPyMinimize
from implicit_grad.solvers.gurobi_qp import _check_status


@NEEDS_SCIPY
def test_gurobi_matches_slsqp_on_random_programs():
    pytest.importorskip("gurobipy")
    for seed in range(5):
        B, c = normal(6, 6, seed=seed, grad=False), normal(6, seed=seed + 50, grad=False)
        G, h = normal(4, 6, seed=seed + 100, grad=False), normal(4, seed=seed + 150, grad=False)
        row = normal(6, seed=seed + 200, grad=False)

        def objective(p, B=B, c=c):
            x = torch.cat([p[0], p[1].flatten()])
            return (B @ x).square().sum() / 2 + 0.1 * x.square().sum() + c @ x + 3

        def equality(p, row=row):
            return row @ torch.cat([p[0], p[1].flatten()]) - 0.2

        def inequality(p, G=G, h=h):
            return G @ torch.cat([p[0], p[1].flatten()]) - h.abs()

        given = {"equality": equality, "inequality": inequality, "bounds": (-0.5, 0.5)}
        init = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
        phi = GurobiQP().minimize(objective, init, **given)
        # at such a tolerance SLSQP may say that its line search failed, and be right all the same
        slsqp = SciPyMinimize(method="SLSQP", tol=1e-15).minimize(objective, init, **given)
        assert [t.shape for t in phi] == [t.shape for t in init]
        assert (flat(phi) - flat(slsqp)).abs().max() < 1e-6
        close = [flat(equality(phi)), flat(inequality(phi)), flat(phi) - 0.5, -0.5 - flat(phi)]
        active = [r[r.abs() < 1e-4] for r in close]
        assert sum(map(len, active)) >= 2
        assert torch.cat(active).abs().max() < 1e-12  # active constraints can be told from others


def test_gurobi_fulfils_kkt():
    pytest.importorskip("gurobipy")
    objective, given, minimum = constrained_projection()
    with torch.no_grad():
        phi = GurobiQP().minimize(objective, torch.zeros_like(minimum), **given)
    assert (phi - minimum).abs().max() < 1e-12


def test_gurobi_in_float32_and_without_constraints():
    pytest.importorskip("gurobipy")
    for problem in (single(), shapes(), tied()):
        phi = GurobiQP().minimize(problem.objective, problem.init)
        accuracy = 1e-6 if problem.L == 1 else 1e-12
        assert (flat(phi) - flat(problem.minimum)).abs().max() < accuracy


GUROBI_ERRORS = {
    "cubic": (lambda p: (p**3).sum() + 9 * (p * p).sum(), {}, ARGUMENT, "objective must be quad"),
    "kink": (lambda p: p[0].abs() + p[1], {}, ARGUMENT, "objective must be quadratic"),
    "another kink": (lambda p: p[0] + p[1].abs(), {}, ARGUMENT, "objective must be quadratic"),
    "concave": (lambda p: -(p * p).sum(), {}, ARGUMENT, r"not convex.*eigenvalues from -2 to -2"),
    "saddle": (lambda p: p[0] * p[1], {}, ARGUMENT, "not convex.*from -1 to 1"),
    "curved row": (torch.sum, {"equality": lambda p: p.square()}, ARGUMENT, "equality must be aff"),
    "curved inequality": (
        torch.sum,
        {"inequality": lambda p: p.square()},
        ARGUMENT,
        "inequality must be affine",
    ),
    "infeasible": (
        lambda p: p.square().sum(),
        {"inequality": lambda p: [p + 1, 1 - p]},
        SOLUTION,
        "GurobiQP: the problem is infeasible",
    ),
    "unbounded": (torch.sum, {"bounds": (None, 0)}, SOLUTION, "GurobiQP: the problem is unbounded"),
    "infeasible and falling": (
        torch.sum,
        {"inequality": lambda p: [p + 1, 1 - p]},
        SOLUTION,
        "the problem is infeasible: no phi",
    ),
    "unbounded along an equality": (
        torch.sum,
        {"equality": lambda p: p[0] - p[1]},
        SOLUTION,
        "the problem is unbounded: the objective falls",
    ),
    "not a number": (lambda p: torch.log(p - 9).sum(), {}, SOLUTION, "GurobiQP: at step 0.*nan"),
}


@pytest.mark.parametrize("case", GUROBI_ERRORS)
def test_gurobis_errors(case):
    pytest.importorskip("gurobipy")
    objective, given, error, sentence = GUROBI_ERRORS[case]
    with pytest.raises(error, match=sentence):
        GurobiQP().minimize(objective, torch.tensor([0.4, 0.7]).double(), **given)


def test_gurobis_doubts_are_a_warning():
    names = pytest.importorskip("gurobipy").GRB
    for status, solutions in ((names.SUBOPTIMAL, 1), (names.ITERATION_LIMIT, 1)):
        with pytest.warns(ig.ImplicitGradWarning, match=f"not sure.* ended with status {status}"):
            _check_status(SimpleNamespace(Status=status, SolCount=solutions), names)
    _check_status(SimpleNamespace(Status=names.OPTIMAL, SolCount=1), names)  # says nothing


def test_gurobis_params_reach_gurobi():
    pytest.importorskip("gurobipy")
    problem = shapes()
    with pytest.raises(SOLUTION, match="without a solution, with status"):
        GurobiQP(params={"IterationLimit": 0, "BarIterLimit": 0, "Presolve": 0}).minimize(
            problem.objective, problem.init, bounds=(0.5, 1.0), equality=lambda p: p["w"].sum() - 4
        )
