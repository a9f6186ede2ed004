"""Attention within buckets of tokens, chunk by chunk: a table of integers says which bucket each token is in.

A bucket's tokens, in raster order, are cut into chunks of ``size``, each in a row of slots of its own. N tokens in
``count`` buckets fill at most N // size + count chunks: shapes follow from N, whatever is in the table. A token's place
in its chunk follows from the tokens before it, so that later ones change nothing of what earlier ones see, to the bit.
(Chunks of all tokens sorted by bucket have neither: their borders depend on how many tokens other buckets have.)
"""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..grid import Grid
from ..key_set import KeySet
from ..precision import at_least_float32, outside_autocast
from .flash import Before, Merged, hiding, kernel_for
from .selection import members, rows
from .union import flash

LANES = 16  # of a chunk, or a multiple: a product of matrices rounds by how they lie to multiples of 64 bytes

AT_ONCE = 2**17  # numbers of queries on a CPU, whose cache their copies should fit


class Chunks(KeySet):
    """The chunks of some buckets: every token with those of its own chunk and of the one before it in its bucket.

    Args:
        bucket: of each token, in [0, count).
        count: buckets, of which any may be empty.
        size: tokens of a chunk.
    """

    def __init__(self, bucket: Int[Tensor, "b N"], count: int, size: int):
        b, n = bucket.shape
        self.bucket, self.size, self.lanes = bucket, size, size + -size % LANES
        place = torch.arange(n, device=bucket.device).expand(b, -1)
        zero = torch.zeros_like(bucket[:, :1])  # under vmap only what comes of a table can be written into
        order = (bucket * n + place).argsort(dim=1)
        # where each bucket begins and ends among the sorted tokens; what adds as it scatters has no order on CUDA
        sorted_ = bucket.gather(1, order)
        same = sorted_[:, 1:] == sorted_[:, :-1]
        none = zero.expand(-1, count + 1)  # the last takes what begins or ends no bucket
        last = torch.cat([torch.where(same, count, sorted_[:, :-1]), sorted_[:, -1:]], dim=1)
        first = torch.cat([sorted_[:, :1], torch.where(same, count, sorted_[:, 1:])], dim=1)
        ends, begins = none.scatter(1, last, place + 1)[:, :count], none.scatter(1, first, place)[:, :count]
        self.sizes = ends - begins  # of the buckets
        self.rank = zero.expand(-1, n).scatter(1, order, place) - begins.gather(1, bucket)  # in its bucket
        own = self.rank // size  # chunk of its bucket
        whole = (self.sizes + size - 1) // size
        first = whole.cumsum(dim=1) - whole  # chunk of each bucket
        self.chunk, self.lane = first.gather(1, bucket) + own, self.rank - own * size
        chunks = n // size + count
        token = (zero - 1).expand(-1, chunks * self.lanes).scatter(1, self.slot, place)
        self.token = token.reshape(b, chunks, self.lanes)  # in each slot; -1 is padding
        before = torch.cat([(zero - 1).expand(-1, self.lanes)[:, None], self.token[:, :-1]], dim=1)
        self.near = torch.cat([before, self.token], dim=2)  # what is in the chunk before, and in its own

    def of(self, images: slice) -> "Chunks":
        """Those of some of the b."""
        some = copy.copy(self)
        for name in ("bucket", "sizes", "rank", "chunk", "lane", "token", "near"):
            setattr(some, name, getattr(self, name)[images])
        return some

    @property
    def slot(self) -> Int[Tensor, "b N"]:
        """Of each token, among those of all chunks."""
        return self.chunk * self.lanes + self.lane

    def fold(self, x: Shaped[Tensor, "b N d"]) -> Shaped[Tensor, "b chunks lanes d"]:
        """The tokens of each chunk; padding is some token or other."""
        return rows(x, self.token.clamp(min=0))

    def fold_near(self, x: Shaped[Tensor, "b N d"]) -> Shaped[Tensor, "b chunks near d"]:
        """The tokens of the chunk before each chunk, then its own."""
        return rows(x, self.near.clamp(min=0))

    def back(self, y: Shaped[Tensor, "b chunks lanes d"]) -> Shaped[Tensor, "b N d"]:
        """The inverse of `fold`."""
        return members(y, self.chunk, self.lane)

    def seen(self, past: bool, itself: Bool[Tensor, "b N"]) -> Bool[Tensor, "b chunks lanes near"]:
        """Which tokens of its chunk and the one before a token sees; ``past``: of those before it.

        Itself only where ``itself`` says so. Padding sees nothing and is not seen.
        """
        query = torch.arange(self.lanes, device=self.token.device)[:, None]
        key = torch.arange(-self.lanes, self.lanes, device=self.token.device)
        continues = self.fold(self.rank[..., None])[:, :, :1] >= self.size  # (b, chunks, 1, 1)
        there = (self.near >= 0)[:, :, None] & (continues | (key >= 0))  # (b, chunks, 1, 2 lanes)
        others = key < query if past else key != query
        there = there & (others | (self.fold(itself[..., None]) & (key == query)))
        return there & (self.token >= 0)[..., None]

    def queries(self, x):
        return self.fold(x.flatten(1, 2))

    def keys(self, x):
        return self.fold_near(x.flatten(1, 2))

    def place(self, y, grid, fill=0.0):
        return self.back(y).unflatten(1, tuple(grid))

    # A token is in one slot: the adjoint of a fold takes from there, and leaves what padding has

    def add_queries(self, whole, part):
        whole += self.place(part, Grid(*whole.shape[1:3]))

    def add_keys(self, whole, part):
        following = (self.chunk + 1) % part.shape[1]  # the first, which is behind the last, has seen none before it
        own, later = members(part, self.chunk, self.lanes + self.lane), members(part, following, self.lane)
        whole += (own + later).unflatten(1, whole.shape[1:3])


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads tokens dk"],
    v: Float[Tensor, "B heads tokens dv"],
    grid: Grid,
    rounds: list[Chunks],
    masks: list[Bool[Tensor, "b chunks lanes near"]],
    *,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B heads tokens dv"]:
    """One softmax over what the positions see in each of some rounds, and over the prefix tokens.

    What is seen in several rounds counts as often. Prefix queries see all (causal: one another).
    Cost: 2 · (N + count · size) · (2 size + P) · d a round, if ``size`` is a multiple of 16.

    Args:
        q, k, v: of all tokens, prefix tokens first.
        grid: of the positions.
        rounds: chunks of the positions, b = B · heads.
        masks: of each round, see `Chunks.seen`. Each position sees something in one of them or a prefix token.
        causal: whether prefix tokens are kept from seeing positions; for these the masks say it.
        scale: factor on q · k.
        dropout: of the weights, each round's by itself.
    """
    heads, prefix = q.shape[1], grid.prefix_of(q.shape[2])
    q, k = q.to(v.dtype), k.to(v.dtype)
    of_all = [t.flatten(0, 1) for t in (q, k, v)]
    before, here = [t[:, :prefix] for t in of_all[1:]], [t[:, prefix:] if prefix else t for t in of_all]
    kernel = kernel_for(*here) if dropout == 0 else None
    if kernel:
        out = _merged(kernel, here, before, rounds, masks, scale)
    else:
        out = _concatenated(here, before, rounds, masks, scale, dropout)
    out = out.reshape(q.shape[0], heads, grid.size, v.shape[3])
    if prefix == 0:
        return out
    k, v = (t[:, :, :prefix] if causal else t for t in (k, v))
    return torch.cat([flash(q[:, :, :prefix], k, v, dropout_p=dropout, scale=scale), out], dim=2)


