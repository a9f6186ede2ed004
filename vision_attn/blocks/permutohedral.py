"""Permutohedral attention: a Gaussian mean over the pixels that are near in a few learned features and in place.

Joutard et al. 2019, PAM, https://arxiv.org/abs/1907.00641
    A = S B_d ⋯ B_0 Sᵀ, rows divided by their sums      B_j = I + ½ [p' = p ± o_j]      f = LeakyReLU(W x + U r)
    S_up = φ(E f_u - p)      φ(z) = max(0, 1 - (max_i z_i - min_i z_i) / (d + 1))
Cost: 2 N (features + 1) d
Computed: 1.2 ×
p are the vertices of the permutohedral lattice (Adams et al. 2010) that any pixel of the image touches: integer points
of d + 1 coordinates, alike modulo d + 1, of sum 0; here d is ``features``, the features of a head. E takes features to
that plane, √(2/3) (d + 1) times an orthonormal basis of it; o_j is the step along axis j, d there and -1 elsewhere.
The whole is near to exp(-|f_u - f_v|² / 2). r is the row and the column of a pixel, from the middle, in pixels, of
which ``width`` are one feature at the start. Prefix tokens stand in the middle.
Values are splat on the vertices, blurred along the axes and sliced, whose cost grows with the vertices, not the pairs.
With many features no two pixels share a vertex and nothing is mixed: there are as many vertices as features then allow,
(d + 1) N at most, each of them blurred. 3 or 4 features are what the mechanism is for.
What is seen changes in steps: a vertex that a pixel just leaves no longer passes on what others gave it. Coordinates
are in at least float32, but near such borders half precision of the features may see other vertices.
Deviations: tables are of each image and head (the code: of the batch, and the blur passes through vertices that only
other images touch). Rows are divided by their sums (``normalize=False``: by 1 + 2^-d, as in the code, and grow with the
density of pixels, which float16 may not hold). 4 features (the code: 9). The code's factor on r, drawn from N(0, 1), is
part of U.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import check
from ..engines.kernel import normalised, with_ones
from ..engines.lattice import filtered
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast


class Block(Mixer):
    """Permutohedral attention.

    Args:
        features: of a head, that pixels are compared by.
        normalize: whether rows of the weights are divided by their sums.
        width: pixels that change a feature by about 1, at the start.
        Others: those of `Mixer`, but ``scale``, ``qk_norm``, ``key_dim`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    projects = "qv"  # queries are the features
    not_causal = "what is blurred through the lattice has no order"

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        features: int = 4,
        normalize: bool = True,
        width: float = 8.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        scale: float | None = None,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("features", features)
        check.boolean("normalize", normalize)
        check.positive("width", width)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "features are compared by their distance")
        dd = dict(device=device, dtype=dtype)
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **dd, **mixer)
        self.features, self.averages, self.width = features, normalize, width
        self.key_dim = self.num_heads * features
        self.widths = [self.key_dim, 0, dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias, **dd)
        self.places = nn.Parameter(torch.empty(self.num_heads, features, 2, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws U from N(0, 1 / (``features`` ``width``²)), so that a feature changes by 1 over ``width`` pixels."""
        nn.init.normal_(self.places, std=self.features**-0.5 / self.width)

    def heads(self, x, grid):
        """Features in at least float32, nothing, and values."""
        q, k, v = super().heads(x, grid)
        grid, wide = Grid.of(grid), at_least_float32(x)
        middle = (torch.arange(n, device=x.device, dtype=wide) - (n - 1) / 2 for n in grid)
        row, column = (place.flatten() for place in torch.meshgrid(*middle, indexing="ij"))
        down, right = self.places.to(wide).unbind(dim=-1)
        places = down[:, None] * row[:, None] + right[:, None] * column[:, None]  # (heads, N, features)
        return F.leaky_relu(q.to(wide) + F.pad(places, (0, 0, grid.prefix_of(x.shape[1]), 0))), k, v

    def mix(self, q, k, v, grid):
        wide = at_least_float32(v)
        f, values = (t.to(wide).flatten(0, 1) for t in (q, v))
        with outside_autocast(v):
            if self.averages:
                out = normalised(filtered(f, with_ones(values)))
            else:
                out = filtered(f, values) / (1 + 2.0 ** -f.shape[-1])
        return out.reshape(v.shape).to(v.dtype)

    def weights(self, q, k, grid):
        if q.is_meta:  # vertices can't be counted
            return k.new_empty(*q.shape[:3], q.shape[2])
        wide = q.to(at_least_float32(q))
        matrices = torch.stack([self.matrix(f) for f in wide.flatten(0, 1)])
        return matrices.unflatten(0, q.shape[:2]).to(k.dtype)

    def matrix(self, f: Float[Tensor, "N d"]) -> Float[Tensor, "N N"]:
        """A of one image and head, by the formula of the hat."""
        d = f.shape[1]
        basis = f.new_zeros(d + 1, d)
        for i, j in itertools.product(range(d + 1), range(1, d + 1)):
            basis[i, j - 1] = (1 if i < j else -j if i == j else 0) / math.sqrt(j * (j + 1))
        u = math.sqrt(2 / 3) * (d + 1) * f @ basis.mT
        pixel, point = touched(u.detach())
        number = numbered(point)
        far = u[pixel] - point
        hats = u.new_zeros(len(u), int(number.max()) + 1)
        hats = hats.index_put((pixel, number), 1 - (far.amax(dim=1) - far.amin(dim=1)) / (d + 1))
        points = point.new_zeros(hats.shape[1], d + 1).index_put((number,), point)  # each once
        given = hats.mT
        for point, beside in neighbours(points):
            given = given.index_add(0, point, given.index_select(0, beside), alpha=0.5)
        matrix = hats @ given
        return matrix / (matrix.sum(dim=-1, keepdim=True) if self.averages else 1 + 2**-d)

    def extra_repr(self):
        return f"dim={self.dim}, num_heads={self.num_heads}, features={self.features}, normalize={self.averages}"


def touched(u: Float[Tensor, "N coordinates"]) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs coordinates"]]:
    """Pixels and points of the lattice, of all pairs whose hat is above 0.

    All coordinates of u - p lie in less than d + 1. So p is, but for some coordinates, the next point below of a
    remainder; where the rest to it is larger than that of any one coordinate, it may be the one above.
    """
    size = u.shape[1]
    remainders = torch.arange(size, device=u.device)[:, None, None]
    below = remainders + size * ((u - remainders) / size).floor()
    rest = u - below  # (remainders, N, coordinates)
    larger = rest[:, None] > rest.permute(0, 2, 1)[..., None]  # (remainders, coordinates, N, coordinates)
    points = below[:, None] + size * larger
    spread = (u - points).amax(dim=-1) - (u - points).amin(dim=-1)
    pairs = (points.sum(dim=-1) == 0) & (spread < size)
    return pairs.nonzero()[:, 2], points[pairs].long()


def neighbours(points: Int[Tensor, "M coordinates"]) -> list[tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]]:
    """For each axis the numbers of all pairs of points that are a step apart, both ways."""
    count, size = points.shape
    steps = size * torch.eye(size, dtype=torch.long, device=points.device) - 1
    wanted = points + torch.stack([steps, -steps], dim=1)[:, :, None]  # (axes, 2, M, coordinates)
    number = numbered(torch.cat([points, wanted.flatten(0, 2)]))
    place = torch.full_like(number, count).index_put((number[:count],), torch.arange(count, device=points.device))
    found = place[number[count:]].unflatten(0, (size, 2, count))
    return [((beside < count).nonzero()[:, 1], beside[beside < count]) for beside in found]


def numbered(points: Int[Tensor, "M coordinates"]) -> Int[Tensor, "M"]:
    """Numbers from 0, the same for the same points: coordinate by coordinate, so that numbers stay small."""
    number = torch.zeros_like(points[:, 0])
    for column in points.unbind(dim=1):
        column = column - column.min()
        number = (number * (column.max() + 1) + column).unique(return_inverse=True)[1]
    return number
