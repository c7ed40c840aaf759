"""A pytest plug-in: a fixture of inner problems, and hypothesis in charge of torch's generator.

With `pytest_plugins = ["implicit_grad.testing.plugin"]` in conftest.py, a linear solver of yours is
tested on problems of every family and precision, without hypothesis, by

    def test_my_linear_solver(implicit_problem):
        solve = implicit_problem.implicit(linear_solver=Mine())
        check_implicit(solve, implicit_problem.args)

Where there is hypothesis, each of its examples begins with the same state of torch's generator, so
that a failure of a solver that draws random numbers is repeated, and shrinks.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from implicit_grad.testing.problems import FAMILIES, InnerProblem, SpectralMatrix

_PROBLEMS = {
    f"{family}-{str(dtype).removeprefix('torch.')}": InnerProblem(
        family, SpectralMatrix((1.0, 2.0, 5.0), seed=1, dtype=dtype), form="dict"
    )
    for family in FAMILIES
    for dtype in (torch.float64, torch.float32)
}


class _Generator:
    """Torch's default generator, by the names that hypothesis calls."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_GENERATOR = _Generator()  # hypothesis keeps a weak reference only


def pytest_configure() -> None:
    """Tell hypothesis, if it is there, of torch's generator."""
    with contextlib.suppress(ImportError):
        import hypothesis

        hypothesis.register_random(_GENERATOR)


@pytest.fixture(params=_PROBLEMS)
def implicit_problem(request: pytest.FixtureRequest) -> InnerProblem:
    """An inner problem with its exact solution and hypergradient, one of each kind."""
    return _PROBLEMS[request.param]
