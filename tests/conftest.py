"""The registry as test cases: an argument named as in `CHOICES` runs over every block in every row of its options."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from vision_attn import create_block, create_layer, describe, list_blocks

# pytest-xdist runs a process on every core: threads in each would only wait for one another
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)

# Options that make a block more itself, at sizes that fit the suite. A block that is not here: with its defaults.
OPTIONS = {
    "axial": [{}, {"mode": "sum", "length": 3}, {"length": (5, 7)}],
    "cbam": [{}, {"spatial": False}, {"kernel_size": 3, "rd_channels": 2}],
    "dilated": [{"kernel_size": 3, "dilation": (2, 3)}],
    "expectation_maximization": [{"bases": 3}, {"bases": 5, "temperature": 0.5, "iterations": 1}],
    "fixed": [{"c": 3}, {"c": 3, "split_heads": True}, {"c": 2, "part": "summary"}],
    "global_context": [{}, {"fusion": "multiply"}, {"fusion": "both", "rd_channels": 2}, {"pooling": "average"}],
    "factored": [{}, {"part": "previous_row"}],
    "global_tokens": [{"tokens": 3, "kernel_size": 3}],
    "interlaced_sparse": [{}, {"factor": (2, 3)}],
    "per_head": [{"kernel_size": (3, 5), "stride": (2, 3), "tokens": 3}],
    "strided": [{}, {"split_heads": True}],
    "window": [{}, {"kernel_size": (3, 5)}],
}
# Parameters that a softmax can't feel, because it does not see a constant: their gradient is 0.
UNFELT = {"global_context": {"key.bias"}}

BATCH, HEADS, KEY, VALUE = 2, 3, 7, 11  # of mixers: queries, keys and values of (BATCH, HEADS, tokens, KEY or VALUE)
CHANNELS = 19  # of gates
GRIDS = [(13, 17), (1, 23), (29, 1), (1, 1)]  # none is a multiple of a window
PREFIXES = [0, 1, 5]

logging.getLogger("torch.__trace").propagate = False  # thousands of lines under a failure in compiled code

# What is special to a block goes with the block.
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_special_*.py") if path.stem[13:] not in list_blocks()
]


GATES = [name for name in list_blocks() if describe(name).kind == "gate"]
MIXERS = [name for name in list_blocks() if describe(name).kind == "mixer"]
every_block = pytest.mark.parametrize("block", list_blocks())
every_mixer = pytest.mark.parametrize("block", MIXERS)
every_gate = pytest.mark.parametrize("block", GATES)


class Case(NamedTuple):
    """A block of the registry with options."""

    name: str
    options: dict

    @property
    def is_mixer(self) -> bool:
        return describe(self.name).kind == "mixer"

    @property
    def can_be_causal(self) -> bool:
        return describe(self.name).causal

    @property
    def sizes(self) -> dict:
        if self.is_mixer:
            return dict(dim=HEADS * VALUE, num_heads=HEADS, key_dim=HEADS * KEY)
        return dict(dim=CHANNELS)

    def block(self, **more):
        """In float64 and eval mode, with no parameter or statistic at a special initial value."""
        return lived_in(create_block(self.name, **{**self.sizes, **self.options, **more}))

    def layer(self, **more):
        """`block` as a layer on maps, with a gain as after training."""
        return lived_in(create_layer(self.name, **{**self.sizes, **self.options, **more}))

    def input(self, grid, prefix: int = 5):
        """Tokens for a mixer, a map for a gate."""
        shape = (prefix + grid[0] * grid[1], self.sizes["dim"]) if self.is_mixer else (self.sizes["dim"], *grid)
        return torch.randn(BATCH, *shape, dtype=torch.float64)

    def run(self, block, x, grid):
        return block(x, grid) if self.is_mixer else block(x)


def lived_in(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode, as if trained for a while."""
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p += torch.randn_like(p).mul(0.3).add(0.1)
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return module


def alive(model: nn.Module) -> nn.Module:
    """A host with no gain, norm, bias or running statistic at a special initial value, so that every part matters."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += torch.randn_like(p).mul(0.2).add(0.1)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 2)
    return model


def cases() -> list[Case]:
    """Every block with every row of its options, and causal where it can be."""
    found = [Case(name, options) for name in list_blocks() for options in OPTIONS.get(name, [{}])]
    return found + [case._replace(options={**case.options, "causal": True}) for case in found if case.can_be_causal]


CHOICES = {
    "any_case": lambda case: True,
    "mixer_case": lambda case: case.is_mixer,
    "gate_case": lambda case: not case.is_mixer,
    "causal_case": lambda case: case.options.get("causal", False),
    "pattern_case": lambda case: case.is_mixer and any(hasattr(step, "pattern") for step in case.block().steps),
}


def pytest_generate_tests(metafunc):
    for argument in CHOICES.keys() & set(metafunc.fixturenames):
        chosen = [case for case in cases() if CHOICES[argument](case)]
        names = ["-".join([case.name, *(f"{k}={v}" for k, v in case.options.items())]) for case in chosen]
        metafunc.parametrize(argument, chosen, ids=names)
    if "block_name" in metafunc.fixturenames:
        metafunc.parametrize("block_name", list_blocks())


@pytest.fixture(autouse=True)
def same_numbers_every_run():
    torch.manual_seed(0)
