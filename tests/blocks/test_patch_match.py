import itertools

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block
from vision_attn.blocks.patch_match import draw

GRID = Grid(7, 11)


def smooth(grid, heads=3, d=16, cells=4):
    """Queries and keys that change slowly over the map."""
    maps = F.interpolate(torch.randn(4, heads * d, cells, cells, dtype=torch.float64), tuple(grid), mode="bicubic")
    q, k = maps.flatten(2).unflatten(1, (heads, d)).transpose(2, 3).chunk(2)
    return q.contiguous(), k.contiguous()


def by_loops(block, q, k, grid):
    """The search as it is told, pixel by pixel, for one image and head (N, d)."""
    height, width = grid
    scores, prime = (q @ k.mT).tolist(), 2**31 - 1
    places = [divmod(place, width) for place in range(height * width)]

    def draws(place, number):
        z = (place * 48271 + number * 69621 + block.seed) % prime
        for _ in range(3):
            z = (z * z + 48271 * z + 11) % prime
        return z // 128 / 2**24

    def best_of(place, places):
        """The first of the best, the first place being the match so far; from outside moved to the border."""
        inside = [(min(max(row, 0), height - 1), min(max(column, 0), width - 1)) for row, column in places]
        known = [(row, column) for row, column in inside if not (block.causal and row * width + column > place)]
        return max(known, key=lambda match: scores[place][match[0] * width + match[1]])

    used = iter(range(1, 10**6))
    first, second = next(used), next(used)
    match = [
        best_of(place, [here, (int(height * draws(place, first)), int(width * draws(place, second)))])
        for place, here in enumerate(places)
    ]
    for number in range(block.rounds):
        step, known = 2 ** (block.rounds - 1 - number), list(match)
        up, down = (2, 0) if block.causal else (1, 1)
        for place, (row, column) in enumerate(places):
            offers = [known[place]]
            for y, x in itertools.product(range(-up, down + 1), (-1, 0, 1)):
                of_row = min(max(row + y * step, 0), height - 1)
                of_column = min(max(column + x * step, 0), width - 1)
                other = of_row * width + of_column
                if other != place and not (block.causal and other > place):
                    at_row, at_column = known[other]
                    offers.append((at_row + row - of_row, at_column + column - of_column))
            match[place] = best_of(place, offers)
        pairs = [(next(used), next(used)) for _ in range(block.searches)]
        for place, (row, column) in enumerate(match):
            offers = [(row, column)]
            for halved, pair in enumerate(pairs):
                away, along = (
                    torch.tensor((2 * draws(place, draw) - 1) * n / 2**halved).round().int().item()
                    for draw, n in zip(pair, grid)
                )
                offers.append((row + away, column + along))
            match[place] = best_of(place, offers)
    return [row * width + column for row, column in match]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, dict(rounds=3, searches=2, seed=5)])
def test_matches_are_those_of_the_search_pixel_by_pixel(causal, options):
    block = create_block("patch_match", 3, num_heads=3, causal=causal, **options)
    q, k = smooth(GRID)
    chosen = block.choose(q, k, GRID)
    for image, head in ((0, 0), (1, 2)):
        assert chosen[image, head].tolist() == by_loops(block, q[image, head], k[image, head], GRID)


def test_where_maps_are_smooth_most_pixels_find_their_best_key():
    grid = Grid(37, 41)
    q, k = smooth(grid, heads=2, cells=6)
    block = create_block("patch_match", 2, num_heads=2)
    keys, seen = block.windows(block.choose(q, k, grid), grid)
    best = (q @ k.mT).argmax(dim=-1, keepdim=True)
    assert seen.all() and ((keys == best).any(dim=-1)).double().mean() > 0.85


def test_the_match_is_never_worse_than_the_pixel_itself():
    block, (q, k) = create_block("patch_match", 3, num_heads=3), smooth(GRID)
    scores, match = q @ k.mT, block.choose(q, k, GRID)
    assert (scores.gather(-1, match[..., None])[..., 0] >= scores.diagonal(dim1=-2, dim2=-1)).all()


@pytest.mark.parametrize("grid, size", [(GRID, 9), (Grid(1, 11), 3), (Grid(2, 2), 4), (Grid(1, 1), 1)])
def test_a_window_has_as_many_keys_as_the_map_lets_it(grid, size):
    block, (q, k) = create_block("patch_match", 3, num_heads=3), smooth(grid)
    weights = block.weights(q, k, grid)
    assert ((weights > 0).sum(dim=-1) == size).all()
    match = block.choose(q, k, grid)
    assert (weights.gather(-1, match[..., None]) > 0).all()
    keys, seen = block.windows(match, grid)
    found = torch.zeros_like(weights, dtype=torch.bool)
    for key, is_seen in zip(keys.unbind(-1), seen.unbind(-1)):
        found |= (torch.arange(grid.size) == key[..., None]) & is_seen[..., None]
    assert torch.equal(found, weights > 0)


@pytest.mark.parametrize("place", [13, 6 * 17 + 8])
def test_a_causal_search_knows_nothing_of_what_is_to_come(place):
    block, grid = create_block("patch_match", 7, num_heads=7, causal=True), Grid(13, 17)
    q, k = smooth(grid, heads=7)
    match = block.choose(q, k, grid)
    assert (match <= torch.arange(grid.size)).all()
    for t in (q, k):
        t[:, :, place + 1 :] = 5 * torch.randn_like(t[:, :, place + 1 :])
    assert torch.equal(block.choose(q, k, grid)[..., : place + 1], match[..., : place + 1])


def test_draws_are_even_and_rows_do_not_follow_from_columns():
    drawn = draw(torch.arange(5003), 7, seed=0).double()
    assert 0 <= drawn.min() and drawn.max() < 1
    torch.testing.assert_close(drawn.mean(dim=1), torch.full((7,), 0.5).double(), rtol=0, atol=0.02)
    assert (torch.corrcoef(drawn) - torch.eye(7)).abs().max() < 0.05
    quarters = ((4 * drawn[0]).long() * 4 + (4 * drawn[1]).long()).bincount(minlength=16)
    assert (quarters / 5003 * 16 - 1).abs().max() < 0.2
    other = draw(torch.arange(5003), 7, seed=1)
    assert (other == drawn).double().mean() < 0.01


def test_even_windows_are_refused():
    with pytest.raises(ValueError, match="window=4: must be odd"):
        create_block("patch_match", 8, window=4)
