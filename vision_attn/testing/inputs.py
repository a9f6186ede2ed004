"""How inputs may come, and what must not happen to them."""

import itertools

import torch

from ..grid import Grid
from .case import GRID, GRIDS, SMALL, holds_for
from .hard_input import WAYS
from .oracle import assert_equal, assert_same_bits, sides


@holds_for("any")
def layout_in_memory_does_not_matter(case):
    """Strided, channels-last, transposed and expanded inputs give the numbers of contiguous ones."""
    block, x = case.block(), case.input(GRID)
    for way in ("channels last", "strided"):
        with case.trying(grid=GRID, input=way):
            other = WAYS[way](x)
            assert not other.is_contiguous()
            assert_equal(case.run(block, other, GRID), case.run(block, x, GRID))
    for fast, _, inputs in sides(block, GRID, 5):
        with case.trying(grid=GRID):
            transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]  # as a fused qkv gives them
            one_for_all = [t[:, :1].expand_as(t) for t in inputs]
            assert_equal(fast(*transposed), fast(*inputs))
            assert_equal(fast(*one_for_all), fast(*(t.contiguous() for t in one_for_all)))


@holds_for("any")
def an_input_is_never_modified(case):
    """The input stays as it was, also in training."""
    for grid in GRIDS:
        with case.trying(grid=grid):
            x = case.input(grid)
            before = x.clone()
            case.run(case.block().train(), x, grid)
            assert torch.equal(x, before) and x._version == 0


@holds_for("any")
def images_of_a_batch_never_mix(case):
    """An image's output does not depend on the others of its batch."""
    block = case.block()
    for grid in GRIDS:
        with case.trying(grid=grid):
            x = case.input(grid)
            out = case.run(block, x, grid)
            for alone, expected in zip(x.split(1), out.split(1)):
                assert_equal(case.run(block, alone, grid), expected)
            x[1] = torch.randn_like(x[1])
            assert torch.equal(case.run(block, x, grid)[0], out[0])


@holds_for("any")
def a_size_leaves_nothing_behind(case):
    """After inputs of other sizes the same input gives the same bits."""
    block, x = case.block(), case.input(GRID)
    with case.trying(grid=GRID):
        before = case.run(block, x, GRID)
        for grid in (SMALL, Grid(GRID.width, GRID.height)):
            case.run(block, case.input(grid, prefix=1), grid)
        assert_same_bits(case.run(block, x, GRID), before)


@holds_for("any")
def inference_mode_changes_nothing(case):
    """Under torch.inference_mode and torch.no_grad the numbers are those of a forward pass in training's place."""
    block = case.block(**case.wide_keys)
    for grid, mode in itertools.product(GRIDS, (torch.inference_mode, torch.no_grad)):
        with case.trying(grid=grid, mode=mode.__name__):
            x = case.input(grid)
            exact = case.run(block, x, grid)
            with mode():
                assert_equal(case.run(block, x, grid), exact.detach())
