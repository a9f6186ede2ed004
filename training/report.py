"""Pages about runs: HTML with its pictures inside, one file to keep or to send."""

import base64
import html
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, shorten

import matplotlib.pyplot as plt
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from training.estimate import duration

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: 0 .8rem 0 0; text-align: left }
pre { background: #f4f4f4; padding: .8rem; overflow: auto } summary { cursor: pointer; font-weight: bold }"""
FEW = 40  # classes whose names find room


class Page:
    """Sections in order; `save` writes them."""

    def __init__(self, title: str):
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, note: str = ""):
        self.parts.append(f"<h2>{html.escape(text)}</h2>" + (f"<p>{html.escape(note)}</p>" if note else ""))

    def table(self, rows: Sequence[dict], folded: str = ""):
        """Rows under their names; behind a line to unfold where `folded` says what they are."""
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
        lines = ("".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in rows)
        table = f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
        self.parts.append(_folded(folded, table) if folded else table)

    def facts(self, facts: dict[str, str]):
        """Names and what they are, a line each; what is empty is left out."""
        lines = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items() if v)
        self.parts.append(f"<table>{''.join(lines)}</table>")

    def folded(self, title: str, text: str):
        """Text behind a line to unfold."""
        self.parts.append(_folded(title, f"<pre>{html.escape(text)}</pre>"))

    def picture(self, png: bytes, alt: str):
        data = base64.b64encode(png).decode()
        self.parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def figure(self, figure, alt: str):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        self.picture(file.getvalue(), alt)

    def save(self, path: str | Path):
        title, body = html.escape(self.title), "\n".join(self.parts)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        Path(path).write_text(f'<!doctype html><html lang="en">{head}\n{body}\n</html>\n', errors="backslashreplace")


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def title_of(saved: dict) -> str:
    """The model of a checkpoint, and what is inserted."""
    return saved["model"] + (f" + {saved['insert']['block']}" if saved["insert"] else "")


def add_results(page: Page, saved: dict):
    """The best epoch and the last one, named, with their numbers."""
    history = saved["history"]
    if not history:
        page.table([{name: f"{value:.6g}" for name, value in saved["metrics"].items()} or {"epochs": saved["epoch"]}])
        return
    best = [row for row in history if row["step"] == saved["metrics"].get("best_step")]
    told = [("best", row) for row in best[:1]] + [("last", history[-1])]
    hidden = ("epoch", "step", "seconds", "images_per_second", "lr")
    rows = [
        {"": f"{which} epoch, {row['epoch']}", **{k: f"{v:.5g}" for k, v in row.items() if k not in hidden}}
        for which, row in told
    ]
    page.table(rows)


def add_curves(page: Page, saved: dict):
    """The log of all epochs."""
    if saved["history"]:
        page.heading("Curves")
        page.figure(curves(saved["history"]), "curves of the log")


def facts_of(saved: dict, parameters: int, flops: int) -> dict[str, str]:
    """What the run was: model, data, time, machine.

    Args:
        flops: of one image forward, 2 per multiply-add; 0 where they were not counted.
    """
    data, config, made = saved["data"], saved["config"], saved["made"]
    where = config["data"].get("dir")
    memory, last = made.get("memory"), (saved["history"] or [saved])[-1]
    return {
        "model": title_of(saved),
        "parameters": f"{parameters / 1e6:.3g} M",
        "forward, an image": f"{flops / 1e9:.3g} GFLOPs, 2 per multiply-add" if flops else "",
        "data": config["data"]["name"] + (f", {where}" if where else ""),
        "images to train on": f"{data['train_images']:,}" if "train_images" in data else "",
        "input": "×".join(map(str, data["input_size"])),
        "epochs": f"{last['epoch']}, {last['step']:,} steps",
        "wall time": duration(wall_time(saved)) if saved["history"] else "",
        "speed": f"{speed(saved):.4g} images/s in training" if speed(saved) else "",
        "memory": f"{memory / 2**20:,.0f} MiB at most" if memory else "",
        "hardware": made.get("hardware", ""),
        "date": f"{made['date']} UTC" if "date" in made else "",
        "torch": f"{saved['versions']['torch']}, timm {saved['versions']['timm']}",
    }


def wall_time(saved: dict) -> float:
    """Seconds of all epochs, evaluation and saving among them."""
    return sum(row.get("seconds", 0.0) for row in saved["history"])


