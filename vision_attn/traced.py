"""Sizes while a graph is recorded: symbolic to torch.compile and torch.export, 0-d tensors to torch.jit.trace.

What Python computes with them must stay in the graph, or it would hold for the traced size alone. Nor do tensors
outlast what records or transforms them.
"""

import warnings

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def is_traced() -> bool:
    """Whether a graph is recorded: by torch.compile, torch.export, torch.jit.trace or either exporter to ONNX."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether tensors are wrapped by torch.func (vmap, grad, functionalize), and have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_passing(device: torch.device) -> bool:
    """Whether what is made on the device now has no numbers, or none that may be kept.

    So it is while a graph is recorded, by torch or of CUDA's launches, under torch.func and among fake tensors.
    """
    if is_traced() or is_transformed() or detect_fake_mode() is not None:
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def least(most: int, size):
    """The smaller of the two."""
    return size.clamp(max=most) if isinstance(size, Tensor) else torch.sym_min(most, size)


def largest(least: int, size):
    """The larger of the two."""
    return size.clamp(min=least) if isinstance(size, Tensor) else torch.sym_max(least, size)


def fixed(size) -> int:
    """A size that is the same for every input of a graph, as a number."""
    if not isinstance(size, Tensor):
        return size
    with warnings.catch_warnings(action="ignore", category=torch.jit.TracerWarning):  # it is meant
        return int(size)
