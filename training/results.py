"""Tables of measurements: CSV files that say how they were made."""

import csv
import datetime
import shlex
import sys
from pathlib import Path

import torch


def read(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table that `write` wrote, as text."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def write(path: str | Path | None, name: str, rows: list[dict], device: str = "cpu") -> Path:
    """Write rows, under the command line that made them, to `path`; None: to results/, named by machine and `name`."""
    machine = torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else f"cpu{torch.get_num_threads()}"
    stamp = f"{machine}-torch{torch.__version__.split('+')[0]}-{datetime.date.today()}"
    target = Path(path or f"results/{stamp}-{name}.csv")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        print(target)  # once, of a table that grows
    with open(target, "w", newline="", encoding="utf-8") as file:
        file.write(f"# python {shlex.join(sys.argv)}\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target
