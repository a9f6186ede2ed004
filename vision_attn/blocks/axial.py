"""Axial attention: along the columns, then along the rows, each with projections of its own.

Ho et al. 2019, Axial Transformer; Wang et al. 2020, Axial-DeepLab, https://arxiv.org/abs/1912.12180
    A_u = softmax over {v : col(v) = col(u)} of (q_u · k_v + q_u · r^q_{v-u} + k_v · r^k_{v-u}) d^-½, then over rows
Cost: 2 N (H + W) d
Computed: 1 ×
``mode="sequential"`` (height, then width, as in Axial-DeepLab): every pixel reaches every other. ``mode="sum"``: both
steps see the input and their outputs are added; one such layer reaches its row and column only.
``length`` adds the learned relative positions r of Axial-DeepLab, shared by the heads; they are learned for an axis
of that many pixels and resized linearly to any other.
Deviations: scores are scaled by d^-½ (Axial-DeepLab: BatchNorm over the scores, which mixes the images of a batch).
Positions act on queries and keys; its value term r^v is left out, so that the output stays weights @ v, as are its
BatchNorms of qkv and output; its queries and keys are half as wide (``key_dim``), and it has no ``proj``
(``out_proj=False``). Its code counts r^q the other way, by u - v. Ho et al. have no r. The sum is a reading of their
layer that common code has made usual.

>>> from vision_attn import Grid
>>> print(Column().draw(Grid(3, 5), 1, 3))
---#-
---@-
---#-
>>> print(Row().draw(Grid(3, 5), 1, 3))
-----
###@#
-----
"""

from typing import Literal

import torch
from einops import rearrange
from torch import nn

from .. import check
from ..engines.union import attend
from ..mixer import PatternMixer, Sequence
from ..pattern import Column, Row
from ..precision import at_least_float32


class Along(PatternMixer):
    """Attention along one axis, with relative positions if ``length`` is given."""

    undecayed = ("relative",)

    def __init__(self, axis, length, out_proj, dim, num_heads, *, device=None, dtype=None, **mixer):
        self.not_rotary = "relative positions are compared with queries and keys as they are" if length else ""
        super().__init__((Column(), Row())[axis], dim, num_heads, device=device, dtype=dtype, **mixer)
        self.axis, self.length = axis, length
        if not out_proj:
            self.proj = nn.Identity()
        size = (2, 2 * length - 1, self.key_dim // self.num_heads) if length else None  # r^q and r^k, by offset
        self.relative = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if length else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the relative positions from N(0, 1 / d)."""
        if self.relative is not None:
            nn.init.normal_(self.relative, std=self.relative.shape[-1] ** -0.5)

    def mix(self, q, k, v, grid):
        (keys,) = self.pattern.key_sets()
        bias = None if self.relative is None else self.scale * self.folded_bias(q, k, keys, grid)
        return attend(q, k, v, grid, self.pattern, scale=self.scale, dropout=self.dropout, bias=bias)

    def folded_bias(self, q, k, keys, grid):
        """q_i · r^q_{j-i} + k_j · r^k_{j-i} for each group, (B · heads, groups, L, L)."""
        prefix, length = grid.prefix_of(q.shape[2]), grid[self.axis]
        q, k = (
            keys.queries(rearrange(t[:, :, prefix:], "B n (H W) d -> (B n) H W d", H=grid.height, W=grid.width))
            for t in (q, k)
        )
        table = self.resized(length).to(q.dtype)  # (2, 2L - 1, d)
        place = torch.arange(length, device=q.device)
        from_q, from_k = table[:, place[None, :] - place[:, None] + length - 1].unbind()  # each (L, L, d)
        return torch.einsum("bgid,ijd->bgij", q, from_q) + torch.einsum("bgjd,ijd->bgij", k, from_k)

    def resized(self, length):
        """The table for an axis of ``length`` pixels, interpolated linearly, ends on ends, (2, 2 length - 1, d)."""
        wide = at_least_float32(self.relative)
        offset = torch.arange(2 * length - 1, device=self.relative.device, dtype=wide) - (length - 1)
        at = offset / offset.amax().clamp(min=1) * (self.length - 1) + self.length - 1
        hat = 1 - (at[:, None] - torch.arange(2 * self.length - 1, device=at.device)).abs()
        return hat.clamp(min=0).to(self.relative.dtype) @ self.relative

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        scores = q @ k.mT
        if self.relative is not None:
            scores[:, :, prefix:, prefix:] += self.plain_bias(q[:, :, prefix:], k[:, :, prefix:], grid)
        unseen = ~self.pattern.mask(grid, prefix, q.device)
        return (scores * self.scale).masked_fill(unseen, -torch.inf).softmax(dim=-1)

    def plain_bias(self, q, k, grid):
        """The position terms of every pair of pixels, (B, heads, N, N); those of unseen pairs mean nothing."""
        place = torch.arange(grid.size, device=q.device)
        place = (place // grid.width if self.axis == 0 else place % grid.width).double()
        stretch = (self.length - 1) / max(1, grid[self.axis] - 1)
        at = (place[None, :] - place[:, None]) * stretch + self.length - 1  # where in the table, a real number
        low = at.floor().long()
        high, part = (low + 1).clamp(max=2 * self.length - 2), (at - low)[..., None].to(q.dtype)
        from_q, from_k = (r[low] * (1 - part) + r[high] * part for r in self.relative)  # each (N, N, d)
        return (q[..., :, None, :] * from_q).sum(-1) + (k[..., None, :, :] * from_k).sum(-1)


class Block(Sequence):
    """Axial attention.

    Args:
        mode: "sequential" (height, then width) or "sum".
        length: axis length that relative positions are learned for, an integer or (height, width); None: no positions.
        out_proj: whether a projection, ``proj``, follows the heads of each step; without it, as in Axial-DeepLab,
            ``proj_bias`` has no effect.
        Others: those of `Mixer`; ``rotary`` without ``length``.
    """

    not_causal = "a causal column and a causal row never reach what is right of a pixel in the rows above"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        mode: Literal["sequential", "sum"] = "sequential",
        length: int | tuple[int, int] | None = None,
        out_proj: bool = True,
        **mixer,
    ):
        check.one_of("mode", mode, ("sequential", "sum"))
        lengths = (None, None) if length is None else check.pair("length", length)
        check.boolean("out_proj", out_proj)
        super().__init__(*(Along(axis, lengths[axis], out_proj, dim, num_heads, **mixer) for axis in (0, 1)))
        self.mode = mode

    def forward(self, x, grid):
        if self.mode == "sum":
            return sum(step(x, grid) for step in self.chain)
        return super().forward(x, grid)

    def attention(self, x, grid):
        if self.mode == "sum":
            return sum(step.attention(x, grid).mean(dim=1, keepdim=True) for step in self.chain) / 2
        return super().attention(x, grid)
