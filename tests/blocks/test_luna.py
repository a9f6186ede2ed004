import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("luna", DIM, num_heads=HEADS, **{"memory": 3, **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


def test_memory_reads_everything_and_pixels_read_the_memory():
    block, (q, k, v) = new(), random_qkv()
    read = [
        [F.scaled_dot_product_attention(token[:, None].expand(2, -1, -1, -1), k, t) for t in (k, v)]
        for token in block.memory.unbind(dim=1)
    ]
    keys, values = (torch.cat(some, dim=2) for some in zip(*read))
    expected = F.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


def test_with_one_token_all_are_told_the_same():
    block, (q, k, v) = new(memory=1), random_qkv()
    out = block.mix(q, k, v, GRID)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("prefix", [0, 2])
def test_causal_packs_are_means_of_the_past_one_pixel_after_another(prefix):
    block, (q, k, v) = new(causal=True), random_qkv(prefix + GRID.size)
    out = block.mix(q, k, v, GRID)
    for t in range(prefix + GRID.size):
        seen = max(t + 1, prefix)
        for head, tokens in enumerate(block.memory):
            shares = torch.stack([(1 + 2 ** (k[:, head, :seen] @ p * WIDTH**-0.5)).log2() for p in tokens], dim=-1)
            keys, values = (shares.mT @ x[:, head, :seen] / shares.sum(dim=1)[..., None] for x in (k, v))
            weights = (keys @ q[:, head, t, :, None] * WIDTH**-0.5).softmax(dim=1)
            torch.testing.assert_close(out[:, head, t], (weights * values).sum(dim=1), rtol=1e-11, atol=1e-13)


def test_a_share_is_one_where_a_key_says_nothing_and_grows_with_its_score():
    block = new(causal=True)
    assert (block.shares(torch.zeros(2, HEADS, 5, WIDTH, dtype=torch.float64)) == 1).all()
    with torch.no_grad():
        block.memory.fill_(1.0)
    keys = torch.full((1, HEADS, 1, WIDTH), 5.0, dtype=torch.float64)
    assert block.shares(keys).flatten()[0].item() == pytest.approx(math.log2(1 + 2**10.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_future_changes_no_bit_of_the_past(dtype, prefix):
    block, grid = new(causal=True).to(dtype), Grid(13, 17)  # of several chunks
    inputs = [t.to(dtype) for t in random_qkv(prefix + grid.size)]
    out = block.mix(*inputs, grid)
    for place in (0, 16, 63, 64, 130):
        changed = [t.clone() for t in inputs]
        for t in changed:
            t[:, :, prefix + place + 1 :] = 10 * torch.randn_like(t[:, :, prefix + place + 1 :])
        other = block.mix(*changed, grid)
        assert torch.equal(other[:, :, : prefix + place + 1], out[:, :, : prefix + place + 1])
        assert not torch.equal(other, out)


def test_the_state_does_not_grow_with_the_image():
    block = new(causal=True).float()
    small, large = (block.new_cache(5, grid).nbytes for grid in (Grid(2, 3), Grid(97, 89)))
    assert small == large == 5 * HEADS * 3 * (2 * WIDTH + 1) * 4
    with pytest.raises(ValueError, match="full=True"):
        block.new_cache(5, GRID, full=True)


def test_a_past_of_low_scores_is_averaged_as_one_of_high_scores():
    """Where all shares would vanish in float32: the first mean is the first value."""
    block, (q, k, v) = new(causal=True).float(), random_qkv().float()
    with torch.no_grad():
        block.memory.fill_(-1.0)
    k.abs_()
    for size in (1, 1e3, 1e6):
        out = block.mix(q, size * k, v, GRID)
        torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
        assert (out.amax(dim=2) <= v.amax(dim=2) + 1e-5).all() and (out.amin(dim=2) >= v.amin(dim=2) - 1e-5).all()
