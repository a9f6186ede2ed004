"""Gate: a feature map is reweighted or added to, in place. Feature map → feature map."""

from jaxtyping import Float
from torch import Tensor

from . import check
from .leaf import Leaf
from .traced import fixed


class Gate(Leaf):
    """A block that works on feature maps (B, C, H, W) and has no matrix of who attends to whom.

    A subclass says its mechanism twice, sharing no code: ``reference`` in plain loops, ``gate`` fast.

    Args:
        dim: channels in and out, C.
    """

    recurrence = 1  # times that OnMap applies the block, with shared weights
    not_causal = ""  # why causal=True is refused, where it is
    undecayed: tuple[str, ...] = ()  # parameters that weight decay leaves alone: learned tokens, tables over positions

    def __init__(self, dim: int):
        super().__init__()
        check.positive_int("dim", dim)
        self.dim = dim

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The block's output for a feature map.

        Raises:
            ValueError: ``x`` is not (B, C=dim, H, W).
        """
        return self.gate(self.checked(x))

    def gate(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The fast path."""
        raise NotImplementedError

    def reference(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The definition, in plain loops."""
        raise NotImplementedError

    def attention_map(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
        """Where the block looks in ``x``: its spatial weight of every position. For eval mode: in train mode a
        BatchNorm inside takes note of ``x`` as in a forward pass."""
        raise NotImplementedError

    def checked(self, x: Tensor) -> Tensor:
        """``x`` if it is a map of this block's channels, ValueError otherwise."""
        if x.ndim != 4 or fixed(x.shape[1]) != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (B, C={self.dim}, H, W)")
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
