"""Adaptive span: each head learns how far it looks, and pays for the window that it may reach at most.

Sukhbaatar et al. 2019, Adaptive Attention Span, https://arxiv.org/abs/1905.07799
    A_ij = m(x_ij) exp(s_ij) / Σ_k m(x_ik) exp(s_ik)      s_ij = q_i · k_j d^-½
    m(x) = min(1, max(0, (R + z - x) / R))      x_ij = max(|row(i) - row(j)|, |col(i) - col(j)|)
Cost: 2 N (2 (S + R) - 1)² d
Computed: 2 ×
Every head has a z in [0, S], the largest distance that it sees in full; beyond it m falls to 0 over R more pixels.
S is ``span``, R is ``ramp``. log m joins the scores of a window of radius S + R, cut off at the border; FlexAttention
(``route("flex")``) adds it from a table by how far a key is down and right. The paper adds a penalty on the spans to
the loss, λ/heads Σ z: a training script adds λ ``block.spans().mean()``.
With ``causal=True`` the part of the window that comes before in raster order, and the pixel itself. Prefix tokens are
at no distance: they see and are seen in full (causal: they see only one another). With ``include_self=False`` a pixel
does not look at itself, and the nearest others are at distance 0, as in the authors' code; one that sees nothing takes
0 (the code: its past is never empty, but padded with zeros).
Deviations: distance in two dimensions (the paper: on a line, into the past). As in the authors' code the parameter is
z / S; theirs is set back into [0, 1] after every optimizer step, here it is clamped where it is used, and beyond keeps
the gradient that leads back, so that no span is stuck and none winds up. Their window ends at S, ramp or not, and their
divisor has 1e-8 more. Their positions do not look at themselves, these do by default. The position embeddings of their
keys are left out.

>>> from vision_attn import Grid
>>> print(Block(32, span=4, init=0.25, ramp=1.5).pattern.draw(Grid(5, 7), 3, 2))
-------
#####--
#####--
##@##--
#####--
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import check
from ..engines import flex
from ..engines.bias import Bias, biased
from ..engines.cache import Store
from ..engines.flash import kernel_for
from ..engines.route import is_small, note, takes_dense
from ..engines.union import attend, flash
from ..grid import Grid
from ..kept import kept
from ..key_set import Everything, Only, Rows, rows_and_columns
from ..mixer import Mixer, warn_of_blind_spot
from ..pattern import Past, Pattern, Window
from ..precision import at_least_float32, in_float32_where_slow


@dataclass(frozen=True)
class Others(Pattern):
    """Everything but itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        return (qy != ky) | (qx != kx)

    def key_sets(self):
        return (Only(Everything(), self),)


