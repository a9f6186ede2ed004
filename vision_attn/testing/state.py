"""What a block keeps: parameters, statistics, copies of itself."""

import copy
import io
import pickle

import torch

from ..layout import OnMap
from .case import GRID, holds_for
from .oracle import assert_same_bits


@holds_for("any")
def every_parameter_learns(case):
    """Every parameter has a gradient, but those said to be unfelt, whose gradient is 0."""
    layer = case.layer().train()
    with case.trying(grid=GRID):
        out = layer(case.map(GRID))
        out.backward(torch.randn_like(out))
        for name, p in layer.named_parameters():
            assert p.grad is not None, name
            felt = name.removeprefix("block.") not in case.unfelt
            assert (p.grad.abs().max() > 1e-9) == felt, f"{name} has {'no' if felt else 'a'} gradient"


@holds_for("any")
def state_goes_round(case):
    """A state_dict saved and loaded into a new block makes it the same."""
    block, x, file = case.block(), case.input(GRID), io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = case.block()
    with case.trying(grid=GRID):
        if block.state_dict():
            assert not torch.equal(case.run(other, x, GRID), case.run(block, x, GRID))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_same_bits(case.run(other, x, GRID), case.run(block, x, GRID))


@holds_for("any")
def copies_and_pickles(case):
    """Copies and pickles, taken in the middle of training, give the same bits and share nothing."""
    layer, x = case.layer(), case.map(GRID)
    layer(x).sum().backward()
    for how, other in (("deepcopy", copy.deepcopy(layer)), ("pickle", pickle.loads(pickle.dumps(layer)))):
        with case.trying(by=how):
            assert_same_bits(other(x), layer(x))
            assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}


@holds_for("any")
def device_and_dtype_reach_every_tensor(case):
    """``device`` and ``dtype``, given or moved to, reach every tensor; on the meta device shapes come out right."""
    for block in (case.new(device="meta", dtype=torch.bfloat16), case.new().to("meta").to(torch.bfloat16)):
        with case.trying(device="meta"):
            tensors = list(block.parameters()) + [b for b in block.buffers() if b.is_floating_point()]
            assert {(t.device.type, t.dtype) for t in tensors} <= {("meta", torch.bfloat16)}
            x = case.input(GRID).to("meta", torch.bfloat16)
            out = case.run(block, x, GRID)
            assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")
            if case.is_mixer:
                assert block.attention(x, GRID).device.type == "meta"


@holds_for("any")
def a_block_made_without_memory_can_be_reset(case):
    """Made on the meta device, as sharded training does, each module with tensors of its own resets itself."""
    layer = OnMap(case.new(device="meta")).to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(77)
    with case.trying(grid=GRID):
        for module in layer.modules():
            if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                module.reset_parameters()
        assert not any((t == 77).any() for t in layer.state_dict().values())
        x = case.map(GRID).float()
        assert_same_bits(layer(x), x)
