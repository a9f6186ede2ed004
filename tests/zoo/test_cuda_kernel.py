"""The kernel that merges key sets on CUDA, with a double in its place that reads memory as the kernel does.

What the double does is read from torch's kernel: scores are multiplied by log2 e in float32, where a mask of the least
number becomes -inf; a row of nothing but -inf has output 0 and log-sum-exp 0; in 16 bits the backward takes the rows of
``out`` to be groups · d numbers apart, whatever its strides; strides that the kernel checks are checked.
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import chosen, in_turn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vision_attn import Grid, create_block
from vision_attn.engines import flash, union
from vision_attn.key_set import Columns

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, HEADS, CHANNELS = 2, 4, 8
QUICK = {Grid(7, 11): 1, Grid(32, 3): 0, Grid(1, 9): 0, Grid(9, 1): 5}  # each with so many prefix tokens
GRIDS, PREFIXES = [*QUICK, Grid(16, 16), Grid(32, 32)], [0, 1, 5]


def refuse(condition, message):
    if condition:
        raise RuntimeError(message)


def refuse_unaligned(t, step):
    """Where channels do not lie side by side, or rows begin elsewhere than at multiples of ``step`` numbers."""
    refuse(t.stride(-1) != 1 or any(n % step for n in t.stride()[:-1]), f"not aligned: {t.stride()}")
    refuse(t.data_ptr() % 16, "not aligned: the pointer")


class Double:
    """The two operators of the kernel, which raise RuntimeError for what they refuse or must not be given."""

    log2e = 1 / math.log(2)

    def scores(self, q, k, v, bias, causal, scale):
        """In float32, times log2 e."""
        for t in (q, k, v):
            refuse_unaligned(t, 16 // t.element_size())
            refuse(t.shape[1] > 65_535, f"{t.shape[1]} groups: more than a grid of CUDA has blocks")
        s = scale * q.float() @ k.float().mT
        if bias is not None:
            refuse(bias.shape != s.shape or bias.dtype != q.dtype, f"mask of {bias.shape}, {bias.dtype}")
            refuse_unaligned(bias, 16)
            s = s + bias.float()
        if causal:
            s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return s * self.log2e

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, compute_lse, dropout, causal, *, scale):
        refuse(not compute_lse or dropout, "what the route does not need")
        s = self.scores(q, k, v, bias, causal, scale)
        most = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        p = (s - most).exp2()
        total = p.sum(-1, keepdim=True)
        total = total.where(total > 0, 1)
        out = ((p.to(v.dtype).float() @ v.float()) / total).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        lse = (most / self.log2e + total.log())[..., 0]
        seed = torch.zeros((), dtype=torch.int64)
        return out, F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), seed, seed

    def _scaled_dot_product_efficient_attention_backward(
        self, slope, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
    ):
        refuse(wanted != [True, True, True, False] or dropout, "what the route does not need")
        refuse(not slope.dtype == out.dtype == q.dtype or lse.dtype != torch.float32, "another type")
        refuse(slope.shape != out.shape or out.stride(-1) != 1, "another shape or layout")
        refuse_unaligned(slope, 16 // slope.element_size())
        queries = q.shape[2]
        refuse(lse.shape[2] % 32 or (lse[..., queries:] != torch.inf).any(), "log-sum-exp not padded")
        refuse(q.shape[1] > 1 and lse.stride(1) % 8, "LSE is not correctly aligned (strideH)")
        p = (self.scores(q, k, v, bias, causal, scale) - self.log2e * lse[..., :queries, None]).exp2()
        delta = (slope.float() * self.as_read(out).float()).sum(-1, keepdim=True)
        ds = p * (slope.float() @ v.float().mT - delta) * scale
        p, ds = (t.to(q.dtype).float() for t in (p, ds))
        return *(t.to(q.dtype) for t in (ds @ k.float(), ds.mT @ q.float(), p.mT @ slope.float())), None

    def as_read(self, out):
        """Rows of ``out`` (b, groups, queries, d) as the backward finds them in memory."""
        if out.dtype == torch.float32:
            return out
        b, groups, queries, d = out.shape
        strides = (out.stride(0), out.stride(1), groups * d, 1)
        behind = 1 + out.storage_offset() + sum((n - 1) * stride for n, stride in zip(out.shape, strides))
        refuse(behind > out.untyped_storage().nbytes() // out.element_size(), "reads behind the end of out")
        return out.as_strided(out.shape, strides)


@pytest.fixture
def double(monkeypatch):
    """Puts the double in the kernel's place, for tensors on the CPU."""
    monkeypatch.setattr(flash, "aten", Double())
    monkeypatch.setattr(union, "kernel_for", lambda q, k, v: flash.Cuda)
    monkeypatch.setattr(union, "is_slow", lambda x: False)  # or float16 would go through float32


