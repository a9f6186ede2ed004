"""Every attention alone: what is measured is written, growth is fitted, and a run that was stopped goes on."""

import csv
import math

import pytest
import torch
from conftest import OFTEN, every_mixer
from scripts import load

from vision_attn import Grid, create_block, describe, list_blocks

attention = load("benchmarks/attention")


@pytest.mark.parametrize("names", [OFTEN, pytest.param(list_blocks(), marks=pytest.mark.slow)], ids=["few", "all"])
def test_benchmark_writes_ratios(tmp_path, names):
    path = tmp_path / "out" / "mixers.csv"
    causal = [dict(name=name, causal=True) for name in names if describe(name).causal]
    options = dict(heads=4, channels=8, repeats=1, blocks=[*names, *causal] if names is OFTEN else None)
    attention.benchmark(sizes=((3, 5), (7, 5)), path=str(path), dense_limit=20, **options)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# python ")
    rows = list(csv.DictReader(lines[1:]))
    assert len(rows) == 2 * (len(names) + len(causal))
    for row in rows:
        measured = [value for name, value in row.items() if " " in name and value != "not run"]
        assert len(measured) >= 4 and all(float(value) >= 0 for value in measured)
        steps = getattr(create_block(row["block"], 32), "steps", ())
        masked = row["height"] == "3" and bool(steps) and all(hasattr(step, "pattern") for step in steps)
        assert (row["step: masked / block"] == "not run") != masked
    assert path.with_suffix(".png").stat().st_size > 1000
    growth = list(csv.DictReader(path.with_name("mixers-exponents.csv").read_text(encoding="utf-8").splitlines()[1:]))
    assert len(growth) == len(rows) / 2
    assert all(math.isfinite(float(row[f"{what}, exponent"])) for row in growth for what in ("time", "memory"))
    with path.open("w", newline="", encoding="utf-8") as file:  # as if it had been stopped
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows[:-2])
    attention.benchmark(sizes=((3, 5), (7, 5)), resume=str(path), dense_limit=20, **options)
    again = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:]))
    assert again[:-2] == rows[:-2] and len(again) == len(rows)
    assert [row["block MiB"] for row in again] == [row["block MiB"] for row in rows]
    path.with_suffix(".png").unlink()
    attention.benchmark(
        sizes=((3, 5), (7, 5)), resume=str(path), blocks=options["blocks"]
    )  # nothing is left to measure
    assert path.with_suffix(".png").stat().st_size > 1000 and len(path.read_text().splitlines()) == len(lines)


def test_several_images_make_up_the_positions_asked_for(tmp_path):
    path, options = tmp_path / "mixers.csv", dict(heads=2, channels=8, repeats=1, blocks=["window", "cbam"])
    attention.benchmark(sizes=((3, 5), (7, 5)), positions=110, path=str(path), **options)
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:]))
    assert [(row["height"], row["batch"]) for row in rows] == [("3", "7")] * 2 + [("7", "3")] * 2


def test_benchmark_runs_attention_alone_where_that_is_all():
    mixers = [create_block(name, 96) for name in list_blocks() if describe(name).kind == "mixer"]
    whole = {type(made).__module__.rpartition(".")[2] for made in mixers if attention.runs_whole(made)}
    assert whole == {"fourier", "inducing_points", "star", "residual_logits"}


@every_mixer
def test_a_mixer_is_timed_on_queries_and_keys_as_it_makes_them(block, monkeypatch):
    """Of fewer channels than its values, or more."""
    made, grid, given = create_block(block, 96, num_heads=3), Grid(3, 5), []
    if attention.runs_whole(made):
        (out,) = attention.calls_of(made, 3, 32, grid, "cpu", torch.float32, False, False)["block"]()
        assert out.shape == (1, grid.size, 96)
        return
    for step in made.steps:
        monkeypatch.setattr(step, "mix", lambda *parts, step=step: given.append((step, parts)) or parts[2])
    attention.calls_of(made, 3, 32, grid, "cpu", torch.float32, False, False)["block"]()
    for step, (*parts, at) in given:
        assert [t.shape for t in parts] == [t.shape for t in step.heads(torch.zeros(1, grid.size, 96), grid)]
        assert at == grid and all(t.requires_grad for t in parts)
    assert len(given) == len(made.steps)


def test_benchmark_tells_from_which_size_a_block_wins():
    def row(block, side, ms):
        return {"block": block, "options": "", "height": side, "width": side, "step ms": ms, "block MiB": 1}

    dense = [row("dense", side, side**4) for side in (2, 3, 5, 7)]
    linear = [row("linear", side, 11 * side**2) for side in (2, 3, 5, 7)]
    slow = [row("slow", side, 9 * side**4) for side in (2, 3, 5, 7)]
    found = {each["block"]: each for each in attention.growth([*dense, *linear, *slow])}
    assert [found[n]["time: wins from"] for n in ("dense", "linear", "slow")] == ["never", "5×5", "never"]
    assert [found[n]["time, exponent"] for n in ("dense", "linear", "slow")] == ["2.00", "1.00", "2.00"]
    assert found["linear"]["time: dense / block at the largest"] == f"{7**2 / 11:.2f}"


def test_benchmark_fits_exponents():
    exponent = attention.exponent
    assert exponent([1, 10, 1000], [7, 70, 7000]) == pytest.approx(1)
    assert exponent([2, 3, 5], [4 * 3, 9 * 3, 25 * 3]) == pytest.approx(2)
