import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block
from vision_attn.blocks.big_bird import Draws
from vision_attn.pattern import BlindSpot

GRID = Grid(11, 17)
TILES = (6, 9)  # of side 2


def new(**options):
    options = {"tile": 2, "drawn": 3, "tokens": 5, "seed": 1, **options}
    return create_block("big_bird", 10, num_heads=2, **options)


def test_draws_come_back_from_their_seed_and_from_the_state_dict():
    one, same, other = new(), new(), new(seed=2)
    assert torch.equal(one.draws.table, same.draws.table) and not torch.equal(one.draws.table, other.draws.table)
    assert not torch.equal(one.draws.table[0], one.draws.table[1])
    masks = [block.pattern.head_masks(2, GRID) for block in (one, same, other)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(*masks[0])  # heads differ
    assert "draws.table" in one.state_dict() and "draws.table" not in dict(one.named_parameters())
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.pattern.head_masks(2, GRID), masks[0])
    other.draws.reset_parameters()
    assert torch.equal(other.pattern.head_masks(2, GRID), masks[2])
    assert torch.equal(one.half().draws.table, same.draws.table)  # in half precision the draw stays


def test_layers_have_draws_of_their_own_unless_a_seed_is_given():
    layers = [new(seed=None) for _ in range(2)]
    assert not torch.equal(layers[0].draws.table, layers[1].draws.table)
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(*(layer.pattern.head_masks(2, GRID) for layer in layers))


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("down, right", [TILES, (1, 5), (3, 3), (19, 17)])
def test_drawn_tiles_are_not_beside_not_drawn_twice_and_past_where_they_must_be(down, right, past):
    for drawn_by_head in Draws(heads=2, drawn=4, seed=3).tiles(down, right, past).tolist():
        for tile, drawn in enumerate(drawn_by_head):
            far = [
                other
                for other in range(tile if past else down * right)
                if abs(other // right - tile // right) > 1 or abs(other % right - tile % right) > 1
            ]
            found = [other for other in drawn if other >= 0]
            assert set(found) <= set(far) and len(found) == len(set(found)) == min(4, len(far))


def test_every_tile_is_drawn_about_as_often():
    """From 3000 heads; runs of 54 - 9 or more tiles differ by one in length."""
    drawn = Draws(heads=3000, drawn=3, seed=1).tiles(*TILES, False)[:, 3 * TILES[1] + 4]
    counts = drawn.flatten().bincount(minlength=54).reshape(TILES)
    assert (counts[2:5, 3:6] == 0).all() and counts.sum() == 9000
    counts[2:5, 3:6] = 200  # each of the other 45 is expected 9000 / 45 times, within √200 = 14
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


def test_on_grids_of_more_tiles_than_the_table_has_rows_draws_miss_no_more_tiles_than_chance():
    """One draw for each of n tiles, all alike, misses n / e of them; runs of rows used again would miss most."""
    for side in (16, 32, 64):
        drawn = Draws(heads=5, drawn=1, seed=1).tiles(side, side, False)
        missed = torch.tensor([side**2 - one.unique().numel() for one in drawn]) / side**2
        assert (missed < 1.1 / 2.718).all()


def test_more_draws_than_tiles_see_all_tiles():
    block = new(drawn=99).double()
    q, k, v = torch.randn(3, 2, 2, GRID.size, 5, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


def test_causal_it_does_not_see_what_is_past_in_later_tiles_but_beside_and_warns_of_it():
    """However many are drawn: right of a pixel, in the rows above it that run through its own tiles."""
    with pytest.warns(BlindSpot, match="causal big_bird alone leaves"):
        pattern = new(drawn=99, causal=True, tokens=1).pattern
    mask = pattern.mask(GRID)
    for i, row in enumerate(mask.tolist()):
        for j, seen in enumerate(row):
            (y, x), (ky, kx) = ((place // 17 // 2, place % 17 // 2) for place in (i, j))
            beside = max(abs(y - ky), abs(x - kx)) <= 1
            assert seen == (j <= i and (beside or (ky, kx) < (y, x) or j == 0))


def test_the_number_of_keys_does_not_grow_with_the_grid():
    pattern = new().pattern
    for grid in (GRID, Grid(23, 29), Grid(41, 37)):  # the last has more tiles than the table has rows
        seen = pattern.head_masks(2, grid).sum(dim=-1)
        assert seen[:, 5:].max() <= (9 + 3) * 4 + 5
        assert (seen[:, grid.width * 9 + 8] > 9 * 4).all()  # draws are there beside what is near


def test_the_first_positions_see_all_so_two_layers_hear_everything():
    pattern = new(tokens=1).pattern
    assert pattern.mask(GRID)[0].all() and pattern.mask(GRID)[:, 0].all()
    assert pattern.reach(GRID, 2).all() and not pattern.reach(GRID, 1).all()
