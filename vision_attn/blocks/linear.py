"""Linear attention: the softmax gives way to a product of feature maps, which is summed up once for all pixels.

Katharopoulos et al. 2020, Transformers are RNNs, https://arxiv.org/abs/2006.16236
    A_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j)    φ(x) = elu(x) + 1
Cost: 2 N (d / heads + 1) d
Computed: 1 ×
With ``causal=True`` the sums are over what comes before in raster order and the pixel itself: prefix sums in chunks
of 64, which adds 128 N d, and pixel by pixel a recurrent state of d² / heads + d numbers (``new_cache``, ``step``) that
does not grow with the image.
The order of positions does not matter otherwise; prefix tokens are ordinary and, if causal, come first of all.
Deviations: no ε in the quotient, whose divisor is a sum of positive numbers. Sums are taken in at least float32.
"""

import math

import torch

from .. import check
from ..engines.kernel import Recurrence, attend, attend_past, average, normalised, state, with_ones
from ..mixer import Mixer
from ..precision import at_least_float32
from ..traced import is_traced, is_transformed


def features(x):
    """elu + 1, in at least float32 and positive: exp, where torch's elu of -20 is -1."""
    x = x.to(at_least_float32(x)).contiguous()  # compiled, the gradient of another layout fails
    if not (is_traced() or is_transformed()):
        return Features.apply(x)
    return torch.where(x > 0, x + 1, x.masked_fill(x > 0, 0).exp().clamp(min=torch.finfo(x.dtype).tiny))


class Features(torch.autograd.Function):
    """`features` that keep their values φ alone, of which their slopes are a function."""

    @staticmethod
    def forward(x):
        return x.clamp(math.log(torch.finfo(x.dtype).tiny), 0).exp_().add_(x.relu())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, slope):
        return by_slope(slope, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        return by_slope(tangent, *ctx.saved_tensors)


def by_slope(t, phi):
    """``t`` times φ, where it is less than 1, or 1; 0 where φ has its least value, even of what is infinite there."""
    least = phi.masked_fill(phi > 1, 1) if torch.is_grad_enabled() else phi.clamp(max=1)  # clamp: slope 0 at φ = 1
    return torch.ops.aten.threshold_backward(t * least, phi, 2 * torch.finfo(phi.dtype).tiny)


def features_of_queries(q):
    """The same up to a factor for each query, which the quotient cancels, so that not all of them vanish."""
    q = q.to(at_least_float32(q)).contiguous()
    return features(q - q.detach().amax(dim=-1, keepdim=True).clamp(max=0))


class Block(Mixer):
    """Linear attention.

    Args:
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "features are of channels one by one, which a turn mixes"

    def __init__(self, dim, num_heads=None, *, causal: bool = False, attn_drop: float = 0.0, **mixer):
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(mixer.get("scale"), "no softmax depends on the scale of q · k")
        super().__init__(dim, num_heads, **mixer)
        self.causal = causal

    def mix(self, q, k, v, grid):
        phi_q, phi_k = features_of_queries(q), features(k)
        if not self.causal:
            return average(phi_q, phi_k, v)
        values = with_ones(v.to(at_least_float32(v)))
        (first_q, phi_q), (first_k, phi_k), (first, values) = (grid.split(t) for t in (phi_q, phi_k, values))
        out = attend_past(phi_q, phi_k, values, state(first_k, first))
        return normalised(torch.cat([attend(first_q, first_k, first), out], dim=2)).to(v.dtype)

    def weights(self, q, k, grid):
        products = torch.einsum(
            "bnid,bnjd->bnij", torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp())
        )
        if self.causal:
            prefix = grid.prefix_of(q.shape[2])
            place = torch.arange(q.shape[2], device=q.device).sub(prefix).clamp(min=-1)  # all prefix tokens come first
            products = products * (place[:, None] >= place[None, :])
        return products / products.sum(dim=-1, keepdim=True)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        if full:
            raise ValueError("full=True: the state is all that linear attention knows of the past")
        (key, value), factory = self.head_dims, self.factory(device, dtype)
        channels = key, value + 1
        return Recurrence(features_of_queries, features, batch, self.num_heads, *channels, **factory)
