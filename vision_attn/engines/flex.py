"""Attention of a pattern by FlexAttention, which skips blocks of 128 × 128 pairs of which none is allowed.

Dong et al. 2024, https://arxiv.org/abs/2412.05496. Blocks are counted from the pattern's key sets, so that no N×N mask
is made. It is for CUDA, and compiled anew for each pattern and shape, which takes about ten seconds a call: no route
takes it unless ``route("flex")`` asks for it.

- One call: patterns whose allowed pairs lie in few blocks in raster order (windows, rows, global tokens), and with a
  ``table`` of biases by how far a key is from its query, which may learn (`adaptive_span`, `gaussian_prior`).
- Two calls, merged by their log-sum-exp: patterns with columns, which meet a key in every row, so nearly all blocks in
  raster order (criss-cross, strided, fixed, heads that look along columns). One call is in raster order, the other is
  in the order of columns, and each takes the pairs that lie in few blocks there. Counted blocks decide (`calls_of`).

On an H100 one call takes a third to three quarters of the time of key sets from 64×64 on. Two calls and tables were not
run on a GPU, though their kernels compile for one; on a CPU they give the definition's outputs and gradients without
kernels, and its outputs with those that torch has there.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..grid import Grid
from ..kept import kept
from ..key_set import Only
from ..pattern import Column, Pattern, PerHead, Row
from ..traced import is_passing
from .route import asked, note

BLOCK = 128  # queries, and keys, of a block
MOST = 1024  # patterns and sizes that are compiled; of one more torch would make the N×N matrix
SECOND = 6  # blocks of keys, for each of queries, in whose time a second call is made and merged: an estimate
CPU = torch.device("cpu")


def takes(
    q: Float[Tensor, "B heads tokens dk"], v: Float[Tensor, "B heads known dv"], pattern: Pattern, dropout: float
) -> bool:
    """Whether FlexAttention is asked for and there, nothing is dropped, and the pattern sums up nothing.

    Its kernels take no fewer than 16 channels.
    """
    if asked() != "flex" or q.device.type != "cuda" or is_passing(q.device):
        return False
    return dropout == 0 and type(pattern).known is Pattern.known and min(q.shape[-1], v.shape[-1]) >= 16


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads known dk"],
    v: Float[Tensor, "B heads known dv"],
    grid: Grid,
    pattern: Pattern,
    *,
    scale: float,
    table: Float[Tensor, "heads down right"] | None = None,
    run=None,
) -> Float[Tensor, "B heads tokens dv"]:
    """What `union.attend` gives. ``table``, (heads, 2 H - 1, 2 W - 1), is added to the scaled scores: its entry
    (H - 1 + y, W - 1 + x) where the key is y rows below and x columns right of the query, nothing for prefix tokens.
    Its gradient takes one more addition in memory for each pair. ``run``: to use in place of `compiled`.
    """
    note("flex")
    tokens, known, q, k = q.shape[2], k.shape[2], q.to(v.dtype), k.to(v.dtype)
    in_rows, in_columns = calls_of(pattern, q.shape[1], grid, tokens, known)
    call = functools.partial(_call, scale=scale, table=table, run=run or compiled)
    out, total = call(q, k, v, grid, in_rows, with_total=in_columns is not None)
    if in_columns is None:
        return out
    prefix, turned = tokens - grid.size, Grid(grid.width, grid.height)
    positions = (_transposed(t[:, :, t.shape[2] - grid.size :], grid) for t in (q, k, v))
    found = call(*positions, grid, in_columns, with_total=True, by_column=True)
    other, other_total = (_transposed(t, turned) for t in found)
    other, other_total = F.pad(other, (0, 0, prefix, 0)), F.pad(other_total, (prefix, 0), value=_least(total))
    return (run or compiled)(merged)(out, total, other, other_total)


@functools.cache
def compiled(function):
    """A function compiled by torch, for one shape after the other."""
    fast = torch.compile(function, dynamic=False)

    def call(*args, **options):
        with torch._dynamo.config.patch(recompile_limit=MOST, accumulated_recompile_limit=MOST):
            return fast(*args, **options)

    return call


def merged(
    out: Float[Tensor, "B heads tokens d"],
    total: Float[Tensor, "B heads tokens"],
    other: Float[Tensor, "B heads tokens d"],
    other_total: Float[Tensor, "B heads tokens"],
) -> Float[Tensor, "B heads tokens d"]:
    """Attention over two disjoint sets of keys, from that over each and the log-sum-exp of its scores, both finite."""
    weight = torch.sigmoid(other_total - total)[..., None]
    return torch.lerp(out.to(weight.dtype), other.to(weight.dtype), weight).to(out.dtype)


def _transposed(x: Tensor, grid: Grid) -> Tensor:
    """Positions (B, heads, H · W, …) column by column."""
    return x.unflatten(2, tuple(grid)).transpose(2, 3).flatten(2, 3)


def _least(total: Tensor) -> float:
    """The log-sum-exp of no scores; half the least number, which the other call's may be taken from."""
    return torch.finfo(total.dtype).min / 2


