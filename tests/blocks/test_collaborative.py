import pytest
import torch
from torch import nn

from vision_attn import Grid, create_block
from vision_attn.cost import flops

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def test_where_each_head_takes_channels_of_its_own_it_is_dense_attention():
    options = dict(num_heads=HEADS, key_dim=DIM)
    ours, dense = create_block("collaborative", DIM, **options).double(), create_block("dense", DIM, **options).double()
    for name in ("qkv", "proj"):
        getattr(ours, name).load_state_dict(getattr(dense, name).state_dict())
    with torch.no_grad():
        ours.mixing.copy_(torch.eye(HEADS).repeat_interleave(13, dim=1))
        nn.init.zeros_(ours.content)
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x, GRID), dense(x, GRID), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.attention(x, GRID), dense.attention(x, GRID), rtol=1e-12, atol=1e-14)


def test_heads_that_weight_no_channel_look_by_content_alone():
    """What a key says for itself draws all queries alike, in the head that it says it to."""
    block = create_block("collaborative", DIM, num_heads=HEADS, key_dim=6).double()
    nn.init.zeros_(block.mixing)
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    weights = block.attention(x, GRID)
    expected = (2**-0.5 * x @ block.content.mT).softmax(dim=1).mT[:, :, None]  # D / heads = 2
    torch.testing.assert_close(weights, expected.expand_as(weights), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "dim, heads, key_dim", [(64, None, 16), (96, 6, 24), (96, 5, None), (39, 3, 9), (7, 7, 7), (1, None, 1)]
)
def test_queries_have_a_quarter_of_the_channels(dim, heads, key_dim):
    if key_dim is None:
        with pytest.raises(ValueError, match="num_heads=5: must divide dim=96"):
            create_block("collaborative", dim, num_heads=heads)
        return
    block = create_block("collaborative", dim, num_heads=heads)
    assert block.key_dim == key_dim and block.qkv.out_features == 2 * key_dim + dim


def test_heads_share_what_is_projected():
    """A change of one channel's query weights is felt by all heads."""
    block, x = create_block("collaborative", DIM, num_heads=HEADS).double(), torch.randn(1, 6, DIM, dtype=torch.float64)
    before = block.attention(x, Grid(2, 3))
    with torch.no_grad():
        block.qkv.weight[0] += 1
    assert ((block.attention(x, Grid(2, 3)) - before).abs().amax(dim=(0, 2, 3)) > 1e-6).all()


def test_each_head_compares_all_channels():
    n, x = GRID.size, torch.empty(1, GRID.size, 24, device="meta")
    block = create_block("collaborative", 24, num_heads=3, key_dim=12, content_bias=False, device="meta").eval()
    assert block.content is None
    # values are made as wide as keys
    assert flops(block, x, GRID) == 2 * (n**2 * (3 * 12 + 3 * 12) + n * 24 * (2 * 12 + 24 + 24))


def test_queries_of_all_heads_are_not_normalised():
    with pytest.raises(ValueError, match="qk_norm=True: must be False: heads share"):
        create_block("collaborative", DIM, num_heads=HEADS, qk_norm=True)
