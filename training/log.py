"""Tables of a run, as CSV files that are whole at any moment."""

import csv
import io
from pathlib import Path

from training.checkpoint import write_text


def write_rows(path: str | Path, rows: list[dict]):
    """Write a table; its columns are the names in the first row. Numbers get six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    write_text(Path(path), text.getvalue())


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table, as text; none if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
