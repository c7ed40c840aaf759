"""What `print` shows of statuses, reports, monitors and certificates: a few lines that help."""

from __future__ import annotations

import pytest
import torch

import implicit_grad as ig


def solved(linear_solver, monitor=None, **options):
    """A backward pass, and the solver that it went through."""
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    solve = ig.implicit(
        lambda a: a / a.new_tensor([2.0, 3.0, 4.0]),
        ig.argmin(lambda w, a: ((w * w) @ w.new_tensor([2.0, 3.0, 4.0])) / 2 - a @ w),
        linear_solver=linear_solver,
        monitor=monitor,
        on_failure="ignore",
        **options,
    )
    solve(a).sum().backward()
    return solve, a


@pytest.mark.parametrize("status", list(ig.Status), ids=lambda status: status.name)
def test_a_status_says_its_name_and_what_happened(status):
    text = str(status)
    assert text.startswith(f"{status.name}: ") and "\n" not in text and len(text) < 210
    happened = text.removeprefix(f"{status.name}: ").partition(" (see ")[0]
    assert status.sentence.startswith(happened) and len(happened) > 20
    assert (f"docs/why.md#{status.anchor}" in text) != status.ok
    assert f"{status}" == text and int(status) == status.value


def test_a_report_shows_what_is_known_by_the_names_of_its_attributes():
    monitor = ig.Monitor()
    solved(ig.CG(), monitor)
    report, (first, *rest) = monitor.last, str(monitor.last).splitlines()
    assert first == str(report.status)
    shown = dict(pair.split("=") for pair in " ".join(rest).replace(",", "").split())
    assert int(shown["iterations"]) == report.iterations
    assert float(shown["ritz_max"]) == pytest.approx(report.ritz_max, rel=0.05)
    assert shown["curvature"] == "hessian" and "substitute" not in shown
    assert max(map(len, rest)) <= 100


def test_a_report_shows_what_the_check_found():
    report = ig.Report(**dict.fromkeys(ig.Report.__dataclass_fields__) | {"status": ig.Status(1)})
    assert "check" not in str(report)
    found = ig.Report(**{**vars(report), "check": "products are wrong"})
    assert str(found).splitlines()[-1] == "  check: products are wrong"


def test_a_monitor_counts_and_shows_the_last():
    monitor = ig.Monitor()
    assert str(monitor) == "no backward solve yet" and "no backward solve" in repr(monitor)
    solved(ig.CG(maxiter=1, rtol=1e-12), monitor)
    assert str(monitor).startswith("1 backward solve: 1 MAX_ITER\n")
    for _ in range(2):
        solved(ig.CG(), monitor)
    lines = str(monitor).splitlines()
    assert lines[0] == "3 backward solves: 2 CONVERGED, 1 MAX_ITER"
    assert lines[1] == str(ig.Status.MAX_ITER)
    assert str(monitor).endswith(f"The last one: {monitor.last}")
    assert "\n" not in repr(monitor)


def test_a_certificate_says_how_far_off_the_gradient_is():
    solve, a = solved(ig.CG())
    certificate = ig.certify(solve, (a,), lambda w: w.square().sum())
    text = str(certificate)
    assert f"{100 * certificate.relative_error:.2g} % off" in text and "loss falls" in text
    assert len(text.splitlines()) == 2 and max(map(len, text.splitlines())) <= 120
    failed = type(certificate)(**{**vars(certificate), "status": ig.Status.MAX_ITER})
    assert str(failed) == f"Not certified, for a linear solve failed: {ig.Status.MAX_ITER}"
    far = type(certificate)(**{**vars(certificate), "relative_error": 2.0})
    assert "need not fall" in str(far)