def merging_steps(case):
    """Steps of several key sets."""
    for step in case.new(dim=HEADS * CHANNELS, num_heads=HEADS, key_dim=HEADS * CHANNELS).steps:
        own = "mix" in vars(type(step))
        pattern = None if own else getattr(step, "pattern", None)
        if pattern and any(len(part.key_sets()) > 1 for part in pattern.by_head()):
            yield step


def inputs(grid, prefix, dtype):
    return [torch.randn(BATCH, HEADS, prefix + grid.size, CHANNELS).to(dtype) for _ in range(3)]


def output_and_gradients(mix, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = mix(*tensors)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, tensors, direction.to(out.dtype))]


def assert_as_good_as_plain(step, grid, prefix, dtype):
    """Norm of the error, of output and gradients: at most twice that of the plain formula in the same type."""
    tensors = inputs(grid, prefix, dtype)

    def plain(q, k, v):
        return step.weights(q, k, grid) @ v

    exact = output_and_gradients(plain, [t.double() for t in tensors])
    ours = output_and_gradients(lambda q, k, v: step.mix(q, k, v, grid), tensors)
    for one, other, wanted in zip(ours, output_and_gradients(plain, tensors), exact):
        error, allowed = ((t.double() - wanted).norm().item() for t in (one, other))
        least = 1e-6 * wanted.norm().item()  # where the plain formula is right to the last bit
        assert error <= 2 * allowed + least, f"{grid} with {prefix} prefix tokens, {dtype}: {error} > 2 * {allowed}"


