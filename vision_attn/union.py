"""Exact softmax attention over a union of disjoint key sets, without the N×N matrix.

One key set goes straight to `torch.nn.functional.scaled_dot_product_attention` on folded views. Several share one
softmax over their concatenated scores: time and memory grow with the pairs that are looked at.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .pattern import KeySet


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads tokens dk"],
    v: Float[Tensor, "B heads tokens dv"],
    grid: Grid,
    key_sets: tuple[KeySet, ...],
    *,
    scale: float,
    dropout: float = 0.0,
    bias: Float[Tensor, "#b groups length length"] | None = None,
) -> Float[Tensor, "B heads tokens dv"]:
    """softmax over the union of ``key_sets`` and the prefix tokens; prefix queries see everything.

    ``bias`` is added to the scaled scores of the only key set, b = B · heads. Cost: (queries × keys looked at) · d.
    """
    heads, prefix = q.shape[1], grid.prefix_of(q.shape[2])
    on_grid = [
        rearrange(t[:, :, prefix:], "B n (H W) d -> (B n) H W d", H=grid.height, W=grid.width) for t in (q, k, v)
    ]
    k_prefix, v_prefix = (rearrange(t[:, :, :prefix], "B n P d -> (B n) 1 P d") for t in (k, v))
    route = _one_set if len(key_sets) == 1 else _concatenated
    out = route(*on_grid, k_prefix, v_prefix, grid, key_sets, bias, scale, dropout)
    out = rearrange(out, "(B n) H W d -> B n (H W) d", n=heads)
    if prefix == 0:
        return out
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v, dropout_p=dropout, scale=scale)
    return torch.cat([first, out], dim=2)


def _one_set(q, k, v, k_prefix, v_prefix, grid, key_sets, bias, scale, dropout):
    (keys,) = key_sets
    prefix = k_prefix.shape[2]
    q, k, v = (keys.fold(t) for t in (q, k, v))
    mask = _additive(keys.mask(grid, q.device), q.dtype)
    if bias is not None:
        mask = bias if mask is None else bias + mask
    if prefix:
        k, v = (torch.cat([p.expand(-1, t.shape[1], -1, -1), t], dim=2) for p, t in ((k_prefix, k), (v_prefix, v)))
        mask = None if mask is None else F.pad(mask, (prefix, 0))
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return keys.unfold(out, grid)


def _concatenated(q, k, v, k_prefix, v_prefix, grid, key_sets, bias, scale, dropout):
    if bias is not None:
        raise ValueError(f"bias: takes one key set, got {len(key_sets)}")
    prefix = k_prefix.shape[2]
    q = q * scale
    scores = [rearrange(q, "b H W d -> b 1 (H W) d") @ k_prefix.mT] if prefix else []
    scores = [rearrange(s, "b 1 (H W) P -> b H W P", H=grid.height, W=grid.width) for s in scores]
    for keys in key_sets:
        seen = keys.fold(q) @ keys.fold(k).mT
        mask = _additive(keys.mask(grid, q.device), q.dtype)
        scores.append(keys.unfold(seen if mask is None else seen + mask, grid))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    weights = F.dropout(weights.to(v.dtype), dropout).split([s.shape[-1] for s in scores], dim=-1)
    out = sum(keys.unfold(keys.fold(w) @ keys.fold(v), grid) for keys, w in zip(key_sets, weights[-len(key_sets) :]))
    if prefix:
        first = rearrange(weights[0], "b H W P -> b 1 (H W) P") @ v_prefix
        out = out + rearrange(first, "b 1 (H W) d -> b H W d", H=grid.height, W=grid.width)
    return out


def _additive(mask, dtype):
    """A bool mask as a bias. The smallest finite number, so that a group of nothing but padding stays finite."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None]
