"""Adaptive connections: each pixel looks at the few pixels of the image that a learned scorer ranks highest.

Li et al. 2020, SAC, https://arxiv.org/abs/2003.09833
    A_u = softmax over the ``edges`` pixels v of largest g_uv of q_u · k_v d^-½ + g_uv
    g_uv = a_u · r_row(v) + b_u · c_column(v)    r, c: means over a row, a column of projected keys; a, b: of queries
Cost: 2 N edges d + (2 d + (H + W) heads) N width
Computed: 1.6 ×
In the paper an LSTM predicts edges one after another, each from the two ends of the last one, and is trained by
REINFORCE with the task's reward; tokens then attend along edges alone. A block can't have that: the reward is known to
the training loop, and edges drawn in turn take as many steps as there are edges. What is kept: edges are few, and are
learned. A scorer ranks all N pixels for each pixel and head, the best of them are the edges, and its score is added to
the logit, so that it learns by the gradient which edges to rank higher.
Ranking needs no N × N scores: g is a sum of a part for the row and a part for the column, so the best pixels lie where
the best rows and columns cross (as in product keys), the i-th best row and the j-th best column only for i j ≤
``edges``. This is exact. Prefix tokens see, and are seen by, all; to them g is 0. Everything is computed in at least
float32.
Deviations: the scorer, as said. No code was published.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import check
from ..engines.selection import rows
from ..engines.union import flash
from ..grid import Grid
from ..key_set import rows_and_columns
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast


class Block(Mixer):
    """Adaptive connections.

    Args:
        edges: pixels that each pixel looks at.
        width: channels of the scorer's projections.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "scores are of means over whole rows and columns"
    not_rotary = "its scorer reads channels of queries and keys one by one, which a turn mixes"

    def __init__(self, dim, num_heads=None, *, edges: int = 16, width: int = 8, device=None, dtype=None, **mixer):
        check.positive_int("edges", edges)
        check.positive_int("width", width)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.edges = edges
        size = 2, self.num_heads, self.key_dim // self.num_heads, width  # for rows and for columns
        self.of_queries, self.of_keys = (nn.Parameter(torch.empty(size, device=device, dtype=dtype)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the scorer's projections from N(0, 1 / channels of a key)."""
        for projection in (self.of_queries, self.of_keys):
            nn.init.normal_(projection, std=projection.shape[2] ** -0.5)

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Float[Tensor, "B heads tokens d"], grid: Grid
    ) -> Int[Tensor, "B heads N edges"]:
        """Raster indices of the pixels that each pixel looks at, -1 where there are fewer. In at least float32."""
        prefix, wide = grid.prefix_of(q.shape[2]), at_least_float32(q)
        with outside_autocast(q):
            parts = self.scores(q[:, :, prefix:].to(wide), k[:, :, prefix:].to(wide), grid)
        # there may be fewer rows, or columns, than edges: what is padded has a place below 0
        (row, y), (column, x) = (
            F.pad(part, (0, self.edges), value=-torch.inf).topk(self.edges, dim=-1) for part in parts
        )
        y, x = (at.masked_fill(at >= length, -grid.size) for at, length in zip((y, x), grid))
        crossing = [(slice(i, i + 1), slice(self.edges // (i + 1))) for i in range(self.edges)]
        score = torch.cat([row[..., i] + column[..., j] for i, j in crossing], dim=-1)
        place = torch.cat([y[..., i] * grid.width + x[..., j] for i, j in crossing], dim=-1)
        return place.gather(-1, score.topk(self.edges, dim=-1).indices).clamp(min=-1)

    def scores(self, q, k, grid):
        """The two parts of g: of each pixel for rows (B, heads, N, H) and for columns (B, heads, N, W)."""
        means = (k.unflatten(2, (grid.height, grid.width)).mean(dim=axis) for axis in (3, 2))
        projections = zip(self.of_queries.to(q.dtype).unbind(), self.of_keys.to(q.dtype).unbind(), means)
        return [(q @ of_query) @ (mean @ of_key).transpose(-2, -1) for of_query, of_key, mean in projections]

    def mix(self, q, k, v, grid):
        prefix, wide, chosen = grid.prefix_of(q.shape[2]), at_least_float32(v), self.choose(q, k, grid)
        with outside_autocast(v):
            (first_q, query), (first_k, keys), (first_v, values) = (grid.split(t.to(wide)) for t in (q, k, v))
            seen, parts = chosen.clamp(min=0), self.scores(query, keys, grid)
            bias = sum(part.gather(-1, at) for part, at in zip(parts, rows_and_columns(seen, grid.width)))
            bias = bias.masked_fill(chosen < 0, -torch.inf)
            near_k, near_v = rows(keys, seen), rows(values, seen)  # (B, heads, N, edges, d)
            logits = self.scale * (query[..., None, :] @ near_k.transpose(-2, -1))[..., 0, :] + bias
            if not prefix:  # onnxruntime leaves a product over nothing as the memory was
                weights = F.dropout(logits.softmax(dim=-1), self.dropout)
                return (weights[..., None, :] @ near_v)[..., 0, :].to(v.dtype)
            logits = torch.cat([self.scale * query @ first_k.transpose(-2, -1), logits], dim=-1)
            to_first, to_near = F.dropout(logits.softmax(dim=-1), self.dropout).split([prefix, self.edges], dim=-1)
            out = to_first @ first_v + (to_near[..., None, :] @ near_v)[..., 0, :]
            first = flash(first_q, k.to(wide), v.to(wide), dropout_p=self.dropout, scale=self.scale)
            return torch.cat([first, out], dim=2).to(v.dtype)

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        y, x = (c.flatten().to(q.device) for c in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        g = 0
        lines = (y, grid.width), (x, grid.height)
        for of_queries, of_keys, (place, pixels) in zip(self.of_queries.to(q.dtype), self.of_keys.to(q.dtype), lines):
            same = (place[:, None] == place).to(q.dtype)  # the pixels of its row, or column, for each pixel
            means = torch.einsum("ij,bnjd,ndw->bniw", same / pixels, k[:, :, prefix:], of_keys)
            g = g + torch.einsum("bnid,ndw,bnjw->bnij", q[:, :, prefix:], of_queries, means)
        chosen = self.choose(q, k, grid)
        seen = torch.zeros(*chosen.shape[:3], grid.size + 1, dtype=torch.bool, device=q.device)
        seen = seen.scatter(-1, chosen.masked_fill(chosen < 0, grid.size), True)[..., : grid.size]
        bias = F.pad(g.masked_fill(~seen, -torch.inf), (prefix, 0, prefix, 0))
        return (self.scale * torch.einsum("bnid,bnjd->bnij", q, k) + bias).softmax(dim=-1)

    def extra_repr(self):
        return f"{super().extra_repr()}, edges={self.edges}, width={self.of_keys.shape[3]}"
