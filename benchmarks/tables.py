"""Rows of measurements as a CSV file and as a table on the console."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Row = dict[str, object]


def write(rows: Sequence[Row], path: Path, console: Console) -> None:
    """The rows, all with the same columns, into a file and onto the console."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    table = Table(*rows[0].keys(), title=str(path))
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