def _call(q, k, v, grid, pattern, *, scale, table, run, with_total=False, by_column=False):
    """One call of FlexAttention: its output and, ``with_total``, the log-sum-exp of scores. ``by_column``: in the order
    of columns. No convention of a kernel about queries that see nothing matters: they take 0, and their sum is least.
    """
    heads, queries, known = q.shape[1:3] + k.shape[2:3]
    *blocks, unseen = kept(_blocks, pattern, heads, grid, queries, known, by_column, device=q.device)
    prefixes = queries - grid.size, known - grid.size
    rule = rule_of(pattern, heads, grid, *prefixes, by_column)
    mask = BlockMask((queries, known), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)
    options = dict(block_mask=mask, scale=scale, return_aux=AuxRequest(lse=with_total))
    if table is not None:
        options["score_mod"] = addition_of(table, grid, *prefixes, by_column)
    out, (total, *_) = run(flex_attention)(q.contiguous(), k.contiguous(), v.contiguous(), **options)
    if unseen is not None:
        out = out.masked_fill(unseen[..., None], 0)
        total = total.masked_fill(unseen, _least(total)) if with_total else None
    return out, total


# What is seen, and what is added: functions of FlexAttention


@functools.lru_cache(maxsize=256)  # the same object each time, or what calls it is compiled anew
def rule_of(pattern: Pattern, heads: int, grid: Grid, prefix: int, known_prefix: int, by_column: bool = False):
    """The pattern as a rule of FlexAttention: (image, head, query, key) to whether it is seen; prefix tokens first."""
    parts, first = [], 0
    for part, share in zip(pattern.by_head(), pattern.shares(heads)):
        parts.append((part, first, first + share))
        first += share
    several, causal, place = len(parts) > 1, pattern.causal, _place_of(grid, by_column)

    def rule(b, h, query, key):
        query, key = query - prefix, key - known_prefix
        places = *place(query), *place(key)
        seen = None
        for part, first, last in parts:
            allowed = part.allowed(*places, grid)
            if several:
                allowed = allowed & (h >= first) & (h < last)
            seen = allowed if seen is None else seen | allowed
        seen = seen & (query >= 0)
        return (key < 0) | (seen if causal else seen | (query < 0))

    return rule


def addition_of(table, grid: Grid, prefix: int, known_prefix: int, by_column: bool = False):
    """The table as a function of FlexAttention: (score, image, head, query, key) to the sum of score and bias.

    A new one at each step, as the table is: what calls it is compiled for its code and the table's shape alone.
    """
    place, row = _place_of(grid, by_column), 2 * grid.width - 1
    flat = table.flatten(1).clone()  # of a view that is captured torch 2.11 loses the gradient, without a word
    middle = (grid.height - 1) * row + grid.width - 1

    def entry(number):
        y, x = place(number)
        return y * row + x

    def added(score, b, h, query, key):
        query, key = query - prefix, key - known_prefix
        bias = flat[h, entry(key) - entry(query) + middle]  # of a pair no more than a difference is to be computed
        return torch.where((query < 0) | (key < 0), score, score + bias)

    return added


