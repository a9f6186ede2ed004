"""Performer: softmax attention by positive orthogonal random features, summed up once for all pixels.

Choromanski et al. 2021, Performer, https://arxiv.org/abs/2009.14794
    A_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j)
    φ(x) = M^-½ exp(ω x̂ - ‖x̂‖² / 2)    x̂ = x d^-¼    so that E φ(q) · φ(k) = exp(q · k d^-½)
Cost: 4 N M d
Computed: 1 ×
A head of d channels has M = d ln d features. ω (M × d) is normal, and orthogonal in blocks of d rows, which makes the
error smaller; it is a buffer that all heads share, saved with the weights, and `redraw` draws it anew. The larger the
scores, the more features they take: at scores of several units the estimate is rough.
With ``causal=True`` the sums are over what comes before in raster order and the pixel itself: prefix sums in chunks
of 64, which adds 64 N (M heads + d), and pixel by pixel a recurrent state that does not grow with the image. The order
of positions does not matter otherwise; prefix tokens are ordinary and, if causal, come first of all.
What keeps exp in range cancels in the quotient. For all pixels it is a softmax over positions for every feature, and
one over features for every query, right at any scale. A causal one can't use what the authors' code subtracts, the
largest exponent of all keys, which tells the past of the future. But ω k̂ - ‖k̂‖² / 2 ≤ ‖ω‖² / 2 whatever the key, and
seldom near it: sums need nothing but that exponents stop at ±59 in float32. A past of nothing but keys with ‖k̂‖² well
over 118, whose features the authors' code loses in its ε, is then averaged.
Deviations: no ε is added to the features, which the paper's code does. Exponents are taken in at least float32. ω is
drawn from torch's generator when the block is made. The QR factor is made uniform, which the code's is not.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines.kernel import Recurrence, attend, attend_past, normalised, state, with_ones
from ..grid import Grid
from ..mixer import Mixer
from ..pattern import Past
from ..precision import at_least_float32, outside_autocast


class Block(Mixer):
    """Performer.

    Args:
        features: random features of a head, M. None: d ln d for d channels, at least 16.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        features: int | None = None,
        causal: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        width = self.key_dim // self.num_heads
        features = max(16, round(width * math.log(width))) if features is None else features
        check.positive_int("features", features)
        self.causal = causal
        self.register_buffer("omega", torch.empty(features, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ω anew."""
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws ω anew, which the paper does now and then in training, so that weights do not fit one draw.

        Call it between steps, every thousand or so, on each `Block` in ``model.modules()``, with generators of the
        same seed on all processes. What averages weights must copy ω; a state of `new_cache` is one draw's.
        """
        features, width = self.omega.shape
        device = self.omega.device if generator is None else generator.device
        dd = dict(device=device, dtype=at_least_float32(self.omega))
        blocks = range(0, features, width)
        rows = [nn.init.orthogonal_(torch.empty(width, width, **dd), generator=generator) for _ in blocks]
        lengths = torch.randn(features, width, generator=generator, **dd).norm(dim=1, keepdim=True)
        self.omega.copy_(torch.cat(rows)[:features] * lengths)

    def mix(self, q, k, v, grid):
        with outside_autocast(q):
            if self.causal:
                return self.mix_past(q, k, v, grid)
            of_keys = self.exponents(k)
            largest = of_keys.detach().amax(dim=-2, keepdim=True)  # of a feature over all positions, as the sum
            of_keys = (of_keys - largest).exp()
            total = of_keys.sum(dim=-2, keepdim=True)
            of_queries = (self.exponents(q) + (largest + total.log())).softmax(dim=-1)
            return (of_queries @ (state(of_keys, v) / total.transpose(-2, -1))).to(v.dtype)

    def mix_past(self, q, k, v, grid):
        """`mix` of each position with what comes before it."""
        parts = self.features_of_queries(q), self.features_of_keys(k), with_ones(v.to(at_least_float32(v)))
        (first_q, q), (first_k, k), (first, values) = (grid.split(t) for t in parts)
        out = attend_past(q, k, values, state(first_k, first))
        return normalised(torch.cat([attend(first_q, first_k, first), out], dim=2)).to(v.dtype)

    def exponents(self, x: Float[Tensor, "B heads *tokens d"]) -> Float[Tensor, "B heads *tokens features"]:
        """ω x̂ - ‖x̂‖² / 2, in at least float32."""
        x = x.to(at_least_float32(x)) * self.scale**0.5
        return x @ self.omega.to(x.dtype).transpose(-2, -1) - x.square().sum(dim=-1, keepdim=True) / 2

    def features_of_queries(self, q):
        """φ up to a factor for each query, which the quotient cancels."""
        exponents = self.exponents(q)
        return (exponents - exponents.detach().amax(dim=-1, keepdim=True)).exp()

    def features_of_keys(self, k):
        """φ, neither too large nor too small for a sum over positions and a quotient."""
        exponents = self.exponents(k)
        reach = math.log(torch.finfo(exponents.dtype).max) * 2 / 3
        return exponents.clamp(-reach, reach).exp()

    def weights(self, q, k, grid):
        def log_phi(x):
            x = x.double() * self.scale**0.5
            norm = (x * x).sum(dim=-1, keepdim=True)
            return torch.einsum("bnid,md->bnim", x, self.omega.double()) - norm / 2

        of_q, of_k = log_phi(q), log_phi(k)
        # what all keys of a row share, and M^-½, cancel in the quotient
        of_q, of_k = of_q - of_q.amax(dim=3, keepdim=True), of_k - of_k.amax(dim=(2, 3), keepdim=True)
        products = torch.einsum("bnim,bnjm->bnij", of_q.exp(), of_k.exp())
        if self.causal:
            products = products * Past().mask(grid, grid.prefix_of(q.shape[2]), q.device)
        return (products / products.sum(dim=-1, keepdim=True)).to(q.dtype)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        if full:
            raise ValueError("full=True: the state is all that a Performer knows of the past")
        channels = len(self.omega), self.dim // self.num_heads + 1
        of, options = (self.features_of_queries, self.features_of_keys), self.factory(device, dtype)
        return Recurrence(*of, batch, self.num_heads, *channels, grid=Grid.of(grid), **options)

    def extra_repr(self):
        return f"{super().extra_repr()}, features={len(self.omega)}"
