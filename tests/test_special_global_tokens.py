import pytest

from vision_attn import Grid, create_block

GRID = Grid(7, 11)


@pytest.mark.parametrize("causal", [False, True])
def test_the_first_positions_see_all_and_are_seen_by_all(causal):
    mask = create_block("global_tokens", 32, tokens=5, kernel_size=3, causal=causal).pattern.mask(GRID).tolist()
    for i, row in enumerate(mask):
        for j, seen in enumerate(row):
            near = abs(i // 11 - j // 11) <= 1 and abs(i % 11 - j % 11) <= 1
            assert seen == ((i < 5 or j < 5 or near) and (j <= i or not causal))


def test_two_layers_hear_everything():
    pattern = create_block("global_tokens", 32, tokens=1, kernel_size=1).pattern
    assert pattern.reach(GRID, 2).all() and not pattern.reach(GRID, 1).all()


def test_more_global_positions_than_there_are_is_dense():
    assert create_block("global_tokens", 32, tokens=99).pattern.mask(GRID).all()


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": 1.5}, {"kernel_size": 4}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        create_block("global_tokens", 32, **options)
