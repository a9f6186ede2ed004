"""``python -m vision_attn``: every command prints what is so, and bad input gets one line and exit code 2."""

import argparse
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn import Grid, create_block, create_layer, describe, draw, list_blocks
from vision_attn.__main__ import main, option
from vision_attn.cost import flops, parameters
from vision_attn.gate import Gate


@pytest.fixture
def run(capsys):
    """What a command prints, as lines."""

    def call(*words):
        assert main(list(words)) == 0
        return capsys.readouterr().out.splitlines()

    return call


def test_list_says_what_the_registry_says(run):
    lines = run("list", "*cross*") + run("list", "linear") + run("list", "cbam")
    assert [line.split()[:2] for line in lines] == [["criss_cross", "mixer"], ["linear", "mixer"], ["cbam", "gate"]]
    assert [line.split()[2] == "causal" for line in lines] == [False, True, False]
    assert all(describe(line.split()[0]).cost in line and describe(line.split()[0]).url in line for line in lines)


# What a pixel looks at


def test_every_block_shows_where_it_looks(block_name, run):
    lines = run("show", block_name, "--size", "5x7", "--query", "2,4")
    maps = [line for line in lines[3:] if line and " " not in line]
    assert lines[0] == describe(block_name).title and block_name in lines[2] and "5×7" in lines[2]
    assert maps and len(maps) % 5 == 0 and {len(line) for line in maps} == {7}
    for rows in (maps[i : i + 5] for i in range(0, len(maps), 5)):
        assert (rows[2][4] in "@o") == (describe(block_name).kind == "mixer")
        assert sum(line.count("@") + line.count("o") for line in rows) == (describe(block_name).kind == "mixer")


def test_a_pattern_is_drawn_with_its_options(run):
    pattern = create_block("window", 64, kernel_size=(3, 5), causal=True).pattern
    options = ["--set", "kernel_size=(3, 5)", "--set", "causal=true"]
    lines = run("show", "window", "--size", "5x11", "--query", "3,1", *options)
    assert lines[1] == "options: kernel_size=7, border='cut', causal=False"
    assert lines[4:] == ["sees 6 of 55", *pattern.draw(Grid(5, 11), 3, 1).splitlines()]


def test_the_middle_is_shown_unless_asked_otherwise(run):
    assert run("show", "criss_cross", "--size", "5x7")[5:] == ["---#---", "---#---", "###@###", "---#---", "---#---"]


def test_heads_and_steps_have_titles(run):
    seen = [part.mask(Grid(7, 13))[3 * 13 + 6].sum() for part in create_block("per_head", 64).pattern.by_head()]
    heads = [line for line in run("show", "per_head", "--size", "7x13") if "sees" in line]
    assert heads == [f"{of}, sees {n} of 91" for of, n in zip(("heads 1 to 2", "head 3", "head 4"), seen)]
    steps = [line for line in run("show", "axial", "--size", "7x13") if "sees" in line]
    assert steps == ["step 1 of 2, sees 7 of 91", "step 2 of 2, sees 13 of 91"]


def test_weights_are_those_of_the_definition():
    """Of the second step, too, which sees what the first one made."""
    grid, block = Grid(5, 7), create_block("linear", 32, num_heads=2)
    (look,) = draw.looks(block, grid, (3, 2))
    tokens = draw.random_image(32, grid, seed=0).flatten(2).mT
    assert torch.equal(look.weights.flatten(), block.attention(tokens, grid)[0, :, 3 * 7 + 2].mean(dim=0))
    assert look.weights.sum().item() == pytest.approx(1)

    gate = create_block("global_context", 32).eval()
    (look,) = draw.looks(gate, grid, (3, 2))
    assert torch.equal(look.weights, gate.attention_map(draw.random_image(32, grid, seed=0))[0])


def test_a_causal_kernel_is_dark_in_the_past_alone(run):
    rows = run("show", "linear", "--size", "5x7", "--query", "2,3", "--set", "causal=true")[5:]
    after = (rows[2] + rows[3] + rows[4])[4:]
    assert set(after) == {"."} and "." not in rows[0] + rows[1] + rows[2][:4]


