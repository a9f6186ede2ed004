"""ProbSparse attention: the pixels whose attention is most peaked look at everything, the others take the mean.

Zhou et al. 2021, Informer, https://arxiv.org/abs/2012.07436
    A_u = softmax over all v of q_u · k_v d^-½ for the u pixels of largest M, and 1 / N elsewhere
    M_u = max_s q_u · k_s - mean_s q_u · k_s over a sample s of the keys    u = ``factor`` ⌈ln N⌉
Cost: 2 N u d + N cells² d
Computed: 1 ×
Attention that is nearly even gives the mean of the values, so only where M says that it is not is it worth computing.
The pixels are chosen anew for each image and head, by numbers, so M has no gradient.
The sample is of pixels at the centres of ``cells`` × ``cells`` equal parts of the image, the same for all queries.
Prefix tokens are keys beside all pixels, and their own attention is computed in full; they count in the mean.
Deviations: the sample in the paper is u keys drawn at random for each query; the authors' code draws them once for all
images and heads, at evaluation too, so that no output can be repeated. It is slower as well, for each query has keys of
its own to gather. In M the code divides the sum over the sample by N, the number of all keys, which makes it nearly the
maximum alone. The code's causal form adds the values up where this one takes their mean, and chooses by all pixels.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import check
from ..engines.buckets import rows
from ..engines.union import flash
from ..grid import Grid
from ..mixer import Mixer, softmax_over
from ..precision import at_least_float32, is_slow, outside_autocast
from ..traced import largest, least


class Block(Mixer):
    """ProbSparse attention.

    Args:
        factor: pixels that are answered in full, for each e-fold of the pixels that there are.
        cells: parts of the image down and right, an integer or (height, width); each has one key of the sample.
        Others: those of `Mixer`, but ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "which pixels are answered in full depends on all of them"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        factor: int = 5,
        cells: int | tuple[int, int] = 8,
        attn_drop: float = 0.0,
        **mixer,
    ):
        check.positive_int("factor", factor)
        cells = check.pair("cells", cells)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, **mixer)
        self.factor, self.cells = factor, cells

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B heads tokens d"], k: Float[Tensor, "B heads tokens d"], grid: Grid
    ) -> Int[Tensor, "B heads u"]:
        """Raster indices of the pixels whose attention is computed in full. In at least float32."""
        wide, prefix = at_least_float32(q), grid.prefix_of(q.shape[2])
        places = [torch.arange(1, 2 * n, 2, device=q.device) * size // (2 * n) for n, size in zip(self.cells, grid)]
        sample = (places[0][:, None] * grid.width + places[1]).flatten()
        with outside_autocast(q):
            keys = k[:, :, prefix:].to(wide).index_select(2, sample)
            scores = q[:, :, prefix:].to(wide) @ keys.transpose(-2, -1)
        return (scores.amax(dim=-1) - scores.mean(dim=-1)).topk(self.answered(grid), dim=-1).indices

    def answered(self, grid: Grid) -> int:
        """u, the number of pixels whose attention is computed in full."""
        # ⌈ln N⌉ as a sum, for a logarithm would not stay in a graph
        folds = sum(least(1, grid.size // (math.floor(math.exp(i)) + 1)) for i in range(16))
        return least(largest(1, self.factor * folds), grid.size)

    def mix(self, q, k, v, grid):
        if is_slow(v):
            with outside_autocast(v):
                return self.mix(q.float(), k.float(), v.float(), grid).half()
        prefix, chosen = grid.prefix_of(q.shape[2]), self.choose(q, k, grid)
        first, q = q.split([prefix, grid.size], dim=2)
        asked = rows(q.flatten(0, 1), chosen.flatten(0, 1)).unflatten(0, q.shape[:2])
        out = flash(torch.cat([first, asked], dim=2), k, v, scale=self.scale)
        image = v.mean(dim=2, keepdim=True, dtype=at_least_float32(v)).to(out.dtype).expand(-1, -1, grid.size, -1)
        image = with_rows(image.flatten(0, 1), chosen.flatten(0, 1), out[:, :, prefix:].flatten(0, 1))
        return torch.cat([out[:, :, :prefix], image.unflatten(0, q.shape[:2])], dim=2)

    def weights(self, q, k, grid):
        prefix, chosen = grid.prefix_of(q.shape[2]), self.choose(q, k, grid)
        answered = (chosen[..., None] == torch.arange(grid.size, device=q.device)).any(dim=2)
        answered = F.pad(answered, (prefix, 0), value=True)  # (B, heads, tokens)
        return torch.where(answered[..., None], softmax_over(None, q, k, self.scale), 1 / k.shape[2])

    def extra_repr(self):
        return f"{super().extra_repr()}, factor={self.factor}, cells={self.cells}"


def with_rows(
    x: Float[Tensor, "b N d"], index: Int[Tensor, "b u"], new: Float[Tensor, "b u d"]
) -> Float[Tensor, "b N d"]:
    """``x`` with ``new`` in the place of some of its rows, the inverse of `rows`."""
    b, n, d = x.shape
    flat = (index + torch.arange(b, device=x.device)[:, None] * n).flatten()
    return x.reshape(b * n, d).index_copy(0, flat, new.reshape(-1, d)).reshape(b, n, d)
