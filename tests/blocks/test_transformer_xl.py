import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Grid, create_block
from vision_attn.pattern import BlindSpot

GRID = Grid(7, 5)
DIM, HEADS = 39, 3


def new(**options):
    block = create_block("transformer_xl", DIM, num_heads=HEADS, **{"memory": 2, "waves": 3} | options).double()
    with torch.no_grad():
        for parameter in (block.u, block.w):
            parameter.normal_()
    return block


@pytest.mark.parametrize("memory", [0, 1, 2, None])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_are_the_papers_pair_by_pair(causal, memory):
    with pytest.warns(BlindSpot) if causal and memory == 0 else torch.no_grad():
        block = new(causal=causal, memory=memory)
    q, k, v = torch.randn(3, 2, HEADS, GRID.size, 13, dtype=torch.float64)
    out = block.mix(q, k, v, GRID)
    for i in (0, 4, 17, 22, 34):
        scores = []
        for j in range(GRID.size):
            down, right = i // 5 - j // 5, i % 5 - j % 5
            far = memory is not None and abs(down) > memory
            if far or (causal and j > i):
                scores.append(torch.full((2, HEADS), -math.inf))
                continue
            waves = [
                wave(t * 10000 ** (-f / 3)) for wave in (math.sin, math.cos) for t in (down, right) for f in range(3)
            ]
            key_of_place = block.W_R @ torch.tensor(waves, dtype=torch.float64)  # (heads, d)
            content = ((q[:, :, i] + block.u) * k[:, :, j]).sum(-1)
            scores.append((content + ((q[:, :, i] + block.w) * key_of_place).sum(-1)) * 13**-0.5)
        weights = torch.stack(scores, dim=-1).softmax(-1)
        expected = (weights[..., None] * v).sum(2)
        torch.testing.assert_close(out[:, :, i], expected, rtol=1e-10, atol=1e-12)


def test_without_biases_and_waves_it_is_attention_to_recent_rows():
    block = new(causal=True)
    for parameter in (block.u, block.w, block.W_R):
        nn.init.zeros_(parameter)
    q, k, v = torch.randn(3, 2, HEADS, 4 + GRID.size, 13, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=block.pattern.mask(GRID, 4))
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_move_down_together_stay_as_they_are(causal):
    """Those of which no row within the memory has come or gone."""
    block, x = new(causal=causal), torch.randn(2, 3 + GRID.size, DIM, dtype=torch.float64)
    above, below = torch.randn(2, 2, 4 * 5, DIM, dtype=torch.float64)
    taller = torch.cat([x[:, :3], above, x[:, 3:], below], dim=1)
    out, moved = block(x, GRID)[:, 3:].unflatten(1, GRID), block(taller, Grid(15, 5))[:, 3:].unflatten(1, (15, 5))
    last = 7 if causal else 5
    torch.testing.assert_close(moved[:, 6 : 4 + last], out[:, 2:last], rtol=1e-9, atol=1e-11)
    assert (moved[:, 4] - out[:, 0]).abs().min() > 1e-6


def test_prefix_tokens_have_no_place():
    """Where all keys are alike, positions see prefix tokens alike, by u · k alone, and are seen so."""
    block = new(memory=None)
    q, k = (torch.randn(1, HEADS, 1, 13, dtype=torch.float64).expand(-1, -1, 2 + GRID.size, -1) for _ in range(2))
    values = torch.eye(2 + GRID.size, dtype=torch.float64).expand(1, HEADS, -1, -1)
    weights = block.mix(q, k, values, GRID)
    torch.testing.assert_close(weights[:, :, :2], torch.full_like(weights[:, :, :2], 1 / (2 + GRID.size)))
    torch.testing.assert_close(weights[:, :, :, 0], weights[:, :, :, 1])
    assert weights[0, 0, 2, 2:].std() > 1e-3


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"memory": None}, {"memory": None, "causal": True}], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_stopped_gradient_is_that_of_constants_in_other_rows(options, prefix):
    """Beside the definition, with keys and values of the own row from the input, those of others from a constant."""
    block, x = new(stop_gradient=True, **options), torch.randn(2, prefix + GRID.size, DIM, dtype=torch.float64)
    x.requires_grad_()
    row = torch.arange(-prefix, GRID.size).div(5, rounding_mode="floor").clamp(min=-1)
    own = (row == row[:, None]) | (row < 0) | (row[:, None] < 0)
    (q, k, v), (_, k_fixed, v_fixed) = block.heads(x, GRID), block.heads(x.detach(), GRID)
    place = torch.arange(GRID.size)
    relative = F.pad(block.relative(q[:, :, prefix:], GRID, place // 5, place % 5), (prefix, 0, prefix, 0))
    scores = torch.where(own, *((q + block.u[:, None]) @ some.mT for some in (k, k_fixed))) + relative
    seen = block.pattern.mask(GRID, prefix)
    weights = (scores * block.scale).masked_fill(~seen, -math.inf).softmax(-1)
    mixed = (weights * own) @ v + (weights * ~own) @ v_fixed
    expected = block.proj(mixed.transpose(1, 2).flatten(2))
    slope = torch.randn_like(expected)
    out = block(x, GRID)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    felt = [x, *block.parameters()]
    found, wanted = (torch.autograd.grad(y, felt, slope, retain_graph=True) for y in (out, expected))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    free = new(**options)
    free.load_state_dict(block.state_dict())
    full = torch.autograd.grad(free(x, GRID), [x, *free.parameters()], slope)
    for one, other in zip(found[1:], full[1:]):  # the projections learn from all of it
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(found[0], full[0])


def test_two_rows_give_each_other_no_gradient_but_by_the_prefix():
    block = new(stop_gradient=True)
    x = torch.randn(1, GRID.size, DIM, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(block(x, GRID)[:, 15:20].sum(), x)
    rows = slope.unflatten(1, GRID).abs().amax(dim=(0, 2, 3))
    assert rows[3] > 0 and not rows[:3].any() and not rows[4:].any()


def test_layers_hear_so_many_rows_more():
    pattern = new(causal=True).pattern
    for layers in (1, 2, 3):
        reached = pattern.reach(GRID, layers).unflatten(1, GRID)[6 * 5 + 2]
        assert reached[max(0, 6 - 2 * layers) : 6].all() and not reached[: max(0, 6 - 2 * layers)].any()


@pytest.mark.parametrize("full", [False, True])
def test_sampling_keeps_one_row_more_than_is_remembered(full):
    block, x = new(causal=True), torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    cache = block.new_cache(2, GRID, full=full)
    with torch.no_grad():
        out = torch.stack([block.step(x[:, i], i, cache) for i in range(GRID.size)], dim=1)
        torch.testing.assert_close(out, block(x, GRID), rtol=1e-10, atol=1e-12)
    assert (
        cache.nbytes == 2 * (7 if full else 3) * 5 * HEADS * (2 * 32) * 8
    )  # 13 channels, 12 of waves and 7 of nothing


@pytest.mark.parametrize(
    "options, said", [({"memory": -1}, "memory=-1: must be an integer ≥ 0"), ({"waves": 0}, "waves=0")]
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        new(**options)
