"""Criss-cross attention: each pixel looks along its own row and its own column.

Huang et al. 2019, CCNet, https://arxiv.org/abs/1811.11721
    A_u = softmax over {v : row(v) = row(u) or col(v) = col(u)} of q_u · k_v
Cost: 2 N (H + W) d
Computed: 1 ×
One softmax over the H + W - 1 positions, the pixel itself counted once. On feature maps the layer is applied twice
with the same weights and the same gain (``recurrence=2``), so that every pixel hears from every other through a
corner.
Deviations: scores are scaled by d^-½ so that several heads and any width train alike (the paper: one head, no scale;
``num_heads=1, key_dim=dim // 8, scale=1.0`` gives it). ``proj`` follows the heads as in a ViT (the paper: none, as
with ``out_proj=False``).
On tokens the block is applied once: there the depth of the ViT is the recurrence.

>>> from vision_attn import Grid
>>> print(CrissCross().draw(Grid(3, 5), 1, 3))
---#-
###@#
---#-
"""

from dataclasses import dataclass

from torch import nn

from .. import check
from ..key_set import Columns, Rows
from ..mixer import PatternMixer
from ..pattern import Pattern


@dataclass(frozen=True)
class CrissCross(Pattern):
    """Own row and own column."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy == ky) | (qx == kx)

    def key_sets(self):
        return Rows(), Columns(with_self=False)


class Block(PatternMixer):
    """Criss-cross attention.

    Args:
        recurrence: times a layer on maps applies it.
        out_proj: whether a projection, ``proj``, follows the heads; without it, as in the paper, ``proj_bias`` has no
            effect.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = (
        "what is right of a pixel in the rows above is never heard, at any depth (315 of 903 past pairs on 6×7)"
    )

    def __init__(self, dim, num_heads=None, *, recurrence: int = 2, out_proj: bool = True, **mixer):
        super().__init__(CrissCross(), dim, num_heads, **mixer)
        check.positive_int("recurrence", recurrence)
        check.boolean("out_proj", out_proj)
        self.recurrence = recurrence
        if not out_proj:
            self.proj = nn.Identity()
