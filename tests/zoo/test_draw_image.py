"""What a block chooses in an image, drawn: ``python -m vision_attn show BLOCK --image FILE``."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn import Grid, create_block, describe, draw
from vision_attn.__main__ import main

GRID, LEFT = Grid(7, 13), 6  # columns of the left half


def halves(height=35, width=65):
    """Orange to the left and blue to the right, a little noisy; five pixels each way are a cell of the grid."""
    noise = 0.1 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    left = torch.arange(width) < width * LEFT // GRID.width
    orange, blue = (torch.tensor(colour)[:, None, None] for colour in ([0.8, 0.5, 0.1], [0.1, 0.3, 0.7]))
    return noise + torch.where(left, orange, blue)


def file_of(image, path, **more):
    Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(path, **more)
    return str(path)


def shown(name, query, heads=2, dim=64, **options):
    torch.manual_seed(0)
    block = create_block(name, dim, num_heads=heads, **options).eval()
    return block, draw.looks(block, GRID, query, image=halves())


def chosen_by(block):
    """The tables of `choose` for the image, of each head."""
    q, k, _ = block.heads(draw.lifted(halves(), block.dim, GRID, seed=0).flatten(2).mT, GRID)
    return block.choose(q, k, GRID)


# What is chosen


@pytest.mark.parametrize("name, options", [("lsh", {}), ("routing", {}), ("clustered", {"cells": 2})])
@pytest.mark.parametrize("half", [slice(LEFT), slice(LEFT, None)])
def test_like_is_put_with_like(name, options, half):
    columns = range(GRID.width)[half]
    found = [look for x in columns for look in shown(name, (3, x), **options)[1]]
    seen = torch.stack([look.weights for look in found])
    assert seen.sum() > 5 * len(found)
    assert seen[:, :, half].sum() > 0.9 * seen.sum()


@pytest.mark.parametrize("name", ["lsh", "routing", "bilevel", "adaptive_connection"])
def test_drawn_is_what_has_weight_for_the_first_four_heads(name):
    options = {"tile": 2} if name == "bilevel" else {"rounds": 3} if name == "lsh" else {}
    block, found = shown(name, (3, 2), heads=5, dim=60, **options)
    tokens = draw.lifted(halves(), 60, GRID, seed=0).flatten(2).mT
    weights = block.attention(tokens, GRID)[0, :4, 3 * 13 + 2].unflatten(1, GRID)
    assert torch.equal(torch.stack([look.weights for look in found]), (weights > 0).float())
    for head, look in enumerate(found, start=1):
        assert look.title == f"head {head} of 5, sees {int(look.weights.sum())} of 91"
        rows = look.text.splitlines()
        assert rows[3][2] == ("@" if look.weights[3, 2] else "o")
        assert [[c in "#@" for c in row] for row in rows] == look.weights.bool().tolist()


def test_of_clusters_that_see_everything_the_own_one_is_drawn():
    block, found = shown("clustered", (3, 2), cells=2)
    cluster, _ = chosen_by(block)
    for head, look in enumerate(found):
        assert torch.equal(look.weights.flatten(), (cluster[0, head] == cluster[0, head, 3 * 13 + 2]).float())
        assert look.title == f"head {head + 1} of 2, answered alike: {int(look.weights.sum())} of 91"
        assert look.text.splitlines()[3][2] == "@"


def test_prob_sparse_shows_who_takes_the_mean_or_whom_an_answered_pixel_sees():
    block, _ = shown("prob_sparse", (0, 0), heads=1, factor=3)
    answered = set(chosen_by(block).flatten().tolist())
    left_out = min(set(range(91)) - answered)
    _, (look,) = shown("prob_sparse", divmod(left_out, 13), heads=1, factor=3)
    assert set((look.weights.flatten() == 0).nonzero().flatten().tolist()) == answered
    assert look.title == f"head 1 of 1, answered alike: {91 - len(answered)} of 91"

    at = min(answered)
    block, (look,) = shown("prob_sparse", divmod(at, 13), heads=1, factor=3)
    weights = block.attention(draw.lifted(halves(), 64, GRID, seed=0).flatten(2).mT, GRID)[0, 0, at]
    assert torch.equal(look.weights.flatten(), weights) and look.title.startswith("head 1 of 1, sees all, weights 0.0")


# What is not chosen


@pytest.mark.parametrize("name", ["window", "linear"])
def test_any_other_mixer_shows_its_weights_for_the_image(name):
    block, (look,) = shown(name, (3, 2))
    tokens = draw.lifted(halves(), 64, GRID, seed=0).flatten(2).mT
    assert torch.equal(look.weights.flatten(), block.attention(tokens, GRID)[0, :, 3 * 13 + 2].mean(dim=0))
    assert look.title.startswith("weights for the image, ")


def test_a_gate_shows_its_weights_for_the_image():
    gate = create_block("cbam", 32).eval()
    (look,) = draw.looks(gate, GRID, (3, 2), seed=5, image=halves())
    assert torch.equal(look.weights, gate.attention_map(draw.lifted(halves(), 32, GRID, seed=5))[0])
    assert look.title.startswith("weights for the image, ")


def test_every_block_shows_an_image(block_name, tmp_path, capsys):
    path = file_of(halves(), tmp_path / "halves.png")
    assert main(["show", block_name, "--image", path, "--size", "5x7", "--query", "2,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    query = "query 2,4" if describe(block_name).kind == "mixer" else "every position"
    assert lines[2] == f"{block_name} on 5×7 of halves.png, {query}"
    maps = [line for line in lines[3:] if line and " " not in line]
    assert maps and len(maps) % 5 == 0 and {len(line) for line in maps} == {7}


# How an image is lifted to channels


def test_tokens_are_alike_where_colours_are_and_places_do_not_count():
    image = halves()
    tokens = draw.lifted(image, 24, GRID, seed=3)
    assert tokens.shape == (1, 24, 7, 13)
    torch.testing.assert_close(draw.lifted(image.flip(2), 24, GRID, seed=3), tokens.flip(3), rtol=1e-4, atol=1e-4)
    larger = image.repeat_interleave(2, dim=1).repeat_interleave(3, dim=2)
    torch.testing.assert_close(draw.lifted(larger, 24, GRID, seed=3), tokens, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw.lifted(image, 24, GRID, seed=4), tokens, atol=0.1)
    left, right = tokens[0, :, :, :LEFT].flatten(1), tokens[0, :, :, LEFT:].flatten(1)
    between = (left.mean(dim=1) - right.mean(dim=1)).norm()
    assert all((part - part.mean(dim=1, keepdim=True)).norm(dim=0).mean() < between / 2 for part in (left, right))


def test_hue_tells_as_much_as_brightness():
    """Brightness differs ten times as much, and without whitening would be all that is told."""
    bright, hue = torch.rand(2, 7, 13, generator=torch.Generator().manual_seed(0))
    image = 0.1 + 0.7 * bright + 0.07 * torch.stack([hue, -hue, 0 * hue]) + 0.07
    tokens = draw.lifted(image, 48, GRID, seed=0).flatten(2)[0]
    for told in (bright, hue):
        told = (told - told.mean()).flatten()
        along = tokens @ told / told.square().sum() ** 0.5
        assert along.norm() > 0.4 * tokens.norm()


def test_one_bright_cell_stands_out_no_further_than_three_standard_deviations():
    image = torch.full((3, *GRID), 0.2)
    image[:, 3, 2] = 1
    tokens = draw.lifted(image, 64, GRID, seed=0)[0].norm(dim=0)
    assert tokens[3, 2] < 50 * tokens[0, 0]  # 90 times, of 91 cells, if it stood out in full


def test_an_image_of_one_colour_and_one_smaller_than_the_grid():
    assert draw.lifted(torch.full((3, 35, 65), 0.3), 24, GRID, seed=0).abs().max() < 1e-3
    assert draw.lifted(halves(2, 3), 24, GRID, seed=0).isfinite().all()


# Files


def test_a_file_is_read_as_rgb_and_turned_as_noted(tmp_path):
    image = halves()
    path = file_of(image, tmp_path / "a.png")
    torch.testing.assert_close(draw.read_image(path), image, rtol=0, atol=1 / 255)
    turned = Image.Exif()
    turned[0x112] = 6  # the camera stood on its right side
    path = file_of(image, tmp_path / "b.png", exif=turned)
    torch.testing.assert_close(draw.read_image(path), image.mT.flip(2), rtol=0, atol=1 / 255)
    Image.new("L", (5, 3), 51).save(tmp_path / "c.png")
    torch.testing.assert_close(draw.read_image(tmp_path / "c.png"), torch.full((3, 3, 5), 0.2))


def test_a_grid_has_the_proportions_of_the_image(tmp_path, capsys):
    for size, grid in [((35, 65), "17×32"), ((65, 35), "32×17"), ((2, 601), "1×32")]:
        path = file_of(halves(*size), tmp_path / "a.png")
        assert main(["show", "lsh", "--image", path, "--dim", "8"]) == 0
        assert f"lsh on {grid} of a.png" in capsys.readouterr().out


def test_a_picture_has_the_image_beside_what_is_seen_in_its_own_colours(tmp_path, capsys):
    path, png = file_of(halves(), tmp_path / "a$x^$.png"), tmp_path / "look.png"
    assert main(["show", "clustered", "--image", path, "--size", "7x13", "--query", "3,2", "--png", str(png)]) == 0
    assert capsys.readouterr() == (f"{png}\n", "")
    drawn = np.asarray(Image.open(png).convert("RGB")).astype(int)
    blue, red = drawn[..., 2] > drawn[..., 0] + 90, (abs(drawn - (214, 39, 40)).sum(axis=2) < 20).sum(axis=0)
    third = drawn.shape[1] // 3
    assert blue[:, :third].any() and not blue[:, third:].any()  # the query is in the left half, and so is what it sees
    assert all((red[third * panel : third * (panel + 1)] > 0).any() for panel in range(3))


@pytest.mark.parametrize("kept", ["missing.png", "", "text.png", "half.png"])
def test_what_is_no_image_is_named(kept, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    file_of(halves(), tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:2000])
    path = str(tmp_path / kept)
    assert main(["show", "lsh", "--image", path]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: image={path!r}: must be an image file: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "image, said",
    [
        (torch.zeros(1, 3, 5, 7), r"image of shape \(1, 3, 5, 7\), torch.float32: must be \(3, h, w\)"),
        (torch.zeros(4, 5, 7), r"image of shape \(4, 5, 7\)"),
        (torch.zeros(3, 0, 7), r"image of shape \(3, 0, 7\)"),
        (torch.zeros(3, 5, 7, dtype=torch.uint8), "torch.uint8: must be .* floating point"),
        (torch.full((3, 5, 7), 255.0), r"image with values 2.6e\+02 to 2.6e\+02: must be within \[0, 1\]"),
        (torch.full((3, 5, 7), torch.nan), "image with values nan to nan: must be within"),
    ],
)
def test_wrong_images_are_refused(image, said):
    with pytest.raises(ValueError, match=said):
        draw.looks(create_block("lsh", 8), GRID, (3, 2), image=image)


def test_reading_alone_needs_pillow(tmp_path, monkeypatch, capsys):
    path = file_of(halves(), tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["show", "lsh", "--size", "5x7"]) == 0
    assert main(["show", "lsh", "--image", path]) == 2
    assert capsys.readouterr().err == "error: reading an image needs Pillow: pip install pillow\n"
