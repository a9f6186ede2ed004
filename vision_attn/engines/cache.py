"""Keys and values kept while an image is made pixel by pixel, no more than the pattern will look at again.

Each key set of a causal pattern says which rows and columns of the past it needs (``kept``), those of the same columns
share them, and reads what the next pixel sees (``seen_from``): slices, not masks. A step then costs what the pattern
looks at, not the whole past.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..grid import Grid
from ..key_set import Everything, KeySet
from ..pattern import Past, Pattern


class Store:
    """Keys and values for key sets that need the same columns: their last rows, each (B, heads, rows, columns, d)."""

    def __init__(self, sets: Sequence[KeySet], grid: Grid, *shape: int, dims: tuple[int, int], device=None, dtype=None):
        self.sets, self.grid = sets, grid
        self.rows, self.first, self.columns = max(keys.kept(grid) for keys in sets)
        shape = (*shape, self.rows, self.columns)
        self.past = [torch.zeros(*shape, dim, device=device, dtype=dtype) for dim in dims]

    def put(self, y: int, x: int, entries: list[Float[Tensor, "B heads d"]]) -> None:
        if 0 <= x - self.first < self.columns:
            for past, entry in zip(self.past, entries):
                past[:, :, y % self.rows, x - self.first] = entry

    def read(self, y: int, x: int) -> list[list[Float[Tensor, "B heads keys d"]]]:
        """Keys and values that the pixel at (y, x) sees, in pieces; views where they can be."""
        pieces = []
        for rows, columns in (seen for keys in self.sets for seen in keys.seen_from(y, x, self.grid)):
            columns = slice(columns.start - self.first, columns.stop - self.first, columns.step)
            for some in around(rows, self.rows) if self.rows < self.grid.height else [rows]:
                pieces.append([past[:, :, some, columns].flatten(2, 3) for past in self.past])
        return pieces


def around(rows: slice, size: int) -> list[slice]:
    """Where a ring of ``size`` rows holds ``rows``, in their order: slices, for a list is copied to the device."""
    start, step, found = rows.start, rows.step or 1, []
    while start < rows.stop:
        first = start % size
        count = min(len(range(start, rows.stop, step)), len(range(first, size, step)))
        found.append(slice(first, first + (count - 1) * step + 1, step))
        start += count * step
    return found or [slice(0, 0)]


class Whole(Store):
    """All of the past, of which the pixel at (y, x) sees what ``pattern`` allows; ``masked``: or is shown all of it."""

    def __init__(self, pattern: Pattern, masked: bool, *args, **options):
        super().__init__([Everything()], *args, **options)
        self.pattern, self.masked = pattern, masked
        self.row, self.indices = -1, ()  # of the image, and what each of its pixels sees

    def read(self, y, x):
        last = y * self.grid.width + x + 1
        past = [past.flatten(2, 3)[:, :, :last] for past in self.past]
        if self.masked or isinstance(self.pattern, Past):
            return [past]
        if y != self.row:  # a row at once: to count is to wait for the device
            self.row, self.indices = y, self.seen(y)
        return [[entries.index_select(2, self.indices[x]) for entries in past]]

    def seen(self, y: int) -> tuple[Int[Tensor, "seen"], ...]:
        """Raster indices that each pixel of row ``y`` sees."""
        width, device = self.grid.width, self.past[0].device
        x, place = torch.arange(width, device=device)[:, None], torch.arange((y + 1) * width, device=device)
        mask = self.pattern.allowed(y, x, place // width, place % width, self.grid)
        mask = mask.expand(width, len(place))
        return mask.nonzero()[:, 1].split(mask.sum(dim=1).tolist())

    def mask(self, y, x):
        place = torch.arange(y * self.grid.width + x + 1, device=self.past[0].device)
        ones = torch.ones_like(place, dtype=torch.bool)
        return ones & self.pattern.allowed(y, x, place // self.grid.width, place % self.grid.width, self.grid)


class PatternCache:
    """The past of one mixer.

    Args:
        pattern: causal.
        batch, heads: number of images, and of heads of the mixer.
        grid: of the image that is made.
        dims: channels of a head's keys and values.
        scale: factor on q · k.
        full: keep the whole past, read all of it and mask what the pattern does not allow.
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        heads: int,
        grid: Grid,
        dims: tuple[int, int],
        scale: float,
        full: bool = False,
        device=None,
        dtype=None,
    ):
        self.grid, self.scale, self.full = grid, scale, full
        self.shares, self.stores = pattern.shares(heads), []
        for part, share in zip(pattern.by_head(), self.shares):
            options = dict(dims=dims, device=device, dtype=dtype)
            sets = part.key_sets()
            if full or any(type(keys).seen_from is KeySet.seen_from for keys in sets):
                self.stores.append([Whole(part, full, grid, batch, share, **options)])
            else:
                by_columns = {}
                for keys in sets:
                    by_columns.setdefault(keys.kept(grid)[1:], []).append(keys)
                self.stores.append([Store(some, grid, batch, share, **options) for some in by_columns.values()])

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(past.nbytes for stores in self.stores for store in stores for past in store.past)

    def step(
        self, q: Float[Tensor, "B heads dq"], k: Float[Tensor, "B heads dk"], v: Float[Tensor, "B heads dv"], place: int
    ) -> Float[Tensor, "B heads dv"]:
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        y, x = divmod(place, self.grid.width)
        outs = []
        for stores, query, *entries in zip(self.stores, *(t.split(self.shares, dim=1) for t in (q, k, v))):
            if not query.shape[1]:
                continue
            for store in stores:
                store.put(y, x, entries)
            pieces = [piece for store in stores for piece in store.read(y, x)]
            keys, values = pieces[0] if len(pieces) == 1 else (torch.cat(some, dim=2) for some in zip(*pieces))
            mask = stores[0].mask(y, x)[None] if self.full else None
            out = F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=mask, scale=self.scale)
            outs.append(out[:, :, 0])
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class FullPast:
    """All of the past of a mixer in raster order, whatever it sees of it.

    Args:
        batch, heads: number of images, and of heads of the mixer.
        grid: of the image that is made.
        dims: channels of a head in each of the tensors to keep.
    """

    def __init__(self, batch: int, heads: int, grid: Grid, dims: list[int], device=None, dtype=None):
        self.grid = grid
        self.past = [torch.zeros(batch, heads, grid.size, dim, device=device, dtype=dtype) for dim in dims]

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(past.nbytes for past in self.past)

    def put(self, place: int, *entries: Float[Tensor, "B heads d"]) -> None:
        for past, entry in zip(self.past, entries, strict=True):
            past[:, :, place] = entry


class RemixedPast(FullPast):
    """The past of a mixer that is mixed anew for every pixel: right for any causal mixer, and as slow.

    Args:
        mix: of the mixer.
        Others: those of `FullPast`, ``dims`` of queries, keys and values.
    """

    def __init__(self, mix, *args, **options):
        super().__init__(*args, **options)
        self.mix = mix

    def step(
        self, q: Float[Tensor, "B heads dq"], k: Float[Tensor, "B heads dk"], v: Float[Tensor, "B heads dv"], place: int
    ) -> Float[Tensor, "B heads dv"]:
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        self.put(place, q, k, v)
        return self.mix(*self.past, self.grid)[:, :, place]
