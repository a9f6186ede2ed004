"""Linformer: keys and values are projected down to a few, whatever the number of pixels.

Wang et al. 2020, Linformer, https://arxiv.org/abs/2006.04768
    y = softmax(q (E k)ᵀ d^-½) (F v)    E, F: k × N
Cost: 2 N (rank² + rank) d
Computed: 1 ×
The paper's E and F belong to one length of text. In two dimensions they are products of a matrix for the rows and one
for the columns, k = k_H k_W (``rank`` each), learned for ``length`` pixels an axis. On any other number of pixels each
entry is spread over the pixels that share its part of the axis, so that sums stay; one grid's weights serve every grid.
``sharing`` is the paper's: "none", "headwise" (one E and one F for all heads) or "key_value" (also E = F; sharing over
layers is the host's). ``projection="mean"`` is its pooling variant: means over k_H × k_W equal parts of the image, with
nothing to learn.
Prefix tokens are not projected: they stand beside the projected keys.
Deviations: the factoring over axes. The authors' code projects the input down and makes keys and values of that, so
that their biases are added once; here E and F sum them. Rows of ``weights``, softmax times F, sum to 1 for means only,
as in the paper.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import nn

from .. import check
from ..engines.union import flash
from ..mixer import Mixer
from ..precision import at_least_float32, in_float32_where_slow, outside_autocast
from ..resize import spread


class Block(Mixer):
    """Linformer.

    Args:
        rank: projected keys, an integer or (height, width); their product is the paper's k.
        length: axis length that E and F are learned for, an integer or (height, width).
        sharing: "none", "headwise" or "key_value".
        projection: "learned" or "mean".
            ``length`` and ``sharing`` are of the learned one alone.
        Others: those of `Mixer`, but ``attn_drop``, which could drop no pixel: F spreads the weights over all of them.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False
    not_causal = "each projected key is a mixture of all pixels, so no mask over them hides the future"
    not_rotary = "keys are mixed over pixels at many places"
    undecayed = ("rows", "columns")

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        rank: int | tuple[int, int] = 8,
        length: int | tuple[int, int] = 16,
        sharing: Literal["none", "headwise", "key_value"] = "headwise",
        projection: Literal["learned", "mean"] = "learned",
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        self_rank, self_length = check.pair("rank", rank), check.pair("length", length)
        check.one_of("sharing", sharing, ("none", "headwise", "key_value"))
        check.one_of("projection", projection, ("learned", "mean"))
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.rank, self.length = self_rank, self_length
        self.averages = projection == "mean"
        self.rows = self.columns = None
        if projection == "learned":
            sets, heads = 1 if sharing == "key_value" else 2, self.num_heads if sharing == "none" else 1
            shapes = [(sets, heads, rank, length) for rank, length in zip(self.rank, self.length)]
            self.rows, self.columns = (nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in shapes)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws E and F from N(0, 1 / length) along each axis."""
        for table in (self.rows, self.columns):
            if table is not None:
                nn.init.normal_(table, std=table.shape[-1] ** -0.5)

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        prefix = grid.prefix_of(q.shape[2])
        wide = at_least_float32(v)
        with outside_autocast(v):
            (down_k, down_v), (right_k, right_v) = (self.projections(axis, grid, q.device, wide) for axis in (0, 1))
            k, v = (
                torch.cat([t[:, :, :prefix], project(t[:, :, prefix:].to(wide), grid, down, right).to(t.dtype)], dim=2)
                for t, down, right in ((k, down_k, right_k), (v, down_v, right_v))
            )
        return flash(q, k, v, scale=self.scale)

    def projections(self, axis, grid, device, dtype):
        """Of keys and of values along an axis, each (heads or 1, rank, axis length)."""
        length, rank, table = grid[axis], self.rank[axis], (self.rows, self.columns)[axis]
        if table is None:
            return spread(rank, length, device=device, dtype=dtype).expand(2, 1, rank, length).unbind()
        resized = table.to(dtype) @ spread(self.length[axis], length, device=device, dtype=dtype)
        return resized.expand(2, -1, -1, -1).unbind()

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        (rows_k, rows_v), (columns_k, columns_v) = (self.plain(axis, grid, q) for axis in (0, 1))
        e, f = (
            torch.einsum("nky,nlx->nklyx", rows, columns).flatten(3).flatten(1, 2)  # (heads or 1, k, N)
            for rows, columns in ((rows_k, columns_k), (rows_v, columns_v))
        )
        keys = torch.cat([k[:, :, :prefix], e @ k[:, :, prefix:]], dim=2)
        weights = (q @ keys.mT * self.scale).softmax(dim=-1)
        return torch.cat([weights[..., :prefix], weights[..., prefix:] @ f], dim=-1)

    def plain(self, axis, grid, like):
        """E and F along an axis, in a loop over the parts of it that entries of the table, or means, stand for."""
        length, table = grid[axis], (self.rows, self.columns)[axis]
        count = self.rank[axis] if table is None else self.length[axis]
        parts = torch.zeros(1, count, length, dtype=like.dtype, device=like.device)
        for part in range(count):
            for place in range(length):
                begin, end = max(place, part * length / count), min(place + 1, (part + 1) * length / count)
                parts[0, part, place] = max(0, end - begin) * count / length
        if table is None:
            return parts, parts
        tables = [t.to(like.dtype) @ parts for t in table]
        return tables if len(tables) == 2 else tables * 2


def project(t, grid, down, right):
    """Tokens (B, heads, N, d) projected along the rows, then along the columns: (B, heads, k, d)."""
    t = down @ rearrange(t, "B n (H W) d -> B n H (W d)", H=grid.height)
    t = right[:, None] @ rearrange(t, "B n k (W d) -> B n k W d", W=grid.width)
    return t.flatten(2, 3)
