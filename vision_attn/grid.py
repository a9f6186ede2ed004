"""The grid of positions that a sequence of image tokens stands for."""

from typing import NamedTuple

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor

from .traced import fixed


class Grid(NamedTuple):
    """``height × width`` positions in row-major (raster) order; either may be symbolic while a graph is traced.

    Token ``P + y * width + x`` of a sequence is position ``(y, x)``; the first ``P`` tokens are prefix tokens.
    """

    height: int
    width: int

    @classmethod
    def of(cls, grid: "tuple[int, int]") -> "Grid":
        """A grid from any (height, width); ValueError for anything else."""
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or any(isinstance(n, (float, str)) for n in grid):
            raise ValueError(f"grid={grid!r}: must be (height, width), two integers ≥ 1")
        return cls(*grid)

    @property
    def size(self) -> int:
        """Number of positions, H·W."""
        return self.height * self.width

    def prefix_of(self, tokens: int) -> int:
        """Number P of prefix tokens in a sequence of ``tokens`` = P + H·W; ValueError if the grid does not fit."""
        if fixed(self.height) < 1 or fixed(self.width) < 1:
            raise ValueError(f"grid={self.height}×{self.width}: height and width must be ≥ 1")
        prefix = fixed(tokens - self.size)
        if prefix < 0:
            raise ValueError(
                f"grid={self.height}×{self.width} has {self.size} positions, but there are only {tokens} tokens; "
                "x must be (B, P + H·W, dim) with P ≥ 0 prefix tokens"
            )
        return prefix

    def split(self, x: Shaped[Tensor, "B heads tokens d"]) -> tuple[Tensor, Tensor]:
        """The prefix tokens (B, heads, P, d) and the positions (B, heads, H·W, d) of a sequence."""
        prefix = self.prefix_of(x.shape[2])
        if prefix == 0:  # no parts: autograd would put their gradients together again, which is a copy
            return x.detach().narrow(2, 0, 0), x
        return x.split([prefix, self.size], dim=2)

    def maps(self, x: Shaped[Tensor, "B heads positions d"]) -> Shaped[Tensor, "B_heads H W d"]:
        """The positions as maps, those of all images and heads in a row."""
        return rearrange(x, "B n (H W) d -> (B n) H W d", H=self.height, W=self.width)
