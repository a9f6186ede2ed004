"""Routing attention: clusters of tokens, and centroids that follow them."""

import pytest
import torch
from torch import nn

from vision_attn import Grid, create_block

GRID = Grid(11, 17)
N = GRID.size


def new(heads=2, dim=10, **options):
    return create_block("routing", dim, num_heads=heads, **{"clusters": 3, "chunk": 5, **options}).double()


def tokens(grid=GRID, heads=2, prefix=0, batch=2, d=5):
    return torch.randn(3, batch, heads, prefix + grid.size, d, dtype=torch.float64)


def normalised(x):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def assert_is_its_definition(block, q, k, v, grid):
    torch.testing.assert_close(block.mix(q, k, v, grid), block.weights(q, k, grid) @ v, rtol=1e-11, atol=1e-12)


# What is chosen


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_centroid_gathers_the_tokens_nearest_to_it(prefix):
    block = new(clusters=4)
    q, k, _ = tokens(prefix=prefix)
    chosen = block.choose(q, k, GRID)
    assert chosen.shape == (2, 2, 4, 47) and chosen.dtype == torch.int64  # 187 / 4, rounded up
    near = torch.einsum("hcd,bhnd->bhcn", block.centroids.value, normalised(q[:, :, prefix:]))
    for mine, all_of_them in zip(chosen.flatten(0, 2), near.flatten(0, 2)):
        others = torch.ones(N, dtype=torch.bool).scatter(0, mine, False)
        assert len(mine.unique()) == 47 and all_of_them[mine].min() > all_of_them[others].max()
    nearest = new(clusters=4, causal=True)
    nearest.load_state_dict(block.state_dict())
    assert torch.equal(nearest.choose(q, k, GRID), near.argmax(dim=2))


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_chosen_repeats_and_depends_on_no_other_image_and_no_prefix(causal):
    block = new(causal=causal)
    q, k, _ = tokens(prefix=3)
    chosen = block.choose(q, k, GRID)
    assert torch.equal(block.choose(q, k, GRID), chosen)
    q[0], q[:, :, :3] = 7 * torch.randn_like(q[0]), 1
    assert torch.equal(block.choose(q, k, GRID)[1], chosen[1])
    assert not torch.equal(new(causal=causal).choose(q, k, GRID)[1], chosen[1])


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_token_gets_the_mean_of_its_clusters_and_of_none_itself(prefix):
    block = new(clusters=5)
    q, k, v = tokens(prefix=prefix)
    x, chosen, out = normalised(q), block.choose(q, k, GRID), block.mix(q, k, v, GRID)
    counts = []
    for image, head, i in [(0, 0, i) for i in range(N)] + [(1, 1, 0), (1, 0, 186)]:
        mine = [c for c in chosen[image, head].tolist() if i in c]
        counts.append(len(mine))
        parts = []
        for members in mine or [[i]]:
            seen = [*range(prefix), *(prefix + j for j in members)]
            scores = 5**-0.5 * x[image, head, prefix + i] @ x[image, head, seen].mT
            parts.append(scores.softmax(dim=0) @ v[image, head, seen])
        torch.testing.assert_close(out[image, head, prefix + i], torch.stack(parts).mean(0), rtol=1e-11, atol=1e-12)
    assert min(counts) == 0 and max(counts) > 1


@pytest.mark.parametrize("chunk", [1, 5, 400])
def test_causal_it_sees_its_own_run_and_the_one_before(chunk):
    block = new(heads=1, dim=5, chunk=chunk, causal=True)
    q, k, _ = tokens(heads=1, batch=1, prefix=2)
    cluster, weights = block.choose(q, k, GRID)[0, 0].tolist(), block.weights(q, k, GRID)[0, 0]
    for i in range(N):
        members = [j for j in range(i + 1) if cluster[j] == cluster[i]]
        first = max(0, (len(members) - 1) // chunk - 1) * chunk
        assert weights[2 + i].nonzero().flatten().tolist() == [0, 1, *(2 + j for j in members[first:])]
    assert (weights[:2, 2:] == 0).all()


# Corners


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (19, 3)])
@pytest.mark.parametrize("clusters", [1, 4, 400])
def test_few_tokens_many_clusters_and_tokens_that_are_all_alike(clusters, grid, prefix, causal):
    block, grid = new(clusters=clusters, causal=causal, chunk=2), Grid(*grid)
    q, k, v = tokens(grid, prefix=prefix)
    for queries in (q, q[:, :, :1].expand_as(q), torch.zeros_like(q)):
        assert_is_its_definition(block, queries, k, v, grid)


