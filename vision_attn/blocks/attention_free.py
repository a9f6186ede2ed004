"""Attention-free mixing: each pixel is weighted by what it says of itself and by how far away it is, and gated.

Zhai et al. 2021, AFT, https://arxiv.org/abs/2105.14103
    y_i = σ(q_i) ⊙ Σ_j softmax_j(k_j + w_{j-i}) v_j        w = 0 outside the window, not -∞
Cost: N k² (d + heads)
Computed: 1 ×
This is AFT-conv: k_j is one number a head, and w is learned for the steps of a window of k × k pixels. So one sum over
all pixels serves all, and what is left is a convolution:
    Σ_j exp(k_j + w_{j-i}) v_j = Σ_j exp(k_j) v_j + Σ_{j in the window of i} (exp(w_{j-i}) - 1) exp(k_j) v_j
and without v for the divisor. Every pixel sees every other; the window says how much more or less it sees those near.
With ``causal=True`` the first sum is a running one, over what comes before in raster order and the pixel itself, and
the window ends there; pixel by pixel that is d / heads + 1 sums a head and the rows that the window reaches.
Prefix tokens have no distance: their w is 0; if causal, they come first of all. Sums are taken in at least float32.
Deviations: keys are held within ±30, where their exponentials can be summed as they are (the paper subtracts the
largest, which looks ahead). w starts from N(0, 0.02²) and is used as it is. Where w is far below 0, a window is taken
out of a sum that it is part of: below -10 that rounds visibly in float32. The paper's other forms, with a key for each
channel and without distances (simple) or with a table of N×N of them (full, local), are not offered.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines.kernel import normalised, with_ones
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast
from ..traced import fixed

MOST = 30.0  # of a key; also exp(2 · 30) summed over a thousand rows of a thousand is a float32


class Block(Mixer):
    """AFT-conv.

    Args:
        kernel_size: pixels of the window, one odd integer or (height, width).
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale``, ``qk_norm``, ``key_dim`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    projects = "v"  # and the gate q and the numbers k, which are not compared
    undecayed = ("near",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        kernel_size: int | tuple[int, int] = 11,
        causal: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        scale: float | None = None,
        device=None,
        dtype=None,
        **mixer,
    ):
        window = check.odd_pair("kernel_size", kernel_size)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "there is no q · k to scale")
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **dd, **mixer)
        self.widths = [dim, self.num_heads, dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias, **dd)
        self.causal, self.window = causal, window
        self.near = nn.Parameter(torch.empty(self.num_heads, *window, **dd))  # w
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws w from N(0, 0.02²)."""
        nn.init.normal_(self.near, std=0.02)

    def forward(self, x, grid):
        q, k, v = self.heads(x, grid)
        out = q.sigmoid() * self.mix(q, k, v, Grid.of(grid))
        return self.proj_drop(self.proj(rearrange(out, "B n t d -> B t (n d)")))

    def mix(self, q, k, v, grid):
        """Before the gate. Of keys with several channels, which the block itself does not make, their sum counts."""
        prefix = grid.prefix_of(v.shape[2])
        with outside_autocast(v):
            weighted = self.weighted(k, v)  # (B, heads, tokens, d + 1)
            if self.causal:
                place = torch.arange(v.shape[2], device=v.device).clamp(min=prefix - 1)  # prefix tokens see one another
                seen = weighted.cumsum(dim=2).index_select(2, place)
            else:
                seen = weighted.sum(dim=2, keepdim=True)
            first, pixels = grid.split(weighted)
            image = rearrange(pixels, "B n (H W) d -> B H W (n d)", H=grid.height)
            (down, right), channels = (size // 2 for size in self.window), fixed(weighted.shape[3])
            image = F.pad(image, (0, 0, right, right, down, 0 if self.causal else down)).permute(0, 3, 1, 2)
            near = self.more(weighted.dtype)[:, None].expand(-1, channels, -1, -1)
            near = near.reshape(self.num_heads * channels, 1, -1, self.window[1])
            more = F.conv2d(image, near, groups=self.num_heads * channels)
            more = rearrange(more, "B (n d) H W -> B n (H W) d", n=self.num_heads)
            return normalised(seen + torch.cat([torch.zeros_like(first), more], dim=2)).to(v.dtype)

    def weighted(
        self, k: Float[Tensor, "B heads tokens dk"], v: Float[Tensor, "B heads tokens d"]
    ) -> Float[Tensor, "B heads tokens d_1"]:
        """exp(k) v and exp(k), in at least float32."""
        wide = at_least_float32(v)
        return k.to(wide).sum(dim=-1, keepdim=True).clamp(-MOST, MOST).exp() * with_ones(v.to(wide))

    def more(self, dtype) -> Float[Tensor, "heads height width"]:
        """exp(w) - 1; if causal, of the rows that are not below, and 0 ahead."""
        more = self.near.to(dtype).exp() - 1
        if not self.causal:
            return more
        height, width = self.window
        seen = torch.arange(height * width, device=more.device).reshape(height, width) <= height * width // 2
        return (more * seen).narrow(1, 0, height // 2 + 1)

    def weights(self, q, k, grid):
        prefix, width = grid.prefix_of(q.shape[2]), grid[1]
        place = torch.arange(q.shape[2], device=q.device) - prefix
        down, right = (size // 2 for size in self.window)
        dy, dx = (t[None, :] - t[:, None] for t in (place // width, place % width))
        inside = (dy.abs() <= down) & (dx.abs() <= right) & (place >= 0) & (place[:, None] >= 0)
        near = self.near.to(q.dtype)[:, (dy + down).clamp(0, 2 * down), (dx + right).clamp(0, 2 * right)]
        scores = k.sum(dim=-1)[:, :, None].clamp(-MOST, MOST) + near * inside
        if self.causal:
            place = place.clamp(min=-1)  # prefix tokens come first of all
            scores = scores.masked_fill(place > place[:, None], -torch.inf)
        return scores.softmax(dim=-1)

    def reference(self, x, grid):
        q, k, v = self.heads(x, grid)
        gated = self.weights(q, k, Grid.of(grid)) @ v / (1 + (-q).exp())
        return self.proj_drop(self.proj(rearrange(gated, "B n t d -> B t (n d)")))

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if full or not self.causal:
            return super().new_cache(batch, grid, full=full, device=device, dtype=dtype)
        return State(self, batch, Grid.of(grid), **self.factory(device, dtype))

    def step(self, x, place, cache):
        q, k, v = (t[:, :, 0] for t in self.heads(x[:, None], Grid(1, 1)))
        return self.proj_drop(self.proj((q.sigmoid() * cache.step(q, k, v, place)).flatten(1)))


class State:
    """What causal AFT keeps of the past: its sums, and the rows that the window reaches, columns of zeros beside."""

    def __init__(self, block: Block, batch: int, grid: Grid, device=None, dtype=None):
        wide = torch.promote_types(dtype, torch.float32)
        self.weighted, self.width = block.weighted, grid.width
        self.more = block.more(wide).to(device)[..., None]  # (heads, rows, width, 1)
        heads, rows, columns, _ = self.more.shape
        channels = block.dim // heads + 1
        self.rows = torch.zeros(batch, heads, rows, grid.width + columns - 1, channels, device=device, dtype=wide)
        self.sums = torch.zeros(batch, heads, channels, device=device, dtype=wide)

    @property
    def nbytes(self) -> int:
        """Memory of the state, in bytes."""
        return self.rows.nbytes + self.sums.nbytes

    def step(
        self, q: Float[Tensor, "B heads d"], k: Float[Tensor, "B heads 1"], v: Float[Tensor, "B heads d"], place: int
    ) -> Float[Tensor, "B heads d"]:
        """Takes in the next pixel, and returns what it draws from the past and itself, before its gate."""
        x, columns = place % self.width, self.more.shape[2]
        if x == 0:
            self.rows = F.pad(self.rows[:, :, 1:], (0, 0, 0, 0, 0, 1))  # a new row
        new = self.weighted(k[:, :, None], v[:, :, None])[:, :, 0].to(self.sums.dtype)
        self.sums = self.sums + new
        self.rows[:, :, -1, x + columns // 2] = new
        near = (self.more * self.rows[:, :, :, x : x + columns]).sum(dim=(2, 3))
        return normalised(self.sums + near).to(v.dtype)
