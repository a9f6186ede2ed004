import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(7, 11)


def seen_in_the_paper(i, l):
    """A1 and A2 of the paper for index i and stride l, in its words."""
    return {j for j in range(max(0, i - l), i + 1)} | {j for j in range(i + 1) if (i - j) % l == 0}


def rows_of(mask):
    return [{j for j, s in enumerate(row) if s} for row in mask.tolist()]


def test_the_causal_pattern_is_the_papers():
    pattern = create_block("strided", 32, causal=True).pattern
    assert rows_of(pattern.mask(GRID)) == [seen_in_the_paper(i, GRID.width) for i in range(GRID.size)]


def test_the_parts_are_the_papers():
    local, column = (create_block("strided", 32, causal=True, part=part).pattern for part in ("local", "column"))
    assert rows_of(local.mask(GRID)) == [set(range(max(0, i - 10), i + 1)) for i in range(GRID.size)]
    assert rows_of(column.mask(GRID)) == [{j for j in range(i + 1) if (i - j) % 11 == 0} for i in range(GRID.size)]
    split = create_block("strided", 32, num_heads=2, causal=True, split_heads=True).pattern
    assert [rows_of(part.mask(GRID)) for part in split.by_head()] == [rows_of(p.mask(GRID)) for p in (local, column)]


def test_without_causal_it_looks_both_ways():
    causal, both = (create_block("strided", 32, causal=c).pattern.mask(GRID) for c in (True, False))
    assert torch.equal(both, causal | causal.T)


def test_two_layers_hear_all_of_the_past_and_one_does_not():
    pattern = create_block("strided", 32, causal=True).pattern
    past = torch.ones(GRID.size, GRID.size, dtype=torch.bool).tril()
    assert torch.equal(pattern.reach(GRID, 2), past) and not torch.equal(pattern.reach(GRID, 1), past)


@pytest.mark.parametrize("options", [{"part": "row"}, {"part": "local", "split_heads": True}])
def test_parts_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=f"part='{options['part']}'"):
        create_block("strided", 32, **options)


def test_one_head_can_not_be_split():
    with pytest.raises(ValueError, match="num_heads=1: must be ≥ 2"):
        create_block("strided", 32, num_heads=1, split_heads=True)
    assert create_block("strided", 32, split_heads=True).num_heads == 2
