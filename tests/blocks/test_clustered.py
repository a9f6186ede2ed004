"""Clustered attention: clusters, their means, and their top keys."""

import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(11, 17)
N = GRID.size


def new(**options):
    return create_block("clustered", 10, num_heads=2, **{"cells": (2, 3), **options}).double().eval()


def tokens(grid=GRID, prefix=0, batch=2):
    return torch.randn(3, batch, 2, prefix + grid.size, 5, dtype=torch.float64)


def test_clusters_start_as_parts_of_the_image():
    q, k, _ = tokens()
    cluster, top = new(iterations=0).choose(q, k, GRID)
    parts = torch.tensor([[y * 2 // 11 * 3 + x * 3 // 17 for x in range(17)] for y in range(11)])
    assert torch.equal(cluster, parts.flatten().expand(2, 2, -1)) and top.shape[-1] == 0


def test_each_iteration_moves_every_token_to_the_nearest_mean():
    """Means of no tokens are out."""
    q, k, _ = tokens(Grid(1, 17))
    before, _ = new(cells=(3, 4), iterations=2).choose(q, k, Grid(1, 17))
    after, _ = new(cells=(3, 4), iterations=3).choose(q, k, Grid(1, 17))
    for some, labels, moved in zip(q.flatten(0, 1), before.flatten(0, 1), after.flatten(0, 1)):
        means = {c: some[labels == c].mean(dim=0) for c in labels.unique().tolist()}
        assert len(means) < 12
        nearest = [min(means, key=lambda c: (x - means[c]).norm().item()) for x in some]
        assert moved.tolist() == nearest


def test_what_is_chosen_repeats_and_depends_on_no_other_image():
    block = new(top=7)
    q, k, _ = tokens(prefix=3)
    cluster, top = block.choose(q, k, GRID)
    assert all(map(torch.equal, block.choose(q, k, GRID), (cluster, top)))
    q[0], k[0] = torch.randn_like(q[0]), torch.randn_like(k[0])
    other = block.choose(q, k, GRID)
    assert torch.equal(other[0][1], cluster[1]) and torch.equal(other[1][1], top[1])
    assert not torch.equal(other[0][0], cluster[0])


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_cluster_asks_by_its_mean(prefix):
    block = new()
    q, k, v = tokens(prefix=prefix)
    cluster, _ = block.choose(q, k, GRID)
    out = block.mix(q, k, v, GRID)[:, :, prefix:]
    for image, head, c in [(0, 0, 0), (1, 1, 5), (0, 1, 2)]:
        mine = cluster[image, head] == c
        mean = q[image, head, prefix:][mine].mean(dim=0)
        expected = (5**-0.5 * k[image, head] @ mean).softmax(dim=0) @ v[image, head]
        torch.testing.assert_close(out[image, head][mine], expected.expand(int(mine.sum()), -1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 3])
def test_top_keys_keep_their_sum_and_are_weighed_by_each_query(prefix):
    plain, improved = new(), new(top=7)
    q, k, _ = tokens(prefix=prefix)
    by_mean, by_each = plain.weights(q, k, GRID), improved.weights(q, k, GRID)
    cluster, top = improved.choose(q, k, GRID)
    for image, head, i in [(0, 0, 0), (1, 1, 186), (0, 1, 93)]:
        best = top[image, head, cluster[image, head, i]]
        row, other = by_mean[image, head, prefix + i], by_each[image, head, prefix + i]
        assert set(row.topk(7).indices.tolist()) == set(best.tolist())
        share = (5**-0.5 * k[image, head, best] @ q[image, head, prefix + i]).softmax(dim=0)
        torch.testing.assert_close(other[best], share * row[best].sum(), rtol=1e-11, atol=1e-13)
        rest = torch.ones(prefix + N, dtype=torch.bool).scatter(0, best, False)
        torch.testing.assert_close(other[rest], row[rest], rtol=1e-11, atol=1e-13)


def test_with_all_keys_at_the_top_it_is_dense_attention():
    q, k, v = tokens(prefix=3)
    dense = (5**-0.5 * q @ k.mT).softmax(dim=-1) @ v
    for top in (N + 3, 999):
        torch.testing.assert_close(new(top=top).mix(q, k, v, GRID), dense, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (19, 1), (3, 5)])
@pytest.mark.parametrize("cells, top", [((9, 8), 0), (1, 3), ((5, 7), 4)])
def test_fewer_tokens_than_clusters_and_tokens_that_are_all_alike(cells, top, grid):
    block, grid = new(cells=cells, top=top), Grid(*grid)
    for prefix in (0, 2):
        q, k, v = tokens(grid, prefix=prefix)
        for queries in (q, q[:, :, :1].expand_as(q), torch.zeros_like(q)):
            out = block.mix(queries, k, v, grid)
            torch.testing.assert_close(out, block.weights(queries, k, grid) @ v, rtol=1e-11, atol=1e-12)


def test_it_cannot_be_causal():
    with pytest.raises(ValueError, match="causal=True: clustered can't be causal: queries are averaged over the whole"):
        create_block("clustered", 10, causal=True)
