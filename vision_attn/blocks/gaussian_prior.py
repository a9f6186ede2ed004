"""Gaussian prior: dense attention that expects what matters to be near, by a bell around each pixel that heads learn.

Guo et al. 2019, Gaussian Transformer; Yang et al. 2018, Localness, https://arxiv.org/abs/1810.10182
    A_i = softmax over all j of q_i · k_j d^-½ + B_ij
    B_ij = -(r_j - r_i - a_r)² / 2 σ_r² - (c_j - c_i - a_c)² / 2 σ_c²      r: row, c: column
Cost: 2 N² d
Computed: 1.1 ×
Every head learns its widths σ and its centre a, in pixels, by axis: log σ starts at log ``width``, a at 0. The square
is one of products of what a query knows by what a key knows, so that B is made by four more channels of q and k and no
matrix: (u_r / σ_r², u_c / σ_c², 1, t_i) · (r_j, c_j, s_j, 1) for u = r + a, with the squares alone in t and s. They
are large where they cancel: coordinates are centred, and everything is computed in at least float32. FlexAttention
(``route("flex")``) adds B itself, from a table by how far a key is down and right.
Prefix tokens have no place: B = 0 between them and all others.
With ``causal=True`` a position looks at itself and at what comes before it in raster order; prefix tokens come first
of all and see only one another.
Deviations: two axes (the papers: a line of text). Centre and width are parameters of a head (Yang et al. predict them
from the query, inside the sentence). Guo et al.'s offset, a penalty on a word's own place, is left out.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..engines import flex
from ..engines.cache import PatternCache
from ..engines.union import attend
from ..grid import Grid
from ..mixer import Mixer
from ..pattern import All, Past
from ..precision import at_least_float32, outside_autocast


class Block(Mixer):
    """Dense attention with a Gaussian prior.

    Args:
        width: σ in pixels, at first, of every head and both axes.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, dim, num_heads=None, *, width: float = 5.0, causal: bool = False, device=None, dtype=None, **mixer
    ):
        check.positive("width", width)
        check.boolean("causal", causal)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.width, self.causal = width, causal
        per_head = (torch.empty(self.num_heads, device=device, dtype=dtype) for _ in range(4))
        self.log_sigma_r, self.log_sigma_c, self.a_r, self.a_c = map(nn.Parameter, per_head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the widths to ``width``, and the centres to the pixel itself."""
        for log_sigma, a in ((self.log_sigma_r, self.a_r), (self.log_sigma_c, self.a_c)):
            nn.init.constant_(log_sigma, math.log(self.width))
            nn.init.zeros_(a)

    def mix(self, q, k, v, grid):
        pattern = Past() if self.causal else All()
        if flex.takes(q, v, pattern, self.dropout):
            return flex.attend(q, k, v, grid, pattern, scale=self.scale, table=self.bell(grid))
        prefix, wide = grid.prefix_of(q.shape[2]), at_least_float32(v)
        of_q, of_k = (F.pad(t, (0, 0, prefix, 0)).expand(q.shape[0], -1, -1, -1) for t in self.channels(grid, wide))
        with outside_autocast(v):
            q, k = torch.cat([self.scale * q.to(wide), of_q], dim=-1), torch.cat([k.to(wide), of_k], dim=-1)
            return attend(q, k, v.to(wide), grid, pattern, scale=1.0, dropout=self.dropout).to(v.dtype)

    def channels(self, grid, dtype):
        """What queries and keys get besides, each (heads, N, 4); their product is B."""
        of_q, of_k = [], []
        squares_q = squares_k = 0.0
        places = torch.meshgrid(
            *(torch.arange(n, device=self.a_r.device, dtype=dtype) - (n - 1) / 2 for n in grid), indexing="ij"
        )
        for place, log_sigma, a in zip(places, (self.log_sigma_r, self.log_sigma_c), (self.a_r, self.a_c)):
            narrow = (-2.0 * log_sigma.to(dtype)).exp()[:, None]  # 1 / σ²
            key = place.flatten().expand(self.num_heads, -1)
            query = key + a.to(dtype)[:, None]
            of_q.append(query * narrow)
            of_k.append(key)
            squares_q = squares_q - query.square() * narrow / 2
            squares_k = squares_k - key.square() * narrow / 2
        ones = torch.ones_like(squares_k)
        return torch.stack([*of_q, ones, squares_q], dim=-1), torch.stack([*of_k, squares_k, ones], dim=-1)

    def bell(self, grid: Grid) -> Float[Tensor, "heads down right"]:
        """B by how far down and right a key is, from 1 - H and 1 - W on."""
        of_axes = []
        for n, log_sigma, a in zip(grid, (self.log_sigma_r, self.log_sigma_c), (self.a_r, self.a_c)):
            log_sigma, a = (t.to(at_least_float32(t))[:, None] for t in (log_sigma, a))
            far = torch.arange(1 - n, n, device=a.device) - a
            of_axes.append(-far.square() * (-2.0 * log_sigma).exp() / 2)
        of_rows, of_columns = of_axes
        return of_rows[:, :, None] + of_columns[:, None]

    def weights(self, q, k, grid):
        prefix = grid.prefix_of(q.shape[2])
        place = torch.arange(grid.size, device=q.device)
        row, column = place // grid.width, place % grid.width
        down, right = row[None, :] - row[:, None], column[None, :] - column[:, None]  # from the query to the key
        scores = self.scale * torch.einsum("bnid,bnjd->bnij", q, k)
        for head in range(self.num_heads):
            of_row = (down - self.a_r[head]) ** 2 / (2 * self.log_sigma_r[head].exp() ** 2)
            of_column = (right - self.a_c[head]) ** 2 / (2 * self.log_sigma_c[head].exp() ** 2)
            scores[:, head, prefix:, prefix:] -= of_row + of_column
        if self.causal:
            scores = scores.masked_fill(~Past().mask(grid, prefix, q.device), -torch.inf)
        return scores.softmax(dim=-1)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        grid, (key, value), factory = Grid.of(grid), self.head_dims, self.factory(device, dtype)
        dims = key + 4, value
        wide = factory["dtype"] = torch.promote_types(factory["dtype"], torch.float32)
        past = PatternCache(Past(), batch, self.num_heads, grid, dims, 1.0, full, **factory)
        return Nearby(past, self.scale, *self.channels(grid, wide))


class Nearby:
    """A cache of keys that have the prior's channels, which queries get at every step.

    Args:
        past: the cache, for scores of scale 1.
        scale: factor on q · k.
        of_q, of_k: the channels of all positions.
    """

    def __init__(self, past: PatternCache, scale: float, of_q, of_k):
        self.past, self.grid, self.scale, self.of_q, self.of_k = past, past.grid, scale, of_q, of_k

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return self.past.nbytes

    def step(self, q, k, v, place: int):
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        of_q, of_k = (t[:, place].expand(len(q), -1, -1) for t in (self.of_q, self.of_k))
        with outside_autocast(v):
            q, k = torch.cat([self.scale * q.to(of_q.dtype), of_q], dim=-1), torch.cat([k.to(of_k.dtype), of_k], dim=-1)
            return self.past.step(q, k, v.to(of_q.dtype), place).to(v.dtype)
