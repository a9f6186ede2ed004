"""Star-Transformer: each pixel looks at the ring around it, at its own beginning and at a relay that looks at all.

Guo et al. 2019, Star-Transformer, https://arxiv.org/abs/1902.09113
    s = φ(MHA(s; {s, h_1 … h_N}))    h_u = φ(MHA(LN(h_u); {LN(h_v) : v in the ring of u} ∪ {e_u, s}))    φ = LeakyReLU
Cost: 2 cycles N (k² + 2 R + 1) d
Computed: 1.6 ×
e is the block's input and h starts as it; s is the relay: the R prefix tokens of the host, or one that starts as the
mean of the pixels where there are none. ``cycles`` rounds, each with its own projections; the relays' last state is the
output of the prefix tokens. Any two pixels are two steps apart, through the relay.
The ring on a line of text, a word and its neighbours, becomes the k × k window around a pixel.
Deviations: φ, the LayerNorm before the ring alone and no residual connection inside follow the code of fastNLP, of
which there are several versions (the paper: LayerNorm(ReLU(MHA)) for both); the host has a residual. The LayerNorm has
torch's ε of 1e-5 (that code: 1e-6). The relay is updated before the pixels of a round, not after, so that its last
update is read. At the border the ring is cut off (that code attends to keys of zeros there). Several rounds have no
matrix of weights: `attention` shows the last one.
"""

from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .. import check
from ..engines.union import flash
from ..grid import Grid
from ..key_set import Neighbours
from ..mixer import Mixer
from ..precision import at_least_float32, in_range, outside_autocast
from ..traced import fixed


