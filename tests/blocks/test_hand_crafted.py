import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.pattern import blind_spot

GRID = Grid(5, 7)
NAMES = ("row", "column", "left", "right", "up", "down")


def numbered(prefix=0, heads=1):
    """Each token's value is its place, prefix tokens are -1, -2, …"""
    places = torch.cat([-1.0 - torch.arange(prefix), torch.arange(GRID.size)]).double()
    return places.expand(1, heads, -1)[..., None]


def expected_at(name, y, x, causal):
    """By its name: the mean of the places looked at."""
    rows, columns = range(y + 1 if causal else 5), range(x + 1 if causal else 7)
    seen = {
        "row": [(y, other) for other in columns],
        "column": [(other, x) for other in rows],
        "previous_row": [(y - 1, other) for other in range(7)] if y else [(y, x)],
        "all": [(row, column) for row in range(5) for column in range(7) if not causal or (row, column) <= (y, x)],
        "left": [(y, max(x - 1, 0))],
        "right": [(y, min(x + 1, 6))],
        "up": [(max(y - 1, 0), x)],
        "down": [(min(y + 1, 4), x)],
    }[name]
    return sum(7.0 * row + column for row, column in seen) / len(seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "previous_row", "all"])
def test_on_a_numbered_map_each_pixel_gets_the_mean_of_the_places_named(name, causal):
    if causal and name in ("right", "down"):
        with pytest.raises(ValueError, match=f"causal=True must be without {name}"):
            create_block("hand_crafted", 3, patterns=(name,), causal=True)
        return
    block, v = create_block("hand_crafted", 3, num_heads=1, patterns=(name,), causal=causal), numbered()
    expected = [expected_at(name, y, x, causal) for y in range(5) for x in range(7)]
    out = block.mix(v[..., :0], v[..., :0], v, GRID)
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def mixed(name, v, **options):
    return create_block("hand_crafted", 3, num_heads=1, patterns=(name,), **options).mix(
        v[..., :0], v[..., :0], v, GRID
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["left", "right", "up", "down"])
def test_a_narrow_bell_is_a_step_and_a_wide_one_the_mean_of_all(name, causal):
    if causal and name in ("right", "down"):
        with pytest.raises(ValueError, match=f"causal=True must be without gaussian_{name}"):
            mixed(f"gaussian_{name}", numbered(), causal=True)
        return
    v = torch.randn(2, 1, GRID.size, 3, dtype=torch.float64)
    for width, other in ((0.01, name), (1e6, "all")):
        out = mixed(f"gaussian_{name}", v, width=width, causal=causal)
        torch.testing.assert_close(out, mixed(other, v, causal=causal), rtol=1e-9, atol=1e-9)


def test_a_bell_falls_with_the_distance_to_its_centre():
    """Twice as far is the fourth power, whichever way; of what is weighted alike the sum is 1."""
    block = create_block("hand_crafted", 3, num_heads=1, patterns=("gaussian",), width=1.7)
    seen = block.attention(torch.randn(1, GRID.size, 3), GRID)[0, 0, 2 * 7 + 3].view(5, 7)  # of the middle
    torch.testing.assert_close(seen, seen.flip(0)), torch.testing.assert_close(seen, seen.flip(1))
    once, twice = seen[2, 2] / seen[2, 3], seen[2, 1] / seen[2, 3]
    torch.testing.assert_close(twice, once**4), torch.testing.assert_close(seen[1, 3], seen[2, 2])
    assert once.item() == pytest.approx(2.718281828 ** (-1 / (2 * 1.7**2)), rel=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_prefix_tokens_take_the_mean_and_give_nothing(causal):
    block, v = create_block("hand_crafted", 6, num_heads=6, causal=causal), numbered(prefix=3, heads=6).clone()
    out = block.mix(v[..., :0], v[..., :0], v, GRID)
    mean = v[:, :, :3].mean() if causal else v[:, 0].mean()
    torch.testing.assert_close(out[:, :, :3], mean.expand(1, 6, 3, 1))
    v[:, :, :3] = 1e9
    assert torch.equal(block.mix(v[..., :0], v[..., :0], v, GRID)[:, :, 3:], out[:, :, 3:])


@pytest.mark.parametrize("heads", [1, 2, 5, 6, 8])
def test_by_default_there_are_as_many_patterns_as_heads_can_have(heads):
    both = NAMES[:heads]
    past = ("row", "column", "previous_row", "left", "up")[:heads]
    assert create_block("hand_crafted", 8 * heads, num_heads=heads).names == both
    assert create_block("hand_crafted", 8 * heads, num_heads=heads, causal=True).names == past
    assert blind_spot([create_block("hand_crafted", 8 * heads, num_heads=heads, causal=True).pattern]) == (
        903 - 6 * 28 if heads == 1 else 315 if heads == 2 else 0
    )


@pytest.mark.parametrize("dim, heads", [(64, 8), (96, 6), (35, 7), (384, 12), (5, 1)])
def test_without_a_number_of_heads_there_is_one_for_each_pattern(dim, heads):
    block = create_block("hand_crafted", dim)
    assert block.num_heads == heads and block.names == NAMES[:heads]


def test_what_is_looked_at_does_not_depend_on_the_image():
    block = create_block("hand_crafted", 12, num_heads=3)
    one, other = (block.attention(torch.randn(2, 3 + GRID.size, 12), GRID) for _ in range(2))
    assert torch.equal(one, other) and block.qkv.out_features == 12


@pytest.mark.parametrize("patterns", [(), ("row", "diagonal"), "row", ("row", "column", "up")])
def test_patterns_are_known_and_no_more_than_heads(patterns):
    with pytest.raises(ValueError, match="patterns="):
        create_block("hand_crafted", 12, num_heads=2, patterns=patterns)
