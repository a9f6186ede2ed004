"""Time every mixer's fast path beside its definition and beside dense SDPA, in one run, and write the ratios.

    python benchmark.py
    python benchmark.py --sizes '[[32, 32], [64, 64]]' --device cuda

Times are minima over interleaved repeats. Machines are noisy: trust the ratios, not the milliseconds.
"""

import csv
import datetime
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from vision_attn import Grid, create_block, describe, list_blocks

DEFINITION_LIMIT = 32 * 32  # positions; beyond, the N×N matrix of the definition is not worth its memory


def clock(call: Callable[[], None], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def attention_calls(block: str, heads: int, dim: int, grid: Grid, device: str) -> dict[str, Callable[[], None]]:
    """Fast path and definition, forward and forward + backward; of a block of several steps, all of them."""
    steps = create_block(block, dim, num_heads=heads, device=device).steps
    q, k, v = (torch.randn(1, heads, grid.size, dim // heads, device=device, requires_grad=True) for _ in range(3))

    def run(attend, backward: bool):
        for step in steps:
            with torch.set_grad_enabled(backward):
                out = attend(step)
            if backward:
                out.sum().backward()

    def fast(step):
        return step.mix(q, k, v, grid)

    def definition(step):
        return step.weights(q, k, grid) @ v

    calls = {"forward": lambda: run(fast, False), "step": lambda: run(fast, True)}
    if grid.size <= DEFINITION_LIMIT:
        calls |= {
            "definition forward": lambda: run(definition, False),
            "definition step": lambda: run(definition, True),
        }
    return calls


def benchmark(
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (32, 32), (64, 64)),
    dim: int = 256,
    heads: int = 8,
    repeats: int = 5,
    device: str = "cpu",
    threads: int = 1,
    path: str | None = None,
) -> None:
    """Writes a CSV of times and ratios.

    Args:
        sizes: grids, (height, width).
        dim, heads: of the blocks; batch is 1.
        repeats: timed calls of each kind; the fastest counts.
        device: cpu or cuda.
        threads: CPU threads.
        path: of the CSV; null names it by device, torch version and date under results/.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu{threads}"
    stamp = f"{where.replace(' ', '-')}-torch{torch.__version__.split('+')[0]}-{datetime.date.today()}"
    target = Path(path or f"results/{stamp}-mixers.csv")
    rows, mixers = [], [name for name in list_blocks() if describe(name).kind == "mixer"]
    for size in tqdm(sizes, unit=" sizes"):
        grid = Grid(*size)
        calls = {name: attention_calls(name, heads, dim, grid, device) for name in mixers}
        best = {(name, kind): float("inf") for name in mixers for kind in calls[name]}
        for _, (name, kind) in itertools.product(range(repeats), best):
            best[name, kind] = min(best[name, kind], clock(calls[name][kind], device))
        for name in mixers:
            row = dict(block=name, height=grid.height, width=grid.width)
            for kind in ("forward", "step"):
                ms, definition = best[name, kind], best.get((name, f"definition {kind}"))
                row[f"{kind} ms"] = f"{ms:.3f}"
                row[f"{kind}: dense / block"] = f"{best['dense', kind] / ms:.2f}"
                row[f"{kind}: definition / block"] = f"{definition / ms:.2f}" if definition else "not run"
            rows.append(row)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", newline="", encoding="utf-8") as file:
        file.write(f"# python benchmark.py --dim {dim} --heads {heads} --repeats {repeats} --threads {threads}\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(target)


if __name__ == "__main__":
    sys.exit(auto_cli(benchmark))
