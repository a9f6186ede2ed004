"""LSH attention: tokens whose queries point the same way fall into one bucket, and look at each other there.

Kitaev et al. 2020, Reformer, https://arxiv.org/abs/2001.04451
    b(x) = argmax [x R; -x R]      k_j = q_j / ‖q_j‖      R: d × count / 2, normal, one for each round and head
    A_i = softmax over j ≠ i of q_i · k_j d^-½ + log n_ij
Cost: rounds N (4 chunk + min(128, N / (4 chunk))) d
Computed: 1.4 ×
Queries are keys: one projection makes both. n_ij is the number of rounds in which i sees j, log 0 = -∞: that is the
paper's merging of rounds by their log-sum-exp. In a round, each bucket's tokens are cut in raster order into chunks of
``chunk``; a token sees those of its own chunk and of the one before. It sees itself only where it sees nothing else.
There are two buckets for each of N / (4 chunk) directions, at most 128: a bucket has two chunks in the mean.
Prefix tokens see all and are seen by all; they are in no bucket.
In two dimensions pixels are hashed as they are, and raster order is what is left of places: let other heads look near.
R is drawn once, by `reset_parameters`, and saved with the weights.
With ``causal=True`` a token sees those that come before it in raster order, exactly: its place in a bucket depends on
them alone, and later pixels change no bit of what earlier ones get.
Deviations: the code sorts all tokens by bucket and cuts the whole row into chunks, the first of which looks back at
the last; there a chunk's borders depend on later pixels, and parts of other buckets are seen. It draws R anew in every
call; its buckets have one chunk in the mean, and above 128 two factors. ``scale`` is d^-½ (the code: 1; scale=1.0 gives
it). The paper takes up to 8 rounds: here one, each further one costs as much again. A token alone takes itself alone
(the code: by -10⁵ on its score).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import check
from ..engines.buckets import Chunks, attend
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast
from ..traced import fixed, largest, least

DIRECTIONS = 128  # at most, of two buckets each: to hash is a product of queries with all of them
EPSILON = 1e-6  # added to the mean square of a query, so that one of zeros has a gradient


class Block(Mixer):
    """LSH attention.

    Args:
        rounds: hashes, each with buckets of its own.
        chunk: tokens of a bucket that see each other and the as many before them.
        causal: only what comes before in raster order.
        Others: those of `Mixer`; ``attn_drop`` must be 0 with several rounds, each of which would drop by itself.

    Raises:
        ValueError: an argument is out of range.
    """

    projects = "qv"
    not_rotary = "queries are keys too, and their hashes are of what they say, not where"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        rounds: int = 1,
        chunk: int = 32,
        causal: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("rounds", rounds)
        check.positive_int("chunk", chunk)
        check.boolean("causal", causal)
        check.rate("attn_drop", attn_drop)
        if attn_drop and rounds > 1:
            raise ValueError(f"attn_drop={attn_drop!r}: must be 0 with rounds={rounds}: each would drop by itself")
        super().__init__(dim, num_heads, attn_drop=attn_drop, device=device, dtype=dtype, **mixer)
        self.rounds, self.chunk, self.causal = rounds, chunk, causal
        shape = DIRECTIONS, self.num_heads, rounds, self.key_dim // self.num_heads
        self.register_buffer("planes", torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws R anew."""
        self.planes.normal_()

    def directions(self, n: int) -> int:
        """Columns of R in use for ``n`` positions."""
        return largest(1, least(DIRECTIONS, n // (4 * self.chunk)))

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Tensor, grid: Grid
    ) -> Int[Tensor, "B heads rounds positions"]:
        """The bucket of each position in each round."""
        wide, count = at_least_float32(q), self.directions(grid.size)
        q = q[:, :, None, grid.prefix_of(q.shape[2]) :].to(wide)
        with outside_autocast(q):
            along = q @ self.planes.narrow(0, 0, count).to(wide).permute(1, 2, 3, 0)  # (B, heads, rounds, N, count)
        (high, best), (low, worst) = along.max(dim=-1), along.min(dim=-1)
        return torch.where(high >= -low, best, worst + count)

    @in_float32_where_slow  # and gradients of unit keys are sums of products with queries
    def mix(self, q, k, v, grid):
        count = 2 * self.directions(grid.size)
        rounds = [Chunks(bucket.flatten(0, 1), count, self.chunk) for bucket in self.choose(q, k, grid).unbind(2)]
        alone = torch.stack([self.alone(chunks) for chunks in rounds]).all(dim=0)
        if grid.prefix_of(q.shape[2]):
            alone = torch.zeros_like(alone)
        masks = [chunks.seen(self.causal, alone) for chunks in rounds]
        options = dict(causal=self.causal, scale=self.scale, dropout=self.dropout)
        return attend(q, self.keys(q), v, grid, rounds, masks, **options)

    def alone(self, chunks: Chunks):
        """Which tokens have none but themselves to see, (b, N)."""
        if self.causal:
            return chunks.rank == 0
        beside = chunks.sizes.clamp(max=self.chunk).gather(1, chunks.bucket)  # if in the first chunk
        return (chunks.rank < self.chunk) & (beside == 1)

    def keys(self, q):
        """Queries of unit length."""
        wide = q.to(at_least_float32(q))
        length = (wide.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt() * fixed(q.shape[-1]) ** 0.5
        return (wide / length).to(q.dtype)

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        bucket = self.choose(q, k, grid)[..., None]  # (B, heads, rounds, N, 1)
        same = bucket == bucket.mT
        chunk = same.tril(-1).sum(dim=-1, keepdim=True) // self.chunk  # by how many of the bucket come before
        seen = same & ((chunk == chunk.mT) | (chunk == chunk.mT + 1))
        itself = torch.eye(grid.size, dtype=torch.bool, device=q.device)
        times = (seen.tril() if self.causal else seen).sum(dim=2).masked_fill(itself, 0)
        if not prefix:
            times = times + (itself & (times.sum(dim=-1, keepdim=True) == 0))
        times = F.pad(times, (prefix, 0, prefix, 0), value=1)
        if self.causal:
            times[:, :, :prefix, prefix:] = 0
        keys = q / (q.square().sum(dim=-1, keepdim=True) + q.shape[-1] * EPSILON).sqrt()
        scores = self.scale * torch.einsum("bnid,bnjd->bnij", q, keys)
        return (scores + times.to(q.dtype).log()).softmax(dim=-1)

    def extra_repr(self):
        return f"{super().extra_repr()}, rounds={self.rounds}, chunk={self.chunk}"
