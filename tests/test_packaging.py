"""What is installed: all modules, the types, one version, the extras that messages name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import implicit_grad as ig
from implicit_grad.solvers._neighbours import _EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "implicit_grad"
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, which leaves the sources as they are."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    shutil.copytree(PACKAGE, copy / "implicit_grad", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    """What an index and pip know of it."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_every_module_and_the_marker_of_types_are_packaged(wheel):
    sources = {str(p.relative_to(ROOT).as_posix()) for p in PACKAGE.rglob("*.py")}
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == sources | {"implicit_grad/py.typed"}
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_version_is_said_once(metadata):
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert metadata["Version"] == ig.__version__ == cited[1]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## [{ig.__version__}]" in changelog


def test_the_extras_that_messages_name_exist(metadata):
    text = "".join(path.read_text("utf-8") for path in (ROOT / "README.md", *PACKAGE.rglob("*.py")))
    named = set(_EXTRAS.values())
    for found in re.findall(r"implicit-grad\[([a-z0-9,]+)\]", text) + re.findall(
        r'pip install -e "\.\[([a-z0-9,]+)\]"', text
    ):
        named |= set(found.split(","))
    assert {"scipy", "gurobi", "learn2learn", "torchopt"} <= named
    assert named <= set(metadata.get_all("Provides-Extra"))


def test_an_extra_brings_the_package_that_was_missing(metadata):
    required = metadata.get_all("Requires-Dist")
    for package, extra in _EXTRAS.items():
        assert any(re.match(rf'{package}\b.*extra == "{extra}"', one) for one in required)


def test_pre_commit_runs_the_linter_that_make_lint_runs(metadata):
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    (revision,) = re.findall(r"ruff-pre-commit\n +rev: v(\d+\.\d+)\.\d+\n", hooks)
    (wanted,) = [one for one in metadata.get_all("Requires-Dist") if one.startswith("ruff")]
    assert f">={revision}" in wanted
