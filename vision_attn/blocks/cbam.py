"""CBAM: what to look at, channel by channel, then where, pixel by pixel.

Woo et al. 2018, CBAM, https://arxiv.org/abs/1807.06521
    x' = x · σ(MLP(mean over pixels) + MLP(max over pixels))
    y  = x' · σ(BN(conv 7×7 of [max over channels, mean over channels] of x'))
Cost: 2 N d + d² / 4 + 98 N
Computed: 1 ×
As in the authors' code the maximum comes before the mean, the shared MLP has biases, and a BatchNorm (momentum
0.01) follows the 7×7 convolution; the paper does not mention the last two.
Deviations: the hidden layer has at least 4 channels (the code: dim // 16, which is 0 below 16). The BatchNorm
starts with weight 1 (the code's ResNet: 0, so that the gate starts flat at one half); starting without effect is
what a layer's gain is for.
"""

import math

import torch
from torch import nn

from .. import check
from ..gate import Gate
from ..precision import at_least_float32, scaled
from ..traced import is_traced, is_transformed


class Block(Gate):
    """CBAM.

    Args:
        dim: channels.
        rd_ratio: width of the hidden layer over ``dim``; rd_channels: that width itself.
        spatial: whether the second gate, over pixels, follows.
        kernel_size: of its convolution, odd.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "both gates look at the whole image or ahead"

    def __init__(
        self,
        dim: int,
        *,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        spatial: bool = True,
        kernel_size: int = 7,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        dd = dict(device=device, dtype=dtype)
        check.positive("rd_ratio", rd_ratio)
        check.boolean("spatial", spatial)
        hidden = max(4, int(dim * rd_ratio)) if rd_channels is None else rd_channels
        check.positive_int("rd_channels", hidden)
        check.positive_int("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        self.mlp = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.ReLU(), nn.Linear(hidden, dim, **dd))
        self.spatial = None
        if spatial:
            conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
            self.spatial = nn.Sequential(conv, nn.BatchNorm2d(1, momentum=0.01, **dd))

    def gate(self, x):
        x = scaled(x, self.channel_gate(x))
        return x if self.spatial is None else scaled(x, self.spatial_gate(x))

    def channel_gate(self, x):
        """(B, C, 1, 1), in [0, 1] and at least float32."""
        pooled = torch.stack([x.mean(dim=(2, 3)), largest(x.flatten(2), 2)[..., 0]])  # (2, B, C)
        scores = self.mlp(pooled).sum(dim=0)
        return scores.to(at_least_float32(scores)).sigmoid()[:, :, None, None]

    def spatial_gate(self, x):
        """(B, 1, H, W), in [0, 1] and at least float32."""
        pooled = torch.cat([largest(x, 1), x.mean(dim=1, keepdim=True)], dim=1)
        return self.spatial(pooled).to(at_least_float32(x)).sigmoid()

    def attention_map(self, x):
        x = self.checked(x)
        if self.spatial is None:
            return torch.ones_like(x[:, 0])
        return self.spatial_gate(scaled(x, self.channel_gate(x)))[:, 0].to(x.dtype)

    def reference(self, x):
        first, last = self.mlp[0], self.mlp[2]
        rows = []
        for image in x:  # (C, H, W)
            scores = 0
            for pooled in (image.flatten(1).sum(1) / image[0].numel(), image.flatten(1).max(1).values):
                hidden = (first.weight @ pooled + first.bias).clamp(min=0)
                scores = scores + last.weight @ hidden + last.bias
            rows.append(torch.stack([channel / (1 + math.e**-s) for channel, s in zip(image, scores)]))
        x = torch.stack(rows)
        if self.spatial is None:
            return x
        conv, norm = self.spatial
        size, (height, width) = conv.kernel_size[0], x.shape[2:]
        two = torch.stack([x.max(dim=1).values, x.sum(dim=1) / x.shape[1]], dim=1)
        scores = torch.zeros_like(x[:, 0])
        for dy in range(size):
            for dx in range(size):
                y, z = dy - size // 2, dx - size // 2  # where this tap looks
                there = two[:, :, max(0, y) : max(0, height + min(0, y)), max(0, z) : max(0, width + min(0, z))]
                tap = (conv.weight[0, :, dy, dx, None, None] * there).sum(dim=1)
                here = scores[:, max(0, -y) :, max(0, -z) :][:, : tap.shape[1], : tap.shape[2]]
                here += tap
        if norm.training:
            mean, var = scores.mean(), scores.var(unbiased=False)
        else:
            mean, var = norm.running_mean, norm.running_var
        scores = (scores - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
        return x / (1 + (-scores).exp())[:, None]


def largest(x, dim):
    """The maximum along a dimension, which stays. Where a gradient may be wanted, with its place: amax's is slower."""
    if (torch.is_grad_enabled() and x.requires_grad) or is_traced() or is_transformed():
        return x.max(dim=dim, keepdim=True).values
    return x.amax(dim=dim, keepdim=True)
