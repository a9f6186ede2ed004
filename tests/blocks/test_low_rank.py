import math

import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.cost import parameters

GRID = Grid(11, 13)  # 143 positions: three chunks, the last not full
DIM, HEADS, WIDTH = 34, 2, 17


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_it_pools_pixels_by_the_bilinear_score_of_the_paper(causal, l2_norm):
    """score = tanh(cᵀ P_h Q_hᵀ x), of some context c and matrix P whose product is the block's `context`."""
    block = create_block("low_rank", DIM, num_heads=HEADS, l2_norm=l2_norm, causal=causal).double()
    c, p = torch.randn(DIM, dtype=torch.float64), torch.randn(DIM, HEADS, WIDTH, dtype=torch.float64) / DIM
    with torch.no_grad():
        block.context.copy_(torch.einsum("c,chr->hr", c, p))
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    q_matrix = block.qkv.weight[:DIM].T.unflatten(1, (HEADS, WIDTH))  # Q
    q_bias = block.qkv.bias[:DIM].unflatten(0, (HEADS, WIDTH))
    _, k, v = block.heads(x, GRID)
    out = block.mix(k, k, v, GRID)
    for image in range(2):
        scores = torch.stack(
            [
                torch.stack([torch.tanh(c @ p[:, h] @ (q_matrix[:, h].T @ pixel + q_bias[h])) for h in range(HEADS)])
                for pixel in x[image]
            ]
        )  # (pixels, heads)
        if l2_norm:
            scores = scores / scores.norm(dim=1, keepdim=True)
        for i in range(0, GRID.size, 29):
            seen = i + 1 if causal else GRID.size
            for h in range(HEADS):
                wanted = scores[:seen, h].softmax(0) @ v[image, h, :seen]
                torch.testing.assert_close(out[image, h, i], wanted, rtol=1e-9, atol=1e-10)


def test_all_pixels_hear_the_same_and_none_outweighs_another_by_more_than_e_squared():
    block = create_block("low_rank", DIM, num_heads=HEADS).double()
    _, k, v = 100 * torch.randn(3, 2, HEADS, GRID.size, WIDTH, dtype=torch.float64)
    weights, out = block.weights(k, k, GRID), block.mix(k, k, v, GRID)
    assert torch.equal(weights, weights[:, :, :1].expand_as(weights))
    assert torch.equal(out, out[:, :, :1].expand_as(out))
    ratio = weights.amax(-1) / weights.amin(-1)
    assert (ratio <= math.exp(2) * (1 + 1e-12)).all() and (ratio > 7).all()


def test_the_order_of_pixels_does_not_matter():
    block = create_block("low_rank", DIM, num_heads=HEADS).double()
    x, order = torch.randn(2, GRID.size, DIM, dtype=torch.float64), torch.randperm(GRID.size)
    torch.testing.assert_close(block(x[:, order], GRID), block(x, GRID), rtol=1e-10, atol=1e-12)


def test_a_causal_sequence_ends_with_what_the_whole_image_gives():
    past, whole = (create_block("low_rank", DIM, num_heads=HEADS, causal=causal).double() for causal in (True, False))
    whole.load_state_dict(past.state_dict())
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    out = past(x, GRID)
    torch.testing.assert_close(out[:, -1], whole(x, GRID)[:, -1], rtol=1e-10, atol=1e-12)
    assert (out[:, :5] - out[:, :1]).abs().max() < 1e-12 < (out[:, 5:] - out[:, :1]).abs().max()  # prefix tokens alike


def test_there_are_no_queries_to_project():
    block = create_block("low_rank", DIM, num_heads=HEADS, key_dim=HEADS)  # rank 1, as the source's
    assert block.context.shape == (HEADS, 1)
    assert parameters(block) == HEADS + (DIM + 1) * (HEADS + DIM) + (DIM + 1) * DIM
    assert block.heads(torch.randn(3, GRID.size, DIM), GRID)[0].shape == (3, HEADS, GRID.size, 0)


def test_the_state_is_as_small_as_one_pixel():
    block = create_block("low_rank", DIM, num_heads=HEADS, causal=True)
    assert block.new_cache(3, Grid(97, 89)).nbytes == 3 * HEADS * (WIDTH + 1) * 4


@pytest.mark.parametrize(
    "options, said",
    [({"attn_drop": 0.1}, "attn_drop=0.1"), ({"scale": 1.0}, "scale=1.0"), ({"l2_norm": True}, "l2_norm=True")],
)
def test_what_it_has_no_use_for_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        create_block("low_rank", 31, **options)
