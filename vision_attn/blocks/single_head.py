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
residual itself between them is left out. LayerNorms have torch's ε of 1e-5 (the code: 1e-12), and U gives f before c
(the code: after it). GELU is exact (the code: x σ(1.702 x)). Weights start as torch's layers do, gates at σ(0) as in
the code.

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
from ..precision import at_least_float32, scaled


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
        self.qkv = nn.Linear(dim, self.key_dim if self.key_dim == dim else 2 * self.key_dim, bias=qkv_bias, **dd)
        self.gates = Gates(dim, self.key_dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.proj = nn.Linear(dim, boom * dim, bias=proj_bias, **dd)  # of the Boom layer
        self.register_load_state_dict_pre_hook(move_gates)

    def projected(self, x):
        return self.gates(x, self.qkv(x))

    def forward(self, x, grid):
        q, k, v = self.heads(x, grid)
        return self.output(x, rearrange(self.mix(q, k, v, Grid.of(grid)), "B n t d -> B t (n d)"))

    def step(self, x, place, cache):
        return self.output(x, cache.step(*self.heads_of_pixel(x, place, cache), place).flatten(1))

    def output(self, x: Float[Tensor, "*B dim"], attended: Float[Tensor, "*B dim"]) -> Float[Tensor, "*B dim"]:
        """What the two steps add to ``x``."""
        return self.proj_drop(attended + self.boom(self.norm(x + attended)))

    def boom(self, z: Float[Tensor, "*B dim"]) -> Float[Tensor, "*B dim"]:
        """A feed-forward layer without the second matrix: the wide activations are summed, chunk by chunk."""
        wide = F.gelu(self.proj(z).unflatten(-1, (-1, self.dim)))  # in chunks, to which the sum's gradient is expanded
        return wide.sum(dim=-2, dtype=wide.dtype)  # CUDA's autocast would give float32


class Gates(nn.Module):
    """Queries, keys and values, each channel behind a learned gate."""

    def __init__(self, dim: int, key_dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.keys_projected = key_dim != dim
        self.q_gate, self.k_gate, self.v_gate = (nn.Parameter(torch.empty(n, **dd)) for n in (key_dim, key_dim, dim))
        self.norm = nn.LayerNorm(key_dim, **dd)
        self.over = nn.Linear(dim, 2 * dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Opens the gates half."""
        for gate in (self.q_gate, self.k_gate, self.v_gate):
            nn.init.zeros_(gate)

    def forward(self, x: Float[Tensor, "B tokens dim"], projected: Float[Tensor, "B tokens q_k"]):
        """Queries, keys and values of ``x``, whose queries, and keys if their width is their own, are projected."""
        q, k = projected.chunk(2, dim=-1) if self.keys_projected else (projected, x)
        wide = at_least_float32(x)
        of_v = self.over(self.v_gate.sigmoid()[None]).to(wide)  # (1, 2 dim): no quantised layer takes a vector
        f, c = of_v.chunk(2, dim=-1)
        q_gate, k_gate = (gate.to(wide).sigmoid() for gate in (self.q_gate, self.k_gate))
        return scaled(self.norm(q), q_gate), scaled(k, k_gate), scaled(x, f.sigmoid() * c.tanh())


def move_gates(block: Block, state: dict, prefix: str, *_) -> None:
    """Renames the gates of a state from when they were a part of ``qkv``."""
    for name, _ in block.gates.named_parameters():
        if (old := f"{prefix}qkv.{name}") in state:
            state[f"{prefix}gates.{name}"] = state.pop(old)
