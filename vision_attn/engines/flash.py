"""Flash attention over several key sets under one softmax: each set's flash call, merged by log-sum-exp.

A query that meets key sets s with outputs o_s and log-sum-exps l_s has
    l = log Σ_s exp l_s        o = Σ_s exp(l_s - l) o_s
and the gradient of the merged softmax is, set by set, what flash's own backward gives for the merged o and l (the
identity that ring attention uses, Liu et al. 2023, https://arxiv.org/abs/2310.01889). Between forward and backward
only queries, keys, values, o and l are kept; every set adds its part to one output and to one gradient of each.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..grid import Grid
from ..key_set import Columns, Everything, KeySet, Rows, Tiles
from ..precision import at_least_float32
from ..traced import is_passing, is_traced, is_transformed

aten = torch.ops.aten

BLOCKS = 65_535  # that a grid of CUDA has along its second and third axis
AT_ONCE = 2**16  # numbers of queries whose keys overlap


class Cpu:
    """The flash kernel of torch on a CPU, in float64 or float32: half precision would round every set's output."""

    @staticmethod
    def mask_type(dtype: torch.dtype) -> torch.dtype:
        """The type of masks for tensors of a type."""
        return torch.promote_types(dtype, torch.float32)

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        """Output (b, groups, queries, d) and log-sum-exp (b, groups, queries); mask (#b, #groups, #queries, keys)."""
        q, k, v, mask = map(_wide, (q, k, v, _expanded(mask, q)))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)

    @staticmethod
    def backward(slope, q, k, v, out, lse, mask, causal, scale):
        """Gradients of q, k and v."""
        slope, q, k, v, out, mask = map(_wide, (slope, q, k, v, out, _expanded(mask, q)))
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            slope, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )


class Cuda:
    """The memory-efficient kernel of torch on a CUDA device, in the tensors' own type; it sums in float32.

    Deviations from the kernel's own form: it returns the log-sum-exp of a multiple of 32 queries and wants it back so,
    side by side, +inf behind the last; rows of a mask must begin at multiples of 16 numbers, all others at multiples of
    16 bytes; in 16 bits its backward takes ``out`` to lie as it returned it, whatever the strides.
    """

    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @staticmethod
    def mask_type(dtype: torch.dtype) -> torch.dtype:
        """The type of masks for tensors of a type."""
        return dtype

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        """Output (b, groups, queries, d) and log-sum-exp (b, groups, queries); mask (#b, #groups, #queries, keys)."""

        def call(q, k, v, mask):
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, causal, scale=scale)
            return out, lse[..., : q.shape[2]]

        return by_launches(call, *map(_aligned, (q, k, v)), _expanded(_aligned_mask(mask), q))

    @staticmethod
    def backward(slope, q, k, v, out, lse, mask, causal, scale):
        """Gradients of q, k and v."""
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a dropout of 0

        def call(slope, q, k, v, out, lse, mask):
            given = slope, q, k, v, mask, _as_returned(out), _padded(lse), unused, unused
            return aten._scaled_dot_product_efficient_attention_backward(
                *given, 0.0, [True, True, True, False], causal, scale=scale
            )[:3]

        slope, q, k, v = map(_aligned, (slope.to(q.dtype), q, k, v))
        return by_launches(call, slope, q, k, v, out.to(q.dtype), lse.float(), _expanded(_aligned_mask(mask), q))


class Single:
    """Groups of one query and one key, which has all of the weight, so that no kernel is needed.

    Masks say nothing there: a query that sees nothing is shown its key (`added`), and left out by hand.
    """

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        """Output (b, groups, 1, d), the values themselves, and log-sum-exp (b, groups, 1), the scores."""
        q, k = map(_wide, (q, k))
        return _wide(v).clone(), scale * (q * k).sum(dim=-1)

    @staticmethod
    def backward(slope, q, k, v, out, lse, mask, causal, scale):
        """Gradients of q, k and v."""
        slope, q, k, v, out = map(_wide, (slope, q, k, v, out))
        weight = (scale * (q * k).sum(dim=-1) - lse).exp()[..., None]
        of_score = scale * weight * (slope * (v - out)).sum(dim=-1, keepdim=True)
        return of_score * k, of_score * q, weight * slope


