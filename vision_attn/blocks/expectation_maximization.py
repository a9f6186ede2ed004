"""Expectation-maximization attention: the image is explained by a few bases, and redrawn from them.

Li et al. 2019, EMANet, https://arxiv.org/abs/1907.13426
    E: z = softmax over the bases of x₁ μ      M: μ = normalised(x₁ᵀ z / Σ_n z)      three times, from the stored μ
    y = x + BN(W₂ ReLU(μ zᵀ))                  x₁ = W₁ x
Cost: 7 N K d
Computed: 1 ×
K = 64 bases of unit norm. The stored bases follow the bases of the batch by a moving average: once per optimizer
step however often forward ran, over all processes, never in eval.
``grad="paper"`` runs the iterations without gradient as the authors' code does: W₁ then never learns and the rest
of the network feels the block only through the identity. ``grad="full"`` (default) differentiates through them.
Deviations: the moving average is part of the module (the code: of the training script), and is scaled back to unit
norm (the code: its norm shrinks, which softens the first E step). The closing ReLU is the host's, whose maps may be
signed. Softmax and norms are taken in at least float32, and the block is left out of autocast. ``temperature`` divides
the scores of the E step (paper and code: 1). Weights start as torch's layers do.
"""

from typing import Literal

import torch
from torch import nn

from .. import check
from ..average import StepAverage
from ..gate import Gate
from ..precision import at_least_float32, outside_autocast, weight_of


class Block(Gate):
    """Expectation-maximization attention.

    Args:
        dim: channels.
        bases: number of bases, K.
        iterations: EM iterations.
        momentum: share of the stored bases that a step keeps.
        temperature: divides the scores of the E step.
        grad: "full" or "paper".

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the bases are fitted to the whole image"

    def __init__(
        self,
        dim: int,
        *,
        bases: int = 64,
        iterations: int = 3,
        momentum: float = 0.9,
        temperature: float = 1.0,
        grad: Literal["full", "paper"] = "full",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        dd = dict(device=device, dtype=dtype)
        check.positive_int("bases", bases)
        check.positive_int("iterations", iterations)
        check.rate("momentum", momentum)
        check.positive("temperature", temperature)
        check.one_of("grad", grad, ("full", "paper"))
        self.iterations, self.temperature, self.through = iterations, temperature, grad == "full"
        # without a gradient for good, it is no parameter to train: distributed training would wait for it
        self.before = nn.Conv2d(dim, dim, 1, **dd).requires_grad_(self.through)
        self.after = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.bases = Bases(dim, bases, momentum, beside=self.after, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.register_load_state_dict_pre_hook(as_convolution)

    def gate(self, x):
        # not in autocast: the redrawn image is nearly constant at first, and the norm would magnify half's rounding
        with outside_autocast(x):
            return self.redraw(x.to(weight_of(self.after).dtype)).to(x.dtype)

    def redraw(self, x):
        features = self.before(x)
        with torch.set_grad_enabled(self.through and torch.is_grad_enabled()):
            z, mu = self.fit(features.flatten(2))
            share, bases = z.to(mu.dtype).transpose(1, 2), mu  # (B, K, N), (B, C, K)
            if features.is_contiguous():
                redrawn = bases @ share
            else:  # channels last, as the features
                redrawn = (share.transpose(1, 2) @ bases.transpose(1, 2)).transpose(1, 2)
            redrawn = redrawn.reshape(features.shape)
        self.bases.note(mu.to(at_least_float32(mu)).mean(dim=0))
        redrawn = redrawn.to(x.dtype).relu()
        return x + self.norm(self.after(redrawn))

    def fit(self, x):
        """Responsibilities (B, N, K) and bases (B, C, K) of the features (B, C, N) after all iterations."""
        wide = at_least_float32(x)
        mu = self.bases.value.to(x.dtype).expand(x.shape[0], -1, -1)
        for _ in range(self.iterations):
            z = (x.transpose(1, 2) @ (mu / self.temperature)).softmax(dim=-1, dtype=wide)
            mu = x.to(wide) @ z / (1e-6 + z.sum(dim=1, keepdim=True))
            mu = (mu / (1e-6 + mu.norm(dim=1, keepdim=True))).to(x.dtype)
        return z, mu

    def attention_map(self, x):
        """How surely each pixel belongs to one basis: its largest responsibility."""
        z, _ = self.fit(self.before(self.checked(x)).flatten(2))
        return z.amax(dim=-1).unflatten(1, x.shape[2:])

    def reference(self, x):
        after = torch.stack([self.reference_image(image) for image in x])
        if self.norm.training:
            mean, var = after.mean(dim=(0, 2, 3)), after.var(dim=(0, 2, 3), unbiased=False)
        else:
            mean, var = self.norm.running_mean, self.norm.running_var
        slope = self.norm.weight / (var + self.norm.eps).sqrt()
        return x + (after - mean[:, None, None]) * slope[:, None, None] + self.norm.bias[:, None, None]

    def reference_image(self, image):
        """One image (C, H, W) in loops over pixels and bases, up to the BatchNorm."""
        pixels = [self.before.weight[:, :, 0, 0] @ p + self.before.bias for p in image.flatten(1).unbind(1)]
        bases = list(self.bases.value.unbind(1))
        for _ in range(self.iterations):
            scores = [torch.stack([(p * b).sum() / self.temperature for b in bases]) for p in pixels]
            share = [s.exp() / s.exp().sum() for s in scores]
            total = [sum(s[k] for s in share) + 1e-6 for k in range(len(bases))]
            bases = [sum(s[k] / total[k] * p for s, p in zip(share, pixels)) for k in range(len(bases))]
            bases = [b / ((b * b).sum().sqrt() + 1e-6) for b in bases]
        redrawn = [sum(s[k] * b for k, b in enumerate(bases)).clamp(min=0) for s in share]
        return torch.stack([self.after.weight[:, :, 0, 0] @ r for r in redrawn], dim=1).reshape(image.shape)


def as_convolution(block: Block, state: dict, prefix: str, *_) -> None:
    """Makes a convolution of what was a linear layer, in a state from then."""
    weight = state.get(f"{prefix}before.weight")
    if weight is not None and weight.ndim == 2:
        state[f"{prefix}before.weight"] = weight[:, :, None, None]


class Bases(StepAverage):
    """The stored bases (C, K), of unit norm."""

    def __init__(self, dim: int, bases: int, momentum: float, beside: nn.Module, device=None, dtype=None):
        super().__init__(beside)
        self.momentum = momentum
        self.register_buffer("value", torch.empty(dim, bases, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bases anew: normal, scaled to unit norm."""
        nn.init.normal_(self.value)
        self.value /= 1e-6 + self.value.norm(dim=0)

    def fold(self, seen):
        mean = self.momentum * self.value + (1 - self.momentum) * seen.to(self.value.dtype)
        self.value.copy_(mean / (1e-6 + mean.norm(dim=0)))
