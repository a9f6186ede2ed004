"""Clustered attention: tokens whose queries are alike ask as one, by the mean of their queries.

Vyas et al. 2020, Clustered Attention, https://arxiv.org/abs/2007.04825
    A_i = softmax over j of q̄_c · k_j d^-½      c = c(i), the cluster of i      q̄_c: mean of its queries
    improved: of T_c, the ``top`` keys of the largest q̄_c · k_j, only the sum is kept, for i to share out by itself:
    A_ij = (Σ_{t ∈ T_c} A_ct) · softmax over j ∈ T_c of q_i · k_j d^-½      for j ∈ T_c
Cost: (2 + iterations) N cells² d + 2 N top d
Computed: 1 ×
In two dimensions clusters are superpixels: they start as ``cells`` × ``cells`` equal parts of the image, and move by
``iterations`` rounds of k-means of the queries of each head; one that has lost all its tokens is out. That does without
a draw: the same image has the same clusters always. Gradients go through the means, not through the choice.
Prefix tokens are keys like any other; as queries they see all, each for itself.
Deviations: the code clusters the sign bits of random projections of the queries by their Hamming distance, in ten
rounds that start at random tokens, all drawn anew in every call, also in eval. Its causal forms make clusters, means
and ``top`` of all tokens and mask later keys afterwards, so that a pixel hears later ones.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import check
from ..check import Count
from ..engines.buckets import Chunks, rows
from ..engines.union import flash
from ..grid import Grid
from ..key_set import rows_and_columns
from ..mixer import Mixer
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast
from ..traced import is_traced, least

CHUNK = 32  # tokens of a cluster whose own scores are computed at once


class Block(Mixer):
    """Clustered attention.

    Args:
        cells: clusters to start from, down and right: an integer or (height, width); their product is their number.
        iterations: of k-means.
        top: keys of each cluster that each of its queries weighs by itself; 0: none.
        Others: those of `Mixer`, but ``attn_drop``, which could drop no pixel of one query alone.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "queries are averaged over the whole image, and clusters are made of all of it"
    not_rotary = "queries are averaged over pixels at many places"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        cells: int | tuple[int, int] = 8,
        iterations: Count = 3,
        top: Count = 0,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        cells = check.pair("cells", cells)
        check.count("iterations", iterations)
        check.count("top", top)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.cells, self.iterations, self.top = cells, iterations, top
        self.count = cells[0] * cells[1]

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Float[Tensor, "B heads tokens d"], grid: Grid
    ) -> tuple[Int[Tensor, "B heads positions"], Int[Tensor, "B heads clusters top"]]:
        """The cluster of each position, and each cluster's top tokens, prefix tokens counted; fewer if there are."""
        wide = at_least_float32(q)
        x = q[:, :, grid.prefix_of(q.shape[2]) :].to(wide)
        y, right = rows_and_columns(torch.arange(grid.size, device=q.device), grid.width)
        (down, across), (height, width) = self.cells, grid
        cluster = (y * down // height * across + right * across // width).expand(x.shape[:3])
        with outside_autocast(q):
            for _ in range(self.iterations):
                mean, size = self.means(x, cluster)
                # |x - mean|² / -2, up to what is the same for all clusters; those without tokens are far away
                offset = (mean.square().sum(dim=-1) / -2).masked_fill(size[..., 0] == 0, torch.finfo(wide).min)
                near = torch.baddbmm(
                    offset.flatten(0, 1)[:, None], x.flatten(0, 1), mean.flatten(0, 1).transpose(-2, -1)
                )
                cluster = near.argmax(dim=-1).reshape(x.shape[:3])
            if not self.top:
                return cluster, cluster.new_zeros(x.shape[0], x.shape[1], self.count, 0)
            scores = self.means(x, cluster)[0] @ k.to(wide).transpose(-2, -1)
        return cluster, scores.topk(least(self.top, k.shape[2]), dim=-1).indices

    def means(self, x, cluster):
        """Means (B, heads, clusters, d) and numbers of tokens (B, heads, clusters, 1); 0 of none."""
        with_one, b = F.pad(x, (0, 1), value=1.0), x.shape[0] * x.shape[1]
        if x.device.type == "cpu" and not is_traced():
            flat = (cluster.flatten(0, 1) + self.count * torch.arange(b, device=x.device)[:, None]).flatten()
            total = with_one.new_zeros(b * self.count, with_one.shape[3]).index_add(0, flat, with_one.flatten(0, 2))
            total = total.reshape(*x.shape[:2], self.count, with_one.shape[3])
        else:  # as a product: on CUDA sums to one place have no order, and would tip ties now here, now there
            total = (cluster[:, :, None] == torch.arange(self.count, device=x.device)[:, None]).to(x.dtype) @ with_one
        total, size = total.split([x.shape[3], 1], dim=-1)
        return total / size.clamp(min=1), size

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        prefix, heads = grid.prefix_of(q.shape[2]), q.shape[1]
        cluster, top = self.choose(q, k, grid)
        with outside_autocast(v):
            mean, _ = self.means(q[:, :, prefix:].to(at_least_float32(v)), cluster)
        if self.top:
            out = self.improved(mean.flatten(0, 1), *(t.flatten(0, 1) for t in (q[:, :, prefix:], k, v, cluster, top)))
        else:
            out = rows(flash(mean.to(v.dtype), k, v, scale=self.scale).flatten(0, 1), cluster.flatten(0, 1))
        out = out.reshape(q.shape[0], heads, grid.size, v.shape[3])
        return torch.cat([flash(q[:, :, :prefix], k, v, scale=self.scale), out], dim=2) if prefix else out

    def improved(self, mean, q, k, v, cluster, top):
        """What positions (b, N, d) get of all keys but the top ones by their cluster, and of these by themselves."""
        wide = mean.dtype
        with outside_autocast(v):
            weights = (self.scale * mean @ k.to(wide).transpose(-2, -1)).softmax(dim=-1)  # (b, clusters, tokens)
            share = weights.gather(2, top).sum(dim=-1, keepdim=True)
            others = weights.scatter(2, top, 0.0) @ v.to(wide)
        chunks = Chunks(cluster, self.count, CHUNK)
        of_chunk = cluster.gather(1, chunks.token[:, :, 0].clamp(min=0))  # its cluster
        keys = rows(top, of_chunk)  # (b, chunks, top)
        out = chunks.back(flash(chunks.fold(q), rows(k, keys), rows(v, keys), scale=self.scale))
        return (out * rows(share, cluster) + rows(others, cluster)).to(v.dtype)

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        cluster, top = self.choose(q, k, grid)
        number = torch.arange(self.count, device=q.device)
        mine = (cluster[..., None] == number).to(q.dtype)  # (B, heads, N, clusters)
        share = mine / mine.sum(dim=2, keepdim=True).clamp(min=1)
        mean = torch.einsum("bnic,bnid->bncd", share, q[:, :, prefix:])
        of_cluster = (self.scale * torch.einsum("bncd,bnjd->bncj", mean, k)).softmax(dim=-1)
        weights = torch.einsum("bnic,bncj->bnij", mine, of_cluster)
        own = self.scale * torch.einsum("bnid,bnjd->bnij", q, k)
        if self.top:
            is_top = torch.zeros(of_cluster.shape, dtype=q.dtype, device=q.device).scatter(3, top, 1.0)
            is_top = torch.einsum("bnic,bncj->bnij", mine, is_top) > 0
            kept = weights.masked_fill(~is_top, 0).sum(dim=-1, keepdim=True)
            shared_out = own[:, :, prefix:].masked_fill(~is_top, -torch.inf).softmax(dim=-1) * kept
            weights = torch.where(is_top, shared_out, weights)
        return torch.cat([own[:, :, :prefix].softmax(dim=-1), weights], dim=2)

    def extra_repr(self):
        return f"{super().extra_repr()}, cells={self.cells}, top={self.top}"
