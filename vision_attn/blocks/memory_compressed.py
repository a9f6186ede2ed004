"""Memory-compressed attention: keys and values are convolved down with a stride, queries are not.

Liu et al. 2018, T-DMCA; Wang et al. 2021, PVT, https://arxiv.org/abs/1801.10198
    A_u = softmax over blocks c of q_u · k̄_c d^-½    k̄_c = Σ_{j in c} W_j k_j    v̄_c = Σ_{j in c} w_j v_j
Cost: 2 N² d / stride² + N d² / heads
Computed: 1.1 ×
Blocks are ``stride`` × ``stride`` pixels, which is also the kernel's size; those cut by the border are filled with
zeros. W is a full convolution of each head's keys. With ``causal=True`` a block is seen once it is complete, wholly
before the pixel or ending with it; before the first there is nothing to see, so a null key, which is learned and
worth nothing, stands beside them. The newest pixels are then left to other layers or heads, as in the paper, which
alternates with local attention. Prefix tokens are seen as they are; ``qk_norm`` comes before the convolution.
The paper compresses a line of text by 3; blocks of pixels are its reading in two dimensions, which PVT has too.
Deviations: values are convolved with one kernel w for all channels of a head, so that the output stays weights @ v (the
paper: a full convolution; mixing channels is left to the projections). The scale is that of a head's width (a
well-known reimplementation: of all heads together) and the null value is 0 (there: learned). PVT convolves the input,
over all channels, and norms it (LayerNorm) before keys and values are made of it; here neither.

>>> from vision_attn import Grid
>>> print(Complete((2, 3), past=True).draw(Grid(5, 8), 3, 5))
########
########
######--
#####@--
--------
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .. import check
from ..engines.by_rows import in_chunks
from ..engines.union import flash
from ..key_set import Tiles, rows_and_columns
from ..mixer import Mixer, warn_of_blind_spot
from ..pattern import Directed, complete
from ..precision import in_float32_where_slow

ROWS = 1024  # queries that share a mask


@dataclass(frozen=True)
class Complete(Directed):
    """All blocks of ``stride`` = (height, width) pixels or, with ``past``, those without a pixel to come."""

    stride: tuple[int, int]

    def allowed(self, qy, qx, ky, kx, grid):
        return complete(self.stride, qy, qx, ky, kx, grid) | (not self.past)


class Block(Mixer):
    """Memory-compressed attention.

    Args:
        stride: pixels in a block, an integer or (height, width).
        causal: only blocks without a pixel behind the query in raster order.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "keys are pooled over pixels at many places"
    averages = False
    undecayed = ("null",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        stride: int | tuple[int, int] = 3,
        causal: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        stride = check.pair("stride", stride)
        check.boolean("causal", causal)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        dd, heads, d = dict(device=device, dtype=dtype), self.num_heads, self.key_dim // self.num_heads
        self.stride, self.causal = stride, causal
        self.of_keys = nn.Parameter(torch.empty(heads * d, d, *stride, **dd))  # as a grouped convolution has them
        self.of_values = nn.Parameter(torch.empty(heads, *stride, **dd))
        self.null = nn.Parameter(torch.empty(heads, d, **dd)) if causal else None
        self.reset_parameters()
        self.pattern = Complete(stride, past=causal)
        warn_of_blind_spot(self)

    def reset_parameters(self) -> None:
        """Keys: N(0, 1 / fan in). Values: the mean of the block. The null key: 0."""
        nn.init.normal_(self.of_keys, std=self.of_keys[0].numel() ** -0.5)
        nn.init.constant_(self.of_values, 1 / self.of_values[0].numel())
        if self.null is not None:
            nn.init.zeros_(self.null)

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        prefix = grid.prefix_of(q.shape[2])
        keys, values = self.blocks(k[:, :, prefix:], grid), self.blocks(v[:, :, prefix:], grid)
        # (B, heads, blocks, p q, d)
        # not einops, for which a parameter is a type of its own, a reason to compile again
        kernels = self.of_keys.to(k.dtype).unflatten(0, (k.shape[1], -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        keys = keys.flatten(3) @ kernels  # (heads, stride² d, d)
        values = (self.of_values.to(v.dtype).flatten(1)[:, None, None] @ values)[..., 0, :]
        keys, values = [k[:, :, :prefix], keys], [v[:, :, :prefix], values]
        if self.causal:
            keys.insert(1, self.null.to(k.dtype)[:, None].expand(k.shape[0], -1, 1, -1))
            values.insert(1, torch.zeros_like(v[:, :, :1]))
        keys, values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        attend = partial(flash, dropout_p=self.dropout, scale=self.scale)
        if not self.causal:
            return attend(q, keys, values)
        last = self.last_pixels(grid, q.device)
        seen = torch.cat([torch.arange(-prefix, 1, device=q.device), last])  # prefix tokens, the null key, blocks

        def of_some(q, rows):
            return attend(q, keys, values, attn_mask=seen <= (rows - prefix).clamp(min=-1)[:, None])

        return in_chunks(of_some, q, ROWS)

    def blocks(self, t, grid):
        """Positions (B, heads, N, d) by block, (B, heads, blocks, pixels of a block, d), padded with zeros."""
        maps = grid.maps(t)
        return rearrange(Tiles(self.stride).queries(maps), "(B n) c s d -> B n c s d", n=t.shape[1])

    def last_pixels(self, grid, device):
        """Raster index of the last pixel of each block."""
        n = Tiles(self.stride).sizes(*grid)
        places = rows_and_columns(torch.arange(n["y"] * n["x"], device=device), n["x"])
        bottom, right = (((at + 1) * s).clamp(max=size) - 1 for at, s, size in zip(places, self.stride, grid))
        return bottom * grid.width + right

    def weights(self, q, k, grid):
        prefix, (height, width), (p, r) = grid.prefix_of(q.shape[2]), grid, self.stride
        down, right = -(-height // p), -(-width // r)
        y, x = (c.flatten() for c in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        at = (y // p * right + x // r).to(q.device)  # the block of each pixel
        of_block = at == torch.arange(down * right, device=q.device)[:, None]  # (blocks, N)
        spread = of_block * self.of_values.to(q.dtype)[:, y % p, x % r][:, None]  # (heads, blocks, N)
        image = F.pad(
            k[:, :, prefix:].mT.unflatten(3, grid).flatten(1, 2), (0, right * r - width, 0, down * p - height)
        )
        keys = F.conv2d(image, self.of_keys.to(q.dtype), stride=self.stride, groups=q.shape[1])
        keys = keys.flatten(2).unflatten(1, (q.shape[1], -1)).mT  # (B, heads, blocks, d)
        scores = [q @ k[:, :, :prefix].mT, q @ keys.mT]
        if self.causal:
            seen = self.pattern.mask(grid, prefix, q.device)[:, prefix:]  # (tokens, N)
            first = of_block.to(torch.uint8).argmax(dim=1)  # one pixel of each block stands for it
            scores[1] = scores[1].masked_fill(~seen[:, first], -torch.inf)
            null = torch.einsum("bnid,nd->bni", q, self.null.to(q.dtype))[..., None]
            null = torch.where(torch.arange(q.shape[2], device=q.device)[:, None] >= prefix, null, -torch.inf)
            scores.append(null)
        sizes = [score.shape[-1] for score in scores]
        weights = (torch.cat(scores, dim=-1) * self.scale).softmax(dim=-1).split(sizes, dim=-1)
        return torch.cat([weights[0], weights[1] @ spread], dim=-1)
