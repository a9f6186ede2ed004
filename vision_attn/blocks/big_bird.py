"""Big Bird: each tile of pixels looks at the tiles around it, at a few drawn at random, and at global pixels.

Zaheer et al. 2020, Big Bird, https://arxiv.org/abs/2007.14062
    A_u = softmax over {v : tile(v) beside tile(u)} ∪ {v : tile(v) drawn for tile(u)} ∪ global of q_u · k_v d^-½
Cost: 2 N ((9 + drawn) tile² + 2 tokens) d
Computed: 1 ×
Tiles are ``tile`` × ``tile`` pixels; beside means the 3 × 3 tiles around; global are the first ``tokens`` positions in
raster order, which see all and are seen by all, and the prefix tokens of the host. For each head and each tile
``drawn`` tiles are drawn among those that are not beside it. The draw is a table of random numbers, made from ``seed``
and kept in the state dict, which serves grids of any size: number u picks the u-th share of the tiles to choose from.
It has rows for 256 tiles; larger grids use them again, each time moved on, so that other tiles are picked.
With ``causal=True`` tiles are drawn among earlier ones, and all is cut to what comes before in raster order: past
pixels of later tiles, right of a pixel in the rows above it, are left to other layers but for those beside.
Blocks on a line of text become tiles. The paper's three parts are exact; every tile has nearly the same chance.
Deviations: the tiles to choose from are split into ``drawn`` runs with one drawn from each, so that none is drawn twice
(the code draws without replacement), global positions not excepted. At the paper's lengths the code draws among the
first 1,024 positions alone. Its global blocks are the first and the last.

>>> from vision_attn import Grid
>>> print(Block(32, tile=2, drawn=2, tokens=3, seed=1).pattern.by_head()[0].draw(Grid(9, 13), 3, 4))
########-----
--######-----
--######-----
--##@###-----
--######-----
--######-----
##-----------
##-----------
##-----------
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from .. import check
from ..engines.flash import hiding
from ..engines.route import is_small, note, takes_dense
from ..engines.union import flash
from ..grid import Grid
from ..key_set import Everything, Only, Tiles, rows_and_columns
from ..mixer import PatternMixer, warn_of_blind_spot
from ..pattern import Directed, Global, Past, PerHead
from ..precision import in_float32_where_slow
from ..traced import least

ROWS = 256  # tiles with draws of their own
BITS = 20  # of a random number
MOVED = 648_055  # of 2^20, the golden ratio: numbers used again, moved by it once more each time, spread evenly


class Draws(nn.Module):
    """Random numbers for each head, tile and draw, as integers, which no change of type rounds."""

    def __init__(self, heads: int, drawn: int, seed: int, device=None):
        super().__init__()
        self.seed = seed
        self.register_buffer("table", torch.empty(heads, ROWS, drawn, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the table from the seed."""
        rng = torch.Generator().manual_seed(self.seed)
        self.table.copy_(torch.randint(2**BITS, self.table.shape, generator=rng))

    def tiles(self, down: int, right: int, past: bool) -> Int[Tensor, "heads tiles drawn"]:
        """Tiles drawn for each of down × right tiles; -1 where there is none left to draw."""
        drawn, device = self.table.shape[2], self.table.device
        tile = torch.arange(down * right, device=device)
        y, x = rows_and_columns(tile, right)
        runs = []  # of tiles not to be drawn, first tile and length, in raster order
        for row in (y - 1, y) if past else (y - 1, y, y + 1):
            first, last = (x - 1).clamp(min=0), (x + 1).clamp(max=right - 1)
            here = row * right + first, (last - first + 1) * ((row >= 0) & (row < down))
            runs.append((here[0], torch.minimum(here[1], tile - here[0])) if past else here)
        choice = (tile if past else down * right) - sum(length for _, length in runs)
        ends = choice[:, None] * torch.arange(drawn + 1, device=device) // drawn  # of shares, (tiles, drawn + 1)
        length = ends[:, 1:] - ends[:, :-1]
        numbers = (self.table.index_select(1, tile % ROWS) + (tile // ROWS * MOVED)[:, None]) % 2**BITS
        found = ends[:, :-1] + numbers * length // 2**BITS  # number among the choice
        for first, skipped in runs:
            found = found + skipped[:, None] * (found >= first[:, None])
        return found.masked_fill(length == 0, -1)


@dataclass(frozen=True)
class NearAndDrawn(Directed):
    """The 3 × 3 tiles around its own, and those drawn for it by one head."""

    side: int
    head: int
    draws: Draws = field(repr=False)

    def allowed(self, qy, qx, ky, kx, grid):
        qy, qx, ky, kx = (torch.as_tensor(place) // self.side for place in (qy, qx, ky, kx))
        sizes = Tiles((self.side, self.side)).sizes(*grid)
        drawn = self.draws.tiles(sizes["y"], sizes["x"], self.past)[self.head].to(ky.device)
        near = ((qy - ky).abs() <= 1) & ((qx - kx).abs() <= 1)
        return near | (drawn[qy * sizes["x"] + qx] == (ky * sizes["x"] + kx)[..., None]).any(dim=-1)

    def key_sets(self):
        return (Only(Everything(), self),)  # for sampling, which keeps the whole past; `mix` gathers tiles instead


class Block(PatternMixer):
    """Window of tiles, tiles drawn at random, and global positions.

    Args:
        tile: side of a tile in pixels.
        drawn: number of tiles drawn for each.
        tokens: number of positions that see all and are seen by all.
        seed: ≥ 1, of the draw, which is made anew by `reset_parameters` of ``draws``. None: torch's generator gives
            one, so that layers differ.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        tile: int = 4,
        drawn: int = 3,
        tokens: int = 8,
        seed: int | None = None,
        causal: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        seed = int(torch.randint(1, 2**31, (), device="cpu")) if seed is None else seed
        for name, value in (("tile", tile), ("drawn", drawn), ("tokens", tokens), ("seed", seed)):
            check.positive_int(name, value)
        check.boolean("causal", causal)
        # the heads that the base counts have draws of their own, so the pattern comes after it
        super().__init__(Past() if causal else Global(tokens), dim, num_heads, device=device, dtype=dtype, **mixer)
        self.side, self.tokens = tile, tokens
        self.draws = Draws(self.num_heads, drawn, seed, device=device)
        by_head = (NearAndDrawn(tile, head, self.draws, past=causal) for head in range(self.num_heads))
        pattern = PerHead(tuple(one | Global(tokens) for one in by_head))
        self.pattern = pattern & Past() if causal else pattern
        if not self.draws.table.is_meta:  # nothing is drawn there
            warn_of_blind_spot(self)

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        if takes_dense(is_small(grid, q.device, 28)):
            return self.mix_by_mask(q, k, v, grid)
        heads, prefix, fold = q.shape[1], grid.prefix_of(q.shape[2]), Tiles((self.side, self.side))
        first = prefix + least(self.tokens, grid.size)  # tokens that all see
        seen, place = self.seen(grid), fold.numbers(grid, q.device)[0]  # (heads, tiles, m), (tiles, side²)
        count = place.shape[0]

        def tiles(t):  # (B, heads · tiles, side², d)
            maps = grid.maps(t[:, :, prefix:])
            return rearrange(fold.queries(maps), "(B n) t p d -> B (n t) p d", n=heads)

        def keys(t):  # (B, heads · tiles, first + m · side², d)
            index = seen.clamp(min=0) + count * torch.arange(heads, device=q.device)[:, None, None]
            found = rearrange(
                tiles(t).index_select(1, index.flatten()), "B (n t m) p d -> B (n t) (m p) d", n=heads, t=count
            )
            start = t[:, :, None, :first].expand(-1, -1, count, -1, -1).flatten(1, 2)
            return torch.cat([start, found], dim=2)

        key = place[seen.clamp(min=0)].masked_fill((seen < 0)[..., None], -1).flatten(2)[:, :, None]
        mask = key >= first - prefix  # what all see is not seen twice; padding is -1
        if self.causal:
            query = place.masked_fill(place < 0, grid.size)[..., None]  # padding may see all
            mask = mask & (key <= query)
            start = torch.arange(-prefix, first - prefix, device=q.device) <= query
        else:
            start = torch.ones(count, 1, first, dtype=torch.bool, device=q.device)
        mask = torch.cat([start.expand(heads, -1, -1, -1), mask], dim=3).flatten(0, 1)
        mask = mask[None].expand(-1, -1, place.shape[1], -1)  # ONNX wants a row for each query
        options = dict(dropout_p=self.dropout, scale=self.scale)
        out = flash(tiles(q), keys(k), keys(v), attn_mask=mask, **options)
        out = fold.place(rearrange(out, "B (n t) p d -> (B n) t p d", n=heads), grid)
        out = rearrange(out, "(B n) H W d -> B n (H W) d", n=heads)
        if self.causal:
            start = flash(*(t[:, :, :prefix] for t in (q, k, v)), **options)
            return torch.cat([start, out], dim=2)
        start = flash(q[:, :, :first], k, v, **options)
        return torch.cat([start, out.narrow(2, first - prefix, grid.size - first + prefix)], dim=2)

    def mix_by_mask(self, q, k, v, grid):
        """The same for small grids: one call with the whole mask of each head."""
        note("dense")
        (height, width), prefix, seen = grid, grid.prefix_of(q.shape[2]), self.seen(grid)
        y, x, place = (torch.arange(n, device=q.device) for n in (height, width, grid.size))
        tile = (y[:, None] // self.side * -(-width // self.side) + x // self.side).flatten()  # of each pixel
        count = seen.shape[1]
        tiles = torch.zeros(*seen.shape[:2], count + 1, dtype=torch.bool, device=q.device)
        tiles = tiles.scatter(2, seen.masked_fill(seen < 0, count), True)  # (heads, tiles, tiles)
        mask = tiles.index_select(2, tile).index_select(1, tile) | (place < self.tokens)  # whole rows last
        mask = mask & (place <= place[:, None]) if self.causal else mask | (place < self.tokens)[:, None]
        mask = F.pad(mask, (0, 0, prefix, 0), value=not self.causal)
        mask = hiding(F.pad(mask, (prefix, 0), value=True), v.dtype)
        return flash(q, k, v, attn_mask=mask, dropout_p=self.dropout, scale=self.scale)

    def seen(self, grid: Grid) -> Int[Tensor, "heads tiles m"]:
        """The tiles that each tile sees, near ones and drawn ones; -1: there is none."""
        sizes = Tiles((self.side, self.side)).sizes(*grid)
        down, right, device = sizes["y"], sizes["x"], self.draws.table.device
        y, x = rows_and_columns(torch.arange(down * right, device=device), right)
        dy, dx = rows_and_columns(torch.arange(6 if self.causal else 9, device=device), 3)
        y, x = y[:, None] + dy - 1, x[:, None] + dx - 1
        near = (y * right + x).masked_fill((y < 0) | (y >= down) | (x < 0) | (x >= right), -1)
        return torch.cat([near.expand(self.num_heads, -1, -1), self.draws.tiles(down, right, self.causal)], dim=2)
