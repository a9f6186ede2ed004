"""Routing attention: a few centroids each gather the tokens nearest to them, which look at each other.

Roy et al. 2020, Routing Transformer, https://arxiv.org/abs/2003.05997
    C_c = the ⌈N / clusters⌉ tokens of the largest x · μ_c      x = LayerNorm(q)
    A_i = mean over {c : i ∈ C_c} of softmax over j ∈ C_c of x_i · x_j d^-½
Cost: (2 N² / clusters + N clusters) d
Computed: 1 ×
Queries are keys: one projection makes both, and the LayerNorm has no gain and no bias. Each head has its centroids.
Prefix tokens see all and belong to every cluster.
The centroids follow the tokens nearest to them by a moving average: once per optimizer step however often forward ran,
over all processes, never in eval. They are saved with the weights.
In two dimensions tokens are compared as they are, wherever they stand: let other heads look near, as the paper does.
With ``causal=True`` a token goes to its nearest centroid alone, and sees those of that cluster that come before it in
raster order, and itself: those of its own run of ``chunk`` of them and of the run before. That is exact: later pixels
change no bit of what earlier ones get. Which tokens are the w nearest is known only when all are there.
Deviations: a token that no centroid gathers sees itself (the code: gets zeros), and a token in several gets their mean
(the code adds 0.01 to their number). The code's causal form takes the same sets and masks what is later in them, so
that a pixel's set tells of later pixels, and samples by other sets than it trains by. μ is of unit length, and a
cluster without tokens keeps its own (the code: sums and counts, with a smoothing). The loss that draws x to μ, of
weight 10⁻⁴, is left out: a block hands out no losses.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import check
from ..average import StepAverage
from ..engines.buckets import Chunks, attend
from ..engines.selection import rows
from ..engines.union import flash
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast
from ..traced import fixed, is_traced

EPSILON = 1e-5  # of the LayerNorm


class Block(Mixer):
    """Routing attention.

    Args:
        clusters: of each head.
        decay: share of the centroids that a step keeps.
        causal: only what comes before in raster order, and itself.
        chunk: tokens of a run of a cluster, of the causal form alone.
        Others: those of `Mixer`; ``attn_drop`` must be 0 but in the causal form, as each cluster would drop by itself.

    Raises:
        ValueError: an argument is out of range.
    """

    projects = "qv"
    not_rotary = "queries are keys too, and clusters are of what they say, not where"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        clusters: int = 8,
        decay: float = 0.999,
        causal: bool = False,
        chunk: int = 32,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("clusters", clusters)
        check.rate("decay", decay)
        check.boolean("causal", causal)
        check.positive_int("chunk", chunk)
        check.rate("attn_drop", attn_drop)
        if attn_drop and not causal:
            raise ValueError(f"attn_drop={attn_drop!r}: must be 0 with causal=False: each cluster would drop by itself")
        super().__init__(dim, num_heads, attn_drop=attn_drop, device=device, dtype=dtype, **mixer)
        self.clusters, self.chunk, self.causal = clusters, chunk, causal
        shape = self.num_heads, clusters, self.key_dim // self.num_heads
        self.centroids = Centroids(shape, decay, beside=self.proj, device=device, dtype=dtype)

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Tensor, grid: Grid
    ) -> Int[Tensor, "B heads clusters w"] | Int[Tensor, "B heads positions"]:
        """The positions of each cluster; if causal, the cluster of each position."""
        near = self.near(q, grid)
        if self.causal:
            return near.argmax(dim=2)
        return near.topk((grid.size + self.clusters - 1) // self.clusters, dim=-1).indices

    def positions(self, q, grid):
        """x of the positions, in at least float32."""
        return normalised(q[:, :, grid.prefix_of(q.shape[2]) :])

    def near(self, q, grid) -> Float[Tensor, "B heads clusters positions"]:
        """x · μ."""
        x = self.positions(q, grid)
        with outside_autocast(q):
            return self.centroids.value.to(x.dtype) @ x.transpose(-2, -1)

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        self.note(q, grid)
        x = normalised(q).to(v.dtype)
        chosen = self.choose(q, k, grid).flatten(0, 1)
        if self.causal:
            chunks = Chunks(chosen, self.clusters, self.chunk)
            seen = chunks.seen(past=True, itself=torch.ones_like(chosen, dtype=torch.bool))
            return attend(x, x, v, grid, [chunks], [seen], causal=True, scale=self.scale, dropout=self.dropout)
        prefix = grid.prefix_of(q.shape[2])
        out = self.of_clusters(x.flatten(0, 1), v.flatten(0, 1), prefix, chosen)
        out = out.reshape(q.shape[0], q.shape[1], grid.size, v.shape[3])
        return torch.cat([flash(x[:, :, :prefix], x, v, scale=self.scale), out], dim=2) if prefix else out

    def of_clusters(self, x, v, prefix, members):
        """What positions get of their clusters' ``members`` (b, clusters, w) and of the prefix tokens, (b, N, d)."""
        x_before, v_before, x, v = (t[:, some] for some in (slice(prefix), slice(prefix, None)) for t in (x, v))
        n = v.shape[1]
        queries, values = rows(x, members), rows(v, members)
        keys, itself = queries, v  # of a token that sees nothing else
        if prefix:
            keys, values = (
                torch.cat([before[:, None].expand(-1, self.clusters, -1, -1), t], dim=2)
                for before, t in ((x_before, keys), (v_before, values))
            )
            scores = torch.cat([x.square().sum(dim=-1, keepdim=True), x @ x_before.transpose(-2, -1)], dim=-1)
            own, others = (self.scale * scores).softmax(dim=-1).split([1, prefix], dim=-1)
            itself = own * v + others @ v_before
        out = flash(queries, keys, values, scale=self.scale).to(at_least_float32(v))  # (b, clusters, w, d)
        total, times = self.summed(out, members, n)
        return torch.where(times > 0, (total / times.clamp(min=1)).to(v.dtype), itself)

    def summed(self, out, members, n):
        """What each position got in all of its clusters, (b, N, d), and in how many it is, (b, N, 1)."""
        b, _, size, width = out.shape
        if out.device.type == "cpu" and not is_traced():
            flat = (members + torch.arange(b, device=out.device)[:, None, None] * n).flatten()
            parts = out.flatten(0, 2), out.new_ones(flat.shape[0], 1)
            sums = (out.new_zeros(b * n, t.shape[1]).index_add(0, flat, t) for t in parts)
            return tuple(t.reshape(b, n, t.shape[1]) for t in sums)
        # cluster by cluster: on CUDA sums to one place have no order
        place = torch.arange(size, device=out.device).expand_as(members)
        none = torch.zeros_like(members[..., :1]) - 1
        found = none.expand(-1, -1, n).scatter(2, members, place)  # (b, clusters, N)
        first = torch.arange(self.clusters, device=out.device)[:, None] * size
        there = (found >= 0)[..., None].to(out.dtype)
        parts = rows(out.flatten(1, 2), found.clamp(min=0) + first) * there
        return parts.sum(dim=1), there.sum(dim=1)

    def note(self, q, grid):
        """Tells the centroids, in training, of the positions nearest to each: their mean, times their share."""
        if self.training:
            with torch.no_grad(), outside_autocast(q):
                x, nearest = self.positions(q, grid), self.near(q, grid).argmax(dim=2, keepdim=True)
                hot = (nearest == torch.arange(self.clusters, device=q.device)[:, None]).to(x.dtype)
                mean = (hot @ x).mean(dim=0) * (self.clusters / (grid.size * fixed(q.shape[-1]) ** 0.5))
            self.centroids.note(mean)

    def weights(self, q, k, grid):
        prefix, tokens = grid.prefix_of(q.shape[2]), q.shape[2]
        x = q - q.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
        scores = self.scale * torch.einsum("bnid,bnjd->bnij", x, x)
        itself = torch.eye(tokens, dtype=torch.bool, device=q.device)
        first = torch.arange(tokens, device=q.device) < prefix
        chosen = self.choose(q, k, grid)
        if self.causal:
            seen = F.pad(self.seen_of_past(chosen), (prefix, 0, prefix, 0), value=True)
            return scores.masked_fill(~(seen & (first | ~first[:, None])), -torch.inf).softmax(dim=-1)
        weights = times = 0
        for members in chosen.unbind(2):
            inside = torch.zeros(scores.shape[:3], dtype=torch.bool, device=q.device).scatter(2, prefix + members, True)
            of_one = scores.masked_fill(~(inside | first)[:, :, None], -torch.inf).softmax(dim=-1)
            weights = weights + of_one.masked_fill(~inside[..., None], 0)
            times = times + inside[..., None].to(q.dtype)
        of_itself = scores.masked_fill(~(itself | first), -torch.inf).softmax(dim=-1)
        weights = torch.where(times > 0, weights / times.clamp(min=1), of_itself)
        return torch.where(first[:, None], scores.softmax(dim=-1), weights)

    def seen_of_past(self, cluster):
        """The causal form: whom each position sees, (B, heads, N, N), of its cluster (B, heads, N)."""
        same = (cluster[..., None] == cluster[..., None, :]).tril()
        run = (same.sum(dim=-1, keepdim=True) - 1) // self.chunk  # by how many of the cluster come before
        return same & (run - run.mT <= 1)

    def extra_repr(self):
        return f"{super().extra_repr()}, clusters={self.clusters}"


def normalised(q: Tensor) -> Tensor:
    """LayerNorm(q), in at least float32."""
    return F.layer_norm(q.to(at_least_float32(q)), (fixed(q.shape[-1]),), eps=EPSILON)


class Centroids(StepAverage):
    """The centroids (heads, clusters, d) of unit length, kept as sums of unit vectors of that direction."""

    def __init__(self, shape: tuple[int, int, int], decay: float, beside: nn.Module, device=None, dtype=None):
        super().__init__(beside)
        self.decay = decay
        self.register_buffer("sums", torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the centroids anew: any direction, of unit length."""
        nn.init.normal_(self.sums)
        self.sums.copy_(self.value)

    @property
    def value(self) -> Float[Tensor, "heads clusters d"]:
        return F.normalize(self.sums.to(at_least_float32(self.sums)), dim=-1)

    def fold(self, seen):
        moved = self.decay * self.sums + (1 - self.decay) * seen.to(self.sums.dtype)
        self.sums.copy_(torch.where((seen != 0).any(dim=-1, keepdim=True), moved, self.sums))  # none seen: as it was
