"""Exact softmax attention over a union of disjoint key sets, without the N×N matrix.

Everything, or all of the past, goes straight to `torch.nn.functional.scaled_dot_product_attention`, and so does any one
key set, on folded views. Several are one flash call each, merged by their log-sum-exp, and so, on a CPU, is one whose
groups share keys: it is folded a few images at a time, and anew in the backward. Where no kernel gives a log-sum-exp
(`flash.kernel_for`), several share one softmax over concatenated scores. Time and memory grow with the pairs that are
looked at. Small grids take one call with the pattern's mask instead, where that is faster (`route`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..grid import Grid
from ..kept import kept
from ..key_set import KeySet, Only
from ..pattern import All, Past, Pattern
from ..precision import at_least_float32, is_slow, outside_autocast
from ..traced import fixed, is_traced, is_transformed
from . import flex
from .bias import Bias, biased
from .flash import BLOCKS, Before, added, by_launches, hiding, kernel_for, mask_of, merged
from .route import asked, dense_is_faster, flat_is_faster, note, takes_dense


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads known dk"],
    v: Float[Tensor, "B heads known dv"],
    grid: Grid,
    pattern: Pattern,
    *,
    scale: float,
    dropout: float = 0.0,
    bias: Bias | Float[Tensor, "#b #groups queries keys"] | None = None,
    others: Sequence[tuple[KeySet, Tensor, Tensor]] = (),
) -> Float[Tensor, "B heads tokens dv"]:
    """softmax over what ``pattern`` allows and the prefix tokens; prefix queries see all (causal: one another).

    Without causality there may be more prefix tokens among the keys than among the queries. ``bias`` is added to the
    scaled scores of the only key set, b = B · heads. ``others`` are under the same softmax: key sets with keys and
    values of their own, maps (b, rows, columns, d). Cost: (queries × keys looked at) · d.
    """
    if is_slow(v):  # and scores may pass the least float16, a mask
        bias = bias.float() if isinstance(bias, Tensor) else bias
        others, options = [(keys, *(t.float() for t in own)) for keys, *own in others], dict(scale=scale, bias=bias)
        with outside_autocast(v):
            q, k, v = q.float(), k.float(), v.float()
            return attend(q, k, v, grid, pattern, dropout=dropout, others=others, **options).half()
    prefix = grid.prefix_of(q.shape[2])
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may leave normalised queries and keys wider
    plain = bias is None and not others
    if isinstance(pattern, All | Past) and plain:  # no folds: the prefix is in its place
        note("dense")
        out = flash(q, k, v, dropout_p=dropout, is_causal=pattern.causal, scale=scale)
        if not pattern.causal:
            return out
        out = out[:, :, prefix:]
    elif plain and takes_dense(dense_is_faster(pattern, q, grid)):
        return _dense(q, k, v, grid, pattern, scale, dropout)
    elif plain and flex.takes(q, v, pattern, dropout):
        return flex.attend(q, k, v, grid, pattern, scale=scale)
    else:
        shares = pattern.shares(q.shape[1])
        heads_of = zip(*(t.split(shares, dim=1) for t in (q, k, v))) if len(shares) > 1 else [(q, k, v)]
        outs = [
            _on_grid(*some, grid, part.key_sets(), scale, dropout, bias, others)
            for part, share, some in zip(pattern.by_head(), shares, heads_of)
            if share
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    if prefix == 0:
        return out
    k, v = (t[:, :, :prefix] if pattern.causal else t for t in (k, v))
    return torch.cat([flash(q[:, :, :prefix], k, v, dropout_p=dropout, scale=scale), out], dim=2)


def flash(
    q: Float[Tensor, "B heads queries dk"],
    k: Float[Tensor, "B heads keys dk"],
    v: Float[Tensor, "B heads keys dv"],
    **options,
) -> Float[Tensor, "B heads queries dv"]:
    """Torch's attention, with its ``options``, values being made as wide as wider keys: else it makes the N×N matrix.

    It does so for narrower keys, whose products would cost more if they were widened.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    width, wider = v.shape[-1], fixed(q.shape[-1] - v.shape[-1])
    v = F.pad(v, (0, wider)) if wider > 0 else v
    if wider < 0 and 0 in q.stride():  # cuDNN lays its output out as they lie, and those of all images lie nowhere
        q = q.contiguous()
    return _by_launches(q, k, v, **options)[..., :width]


