import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.blocks import global_filter

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 11


def bare(length=tuple(GRID), num_heads=HEADS, dim=HEADS * WIDTH):
    return create_block("global_filter", dim, num_heads=num_heads, length=length, projections=False).double()


def pixels(grid=GRID, prefix=0, dim=HEADS * WIDTH):
    return torch.randn(2, prefix + grid.size, dim, dtype=torch.float64)


def filter_of(kernel, length):
    """K of a kernel (heads, H, W)."""
    return torch.view_as_real(torch.fft.rfft2(kernel, s=length))


@pytest.mark.parametrize("grid", [GRID, Grid(6, 4), Grid(1, 7), Grid(5, 2)])
def test_it_is_a_circular_convolution_pixel_by_pixel(grid):
    block, x = bare(tuple(grid)), pixels(grid)
    kernel = torch.randn(HEADS, *grid, dtype=torch.float64)
    with torch.no_grad():
        block.filter.copy_(filter_of(kernel, grid))
    out = block(x, grid).unflatten(1, grid).unflatten(-1, (HEADS, WIDTH))
    image = x.unflatten(1, grid).unflatten(-1, (HEADS, WIDTH))
    for y in range(grid.height):
        for z in range(grid.width):
            wanted = sum(
                kernel[:, (y - row) % grid.height, (z - column) % grid.width, None] * image[:, row, column]
                for row in range(grid.height)
                for column in range(grid.width)
            )
            torch.testing.assert_close(out[:, y, z], wanted, rtol=1e-10, atol=1e-11)


def test_a_filter_of_ones_is_the_identity_at_every_size():
    block = bare((4, 3))
    with torch.no_grad():
        block.filter.copy_(torch.tensor([1.0, 0.0]))
    for grid in (GRID, Grid(1, 1), Grid(13, 2), Grid(3, 17)):
        x = pixels(grid)
        torch.testing.assert_close(block(x, grid), x, rtol=1e-11, atol=1e-12)


def test_moving_the_image_around_moves_the_output():
    block, x = bare((4, 3)), pixels()
    moved = x.unflatten(1, GRID).roll((2, 3), (1, 2)).flatten(1, 2)
    wanted = block(x, GRID).unflatten(1, GRID).roll((2, 3), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(block(moved, GRID), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grid", [Grid(10, 16), Grid(15, 24)])
def test_a_blur_keeps_its_size_in_pixels_on_a_larger_image(grid):
    """A small kernel has a smooth filter, which is interpolated well; its frequency 0, its sum, stays exactly."""
    near = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernels = {}
    for length in (Grid(30, 32), grid):
        kernel = torch.zeros(1, *length, dtype=torch.float64)
        kernel[0, :3, :3] = near[:, None] * near
        kernels[length] = kernel.roll((-1, -1), (1, 2))
    learned = Grid(30, 32)
    block = bare(tuple(learned), num_heads=1)
    with torch.no_grad():
        block.filter.copy_(filter_of(kernels[learned], learned))
    q = torch.zeros(1, 1, grid.size, 0, dtype=torch.float64)
    got = block.weights(q, q, grid)[0, 0, :, 0].reshape(grid)
    torch.testing.assert_close(got, kernels[grid][0], rtol=0, atol=2e-3)
    assert got.sum().item() == pytest.approx(1, abs=1e-12)


def test_twice_the_length_takes_every_second_frequency_as_it_is():
    block = bare((5, 8))
    like = torch.empty(0, dtype=torch.float64)
    real, imaginary = block.response(Grid(10, 16), like)
    table = block.filter.detach()
    torch.testing.assert_close(torch.stack([real, imaginary], -1)[:, ::2, ::2], table, rtol=1e-12, atol=0)
    between = (table[:, -1, 0] + table[:, 0, 0]) / 2  # around the circle of the rows
    torch.testing.assert_close(torch.stack([real, imaginary], -1)[:, -1, 0], between, rtol=1e-12, atol=0)


def test_a_filter_for_each_channel_is_the_published_one():
    """The authors' layer: torch's transforms of the whole map, one complex number a channel and frequency."""
    block, x = bare(num_heads=HEADS * WIDTH), pixels()
    assert block.filter.shape == (HEADS * WIDTH, 5, 4, 2) and list(block.state_dict()) == ["filter"]
    weight = torch.view_as_complex(block.filter.permute(1, 2, 0, 3).contiguous())
    image = torch.fft.rfft2(x.unflatten(1, GRID), dim=(1, 2), norm="ortho") * weight
    wanted = torch.fft.irfft2(image, s=GRID, dim=(1, 2), norm="ortho").flatten(1, 2)
    torch.testing.assert_close(block(x, GRID), wanted, rtol=1e-11, atol=1e-12)


def test_prefix_tokens_take_the_mean_and_are_not_heard():
    block, x = bare(), pixels(prefix=3)
    out = block(x, GRID)
    torch.testing.assert_close(out[:, :3], x.mean(1, keepdim=True).expand(-1, 3, -1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out[:, 3:], block(x[:, 3:], GRID), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [0, (3,), (0, 3), 2.5])
def test_a_bad_length_is_named(length):
    with pytest.raises(ValueError, match="length="):
        create_block("global_filter", 32, length=length)


@pytest.mark.parametrize("grid", [GRID, Grid(6, 4), Grid(1, 7), Grid(5, 2), Grid(3, 1)])
def test_matrices_give_what_the_fast_transform_gives(grid, monkeypatch):
    """As in traced graphs."""
    block, x = create_block("global_filter", 22, num_heads=2, length=(4, 3)).double(), pixels(grid, prefix=2, dim=22)
    wanted = block(x, grid)
    monkeypatch.setattr(global_filter, "is_traced", lambda: True)
    monkeypatch.delattr(torch, "fft")
    torch.testing.assert_close(block(x, grid), wanted, rtol=1e-11, atol=1e-12)
