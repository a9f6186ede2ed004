"""Hand-crafted attention: each head takes one fixed thing, a pixel beside, the mean of the row, the mean of the column.

Wu et al. 2020, Hand-crafted Attention, https://arxiv.org/abs/2006.05174
    A_u = 1 / |S_h(u)| on S_h(u), by head: {u + one step}, the row of u, the column of u, the row above
Cost: N (H + W + 4) d / 6
Computed: 0.0076 ×
There are no queries and keys: what is looked at does not depend on the image. ``patterns`` names what equal shares of
the heads have, in order; by default the row, the column and a step to each side, or the first of these where heads are
fewer. A step stops at the border. With ``causal=True`` rows and columns end at the pixel itself, and the row above
joins them: without it, what is right of a pixel in the rows above is never reached.
Two more kinds are by name. "all" is the mean of everything, if causal of what came before and itself: the average
attention of Zhang et al. 2018, https://arxiv.org/abs/1805.00631, without its gate. "gaussian" weights everything by
exp(-|v - u|² / 2 ``width``²), "gaussian_left" and so on by such a bell around the pixel beside: the hard-coded Gaussian
attention of You et al. 2020, https://arxiv.org/abs/2005.00742, whose weights there are not made to sum to 1. A bell is
a matrix for the rows times one for the columns; if causal, one for the rows above, another for the pixel's own.
Prefix tokens look at all tokens alike (causal: at one another), and positions do not look at them.
The source crafts attention for a line of audio frames by hand (fixed diagonals, blocks and verticals); these are their
counterparts on a grid. Its present title is Input-independent Attention Weights Are Expressive Enough; the name here is
that of the first version, Hand-crafted Attention is All You Need?
Deviations: see above; ``key_dim`` has no effect; the source's other baselines without q · k are a block of their own,
`synthesizer`.

>>> from vision_attn import Grid
>>> for pattern in Block(96, num_heads=3, patterns=("left", "row", "previous_row"), causal=True).pattern.by_head():
...     print(pattern.draw(Grid(3, 5), 1, 3), end="\\n\\n")
-----
--#o-
-----
<BLANKLINE>
-----
###@-
-----
<BLANKLINE>
#####
---o-
-----
<BLANKLINE>
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from .. import check
from ..mixer import Mixer, heads_for, warn_of_blind_spot
from ..pattern import All, Column, Directed, Past, PerHead, Row
from ..precision import at_least_float32, outside_autocast

Name = Literal[
    "row", "column", "left", "right", "up", "down", "previous_row", "all",
    "gaussian", "gaussian_left", "gaussian_right", "gaussian_up", "gaussian_down",
]  # fmt: skip
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
CENTRES = {"gaussian": (0, 0)} | {f"gaussian_{name}": step for name, step in STEPS.items()}
AHEAD = {"right", "down", "gaussian_right", "gaussian_down"}


@dataclass(frozen=True)
class Step(Directed):
    """The pixel ``step`` = (down, right) away, or the last one before the border."""

    step: tuple[int, int]

    def allowed(self, qy, qx, ky, kx, grid):
        places = zip((qy, qx), (ky, kx), self.step, grid)
        down, right = ((k == q + s) | ((k == q) & ((q + s < 0) | (q + s >= n))) for q, k, s, n in places)
        return down & right


@dataclass(frozen=True)
class RowAbove(Directed):
    """The whole row above; in the first row the position itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (ky == qy - 1) | ((qy == 0) & (ky == qy) & (kx == qx))


def step(v, down, right):
    """Each pixel of the map (B, heads, H, W, d) from one step away, the border's own where there is none."""
    for axis, by in ((2, down), (3, right)):
        if by:
            size = v.shape[axis]
            rest, edge = v.narrow(axis, max(by, 0), size - 1), v.narrow(axis, size - 1 if by > 0 else 0, 1)
            v = torch.cat([rest, edge] if by > 0 else [edge, rest], dim=axis)
    return v


def mean(v, axis, past):
    """Mean of each line along an axis of the map, ``past``: up to each pixel, summed in at least float32."""
    wide = at_least_float32(v)
    if not past:
        return v.mean(dim=axis, keepdim=True, dtype=wide).to(v.dtype).expand(v.shape)
    count = torch.arange(1, v.shape[axis] + 1, device=v.device).view([-1] + [1] * (4 - axis))
    return (v.cumsum(dim=axis, dtype=wide) / count).to(v.dtype)


def row_above(v):
    return torch.cat([v[:, :, :1], mean(v, 3, past=False).narrow(2, 0, v.shape[2] - 1)], dim=2)


def mean_of_all(v, past):
    """Mean of the map, ``past``: of each pixel and those before it in raster order."""
    if past:
        return mean(v.flatten(2, 3)[:, :, None], 3, past=True).reshape(v.shape)
    return v.mean(dim=(2, 3), keepdim=True, dtype=at_least_float32(v)).to(v.dtype).expand(v.shape)


