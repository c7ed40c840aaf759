"""The site's pages: their code runs, their links lead somewhere, and they name what is public."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest
import torch

import implicit_grad as ig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
FILES += [ROOT / folder / "README.md" for folder in ("examples", "benchmarks")]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
# A fence may say what its code needs besides: ```python needs=scipy
BLOCK = re.compile(
    r"^( *)(`{3,})(\w*)(?: needs=([\w,.]+))?[^\n]*\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
REST = re.compile(r"^The rest of this page is \[(.+?)\]", re.MULTILINE)  # see docs/conf.py
ANCHOR = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)


class Block(NamedTuple):
    """Source after as many empty lines as come before it, so that tracebacks name the page's."""

    source: str
    needs: tuple[str, ...] = ()


def python_blocks(text: str) -> list[Block]:
    return [
        Block(
            "\n" * text.count("\n", 0, found.start(5)) + dedent(found[5]),
            tuple((found[4] or "").split(",")) if found[4] else (),
        )
        for found in BLOCK.finditer(text)
        if found[3].lower() in ("py", "python", "python3")
    ]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    return BLOCK.sub("", text_of(page))


def installed(name: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a part of a package that is not there, or is another one
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    for block in python_blocks(text_of(page)):
        if not all(map(installed, block.needs)):
            continue
        with warnings.catch_warnings():
            if block.needs:  # other packages' own are not ours to mend
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", ig.ImplicitGradWarning)
            exec(compile(block.source, str(page), "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": notebook.stem}
    for cell in json.loads(text_of(notebook))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] or cell["execution_count"], "run it, and keep what it prints"
            exec(compile("".join(cell["source"]), str(notebook), "exec"), namespace)
    pyplot.close("all")


def test_which_blocks_are_found():
    text = """\
```python
a = 1
```
```{eval-rst}
no python
```
:::{container} pair
```python needs=higher,torch
b = 2
```
:::
````text
```python
c = 3
```
````
"""
    assert python_blocks(text) == [
        Block("\na = 1\n"),
        Block("\n" * 8 + "b = 2\n", ("higher", "torch")),
    ]


def anchors(page: Path) -> set[str]:
    """Those that are written, and those of headings, as GitHub and the site make them."""
    text = prose_of(page)
    if rest := REST.search(text):
        text += (ROOT / rest[1]).read_text("utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}
    return slugs | set(ANCHOR.findall(text))


@pytest.mark.parametrize(
    "page", [*PAGES, *FILES], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose_of(page)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_listed():
    listed = set(re.findall(r"^(\w+)$", text_of(DOCS / "index.md"), re.MULTILINE))
    assert listed == {page.stem for page in PAGES} - {"index"}


def public_names() -> set[str]:
    modules = {"implicit_grad": ig, "implicit_grad.solvers": ig.solvers}
    modules |= {"implicit_grad.testing": ig.testing}
    names = {f"{path}.{name}" for path, module in modules.items() for name in module.__all__}
    return names - {"implicit_grad.solvers", "implicit_grad.testing"}


@pytest.mark.parametrize("name", sorted(public_names()))
def test_the_reference_has_every_public_name(name):
    directive = r"\.\. (?:auto)?(?:function|class|exception|module):: "
    assert re.search(directive + re.escape(name) + r"$", text_of(DOCS / "api.md"), re.MULTILINE)


def sentences() -> list[str]:
    """What can be seen when something is wrong: statuses, causes and exceptions."""
    exceptions = [name for name in ig.__all__ if name.endswith(("Error", "Warning"))]
    return [*ig.Status.__members__, *ig.testing.Cause.__members__, *exceptions]


def anchors_of_why() -> list[str]:
    return ANCHOR.findall(text_of(DOCS / "why.md"))


@pytest.mark.parametrize("name", sorted(set(sentences())))
def test_every_status_cause_and_exception_has_a_cure(name):
    known = {**ig.Status.__members__, **ig.testing.Cause.__members__}
    anchor = known.get(name, getattr(ig, name, None)).anchor
    assert anchor == re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower().replace("_", "-")
    assert anchor in anchors_of_why(), f"why.md has no anchor ({anchor})="
    assert f"`{name}`" in text_of(DOCS / "why.md")


def sources() -> list[str]:
    return [path.read_text("utf-8") for path in sorted((ROOT / "implicit_grad").rglob("*.py"))]


def test_what_the_library_says_and_what_why_md_quotes_have_the_same_anchors():
    """Each sentence with an anchor is quoted there, under it; and the other way round."""
    assert len(anchors_of_why()) == len(set(anchors_of_why()))
    given = set(re.findall(r'anchor="([\w-]+)"', "".join(sources())))
    quoted = set(re.findall(r"^\(([\w-]+)\)=\n> ", text_of(DOCS / "why.md"), re.MULTILINE))
    assert given - {ig.Status.NEGATIVE_CURVATURE.anchor} == quoted


def test_quoted_messages_are_those_of_the_library():
    """`> …` in why.md begins as a message of the library does."""
    said = re.sub(r"""["']\s*\n\s*f?["']""", "", "".join(sources()))  # strings written in pieces
    quoted = re.findall(r"^> (.+?)(?: …)?$", text_of(DOCS / "why.md"), re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        for piece in message.split(" … "):
            assert piece in said, piece
