"""Attention to the means of square cells: fine near, coarse far.

A `Pyramid` says which cells of which side a pixel sees; a cell's key and value are the means of its pixels' keys and
values, and one softmax goes over all cells seen. With ``past`` a cell counts only once all its pixels are past.
"""

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange

from .engines.cells import means
from .engines.union import attend
from .grid import Grid
from .mixer import Mixer, warn_of_blind_spot
from .pattern import Directed, complete


@dataclass(frozen=True)
class Pyramid(Directed):
    """Which cells a pixel sees. Subclasses state ``sides``, ``seen`` and ``key_sets``."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of a cell at each level, in pixels, fine to coarse; the first is 1."""
        raise NotImplementedError

    def seen(self, level: int, qy, qx, ky, kx, grid: Grid):
        """Whether the query at (qy, qx) sees the cell of a level that the pixel (ky, kx) is in."""
        raise NotImplementedError

    def allowed(self, qy, qx, ky, kx, grid):
        levels = range(len(self.sides))
        return reduce(lambda a, b: a | b, (self.seen(level, qy, qx, ky, kx, grid) for level in levels))

    def known(self, x, grid):
        _, pixels = grid.split(x)
        pixels = rearrange(pixels, "B n (H W) d -> B H W (n d)", H=grid.height, W=grid.width)  # as projections lie
        cells = [means(pixels, side) for side in self.sides[1:]]
        return torch.cat([x, *(rearrange(t, "B h w (n d) -> B n (h w) d", n=x.shape[1]) for t in cells)], dim=2)

    def known_masks(self, heads, grid, prefix=0, device=None):
        y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
        rows, of_first = [], []
        for level, side in enumerate(self.sides):
            down, right = torch.meshgrid(*(torch.arange(0, n, side, device=device) for n in grid), indexing="ij")
            cells = down.flatten(), right.flatten()  # by their first pixels
            seen = self.seen(level, y[:, None], x[:, None], *cells, grid)
            rows.append(seen.expand(grid.size, len(cells[0])))
            of_first.append(torch.full((prefix, len(cells[0])), level == 0 and not self.causal, device=device))
        return F.pad(torch.cat([torch.cat(of_first, dim=1), torch.cat(rows, dim=1)]), (prefix, 0), value=True)[None]

    def complete(self, side: int, qy, qx, ky, kx, grid: Grid):
        """Whether the cell with (ky, kx) in it has no pixel behind (qy, qx); where nothing is asked: always."""
        return complete((side, side), qy, qx, ky, kx, grid) | (not self.past)


class PyramidMixer(Mixer):
    """Softmax attention over the cells that a `Pyramid` shows. Arguments: the pyramid, and those of `Mixer`."""

    not_rotary = "keys are averaged over cells, of pixels at many places"

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