def by_launches(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``call(*tensors)``, of (b, groups, …) each, on no more images or groups than a grid of CUDA has blocks."""
    for axis in (0, 1):
        if tensors[0].shape[axis] > BLOCKS:
            pieces = zip(*(repeat(t) if t is None else t.split(BLOCKS, dim=axis) for t in tensors))
            outs = [by_launches(call, *some) for some in pieces]
            return tuple(torch.cat(some, dim=axis) for some in zip(*outs))
    return call(*tensors)


def _aligned(t: Tensor) -> Tensor:
    """The tensor, or a copy of it whose rows begin at multiples of 16 bytes."""
    step = 16 // t.element_size()
    if t.stride(-1) == 1 and not any(n % step for n in (*t.stride()[:-1], t.storage_offset())):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _aligned_mask(mask: Tensor | None) -> Tensor | None:
    """The mask, or a copy of it whose rows begin at multiples of 16 numbers."""
    if mask is None or (mask.stride(-1) == 1 and not any(n % 16 for n in mask.stride()[:-1])):
        return mask
    return F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]


def _as_returned(out: Tensor) -> Tensor:
    """The output (b, groups, queries, d) in the layout in which the kernel returns it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _padded(lse: Tensor) -> Tensor:
    """The log-sum-exp of a multiple of 32 queries, side by side."""
    queries = lse.shape[-1]
    padded = lse.new_full((*lse.shape[:2], queries + -queries % 32), torch.inf)
    padded[..., :queries] = lse
    return padded


def _expanded(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], -1)


_agrees: dict[tuple, bool] = {}  # of every kernel, device and type that was tried to the end


