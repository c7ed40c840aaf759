"""Options, calls and missing packages: what minimisers and root finders refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from minimisers import ARGUMENT, OPTIMIZERS, START

import implicit_grad as ig
from implicit_grad.solvers import (
    GradientDescent,
    GurobiQP,
    MissingPackageError,
    Nesterov,
    NewtonCG,
    SciPyMinimize,
    SciPyRoot,
    TorchOpt,
    TorchOptim,
)
from implicit_grad.solvers._neighbours import needed_by


def with_option(solver: Any, **options: Any) -> Callable[[], Any]:
    return lambda: solver(**options)


SGD = OPTIMIZERS["SGD"]


NAN = float("nan")


BAD_OPTIONS = {
    r"GradientDescent\(lr=0\): expected a number > 0": with_option(GradientDescent, lr=0, steps=1),
    r"GradientDescent\(lr='1'\)": with_option(GradientDescent, lr="1", steps=1),
    r"GradientDescent\(lr=inf\)": with_option(GradientDescent, lr=math.inf, steps=1),
    r"GradientDescent: give steps, tol or both": with_option(GradientDescent, lr=1),
    r"GradientDescent\(steps=-1\): expected an integer of": with_option(
        GradientDescent, lr=1, steps=-1
    ),
    r"GradientDescent\(steps=2.0\)": with_option(GradientDescent, lr=1, steps=2.0),
    r"GradientDescent\(steps=True\)": with_option(GradientDescent, lr=1, steps=True),
    r"GradientDescent\(tol=-1\): expected None or a number of at": with_option(
        GradientDescent, lr=1, tol=-1
    ),
    r"GradientDescent\(tol=nan\)": with_option(GradientDescent, lr=1, tol=NAN),
    r"GradientDescent\(rtol=1\): expected None or a number between": with_option(
        GradientDescent, lr=1, rtol=1
    ),
    r"GradientDescent\(rtol=0\)": with_option(GradientDescent, lr=1, rtol=0),
    r"Nesterov\(lr=-1\)": with_option(Nesterov, lr=-1, steps=1),
    r"Nesterov\(kappa=0.5\): expected None or a number of at least 1": with_option(
        Nesterov, lr=1, steps=1, kappa=0.5
    ),
    r"Nesterov\(kappa=inf\)": with_option(Nesterov, lr=1, steps=1, kappa=math.inf),
    r"Nesterov\(momentum=1\): expected None or a number from 0 to": with_option(
        Nesterov, lr=1, steps=1, momentum=1
    ),
    r"Nesterov\(momentum=-0.1\)": with_option(Nesterov, lr=1, steps=1, momentum=-0.1),
    r"Nesterov: give kappa or momentum, not both": with_option(
        Nesterov, lr=1, steps=1, kappa=2, momentum=0.5
    ),
    r"NewtonCG\(maxiter=-1\): expected an integer of at least 0": with_option(NewtonCG, maxiter=-1),
    r"NewtonCG\(cg=0\): expected an integer of at least 1": with_option(NewtonCG, cg=0),
    r"NewtonCG\(rtol=2\)": with_option(NewtonCG, rtol=2),
    r"TorchOptim: factory must be a function.*got a str": with_option(
        TorchOptim, factory="sgd", steps=1
    ),
    r"TorchOptim: scheduler must be None or a function": with_option(
        TorchOptim, factory=SGD, steps=1, scheduler=3
    ),
    r"TorchOptim: give steps": with_option(TorchOptim, factory=SGD),
    r"TorchOpt: transform must be.*got a function": with_option(TorchOpt, transform=SGD, steps=1),
    r"SciPyMinimize\(method='adam'\): expected one of Nelder-Mead, ": with_option(
        SciPyMinimize, method="adam"
    ),
    r"SciPyMinimize\(tol=-1\)": with_option(SciPyMinimize, tol=-1),
    r"SciPyMinimize\(options=3\): expected None or a dict": with_option(SciPyMinimize, options=3),
    r"SciPyRoot\(method='newton'\): expected one of hybr, lm": with_option(
        SciPyRoot, method="newton"
    ),
    r"SciPyRoot\(tol='a'\)": with_option(SciPyRoot, tol="a"),
    r"GurobiQP\(params='fast'\): expected None or a dict": with_option(GurobiQP, params="fast"),
}


@pytest.mark.parametrize("sentence", BAD_OPTIONS)
def test_options_that_cannot_work(sentence):
    with pytest.raises(ARGUMENT, match=f"^{sentence}"):
        BAD_OPTIONS[sentence]()


@pytest.mark.parametrize("good", [0, 1e-300, 5, np.float32(0.5)])
def test_numbers_of_other_kinds_are_fine(good):
    assert GradientDescent(lr=1, tol=good).tol == good
    assert Nesterov(lr=1, tol=1, kappa=good + 1).kappa == good + 1
    assert Nesterov(lr=1, tol=1, momentum=0).momentum == 0
    assert NewtonCG(maxiter=0, cg=1).minimize(torch.sum, torch.ones(2)).tolist() == [1, 1]


def scipy_with(**given: Any) -> Callable[[], Any]:
    return lambda: SciPyMinimize().minimize(torch.sum, START, **given)


BAD_CALLS = {
    r"GradientDescent: init must hold floating-point tensors.*an int64 tensor": lambda: (
        GradientDescent(lr=1, steps=1).minimize(torch.sum, [START, torch.tensor([1])])
    ),
    r"NewtonCG: objective must return a scalar floating-point tensor, got a float64 ten": lambda: (
        NewtonCG().minimize(lambda p: p, START)
    ),
    r"SciPyMinimize: objective must return a scalar.*got a float$": lambda: (
        SciPyMinimize().minimize(lambda p: p.sum().item(), START)
    ),
    r"TorchOptim: factory must return a torch.optim.Optimizer, got a list": lambda: TorchOptim(
        factory=lambda params: params, steps=1
    ).minimize(torch.sum, START),
    r"SciPyMinimize: bounds must be a pair \(lower, upper\), got a float": scipy_with(bounds=1.0),
    r"SciPyMinimize: bounds must not be NaN, and no lower.*1 of 2 el": scipy_with(
        bounds=(torch.tensor([0, 3]), 2)
    ),
    r"SciPyMinimize: bounds must not be NaN.*2 of 2 elem": scipy_with(bounds=(NAN, None)),
    r"SciPyMinimize: the lower bound must be None, a number, a tensor": scipy_with(
        bounds=({"a": 1}, None)
    ),
    r"SciPyMinimize: the upper bound must be": scipy_with(bounds=(None, torch.zeros(3))),
    r"SciPyMinimize: the upper bound must.*str": scipy_with(bounds=(None, "x")),
    r"SciPyMinimize\(method='L-BFGS-B'\) cannot handle equality and.*SLSQP, trust-con": scipy_with(
        equality=lambda p: p
    ),
    r"SciPyMinimize\(method='BFGS'\) cannot handle bounds; these can: COBYLA": lambda: (
        SciPyMinimize(method="bfgs").minimize(torch.sum, START, bounds=(0, 1))
    ),
    r"SciPyMinimize: inequality must return floating-point tensors, got a float": lambda: (
        SciPyMinimize(method="SLSQP").minimize(torch.sum, START, inequality=lambda p: 1.0)
    ),
    r"SciPyRoot: residual returned 1 numbers for the 2 of phi": lambda: SciPyRoot().find_root(
        lambda p: p[:1], START
    ),
    r"SciPyRoot: residual must return floating-point tensors": lambda: SciPyRoot().find_root(
        lambda p: None, START
    ),
}


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_calls_that_cannot_work(sentence):
    if sentence.startswith("SciPy"):
        pytest.importorskip("scipy")
    with pytest.raises(ARGUMENT, match=f"^{sentence}"):
        BAD_CALLS[sentence]()


def test_a_package_that_no_extra_brings_is_missed_as_usual():
    with pytest.raises(ModuleNotFoundError, match="nowhere") as caught, needed_by(GurobiQP()):
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    assert not isinstance(caught.value, ig.ImplicitGradError)


@pytest.mark.parametrize("package", ["scipy", "gurobipy"])
def test_a_missing_package_is_named_by_its_extra(package, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    calls = {
        "scipy": [
            lambda: SciPyMinimize().minimize(lambda p: p.square().sum(), START),
            lambda: SciPyRoot().find_root(lambda p: p, START),
        ],
        "gurobipy": [lambda: GurobiQP().minimize(lambda p: p.square().sum(), START)],
    }
    extra = {"scipy": "scipy", "gurobipy": "gurobi"}[package]
    for call in calls[package]:
        with pytest.raises(
            MissingPackageError, match=rf"pip install 'implicit-grad\[{extra}\]'"
        ) as e:
            call()
        assert isinstance(e.value, ModuleNotFoundError) and isinstance(
            e.value, ig.ImplicitGradError
        )
        assert e.value.name == package
