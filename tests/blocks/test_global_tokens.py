import pytest
import torch

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


@pytest.mark.parametrize("options", [{"tokens": -1}, {"tokens": 1.5}, {"kernel_size": 4}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        create_block("global_tokens", 32, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_without_tokens_of_its_own_the_prefix_alone_is_global(prefix, causal):
    block = create_block("global_tokens", 26, num_heads=2, tokens=0, kernel_size=(3, 5), causal=causal).double()
    places = [None] * prefix + [(y, x) for y in range(7) for x in range(11)]
    q, k, v = torch.randn(3, 1, 2, len(places), 13, dtype=torch.float64)
    out = block.mix(q, k, v, GRID)
    for i, here in enumerate(places):
        seen = [j for j, there in enumerate(places) if there is None or (here is None and not causal)]
        if here is not None:
            near = [abs(here[0] - there[0]) <= 1 and abs(here[1] - there[1]) <= 2 for there in places[prefix:]]
            seen += [prefix + j for j, close in enumerate(near) if close and (prefix + j <= i or not causal)]
        shares = ((q[:, :, i, None] * k[:, :, seen]).sum(-1) * 13**-0.5).softmax(-1)
        torch.testing.assert_close(out[:, :, i], (shares[..., None] * v[:, :, seen]).sum(2), rtol=1e-10, atol=1e-12)


def test_a_causal_window_without_tokens_keeps_its_rows_only():
    block = create_block("global_tokens", 8, num_heads=1, tokens=0, kernel_size=5, causal=True)
    assert block.new_cache(1, Grid(31, 29)).nbytes == 3 * 29 * 2 * 8 * 4
