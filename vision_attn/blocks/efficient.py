"""Efficient attention: positions are summarised into d global maps, which every position then draws from.

Shen et al. 2021, Efficient Attention, https://arxiv.org/abs/1812.01243
    y = ρ_q(q) (ρ_k(k)ᵀ v)    ρ_q: softmax over the channels of a head    ρ_k: softmax over the positions
Cost: 2 N d² / heads
Computed: 1 ×
The implied matrix ρ_q(q) ρ_k(k)ᵀ has rows that sum to 1. The order of positions does not matter; prefix tokens are
ordinary.
Deviations: heads are of the authors' code (the paper: one). The residual is the host's. There is no scale, as in both.
"""

from .. import check
from ..kernel import attend
from ..mixer import Mixer


class Block(Mixer):
    """Efficient attention. Arguments: those of `Mixer`, but ``scale`` and ``attn_drop``, which it has no use for."""

    not_causal = "the softmax over positions divides by the whole image"

    def __init__(self, dim, num_heads=None, *, attn_drop: float = 0.0, **mixer):
        check.no_attn_drop(attn_drop)
        check.no_scale(mixer.get("scale"), "there is no q · k to scale")
        super().__init__(dim, num_heads, **mixer)

    def mix(self, q, k, v, grid):
        return attend(q.softmax(dim=-1), k.softmax(dim=-2), v)

    def weights(self, q, k, grid):
        rho_q = q.exp() / q.exp().sum(dim=3, keepdim=True)
        rho_k = k.exp() / k.exp().sum(dim=2, keepdim=True)
        return rho_q @ rho_k.mT
