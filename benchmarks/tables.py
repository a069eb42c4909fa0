"""The tables that benchmarks print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Print a row for each of `rows`, which have the same keys; numbers to 4 digits."""
    table = Table(title=title)
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)
