"""Sinkhorn attention: what is sorted to a tile, what the border cuts, and what comes later."""

import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(11, 17)
N = GRID.size


def new(heads=2, dim=10, **options):
    return create_block("sinkhorn", dim, num_heads=heads, **{"tile": 3, **options}).double().eval()


def tokens(grid=GRID, prefix=0, batch=2):
    return torch.randn(3, batch, 2, prefix + grid.size, 5, dtype=torch.float64)


def tiles(grid, side):
    """Pixels of each tile by place, None where it lacks one."""
    down, right = -(-grid.height // side), -(-grid.width // side)
    places = [
        [(y * side + p, x * side + r) for p in range(side) for r in range(side)]
        for y in range(down)
        for x in range(right)
    ]
    return [[y * grid.width + x if y < grid.height and x < grid.width else None for y, x in tile] for tile in places]


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("grid, side", [((11, 17), 3), ((4, 6), 2), ((2, 7), 4), ((1, 1), 3)])
def test_a_tile_looks_at_itself_and_at_a_mixture_place_by_place(grid, side, cut):
    """In loops; a tile that lacks a place has its mean there, and a place that no tile has is not looked at."""
    block, grid = new(tile=side, cut=cut, iterations=4), Grid(*grid)
    q, k, v = (t[0, 0] for t in tokens(grid, batch=1))
    parts = tiles(grid, side)
    inside = [[i for i in part if i is not None] for part in parts]
    means = [[t[some].mean(dim=0) for some in inside] for t in (q, k, v)]
    order = torch.stack([torch.stack([a @ b for b in means[1]]) for a in means[0]]) * 5**-0.5 / 0.75
    order = order.exp()
    for _ in range(4):
        order = order / order.sum(dim=0)
        order = order / order.sum(dim=1, keepdim=True)
    out = block.mix(*(t[None, None].expand(1, 2, -1, -1) for t in (q, k, v)), grid)[0, 0]
    for u, some in enumerate(inside):
        keys, values = list(k[some]), list(v[some])
        for w in range(min(cut, len(parts))) if cut else [u]:
            for p in range(side**2):
                if parts[0][p] is not None:
                    for t, mean, found in ((k, means[1], keys), (v, means[2], values)):
                        there = [t[part[p]] if part[p] is not None else mean[x] for x, part in enumerate(parts)]
                        found.append(sum(share * one for share, one in zip(order[w], there)))
        weights = (5**-0.5 * q[some] @ torch.stack(keys).mT).softmax(dim=-1)
        torch.testing.assert_close(out[some], weights @ torch.stack(values), rtol=1e-10, atol=1e-11)


def test_the_mixture_is_nearly_doubly_stochastic_after_many_iterations():
    q, k = torch.randn(2, 3, 20, 5, dtype=torch.float64)
    order = new(iterations=100).order(q, k)
    torch.testing.assert_close(order.sum(dim=2), torch.ones(3, 20, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(order.sum(dim=1), torch.ones(3, 20, dtype=torch.float64), rtol=1e-6, atol=0)
    assert (new(iterations=1).order(q, k).sum(dim=1) - 1).abs().max() > 1e-3


def test_a_lower_temperature_sorts_more_sharply():
    q, k = torch.randn(2, 3, 20, 5, dtype=torch.float64)
    mild, sharp = (new(temperature=t).order(q, k).amax(dim=2) for t in (0.75, 0.1))
    assert (sharp > mild).double().mean() > 0.9


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid, side", [((11, 17), 3), ((1, 5), 4), ((2, 3), 1)])
def test_causal_a_run_mixes_those_before_it(grid, side, prefix):
    block, grid = new(tile=side, causal=True), Grid(*grid)
    q, k, v = tokens(grid, prefix=prefix, batch=1)
    out, (q, k, v), length = block.mix(q, k, v, grid)[0, 0], (t[0, 0] for t in (q, k, v)), side**2
    first, (q, k, v) = [k[:prefix], v[:prefix]], (t[prefix:] for t in (q, k, v))
    for i in range(grid.size):
        u = i // length
        keys, values = [*first[0], *k[u * length : i + 1]], [*first[1], *v[u * length : i + 1]]
        if u:
            known = q[: u * length + 1].mean(dim=0)
            runs = [slice(w * length, (w + 1) * length) for w in range(u)]
            share = torch.stack([known @ k[run].mean(dim=0) for run in runs]) * 5**-0.5 / 0.75
            share = share.softmax(dim=0)
            keys += list(sum(s * k[run] for s, run in zip(share, runs)))
            values += list(sum(s * v[run] for s, run in zip(share, runs)))
        weights = (5**-0.5 * torch.stack(keys) @ q[i]).softmax(dim=0)
        torch.testing.assert_close(out[prefix + i], weights @ torch.stack(values), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix, channels", [(0, 11), (3, 16)])
def test_later_pixels_change_no_bit_of_what_earlier_ones_get(prefix, channels, dtype):
    block = create_block("sinkhorn", 2 * channels, num_heads=2, tile=3, causal=True).to(dtype).eval()
    x = torch.randn(2, prefix + N, 2 * channels).to(dtype)
    with torch.no_grad():
        out = block(x, GRID)
        for place in (0, 8, 9, 16, 93, 185):
            changed = x.clone()
            changed[:, prefix + place + 1 :] = 10 * torch.randn_like(changed[:, prefix + place + 1 :])
            other = block(changed, GRID)
            assert torch.equal(other[:, : prefix + place + 1], out[:, : prefix + place + 1])
            assert not torch.equal(other, out)


def test_sorted_tiles_are_cut_off_only_where_later_ones_may_be_seen():
    with pytest.raises(ValueError, match="cut=2: must be 0 with causal=True: the first sorted tiles hold later pixels"):
        new(cut=2, causal=True)


def test_it_has_no_state_and_draws_nothing():
    block = new().train()
    q, k, v = tokens()
    assert set(block.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert torch.equal(block.mix(q, k, v, GRID), block.mix(q, k, v, GRID))
