"""The suite where its results could differ: other arithmetic, other versions. Prints three tables.

    make matrix                              # all rows, many hours; goes on after a failure
    python tests/matrix.py bounds            # the error bounds with the same torch, other roundings
    python tests/matrix.py suite             # the whole suite with these
    python tests/matrix.py environments      # the whole suite, in an environment for each row
    python tests/matrix.py environments 3.13 # the rows in whose text this pattern is found

A row's output is in build/matrix/*.log; its environment is removed before the next is made.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "matrix"

# ---------------------------------------------------------------- other arithmetic

BOUNDS = tuple(f"_linear_solvers/test_{name}.py" for name in ("error_bounds", "cg", "spectra"))
CAPABILITIES = ("default", "avx2", "avx512")
MKL = (
    *({"MKL_ENABLE_INSTRUCTIONS": name} for name in ("SSE4_2", "AVX2", "AVX512")),
    *({"MKL_CBWR": name} for name in ("COMPATIBLE", "AVX2")),  # the others are for Intel's only
)
# Products, sums and factorisations whose last bits tell one arithmetic from another.
PROBE = """
import hashlib, torch
bits = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    for n in (3, 10, 40, 80, 200):
        a = torch.linspace(-1, 1, n * n, dtype=dtype).sin().reshape(n, n) + torch.eye(n)
        for x in (a @ a, a @ a[0], a[0] @ a[1], a.sum(), a.softmax(1), *torch.linalg.qr(a)):
            bits.update(x.numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability().lower(), bits.hexdigest()[:6])
"""


def arithmetics() -> Iterator[tuple[str, dict[str, str], str]]:
    """Name, variables and digest of every setting that this processor has."""
    for capability, mkl, threads in itertools.product(CAPABILITIES, MKL, ("1", "2")):
        variables = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads, **mkl}
        probe = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        has, digest = probe.stdout.split()
        if has == capability:
            setting = "=".join(*mkl.items())
            yield f"{capability} | {setting} | {threads}", variables, digest


def run_bounds(wanted: str) -> None:
    """The bounds' tests in every setting, on more problems."""
    os.environ["IMPLICIT_GRAD_LONG"] = "1"
    run_arithmetics("bounds", BOUNDS, wanted)


def run_suite(wanted: str) -> None:
    """The whole suite in every setting."""
    run_arithmetics("suite", ("",), wanted)


def run_arithmetics(what: str, tests: Sequence[str], wanted: str) -> None:
    """Some tests in every setting, once where all bits agree."""
    print("\n| ATen | MKL | threads | arithmetic | passed | failed | skipped | s |")
    print("|---|---|---|---|---|---|---|---|")
    files = [str(ROOT / "tests" / name) for name in tests]
    seen: dict[str, str] = {}
    for number, (name, variables, digest) in enumerate(arithmetics()):
        if not re.search(wanted, name):
            continue
        result = seen.get(digest)
        if result is None:
            result = run_pytest(sys.executable, f"{what}-{number}", files, variables)
            seen[digest] = "as above | | | "
        print(f"| {name} | {digest} | {result} |", flush=True)


# ---------------------------------------------------------------- other versions


class Missing(Exception):
    """Why a row could not run."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A Python and what is pinned in it; the rest is as new as pyproject.toml allows."""

    python: str
    torch: str
    numpy: str = ""
    learn2learn: bool = True  # wants numpy < 2, hence Python < 3.13

    def __str__(self) -> str:
        return f"{self.python} torch{self.torch} numpy{self.numpy}"

    @property
    def interpreter(self) -> str | None:
        """One that runs, from the PATH or pyenv."""
        pyenv = Path.home().glob(f".pyenv/versions/{self.python}.*/bin/python")
        for candidate in (f"python{self.python}", *map(str, pyenv)):
            path = shutil.which(candidate)
            if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
                return path
        return None

    @property
    def requirements(self) -> list[str]:
        """What pip is to install."""
        pins = BUILD / "constraints.txt"
        pins.write_text(f"torch{self.torch}\nnumpy{self.numpy}\n", encoding="utf-8")
        if self.learn2learn:
            return ["-r", ".ci/requirements.txt", "-c", str(pins)]
        return ["-e", ".[torchopt,scipy,gurobi,cvxpy,plot,test]", "-c", str(pins)]


