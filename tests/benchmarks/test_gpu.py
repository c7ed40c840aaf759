"""The script for a GPU, in miniature on the CPU: needs torch alone, and sees what is wrong."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import implicit_grad as ig

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")

ROOT = Path(__file__).parents[2]

# A bare machine has neither; importing one of these fails.
BARE = """
import runpy, sys
for name in ("learn2learn", "rich", "matplotlib", "scipy", "pytest", "hypothesis"):
    sys.modules[name] = None
sys.argv = ["gpu.py", *sys.argv[1:]]
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"gpu_{name}_cpu.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_miniature_on_a_bare_machine(tmp_path: Path) -> None:
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "wrong gradients: 0" in done.stdout
    found = {row["right"].split(":")[0] for row in table(tmp_path, "gradients")}
    assert found == {"yes", "skipped"}
    waits = {r["linear solver"]: float(r["waits, an iteration"]) for r in table(tmp_path, "waits")}
    assert waits["CG, fixed budget (goal 1)"] == 1
    peaks = {row["steps"]: row for row in table(tmp_path, "memory")}
    assert float(peaks["4"]["iMAML, MiB"]) <= 1.01 * float(peaks["1"]["iMAML, MiB"])
    assert float(peaks["4"]["MAML by hand, MiB"]) > 1.5 * float(peaks["1"]["MAML by hand, MiB"])
    assert all(float(r["difference from the loop"]) < 1e-3 for r in table(tmp_path, "batches"))
    for name in ("graph", "compile"):
        rows = table(tmp_path, name)
        assert len(rows) == 2 and all(row["device"] and row["torch"] for row in rows)
        assert float(rows[0]["ms"]) > 0


def test_a_wrong_gradient_is_seen() -> None:
    import gpu_gradients

    problem = gpu_gradients.Problem("attention")
    few = gpu_gradients.Mode(torch.float64, 1e-7, solver=ig.CG(maxiter=1))
    assert problem.error(gpu_gradients.gradient(problem, "cpu", few)) > 1e-2


def test_what_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_gradients

    def fails() -> float:
        raise ValueError("no such\nkernel")

    given = [("a", "x", 1e-3, lambda: 1e-2), ("b", "y", 1e-3, fails), ("c", "z", 1e-3, lambda: 0.0)]
    monkeypatch.setattr(gpu_gradients, "cases", lambda device, quick: iter(given))
    found = [row["right"] for row in gpu_gradients.measured("cpu", quick=True)]
    assert found == ["NO", "NO: ValueError: no such kernel", "yes"]
