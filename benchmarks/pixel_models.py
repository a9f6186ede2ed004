"""Measure pixel models: what patterns are worth in bits, how fast they sample, what a training step costs.

    python benchmarks/pixel_models.py bits
    python benchmarks/pixel_models.py sampling
    python benchmarks/pixel_models.py step

`bits` trains every variant with every seed by train_pixels.py (a finished run is kept: start again after a stop), and
writes the mean and the spread of the last test bits per dimension, beside what two simple models of the same images
reach. `sampling` draws 32×32×3 images from one set of weights with each cache. `step` times a training step of whole
models beside the dense one.
"""

import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import backbones  # noqa: F401  registers the named models
from training.datasets import Digits
from training.results import write
from vision_attn import Grid

VARIANTS = {
    "strided by head": {},
    "strided interleaved": [{"name": "strided", "part": part} for part in ("local", "column")],
    "strided merged": "strided",
    "fixed c=2": {"name": "fixed", "c": 2},
    "factored by head": "factored",
    "two-stream axial": None,
    "linear": "linear",
    "dense": "dense",
    "row and column by layer (blind spot)": [{"name": "factored", "part": part} for part in ("row", "column")],
}
CONFIG = "configs/digits_pixels.yaml"


def bits(seeds: int = 3, runs: str = "runs/bits", path: str | None = None) -> None:
    """Bits per dimension on digits of all variants, at equal steps and about equal parameters.

    Args:
        seeds: runs of each variant.
        runs: folder for the runs.
        path: of the CSV; null names it under results/.
    """
    table = []
    for (variant, blocks), seed in tqdm([(v, s) for s in range(seeds) for v in VARIANTS.items()], unit=" runs"):
        output = Path(runs) / f"{variant.replace(' ', '-')}-{seed}"
        if not (output / "done").exists():
            model = ["--model.name", "pixel_digits_axial"] if blocks is None else []
            model += (
                ["--model.args.blocks", blocks if isinstance(blocks, str) else json.dumps(blocks)] if blocks else []
            )
            command = [sys.executable, "train_pixels.py", "--config", CONFIG, "--seed", str(seed), *model]
            options = ["--output", str(output), "--target_bits", "null", "--pictures.every", "0"]
            subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
            (output / "done").touch()
        last = list(csv.DictReader(open(output / "log.csv", encoding="utf-8")))[-1]
        state = torch.load(output / "last.pt", weights_only=True)["state_dict"]
        parameters = sum(value.numel() for value in state.values())
        table.append((variant, parameters, float(last["test_bits"]), float(last["train_bits"]), int(last["step"])))
    rows = [
        dict(model=name, parameters="", steps="", test_bits=f"{value:.3f}", spread="", train_bits="", seeds="")
        for name, value in simple_models().items()
    ]
    for variant in VARIANTS:
        some = [row for row in table if row[0] == variant]
        test, train = ([row[i] for row in some] for i in (2, 3))
        rows.append(
            dict(
                model=variant,
                parameters=some[0][1],
                steps=some[0][4],
                test_bits=f"{statistics.mean(test):.3f}",
                spread=f"{max(test) - min(test):.3f}",
                train_bits=f"{statistics.mean(train):.3f}",
                seeds=" ".join(f"{value:.4f}" for value in test),
            )
        )
    write(path, "digits-bits", rows)


def simple_models() -> dict[str, float]:
    """Bits per dimension on the test digits of counts, one added to each: of every pixel, and given the value left."""
    train, test = (
        torch.stack([pil_to_tensor(image)[0] for image, _ in Digits(train=is_train, raw=True)]).long()
        for is_train in (True, False)
    )
    pixel = torch.arange(64).reshape(8, 8)
    left = [F.pad(images, (1, 0), value=17)[..., :-1] for images in (train, test)]  # 17: there is none
    bits, models = {}, {"per-pixel marginal": ((64,), [(), ()]), "left bigram": ((64, 18), [(x,) for x in left])}
    for name, (shape, given) in models.items():
        seen, asked = ((pixel.expand_as(images), *more, images) for images, more in zip((train, test), given))
        counts = torch.ones(*shape, 17).index_put_(seen, torch.tensor(1.0), accumulate=True)
        bits[name] = -(counts / counts.sum(-1, keepdim=True))[asked].log2().mean().item()
    return bits


