"""The benchmarks that time things: in miniature, each writes its tables and its picture."""

import csv
from pathlib import Path

import pytest
import torch

for neighbour in ("learn2learn", "matplotlib", "rich", "scipy", "sklearn"):
    pytest.importorskip(neighbour)

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def test_ratios_are_taken_within_each_round() -> None:
    from timing import ratios, sums

    assert ratios([2.0, 20.0, 200.0], sums([1.0, 5.0, 50.0], [1.0, 5.0, 50.0]))[0] == 2.0


def test_interleaved_measures_some_rounds_whatever_the_budget() -> None:
    from timing import LEAST_ROUNDS, interleaved

    calls: list[str] = []
    methods = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(methods, 0.0, "test")
    assert {len(seconds) for seconds in times.values()} == {LEAST_ROUNDS}
    timed = calls[-3 * LEAST_ROUNDS :]
    assert all(set(timed[i : i + 3]) == set("abc") for i in range(0, len(timed), 3))
    assert [timed[0], timed[3]] == ["a", "b"]  # nobody is always first


def test_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rounds: None) -> None:
    import floor

    monkeypatch.setitem(floor.JOBS, "MLP, 1M weights", lambda: floor.perceptron(width=8))
    floor.main(["--out", str(tmp_path), "--seconds", "0", "--jobs", "MLP, 1M weights"])
    rows = {row["method"]: row for row in table(tmp_path / "floor.csv")}
    assert float(rows["imaml, adapt(closure)"]["difference"]) < 1e-4
    assert float(rows["implicit, own loop"]["difference"]) < 1e-4
    assert all(float(row["over_floor"]) > 0 for row in rows.values())
    assert table(tmp_path / "floor_iteration.csv")[0]["method"] == "implicit"
    assert (tmp_path / "floor.png").stat().st_size > 0


def test_the_cost_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import check_cost

    monkeypatch.setattr(check_cost.few_shot, "__defaults__", (2,))  # the network's width
    check_cost.main(["--out", str(tmp_path), "--rounds", "3"])
    rows = {(row["job"], row["check"]): row for row in table(tmp_path / "check_cost.csv")}
    assert set(rows) == {(job, way) for job in check_cost.JOBS for way in check_cost.CHECKS}
    times = ("first call, ms", "later call, ms")
    assert all(float(row[time]) > 0 for row in rows.values() for time in times)


def test_large_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rounds: None) -> None:
    import data_in_batches

    monkeypatch.setattr(data_in_batches, "BATCH", 20)
    sizes = ["--images", "40", "160", "--one-graph-to", "160"]
    data_in_batches.main(["--out", str(tmp_path), "--seconds", "0", *sizes])
    rows = table(tmp_path / "large_data.csv")
    peaks = {(row["method"], row["images"]): float(row["peak_MiB"]) for row in rows}
    assert peaks["batches", "160"] < 1.02 * peaks["batches", "40"]
    assert peaks["one graph", "160"] > 2 * peaks["one graph", "40"]
    assert all(float(row["over_raw"]) > 0 for row in table(tmp_path / "large_data_time.csv"))


def test_peers_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_rounds: None
) -> None:
    import peers

    nowhere = peers.Peer("nobody", "no_such_package", peers.betty)
    monkeypatch.setattr(peers, "PEERS", (peers.PEERS[-1], nowhere))
    peers.main(["--out", str(tmp_path), "--seconds", "0"])
    rows = {row["method"]: row for row in table(tmp_path / "peers.csv")}
    assert rows["nobody"]["computes"] == "not installed" and not rows["nobody"]["ms"]
    assert rows["hypertorch"]["computes"].startswith("not on PyPI")
    first_order = rows["learn2learn MAML, first order"]
    assert first_order["computes"] == "first order" and float(first_order["difference"]) > 1e-2
    assert float(rows["implicit, own loop"]["difference"]) < 1e-4
    assert (tmp_path / "peers.png").stat().st_size > 0


def test_time_to_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double_precision: None
) -> None:
    import time_to_accuracy

    def small() -> time_to_accuracy.Problem:
        A = torch.diag(torch.linspace(1, 5, 6))
        return time_to_accuracy.Problem(
            lambda phi: phi @ A @ phi / 2, lambda phi: phi.sum(), 0.5, torch.ones(6)
        )

    monkeypatch.setitem(time_to_accuracy.PROBLEMS, "ridge", small)
    names = ["NewtonCG + CG", "polish + CG, warm, Cholesky kept", "Nesterov, unrolled"]
    options = ["--seconds", "0", "--problems", "ridge", "--methods", *names]
    time_to_accuracy.main(["--out", str(tmp_path), *options])
    rows = table(tmp_path / "time_to_accuracy.csv")
    assert {row["method"] for row in rows} == set(names)
    assert all(float(row["error"]) <= float(row["tolerance"]) for row in rows)
    assert all(int(row["passes"]) > 1 for row in rows)
    others = [row for row in rows if "kept" not in row["method"]]
    assert others and all(float(row["its_share_of_setup"]) == 0 for row in others)
    unrolled = [row for row in rows if row["method"] == "Nesterov, unrolled"]
    assert all(int(row["passes"]) == 2 * int(row["inner"]) for row in unrolled)
    assert len(table(tmp_path / "time_to_accuracy_best.csv")) == 3
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 0


def test_quadratic_programs_have_the_loops_gradients(tmp_path: Path) -> None:
    import batched_qps

    arguments = ["--programs", "3", "--unknowns", "8", "--seconds", "0.01"]
    batched_qps.main(["--out", str(tmp_path), *arguments])
    rows = {row["method"]: row for row in table(tmp_path / "batched_qps.csv")}
    for name in ("implicit_grad", "implicit_grad, Exact", "a loop of implicit_grad"):
        assert float(rows[name]["gradients differ"]) < 1e-9


def test_batches_have_the_loops_gradients(tmp_path: Path) -> None:
    import batched

    batched.main(["--out", str(tmp_path), "--tasks", "2", "3", "--rounds", "1"])
    for job in ("OmniglotCNN", "OmniglotFC", "regressions"):
        rows = table(tmp_path / f"batched_{job}_cpu.csv")
        assert [row["tasks"] for row in rows] == ["2", "3"]
        assert all(float(row["difference"]) < 1e-4 for row in rows)
    assert (tmp_path / "batched_cpu.png").stat().st_size > 0
