"""Bi-level routing attention: each tile chooses a few tiles by their means, and its pixels look at all of their pixels.

Zhu et al. 2023, BiFormer, https://arxiv.org/abs/2303.08810
    I_r = the ``routes`` regions s of largest q̄_r · k̄_s
    A_u = softmax over {v : region(v) in I_region(u)} of q_u · k_v d^-½
Cost: 2 N routes tile² d
Computed: 1 ×
Regions are tiles of ``tile`` × ``tile`` pixels, cut off at the border. q̄ and k̄ are means over the pixels of a tile, of
all heads side by side: one choice serves all heads. It is made by numbers and has no gradient; what is learned of it is
learned through the attention that follows. Where there are no more tiles than ``routes`` all see all. Prefix tokens
see, and are seen by, all.
Deviations: the paper cuts any image into 7 × 7 regions, so that a pixel looks at more of a larger image, and at all of
it where it is small; tiles of a fixed size keep the cost of a pixel. Its code attends to the zeros that fill up the
last regions (one form of it) or has more regions than 7 (another); here nothing but pixels is seen or counted. The
scale is that of a head's width (the code: of all heads together). The depthwise convolution of the values beside the
attention, 5 × 5 in its models, is left to the host.

>>> from vision_attn import Grid
>>> block, grid = Block(2, tile=2, routes=2), Grid(4, 7)
>>> q, k = torch.zeros(2, 1, 1, grid.size, 2)
>>> q[..., 9, 0] = k[..., 27, 0] = k[..., 14, 0] = 1  # (1, 2) asks, (3, 6) and (2, 0) answer
>>> seen = block.weights(q, k, grid)[0, 0, 9].unflatten(0, grid) > 0
>>> print(*("".join("-#"[pixel] for pixel in row) for row in seen.tolist()), sep="\\n")
-------
-------
##----#
##----#
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .. import check
from ..engines.selection import rows
from ..engines.union import flash
from ..grid import Grid
from ..key_set import Tiles
from ..mixer import Mixer, softmax_over
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast
from ..traced import is_traced, least


class Block(Mixer):
    """Bi-level routing attention.

    Args:
        tile: side of a tile in pixels.
        routes: tiles that each tile chooses.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "a tile chooses by the means of all of its pixels"

    def __init__(self, dim, num_heads=None, *, tile: int = 8, routes: int = 4, **mixer):
        check.positive_int("tile", tile)
        check.positive_int("routes", routes)
        super().__init__(dim, num_heads, **mixer)
        self.side, self.routes, self.tiles = tile, routes, Tiles((tile, tile))

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Float[Tensor, "B heads tokens d"], grid: Grid
    ) -> Int[Tensor, "B tiles routes"]:
        """The tiles, numbered in raster order, that each tile chooses. In at least float32."""
        prefix, wide = grid.prefix_of(q.shape[2]), at_least_float32(q)
        pixels = (self.tiles.numbers(grid, q.device)[0] >= 0).sum(dim=1, keepdim=True)  # in each tile, (tiles, 1)
        of_queries, of_keys = (
            rearrange(
                self.folded(t[:, :, prefix:].to(wide), grid).sum(dim=2) / pixels, "(B n) t d -> B t (n d)", n=t.shape[1]
            )
            for t in (q, k)
        )
        with outside_autocast(q):
            near = of_queries @ of_keys.transpose(-2, -1)  # (B, tiles, tiles)
        return near.topk(least(self.routes, near.shape[2]), dim=-1).indices

    def folded(self, t: Float[Tensor, "B heads N d"], grid: Grid) -> Float[Tensor, "b tiles pixels d"]:
        """Positions by tile, those of the images and heads in a row, padded with zeros."""
        return self.tiles.queries(grid.maps(t))

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        heads, prefix, chosen = q.shape[1], grid.prefix_of(q.shape[2]), self.choose(q, k, grid)
        routes, pixels = chosen.shape[2], self.side**2
        of_heads = chosen[:, None].expand(-1, heads, -1, -1).flatten(0, 1).flatten(1)  # (b, tiles · routes)

        def keys(t):
            """Prefix tokens and the pixels of the chosen tiles, (b, tiles, keys, d)."""
            found = rows(self.folded(t[:, :, prefix:], grid).flatten(2), of_heads)
            found = rearrange(found, "(B n) (t r) (p d) -> B n t (r p) d", n=heads, r=routes, p=pixels)
            if prefix:
                first = t[:, :, None, :prefix].expand(-1, -1, found.shape[2], -1, -1)
                found = torch.cat([first, found], dim=3)
            return found.flatten(0, 1)

        mask = None
        if is_traced() or grid.height % self.side or grid.width % self.side:  # the border cuts tiles
            there = self.tiles.numbers(grid, q.device)[1] >= 0  # (tiles, pixels)
            mask = there.index_select(0, chosen.flatten()).reshape(*chosen.shape[:2], routes * pixels)
            mask = F.pad(mask, (prefix, 0), value=True)[:, None, :, None]
            mask = mask.expand(-1, heads, -1, pixels, -1).flatten(0, 1)
        options = dict(dropout_p=self.dropout, scale=self.scale)
        out = flash(self.folded(q[:, :, prefix:], grid), keys(k), keys(v), attn_mask=mask, **options)
        out = rearrange(self.tiles.place(out, grid), "(B n) H W d -> B n (H W) d", n=heads)
        return torch.cat([flash(q[:, :, :prefix], k, v, **options), out], dim=2)

    def weights(self, q, k, grid):
        (height, width), prefix = grid, grid.prefix_of(q.shape[2])
        y, x = torch.arange(height, device=q.device)[:, None], torch.arange(width, device=q.device)
        at = (y // self.side * -(-width // self.side) + x // self.side).flatten()  # the tile of each pixel
        chosen = self.choose(q, k, grid)[:, at]  # (B, N, routes)
        seen = (chosen[:, :, None] == at[:, None]).any(dim=-1)  # (B, N, N)
        return softmax_over(F.pad(seen, (prefix, 0, prefix, 0), value=True)[:, None], q, k, self.scale)

    def extra_repr(self):
        return f"{super().extra_repr()}, tile={self.side}, routes={self.routes}"
