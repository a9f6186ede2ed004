import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(7, 11)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("adaptive_connection", DIM, num_heads=HEADS, **{"edges": 5, "width": 3, **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


def scores(block, q, k, grid):
    """g of all pairs, from the means of each row and each column, (B, heads, N, H, W)."""
    (row_q, column_q), (row_k, column_k) = block.of_queries, block.of_keys
    image = k.unflatten(2, grid)
    rows, columns = (image @ row_k[:, None]).mean(dim=3), (image @ column_k[:, None]).mean(dim=2)
    return (q @ row_q @ rows.mT)[..., :, None] + (q @ column_q @ columns.mT)[..., None, :]


@pytest.mark.parametrize("edges", [1, 2, 5, 16, 30])
@pytest.mark.parametrize("grid", [GRID, Grid(1, 1), Grid(1, 13), Grid(13, 1), Grid(2, 17), Grid(19, 3), Grid(3, 5)])
def test_edges_are_the_best_of_all_pixels_though_only_crossings_are_compared(edges, grid):
    block, (q, k, _) = new(edges=edges), random_qkv(grid.size)
    chosen, most = block.choose(q, k, grid), min(edges, grid.size)
    expected = scores(block, q, k, grid).flatten(3).topk(most, dim=-1).indices
    assert chosen.shape == (2, HEADS, grid.size, edges)
    assert torch.equal(chosen[..., :most], expected) and (chosen[..., most:] == -1).all()


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_pixel_looks_along_its_edges_with_its_score_added(prefix):
    block, (q, k, v) = new(), random_qkv(prefix + GRID.size)
    out, g = block.mix(q, k, v, GRID), scores(block, q[:, :, prefix:], k[:, :, prefix:], GRID).flatten(3)
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    torch.testing.assert_close(out[:, :, :prefix], first, rtol=1e-11, atol=1e-13)
    for image, head, pixel in [(0, 0, 0), (1, 2, 40), (1, 1, 76)]:
        edges = sorted(range(GRID.size), key=lambda other: -g[image, head, pixel, other].item())[:5]
        seen = [*range(prefix), *(prefix + other for other in edges)]
        added = torch.cat([torch.zeros(prefix).double(), g[image, head, pixel, edges]])
        logits = k[image, head, seen] @ q[image, head, prefix + pixel] * WIDTH**-0.5 + added
        expected = logits.softmax(dim=0) @ v[image, head, seen]
        torch.testing.assert_close(out[image, head, prefix + pixel], expected, rtol=1e-11, atol=1e-13)


def test_with_as_many_edges_as_pixels_and_a_scorer_that_says_nothing_it_is_dense_attention():
    block, (q, k, v) = new(edges=GRID.size), random_qkv()
    torch.nn.init.zeros_(block.of_queries)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


def test_the_scorer_learns_which_pixels_to_rank_higher():
    """The value of one column is wanted, which keys tell: its pixels become the edges."""
    block, (q, k, _) = new(), random_qkv()
    q[..., 0] = 1
    image = k.unflatten(2, GRID)
    image[..., 0], image[:, :, :, 4, 0] = 0, 3
    v = torch.zeros_like(k).unflatten(2, GRID)
    v[:, :, :, 4] = 1
    v = v.flatten(2, 3)

    def share():
        return (block.choose(q, k, GRID) % 11 == 4).double().mean()

    before, optimizer = share(), torch.optim.Adam([block.of_queries, block.of_keys], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (-block.mix(q, k, v, GRID).mean()).backward()
        optimizer.step()
    assert before < 0.5 and share() > 0.9


def test_a_choice_repeats_and_depends_on_nothing_but_its_own_image_and_head():
    block, (q, k, _) = new(), random_qkv(3 + GRID.size)
    chosen = block.choose(q, k, GRID)
    assert torch.equal(chosen, block.choose(q, k, GRID))
    q[1], k[1] = torch.randn(2, *q[1].shape, dtype=torch.float64)
    q[:, 0], k[:, 0] = torch.randn(2, *q[:, 0].shape, dtype=torch.float64)
    other = block.choose(q, k, GRID)
    assert torch.equal(other[0, 1:], chosen[0, 1:])
    assert not torch.equal(other[1], chosen[1]) and not torch.equal(other[0, 0], chosen[0, 0])


def test_edges_of_pixels_that_are_all_alike_are_different_pixels():
    block, (q, k, _) = new(), random_qkv()
    q, k = (t[:, :, :1].expand_as(t) for t in (q, k))
    chosen = block.choose(q, k, GRID)
    assert all(len(edges.unique()) == 5 for edges in chosen.flatten(0, 2)) and (chosen >= 0).all()
    assert ((block.weights(q, k, GRID) - 0.2).abs() < 1e-12).sum() == chosen.numel()


def test_numbers_that_are_none_stay_none():
    """A choice among them must not leave the image, whose rows are fewer than edges."""
    for bad in (torch.nan, torch.inf):
        block, (q, k, v) = new(edges=16), random_qkv()
        q[0, 0, 3, 1] = k[1, 2, 40, 0] = bad
        assert block.choose(q, k, GRID).amax() < GRID.size
        out = block.mix(q, k, v, GRID)
        assert out[0, 1].isfinite().all() and not out[0, 0, 3].isfinite().all()
