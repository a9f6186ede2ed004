"""Finished runs side by side: what they reached, with its spread over seeds, and what they cost."""

import json
import statistics
from dataclasses import dataclass

import matplotlib.pyplot as plt

from training.config import deciding
from training.estimate import duration
from training.report import Page, speed, title_of, wall_time

MEASURES = {"best_top1": ("top-1 %", "top1"), "best_bits_per_dim": ("bits/dim", "test_bits")}  # its name, its column


@dataclass
class Finished:
    """A run: its folder, its best checkpoint with the whole history, and what its model takes."""

    folder: str
    saved: dict
    parameters: int
    flops: int

    @property
    def measure(self) -> str:
        return next(name for name in MEASURES if name in self.saved["metrics"])

    @property
    def best(self) -> float:
        return self.saved["metrics"][self.measure]

    @property
    def last(self) -> float:
        return self.saved["history"][-1][MEASURES[self.measure][1]]

    @property
    def config(self) -> dict:
        """Options that make it another run, by name."""
        return {name: value for name, value in deciding(self.saved["config"]).items() if name != "seed"}


def grouped(runs: list[Finished]) -> dict[str, list[Finished]]:
    """Runs that differ in their seed alone under one name: the model, and the options in which groups differ.

    Raises:
        ValueError: if a run has no epoch, or they have not the same measure.
    """
    for run in runs:
        if not run.saved["history"] or not MEASURES.keys() & run.saved["metrics"].keys():
            raise ValueError(f"{run.folder} has no finished epoch")
    if len({run.measure for run in runs}) > 1:
        named = ", ".join(f"{run.folder} {MEASURES[run.measure][0]}" for run in runs)
        raise ValueError(f"the runs do not measure the same: {named}")
    alike: dict[str, list[Finished]] = {}
    for run in runs:
        alike.setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    names = sorted({name for run in runs for name in run.config})
    differing = [
        name
        for name in names
        if not name.startswith("model.") and len({json.dumps(run.config.get(name)) for run in runs}) > 1
    ]
    groups: dict[str, list[Finished]] = {}
    for each in alike.values():
        more = [f"{name} {each[0].config.get(name)}" for name in differing]
        label = ", ".join([title_of(each[0].saved), *more])
        groups[label if label not in groups else f"{label} ({each[0].folder})"] = each
    return groups


def add_comparison(page: Page, runs: list[Finished]):
    """A row for each group of runs that differ in their seed alone, their curves in one plot, a row for each run."""
    groups, (name, column) = grouped(runs), MEASURES[runs[0].measure]
    page.table([_row(label, each, name) for label, each in groups.items()])
    page.heading("Curves", f"{name} over epochs.")
    page.figure(_curves(groups, name, column), f"{name} over epochs")
    page.heading("Runs")
    page.table(
        [
            {
                "folder": run.folder,
                "model": label,
                "seed": run.saved["config"].get("seed", ""),
                f"best {name}": f"{run.best:.4g}",
                f"last {name}": f"{run.last:.4g}",
                "wall time": duration(wall_time(run.saved)),
                "hardware": run.saved["made"].get("hardware", ""),
                "date": run.saved["made"].get("date", ""),
            }
            for label, each in groups.items()
            for run in each
        ]
    )


def _row(label: str, runs: list[Finished], name: str) -> dict:
    memory = [run.saved["made"]["memory"] for run in runs if "memory" in run.saved["made"]]
    return {
        "model": label,
        "runs": len(runs),
        f"best {name}": spread([run.best for run in runs]),
        f"last {name}": spread([run.last for run in runs]),
        "epochs": runs[0].saved["history"][-1]["epoch"],
        "images/s": f"{statistics.mean(speed(run.saved) for run in runs):.4g}",
        "parameters": f"{runs[0].parameters / 1e6:.3g} M",
        "GFLOPs": f"{runs[0].flops / 1e9:.3g}" if runs[0].flops else "not counted",
        "memory": f"{max(memory) / 2**20:,.0f} MiB" if memory else "not noted",
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation; of a single value itself."""
    mean = f"{statistics.mean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def _curves(groups: dict[str, list[Finished]], name: str, column: str):
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (label, runs) in enumerate(groups.items()):
        for run in runs:
            history = run.saved["history"]
            xs, ys = [row["epoch"] for row in history], [row[column] for row in history]
            axis.plot(xs, ys, marker=".", color=f"C{number % 10}", label=label if run is runs[0] else None)
    axis.set(xlabel="epoch", ylabel=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
