"""A page about a run: HTML with its pictures inside, one file to keep or to send."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: 0 .8rem 0 0; text-align: left }
pre { background: #f4f4f4; padding: .8rem; overflow: auto }"""


class Page:
    """Sections in order; `save` writes them."""

    def __init__(self, title: str):
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, note: str = ""):
        self.parts.append(f"<h2>{html.escape(text)}</h2>" + (f"<p>{html.escape(note)}</p>" if note else ""))

    def table(self, rows: Sequence[dict]):
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
        lines = ("".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")

    def text(self, text: str):
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

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
        Path(path).write_text(f'<!doctype html><html lang="en">{head}\n{body}\n</html>\n')


def add_run(page: Page, saved: dict):
    """What the run was, and its curves."""
    best = {name: f"{value:.6g}" for name, value in saved["metrics"].items()}
    page.table([{"model": saved["model"], "epochs": saved["epoch"], "steps": saved["step"], **best}])
    if saved["history"]:
        page.heading("Curves")
        page.figure(curves(saved["history"]), "curves of the log")
    page.heading("Configuration")
    page.text(json.dumps({"config": saved["config"], "versions": saved["versions"]}, indent=2))


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
    page.table(rows)


def confusion(matrix, classes: list[str]):
    """A picture of counts; with labels where there is room for them."""
    side = min(3 + 0.32 * len(classes), 12)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="says", ylabel="is", xticks=[], yticks=[])
    if len(classes) <= 40:
        places = range(len(classes))
        axis.set_xticks(places, classes, rotation=90)
        axis.set_yticks(places, classes)
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
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2 * rows), layout="constrained", squeeze=False)
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
