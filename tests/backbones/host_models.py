"""Small models of one's own to insert into, for tests."""

import torch
from conftest import GATES, MIXERS
from torch import nn

from vision_attn.layout import Residual

BLOCKS = [GATES[0], MIXERS[0]]


def layers(model) -> dict[str, Residual]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Residual)}


class Gives(nn.Module):
    """What ``function`` makes of a map."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Host(nn.Module):
    """A convolution, a place behind it, and an answer; ``size`` is the only one it takes, None: any."""

    def __init__(self, function=lambda x: x, channels=12, size=None, stride=4):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, channels, stride, stride)
        self.place = Gives(function)

    def forward(self, x):
        if self.size and tuple(x.shape[-2:]) != self.size:
            raise RuntimeError(f"takes {self.size} only")
        out = self.place(self.conv(x))
        return (out if isinstance(out, torch.Tensor) else out[0]).flatten(1).mean(1)


def nhwc(x):
    return x.permute(0, 2, 3, 1)
