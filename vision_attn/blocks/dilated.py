"""Dilated attention: each pixel looks at a window with gaps, every s-th pixel down and right.

Wang et al. 2020, Transformer on a Diet; Hassani & Shi 2022, DiNAT, https://arxiv.org/abs/2209.15001
    A_u = softmax over {v : row(v) - row(u) and col(v) - col(u) in s · {-r … r}} of q_u · k_v d^-½
Cost: 2 N k² d
Computed: 2 ×
Here k = 2 r + 1 is ``kernel_size``. Layers with dilations 1, s, s² … reach far for the price of a small window. With
``causal=True`` the part of the window that comes before in raster order, and the pixel itself. At the border the
window is cut off; with ``border="shift"`` it moves inwards, in steps of s, as in DiNAT and NATTEN, and has k² pixels
everywhere, or every s-th that an axis has where it is shorter.
Deviations: Transformer on a Diet looks at a line of text, 2^layer apart; this is its reading in two dimensions. DiNAT
also has relative positions.

>>> from vision_attn import Grid
>>> print(Window(radius=(1, 1), dilation=(2, 3), past=False).draw(Grid(5, 7), 2, 3))
#--#--#
-------
#--@--#
-------
#--#--#
>>> print(Window(radius=(1, 1), dilation=(2, 3), past=True).draw(Grid(5, 7), 2, 3))
#--#--#
-------
#--@---
-------
-------
>>> print(Window(radius=(1, 1), dilation=(2, 3), shift=True).draw(Grid(5, 7), 0, 3))
#--@--#
-------
#--#--#
-------
#--#--#
"""

from typing import Literal

from .. import check
from ..mixer import PatternMixer
from ..pattern import Window


class Block(PatternMixer):
    """Dilated window attention.

    Args:
        kernel_size: pixels in the window, one odd integer or (height, width).
        dilation: step between them, one integer or (height, width).
        border: where the window leaves the image it is "cut" off, or it is made to "shift" inwards.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range, or a causal window is to shift.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 2,
        border: Literal["cut", "shift"] = "cut",
        causal: bool = False,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.border(border, causal)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        window = Window(radius, check.pair("dilation", dilation), border == "shift", past=causal)
        super().__init__(window, dim, num_heads, **mixer)
