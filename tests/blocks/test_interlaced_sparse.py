import pytest
import torch

from vision_attn import Grid, create_block

DIM = 13
SIZES = [(9, 9, (4, 4)), (7, 11, (2, 3)), (4, 9, (2, 3)), (1, 17, (4, 4)), (2, 3, (5, 7))]


@pytest.mark.parametrize("height, width, factor", SIZES)
def test_steps_are_attention_over_lists_of_pixels(height, width, factor):
    """Far: every factor-th pixel of the rows and columns. Near: a window. Pixels outside the map do not exist."""
    grid, (fy, fx) = Grid(height, width), factor
    block = create_block("interlaced_sparse", DIM, factor=factor).double()
    q, k, v = torch.randn(3, 2, 1, grid.size, DIM, dtype=torch.float64)
    for far, step in zip((True, False), block.steps):
        out = step.mix(q, k, v, grid)
        for y in range(height):
            for x in range(width):
                rows = range(y % fy, height, fy) if far else range(y - y % fy, min(height, y - y % fy + fy))
                columns = range(x % fx, width, fx) if far else range(x - x % fx, min(width, x - x % fx + fx))
                keys = [row * width + column for row in rows for column in columns]
                scores = (k[:, 0, keys] @ q[:, 0, y * width + x, :, None]).squeeze(-1) * DIM**-0.5
                expected = (scores.softmax(-1)[:, :, None] * v[:, 0, keys]).sum(1)
                torch.testing.assert_close(out[:, 0, y * width + x], expected, rtol=1e-11, atol=1e-13)


def test_long_range_comes_first():
    far, near = create_block("interlaced_sparse", DIM, factor=(2, 3)).steps
    assert "#--#" in far.pattern.draw(Grid(5, 7), 0, 6) and "##@" in near.pattern.draw(Grid(5, 7), 0, 5)


@pytest.mark.parametrize("height, width, factor", SIZES)
def test_every_pixel_hears_every_other(height, width, factor):
    block = create_block("interlaced_sparse", DIM, factor=factor).double()
    grid = Grid(height, width)
    far, near = (step.pattern.mask(grid).double() for step in block.steps)
    whole_windows = height % factor[0] == width % factor[1] == 0
    if whole_windows:  # a cut window does not hold every place of the others
        assert (near @ far > 0).all()
    x = torch.randn(1, grid.size, DIM, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(block(x, grid)[0, 0].sum(), x)
    assert ((slope != 0).any(-1)[0] == (near @ far > 0)[0]).all()


def test_its_attention_is_that_of_both_steps():
    grid = Grid(7, 11)
    block = create_block("interlaced_sparse", DIM, num_heads=1, factor=(2, 3)).double()
    for step in block.steps:  # values and output as they are, so that only the attention acts
        for linear in (step.qkv, step.proj):
            linear.weight.data[-DIM:] = torch.eye(DIM)
            linear.bias.data[-DIM:] = 0
    x = torch.randn(2, 5 + grid.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(block(x, grid), block.attention(x, grid)[:, 0] @ x, rtol=1e-10, atol=1e-12)


def test_steps_have_projections_of_their_own_and_windows_of_8():
    one, two = create_block("interlaced_sparse", DIM).steps
    assert one.pattern.factor == two.pattern.tile == (8, 8)
    assert not torch.equal(one.qkv.weight, two.qkv.weight) and not torch.equal(one.proj.weight, two.proj.weight)


@pytest.mark.parametrize("height, width", [(9, 9), (7, 11), (1, 5)])
def test_padding_takes_no_weight(height, width):
    """All values are 1: the output is 1 only if no weight fell on a zero of the padding."""
    grid = Grid(height, width)
    q, k = torch.randn(2, 2, 1, grid.size, DIM, dtype=torch.float64)
    for step in create_block("interlaced_sparse", DIM, factor=4).steps:
        out = step.mix(q, k, torch.ones_like(q), grid)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-13, atol=0)