def test_the_same_seed_shows_the_same(run):
    first, again, other = (run("show", "performer", "--size", "5x7", "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again != other


def test_blind_spots_are_noted(capsys):
    assert main(["show", "window", "--size", "5x7", "--set", "causal=true"]) == 0
    note = capsys.readouterr().err
    assert note.startswith("note: causal window alone leaves") and note.count("\n") == 1


@pytest.mark.parametrize("block", ["per_head", "linear", "fast_l2", "cbam"])
def test_a_picture_has_a_panel_for_each_look(block, tmp_path, run):
    path = tmp_path / "new" / "look.png"
    assert run("show", block, "--size", "5x7", "--png", str(path)) == [str(path)]
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert run("show", block, "--size", "5x7", "--png", str(path.with_suffix(""))) == [str(path)]
    panels = len(draw.looks(create_block(block, 64), Grid(5, 7), (2, 3)))
    assert image.shape[1] > 300 * panels and image.std() > 10
    red = (abs(image - (214, 39, 40)).sum(axis=2) < 20).sum()  # the query
    assert (red > 20 * panels) == (block != "cbam")


def test_only_a_picture_needs_matplotlib(tmp_path, monkeypatch, capsys):
    program = "import sys, vision_attn.__main__ as m; m.main(['show', 'linear']); print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["show", "linear", "--size", "5x7", "--png", str(tmp_path / "look.png")]) == 2
    assert "vision-attn[train]" in capsys.readouterr().err


# What a block costs


def table(lines):
    """The rows of a printed table by their first word, but for the line above and the lines below."""
    below = "GFLOP", "by its docstring", "as measured", "route:", "Take dense", "Fastest is"
    rows = [line for line in lines[2:] if not line.startswith(below)]
    return {line.split()[0]: line.split()[1:] for line in rows}


@pytest.mark.parametrize("causal", [False, True])
def test_cost_stands_beside_dense(causal, run):
    words = ["--size", "5x7", "--dim", "32", "--seconds", "0", *(["--set", "causal=true"] if causal else [])]
    lines = run("cost", "window", "--set", "kernel_size=3", *words)
    rows = table(lines)
    assert list(rows) == ["window", "dense", "/"] and lines[-1] == "route: union"
    block = create_block("window", 32, kernel_size=3, causal=causal)
    counted = flops(block, torch.randn(1, 35, 32), (5, 7))
    assert float(rows["window"][0]) == pytest.approx(counted / 1e9, rel=0.01)
    assert int(rows["window"][1].replace(",", "")) == parameters(block)
    assert all(float(cell) > 0 for cell in rows["window"][2:] + rows["dense"][2:])
    for own, dense, ratio in zip(rows["window"], rows["dense"], rows["/"][1:]):
        own, dense = (float(cell.replace(",", "")) for cell in (own, dense))
        assert float(ratio) == pytest.approx(own / dense, rel=0.02)


def test_a_gate_costs_what_its_layer_costs(run):
    lines = run("cost", "cbam", "--size", "5x7", "--dim", "32", "--seconds", "0")
    assert "map" in lines[0]
    for name in ("cbam", "dense"):
        assert int(table(lines)[name][1].replace(",", "")) == parameters(create_layer(name, 32))


def test_dense_costs_as_much_as_dense(run):
    rows = table(run("cost", "dense", "--size", "5x7", "--dim", "32", "--seconds", "0"))
    assert list(rows) == ["dense", "/"] and set(rows["/"][1:]) == {"1"}


def test_recommendations_come_fastest_first(run):
    words = "--size", "5x7", "--dim", "32", "--blocks", "[alw]*", "--seconds", "0", "--causal", "--batch", "3"
    lines = run("recommend", *words, "--dtype", "bfloat16")
    rows = table(lines)
    names = [name for name in list_blocks("[alw]*") if describe(name).kind == "mixer" and describe(name).causal]
    assert set(rows) == {"dense", *names} and len(names) >= 2
    assert rows["dense"][2] == rows["dense"][4] == "1"
    times = [float(row[1]) for row in rows.values()]
    (said,) = [line for line in lines if line.startswith(("Fastest is", "Take dense"))]
    faster = [name for name, row in rows.items() if float(row[2]) < 1]
    assert next(iter(faster), "dense") in said and (not faster or f"{len(faster)} of {len(names)}" in said)
    assert times == sorted(times) and lines[0].startswith("causal mixers")
    assert rows["window"][-1] == "union" and len(rows["linear"]) == len(rows["window"]) - 1  # which has no pattern


# Bad input


@pytest.mark.parametrize(
    "words, said",
    [
        ("show cris_cross", "nearest: criss_cross"),
        ("cost cbma", "nearest: cbam"),
        ("list cbma", "nearest: cbam"),
        ("recommend --blocks cbma", "nearest: cbam"),
        ("show axial --size 12", "--size: '12' must be HEIGHTxWIDTH, both ≥ 1"),
        ("cost axial --size 0x7", "--size: '0x7' must be"),
        ("show axial --query 5", "--query: '5' must be Y,X"),
        ("show axial --size 5x7 --query 5,3", "query=(5, 3): must be (y, x) on a 5×7 grid"),
        ("show axial --size 5x7 --query 3,7", "query=(3, 7): must be"),
        ("show axial --set mode", "--set: 'mode' must be NAME=VALUE"),
        ("show axial --set mode=both", "mode='both': must be one of"),
        ("list zz*", "blocks='zz*': no block matches"),
        ("show axial --set nope=1", "--set: nope: no option of axial; it has num_heads, mode"),
        ("show window --set kernel=5", "kernel: no option of window; nearest: kernel_size; it has"),
        ("show axial --size 5x7 --png .", "path='.': is a folder"),
        ("show efficient --size 100000000x100000000", "not enough memory"),
        ("cost axial --size 5x7 --dim 8 --seconds nan", "seconds=nan: must be"),
        ("recommend --size 5x7 --dim 32 --blocks cbam", "nothing to compare: cbam: is a gate"),
        ("show axial --set causal=true", "causal=True: axial can't be causal"),
        ("show axial --dim 0", "dim=0: must be an integer ≥ 1"),
        ("cost axial --dim wide", "--dim: invalid int value: 'wide'"),
        ("cost axial --device abacus", "--device: 'abacus' is not there"),
        ("recommend --dim 0", "dim=0: must be"),
        ("check cbma --device cpu", "nearest: cbam"),
        ("check zz* --device cpu", "blocks='zz*': no block matches"),
        ("check --device abacus", "--device: 'abacus' is not there"),
        ("show", "block"),
        ("draw axial", "'draw'"),
        ("readme nowhere.md", "nowhere.md"),
        ("", "COMMAND"),
    ],
)
def test_bad_input_is_named_in_one_line(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert said in printed.err


@pytest.mark.parametrize(
    "text, value",
    [("a=3", 3), ("a=(3, 5)", (3, 5)), ("a=true", True), ("a=False", False), ("a=sum", "sum"), ("a=None", None)],
)
def test_options_are_literals_or_text(text, value):
    assert option(text) == ("a", value)


def test_an_option_without_a_value_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="'a'"):
        option("a")


def test_a_gate_has_no_query():
    assert isinstance(create_block("cbam", 32), Gate)
    (look,) = draw.looks(create_block("cbam", 32), Grid(5, 7), (0, 0))
    assert "@" not in look.text
