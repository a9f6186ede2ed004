"""Key sets: reshapes of the grid into groups, in which queries meet the keys they may see.

A pattern is computed from a few disjoint key sets. Each is one call of flash attention: on views where rows, columns
or the whole grid are folded, on one copy where tiles are cut or rows are joined.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .grid import Grid
from .kept import kept
from .traced import is_passing, is_traced, least


def pad(x: Tensor, *amounts: int, fill: float = 0.0) -> Tensor:
    """`torch.nn.functional.pad`, but a view where there is nothing to pad (and the size is not traced)."""
    return F.pad(x, amounts, value=fill) if is_traced() or any(amounts) else x


def rows_and_columns(place: Int[Tensor, "..."], width) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    """Row and column of raster indices. Not by %, which no ONNX graph takes with a width that is free."""
    row = place // width
    return row, place - row * width


def crossed(down: Shaped[Tensor, "g p ky"], right: Shaped[Tensor, "g q kx"]) -> tuple[Tensor, Tensor]:
    """What is said of queries and keys down, and right, so that it broadcasts to (g, p, q, ky, kx)."""
    return down.unsqueeze(2).unsqueeze(4), right.unsqueeze(1).unsqueeze(3)


def add_at(fold: Callable[[Tensor], Tensor], whole: Tensor, part: Tensor) -> None:
    """Adds each entry of ``part`` where ``fold`` takes it from in ``whole``: the adjoint of ``fold``, in place."""
    target = fold(whole)
    if torch._C._is_alias_of(target, whole):
        target += part.reshape(target.shape)
        return
    with torch.inference_mode(False), torch.enable_grad():  # the fold copies: autograd knows its adjoint
        entries = torch.zeros(whole.shape, dtype=whole.dtype, device=whole.device, requires_grad=True)
        target = fold(entries)
        part = part.clone() if part.is_inference() else part
        slope = torch.autograd.grad(target, entries, part.to(target.dtype).reshape(target.shape))[0]
    whole += slope


class KeySet:
    """Groups of queries and keys of the grid, in which every query sees every key that ``mask`` lets through.

    A query is in one group or in none, a key may be in several. With ``causal`` a query sees the keys up to its own
    index in the group, and there is no mask.
    """

    causal = False
    overlap = False  # whether groups share keys, so that all groups' keys are many times the grid
    every = True  # whether every position is a query

    def queries(self, x: Shaped[Tensor, "b H W d"]) -> Shaped[Tensor, "b groups queries d"]:
        """The queries of each group, padded with zeros where the grid does not divide."""
        raise NotImplementedError

    def keys(self, x: Shaped[Tensor, "b H W d"]) -> Shaped[Tensor, "b groups keys d"]:
        """The keys of each group, padded with zeros. A view where it can be."""
        return self.queries(x)

    def place(
        self, y: Shaped[Tensor, "b groups queries d"], grid: Grid, fill: float = 0.0
    ) -> Shaped[Tensor, "b H W d"]:
        """The inverse of ``queries``: padding is dropped, and positions without a query get ``fill``."""
        raise NotImplementedError

    def mask(self, grid: Grid, device) -> Bool[Tensor, "#groups #queries keys"] | None:
        """Which keys of its group a query sees; None: all of them.

        Each query that is placed sees at least one key, of this set or of the others of a pattern. That is not so of
        `Only`, of which it takes 0 where it sees nothing.
        """
        return None

    def ready(self, grid: Grid, device) -> "KeySet":
        """Itself, with what of its tables could not be kept (`is_passing`), so that they are made but once."""
        return self

    def parts(self, grid: Grid) -> tuple["KeySet", ...]:
        """The same pairs as key sets that need less of a mask, where that is cheaper; the size is not traced."""
        return (self,)

    def split(self, groups: int, most: int) -> list[tuple["KeySet", slice]]:
        """Itself with all of its ``groups`` or, where they share keys, sets of the keys of at most ``most`` each."""
        return [(self, slice(None))]

    def add_queries(self, whole: Float[Tensor, "b H W d"], part: Float[Tensor, "b groups queries d"]) -> None:
        """The adjoint of `queries`, in place."""
        add_at(self.queries, whole, part)

    def add_keys(self, whole: Float[Tensor, "b H W d"], part: Float[Tensor, "b groups keys d"]) -> None:
        """The adjoint of `keys`, in place."""
        add_at(self.keys, whole, part)

    def kept(self, grid: Grid) -> tuple[int, int, int]:
        """What later queries of a causal set may still see: number of last rows, first column, number of columns."""
        return grid.height, 0, grid.width

    def seen_from(self, y: int, x: int, grid: Grid) -> list[tuple[slice, slice]]:
        """What the query at (y, x) of a causal set sees, as disjoint (rows, columns) of the grid."""
        raise NotImplementedError

    def numbers(self, grid: Grid, device) -> tuple[Int[Tensor, "groups queries"], Int[Tensor, "groups keys"]]:
        """Raster index of each query and of each key; -1 is padding."""
        number = torch.arange(1, grid.size + 1, device=device).reshape(1, grid.height, grid.width, 1)
        return tuple(fold(number)[0, :, :, 0] - 1 for fold in (self.queries, self.keys))


@dataclass(frozen=True)
class Only(KeySet):
    """The pairs of a key set that a pattern allows or, with ``allow=False``, does not allow."""

    whole: KeySet
    pattern: Any
    allow: bool = True

    @property
    def overlap(self):
        return self.whole.overlap

    @property
    def every(self):
        return self.whole.every

    def queries(self, x):
        return self.whole.queries(x)

    def keys(self, x):
        return self.whole.keys(x)

    def place(self, y, grid, fill=0.0):
        return self.whole.place(y, grid, fill)

    def split(self, groups, most):
        return self.whole.split(groups, most)

    def ready(self, grid, device):
        return replace(self, whole=self.whole.ready(grid, device))

    def mask(self, grid, device):
        y, x = (torch.arange(1, n + 1, device=device) for n in grid)
        places = y[None, :, None, None].expand(1, *grid, 1), x[None, None, :, None].expand(1, *grid, 1)
        qy, qx = (self.whole.queries(place)[0] - 1 for place in places)  # (groups, queries, 1)
        ky, kx = (self.whole.keys(place)[0].transpose(1, 2) - 1 for place in places)  # (groups, 1, keys); padding: -1
        there = ky >= 0
        seen = there & self.pattern.allowed(qy, qx, ky, kx, grid)
        seen = seen if self.allow else there & ~seen
        if self.whole.causal:
            seen = seen & torch.ones(seen.shape[1:], dtype=torch.bool, device=device).tril()
        whole = self.whole.mask(grid, device)
        return seen if whole is None else seen & whole


@dataclass(frozen=True)
class Everything(KeySet):
    """Every position with every position: one group."""

    causal: bool = False

    def queries(self, x):
        return rearrange(x, "b H W d -> b 1 (H W) d")

    def place(self, y, grid, fill=0.0):
        return rearrange(y, "b 1 (H W) d -> b H W d", H=grid.height, W=grid.width)


@dataclass(frozen=True)
class Rows(KeySet):
    """Every position with its own row. A view, no copy."""

    causal: bool = False

    def queries(self, x):
        return x

    def place(self, y, grid, fill=0.0):
        return y

    def kept(self, grid):
        return 1, 0, grid.width

    def seen_from(self, y, x, grid):
        return [(slice(y, y + 1), slice(0, x + 1))]


@dataclass(frozen=True)
class Itself(KeySet):
    """Every position with itself alone. A view, no copy."""

    def queries(self, x):
        return rearrange(x, "b H W d -> b (H W) 1 d")

    def place(self, y, grid, fill=0.0):
        return rearrange(y, "b (H W) 1 d -> b H W d", H=grid.height, W=grid.width)

    def kept(self, grid):
        return 1, 0, grid.width

    def seen_from(self, y, x, grid):
        return [(slice(y, y + 1), slice(x, x + 1))]


@dataclass(frozen=True)
class Columns(KeySet):
    """Every position with its own column, with or without itself. A view, no copy."""

    with_self: bool = True
    causal: bool = False

    @property
    def above(self) -> bool:
        return self.causal and not self.with_self

    @property
    def every(self):
        return not self.above

    def queries(self, x):
        return (x.narrow(1, 1, x.shape[1] - 1) if self.above else x).transpose(1, 2)

    def keys(self, x):
        return (x.narrow(1, 0, x.shape[1] - 1) if self.above else x).transpose(1, 2)

    def place(self, y, grid, fill=0.0):
        y = y.transpose(1, 2)
        return F.pad(y, (0, 0, 0, 0, 1, 0), value=fill) if self.above else y

    def mask(self, grid, device):
        if self.with_self or self.causal:
            return None
        y = torch.arange(grid.height, device=device)
        return (y[:, None] != y[None, :])[None]

    def seen_from(self, y, x, grid):
        return [(slice(0, y + self.with_self), slice(x, x + 1))]


@dataclass(frozen=True)
class Tiles(KeySet):
    """The grid cut into tiles of ``tile`` = (height, width) positions, padded at the bottom and right.

    With ``across=False`` a group is one tile of adjacent positions (a window); with ``across=True`` it is the
    positions that hold the same place in every tile (a dilated grid).
    """

    tile: tuple[int, int]
    across: bool = False

    @property
    def axes(self) -> tuple[str, str]:
        return ("(py px)", "(y x)") if self.across else ("(y x)", "(py px)")

    def sizes(self, height: int, width: int) -> dict[str, int]:
        """Tiles down (y) and across (x), and positions in one (py, px)."""
        py, px = self.tile
        return dict(y=(height + py - 1) // py, x=(width + px - 1) // px, py=py, px=px)

    def queries(self, x):
        height, width = x.shape[1:3]
        n, (groups, members) = self.sizes(height, width), self.axes
        x = pad(x, 0, 0, 0, n["x"] * n["px"] - width, 0, n["y"] * n["py"] - height)
        return rearrange(x, f"b (y py) (x px) d -> b {groups} {members} d", **n)

    def place(self, y, grid, fill=0.0):
        n, (groups, members) = self.sizes(*grid), self.axes
        y = rearrange(y, f"b {groups} {members} d -> b (y py) (x px) d", **n)
        # not a slice, whose size is a new unknown to torch.export
        return y.narrow(1, 0, grid.height).narrow(2, 0, grid.width)

    def mask(self, grid, device):
        _, key = self.numbers(grid, device)
        return (key >= 0)[:, None]


@dataclass(frozen=True)
class Gathered(KeySet):
    """Groups whose keys are gathered by an index."""

    made: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False, kw_only=True)  # see `ready`

    def tables(self, grid: Grid, device) -> tuple[Int[Tensor, "groups keys"], Bool[Tensor, "groups queries keys"]]:
        """The index of each key, of some other one where there is none, and what is seen."""
        raise NotImplementedError

    def kept_tables(self, grid: Grid, device: torch.device):
        """`tables`, made once: 8 bytes for each key of a group, and one for each pair that is looked at."""
        return self.made or kept(type(self).tables, self, grid, device=device)

    def ready(self, grid, device):
        return replace(self, made=self.tables(grid, device)) if is_passing(device) else self

    def gathered(self, x: Shaped[Tensor, "b H W d"], at: Int[Tensor, "groups keys"]):
        """The entries of a map at raster indices, (b, groups, keys, d)."""
        return rearrange(x.flatten(1, 2).index_select(1, at.flatten()), "b (t n) d -> b t n d", n=at.shape[1])

    def mask(self, grid, device):
        return self.kept_tables(grid, torch.device(device))[1]


@dataclass(frozen=True)
class Positions(Gathered):
    """Groups whose keys are positions of the grid, and of which many share a key."""

    overlap = True

    def keys(self, x):
        return self.gathered(x, self.kept_tables(Grid(*x.shape[1:3]), x.device)[0])

    def split(self, groups, most):
        if groups <= most:
            return super().split(groups, most)
        size = -(-groups // -(-groups // most))  # alike
        ends = [(start, min(start + size, groups)) for start in range(0, groups, size)]
        return [(Some(self, *some), slice(*some)) for some in ends]

    def add_keys(self, whole, part):
        grid, whole, part = Grid(*whole.shape[1:3]), whole.flatten(1, 2), part.to(whole.dtype)
        if whole.device.type != "cpu":
            at, _ = self.kept_tables(grid, whole.device)
            whole.index_add_(1, at.flatten(), part.flatten(1, 2))
            return
        across = part.transpose(1, 2).is_contiguous()  # as gradients of torch's kernel on a CPU lie
        entries, starts, first = kept(taken, self, grid, across, device=whole.device)
        part = (part.transpose(1, 2) if across else part).flatten(1, 2)
        for one, some in zip(whole.narrow(1, int(first), len(starts)), part):
            one += F.embedding_bag(entries, some, starts, mode="sum")  # two thirds of the time of index_add_


@dataclass(frozen=True)
class Some(Positions):
    """The keys alone of some groups of a set."""

    whole: Positions
    first: int
    end: int

    def tables(self, grid, device):
        return tuple(t[self.first : self.end] for t in self.whole.kept_tables(grid, device))


def taken(keys: Gathered, grid: Grid, across: bool, device) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the entries (groups, keys) are of each position, where those of each begin, and the first position.

    Of the positions up to the last that has any. Without what no query sees; ``across``: (keys, groups).
    """
    at, seen = keys.kept_tables(grid, torch.device(device))
    numbers, seen = torch.arange(at.numel(), device=device), seen.any(dim=1)
    numbers = numbers.view(at.T.shape).T if across else numbers.view(at.shape)
    positions, order = at[seen].sort(stable=True)
    first, end = (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)
    starts = torch.searchsorted(positions, torch.arange(first, end, device=device))
    return numbers[seen][order], starts, torch.tensor(first)


