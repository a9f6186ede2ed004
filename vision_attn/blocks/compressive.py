"""Compressive Transformer: recent rows are remembered as they are, and older ones as learned summaries of cells.

Rae et al. 2019, Compressive Transformer, https://arxiv.org/abs/1911.05507
    A_i = softmax over recent j and older cells c of s_ij and s_ic, those of Transformer-XL
    k̄_c = Σ_{j in c} W_j k_j    v̄_c = Σ_{j in c} w_j v_j
Cost: 2 N ((2 memory + stride) W + N / stride²) d + N d² / heads
Computed: 2.4 ×
Rows are the segments. They leave the memory of ``memory`` rows in bands of ``stride`` rows, when the last of a band is
old enough, and then ``stride`` × ``stride`` pixels are one cell: so nothing of the past is lost, and up to ``memory`` +
``stride`` - 1 rows are exact. Exact keys and cells share one softmax. A cell has the place of its centre; cells that
are cut off by the border are filled with zeros, and all start near means. Without ``causal`` rows below are remembered
and compressed in the same way. Prefix tokens see all pixels as they are (causal: one another), and all see them.
``reconstruction`` is the paper's auxiliary loss, attention over what is compressed beside attention over its cells.
When pixels are sampled, ``memory`` + ``stride`` rows and all cells are kept, and each cell is made once.
Deviations: the kernel of cells learns from the main loss, too (the paper: from the auxiliary loss alone). Keys and
values are convolved (there: hidden states), values with one kernel for all channels of a head, so that the output
stays weights @ v. There is no limit to the compressed memory.

>>> from vision_attn import Grid
>>> print(Compressed(memory=1, band=2, past=True).draw(Grid(9, 7), 6, 3))
+++++++
+++++++
+++++++
+++++++
#######
#######
###@---
-------
-------
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines.cache import Store
from ..engines.union import flash
from ..grid import Grid
from ..key_set import Everything, KeySet, Tiles, pad, rows_and_columns
from ..mixer import Mixer
from ..recurrence import Recent, RecentRows, RelativeMixer, RelativePast


@dataclass(frozen=True)
class Compressed(Recent):
    """What is seen as it is; what is older is seen in cells."""

    def older(self, qy, ky):
        """Whether a row sees another in cells."""
        first, behind = self.span(qy)
        return ky < first if self.past else (ky < first) | (ky >= behind)

    def draw(self, grid, y, x):
        """As that of `Pattern`, ``+`` what is seen in a cell."""
        rows = super().draw(grid, y, x).split("\n")
        return "\n".join("+" * len(seen) if self.older(y, row) else seen for row, seen in enumerate(rows))


@dataclass(frozen=True)
class OlderCells(KeySet):
    """Every position with the cells of older rows; keys come as the map of cells."""

    pattern: Compressed

    def queries(self, x):
        return Everything().queries(x)

    def place(self, y, grid, fill=0.0):
        return Everything().place(y, grid)

    def mask(self, grid, device):
        n = Tiles((self.pattern.band,) * 2).sizes(*grid)
        row, _ = rows_and_columns(torch.arange(grid.size, device=device)[:, None], grid.width)
        band, _ = rows_and_columns(torch.arange(n["y"] * n["x"], device=device), n["x"])
        return self.pattern.older(row, band * self.pattern.band)[None]

    def parts(self, grid):
        """Without a mask: rows that see the same cells above, and those that see the same cells below."""
        memory, band = self.pattern.memory, self.pattern.band
        bands, sets = -(-grid.height // band), []
        for first in range(memory + band, grid.height, band):
            sets.append(SomeCells(first, min(first + band, grid.height), 0, (first - memory) // band))
        if not self.pattern.past:
            for number in range(1, bands):
                end = number * band - memory
                if end > 0:
                    sets.append(SomeCells(max(0, end - band), end, number, bands))
        return tuple(sets)


@dataclass(frozen=True)
class SomeCells(KeySet):
    """All positions of the rows ``first`` … ``end`` - 1 with all cells of the bands ``band`` … ``last`` - 1. Views."""

    first: int
    end: int
    band: int
    last: int

    def queries(self, x):
        return x[:, self.first : self.end].flatten(1, 2)[:, None]

    def keys(self, x):
        return x[:, self.band : self.last].flatten(1, 2)[:, None]

    def place(self, y, grid, fill=0.0):
        y = y[:, 0].unflatten(1, (-1, grid.width))
        return pad(y, 0, 0, 0, 0, self.first, grid.height - self.end, fill=fill)


class Convolved(nn.Module):
    """Keys and values of cells of ``stride`` × ``stride`` pixels: a convolution with that stride, head by head.

    Args:
        heads: heads.
        channels: of a head's keys.
        stride: pixels along a side of a cell.
    """

    def __init__(self, heads: int, channels: int, stride: int, device=None, dtype=None):
        super().__init__()
        self.tiles = Tiles((stride, stride))
        self.of_keys = nn.Parameter(torch.empty(heads * channels, channels, stride, stride, device=device, dtype=dtype))
        self.of_values = nn.Parameter(torch.empty(heads, stride, stride, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Means of cells; the weights of values are a tenth off, so that no two of them are alike."""
        pixels = self.of_values[0].numel()
        eye = torch.eye(self.of_keys.shape[1])[..., None, None] / pixels
        with torch.no_grad():
            self.of_keys.unflatten(0, (-1, self.of_keys.shape[1])).copy_(eye)
        nn.init.normal_(self.of_values, mean=1 / pixels, std=0.1 / pixels)

    def forward(
        self, k: Float[Tensor, "B heads N dk"], v: Float[Tensor, "B heads N dv"], grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Positions by their cells, in raster order: (B, heads, cells, dk) and (B, heads, cells, dv)."""
        grid = Grid.of(grid)  # hooks of modules may have made a plain tuple of it
        k, v = (rearrange(self.tiles.queries(grid.maps(t)), "(B n) c s d -> B n c s d", n=t.shape[1]) for t in (k, v))
        # not einops, for which a parameter is a type of its own, a reason to compile again
        of_keys = self.of_keys.to(k.dtype).unflatten(0, (k.shape[1], -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        of_values = self.of_values.to(v.dtype).flatten(1)[:, None, None]
        return k.flatten(3) @ of_keys, (of_values @ v)[..., 0, :]


class Block(RelativeMixer):
    """Attention to recent rows, and to cells of older ones, with relative positions.

    Args:
        memory: rows that are seen as they are above (not ``causal``: and below), at least.
        stride: pixels along a side of a cell.
        causal: only what comes before in raster order, and itself.
        Others: those of `RelativeMixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False  # a cell's values need not have weights that sum to 1

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        memory: check.Count = 3,
        stride: int = 4,
        causal: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.count("memory", memory)
        check.positive_int("stride", stride)
        check.boolean("causal", causal)
        dd = dict(device=device, dtype=dtype)
        super().__init__(Compressed(memory, stride, past=causal), dim, num_heads, **dd, **mixer)
        self.cells = Convolved(self.num_heads, self.head_dims[0], stride, **dd)

    def summaries(self, k, v, grid):
        k, v = (grid.split(t)[1] for t in (k, v))
        n = self.cells.tiles.sizes(*grid)
        known = self.known(*self.cells(k, v, grid), *self.waves_at(*self.centres(grid, k.device)))
        return [(OlderCells(self.exact), *(Grid(n["y"], n["x"]).maps(t) for t in known))]

    def centres(self, grid, device):
        """Row and column of the centre of each cell."""
        n, stride = self.cells.tiles.sizes(*grid), self.exact.band
        at = rows_and_columns(torch.arange(n["y"] * n["x"], device=device), n["x"])
        return tuple(place * stride + (stride - 1) / 2 for place in at)

    def weights(self, q, k, grid):
        prefix, (height, width), c = grid.prefix_of(q.shape[2]), grid, self.exact.band
        down, right = -(-height // c), -(-width // c)
        band, side = (t.flatten() for t in torch.meshgrid(torch.arange(down), torch.arange(right), indexing="ij"))
        band, side, row = band.to(q.device), side.to(q.device), torch.arange(grid.size, device=q.device) // width
        image = F.pad(
            k[:, :, prefix:].mT.unflatten(3, grid).flatten(1, 2), (0, right * c - width, 0, down * c - height)
        )
        cells = F.conv2d(image, self.cells.of_keys.to(k.dtype), stride=c, groups=k.shape[1])
        cells = cells.flatten(2).unflatten(1, (k.shape[1], -1))  # (B, heads, d, cells)
        asking = q + self.u[:, None]
        place = torch.arange(grid.size, device=q.device)
        to_pixels = self.relative(q[:, :, prefix:], grid, place // width, place % width)
        to_cells = self.relative(q[:, :, prefix:], grid, c * band + (c - 1) / 2, c * side + (c - 1) / 2)
        old = c * band + c - 1 < row[:, None] - self.exact.memory
        if not self.causal:
            old = old | (c * band > row[:, None] + self.exact.memory)
        seen = torch.cat([self.exact.mask(grid, prefix, q.device), F.pad(old, (0, 0, prefix, 0))], dim=1)
        scores = torch.cat(
            [
                asking @ k.mT + F.pad(to_pixels, (prefix, 0, prefix, 0)),
                asking @ cells + F.pad(to_cells, (0, 0, prefix, 0)),
            ],
            dim=3,
        )
        weights = (self.scale * scores).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        to_pixels, to_cells = weights.split([q.shape[2], down * right], dim=3)
        y, x = place // width, place % width
        inside = (y // c == band[:, None]) & (x // c == side[:, None])  # (cells, N)
        shares = inside * self.cells.of_values.to(q.dtype)[:, y % c, x % c][:, None]
        return to_pixels + F.pad(to_cells @ shares, (prefix, 0))

    def reconstruction(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> Float[Tensor, ""]:
        """The paper's auxiliary loss: attention over what is compressed beside attention over its cells.

        The mean square of the difference, over all pixels that see cells and all channels; 0 where none does. It has a
        gradient to the kernel of the cells alone. Cost: 2 N² d.

        Args:
            x: tokens, as `forward` takes them.
            grid: of their positions.

        Raises:
            ValueError: as `forward`.
        """
        grid = Grid.of(grid)
        with torch.no_grad():
            q, k, v = (grid.split(t)[1] for t in self.heads(x, grid))
            waves = self.waves_of(grid, 0, x.device)
            pixels = [t.unflatten(2, grid) for t in self.known(k, v, *waves)]
            asking = self.asking(q, *waves, like=pixels[0]).unflatten(2, grid)
        ((_, *cells),) = self.summaries(k, v, grid)
        cells = [t.unflatten(0, k.shape[:2]) for t in cells]  # (B, heads, bands, cells of a band, d)
        total, count = 0 * self.cells.of_values.sum(), 0
        for row in range(grid.height):
            old = [r for r in range(grid.height) if self.exact.older(row, r)]
            if old:
                bands = sorted({r // self.exact.band for r in old})
                exact, short = (
                    flash(asking[:, :, row], *(t[:, :, some].flatten(2, 3) for t in known), scale=self.scale)
                    for known, some in ((pixels, old), (cells, bands))
                )
                total = total + (exact - short)[..., : v.shape[3]].square().sum()
                count += v[:, :, : grid.width].numel()
        return total / max(1, count)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        """As that of `Mixer`; ``full=True`` mixes all of the past anew."""
        if full or not self.causal:
            return Mixer.new_cache(self, batch, grid, device=device, dtype=dtype)
        grid, factory = Grid.of(grid), self.factory(device, dtype)
        past = CompressedPast(self, batch, grid, **factory)
        return RelativePast(self, past, *self.waves_of(grid, 0, factory["device"]))


class CompressedPast:
    """The past of one mixer: recent rows as they are, and cells, made when their last pixel is there.

    Args:
        mixer: whose past it is.
        batch: number of images.
        grid: of the image that is made.
    """

    def __init__(self, mixer: Block, batch: int, grid: Grid, device=None, dtype=None):
        self.mixer, self.grid, dd = mixer, grid, dict(device=device, dtype=dtype)
        dims = (mixer.width(*mixer.head_dims),) * 2
        self.recent = Store([RecentRows(mixer.exact)], grid, batch, mixer.num_heads, dims=dims, **dd)
        n = mixer.cells.tiles.sizes(*grid)
        self.cells = [torch.zeros(batch, mixer.num_heads, n["y"], n["x"], dim, **dd) for dim in dims]

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(t.nbytes for t in (*self.recent.past, *self.cells))

    def step(self, q, k, v, place: int):
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        (y, x), band = divmod(place, self.grid.width), self.mixer.exact.band
        self.recent.put(y, x, [k, v])
        first, _ = self.mixer.exact.span(y)
        older = [cells[:, :, : max(0, first) // band].flatten(2, 3) for cells in self.cells]
        keys, values = (torch.cat(some, dim=2) for some in zip(older, *self.recent.read(y, x)))
        out = flash(q[:, :, None], keys, values, scale=self.mixer.scale)
        if x == self.grid.width - 1 and y % band == band - 1:
            self.compress(y // band)
        return out[:, :, 0]

    def compress(self, number: int) -> None:
        """Makes the cells of a band of rows."""
        mixer, band = self.mixer, self.mixer.exact.band
        rows = [row % self.recent.rows for row in range(number * band, (number + 1) * band)]
        k, v = (t[:, :, rows, :, :dim].flatten(2, 3) for t, dim in zip(self.recent.past, mixer.head_dims))
        here = Grid(band, self.grid.width)
        row, column = mixer.centres(here, k.device)
        waves = mixer.waves_at(row + number * band, column)
        for cells, made in zip(self.cells, mixer.known(*mixer.cells(k, v, here), *waves)):
            cells[:, :, number] = made
