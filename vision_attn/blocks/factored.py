"""Factored attention: heads (or layers) take turns with the row, the column and the row above.

Dhariwal et al. 2020, Jukebox, https://arxiv.org/abs/2005.00341
    row: {j ≤ i : row(j) = row(i)}   column: {j ≤ i : col(j) = col(i)}   previous row: {j : row(j) = row(i) - 1} ∪ {i}
Cost: 2 N (H + 3 W) d / 3
Computed: 1.2 ×
By default each third of the heads has one of the three; ``part="row"``, ``"column"`` or ``"previous_row"`` gives a
layer one of them, to be cycled by the host, as the paper does. The previous row makes the causal set whole: a causal
row and column never hear what is right of a pixel in the rows above. Without ``causal`` rows and columns go both ways,
and the previous row is the rows above and below.
Deviations: a pixel always sees itself in the previous row's set too (the code: keys of zeros stand before the first
row). Heads are our addition, as is the pattern without ``causal``.

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

from .. import check
from ..key_set import AdjacentRows
from ..mixer import PatternMixer
from ..pattern import Column, Directed, PerHead, Row


@dataclass(frozen=True)
class Beside(Directed):
    """The row above, not ``past`` also the row below, and itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (ky == qy - 1) | ((ky == qy + 1) & (not self.past)) | ((ky == qy) & (kx == qx))

    def key_sets(self):
        return (RowsBeside(above=1, below=0 if self.past else 1),)


@dataclass(frozen=True)
class RowsBeside(AdjacentRows):
    """All of the other rows, and the position itself."""

    def sees(self, dy, qx, kx, width):
        return (dy != 0) | (kx == qx)

    def seen_from(self, y, x, grid):
        return [(slice(max(0, y - 1), y), slice(0, grid.width)), (slice(y, y + 1), slice(x, x + 1))]


class Block(PatternMixer):
    """Factored attention.

    Args:
        causal: only what comes before in raster order, and itself.
        part: None for a third of the heads each, or "row", "column", "previous_row" for one of them.
        Others: those of `Mixer`.

    Raises:
        ValueError: fewer than three heads without ``part``, or an argument out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        causal: bool = False,
        part: Literal["row", "column", "previous_row"] | None = None,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.one_of("part", part, (None, "row", "column", "previous_row"))
        parts = {"row": Row(past=causal), "column": Column(past=causal), "previous_row": Beside(past=causal)}
        super().__init__(parts[part] if part else PerHead(tuple(parts.values())), dim, num_heads, **mixer)