def speed(saved: dict) -> float:
    """Images a second, the median over epochs; 0 where none was logged."""
    return statistics.median([row.get("images_per_second", 0.0) for row in saved["history"]] or [0.0])


def add_configuration(page: Page, saved: dict, of: str = ""):
    """All of it, folded."""
    text = json.dumps({"config": saved["config"], "versions": saved["versions"]}, indent=2)
    page.folded(f"Configuration {of}".strip(), text)


def curves(history: list[dict]):
    """The log over epochs: what has the same end of its name shares a plot."""
    groups: dict[str, list[str]] = {}
    for name in history[0]:
        if name not in ("epoch", "step", "seconds"):
            groups.setdefault("top" if name.startswith("top") else name.split("_")[-1], []).append(name)
    figure, axes = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 3), layout="constrained", squeeze=False)
    for axis, (_, names) in zip(axes[0], groups.items()):
        for name in names:
            axis.plot([row["epoch"] for row in history], [row[name] for row in history], marker=".", label=name)
        axis.set(xlabel="epoch", title=names[0] if len(names) == 1 else "")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    return figure


def add_answers(page: Page, probabilities: Tensor, targets: Tensor, classes: list[str]):
    """The confusion matrix, and the accuracy of each class."""
    guesses = probabilities.argmax(dim=1)
    matrix = confusion_matrix(targets.numpy(), guesses.numpy(), labels=range(len(classes)))
    right = int((guesses == targets).sum())
    page.heading("Confusion", f"{right} of {len(targets)} right. Rows: what an image is; columns: what the model says.")
    page.figure(confusion(matrix, classes), "confusion matrix")
    page.heading("Accuracy of each class")
    rows = []
    for index, name in enumerate(classes):
        count, wrong = matrix[index].sum(), matrix[index].copy()
        wrong[index] = 0
        taken = f"{classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        rows.append((matrix[index, index] / count if count else float("nan"), name, count, taken))
    rows = [
        {"class": name, "images": count, "accuracy": f"{100 * share:.1f} %", "mostly taken for": taken}
        for share, name, count, taken in sorted(rows, key=lambda row: row[0])
    ]
    page.table(rows[:FEW])
    if len(rows) > FEW:
        page.table(rows[FEW:], folded=f"{len(rows) - FEW} more, which do better")


def confusion(matrix, classes: list[str]):
    """A picture of counts; with names where there is room for them."""
    names = [shorten(name, 30, placeholder=" …") for name in classes]
    room = 0.08 * max(map(len, names)) if len(names) <= FEW else 0.3  # inches, for names beside the matrix
    side = min(2.5 + 0.32 * len(classes), 12) + room
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="says", ylabel="is", xticks=[], yticks=[])
    if len(classes) <= FEW:
        places = range(len(classes))
        axis.set_xticks(places, names, rotation=90)
        axis.set_yticks(places, names)
        for row in places:
            for column in places:
                if matrix[row, column] and len(classes) <= 20:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=8)
    return figure


def mistakes(probabilities: Tensor, targets: Tensor, count: int) -> list[int]:
    """Indices of the wrong answers, the surest first."""
    sureness, guesses = probabilities.max(dim=1)
    wrong = (guesses != targets).nonzero().flatten()
    return wrong[sureness[wrong].argsort(descending=True)][:count].tolist()


def add_images(page: Page, pixels: Tensor, titles: list[str], alt: str, columns: int = 6):
    """Images (B, C, H, W) in 0..1 with titles, in rows."""
    rows = -(-len(pixels) // columns)
    titles = ["\n".join(fill(line, 22) for line in title.splitlines()) for title in titles]
    height = 1.7 + 0.15 * max(title.count("\n") + 1 for title in titles)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns, height * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, pixels.expand(-1, 3, -1, -1), titles):
        axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(title, fontsize=8)
    page.figure(figure, alt)


def varied(targets: Tensor, count: int) -> list[int]:
    """`count` indices from all over, of as many classes as can be."""
    places = torch.arange(len(targets))
    turn = torch.zeros_like(places)
    for label in targets.unique():
        turn[targets == label] = torch.arange(int((targets == label).sum()))
    return sorted(places.tolist(), key=lambda place: (turn[place].item(), targets[place].item()))[:count]
