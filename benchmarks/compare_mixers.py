"""Mixers in one small ViT, and gates in one small ResNet, trained alike: accuracy beside time and memory.

    python benchmarks/compare_mixers.py --dir DATA_DIR
    python benchmarks/compare_mixers.py --mixers '[dense, linear]' --data '[digits, pathfinder]' --epochs 1 --seeds 1
    python benchmarks/compare_mixers.py --mixers '[dense, {name: window, kernel_size: 3}]' --gates '[cbam]' \\
        --data '[folder]' --dir photos --training '[--data.val-share, "0.2"]'

vit_tiny_patch4_32 at width 96, that is 8×8 tokens and a class token, and cifar_resnet20, which is there without a gate,
too. Data are digits, the first 10,000 images of CIFAR-10, Pathfinder, or a folder of one's own, in which images are
brought to 32×32 pixels. On Pathfinder the ViT is vit_tiny_conv2_32, of four layers: patches of 4×4 pixels never learned
it, while 11×11 pixels, which is what a token sees here, are too few to follow a curve without attention. One recipe
and one number of steps for all: what is compared is what a block learns from little, not the best it can do. A call
that was stopped goes on where it stood. Writes a CSV after every run, and in the end a picture and a plain text beside
it; steps are timed before the first run, all models taking turns.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli

import backbones  # noqa: F401  registers the named models
from training import checkpoint
from training.log import read_rows, write_rows
from training.results import write
from vision_attn import describe, list_blocks
from vision_attn.cost import flops, parameters, peak_memory, times

ROOT = Path(__file__).parents[1]
RESNET = "cifar_resnet20"
RECIPE = "--optim.name adamw --optim.weight-decay 0.05 --optim.warmup-epochs 1 --optim.clip-grad 1.0 --save-every 500"


class Setting(NamedTuple):
    """What all mixers have in common on some data."""

    vit: str
    args: dict  # of the ViT, but for its depth
    depth: int
    batch: int
    epochs: int
    words: str  # for train_imagenet.py
    images: int | None = None  # to train on, the first ones; None: all
    in_chans: int = 3


PATCHES = ("vit_tiny_patch4_32", dict(embed_dim=96), 2, 16)  # small batches: the same images make more steps
PAD, MIRRORED = "--optim.lr 1e-3 --augment.crop pad", "--optim.lr 1e-3 --augment.crop pad --augment.hflip 0.5"
GREY = dict(embed_dim=96, in_chans=1, class_token=False, global_pool="avgmax")
SETTINGS = {
    "digits": Setting(*PATCHES, 10, PAD, 1_437),
    "cifar10": Setting(*PATCHES, 3, MIRRORED, 10_000),
    "folder": Setting(*PATCHES, 10, f"{MIRRORED} --data.img-size 32"),
    "pathfinder": Setting(
        *("vit_tiny_conv2_32", GREY, 4, 128, 6),
        "--optim.lr 2e-3 --augment.crop centre --augment.hflip 0.5 --data.mean [0.065] --data.std [0.173]",
        *(50_000, 1),
    ),
}
# Where the defaults are for larger images: at 8×8 they see all, or nearly all
AT_8X8 = {
    "adaptive_connection": {"edges": 8},
    "adaptive_span": {"span": 3},
    "big_bird": {"tile": 2, "drawn": 1, "tokens": 2},
    "bilevel": {"tile": 2},
    "dilated": {"kernel_size": 3},
    "fixed": {"c": 2},
    "global_memory": {"chunk": 4},
    "global_tokens": {"kernel_size": 3, "tokens": 4},
    "hand_crafted": {"num_heads": 6},  # one for each of its patterns
    "inducing_points": {"points": 8},
    "interlaced_sparse": {"factor": 4},
    "linformer": {"rank": 4, "length": 8},
    "longformer": {"kernel_size": 3, "tokens": 4},
    "nystrom": {"cells": 4},
    "prob_sparse": {"factor": 2, "cells": 4},
}
AT_16X16 = {"hand_crafted": {"num_heads": 6}}


class Network(NamedTuple):
    """A row of the table."""

    block: str  # "": none
    model: str
    args: dict


def networks(
    setting: Setting, mixers: list[str | dict], gates: list[str | dict], depth: int | None, options: dict
) -> list[Network]:
    """The models to compare: mixers in a ViT, gates in a ResNet beside one without."""
    of_resnet = {} if setting.in_chans == 3 else dict(in_chans=setting.in_chans)
    made = [Network("", RESNET, of_resnet)] if gates else []
    for kind, asked, model, size in (
        ("mixer", mixers, setting.vit, setting.args | dict(depth=depth or setting.depth)),
        ("gate", gates, RESNET, of_resnet),
    ):
        for one in asked:
            own = {"name": one} if isinstance(one, str) else dict(one)
            name = own.pop("name", None)
            if name is None or describe(name).kind != kind:
                raise ValueError(f"{kind}s={one!r}: must be the name of a {kind}, or its name and options")
            made.append(Network(name, f"{model}_{name}", size | {"attn_kwargs": own or options.get(name, {})}))
    return made


def step_costs(setting: Setting, compared: list[Network], device: str, repeats: int) -> list[dict]:
    """Parameters, operations, time and memory of each model; a step is forward + backward of a batch."""
    torch.manual_seed(0)
    images = torch.randn(setting.batch, setting.in_chans, 32, 32, device=device)
    labels = torch.randint(10, (setting.batch,), device=device)
    models = [timm.create_model(one.model, num_classes=10, **one.args).to(device) for one in compared]

    def step(model):
        loss = F.cross_entropy(model(images), labels)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    calls = {i: (lambda model=model: step(model)) for i, model in enumerate(models)}
    for call in calls.values():
        call()
    taken = times(calls, device, least=repeats)
    return [
        {
            "parameters": parameters(model),
            "step ms": round(statistics.median(taken[i]), 1),
            "step MiB": round(peak_memory(calls[i], device), 1),
            "MFLOP of an image": round(flops(model.eval(), images[:1]) / 1e6, 2),
        }
        for i, model in enumerate(models)
    ]


def compare(
    mixers: list[str | dict] | None = None,
    gates: list[str | dict] | None = None,
    data: list[str] | None = None,
    dir: str | None = None,
    epochs: int | None = None,
    seeds: int = 2,
    depth: int | None = None,
    options: dict[str, dict] | None = None,
    training: list[str] | None = None,
    repeats: int = 5,
    device: str = "cpu",
    threads: int = 1,
    jobs: int = 1,
    runs: str = "runs/mixers",
    path: str | None = None,
) -> None:
    """Trains every mixer with every seed on every data set, and writes what came out.

    Args:
        mixers: names, or names with options ({name: window, kernel_size: 3}); null: all.
        gates: likewise, in a ResNet; null: none.
        data: digits, cifar10, pathfinder (or pathfinder/LEVEL), folder; null: digits, and cifar10 if dir is given.
        dir: root of CIFAR-10, or of the folder.
        epochs: of each run; null: 3 of CIFAR-10, 6 of Pathfinder, 10 of others.
        seeds: runs of each mixer.
        depth: layers of the ViT; null: 4 for Pathfinder, 2 for others.
        options: of blocks that are given without, by name; of others those that fit the grid.
        training: further words for train_imagenet.py, the same for all runs.
        repeats: timed steps of each; the median counts.
        device: cpu or cuda.
        threads: of torch.
        jobs: runs at a time.
        runs: folder for the runs.
        path: CSV to write; null names it by machine and date under results/.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    data = data or ["digits", *(["cifar10"] if dir else [])]
    for name in data:
        if name.partition("/")[0] not in SETTINGS:
            raise ValueError(f"data={name!r}: must be {', '.join(SETTINGS)} or pathfinder/LEVEL")
    there = [name for name in data if name in ("cifar10", "folder")]
    if len(there) > 1 or (there and dir is None):
        raise ValueError(f"dir={dir!r}: must be the root of {' or '.join(there)}, of one of them in a call")
    mixers = [name for name in list_blocks() if describe(name).kind == "mixer"] if mixers is None else mixers
    compared, known = {}, {}
    for name in data:
        setting = setting_of(name)
        fitting = AT_8X8 if setting.vit == PATCHES[0] else AT_16X16
        compared[name] = networks(setting, mixers, gates or [], depth, fitting | (options or {}))
        costs = Path(runs, f"steps-{mark(compared[name], setting.batch, device, threads)}.csv")
        if not costs.exists():
            costs.parent.mkdir(parents=True, exist_ok=True)
            write_rows(costs, step_costs(setting, compared[name], device, repeats))
        known[name] = read_rows(costs)

    def run(what) -> float | None:
        seed, name, place = what
        setting, one = setting_of(name), compared[name][place]
        length = epochs or setting.epochs
        words = ["--model.name", one.model, "--model.args", json.dumps(one.args), "--data.name", name]
        words += [*RECIPE.split(), *setting.words.split(), "--batch-size", setting.batch, "--device", device]
        words += [*(training or []), *(["--data.train-images", setting.images] if setting.images else [])]
        words += ["--epochs", length, "--seed", seed, "--threads", threads]
        output = Path(runs, f"{name.replace('/', '_')}-{one.block or one.model}-{seed}-{mark(words)}")
        place = {"pathfinder": Path(runs, "pathfinder"), **dict.fromkeys(there, dir)}.get(name.partition("/")[0])
        words += ["--output", output, "--resume", "auto", *(["--data.dir", place] if place else [])]
        return trained(list(map(str, words)), output, length)

    found: dict[tuple[str, int], list[float]] = {}
    asked = [(*of, place) for of in product(range(seeds), data) for place in range(len(compared[of[1]]))]
    for (_, name, place), top1 in outcomes(run, asked, jobs):
        if top1 is None:  # it was stopped, so stop
            break
        found.setdefault((name, place), []).append(top1)
        rows = table(found, known, compared, epochs)
        path = write(path, "mixer-accuracy", rows, device)
    if found:
        path.with_suffix(".txt").write_text(text(rows), encoding="utf-8")
        picture(rows, path.with_suffix(".png"))


