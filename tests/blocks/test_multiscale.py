import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(11, 17)
HEADS, WIDTH = 2, 5
DIM = HEADS * WIDTH


def random_qkv():
    return torch.randn(3, 2, HEADS, GRID.size, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
def test_one_level_is_a_window(causal):
    block = create_block("multiscale", DIM, num_heads=HEADS, kernel_size=5, levels=1, causal=causal)
    window = create_block("window", DIM, num_heads=HEADS, kernel_size=5, causal=causal).pattern.mask(GRID)
    q, k, v = random_qkv()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=window)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_each_level_has_a_window_of_as_many_cells(causal):
    """One pixel at a time; a pixel that several levels show is there several times."""
    options = dict(kernel_size=3, scale_factor=3, levels=3, causal=causal)
    block = create_block("multiscale", DIM, num_heads=HEADS, **options)
    q, k, v = random_qkv()
    out = block.mix(q, k, v, GRID)
    for y, x in [(0, 0), (2, 2), (5, 16), (10, 7), (8, 8)]:
        here, cells = y * GRID.width + x, []
        for side in (1, 3, 9):
            for row in range(y // side - 1, y // side + 2):
                for column in range(x // side - 1, x // side + 2):
                    rows = [p for p in range(row * side, row * side + side) if 0 <= p < GRID.height]
                    columns = [p for p in range(column * side, column * side + side) if 0 <= p < GRID.width]
                    cell = [p * GRID.width + r for p in rows for r in columns]
                    if cell and (max(cell) <= here or not causal):
                        cells.append(cell)
        keys, values = (torch.stack([t[:, :, cell].mean(dim=2) for cell in cells], dim=2) for t in (k, v))
        expected = F.scaled_dot_product_attention(q[:, :, [here]], keys, values)
        torch.testing.assert_close(out[:, :, [here]], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scale_factor, levels", [(17, 2), (97, 3), (19, 14)])
def test_a_cell_larger_than_the_image_is_its_mean(scale_factor, levels):
    block = create_block("multiscale", DIM, num_heads=HEADS, kernel_size=1, scale_factor=scale_factor, levels=levels)
    q, _, v = random_qkv()
    out = block.mix(q, torch.zeros_like(q), v, GRID)  # all that is seen counts alike: the pixel, and image after image
    expected = (v + (levels - 1) * v.mean(dim=2, keepdim=True)) / levels
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"kernel_size": (3, 5)}, {"attn_drop": 0.1}])
def test_what_it_can_not_take_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}="):
        create_block("multiscale", DIM, **options)
