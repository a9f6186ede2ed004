"""Sinkhorn attention: each tile looks at itself and at a mixture of all tiles, sorted to it by what they hold.

Tay et al. 2020, Sparse Sinkhorn Attention, https://arxiv.org/abs/2002.11296
    R = rows and columns of exp(q̄_u · k̄_v d^-½ / temperature) scaled to sum to 1, in turn      q̄_u, k̄_v: means of tiles
    K̃_u = Σ_v R_uv K_v, place by place      A_i = softmax over the keys of i's own tile u and over K̃_u
    SortCut: all tiles look at the first ``cut`` of K̃ instead of each at its own
Cost: 4 N tile² d + 2 N² / tile² d
Computed: 1 ×
Values are mixed as keys are, so a weight for a place of K̃_u is shared out among the pixels in that place of the tiles.
In two dimensions blocks are tiles of ``tile`` × ``tile`` pixels. A tile that the border cuts has its means where it
lacks pixels; places that no tile has are left out. The last scaling is of rows, so that they sum to 1.
With ``causal=True`` blocks are runs of tile² pixels in raster order, as a tile's pixels are not all past at once. A run
mixes those before it, by a softmax over v < u with q̄_u the mean of all queries up to the first of run u; the first
looks at itself alone. Later pixels change no bit of what earlier ones get.
Prefix tokens see all and are seen by all.
Nothing is chosen, only mixed: there is no table of integers that the definition and the fast path share.
Deviations: the code's default sorts by a learned net of its own or by repeated picking of the largest product, and adds
Gumbel noise, also in eval; there is none here, and no parameter. Its values are the sorted keys, by mistake.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .. import check
from ..check import Count
from ..engines.union import flash
from ..key_set import Tiles
from ..mixer import Mixer
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast
from ..traced import fixed, is_traced, least


class Block(Mixer):
    """Sinkhorn attention.

    Args:
        tile: side of a tile in pixels.
        iterations: scalings of columns and rows.
        temperature: divides the scores of tiles.
        cut: sorted tiles that all look at (SortCut); 0: each at its own.
        causal: only what comes before in raster order, and itself; ``cut`` must be 0.
        Others: those of `Mixer`, but ``attn_drop``, as a place of a sorted tile is a mixture of pixels.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "sorted keys are mixtures of keys at many places"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        tile: int = 8,
        iterations: int = 7,
        temperature: float = 0.75,
        cut: Count = 0,
        causal: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("tile", tile)
        check.positive_int("iterations", iterations)
        check.positive("temperature", temperature)
        check.count("cut", cut)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        if causal and cut:
            raise ValueError(f"cut={cut!r}: must be 0 with causal=True: the first sorted tiles hold later pixels")
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.tile, self.iterations, self.temperature, self.cut = tile, iterations, temperature, cut
        self.causal = causal

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        prefix = grid.prefix_of(q.shape[2])
        before = [t[:, :, :prefix].flatten(0, 1)[:, None] for t in (k, v)]
        here = [t[:, :, prefix:].flatten(0, 1) for t in (q, k, v)]
        out = (self.runs if self.causal else self.tiles)(*here, before, grid)
        out = out.reshape(q.shape[0], q.shape[1], grid.size, v.shape[3])
        if prefix == 0:
            return out
        k, v = (t[:, :, :prefix] if self.causal else t for t in (k, v))
        return torch.cat([flash(q[:, :, :prefix], k, v, scale=self.scale), out], dim=2)

    def tiles(self, q, k, v, before, grid):
        """What positions (b, N, d) get of their tile and of a sorted one, or of the first sorted ones."""
        fold = Tiles((self.tile, self.tile))
        q, k, v = (fold.queries(rearrange(t, "b (H W) d -> b H W d", H=grid.height, W=grid.width)) for t in (q, k, v))
        whole = not is_traced() and grid.height % self.tile == 0 and grid.width % self.tile == 0
        there = None if whole else fold.numbers(grid, q.device)[0] >= 0  # (tiles, places)
        with outside_autocast(v):
            order = self.order(*(self.means(t, there) for t in (q, k)))
            if self.cut:
                order = order.narrow(1, 0, least(self.cut, order.shape[1]))
            k_sorted, v_sorted = (self.mixed(order, self.filled(t, there)).to(v.dtype) for t in (k, v))
        if self.cut:
            k_sorted, v_sorted = (t.flatten(1, 2)[:, None].expand(-1, q.shape[1], -1, -1) for t in (k_sorted, v_sorted))
        mask = None
        if there is not None:  # places that no tile has, the first tile has not
            sorted_there = there[:1].expand(order.shape[1], -1)
            sorted_there = sorted_there.flatten()[None].expand(q.shape[1], -1) if self.cut else sorted_there
            mask = torch.cat([there, sorted_there], dim=1)[:, None].expand(-1, q.shape[2], -1)
        out = self.attend(q, [k, k_sorted], [v, v_sorted], before, mask)
        return fold.place(out, grid).flatten(1, 2)

    def means(self, t, there):
        """Of tiles (b, tiles, places, d), over the places that are ``there``; None: all are."""
        total = t.sum(dim=2, dtype=at_least_float32(t))
        return total / (t.shape[2] if there is None else there.sum(dim=1)[:, None].to(total.dtype))

    def filled(self, t, there):
        """Tiles with their means where they lack places."""
        if there is not None:
            t = torch.where(there[..., None], t.to(at_least_float32(t)), self.means(t, there)[:, :, None])
        return t

    def order(self, q: Tensor, k: Tensor) -> Tensor:
        """R of the means of tiles (b, tiles, d)."""
        scores = (self.scale / self.temperature) * q @ k.transpose(-2, -1)
        for _ in range(self.iterations):
            scores = scores.log_softmax(dim=1).log_softmax(dim=2)
        return scores.exp()

    def mixed(self, order, t):
        """Tiles (b, tiles, places, d) mixed to sorted ones."""
        return (order @ t.to(order.dtype).flatten(2)).unflatten(2, t.shape[2:])

    def runs(self, q, k, v, before, grid):
        """The causal form: what positions (b, N, d) get of their run and of the mixture of earlier ones."""
        length, wide, n = self.tile**2, at_least_float32(v), grid.size
        count = (n + length - 1) // length
        q, k, v = (
            F.pad(t, (0, 0, 0, count * length - n)).reshape(t.shape[0], count, length, t.shape[2]) for t in (q, k, v)
        )
        run, place = torch.arange(count, device=q.device), torch.arange(length, device=q.device)
        past = run < run[:, None]
        with outside_autocast(v):
            earlier = F.pad(q.sum(dim=2, dtype=wide).cumsum(dim=1), (0, 0, 1, 0)).narrow(1, 0, count)
            known = (earlier + q[:, :, 0]) / (run * length + 1)[:, None].to(wide)
            mean = k.sum(dim=2, dtype=wide) / length
            scores = (self.scale / self.temperature) * known @ mean.transpose(-2, -1)
            order = scores.masked_fill(~past, torch.finfo(wide).min).softmax(dim=-1) * past.to(wide)
            k_sorted, v_sorted = (self.mixed(order, t).to(v.dtype) for t in (k, v))
        own = (place <= place[:, None]).expand(count, -1, -1)
        mask = torch.cat([own, (run > 0)[:, None, None].expand_as(own)], dim=2)
        out = self.attend(q, [k, k_sorted], [v, v_sorted], before, mask)
        return out.flatten(1, 2).narrow(1, 0, n)

    def attend(self, q, keys, values, before, mask):
        """Attention of blocks to ``before`` and their ``keys`` as ``mask`` (blocks, places, keys) says; None: all."""
        blocks, prefix = q.shape[1], fixed(before[0].shape[2])
        if prefix:
            keys, values = ([t.expand(-1, blocks, -1, -1), *parts] for t, parts in zip(before, (keys, values)))
            mask = mask if mask is None else F.pad(mask, (prefix, 0), value=True)
        mask = mask if mask is None else mask[None].expand(q.shape[0], -1, -1, -1)
        return flash(q, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask, scale=self.scale)

    def weights(self, q, k, grid):
        prefix, width = grid.prefix_of(q.shape[2]), grid.width
        index = torch.arange(grid.size, device=q.device)
        y, x = index // width, index % width
        if self.causal:
            block, place = index // self.tile**2, index % self.tile**2
            order = self.order_of_runs(q[:, :, prefix:], k[:, :, prefix:])
        else:
            down, right = ((n + self.tile - 1) // self.tile for n in grid)
            block = y // self.tile * right + x // self.tile
            place = y % self.tile * self.tile + x % self.tile
            order = self.order_of_tiles(q[:, :, prefix:], k[:, :, prefix:], block, down * right)
        # how much of each position (last) is in each place of each sorted block
        is_in = (block == torch.arange(order.shape[3], device=q.device)[:, None]).to(q.dtype)  # (blocks, N)
        is_at = (place == torch.arange(self.tile**2, device=q.device)[:, None]).to(q.dtype)  # (places, N)
        held = torch.einsum("vj,pj->vpj", is_in, is_at)
        lacking = held.sum(dim=2, keepdim=True) == 0
        held = torch.where(lacking, (is_in / is_in.sum(dim=1, keepdim=True))[:, None], held)
        share = torch.einsum("bnuv,vpj->bnupj", order, held)
        seen_by_none = lacking[0, :, 0] if not self.causal else torch.zeros_like(lacking[0, :, 0])
        if self.cut:
            share = share[:, :, : self.cut].flatten(2, 3)[:, :, None].expand(-1, -1, grid.size, -1, -1)
            hidden = seen_by_none.repeat(min(self.cut, order.shape[2])).expand(grid.size, -1)
        else:
            share = share[:, :, block]  # (B, heads, N, places, N)
            hidden = seen_by_none | (self.causal & (block == 0))[:, None]
        same = block == block[:, None]
        same = same.tril() if self.causal else same
        own = self.scale * torch.einsum("bnid,bnjd->bnij", q, k)
        sorted_keys = torch.einsum("bnipj,bnjd->bnipd", share, k[:, :, prefix:])
        others = self.scale * torch.einsum("bnid,bnipd->bnip", q[:, :, prefix:], sorted_keys)
        scores = torch.cat(
            [
                own[:, :, prefix:, :prefix],
                own[:, :, prefix:, prefix:].masked_fill(~same, -torch.inf),
                others.masked_fill(hidden, -torch.inf),
            ],
            dim=-1,
        )
        of_prefix, of_own, of_others = scores.softmax(dim=-1).split([prefix, grid.size, others.shape[-1]], dim=-1)
        weights = torch.cat([of_prefix, of_own + torch.einsum("bnip,bnipj->bnij", of_others, share)], dim=-1)
        first = own[:, :, :prefix]
        if self.causal:
            later = torch.arange(own.shape[3], device=q.device) >= prefix
            first = first.masked_fill(later, -torch.inf)
        return torch.cat([first.softmax(dim=-1), weights], dim=2)

    def order_of_tiles(self, q, k, tile, count):
        """R in plain sums, (B, heads, tiles, tiles)."""
        of = (tile == torch.arange(count, device=q.device)[:, None]).to(q.dtype)
        mean = of / of.sum(dim=1, keepdim=True)
        scores = torch.einsum("ui,bnid,vj,bnjd->bnuv", mean, q, mean, k) * self.scale / self.temperature
        for axis in (2, 3) * self.iterations:
            scores = scores - scores.logsumexp(dim=axis, keepdim=True)
        return scores.exp()

    def order_of_runs(self, q, k):
        """R of the causal form, run by run, (B, heads, runs, runs)."""
        length = self.tile**2
        means = [run.mean(dim=2) for run in k.split(length, dim=2)]
        rows = []
        for u in range(len(means)):
            known = q[:, :, : u * length + 1].mean(dim=2)
            scores = [(known * mean).sum(dim=-1) * self.scale / self.temperature for mean in means[:u]]
            shares = [torch.stack(scores, dim=-1).softmax(dim=-1)] if u else []
            rows.append(torch.cat([*shares, q.new_zeros(*q.shape[:2], len(means) - u)], dim=-1))
        return torch.stack(rows, dim=2)

    def extra_repr(self):
        return f"{super().extra_repr()}, tile={self.tile}, cut={self.cut}"
