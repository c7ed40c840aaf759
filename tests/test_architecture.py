"""The shape of the package: imports go down CONTRIBUTING's ladder, and touch no neighbour."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import implicit_grad as ig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "implicit_grad"
NEIGHBOURS = {"learn2learn", "torchopt", "scipy", "gurobipy", "matplotlib", "pytest", "hypothesis"}
MOST_LINES = 300


def module_name(path: Path) -> str:
    """Dotted, as imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def ladder() -> list[str]:
    """CONTRIBUTING's list of modules, from the top; a folder stands for all that is in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## The ladder\n")[2]
    listing = re.search(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert listing, "CONTRIBUTING.md has no ladder"
    return [line.split()[0] for line in listing[1].splitlines()]


def rung(module: str) -> str:
    """The line of the ladder on which a module stands."""
    _, *below = module.split(".")
    if not below:
        return "__init__"
    return f"{below[0]}/" if MODULES[module].parent != PACKAGE else below[0]


def imports(source: str) -> set[str]:
    """The package's modules that some source imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: import by the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.partition(".")[0] == "implicit_grad"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours}


IMPORTS = {module: imports(path.read_text("utf-8")) for module, path in MODULES.items()}


def test_the_ladder_names_every_module_once():
    assert sorted(ladder()) == sorted({rung(module) for module in MODULES})


def test_imports_go_down_the_ladder():
    height = {name: -line for line, name in enumerate(ladder())}
    upward = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if rung(module) != rung(target) and height[rung(module)] < height[rung(target)]
    ]
    assert not upward


def test_no_import_cycles():
    TopologicalSorter(IMPORTS).prepare()  # raises on a cycle, and names it


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from implicit_grad import _tree", "implicit_grad._tree"),
        ("from implicit_grad._tree import Flat", "implicit_grad._tree"),
        ("import implicit_grad._tree as t", "implicit_grad._tree"),
        ("from implicit_grad import CG", "implicit_grad"),
        ("import implicit_grad as ig", "implicit_grad"),
        ("def f():\n    from implicit_grad.solvers import X", "implicit_grad.solvers"),
        ("import torch", None),
    ],
)
def test_which_imports_are_found(source, found):
    assert imports(source) == {found} - {None}


def test_importing_the_package_imports_no_neighbour():
    code = """
import sys, torch, optree, numpy
dependencies = set(sys.modules)
import implicit_grad
print(*{name.partition(".")[0] for name in set(sys.modules) - dependencies})
"""
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert "implicit_grad" in loaded
    assert not NEIGHBOURS & set(loaded)


@pytest.mark.parametrize("module", [ig, ig.solvers], ids=lambda module: module.__name__)
def test_public_names_are_documented(module):
    for name in module.__all__:
        text = inspect.getdoc(getattr(module, name)) or ""
        # what `dataclass` writes by itself, the signature, explains nothing
        assert text and not text.startswith(f"{name}("), f"{name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    lines = len(MODULES[module].read_text("utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: split what holds two ideas"