def test_of_one_cluster_it_is_dense_attention():
    q, k, v = tokens(prefix=3)
    x = normalised(q)
    dense = (5**-0.5 * x @ x.mT).softmax(dim=-1) @ v
    torch.testing.assert_close(new(clusters=1).mix(q, k, v, GRID), dense, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix, channels", [(0, 11), (3, 16)])
def test_later_pixels_change_no_bit_of_what_earlier_ones_get(prefix, channels, dtype):
    block = create_block("routing", 2 * channels, num_heads=2, clusters=3, chunk=5, causal=True).to(dtype).eval()
    x = torch.randn(2, prefix + N, 2 * channels).to(dtype)
    with torch.no_grad():
        out = block(x, GRID)
        for place in (0, 16, 17, 93, 185):
            changed = x.clone()
            changed[:, prefix + place + 1 :] = 10 * torch.randn_like(changed[:, prefix + place + 1 :])
            other = block(changed, GRID)
            assert torch.equal(other[:, : prefix + place + 1], out[:, : prefix + place + 1])
            assert not torch.equal(other, out)


def test_dropping_weights_is_for_the_causal_form():
    assert new(attn_drop=0.3, causal=True).attn_drop == 0.3
    with pytest.raises(ValueError, match="attn_drop=0.3: must be 0 with causal=False"):
        new(attn_drop=0.3)


# Centroids


def test_centroids_are_of_unit_length_and_each_head_has_its_own():
    value = new().centroids.value
    assert value.shape == (2, 3, 5)
    torch.testing.assert_close(value.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    assert not torch.allclose(value[0], value[1])


@pytest.mark.parametrize("causal", [False, True])
def test_centroids_move_once_per_optimizer_step(causal):
    """Three micro-steps, then one fold: by the nearest tokens of all three."""
    block = new(decay=0.9, causal=causal)
    optimizer, was = torch.optim.SGD(block.parameters(), 0.1), block.centroids.sums.clone()
    seen = torch.zeros_like(was)
    for _ in range(3):
        x = torch.randn(2, 3 + N, 10, dtype=torch.float64)
        q = normalised(block.heads(x, GRID)[0][:, :, 3:].detach())
        nearest = torch.einsum("bhnd,hcd->bhnc", q, block.centroids.value).argmax(dim=-1)
        for image in range(2):
            for head in range(2):
                for i in range(N):
                    seen[head, nearest[image, head, i]] += q[image, head, i] / 5**0.5 * 3 / (6 * N)
        block(x, GRID).square().sum().backward()
        assert torch.equal(block.centroids.sums, was)
    optimizer.step()
    torch.testing.assert_close(block.centroids.sums, 0.9 * was + 0.1 * seen, rtol=1e-11, atol=1e-12)
    moved = block.centroids.sums.clone()
    optimizer.step()
    assert torch.equal(block.centroids.sums, moved)


def test_centroids_stay_in_eval_and_without_gradients_and_by_other_optimizers():
    block, other = new(), nn.Linear(3, 5)
    was, x = block.centroids.sums.clone(), torch.randn(2, N, 10, dtype=torch.float64)
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (block, other)]
    with torch.no_grad():
        block(x, GRID)
    block.eval()(x, GRID).sum().backward()
    block.train().weights(*tokens()[:2], GRID)
    optimizers[0].step()
    block(x, GRID).sum().backward()
    optimizers[1].step()
    assert torch.equal(block.centroids.sums, was)


def test_a_centroid_that_no_token_is_nearest_to_stays():
    block = new(decay=0.5)
    block.centroids.sums[0, 1] = 0.3 * torch.ones(5)  # x has mean 0: the product is 0
    block.centroids.sums[0, 0], block.centroids.sums[0, 2] = torch.tensor([[1.0, -1, 0, 0, 0], [-1, 1, 0, 0, 0]])
    was = block.centroids.sums.clone()
    block(torch.randn(2, N, 10, dtype=torch.float64), GRID).sum().backward()
    torch.optim.SGD(block.parameters(), 0.1).step()
    moved = (block.centroids.sums != was).any(dim=-1)
    assert moved.tolist() == [[True, False, True], [True, True, True]]


def test_a_loaded_state_gives_the_same_sets():
    one, other = new(), new()
    q, k, _ = tokens()
    assert not torch.equal(one.choose(q, k, GRID), other.choose(q, k, GRID))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.choose(q, k, GRID), other.choose(q, k, GRID))
    other.centroids.reset_parameters()
    assert not torch.equal(one.choose(q, k, GRID), other.choose(q, k, GRID))
