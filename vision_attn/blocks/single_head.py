"""Single-headed attention: one wide head, whose keys and values are the pixels themselves, each channel gated.

Merity 2019, SHA-RNN, https://arxiv.org/abs/1911.11423
    q = σ(q_s) ⊙ LN(W x)    k = σ(k_s) ⊙ x    v = σ(f) tanh(c) ⊙ x    (f, c) = U σ(v_s)
    a = softmax(q kᵀ d^-½) v    y = a + Boom(LN(x + a))
    Boom(z): GELU(W' z), of 4 d channels, in 4 chunks that are summed
Cost: 2 N² d
Computed: 1 ×
Only queries take a matrix; q_s, k_s, v_s are learned vectors of d gates, U a matrix for the sake of training alone.
Boom has no second matrix. With ``causal=True`` a position looks at itself and at what comes before it in raster order;
prefix tokens come first of all and see only one another.
More heads than one, and ``key_dim`` other than ``dim`` (keys then take a matrix too, an option of the authors' code),
are for hosts that have them.
Deviations: no LSTM before the attention, whose place in an image is that of the host's layers. Norms of the input (the
code: one of queries, one of keys and values) and the residual around both steps are the host's; that the code norms the
residual itself between them is left out. GELU is exact (the code: x σ(1.702 x)). Weights start as torch's layers do,
gates at σ(0) as in the code.

>>> from vision_attn import Grid
>>> print(Past().draw(Grid(3, 5), 1, 3))
#####
###@-
-----
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..grid import Grid
from ..mixer import PatternMixer
from ..pattern import All, Past


class Block(PatternMixer):
    """Single-headed attention.

    Args:
        num_heads: one in the source, and if None.
        boom: chunks of dim channels that the Boom layer sums.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`; ``qkv_bias`` is of queries, ``proj_bias`` of the Boom layer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        boom: int = 4,
        causal: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("boom", boom)
        check.boolean("causal", causal)
        dd = dict(device=device, dtype=dtype)
        num_heads = 1 if num_heads is None else num_heads
        options = dict(qkv_bias=qkv_bias, proj_bias=proj_bias, **dd, **mixer)
        super().__init__(Past() if causal else All(), dim, num_heads, **options)
        self.qkv = Gated(dim, self.key_dim, qkv_bias, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.proj = Boom(dim, boom, proj_bias, **dd)

    def forward(self, x, grid):
        q, k, v = self.heads(x, grid)
        return self.output(x, rearrange(self.mix(q, k, v, Grid.of(grid)), "B n t d -> B t (n d)"))

    def step(self, x, place, cache):
        q, k, v = (t[:, :, 0] for t in self.heads(x[:, None], Grid(1, 1)))
        return self.output(x, cache.step(q, k, v, place).flatten(1))

    def output(self, x: Float[Tensor, "*B dim"], attended: Float[Tensor, "*B dim"]) -> Float[Tensor, "*B dim"]:
        """What the two steps add to ``x``."""
        return self.proj_drop(attended + self.proj(self.norm(x + attended)))


class Gated(nn.Linear):
    """Queries, keys and values side by side, each channel behind a learned gate; the matrix is that of queries."""

    def __init__(self, dim: int, key_dim: int, bias: bool, device=None, dtype=None):
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, key_dim if key_dim == dim else 2 * key_dim, bias=bias, **dd)
        self.norm = nn.LayerNorm(key_dim, **dd)
        self.over = nn.Linear(dim, 2 * dim, **dd)
        self.q_gate, self.k_gate, self.v_gate = (nn.Parameter(torch.zeros(n, **dd)) for n in (key_dim, key_dim, dim))

    def reset_parameters(self) -> None:
        """Draws the matrix anew, and opens the gates half."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_gate"):
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "B tokens dim"]) -> Float[Tensor, "B tokens q_k_v"]:
        """Queries, keys and values of ``x``."""
        projected = super().forward(x)
        q, k = (projected, x) if len(self.q_gate) == self.in_features else projected.chunk(2, dim=-1)
        f, c = self.over(self.v_gate.sigmoid()).chunk(2)
        gated = self.q_gate.sigmoid() * self.norm(q), self.k_gate.sigmoid() * k, f.sigmoid() * c.tanh() * x
        return torch.cat(gated, dim=-1)


class Boom(nn.Linear):
    """A feed-forward layer without the second matrix: the wide activations are summed, chunk by chunk."""

    def __init__(self, dim: int, chunks: int, bias: bool, device=None, dtype=None):
        super().__init__(dim, chunks * dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*B dim"]) -> Float[Tensor, "*B dim"]:
        """The layer's output."""
        return F.gelu(super().forward(x)).unflatten(-1, (-1, self.in_features)).sum(dim=-2)
