"""Dense softmax attention: every position looks at every position. The baseline of all others.

Vaswani et al. 2017, Transformer; Dosovitskiy et al. 2021, ViT, https://arxiv.org/abs/1706.03762
    A_u = softmax over all v of q_u · k_v d^-½
Cost: 2 N² d
With ``causal=True`` a position looks at itself and at what comes before it in raster order; prefix tokens come
first of all and see only one another.
Deviations: none.
"""

import torch
import torch.nn.functional as F

from .. import check
from ..mixer import Mixer, softmax_over


class Block(Mixer):
    """Dense softmax attention. ``causal``: raster order; the other arguments are those of `Mixer`."""

    def __init__(self, dim, num_heads=None, *, causal: bool = False, **mixer):
        super().__init__(dim, num_heads, **mixer)
        check.boolean("causal", causal)
        self.causal = causal

    def mix(self, q, k, v, grid):
        prefix = grid.prefix_of(q.shape[2])
        options = dict(dropout_p=self.dropout, scale=self.scale)
        if not self.causal or prefix == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, **options)
        first = F.scaled_dot_product_attention(*(t[:, :, :prefix] for t in (q, k, v)), **options)
        seen = torch.ones(grid.size, q.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
        rest = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=seen, **options)
        return torch.cat([first, rest], dim=2)

    def weights(self, q, k, grid):
        mask = None
        if self.causal:
            prefix = grid.prefix_of(q.shape[2])
            place = torch.arange(q.shape[2], device=q.device).sub(prefix).clamp(min=-1)  # all prefix tokens come first
            mask = place[:, None] >= place[None, :]
        return softmax_over(mask, q, k, self.scale)
