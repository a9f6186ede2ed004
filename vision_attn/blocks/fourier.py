"""Fourier mixing: every pixel becomes a frequency of the whole image, the real part of its Fourier transform.

Lee-Thorp et al. 2021, FNet, https://arxiv.org/abs/2105.03824
    y = Re F_tokens(F_channels(x))        in two dimensions Re F_rows(F_columns(F_channels(v)))
Cost: 5/2 N d log2(N d / heads)
Computed: 1 ×
At row f, column g and channel c stands Σ cos 2π(f y/H + g x/W + c e/D) v_{(y,x),e} / √(H W D). Nothing is learned
in between, and nothing is bound to a size. The cost is that of a fast Fourier transform, 5 n log₂ n operations for n
numbers; in traced graphs matrices of cosines and sines along each axis take its place.
Sums are taken in at least float32. With more ``num_heads`` than one, channels are transformed head by head.
Prefix tokens have no place in the image: each becomes frequency 0 of all tokens, as the paper's class token, the
first of its line, does; positions do not take from them.
Deviations: transforms are divided by √n, so that they keep lengths (the code: not divided, outputs grow with √(N D),
which a LayerNorm behind takes out again). Projections before and after, in the place of a ViT's (the paper: none,
``projections=False``). Since channels are mixed, there is no matrix of weights; `attention` shows the moduli of the
complex ones, which are all alike.
"""

import math

import torch
from einops import rearrange
from torch import nn

from .. import check
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast
from ..traced import is_traced
from ..waves import turn, waves


class Block(Mixer):
    """Fourier mixing.

    Args:
        num_heads: groups of channels that are transformed on their own; one in the paper, and if None.
        projections: whether values are projected before, by ``qkv``, and after, by ``proj``; without them, as in the
            paper, nothing is learned and their biases have no effect.
        Others: those of `Mixer`, but ``scale``, ``qk_norm``, ``key_dim`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    projects = "v"
    not_causal = "every frequency is a sum over the whole image"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        projections: bool = True,
        attn_drop: float = 0.0,
        scale: float | None = None,
        **mixer,
    ):
        check.boolean("projections", projections)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "there is no q · k to scale")
        super().__init__(dim, 1 if num_heads is None else num_heads, **mixer)
        if not projections:
            self.qkv, self.proj = nn.Identity(), nn.Identity()

    @property
    def steps(self):
        return ()  # channels are mixed too: see `reference`

    def mix(self, q, k, v, grid):
        wide = v.to(at_least_float32(v))
        first, pixels = grid.split(wide)
        image = rearrange(pixels, "B n (H W) d -> B n H W d", H=grid.height)
        with outside_autocast(v):
            if is_traced():
                out = real_part_by_matrices(image)
            else:
                out = torch.fft.fftn(image, dim=(2, 3, 4), norm="ortho").real
            out = out.flatten(2, 3)
            if grid.prefix_of(v.shape[2]):
                ones = torch.ones_like(wide[:1, :1, :, :1]).sum(dim=2, keepdim=True)
                cosines, _ = waves(v.shape[3], device=v.device, dtype=wide.dtype)
                out = torch.cat([(wide.sum(dim=2, keepdim=True) / ones.sqrt() @ cosines).expand(first.shape), out], 2)
        return out.to(v.dtype)

    def attention(self, x, grid):
        """Moduli of the transform's weights, as shares: pixels take from all pixels alike, prefix tokens from all."""
        _, _, v = self.heads(x, grid)
        prefix = Grid.of(grid).prefix_of(x.shape[1])
        seen = v.new_ones(x.shape[0], 1, x.shape[1], x.shape[1])
        seen[:, :, prefix:, :prefix] = 0
        return seen / seen.sum(dim=-1, keepdim=True)

    def reference(self, x, grid):
        _, _, v = self.heads(x, grid)
        prefix, (height, width) = Grid.of(grid).prefix_of(x.shape[1]), grid
        channel, y, z = (torch.arange(n, dtype=torch.float64) for n in (v.shape[3], height, width))
        between = channel[:, None] * channel / len(channel)  # in turns, (e, c)
        sums = [(v, torch.zeros(v.shape[2]))] * prefix
        for f in range(height):
            for g in range(width):
                sums.append((v[:, :, prefix:], (f * y[:, None] / height + g * z / width).flatten()))
        rows = []
        for seen, turns in sums:
            real = torch.cos(2 * math.pi * (turns[:, None, None] + between)) / (len(turns) * len(channel)) ** 0.5
            rows.append(torch.einsum("bnje,jec->bnc", seen, real.to(v.dtype)))
        return self.proj_drop(self.proj(rearrange(torch.stack(rows), "t B n c -> B t (n c)")))


def real_part_by_matrices(image):
    """The real part of the transform of real maps (B, heads, H, W, d) over their last three axes."""
    height, width, channels = image.shape[2:]
    rows, columns, deep = (waves(n, device=image.device, dtype=image.dtype) for n in (height, width, channels))
    real, imaginary = turn(image @ deep[0], -image @ deep[1], *columns)
    real, imaginary = (rearrange(t, "B n H W d -> B n H (W d)") for t in (real, imaginary))
    out = rows[0] @ real + rows[1] @ imaginary
    return rearrange(out, "B n H (W d) -> B n H W d", d=channels)
