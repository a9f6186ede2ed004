"""PatchMatch attention: each pixel searches the image for the key that fits best, and looks at a window around it.

Calian et al. 2019, SCRAM, https://arxiv.org/abs/1905.10308
    A_u = softmax over {v : v in the window around a(u)} of q_u · k_v d^-½      a(u) ≈ argmax over v of q_u · k_v
Cost: rounds (8 + searches) N d + 2 window² N d
Computed: 1 ×
a(u) starts as u or, if that fits better, as a place drawn anywhere. Each of ``rounds`` rounds makes two offers, and of
each the best is taken where it fits better than a(u). First the eight pixels around offer their matches, moved by as
much as they are away, 2^(rounds-1) pixels in the first round and half as far in each next one; then ``searches`` places
are drawn around a(u), within the whole image, half of it, a quarter … Draws are a hash of place, round and ``seed``:
the same for every image and run. Pixels, places and the window are moved inwards at the border. Gradients flow through
the window; the search has none.
What is found: where keys are alike nearby, as in images, most matches are right after four rounds. On 64×64 pixels, of
maps that are smooth over 8 pixels the best of all 4,096 keys is in the window of 86 % of pixels, over 4 pixels of 45 %,
and of independent noise of 1 %, hardly more than by chance. But the window is no dense attention: even the best nine
keys hold a small part of the weight of a soft map. It is for peaked ones: ``qk_norm`` and a larger ``scale`` help.
With ``causal=True`` the seven pixels offer that come before in three rows of three, up to the pixel itself, and what is
not past in the window is not seen: later pixels change no bit of what earlier ones get. It finds 76 %, 41 % and 4 %.
Prefix tokens see all and are seen by all.
Deviations: of the paper only the abstract could be read: PatchMatch for the best key, then a sparse approximation
around it. How matches are offered, the window and its softmax are our reading. All pixels search at once, and all
around offer (PatchMatch goes over them in order, and the two offer that it has just passed).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import check
from ..check import Count
from ..engines.selection import dots_of_rows, flat, sums_of_rows
from ..engines.union import flash
from ..grid import Grid
from ..kept import kept
from ..mixer import Mixer, softmax_over
from ..pattern import Past
from ..precision import at_least_float32, outside_autocast

PRIME = 2**31 - 1  # draws are below it; their squares fit 64 bits


class Block(Mixer):
    """PatchMatch attention.

    Args:
        window: side of the window around a match, odd.
        rounds: of the search.
        searches: places drawn around a match in a round.
        seed: of the draws.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        window: int = 3,
        rounds: int = 4,
        searches: int = 6,
        seed: Count = 0,
        causal: bool = False,
        **mixer,
    ):
        for name, value in dict(window=window, rounds=rounds, searches=searches).items():
            check.positive_int(name, value)
        if window % 2 == 0:
            raise ValueError(f"window={window}: must be odd")
        check.count("seed", seed)
        check.boolean("causal", causal)
        super().__init__(dim, num_heads, **mixer)
        self.window, self.rounds, self.searches, self.seed, self.causal = window, rounds, searches, seed, causal

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Float[Tensor, "B heads tokens d"], grid: Grid
    ) -> Int[Tensor, "B heads N"]:
        """The match of each position, its number in raster order."""
        prefix, wide = grid.prefix_of(q.shape[2]), at_least_float32(q)
        q, k = (t[:, :, prefix:].flatten(0, 1).to(wide).contiguous() for t in (q, k))  # (b, N, d)
        options = self.causal, self.rounds, self.searches, self.seed
        first, beside, back, drawn = kept(offers, grid, *options, device=q.device)
        search = Search(q, k, grid, self.causal)
        search.offer(first[:, None])
        for number in range(self.rounds):
            search.offer(search.match[..., beside[number]] + back[:, number, None])
            search.offer(search.match[..., None] + drawn[:, number, None])
        row, column = search.match.unbind(0)
        return (row * grid.width + column).reshape(-1, self.num_heads, q.shape[1])

    def mix(self, q, k, v, grid):
        prefix, wide, dtype = grid.prefix_of(q.shape[2]), at_least_float32(v), v.dtype
        index, seen = self.windows(self.choose(q, k, grid), grid)
        q, k, v = (t.to(wide) for t in (q, k, v))
        with outside_autocast(v):
            before, here = [t[:, :, :prefix] for t in (k, v)], [t[:, :, prefix:] for t in (q, k, v)]
            of_all = [t.reshape(-1, t.shape[-1]) for t in here]
            numbers = flat(index.flatten(2), here[0].shape[2]).reshape(-1, self.window**2)
            scores = dots_of_rows(*of_all[:2], numbers).reshape(index.shape)
            scores = (self.scale * scores).masked_fill(~seen, torch.finfo(wide).min)
            if prefix:
                scores = torch.cat([scores, self.scale * here[0] @ before[0].transpose(-2, -1)], dim=-1)
            weights = F.dropout(scores.softmax(dim=-1), self.dropout)
            of_window, of_prefix = weights.split([self.window**2, prefix], dim=-1)
            out = sums_of_rows(of_all[2], numbers, of_window.reshape(-1, self.window**2)).reshape(here[2].shape)
            if prefix:
                out = out + of_prefix @ before[1]
                k, v = before if self.causal else (k, v)
                first = flash(q[:, :, :prefix], k, v, dropout_p=self.dropout, scale=self.scale)
                out = torch.cat([first, out], dim=2)
        return out.to(dtype)

    def windows(self, match, grid) -> tuple[Int[Tensor, "B heads N keys"], Bool[Tensor, "B heads N keys"]]:
        """The keys around each match, and which of them are there and seen."""
        place, beside = torch.arange(grid.size, device=match.device), torch.arange(self.window, device=match.device)
        last = coordinates(place, grid)[:, -1, None, None, None]
        first = torch.minimum(coordinates(match, grid) - self.window // 2, last - self.window + 1).clamp(min=0)
        lines, last = first[..., None] + beside, last[..., None]  # (2, B, heads, N, window)
        (in_rows, in_columns), (rows, columns) = ((lines <= last).unbind(0), torch.minimum(lines, last).unbind(0))
        seen = in_rows[..., :, None] & in_columns[..., None, :]
        keys = (rows[..., :, None] * grid.width + columns[..., None, :]).flatten(-2)
        seen = seen.flatten(-2)
        return keys, seen & (keys <= place[:, None]) if self.causal else seen

    def weights(self, q, k, grid):
        prefix, match = grid.prefix_of(q.shape[2]), self.choose(q, k, grid)
        y, x = torch.meshgrid(*(torch.arange(n, device=q.device) for n in grid), indexing="ij")
        inside = True
        for at, size, line in ((match // grid.width, grid.height, y), (match % grid.width, grid.width, x)):
            first = (at - self.window // 2).clamp(0, max(0, size - self.window))[..., None]
            inside = inside & (first <= line.flatten()) & (line.flatten() < first + self.window)
        seen = F.pad(inside, (prefix, 0, prefix, 0), value=True)
        if self.causal:
            seen = seen & Past().mask(grid, prefix, q.device)
        return softmax_over(seen, q, k, self.scale)

    def extra_repr(self):
        return f"{super().extra_repr()}, window={self.window}, rounds={self.rounds}, searches={self.searches}"


def offers(grid: Grid, causal: bool, rounds: int, searches: int, seed: int, device) -> tuple[Tensor, ...]:
    """What is offered, the same for every image and head: the first places, then for each round what follows.

    Returns:
        first: rows and columns of each pixel itself and of a drawn place, (2, N, 2).
        beside: pixels whose matches are offered, (rounds, N, places).
        back: rows and columns that those are moved by, (2, rounds, N, places).
        drawn: rows and columns from the match so far to drawn places, (2, rounds, N, searches).
    """
    place = torch.arange(grid.size, device=device)
    here = coordinates(place, grid)
    last = here[:, -1:]
    away = torch.arange(-7, 0, device=device) if causal else torch.arange(-4, 4, device=device)
    away = away + (away >= 0)  # along three columns around the pixel, in raster order, without itself
    down = (away + 7) // 3 - 2
    step = 2 ** torch.arange(rounds - 1, -1, -1, device=device)
    there = here[:, None, :, None] + step[:, None, None] * torch.stack([down, away - 3 * down])[:, None, None]
    there = torch.minimum(there.clamp(min=0), last[..., None, None])
    beside = there[0] * grid.width + there[1]
    if causal:
        beside = torch.minimum(beside, place[:, None])  # in the first rows what is moved inwards would be later
    back = here[:, None, :, None] - coordinates(beside, grid)
    draws, size = draw(place, 2 * (1 + rounds * searches), seed), last + 1
    first = torch.stack([here, (size * draws[:2]).long()], dim=-1)
    moves = (2 * draws[2:] - 1).unflatten(0, (rounds, searches, 2)).permute(2, 0, 3, 1)
    reach = size * 0.5 ** torch.arange(searches, device=device)
    return first, beside, back, (moves * reach[:, None, None]).round().long()


def draw(place: Int[Tensor, "N"], count: int, seed: int) -> Float[Tensor, "count N"]:
    """So many numbers in [0, 1) for each place. Linear steps alone would make rows and columns of offers depend."""
    number = torch.arange(1, count + 1, device=place.device)[:, None]
    z = (place * 48271 + number * 69621 + seed % PRIME) % PRIME
    for _ in range(3):
        z = (z * z + 48271 * z + 11) % PRIME
    return (z // 128).to(torch.float32) / 2**24  # as many bits as it holds


def coordinates(place: Int[Tensor, "*n"], grid: Grid) -> Int[Tensor, "2 *n"]:
    """Rows and columns."""
    row = place // grid.width
    return torch.stack([row, place - row * grid.width])


class Search:
    """Matches, as rows and columns, that get better with every offer.

    Args:
        q, k: what is compared, by products.
        grid: of the positions.
        causal: whether no match may come later than its query.
    """

    def __init__(self, q: Float[Tensor, "b N d"], k: Float[Tensor, "b N d"], grid: Grid, causal: bool):
        self.q, self.k, self.width, self.causal = q.flatten(0, 1), k.flatten(0, 1), grid.width, causal
        place = torch.arange(q.shape[1], device=q.device)
        self.place, here = place[:, None], coordinates(place, grid)
        self.match, self.last = here[:, None].expand(2, *q.shape[:2]), here[:, None, -1:, None]
        self.before = torch.arange(q.shape[0], device=q.device)[:, None, None] * q.shape[1]  # of other images and heads
        self.best = torch.full_like(q[..., 0], -torch.inf)

    def offer(self, places: Int[Tensor, "2 #b N places"]) -> None:
        """Takes the best of some places where it is better than the match so far; from outside moved to the border."""
        places = torch.minimum(places.clamp(min=0), self.last)
        numbers = places[0] * self.width + places[1]
        of_all = numbers + self.before
        with outside_autocast(self.q):
            scores = dots_of_rows(self.q, self.k, of_all.flatten(0, 1)).reshape(of_all.shape)
        if self.causal:
            scores = scores.masked_fill(numbers > self.place, -torch.inf)
        score, at = scores.max(dim=-1)
        new = places.expand(2, *scores.shape).gather(-1, at[..., None].expand(2, *at.shape, 1))[..., 0]
        is_better = score > self.best
        self.match = torch.where(is_better, new, self.match)
        self.best = torch.where(is_better, score, self.best)
