"""Dense softmax attention: every position looks at every position. The baseline of all others.

Vaswani et al. 2017, Transformer; Dosovitskiy et al. 2021, ViT, https://arxiv.org/abs/1706.03762
    A_u = softmax over all v of q_u · k_v d^-½
Cost: 2 N² d
Computed: 1 ×
With ``causal=True`` a position looks at itself and at what comes before it in raster order; prefix tokens come
first of all and see only one another.
Deviations: none.

>>> from vision_attn import Grid
>>> print(Past().draw(Grid(3, 5), 1, 3))
#####
###@-
-----
"""

from .. import check
from ..mixer import PatternMixer
from ..pattern import All, Past


class Block(PatternMixer):
    """Dense softmax attention. ``causal``: raster order; the other arguments are those of `Mixer`."""

    def __init__(self, dim, num_heads=None, *, causal: bool = False, **mixer):
        check.boolean("causal", causal)
        super().__init__(Past() if causal else All(), dim, num_heads, **mixer)
