"""Every block on a CUDA device that is only pretended: shapes, types and devices are right, and nothing waits for it.

Fake tensors have no numbers: what asks for one, which is a wait on a device, raises.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import chosen, first_options, in_turn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from backbones.pixel import PixelTransformer, TwoStreamPixelTransformer
from vision_attn import Grid, create_block, list_blocks, mixer
from vision_attn.engines import flash, union
from vision_attn.engines.cache import around

DIM, HEADS, BATCH = 64, 4, 2
aten = torch.ops.aten


def needs(block):
    return pytest.mark.skipif(block not in list_blocks(), reason=f"there is no {block}")


class Pretended(TorchFunctionMode):
    """Torch's functions as a device has them: attention by a fused kernel, and no tensor made elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload):
            return function(*args, **(kwargs or {}))
        instead = {F.scaled_dot_product_attention: self.attention, torch.autograd.grad: self.grad}
        out = instead.get(function, function)(*args, **(kwargs or {}))
        assert function not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), "a copy from the host, a wait"
        made = [t for t in tree_leaves(out) if isinstance(t, FakeTensor) and t.ndim]
        assert all(t.device.type == "cuda" for t in made), f"{function} gives a tensor of {made[0].device}"
        return out

    @staticmethod
    def grad(outputs, inputs, grad_outputs, **how):
        (out,), (x,), (slope,) = (tree_leaves(given) for given in (outputs, inputs, grad_outputs))
        return (backward(out, slope)[x],)

    @staticmethod
    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
            attn_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        assert q.dtype == k.dtype == v.dtype
        width, wide = q.shape[-1], v.shape[-1]
        laid_as_queries = q.element_size() > 2 or width == wide or 0 not in q.stride()
        assert laid_as_queries, "cuDNN's output would lie as the queries, which all images share"
        aligned = all(n % (16 // q.element_size()) == 0 for n in (width, wide))
        assert aligned or (attn_mask is None and width == wide), f"the N×N matrix, for {width} and {wide} channels"
        if attn_mask is not None:
            assert attn_mask.dtype in (torch.bool, q.dtype)
            bias = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
            attn_mask = bias.expand(*q.shape[:-1], k.shape[-2])
        more = dict(compute_log_sumexp=True, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, **more)[0]


@contextmanager
def pretended_cuda(autocast: torch.dtype | None = None):
    before = torch.get_autocast_dtype("cuda")
    with FakeTensorMode() as fake, Pretended():
        try:
            torch.set_autocast_cache_enabled(False)
            torch.set_autocast_dtype("cuda", autocast or before)
            torch.set_autocast_enabled("cuda", autocast is not None)  # torch.autocast refuses without a device
            yield fake
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
            torch.set_autocast_cache_enabled(True)


def moved(module):
    """The module with its parameters and buffers on the device."""
    return module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))


def backward(out, slope=None) -> dict:
    """The gradient of each leaf: torch's engine in plain steps, since its own threads need a device."""
    waits_for, nodes = {}, [out.grad_fn]
    for node in nodes:
        for after, _ in node.next_functions:
            if after is not None:
                nodes += [after] * (after not in waits_for)
                waits_for[after] = waits_for.get(after, 0) + 1
    slope = torch.ones_like(out) if slope is None else slope
    slopes, found, ready = {out.grad_fn: {out.output_nr: slope}}, {}, [out.grad_fn]
    while ready:
        node = ready.pop()
        given = [slopes.get(node, {}).get(i) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            found[node.variable] = given[0]
            continue
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        parts = node.apply(*given) if own else node(*given)
        parts = parts if isinstance(parts, tuple) else (parts,)
        others = len(parts) - len(node.next_functions)  # of what is no tensor, in front
        assert parts[:others] == (None,) * others
        for (after, i), part in zip(node.next_functions, parts[others:], strict=True):
            if after is None:
                continue
            if part is not None:
                wanted, known = after._input_metadata[i], slopes.setdefault(after, {})
                part = part.sum_to_size(wanted.shape).to(wanted.dtype)
                known[i] = known[i] + part if i in known else part
            waits_for[after] -= 1
            ready += [after] * (waits_for[after] == 0)
    return found


@pytest.fixture(params=["kernel", "concatenated"])
def route(request, monkeypatch):
    monkeypatch.setattr(flash, "agrees", lambda *args: request.param == "kernel")
    return request.param


def assert_runs(case, grid, prefix, dtype, autocast=None):
    sizes = dict(dim=DIM, num_heads=HEADS) if case.is_mixer else dict(dim=DIM)
    block = case.block_class(**{**sizes, **case.options}, device="meta", dtype=dtype).train()
    with pretended_cuda(autocast):
        moved(block)
        shape = (prefix + grid.size, DIM) if case.is_mixer else (DIM, *grid)
        x = torch.randn(BATCH, *shape, device="cuda", dtype=dtype, requires_grad=True)
        out = case.run(block, x, grid)
        assert out.shape == x.shape and out.device == x.device
        if autocast is None or not case.is_mixer or case.options.get("projections") is False:
            assert out.dtype == dtype
        else:
            assert out.dtype == autocast
        slopes = backward(out)
        for p in (x, *(p for name, p in block.named_parameters() if p.requires_grad and name not in case.unfelt)):
            assert slopes[p].shape == p.shape and slopes[p].dtype == dtype and slopes[p].device == p.device


QUICK = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.float16)]
TYPES = [*QUICK, (torch.float16, None), (torch.float32, torch.bfloat16)]


