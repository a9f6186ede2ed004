"""The routes of exact sparse attention: flash calls merged by log-sum-exp, and concatenated scores."""

import warnings

import pytest
import torch
from conftest import chosen, in_turn
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_attn import Grid, create_block, route
from vision_attn.blocks.adaptive_span import Others
from vision_attn.engines import flash, union
from vision_attn.mixer import softmax_over
from vision_attn.pattern import All, Column, Past, Row, Window
from vision_attn.testing.case import BATCH, HEADS, KEY

GRIDS = [Grid(13, 17), Grid(17, 5), Grid(1, 23), Grid(29, 1), Grid(1, 1)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the flash kernel."""
    count = dict(forward=0, backward=0)

    class Counting(flash.Cpu):
        @staticmethod
        def forward(*args):
            count["forward"] += 1
            return flash.Cpu.forward(*args)

        @staticmethod
        def backward(*args):
            count["backward"] += 1
            return flash.Cpu.backward(*args)

    monkeypatch.setattr(union, "kernel_for", lambda q, k, v: flash.kernel_for(q, k, v) and Counting)
    return count


def inputs(grid, prefix=0, channels=KEY, dtype=torch.float64):
    return [torch.randn(BATCH, HEADS, prefix + grid.size, channels, dtype=dtype) for _ in range(3)]


def outputs_and_gradients(step, tensors, grid):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = step.mix(*tensors, grid)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, tensors, direction.to(out.dtype))]


@in_turn({"case": chosen("pattern_case"), "grid": GRIDS, "prefix": [0, 3]})
def test_both_routes_give_the_same(case, grid, prefix, monkeypatch, calls):
    for step in case.block().steps:
        tensors = inputs(grid, prefix)
        merged = outputs_and_gradients(step, tensors, grid)
        used = calls["forward"]
        with monkeypatch.context() as patch:
            patch.setattr(union, "kernel_for", lambda q, k, v: None)
            concatenated = outputs_and_gradients(step, tensors, grid)
        assert calls["forward"] == used
        for one, other in zip(merged, concatenated):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["window", "global_tokens"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_keys_that_groups_share_are_folded_for_few_images_at_a_time(name, prefix, calls, monkeypatch):
    block, grid = create_block(name, KEY * HEADS, num_heads=HEADS, kernel_size=3).double(), Grid(13, 17)
    tensors = inputs(grid, prefix)
    at_once = outputs_and_gradients(block, tensors, grid)
    before = dict(calls)
    monkeypatch.setattr(flash, "AT_ONCE", 2 * grid.size * KEY)
    for one, other in zip(outputs_and_gradients(block, tensors, grid), at_once):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    pieces = -(-BATCH * HEADS // 2)
    assert calls == {way: (pieces + 1) * count for way, count in before.items()}


@pytest.mark.parametrize("name", ["window", "dilated", "global_tokens", "adaptive_span"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_keys_that_groups_share_are_folded_for_few_groups_at_a_time(name, prefix, calls, monkeypatch):
    """Where one map is more than is folded at once; `Only` takes part in this, and so does a bias."""
    options = dict(span=2) if name == "adaptive_span" else dict(kernel_size=3)
    block, grid = create_block(name, KEY * HEADS, num_heads=HEADS, **options).double(), Grid(13, 17)
    tensors = inputs(grid, prefix)
    with route("union"):
        at_once = outputs_and_gradients(block, tensors, grid)
        before = dict(calls)
        monkeypatch.setattr(flash, "AT_ONCE", grid.size * KEY // 3)
        in_parts = outputs_and_gradients(block, tensors, grid)
    for one, other in zip(in_parts, at_once):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert all(calls[way] - count >= (count + 2) * BATCH * HEADS for way, count in before.items())


def test_several_sets_are_merged_and_one_is_not(pattern_case, calls):
    """One set goes to the public function, whichever kernel that takes, but where its groups share keys."""
    grid = Grid(13, 17)
    for step in pattern_case.block().steps:
        before = calls["forward"]
        own = "mix" in vars(type(step))  # it gathers keys by itself
        sets = [part.key_sets() for part in step.pattern.by_head()]
        several = not own and any(len(some) > 1 or some[0].overlap for some in sets)
        outputs_and_gradients(step, inputs(grid), grid)
        assert (calls["forward"] > before) == several
    assert calls["forward"] == calls["backward"]


def test_what_the_kernel_can_not_do_goes_the_other_way(calls):
    block, grid = create_block("criss_cross", 33, num_heads=3), Grid(5, 7)
    q, k, v = inputs(grid, dtype=torch.float32)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        block.mix(q.to(dtype), k.to(dtype), v.to(dtype), grid)
    assert calls["forward"] == 4 * 2  # row and column; of prefix tokens there are none
    before = calls["forward"]
    block.mix(q, k, v[..., :5], grid)  # values of another width
    block.mix(q.to("meta"), k.to("meta"), v.to("meta"), grid)
    block.mix(q[:0], k[:0], v[:0], grid)
    assert calls["forward"] == before


def test_an_empty_batch_has_an_empty_answer(pattern_case):
    grid = Grid(5, 7)
    for step in pattern_case.block().steps:
        out = outputs_and_gradients(step, [t[:0] for t in inputs(grid, 2)], grid)
        assert [t.shape for t in out] == [(0, HEADS, 2 + grid.size, KEY)] * 4


def test_channels_need_not_lie_side_by_side(pattern_case):
    """The kernel itself reads such tensors wrongly, without an error."""
    grid = Grid(5, 7)
    for step in pattern_case.block().steps:
        tensors = inputs(grid)
        wanted = outputs_and_gradients(step, tensors, grid)
        apart = [t.mT.contiguous().mT for t in tensors]
        for t, other in zip(outputs_and_gradients(step, apart, grid), wanted):
            torch.testing.assert_close(t, other, rtol=1e-10, atol=1e-12)
        one_slope = [t.clone().requires_grad_() for t in tensors]
        out = step.mix(*one_slope, grid)
        slopes = torch.autograd.grad(out.sum(), one_slope)  # a gradient that is one number, expanded
        again = torch.autograd.grad(step.mix(*one_slope, grid), one_slope, torch.ones_like(out))
        for t, other in zip(slopes, again):
            torch.testing.assert_close(t, other, rtol=1e-10, atol=1e-12)


@in_turn({"case": chosen("pattern_case"), "dtype": [torch.bfloat16, torch.float16]})
def test_gradients_in_half_precision_are_as_good_as_torchs(case, dtype):
    """Within twice the error of the plain formula in the same type, the rule of FlashAttention's own tests."""
    grid = Grid(13, 17)
    for step in case.block().steps:
        if getattr(step, "relative", None) is not None or isinstance(step.pattern, All | Past):  # torch's own kernel
            continue
        tensors = [t.to(dtype) for t in inputs(grid)]
        exact = outputs_and_gradients(step, [t.double() for t in tensors], grid)
        mask = step.pattern.head_masks(HEADS, grid)

        class Plain:
            @staticmethod
            def mix(q, k, v, grid, mask=mask, scale=step.scale):
                weights = (scale * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(dim=-1)
                return weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0) @ v  # nothing seen, nothing taken

        ours, torchs = outputs_and_gradients(step, tensors, grid), outputs_and_gradients(Plain, tensors, grid)
        for one, other, wanted in zip(ours, torchs, exact):
            error, allowed = ((t.double() - wanted).abs().max().item() for t in (one, other))
            assert error <= 2 * allowed


def test_a_kernel_of_the_cpu_that_errs_is_not_used(calls, monkeypatch):
    block, grid = create_block("criss_cross", 33, num_heads=3), Grid(5, 7)
    q, k, v = inputs(grid, dtype=torch.float32)
    monkeypatch.setattr(flash, "_agrees", {})
    monkeypatch.setattr(flash, "trial", lambda kernel, device, dtype: [0.5])
    with pytest.warns(UserWarning, match="torch's kernel for cpu and torch.float32 is not used: relative errors"):
        out = block.mix(q, k, v, grid)
    assert calls["forward"] == 0
    torch.testing.assert_close(out, block.weights(q, k, grid) @ v)


def test_the_kernel_of_the_cpu_is_tried_where_it_can_be(calls, monkeypatch):
    block, grid = create_block("criss_cross", 33, num_heads=3), Grid(5, 7)
    monkeypatch.setattr(flash, "_agrees", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FakeTensorMode():
            block.mix(*inputs(grid), grid)
        torch.func.functionalize(block.mix)(*inputs(grid), grid)
        assert not flash._agrees and calls["forward"] == 0
        with torch.inference_mode():
            block.mix(*inputs(grid), grid)
    assert flash._agrees == {(flash.Cpu, torch.device("cpu"), torch.float64): True} and calls["forward"] == 2


def test_dropout_leaves_the_kernel_alone(calls):
    block, grid = create_block("criss_cross", 33, num_heads=3, attn_drop=0.3).train(), Grid(5, 7)
    block.mix(*inputs(grid, dtype=torch.float32), grid)
    assert calls["forward"] == 0


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 1e-13])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("grid", [Grid(5, 1), Grid(1, 1), Grid(5, 7)])
@pytest.mark.parametrize(
    "pattern",
    [
        Row() & Others(),
        Row(past=True) & Others(),
        Window((1, 0)) & Row() & Others(),
        Window((0, 2)) & Others() | Column(past=True) & Others(),
        (Row(past=True) | Column(past=True)) & Others(),
    ],
)
def test_a_query_that_sees_nothing_takes_nothing_on_any_route(pattern, grid, kernel, dropout, prefix, monkeypatch):
    assert not pattern.mask(grid).any(dim=1).all() or grid == Grid(5, 7)
    if not kernel:
        monkeypatch.setattr(union, "kernel_for", lambda q, k, v: None)

    class Step:
        mix = staticmethod(lambda q, k, v, grid: union.attend(q, k, v, grid, pattern, scale=0.3, dropout=dropout))

    class Definition:
        mix = staticmethod(lambda q, k, v, grid: softmax_over(pattern.mask(grid, prefix)[None], q, k, 0.3) @ v)

    tensors = inputs(grid, prefix)
    for one, other in zip(outputs_and_gradients(Step, tensors, grid), outputs_and_gradients(Definition, tensors, grid)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
