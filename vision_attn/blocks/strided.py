"""Strided attention: each pixel looks at its line of the raster, one row long, and at its own column.

Child et al. 2019, Sparse Transformer, https://arxiv.org/abs/1904.10509
    A_i = softmax over {i - l < j ≤ i} ∪ {j ≤ i : (i - j) mod l = 0} of q_i · k_j    raster order, l = W
Cost: 2 N (2 W + H) d
Computed: 1.3 ×
With ``causal=True`` as published: the band of the last W pixels, which is the row so far and the tail of the row above,
and the column above. Without, both go both ways. One softmax over the union is the paper's "merged head";
``split_heads=True`` gives the first half of the heads the band and the second half the column, as its third way;
``part="local"`` and ``part="column"`` give a layer one of them, to be interleaved by the host.
Deviations: the band has W pixels with the pixel itself (the paper's formula: W + 1; the last one is in the column).
Without ``causal`` the pattern is our reading: the paper has none.

>>> from vision_attn import Grid
>>> print(Strided(past=True).draw(Grid(5, 7), 3, 2))
--#----
--#----
--#####
##@----
-------
>>> print(Strided(past=False).draw(Grid(5, 7), 3, 2))
--#----
--#----
--#####
##@####
###----
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .. import check
from ..key_set import Columns, KeySet
from ..mixer import PatternMixer
from ..pattern import Column, Directed, PerHead


@dataclass(frozen=True)
class Local(Directed):
    """Less than a row of pixels away in raster order, before or (not ``past``) after."""

    def allowed(self, qy, qx, ky, kx, grid):
        behind = (qy * grid.width + qx) - (ky * grid.width + kx)
        return (behind < grid.width) & (behind >= 0 if self.past else behind > -grid.width)

    def key_sets(self):
        return (Band(self.past),)


@dataclass(frozen=True)
class Strided(Directed):
    """The band and the column."""

    def allowed(self, qy, qx, ky, kx, grid):
        at = (qy, qx, ky, kx, grid)
        return Local(past=self.past).allowed(*at) | Column(past=self.past).allowed(*at)

    def key_sets(self):
        return *Local(past=self.past).key_sets(), Columns(with_self=False, causal=self.past)


@dataclass(frozen=True)
class Band(KeySet):
    """Every position with the keys of its own row, the row above and, not ``past``, the row below that are in `Local`.

    Rows beyond the border are zeros, which are not seen.
    """

    past: bool

    @property
    def rows(self) -> range:
        """How much further down they are."""
        return range(-1, 1 if self.past else 2)

    def queries(self, x):
        return x

    def keys(self, x):
        padded = F.pad(x, (0, 0, 0, 0, 1, 0 if self.past else 1))
        return torch.cat([padded.narrow(1, 1 + dy, x.shape[1]) for dy in self.rows], dim=2)

    def add_keys(self, whole, part):
        height, width = whole.shape[1:3]
        for i, dy in enumerate(self.rows):
            rows = height - abs(dy)
            if rows > 0:
                there = part[:, max(0, -dy) : max(0, -dy) + rows, i * width : (i + 1) * width]
                whole[:, max(0, dy) : max(0, dy) + rows] += there

    def place(self, y, grid, fill=0.0):
        return y

    def mask(self, grid, device):
        y, x = (torch.arange(n, device=device) for n in grid)
        dy, query = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None], x[:, None, None]
        inside = (y[:, None, None] + dy >= 0) & (y[:, None, None] + dy < grid.height)  # (H, rows, 1)
        own = (dy == 0) & (x <= query) if self.past else dy == 0
        seen = ((dy == -1) & (x > query)) | own | ((dy == 1) & (x < query))  # (W, rows, W)
        return (inside[:, None] & seen).flatten(2)

    def kept(self, grid):
        return min(grid.height, 2), 0, grid.width

    def seen_from(self, y, x, grid):
        return [(slice(max(0, y - 1), y), slice(x + 1, grid.width)), (slice(y, y + 1), slice(0, x + 1))]


class Block(PatternMixer):
    """Strided attention.

    Args:
        causal: only what comes before in raster order, and itself.
        split_heads: half of the heads have the band, the others the column.
        part: None for both, "local" or "column" for one of them.
        Others: those of `Mixer`.

    Raises:
        ValueError: ``part`` together with ``split_heads``, one head to split, or an argument out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        causal: bool = False,
        split_heads: bool = False,
        part: Literal["local", "column"] | None = None,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.boolean("split_heads", split_heads)
        check.one_of("part", part, (None, "local", "column"))
        if split_heads and part:
            raise ValueError(f"part={part!r}: must be None with split_heads=True, which gives each part half the heads")
        local, column = Local(past=causal), Column(past=causal)
        pattern = PerHead((local, column)) if split_heads else {"local": local, "column": column}.get(part)
        super().__init__(pattern or Strided(past=causal), dim, num_heads, **mixer)
