"""Big Bird: each tile of pixels looks at the tiles around it, at a few drawn at random, and at global pixels.

Zaheer et al. 2020, Big Bird, https://arxiv.org/abs/2007.14062
    A_u = softmax over {v : tile(v) beside tile(u)} ∪ {v : tile(v) drawn for tile(u)} ∪ global of q_u · k_v d^-½
Cost: 2 N ((9 + drawn) tile² + 2 tokens) d
Tiles are ``tile`` × ``tile`` pixels; beside means the 3 × 3 tiles around; global are the first ``tokens`` positions in
raster order, which see all and are seen by all, and the prefix tokens of the host. For each head and each tile
``drawn`` tiles are drawn among those that are not beside it. The draw is a table of random numbers, made from ``seed``
and kept in the state dict, which serves grids of any size: number u picks the u-th share of the tiles to choose from.
With ``causal=True`` tiles are drawn among earlier ones, and all is cut to what comes before in raster order: past
pixels of later tiles, right of a pixel in the rows above it, are left to other layers but for those beside.
Blocks on a line of text become tiles. The paper's three parts are exact; every tile has nearly the same chance.
Deviations: the tiles to choose from are split into ``drawn`` runs with one drawn from each, so that none is drawn twice
(the code draws without replacement). The code's global blocks are the first and the last.

>>> from vision_attn import Grid
>>> print(Block(32, tile=2, drawn=2, tokens=3).pattern.by_head()[0].draw(Grid(9, 13), 3, 4))
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
from einops import rearrange
from torch import nn

from .. import check
from ..key_set import KeySet, Neighbours, Tiles, rows_and_columns
from ..mixer import PatternMixer, warn_of_blind_spot
from ..pattern import Directed, Global, Past, Pattern, PerHead

ROWS = 256  # tiles with draws of their own; larger grids use them again
BITS = 20  # of a random number


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

    def tiles(self, head: int, down: int, right: int, past: bool):
        """Tiles drawn for each of down × right tiles, (tiles, drawn); -1 where there is none left to draw."""
        count, device = down * right, self.table.device
        tile = torch.arange(count, device=device)
        y, x = rows_and_columns(tile, right)
        choice = ((y[:, None] - y).abs() > 1) | ((x[:, None] - x).abs() > 1)
        if past:
            choice = choice & (tile < tile[:, None])
        rank = choice.cumsum(dim=1)  # 1 for the first to choose from, …
        number = self.table[head].index_select(0, tile % ROWS)
        drawn = number.shape[1]
        ends = rank[:, -1:] * torch.arange(drawn + 1, device=device) // drawn  # of runs, (tiles, drawn + 1)
        length = ends[:, 1:] - ends[:, :-1]
        wanted = ends[:, :-1] + number * length // 2**BITS
        found = (rank[:, None] <= wanted[..., None]).sum(dim=-1)  # index of the first whose rank is above
        return found.masked_fill(length == 0, -1)


@dataclass(frozen=True)
class Beside(Pattern):
    """The 3 × 3 tiles around its own."""

    side: int

    def allowed(self, qy, qx, ky, kx, grid):
        return (abs(qy // self.side - ky // self.side) <= 1) & (abs(qx // self.side - kx // self.side) <= 1)

    def key_sets(self):
        return (TilesBeside((self.side, self.side), tile=self.side),)


@dataclass(frozen=True)
class Drawn(Directed):
    """The tiles drawn for its own, by one head."""

    side: int
    head: int
    draws: Draws = field(repr=False)

    @property
    def all(self) -> Tiles:
        return Tiles((self.side, self.side))

    def tiles(self, grid):
        n = self.all.sizes(*grid)
        return self.draws.tiles(self.head, n["y"], n["x"], self.past)

    def allowed(self, qy, qx, ky, kx, grid):
        right = self.all.sizes(*grid)["x"]
        own, other = (torch.as_tensor(y // self.side * right + x // self.side) for y, x in ((qy, qx), (ky, kx)))
        return (self.tiles(grid).to(own.device)[own] == other[..., None]).any(dim=-1)

    def key_sets(self):
        return (DrawnTiles(self),)


class TilesBeside(Neighbours):
    """Every position with the tiles around its own, whole."""

    def mask(self, grid, device):
        _, key = self.numbers(grid, device)
        return (key >= 0)[:, None]

    seen_from = KeySet.seen_from  # sampling keeps the whole past


@dataclass(frozen=True)
class DrawnTiles(KeySet):
    """Every position with the tiles drawn for its own."""

    pattern: Drawn

    def queries(self, x):
        return self.pattern.all.queries(x)

    def place(self, y, grid, fill=0.0):
        return self.pattern.all.place(y, grid, fill)

    def keys(self, x):
        tiles = self.queries(x)
        drawn = self.pattern.tiles(x.shape[1:3])
        found = tiles.index_select(1, drawn.flatten().clamp(min=0))
        return rearrange(found, "b (t n) p d -> b t (n p) d", n=drawn.shape[1])

    def mask(self, grid, device):
        _, key = self.numbers(grid, device)
        missing = (self.pattern.tiles(grid) < 0).repeat_interleave(self.pattern.side**2, dim=1)
        return ((key >= 0) & ~missing)[:, None]


class Block(PatternMixer):
    """Window of tiles, tiles drawn at random, and global positions.

    Args:
        tile: side of a tile in pixels.
        drawn: number of tiles drawn for each.
        tokens: number of positions that see all and are seen by all.
        seed: of the draw, which is made anew by `reset_parameters` of ``draws``.
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
        seed: int = 1,
        causal: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        for name, value in (("tile", tile), ("drawn", drawn), ("tokens", tokens), ("seed", seed)):
            check.positive_int(name, value)
        check.boolean("causal", causal)
        # the heads that the base counts have draws of their own, so the pattern comes after it
        super().__init__(Past() if causal else Global(tokens), dim, num_heads, device=device, dtype=dtype, **mixer)
        self.draws = Draws(self.num_heads, drawn, seed, device=device)
        by_head = tuple(Drawn(tile, head, self.draws, past=causal) for head in range(self.num_heads))
        pattern = PerHead(tuple(Beside(tile) | one | Global(tokens) for one in by_head))
        self.pattern = pattern & Past() if causal else pattern
        if not self.draws.table.is_meta:  # nothing is drawn there
            warn_of_blind_spot(self)