@in_turn({"case": chosen("mixer_case"), "dtype": DTYPES})
def test_merging_on_cuda_is_as_good_as_the_plain_formula(case, dtype, double):
    for step in merging_steps(case):
        for grid, prefix in QUICK.items():
            assert_as_good_as_plain(step, grid, prefix, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_on_cuda_is_so_with_any_prefix_at_all_sizes(mixer_case, dtype, grid, double):
    for step in merging_steps(mixer_case):
        for prefix in PREFIXES:
            assert_as_good_as_plain(step, grid, prefix, dtype)


@pytest.mark.parametrize("kernel", [flash.Cpu, flash.Cuda])
def test_a_query_that_sees_nothing_of_any_set_takes_nothing(kernel, double, monkeypatch):
    monkeypatch.setattr(flash, "aten", torch.ops.aten if kernel is flash.Cpu else flash.aten)
    grid, sets = Grid(7, 11), [flash.Above((3, 4)), Columns(with_self=False)]
    above, column = (keys.mask(grid, CPU) for keys in sets)
    tensors = [torch.randn(BATCH, *grid, CHANNELS).requires_grad_() for _ in range(3)]
    tensors += [torch.randn(BATCH, 1, 0, CHANNELS).requires_grad_() for _ in range(2)]
    masks = [flash.added(seen, torch.float32) for seen in (above, column & False)]
    out = flash.merged(kernel, sets, masks, grid, 0.5, *tensors)
    blind = ~sets[0].place(above.any(-1)[None, :, :, None].expand(1, -1, 12, -1), grid).expand(BATCH, -1, -1, CHANNELS)
    assert blind.sum() == BATCH * 3 * 11 * CHANNELS  # rows 0, 3 and 6
    assert (out[blind] == 0).all() and (out[~blind] != 0).all()
    slope, *_ = torch.autograd.grad(out.sum(), tensors)
    assert (slope[blind] == 0).all() and slope.isfinite().all() and slope.any()


def test_tensors_need_not_be_aligned(double):
    """Rows of an odd length, and a gradient that is a slice of something wider."""
    grid, step = Grid(7, 11), create_block("criss_cross", HEADS * CHANNELS, num_heads=HEADS)
    wide = [F.pad(t, (3, 2)) for t in inputs(grid, 5, torch.float32)]

    def mixed(*tensors):
        return step.mix(*(t[..., 3:-2] for t in tensors), grid)

    exact = output_and_gradients(mixed, [t.double() for t in wide])
    for one, other in zip(output_and_gradients(lambda *ts: F.pad(mixed(*ts), (1, 2))[..., 1:-2], wide), exact):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_each_image_may_have_a_mask_of_its_own(double):
    q, k, v, slope = (torch.randn(BATCH, 3, 11, CHANNELS) for _ in range(4))
    mask = flash.hiding(torch.rand(BATCH, 3, 11, 11) < 0.7, torch.float32)[0]
    out, lse = flash.Cuda.forward(q, k, v, mask, False, 0.5)
    parts = flash.Cuda.backward(slope, q, k, v, out, lse, mask, False, 0.5)
    for i in range(BATCH):
        alone, lse_alone = flash.Cuda.forward(*(t[i : i + 1] for t in (q, k, v, mask)), False, 0.5)
        wanted = flash.Cuda.backward(
            *(t[i : i + 1] for t in (slope, q, k, v)), alone, lse_alone, mask[i : i + 1], False, 0.5
        )
        for whole, part in zip((out, lse, *parts), (alone, lse_alone, *wanted)):
            torch.testing.assert_close(whole[i : i + 1], part)


@pytest.mark.parametrize("name", ["binary_partition", "interlaced_sparse", "big_bird", "window"])
def test_more_groups_than_cuda_has_blocks_are_several_calls(name, double, monkeypatch):
    """Key sets that are merged, and those that go to torch's attention with a mask and without."""
    sizes, tokens = [], F.scaled_dot_product_attention

    def noted(q, *args, **options):
        sizes.extend(q.shape[:2])
        return tokens(q, *args, **options)

    block, grid = create_block(name, HEADS * CHANNELS, num_heads=HEADS).double(), Grid(19, 23)
    tensors = [torch.randn(BATCH, 3 + grid.size, HEADS * CHANNELS, dtype=torch.float64)]
    wanted = output_and_gradients(lambda x: block(x, grid), tensors)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for module in (flash, union):
        monkeypatch.setattr(module, "BLOCKS", 5)
    for one, other in zip(output_and_gradients(lambda x: block(x, grid), tensors), wanted):
        torch.testing.assert_close(one, other)
    assert max(sizes, default=0) <= 5


# The trial that decides whether the kernel is used


@pytest.fixture
def untried(monkeypatch):
    """Nothing was tried, and the double stands in the kernel's place."""
    monkeypatch.setattr(flash, "_agrees", {})
    monkeypatch.setattr(flash, "aten", Double())
    monkeypatch.setattr(
        union, "kernel_for", lambda q, k, v: flash.Cuda if flash.agrees(flash.Cuda, CPU, q.dtype) else None
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_trusts_the_kernel(dtype, untried):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash.agrees(flash.Cuda, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_trusts_torchs_kernel_of_the_cpu(dtype):
    assert max(flash.trial(flash.Cpu, CPU, dtype)) < (1e-6 if dtype == torch.float32 else 1e-2)


def least_number(seen, dtype):
    """Hides by the least number, and where a query sees nothing, everything."""
    if seen is None:
        return None, None
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None]
    return mask, ~seen.any(dim=-1)[None]


FAULTS = {  # each undoes one thing that the route takes care of
    "a set of which a query sees nothing has weight": dict(added=least_number, _filled=lambda lse, where, value: lse),
    "hidden queries see all": dict(_filled=lambda lse, where, value: lse),
    "out in any layout": dict(_as_returned=lambda out: out),
    "log-sum-exp in any layout": dict(_padded=lambda lse: F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)),
    "masks in any layout": dict(_aligned_mask=lambda mask: mask),
}
UNHARMED = {  # types that a fault does nothing to
    "out in any layout": (torch.float32,),
}


class Unnoticed(Double):
    """On a device nothing checks what is read: numbers of other pixels, or from behind the end."""

    def as_read(self, out):
        try:
            return super().as_read(out)
        except RuntimeError:
            return out.contiguous().roll(1, dims=2)


@pytest.mark.parametrize("kernel", [Double, Unnoticed])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_trial_finds_each_fault(fault, dtype, kernel, untried, monkeypatch):
    monkeypatch.setattr(flash, "aten", kernel())
    for name, faulty in FAULTS[fault].items():
        monkeypatch.setattr(flash, name, faulty)
    if dtype in UNHARMED.get(fault, ()):
        assert flash.agrees(flash.Cuda, CPU, dtype)
    else:
        with pytest.warns(UserWarning, match=f"torch's kernel for cpu and {dtype} is not used"):
            assert not flash.agrees(flash.Cuda, CPU, dtype)


class Changed(Double):
    def __init__(self, change):
        self.change = change

    def _scaled_dot_product_efficient_attention(self, *args, **kwargs):
        out, lse, *rest = super()._scaled_dot_product_efficient_attention(*args, **kwargs)
        return self.change(out, lse), lse.mT if self.change is shape else lse, *rest


def raises(out, lse):
    raise RuntimeError("no such kernel")


def lies(out, lse):
    return 1.1 * out


def shape(out, lse):
    return out


@pytest.mark.parametrize("change", [raises, lies, shape])
def test_a_kernel_that_changed_is_not_used(change, untried, monkeypatch):
    monkeypatch.setattr(flash, "aten", Changed(change))
    with pytest.warns(UserWarning, match="torch's kernel for cpu and torch.float32 is not used"):
        assert not flash.agrees(flash.Cuda, CPU, torch.float32)


@pytest.mark.parametrize("which", range(3))
def test_one_number_that_is_none_is_enough(which, untried, monkeypatch):
    class Spoilt(Double):
        def _scaled_dot_product_efficient_attention_backward(self, *args, **kwargs):
            slopes = super()._scaled_dot_product_efficient_attention_backward(*args, **kwargs)
            slopes[which][-1, -1, -1, -1] = torch.nan
            return slopes

    monkeypatch.setattr(flash, "aten", Spoilt())
    with pytest.warns(UserWarning, match="relative errors .*nan"):
        assert not flash.agrees(flash.Cuda, CPU, torch.float32)


def test_wrong_numbers_are_found_once(untried, monkeypatch):
    monkeypatch.setattr(flash, "aten", Changed(lies))
    with pytest.warns(UserWarning, match="relative errors"):
        assert not flash.agrees(flash.Cuda, CPU, torch.float32)
    monkeypatch.setattr(flash, "trial", None)
    assert not flash.agrees(flash.Cuda, CPU, torch.float32)


def test_a_trial_that_broke_off_is_made_again(untried, monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no such kernel"):
        patch.setattr(flash, "aten", Changed(raises))
        assert not flash.agrees(flash.Cuda, CPU, torch.float32)
    assert flash.agrees(flash.Cuda, CPU, torch.float32)


def test_too_little_memory_is_not_the_kernels_fault(untried, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(flash.aten, "_scaled_dot_product_efficient_attention", full)
        flash.agrees(flash.Cuda, CPU, torch.float32)
    assert flash.agrees(flash.Cuda, CPU, torch.float32)


def test_nothing_is_tried_of_fake_tensors_or_while_a_graph_is_captured(untried, monkeypatch):
    cuda = torch.device("cuda", 0)
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(flash, "trial", None)
        with FakeTensorMode():
            assert not flash.agrees(flash.Cuda, cuda, torch.bfloat16)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not flash.agrees(flash.Cuda, cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(flash, "trial", lambda *args: [0.0])
    assert flash.agrees(flash.Cuda, cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert flash.agrees(flash.Cuda, cuda, torch.bfloat16)  # what was tried before may be captured


def test_the_first_call_may_come_from_anywhere(untried):
    """Checkpointing counts what is saved for a backward, autocast and default devices change what is computed."""
    block, grid = create_block("criss_cross", HEADS * CHANNELS, num_heads=HEADS), Grid(7, 11)
    x = torch.randn(BATCH, grid.size, HEADS * CHANNELS, requires_grad=True)
    wanted = torch.autograd.grad(block(x, grid).sum(), x)
    flash._agrees.clear()
    out = checkpoint(block, x, grid, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), wanted)
    contexts = (
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    )
    for context in contexts:
        flash._agrees.clear()
        with context():
            assert flash.agrees(flash.Cuda, CPU, torch.float32)
