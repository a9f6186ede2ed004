import pytest
import torch
from einops import rearrange
from torch import nn

from vision_attn import Grid, create_block, describe
from vision_attn.cost import flops

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_scores_of_earlier_layers_are_added(layers, causal):
    """With the matrices of scores, as the paper has them, kept from layer to layer."""
    block = create_block("residual_logits", DIM, num_heads=HEADS, layers=layers, causal=causal).double()
    tokens = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    unseen = torch.ones(5 + GRID.size, 5 + GRID.size, dtype=torch.bool).triu(1)
    unseen[:5, :5] = False
    x, scores = tokens, 0
    for layer in block.steps:
        q, k, v = rearrange(layer.qkv(x), "b t (three n d) -> three b n t d", three=3, n=HEADS)
        scores = scores + q @ k.mT / 13**0.5
        shares = (scores.masked_fill(unseen, -torch.inf) if causal else scores).softmax(-1)
        x = x + layer.proj(rearrange(shares @ v, "b n t d -> b t (n d)"))
    torch.testing.assert_close(block(tokens, GRID), x - tokens, rtol=1e-10, atol=1e-12)


def test_one_layer_is_dense_attention():
    one, dense = (create_block(name, DIM, num_heads=HEADS).double() for name in ("residual_logits", "dense"))
    one = create_block("residual_logits", DIM, num_heads=HEADS, layers=1).double()
    dense.load_state_dict(one.steps[0].state_dict())
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(one(x, GRID), dense(x, GRID), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.attention(x, GRID), dense.attention(x, GRID), rtol=1e-12, atol=1e-14)


def test_a_layer_without_queries_attends_as_the_one_before():
    """Its own scores are 0: what is left are those of the layer before."""
    block = create_block("residual_logits", DIM, num_heads=HEADS).double()
    first, second = block.steps
    with torch.no_grad():
        second.qkv.weight[:DIM], second.qkv.bias[:DIM] = 0, 0
    asked, real = [], type(second).mix
    for layer in block.steps:
        layer.mix = lambda q, k, v, grid, layer=layer: (
            asked.append(layer.weights(q, k, grid)) or real(layer, q, k, v, grid)
        )
    block(torch.randn(2, GRID.size, DIM, dtype=torch.float64), GRID)
    torch.testing.assert_close(asked[1], asked[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_layers_that_share_scores_have_the_weights_of_the_first(causal):
    """Made once, as a matrix, and multiplied by the values of each layer."""
    block = create_block("residual_logits", DIM, num_heads=HEADS, layers=3, share="scores", causal=causal).double()
    assert [layer.qkv.out_features for layer in block.steps] == [3 * DIM, DIM, DIM]
    tokens = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    x, shares = tokens, block.steps[0].attention(tokens, GRID)
    for layer in block.steps:
        v = rearrange(layer.qkv(x)[..., -DIM:], "b t (n d) -> b n t d", n=HEADS)
        x = x + layer.proj(rearrange(shares @ v, "b n t d -> b t (n d)"))
    torch.testing.assert_close(block(tokens, GRID), x - tokens, rtol=1e-10, atol=1e-12)


def test_a_cache_of_shared_scores_keeps_one_set_of_keys_a_layer():
    sums, scores = (
        create_block("residual_logits", DIM, num_heads=HEADS, layers=3, share=share, causal=True).new_cache(2, GRID)
        for share in ("sums", "scores")
    )
    assert sums.nbytes == 2 * GRID.size * DIM * (2 + 3 + 4) * 4  # of float32
    assert scores.nbytes == 2 * GRID.size * DIM * (2 + 2 + 2) * 4


@pytest.mark.parametrize("layers", [2, 3])
def test_its_attention_is_that_of_all_layers(layers):
    block = create_block("residual_logits", DIM, num_heads=1, layers=layers).double()
    for layer in block.steps:  # values and output as they are, so that only the attention acts
        for linear in (layer.qkv, layer.proj):
            linear.weight.data[-DIM:] = torch.eye(DIM)
            linear.bias.data[-DIM:] = 0
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    reached = block.attention(x, GRID)
    torch.testing.assert_close(reached.sum(-1), torch.ones_like(reached[..., 0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x, GRID), (2**layers - 1) * reached[:, 0] @ x, rtol=1e-10, atol=1e-12)


def test_a_layer_learns_from_the_scores_that_it_leaves_to_later_ones():
    """With its own output cut off, the first layer is felt through the second one's scores alone."""
    block = create_block("residual_logits", DIM, num_heads=HEADS).double()
    first, second = block.steps
    nn.init.zeros_(first.proj.weight), nn.init.zeros_(first.proj.bias)
    block(torch.randn(2, GRID.size, DIM, dtype=torch.float64), GRID).square().sum().backward()
    of_q, of_k, _ = first.qkv.weight.grad.split(DIM)
    assert of_q.abs().max() > 1e-6 and of_k.abs().max() > 1e-6


def test_it_costs_what_its_docstring_says():
    assert describe("residual_logits").cost == "2 layers N² d"
    n, x = GRID.size, torch.empty(1, GRID.size, 24, device="meta")
    for layers in (1, 2, 3):
        block = create_block("residual_logits", 24, num_heads=HEADS, layers=layers, device="meta").eval()
        assert flops(block, x, GRID) == 2 * (n**2 * 24 * layers * (layers + 1) + layers * 4 * n * 24**2)
        block = create_block("residual_logits", 24, num_heads=HEADS, layers=layers, share="scores", device="meta")
        assert flops(block.eval(), x, GRID) == 2 * (n**2 * 24 * layers * 2 + (2 * layers + 2) * n * 24**2)
