"""Time and memory of every block beside dense attention, with and without the pattern as a mask, all in one run.

    python benchmarks/attention.py
    python benchmarks/attention.py --blocks '[criss_cross, {name: strided, causal: true}]' --sizes '[[64, 64]]'
    python benchmarks/attention.py --device cuda
    python benchmarks/attention.py --resume results/FILE.csv

For each block and size, forward and forward + backward ("step"): milliseconds (minimum over interleaved repeats), peak
memory of a step beyond the inputs, floating-point operations of a forward. Dense is torch's attention without a mask
(of a causal block: with `is_causal`); masked is the same with the block's pattern as a boolean mask (that of the first
head for all: one for each would be slower still). A block that is more than one attention after another, and a gate,
runs whole, projections included. Machines are noisy: trust the ratios. Writes a CSV, a plot of
time and memory against the number of pixels with fitted exponents, and these in a second CSV, with the size from
which on each block beats dense.
"""

import itertools
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from tqdm import tqdm

from training.results import read, write
from vision_attn import Gate, Grid, Mixer, create_block, describe, list_blocks
from vision_attn.cost import clock, counting, peak_memory


def calls_of(
    made: Mixer | Gate,
    heads: int,
    channels: int,
    grid: Grid,
    device: str,
    dtype: torch.dtype,
    dense: bool,
    masked: bool,
    batch: int = 1,
) -> dict[str, Callable]:
    """Attention of all steps of a block by each route: its own and, if asked for, dense and masked.

    Its own of the queries, keys and values that it makes, which may have fewer or more channels.
    """
    steps = steps_of(made)
    q, k, v = (
        torch.randn(batch, heads, grid.size, channels, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    if isinstance(made, Gate):
        x = torch.randn(batch, heads * channels, *grid, device=device, dtype=dtype)
        calls = {"block": lambda: [made(x)]}
    else:
        x = torch.randn(batch, grid.size, heads * channels, device=device, dtype=dtype)
        if runs_whole(made):
            calls = {"block": lambda: [made(x, grid)]}
        else:
            own = [[t.detach().requires_grad_() for t in step.heads(x, grid)] for step in steps]
            calls = {"block": lambda: [step.mix(*parts, grid) for step, parts in zip(steps, own)]}
    if dense:
        causal = [isinstance(step, Mixer) and step.causal for step in steps]
        calls["dense"] = lambda: [F.scaled_dot_product_attention(q, k, v, is_causal=past) for past in causal]
    if masked:
        masks = [step.pattern.by_head()[0].mask(grid, device=device) for step in steps]
        calls["masked"] = lambda: [F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in masks]
    return calls


def steps_of(made: Mixer | Gate) -> tuple:
    """The attentions that it does one after the other, or the block itself."""
    return (made.steps if isinstance(made, Mixer) else ()) or (made,)


def runs_whole(made: Mixer) -> bool:
    """Whether it is no attention after another: it has no such steps, or they are not all that it does."""
    return not made.steps or (len(made.steps) > 1 and hasattr(made, "reference"))


def forward(call: Callable) -> Callable[[], None]:
    def run():
        with torch.no_grad():
            call()

    return run


def step(call: Callable) -> Callable[[], None]:
    return lambda: sum(out.sum() for out in call()).backward()


def measure(
    name: str,
    options: dict,
    grid: Grid,
    heads: int,
    channels: int,
    repeats: int,
    device: str,
    dtype,
    dense_limit: int,
    positions: int | None = None,
) -> dict:
    """One row of the table."""
    of_heads = dict(num_heads=heads) if describe(name).kind == "mixer" else {}
    made = create_block(name, heads * channels, **of_heads, **options).to(device, dtype)
    dense = grid.size <= dense_limit
    masked = dense and all(hasattr(step, "pattern") for step in steps_of(made))
    batch = max(1, (positions or 1) // grid.size)
    calls = calls_of(made, heads, channels, grid, device, dtype, dense, masked, batch)
    timed = {(route, kind.__name__): kind(call) for route, call in calls.items() for kind in (forward, step)}
    best = dict.fromkeys(timed, math.inf)
    for _, key in itertools.product(range(repeats), timed):
        best[key] = min(best[key], clock(timed[key], device))
    row = titles(name, options) | dict(height=grid.height, width=grid.width) | ({"batch": batch} if positions else {})
    for kind in ("forward", "step"):
        row[f"{kind} ms"] = f"{best['block', kind]:.2f}"
        for other in ("dense", "masked"):
            ms = best.get((other, kind))
            row[f"{kind}: {other} / block"] = f"{ms / best['block', kind]:.2f}" if ms else "not run"
    for route in ("block", "dense", "masked"):
        row[f"{route} MiB"] = f"{peak_memory(step(calls[route]), device):.3f}" if route in calls else "not run"
    for route in ("block", "dense"):
        with counting() as counter:
            calls.get(route, list)()
        row[f"{route} GFLOP"] = f"{counter.get_total_flops() / 1e9:.3f}" if route in calls else "not run"
    return row


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of a straight line through log values against log sizes."""
    x, y = (torch.tensor(some).double().log() for some in (sizes, values))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def growth(rows: list[dict]) -> list[dict]:
    """How time and memory of a step grow with the number of pixels N, and from which size on each block beats dense.

    Dense is the row of that block, causal for causal ones, of the same run. The exponent is of N: 1 is linear.
    """
    found = []
    for name in dict.fromkeys(map(label, rows)):
        some = sorted((row for row in rows if label(row) == name), key=lambda row: row["height"] * row["width"])
        sizes = [row["height"] * row["width"] for row in some]
        if len(set(sizes)) < 2:
            continue
        baseline = "dense causal=True" if "causal=True" in name else "dense"
        dense = {(row["height"], row["width"]): row for row in rows if label(row) == baseline}
        summary = {"block": some[0]["block"], "options": some[0]["options"], "of": f"{len(sizes)} sizes"}
        for column, title in (("step ms", "time"), ("block MiB", "memory")):
            summary[f"{title}, exponent"] = f"{exponent(sizes, [float(row[column]) for row in some]):.2f}"
            wins, largest = "not run", "not run"
            pairs = [(row, dense.get((row["height"], row["width"]))) for row in some]
            pairs = [(row, other) for row, other in pairs if other]
            if pairs:
                ratios = [float(other[column]) / float(row[column]) for row, other in pairs]
                lost = [place for place, ratio in enumerate(ratios) if ratio <= 1]
                first = lost[-1] + 1 if lost else 0  # behind the last size where it loses
                row = pairs[first][0] if first < len(pairs) else None
                wins, largest = f"{row['height']}×{row['width']}" if row else "never", f"{ratios[-1]:.2f}"
            summary[f"{title}: wins from"] = wins
            summary[f"{title}: dense / block at the largest"] = largest
        found.append(summary)
    return found


def titles(name: str, options: dict) -> dict[str, str]:
    """The columns that say what a row is about."""
    return {"block": name, "options": " ".join(f"{option}={value}" for option, value in options.items())}


def label(row: dict) -> str:
    return f"{row['block']} {row['options']}".strip()


def plot(rows: list[dict], target: Path) -> None:
    """Time and memory of a step against pixels, both logarithmic: a panel for each block, dense in gray."""
    from matplotlib.figure import Figure

    of = {name: [row for row in rows if row["block"] == name] for name in dict.fromkeys(row["block"] for row in rows)}
    across = min(8, len(of))
    down = math.ceil(len(of) / across)
    figure = Figure(figsize=(1 + 2.2 * across, 2 + 3.6 * down), dpi=100, layout="constrained")
    shown = ("step ms", "forward + backward, ms"), ("block MiB", "peak memory of a step, MiB")
    for half, (column, unit) in zip(figure.subfigures(2, 1), shown):
        half.suptitle(f"{unit}, against pixels N (gray: dense; dashed: causal)")
        panels = half.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
        for (name, own), axis in zip(of.items(), panels):  # in this order, which takes no panel too many
            axis.set(xscale="log", yscale="log")
            axis.set_title(name, fontsize=8)
            axis.grid(alpha=0.3)
            draw(axis, of.get("dense", []), column, color="0.8")
            axis.legend(handles=draw(axis, own, column), fontsize=6, loc="upper left", frameon=False)
        for axis in panels:  # left over
            axis.set_axis_off()
    figure.savefig(target)


def draw(axis, rows: list[dict], column: str, **style) -> list:
    """A line for each set of options of a block, dashed where causal, with its exponent."""
    lines = []
    for options in dict.fromkeys(row["options"] for row in rows):
        some = [row for row in rows if row["options"] == options]
        sizes, values = [row["height"] * row["width"] for row in some], [float(row[column]) for row in some]
        grows = f"N^{exponent(sizes, values):.2f}" if len(set(sizes)) > 1 else ""
        dashes = "--" if "causal=True" in options else "-"
        lines += axis.plot(sizes, values, dashes, marker=".", label=f"{options} {grows}".strip(), **style)
    return lines


def benchmark(
    blocks: list[str | dict] | None = None,
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (32, 32), (64, 64)),
    heads: int = 4,
    channels: int = 64,
    repeats: int = 5,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    dense_limit: int = 128 * 128,
    positions: int | None = None,
    path: str | None = None,
    resume: str | None = None,
) -> None:
    """Writes a CSV of times, memory and operations, and a plot beside it.

    Args:
        blocks: names, or maps of "name" and options. null: all, and all that can be causal as such.
        sizes: grids, (height, width).
        heads: of the blocks.
        channels: of a head.
        repeats: timed calls of each kind; the fastest counts.
        device: cpu or cuda.
        dtype: float32, bfloat16, float16 or float64.
        threads: CPU threads.
        dense_limit: positions up to which dense attention is timed beside, with and without the N×N mask.
        positions: of all images together, as many images as that takes; null: of one image.
        path: of the CSV; null names it by device, torch version and date under results/.
        resume: instead, the CSV of a stopped run, to measure what it has no row of.
    """
    warnings.simplefilter("ignore")  # of blind spots, which are no matter of speed
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if blocks is None:
        blocks = list_blocks() + [dict(name=name, causal=True) for name in list_blocks() if describe(name).causal]
    rows = []
    if resume:
        path = Path(resume)
        rows = [row | {side: int(row[side]) for side in ("height", "width")} for row in read(resume)]
    known = {(label(row), row["height"], row["width"]) for row in rows}
    left = []
    for size, block in itertools.product(sizes, blocks):
        options = {"name": block} if isinstance(block, str) else dict(block)
        name = options.pop("name")
        if (label(titles(name, options)), *size) not in known:
            left.append((name, options, Grid(*size)))
    for what in tqdm(left, unit=" rows"):
        rows.append(measure(*what, heads, channels, repeats, device, getattr(torch, dtype), dense_limit, positions))
        path = write(path, "mixers", rows, device)  # after every row: it may be stopped
    plot(rows, path.with_suffix(".png"))
    if summaries := growth(rows):
        write(path.with_name(f"{path.stem}-exponents.csv"), "mixers-exponents", summaries, device)


if __name__ == "__main__":
    sys.exit(auto_cli(benchmark))
