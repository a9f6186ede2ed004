"""Any block as a residual layer: on feature maps (`OnMap`) or on the tokens of a ViT (`OnTokens`).

Both compute x + gain · update(x) with one learned gain that starts at 0: exactly the identity until trained. The
gain is a bare parameter, so a host that re-initialises its convolutions and norms can't overwrite it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from . import check
from .gate import Gate
from .grid import Grid
from .leaf import Leaf
from .mixer import Mixer
from .traced import fixed


class Residual(Leaf):
    """x + gain · update(x). ``init_gain=0`` starts as identity, ``init_gain=1`` as the block was published."""

    def __init__(self, block: Mixer | Gate, init_gain: float = 0.0):
        super().__init__()
        if not isinstance(block, (Mixer, Gate)):
            raise ValueError(f"block={type(block).__name__}: must be a Mixer or a Gate")
        check.finite("init_gain", init_gain)
        self.block, self.init_gain = block, float(init_gain)
        at = next(block.parameters(), torch.empty(0))
        self.gain = nn.Parameter(at.new_empty(1))  # not 0-d: sharded training refuses that
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the gain to ``init_gain``. The block's own modules reset themselves."""
        nn.init.constant_(self.gain, self.init_gain)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """x + gain · update, in the type of ``x`` and in one pass."""
        return torch.addcmul(x, self.gain.to(x.dtype), update.to(x.dtype))

    def extra_repr(self) -> str:
        return f"init_gain={self.init_gain:g}"


class OnMap(Residual):
    """A block on a feature map: what a conv slot takes. A mixer sees the map's pixels as tokens.

    A block whose paper applies it several times with shared weights is applied ``block.recurrence`` times.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if x.ndim != 4 or fixed(x.shape[1]) != self.block.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (B, C={self.block.dim}, H, W)")
        for _ in range(self.block.recurrence):
            if isinstance(self.block, Gate):
                x = torch.lerp(x, self.block(x).to(x.dtype), self.gain.to(x.dtype))
            else:
                x = self.add(x, self.update(x))
        return x

    def update(self, x: Tensor) -> Tensor:
        grid = Grid(x.shape[2], x.shape[3])
        out = self.block(rearrange(x, "B C H W -> B (H W) C"), grid)
        return rearrange(out, "B (H W) C -> B C H W", H=grid.height)


class OnTokens(Residual):
    """A block on tokens (B, P + H·W, C). A gate sees the patch tokens as a map and leaves prefix tokens alone."""

    def forward(self, x: Float[Tensor, "B tokens C"], grid: Grid) -> Float[Tensor, "B tokens C"]:
        if x.ndim != 3 or fixed(x.shape[2]) != self.block.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (B, P + H·W, C={self.block.dim})")
        grid = Grid.of(grid)
        if isinstance(self.block, Mixer):
            return self.add(x, self.block(x, grid))
        prefix = grid.prefix_of(x.shape[1])
        image = rearrange(x[:, prefix:], "B (H W) C -> B C H W", H=grid.height, W=grid.width)
        update = rearrange(self.block(image) - image, "B C H W -> B (H W) C")
        # added to all tokens, not joined to the prefix: the sum keeps the strides of x, on which later sums depend
        return self.add(x, F.pad(update, (0, 0, prefix, 0)))
