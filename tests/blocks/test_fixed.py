import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(7, 11)


def rows_of(mask):
    return [{j for j, s in enumerate(row) if s} for row in mask.tolist()]


def seen_in_the_paper(i, l, c):
    """A1 and A2 of the paper for index i, block length l and summary length c, in its words."""
    return {j for j in range(i + 1) if j // l == i // l} | {j for j in range(i + 1) if l - c <= j % l < l}


@pytest.mark.parametrize("c", [1, 3])
def test_the_causal_pattern_of_one_head_is_the_papers(c):
    pattern = create_block("fixed", 32, num_heads=1, c=c, causal=True).pattern
    assert rows_of(pattern.mask(GRID)) == [seen_in_the_paper(i, GRID.width, c) for i in range(GRID.size)]


def test_heads_have_summaries_of_their_own():
    parts = create_block("fixed", 40, num_heads=5, c=3, part="summary", causal=True).pattern.by_head()
    last = GRID.size - 1
    columns = [{j % 11 for j in rows_of(part.mask(GRID))[last] if j != last} for part in parts]
    assert columns == [{8, 9, 10}, {5, 6, 7}, {2, 3, 4}, {8, 9, 10}, {5, 6, 7}]


def test_a_narrow_grid_is_all_summary():
    pattern = create_block("fixed", 32, num_heads=1, c=8, causal=True).pattern
    assert torch.equal(pattern.mask(Grid(5, 3)), torch.ones(15, 15, dtype=torch.bool).tril())


def test_split_heads_are_rows_and_summaries():
    pattern = create_block("fixed", 40, num_heads=5, c=3, causal=True, split_heads=True).pattern
    masks = pattern.head_masks(5, GRID)
    row = create_block("fixed", 40, num_heads=1, part="local", causal=True).pattern.mask(GRID)
    assert all(torch.equal(mask, row) for mask in masks[:3])
    summaries = create_block("fixed", 40, num_heads=2, c=3, part="summary", causal=True).pattern.head_masks(2, GRID)
    assert torch.equal(masks[3:], summaries)


def test_without_causal_all_rows_are_looked_at():
    causal, both = (create_block("fixed", 32, num_heads=1, c=2, causal=c).pattern.mask(GRID) for c in (True, False))
    rows = torch.arange(GRID.size) // 11
    summary = (torch.arange(GRID.size) % 11 >= 9).expand(GRID.size, -1)
    assert torch.equal(both, (rows[:, None] == rows) | summary) and (causal <= both).all()


@pytest.mark.parametrize("options, said", [({"c": 0}, "c=0"), ({"part": "row"}, "part='row'")])
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        create_block("fixed", 32, **options)


@pytest.mark.parametrize("heads, num_verts", [(1, 1), (4, 1), (4, 2), (6, 3), (5, 2)])
def test_heads_take_turns_with_the_summaries_as_in_the_authors_code(heads, num_verts):
    """Head h looks at its own row and at block h mod num_verts of all rows, blocks being counted from the right."""
    pattern = create_block("fixed", 8 * heads, num_heads=heads, c=2, num_verts=num_verts, causal=True).pattern
    for head, mask in enumerate(pattern.head_masks(heads, GRID)):
        end = 11 - 2 * (head % num_verts)
        for i, seen in enumerate(rows_of(mask)):
            assert seen == {j for j in range(i + 1) if j // 11 == i // 11 or end - 2 <= j % 11 < end}


def test_split_heads_take_turns_among_themselves():
    options = dict(c=3, part="summary", causal=True, num_verts=2)
    summaries = create_block("fixed", 24, num_heads=3, **options).pattern.head_masks(3, GRID)
    split = create_block("fixed", 48, num_heads=6, **{**options, "part": None}, split_heads=True).pattern
    assert torch.equal(split.head_masks(6, GRID)[3:], summaries)
    assert torch.equal(summaries[0], summaries[2]) and not torch.equal(summaries[0], summaries[1])


@pytest.mark.parametrize("num_verts", [0, -1, 1.5, "2", True])
def test_wrong_numbers_of_summaries_are_named(num_verts):
    with pytest.raises(ValueError, match=f"num_verts={num_verts!r}"):
        create_block("fixed", 32, num_verts=num_verts)


def test_a_layer_without_summaries_takes_no_number_of_them():
    with pytest.raises(ValueError, match="num_verts=3: must be None with part='local'"):
        create_block("fixed", 32, part="local", num_verts=3)
    assert create_block("fixed", 32, part="local", num_verts=None).pattern.by_head()
