"""The certificate of a batch is that of all its tasks together."""

import pytest
import torch

import implicit_grad as ig

A = torch.tensor([[1.0, 4.0], [2.0, 3.0], [5.0, 1.0]], dtype=torch.float64)


def objective(phi, a):
    """Quartic, so that a gradient at the wrong φ is wrong; for a batch, one value a task."""
    return (phi.shape[-1] * (phi - a) ** 2 / 2 + (phi - a) ** 4 + phi**2 / 2).sum(-1)


def solver(a):
    """Not quite solved: by another distance in each task."""
    away = torch.arange(1.0, 1 + a.numel(), dtype=a.dtype).reshape(a.shape) / 100
    return a.detach() * 0.7 + (away if a.dim() > 1 else away * 0)


def outer(phi):
    return (phi**2).sum() / 2


def certified(phi, a, **options):
    a = a.clone().requires_grad_()
    solve = ig.implicit(lambda a: phi.clone(), ig.argmin(objective, **options), on_failure="ignore")
    return ig.certify(solve, (a,), outer)


def test_errors_are_those_of_all_tasks():
    phi = solver(A)
    whole = certified(phi, A, tasks=True)
    alone = [certified(p, a) for p, a in zip(phi, A, strict=True)]
    for name in ("error", "inner_error"):
        parts = [getattr(c, name) for c in alone]
        assert min(parts) > 0
        want = sum(part**2 for part in parts) ** 0.5
        assert getattr(whole, name) == pytest.approx(want, rel=1e-8)
    assert whole.outer_loss_error == pytest.approx(sum(c.outer_loss_error for c in alone))
    torch.testing.assert_close(whole.corrected[0], torch.stack([c.corrected[0] for c in alone]))


@pytest.mark.parametrize("bad", range(3))
def test_the_worst_task_decides(bad):
    sign = torch.ones(3, dtype=torch.float64)
    sign[bad] = -1
    condition = ig.argmin(lambda phi, a: sign * ((phi - a) ** 2).sum(1), tasks=True)
    solve = ig.implicit(lambda a: a.detach().clone(), condition, on_failure="ignore")
    certificate = ig.certify(solve, (A.clone().requires_grad_(),), outer)
    assert certificate.status is ig.Status.NEGATIVE_CURVATURE and not certificate.descends
