"""What is traced at one size, and then run at others."""

import pytest
import torch
from conftest import OFTEN, block_of, cases, short_name
from torch import nn

from vision_attn import Grid
from vision_attn.mixer import Mixer

TRACED, OTHERS = (2, 8, 12), [(3, 7, 11), (1, 13, 9), (2, 1, 17), (1, 29, 31)]  # (batch, height, width)


class WithPrefix(nn.Module):
    """A mixer on the positions of a map and on tokens before them, whose grid is that of the map, as in a ViT."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, prefix, x):
        return self.mixer(torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1), Grid(*x.shape[2:]))


def every_case():
    """Every block with its first options, and those that `make test-all` tries with it."""
    seen = set()
    for case in cases():
        marks = [pytest.mark.slow] if block_of(case) in seen else []
        seen.add(block_of(case))
        yield pytest.param(case, id=short_name(case), marks=marks)


def often(params):
    """All but a few blocks are left to `make test-all`."""
    for param in params:
        marks = [] if block_of(param.values[0]) in OFTEN else [pytest.mark.slow]
        yield pytest.param(*param.values, id=param.id, marks=[*param.marks, *marks])


def mixers(params):
    return [param for param in params if param.values[0].is_mixer]


def inputs(case, size, prefix=None, dtype=torch.float32):
    """Maps (B, C, H, W), preceded by prefix tokens (B, P, C) if there are to be any."""
    batch, *grid = size
    x = torch.randn(batch, case.sizes["dim"], *grid, dtype=dtype)
    return (x,) if prefix is None else (torch.randn(batch, prefix, x.shape[1], dtype=dtype), x)
