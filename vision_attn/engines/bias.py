"""Attention with a bias that grows with a parameter, whose gradient takes one more flash call and no N×N matrix.

With scores s_ij + b_ij(z), slopes b'_ij = ∂b_ij/∂z ≥ 0, weights P, outputs o and their gradients g
    ∂L/∂z = Σ_ij P_ij b'_ij g_i · (v_j - o_i) = Σ_i exp(l'_i - l_i) g_i · (o'_i - o_i)
where l is the log-sum-exp of the scores, and o' and l' are output and log-sum-exp of a call with bias b + log b'.
Torch's own attention on a CPU keeps all weights where the gradient of its mask is asked for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..grid import Grid
from ..kept import kept
from ..key_set import KeySet
from ..precision import at_least_float32
from .flash import Before, Cpu, Cuda, Merged, mask_of, pieces


class Bias(NamedTuple):
    """What is added to the scores of a key set, half the least number where a key is hidden.

    Args:
        added: b, in at least float32 and differentiable.
        parameter: z, broadcast to the grid.
        steeper: gives b + log b', which is asked for in the backward alone.
    """

    added: Float[Tensor, "#b #groups #queries keys"]
    parameter: Float[Tensor, "#b #H #W"]
    steeper: Callable[[], Float[Tensor, "#b #groups #queries keys"]]

    def as_mask(self, dtype: torch.dtype) -> Float[Tensor, "#b #groups #queries keys"]:
        """What is added, in a type whose range may be smaller."""
        return _within(self.added, dtype)


def biased(
    kernel: type[Cpu] | type[Cuda],
    keys: KeySet,
    bias: Bias,
    grid: Grid,
    scale: float,
    q: Float[Tensor, "b H W d"],
    k: Float[Tensor, "b H W d"],
    v: Float[Tensor, "b H W d"],
    k_before: Float[Tensor, "b 1 P d"],
    v_before: Float[Tensor, "b 1 P d"],
) -> Float[Tensor, "b H W d"]:
    """Attention of the grid's positions over a key set, with a bias, and over P ≥ 0 keys that all see, without.

    The kernel is that of `flash.kernel_for`. Cost: that of a flash call and half a call more in the backward.
    """
    mask, unseen = kept(mask_of, keys, grid, kernel.mask_type(q.dtype), device=q.device)
    learned, tensors = (bias.steeper, bias.added.detach(), bias.parameter), (q, k, v, k_before, v_before)
    return Biased.apply(kernel, keys, mask, unseen, grid, scale, *learned, *tensors)[0]


class Biased(torch.autograd.Function):
    """`Merged` of a key set and of the keys that all see; bias and mask become one for a few images at a time."""

    @staticmethod
    def forward(kernel, keys, mask, hidden, grid, scale, steeper, added, z, *tensors):
        outs = []
        for *some, bias in pieces([keys], *tensors, _of_all(added, tensors[0])):
            masks = [_together(bias, mask, kernel, some[0]), None]
            outs.append(Merged.some(kernel, [keys, Before()], [0, 1], masks, [hidden, None], grid, scale, *some))
        return outs[0] if len(outs) == 1 else tuple(map(torch.cat, zip(*outs)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernel, ctx.keys, mask, hidden, ctx.grid, ctx.scale, ctx.steeper, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(mask, hidden, *tensors, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope, _):
        mask, hidden, added, z, *tensors, out, total = ctx.saved_tensors  # once: see `Merged`
        kernel, keys, scale, q, count = ctx.kernel, ctx.keys, ctx.scale, tensors[0], len(tensors)
        both = kernel, [keys, Before()], [0, 1]
        slopes = [torch.zeros(t.shape, dtype=at_least_float32(out), device=t.device) for t in tensors]
        of_z, learns = torch.zeros_like(total), ctx.needs_input_grad[8]
        biases = [_of_all(t, q) for t in (added, ctx.steeper() if learns else added)]
        of_all = slope.contiguous(), out, total, of_z, *slopes, *tensors, *biases
        for slope, out, total, part, *some, bias, steeper in pieces([keys], *of_all):
            masks, tensors = [_together(bias, mask, kernel, slope), None], some[count:]
            Merged.add_slopes(*both, masks, [hidden, None], scale, some[:count], tensors, slope, out, total)
            if learns:
                masks = [_together(steeper, mask, kernel, slope)]
                risen, more = Merged.some(kernel, [keys], [0], masks, [hidden], ctx.grid, scale, *tensors[:3])
                part += (more - total).exp() * (slope * (risen - out)).sum(dim=-1, keepdim=True)
        of_z = of_z[..., 0].sum_to_size(z.shape).to(z.dtype) if learns else None
        return *(None,) * 8, of_z, *(slope.to(q.dtype) for slope in slopes)


def _of_all(bias, q):
    return bias.expand(len(q), -1, -1, -1)


def _together(bias, mask, kernel, q):
    """What is added to the scores."""
    dtype = kernel.mask_type(q.dtype)
    return bias if mask is None and bias.dtype == dtype else _within(bias if mask is None else bias + mask, dtype)


def _within(bias, dtype):
    """In a type; what hides a key stays finite, for a query may see none."""
    return bias.clamp(min=torch.finfo(dtype).min / 2).to(dtype)
