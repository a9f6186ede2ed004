"""Spatial gating: learned matrices along rows and columns mix half of what a pixel says, and that gates the other half.

Liu et al. 2021, gMLP, https://arxiv.org/abs/2105.08050
    y = u ⊙ (W LayerNorm(v) + b)        [u, v] = GELU(x U)        W_{(y,x),(y',x')} = R_{y,y'} C_{x,x'}
Cost: N (H + W) d
Computed: 1 ×
The paper's W is an N×N matrix for one length of text, and b a number for each place of it. In two dimensions W is the
product of a matrix for the rows and one for the columns, learned for ``length`` pixels an axis. On any other number
each output is taken between two of those linearly, as b is, and each input is spread over the pixels that share its
part of the axis, so that sums stay. Weights do not depend on the image, may be negative and do not sum to 1.
``gated=False`` leaves out gate, GELU and LayerNorm: y = W v, the linear mixing of ResMLP. MLP-Mixer has two of those,
with a GELU between them.
Prefix tokens have no row or column: they take from all tokens alike, with b = 1, and positions do not take from them.
Deviations: the factoring over axes. R and C are of each head (the paper: W for all channels, ``num_heads=1``). R starts
near 0 and b at 1, so that the gate starts open, as in the paper, but C does not, or neither would learn at first. The
projection to u and v has the block's own width twice (the paper's hidden layer is six times as wide).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast
from ..resize import spread, stretch


class Block(Mixer):
    """Spatial gating unit.

    Args:
        length: axis length that R, C and b are learned for, an integer or (height, width).
        gated: whether what is mixed gates the other half; False: it is the output.
        Others: those of `Mixer`, but ``scale``, ``qk_norm``, ``key_dim`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False
    projects = "v"  # and the half that is gated
    not_causal = "a matrix for the columns that reaches right of a pixel in the rows above does so in its own row"
    undecayed = ("rows", "columns", "bias")

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        length: int | tuple[int, int] = 16,
        gated: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        scale: float | None = None,
        device=None,
        dtype=None,
        **mixer,
    ):
        self_length = check.pair("length", length)
        check.boolean("gated", gated)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "there is no q · k to scale")
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **dd, **mixer)
        self.length, self.gated = self_length, gated
        self.rows, self.columns = (nn.Parameter(torch.empty(self.num_heads, n, n, **dd)) for n in self.length)
        self.norm = self.bias = None
        if gated:
            self.widths = [dim, 0, dim]
            self.qkv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
            self.norm = nn.LayerNorm(dim, **dd)
            self.bias = nn.Parameter(torch.empty(self.num_heads, *self.length, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws R and C from N(0, 1 / length), R a hundred times smaller if it is to gate; b is 1."""
        for table, size in ((self.rows, 0.01 if self.gated else 1.0), (self.columns, 1.0)):
            nn.init.normal_(table, std=size * table.shape[-1] ** -0.5)
        if self.gated:
            nn.init.ones_(self.bias)

    def projected(self, x):
        if not self.gated:
            return super().projected(x)
        u, k, v = F.gelu(self.qkv(x)).split(self.widths, dim=-1)
        return u, k, self.norm(v)

    def forward(self, x, grid):
        u, k, v = self.heads(x, grid)
        out = self.mix(u, k, v, Grid.of(grid))
        if self.gated:
            with outside_autocast(x):
                out = (u * (out + self.open(Grid.of(grid), out))).to(u.dtype)
        return self.proj_drop(self.proj(rearrange(out, "B n t d -> B t (n d)")))

    def open(self, grid: Grid, like: Float[Tensor, "B heads tokens d"]) -> Float[Tensor, "heads tokens 1"]:
        """b of each token, 1 of prefix tokens, in at least float32."""
        factory = dict(device=like.device, dtype=at_least_float32(like))
        down, right = (stretch(old, new, **factory) for old, new in zip(self.length, grid))
        places = down @ self.bias.to(down.dtype) @ right.transpose(0, 1)
        prefix = grid.prefix_of(like.shape[2])
        return F.pad(places.flatten(1), (prefix, 0), value=1.0)[..., None]

    def mix(self, q, k, v, grid):
        wide = v.to(at_least_float32(v))
        first, pixels = grid.split(wide)
        with outside_autocast(v):
            down, right = (
                stretch(old, new, device=v.device, dtype=wide.dtype)
                @ table.to(wide.dtype)
                @ spread(old, new, device=v.device, dtype=wide.dtype)
                for table, old, new in zip((self.rows, self.columns), self.length, grid)
            )
            image = right[:, None] @ rearrange(pixels, "B n (H W) d -> B n H W d", H=grid.height)
            out = down @ rearrange(image, "B n H W d -> B n H (W d)")
            out = rearrange(out, "B n H (W d) -> B n (H W) d", W=grid.width)
            out = torch.cat([wide.mean(dim=2, keepdim=True).expand(first.shape), out], dim=2)
        return out.to(v.dtype)

    def weights(self, q, k, grid):
        prefix, tokens = grid.prefix_of(q.shape[2]), q.shape[2]
        rows, columns = (
            plain(table.to(at_least_float32(q)), size) for table, size in zip((self.rows, self.columns), grid)
        )
        weights = q.new_zeros(q.shape[0], self.num_heads, tokens, tokens)
        weights[:, :, :prefix] = 1 / tokens
        places = torch.einsum("nyr,nxc->nyxrc", rows, columns).flatten(3).flatten(1, 2)
        weights[:, :, prefix:, prefix:] = places.to(q.dtype)
        return weights

    def reference(self, x, grid):
        prefix, made = Grid.of(grid).prefix_of(x.shape[1]), self.qkv(x)
        if self.gated:
            made = made * (1 + torch.erf(made / 2**0.5)) / 2
            u, v = made.chunk(2, dim=-1)
            v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + self.norm.eps).sqrt()
            made = torch.cat([v * self.norm.weight + self.norm.bias, u], dim=-1)
        v, *u = rearrange(made, "B t (half n d) -> half B n t d", n=self.num_heads, d=self.dim // self.num_heads)
        out = self.weights(v, v, Grid.of(grid)) @ v
        if self.gated:
            places = F.interpolate(self.bias[None], size=tuple(grid), mode="bilinear").flatten(2)[0]
            out = u[0] * (out + torch.cat([places.new_ones(self.num_heads, prefix), places], dim=1)[..., None])
        return self.proj_drop(self.proj(rearrange(out, "B n t d -> B t (n d)")))

    def extra_repr(self):
        return f"{super().extra_repr()}, length={self.length}, gated={self.gated}"


def plain(table: Float[Tensor, "heads old old"], length: int) -> Float[Tensor, "heads length length"]:
    """A matrix of another size: its inputs spread in a loop, its outputs by torch's interpolation."""
    old = table.shape[-1]
    parts = table.new_zeros(old, length)
    for part in range(old):
        for place in range(length):
            begin, end = max(place, part * length / old), min(place + 1, (part + 1) * length / old)
            parts[part, place] = max(0, end - begin) * old / length
    return F.interpolate((table @ parts).mT, size=length, mode="linear", align_corners=False).mT
