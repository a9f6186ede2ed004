"""Patterns by head: some heads look near, some at a wide lattice, some at a few global positions.

Child et al. 2019, Sparse Transformer, §4.3, https://arxiv.org/abs/1904.10509
    head h: A_u = softmax over the h-th pattern's positions of q_u · k_v d^-½
    local: the k × k window    strided: every s-th pixel down and right    global: the first ``tokens`` positions
Cost: 2 N (k² + N / s² + 2 tokens) d / 3
Computed: 1.2 ×
The third and best way of combining patterns in the source: no softmax spans two of them, so each head costs only its
own and none has to be merged. ``patterns`` names what equal shares of the heads have, in order. With ``causal=True``
each is cut to what comes before in raster order.
Deviations: the paper's heads have the two parts of strided or of fixed (those blocks' ``split_heads=True``); these
three are the common set of local, strided and global masks. Global heads also see the pixel itself.

>>> from vision_attn import Grid
>>> for pattern in Block(96, num_heads=3, kernel_size=3, stride=(2, 3), tokens=2, causal=True).pattern.by_head():
...     print(pattern.draw(Grid(3, 7), 2, 4), end="\\n\\n")
-------
---###-
---#@--
<BLANKLINE>
-#--#--
-------
-#--@--
<BLANKLINE>
##-----
-------
----@--
<BLANKLINE>
"""

from dataclasses import dataclass
from typing import Literal

from .. import check
from ..key_set import Itself, Tiles
from ..mixer import PatternMixer
from ..pattern import Global, Past, Pattern, PerHead, Window


@dataclass(frozen=True)
class Lattice(Pattern):
    """A whole number of ``stride`` = (down, right) away."""

    stride: tuple[int, int]

    def allowed(self, qy, qx, ky, kx, grid):
        return ((ky - qy) % self.stride[0] == 0) & ((kx - qx) % self.stride[1] == 0)

    def key_sets(self):
        return (Tiles(self.stride, across=True),)


@dataclass(frozen=True)
class Own(Pattern):
    """The position itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy == ky) & (qx == kx)

    def key_sets(self):
        return (Itself(),)


class Block(PatternMixer):
    """Patterns by head.

    Args:
        patterns: of equal shares of the heads: "local", "strided", "global", any number in any order.
        kernel_size: of the local window, one odd integer or (height, width).
        stride: of the lattice, one integer or (height, width).
        tokens: number of global positions.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: fewer heads than patterns, or an argument out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        patterns: tuple[Literal["local", "strided", "global"], ...] = ("local", "strided", "global"),
        kernel_size: int | tuple[int, int] = 7,
        stride: int | tuple[int, int] = 4,
        tokens: int = 8,
        causal: bool = False,
        **mixer,
    ):
        check.positive_int("tokens", tokens)
        check.boolean("causal", causal)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        known = {
            "local": Window(radius),
            "strided": Lattice(check.pair("stride", stride)),
            "global": Global(tokens) | Own(),
        }
        if not isinstance(patterns, (tuple, list)) or not patterns or not all(n in list(known) for n in patterns):
            raise ValueError(f"patterns={patterns!r}: must be a list of {', '.join(map(repr, known))}")
        pattern = PerHead(tuple(known[name] for name in patterns))
        super().__init__(pattern & Past() if causal else pattern, dim, num_heads, **mixer)
