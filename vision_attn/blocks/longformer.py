"""Longformer: a window, dilated for some heads, and a few global tokens with projections of their own.

Beltagy et al. 2020, Longformer; Zhang et al. 2021, ViL, https://arxiv.org/abs/2004.05150
    A_u = softmax over {v : v in the window of u, dilated by head} ∪ {v : v global} of q_u · k_v d^-½
    A_g = softmax over all v of q'_g · k'_v d^-½, applied to v'_v, for g global
Cost: 2 N (k² + 2 tokens) d
Computed: 2.2 ×
Global are the prefix tokens of the host (ViL's reading for images: learned tokens) and the first ``tokens`` positions
in raster order, so that a map without prefix tokens has some and the pattern can be causal. What they look at goes
through queries, keys and values of their own. With ``causal=True`` all is cut to what comes before. With ``tokens=0``
prefix tokens alone are global; where there are none, the projections of their own get a gradient of 0.
Where they are few they look at the channels of all pixels as these are: for each head d multiply-adds in place of
d / heads, which are computed more, but no keys and values of all pixels.
Windows on a line of text become squares.
Deviations: scores of global keys, as seen by the others, use the common projections, as in the code. The second
projections start on their own (the paper: as copies of the first). ViL's global tokens have an output projection of
their own too.

>>> from vision_attn import Grid
>>> for pattern in Block(64, num_heads=2, kernel_size=3, dilation=(1, 2), tokens=2).pattern.by_head():
...     print(pattern.draw(Grid(5, 7), 2, 3), end="\\n\\n")
##-----
--###--
--#@#--
--###--
-------
<BLANKLINE>
##-#-#-
-------
-#-@-#-
-------
-#-#-#-
<BLANKLINE>
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .. import check
from ..engines.union import flash
from ..grid import Grid
from ..mixer import PatternMixer, softmax_over
from ..pattern import Global, Past, PerHead, Window
from ..traced import least


class Block(PatternMixer):
    """Window attention with dilation by head and global tokens of their own.

    Args:
        kernel_size: pixels in the window, one odd integer or (height, width).
        dilation: step between them for equal shares of the heads; None: (1, 2), or 1 for a single head.
        tokens: number of positions that see all and are seen by all, beside the prefix tokens; 0: these alone.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: fewer heads than dilations, or an argument out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        kernel_size: int | tuple[int, int] = 7,
        dilation: tuple[int, ...] | None = None,
        tokens: check.Count = 8,
        causal: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.count("tokens", tokens)
        check.boolean("causal", causal)
        check.positive_int("dim", dim)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        if num_heads is not None:
            check.positive_int("num_heads", num_heads)
        if dilation is None:
            dilation = (1, 2) if (num_heads or dim) > 1 else (1,)
        if (
            not isinstance(dilation, (tuple, list))
            or not dilation
            or not all(type(n) is int and n > 0 for n in dilation)
        ):
            raise ValueError(f"dilation={dilation!r}: must be a list of integers ≥ 1")
        windows = tuple(Window(radius, (step, step), past=causal) for step in dilation)
        pattern = PerHead(windows) if len(windows) > 1 else windows[0]
        if tokens:
            pattern = (pattern | Global(tokens)) & Past() if causal else pattern | Global(tokens)
        super().__init__(pattern, dim, num_heads, qkv_bias=qkv_bias, device=device, dtype=dtype, **mixer)
        self.tokens = tokens
        self.qkv_global = nn.Linear(dim, sum(self.widths), bias=qkv_bias, device=device, dtype=dtype)

    def forward(self, x, grid):
        grid = Grid.of(grid)
        q, k, v = self.heads(x, grid)
        out = self.mix(q, k, v, grid)
        if torch.onnx.is_in_onnx_export() and grid.prefix_of(x.shape[1]) + self.tokens == 0:
            return self.output(out)  # onnxruntime reshapes no tensor of nothing
        of_global = self.of_global(x, grid)
        rest = out.narrow(2, of_global.shape[2], out.shape[2] - of_global.shape[2])
        return self.output(torch.cat([of_global.to(out.dtype), rest], dim=2))

    def output(self, out):
        return self.proj_drop(self.proj(rearrange(out, "B n t d -> B t (n d)")))

    def of_global(self, x, grid):
        """What the global tokens take, by their own projections, (B, heads, P + tokens, d)."""
        prefix = grid.prefix_of(x.shape[1])
        count = prefix + least(self.tokens, grid.size)
        if self.asked_by_few(prefix):
            return self.through_weights(x, count)
        few = self.causal or prefix + self.tokens == 0
        x = x.narrow(1, 0, count) if few and self.rotary is None else x
        q, k, v = self.global_heads(x, grid)
        k, v = (t.narrow(2, 0, count) if few else t for t in (k, v))
        mask = self.past(prefix, count, x.device) if self.causal else None
        options = dict(attn_mask=mask, dropout_p=self.dropout, scale=self.scale)
        return flash(q.narrow(2, 0, count), k, v, **options)

    def asked_by_few(self, prefix):
        """Whether `through_weights` has less to multiply, and sees the weights: of a layer as it was made."""
        plain = type(self.qkv_global) is nn.Linear and isinstance(self.k_norm, nn.Identity) and self.rotary is None
        return plain and not self.dropout and not self.causal and 0 < self.num_heads * (prefix + self.tokens) < self.dim

    def through_weights(self, x, count):
        """What ``count`` global tokens take of all, without keys and values of all.

        q · W_k x = (W_kᵀ q) · x, and its part with the bias is the same for all x; Σ a W_v x = W_v Σ a x.
        """
        (w_q, w_k, w_v), bias = self.qkv_global.weight.split(self.widths), self.qkv_global.bias
        b_q, _, b_v = (None,) * 3 if bias is None else bias.split(self.widths)
        w_k, w_v = (rearrange(w, "(n d) C -> n d C", n=self.num_heads) for w in (w_k, w_v))
        q = rearrange(F.linear(x.narrow(1, 0, count), w_q, b_q), "B t (n d) -> B n t d", n=self.num_heads)
        asked = rearrange(q @ w_k, "B n t C -> B 1 (n t) C")
        seen = flash(asked, x[:, None], x[:, None], scale=self.scale)
        out = rearrange(seen, "B 1 (n t) C -> B n t C", n=self.num_heads) @ w_v.transpose(-2, -1)
        return out if b_v is None else out + rearrange(b_v, "(n d) -> n 1 d", n=self.num_heads)

    def global_heads(self, x, grid, place=None):
        parts = self.qkv_global(x).split(self.widths, dim=-1)
        q, k, v = (rearrange(part, "B t (n d) -> B n t d", n=self.num_heads) for part in parts)
        q, k = self.turned(self.q_norm(q), self.k_norm(k), grid, place)
        return q.to(v.dtype), k.to(v.dtype), v

    @staticmethod
    def past(prefix, count, device):
        """Which of the first ``count`` tokens see which: prefix tokens one another, others what is not behind them."""
        place = (torch.arange(count, device=device) - prefix).clamp(min=-1)
        return place <= place[:, None]

    def attention(self, x, grid):
        grid = Grid.of(grid)
        weights, prefix = super().attention(x, grid), grid.prefix_of(x.shape[1])
        count = prefix + min(self.tokens, x.shape[1] - prefix)
        q, k, _ = self.global_heads(x, grid)
        place = (torch.arange(x.shape[1], device=x.device) - prefix).clamp(min=-1)
        mask = (place <= place[:, None]) | (not self.causal)
        weights[:, :, :count] = softmax_over(mask[None], q, k, self.scale)[:, :, :count]
        return weights

    def reference(self, x, grid):
        """The whole block by its definition: `weights`, and the rows of global tokens one by one."""
        grid, (q, k, v) = Grid.of(grid), self.heads(x, grid)
        prefix, out = grid.prefix_of(x.shape[1]), self.weights(q, k, grid) @ v
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv_global(x).split(self.widths, -1)
        )
        q, k = self.turned(self.q_norm(q), self.k_norm(k), grid)
        for token in range(prefix + min(self.tokens, grid.size)):
            seen = max(prefix, token + 1) if self.causal else x.shape[1]
            row = (q[:, :, token, None] @ k[:, :, :seen].mT * self.scale).softmax(dim=-1) @ v[:, :, :seen]
            out = torch.cat([out[:, :, :token], row, out[:, :, token + 1 :]], dim=2)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        return WithGlobal(super().new_cache(batch, grid, full=full, device=device, dtype=dtype))

    def step(self, x, place, cache):
        out = cache.local.step(*self.heads_of_pixel(x, place, cache), place)
        if place < self.tokens:
            q, *entries = self.global_heads(x[:, None], cache.grid, place)
            cache.seen = [torch.cat(pair, dim=2) for pair in zip(cache.seen, entries)] if cache.seen else entries
            out = flash(q, *cache.seen, scale=self.scale)[:, :, 0]
        return self.proj_drop(self.proj(out.flatten(1)))


class WithGlobal:
    """The past of the windows, and the keys and values of the global tokens so far."""

    def __init__(self, local):
        self.local, self.seen, self.grid = local, [], local.grid

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return self.local.nbytes + sum(t.nbytes for t in self.seen)
