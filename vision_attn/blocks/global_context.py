"""Global context: one attention map for the whole image, its summary given to every pixel.

Cao et al. 2019, GCNet, https://arxiv.org/abs/1904.11492
    c = Σ_v softmax_v(w · x_v) x_v        t(c) = W₂ ReLU(LayerNorm(W₁ c))
    y_u = x_u + t(c)   (``fusion="add"``)    or   y_u = x_u · σ(t(c))   (``"multiply"``)    or both, multiplied first
Cost: 2 N d + d² / 8
Computed: 1 ×
With ``fusion="both"`` each has its own transform; ``pooling="average"`` takes the mean over pixels for c.
Deviations: the last W₂ is not zero at the start (the code: zero, so that adding starts as identity). A layer's zero
gain gives that for every fusion, and the two zeros together would never train. The bottleneck has at least 4 channels,
and linear layers start as torch's do (the code: Kaiming). The LayerNorm has the code's ε, but weights of shape
(hidden,) (the code: (hidden, 1, 1)).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import check
from ..gate import Gate
from ..precision import at_least_float32, outside_autocast, scaled, weight_of
from ..traced import is_traced, is_transformed


class Block(Gate):
    """Global context block.

    Args:
        dim: channels.
        fusion: "add", "multiply" or "both".
        pooling: "attention" or "average".
        rd_ratio: width of the bottleneck over ``dim``; rd_channels: that width itself.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the summary that every pixel gets is of the whole image"

    def __init__(
        self,
        dim: int,
        *,
        fusion: Literal["add", "multiply", "both"] = "add",
        pooling: Literal["attention", "average"] = "attention",
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        dd = dict(device=device, dtype=dtype)
        check.one_of("fusion", fusion, ("add", "multiply", "both"))
        check.one_of("pooling", pooling, ("attention", "average"))
        check.positive("rd_ratio", rd_ratio)
        hidden = max(4, int(dim * rd_ratio)) if rd_channels is None else rd_channels
        check.positive_int("rd_channels", hidden)

        def transform():
            return nn.Sequential(
                nn.Linear(dim, hidden, **dd), nn.LayerNorm(hidden, **dd), nn.ReLU(), nn.Linear(hidden, dim, **dd)
            )

        self.key = nn.Conv2d(dim, 1, 1, **dd) if pooling == "attention" else None
        self.multiply = transform() if fusion != "add" else None
        self.add = transform() if fusion != "multiply" else None

    def gate(self, x):
        wide = at_least_float32(x)
        with outside_autocast(x):  # its gradient, a sum over channels, may leave float16
            shares, pixels = self.shares(x).flatten(1), x.to(wide).flatten(2)  # (B, N), (B, C, N)
            if torch.is_grad_enabled() and x.is_contiguous() and not (is_traced() or is_transformed()):
                context = Summary.apply(pixels, shares).to(x.dtype)
            else:
                context = summary(pixels, shares).to(x.dtype)
        if self.multiply is not None:
            x = scaled(x, self.multiply(context).to(wide).sigmoid()[:, :, None, None])
        if self.add is not None:
            x = x + self.add(context)[:, :, None, None]
        return x

    def attention_map(self, x):
        return self.shares(self.checked(x)).to(x.dtype)

    def shares(self, x):
        """Of each position in the summary, (B, H, W), in at least float32."""
        batch, _, height, width = x.shape
        if self.key is None:
            return x.new_ones(batch, height, width, dtype=at_least_float32(x)) / (height * width)
        scores = self.key(x.to(weight_of(self.key).dtype)).flatten(1)
        return scores.softmax(dim=1, dtype=at_least_float32(x)).reshape(batch, height, width)

    def reference(self, x):
        return torch.stack([self.reference_image(image) for image in x])

    def reference_image(self, image):
        """One image (C, H, W), in loops over its pixels."""
        pixels = [image[:, y, z] for y in range(image.shape[1]) for z in range(image.shape[2])]
        weights = [1.0 for _ in pixels]
        if self.key is not None:
            scores = [(self.key.weight[0, :, 0, 0] * pixel).sum() + self.key.bias[0] for pixel in pixels]
            weights = [torch.exp(score - max(scores)) for score in scores]
        context = sum(weight * pixel for weight, pixel in zip(weights, pixels)) / sum(weights)
        for name in ("multiply", "add"):
            if (transform := getattr(self, name)) is None:
                continue
            first, norm, _, last = transform
            hidden = first.weight @ context + first.bias
            hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt()
            hidden = (hidden * norm.weight + norm.bias).clamp(min=0)
            out = (last.weight @ hidden + last.bias)[:, None, None]
            image = image / (1 + torch.exp(-out)) if name == "multiply" else image + out
        return image


def summary(pixels: Float[Tensor, "B C N"], shares: Float[Tensor, "B N"]) -> Float[Tensor, "B C"]:
    """Σ_n shares_n pixels_n of each image: a row times a matrix, which torch has fast for several images, too."""
    return (shares[:, None] @ pixels.transpose(1, 2))[:, 0]


class Summary(torch.autograd.Function):
    """`summary` of pixels whose gradient lies in memory as they do, where the product's would lie across."""

    @staticmethod
    def forward(ctx, pixels, shares):
        ctx.save_for_backward(pixels, shares)
        return summary(pixels, shares)

    @staticmethod
    def backward(ctx, slope):
        pixels, shares = ctx.saved_tensors
        return slope[:, :, None] * shares[:, None], (slope[:, None] @ pixels)[:, 0]
