"""Binary partitioning: each pixel looks at near pixels one by one and at far ones through ever larger squares.

Ye et al. 2019, BP-Transformer, https://arxiv.org/abs/1911.04070
    A_u = softmax over the cells c of a quadtree around u of q_u · k̄_c d^-½    k̄_c, v̄_c: means over the cell
Cost: 6 N levels (2 near + 1)² d + 2 N² d / 4^levels
Computed: 3.9 ×
Every pixel is in exactly one cell that u sees. A cell of side 2^l is seen if it is more than ``near`` cells away and
its parent of side 2^{l+1} is not; pixels whose parent is within ``near`` are seen themselves; at the last level, side
2^levels, all that is left is seen. So the number of keys grows with the logarithm of the distance, as long as
``levels`` does: with the default, cells of the last level are the fewer keys up to about 170 × 170. With
``causal=True`` a cell is seen once it lies wholly in the past; what is past but in a cell that is not yet complete,
such as the far left of the pixel's own row, is left to other layers.
The paper splits a line of text into a binary tree; the quadtree is its reading in two dimensions.
Deviations: the nodes of the tree are means of keys and values (the paper: states of their own, which each layer
updates from their leaves, with embeddings for the kinds of edges). The paper looks at k nodes a level to each side.

>>> from vision_attn import Grid
>>> print(Quadtree(near=1, levels=2).draw_levels(Grid(9, 13), 4, 2))
1111111122222
1111111122222
0000001122222
0000001122222
00@0001122222
0000001122222
0000001122222
0000001122222
1111111122222
>>> print(Quadtree(near=1, levels=2, past=True).draw(Grid(9, 13), 5, 4))
#############
#############
#############
#############
########-----
####@--------
-------------
-------------
-------------
"""

from dataclasses import dataclass

from .. import check
from ..engines.cells import AllCells, Cells
from ..pyramid import Pyramid, PyramidMixer


@dataclass(frozen=True)
class Quadtree(Pyramid):
    """Cells of a quadtree, the larger the farther away, each pixel in one of them."""

    near: int = 1
    levels: int = 4

    @property
    def sides(self):
        return tuple(2**level for level in range(self.levels + 1))

    def seen(self, level, qy, qx, ky, kx, grid):
        return (self.level(qy, qx, ky, kx) == level) & self.complete(self.sides[level], qy, qx, ky, kx, grid)

    def level(self, qy, qx, ky, kx):
        """Level of the cell in which a pixel is seen: the number of larger cells around it that are far."""
        apart = [(abs(qy // side - ky // side), abs(qx // side - kx // side)) for side in self.sides[1:]]
        return sum(((down > self.near) | (right > self.near)) * 1 for down, right in apart)

    def draw_levels(self, grid, y, x) -> str:
        """What the query at (y, x) sees: the level of each pixel's cell, ``@`` itself."""
        rows = [[str(self.level(y, x, ky, kx)) for kx in range(grid.width)] for ky in range(grid.height)]
        rows[y][x] = "@"
        return "\n".join(map("".join, rows))

    def key_sets(self):
        below = tuple(Branches(side, 2 * self.near + 1, self.past, self.near) for side in self.sides[:-1])
        return (*below, Rest(self.sides[-1], self.near, self.past, self.near))


@dataclass(frozen=True)
class Branches(Cells):
    """Cells that are more than ``close`` away, and whose parents are not."""

    close: int = 1

    def sees(self, queries, cells):
        down, right = ((q // (2 * self.side) - c // 2).abs() <= self.close for q, c in zip(queries, cells))
        parent = down & right
        return parent if self.side == 1 else parent & self.far(queries, cells)  # no smaller cells show a pixel

    def far(self, queries, cells):
        down, right = ((q // self.side - c).abs() > self.close for q, c in zip(queries, cells))
        return down | right

    def parts(self, grid):
        none_is_far = self.side > 1 and max(grid) <= (self.close + 1) * self.side
        return () if none_is_far else (self,)


@dataclass(frozen=True)
class Rest(AllCells):
    """All cells that are more than ``close`` away."""

    close: int = 1

    sees, parts = Branches.far, Branches.parts


class Block(PyramidMixer):
    """Attention over a quadtree.

    Args:
        near: cells of each size around a pixel that are seen finer.
        levels: of cells above pixels; the largest have 2^levels pixels a side.
        causal: only cells wholly before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, dim, num_heads=None, *, near: int = 1, levels: int = 4, causal: bool = False, **mixer):
        check.positive_int("near", near)
        check.positive_int("levels", levels)
        if (near + 1) * 2**levels >= 2**61:
            raise ValueError(f"levels={levels!r}: what is near must have less than 2^62 pixels a side")
        check.boolean("causal", causal)
        super().__init__(Quadtree(past=causal, near=near, levels=levels), dim, num_heads, **mixer)
