"""Sizes while a graph is recorded: symbolic to torch.compile and torch.export, 0-d tensors to torch.jit.trace.

What Python computes with them must stay in the graph, or it would hold for the traced size alone.
"""

import warnings

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether a graph is recorded: by torch.compile, torch.export, torch.jit.trace or either exporter to ONNX."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


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
