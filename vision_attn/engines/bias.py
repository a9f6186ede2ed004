"""Attention with a bias that grows with a parameter, whose gradient takes one more flash call and no N×N matrix.

With scores s_ij + b_ij(z), slopes b'_ij = ∂b_ij/∂z ≥ 0, weights P, outputs o and their gradients g
    ∂L/∂z = Σ_ij P_ij b'_ij g_i · (v_j - o_i) = Σ_i exp(l'_i - l_i) g_i · (o'_i - o_i)
where l is the log-sum-exp of the scores, and o' and l' are output and log-sum-exp of a call with bias b + log b'.
Torch's own attention on a CPU keeps all weights where the gradient of its mask is asked for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .flash import Cpu, Cuda

AT_ONCE = 2**20  # numbers of a bias that is added to a mask


class Bias(NamedTuple):
    """What is added to scores, least numbers where a key is hidden.

    Args:
        added: b, in at least float32 and differentiable.
        parameter: z, broadcast to queries.
        steeper: gives b + log b', which is asked for in the backward alone.
    """

    added: Float[Tensor, "#b #groups #queries keys"]
    parameter: Float[Tensor, "#b #groups #queries"]
    steeper: Callable[[], Float[Tensor, "#b #groups #queries keys"]]

    def with_prefix(self, prefix: int) -> "Bias":
        """The same behind keys that all see."""
        least = torch.finfo(self.added.dtype).min / 2
        added = F.pad(self.added, (prefix, 0))
        return Bias(added, self.parameter, lambda: F.pad(self.steeper(), (prefix, 0), value=least))


def biased(
    kernel: type[Cpu] | type[Cuda],
    q: Float[Tensor, "b groups queries d"],
    k: Float[Tensor, "b groups keys d"],
    v: Float[Tensor, "b groups keys d"],
    bias: Bias,
    mask: Float[Tensor, "#b #groups #queries keys"] | None,
    scale: float,
) -> Float[Tensor, "b groups queries d"]:
    """softmax(scale · q kᵀ + bias + mask) v, by a kernel that tells the log-sum-exp (`flash.kernel_for`)."""
    return Biased.apply(kernel, scale, bias.steeper, mask, bias.added.detach(), q, k, v, bias.parameter)[0]


class Biased(torch.autograd.Function):
    """A few images at a time where a mask is added to the bias, which is larger than both."""

    @staticmethod
    def forward(kernel, scale, steeper, mask, added, q, k, v, z):
        out, total = Biased.called(kernel, scale, added, mask, q, k, v)
        return out.to(v.dtype), total

    @staticmethod
    def called(kernel, scale, added, mask, *tensors):
        """Output and log-sum-exp."""
        parts = [
            kernel.forward(*some, both, False, scale) for both, *some in Biased.pieces(kernel, added, mask, *tensors)
        ]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))

    @staticmethod
    def pieces(kernel, added, mask, *tensors):
        """Bias and mask in one, with the tensors, along b."""
        dtype = kernel.mask_type(tensors[0].dtype)
        if mask is None:
            yield added.to(dtype), *tensors
            return
        b, least = len(tensors[0]), torch.finfo(dtype).min / 2
        size = max(1, AT_ONCE // torch.broadcast_shapes(added[:1].shape, mask[:1].shape).numel())
        of_b = [t.expand(b, -1, -1, -1) for t in (added, mask)]
        for added, mask, *some in zip(*(t.split(size) for t in (*of_b, *tensors))):
            yield (added + mask).clamp(min=least).to(dtype), *some

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernel, ctx.scale, ctx.steeper, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope, _):
        mask, added, q, k, v, z, out, total = ctx.saved_tensors
        parts = [
            ctx.kernel.backward(*some, total, both, False, ctx.scale)
            for both, *some, total in Biased.pieces(ctx.kernel, added, mask, slope.contiguous(), q, k, v, out, total)
        ]
        slopes = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
        of_z = None
        if ctx.needs_input_grad[-1]:
            risen, more = Biased.called(ctx.kernel, ctx.scale, ctx.steeper(), mask, q, k, v)
            of_z = (more - total).exp() * (slope * (risen - out)).sum(dim=-1, dtype=total.dtype)
            of_z = of_z.sum_to_size(z.shape).to(z.dtype)
        return *(None,) * 5, *(s.to(q.dtype) for s in slopes), of_z