@dataclass(frozen=True)
class Neighbours(Positions):
    """Every position with the window around it: ``radius`` = (down, right) steps of ``dilation`` = (down, right).

    Positions that the dilation does not mix are a grid of their own, a class. Each is cut into tiles of queries, with
    the keys that these see between them. Groups are tiles in raster order, of each the classes: a few of them are near
    one another. ``past``: only what comes before in raster order, and itself. ``shift``: at the border a window moves
    inwards, where else it is cut off.
    """

    radius: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    past: bool = False
    shift: bool = False

    def tile(self, device) -> tuple[int, int]:
        """Queries of a tile down and right: so many that a tile's keys are at most 1.6 windows long and wide.

        At most 8, or 32 of a tile that is a line. On CUDA always 8: kernels take 64 queries at a time there, and fewer
        cost as much.
        """
        if torch.device(device).type == "cuda":
            return 8, 8
        p, q = (max(p for p in (1, 2, 4, 8, 16, 32) if p == 1 or p + 2 * r <= 1.6 * (2 * r + 1)) for r in self.radius)
        return (p, q) if 1 in (p, q) else (min(p, 8), min(q, 8))

    def sizes(self, height: int, width: int, device) -> dict[str, int]:
        """Tiles of a class down (y) and right (x), queries in one (p, q), and steps between neighbours (sy, sx)."""
        (p, q), (sy, sx) = self.tile(device), self.dilation
        y, x = (height + p * sy - 1) // (p * sy), (width + q * sx - 1) // (q * sx)
        return dict(y=y, x=x, p=p, q=q, sy=sy, sx=sx)

    def axes(self, grid: Grid, device) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Down and right, of each group: queries (groups, queries, 1) and keys (groups, 1, keys), numbered within
        their class, which of them see which, and the places of the keys on the grid (groups, 1, keys).

        Groups are one axis, so that a graph traced for any size asks for no two of them.
        """
        n = self.sizes(*grid, device)
        number = torch.arange(n["sy"] * n["sx"] * n["y"] * n["x"], device=device).view(-1, 1, 1)
        rest, class_x = rows_and_columns(number, n["sx"])
        rest, class_y = rows_and_columns(rest, n["sy"])
        tile_y, tile_x = rows_and_columns(rest, n["x"])
        found = []
        for tile, first, length, size, radius, step, before in (
            (tile_y, class_y, grid.height, n["p"], self.radius[0], n["sy"], self.past),
            (tile_x, class_x, grid.width, n["q"], self.radius[1], n["sx"], False),
        ):
            query = tile * size + torch.arange(size, device=device).view(-1, 1)
            last = (length - 1 - first) // step  # of its class
            start = query - radius
            if self.shift:
                start = torch.minimum(start, last - 2 * radius).clamp(min=0)
            end = torch.minimum(query if before else start + 2 * radius, last)
            key = start.narrow(1, 0, 1) + torch.arange(size + radius * (1 if before else 2), device=device)
            seen = (key >= start.clamp(min=0)) & (key <= end)
            found.append((query, key, seen, (first + step * key).clamp(min=0).clamp(max=length - 1)))
        return found

    def queries(self, x):
        height, width = x.shape[1:3]
        n = self.sizes(height, width, x.device)
        x = pad(x, 0, 0, 0, n["x"] * n["q"] * n["sx"] - width, 0, n["y"] * n["p"] * n["sy"] - height)
        return rearrange(x, "b (y p sy) (x q sx) d -> b (y x sy sx) (p q) d", **n)

    def tables(self, grid, device):
        (qy, ky, *down), (qx, kx, *right) = self.axes(grid, device)
        (rows_seen, columns_seen), (rows, columns) = (crossed(*pair) for pair in zip(down, right))
        seen = rows_seen & columns_seen
        if self.past:
            above, left = crossed(ky < qy, kx <= qx)
            seen = seen & (above | left)
        at = rearrange(rows * grid.width + columns, "g 1 1 ky kx -> g (ky kx)")
        return at, rearrange(seen, "g p q ky kx -> g (p q) (ky kx)")

    def place(self, y, grid, fill=0.0):
        y = rearrange(y, "b (y x sy sx) (p q) d -> b (y p sy) (x q sx) d", **self.sizes(*grid, y.device))
        return y.narrow(1, 0, grid.height).narrow(2, 0, grid.width)

    def add_queries(self, whole, part):
        whole += self.place(part, Grid(*whole.shape[1:3]))

    def kept(self, grid):
        return min(grid.height, self.radius[0] * self.dilation[0] + 1), 0, grid.width

    def seen_from(self, y, x, grid):
        (ry, rx), (sy, sx) = self.radius, self.dilation
        above, left = min(ry, y // sy) * sy, min(rx, x // sx) * sx
        return [
            (slice(y - above, y, sy), slice(x - left, min(grid.width, x + rx * sx + 1), sx)),
            (slice(y, y + 1), slice(x - left, x + 1, sx)),
        ]


@dataclass(frozen=True)
class SeenByAll(KeySet):
    """Every position with the first ``tokens``."""

    tokens: int

    def first(self, x):
        return Everything().queries(x).narrow(2, 0, least(self.tokens, x.shape[1] * x.shape[2]))

    def queries(self, x):
        return Everything().queries(x)

    def keys(self, x):
        return self.first(x)

    def place(self, y, grid, fill=0.0):
        return Everything().place(y, grid)


@dataclass(frozen=True)
class SeesAll(SeenByAll):
    """The first ``tokens`` positions with all the others."""

    every = False

    def queries(self, x):
        return self.first(x)

    def keys(self, x):
        return Everything().queries(x)

    def place(self, y, grid, fill=0.0):
        return Everything().place(pad(y, 0, 0, 0, grid.size - y.shape[2], fill=fill), grid)

    def mask(self, grid, device):
        return (torch.arange(grid.size, device=device) >= self.tokens)[None, None]
