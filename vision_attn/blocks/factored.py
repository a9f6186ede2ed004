"""Factored attention: heads (or layers) take turns with the row, the column and the row above.

Dhariwal et al. 2020, Jukebox, https://arxiv.org/abs/2005.00341
    row: {j ≤ i : row(j) = row(i)}   column: {j ≤ i : col(j) = col(i)}   previous row: {j : row(j) = row(i) - 1} ∪ {i}
Cost: 2 N (H + 3 W) d / 3
Computed: 1 ×
By default each third of the heads has one of the three; ``part="row"``, ``"column"`` or ``"previous_row"`` gives a
layer one of them, to be cycled by the host, as the paper does. The previous row makes the causal set whole: a causal
row and column never reach what is right of a pixel in the rows above. Without ``causal`` rows and columns go both ways,
and the previous row is the rows above and below.
With ``include_self=False`` the previous row is without the pixel itself, as in the authors' code, and the first row,
which has none, takes 0 from it (the code: the mean of a row of zeros).
Deviations: by default a pixel sees itself in the previous row's set too. Heads are our addition, as is the pattern
without ``causal``.

>>> from vision_attn import Grid
>>> for pattern in (Row(past=True), Column(past=True), Beside(past=True)):
...     print(pattern.draw(Grid(3, 5), 1, 3), end="\\n\\n")
-----
###@-
-----
<BLANKLINE>
---#-
---@-
-----
<BLANKLINE>
#####
---@-
-----
<BLANKLINE>
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

from .. import check
from ..key_set import Itself, KeySet
from ..mixer import PatternMixer
from ..pattern import Column, Directed, PerHead, Row


@dataclass(frozen=True)
class Beside(Directed):
    """The row above, not ``past`` also the row below, and itself or (not ``include_self``) only those."""

    include_self: bool = True

    def allowed(self, qy, qx, ky, kx, grid):
        beside = (ky == qy - 1) | ((ky == qy + 1) & (not self.past))
        return beside | ((ky == qy) & (kx == qx) & self.include_self)

    def key_sets(self):
        beside = (NextRow(-1),) if self.past else (NextRow(-1), NextRow(1))
        return (*beside, Itself()) if self.include_self else beside


@dataclass(frozen=True)
class NextRow(KeySet):
    """Every position with all of the row above (``step`` -1) or below (1), where there is one. A view, no copy."""

    step: int
    every = False

    def queries(self, x):
        return x.narrow(1, 1 if self.step < 0 else 0, x.shape[1] - 1)

    def keys(self, x):
        return x.narrow(1, 0 if self.step < 0 else 1, x.shape[1] - 1)

    def place(self, y, grid, fill=0.0):
        return F.pad(y, (0, 0, 0, 0, 1, 0) if self.step < 0 else (0, 0, 0, 0, 0, 1), value=fill)

    def kept(self, grid):
        return min(grid.height, 2), 0, grid.width

    def seen_from(self, y, x, grid):
        return [(slice(max(0, y - 1), y), slice(0, grid.width))]


class Block(PatternMixer):
    """Factored attention.

    Args:
        causal: only what comes before in raster order, and itself.
        part: None for a third of the heads each, or "row", "column", "previous_row" for one of them.
        include_self: whether the previous row's set has the pixel itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: fewer than three heads without ``part``, ``include_self=False`` without a previous row, or an
            argument out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        causal: bool = False,
        part: Literal["row", "column", "previous_row"] | None = None,
        include_self: bool = True,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.one_of("part", part, (None, "row", "column", "previous_row"))
        check.boolean("include_self", include_self)
        if not include_self and part in ("row", "column"):
            raise ValueError(f"include_self={include_self!r}: must be True with part={part!r}, which has the pixel")
        beside = Beside(past=causal, include_self=include_self)
        parts = {"row": Row(past=causal), "column": Column(past=causal), "previous_row": beside}
        super().__init__(parts[part] if part else PerHead(tuple(parts.values())), dim, num_heads, **mixer)
        self.averages = include_self
