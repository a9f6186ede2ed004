"""Interlaced sparse attention: first among pixels far apart, then among neighbours.

Huang et al. 2019, ISA; Yuan et al. 2021, OCNet, https://arxiv.org/abs/1907.12273
    long range:  A_u = softmax over {v : v ≡ u modulo the factor, in y and in x} of q_u · k_v d^-½
    short range: A_u = softmax over {v : v in the same factor × factor window as u} of q_u · k_v d^-½
Cost: 2 N (N / f² + f²) d
Computed: 1 ×
Two steps, each with its own projections; together every pixel reaches every other where the size is a multiple of the
factor. Elsewhere the pixels of a cut window miss those whose place it lacks (14×14 with factor 8: 88 % are reached).
Deviations: padding is masked in both steps (the authors' code attends to it: in an untrained block in eval mode, at 9×9
with factor 4, 38 % of the long-range weight falls on zeros), and put at the bottom and right instead of on both sides,
so that the grouping does not move with the size. Projections are linear (the code: convolution, BatchNorm, ReLU, twice
for q and k), so that the block also fits the tokens of a ViT, with any number of heads (the code: one); the residual
and the 1×1 convolution around the module are the host's.

>>> from vision_attn import Grid
>>> print(Apart(factor=(2, 3)).draw(Grid(5, 7), 2, 4))
-#--#--
-------
-#--@--
-------
-#--#--
>>> print(Tile(tile=(2, 3)).draw(Grid(5, 7), 2, 4))
-------
-------
---#@#-
---###-
-------
"""

from dataclasses import dataclass

from .. import check
from ..key_set import Tiles
from ..mixer import PatternMixer, Sequence
from ..pattern import Pattern, Tile


@dataclass(frozen=True)
class Apart(Pattern):
    """Positions that hold the same place in every window of ``factor`` = (height, width)."""

    factor: tuple[int, int]

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy % self.factor[0] == ky % self.factor[0]) & (qx % self.factor[1] == kx % self.factor[1])

    def key_sets(self):
        return (Tiles(self.factor, across=True),)


class Block(Sequence):
    """Long range, then short range. ``factor``: window size, one integer or (height, width); the rest is `Mixer`'s."""

    not_causal = "the past inside the groups of both steps leaves a third of all past pixels unreached, at any depth"

    def __init__(self, dim, num_heads=None, *, factor: int | tuple[int, int] = 8, **mixer):
        factor = check.pair("factor", factor)
        super().__init__(*(PatternMixer(pattern, dim, num_heads, **mixer) for pattern in (Apart(factor), Tile(factor))))
