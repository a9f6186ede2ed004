"""Rotary positions: queries and keys turn by angles that grow with their places, so that q · k tells where k is from q.

Heo et al. 2024, RoPE for vision transformers, https://arxiv.org/abs/2403.13298
    q'_u · k'_v = Re Σ_p q_up e^{iθ_p(u)} (k_vp e^{iθ_p(v)})*        θ_p(y, x) = f^x_p x + f^y_p y
Pairs of a head's channels are complex numbers q_p. Cost: 4 N d for queries and keys together.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from . import check
from .grid import Grid
from .precision import at_least_float32
from .traced import fixed

FORMS = ("axial", "mixed", "dinov3")


class Rotary(nn.Module):
    """Turns queries and keys by their places. Prefix tokens, and channels beyond a multiple of 4, are left as they are.

    Args:
        form: "axial": half of the pairs turn by x, the others by y, of pixels, in frequencies base^(-2p / pairs),
            p = 0, 1, …. "mixed": every pair by both, in learned frequencies of each head, which start as two axes at a
            right angle, drawn at random. "dinov3": as "axial" by 2π times the coordinates of pixel centres, which go
            from -1 to 1 along each axis: what is turned follows the image, not the pixel.
        heads: of queries and keys.
        channels: of a head, at least 4.
        base: of the frequencies. None: 100; of "mixed" 10.
        offset: added to the coordinates of pixels, before they are put between -1 and 1 or brought to ``reference``.
        x_first: whether the first half of the pairs turns by x, not y. None: unless "dinov3".
        halves: whether a pair is channels p and p + pairs, not 2p and 2p + 1. None: only "dinov3".
        reference: (height, width) that coordinates of "axial" are stretched to, whatever the grid; None: as they are.

    Raises:
        ValueError: an unknown form, or fewer than 4 channels.
    """

    undecayed = ("frequencies",)

    def __init__(
        self,
        form: Literal["axial", "mixed", "dinov3"],
        heads: int,
        channels: int,
        *,
        base: float | None = None,
        offset: float = 0.0,
        x_first: bool | None = None,
        halves: bool | None = None,
        reference: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check.one_of("rotary", form, FORMS)
        if channels < 4:
            raise ValueError(f"rotary={form!r}: queries and keys must have ≥ 4 channels a head, not {channels}")
        self.form, self.pairs, self.offset, self.reference = form, channels // 4 * 2, offset, reference
        self.base = (10.0 if form == "mixed" else 100.0) if base is None else base
        self.x_first = form != "dinov3" if x_first is None else x_first
        self.halves = form == "dinov3" if halves is None else halves
        self.frequencies = None
        if form == "mixed":
            # of x, then of y, in radians a pixel
            self.frequencies = nn.Parameter(torch.empty(2, heads, self.pairs, device=device, dtype=dtype))
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the direction of each head's axes, if they are learned."""
        if self.frequencies is None:
            return
        like = dict(device=self.frequencies.device, dtype=at_least_float32(self.frequencies))
        axis = 2 * math.pi * torch.rand(self.frequencies.shape[1], 1, **like)
        angle = torch.cat([axis, axis + math.pi / 2], dim=1)[:, :, None]  # (heads, 2, 1)
        size = self.slower(like["device"], like["dtype"])
        self.frequencies.copy_(torch.stack([(size * angle.cos()).flatten(1), (size * angle.sin()).flatten(1)]))

    def forward(
        self,
        q: Float[Tensor, "B heads tokens d"],
        k: Float[Tensor, "B heads tokens d"],
        grid: Grid,
        place: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of P + H·W tokens on ``grid``, turned; or of one, at raster index ``place`` of it."""
        grid = Grid.of(grid)
        if place is None:
            lines = (torch.arange(n, device=q.device) for n in grid)
            y, x = (t.flatten() for t in torch.meshgrid(*lines, indexing="ij"))
            angle = F.pad(self.angles(y, x, grid, at_least_float32(q)), (0, 0, grid.prefix_of(q.shape[2]), 0))
        else:
            y, x = (torch.full((1,), at, device=q.device) for at in divmod(place, grid.width))
            angle = self.angles(y, x, grid, at_least_float32(q))
        cosines, sines = angle.cos(), angle.sin()
        return turned(q, cosines, sines, self.halves), turned(k, cosines, sines, self.halves)

    def angles(
        self, y: Shaped[Tensor, "n"], x: Shaped[Tensor, "n"], grid: Grid, dtype: torch.dtype
    ) -> Float[Tensor, "#heads n pairs"]:
        """θ at places (y, x) of ``grid``, in radians."""
        down, right = (
            self.coordinate(at.to(dtype), axis, size)[:, None] for axis, (at, size) in enumerate(zip((y, x), grid))
        )
        if self.frequencies is not None:
            of_x, of_y = self.frequencies.to(dtype)[:, :, None]  # (heads, 1, pairs)
            return right * of_x + down * of_y
        slower = self.slower(y.device, dtype)
        halves = (right, down) if self.x_first else (down, right)
        return torch.cat([at * slower for at in halves], dim=1)[None]

    def coordinate(self, at: Float[Tensor, "n"], axis: int, size: int) -> Float[Tensor, "n"]:
        """What pixels ``at`` along an axis of ``size`` are turned by."""
        if self.form == "dinov3":
            return 2 * math.pi * ((at + 0.5 + self.offset) / size * 2 - 1)
        return at + self.offset if self.reference is None else (at + self.offset) / size * self.reference[axis]

    def slower(self, device, dtype) -> Float[Tensor, "half"]:
        """base^(-2p / pairs) of half of the pairs."""
        half = self.pairs // 2
        power = torch.arange(half, device=device, dtype=dtype) / half
        return torch.full_like(power, self.base).pow(-power)

    def extra_repr(self) -> str:
        return f"{self.form!r}, base={self.base:g}"


def turned(
    x: Float[Tensor, "B heads tokens d"],
    cosines: Float[Tensor, "#heads tokens pairs"],
    sines: Float[Tensor, "#heads tokens pairs"],
    halves: bool,
) -> Float[Tensor, "B heads tokens d"]:
    """x with its first pairs turned, computed in the type of the angles."""
    size = 2 * cosines.shape[-1]
    pairs, rest = x.split([size, fixed(x.shape[-1]) - size], dim=-1)
    a, b = pairs.chunk(2, dim=-1) if halves else (pairs[..., 0::2], pairs[..., 1::2])
    both = a * cosines - b * sines, a * sines + b * cosines
    out = (torch.cat(both, dim=-1) if halves else torch.stack(both, dim=-1).flatten(-2)).to(x.dtype)
    return torch.cat([out, rest], dim=-1) if fixed(rest.shape[-1]) else out
