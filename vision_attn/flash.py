"""Flash attention over several key sets under one softmax: each set's flash call, merged by log-sum-exp.

A query that meets key sets s with outputs o_s and log-sum-exps l_s has
    l = log Σ_s exp l_s        o = Σ_s exp(l_s - l) o_s
and the gradient of the merged softmax is, set by set, what flash's own backward gives for the merged o and l (the
identity that ring attention uses, Liu et al. 2023, https://arxiv.org/abs/2310.01889). Between forward and backward
only queries, keys, values, o and l are kept; every set adds its part to one output and to one gradient of each.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .key_set import Everything, KeySet
from .precision import at_least_float32

aten = torch.ops.aten

AT_ONCE = 2**17  # numbers of queries whose keys overlap


class Cpu:
    """The flash kernel of torch on a CPU, in float64 or float32: half precision would round every set's output."""

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        """Output (b, groups, queries, d) and log-sum-exp (b, groups, queries)."""
        q, k, v, mask = map(_wide, (q, k, v, mask))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)

    @staticmethod
    def backward(slope, q, k, v, out, lse, mask, causal, scale):
        """Gradients of q, k and v."""
        slope, q, k, v, out, mask = map(_wide, (slope, q, k, v, out, mask))
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            slope, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )


class Cuda:
    """The memory-efficient kernel of torch on a CUDA device, in the tensors' own type; it sums in float32.

    Deviations from the kernel's own form: it returns the log-sum-exp of a multiple of 32 queries and wants it back so,
    +inf behind the last; rows of a mask must begin at multiples of 16 numbers.
    """

    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        """Output (b, groups, queries, d) and log-sum-exp (b, groups, queries)."""
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, _aligned(mask), True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]].contiguous()

    @staticmethod
    def backward(slope, q, k, v, out, lse, mask, causal, scale):
        """Gradients of q, k and v."""
        lse = F.pad(lse.float(), (0, -lse.shape[-1] % 32), value=torch.inf)
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0
        return aten._scaled_dot_product_efficient_attention_backward(
            slope.to(q.dtype),
            *(q, k, v, _aligned(mask), out.to(q.dtype), lse, unused, unused, 0.0, [True, True, True, False], causal),
            scale=scale,
        )[:3]


