"""PatchMatch attention: each pixel searches the image for the key that fits best, and looks at a window around it.

Calian et al. 2019, SCRAM, https://arxiv.org/abs/1905.10308
    A_u = softmax over {v : v in the window around a(u)} of q_u · k_v d^-½      a(u) ≈ argmax over v of q_u · k_v
Cost: rounds (4 + searches) N d + 2 window² N d
Computed: 1 ×
a(u) starts as u. After one draw anywhere there are ``rounds`` rounds: four pixels around offer their matches, one after
the other, moved by as much as they are away, 2^(rounds-1) pixels in the first round and half as far in each next one;
then ``searches`` places are drawn around the match so far, within the whole image, half of it, a quarter … What is
offered is taken where it fits better. Draws are a hash of place, round and ``seed``: the same for every image and run.
The window is moved inwards at the border. Gradients flow through it; the search has none.
What is found: where keys are alike nearby, as in images, most matches are right after four rounds. On 64×64 pixels, of
maps that are smooth over 8 pixels the best of all 4,096 keys is in the window of 82 % of pixels, over 4 pixels of 39 %,
and of independent noise of 1 %, hardly more than by chance. But the window is no dense attention: even the best nine
keys hold a small part of the weight of a soft map. It is for peaked ones: ``qk_norm`` and a larger ``scale`` help.
With ``causal=True`` offers come from the left and from above alone, and what is not past in the window is not seen:
later pixels change no bit of what earlier ones get. Prefix tokens see all and are seen by all.
Deviations: of the paper only the abstract could be read: PatchMatch for the best key, then a sparse approximation
around it. How matches are offered, the window and its softmax are our reading. All pixels search at once (PatchMatch
goes over them in order).
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
        search = Search(q, k, grid, self.causal)
        draws = iter(self.drawn(search.place, 2 * (1 + self.rounds * self.searches)).unbind(0))
        search.offer(*((n * next(draws)).long() for n in grid))
        for number in range(self.rounds):
            step = 2 ** (self.rounds - 1 - number)
            others = ((-step, -step), (-step, step)) if self.causal else ((0, step), (step, 0))
            for away in ((0, -step), (-step, 0), *others):
                search.offer(*search.beside(*away))
            for halved in range(self.searches):
                moves = ((2 * next(draws) - 1) * n / 2**halved for n in grid)
                search.offer(*(m + move.round().long() for m, move in zip(search.match, moves)))
        row, column = search.match
        return (row * grid.width + column).reshape(-1, self.num_heads, q.shape[1])

    def drawn(self, place: Int[Tensor, "N"], count: int) -> Float[Tensor, "count N"]:
        """So many numbers in [0, 1) for each place. Linear steps alone would make rows and columns of offers depend."""
        draw = torch.arange(1, count + 1, device=place.device)[:, None]
        z = (place * 48271 + draw * 69621 + self.seed % PRIME) % PRIME
        for _ in range(3):
            z = (z * z + 48271 * z + 11) % PRIME
        return (z // 128).to(torch.float32) / 2**24  # as many bits as it holds

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
        sides = []
        match_row, row = (t // grid.width for t in (match, place))
        match_column, column = match - match_row * grid.width, place - row * grid.width
        for at, last in ((match_row, row[-1]), (match_column, column[-1])):
            first = torch.minimum(at - self.window // 2, last - self.window + 1).clamp(min=0)
            sides.append((first[..., None] + beside, last))
        (rows, bottom), (columns, right) = sides
        seen = (rows <= bottom)[..., :, None] & (columns <= right)[..., None, :]
        rows, columns = torch.minimum(rows, bottom), torch.minimum(columns, right)
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


class Search:
    """Matches that get better with every offer; at first each query is its own.

    Args:
        q, k: what is compared, by products.
        grid: of the positions.
        causal: whether no match may come later than its query.
    """

    def __init__(self, q: Float[Tensor, "b N d"], k: Float[Tensor, "b N d"], grid: Grid, causal: bool):
        self.q, self.k, self.width, self.causal = q, k, grid.width, causal
        self.place = torch.arange(q.shape[1], device=q.device)
        self.row = self.place // grid.width
        self.column = self.place - self.row * grid.width
        self.match = [t.expand(q.shape[:2]) for t in (self.row, self.column)]
        self.best = self.scores(*self.match)

    def offer(self, row: Int[Tensor, "*b N"], column: Int[Tensor, "*b N"]) -> None:
        """Takes a place for each query where it is better than the match so far; from outside moved to the border."""
        row, column = (torch.minimum(t.clamp(min=0), o[-1]) for t, o in ((row, self.row), (column, self.column)))
        score = self.scores(*(t.expand(self.q.shape[:2]) for t in (row, column)))
        is_better = score > self.best
        if self.causal:
            is_better = is_better & (row * self.width + column <= self.place)
        self.match = [torch.where(is_better, new, old) for new, old in zip((row, column), self.match)]
        self.best = torch.where(is_better, score, self.best)

    def beside(self, down: int, right: int) -> list[Int[Tensor, "b N"]]:
        """The matches of the pixels ``down`` and ``right``, moved back by that; its own of one that has none there."""
        row, column = self.row + down, self.column + right
        inside = (row >= 0) & (row <= self.row[-1]) & (column >= 0) & (column <= self.column[-1])
        there = torch.where(inside, row * self.width + column, self.place)
        moved = (t[:, there] - away for t, away in zip(self.match, (down, right)))
        return [torch.where(inside, new, old) for new, old in zip(moved, self.match)]

    def scores(self, row: Int[Tensor, "b N"], column: Int[Tensor, "b N"]) -> Float[Tensor, "b N"]:
        """q · k of each query and a place."""
        numbers = flat(row * self.width + column, self.q.shape[1])[:, None]
        with outside_autocast(self.q):
            return dots_of_rows(self.q.flatten(0, 1), self.k.flatten(0, 1), numbers).reshape(row.shape)
