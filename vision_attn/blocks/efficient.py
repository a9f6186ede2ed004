"""Efficient attention: positions are summarised into d global maps, which every position then draws from.

Shen et al. 2021, Efficient Attention, https://arxiv.org/abs/1812.01243
    y = ρ_q(q) (ρ_k(k)ᵀ v)    ρ_q: softmax over the channels of a head    ρ_k: softmax over the positions
Cost: 2 N d² / heads
Computed: 1 ×
The implied matrix ρ_q(q) ρ_k(k)ᵀ has rows that sum to 1. The order of positions does not matter; prefix tokens are
ordinary.
``value_dim`` is how many channels the values have together, which ``proj`` brings back to ``dim``.
Deviations: heads are of the authors' code (the paper: one). The residual is the host's. There is no scale, as in both.
"""

from torch import nn

from .. import check
from ..engines.kernel import attend
from ..mixer import Mixer
from ..precision import at_least_float32


class Block(Mixer):
    """Efficient attention.

    Args:
        value_dim: channels of all values together, a multiple of the heads. None: ``dim``.
        Others: those of `Mixer`, but ``scale`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the softmax over positions divides by the whole image"
    not_rotary = "a query's softmax goes over its channels, which a turn mixes"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        value_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.no_attn_drop(attn_drop)
        check.no_scale(mixer.get("scale"), "there is no q · k to scale")
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, **mixer, **dd)
        if value_dim is not None:
            check.positive_int("value_dim", value_dim)
            if value_dim % self.num_heads:
                raise ValueError(f"value_dim={value_dim!r}: must be a multiple of num_heads={self.num_heads}")
            self.widths[2] = value_dim
            self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias, **dd)
            self.proj = nn.Linear(value_dim, dim, bias=proj_bias, **dd)

    def mix(self, q, k, v, grid):
        wide = at_least_float32(v)  # as their gradients, of products with v, may leave float16
        return attend(q.softmax(dim=-1, dtype=wide), k.softmax(dim=-2, dtype=wide), v)

    def weights(self, q, k, grid):
        rho_q = q.exp() / q.exp().sum(dim=3, keepdim=True)
        rho_k = k.exp() / k.exp().sum(dim=2, keepdim=True)
        return rho_q @ rho_k.mT
