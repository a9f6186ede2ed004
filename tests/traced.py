"""What is traced at one size, and then run at others."""

import torch
from conftest import chosen, first_options
from torch import nn

from vision_attn import Grid
from vision_attn.mixer import Mixer

TRACED, OTHERS = (2, 8, 12), [(3, 7, 11), (1, 13, 9), (2, 1, 17), (1, 29, 31)]  # (batch, height, width)


EVERY, MIXERS = (first_options(chosen(f"{kind}_case")) for kind in ("any", "mixer"))


class WithPrefix(nn.Module):
    """A mixer on the positions of a map and on tokens before them, whose grid is that of the map, as in a ViT."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, prefix, x):
        return self.mixer(torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1), Grid(*x.shape[2:]))


def inputs(case, size, prefix=None, dtype=torch.float32):
    """Maps (B, C, H, W), preceded by prefix tokens (B, P, C) if there are to be any."""
    batch, *grid = size
    x = torch.randn(batch, case.sizes["dim"], *grid, dtype=dtype)
    return (x,) if prefix is None else (torch.randn(batch, prefix, x.shape[1], dtype=dtype), x)
