"""Global filter: a circular convolution as large as the image, learned as a filter of its frequencies.

Rao et al. 2021, GFNet, https://arxiv.org/abs/2107.00645
    y = F⁻¹(K ⊙ F(v))        F: rows and columns; y_u = Σ_v k(u − v mod the image) v_v,  k = F⁻¹(K)
Cost: 5/2 N d log2(N) + 2 N d
Computed: 1 ×
K is complex, of each head and of the half of the frequencies that a real image needs, learned for ``length`` pixels an
axis. On another size it is interpolated linearly in cycles per pixel, around the circle of the rows' frequencies, so
that its 0 stays at 0 and the filter keeps its size in pixels. Weights are those of a circulant matrix: they may be
negative, and what leaves the image on one side comes in on the other. The cost is that of fast Fourier transforms, 5/2
n log₂ n operations for n real numbers; in traced graphs matrices of cosines and sines along each axis take their place.
Of the columns that are their own mirror image, the first and of an even width the last, only the conjugate-symmetric
part has an effect: a real image has no other.
Prefix tokens have no place on the circle: they take from all tokens alike, and positions do not take from them.
Deviations: a filter for each head (the paper: for each channel, ``num_heads=dim``). Projections before and after, in
the place of a ViT's (the paper: none, ``projections=False``). The authors' code resizes K bicubically from corner to
corner in the order of the transform, which moves its frequencies. The paper has one residual around filter and MLP
together; that is the host's.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..grid import Grid
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast
from ..traced import is_traced
from ..waves import turn, waves


class Block(Mixer):
    """Global filter.

    Args:
        length: axis length that the filter is learned for, an integer or (height, width).
        projections: whether values are projected before, by ``qkv``, and after, by ``proj``; without them, as in the
            paper, their biases have no effect.
        Others: those of `Mixer`, but ``scale``, ``qk_norm``, ``key_dim`` and ``attn_drop``, which it has no use for.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False
    projects = "v"
    not_causal = "the convolution is circular, so what comes last stands before what comes first"
    undecayed = ("filter",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        length: int | tuple[int, int] = 16,
        projections: bool = True,
        attn_drop: float = 0.0,
        scale: float | None = None,
        device=None,
        dtype=None,
        **mixer,
    ):
        self_length = check.pair("length", length)
        check.boolean("projections", projections)
        check.no_attn_drop(attn_drop)
        check.no_scale(scale, "there is no q · k to scale")
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        if not projections:
            self.qkv, self.proj = nn.Identity(), nn.Identity()
        self.length = self_length
        size = self.num_heads, self.length[0], self.length[1] // 2 + 1, 2
        self.filter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))  # real and imaginary parts
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the filter from N(0, 0.02²), as the authors' code does."""
        nn.init.normal_(self.filter, std=0.02)

    def mix(self, q, k, v, grid):
        wide = v.to(at_least_float32(v))
        first, pixels = grid.split(wide)
        image = rearrange(pixels, "B n (H W) d -> B n H W d", H=grid.height)
        with outside_autocast(v):
            real, imaginary = self.response(grid, wide)
            if is_traced():
                out = filtered_by_matrices(image, real, imaginary)
            else:
                response = torch.complex(real, imaginary)[..., None]
                out = torch.fft.irfft2(torch.fft.rfft2(image, dim=(2, 3)) * response, s=grid, dim=(2, 3))
            out = torch.cat([wide.mean(dim=2, keepdim=True).expand(first.shape), out.flatten(2, 3)], dim=2)
        return out.to(v.dtype)

    def response(self, grid: Grid, like: Tensor) -> tuple[Float[Tensor, "heads H F"], Float[Tensor, "heads H F"]]:
        """K at the frequencies of a grid, f = 0 … H-1 and g = 0 … W // 2: its real and its imaginary part."""
        if not is_traced() and grid == self.length:
            return self.filter.to(like.dtype).unbind(dim=-1)
        (height, width), (rows, columns), factory = grid, self.length, dict(device=like.device, dtype=like.dtype)
        table = torch.cat([self.filter, self.filter[:, :1]], dim=1).to(like.dtype)  # the circle, closed
        f = torch.arange(height, **factory) * rows / height
        g = torch.arange(width // 2 + 1, **factory) * columns / width
        down, right = hats(f, rows + 1), hats(g.clamp(max=columns // 2), columns // 2 + 1)
        real, imaginary = (down @ part @ right.transpose(0, 1) for part in table.unbind(dim=-1))
        return real, imaginary

    def weights(self, q, k, grid):
        prefix, (height, width) = grid.prefix_of(q.shape[2]), grid
        kernel = self.kernel(grid, q.device, at_least_float32(q))
        y, x = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
        dy, dx = (y[:, None] - y) % height, (x[:, None] - x) % width
        circulant = kernel[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3, 4).flatten(1, 2)
        weights = q.new_zeros(q.shape[0], self.num_heads, q.shape[2], q.shape[2])
        weights[:, :, :prefix] = 1 / q.shape[2]
        weights[:, :, prefix:, prefix:] = circulant.to(q.dtype)
        return weights

    def kernel(self, grid: Grid, device, dtype) -> Float[Tensor, "heads H W"]:
        """k(y, x), in a loop over the frequencies of a real image."""
        (height, width), (rows, columns) = grid, self.length
        y, x = torch.arange(height, device=device)[:, None].double(), torch.arange(width, device=device).double()
        kernel = torch.zeros(self.num_heads, height, width, device=device, dtype=dtype)
        for f in range(height):
            for g in range(width // 2 + 1):
                down, right = f * rows / height, min(g * columns / width, columns // 2)
                real, imaginary = 0, 0
                for row, in_row in ((int(down), 1 - down % 1), (int(down) + 1, down % 1)):
                    for column, in_column in ((int(right), 1 - right % 1), (int(right) + 1, right % 1)):
                        entry = self.filter[:, row % rows, min(column, columns // 2)].to(dtype) * in_row * in_column
                        real, imaginary = real + entry[:, 0], imaginary + entry[:, 1]
                angle = 2 * math.pi * (f * y / height + g * x / width)
                twice = 1 if g == 0 or 2 * g == width else 2  # for the frequency -g
                wave = real[:, None, None] * angle.cos().to(dtype) - imaginary[:, None, None] * angle.sin().to(dtype)
                kernel = kernel + twice * wave / (height * width)
        return kernel

    def extra_repr(self):
        return f"{super().extra_repr()}, length={self.length}"


def hats(places: Float[Tensor, "new"], entries: int) -> Float[Tensor, "new old"]:
    """Shares of the two entries on either side of each place, linearly."""
    return (1 - (places[:, None] - torch.arange(entries, device=places.device, dtype=places.dtype)).abs()).clamp(min=0)


def filtered_by_matrices(image, real, imaginary):
    """Real maps (B, heads, H, W, d), each frequency times K (heads, H, W // 2 + 1)."""
    (height, width, channels), factory = image.shape[2:], dict(device=image.device, dtype=image.dtype)
    half = width // 2 + 1
    (down, down_sines), (right, right_sines) = waves(height, **factory), waves(width, half, **factory)

    def along_rows(a, b, sines):
        both = (rearrange(t, "B n H F d -> B n H (F d)") for t in (a, b))
        return (rearrange(t, "B n H (F d) -> B n H F d", d=channels) for t in turn(*both, down, sines))

    a, b = along_rows(right @ image, -right_sines @ image, down_sines)
    real, imaginary = real[..., None], imaginary[..., None]
    a, b = along_rows(a * real - b * imaginary, a * imaginary + b * real, -down_sines)
    g = torch.arange(half, device=image.device)
    twice = 2 - (g == 0).to(image.dtype) - (2 * g == width).to(image.dtype)  # for the frequency -g
    right, right_sines = ((t * twice[:, None]).transpose(0, 1) for t in (right, right_sines))
    return right @ a - right_sines @ b
