"""Random feature attention: a Gaussian of the distance between queries and keys, by sines and cosines drawn at random.

Peng et al. 2021, RFA, https://arxiv.org/abs/2103.02143
    A_i = Σ_j φ(q̂_i) · φ(k̂_j) v_j / Σ_j φ(q̂_i) · φ(k̂_j)    x̂ = x / ‖x‖
    φ(x) = M^-½ [sin(w_1 · x), …, sin(w_M · x), cos(w_1 · x), …, cos(w_M · x)]    w = σ ω
Cost: 6 N features d
Computed: 1 ×
E φ(q̂) · φ(k̂) = exp(-‖σ (q̂ - k̂)‖² / 2), which between unit vectors is a softmax over σ² q̂ · k̂. ω (M × d a head, M =
``features``) is normal: a buffer, saved with the weights, which `redraw` draws anew. σ, for each channel of each head,
is learned: at 1 the largest weight is but e² times the smallest.
The estimate may be negative, the less often the more features: 0.4 % of its values at M = 32, 0.04 % at 64. A sum of
weights is taken for at least 0.1, as in the authors' code; rows of ``weights`` then sum to less than 1, or below 0. It
is far above that over a whole image, unless all keys are alike and their one value is estimated badly; with
``causal=True`` it may be less for the first pixels. Everything is computed in at least float32.
With ``causal=True`` the sums are over what comes before in raster order and the pixel itself: prefix sums in chunks of
64, which adds 64 N (2 M heads + d), and pixel by pixel a recurrent state of 2 M (d / heads + 1) numbers a head. The
order of positions does not matter otherwise; prefix tokens are ordinary and, if causal, come first of all.
Deviations: the authors' code draws a pool of ω beforehand and takes one at random in each step of training, the same
in evaluation; here there is one, to be drawn anew between steps. Their gated form, whose past fades by a learned factor
at every position, is left out, and so is the other kernel of the paper, of arc-cosines.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines.kernel import Recurrence, attend, attend_in_order, with_ones
from ..mixer import Mixer
from ..pattern import Past
from ..precision import at_least_float32, outside_autocast

LEAST = 0.1  # sum of weights that is divided by


class Block(Mixer):
    """Random feature attention.

    Args:
        features: random directions of a head, M; each gives a sine and a cosine.
        init: σ at the start.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "sigma weighs channels one by one, which a turn mixes"
    averages = False
    undecayed = ("sigma",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        features: int = 64,
        init: float = 1.0,
        causal: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("features", features)
        check.positive("init", init)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(mixer.get("scale"), "sigma, which is learned, is the scale")
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        dd, heads, width = dict(device=device, dtype=dtype), self.num_heads, self.key_dim // self.num_heads
        self.features, self.init, self.causal = features, init, causal
        self.sigma = nn.Parameter(torch.empty(heads, width, **dd))
        self.register_buffer("omega", torch.empty(heads, features, width, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets σ to ``init`` and draws ω anew."""
        nn.init.constant_(self.sigma, self.init)
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws ω anew from N(0, 1), so that weights do not fit one draw.

        Call it between steps on each `Block` in ``model.modules()``, with generators of the same seed on all processes.
        What averages weights must copy ω; a state of `new_cache` is one draw's.
        """
        device = self.omega.device if generator is None else generator.device
        self.omega.copy_(torch.randn(self.omega.shape, generator=generator, device=device, dtype=torch.float32))

    def mix(self, q, k, v, grid):
        with outside_autocast(v):
            q, k, values = self.phi(q), self.phi(k), with_ones(v.to(at_least_float32(v)))
            prefix = grid.prefix_of(q.shape[2])
            out = attend_in_order(q, k, values, prefix) if self.causal else attend(q, k, values)
            return quotient(out).to(v.dtype)

    def phi(self, x: Float[Tensor, "B heads tokens d"]) -> Float[Tensor, "B heads tokens M"]:
        """φ(x̂), in at least float32."""
        x = x.to(at_least_float32(x))
        unit = x / (x.norm(dim=-1, keepdim=True) + 1e-3)  # the authors' ε
        directions = (self.omega.to(x.dtype) * self.sigma.to(x.dtype)[:, None]).transpose(-2, -1)
        turned = unit @ directions
        return torch.cat([turned.sin(), turned.cos()], dim=-1) * self.features**-0.5

    def phi_of_one(self, x: Float[Tensor, "B heads d"]) -> Float[Tensor, "B heads M"]:
        """`phi` of one position."""
        return self.phi(x[:, :, None])[:, :, 0]

    def weights(self, q, k, grid):
        w = self.sigma.to(q.dtype)[:, None] * self.omega.to(q.dtype)
        q, k = (x / ((x * x).sum(dim=-1, keepdim=True).sqrt() + 1e-3) for x in (q, k))
        of_q, of_k = (torch.einsum("bnid,nmd->bnim", x, w) for x in (q, k))
        products = torch.einsum("bnim,bnjm->bnij", of_q.sin(), of_k.sin())
        products = (products + torch.einsum("bnim,bnjm->bnij", of_q.cos(), of_k.cos())) / self.features
        if self.causal:
            products = products * Past().mask(grid, grid.prefix_of(q.shape[2]), q.device)
        return products / products.sum(dim=-1, keepdim=True).clamp(min=LEAST)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        if full:
            raise ValueError("full=True: the state is all that random feature attention knows of the past")
        channels, factory = (2 * self.features, self.dim // self.num_heads + 1), self.factory(device, dtype)
        return State(self.phi_of_one, self.phi_of_one, batch, self.num_heads, *channels, **factory)

    def extra_repr(self):
        return f"{super().extra_repr()}, features={self.features}"


class State(Recurrence):
    """The state of causal random feature attention."""

    def step(self, q, k, v, place):
        return quotient(self.drawn(q, k, with_ones(v.to(self.past.dtype)))).to(v.dtype)


def quotient(out: Float[Tensor, "... d_1"]) -> Float[Tensor, "... d"]:
    """The first channels divided by the last, the sum of the weights, or by ``LEAST`` if that is more."""
    return out[..., :-1] / out[..., -1:].clamp(min=LEAST)
