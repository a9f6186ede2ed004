"""Recent rows: the rule, its key sets with a mask and without, and the waves of places."""

import math

import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.blocks.compressive import Compressed, OlderCells
from vision_attn.recurrence import Recent, RecentRows

SIZES = [(memory, band, past) for memory in (0, 1, 3, 5) for band in (1, 2, 3, 5) for past in (True, False)]
GRIDS = [Grid(13, 3), Grid(4, 5), Grid(1, 2), Grid(7, 1)]


def pairs_of(keys, grid, cells=None):
    """How often each query meets each key, positions or ``cells`` (a map of their numbers)."""
    query, _ = keys.numbers(grid, "cpu")
    number = torch.arange(1, grid.size + 1).view(1, *grid, 1) if cells is None else cells + 1
    key = keys.keys(number)[0, :, :, 0] - 1
    seen = key[:, None] >= 0
    if keys.causal:
        seen = seen & torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
    elif (mask := keys.mask(grid, "cpu")) is not None:
        seen = seen & mask
    met = torch.zeros(grid.size, int(number.max()))
    for group in range(len(query)):
        there = seen.expand(len(query), query.shape[1], -1)[group] & (query[group] >= 0)[:, None]
        i, j = there.nonzero().T
        met.index_put_((query[group, i], key[group % len(key), j]), torch.ones(len(i)), accumulate=True)
    return met


@pytest.mark.parametrize("memory, band, past", SIZES)
def test_a_band_is_seen_until_all_of_its_rows_are_too_far_away(memory, band, past):
    pattern, grid = Recent(memory, band, past=past), Grid(17, 2)
    mask = pattern.mask(grid)
    for i in range(grid.size):
        for j in range(grid.size):
            first = j // 2 // band * band
            recent = first + band - 1 >= i // 2 - memory and first <= i // 2 + memory
            assert mask[i, j] == (recent and (j <= i or not past))


@pytest.mark.parametrize("memory, band, past", SIZES)
def test_key_sets_hold_every_pair_once_with_a_mask_and_without(memory, band, past):
    pattern = Recent(memory, band, past=past)
    for grid in GRIDS:
        whole = RecentRows(pattern)
        assert torch.equal(pairs_of(whole, grid), pattern.mask(grid).float())
        assert torch.equal(sum(pairs_of(part, grid) for part in whole.parts(grid)), pattern.mask(grid).float())
        assert not past or all(part.mask(grid, "cpu") is None for part in whole.parts(grid))


@pytest.mark.parametrize("memory, band, past", SIZES)
def test_older_rows_are_seen_in_cells_and_nothing_is_lost(memory, band, past):
    pattern = Compressed(memory, band, past=past)
    for grid in GRIDS:
        down, right = (-(-n // band) for n in grid)
        number = torch.arange(down * right).view(1, down, right, 1)
        whole = OlderCells(pattern)
        met = pairs_of(whole, grid, number)
        assert torch.equal(sum((pairs_of(part, grid, number) for part in whole.parts(grid)), 0 * met), met)
        pixel = torch.arange(grid.size)
        cell = pixel // grid.width // band * right + pixel % grid.width // band
        everything = torch.ones(grid.size, grid.size)
        assert torch.equal(met[:, cell] + pattern.mask(grid), everything.tril() if past else everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_waves_are_right_far_from_the_corner_in_any_type(dtype):
    block = create_block("transformer_xl", 33, num_heads=3, waves=5).to(dtype)
    sines, cosines = block.waves_at(torch.tensor([997]), torch.tensor([1009]))
    for axis, place in enumerate((997, 1009)):
        for f in range(5):
            angle = place * 10000 ** (-f / 5)
            assert sines[0, 5 * axis + f].item() == pytest.approx(math.sin(angle), abs=2e-4)
            assert cosines[0, 5 * axis + f].item() == pytest.approx(math.cos(angle), abs=2e-4)
