"""Attention to the means of square cells: fine near, coarse far.

A `Pyramid` says which cells of which side a pixel sees; a cell's key and value are the means of its pixels' keys and
values, and one softmax goes over all cells seen. With ``past`` a cell counts only once all its pixels are past.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .key_set import Everything, KeySet, Tiles, pad, rows_and_columns
from .mixer import Mixer, warn_of_blind_spot
from .pattern import Directed, complete
from .precision import at_least_float32
from .traced import is_traced
from .union import attend

TILE = Tiles((8, 8))  # of queries that share their keys


@dataclass(frozen=True)
class Pyramid(Directed):
    """Which cells a pixel sees. Subclasses state ``sides``, ``seen`` and ``key_sets``."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of a cell at each level, in pixels, fine to coarse."""
        raise NotImplementedError

    def seen(self, level: int, qy, qx, ky, kx, grid: Grid):
        """Whether the query at (qy, qx) sees the cell of a level that the pixel (ky, kx) is in."""
        raise NotImplementedError

    def allowed(self, qy, qx, ky, kx, grid):
        levels = range(len(self.sides))
        return reduce(lambda a, b: a | b, (self.seen(level, qy, qx, ky, kx, grid) for level in levels))

    def complete(self, side: int, qy, qx, ky, kx, grid: Grid):
        """Whether the cell with (ky, kx) in it has no pixel behind (qy, qx); where nothing is asked: always."""
        return complete((side, side), qy, qx, ky, kx, grid) | (not self.past)


