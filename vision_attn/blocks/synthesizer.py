"""Synthesizer: each pixel makes its weights up from itself alone, or all share learned ones; nothing is compared.

Tay et al. 2021, Synthesizer, https://arxiv.org/abs/2005.00743
    A_{(y,x),(y',x')} = softmax_{y'} R_{(y,x)}(y') · softmax_{x'} C_{(y',x)}(x')
    dense: R_u = ReLU(q_u) W_R      random: R_u = the y-th row of a learned matrix      C_u likewise, from W_C and x
Cost: 2 N (H + W) d
Computed: 1 ×
The paper's weights are an N×N matrix of logits, made by a two-layer network of each token (dense), learned (random),
a learned product of two thin matrices (factorized) or a learned mixture. In two dimensions they are factored over
the axes: first along the row of each pixel, then along the column, so that every pixel reaches every other at the
cost of two axes. The logits are learned for ``length`` pixels an axis and resized linearly to any other. The first
layer of the network is the projection to queries; there are no keys.
With ``causal=True`` a pixel takes from whole rows above and from its own row up to itself, exactly all of the past.
Prefix tokens have no place to learn logits for: their score is 0, and they look at all tokens alike (causal: at one
another).
Deviations: the network's second layer has no bias. The paper's factorized dense form repeats and multiplies two short
logits; here it is the factoring over axes of every form. Mixtures are of dense and random logits; the paper's with
q · k, and its fixed random tables, are not offered.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .. import check
from ..mixer import Mixer
from ..precision import at_least_float32, scaled
from ..resize import stretch


class Block(Mixer):
    """Synthesizer.

    Args:
        form: "dense", "random", "factorized" (random of low rank) or "mixture" (of dense and random).
        length: axis length that logits are learned for, an integer or (height, width).
        rank: of the factorized matrices.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale``, ``qk_norm`` and ``attn_drop``, which it has no use for; nor has it for
            ``key_dim`` where nothing is dense.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        form: Literal["dense", "random", "factorized", "mixture"] = "dense",
        length: int | tuple[int, int] = 16,
        rank: int = 8,
        causal: bool = False,
        attn_drop: float = 0.0,
        scale: float | None = None,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.one_of("form", form, ("dense", "random", "factorized", "mixture"))
        check.positive_int("rank", rank)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "there is no q · k to scale")
        dd = dict(device=device, dtype=dtype)
        lengths = check.pair("length", length)
        self.projects = "qv" if form in ("dense", "mixture") else "v"
        super().__init__(dim, num_heads, **mixer, **dd)
        heads, width = self.num_heads, self.key_dim // self.num_heads
        self.form, self.causal = form, causal
        self.axes = nn.ModuleList(Logits(form, heads, width, size, rank, **dd) for size in lengths)

    def mix(self, q, k, v, grid):
        prefix = grid.prefix_of(v.shape[2])
        first = v[:, :, :prefix]
        q, image = (rearrange(t[:, :, prefix:], "B n (H W) d -> B n H W d", H=grid.height) for t in (q, v))
        wide = at_least_float32(v)
        across = self.axes[1](q, grid.width)  # (B, heads, H, W, W'), sizes 1 where the logits do not depend
        down = self.axes[0](q.transpose(2, 3), grid.height)  # (B, heads, W, H, H')
        rows = across.softmax(dim=-1, dtype=wide).to(v.dtype) @ image  # (B, heads, H, W, d)
        # scores of 0 for prefix tokens, in front
        down = F.pad(down, (prefix, 0))
        if self.causal:
            future = torch.ones(grid.height, prefix + grid.height, dtype=torch.bool, device=v.device).triu(prefix + 1)
            down = down.masked_fill(future, -torch.inf)
        down = down.softmax(dim=-1, dtype=wide).to(v.dtype)
        to_prefix, down = down.split([prefix, grid.height], dim=-1)
        if self.causal:
            future = torch.ones(grid.width, grid.width, dtype=torch.bool, device=v.device).triu(1)
            own = across.masked_fill(future, -torch.inf).softmax(dim=-1, dtype=wide).to(v.dtype) @ image
            share = down.diagonal(dim1=-2, dim2=-1)[..., None].transpose(-3, -2)  # of the own row, (…, H, W, 1)
            out = (down.tril(-1) @ rows.transpose(2, 3)).transpose(2, 3) + share * own
        else:
            out = (down @ rows.transpose(2, 3)).transpose(2, 3)
        if prefix == 0:
            return out.flatten(2, 3)
        out = out + (to_prefix @ first[:, :, None]).transpose(2, 3)
        seen = first if self.causal else v
        return torch.cat([seen.mean(dim=2, keepdim=True).expand(first.shape), out.flatten(2, 3)], dim=2)

    def weights(self, q, k, grid):
        prefix, (height, width) = grid.prefix_of(q.shape[2]), grid
        places, at = q[:, :, prefix:], torch.arange(max(grid), device=q.device)
        y, x = at[:height].repeat_interleave(width), at[:width].repeat(height)
        rows = self.axes[0].plain(places, height, y)  # (B, heads, N, H)
        columns = self.axes[1].plain(places, width, x)  # (B, heads, N, W)
        if self.causal:
            rows = rows.masked_fill(at[:height] > y[:, None], -torch.inf)
        rows = torch.cat([rows.new_zeros(*rows.shape[:3], prefix), rows], dim=-1).softmax(dim=-1)
        between = at[:height] * width + x[:, None]  # the pixel in row y' and the query's column, (N, H)
        in_row = columns.softmax(dim=-1)[:, :, between]  # (B, heads, N, H, W)
        if self.causal:
            past = columns.masked_fill(at[:width] > x[:, None], -torch.inf).softmax(dim=-1)
            own = (at[:height] == y[:, None])[..., None]
            in_row = torch.where(own, past[:, :, :, None], in_row)
        there = (rows[..., prefix:, None] * in_row).flatten(3)
        rest = torch.cat([rows[..., :prefix], there], dim=-1)
        alike = rest.new_zeros(*rest.shape[:2], prefix, rest.shape[-1])
        seen = prefix if self.causal else rest.shape[-1]
        alike[..., :seen] = 1 / max(1, seen)
        return torch.cat([alike, rest], dim=2)


