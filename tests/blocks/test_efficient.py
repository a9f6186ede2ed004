import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.cost import flops

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def test_channels_of_queries_and_positions_of_keys_are_normalised_head_by_head():
    q, k = torch.randn(2, 2, HEADS, 5 + GRID.size, 13, dtype=torch.float64)
    v = torch.randn(2, HEADS, 5 + GRID.size, 17, dtype=torch.float64)
    out = create_block("efficient", DIM, num_heads=HEADS).mix(q, k, v, GRID)
    for image in range(2):
        for head in range(HEADS):
            queries = torch.stack([row.softmax(0) for row in q[image, head]])
            keys = torch.stack([column.softmax(0) for column in k[image, head].T], dim=1)
            expected = queries @ keys.T @ v[image, head]
            torch.testing.assert_close(out[image, head], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("value_dim", [15, 51])
def test_values_may_have_a_width_of_their_own(value_dim):
    block = create_block("efficient", DIM, num_heads=HEADS, key_dim=21, value_dim=value_dim).double()
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    q, k, v = block.qkv(x).split([21, 21, value_dim], dim=-1)
    heads = []
    for head in range(HEADS):
        queries, keys, values = (t.chunk(HEADS, dim=-1)[head] for t in (q, k, v))
        heads.append(queries.softmax(-1) @ keys.softmax(1).transpose(1, 2) @ values)
    expected = block.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(block(x, GRID), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value_dim", [0, -3, 1.5, "39", True, 40])
def test_wrong_widths_of_values_are_named(value_dim):
    with pytest.raises(ValueError, match=f"value_dim={value_dim!r}"):
        create_block("efficient", DIM, num_heads=HEADS, value_dim=value_dim)


def test_it_mixes_as_many_maps_as_a_head_has_channels():
    q, k = torch.randn(2, 1, 1, GRID.size, 5, dtype=torch.float64)
    weights = create_block("efficient", 5).weights(q, k, GRID)
    assert torch.linalg.matrix_rank(weights[0, 0], rtol=1e-9) == 5


def test_the_order_of_tokens_does_not_matter():
    block = create_block("efficient", DIM, num_heads=HEADS).double()
    x, order = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64), torch.randperm(5 + GRID.size)
    torch.testing.assert_close(block(x[:, order], GRID), block(x, GRID)[:, order], rtol=1e-9, atol=1e-12)


def test_cost_grows_with_the_pixels():
    block = create_block("efficient", DIM, device="meta")
    one, four = (flops(block, torch.empty(1, n * GRID.size, DIM, device="meta"), GRID) for n in (1, 4))
    assert four == 4 * one


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_large_map_half_precision_loses_no_more_than_rounding(dtype):
    """The softmax over positions makes numbers below those that float16 holds well."""
    grid = Grid(127, 131)
    q, k, v = torch.randn(3, 1, 1, grid.size, 7).to(dtype)
    block = create_block("efficient", 7)
    exact = block.mix(q.double(), k.double(), v.double() + 1, grid)
    error = block.mix(q, k, v + 1, grid).double() - exact
    assert error.abs().max() <= exact.abs().max() * torch.finfo(dtype).eps
