import math

import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.blocks import fourier

GRID = Grid(5, 7)


def bare(dim=11, **options):
    return create_block("fourier", dim, projections=False, **options).double()


def pixels(grid=GRID, dim=11, prefix=0):
    return torch.randn(2, prefix + grid.size, dim, dtype=torch.float64)


def test_twice_the_transform_is_the_image_mirrored_about_its_first_pixel_and_channel():
    """Re F Re F x = (x + its mirror image) / 2: no scale is left over, whatever the size."""
    x, block = pixels(), bare()
    image = x.unflatten(1, GRID)
    mirrored = image.flip(1, 2, 3).roll((1, 1, 1), (1, 2, 3))
    twice = block(block(x, GRID), GRID).unflatten(1, GRID)
    torch.testing.assert_close(twice, (image + mirrored) / 2, rtol=1e-11, atol=1e-12)


def test_a_wave_becomes_its_frequency():
    """cos 2π(2 y/H + 3 x/W) of equal channels: half at (2, 3), half at (-2, -3), nothing elsewhere."""
    y, x = torch.meshgrid(*(torch.arange(n).double() / n for n in GRID), indexing="ij")
    wave = torch.cos(2 * math.pi * (2 * y + 3 * x))
    out = bare(3)(wave.reshape(1, 35, 1).expand(1, 35, 3), GRID).unflatten(1, GRID)
    wanted = torch.zeros(1, 5, 7, 3, dtype=torch.float64)
    wanted[0, 2, 3, 0] = wanted[0, 3, 4, 0] = (35 * 3) ** 0.5 / 2
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)


def test_the_first_frequency_is_the_mean_and_constant_images_have_no_other():
    x, block = pixels(), bare(1)
    out = block(x[..., :1], GRID)
    torch.testing.assert_close(out[:, 0], x[..., :1].sum(1) / 35**0.5, rtol=1e-11, atol=1e-12)
    out = block(torch.ones(1, 35, 1, dtype=torch.float64), GRID)
    torch.testing.assert_close(out[0, :, 0], torch.eye(35, dtype=torch.float64)[0] * 35**0.5, rtol=0, atol=1e-12)


def test_prefix_tokens_are_the_first_frequency_of_all_and_are_not_heard():
    x, block = pixels(prefix=3), bare()
    out = block(x, GRID)
    torch.testing.assert_close(out[:, 3:], block(x[:, 3:], GRID), rtol=1e-11, atol=1e-12)
    line = bare()(x, Grid(1, 38))  # the same tokens as a line of 38: its first is frequency 0 of all of them
    torch.testing.assert_close(out[:, :3], line[:, :1].expand(-1, 3, -1), rtol=1e-11, atol=1e-12)


def test_heads_are_transformed_on_their_own():
    x = pixels(dim=22)
    both = torch.cat([bare()(half, GRID) for half in x.chunk(2, dim=-1)], dim=-1)
    torch.testing.assert_close(bare(22, num_heads=2)(x, GRID), both, rtol=1e-11, atol=1e-12)
    assert bare(22).num_heads == 1 and not torch.allclose(bare(22)(x, GRID), both)


def test_as_published_nothing_is_learned():
    assert not bare().state_dict()
    assert {name for name, _ in create_block("fourier", 11).named_parameters()} == {
        f"{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")
    }


def test_half_precision_is_summed_in_float32():
    """The sum on the way passes 65504, though no output does."""
    image = torch.full((1, 35, 11), 3000.0, dtype=torch.float16)
    out = create_block("fourier", 11, projections=False)(image, GRID)
    assert out.dtype == torch.float16 and out[0, 0, 0].item() == pytest.approx(3000 * 385**0.5, rel=1e-3)


@pytest.mark.parametrize("grid", [GRID, Grid(6, 4), Grid(1, 7), Grid(5, 2), Grid(3, 1)])
def test_matrices_give_what_the_fast_transform_gives(grid, monkeypatch):
    """As in traced graphs."""
    block, x = create_block("fourier", 22, num_heads=2).double(), pixels(grid, prefix=2, dim=22)
    wanted = block(x, grid)
    monkeypatch.setattr(fourier, "is_traced", lambda: True)
    monkeypatch.delattr(torch, "fft")
    torch.testing.assert_close(block(x, grid), wanted, rtol=1e-11, atol=1e-12)
