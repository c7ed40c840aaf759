"""The README's code runs: every python block, in order, as one program."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import settings

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    """Each after as many empty lines as come before it, so that tracebacks name README's lines."""
    return [
        "\n" * text.count("\n", 0, found.start(3)) + dedent(found[3])
        for found in BLOCK.finditer(text)
        if found[2].lower() in ("py", "python", "python3")
    ]


@pytest.fixture
def hasty():
    """Hypothesis by its default, on a machine so slow that no test is in time."""
    before = settings.get_current_profile_name()
    settings.register_profile("hasty", deadline=timedelta(microseconds=1), max_examples=3)
    settings.load_profile("hasty")
    yield
    settings.load_profile(before)


def test_readme_runs(tmp_path, monkeypatch, hasty):
    found = python_blocks(README.read_text(encoding="utf-8"))
    assert found, "README.md shows no python code"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for block in found:
        exec(compile(block, str(README), "exec"), namespace)
    namespace["test_my_solver"]()


def test_which_blocks_are_found():
    text = """\
```python
a = 1
```
```bash
not python
```
- In a list:
  ```py
  if True:
      b = 2
  ```
"""
    assert python_blocks(text) == ["\na = 1\n", "\n" * 8 + "if True:\n    b = 2\n"]