class Logits(nn.Module):
    """Logits along one axis, learned for ``length`` pixels."""

    undecayed = ("table", "left", "right", "share")

    def __init__(self, form, heads, width, length, rank, device=None, dtype=None):
        super().__init__()
        self.form, self.length = form, length
        shapes = {"network": (heads, width, length), "table": (heads, length, length), "share": (2,)}
        shapes |= {"left": (heads, length, rank), "right": (heads, rank, length)}
        uses = {"dense": ("network",), "random": ("table",), "factorized": ("left", "right")}
        for name in uses.get(form, ("network", "table", "share")):
            setattr(self, name, nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all tables from N(0, 1 / fan in), and makes both parts of a mixture alike."""
        for name, table in self.named_parameters():
            nn.init.zeros_(table) if name == "share" else nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, q, length):
        """(B, heads, lines, length, length) for queries (B, heads, lines, length, d) on lines along the axis."""
        to_length = stretch(self.length, length, device=q.device, dtype=q.dtype)  # (length, self.length)
        from_length = to_length.transpose(0, 1)
        if self.form == "factorized":
            return ((to_length @ self.left.to(q.dtype)) @ (self.right.to(q.dtype) @ from_length))[:, None]
        parts = []
        if self.form != "random":
            parts.append(q.relu() @ (self.network.to(q.dtype) @ from_length)[:, None])
        if self.form != "dense":
            parts.append((to_length @ self.table.to(q.dtype) @ from_length)[:, None])
        if self.form != "mixture":
            return parts[0]
        shares = self.share.to(at_least_float32(q)).softmax(dim=0).split(1)
        return sum(scaled(part, share) for part, share in zip(parts, shares))

    def plain(self, q, length, place):
        """The same for queries (B, heads, N, d) at these places of the axis, by torch's interpolation."""

        def resized(table):
            return F.interpolate(table, size=length, mode="linear", align_corners=False)

        made, batch = {}, q.shape[0]
        if hasattr(self, "network"):
            made["dense"] = q.clamp(min=0) @ resized(self.network.to(q.dtype))
        if self.form == "factorized":
            table = self.left @ self.right
        elif hasattr(self, "table"):
            table = self.table
        if self.form != "dense":
            table = resized(resized(table.to(q.dtype)).mT).mT
            made["random"] = table[:, place].expand(batch, -1, -1, -1)
        if self.form != "mixture":
            return next(iter(made.values()))
        first, second = self.share.exp() / self.share.exp().sum()
        return first * made["dense"] + second * made["random"]