class Block(Mixer):
    """Star-Transformer.

    Args:
        cycles: rounds of relay and pixels.
        kernel_size: pixels in the ring, one odd integer or (height, width).
        Others: those of `Mixer`, but ``attn_drop``.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the relay looks at the whole image"
    not_rotary = "the relay has no place, and is compared with pixels"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        cycles: int = 2,
        kernel_size: int | tuple[int, int] = 3,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **mixer,
    ):
        nn.Module.__init__(self)  # the projections are those of the rounds
        check.positive_int("cycles", cycles)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        check.no_attn_drop(attn_drop)
        check.rate("proj_drop", proj_drop)
        self.check_rotary(mixer.get("rotary"))
        self.cycles = nn.ModuleList(Cycle(dim, num_heads, radius, mixer) for _ in range(cycles))
        self.dim, self.num_heads = dim, self.cycles[0].ring.num_heads
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def steps(self):
        return ()  # more than weights times values: see `reference`

    def forward(self, x, grid):
        grid, relay, start = self.parts(x, grid)
        pixels = start
        for cycle in self.cycles:
            relay = cycle.of_relay(relay, pixels)
            pixels = cycle.of_pixels(relay, pixels, start, grid)
        return self.output(relay, pixels, x)

    def parts(self, x, grid):
        """The grid, the relay tokens (B, R, dim) and the pixels (B, N, dim)."""
        if x.ndim != 3 or fixed(x.shape[-1]) != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (B, P + H·W, dim={self.dim})")
        grid = Grid.of(grid)
        prefix = grid.prefix_of(x.shape[1])
        relay, pixels = x.split([prefix, grid.size], dim=1)
        return grid, relay if prefix else pixels.mean(dim=1, keepdim=True), pixels

    def output(self, relay, pixels, x):
        if fixed(x.shape[1] - pixels.shape[1]):
            pixels = torch.cat([relay, pixels], dim=1)
        return self.proj_drop(pixels)

    def attention(self, x, grid):
        """The last round, heads averaged: a relay that is no token stands for the pixels that it looks at."""
        grid, relay, start = self.parts(x, grid)
        pixels = start
        for cycle in self.cycles:
            before, after = (relay, pixels), cycle.of_relay(relay, pixels)
            relay, pixels = after, cycle.of_pixels(after, pixels, start, grid)
        seen = cycle.weights_of_relay(*before).mean(dim=1)  # (B, R, R + N)
        ring, own, to_relay = (w.mean(dim=1) for w in cycle.weights_of_pixels(relay, before[1], start, grid))
        among = torch.zeros(*own.shape[:2], grid.size, dtype=x.dtype, device=x.device)
        for pixel, places in enumerate(cycle.places(grid)):
            among[:, pixel, places] = ring[:, pixel, : len(places)]
        among = among + torch.diag_embed(own[..., 0])
        if x.shape[1] > grid.size:
            return torch.cat([seen, torch.cat([to_relay, among], dim=2)], dim=1)[:, None]
        at_pixels = seen[:, :, 1:] / seen[:, :, 1:].sum(dim=-1, keepdim=True)
        return (among + to_relay @ at_pixels)[:, None]

    def reference(self, x, grid):
        grid, relay, start = self.parts(x, grid)
        pixels = start
        for cycle in self.cycles:
            relay = cycle.update(cycle.relay, cycle.weights_of_relay(relay, pixels), torch.cat([relay, pixels], dim=1))
            normed = cycle.norm(pixels)
            ring, own, to_relay = cycle.weights_of_pixels(relay, pixels, start, grid)
            new = []
            for pixel, places in enumerate(cycle.places(grid)):
                weights = [ring[:, :, pixel, : len(places)], own[:, :, pixel], to_relay[:, :, pixel]]
                seen = torch.cat([normed[:, places], start[:, pixel, None], relay], dim=1)
                new.append(cycle.update(cycle.ring, torch.cat(weights, dim=-1)[:, :, None], seen))
            pixels = torch.cat(new, dim=1) if new else pixels
        return self.output(relay, pixels, x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class Cycle(nn.Module):
    """One round, with projections of its own: for the relay, and for the ring."""

    def __init__(self, dim, num_heads, radius, mixer):
        super().__init__()
        self.ring, self.relay = Mixer(dim, num_heads, **mixer), Mixer(dim, num_heads, **mixer)
        self.norm = nn.LayerNorm(dim, device=mixer.get("device"), dtype=mixer.get("dtype"))
        self.radius, self.near = radius, Neighbours(radius)

    # fast

    def of_relay(self, relay, pixels):
        """The relay tokens (B, R, dim) after looking at themselves and all pixels."""
        q, k, v = heads(self.relay, torch.cat([relay, pixels], dim=1))
        out = flash(q.narrow(2, 0, relay.shape[1]), k, v, scale=self.relay.scale)
        return F.leaky_relu(self.relay.proj(out.transpose(1, 2).flatten(2)))

    def of_pixels(self, relay, pixels, start, grid):
        """The pixels (B, N, dim) after looking at their ring, their beginning and the relay."""
        (q, k, v), (_, *own), (_, *relay) = (heads(self.ring, t) for t in (self.norm(pixels), start, relay))
        with outside_autocast(v):
            out = self.drawn(*map(in_range, (q, k, v, *own, *relay)), grid)
        return F.leaky_relu(self.ring.proj(out.to(v.dtype).transpose(1, 2).flatten(2)))

    def drawn(self, q, k, v, own_k, own_v, relay_k, relay_v, grid):
        """What the pixels (B, heads, N, d) draw from their ring, their beginning and the relay."""
        wide, near = at_least_float32(v), self.near.ready(grid, v.device)
        ring = near.queries(grid.maps(q)) @ near.keys(grid.maps(k)).transpose(-2, -1)
        ring = ring.to(wide).masked_fill(~near.mask(grid, v.device), -torch.inf)
        ring = rearrange(near.place(ring, grid), "(B n) H W k -> B n (H W) k", n=q.shape[1])
        own = (q * own_k).sum(dim=-1, keepdim=True, dtype=wide)
        scores = [ring, own, (q @ relay_k.transpose(-2, -1)).to(wide)]
        weights = (torch.cat(scores, dim=-1) * self.ring.scale).softmax(dim=-1).to(v.dtype)
        to_ring, to_own, to_relay = weights.split([s.shape[-1] for s in scores], dim=-1)
        of_ring = near.place(near.queries(grid.maps(to_ring)) @ near.keys(grid.maps(v)), grid)
        of_ring = rearrange(of_ring, "(B n) H W d -> B n (H W) d", n=q.shape[1])
        return of_ring + to_own * own_v + to_relay @ relay_v

    # definition

    def places(self, grid):
        """Raster indices of the ring of each pixel."""
        for y, x in product(range(grid.height), range(grid.width)):
            rows = range(max(0, y - self.radius[0]), min(grid.height, y + self.radius[0] + 1))
            columns = range(max(0, x - self.radius[1]), min(grid.width, x + self.radius[1] + 1))
            yield [row * grid.width + column for row, column in product(rows, columns)]

    def weights_of_relay(self, relay, pixels):
        """softmax over relay and pixels, (B, heads, R, R + N)."""
        q, k, _ = heads(self.relay, torch.cat([relay, pixels], dim=1))
        scores = torch.einsum("bnrd,bnjd->bnrj", q[:, :, : relay.shape[1]], k)
        return (scores * self.relay.scale).softmax(dim=-1)

    def weights_of_pixels(self, relay, pixels, start, grid):
        """softmax over the ring, in the order of `places` and filled up with zeros, the beginning and the relay."""
        (q, k, _), (_, own_k, _), (_, relay_k, _) = (heads(self.ring, t) for t in (self.norm(pixels), start, relay))
        most = (2 * self.radius[0] + 1) * (2 * self.radius[1] + 1)
        rows = []
        for pixel, places in enumerate(self.places(grid)):
            seen = torch.cat([k[:, :, places], own_k[:, :, pixel, None], relay_k], dim=2)
            scores = torch.einsum("bnd,bnjd->bnj", q[:, :, pixel], seen) * self.ring.scale
            ring, rest = scores.softmax(dim=-1).split([len(places), 1 + relay.shape[1]], dim=-1)
            rows.append(torch.cat([F.pad(ring, (0, most - len(places))), rest], dim=-1))
        return torch.stack(rows, dim=2).split([most, 1, relay.shape[1]], dim=-1)

    def update(self, mixer, weights, tokens):
        """φ(projected weights @ values) of weights (B, heads, queries, tokens)."""
        _, _, v = heads(mixer, tokens)
        out = torch.einsum("bnij,bnjd->bind", weights, v)
        return F.leaky_relu(mixer.proj(out.flatten(2)))


def heads(mixer: Mixer, tokens):
    """Queries, keys and values of tokens that are no grid."""
    return mixer.heads(tokens, Grid(1, tokens.shape[1]))
