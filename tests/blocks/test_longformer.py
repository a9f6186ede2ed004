import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Grid, create_block
from vision_attn.testing.case import lived_in

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH
DILATIONS = [1, 1, 2]  # of the heads


def new(**options):
    options = {"kernel_size": 3, "dilation": (1, 2), "tokens": 4, **options}
    return lived_in(create_block("longformer", DIM, num_heads=HEADS, **options))


def plain(block, x, prefix, causal):
    """Token by token and head by head, in loops: of global tokens by the second projections."""
    places = [None] * prefix + [(y, x) for y in range(5) for x in range(7)]
    local, of_global = (linear(x).unflatten(-1, (3, HEADS, WIDTH)) for linear in (block.qkv, block.qkv_global))
    out = torch.zeros(*x.shape[:2], HEADS, WIDTH, dtype=x.dtype)
    for i, here in enumerate(places):
        is_global = i < prefix + block.tokens
        for head, step in enumerate(DILATIONS):
            seen = []
            for j, there in enumerate(places):
                if causal and j > i and j >= prefix:
                    continue
                near = is_global or j < prefix + block.tokens
                if not near:
                    down, right = (abs(a - b) for a, b in zip(here, there))
                    near = down in (0, step) and right in (0, step)
                if near:
                    seen.append(j)
            qkv = of_global if is_global else local
            scores = (qkv[:, i, None, 0, head] * qkv[:, seen, 1, head]).sum(-1) * WIDTH**-0.5
            out[:, i, head] = (scores.softmax(-1)[..., None] * qkv[:, seen, 2, head]).sum(1)
    return block.proj(out.flatten(2))


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_whole_block_is_that_of_the_paper(prefix, causal, tokens):
    block, x = new(causal=causal, tokens=tokens), torch.randn(2, prefix + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(block(x, GRID), plain(block, x, prefix, causal), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_second_projections_are_felt_by_global_tokens_only_and_are_all_they_feel(prefix):
    block, x = new(), torch.randn(1, prefix + GRID.size, DIM, dtype=torch.float64)
    for linear, first, last in ((block.qkv_global, 0, prefix + 4), (block.qkv, prefix + 4, prefix + GRID.size)):
        before = block(x, GRID)
        with torch.no_grad():
            linear.weight += 0.1 * torch.randn_like(linear.weight)
        changed = (block(x, GRID) != before)[0].any(-1)
        assert changed[first:last].all() and changed.sum() == last - first


def test_with_no_other_tokens_it_is_dense_by_the_second_projections():
    block, x = new(tokens=99), torch.randn(2, 3 + GRID.size, DIM, dtype=torch.float64)
    dense = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    state = {f"in_proj_{name}": value for name, value in block.qkv_global.state_dict().items()}
    dense.load_state_dict(state | {f"out_proj.{name}": value for name, value in block.proj.state_dict().items()})
    torch.testing.assert_close(block(x, GRID), dense(x, x, x, need_weights=False)[0], rtol=1e-10, atol=1e-12)


def test_others_look_at_global_tokens_by_the_common_projections():
    block, x = new(), torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    q, k, v = block.heads(x, GRID)
    masks = block.pattern.head_masks(HEADS, GRID)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=masks).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block(x, GRID)[:, 4:], block.proj(expected)[:, 4:], rtol=1e-10, atol=1e-12)
    assert masks[:, 4:, :4].all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_its_attention_is_that_of_both_projections(prefix, causal):
    block = lived_in(create_block("longformer", DIM, num_heads=1, kernel_size=3, tokens=4, causal=causal))
    for linear in (block.qkv, block.qkv_global, block.proj):  # values and output as they are
        linear.weight.data[-DIM:] = torch.eye(DIM)
        linear.bias.data[-DIM:] = 0
    x = torch.randn(2, prefix + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(block(x, GRID), block.attention(x, GRID)[:, 0] @ x, rtol=1e-10, atol=1e-12)


def test_dilations_are_one_for_each_head_at_least():
    assert [part.first.dilation for part in new().pattern.by_head()] == [(1, 1), (2, 2)]
    assert [part.dilation for part in new(tokens=0).pattern.by_head()] == [(1, 1), (2, 2)]
    assert len(create_block("longformer", 32, num_heads=1).pattern.by_head()) == 1
    for options in ({"num_heads": 1, "dilation": (1, 2)}, {"dilation": ()}, {"dilation": 2}, {"dilation": (1, 0)}):
        with pytest.raises(ValueError, match="dilation=|num_heads=1"):
            create_block("longformer", 32, **options)


def test_without_tokens_and_prefix_nothing_is_global():
    block, x = new(tokens=0), torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    block(x, GRID).sum().backward()
    assert not block.qkv_global.weight.grad.any() and not block.qkv_global.bias.grad.any()
    block.zero_grad()
    block(torch.randn(2, 1 + GRID.size, DIM, dtype=torch.float64), GRID).sum().backward()
    assert block.qkv_global.weight.grad.any(dim=1).all()


@pytest.mark.parametrize("tokens", [-1, 1.5, True])
def test_wrong_numbers_of_tokens_are_named(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens}"):
        create_block("longformer", 32, tokens=tokens)


def layers_called(block, x):
    """Rows that the second projections are asked for as a layer, all images together."""
    rows = []
    handle = block.qkv_global.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][..., 0].numel()))
    block(x, GRID)
    handle.remove()
    return sum(rows)


def test_few_global_tokens_need_no_keys_and_values_of_all():
    """They do where a layer in between, dropout or more global tokens leave nothing to gain or no other way."""
    few = dict(num_heads=1, kernel_size=3, tokens=4)
    x = torch.randn(2, 1 + GRID.size, DIM)
    everyone = 2 * (1 + GRID.size)
    assert layers_called(create_block("longformer", DIM, **few), x) == 0
    assert layers_called(create_block("longformer", DIM, **few, qk_norm=True), x) == everyone
    assert layers_called(create_block("longformer", DIM, **few, attn_drop=0.1), x) == everyone
    assert layers_called(create_block("longformer", DIM, **few | {"tokens": 11}), x) == everyone


@pytest.mark.parametrize("bias", [True, False])
def test_without_keys_and_values_of_all_it_is_that_of_the_paper(bias):
    block = lived_in(create_block("longformer", DIM, num_heads=1, kernel_size=3, tokens=4, qkv_bias=bias, scale=0.3))
    x = torch.randn(2, 2 + GRID.size, DIM, dtype=torch.float64, requires_grad=True)
    felt = [x, *block.parameters()]
    for one, other in zip(gradients(block, x, felt), gradients(block.reference, x, felt)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def gradients(function, x, felt):
    out = function(x, GRID)
    return [out, *torch.autograd.grad(out.square().sum(), felt)]
