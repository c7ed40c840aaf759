"""The site: Sphinx with furo and MyST; `make docs` builds it, without the network."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx import addnodes

import implicit_grad as ig
from implicit_grad.testing import strategies

project = "implicit_grad"
author = "The implicit_grad authors"
copyright = author
version = release = ig.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
pygments_dark_style = "github-dark"
smartquotes_action = "D"  # dashes; quotation marks are often code
html_title = "implicit_grad"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say what may be given, in words
add_module_names = False
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_attr_annotations = False
linkcheck_timeout = 20

ROOT = Path(__file__).parents[1]
REST = re.compile(r"^The rest of this page is \[(.+?)\]\(.+\)\.$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
TO_TARGET = re.compile(r"\]\(\w+\.md#([\w-]+)\)")
TARGETS = {
    target
    for page in Path(__file__).parent.glob("*.md")
    for target in re.findall(r"^\(([\w-]+)\)=$", page.read_text("utf-8"), re.MULTILINE)
}
# Files that are pages here, or parts of one.
PAGE_OF = {
    ROOT / "benchmarks/README.md": "benchmarks.md",
    ROOT / "benchmarks/results/census.md": "census.md",
    ROOT / "examples/README.md": "gallery.md",
    **{page: page.name for page in (ROOT / "docs").glob("*.md")},
}


def as_markdown(notebook) -> str:
    """A notebook's cells, with what they printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}\n```")
            else:
                image = output["data"]["image/png"].strip()
                parts.append(f"![The picture](data:image/png;base64,{image})")
    return "\n\n".join(parts)


def to_targets(app, docname, source) -> None:
    """Links to a page's `(target)=` in the form that every MyST knows: by the target alone."""
    source[0] = TO_TARGET.sub(
        lambda link: f"](#{link[1]})" if link[1] in TARGETS else link[0], source[0]
    )


def with_the_rest(app, docname, source) -> None:
    """Put a file of the repository into the page that announces it, and turn its links to here."""
    found = REST.search(source[0])
    if not found:
        return
    path = ROOT / found[1]
    app.env.note_dependency(str(path))

    def turned(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target or target.startswith(("http", "data:")):
            return link[0]
        file = (path.parent / target).resolve()
        if image:
            return f"![{text}](../{file.relative_to(ROOT).as_posix()})"
        return f"[{text}]({PAGE_OF[file]}{anchor})" if file in PAGE_OF else f"`{text}`"

    rest = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        rest = as_markdown(json.loads(rest))
    rest = rest.split("\n", 1)[1] if rest.startswith("# ") else rest
    source[0] = source[0][: found.start()] + LINK.sub(turned, rest)


SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
CODE = re.compile(r"(``?)(.+?)\1")


def inline(text: str) -> str:
    """Our docstrings are Markdown: one backtick is code, and a star is a star."""
    pieces, end = [], 0
    for code in CODE.finditer(text):
        pieces += [re.sub(r"([*|_\\])", r"\\\1", text[end : code.start()]), f"``{code[2]}``"]
        if text[code.end() : code.end() + 1].isalnum():
            pieces.append("\\ ")
        end = code.end()
    return "".join([*pieces, re.sub(r"([*|_\\])", r"\\\1", text[end:])])


def as_rst(app, what, name, obj, options, lines) -> None:
    """A docstring's code and formulas in the markup that autodoc reads."""
    lines[:] = "\n".join(lines).expandtabs().split("\n")
    written, section, formula, example = [], False, False, False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            section, formula = bool(SECTION.match(line)), False
        if not line:
            formula = example = False
        example = example or line.lstrip().startswith(">>>")
        if indented and not section and not formula and not example:
            if written and not written[-1]:
                written += [".. code-block:: text", ""]
                formula = True
        if SECTION.match(line) or formula or example:
            written.append(line)
        else:
            written.append(inline(line))
    lines[:] = written


def public(prefix: str, module) -> dict[str, str]:
    """What a reader may write, and the name on the API page that it stands for."""
    return {f"{prefix}.{name}": f"{module.__name__}.{name}" for name in module.__all__}


NAMES = {
    **public("ig", ig),
    **public("ig.solvers", ig.solvers),
    **public("ig.testing", ig.testing),
}


class Linked(nodes.GenericNodeVisitor):
    """Makes each `ig.NAME`, with or without arguments, a link to the API page.

    On that page, which consists of docstrings, a `NAME` will do. In tables, where long code would
    squeeze the columns beside it, it may be broken after what joins its parts.
    """

    def __init__(self, document, docname: str) -> None:
        super().__init__(document)
        short = {name.split(".", 1)[1]: target for name, target in NAMES.items()}
        del short["prox"]  # arguments have that name, too
        self.names = {**short, **NAMES} if docname == "api" else NAMES

    def default_visit(self, node) -> None: ...

    def default_departure(self, node) -> None: ...

    def visit_entry(self, node) -> None:
        for literal in node.findall(nodes.literal):
            first, *others = re.split(r"(?<=[_.(,=/])(?<!\big\.)(?=\w)", literal.astext())
            breaks = [(nodes.raw("", "<wbr>", format="html"), nodes.Text(part)) for part in others]
            literal.children = [nodes.Text(first), *itertools.chain(*breaks)]

    def visit_literal(self, node) -> None:
        name = re.match(r"[\w.]+", node.astext().replace("<wbr>", ""))
        target = self.names.get(name[0]) if name else None
        if not target or isinstance(node.parent, nodes.reference):
            return
        reference = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True
        )
        reference["py:module"] = reference["py:class"] = None
        node.replace_self(reference)
        reference += node


def link_names(app, doctree) -> None:
    doctree.walk(Linked(doctree, app.env.docname))


def mathml(self, node, display: str) -> None:
    """Browsers render MathML by themselves: no script, and nothing from another server."""
    self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon
    app.connect("source-read", with_the_rest)
    app.connect("source-read", to_targets)
    app.connect("doctree-read", link_names)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: mathml(self, node, "inline"), None),
        block_renderers=(lambda self, node: mathml(self, node, "block"), None),
    )


html_math_renderer = "mathml"
assert strategies  # autodoc needs hypothesis for them