def _place_of(grid: Grid, by_column: bool):
    """Row and column of a position by its number in an order; of a prefix token, whose is negative, those of the
    first position."""
    height, width = grid

    def place(number):
        number = number.clamp(min=0)
        return (number % height, number // height) if by_column else (number // width, number % width)

    return place


# One call or two


@dataclass(frozen=True)
class Except(Pattern):
    """What a pattern allows and another one does not."""

    whole: Pattern
    other: Pattern

    @property
    def causal(self):
        return self.whole.causal

    def allowed(self, qy, qx, ky, kx, grid):
        return self.whole.allowed(qy, qx, ky, kx, grid) & ~self.other.allowed(qy, qx, ky, kx, grid)

    def key_sets(self):
        return tuple(Only(keys, self.other, False) for keys in self.whole.key_sets())


@dataclass(frozen=True)
class Nothing(Pattern):
    """No pair at all."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (ky != ky) & (qy != qy)

    def key_sets(self):
        return ()


def ways(pattern: Pattern) -> tuple[tuple[Pattern, Pattern], ...]:
    """Disjoint parts of a pattern for a call in raster order and one in the order of columns."""
    row, column = Row(), Column()
    return (pattern, Nothing()), (pattern & row, Except(pattern, row)), (Except(pattern, column), pattern & column)


@functools.lru_cache(maxsize=256)
def calls_of(pattern: Pattern, heads: int, grid: Grid, tokens: int, known: int) -> tuple[Pattern, Pattern | None]:
    """What is computed in raster order, prefix tokens included, and what in the order of columns: None if nothing is.

    Of each head's pattern that of `ways` which meets the fewest blocks, if that saves more than a second call takes.
    """

    def met(part, queries, known, by_column):
        return int((kept(counted, part, grid, queries, known, by_column, device=CPU)[0] > 0).sum())

    def cost(way):
        return met(way[0], tokens, known, False) + met(way[1], grid.size, grid.size, True)

    parts, shares, rows = pattern.by_head(), pattern.shares(heads), heads * -(-tokens // BLOCK)
    in_one = sum(share * met(part, tokens, known, False) for part, share in zip(parts, shares))
    if in_one <= (1 + SECOND) * rows:  # fewer than one block for each row of them is not to be had
        return pattern, None
    chosen = [min(ways(part), key=cost) for part in parts]
    in_two = sum(share * cost(way) for way, share in zip(chosen, shares)) + SECOND * rows
    return tuple(map(PerHead, zip(*chosen))) if in_two < in_one else (pattern, None)


# Blocks


def _blocks(pattern, heads, grid, queries: int, known: int, by_column: bool, device):
    """What `BlockMask` takes: number and indices of the blocks of keys that a block of queries meets in part, of those
    that it meets whole, and both the other way round; and which tokens see nothing, or None if all see something."""
    parts = [
        tuple(t.expand(share, *t.shape) for t in kept(counted, part, grid, queries, known, by_column, device=CPU))
        for part, share in zip(pattern.by_head(), pattern.shares(heads))
        if share
    ]
    met, unseen = map(torch.cat, zip(*parts))
    whole = met == BLOCK**2
    found = []
    for chosen in ((met > 0) & ~whole, whole):
        order = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        found += [chosen.sum(dim=-1), order]
    blocks = (t[None].to(torch.int32) for t in found)
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, seq_lengths=(queries, known))
    names = (f"{which}_{what}" for which in ("kv", "full_kv", "q", "full_q") for what in ("num_blocks", "indices"))
    blocks = (getattr(mask, name) for name in names)
    return *(t.to(device) for t in blocks), unseen[None].to(device) if unseen.any() else None


def counted(
    pattern: Pattern, grid: Grid, queries: int, known: int, by_column: bool, device
) -> tuple[Int[Tensor, "blocks_of_queries blocks_of_keys"], Bool[Tensor, "queries"]]:
    """How many pairs of each block the pattern of one head allows, and which queries see nothing."""
    pairs = pairs_of(pattern, grid, queries, known, by_column)
    met = F.pad(pairs, (0, 0, 0, -queries % BLOCK)).unflatten(0, (-1, BLOCK)).sum(dim=1, dtype=torch.int32)
    return met, (pairs == 0).all(dim=-1)


def pairs_of(
    pattern: Pattern, grid: Grid, queries: int, known: int, by_column: bool = False
) -> UInt8[Tensor, "queries blocks"]:
    """How many keys of each block of ``BLOCK`` each query sees; prefix tokens first. Counted on the CPU."""
    prefix, known_prefix, block = queries - grid.size, known - grid.size, torch.arange(known) // BLOCK
    sizes = torch.bincount(block).to(torch.uint8)
    found = torch.zeros(queries, len(sizes), dtype=torch.uint8)
    for keys in pattern.key_sets():
        query, key = keys.numbers(grid, CPU)
        if by_column:
            query, key = (torch.where(n < 0, n, n % grid.width * grid.height + n // grid.width) for n in (query, key))
        there, at = (key >= 0)[:, None], block[key.clamp(min=0) + known_prefix]
        if keys.causal:  # no matrix of pairs, which may be all
            each = (at[:, :, None] == torch.arange(len(sizes))) & there.mT
            seen = each.cumsum(dim=1, dtype=torch.uint8)
        else:
            mask = keys.mask(grid, CPU)
            each = there if mask is None else there & mask
            seen = torch.zeros(*each.shape[:2], len(sizes), dtype=torch.uint8)
            seen.scatter_add_(2, at[:, None].expand(each.shape), each.to(torch.uint8))
        placed = query >= 0
        found[query[placed] + prefix] += seen.expand(*query.shape, -1)[placed]
    found += torch.bincount(block[:known_prefix], minlength=len(sizes)).to(torch.uint8)
    if not pattern.causal:
        found[:prefix] = sizes
    return found
