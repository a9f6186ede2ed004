"""Low-rank attention: each head has one learned query for all pixels, and so one weight for each pixel.

Mehta et al. 2019, LAMA, https://arxiv.org/abs/1912.00835
    a_h = softmax over t of tanh((Pᵀ c)_h · (Qᵀ x_t)_h)    y_h = Σ_t a_ht v_ht
Cost: 2 N d
Computed: 1 ×
cᵀ P Qᵀ x is bilinear in a global context c and a pixel x, with a matrix of low rank: that of a head is its number of
key channels (``key_dim=num_heads``: rank 1). c is learned, so Pᵀ c is a learned vector, `context`; Qᵀ x are the keys.
tanh keeps scores within ±1: no weight is more than e² times another.
The source pools a sentence into one vector a head. Here every pixel gets it, so the rows of the matrix are all equal;
with ``causal=True`` it is that of what comes before in raster order and the pixel itself, by prefix sums, and pixel by
pixel a state of d + heads numbers. The order of positions does not matter otherwise; prefix tokens are ordinary and, if
causal, come first of all.
``l2_norm=True`` scales the scores of a pixel to unit length over the heads, as the source does; they must be several.
Deviations: that is off by default, since it takes several heads and the scores of all of them are coupled by it. Values
are projected, and of heads (the source: all of x for every head, then a projection). The source's other context, the
mean of all x, is not offered.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines.kernel import Recurrence, normalised, state, with_ones
from ..mixer import Mixer
from ..pattern import Past
from ..precision import at_least_float32, outside_autocast


class Block(Mixer):
    """Low-rank attention.

    Args:
        l2_norm: scores of a pixel have unit length over the heads.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale``, ``qk_norm`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range, or one head with ``l2_norm``.
    """

    projects = "kv"
    undecayed = ("context",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        l2_norm: bool = False,
        causal: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.boolean("l2_norm", l2_norm)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(mixer.get("scale"), "the context has a length of its own")
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        if l2_norm and self.num_heads == 1:
            raise ValueError("l2_norm=True: needs num_heads > 1: the scores of one head would all be ±1")
        self.l2_norm, self.causal = l2_norm, causal
        self.context = nn.Parameter(
            torch.empty(self.num_heads, self.key_dim // self.num_heads, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the context anew: about unit scores for unit keys."""
        nn.init.normal_(self.context, std=self.scale)

    def scores(self, k: Float[Tensor, "B heads tokens d"]) -> Float[Tensor, "B heads tokens 1"]:
        """Of each pixel, in at least float32."""
        wide = at_least_float32(k)
        with outside_autocast(k):
            scores = (k.to(wide) @ self.context.to(wide)[:, :, None]).tanh()
        return F.normalize(scores, dim=1) if self.l2_norm else scores

    def mix(self, q, k, v, grid):
        scores = self.scores(k)
        if not self.causal:
            return state(scores.softmax(dim=2), v).to(v.dtype).expand_as(v)
        values = with_ones(v.to(scores.dtype))
        (first_k, k), (first, values) = (grid.split(t) for t in (scores.exp(), values))
        before = state(first_k, first)
        out = torch.cat([before.expand_as(first), before + (k * values).cumsum(dim=2)], dim=2)
        return normalised(out).to(v.dtype)

    def weights(self, q, k, grid):
        scores = torch.tanh(torch.einsum("nd,bnjd->bnj", self.context, k))
        if self.l2_norm:
            scores = scores / (scores * scores).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        rows = scores.exp()[:, :, None, :].expand(-1, -1, k.shape[2], -1)
        if self.causal:
            rows = rows * Past().mask(grid, grid.prefix_of(k.shape[2]), k.device)
        return rows / rows.sum(dim=-1, keepdim=True)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        if full:
            raise ValueError("full=True: the state is all that low-rank attention knows of the past")
        channels, factory = (1, self.dim // self.num_heads + 1), self.factory(device, dtype)
        return Recurrence(one_feature, self.feature_of_keys, batch, self.num_heads, *channels, **factory)

    def feature_of_keys(self, k: Float[Tensor, "B heads d"]) -> Float[Tensor, "B heads 1"]:
        """What a pixel weighs."""
        return self.scores(k[:, :, None]).exp()[:, :, 0]


def one_feature(q: Float[Tensor, "B heads d"]) -> Float[Tensor, "B heads 1"]:
    """Every query is the same."""
    return q.new_ones((*q.shape[:-1], 1))
