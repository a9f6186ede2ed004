"""Transformer-XL: each row looks at itself and at the rows in its memory, by content and by relative position.

Dai et al. 2019, Transformer-XL, https://arxiv.org/abs/1901.02860
    s_ij = d^-½ [(q_i + u) · k_j + (q_i + w) · W_R e(i - j)]    e(t) = [sin t ω_f, cos t ω_f]    ω_f = 10000^(-f / F)
Cost: 2 N (2 memory + 1) W d
Computed: 2.1 ×
Rows are the segments, and e has the waves of both distances, down and to the right. With ``causal=True`` a pixel sees
its row up to itself and ``memory`` rows above, without it also what is to the right, and as many rows below. In a pass
over the whole image recurrence is nothing else than this pattern: a layer reads, of the rows above, what the layer
below has made of them; a stack of L layers reaches L · memory rows. ``memory=None`` is dense attention with relative
positions. There is no table and no matrix of positions: a wave of i - j is a sum of products of waves of i and of j,
so that queries and keys have 4 F channels more, which is exact for any size and any pattern.
``stop_gradient=True``: what a row takes of others has no gradient to the input, as what the paper's memory holds; the
projections learn from all of it. When pixels are sampled, the keys and values of ``memory`` + 1 rows are kept.
Deviations: each layer has its own u and w (the authors' code: one pair for all layers) and starts with a larger W_R.
A memory is a number of rows (there: of tokens, as long as a segment), and there is no ``clamp_len``.

>>> from vision_attn import Grid
>>> print(Recent(memory=2, past=True).draw(Grid(5, 6), 3, 2), Recent(memory=1).draw(Grid(5, 6), 3, 2), sep="\\n\\n")
------
######
######
##@---
------
<BLANKLINE>
------
------
######
##@###
######
"""

from .. import check
from ..mixer import warn_of_blind_spot
from ..pattern import All, Past
from ..recurrence import Recent, RelativeMixer


class Block(RelativeMixer):
    """Attention to recent rows, with relative positions.

    Args:
        memory: rows that are seen above (not ``causal``: and below). None: all.
        causal: only what comes before in raster order, and itself.
        Others: those of `RelativeMixer`.

    Raises:
        ValueError: an argument is out of range.

    Warns:
        BlindSpot: without a memory, a causal row never reaches those above.
    """

    def __init__(self, dim, num_heads=None, *, memory: check.Count | None = 3, causal: bool = False, **mixer):
        if memory is not None:
            check.count("memory", memory)
        check.boolean("causal", causal)
        everything = Past() if causal else All()
        super().__init__(everything if memory is None else Recent(memory, past=causal), dim, num_heads, **mixer)
        warn_of_blind_spot(self)

    @property
    def pattern(self):
        """Who sees whom."""
        return self.exact
