"""Window attention: each pixel looks at the window around it.

Ramachandran et al. 2019, SASA; Hassani et al. 2023, NATTEN, https://arxiv.org/abs/1906.05909
    A_u = softmax over {v : |row(v) - row(u)| ≤ r and |col(v) - col(u)| ≤ r} of q_u · k_v d^-½
Cost: 2 N k² d
Computed: 2 ×
Here k = 2 r + 1 is ``kernel_size``. With ``causal=True`` the part of the window that comes before in raster order, and
the pixel itself. A causal window alone never reaches what is far to the right in the rows just above, at any depth.
At the border the window is cut off; with ``border="shift"`` it moves inwards, as in NAT and NATTEN, and has k² pixels
everywhere, or all that an axis has where it is shorter.
Deviations: cutting off is neither's way (SASA pads with zeros that are attended to). There are no relative positions
(both have some).

>>> from vision_attn import Grid
>>> print(Window(radius=(1, 2), past=False).draw(Grid(4, 7), 2, 1))
-------
####---
#@##---
####---
>>> print(Window(radius=(1, 2), past=True).draw(Grid(4, 7), 2, 1))
-------
####---
#@-----
-------
>>> print(Window(radius=(1, 2), shift=True).draw(Grid(4, 7), 3, 1))
-------
#####--
#####--
#@###--
"""

from typing import Literal

from .. import check
from ..mixer import PatternMixer
from ..pattern import Window


class Block(PatternMixer):
    """Window attention.

    Args:
        kernel_size: pixels in the window, one odd integer or (height, width).
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
        border: Literal["cut", "shift"] = "cut",
        causal: bool = False,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.border(border, causal)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        super().__init__(Window(radius, shift=border == "shift", past=causal), dim, num_heads, **mixer)
