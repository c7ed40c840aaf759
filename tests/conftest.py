"""One seed for every test, and hypothesis's profiles (HYPOTHESIS_PROFILE=long looks further)."""

import gc
import importlib.util
import logging
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import implicit_grad as ig
from implicit_grad._torch.missing import lacks_derivative

hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=30, print_blob=True
)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2_000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# helpers whose assertions tell what they saw, as those of tests do
pytest.register_assert_rewrite("faults", "learners")
# hypothesis in charge of torch's generator
pytest_plugins = ["implicit_grad.testing.plugin"]


def pytest_collection_finish() -> None:
    """What was imported lives to the end: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """The same random numbers for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


class _Errors(logging.Handler):
    """Those that were logged, but for what is ours to say and derivatives that torch has not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Exception) and not isinstance(error, (ig.ImplicitGradError, Warning)):
            if not lacks_derivative(error):
                self.found.append(error)


@pytest.fixture(autouse=True)
def checks_come_to_an_end() -> Iterator[None]:
    """What a check of products runs into is hidden from users; a fault of its own must not be."""
    log, errors = logging.getLogger("implicit_grad._curvature.check"), _Errors()
    log.addHandler(errors)
    log.setLevel(logging.DEBUG)
    yield
    log.removeHandler(errors)
    assert not errors.found


@pytest.fixture
def double_precision() -> Iterator[None]:
    """New tensors are float64, so that numbers can be compared to rounding error."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the benchmarks as they import each other; leave torch's threads as they were."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def few_rounds(benchmarks_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks measure times, which nobody compares here."""
    import timing

    monkeypatch.setattr(timing, "LEAST_ROUNDS", 2)


# what imports learn2learn, by itself or through a helper; the README's program does too
NEEDS_LEARN2LEARN = re.compile(
    r"^\s*(import|from) (learn2learn|characters|few_shot|paper_\w+)\b|README",
    re.MULTILINE,
)
if importlib.util.find_spec("learn2learn") is None:  # there is none for Python >= 3.13
    collect_ignore = [
        str(path)
        for path in Path(__file__).parent.rglob("*.py")
        if NEEDS_LEARN2LEARN.search(path.read_text(encoding="utf-8"))
    ]