class PyramidMixer(Mixer):
    """Softmax attention over the cells that a `Pyramid` shows. Arguments: the pyramid, and those of `Mixer`."""

    def __init__(self, pattern: Pyramid, dim: int, num_heads: int | None = None, **mixer):
        super().__init__(dim, num_heads, **mixer)
        self.pattern = pattern
        warn_of_blind_spot(self)

    @property
    def causal(self):
        return self.pattern.causal

    def mix(self, q, k, v, grid):
        return attend(q, k, v, grid, self.pattern, scale=self.scale, dropout=self.dropout)

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(n, device=q.device) for n in grid), indexing="ij"))
        places = y[:, None], x[:, None], y[None], x[None]
        first = torch.ones(grid.size, prefix, dtype=torch.bool, device=q.device)
        scores, seen = [q[:, :, prefix:] @ k[:, :, :prefix].mT], [first]
        for level, side in enumerate(self.pattern.sides):
            together = (y[:, None] // side == y // side) & (x[:, None] // side == x // side)
            size = together.sum(dim=0)
            means = together.to(k.dtype) @ k[:, :, prefix:] / size[:, None]  # of the cell of each pixel
            # a cell stands in a row once for each of its pixels, so each has its share
            scores.append(q[:, :, prefix:] @ means.mT - size.to(k.dtype).log() / self.scale)
            seen.append(self.pattern.seen(level, *places, grid).expand(grid.size, grid.size))
        scores = (torch.cat(scores, dim=-1) * self.scale).masked_fill(~torch.cat(seen, dim=-1), -torch.inf)
        to_prefix, *to_cells = scores.softmax(dim=-1).split([prefix, *[grid.size] * len(self.pattern.sides)], dim=-1)
        rest = torch.cat([to_prefix, sum(to_cells)], dim=-1)
        hidden = torch.zeros(prefix, q.shape[2], dtype=torch.bool, device=q.device)
        hidden[:, prefix:] = self.causal
        of_prefix = (q[:, :, :prefix] @ k.mT * self.scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.cat([of_prefix, rest], dim=2)


def means(x: Float[Tensor, "b H W d"], side: int) -> Float[Tensor, "b h w d"]:
    """Means of the cells of a grid, those cut by the border included."""
    if side == 1:
        return x
    pixels = sums(torch.ones_like(x[:1, :, :, :1]), side).clamp(min=1)
    return (sums(x, side) / pixels).to(x.dtype)


def sums(x, side):
    """Sums over the cells of a map (b, H, W, d), in at least float32."""
    height, width = x.shape[1:3]
    down, right = count(height, side), count(width, side)
    if is_traced():
        p = q = side
    else:  # a cell larger than the image is the image
        p, q = min(side, height), min(side, width)
    cells = pad(x, 0, 0, 0, right * q - width, 0, down * p - height)
    cells = rearrange(cells, "b (y p) (x q) d -> b y x (p q) d", p=p, q=q)
    return cells.sum(dim=3, dtype=at_least_float32(x))


def count(length, side: int):
    """Cells along an axis. Traced: one more, empty, for a graph holds a single one to be a case of its own."""
    return (length + side - 1) // side + int(torch.compiler.is_compiling())


@dataclass(frozen=True)
class Cells(KeySet):
    """Every position with the means of cells around its own: at most ``radius`` cells of ``side`` pixels away."""

    side: int
    radius: int
    past: bool = False

    @property
    def across(self) -> int:
        """Cells down (and right) that a tile of queries sees between them."""
        return (TILE.tile[0] + self.side - 2) // self.side + 1 + 2 * self.radius

    def axes(self, grid, device) -> list[tuple[Tensor, Tensor]]:
        """Down and right: for each tile its queries (tiles, 8) and the cells that they see (tiles, across).

        Some of them are beyond the border. Tiles are one axis, so that a graph traced for any size asks for no two.
        """
        n = TILE.sizes(*grid)
        number = torch.arange(n["y"] * n["x"], device=device)
        found = []
        for place, size in zip(rows_and_columns(number, n["x"]), TILE.tile):
            first = place[:, None] * size
            query = first + torch.arange(size, device=device)
            found.append((query, first // self.side - self.radius + torch.arange(self.across, device=device)))
        return found

    def queries(self, x):
        return TILE.queries(x)

    def place(self, y, grid, fill=0.0):
        return TILE.place(y, grid, fill)

    def keys(self, x):
        cells = means(x, self.side)
        (_, rows), (_, columns) = self.axes(x.shape[1:3], x.device)
        rows, columns = (t.clamp(min=0).clamp(max=n - 1) for t, n in zip((rows, columns), cells.shape[1:3]))
        at = rows[:, :, None] * cells.shape[2] + columns[:, None]  # (tiles, across, across)
        found = cells.flatten(1, 2).index_select(1, at.flatten())
        return rearrange(found, "b (t n) d -> b t n d", n=self.across**2)

    def sees(self, queries: Sequence[Tensor], cells: Sequence[Tensor]):
        """Which cells are seen, but for the border: (tiles, query row, query column, cell row, cell column)."""
        down, right = ((q // self.side - c).abs() <= self.radius for q, c in zip(queries, cells))
        return down & right

    def mask(self, grid, device):
        (qy, cy), (qx, cx) = self.axes(grid, device)
        qy, qx = qy[:, :, None, None, None], qx[:, None, :, None, None]
        cy, cx = cy[:, None, None, :, None], cx[:, None, None, None, :]
        seen = self.sees([qy, qx], [cy, cx])
        return (seen & self.there(qy, qx, cy, cx, grid)).flatten(3).flatten(1, 2)

    def there(self, qy, qx, cy, cx, grid):
        """Whether a cell is on the grid and, with ``past``, without a pixel behind the query."""
        inside = (cy >= 0) & (cy * self.side < grid.height) & (cx >= 0) & (cx * self.side < grid.width)
        if not self.past:
            return inside
        bottom, right = (((c + 1) * self.side).clamp(max=n) - 1 for c, n in zip((cy, cx), grid))
        return inside & ((bottom < qy) | ((bottom == qy) & (right <= qx)))


@dataclass(frozen=True)
class AllCells(Cells):
    """Every position with the means of all cells of ``side`` pixels, as far as ``sees`` says."""

    def queries(self, x):
        return Everything().queries(x)

    def keys(self, x):
        return Everything().queries(means(x, self.side))

    def place(self, y, grid, fill=0.0):
        return Everything().place(y, grid)

    def mask(self, grid, device):
        down, right = (count(n, self.side) for n in grid)
        query, cell = torch.arange(grid.size, device=device)[:, None], torch.arange(down * right, device=device)
        places = *rows_and_columns(query, grid.width), *rows_and_columns(cell, right)
        return (self.sees(places[:2], places[2:]) & self.there(*places, grid))[None]