class Block(Mixer):
    """Attention of an adaptive span.

    Args:
        span: largest z in pixels, S.
        ramp: pixels over which the mask falls from 1 to 0, R.
        init: share of ``span`` that every head's z is at first.
        causal: only what comes before in raster order, and itself.
        include_self: whether a pixel looks at itself too.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        span: int = 7,
        ramp: float = 2.0,
        init: float = 0.5,
        causal: bool = False,
        include_self: bool = True,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("span", span)
        check.positive("ramp", ramp)
        check.finite("init", init)
        if not 0 <= init <= 1:
            raise ValueError(f"init={init!r}: must be a share of span, in [0, 1]")
        check.boolean("causal", causal)
        check.boolean("include_self", include_self)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.span, self.ramp, self.init, self.causal = span, ramp, init, causal
        self.averages = include_self
        self.nearest = 0 if include_self else 1  # pixels that the first distance is away
        self.window = self.window_of(span)
        self.reach = nn.Parameter(torch.empty(self.num_heads, device=device, dtype=dtype))  # z / S
        self.reset_parameters()
        warn_of_blind_spot(self, self.window_of(span * init))  # as `pattern`, which would wait for the device

    def reset_parameters(self) -> None:
        """Sets all spans to ``init`` · ``span``."""
        nn.init.constant_(self.reach, self.init)

    def spans(self) -> Float[Tensor, "heads"]:
        """z of each head, in pixels: what the paper's penalty is on."""
        reach = self.reach.to(at_least_float32(self.reach))
        # torch.jit.trace takes no function with a gradient of its own: there, none passes beyond
        return self.span * (reach.clamp(0.0, 1.0) if torch.jit.is_tracing() else Held.apply(reach))

    @property
    def pattern(self) -> Pattern:
        """What the heads together see now; what they may learn to see on the meta device."""
        window = self.window if self.reach.is_meta else self.window_of(self.spans().max().item())
        return self.seen_of(window)

    def seen_of(self, window: Window) -> Pattern:
        """The window, with or without the pixel itself."""
        return window & Others() if self.nearest else window

    def window_of(self, z: int | float) -> Window:
        """All that is less than z + R away."""
        radius = math.ceil(z + self.ramp) - 1 + self.nearest
        return Window((radius, radius), past=self.causal)

    def soft_mask(self, distance):
        """m of each head at some distances, (heads, …)."""
        z = self.spans().reshape(-1, *(1 for _ in distance.shape))
        m = (self.ramp + z - (distance - self.nearest)) / self.ramp
        m = m.masked_fill(m >= 1, 1)  # not clamped, whose gradient at 1 is not the same in all versions of torch
        return m.masked_fill((m <= 0) | (distance < self.nearest), 0)

    def bias(self, distance):
        """log m; where m is 0, half the least number, without a gradient."""
        m = self.soft_mask(distance)
        return m.masked_fill(m == 0, 1).log().masked_fill(m == 0, torch.finfo(m.dtype).min / 2)

    def table(self, grid: Grid) -> Float[Tensor, "heads down right"]:
        """`bias` by how far down and right a key is, from 1 - H and 1 - W on."""
        down, right = (torch.arange(1 - n, n, device=self.reach.device).abs() for n in grid)
        return self.bias(torch.maximum(down[:, None], right))

    @torch.no_grad()
    def steeper(self, distance):
        """log m + log ∂ log m / ∂z: -log R on the ramp, hidden elsewhere."""
        m = self.soft_mask(distance)
        flat = (m == 0) | (m == 1)
        return torch.full_like(m, -math.log(self.ramp)).masked_fill(flat, torch.finfo(m.dtype).min / 2)

    def mix(self, q, k, v, grid):
        if takes_dense(is_small(grid, q.device, 28)):
            return self.mix_by_mask(q, k, v, grid)
        if flex.takes(q, v, self.window, self.dropout):
            return flex.attend(q, k, v, grid, self.seen_of(self.window), scale=self.scale, table=self.table(grid))
        (keys,) = self.window.key_sets()
        (radius, _), (size, _) = keys.radius, keys.tile(q.device)
        tile, around = torch.arange(size, device=q.device), torch.arange(-radius, size + radius, device=q.device)
        above = around[: radius + size] if self.causal else around
        down, right = (above - tile[:, None]).abs(), (around - tile[:, None]).abs()
        distance = torch.maximum(down[:, None, :, None], right[None, :, None, :]).flatten(2).flatten(0, 1)

        def of_all(t):
            return t[:, None].repeat(q.shape[0], 1, 1, 1)  # (B · heads, 1, queries, keys)

        z, steeper = self.spans().repeat(q.shape[0])[:, None, None], self.steeper(distance)
        bias = Bias(of_all(self.bias(distance)), z, lambda: of_all(steeper))
        out = attend(q, k, v, grid, self.window, scale=self.scale, dropout=self.dropout, bias=bias)
        return self.without_alone(out, grid)

    @in_float32_where_slow
    def mix_by_mask(self, q, k, v, grid):
        """The same for small grids: log m of all pairs is one mask."""
        note("dense")
        (which,) = kept(distances, grid, grid.prefix_of(q.shape[2]), self.causal, device=q.device)
        near, q, k = torch.arange(max(grid), device=q.device), q.to(v.dtype), k.to(v.dtype)
        hidden = torch.finfo(at_least_float32(self.reach)).min / 2

        def of_all(table, prefix):
            """(heads, distances), what is hidden and what is of prefix tokens for all pairs, (1, heads, N, N)."""
            table = F.pad(F.pad(table, (0, 1), value=hidden), (0, 1), value=prefix)
            return table.index_select(1, which.flatten()).unflatten(1, which.shape)[None]

        steeper = self.steeper(near)
        bias = Bias(of_all(self.bias(near), 0.0), self.spans()[:, None], lambda: of_all(steeper, hidden))
        if kernel := kernel_for(q, k, v) if self.dropout == 0 else None:
            none, maps = (t.detach()[:, :1, :0] for t in (k, v)), Grid(*q.shape[1:3])  # each head as a row of tokens
            out = biased(kernel, Rows(), bias, maps, self.scale, q, k, v, *none)
        else:
            out = flash(q, k, v, attn_mask=bias.as_mask(v.dtype), dropout_p=self.dropout, scale=self.scale)
        return self.without_alone(out, grid)

    def without_alone(self, out, grid):
        """The output, without that of a pixel that sees nothing."""
        if self.nearest == 0 or grid.prefix_of(out.shape[2]):
            return out
        if self.causal:
            return F.pad(out.narrow(2, 1, grid.size - 1), (0, 0, 1, 0))
        alone = grid.size == 1
        if not isinstance(alone, Tensor):  # which it is to torch.jit.trace
            alone = torch.ones((), dtype=torch.bool, device=out.device) if alone else None
        return out if alone is None else out.masked_fill(alone, 0)

    def alone(self, place, grid):
        """Whether no other pixel is there for that at raster index ``place``, which itself is not to be looked at."""
        return self.nearest == 1 and place == 0 and (self.causal or grid.size == 1)

    def weights(self, q, k, grid):
        prefix, z = grid.prefix_of(q.shape[2]), self.spans().to(q.dtype)
        place = torch.arange(grid.size, device=q.device)
        down, right = (c[None, :] - c[:, None] for c in (place // grid.width, place % grid.width))
        x = torch.where(down.abs() > right.abs(), down.abs(), right.abs())
        if self.nearest:
            x = torch.where(x == 0, self.span + self.ramp + 1, x - 1).to(q.dtype)  # itself is out of sight
        rest = torch.stack([(self.ramp + z_of_head - x) / self.ramp for z_of_head in z])
        m = torch.where(rest >= 1, 1.0, torch.where(rest > 0, rest, 0.0))
        m = F.pad(m, (prefix, 0, prefix, 0), value=1.0)
        if self.causal:
            m = m * Past().mask(grid, prefix, q.device)
        scores = (self.scale * q @ k.mT).masked_fill(m == 0, torch.finfo(q.dtype).min)
        masked = m * (scores - scores.amax(dim=-1, keepdim=True)).exp()
        total = masked.sum(dim=-1, keepdim=True)
        return masked / (total + (total == 0))

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if full or not self.causal:
            return super().new_cache(batch, grid, device=device, dtype=dtype)
        factory = self.factory(device, dtype)
        (keys,) = self.window.key_sets()
        return Near(self, Store([keys], Grid.of(grid), batch, self.num_heads, dims=self.head_dims, **factory))


def distances(grid: Grid, prefix: int, causal: bool, device) -> tuple[Int[Tensor, "tokens tokens"]]:
    """How far it is from each token to each: a distance less than max(H, W), that where nothing is seen, or one more
    where all is."""
    hidden, place = max(grid), torch.arange(grid.size, device=device)
    y, x = rows_and_columns(place, grid.width)
    among = torch.maximum((y - y[:, None]).abs(), (x - x[:, None]).abs())
    if causal:
        among = among.masked_fill(place > place[:, None], hidden)
    among = F.pad(among, (0, 0, prefix, 0), value=hidden if causal else hidden + 1)
    return (F.pad(among, (prefix, 0), value=hidden + 1),)


class Held(torch.autograd.Function):
    """A clamp to [0, 1]; beyond, only the gradient passes along which a descent comes back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(0.0, 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        leaves = ((x < 0) & (slope > 0)) | ((x > 1) & (slope < 0))
        return slope.masked_fill(leaves, 0)


class Near:
    """The rows of the past that a block may look at again.

    Args:
        block: gives mask and scale.
        store: of its largest window.
    """

    def __init__(self, block: Block, store: Store):
        self.block, self.store, self.grid = block, store, store.grid

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(past.nbytes for past in self.store.past)

    def step(self, q, k, v, place: int):
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        y, x = divmod(place, self.store.grid.width)
        self.store.put(y, x, [k, v])
        keys, values = (torch.cat(some, dim=2) for some in zip(*self.store.read(y, x)))
        down, right = ((torch.arange(n, device=q.device) - here).abs() for n, here in zip(self.store.grid, (y, x)))
        distance = torch.maximum(down[:, None], right)
        seen = self.store.sets[0].seen_from(y, x, self.store.grid)
        bias = self.block.bias(torch.cat([distance[rows, columns].flatten() for rows, columns in seen]))
        mask = bias.to(q.dtype)[None, :, None]
        out = flash(q[:, :, None], keys, values, attn_mask=mask, scale=self.block.scale)
        return torch.zeros_like(out[:, :, 0]) if self.block.alone(place, self.store.grid) else out[:, :, 0]
