"""The most bytes alive at once: of a call that is known, and afterwards profilers see all again."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from implicit_grad.testing import peak_memory


def recorded():
    """The operations that a profiler records."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        torch.ones(3).exp()
    return {event.key for event in record.key_averages()}


def test_what_is_freed_on_the_way_counts_while_it_lives():
    kept = []

    def call():
        for _ in range(3):
            torch.ones(1000, dtype=torch.float64)
        kept.append(torch.ones(500, dtype=torch.float64))

    assert peak_memory(call) == 8000


def test_backward_passes_count():
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    y = x.exp()  # keeps its result
    assert 8000 < peak_memory(lambda: torch.autograd.grad(y.sum(), x)) < 4 * 8000


def fails():
    raise ValueError("no such file")


def test_profilers_see_every_operation_again():
    assert "aten::exp" in recorded()
    peak_memory(lambda: torch.ones(3))
    assert "aten::exp" in recorded()
    with pytest.raises(ValueError, match="no such file"):
        peak_memory(fails)
    assert "aten::exp" in recorded()