def bell(v, down, right, width, past):
    """Mean of the map by a bell of ``width`` pixels around a place ``down`` and ``right`` of each pixel."""
    wide = v.to(at_least_float32(v))
    rows, columns = (
        -(place[:, None] + step - place).square() / (2 * width**2)
        for place, step in (
            (torch.arange(n, device=v.device, dtype=wide.dtype), step) for n, step in zip(v.shape[2:4], (down, right))
        )
    )
    with outside_autocast(v):
        of_rows = torch.einsum("bnyxd,cx->bnycd", wide, columns.softmax(dim=1))
        if not past:
            return torch.einsum("bnycd,ry->bnrcd", of_rows, rows.softmax(dim=1)).to(v.dtype)
        # the rows above and the pixel's own, each with its share of all weights, by their logarithms
        hidden = torch.finfo(wide.dtype).min
        above, before = (
            torch.where(torch.ones_like(t, dtype=torch.bool).tril(-1 + own), t, hidden)
            for own, t in enumerate((rows, columns))
        )
        of_above = torch.einsum("bnycd,ry->bnrcd", of_rows, above.softmax(dim=1))
        of_own = torch.einsum("bnyxd,cx->bnycd", wide, before.softmax(dim=1))
        sums = above.logsumexp(dim=1)[:, None] + columns.logsumexp(dim=1)
        share = (sums - rows.diagonal()[:, None] - before.logsumexp(dim=1)).sigmoid()[..., None]
        return (of_own + share * (of_above - of_own)).to(v.dtype)


class Block(Mixer):
    """Hand-crafted attention.

    Args:
        patterns: of equal shares of the heads: "row", "column", "left", "right", "up", "down", "previous_row", "all",
            "gaussian", "gaussian_left", "gaussian_right", "gaussian_up", "gaussian_down". None: the first six of these,
            as many as there are heads; causal: of "row", "column", "previous_row", "left", "up".
        width: σ of the bells, in pixels.
        num_heads: None: at least one for each pattern, where ``dim`` can be so divided.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, but ``scale``, ``qk_norm`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: fewer heads than patterns, a causal pattern that looks ahead, or an argument out of range.
    """

    projects = "v"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        patterns: tuple[Name, ...] | None = None,
        width: float = 1.0,
        causal: bool = False,
        attn_drop: float = 0.0,
        scale: float | None = None,
        **mixer,
    ):
        check.positive("width", width)
        check.boolean("causal", causal)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "there is no q · k to scale")
        check.positive_int("dim", dim)
        rules = {"row": Row(past=causal), "column": Column(past=causal), "previous_row": RowAbove(past=causal)}
        rules |= {name: Step(by, past=causal) for name, by in STEPS.items()}
        rules |= dict.fromkeys(("all", *CENTRES), Past() if causal else All())
        names = ("row", "column", "previous_row", "left", "up") if causal else ("row", "column", *STEPS)
        if patterns is not None:
            names = patterns
            if not isinstance(names, (tuple, list)) or not names or not all(name in list(rules) for name in names):
                raise ValueError(f"patterns={patterns!r}: must be a list of {', '.join(map(repr, rules))}")
        num_heads = heads_for(len(names), dim, mixer.get("key_dim")) if num_heads is None else num_heads
        super().__init__(dim, num_heads, **mixer)
        patterns = names[: self.num_heads] if patterns is None else patterns
        if len(patterns) > self.num_heads:
            raise ValueError(f"patterns={patterns!r}: must be at most num_heads={self.num_heads}")
        if causal and (ahead := AHEAD & set(patterns)):
            raise ValueError(f"patterns={patterns!r}: with causal=True must be without {', '.join(sorted(ahead))}")
        self.names, self.width, self.causal = tuple(patterns), width, causal
        self.pattern = PerHead(tuple(rules[name] for name in patterns))
        warn_of_blind_spot(self)

    def mix(self, q, k, v, grid):
        prefix = grid.prefix_of(v.shape[2])
        first, image = grid.split(v)
        image = rearrange(image, "B n (H W) d -> B n H W d", H=grid.height)
        take = {name: lambda v, by=by: step(v, *by) for name, by in STEPS.items()} | {
            "row": lambda v: mean(v, 3, self.causal),
            "column": lambda v: mean(v, 2, self.causal),
            "previous_row": row_above,
            "all": lambda v: mean_of_all(v, self.causal),
        }
        take |= {name: lambda v, by=by: bell(v, *by, self.width, self.causal) for name, by in CENTRES.items()}
        shares = image.split(self.pattern.shares(v.shape[1]), dim=1)
        out = torch.cat([take[name](share) for name, share in zip(self.names, shares)], dim=1)
        out = out.flatten(2, 3)
        if prefix == 0:
            return out
        seen = first if self.causal else v
        return torch.cat([seen.mean(dim=2, keepdim=True).expand(first.shape), out], dim=2)

    def weights(self, q, k, grid):
        prefix, heads = grid.prefix_of(q.shape[2]), q.shape[1]
        seen = self.pattern.head_masks(heads, grid, prefix, q.device)
        seen[:, prefix:, :prefix] = False
        y, x = torch.meshgrid(*(torch.arange(n, device=q.device) for n in grid), indexing="ij")
        away = y.flatten() - y.flatten()[:, None], x.flatten() - x.flatten()[:, None]  # from query (row) to key
        logits = []
        for name, share in zip(self.names, self.pattern.shares(heads)):
            down, right = CENTRES.get(name, (0, 0))
            squares = (away[0] - down) ** 2 + (away[1] - right) ** 2
            logit = -squares.to(q.dtype) / (2 * self.width**2) if name in CENTRES else torch.zeros_like(squares)
            logits += [F.pad(logit.to(q.dtype), (prefix, 0, prefix, 0))] * share
        weights = torch.stack(logits).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        return weights.expand(q.shape[0], -1, -1, -1)
