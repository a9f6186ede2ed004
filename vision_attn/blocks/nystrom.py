"""Nyströmformer: the softmax matrix, rebuilt from how pixels and a few landmarks attend to one another.

Xiong et al. 2021, Nyströmformer, https://arxiv.org/abs/2102.03902
    A = softmax(q k̃ᵀ d^-½) Z softmax(q̃ kᵀ d^-½)    Z ≈ pseudoinverse of M = softmax(q̃ k̃ᵀ d^-½)
    Z ← ¼ Z (13 I - M Z (15 I - M Z (7 I - M Z)))    six times, from Mᵀ / (‖M‖₁ ‖M‖∞)
Cost: 4 N cells² d + 4 iterations cells^6 heads
Computed: 1 ×
q̃ and k̃ are landmarks, means of segments of the queries and of the keys. Segments of a line of text become ``cells`` ×
``cells`` equal parts of the image, whatever its size; a pixel that lies in two parts is shared between them. Prefix
tokens are landmarks of their own beside them. Where there are fewer pixels than cells some landmarks are equal and M
has no inverse; the iterations then approach its pseudoinverse, but each makes rounding up to 3¼ times as large.
Weights may be negative, and rows sum to 1 only as far as Z is right: after 6 iterations to within a few hundredths.
Everything is computed in at least float32.
Deviations: Z starts from the norms of its own matrix. The authors' code divides by the largest column sum of the whole
batch, by which an image changes the others; its "exact" start is the one here. Its depthwise convolution of the values,
beside the attention, is left to the host. There is no mask of padding, for there is none.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .. import check
from ..engines.union import flash
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast
from ..resize import spread


class Block(Mixer):
    """Nyströmformer.

    Args:
        cells: parts of the image down and right, an integer or (height, width); each has one landmark.
        iterations: steps towards the pseudoinverse.
        Others: those of `Mixer`, but ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False
    not_causal = "landmarks are means of parts of the whole image"
    not_rotary = "landmarks are averaged over pixels at many places"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        cells: int | tuple[int, int] = 8,
        iterations: int = 6,
        attn_drop: float = 0.0,
        **mixer,
    ):
        cells = check.pair("cells", cells)
        check.positive_int("iterations", iterations)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, **mixer)
        self.cells, self.iterations = cells, iterations

    def mix(self, q, k, v, grid):
        with outside_autocast(v):
            q, k, values = (t.to(at_least_float32(v)) for t in (q, k, v))
            of_queries, of_keys = self.landmarks(q, grid), self.landmarks(k, grid)
            among = (self.scale * of_queries @ of_keys.transpose(-2, -1)).softmax(dim=-1)
            read = self.inverse(among) @ flash(of_queries, k, values, scale=self.scale)
            return flash(q, of_keys, read, scale=self.scale).to(v.dtype)

    def landmarks(self, t: Float[Tensor, "B heads tokens d"], grid: Grid) -> Float[Tensor, "B heads landmarks d"]:
        """Prefix tokens, and means of the cells."""
        prefix, t = grid.split(t)
        down, right = (spread(n, size, device=t.device, dtype=t.dtype) for n, size in zip(self.cells, grid))
        rows = down @ t.unflatten(2, (grid.height, grid.width)).flatten(3)  # (B, heads, cells, W · d)
        cells = right @ rows.unflatten(3, (grid.width, t.shape[3]))  # (B, heads, cells, cells, d)
        return torch.cat([prefix, cells.flatten(2, 3)], dim=2)

    def inverse(self, m: Float[Tensor, "B heads n n"]) -> Float[Tensor, "B heads n n"]:
        """Z. A step is Z (I + E + E² + E³ / 4), where E = I - M Z is what is still wrong."""
        z = m.transpose(-2, -1) / m.sum(dim=-2).amax(dim=-1)[..., None, None]  # rows of M sum to 1
        one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        for _ in range(self.iterations):
            wrong = one - m @ z
            z = z @ (one + wrong @ (one + wrong @ (one + wrong / 4)))
        return z

    def weights(self, q, k, grid):
        of_queries, of_keys = self.means(q, grid), self.means(k, grid)
        to_landmarks, among, from_landmarks = (
            (self.scale * torch.einsum("bnid,bnjd->bnij", queries, keys)).softmax(dim=-1)
            for queries, keys in ((q, of_keys), (of_queries, of_keys), (of_queries, k))
        )
        identity = torch.eye(among.shape[-1], dtype=q.dtype, device=q.device)
        columns, rows = among.abs().sum(dim=2).amax(dim=-1), among.abs().sum(dim=3).amax(dim=-1)
        z = among.mT / (columns * rows)[..., None, None]
        for _ in range(self.iterations):
            product = among @ z
            z = z @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
        return to_landmarks @ z @ from_landmarks

    def means(self, t, grid):
        """Landmarks: with every pixel cut into ``cells`` pieces an axis, each cell has whole ones."""
        prefix = grid.prefix_of(t.shape[2])
        image = t[:, :, prefix:].unflatten(2, grid)
        for axis, (parts, length) in enumerate(zip(self.cells, grid), start=2):
            image = image.repeat_interleave(parts, dim=axis).unflatten(axis, (parts, length)).mean(dim=axis + 1)
        return torch.cat([t[:, :, :prefix], image.flatten(2, 3)], dim=2)

    def extra_repr(self):
        return f"{super().extra_repr()}, cells={self.cells}, iterations={self.iterations}"
