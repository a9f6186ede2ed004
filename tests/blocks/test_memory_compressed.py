import pytest
import torch
import torch.nn.functional as F
from conftest import Largest

from vision_attn import Grid, create_block
from vision_attn.blocks import memory_compressed
from vision_attn.pattern import BlindSpot

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    block = create_block("memory_compressed", DIM, num_heads=HEADS, **options).double()
    with torch.no_grad():
        for parameter in (block.of_values, block.null):
            if parameter is not None:
                parameter.normal_()
    return block


def random_qkv(tokens):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_pixel_by_pixel_with_kernels_that_change_nothing_it_is_dense(causal, prefix):
    block = new(stride=1, causal=causal)
    with torch.no_grad():
        block.of_keys.copy_(torch.eye(WIDTH).repeat(HEADS, 1)[..., None, None])
        block.of_values.fill_(1)
    q, k, v = random_qkv(prefix + GRID.size)
    mask, keys, values = None, k, v
    if causal:  # beside the null key, which only prefix tokens do not see
        null = block.null[:, None].expand(2, -1, 1, -1)
        keys, values = torch.cat([null, k], dim=2), torch.cat([torch.zeros_like(null), v], dim=2)
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        mask[:prefix, :prefix] = True
        mask = torch.cat([(torch.arange(q.shape[2]) >= prefix)[:, None], mask], dim=1)
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_sums_over_their_pixels_and_seen_once_complete(causal):
    """Blocks of (2, 3) on 5 × 7: those at the bottom and right are cut, and have what kernels leave of them."""
    block = new(stride=(2, 3), causal=causal)
    of_keys, of_values = block.of_keys.unflatten(0, (HEADS, WIDTH)), block.of_values
    q, k, v = random_qkv(GRID.size)
    out = block.mix(q, k, v, GRID)
    for here in (0, 8, 9, 20, 34):
        keys, values = [], []
        for top in (0, 2, 4):
            for left in (0, 3, 6):
                pixels = [(y, x) for y in range(top, min(top + 2, 5)) for x in range(left, min(left + 3, 7))]
                if causal and max(y * 7 + x for y, x in pixels) > here:
                    continue
                key = value = 0
                for y, x in pixels:
                    kernel, weight = of_keys[..., y - top, x - left], of_values[:, y - top, x - left]
                    key = key + torch.einsum("noi,bni->bno", kernel, k[:, :, y * 7 + x])
                    value = value + weight[:, None] * v[:, :, y * 7 + x]
                keys.append(key)
                values.append(value)
        if causal:
            keys.append(block.null.expand(2, -1, -1))
            values.append(torch.zeros_like(v[:, :, 0]))
        keys, values = torch.stack(keys, dim=2), torch.stack(values, dim=2)
        expected = F.scaled_dot_product_attention(q[:, :, [here]], keys, values)
        torch.testing.assert_close(out[:, :, [here]], expected, rtol=1e-11, atol=1e-13)


def test_before_the_first_complete_block_there_is_nothing():
    block, (q, k, v) = new(stride=(2, 3), causal=True), random_qkv(GRID.size)
    out = block.mix(q, k, v, GRID)
    first = 1 * 7 + 2  # the last pixel of the first block
    assert (out[:, :, :first] == 0).all() and (out[:, :, first:] != 0).any(-1).all()
    x = torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    assert (block.attention(x, GRID)[:, :, :first] == 0).all()  # the null key is no token


def test_no_mask_of_all_queries_is_made():
    block, grid = create_block("memory_compressed", 8, num_heads=1, stride=2, causal=True), Grid(59, 67)
    x = torch.randn(1, grid.size, 8, requires_grad=True)
    with Largest() as largest:
        block(x, grid).sum().backward()
    assert largest.size < 1.2 * 1024 * (30 * 34 + 1)  # queries of a chunk × blocks, of 3953 queries


def test_in_chunks_it_is_the_same(monkeypatch):
    block, (q, k, v) = new(stride=(2, 3), causal=True), random_qkv(2 + GRID.size).requires_grad_()
    whole = block.mix(q, k, v, GRID)
    slopes = torch.autograd.grad(whole.square().sum(), [q, k, v, *block.parameters()], allow_unused=True)
    monkeypatch.setattr(memory_compressed, "ROWS", 11)
    parts = block.mix(q, k, v, GRID)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    again = torch.autograd.grad(parts.square().sum(), [q, k, v, *block.parameters()], allow_unused=True)
    torch.testing.assert_close(again, slopes, rtol=1e-11, atol=1e-13)


def test_values_start_as_means_of_whole_blocks_and_what_is_cut_is_filled_with_zeros():
    block = create_block("memory_compressed", DIM, num_heads=HEADS, stride=5).double()
    v = torch.ones(2, HEADS, 11 * 13, WIDTH, dtype=torch.float64)
    out = block.mix(torch.zeros_like(v), torch.zeros_like(v), v, Grid(11, 13))
    torch.testing.assert_close(out, torch.full_like(out, 11 * 13 / (15 * 15)), rtol=1e-6, atol=0)


def test_causal_alone_it_leaves_the_newest_pixels_to_others():
    with pytest.warns(BlindSpot, match="causal memory_compressed alone leaves"):
        new(causal=True)
    assert create_block("memory_compressed", DIM, causal=False).not_causal == ""
