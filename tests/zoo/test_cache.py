"""Pixel by pixel: what a causal block keeps of the past gives what the whole past gives."""

import pytest
import torch
from conftest import MIXERS, chosen, in_turn

from vision_attn import Grid, create_block
from vision_attn.engines.cache import PatternCache
from vision_attn.testing.case import BATCH

CAUSAL = chosen("causal_case")
SMALL = [Grid(5, 7), Grid(11, 3), Grid(2, 7), Grid(1, 5), Grid(3, 1), Grid(1, 1)]


def stepped(block, x, grid, **options):
    cache = block.new_cache(len(x), grid, **options)
    return torch.stack([block.step(x[:, i], i, cache) for i in range(grid.size)], dim=1), cache


@in_turn({"case": CAUSAL, "grid": SMALL})
def test_steps_are_the_forward_pass(case, grid):
    block, x = case.block(), case.input(grid, prefix=0)
    out, _ = stepped(block, x, grid)
    torch.testing.assert_close(out, block(x, grid), rtol=1e-10, atol=1e-12)


@in_turn({"case": CAUSAL, "grid": SMALL[:2]})
def test_the_whole_past_gives_the_same(case, grid):
    block, x = case.block(), case.input(grid, prefix=0)
    try:
        out, cache = stepped(block, x, grid, full=True)
    except ValueError as refusal:  # a state is all it knows of the past
        assert "full=True" in str(refusal) and not hasattr(block, "pattern")
        return
    torch.testing.assert_close(out, block(x, grid), rtol=1e-10, atol=1e-12)
    if type(cache) is PatternCache:
        assert cache.nbytes == 8 * BATCH * grid.size * block.num_heads * sum(block.head_dims)  # of float64


@pytest.mark.parametrize("full", [False, True])
def test_weights_and_type_are_those_of_the_block(causal_case, full):
    block = causal_case.block().float()
    try:
        cache = block.new_cache(BATCH, Grid(5, 7), full=full)
    except ValueError:
        return
    out = block.step(torch.randn(BATCH, block.dim), 0, cache)
    assert out.dtype == torch.float32 and out.shape == (BATCH, block.dim)


def test_only_what_will_be_looked_at_is_kept():
    """In numbers of stored positions per head, on a grid of 31×29."""
    grid = Grid(31, 29)

    def kept(name, **options):
        block = create_block(name, 8, num_heads=1, causal=True, **options)
        return block.new_cache(1, grid).nbytes / (2 * 8 * 4)

    assert kept("dense") == grid.size
    assert kept("fixed", c=3) == 29 + 31 * 3
    assert kept("strided", part="local") == 2 * 29
    assert kept("strided", part="column") == grid.size
    assert kept("factored", part="row") == 29
    assert kept("factored", part="previous_row") == 2 * 29
    assert kept("window", kernel_size=(5, 3)) == 3 * 29
    assert kept("dilated", kernel_size=3, dilation=4) == 5 * 29


@pytest.mark.parametrize("block", MIXERS)
def test_what_is_not_causal_can_not_go_pixel_by_pixel(block):
    with pytest.raises(ValueError, match="causal"):
        create_block(block, 32, num_heads=4).new_cache(1, Grid(5, 7))