def _by_launches(q, k, v, attn_mask=None, **options):
    """Torch's attention, of no more images and groups in a call than its kernels take on CUDA."""
    if is_traced() or max(q.shape[:2]) <= BLOCKS:
        return _attention(q, k, v, attn_mask, **options)
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:2], -1, -1)

    def call(*tensors):
        return (_attention(*tensors, **options),)

    return by_launches(call, q, k, v, mask)[0]


def _attention(q, k, v, mask, **options):
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    by_cudnn = out.is_cuda and out.element_size() == 2 and out.requires_grad  # under autocast, too
    return LikeOutput.apply(out) if by_cudnn and not is_transformed() else out


class LikeOutput(torch.autograd.Function):
    """Nothing, but that gradients lie as the output does.

    Torch keeps cuDNN's backward by sizes, and by how queries, keys and values lie: after a gradient that lay
    otherwise, torch 2.11 gives wrong gradients of all three.
    """

    @staticmethod
    def forward(out):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.strides = output.stride()

    @staticmethod
    def backward(ctx, slope):
        if slope.stride() == ctx.strides:
            return slope
        return torch.empty_strided(slope.shape, ctx.strides, dtype=slope.dtype, device=slope.device).copy_(slope)


def _dense(q, k, v, grid, pattern, scale, dropout):
    """One call with the mask of all heads, prefix queries included."""
    note("dense")
    prefix, more = fixed(grid.prefix_of(q.shape[2])), fixed(k.shape[2] - q.shape[2])
    mask, unseen = kept(_mask_of_all, pattern, fixed(q.shape[1]), grid, prefix, more, q.dtype, device=q.device)
    k, v = (pattern.known(t, grid) for t in (k, v))
    out = flash(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out if unseen is None else out.masked_fill(unseen[..., None], 0)


def _mask_of_all(pattern, heads, grid, prefix: int, more: int, dtype, device):
    """`added` of a pattern's whole mask, and of ``more`` keys before it that all see."""
    seen = F.pad(pattern.known_masks(heads, grid, prefix, device), (more, 0), value=True)
    mask, unseen = added(seen, dtype)
    if not is_traced():  # asked on the CPU, for no device is waited for
        unseen = None if prefix + more or pattern.known_masks(heads, grid, device="cpu").any(-1).all() else unseen
    return mask, unseen


def _on_grid(q, k, v, grid, key_sets, scale, dropout, bias, others):
    """Attention of the positions, without the prefix queries."""
    heads, parts = q.shape[1], [grid.split(t) for t in (q, k, v)]
    q, k, v = (grid.maps(t) for _, t in parts)
    before = [rearrange(t, "B n P d -> (B n) 1 P d") for t, _ in parts[1:]]
    sets = [*((keys, k, v) for keys in key_sets), *others]
    sets = [(keys.ready(grid, q.device), *known) for keys, *known in sets]
    key_sets = [keys for keys, *_ in sets]
    flat = asked() == "flat" or (asked() == "auto" and len(sets) > 1 and flat_is_faster(key_sets, grid, q.device))
    kernel = kernel_for(q, k, v) if dropout == 0 and not isinstance(bias, Tensor) and not flat else None
    if isinstance(bias, Bias):
        if kernel:
            note("union")
            out = biased(kernel, *key_sets, bias, grid, scale, q, k, v, *before)
            return rearrange(out, "(B n) H W d -> B n (H W) d", n=heads)
        bias = bias.as_mask(v.dtype)
    anew = kernel and key_sets[0].overlap and q.device.type == "cpu"
    if len(sets) == 1 and not anew and (key_sets[0].every or not fixed(before[0].shape[2])):
        out = _one_set(q, k, v, before, grid, *key_sets, scale, dropout, bias)
    elif bias is not None:
        raise ValueError(f"bias: takes one key set, got {len(sets)}")
    elif kernel:
        out = _merged(kernel, q, k, v, before, grid, key_sets, others, scale)
    else:
        out = _concatenated(q, [*sets, (Before(), *before)], grid, scale, dropout)
    return rearrange(out, "(B n) H W d -> B n (H W) d", n=heads)


def _one_set(q, k, v, before, grid, keys: KeySet, scale, dropout, bias):
    note("union")  # of one
    q, k, v = keys.queries(q), keys.keys(k), keys.keys(v)
    prefix = fixed(before[0].shape[2])
    mask, unseen = kept(_mask_of_set, keys, grid, prefix, q.dtype, device=q.device)
    if prefix:
        k, v = (torch.cat([p.expand(-1, t.shape[1], -1, -1), t], dim=2) for p, t in zip(before, (k, v)))
        bias = None if bias is None else F.pad(bias, (prefix, 0))
    if bias is not None:
        mask = bias if mask is None else bias + mask
    if mask is not None:
        mask = mask.expand(-1, -1, q.shape[2], -1)
    out = flash(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=keys.causal and not prefix, scale=scale)
    return keys.place(_of_seen(out, keys, unseen), grid)


def _mask_of_set(keys: KeySet, grid, prefix: int, dtype, device):
    """`added` of a key set and of ``prefix`` keys that all see; without them causality is the kernel's."""
    if not prefix:
        return mask_of(keys, grid, dtype, device)
    seen = _with_causal(keys, grid, device)
    return added(seen if seen is None else F.pad(seen, (prefix, 0), value=True), dtype)


def _merged(kernel, q, k, v, before, grid, key_sets, others, scale):
    note("union")
    of = [0] * (len(key_sets) - len(others)) + list(range(2, 2 + len(others)))
    parts = [(part, pair) for keys, pair in zip(key_sets, of) for part in keys.parts(grid)]
    sets, pairs = map(list, zip(*parts))
    masks = [kept(mask_of, keys, grid, kernel.mask_type(q.dtype), device=q.device) for keys in sets]
    tensors = [t for _, *own in others for t in own]
    return merged(kernel, sets, masks, grid, scale, q, k, v, *before, *tensors, pairs=pairs)


def _concatenated(q, sets, grid, scale, dropout):
    note("flat")
    dtype = sets[0][2].dtype
    sets = [entry for entry in sets if not isinstance(entry[0], Before) or fixed(entry[1].shape[2])]
    if q.dtype == torch.float16:  # whose range scores may leave
        q, sets = q.float(), [(keys, k.float(), v) for keys, k, v in sets]
    q, scores = q * scale, []
    masks = [kept(_whole_mask_of, keys, grid, q.dtype, device=q.device) for keys, *_ in sets]
    for (keys, k, _), (mask, _) in zip(sets, masks):
        seen = keys.queries(q) @ keys.keys(k).transpose(-2, -1)
        scores.append(keys.place(seen if mask is None else seen + mask, grid, torch.finfo(q.dtype).min))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=at_least_float32(q))
    weights = F.dropout(weights.to(dtype), dropout).split([s.shape[-1] for s in scores], dim=-1)
    outs = [keys.queries(w) @ keys.keys(v) for (keys, _, v), w in zip(sets, weights)]
    return sum(keys.place(_of_seen(out, keys, unseen), grid) for out, (keys, *_), (_, unseen) in zip(outs, sets, masks))


def _whole_mask_of(keys: KeySet, grid, dtype, device):
    """What hides keys of a set, its causality included, and which queries see none: other sets may show them some."""
    seen = _with_causal(keys, grid, device)
    return (None, None) if seen is None else (hiding(seen, dtype), ~seen.any(dim=-1)[None])


def _of_seen(out, keys: KeySet, unseen):
    """What queries take of a set: nothing where they see nothing. That may be so of composed sets alone."""
    return out.masked_fill(unseen[..., None], 0) if isinstance(keys, Only) else out


def _with_causal(keys: KeySet, grid, device):
    """The mask of a key set, its causality included."""
    if not keys.causal:
        return keys.mask(grid, device)
    number, _ = keys.numbers(grid, device)
    return torch.ones(1, number.shape[1], number.shape[1], dtype=torch.bool, device=device).tril()
