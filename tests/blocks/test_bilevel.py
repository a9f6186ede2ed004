import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(7, 11)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("bilevel", DIM, num_heads=HEADS, **{"tile": 3, "routes": 2, **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


def tile_of(pixel, side=3):
    return pixel // 11 // side * -(-11 // side) + pixel % 11 // side


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_pixel_sees_the_tiles_whose_mean_key_is_nearest_to_its_tile_s_mean_query(prefix):
    block, (q, k, v) = new(), random_qkv(prefix + GRID.size)
    out = block.mix(q, k, v, GRID)
    of_tiles = [[p for p in range(77) if tile_of(p) == tile] for tile in range(12)]
    for image in range(2):
        flat_q, flat_k = (t[image, :, prefix:].transpose(0, 1).flatten(1) for t in (q, k))
        means_q, means_k = (torch.stack([flat[pixels].mean(dim=0) for pixels in of_tiles]) for flat in (flat_q, flat_k))
        for pixel in (0, 5, 38, 76):
            near = (means_k @ means_q[tile_of(pixel)]).tolist()
            chosen = sorted(range(12), key=lambda tile: -near[tile])[:2]
            seen = [*range(prefix), *(prefix + p for tile in chosen for p in of_tiles[tile])]
            expected = F.scaled_dot_product_attention(
                q[image, :, prefix + pixel, None], k[image][:, seen], v[image][:, seen]
            )
            torch.testing.assert_close(out[image, :, prefix + pixel, None], expected, rtol=1e-11, atol=1e-13)
        first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
        torch.testing.assert_close(out[:, :, :prefix], first, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [dict(routes=99), dict(tile=19)])
def test_more_routes_than_tiles_and_tiles_larger_than_the_image_see_everything(options):
    block, (q, k, v) = new(**options), random_qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [Grid(6, 9), Grid(6, 11), Grid(7, 9)])
def test_a_border_that_cuts_tiles_or_does_not(grid, prefix):
    """Where it does not there is no mask."""
    block, (q, k, v) = new(), random_qkv(prefix + grid.size)
    expected = block.weights(q, k, grid) @ v
    torch.testing.assert_close(block.mix(q, k, v, grid), expected, rtol=1e-11, atol=1e-13)


def test_tiles_of_one_pixel_choose_pixels():
    block, (q, k, _) = new(tile=1, routes=3), random_qkv()
    seen = block.weights(q, k, GRID)[:, 0] > 0
    scores = torch.einsum("bnid,bnjd->bij", q, k)
    assert torch.equal(seen, scores >= scores.topk(3, dim=-1).values[..., -1:])


def test_a_choice_repeats_and_depends_on_nothing_but_its_own_image():
    block, (q, k, _) = new(), random_qkv(3 + GRID.size)
    chosen = block.choose(q, k, GRID)
    assert chosen.shape == (2, 12, 2) and torch.equal(chosen, block.choose(q, k, GRID))
    q[1], k[1] = torch.randn(2, *q[1].shape, dtype=torch.float64)
    other = block.choose(q, k, GRID)
    assert torch.equal(other[0], chosen[0]) and not torch.equal(other[1], chosen[1])


def test_what_fills_a_tile_up_is_not_counted_in_its_mean():
    """The last column of tiles is 3 - 1 pixels wide: with zeros counted its mean would be smaller than that beside."""
    block, grid = new(routes=1), Grid(3, 5)
    q, k = torch.ones(2, 1, HEADS, grid.size, WIDTH, dtype=torch.float64)
    k.unflatten(2, grid)[:, :, :, 3:] = 1.1
    assert (block.choose(q, k, grid) == 1).all()


def test_the_number_of_keys_of_a_pixel_does_not_grow_with_the_image():
    block = new()
    for grid in (GRID, Grid(23, 29)):
        q, k, _ = random_qkv(grid.size)
        assert (block.weights(q, k, grid) > 0).sum(dim=-1).max() == 2 * 3 * 3
