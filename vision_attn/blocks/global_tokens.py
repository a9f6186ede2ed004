"""Global tokens: each pixel looks at the window around it and at a few pixels that all see, and that see all.

Beltagy et al. 2020, Longformer; Zhang et al. 2021, ViL, https://arxiv.org/abs/2004.05150
    A_u = softmax over {v : v in the window of u, or v ≤ tokens, or u ≤ tokens} of q_u · k_v d^-½
Cost: 2 N (k² + 2 tokens) d
Computed: 1.8 ×
The global ones are the first ``tokens`` positions in raster order, so that the pattern can be causal: with
``causal=True`` it is cut to what comes before, and they see only one another. Prefix tokens (class token, registers)
are global beside them, and with ``tokens=0`` they alone, as in ViL.
Deviations: Longformer has projections of its own for global tokens, on a line of text; ViL has learned tokens for
them, which here are the prefix tokens of the host, and shares projections with them by choice (``sharew``).

>>> from vision_attn import Grid
>>> print((Window(radius=(1, 1)) | Global(tokens=3)).draw(Grid(4, 7), 2, 4))
###----
---###-
---#@#-
---###-
>>> print(((Window(radius=(1, 1)) | Global(tokens=3)) & Past()).draw(Grid(4, 7), 2, 4))
###----
---###-
---#@--
-------
"""

from .. import check
from ..mixer import PatternMixer
from ..pattern import Global, Past, Window


class Block(PatternMixer):
    """Window attention with global tokens.

    Args:
        tokens: number of positions that see all and are seen by all, beside the prefix tokens; 0: these alone.
        kernel_size: pixels in the window, one odd integer or (height, width).
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        tokens: check.Count = 8,
        kernel_size: int | tuple[int, int] = 7,
        causal: bool = False,
        **mixer,
    ):
        check.count("tokens", tokens)
        check.boolean("causal", causal)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        pattern = Window(radius, past=causal)
        if tokens:
            pattern = (pattern | Global(tokens)) & Past() if causal else pattern | Global(tokens)
        super().__init__(pattern, dim, num_heads, **mixer)
