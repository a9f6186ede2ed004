"""Light non-local attention: features compare and are drawn as they are, fewer of them, in the cheaper order.

Li et al. 2020, AutoNL, https://arxiv.org/abs/2004.01961
    y = x + BN(DW(θ (φᵀ g) / (H W)))    θ = x[:ρC]   φ = x_s[:ρC]   g = x_s = x[::s, ::s]
Cost: min(ρ N (1 + 1 / s²) d², (1 + ρ) N² / s² d) + 9 N d
Computed: 1 ×
No projections and no softmax: θ, φ and g are the input itself, the first ``ratio`` of its channels and every
``stride``-th pixel of it. θ (φᵀ g) and (θ φᵀ) g are the same, and the one with fewer multiply-adds is taken. A
depthwise 3 × 3 convolution and a BatchNorm follow.
Deviations: the BatchNorm starts at 1 and the gain of the host's layer at 0 (the code: the norm at 0). Products are
summed in at least float32, and cut off at a sixteenth of the range of the map's own type. ρC is rounded, to at least 1
(the code: down). The BatchNorm has torch's ε of 1e-5 and momentum of 0.1 (the code: 1e-3 and, so counted, 0.01). The
authors search ρ and s for each layer of a network; here they are arguments.
"""

import torch
from torch import nn

from .. import check
from ..gate import Gate
from ..precision import at_least_float32, outside_autocast, weight_of
from ..traced import is_traced


class Block(Gate):
    """Light non-local attention.

    Args:
        dim: channels.
        ratio: share ρ of the channels that are compared, in (0, 1]; at least one is.
        stride: s, every s-th pixel down and right is looked at.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "in training, the BatchNorm behind the sum takes its statistics from the whole image"

    def __init__(self, dim: int, *, ratio: float = 0.25, stride: int = 2, device=None, dtype=None):
        super().__init__(dim)
        check.positive("ratio", ratio)
        if ratio > 1:
            raise ValueError(f"ratio={ratio!r}: must be in (0, 1]")
        check.positive_int("stride", stride)
        self.compared, self.stride = max(1, round(ratio * dim)), stride
        self.near = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def gate(self, x):
        far = self.far(x).to(weight_of(self.near).dtype)
        with outside_autocast(x):  # in float16 the cube of a feature would soon be infinite
            return x + self.norm(self.near(far)).to(x.dtype)

    def far(self, x):
        """θ φᵀ g / (H W), associated the cheaper way; in a traced graph, whose size is open, the linear one."""
        wide = at_least_float32(x)
        some = nn.functional.avg_pool2d(x, 1, self.stride)  # every s-th pixel, as they are
        theta = x[:, : self.compared].flatten(2).to(wide)  # (B, ρC, N)
        g = some.flatten(2).to(wide)  # (B, C, M)
        phi = g[:, : self.compared]
        with outside_autocast(x):
            if is_traced() or self.linear_is_cheaper(theta.shape[2], g.shape[2]):
                out = (g @ phi.transpose(-2, -1)) @ theta
            else:
                out = g @ (phi.transpose(-2, -1) @ theta)
        most = torch.finfo(x.dtype).max / 16  # float16 ends where the cube of a feature of 40 does
        return (out / theta.shape[2]).clamp(-most, most).to(x.dtype).unflatten(2, x.shape[2:])

    def linear_is_cheaper(self, pixels: int, looked_at: int) -> bool:
        linear = self.compared * self.dim * (pixels + looked_at)
        return linear <= pixels * looked_at * (self.compared + self.dim)

    def attention_map(self, x):
        """How strongly the mean pixel compares with each that is looked at, as a share of the strongest."""
        x = self.checked(x)
        some = x[:, : self.compared, :: self.stride, :: self.stride]
        seen = (x[:, : self.compared].mean(dim=(2, 3), keepdim=True) * some).sum(dim=1).abs()
        seen = seen / seen.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        seen = seen.repeat_interleave(self.stride, dim=1).repeat_interleave(self.stride, dim=2)
        return seen[:, : x.shape[2], : x.shape[3]]

    def reference(self, x):
        after = torch.stack([self.reference_image(image) for image in x]) if len(x) else x
        mean, var = self.norm.running_mean, self.norm.running_var
        if self.norm.training:
            mean, var = after.mean(dim=(0, 2, 3)), after.var(dim=(0, 2, 3), unbiased=False)
        slope = self.norm.weight / (var + self.norm.eps).sqrt()
        return x + (after - mean[:, None, None]) * slope[:, None, None] + self.norm.bias[:, None, None]

    def reference_image(self, image):
        """One image (C, H, W) in loops over the pixels looked at, up to the BatchNorm."""
        _, height, width = image.shape
        far = torch.zeros_like(image)
        for y in range(0, height, self.stride):
            for x in range(0, width, self.stride):
                other = image[:, y, x]
                alike = sum(image[c] * other[c] for c in range(self.compared))  # (H, W)
                far = far + alike * other[:, None, None] / (height * width)
        near = torch.zeros_like(image)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                top, left = max(0, -down), max(0, -right)
                rows, columns = height - abs(down), width - abs(right)
                if rows > 0 and columns > 0:
                    moved = far[:, max(0, down) : max(0, down) + rows, max(0, right) : max(0, right) + columns]
                    moved = moved * self.near.weight[:, 0, 1 + down, 1 + right, None, None]
                    near = near + nn.functional.pad(moved, (left, width - columns - left, top, height - rows - top))
        return near
