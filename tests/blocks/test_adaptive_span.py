import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block, route
from vision_attn.blocks import adaptive_span
from vision_attn.blocks.adaptive_span import Others
from vision_attn.engines.bias import Bias
from vision_attn.engines.flash import Cpu, kernel_for
from vision_attn.engines.union import attend

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def of_spans(*z, span=5, ramp=2.5, causal=False):
    """A block whose heads have these spans."""
    block = create_block("adaptive_span", 13 * len(z), num_heads=len(z), span=span, ramp=ramp, causal=causal).double()
    with torch.no_grad():
        block.reach.copy_(torch.tensor(z, dtype=torch.float64) / span)
    return block


def tokens(heads=HEADS, prefix=0, widths=(13, 13, 17)):
    return [torch.randn(2, heads, prefix + GRID.size, d, dtype=torch.float64) for d in widths]


@pytest.mark.parametrize("causal", [False, True])
def test_each_pixel_softly_masks_what_is_far(causal):
    """One query and one key at a time: the softmax of all scores, then the mask, then divided by what is left."""
    block, (q, k, v) = of_spans(0.0, 1.3, 4.0, causal=causal), tokens()
    out = block.mix(q, k, v, GRID)
    for head, z in enumerate((0.0, 1.3, 4.0)):
        for i in range(GRID.size):
            last = i + 1 if causal else GRID.size
            shares = ((q[:, head, i, None] * k[:, head, :last]).sum(-1) * 13**-0.5).softmax(-1)
            mask = []
            for j in range(last):
                x = max(abs(i // 11 - j // 11), abs(i % 11 - j % 11))
                mask.append(1.0 if x <= z else 0.0 if x >= z + 2.5 else (2.5 + z - x) / 2.5)
            masked = shares * torch.tensor(mask, dtype=torch.float64)
            expected = ((masked / masked.sum(-1, keepdim=True))[..., None] * v[:, head, :last]).sum(1)
            torch.testing.assert_close(out[:, head, i], expected, rtol=1e-10, atol=1e-12)


def test_a_span_beyond_the_image_is_dense_attention():
    block, (q, k, v) = of_spans(11.0, 13.0, span=13), tokens(2, prefix=5)
    torch.testing.assert_close(block.mix(q, k, v, GRID), F.scaled_dot_product_attention(q, k, v), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("z", [0, 1, 2, 3])
def test_a_short_ramp_makes_it_a_hard_window(z):
    block, (q, k, v) = of_spans(*[float(z)] * HEADS, ramp=0.5), tokens(prefix=5)
    if z == 0:
        expected = F.scaled_dot_product_attention(
            q[:, :, :, None],
            *(torch.cat([t[:, :, None, :5].expand(-1, -1, 82, -1, -1), t[:, :, :, None]], 3) for t in (k, v)),
        )[:, :, 5:, 0]
    else:
        window = create_block("window", DIM, num_heads=HEADS, kernel_size=2 * z + 1)
        expected = window.mix(q, k, v, GRID)[:, :, 5:]
    torch.testing.assert_close(block.mix(q, k, v, GRID)[:, :, 5:], expected, rtol=1e-9, atol=1e-11)


def test_spans_are_learned_by_what_is_at_their_rim_alone():
    """The gradient of z is Σ over the ramp of (1 / R m) A (v_j - o): no pixel with m = 1 or m = 0 has a say."""
    block, (q, k, v) = of_spans(0.0, 1.3, 4.0), tokens()
    out, weights = block.mix(q, k, v, GRID), block.weights(q, k, GRID).detach()
    (slope,) = torch.autograd.grad(out.sum(), block.reach)
    y, x = torch.arange(GRID.size) // 11, torch.arange(GRID.size) % 11
    distance = torch.maximum((y - y[:, None]).abs(), (x - x[:, None]).abs()).double()
    gain = v.sum(-1)[:, :, None] - out.detach().sum(-1)[..., None]  # of a key for a query
    for head, z in enumerate((0.0, 1.3, 4.0)):
        m = (2.5 + z - distance) / 2.5
        rim = (m > 0) & (m < 1)
        expected = (weights * gain)[:, head, rim] / (2.5 * m[rim])
        torch.testing.assert_close(slope[head], 5 * expected.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by", ["dense", "union"])
@pytest.mark.parametrize("causal, prefix", [(False, 3), (True, 3), (True, 0)])
def test_what_a_kernel_gives_learns_as_the_definition_does(by, causal, prefix):
    """Also of z at a whole distance, where m has two slopes, and of one within a ramp beyond the image."""
    block, inputs = of_spans(2.0, 1.3, 4.7, causal=causal), tokens(prefix=prefix, widths=(13, 13, 13))
    given = [*(t.requires_grad_() for t in inputs), block.reach]
    assert kernel_for(*inputs) is not None
    with route(by) as taken:
        out = block.mix(*inputs, GRID)
    assert taken == {by}
    slope, wanted = torch.randn_like(out), block.weights(*inputs[:2], GRID) @ inputs[2]
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    for one, other in zip(torch.autograd.grad(out, given, slope), torch.autograd.grad(wanted, given, slope)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("by", ["dense", "union"])
def test_gradients_are_those_of_the_spans_of_the_forward(by):
    block, inputs = of_spans(2.3, 1.3, 4.7), [t.requires_grad_() for t in tokens(widths=(13, 13, 13))]
    with route(by):
        first, later = (block.mix(*inputs, GRID).square().sum() for _ in range(2))
        wanted = torch.autograd.grad(first, block.reach)
        block.reach.data.zero_()  # unseen by autograd, as what a framework swaps in
        torch.testing.assert_close(torch.autograd.grad(later, block.reach), wanted)


class HalfMasks(Cpu):
    """A kernel with masks in float16, as one on CUDA has them."""

    @staticmethod
    def mask_type(dtype):
        return torch.float16


def test_what_hides_is_finite_in_the_type_of_a_kernels_masks(monkeypatch):
    monkeypatch.setattr(adaptive_span, "kernel_for", lambda *tensors: HalfMasks)
    block, inputs = of_spans(2.3, 1.3, 0.0, span=3, ramp=1.5), tokens(widths=(13, 13, 13))
    out, wanted = block.mix(*inputs, GRID), block.weights(*inputs[:2], GRID) @ inputs[2]
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-3)
    slopes = (torch.autograd.grad(some.square().sum(), block.reach)[0] for some in (out, wanted))
    torch.testing.assert_close(*slopes, rtol=1e-2, atol=1e-3)
    least = torch.finfo(torch.float32).min / 2
    assert Bias(torch.full((1, 1, 2, 3), least), torch.zeros(1, 1, 1), None).as_mask(torch.float16).isfinite().all()


@pytest.mark.parametrize("by", ["dense", "union"])
def test_no_weights_are_kept_for_the_backward(by):
    block, grid, sizes = create_block("adaptive_span", 16, num_heads=2, span=3), Grid(23, 29), []
    q, k, v = (torch.randn(3, 2, grid.size, 8, requires_grad=True) for _ in range(3))
    with route(by), torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        block.mix(q, k, v, grid)
    weights = 3 * 2 * grid.size * (grid.size if by == "dense" else (2 * block.window.radius[0] + 1) ** 2)
    assert max(sizes) < weights / 1.5  # a bias of all pairs for all images, or of a tile


def test_the_papers_penalty_shortens_spans_and_none_winds_up_or_is_stuck_outside():
    block = of_spans(-0.5, 2.0, 5.5)  # two have left [0, 5]
    torch.testing.assert_close(block.spans(), torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64))
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    block.spans().mean().backward()
    torch.testing.assert_close(block.reach.grad, torch.tensor([0.0, 5 / 3, 5 / 3], dtype=torch.float64))
    block.reach.grad = None
    (-block.spans().mean()).backward()
    torch.testing.assert_close(block.reach.grad, -torch.tensor([5 / 3, 5 / 3, 0.0], dtype=torch.float64))
    block.reach.grad = None
    block(x, GRID).square().sum().backward()
    assert block.reach.grad[1] != 0
    optimizer = torch.optim.SGD([block.reach], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        block.spans().mean().backward()
        optimizer.step()
    assert (block.spans() == 0).all() and block.pattern.radius == (2, 2)
    assert block.reach.min() >= -0.1 - 0.05 * 5 / 3  # where it was, or one step beyond


def test_its_pattern_is_what_the_longest_span_sees():
    block = of_spans(0.0, 1.3, 4.0)
    assert block.pattern.radius == (6, 6) and block.window.radius == (7, 7)  # less than 6.5 away; at most 7.5
    seen = (block.weights(*tokens()[:2], GRID) != 0).any(dim=1).any(dim=0)
    assert torch.equal(seen, block.pattern.mask(GRID))
    assert create_block("adaptive_span", 32, span=4, ramp=1.0, device="meta").pattern.radius == (4, 4)


def test_a_cache_keeps_the_rows_of_the_largest_window():
    block = create_block("adaptive_span", 8, num_heads=1, span=3, ramp=1.5, causal=True)
    grid = Grid(31, 29)
    assert block.new_cache(1, grid).nbytes == (math.ceil(4.5) - 1 + 1) * 29 * 2 * 8 * 4
    assert block.new_cache(1, grid, full=True).nbytes == grid.size * 3 * 8 * 4


@pytest.mark.parametrize("init", [-0.1, 1.5, "half", None, True, math.nan])
def test_the_first_span_is_a_share_of_the_largest(init):
    with pytest.raises(ValueError, match="init="):
        create_block("adaptive_span", 32, init=init)
    assert create_block("adaptive_span", 32, init=1, span=4).spans().tolist() == [4.0]


def test_on_a_line_it_is_the_authors_attention_to_the_past():
    """Scores of the last S positions without the own one, softmax, a mask over them that ends in the last place with
    z + R, and what is left divided by its sum."""
    limit, z, ramp, length = 7, (0.0, 1.3, 4.0), 2.5, 23
    block = create_block("adaptive_span", DIM, num_heads=3, span=limit, ramp=ramp, causal=True, include_self=False)
    with torch.no_grad():
        block.double().reach.copy_(torch.tensor(z, dtype=torch.float64) / limit)
    q, k, v = torch.randn(3, 2, HEADS, length, 13, dtype=torch.float64)
    out = block.mix(q, k, v, Grid(1, length))
    template = torch.linspace(1 - limit, 0, limit, dtype=torch.float64)
    for i in range(limit, length):
        past = slice(i - limit, i)
        shares = ((q[:, :, i, None] * k[:, :, past]).sum(-1) / 13**0.5).softmax(-1)
        mask = torch.stack([((template + reach) / ramp + 1).clamp(0, 1) for reach in z])
        masked = shares * mask
        expected = ((masked / masked.sum(-1, keepdim=True))[..., None] * v[:, :, past]).sum(2)
        torch.testing.assert_close(out[:, :, i], expected, rtol=1e-10, atol=1e-12)
    assert not out[:, :, 0].any()  # nothing is before the first


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 7), Grid(5, 1), GRID])
def test_without_itself_a_pixel_sees_what_is_around_it(grid, causal):
    block = create_block("adaptive_span", 26, num_heads=2, span=3, include_self=False, causal=causal).double()
    q, k, v = torch.randn(3, 2, 2, grid.size, 13, dtype=torch.float64)
    weights = block.weights(q, k, grid)
    assert torch.equal((weights != 0).any(dim=1).any(dim=0), block.pattern.mask(grid))
    assert not weights.diagonal(dim1=2, dim2=3).any()
    torch.testing.assert_close(block.mix(q, k, v, grid), weights @ v, rtol=1e-10, atol=1e-12)
    alone = torch.arange(grid.size) < (1 if causal or grid.size == 1 else 0)
    torch.testing.assert_close(weights.sum(-1), (~alone).double().expand(2, 2, -1), rtol=1e-10, atol=1e-12)
    assert not block.averages and create_block("adaptive_span", 26).averages


def test_sampling_without_the_pixel_itself_gives_the_same():
    block = create_block("adaptive_span", 26, num_heads=2, span=3, ramp=1.5, include_self=False, causal=True).double()
    x = torch.randn(2, GRID.size, 26, dtype=torch.float64)
    for full in (False, True):
        cache = block.new_cache(2, GRID, full=full)
        out = torch.stack([block.step(x[:, i], i, cache) for i in range(GRID.size)], dim=1)
        torch.testing.assert_close(out, block(x, GRID), rtol=1e-10, atol=1e-12)


def test_all_others_are_a_pattern_too():
    q, k, v = tokens(prefix=2)
    seen = ~torch.eye(GRID.size, dtype=torch.bool)
    mask = F.pad(seen, (2, 0, 2, 0), value=True)
    out = attend(q, k, v, GRID, Others(), scale=13**-0.5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(Others().mask(GRID), seen) and not Others().causal
