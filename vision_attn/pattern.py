"""Who may see whom on a grid: the definition of a sparse pattern, and the key sets that compute it fast.

A `Pattern` is said twice. ``allowed`` is the rule, pixel by pixel; ``mask``, ``draw`` and ``reach`` follow from it.
``key_sets`` are reshapes of the grid: each puts queries in groups with keys they may see, and together they hold every
allowed pair exactly once. `union` computes attention from the key sets alone.

Patterns compose: ``a & b`` is what both allow, ``a | b`` what either does, `PerHead` gives heads patterns of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .grid import Grid
from .key_set import Columns, Everything, KeySet, Neighbours, Only, Rows, SeenByAll, SeesAll, Tiles
from .traced import fixed


class BlindSpot(UserWarning):
    """A causal pattern leaves part of the past unreached, however many layers of it are stacked."""


@dataclass(frozen=True)
class Pattern:
    """A rule for which positions of a grid see which. Subclasses state ``allowed``, ``key_sets`` and ``causal``."""

    @property
    def causal(self) -> bool:
        """Whether nothing is seen that comes later in raster order."""
        return False

    def allowed(self, qy, qx, ky, kx, grid: Grid):
        """Whether the query at (qy, qx) may see the key at (ky, kx); integers or broadcastable integer tensors."""
        raise NotImplementedError

    def key_sets(self) -> tuple[KeySet, ...]:
        """Disjoint key sets whose union is ``allowed``."""
        raise NotImplementedError

    def by_head(self) -> tuple["Pattern", ...]:
        """The patterns of equal shares of the heads, in order: itself, or those of a `PerHead`."""
        return (self,)

    def shares(self, heads: int) -> list[int]:
        """How many of the heads each pattern of `by_head` has."""
        n, heads = len(self.by_head()), fixed(heads)
        ends = [-(-heads * i // n) for i in range(n + 1)]
        return [last - first for first, last in zip(ends, ends[1:])]

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other)

    def mask(self, grid: Grid, prefix: int = 0, device=None) -> Bool[Tensor, "tokens tokens"]:
        """The rule as a matrix, rows are queries. Prefix tokens see all and are seen by all.

        In a causal pattern they come before all positions, and see only one another.
        """
        y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
        seen = self.allowed(y[:, None], x[:, None], y[None, :], x[None, :], grid).expand(grid.size, grid.size)
        first = torch.full((prefix, grid.size), not self.causal, device=device)
        return F.pad(torch.cat([first, seen]), (prefix, 0), value=True)

    def head_masks(self, heads: int, grid: Grid, prefix: int = 0, device=None) -> Bool[Tensor, "heads tokens tokens"]:
        """The mask of each head."""
        parts = zip(self.by_head(), self.shares(heads))
        return torch.cat([part.mask(grid, prefix, device).expand(n, -1, -1) for part, n in parts if n])

    def known(self, x: Float[Tensor, "B heads tokens d"], grid: Grid) -> Float[Tensor, "B heads known d"]:
        """All that queries meet, in one group: the tokens, prefix first, unless a pattern sums some of them up."""
        return x

    def known_masks(self, heads: int, grid: Grid, prefix: int = 0, device=None) -> Bool[Tensor, "#heads tokens known"]:
        """Which of `known` each token sees, of all heads or of each."""
        return self.head_masks(1 if len(self.by_head()) == 1 else heads, grid, prefix, device)

    def draw(self, grid: Grid, y: int, x: int) -> str:
        """What the query at (y, x) sees: ``@`` itself, ``#`` seen, ``-`` not seen (``o``: not even itself)."""
        seen = self.mask(grid)[y * grid.width + x]
        signs = ["#" if s else "-" for s in seen.tolist()]
        signs[y * grid.width + x] = "@" if seen[y * grid.width + x] else "o"
        return "\n".join("".join(signs[row * grid.width : (row + 1) * grid.width]) for row in range(grid.height))

    def reach(self, grid: Grid, layers: int) -> Bool[Tensor, "positions positions"]:
        """Whom each position reaches after ``layers`` layers of this pattern (with residual connections)."""
        return cycle_reach([self] * layers, grid)


@dataclass(frozen=True, kw_only=True)
class Directed(Pattern):
    """A rule that goes both ways or, with ``past``, only to what comes before in raster order (and to itself)."""

    past: bool = False

    @property
    def causal(self):
        return self.past


def cycle_reach(patterns: Sequence[Pattern], grid: Grid) -> Bool[Tensor, "positions positions"]:
    """Whom each position reaches after a layer of each pattern, the first one first (with residual connections)."""
    own = torch.eye(grid.size, dtype=torch.bool)
    return reduce(lambda reached, pattern: ((pattern.mask(grid) | own).float() @ reached.float()) > 0, patterns, own)


def blind_spot(patterns: Sequence[Pattern], grid: Grid = Grid(6, 7)) -> int:
    """Number of past pairs of positions (each with itself counted) that no depth of this cycle of layers connects."""
    with torch.device("cpu"):  # also where a model is built on the meta device
        reached = cycle_reach(patterns, grid)
        for _ in range(grid.size.bit_length()):
            reached = (reached.float() @ reached.float()) > 0
        return int((torch.ones_like(reached).tril() & ~reached).sum())


# Compositions


