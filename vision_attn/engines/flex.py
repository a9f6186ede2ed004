"""Attention of a pattern in one call of FlexAttention, which skips blocks of 128 × 128 pairs of which none is allowed.

Dong et al. 2024, https://arxiv.org/abs/2412.05496. Blocks are counted from the pattern's key sets, so that no N×N mask
is made. It is for CUDA, and compiled anew for each pattern and shape, which takes about ten seconds: no route takes it
unless ``route("flex")`` asks for it. On an H100 it takes a third to three quarters of the time of key sets from 64×64
on.
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..grid import Grid
from ..kept import kept
from ..pattern import Pattern

BLOCK = 128  # queries, and keys, of a block
MOST = 1024  # patterns and sizes that are compiled; of one more torch would make the N×N matrix


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads known dk"],
    v: Float[Tensor, "B heads known dv"],
    grid: Grid,
    pattern: Pattern,
    *,
    scale: float,
    call=None,
) -> Float[Tensor, "B heads tokens dv"]:
    """What `union.attend` gives. ``call``: to use in place of the compiled `flex_attention`."""
    heads, queries, known = q.shape[1:3] + k.shape[2:3]
    device = q.device
    *blocks, unseen = kept(_blocks, pattern, heads, grid, queries, known, device=device)
    rule = rule_of(pattern, heads, grid, queries - grid.size, known - grid.size)
    mask = BlockMask((queries, known), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)
    with torch._dynamo.config.patch(recompile_limit=MOST, accumulated_recompile_limit=MOST):
        out = (call or _compiled())(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask, scale=scale)
    return out if unseen is None else out.masked_fill(unseen[..., None], 0)


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=256)  # the same object each time, or what calls it is compiled anew
def rule_of(pattern: Pattern, heads: int, grid: Grid, prefix: int, known_prefix: int):
    """The pattern as a rule of FlexAttention: (image, head, query, key) to whether it is seen; prefix tokens first."""
    parts, first = [], 0
    for part, share in zip(pattern.by_head(), pattern.shares(heads)):
        parts.append((part, first, first + share))
        first += share
    several, causal, width = len(parts) > 1, pattern.causal, grid.width

    def rule(b, h, query, key):
        query, key = query - prefix, key - known_prefix
        of_query, of_key = query.clamp(min=0), key.clamp(min=0)  # what they say of prefix tokens does not count
        places = of_query // width, of_query % width, of_key // width, of_key % width
        seen = None
        for part, first, last in parts:
            allowed = part.allowed(*places, grid)
            if several:
                allowed = allowed & (h >= first) & (h < last)
            seen = allowed if seen is None else seen | allowed
        seen = seen & (query >= 0)
        return (key < 0) | (seen if causal else seen | (query < 0))

    return rule


def _blocks(pattern, heads, grid, queries: int, known: int, device):
    """What `BlockMask` takes: number and indices of the blocks of keys that a block of queries meets in part, of those
    that it meets whole, and both the other way round; and which tokens see nothing, or None if all see something."""
    parts = [
        pairs_of(part, grid, queries, known).expand(share, -1, -1) if share else None
        for part, share in zip(pattern.by_head(), pattern.shares(heads))
    ]
    pairs = torch.cat([part for part in parts if part is not None])  # (heads, tokens, blocks of keys)
    met = torch.nn.functional.pad(pairs, (0, 0, 0, -queries % BLOCK)).unflatten(1, (-1, BLOCK)).sum(dim=2)
    whole = met == BLOCK**2
    found = []
    for chosen in ((met > 0) & ~whole, whole):
        order = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        found += [chosen.sum(dim=-1), order]
    unseen = (pairs.sum(dim=-1) == 0)[None]
    blocks = (t[None].to(torch.int32) for t in found)
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, seq_lengths=(queries, known))
    names = (f"{which}_{what}" for which in ("kv", "full_kv", "q", "full_q") for what in ("num_blocks", "indices"))
    blocks = (getattr(mask, name) for name in names)
    return *(t.to(device) for t in blocks), unseen.to(device) if unseen.any() else None


def pairs_of(pattern: Pattern, grid: Grid, queries: int, known: int) -> Int[Tensor, "1 queries blocks"]:
    """How many keys of each block of ``BLOCK`` each query sees; prefix tokens first. Counted on the CPU."""
    prefix, known_prefix, cpu = queries - grid.size, known - grid.size, torch.device("cpu")
    count = -(-known // BLOCK)
    found = torch.zeros(queries * count, dtype=torch.int64)
    for keys in pattern.key_sets():
        query, key = keys.numbers(grid, cpu)
        seen = keys.mask(grid, cpu)
        if keys.causal:
            seen = torch.ones(1, query.shape[1], key.shape[1], dtype=torch.bool).tril()
        there = (query >= 0)[:, :, None] & (key >= 0)[:, None]
        there = there if seen is None else there & seen
        place = (query + prefix)[:, :, None] * count + ((key + known_prefix) // BLOCK)[:, None]
        found += torch.bincount(place[there], minlength=len(found))
    found = found.view(queries, count)
    of_first = torch.bincount(torch.arange(known_prefix) // BLOCK, minlength=count)
    found += of_first
    if not pattern.causal:
        found[:prefix] = torch.bincount(torch.arange(known) // BLOCK, minlength=count)
    return found[None]
