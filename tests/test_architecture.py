"""The shape of the package: folders import only from those below them, and touch no neighbour."""

from __future__ import annotations

import ast
import functools
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
NEIGHBOURS = {
    "learn2learn",
    "torchopt",
    "scipy",
    "gurobipy",
    "cvxpy",
    "matplotlib",
    "pytest",
    "hypothesis",
}

# From the top: what stands in one line does not import from its own line, but within a folder.
ORDER = (
    {"__main__"},
    {"__init__"},
    {"testing"},
    {"_implicit", "_certify", "_influence", "learn2learn", "monitor", "prox"},
    {"_wrapper", "solvers"},
    {"_conditions"},
    {"_curvature"},
    {"_theorem"},
    {"_linear_solvers"},
    {"_torch", "_options"},
    {"_warnings"},
    {"_errors"},
)
# What torch does not document, and may change between versions.
PRIVATE = re.compile(
    r"torch\._(?:C|foreach_\w+)\b|\._(?:buffers|parameters|modules|version|backward_hooks|flat_weights)\b"
)


def module_name(path: Path) -> str:
    """Dotted, as imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = sorted(p for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists())


def room(module: str) -> str:
    """The name by which a module stands in `ORDER`: its folder's, or its own."""
    return (module.split(".")[1:] or ["__init__"])[0]


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


@functools.cache
def imports_of_modules() -> dict[str, set[str]]:
    """Each module's, read when they are asked for and not when tests are collected."""
    return {module: imports(path.read_text("utf-8")) for module, path in MODULES.items()}


def test_every_module_has_a_place():
    assert {room(module) for module in MODULES} == set().union(*ORDER)


def test_imports_go_down():
    height = {name: -floor for floor, names in enumerate(ORDER) for name in names}
    upward = [
        f"{module} imports {target}"
        for module, targets in imports_of_modules().items()
        for target in targets
        if room(module) != room(target) and height[room(module)] <= height[room(target)]
    ]
    assert not upward


def test_no_import_cycles():
    TopologicalSorter(imports_of_modules()).prepare()  # raises on a cycle, and names it


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from implicit_grad import _errors", "implicit_grad._errors"),
        ("from implicit_grad._torch import pytree", "implicit_grad._torch.pytree"),
        ("from implicit_grad._torch.pytree import Flat", "implicit_grad._torch.pytree"),
        ("import implicit_grad._torch.pytree as t", "implicit_grad._torch.pytree"),
        ("from implicit_grad import CG", "implicit_grad"),
        ("import implicit_grad as ig", "implicit_grad"),
        ("def f():\n    from implicit_grad.solvers import X", "implicit_grad.solvers"),
        ("import torch", None),
    ],
)
def test_which_imports_are_found(source, found):
    assert imports(source) == {found} - {None}


def modules_loaded_by(code: str) -> set[str]:
    """The top-level names, and the package's modules, that come with torch already imported."""
    listing = f"""
import sys, torch, optree, numpy
dependencies = set(sys.modules)
{code}
print(*set(sys.modules) - dependencies)
"""
    return set(subprocess.check_output([sys.executable, "-c", listing], text=True).split())


def test_importing_the_package_imports_no_neighbour():
    loaded = modules_loaded_by("import implicit_grad")
    assert "implicit_grad" in loaded
    assert not NEIGHBOURS & {name.partition(".")[0] for name in loaded}


def test_the_linear_solvers_stand_alone():
    """With the package's __init__ out of the way, they bring only what checks and errors need."""
    loaded = modules_loaded_by(f"""
import types
package = types.ModuleType("implicit_grad")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["implicit_grad"] = package
import implicit_grad._linear_solvers.cg, implicit_grad._linear_solvers.exact
import implicit_grad._linear_solvers.normal_cg, implicit_grad._linear_solvers.neumann
""")
    ours = {room(name) for name in loaded if name.startswith("implicit_grad.")}
    assert ours == {"_linear_solvers", "_options", "_errors"}


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room(name) != "_torch"], ids=lambda name: name
)
def test_only_one_folder_touches_torchs_private_side(module):
    found = PRIVATE.findall(MODULES[module].read_text("utf-8"))
    assert not found, f"{found}: move what needs it to implicit_grad/_torch/"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_says_what_it_is_for(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert len(text.splitlines()) >= 2, "what is it for, and what may it import?"


@pytest.mark.parametrize("module", [ig, ig.solvers], ids=lambda module: module.__name__)
def test_public_names_are_documented(module):
    for name in module.__all__:
        text = inspect.getdoc(getattr(module, name)) or ""
        # what `dataclass` writes by itself, the signature, explains nothing
        assert text and not text.startswith(f"{name}("), f"{name} has no docstring"
