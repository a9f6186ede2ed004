import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(13, 31)
HEADS, WIDTH = 2, 5
DIM = HEADS * WIDTH


def random_qkv(grid=GRID):
    return torch.randn(3, 2, HEADS, grid.size, WIDTH, dtype=torch.float64)


def partition(y, x, grid, near, levels):
    """Cells (top, left, side) that tile the grid: cut into four what is not farther away than ``near`` cells."""
    side = 2**levels
    waiting = [(top, left, side) for top in range(0, grid.height, side) for left in range(0, grid.width, side)]
    while waiting:
        top, left, side = waiting.pop()
        far = max(abs(top // side - y // side), abs(left // side - x // side)) > near
        if far or side == 1:
            yield top, left, side
        else:
            half = side // 2
            parts = [(top + down, left + right, half) for down in (0, half) for right in (0, half)]
            waiting += [part for part in parts if part[0] < grid.height and part[1] < grid.width]


def pixels_of(cell, grid):
    top, left, side = cell
    rows, columns = range(top, min(top + side, grid.height)), range(left, min(left + side, grid.width))
    return [y * grid.width + x for y in rows for x in columns]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("near, levels", [(1, 1), (1, 4), (2, 2)])
def test_it_is_attention_to_the_means_of_cells_that_tile_the_image(near, levels, causal):
    block = create_block("binary_partition", DIM, num_heads=HEADS, near=near, levels=levels, causal=causal)
    q, k, v = random_qkv()
    out = block.mix(q, k, v, GRID)
    for y, x in [(0, 0), (6, 18), (7, 29), (12, 3)]:
        here = y * GRID.width + x
        cells = [pixels_of(cell, GRID) for cell in partition(y, x, GRID, near, levels)]
        assert sorted(sum(cells, [])) == list(range(GRID.size))
        cells = [cell for cell in cells if not causal or max(cell) <= here]
        keys, values = (torch.stack([t[:, :, cell].mean(dim=2) for cell in cells], dim=2) for t in (k, v))
        expected = F.scaled_dot_product_attention(q[:, :, [here]], keys, values)
        torch.testing.assert_close(out[:, :, [here]], expected, rtol=1e-11, atol=1e-13)


def test_cells_seen_grow_like_the_logarithm_of_the_size():
    counts = []
    for levels, size in enumerate([(13, 17), (29, 31), (59, 61), (127, 113), (251, 241)], start=2):
        pattern, grid = create_block("binary_partition", DIM, levels=levels).pattern, Grid(*size)
        y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
        level = pattern.level(grid.height // 2, grid.width // 2, y, x)
        cells = torch.stack([level, y >> level, x >> level]).flatten(1).unique(dim=1)
        counts.append(cells.shape[1])
    assert all(after - before <= 3 * 3**2 for before, after in zip(counts, counts[1:]))  # while the size doubles
    assert counts[-1] <= 3 * 3**2 * 6 + 4**2


def test_where_all_is_near_it_is_dense():
    q, k, v = random_qkv()
    block = create_block("binary_partition", DIM, num_heads=HEADS, near=15, levels=1)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


def test_levels_with_nothing_far_are_left_out_and_change_nothing():
    q, k, v = random_qkv(Grid(5, 7))
    some, many = (create_block("binary_partition", DIM, num_heads=HEADS, levels=levels) for levels in (2, 20))
    torch.testing.assert_close(some.mix(q, k, v, Grid(5, 7)), many.mix(q, k, v, Grid(5, 7)), rtol=1e-11, atol=1e-13)
    for size in [(1, 1), (1, 5), (4, 3), (8, 5), (5, 9), (17, 2)]:
        for keys in many.pattern.key_sets():
            seen = keys.place(keys.mask(Grid(*size), "cpu")[None].double(), Grid(*size))
            assert keys.parts(Grid(*size)) or not seen.any()
    assert len([keys for keys in many.pattern.key_sets() if keys.parts(Grid(5, 7))]) == 2


def test_places_within_a_far_cell_do_not_matter():
    block = create_block("binary_partition", DIM, num_heads=HEADS, levels=2)
    q, k, v = random_qkv()
    other = torch.arange(GRID.size).reshape(GRID)
    other[8:12, 12:16] = other[8:12, 12:16].roll(1, 1)  # a cell of side 4
    shuffled = block.mix(q, k[:, :, other.flatten()], v[:, :, other.flatten()], GRID)
    same = torch.isclose(shuffled, block.mix(q, k, v, GRID), rtol=1e-11, atol=1e-13).all(-1).all(1).all(0)
    blind = torch.ones(GRID, dtype=torch.bool)
    blind[4:, 8:20] = False  # at most one cell of side 4 away, and so sees halves of it
    blind[8:12, 12:16] = True  # in it, and sees every pixel of it
    assert torch.equal(same.reshape(GRID), blind)
