import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.pattern import blind_spot, cycle_reach

GRID = Grid(6, 7)
PARTS = ("row", "column", "previous_row")


def pattern_of(part):
    return create_block("factored", 33, num_heads=3, part=part, causal=True).pattern


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_three_layers_hear_all_of_the_past_in_any_order(order):
    cycle = [pattern_of(PARTS[i]) for i in order]
    assert torch.equal(cycle_reach(cycle, GRID), torch.ones(42, 42, dtype=torch.bool).tril())


def test_without_the_previous_row_315_of_903_pairs_are_missed():
    assert blind_spot([pattern_of("row"), pattern_of("column")]) == 315


@pytest.mark.parametrize("causal", [True, False])
def test_heads_have_the_three_in_turn(causal):
    whole = create_block("factored", 35, num_heads=5, causal=causal).pattern.head_masks(5, GRID)
    parts = [create_block("factored", 33, num_heads=3, part=part, causal=causal).pattern.mask(GRID) for part in PARTS]
    assert torch.equal(whole, torch.stack([parts[i] for i in (0, 0, 1, 1, 2)]))


def test_the_previous_row_is_all_of_it_and_the_pixel():
    mask = pattern_of("previous_row").mask(GRID)
    for i, row in enumerate(mask.tolist()):
        y = i // 7
        assert {j for j, s in enumerate(row) if s} == {j for j in range(42) if j // 7 == y - 1} | {i}


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="part='local'"):
        create_block("factored", 33, part="local")


@pytest.mark.parametrize("causal", [False, True])
def test_the_previous_row_can_be_without_the_pixel_as_in_the_authors_code(causal):
    """Keys and values of rows beside, zeros before the first row, one dense attention for each row of queries."""
    block = create_block("factored", 26, num_heads=2, part="previous_row", causal=causal, include_self=False).double()
    q, k, v = torch.randn(3, 2, 2, GRID.size, 13, dtype=torch.float64)
    out = block.mix(q, k, v, GRID)
    for y in range(6):
        beside = [r for r in (y - 1, *([] if causal else [y + 1])) if 0 <= r < 6]
        for x in range(7):
            expected = torch.zeros(2, 2, 13, dtype=torch.float64)
            if beside:
                there = [7 * r + c for r in beside for c in range(7)]
                shares = ((q[:, :, 7 * y + x, None] * k[:, :, there]).sum(-1) * 13**-0.5).softmax(-1)
                expected = (shares[..., None] * v[:, :, there]).sum(2)
            torch.testing.assert_close(out[:, :, 7 * y + x], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block.weights(q, k, GRID) @ v, out, rtol=1e-10, atol=1e-12)


def test_one_row_has_no_row_beside_it():
    block = create_block("factored", 26, num_heads=2, part="previous_row", include_self=False).double()
    q, k, v = torch.randn(3, 2, 2, 11, 13, dtype=torch.float64)
    assert not block.mix(q, k, v, Grid(1, 11)).any() and not block.weights(q, k, Grid(1, 11)).any()
    x = torch.randn(2, 11, 26, dtype=torch.float64, requires_grad=True)
    block(x, Grid(1, 11)).sum().backward()
    assert not x.grad.any()


def test_sampling_without_the_pixel_keeps_two_rows():
    block = create_block("factored", 26, num_heads=2, part="previous_row", causal=True, include_self=False).double()
    x = torch.randn(2, GRID.size, 26, dtype=torch.float64)
    for full in (False, True):
        cache = block.new_cache(2, GRID, full=full)
        out = torch.stack([block.step(x[:, i], i, cache) for i in range(GRID.size)], dim=1)
        torch.testing.assert_close(out, block(x, GRID), rtol=1e-10, atol=1e-12)
    assert block.new_cache(1, GRID).nbytes == 2 * 7 * 2 * 26 * 8


@pytest.mark.parametrize("part", [None, "previous_row"])
def test_it_says_whether_all_of_the_weights_sum_to_one(part):
    assert not create_block("factored", 33, num_heads=3, part=part, include_self=False).averages
    assert create_block("factored", 33, num_heads=3, part=part).averages


@pytest.mark.parametrize("part", ["row", "column"])
def test_what_has_no_previous_row_takes_no_say_over_it(part):
    with pytest.raises(ValueError, match=f"include_self=False: must be True with part='{part}'"):
        create_block("factored", 33, num_heads=3, part=part, include_self=False)
    assert create_block("factored", 33, num_heads=3, part=part, include_self=True).averages
