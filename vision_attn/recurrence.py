"""Rows as segments: each row of an image sees itself and the rows that are still in its memory.

What Transformer-XL and the Compressive Transformer share: which rows are recent, scores of relative positions, and keys
and values that give no gradient to what they were made of.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from . import check
from .engines.cache import PatternCache
from .engines.union import attend
from .grid import Grid
from .key_set import KeySet, Only, pad
from .mixer import Mixer
from .pattern import Directed, Pattern, Row
from .precision import at_least_float32, in_float32_where_slow, outside_autocast
from .traced import fixed


@dataclass(frozen=True)
class Recent(Directed):
    """The rows of all bands but those that are wholly more than ``memory`` rows away.

    Bands are ``band`` rows each, from the top. ``past``: own row to the left, and itself, and rows above.
    """

    memory: int
    band: int = 1

    def span(self, qy):
        """The first row that a row sees, and the first behind those that it would see both ways."""
        return tuple((qy + m) // self.band * self.band for m in (-self.memory, self.memory + self.band))

    def rows(self, qy, ky):
        """Whether a row sees another, both ways."""
        first, behind = self.span(qy)
        return (ky >= first) & (ky < behind)

    def allowed(self, qy, qx, ky, kx, grid):
        seen = self.rows(qy, ky) & (qx == qx) & (kx == kx)
        return seen & ((ky < qy) | ((ky == qy) & (kx <= qx))) if self.past else seen

    def key_sets(self):
        return (RecentRows(self),)


@dataclass(frozen=True)
class RecentRows(KeySet):
    """Every position with the rows that a `Recent` shows it."""

    pattern: Recent

    overlap = True

    def around(self, height, device) -> Int[Tensor, "H rows"]:
        """Rows that may be recent for each row, some beyond the border. With ``past`` it is itself the last one."""
        away = self.pattern.memory + self.pattern.band - 1
        beside = torch.arange(-away, 1 if self.pattern.past else away + 1, device=device)
        return torch.arange(height, device=device)[:, None] + beside

    def there(self, x):
        """`around`, by other rows beyond the border, which are not seen."""
        rows = self.around(x.shape[1], x.device)
        return rows.clamp(min=0).clamp(max=x.shape[1] - 1)

    def queries(self, x):
        return x

    def place(self, y, grid, fill=0.0):
        return y

    def keys(self, x):
        rows = self.there(x)
        return rearrange(x.index_select(1, rows.flatten()), "b (H r) W d -> b H (r W) d", r=rows.shape[1])

    def add_keys(self, whole, part):
        rows = self.there(whole)
        part = rearrange(part, "b H (r W) d -> b (H r) W d", r=rows.shape[1])
        whole.index_add_(1, rows.flatten(), part.to(whole.dtype))

    def mask(self, grid, device):
        y, x = (torch.arange(n, device=device) for n in grid)
        row = self.around(grid.height, device)
        seen = self.pattern.rows(y[:, None], row) & (row >= 0) & (row < grid.height)
        seen = seen[:, None, :, None].expand(-1, -1, -1, grid.width)
        if self.pattern.past:
            left = (x <= x[:, None])[:, None]  # (queries, 1, keys)
            seen = seen & torch.cat([torch.ones_like(left).expand(-1, row.shape[1] - 1, -1), left], dim=1)
        return seen.flatten(2)

    def parts(self, grid):
        """Without a mask: the first rows, which see all before them, bands of later rows, and what these remember."""
        if not self.pattern.past:
            return (self,)
        memory, band = self.pattern.memory, self.pattern.band
        later = grid.height > memory
        sets = (FirstRows(memory), memory), (Bands(memory, band), later), (Remembered(memory, band), memory and later)
        return tuple(keys for keys, there in sets if there)

    def kept(self, grid):
        return min(grid.height, self.pattern.memory + self.pattern.band), 0, grid.width

    def seen_from(self, y, x, grid):
        first = max(0, (y - self.pattern.memory) // self.pattern.band * self.pattern.band)
        return [(slice(first, y), slice(0, grid.width)), (slice(y, y + 1), slice(0, x + 1))]


@dataclass(frozen=True)
class FirstRows(KeySet):
    """The first ``rows`` rows, in which each position sees all before it and itself. A view, no copy."""

    rows: int

    causal, every = True, False

    def queries(self, x):
        return x[:, : self.rows].flatten(1, 2)[:, None]

    def place(self, y, grid, fill=0.0):
        y = y[:, 0].unflatten(1, (-1, grid.width))
        return pad(y, 0, 0, 0, 0, 0, grid.height - y.shape[1], fill=fill)


@dataclass(frozen=True)
class Bands(KeySet):
    """Bands of ``band`` rows behind the first ``memory`` rows: each position with its band, up to itself."""

    memory: int
    band: int

    causal, every = True, False

    def queries(self, x):
        later = x[:, self.memory :]
        later = pad(later, 0, 0, 0, 0, 0, -later.shape[1] % self.band)
        return rearrange(later, "b (n c) W d -> b n (c W) d", c=self.band)

    def place(self, y, grid, fill=0.0):
        y = rearrange(y, "b n (c W) d -> b (n c) W d", c=self.band)
        return F.pad(y[:, : grid.height - self.memory], (0, 0, 0, 0, self.memory, 0), value=fill)

    def add_queries(self, whole, part):
        later = whole[:, self.memory :]
        later += rearrange(part, "b n (c W) d -> b (n c) W d", c=self.band)[:, : later.shape[1]]

    def add_keys(self, whole, part):
        self.add_queries(whole, part)


@dataclass(frozen=True)
class Remembered(Bands):
    """Each band with the ``memory`` rows before it, all of which its positions see. Keys are a view, no copy."""

    causal = False
    overlap = True

    def keys(self, x):
        height, width = x.shape[1:3]
        start = (height - self.memory - 1) // self.band * self.band  # of what the last band remembers
        known = x[:, : start + self.memory].flatten(1, 2)
        return known.unfold(1, self.memory * width, self.band * width).transpose(2, 3)

    def add_keys(self, whole, part):
        part = part.unflatten(2, (self.memory, whole.shape[2]))
        last = (part.shape[1] - 1) * self.band + 1
        for row in range(self.memory):
            target = whole[:, row : row + last : self.band]
            target += part[:, :, row]


class RelativeMixer(Mixer):
    """Softmax attention whose scores also depend on how far apart query and key are, by waves.

        s_ij = scale · [(q_i + u) · k_j + (q_i + w) · W_R e(i - j)]

    e are the sines, then the cosines of the distance down and of that to the right, of frequencies 10000^(-f / waves),
    f = 0, 1, … A wave of a difference is a sum of products of waves of i and of j: so queries and keys have 4 ``waves``
    channels more, and any pattern is computed as without. Prefix tokens have no place; their channels are 0.

    Args:
        pattern: who sees whom.
        waves: frequencies along each axis.
        stop_gradient: keys and values of other rows give no gradient to the input, only to the projections.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    not_rotary = "distances are in its scores already, by waves that queries and keys are not turned for"
    undecayed = ("u", "w")

    def __init__(
        self,
        pattern: Pattern,
        dim: int,
        num_heads: int | None = None,
        *,
        waves: int = 8,
        stop_gradient: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("waves", waves)
        check.boolean("stop_gradient", stop_gradient)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.exact, self.waves, self.stop_gradient = pattern, waves, stop_gradient
        dd, channels = dict(device=device, dtype=dtype), self.key_dim // self.num_heads
        self.u, self.w = (nn.Parameter(torch.empty(self.num_heads, channels, **dd)) for _ in range(2))
        self.W_R = nn.Parameter(torch.empty(self.num_heads, channels, 4 * waves, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """u and w: N(0, 0.02²). W_R: N(0, 1 / fan in)."""
        nn.init.normal_(self.u, std=0.02)
        nn.init.normal_(self.w, std=0.02)
        nn.init.normal_(self.W_R, std=(4 * self.waves) ** -0.5)

    @property
    def causal(self):
        return self.exact.causal

    def forward(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> Float[Tensor, "B tokens dim"]:
        """As that of `Mixer`."""
        if not (self.stop_gradient and x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x, grid)
        (q, *own), (_, *stopped) = self.heads(x, grid), self.heads(x.detach(), grid)
        out = self.attend(q, *own, Grid.of(grid), *stopped)
        return self.proj_drop(self.proj(rearrange(out, "B n t d -> B t (n d)")))

    @in_float32_where_slow
    def mix(self, q, k, v, grid):
        return self.attend(q, k, v, grid)

    def attend(self, q, k, v, grid, *stopped):
        """`mix`; rows take ``stopped`` keys and values of one another, if given, in place of k and v."""
        waves = self.waves_of(grid, grid.prefix_of(q.shape[2]), q.device)
        own, others, pattern = self.known(k, v, *waves), [], self.exact
        if stopped:
            pattern = Row(past=self.causal)
            rest = [grid.maps(grid.split(t)[1]) for t in self.known(*stopped, *waves)]
            others += [(Only(keys, pattern, allow=False), *rest) for keys in self.exact.key_sets()]
        others += self.summaries(*(stopped or (k, v)), grid)
        q = self.asking(q, *waves, like=own[0])
        out = attend(q, *own, grid, pattern, scale=self.scale, dropout=self.dropout, others=others)
        return out[..., : v.shape[3]]

    def summaries(self, k, v, grid) -> list[tuple[KeySet, Tensor, Tensor]]:
        """What is under the same softmax besides, as `engines.union.attend` takes it, made of keys and values."""
        return []

    def waves_of(self, grid, prefix: int, device) -> tuple[Tensor, Tensor]:
        """`waves_at` all tokens; those of prefix tokens are 0."""
        y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        return tuple(F.pad(t, (0, 0, prefix, 0)) for t in self.waves_at(y.flatten(), x.flatten()))

    def waves_at(self, y: Shaped[Tensor, "n"], x: Shaped[Tensor, "n"]) -> tuple[Tensor, Tensor]:
        """Sines and cosines (n, 2 waves) at places, in at least float32, first of the row, then of the column."""
        dtype = torch.promote_types(self.u.dtype, torch.float32)
        slower = torch.arange(self.waves, device=y.device, dtype=dtype) / self.waves
        frequency = torch.full_like(slower, 10000).pow(-slower)
        angle = torch.cat([place.to(dtype)[:, None] * frequency for place in (y, x)], dim=1)
        return angle.sin(), angle.cos()

    def asking(
        self, q: Float[Tensor, "B heads n dk"], sines: Tensor, cosines: Tensor, like: Tensor
    ) -> Float[Tensor, "B heads n width"]:
        """Queries with what they ask of the waves; in width and type ``like`` keys of `known`."""
        with outside_autocast(q):
            q, (u, w, W_R) = q.to(sines.dtype), (t.to(sines.dtype) for t in (self.u, self.w, self.W_R))
            of_sines, of_cosines = ((q + w[:, None]) @ W_R).chunk(2, dim=-1)
            # sin ω(i - j) = sin ωi cos ωj - cos ωi sin ωj    cos ω(i - j) = cos ωi cos ωj + sin ωi sin ωj
            turned = of_cosines * sines - of_sines * cosines, of_sines * sines + of_cosines * cosines
            return _widened(torch.cat([q + u[:, None], *turned], dim=-1), fixed(like.shape[-1])).to(like.dtype)

    def known(
        self, k: Float[Tensor, "B heads n dk"], v: Float[Tensor, "B heads n dv"], sines: Tensor, cosines: Tensor
    ) -> tuple[Float[Tensor, "B heads n width"], Float[Tensor, "B heads n width"]]:
        """Keys with their waves and values, in the type of values, and as wide as one another, which kernels want."""
        waves = torch.cat([sines, cosines], dim=1).to(v.dtype).expand(*k.shape[:2], -1, -1)
        width = self.width(fixed(k.shape[3]), fixed(v.shape[3]))
        return _widened(torch.cat([k.to(v.dtype), waves], dim=-1), width), _widened(v, width)

    def width(self, key: int, value: int) -> int:
        """Channels that `known` makes of those of keys and values: a multiple of 8, for kernels on CUDA."""
        return -(-max(key + 4 * self.waves, value) // 8) * 8

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        scores = torch.einsum("bnid,bnjd->bnij", q + self.u[:, None], k)
        place = torch.arange(grid.size, device=q.device)
        relative = self.relative(q[:, :, prefix:], grid, place // grid.width, place % grid.width)
        scores = self.scale * (scores + F.pad(relative, (prefix, 0, prefix, 0)))
        return scores.masked_fill(~self.exact.mask(grid, prefix, q.device), -torch.inf).softmax(dim=-1)

    def relative(self, q, grid, row: Shaped[Tensor, "n"], column: Shaped[Tensor, "n"]) -> Float[Tensor, "B heads N n"]:
        """(q_i + w) · W_R e(i - j) of all positions with n places, distance by distance: the definition."""
        place, wide = torch.arange(grid.size, device=q.device), at_least_float32(q)
        down, right = (place // grid.width)[:, None] - row, (place % grid.width)[:, None] - column
        asked = torch.einsum("bnid,ndf->nfbi", q + self.w[:, None], self.W_R)[..., None].unflatten(1, (2, 2, -1))
        scores = torch.zeros(*asked.shape[4:5], asked.shape[0], grid.size, len(row), dtype=q.dtype, device=q.device)
        for axis, apart in enumerate((down, right)):
            for f in range(self.waves):
                angle = apart.to(wide) * 10000 ** (-f / self.waves)
                of_sine, of_cosine = asked[:, :, axis, f].transpose(0, 1)  # (heads, B, N, 1)
                part = of_sine * angle.sin().to(q.dtype) + of_cosine * angle.cos().to(q.dtype)
                scores = scores + part.transpose(0, 1)
        return scores

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        """As that of `Mixer`."""
        if not self.causal:
            return super().new_cache(batch, grid)
        grid, factory = Grid.of(grid), self.factory(device, dtype)
        dims = (self.width(*self.head_dims),) * 2
        past = PatternCache(self.exact, batch, self.num_heads, grid, dims, self.scale, full, **factory)
        return RelativePast(self, past, *self.waves_of(grid, 0, factory["device"]))


class RelativePast:
    """A cache of keys that have their waves, of which queries ask at every step.

    Args:
        mixer: whose past it is.
        past: a cache of queries, keys and values as `RelativeMixer.known` makes them.
        sines, cosines: of all positions.
    """

    def __init__(self, mixer: RelativeMixer, past, sines: Tensor, cosines: Tensor):
        self.mixer, self.past, self.sines, self.cosines = mixer, past, sines, cosines

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return self.past.nbytes

    def step(self, q, k, v, place: int):
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        waves = self.sines[place : place + 1], self.cosines[place : place + 1]
        key, value = self.mixer.known(k[:, :, None], v[:, :, None], *waves)
        query = self.mixer.asking(q[:, :, None], *waves, like=key)
        return self.past.step(*(t[:, :, 0] for t in (query, key, value)), place)[..., : v.shape[-1]]


def _widened(t: Tensor, width: int) -> Tensor:
    """The tensor with zeros behind its channels."""
    more = width - fixed(t.shape[-1])
    return F.pad(t, (0, more)) if more else t
