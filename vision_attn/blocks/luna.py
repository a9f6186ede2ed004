"""Luna: a few learned tokens pack the image by attention, and each pixel unpacks what it needs of them.

Ma et al. 2021, Luna, https://arxiv.org/abs/2106.01540
    Y_P = softmax(P kᵀ d^-½) {k, v}    Y_X = softmax(q Y_Pkᵀ d^-½) Y_Pv
    causal:  a_t = softmax over m of q_t · (Σ_j p_jm k_j / Σ_j p_jm) d^-½    y_t = Σ_m a_tm (Σ_j p_jm v_j / Σ_j p_jm)
             p_jm = log₂(1 + 2^(P_m · k_j d^-½))    sums over j ≤ t
Cost: 5 N memory d
Computed: 1 ×
P are ``memory`` tokens a head, learned. The softmax of packing divides by the whole image; with ``causal=True`` a
softplus takes its place, and packs are means of what comes before in raster order and the pixel itself. Those are two
attentions by association, which add 128 N (d + memory heads) for prefix sums in chunks of 64, and pixel by pixel a
recurrent state of memory (2 d / heads + 1) numbers a head. The order of positions does not matter otherwise; prefix
tokens are ordinary and, if causal, come first of all. Sums over the past are taken in at least float32.
Deviations: in the paper Y_P goes on to the next layer as its P, behind a residual and a LayerNorm; a block knows one
layer, so P starts anew in each. Packing takes one projection of the image there, as key and value both, and unpacking
two of what is packed; those are composed here, so keys and values are the block's own. Causal sums are divided by t
there, not by Σ_j p_jm, so that weights grow with the scores and outputs leave float16. Here p is at least 1e-19 in
float32, for a quotient that is right where all scores are below -63.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines.kernel import Recurrence, attend_in_order
from ..engines.union import flash
from ..mixer import Mixer
from ..pattern import Past
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast


class Block(Mixer):
    """Luna.

    Args:
        memory: number of tokens that the image is packed into.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``attn_drop``: what is packed is no weight to drop.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "the memory has no place, and is what queries and keys are compared with"
    undecayed = ("memory",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        memory: int = 16,
        causal: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("memory", memory)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.causal = causal
        size = self.num_heads, memory, self.key_dim // self.num_heads
        self.memory = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws P from N(0, 1)."""
        nn.init.normal_(self.memory)

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        if self.causal:
            return self.mix_past(q, k, v, grid)
        queries = self.memory.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        packed = flash(queries, k, torch.cat([k, v], dim=-1), scale=self.scale)
        return flash(q, *packed.split([k.shape[-1], v.shape[-1]], dim=-1), scale=self.scale)

    def mix_past(self, q, k, v, grid):
        """`mix` of each position with what comes before it."""
        prefix, wide = grid.prefix_of(q.shape[2]), at_least_float32(v)
        with outside_autocast(v):
            shares = self.shares(k)
            place = torch.arange(q.shape[2], device=v.device).clamp(min=prefix - 1)  # prefix tokens see one another
            sums = shares.cumsum(dim=2).index_select(2, place)
            scores = attend_in_order(q.to(wide), k.to(wide), shares, prefix) / sums
            weights = (self.scale * scores).softmax(dim=-1) / sums
            return attend_in_order(weights, shares, v.to(wide), prefix).to(v.dtype)

    def shares(self, k: Float[Tensor, "B heads tokens d"]) -> Float[Tensor, "B heads tokens memory"]:
        """How much of each key goes into each token of a causal memory, in at least float32."""
        wide = at_least_float32(k)
        with outside_autocast(k):
            scores = self.scale * k.to(wide) @ self.memory.to(wide).transpose(-2, -1)
            return F.softplus(scores, beta=math.log(2), threshold=40).clamp(min=torch.finfo(wide).tiny ** 0.5)

    def weights(self, q, k, grid):
        scores = torch.einsum("nmd,bnjd->bnmj", self.memory.to(q.dtype), k) * self.scale
        if not self.causal:
            packs = scores.softmax(dim=-1)
            return (q @ (packs @ k).mT * self.scale).softmax(dim=-1) @ packs
        mask = Past().mask(grid, grid.prefix_of(q.shape[2]), q.device).to(q.dtype)
        packs = torch.log2(1 + torch.exp2(scores)).mT  # (B, heads, tokens, memory)
        sums = mask @ packs
        products = torch.einsum("bnid,bnjd->bnij", q, k) * mask
        to_memory = (products @ packs / sums * self.scale).softmax(dim=-1)
        return torch.einsum("bnim,bnjm->bnij", to_memory / sums, packs) * mask

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        if full:
            raise ValueError("full=True: the state is all that Luna knows of the past")
        shape, memory = (batch, self.num_heads), self.memory.shape[1]
        return State(self.shares, self.scale, shape, memory, *self.head_dims, **self.factory(device, dtype))

    def extra_repr(self):
        return f"{super().extra_repr()}, memory={self.memory.shape[1]}"


class State:
    """What causal Luna has packed of the past: sums of keys, values and shares for each token of the memory."""

    def __init__(self, shares, scale, shape, memory, key, value, **factory):
        self.shares, self.scale = shares, scale
        self.keys = Recurrence(same, same, *shape, key, memory, **factory)
        self.values = Recurrence(same, same, *shape, memory, value, **factory)
        self.sums = torch.zeros_like(self.keys.past[..., 0, :])

    @property
    def nbytes(self) -> int:
        """Memory of the state, in bytes."""
        return self.keys.nbytes + self.values.nbytes + self.sums.nbytes

    def step(
        self, q: Float[Tensor, "B heads dk"], k: Float[Tensor, "B heads dk"], v: Float[Tensor, "B heads dv"], place: int
    ) -> Float[Tensor, "B heads dv"]:
        """Takes in the next pixel, and returns what it draws from the past and itself."""
        shares = self.shares(k[:, :, None])[:, :, 0]
        self.sums = self.sums + shares
        scores = self.scale * self.keys.drawn(q, k, shares) / self.sums
        return self.values.drawn(scores.softmax(dim=-1) / self.sums, shares, v).to(v.dtype)


def same(t: Tensor) -> Tensor:
    """The feature map of what needs none."""
    return t
