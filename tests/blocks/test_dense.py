import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Grid, create_block

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def test_it_is_timms_attention():
    options = dict(num_heads=HEADS, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    ours = create_block("dense", DIM, **options).double()
    theirs = timm.layers.Attention(DIM, **options).double()
    theirs.load_state_dict(ours.state_dict())  # strictly: the names are the same
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x, GRID), theirs(x), rtol=1e-12, atol=1e-12)


def test_its_weights_are_those_of_torch():
    q, k = torch.randn(2, 2, HEADS, 5 + GRID.size, 13, dtype=torch.float64)
    one_hot = torch.eye(5 + GRID.size, dtype=torch.float64).expand(2, HEADS, -1, -1)
    weights = create_block("dense", DIM, num_heads=HEADS).weights(q, k, GRID)
    torch.testing.assert_close(weights, F.scaled_dot_product_attention(q, k, one_hot), rtol=1e-12, atol=1e-14)


def test_the_order_of_tokens_does_not_matter():
    block = create_block("dense", DIM, num_heads=HEADS).double()
    x, order = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64), torch.randperm(5 + GRID.size)
    torch.testing.assert_close(block(x[:, order], GRID), block(x, GRID)[:, order], rtol=1e-9, atol=1e-12)


def test_causal_is_raster_order_after_prefix_tokens_that_see_one_another():
    q, k = torch.randn(2, 2, HEADS, 5 + GRID.size, 13, dtype=torch.float64)
    seen = create_block("dense", DIM, num_heads=HEADS, causal=True).weights(q, k, GRID) != 0
    for query in range(5 + GRID.size):
        for key in range(5 + GRID.size):
            assert (seen[:, :, query, key] == (key < 5 or key <= query)).all()
