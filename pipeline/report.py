"""The closing table: what the eval stage measured, for the terminal and for machines."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data.errors import UserError

REPORTING = ("label", "eval")


def read_report(run_folder: Path, stage: str = "eval") -> dict[str, Any] | None:
    """`OUT/<stage>/report.json`: title, columns, rows, notes; None where the stage left none."""
    path = run_folder / stage / "report.json"
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged report ({error}); run `launch {stage} CONFIG` again") from error
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints the table and its notes."""
    table = Table(title=report["title"], box=SIMPLE, title_justify="left")
    for place, column in enumerate(report["columns"]):
        table.add_column(str(column), justify="left" if place == 0 else "right")
    for row in report["rows"]:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    for note in report.get("notes", []):
        console.print(note)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
