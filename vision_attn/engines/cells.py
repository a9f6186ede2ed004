"""Means of square cells of the grid, and the key sets that pair pixels with them.

A cell's key and value are the means of its pixels' keys and values. With ``past`` a cell counts only once all its
pixels are past.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..grid import Grid
from ..key_set import Everything, Gathered, KeySet, Tiles, crossed, pad, rows_and_columns
from ..precision import at_least_float32
from ..traced import is_traced

TILE = Tiles((8, 8))  # of queries that share their keys


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
    cells = rearrange(cells, "b (y p) (x q) d -> b y p x q d", p=p, q=q)  # a view
    return cells.sum(dim=2, dtype=at_least_float32(x)).sum(dim=3)


def count(length, side: int):
    """Cells along an axis. Traced: one more, empty, for a graph holds a single one to be a case of its own."""
    return length if side == 1 else (length + side - 1) // side + int(torch.compiler.is_compiling())


@dataclass(frozen=True)
class Cells(Gathered):
    """Every position with the means of cells around its own: at most ``radius`` cells of ``side`` pixels away."""

    side: int
    radius: int
    past: bool = False

    @property
    def across(self) -> int:
        """Cells down (and right) that a tile of queries sees between them."""
        return (TILE.tile[0] + self.side - 2) // self.side + 1 + 2 * self.radius

    def axes(self, grid, device) -> list[tuple[Tensor, Tensor]]:
        """Down and right: for each tile its queries (tiles, 8, 1) and the cells that they see (tiles, 1, across).

        Some of them are beyond the border. Tiles are one axis, so that a graph traced for any size asks for no two.
        """
        n = TILE.sizes(*grid)
        number = torch.arange(n["y"] * n["x"], device=device).view(-1, 1, 1)
        found = []
        for place, size in zip(rows_and_columns(number, n["x"]), TILE.tile):
            first = place * size
            cells = first // self.side - self.radius + torch.arange(self.across, device=device)
            found.append((first + torch.arange(size, device=device).view(-1, 1), cells))
        return found

    def queries(self, x):
        return TILE.queries(x)

    def place(self, y, grid, fill=0.0):
        return TILE.place(y, grid, fill)

    def keys(self, x):
        at, _ = self.kept_tables(Grid(*x.shape[1:3]), x.device)
        return self.gathered(means(x, self.side), at)

    def sees(self, queries: Sequence[Tensor], cells: Sequence[Tensor]):
        """Which cells are seen, but for the border: (tiles, query row, query column, cell row, cell column)."""
        down, right = ((q // self.side - c).abs() <= self.radius for q, c in zip(queries, cells))
        return down & right

    def tables(self, grid, device):
        (qy, cy), (qx, cx) = self.axes(grid, device)
        down, right = (count(n, self.side) for n in grid)
        rows, columns = crossed(cy.clamp(min=0).clamp(max=down - 1), cx.clamp(min=0).clamp(max=right - 1))
        (qy, qx), (cy, cx) = crossed(qy, qx), crossed(cy, cx)
        seen = self.sees([qy, qx], [cy, cx]) & self.there(qy, qx, cy, cx, grid)
        at = rearrange(rows * right + columns, "t 1 1 cy cx -> t (cy cx)")
        return at, rearrange(seen, "t p q cy cx -> t (p q) (cy cx)")

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

    ready = KeySet.ready  # no index

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
