"""Rows of measurements as a CSV file and as a table on the console."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, object]


def write(rows: Sequence[Row], path: Path, console: Console | None = None) -> None:
    """The rows, all with the same columns, into a file and onto the console.

    Without a console they are printed as plain text: rich need not be installed then.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    lines = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    if console is None:
        _print([list(rows[0]), *lines], path)
        return
    from rich.table import Table

    table = Table(*rows[0].keys(), title=str(path))
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _print(lines: Sequence[Sequence[str]], path: Path) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{path}")
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())