def sampling(
    batches: tuple[int, ...] = (1, 16),
    depth: int = 12,
    dim: int = 256,
    heads: int = 4,
    threads: int = 1,
    path: str | None = None,
) -> None:
    """Values a second while sampling whole 32×32×3 images, and the memory of the cache.

    Without a cache every value takes a forward pass of the whole image, of which some are timed.

    Args:
        batches: images drawn at once.
        depth, dim, heads: of the model.
        threads: CPU threads.
        path: of the CSV; null names it under results/.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    split = {"name": "strided", "split_heads": True}
    kinds = [
        ("dense", "dense", None),
        ("dense", "dense", "full"),
        ("strided by head", split, None),
        ("strided by head", split, "full"),
        ("strided by head", split, "pattern"),
        ("strided merged", "strided", "pattern"),
        ("fixed c=8", {"name": "fixed", "c": 8}, "full"),
        ("fixed c=8", {"name": "fixed", "c": 8}, "pattern"),
        ("factored by head", "factored", "pattern"),
        ("linear", "linear", None),
        ("linear, recurrent", "linear", "pattern"),
    ]
    rows = []
    for batch, (name, blocks, cache) in tqdm([(b, k) for b in batches for k in kinds], unit=" rows"):
        model = timm.create_model("pixel_cifar10", depth=depth, dim=dim, num_heads=heads, blocks=blocks).eval()
        seconds, values, held = _sample(model, batch, cache)
        row = {"model": name, "cache": cache or "none", "batch": batch}
        row |= {"values/s": f"{batch * values / seconds:.2f}", "cache MiB": f"{held / 2**20:.2f}"}
        rows.append(row)
    for row in rows:
        same = {(r["model"], r["cache"]): float(r["values/s"]) for r in rows if r["batch"] == row["batch"]}
        speed = float(row["values/s"])
        plain = same.get((row["model"].removesuffix(", recurrent"), "none"))
        full = same.get((row["model"], "full"), same["dense", "full"])
        row["times no cache"] = f"{speed / plain:.1f}" if plain else "not run"
        row["times full cache"] = f"{speed / full:.2f}"
    write(path, "sampling", rows)


@torch.inference_mode()
def _sample(model, batch: int, cache: str | None) -> tuple[float, int, int]:
    """Seconds, values drawn in them for each image, and bytes of the caches."""
    images = torch.randint(0, model.levels, (batch, model.in_chans, *model.img_size))
    if cache is None:
        repeats = max(1, 4 // batch)
        start = time.perf_counter()
        for _ in range(repeats):
            model(images)
        return time.perf_counter() - start, repeats, 0
    grid = Grid(model.img_size[0], model.img_size[1] * model.in_chans)
    caches = model.new_caches(batch, full=cache == "full")
    values = torch.zeros(batch, grid.size, dtype=torch.long)
    start = time.perf_counter()
    for place in range(grid.size):
        logits = model.step(values[:, place - 1], place, caches)
        values[:, place] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return time.perf_counter() - start, grid.size, sum(one.nbytes for one in caches)


def step(
    batch: int = 1,
    depth: int = 4,
    dim: int = 256,
    heads: int = 4,
    repeats: int = 3,
    threads: int = 1,
    path: str | None = None,
) -> None:
    """Milliseconds of a training step of whole models on 32×32×3 images (N = 3,072), and of their attention alone.

    Args:
        batch: images of a step.
        depth, dim, heads: of the models.
        repeats: timed steps, interleaved over the models; the fastest counts.
        threads: CPU threads.
        path: of the CSV; null names it under results/.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kinds = {"dense": "dense", "strided by head": {"name": "strided", "split_heads": True}, "strided merged": "strided"}
    kinds |= {"fixed c=8": {"name": "fixed", "c": 8}, "factored by head": "factored", "linear": "linear"}
    models = {
        name: timm.create_model("pixel_cifar10", depth=depth, dim=dim, num_heads=heads, blocks=blocks)
        for name, blocks in kinds.items()
    }
    images = torch.randint(0, 256, (batch, 3, 32, 32))
    grid = Grid(32, 96)
    q, k, v = (torch.randn(batch, heads, grid.size, dim // heads, requires_grad=True) for _ in range(3))
    best = {}
    for _ in range(repeats):
        for name, model in models.items():
            calls = {
                "model": lambda model=model: model.bits_per_dim(images).backward(),
                "attention": lambda model=model: model.blocks[0].attn.mix(q, k, v, grid).sum().backward(),
            }
            for what, call in calls.items():
                start = time.perf_counter()
                call()
                best[name, what] = min(best.get((name, what), float("inf")), 1e3 * (time.perf_counter() - start))
    rows = []
    for name in models:
        row = {"model": name}
        for what in ("model", "attention"):
            row[f"{what} ms"] = f"{best[name, what]:.1f}"
            row[f"{what}: dense / this"] = f"{best['dense', what] / best[name, what]:.2f}"
        rows.append(row)
    write(path, "pixel-step", rows)


if __name__ == "__main__":
    sys.exit(auto_cli([bits, sampling, step]))