@in_turn({"case": first_options(chosen("any_case")), "dtype, autocast": QUICK})
def test_blocks_run(case, dtype, autocast, monkeypatch):
    monkeypatch.setattr(flash, "agrees", lambda *args: True)
    assert_runs(case, Grid(7, 11), 1, dtype, autocast)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, autocast", TYPES)
@pytest.mark.parametrize("grid, prefix", [(Grid(7, 11), 0), (Grid(16, 16), 5), (Grid(13, 17), 1)])
def test_blocks_run_at_all_sizes_by_both_routes(any_case, grid, prefix, dtype, autocast, route):
    assert_runs(any_case, grid, prefix, dtype, autocast)


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, None), (torch.float32, torch.float16)])
def test_gradients_of_attention_lie_as_its_output_does(dtype, autocast):
    with pretended_cuda(autocast):
        shape, kind = (BATCH, 11, HEADS, 16), dict(device="cuda", dtype=dtype)
        q, k, v = (torch.empty(shape, **kind).transpose(1, 2).requires_grad_() for _ in range(3))
        out = union.flash(q, k, v)
        for slope in (torch.empty_like(out), torch.empty(out.shape, device="cuda", dtype=out.dtype)):
            node = out.grad_fn
            while "Attention" not in node.name():
                own = isinstance(node, torch.autograd.function.BackwardCFunction)
                slope = node.apply(slope) if own else node(slope)
                ((node, _), *_) = node.next_functions
            assert slope.stride() == out.stride()


# What is around a forward and a backward


@needs("expectation_maximization")
def test_a_step_of_an_optimizer_does_not_wait():
    block = create_block("expectation_maximization", DIM, device="meta").train()
    with pretended_cuda():
        moved(block)
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        for p, slope in backward(block(torch.randn(BATCH, DIM, 7, 11, device="cuda"))).items():
            p.grad = slope
        assert block.bases._notes is not None
        optimizer.step()
        assert block.bases._notes is None


@needs("adaptive_span")
@pytest.mark.parametrize("causal", [False, True])
def test_a_span_is_made_without_a_wait(causal, monkeypatch):
    monkeypatch.setattr(mixer, "blind_spot", lambda patterns: 0)  # counted on the CPU, which has no numbers here either
    with pretended_cuda():
        assert create_block("adaptive_span", DIM, causal=causal, device="cuda").reach.device.type == "cuda"


def pixel_model(cls=PixelTransformer, **options):
    sizes = dict(img_size=(2, 3), in_chans=2, levels=11, dim=DIM, depth=1, num_heads=HEADS)
    return cls(**sizes, **options, device="meta")


@pytest.mark.parametrize("cls", [PixelTransformer, TwoStreamPixelTransformer])
def test_a_loss_of_pixels_does_not_wait(cls, monkeypatch):
    monkeypatch.setattr(flash, "agrees", lambda *args: True)
    asked = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asked.append(message))
    model = pixel_model(cls)
    with pretended_cuda():
        moved(model)
        slopes = backward(model.bits_per_dim(torch.randint(11, (BATCH, 2, 2, 3), device="cuda")))
        assert all(slopes[p].shape == p.shape for p in model.parameters())
    assert asked == ["images: must be integers in 0..10"]


@pytest.mark.parametrize(
    "block", ["dense", "strided", "window", "gaussian_prior", "single_head", "adaptive_span", "linear"]
)
@pytest.mark.filterwarnings("ignore:blocks=.*unreached")
def test_values_are_drawn_without_a_wait(block):
    model = pixel_model(blocks=block)
    with pretended_cuda():
        moved(model)
        assert model.generate(BATCH).shape == (BATCH, 2, 2, 3)


@needs("longformer")
def test_what_has_to_be_counted_is_counted_for_a_row_at_once():
    waits = Counter()

    class Counting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            waits[getattr(function, "__name__", "")] += 1
            return function(*args, **(kwargs or {}))

    grid, block = Grid(5, 7), create_block("longformer", DIM, causal=True, kernel_size=3)
    cache, x = block.new_cache(BATCH, grid), torch.randn(BATCH, grid.size, DIM)
    with Counting():
        for place in range(grid.size):
            block.step(x[:, place], place, cache)
    heads = len(block.pattern.by_head())
    assert waits["nonzero"] == waits["tolist"] == heads * grid.height and not waits["item"]


@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize("step", [None, 1, 2, 3])
def test_a_ring_is_read_in_order(size, step):
    for start in range(11):
        for stop in range(start, start + (size - 1) * (step or 1) + 2):
            rows = range(start, stop, step or 1)
            if stop - start > size:
                continue
            slices = around(slice(start, stop, step), size)
            assert [row for one in slices for row in range(size)[one]] == [row % size for row in rows]
            assert step not in (None, 1) or len(slices) <= 2