def _aligned(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    keys = mask.shape[-1]
    return F.pad(mask[:1], (0, -keys % 16))[..., :keys].expand(mask.shape)


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def agrees(kernel: type[Cpu] | type[Cuda], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives what it should here, output, log-sum-exp and gradients; warns where it does not.

    It is private to torch and may change: this tries it on a small masked and a small causal case, once for each type.
    """
    rng = torch.Generator().manual_seed(0)
    try:
        for queries, keys, causal in ((37, 29, False), (37, 37, True)):
            q, k, v, slope = (torch.randn(2, 3, n, 16, generator=rng) for n in (queries, keys, keys, queries))
            q, k, v, slope = (t.to(device, dtype) for t in (q, k, v, slope))
            hidden = torch.rand(1, 3, queries, keys, generator=rng).to(device) < 0.3
            mask = None if causal else torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
            exact = [t.double().requires_grad_() for t in (q, k, v)]
            scores = 0.25 * exact[0] @ exact[1].mT
            future = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
            scores = scores.masked_fill(future if causal else hidden, -torch.inf)
            wanted = [scores.softmax(-1) @ exact[2], scores.logsumexp(-1)]
            wanted += torch.autograd.grad(wanted[0], exact, slope.double())
            mask = None if mask is None else mask.expand(2, -1, -1, -1)
            out, lse = kernel.forward(q, k, v, mask, causal, 0.25)
            got = [out, lse, *kernel.backward(slope, q, k, v, out, lse, mask, causal, 0.25)]
            close = 2e-3 if dtype == torch.float32 else 3e-2  # of the largest: also in TF32
            errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, wanted)]
            if not max(errors) < close:
                raise RuntimeError(f"relative errors {errors}")
    except (RuntimeError, TypeError, AttributeError) as error:
        warnings.warn(f"torch's kernel for {device} and {dtype} is not used: {error}", stacklevel=2)
        return False
    return True


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(at_least_float32(t))


class Before(Everything):
    """Every position with the keys that all see, which are no part of the grid."""


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> type[Cpu] | type[Cuda] | None:
    """The kernel that takes these tensors and tells the log-sum-exp.

    None where there is none, in traced graphs, and under torch.func, whose tensors have no memory of their own.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if q.shape[-1] != v.shape[-1] or q.numel() == 0:
        return None
    if q.device.type == "cpu":
        return Cpu
    fits = q.device.type == "cuda" and q.dtype in Cuda.dtypes and q.shape[-1] % 8 == 0
    return Cuda if fits and agrees(Cuda, q.device, q.dtype) else None


def merged(
    kernel: type[Cpu] | type[Cuda],
    sets: list[KeySet],
    masks: list[Tensor | None],
    grid: Grid,
    scale: float,
    q: Float[Tensor, "b H W d"],
    k: Float[Tensor, "b H W d"],
    v: Float[Tensor, "b H W d"],
    k_before: Float[Tensor, "b 1 P d"],
    v_before: Float[Tensor, "b 1 P d"],
) -> Float[Tensor, "b H W d"]:
    """Attention of the grid's positions over disjoint key sets and over P ≥ 0 keys that all see.

    Args:
        kernel: see `kernel_for`.
        sets: disjoint key sets; together they have every position as a query.
        masks: additive mask (1, #groups, #queries, keys) of each set, or None.
        grid: of the positions.
        scale: factor on q · k.
        q, k, v: of the positions.
        k_before, v_before: of the keys that all see.
    """
    sets, masks = [*sets, Before()], [*masks, None]
    out, _ = Merged.apply(kernel, sets, masks, grid, scale, q, k, v, k_before, v_before)
    return out


def _pieces(sets: list[KeySet], *tensors: Float[Tensor, "b ..."]) -> zip:
    """The tensors along b: at once but where keys are copied many times, so that copies fit a CPU's cache."""
    few = tensors[0].device.type == "cpu" and any(keys.overlap for keys in sets)
    size = max(1, AT_ONCE // tensors[0][0].numel()) if few else len(tensors[0])
    return zip(*(t.split(size) for t in tensors))


class Merged(torch.autograd.Function):
    """Merges the sets' flash calls; each backward call gets the merged output and log-sum-exp."""

    @staticmethod
    def forward(kernel, sets, masks, grid, scale, *tensors):
        outs = [Merged.some(kernel, sets, masks, grid, scale, *some) for some in _pieces(sets, *tensors)]
        return outs[0] if len(outs) == 1 else tuple(map(torch.cat, zip(*outs)))

    @staticmethod
    def some(kernel, sets, masks, grid, scale, q, k, v, k_before, v_before):
        """Output and log-sum-exp."""
        parts, wide = [], at_least_float32(q)
        for keys, mask in zip(sets, masks):
            folded = _folded(keys, q, k, v, k_before, v_before)
            if folded[0].numel() and folded[1].numel():
                out, lse = kernel.forward(*folded, _expanded(mask, folded[0]), keys.causal, scale)
                parts.append((keys, out, lse[..., None]))
        if len(parts) == 1:
            ((keys, out, lse),) = parts
            return keys.place(out, grid).to(q.dtype), keys.place(lse, grid)
        logs = torch.stack([keys.place(lse, grid, -torch.inf) for keys, _, lse in parts])
        shares = logs.softmax(dim=0)  # exp(l_s - l) need not sum to 1 where l is large and rounds
        merged = q.new_zeros(q.shape, dtype=wide)
        for (keys, out, _), share in zip(parts, shares):
            keys.add_queries(merged, out.mul_(keys.queries(share)))
        return merged.to(q.dtype), logs.logsumexp(dim=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernel, ctx.sets, masks, _, ctx.scale, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*masks, *tensors, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope, _):
        saved = ctx.saved_tensors  # once: gradient checkpointing gives them a single time
        masks, (*tensors, out, total) = saved[: len(ctx.sets)], saved[len(ctx.sets) :]
        wide = at_least_float32(out)
        slopes = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in tensors]
        for some in _pieces(ctx.sets, *slopes, *tensors, _dense_rows(slope), out, total):
            Merged.add_slopes(ctx, masks, some[:5], some[5:10], *some[10:])
        return None, None, None, None, None, *(slope.to(out.dtype) for slope in slopes)

    @staticmethod
    def add_slopes(ctx, masks, slopes, tensors, slope, out, total):
        """Adds the gradients of some of the b to ``slopes``."""
        for keys, mask in zip(ctx.sets, masks):
            q, k, v = _folded(keys, *tensors)
            if q.numel() and k.numel():
                slope_here, out_here, lse = (_dense_rows(keys.queries(t)) for t in (slope, out, total))
                parts = ctx.kernel.backward(
                    slope_here, q, k, v, out_here, lse[..., 0], _expanded(mask, q), keys.causal, ctx.scale
                )
                keys.add_queries(slopes[0], parts[0])
                for whole, before, part in zip(slopes[1:3], slopes[3:], parts[1:]):
                    if isinstance(keys, Before):
                        before += part
                    else:
                        keys.add_keys(whole, part)


def _folded(keys, q, k, v, k_before, v_before):
    """Queries, keys and values of a set, as the kernel reads them: right only where channels lie side by side."""
    folded = (k_before, v_before) if isinstance(keys, Before) else (keys.keys(k), keys.keys(v))
    return tuple(_dense_rows(t) for t in (keys.queries(q), *folded))


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _expanded(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], -1)