ENVIRONMENTS = (
    Environment("3.10", torch="==2.4.*", numpy="==1.26.*"),
    # learn2learn's torchvision has no build for every torch on every machine
    Environment("3.11", torch="==2.13.*", learn2learn=False),
    Environment("3.12", torch="==2.14.*"),
    Environment("3.12", torch="==2.14.*", numpy=">=2", learn2learn=False),
    Environment("3.13", torch="==2.14.*", numpy=">=2", learn2learn=False),
    Environment("3.14", torch="==2.14.*", numpy=">=2", learn2learn=False),
)


def run_environments(wanted: str) -> None:
    """The whole suite in each environment."""
    print("\n| Python | torch | NumPy | learn2learn | passed | failed | skipped | s |")
    print("|---|---|---|---|---|---|---|---|")
    for number, row in enumerate(ENVIRONMENTS):
        if not re.search(wanted, str(row)):
            continue
        l2l = "yes" if row.learn2learn else "no"
        home, versions = (
            BUILD / f"environment-{number}",
            f"{row.python} | {row.torch} | {row.numpy}",
        )
        try:
            python = install(row, home)
            versions = version_cells(python)
            result = run_pytest(python, f"environment-{number}", [], {"OMP_NUM_THREADS": "1"})
        except Missing as missing:
            result = f"{missing} | | | "
        print(f"| {versions} | {l2l} | {result} |", flush=True)
        shutil.rmtree(home, ignore_errors=True)


def install(row: Environment, home: Path) -> str:
    """The Python of a new environment."""
    if row.interpreter is None:
        raise Missing("no such Python here")
    python = str(home / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir"]
    with (BUILD / f"{home.name}-install.log").open("w") as log:
        for command in (
            [row.interpreter, "-m", "venv", "--clear", str(home)],
            [*pip, "--upgrade", "pip>=23.1"],
            [*pip, *row.requirements],
        ):
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode:
                raise Missing(f"not installed, see {log.name}")
    return python


def version_cells(python: str) -> str:
    """Those that were installed."""
    show = "import platform, torch, numpy as np; print(platform.python_version(), '|', "
    show += "torch.__version__, '|', np.__version__)"
    return subprocess.run(
        [python, "-c", show], capture_output=True, text=True, check=True
    ).stdout.strip()


# ---------------------------------------------------------------- one row


def run_pytest(python: str, name: str, files: list[str], variables: dict[str, str]) -> str:
    """Three counts and the seconds, as the cells of a row; failed tests are listed on stderr."""
    log, start = BUILD / f"{name}.log", time.monotonic()
    command = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *files]
    # so that a test that crashes is one that failed
    command += ["--numprocesses", "1", "--max-worker-restart", "1000"]
    with log.open("w") as output:
        environment = os.environ | variables
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    for line in re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE):
        print(f"{name}: {line}", file=sys.stderr)
    last = text.rstrip().rpartition("\n")[2]
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    if code and not failed:  # it crashed, or found no test
        return f"pytest ended with {code} | | | {time.monotonic() - start:.0f}"
    cells = (counts.get("passed", 0), failed, counts.get("skipped", 0))
    return " | ".join(f"{cell:,.0f}" for cell in (*cells, time.monotonic() - start))


def processor() -> str:
    """As it names itself, where the system says it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def main(what: str = "", wanted: str = "") -> None:
    """All tables, or the rows asked for."""
    tables = {"bounds": run_bounds, "suite": run_suite, "environments": run_environments}
    if what not in ("", *tables):
        sys.exit(__doc__)
    BUILD.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores")
    for name, run in tables.items():
        if what in ("", name):
            run(wanted)


if __name__ == "__main__":
    main(*sys.argv[1:3])
