"""LSH attention: buckets, rounds, and what may not depend on what."""

import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.engines import buckets
from vision_attn.engines.buckets import Chunks

GRID = Grid(11, 17)
SIZES = [(1, 1), (1, 7), (19, 3), (13, 17)]


def new(heads=2, dim=10, **options):
    return create_block("lsh", dim, num_heads=heads, **{"chunk": 5, **options}).double().eval()


def tokens(grid=GRID, heads=2, prefix=0, batch=2, d=5):
    return torch.randn(3, batch, heads, prefix + grid.size, d, dtype=torch.float64)


def scores(q):
    """Of queries with those of length 1, ε included, on which the square of a query of zeros stands."""
    return 5**-0.5 * q @ (q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * 5**-0.5).mT


def assert_is_its_definition(block, q, k, v, grid):
    torch.testing.assert_close(block.mix(q, k, v, grid), block.weights(q, k, grid) @ v, rtol=1e-11, atol=1e-12)


# What is chosen


def test_a_bucket_is_the_direction_that_is_nearest_and_its_sign():
    block, grid = new(chunk=3, rounds=2), Grid(5, 13)  # 65 pixels: 5 directions
    q, k, _ = tokens(grid, prefix=3)
    chosen = block.choose(q, k, grid)
    assert chosen.shape == (2, 2, 2, 65) and chosen.dtype == torch.int64 and 0 <= chosen.min() <= chosen.max() < 10
    for image, head, hashed, i in [(0, 0, 0, 0), (1, 1, 1, 64), (0, 1, 0, 31), (1, 0, 1, 7)]:
        along = [(q[image, head, 3 + i] @ block.planes[p, head, hashed]).item() for p in range(5)]
        assert chosen[image, head, hashed, i] == max(range(10), key=lambda b: [*along, *(-a for a in along)][b])


def test_what_is_chosen_repeats_and_depends_on_no_other_image_and_no_prefix():
    block = new(rounds=2)
    q, k, _ = tokens(prefix=3)
    chosen = block.choose(q, k, GRID)
    assert torch.equal(block.choose(q, k, GRID), chosen) and not chosen.requires_grad
    q[0], q[:, :, :3] = 7 * torch.randn_like(q[0]), 1
    assert torch.equal(block.choose(q, k, GRID)[1], chosen[1])
    q[1] = q[1] * torch.linspace(0.1, 9, q.shape[2])[:, None]  # what counts is the direction
    assert torch.equal(block.choose(q, k, GRID)[1], chosen[1])


def test_there_are_as_many_buckets_as_fit_two_chunks_each_and_no_more_than_256():
    for chunk, n, count in [(5, 19, 2), (5, 40, 4), (5, 59, 4), (5, 60, 6), (1, 509, 254), (1, 2003, 256)]:
        assert 2 * new(chunk=chunk).directions(n) == count


def test_heads_and_rounds_and_layers_hash_each_for_themselves():
    one, other = new(rounds=2), new(rounds=2)
    q, k, _ = tokens()
    q = q[:, :1].expand(-1, 2, -1, -1)
    chosen = one.choose(q, k, GRID)
    assert not torch.equal(chosen[:, 0], chosen[:, 1]) and not torch.equal(chosen[:, :, 0], chosen[:, :, 1])
    assert not torch.equal(other.choose(q, k, GRID), chosen)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.choose(q, k, GRID), chosen)
    other.reset_parameters()
    assert not torch.equal(other.choose(q, k, GRID), chosen)


# What is seen