def agrees(kernel: type[Cpu] | type[Cuda], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives what it should here, outputs and gradients; warns where it does not.

    It is private to torch and may change: `trial` merges a few small grids by it, once for each type. Where that can
    not be done, while a CUDA graph is captured or of fake tensors, a kernel that was not tried before is not trusted;
    this, and a trial that broke off, is not remembered.

    Raises:
        torch.OutOfMemoryError: there is no memory for the trial.
    """
    key = kernel, device, dtype
    if key not in _agrees:
        if is_passing(device):
            return False
        try:
            # in a thread of its own, which no context of the caller reaches: inference, autocast, checkpointing
            with ThreadPoolExecutor(1) as thread:
                errors = thread.submit(trial, kernel, device, dtype).result()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError) as error:
            _warn(device, dtype, error)
            return False
        close = 3e-2 if dtype.itemsize == 2 else 2e-3  # also in TF32
        _agrees[key] = all(error < close for error in errors)  # false of NaN, too
        if not _agrees[key]:
            _warn(device, dtype, f"relative errors {errors}")
    return _agrees[key]


def _warn(device, dtype, why):
    warnings.warn(f"torch's kernel for {device} and {dtype} is not used: {why}", stacklevel=4)


class Above(Tiles):
    """Every position with those of its tile that are in rows above: in its first row with none."""

    def mask(self, grid, device):
        (query, key), width = self.numbers(grid, device), grid.width
        return (key[:, None] >= 0) & (key[:, None] // width < query[:, :, None] // width)


def trial(kernel: type[Cpu] | type[Cuda], device: torch.device, dtype: torch.dtype) -> list[float]:
    """Errors of what `merged` makes of a kernel, outputs and gradients; norms, as shares of what is right.

    Tried is what key sets need of it: sets of which a query sees nothing, folds that are views and folds that are
    copies, causality, keys that all see, several images, sizes that are multiples of 32 and such that are of nothing.
    """
    rng, errors = torch.Generator("cpu").manual_seed(0), []
    for grid, channels, before in ((Grid(32, 11), 16, 0), (Grid(33, 5), 64, 5), (Grid(1, 9), 8, 1)):
        y, x = (n.flatten() for n in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
        (qy, ky), (qx, kx) = ((n[:, None], n) for n in (y, x))
        in_row, above = (qy == ky) & (kx <= qx), ky < qy
        for sets, seen in (
            ((Rows(), Columns(with_self=False)), (qy == ky) | (qx == kx)),
            ((Rows(causal=True), Columns(with_self=False, causal=True)), in_row | ((qx == kx) & above)),
            ((Rows(causal=True), Above((3, 4))), in_row | ((qy // 3 == ky // 3) & (qx // 4 == kx // 4) & above)),
        ):
            shapes = [(4, *grid, channels)] * 3 + [(4, 1, before, channels)] * 2
            numbers = [torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu") for shape in shapes]
            tensors = [t.to(device, dtype).requires_grad_() for t in numbers]
            exact = [t.detach().double().requires_grad_() for t in tensors]
            slope = torch.randn(shapes[0], generator=rng, dtype=torch.float32, device="cpu").to(device, dtype)
            masks = [mask_of(keys, grid, kernel.mask_type(dtype), device) for keys in sets]
            scale = channels**-0.5
            out = merged(kernel, list(sets), masks, grid, scale, *tensors)
            q, *others = (t.flatten(1, 2) for t in exact)
            k, v = (torch.cat([all_see, t], dim=1) for all_see, t in zip(others[2:], others[:2]))
            seen = F.pad(seen, (before, 0), value=True)
            wanted = ((scale * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v).reshape(out.shape)
            pairs = zip(torch.autograd.grad(out, tensors, slope), torch.autograd.grad(wanted, exact, slope.double()))
            for one, other in ((out, wanted), *pairs):
                if one.numel():
                    errors.append(((one.double() - other).norm() / other.norm()).item())
    return errors


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(at_least_float32(t))


class Before(Everything):
    """Every position with the keys that all see, which are no part of the grid."""

    def keys(self, x):
        return x

    def add_keys(self, whole, part):
        whole += part


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> type[Cpu] | type[Cuda] | None:
    """The kernel that takes these tensors and tells the log-sum-exp.

    None where there is none or it errs (`agrees`), in traced graphs, and under torch.func, whose tensors have no memory
    of their own.
    """
    if is_traced() or is_transformed():
        return None
    if q.shape[-1] != v.shape[-1] or q.numel() == 0:
        return None
    kernel = {"cpu": Cpu, "cuda": Cuda}.get(q.device.type)
    if kernel is None or (kernel is Cuda and (q.dtype not in Cuda.dtypes or q.shape[-1] % 8)):
        return None
    return kernel if agrees(kernel, q.device, q.dtype) else None


def merged(
    kernel: type[Cpu] | type[Cuda],
    sets: list[KeySet],
    masks: list[tuple[Tensor | None, Tensor | None]],
    grid: Grid,
    scale: float,
    q: Float[Tensor, "b H W d"],
    k: Float[Tensor, "b H W d"],
    v: Float[Tensor, "b H W d"],
    k_before: Float[Tensor, "b 1 P d"],
    v_before: Float[Tensor, "b 1 P d"],
    *others: Float[Tensor, "b ..."],
    pairs: list[int] | None = None,
) -> Float[Tensor, "b H W d"]:
    """Attention of the grid's positions over disjoint key sets and over P ≥ 0 keys that all see.

    Args:
        kernel: see `kernel_for`.
        sets: disjoint key sets; together they have every position as a query.
        masks: of each set, see `mask_of`.
        grid: of the positions.
        scale: factor on q · k.
        q, k, v: of the positions.
        k_before, v_before: of the keys that all see.
        others: further pairs of keys and values, of any shape that the sets which take them know.
        pairs: of each set, which pair it takes: 0 is k and v, 1 those that all see, 2 the first of ``others``.
    """
    pairs = [0] * len(sets) if pairs is None else pairs
    masks, unseen = zip(*masks, (None, None))
    tensors = q, k, v, k_before, v_before, *others
    out, _ = Merged.apply(kernel, [*sets, Before()], [*pairs, 1], masks, unseen, grid, scale, *tensors)
    return out


def pieces(sets: list[KeySet], *tensors: Float[Tensor, "b ..."]) -> zip:
    """The tensors along b: at once but where keys are copied many times, so that copies fit a CPU's cache.

    If one map is too many it is cut further, by `few`.
    """
    copied = tensors[0].device.type == "cpu" and any(keys.overlap for keys in sets)
    size = max(1, AT_ONCE // tensors[0][0].numel()) if copied else len(tensors[0])
    return zip(*(t.split(size) for t in tensors))


class Merged(torch.autograd.Function):
    """Merges the sets' flash calls; each backward call gets the merged output and log-sum-exp.

    Tensors are the queries, and pairs of keys and values, of which each set takes one (``pairs``).
    """

    @staticmethod
    def forward(kernel, sets, pairs, masks, hidden, grid, scale, *tensors):
        outs = [Merged.some(kernel, sets, pairs, masks, hidden, grid, scale, *some) for some in pieces(sets, *tensors)]
        return outs[0] if len(outs) == 1 else tuple(map(torch.cat, zip(*outs)))

    @staticmethod
    def some(kernel, sets, pairs, masks, hidden, grid, scale, q, *known):
        """Output and log-sum-exp."""
        parts, wide = [], at_least_float32(q)
        for keys, pair, mask, unseen in zip(sets, pairs, masks, hidden):
            here, outs = _dense_rows(keys.queries(q)), []
            for some, at in few(keys, here.shape[1], q):
                k, v = (_dense_rows(some.keys(t)) for t in known[2 * pair : 2 * pair + 2])
                if here.numel() and k.numel():
                    call = _kernel_of(here, k, kernel).forward
                    outs.append(call(here[:, at], k, v, _of(mask, at), keys.causal, scale))
            if outs:
                out, lse = outs[0] if len(outs) == 1 else (torch.cat(t, dim=1) for t in zip(*outs))
                parts.append((keys, out, _filled(lse, unseen, -torch.inf)[..., None]))
        if not parts:  # nobody sees anything
            return torch.zeros_like(q), q.new_full((*q.shape[:3], 1), -torch.inf, dtype=wide)
        if len(parts) == 1:
            ((keys, out, lse),) = parts
            out = out.masked_fill_(lse == -torch.inf, 0)
            return keys.place(out, grid).to(q.dtype), keys.place(lse, grid)
        logs = torch.stack([keys.place(lse, grid, -torch.inf) for keys, _, lse in parts])
        # exp(l_s - l) need not sum to 1 where l is large and rounds; that of a query that sees nothing at all is NaN
        shares = logs.softmax(dim=0).masked_fill(logs == -torch.inf, 0)
        merged = q.new_zeros(q.shape, dtype=wide)
        for (keys, out, _), share in zip(parts, shares):
            keys.add_queries(merged, out.mul_(keys.queries(share)))
        return merged.to(q.dtype), logs.logsumexp(dim=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernel, ctx.sets, ctx.pairs, masks, hidden, _, ctx.scale, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*masks, *hidden, *tensors, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope, _):
        saved, n = ctx.saved_tensors, len(ctx.sets)  # once: gradient checkpointing gives them a single time
        masks, hidden, (*tensors, out, total) = saved[:n], saved[n : 2 * n], saved[2 * n :]
        wide, count = at_least_float32(out), len(tensors)
        slopes = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in tensors]
        call = ctx.kernel, ctx.sets, ctx.pairs, masks, hidden, ctx.scale
        for some in pieces(ctx.sets, *slopes, *tensors, _dense_rows(slope), out, total):
            Merged.add_slopes(*call, some[:count], some[count : 2 * count], *some[2 * count :])
        return *(None,) * 7, *(slope.to(out.dtype) for slope in slopes)

    @staticmethod
    def add_slopes(kernel, sets, pairs, masks, hidden, scale, slopes, tensors, slope, out, total):
        """Adds the gradients of some of the b to ``slopes``."""
        for keys, pair, mask, unseen in zip(sets, pairs, masks, hidden):
            known, of_q = slice(1 + 2 * pair, 3 + 2 * pair), []
            q, slope_here, out_here, lse = (_dense_rows(keys.queries(t)) for t in (tensors[0], slope, out, total))
            lse = _filled(lse[..., 0], unseen, torch.inf)  # exp(score - inf): no weight
            for some, at in few(keys, q.shape[1], tensors[0]):
                k, v = (_dense_rows(some.keys(t)) for t in tensors[known])
                if q.numel() and k.numel():
                    here = slope_here[:, at], q[:, at], k, v, out_here[:, at], lse[:, at], _of(mask, at)
                    part, *parts = _kernel_of(q, k, kernel).backward(*here, keys.causal, scale)
                    of_q.append(part)
                    for whole, part in zip(slopes[known], parts):
                        some.add_keys(whole, part)
            if of_q:
                keys.add_queries(slopes[0], of_q[0] if len(of_q) == 1 else torch.cat(of_q, dim=1))


def _kernel_of(q: Tensor, k: Tensor, kernel: type[Cpu] | type[Cuda]) -> type[Cpu] | type[Cuda] | type[Single]:
    return Single if q.shape[2] == k.shape[2] == 1 else kernel


def few(keys: KeySet, groups: int, x: Float[Tensor, "b H W d"]) -> list[tuple[KeySet, slice]]:
    """A key set with all of its groups at once, or parts of it: see `pieces`."""
    if x.device.type != "cpu" or x.numel() <= AT_ONCE:
        return [(keys, slice(None))]
    return keys.split(groups, max(1, groups * AT_ONCE // x.numel()))


def _of(mask: Tensor | None, groups: slice) -> Tensor | None:
    return None if mask is None else mask[:, groups]


def _dense_rows(t: Tensor) -> Tensor:
    """As the kernel reads it: rightly only where channels lie side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _filled(lse: Tensor, where: Tensor | None, value: float) -> Tensor:
    return lse if where is None else lse.masked_fill(where, value)


def mask_of(keys: KeySet, grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """`added` of a key set's own mask, without its causality; on CUDA in rows as `Cuda` wants them."""
    mask, unseen = added(keys.mask(grid, device), dtype)
    return _aligned_mask(mask) if device.type == "cuda" else mask, unseen


def added(
    seen: Bool[Tensor, "#groups #queries keys"] | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores (1, #groups, #queries, keys) to hide keys, and which queries see none, without ``keys``.

    What a kernel makes of a query that sees nothing is its own affair: here it sees everything, and is to be left out
    by hand.
    """
    if seen is None:
        return None, None
    unseen = ~seen.any(dim=-1)[None]
    return hiding(seen | unseen[0, ..., None], dtype), unseen


def hiding(seen: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "1 ..."]:
    """A mask as what is added to scores: half of the least number, which a kernel may multiply by log2 e, hides."""
    return (~seen).to(dtype).mul_(torch.finfo(dtype).min / 2)[None]  # a fifth of the time of filling