@dataclass(frozen=True)
class Both(Pattern):
    """What two patterns allow: the key sets of the first, masked by the second."""

    first: Pattern
    second: Pattern

    @property
    def causal(self):
        return self.first.causal or self.second.causal

    def allowed(self, qy, qx, ky, kx, grid):
        return self.first.allowed(qy, qx, ky, kx, grid) & self.second.allowed(qy, qx, ky, kx, grid)

    def key_sets(self):
        return tuple(Only(keys, self.second) for keys in self.first.key_sets())


@dataclass(frozen=True)
class Either(Pattern):
    """What either of two patterns allows: the key sets of the first, and those of the second without the first."""

    first: Pattern
    second: Pattern

    @property
    def causal(self):
        return self.first.causal and self.second.causal

    def allowed(self, qy, qx, ky, kx, grid):
        return self.first.allowed(qy, qx, ky, kx, grid) | self.second.allowed(qy, qx, ky, kx, grid)

    def key_sets(self):
        return self.first.key_sets() + tuple(Only(keys, self.first, False) for keys in self.second.key_sets())


@dataclass(frozen=True)
class PerHead(Pattern):
    """A pattern for each share of the heads. The rule is what the heads allow together."""

    patterns: tuple[Pattern, ...]

    @property
    def causal(self):
        return all(pattern.causal for pattern in self.patterns)

    def allowed(self, qy, qx, ky, kx, grid):
        return reduce(lambda a, b: a | b, (pattern.allowed(qy, qx, ky, kx, grid) for pattern in self.patterns))

    def by_head(self):
        return self.patterns

    def __and__(self, other):
        return PerHead(tuple(pattern & other for pattern in self.patterns))

    def __or__(self, other):
        return PerHead(tuple(pattern | other for pattern in self.patterns))


# Rules that several mechanisms share


def complete(tile: tuple[int, int], qy, qx, ky, kx, grid: Grid):
    """Whether the ``tile`` = (height, width) with the key (ky, kx) in it has no pixel behind the query (qy, qx)."""
    bottom, right = (k // n * n + n - 1 for k, n in zip((ky, kx), tile))  # perhaps beyond the border
    in_last_row = (bottom == qy) | ((bottom > qy) & (qy == grid.height - 1))
    return (bottom < qy) | (in_last_row & ((right <= qx) | (qx == grid.width - 1)))


@dataclass(frozen=True)
class All(Pattern):
    """Everything."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (ky == ky) & (qy == qy)

    def key_sets(self):
        return (Everything(),)


@dataclass(frozen=True)
class Past(Pattern):
    """Itself and everything before it in raster order."""

    @property
    def causal(self):
        return True

    def allowed(self, qy, qx, ky, kx, grid):
        return (ky < qy) | ((ky == qy) & (kx <= qx))

    def key_sets(self):
        return (Everything(causal=True),)


@dataclass(frozen=True)
class Row(Directed):
    """Own row, to the left or (not ``past``) on both sides, and itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy == ky) & (kx <= qx) if self.past else qy == ky

    def key_sets(self):
        return (Rows(causal=self.past),)


@dataclass(frozen=True)
class Column(Directed):
    """Own column, above or (not ``past``) below, and itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (qx == kx) & (ky <= qy) if self.past else qx == kx

    def key_sets(self):
        return (Columns(causal=self.past),)


@dataclass(frozen=True)
class Tile(Pattern):
    """The tile of ``tile`` = (height, width) positions that it is in itself."""

    tile: tuple[int, int]

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy // self.tile[0] == ky // self.tile[0]) & (qx // self.tile[1] == kx // self.tile[1])

    def key_sets(self):
        return (Tiles(self.tile),)


@dataclass(frozen=True)
class Window(Directed):
    """At most ``radius`` steps of ``dilation`` away, both (down, right); ``past``: and before, or itself.

    At the border the window is cut off. With ``shift`` it moves inwards, in steps, and so has as many pixels as
    elsewhere, or all that an axis has. Not both ``past`` and ``shift``.
    """

    radius: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    shift: bool = False

    def allowed(self, qy, qx, ky, kx, grid):
        (ry, rx), (sy, sx) = self.radius, self.dilation
        down, right = ky - qy, kx - qx
        on_steps = (down % sy == 0) & (right % sx == 0)
        if self.shift:
            return on_steps & self.near(qy, ky, ry, sy, grid.height) & self.near(qx, kx, rx, sx, grid.width)
        near = (abs(down) <= ry * sy) & (abs(right) <= rx * sx)
        seen = on_steps & near
        return seen & ((down < 0) | ((down == 0) & (right <= 0))) if self.past else seen

    @staticmethod
    def near(query, key, radius: int, step: int, length):
        """Whether a key is among the 2 radius + 1 of an axis, in steps, that a query sees, having moved inwards."""
        query, key, last = query // step, key // step, (length - 1 - query % step) // step
        at_first, at_last = (query < radius) & (key <= 2 * radius), (query > last - radius) & (key >= last - 2 * radius)
        return (abs(key - query) <= radius) | at_first | at_last

    def key_sets(self):
        return (Neighbours(self.radius, self.dilation, self.past, self.shift),)


@dataclass(frozen=True)
class Global(Pattern):
    """The first ``tokens`` positions in raster order see all and are seen by all."""

    tokens: int

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy * grid.width + qx < self.tokens) | (ky * grid.width + kx < self.tokens)

    def key_sets(self):
        return SeenByAll(self.tokens), SeesAll(self.tokens)
