"""Attention to the means of square cells: fine near, coarse far.

A `Pyramid` says which cells of which side a pixel sees; a cell's key and value are the means of its pixels' keys and
values, and one softmax goes over all cells seen. With ``past`` a cell counts only once all its pixels are past.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .key_set import Everything, KeySet, Tiles, pad
from .mixer import Mixer, warn_of_blind_spot
from .pattern import Directed
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
        bottom, right = ky // side * side + side - 1, kx // side * side + side - 1  # perhaps beyond the border
        in_last_row = (bottom == qy) | ((bottom > qy) & (qy == grid.height - 1))
        return (bottom < qy) | (in_last_row & ((right <= qx) | (qx == grid.width - 1))) | (not self.past)


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
    height, width = x.shape[1:3]
    if side == 1:
        return x
    sides = [torch.sym_min(side, n) for n in (height, width)]  # a cell as large as the image is the image
    counts = [(n + p - 1) // p for n, p in zip((height, width), sides)]
    x = pad(x, 0, 0, 0, counts[1] * sides[1] - width, 0, counts[0] * sides[0] - height)
    cells = x.unflatten(2, (counts[1], sides[1])).unflatten(1, (counts[0], sides[0]))  # (b, h, side, w, side, d)
    total = cells.sum(dim=(2, 4), dtype=torch.promote_types(x.dtype, torch.float32))
    down, right = (
        (n - p * torch.arange(count, device=x.device)).clamp(max=p)
        for n, p, count in zip((height, width), sides, counts)
    )
    return (total / (down[:, None] * right)[..., None]).to(x.dtype)


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

    def cells(self, tiles: int, device) -> Tensor:
        """Along one axis, the cells that each tile of queries sees, (tiles, across); some are beyond the border."""
        first = torch.arange(tiles, device=device) * TILE.tile[0] // self.side - self.radius
        return first[:, None] + torch.arange(self.across, device=device)

    def queries(self, x):
        return TILE.queries(x)

    def place(self, y, grid, fill=0.0):
        return TILE.place(y, grid, fill)

    def keys(self, x):
        n, cells = TILE.sizes(*x.shape[1:3]), means(x, self.side)
        for axis, tiles in ((1, n["y"]), (2, n["x"])):
            at = self.cells(tiles, x.device).flatten().clamp(min=0, max=cells.shape[axis] - 1)
            cells = cells.index_select(axis, at)
        return rearrange(cells, "b (y m) (x n) d -> b (y x) (m n) d", m=self.across, n=self.across)

    def near(self, query, cell):
        """Whether a cell is seen from a query, along one axis."""
        return (query // self.side - cell).abs() <= self.radius

    def sees(self, near: list[Tensor], queries: list[Tensor], cells: list[Tensor]):
        """Which cells are seen, from both axes: each is shaped to (y, x, query row, query column, cell rows, columns)."""
        return near[0] & near[1]

    def mask(self, grid, device):
        n, tile = TILE.sizes(*grid), TILE.tile[0]
        shapes = ("y p m -> y 1 p 1 m 1", "x q n -> 1 x 1 q 1 n")
        queries, cells, near, last = [], [], [], []
        for shape, length, tiles in zip(shapes, grid, (n["y"], n["x"])):
            query = (torch.arange(tiles, device=device)[:, None] * tile + torch.arange(tile, device=device))[..., None]
            cell = self.cells(tiles, device)[:, None]
            inside = (cell >= 0) & (cell * self.side < length)
            for found, value in (
                (queries, query),
                (cells, cell),
                (near, self.near(query, cell) & inside),
                (last, ((cell + 1) * self.side).clamp(max=length) - 1),
            ):
                found.append(rearrange(value, shape))
        seen = self.sees(near, queries, cells)
        if self.past:
            seen = seen & ((last[0] < queries[0]) | ((last[0] == queries[0]) & (last[1] <= queries[1])))
        return rearrange(seen, "y x p q m n -> (y x) (p q) (m n)")


@dataclass(frozen=True)
class AllCells(KeySet):
    """Every position with the means of all cells of ``side`` pixels, as far as ``sees`` says."""

    side: int
    past: bool = False

    def sees(self, qy, qx, cy, cx):
        """Whether the query at (qy, qx) sees the cell (cy, cx)."""
        raise NotImplementedError

    def queries(self, x):
        return Everything().queries(x)

    def keys(self, x):
        return Everything().queries(means(x, self.side))

    def place(self, y, grid, fill=0.0):
        return Everything().place(y, grid)

    def mask(self, grid, device):
        qy, qx = (torch.arange(n, device=device) for n in grid)
        cy, cx = (torch.arange((n + self.side - 1) // self.side, device=device) for n in grid)
        qy, qx, cy, cx = qy[:, None, None, None], qx[:, None, None], cy[:, None], cx
        seen = self.sees(qy, qx, cy, cx)
        if self.past:
            bottom, right = (((c + 1) * self.side).clamp(max=n) - 1 for c, n in zip((cy, cx), grid))
            seen = seen & ((bottom < qy) | ((bottom == qy) & (right <= qx)))
        return rearrange(seen, "y x cy cx -> 1 (y x) (cy cx)")
