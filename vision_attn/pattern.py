"""Who may see whom on a grid: the definition of a sparse pattern, and the key sets that compute it fast.

A `Pattern` is said twice. ``allowed`` is the rule, pixel by pixel; ``mask``, ``draw`` and ``reach`` follow from it.
``key_sets`` are reshapes of the grid: each puts every query in one group with keys it may see, and together
they hold every allowed pair exactly once. `union` computes attention from the key sets alone.
"""

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Shaped
from torch import Tensor

from .grid import Grid


@dataclass(frozen=True)
class Pattern:
    """A rule for which positions of a grid see which. Subclasses state ``allowed`` and ``key_sets``."""

    def allowed(self, qy, qx, ky, kx, grid: Grid):
        """Whether the query at (qy, qx) may see the key at (ky, kx); integers or broadcastable integer tensors."""
        raise NotImplementedError

    def key_sets(self) -> tuple["KeySet", ...]:
        """Disjoint key sets whose union is ``allowed``."""
        raise NotImplementedError

    def mask(self, grid: Grid, prefix: int = 0, device=None) -> Bool[Tensor, "tokens tokens"]:
        """The rule as a matrix, rows are queries. Prefix tokens see all and are seen by all."""
        y, x = (c.flatten() for c in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
        seen = self.allowed(y[:, None], x[:, None], y[None, :], x[None, :], grid).expand(grid.size, grid.size)
        return F.pad(seen, (prefix, 0, prefix, 0), value=True)

    def draw(self, grid: Grid, y: int, x: int) -> str:
        """What the query at (y, x) sees: ``@`` itself, ``#`` seen, ``-`` not seen (``o``: not even itself)."""
        seen = self.mask(grid)[y * grid.width + x]
        signs = ["#" if s else "-" for s in seen.tolist()]
        signs[y * grid.width + x] = "@" if seen[y * grid.width + x] else "o"
        return "\n".join("".join(signs[row * grid.width : (row + 1) * grid.width]) for row in range(grid.height))

    def reach(self, grid: Grid, layers: int) -> Bool[Tensor, "positions positions"]:
        """Who is heard by whom after ``layers`` layers of this pattern (with residual connections)."""
        one = self.mask(grid) | torch.eye(grid.size, dtype=torch.bool)
        return reduce(lambda seen, _: (seen.float() @ one.float()) > 0, range(layers - 1), one)


class KeySet:
    """A reshape of the grid into groups in which every query sees every key that ``mask`` lets through."""

    def fold(self, x: Shaped[Tensor, "b H W d"]) -> Shaped[Tensor, "b groups length d"]:
        """The grid as groups, padded with zeros where it does not divide."""
        raise NotImplementedError

    def unfold(self, x: Shaped[Tensor, "b groups length d"], grid: Grid) -> Shaped[Tensor, "b H W d"]:
        """The inverse of ``fold``; padding is dropped."""
        raise NotImplementedError

    def mask(self, grid: Grid, device) -> Bool[Tensor, "#groups #length length"] | None:
        """Which keys of its group a query sees; None: all of them."""
        return None


class Rows(KeySet):
    """Every position with its own row. A view, no copy."""

    def fold(self, x):
        return x

    def unfold(self, x, grid):
        return x


class Columns(KeySet):
    """Every position with its own column, with or without itself. A view, no copy."""

    def __init__(self, with_self: bool = True):
        self.with_self = with_self

    def fold(self, x):
        return x.transpose(1, 2)

    def unfold(self, x, grid):
        return x.transpose(1, 2)

    def mask(self, grid, device):
        if self.with_self:
            return None
        y = torch.arange(grid.height, device=device)
        return (y[:, None] != y[None, :])[None]


class Tiles(KeySet):
    """The grid cut into tiles of ``tile`` = (height, width) positions, padded at the bottom and right.

    With ``across=False`` a group is one tile of adjacent positions (a window); with ``across=True`` it is the
    positions that hold the same place in every tile (a dilated grid).
    """

    def __init__(self, tile: tuple[int, int], across: bool = False):
        self.tile = tile
        self.groups, self.members = ("(py px)", "(y x)") if across else ("(y x)", "(py px)")

    def sizes(self, height: int, width: int) -> dict[str, int]:
        """Tiles down (y) and across (x), and positions in one (py, px)."""
        py, px = self.tile
        return dict(y=(height + py - 1) // py, x=(width + px - 1) // px, py=py, px=px)

    def fold(self, x):
        height, width = x.shape[1:3]
        n = self.sizes(height, width)
        x = F.pad(x, (0, 0, 0, n["x"] * n["px"] - width, 0, n["y"] * n["py"] - height))
        return rearrange(x, f"b (y py) (x px) d -> b {self.groups} {self.members} d", **n)

    def unfold(self, x, grid):
        n = self.sizes(*grid)
        x = rearrange(x, f"b {self.groups} {self.members} d -> b (y py) (x px) d", **n)
        # not a slice, whose size is a new unknown to torch.export
        return x.narrow(1, 0, grid.height).narrow(2, 0, grid.width)

    def mask(self, grid, device):
        inside = torch.ones(1, grid.height, grid.width, 1, dtype=torch.bool, device=device)
        return self.fold(inside)[0].transpose(1, 2)  # (groups, 1, length)
