"""The log of a run: a CSV file with one row for each epoch."""

import csv
from pathlib import Path

COLUMNS = ("epoch", "step", "lr", "train_loss", "loss", "top1", "top5", "images_per_second", "seconds")


class CsvLog:
    """Rows of `columns` in the file `path`, on disk as soon as they are written.

    Args:
        epochs: rows of an earlier part of the run to keep; later ones are dropped. 0 starts a new file.
        columns: names, `epoch` among them.
    """

    def __init__(self, path: str | Path, epochs: int = 0, columns: tuple[str, ...] = COLUMNS):
        rows = []
        if epochs and Path(path).exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= epochs]
        self.path, self.columns = path, columns
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, **row):
        """Append one row; its names must be the columns."""
        row = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
