"""Fixed attention: each pixel looks at its own row and at a few summary columns of every row.

Child et al. 2019, Sparse Transformer, https://arxiv.org/abs/1904.10509
    A_i = softmax over {j ≤ i : row(j) = row(i)} ∪ {j ≤ i : col(j) in the summary columns} of q_i · k_j
Cost: 2 N (W + c H) d
Computed: 1 ×
The summary of head h is the h-th block of ``c`` columns from the right (round and round where the row has fewer
blocks), so that heads have distinct ones, as the paper advises. ``num_verts`` has them take turns with so many, as the
authors' code does: head h has the (h mod num_verts)-th. With ``causal=True`` the order is the raster, as
published; without, everything goes both ways. One softmax over the union is the paper's "merged head";
``split_heads=True`` gives the first half of the heads the row and the second half the summaries; ``part="local"`` and
``part="summary"`` give a layer one of them, to be interleaved by the host: the local layer must come first, since what
a summary does not know the later row can't ask.
Deviations: the paper's blocks are pieces of a sequence of any length; ours are the rows of the image. The authors' code
cuts both into blocks of 32 positions, and its heads go round over a given number of summaries, here by default over as
many as the row holds. A pixel always sees itself. Without ``causal`` the pattern is our reading.

>>> from vision_attn import Grid
>>> print(Fixed(c=2, block=0, past=True).draw(Grid(5, 7), 3, 2))
-----##
-----##
-----##
##@----
-------
>>> print(Fixed(c=2, block=1, past=False).draw(Grid(5, 7), 3, 2))
---##--
---##--
---##--
##@####
---##--
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .. import check
from ..key_set import Everything, KeySet, Rows, add_at, pad
from ..mixer import PatternMixer
from ..pattern import Directed, PerHead, Row
from ..traced import largest, least

NEAR = 8  # rows within which summaries are masked one by one


@dataclass(frozen=True)
class Summary(Directed):
    """The summary columns of all rows or (``past``) as far as they come before; and itself."""

    c: int
    block: int

    def allowed(self, qy, qx, ky, kx, grid):
        first = max(0, grid.width - self.c * (self.block % max(1, grid.width // self.c) + 1))
        before = (ky < qy) | ((ky == qy) & (kx <= qx)) if self.past else True
        return ((kx >= first) & (kx < first + self.c) & before) | ((ky == qy) & (kx == qx))

    def key_sets(self):
        columns = (self.c, self.block)
        return SummaryInRow(*columns, self.past), EarlierRows(*columns) if self.past else OtherRows(*columns)


@dataclass(frozen=True)
class Fixed(Directed):
    """The row and the summaries."""

    c: int
    block: int

    def allowed(self, qy, qx, ky, kx, grid):
        at = (qy, qx, ky, kx, grid)
        return Row(past=self.past).allowed(*at) | Summary(self.c, self.block, past=self.past).allowed(*at)

    def key_sets(self):
        columns = (self.c, self.block)
        if self.past:
            return Rows(causal=True), EarlierRows(*columns)
        return BesideSummary(*columns), AllRows(*columns)


@dataclass(frozen=True)
class Columns(KeySet):
    """What has to do with the ``block``-th ``c`` columns from the right."""

    c: int
    block: int

    def first(self, width):
        """The first of the columns. A narrow grid has one block, and of a grid narrower than ``c`` all is summary."""
        return largest(0, width - self.c * (self.block % largest(1, width // self.c) + 1))

    def count(self, width):
        """How many they are: ``c``, or all of a narrower grid."""
        return least(self.c, width)

    def summary(self, x):
        """The columns themselves, (b, H, c, d)."""
        return x.narrow(2, self.first(x.shape[2]), self.count(x.shape[2]))

    def add_keys(self, whole, part):
        add_at(self.key_rows, whole, part)

    def key_rows(self, x):
        """The keys before their rows are joined: a view, where those are copies."""
        return self.summary(x)

    def is_summary(self, x, width):
        return (x >= self.first(width)) & (x < self.first(width) + self.c)


@dataclass(frozen=True)
class BesideSummary(Columns):
    """Every position with what is no summary in its row."""

    def queries(self, x):
        return x

    def key_rows(self, x):
        return x

    def place(self, y, grid, fill=0.0):
        return y

    def mask(self, grid, device):
        x = torch.arange(grid.width, device=device)
        return ~self.is_summary(x, grid.width)[None, None]


@dataclass(frozen=True)
class SummaryInRow(BesideSummary):
    """Every position with the summary in its row, as far as it comes before if ``past``, and with itself."""

    past: bool

    def mask(self, grid, device):
        x = torch.arange(grid.width, device=device)
        seen = self.is_summary(x, grid.width)[None].expand(grid.width, -1)
        seen = seen.tril() if self.past else seen
        return (seen | (x[:, None] == x))[None]

    def kept(self, grid):
        return 1, 0, grid.width

    def seen_from(self, y, x, grid):
        first, last = self.first(grid.width), self.first(grid.width) + self.count(grid.width)
        own = [] if first <= x < last else [(slice(y, y + 1), slice(x, x + 1))]
        return [(slice(y, y + 1), slice(first, max(first, min(last, x + 1)))), *own]


@dataclass(frozen=True)
class AllRows(Columns):
    """Every position with the summaries of all rows."""

    def queries(self, x):
        return Everything().queries(x)

    def keys(self, x):
        return Everything().queries(self.key_rows(x))

    def place(self, y, grid, fill=0.0):
        return Everything().place(y, grid)


@dataclass(frozen=True)
class OtherRows(AllRows):
    """Every position with the summaries of all rows but its own."""

    def mask(self, grid, device):
        query, key = self.numbers(grid, device)
        return (query // grid.width)[:, :, None] != (key // grid.width)[:, None, :]


@dataclass(frozen=True)
class EarlierRows(Columns):
    """Every position below the first row with the summaries of all rows above."""

    every = False

    def queries(self, x):
        return Everything().queries(x.narrow(1, 1, x.shape[1] - 1))

    def keys(self, x):
        return Everything().queries(self.key_rows(x))

    def key_rows(self, x):
        return self.summary(x.narrow(1, 0, x.shape[1] - 1))

    def place(self, y, grid, fill=0.0):
        y = Everything().place(y, grid._replace(height=grid.height - 1))
        return F.pad(y, (0, 0, 0, 0, 1, 0), value=fill)

    def mask(self, grid, device):
        query, key = self.numbers(grid, device)
        return (query // grid.width)[:, :, None] > (key // grid.width)[:, None, :]

    def kept(self, grid):
        return grid.height, self.first(grid.width), self.count(grid.width)

    def seen_from(self, y, x, grid):
        first = self.first(grid.width)
        return [(slice(0, y), slice(first, first + self.count(grid.width)))]

    def parts(self, grid):
        halves = [UpperHalf(self.c, self.block, NEAR * 2**i) for i in range(((grid.height - 1) // NEAR).bit_length())]
        return WithinBlock(self.c, self.block, NEAR), *halves


@dataclass(frozen=True)
class WithinBlock(Columns):
    """Blocks of ``rows``: every position with the summaries of the rows above it in its block."""

    rows: int

    def blocks(self, x):
        """(b, blocks, rows, W, d), padded with zeros."""
        return pad(x, 0, 0, 0, 0, 0, -x.shape[1] % self.rows).unflatten(1, (-1, self.rows))

    def queries(self, x):
        return self.blocks(x).flatten(2, 3)

    def keys(self, x):
        return self.key_rows(x).flatten(2, 3)

    def key_rows(self, x):
        return self.blocks(self.summary(x))

    def place(self, y, grid, fill=0.0):
        return y.unflatten(2, (self.rows, -1)).flatten(1, 2).narrow(1, 0, grid.height)

    def mask(self, grid, device):
        row = torch.arange(self.rows, device=device)
        query, key = row.repeat_interleave(grid.width), row.repeat_interleave(self.count(grid.width))
        return (query[:, None] > key)[None]


@dataclass(frozen=True)
class UpperHalf(Columns):
    """Rows in pairs of blocks of ``rows`` each: every position of a lower block with the summaries of its upper one.

    Two rows in different blocks of `NEAR` are apart in exactly one halving, so pairs of NEAR, 2 NEAR, 4 NEAR … rows and
    `WithinBlock` are together `EarlierRows`, with hardly a mask.
    """

    rows: int
    every = False

    def pairs(self, x):
        """(b, pairs, 2, rows, W, d), as many pairs as have rows in the lower block; padded with zeros."""
        pairs = (x.shape[1] + self.rows - 1) // (2 * self.rows)
        x = pad(x, 0, 0, 0, 0, 0, 2 * self.rows * pairs - x.shape[1])  # or cut off, where there is no lower block
        return x.unflatten(1, (pairs, 2, self.rows))

    def queries(self, x):
        return self.pairs(x)[:, :, 1].flatten(2, 3)

    def keys(self, x):
        return self.key_rows(x).flatten(2, 3)

    def key_rows(self, x):
        return self.pairs(self.summary(x))[:, :, 0]

    def place(self, y, grid, fill=0.0):
        y = F.pad(y.unflatten(2, (self.rows, -1)), (0, 0, 0, 0, self.rows, 0), value=fill).flatten(1, 2)
        return F.pad(y, (0, 0, 0, 0, 0, grid.height - y.shape[1]), value=fill)


class Block(PatternMixer):
    """Fixed attention.

    Args:
        c: columns in a summary.
        causal: only what comes before in raster order, and itself.
        split_heads: half of the heads have the row, the others the summaries.
        part: None for both, "local" or "summary" for one of them.
        num_verts: number of distinct summaries that the heads take turns with; None: each has one of its own.
        Others: those of `Mixer`.

    Raises:
        ValueError: ``part`` together with ``split_heads``, ``num_verts`` without summaries, one head to split, or an
            argument out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        c: int = 8,
        causal: bool = False,
        split_heads: bool = False,
        part: Literal["local", "summary"] | None = None,
        num_verts: int | None = None,
        **mixer,
    ):
        check.positive_int("c", c)
        check.boolean("causal", causal)
        check.boolean("split_heads", split_heads)
        check.one_of("part", part, (None, "local", "summary"))
        if num_verts is not None:
            check.positive_int("num_verts", num_verts)
        if split_heads and part:
            raise ValueError(f"part={part!r}: must be None with split_heads=True, which gives each part half the heads")
        if num_verts is not None and part == "local":
            raise ValueError(f"num_verts={num_verts!r}: must be None with part='local', which has no summaries")

        row, other = Row(past=causal), Summary if split_heads or part == "summary" else Fixed
        one = row if part == "local" else other(c, 0, past=causal)
        super().__init__(PerHead((row, one)) if split_heads else one, dim, num_heads, **mixer)
        if part != "local" and self.num_heads > 1 and num_verts != 1:  # heads have summaries of their own
            rows = -(-self.num_heads // 2) if split_heads else 0
            heads = range(self.num_heads - rows)
            others = tuple(other(c, head % (num_verts or len(heads)), past=causal) for head in heads)
            self.pattern = PerHead((row,) * rows + others)
