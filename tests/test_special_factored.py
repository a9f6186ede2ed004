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