def _merged(kernel, here, before, rounds, masks, scale):
    b, grid, pairs = len(here[0]), Grid(1, here[0].shape[1]), [0] * len(rounds) + [1]
    size = max(1, AT_ONCE // here[0][0].numel()) if here[0].device.type == "cpu" else b
    maps = [t[:, None].split(size) for t in (*here, *before)]
    outs = []
    for start, *tensors in zip(range(0, b, size), *maps):
        some = slice(start, start + size)
        sets = [*(chunks.of(some) for chunks in rounds), Before()]
        added = [hiding(mask[some], kernel.mask_type(here[0].dtype))[0] for mask in masks]
        hidden = [mask.amax(dim=-1) < 0 for mask in added]  # `any` of what is seen takes ten times as long
        added = [mask.masked_fill_(none[..., None], 0) for mask, none in zip(added, hidden)]
        out, _ = Merged.apply(kernel, sets, pairs, [*added, None], [*hidden, None], grid, scale, *tensors)
        outs.append(out[:, 0])
    return torch.cat(outs)


def _concatenated(here, before, rounds, masks, scale, dropout):
    dtype, wide = here[2].dtype, at_least_float32(here[2])
    (q, k, v), (k_before, v_before) = ([t.to(wide) for t in part] for part in (here, before))
    with outside_autocast(q):
        q, scores = q * scale, []
        for chunks, mask in zip(rounds, masks):
            some = chunks.fold(q) @ chunks.fold_near(k).transpose(-2, -1)
            scores.append(chunks.back(some.masked_fill(~mask, torch.finfo(wide).min)))
        scores.append(q @ k_before.transpose(-2, -1))
        weights = F.dropout(torch.cat(scores, dim=-1).softmax(dim=-1), dropout)
        *weights, of_before = weights.split([s.shape[-1] for s in scores], dim=-1)
        out = of_before @ v_before
        for chunks, some in zip(rounds, weights):
            out = out + chunks.back(chunks.fold(some) @ chunks.fold_near(v))
    return out.to(dtype)
