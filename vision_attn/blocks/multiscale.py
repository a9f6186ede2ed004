"""Multi-scale attention: each pixel looks at a window of pixels, one of larger cells, one of larger cells still.

Subramanian et al. 2020, Multi-scale Transformer, https://arxiv.org/abs/2005.00581
    A_u = softmax over {c : c a cell of level l, at most r cells from the one of u} of q_u · k̄_c d^-½
Cost: 2 N levels k² d
Computed: 2.3 ×
Cells of level l have ``scale_factor``^l pixels a side; their keys and values are the means k̄, v̄ over them. The window
has k = 2 r + 1 = ``kernel_size`` cells a side at each level, so that what is near is seen at every scale, and what is
far only coarsely. With ``causal=True`` a cell is seen once it is complete: no pixel of it is behind the query.
The paper has several language models; this is one layer of the one it calls retina, in two dimensions.
Deviations: cells are means of keys and values (the paper's coarse tokens are made by layers of their own).

>>> from vision_attn import Grid
>>> print(Retina(past=False, radius=1, scale=3, levels=2).draw(Grid(5, 11), 1, 4))
#########--
####@####--
#########--
#########--
#########--
>>> print(Retina(past=True, radius=1, scale=3, levels=2).draw(Grid(5, 11), 3, 4))
#########--
#########--
#########--
---#@------
-----------
"""

from dataclasses import dataclass

from .. import check
from ..engines.cells import Cells
from ..pyramid import Pyramid, PyramidMixer


@dataclass(frozen=True)
class Retina(Pyramid):
    """Windows of cells of one number at every level."""

    radius: int = 3
    scale: int = 4
    levels: int = 3

    @property
    def sides(self):
        return tuple(self.scale**level for level in range(self.levels))

    def seen(self, level, qy, qx, ky, kx, grid):
        side = self.sides[level]
        near = (abs(qy // side - ky // side) <= self.radius) & (abs(qx // side - kx // side) <= self.radius)
        return near & self.complete(side, qy, qx, ky, kx, grid)

    def key_sets(self):
        return tuple(Cells(side, self.radius, self.past) for side in self.sides)


class Block(PyramidMixer):
    """Multi-scale attention.

    Args:
        kernel_size: cells in the window at each level, down and right, odd.
        scale_factor: side of a cell in cells of the level below.
        levels: of cells, pixels included.
        causal: only cells wholly before in raster order, and itself.
        Others: those of `Mixer`, but ``attn_drop``, which would have to drop a pixel's share at each level apart.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        kernel_size: int = 7,
        scale_factor: int = 4,
        levels: int = 3,
        causal: bool = False,
        attn_drop: float = 0.0,
        **mixer,
    ):
        check.positive_int("kernel_size", kernel_size)
        radius, _ = (size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        check.positive_int("scale_factor", scale_factor)
        check.positive_int("levels", levels)
        if (radius + 1) * scale_factor ** (levels - 1) >= 2**61:
            raise ValueError(f"levels={levels!r}: the largest window must have less than 2^62 pixels a side")
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        super().__init__(Retina(radius, scale_factor, levels, past=causal), dim, num_heads, **mixer)