def outcomes(run: Callable, asked: list[tuple], jobs: int) -> Iterator[tuple]:
    """What was asked for and what came out, ``jobs`` at a time, as they are done."""
    if jobs == 1:  # in this thread
        yield from ((what, run(what)) for what in asked)
        return
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, what): what for what in asked}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def setting_of(name: str) -> Setting:
    """Of data that may have a level behind their name."""
    return SETTINGS[name.partition("/")[0]]


def mark(*asked) -> str:
    """Eight letters that change with anything that is asked for: what was made otherwise is not taken for it."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]


def trained(words: list[str], output: Path, epochs: int) -> float | None:
    """Top-1 accuracy after the last epoch, of a run that may be done already; NaN if it diverged, None if stopped."""
    last = output / "last.pt"
    if not last.exists() or checkpoint.load(last)["epoch"] < epochs:
        done = subprocess.run([sys.executable, ROOT / "train_imagenet.py", *words])
        if done.returncode == 1:  # its loss was not finite
            return float("nan")
        done.check_returncode()
    saved = checkpoint.load(last)
    return saved["history"][-1]["top1"] if saved["epoch"] >= epochs else None


def table(found: dict, known: dict, compared: dict, epochs: int | None) -> list[dict]:
    """What is there so far, by data set, host and accuracy."""
    rows = []
    for (name, place), top1 in found.items():
        one, setting = compared[name][place], setting_of(name)
        options = " ".join(f"{option}={value}" for option, value in one.args.get("attn_kwargs", {}).items())
        row = {"mixer": one.block or "none", "options": options, "depth": one.args.get("depth", ""), "data": name}
        row |= {"images": setting.images or "all", "epochs": epochs or setting.epochs, "seeds": len(top1)}
        row |= {"top-1 %": f"{statistics.mean(top1):.2f}", "spread": f"{max(top1) - min(top1):.2f}"}
        rows.append(row | known[name][place])
    return sorted(rows, key=lambda row: (*panel(row), row["top-1 %"] == "nan", -float(row["top-1 %"])))


def panel(row: dict) -> tuple[str, str]:
    """Data and host of a row: what it can be compared with."""
    return row["data"], setting_of(row["data"]).vit if row["depth"] else RESNET


def text(rows: list[dict]) -> str:
    """The table in aligned columns."""
    widths = [max(len(str(row[column])) for row in [*rows, dict(zip(rows[0], rows[0]))]) for column in rows[0]]
    lines = [
        "  ".join(
            f"{cell!s:{'<' if place in (0, 1, 3) else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(line, widths))
        )
        for line in [rows[0], *(row.values() for row in rows)]
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def picture(rows: list[dict], target: Path) -> None:
    """Accuracy against the time of a step, a panel for each data set; the area of a point is the memory of a step."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["top-1 %"] != "nan"]  # which diverged
    names = list(dict.fromkeys(map(panel, rows)))
    if not rows:
        return
    figure = Figure(figsize=(11, 7 * len(names)), dpi=120, layout="constrained")
    figure.supxlabel(
        "area: peak memory of a step; bars: from the lowest run to the highest, about the mean", fontsize=9
    )
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axis, (data, host) in zip(panels, names):
        some = [row for row in rows if panel(row) == (data, host)]
        x, y, spread, memory = ([float(row[c]) for row in some] for c in ("step ms", "top-1 %", "spread", "step MiB"))
        colors = ["tab:red" if row["mixer"] in ("dense", "none") else "tab:blue" for row in some]
        axis.errorbar(x, y, [s / 2 for s in spread], fmt="none", ecolor="0.75", linewidth=1, zorder=1)
        axis.scatter(x, y, [200 * m / max(memory) for m in memory], colors, alpha=0.6, linewidth=0, zorder=2)
        images = setting_of(data).batch
        axis.set(xscale="log", xlabel=f"forward + backward of {images} images, ms", ylabel="top-1, %")
        layers = f"{some[0]['depth']} layers, " if some[0]["depth"] else ""
        runs = " or ".join(sorted({str(row["seeds"]) for row in some}, key=int))
        axis.set_title(f"{data}, {host}, {layers}{some[0]['epochs']} epochs, {runs} runs each")
        ticks = [n * 10**power for power in range(6) for n in (1, 1.5, 2, 3, 5, 7)]
        axis.set_xticks([t for t in ticks if min(x) / 1.3 < t < 1.3 * max(x)], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.1)
        axis.grid(alpha=0.3)
        label(axis, x, y, [row["mixer"] for row in some], colors)
    figure.savefig(target)


def label(axis, x: list[float], y: list[float], texts: list[str], colors: list[str]) -> None:
    """Names beside the points, moved until none hides another."""
    from adjustText import adjust_text

    notes = [axis.text(*at, text, fontsize=8, color=color) for *at, text, color in zip(x, y, texts, colors)]
    line = dict(arrowstyle="-", color="0.6", linewidth=0.6)
    adjust_text(notes, x, y, ax=axis, expand=(1.15, 1.5), force_text=(0.3, 0.5), iter_lim=2000, arrowprops=line)


if __name__ == "__main__":
    sys.exit(auto_cli(compare))