def seen_by_loops(buckets, chunk, causal):
    """Of one round, in plain loops over its buckets: which tokens each sees."""
    n = len(buckets)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for bucket in set(buckets):
        members = [i for i in range(n) if buckets[i] == bucket]
        for rank, i in enumerate(members):
            first = max(0, rank // chunk - 1) * chunk
            for j in members[first : (rank // chunk + 1) * chunk]:
                seen[i, j] = j < i if causal else j != i
    return seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5, 32, 400])
def test_one_round_is_a_softmax_over_the_own_chunk_and_the_one_before(chunk, causal):
    block = new(heads=1, dim=5, chunk=chunk, causal=causal)
    q, k, v = tokens(heads=1, batch=1)
    seen = seen_by_loops(block.choose(q, k, GRID)[0, 0, 0].tolist(), chunk, causal)
    alone = ~seen.any(dim=1)
    assert alone.any() or chunk > 5
    seen |= alone.diag()
    weights = scores(q).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(block.mix(q, k, v, GRID), weights @ v, rtol=1e-11, atol=1e-12)
    assert torch.equal(block.weights(q, k, GRID) > 0, seen[None, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
def test_rounds_that_hash_alike_are_one_round(causal, prefix):
    one, three = new(causal=causal), new(rounds=3, causal=causal)
    three.planes.copy_(one.planes.expand(-1, -1, 3, -1))
    q, k, v = tokens(prefix=prefix)
    assert_is_its_definition(three, q, k, v, GRID)
    if not prefix:  # which all rounds together see once
        torch.testing.assert_close(three.mix(q, k, v, GRID), one.mix(q, k, v, GRID), rtol=1e-11, atol=1e-12)


def test_what_more_rounds_see_counts_for_more():
    block, grid = new(rounds=3, chunk=7), Grid(2, 29)
    q, k, _ = tokens(grid)
    weights, chosen = block.weights(q, k, grid), block.choose(q, k, grid)
    times = sum(
        torch.stack([seen_by_loops(row.tolist(), 7, False) for row in chosen[:, :, r].flatten(0, 1)]) for r in range(3)
    ).unflatten(0, (2, 2))
    assert times.max() > 1 and torch.equal(times > 0, weights > 0)
    share = weights / scores(q).exp()
    torch.testing.assert_close(share, times * (share / times.clamp(min=1)).amax(dim=-1, keepdim=True))


def test_prefix_tokens_see_all_and_are_seen_by_all_once():
    q, k, _ = tokens(prefix=3)
    weights = new(rounds=2).weights(q, k, GRID)
    assert (weights[..., :3] > 0).all() and (weights[:, :, :3] > 0).all()
    itself = weights.diagonal(dim1=-2, dim2=-1)[..., 3:]
    assert (itself == 0).all()  # none is alone
    past = new(rounds=2, causal=True).weights(q, k, GRID)
    assert (past[..., :3] > 0).all() and (past[:, :, :3, 3:] == 0).all()


# Corners


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("chunk, rounds", [(1, 1), (1, 2), (3, 2), (17, 1), (500, 3)])
def test_tokens_that_are_all_alike(chunk, rounds, grid, prefix, causal):
    """All of them in one bucket of each round, the others empty."""
    block, grid = new(chunk=chunk, rounds=rounds, causal=causal), Grid(*grid)
    for alike in (torch.ones(5), torch.zeros(5)):
        q, k, v = tokens(grid, prefix=prefix)
        q = alike.double().expand_as(q)
        chosen = block.choose(q, k, grid)
        assert (chosen == chosen[..., :1]).all()
        assert_is_its_definition(block, q, k, v, grid)


@pytest.mark.parametrize("causal", [False, True])
def test_both_routes_are_the_definition_where_images_choose_differently(causal, monkeypatch):
    """A mask that one image has must not serve another: each route, gradients too."""
    block = new(rounds=2, causal=causal)
    q, k, v = (t.requires_grad_() for t in tokens(prefix=3))
    chosen = block.choose(q, k, GRID).flatten(0, 1)
    assert len({tuple(row.flatten().tolist()) for row in chosen}) == len(chosen) == 4
    direction = torch.randn_like(v)
    exact = block.weights(q, k, GRID) @ v
    wanted = exact, *torch.autograd.grad(exact, (q, v), direction)
    for merged in (True, False):
        with monkeypatch.context() as patch:
            if not merged:
                patch.setattr(buckets, "kernel_for", lambda *tensors: None)
            out = block.mix(q, k, v, GRID)
            got = out, *torch.autograd.grad(out, (q, v), direction)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk, rounds, prefix, channels", [(5, 1, 0, 11), (5, 2, 3, 11), (32, 1, 0, 32)])
def test_later_pixels_change_no_bit_of_what_earlier_ones_get(
    chunk, rounds, prefix, channels, dtype, merged, monkeypatch
):
    """Chunks of odd sizes and widths too, which do not begin at the same place in a cache line."""
    if not merged:
        monkeypatch.setattr(buckets, "kernel_for", lambda *tensors: None)
    block = create_block("lsh", 2 * channels, num_heads=2, chunk=chunk, rounds=rounds, causal=True).to(dtype)
    x = torch.randn(2, prefix + GRID.size, 2 * channels).to(dtype)
    with torch.no_grad():
        out = block(x, GRID)
        for place in (0, 16, 17, 93, 185):
            changed = x.clone()
            changed[:, prefix + place + 1 :] = 10 * torch.randn_like(changed[:, prefix + place + 1 :])
            other = block(changed, GRID)
            assert torch.equal(other[:, : prefix + place + 1], out[:, : prefix + place + 1])
            assert not torch.equal(other, out)


# The engine's table


@pytest.mark.parametrize("prefix", [0, 3])
def test_images_and_heads_are_computed_a_few_at_a_time(prefix, monkeypatch):
    """Which changes neither outputs nor gradients; five of the six go together, and one alone."""
    block, used, merge = new(rounds=2, heads=3, dim=15), [], buckets.Merged.apply
    inputs = [t.requires_grad_() for t in tokens(heads=3, prefix=prefix)]
    slope = torch.randn(inputs[0].shape, dtype=torch.float64)

    def answers():
        out = block.mix(*inputs, GRID)
        return [out, *torch.autograd.grad(out, inputs[::2], slope)]  # keys are made of queries

    wanted = answers()
    monkeypatch.setattr(buckets, "AT_ONCE", 5 * GRID.size * 5)
    monkeypatch.setattr(buckets.Merged, "apply", lambda *args: used.append(len(args[-1])) or merge(*args))
    for one, other in zip(answers(), wanted):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert used == [5, 1]


@pytest.mark.parametrize("count, size", [(1, 1), (3, 5), (300, 4), (7, 32)])
def test_every_token_has_a_slot_in_a_chunk_of_its_bucket_in_raster_order(count, size):
    bucket = torch.randint(count, (3, 187))
    bucket[1] = count - 1  # everything in one
    chunks = Chunks(bucket, count, size)
    for image in range(3):
        rows = [[t for t in row.tolist() if t >= 0] for row in chunks.token[image]]
        assert sorted(sum(rows, [])) == list(range(187)) and max(map(len, rows)) <= size
        found = {}
        for row in filter(None, rows):
            (own,) = {bucket[image, t].item() for t in row}
            found.setdefault(own, []).append(row)
        for own, parts in found.items():
            members = [t for t in range(187) if bucket[image, t] == own]
            assert sum(parts, []) == members and all(len(part) == size for part in parts[:-1])
    x = torch.randn(3, 187, 5)
    assert torch.equal(chunks.back(chunks.fold(x)), x)


def test_dropping_weights_is_for_one_round():
    assert new(attn_drop=0.3).attn_drop == 0.3
    with pytest.raises(ValueError, match="attn_drop=0.3: must be 0 with rounds=2"):
        new(attn_drop=0.3, rounds=2)
