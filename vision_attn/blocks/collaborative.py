"""Collaborative heads: all heads share one set of queries and keys, of which each weights the channels in its own way.

Cordonnier et al. 2020, Collaborate, https://arxiv.org/abs/2006.16362
    H_h = softmax((Q diag(m_h) Kᵀ + 1 b_hᵀ) (D / heads)^-½) V_h      Q = X W_Q    K = X W_K    b_h = X c_h
Cost: N² (heads D + d)
Computed: 1.1 ×
W_Q and W_K have D = ``key_dim`` channels for all heads together, m_h is learned, and so is the content bias c_h. With D
the channels of all heads and m_h 1 on those of head h, 0 elsewhere, it is dense attention without biases. D is a
quarter of ``dim`` unless given, of which the paper says that no accuracy is lost: it saves parameters, not time, as
every head compares all D channels.
m_h goes to the queries and the bias is one channel more, 1 in queries and b_h in keys: so it is one flash call.
With ``causal=True`` a position looks at itself and at what comes before it in raster order; prefix tokens come first
of all and see only one another.
Deviations: Q and K have biases if ``qkv_bias`` (the code: none). m starts at N(0, 0.2²), the code's choice; its others,
1 and dense attention's, are left out, as is its way to factorise the heads of a trained model.

>>> from vision_attn import Grid
>>> print(Past().draw(Grid(3, 5), 1, 3))
#####
###@-
-----
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import check
from ..grid import Grid
from ..mixer import PatternMixer
from ..pattern import All, Past
from ..precision import at_least_float32, scaled
from ..traced import fixed


class Block(PatternMixer):
    """Collaborative multi-head attention.

    Args:
        key_dim: channels of the one set of queries, D. None: a quarter of ``dim``, or the multiple of ``num_heads``
            below it.
        content_bias: whether a key has a score of its own in each head.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``qk_norm``: heads have no queries and keys of their own to normalise.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "heads share queries and keys, and weigh their channels one by one"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        key_dim=None,
        content_bias: bool = True,
        causal: bool = False,
        qk_norm: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.boolean("content_bias", content_bias)
        check.boolean("causal", causal)
        check.boolean("qk_norm", qk_norm)
        if qk_norm:
            raise ValueError(f"qk_norm={qk_norm!r}: must be False: heads share queries and keys")
        if key_dim is None:
            check.positive_int("dim", dim)
            heads = max(n for n in range(1, max(1, dim // 32) + 1) if dim % n == 0) if num_heads is None else num_heads
            check.positive_int("num_heads", heads)
            key_dim = heads * max(1, dim // (4 * heads))
        dd = dict(device=device, dtype=dtype)
        super().__init__(Past() if causal else All(), dim, num_heads, key_dim=key_dim, **dd, **mixer)
        self.mixing = nn.Parameter(torch.empty(self.num_heads, key_dim, **dd))
        self.content = nn.Parameter(torch.empty(self.num_heads, dim, **dd)) if content_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws m from N(0, 0.2²), and the content bias as `torch.nn.Linear` draws its weight."""
        nn.init.normal_(self.mixing, std=0.2)
        if self.content is not None:
            nn.init.kaiming_uniform_(self.content, a=math.sqrt(5))

    @property
    def head_dims(self):
        """Channels that a head compares, that of the content bias included, and of its values."""
        return self.key_dim + (self.content is not None), self.dim // self.num_heads

    def projected(self, x):
        q, k, v = super().projected(x)
        q = scaled(q[..., None, :], self.mixing.to(at_least_float32(q)))  # (B, tokens, heads, D)
        k = k[..., None, :].expand(q.shape)
        if self.content is not None:
            of_keys = F.linear(x, self.content)[..., None].to(k.dtype)
            q, k = torch.cat([q, torch.ones_like(of_keys)], dim=-1), torch.cat([k, of_keys], dim=-1)
        return q.flatten(-2), k.flatten(-2), v

    def mix(self, q, k, v, grid):
        missing = max(0, fixed(v.shape[-1] - q.shape[-1]))  # of narrower keys torch would make the N×N matrix
        return super().mix(F.pad(q, (0, missing)), F.pad(k, (0, missing)), v, grid)

    def reference(self, x, grid):
        """The whole block by its definition: a matrix of scores for each head."""
        q, k, v = self.qkv(x).split([self.key_dim, self.key_dim, self.dim], dim=-1)
        seen = self.pattern.mask(grid, Grid.of(grid).prefix_of(x.shape[1]), x.device)
        heads = []
        for head, (mixing, values) in enumerate(zip(self.mixing, v.chunk(self.num_heads, dim=-1))):
            scores = (q * mixing) @ k.mT
            if self.content is not None:
                scores = scores + (x @ self.content[head])[:, None, :]
            heads.append((self.scale * scores).masked_fill(~seen, -torch.inf).softmax(dim=-1) @ values)
        return self.proj_drop(self.proj(torch.cat(heads, dim=-1)))

    def extra_repr(self):
        return f"{super().extra_repr()}, key_dim={self.key_dim}"
