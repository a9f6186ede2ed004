"""Where numbers must be wider than their tensors."""

import contextlib

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> torch.dtype:
    """The type of ``x``, or float32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def is_slow(x: Tensor) -> bool:
    """Whether the type is one that torch is slower in than in float32, and that scores may leave: float16 on a CPU."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def outside_autocast(x: Tensor):
    """A context in which torch multiplies in the types it is given, on the device of ``x``."""
    # the meta device has no autocast
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
