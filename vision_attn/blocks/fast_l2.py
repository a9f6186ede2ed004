"""Fast attention: queries and keys of unit length in place of a softmax, so that sums over pixels come first.

Hu et al. 2020, FANet, https://arxiv.org/abs/2007.03815
    y = 1/n q̂ (k̂ᵀ v)    x̂ = x / ‖x‖ over the channels of a head
Cost: 2 N d² / heads
Computed: 1 ×
Weights are the cosines of queries and keys: they may be negative, and do not sum to 1. ``mean=False`` leaves out 1/n,
the number of tokens, as the authors' code does: outputs then grow with the image, in float16 until they overflow.
With ``causal=True`` the sums, and n, are over what comes before in raster order and the pixel itself: prefix sums in
chunks of 64, which adds 128 N d, and pixel by pixel a recurrent state of d² / heads numbers. The order of positions
does not matter otherwise; prefix tokens are ordinary and, if causal, come first of all.
Deviations: heads (the source: one, with keys of 32 channels: ``num_heads=1, key_dim=32``). The BatchNorms behind the
projections, the LeakyReLU of values and of the output, and the residual are left to the host.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import check
from ..engines.kernel import Recurrence, attend, attend_past, state
from ..grid import Grid
from ..mixer import Mixer
from ..pattern import Past
from ..precision import at_least_float32


def unit(x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
    """``x`` at unit length, in at least float32; 0 stays 0."""
    return F.normalize(x.to(at_least_float32(x)), dim=-1)


class Block(Mixer):
    """Fast attention.

    Args:
        mean: divides by the number of tokens, as the paper does; False: does not, as its code.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False

    def __init__(
        self, dim, num_heads=None, *, mean: bool = True, causal: bool = False, attn_drop: float = 0.0, **mixer
    ):
        check.boolean("mean", mean)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(mixer.get("scale"), "queries and keys have unit length")
        super().__init__(dim, num_heads, **mixer)
        self.mean, self.causal = mean, causal

    def mix(self, q, k, v, grid):
        q, k, values = unit(q), unit(k), v.to(at_least_float32(v))
        tokens, prefix = q.shape[2], grid.prefix_of(q.shape[2])
        if self.causal:
            (first_q, q), (first_k, k), (first, values) = map(grid.split, (q, k, values))
            out = attend_past(q, k, values, state(first_k, first))
            out = torch.cat([attend(first_q, first_k, first), out], dim=2)
            seen = torch.arange(1, tokens + 1, device=v.device, dtype=out.dtype).clamp(min=prefix)[:, None]
        else:
            out, seen = attend(q, k, values), tokens
        return (out / seen if self.mean else out).to(v.dtype)

    def weights(self, q, k, grid):
        q, k = (x / (x * x).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12) for x in (q, k))
        cosines, seen = torch.einsum("bnid,bnjd->bnij", q, k), torch.ones_like(q[0, 0] @ q[0, 0].mT)
        if self.causal:
            seen = seen * Past().mask(grid, grid.prefix_of(q.shape[2]), q.device)
        return cosines * (seen / seen.sum(dim=-1, keepdim=True) if self.mean else seen)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        if full:
            raise ValueError("full=True: the state is all that fast attention knows of the past")
        shape = batch, self.num_heads, *self.head_dims
        return State(self.mean, *shape, grid=Grid.of(grid), **self.factory(device, dtype))


class State(Recurrence):
    """The state of causal fast attention, whose divisor is the number of pixels so far, or none."""

    def __init__(self, mean: bool, *shape: int, **options):
        super().__init__(unit, unit, *shape, **options)
        self.mean = mean

    def step(self, q, k, v, place):
        out = self.drawn(q, k, v)
        return (out / (place + 1) if self.mean else out).to(v.dtype)
