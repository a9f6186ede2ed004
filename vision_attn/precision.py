"""Where numbers must be wider than their tensors."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> torch.dtype:
    """The type of ``x``, or float32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def weight_of(module: nn.Module) -> Tensor:
    """A parameter that tells a module's type and device. Of one without any, as a quantised layer: an empty tensor.

    A layer may have been wrapped (LoRA) or exchanged, so it need not have a ``weight`` of its own.
    """
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return torch.empty(0, dtype=torch.float32) if weight is None else weight


def is_slow(x: Tensor) -> bool:
    """Whether the type is one that torch is slower in than in float32, and that scores may leave: float16 on a CPU."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def in_float32_where_slow(mix: Callable) -> Callable:
    """A method ``mix(q, k, v, grid)`` that takes float32 and gives float16 back where float16 is slow (`is_slow`)."""

    @functools.wraps(mix)
    def wide(self, q, k, v, grid):
        if not is_slow(v):
            return mix(self, q, k, v, grid)
        with outside_autocast(v):
            return mix(self, q.float(), k.float(), v.float(), grid).half()

    return wide


def in_range(x: Tensor) -> Tensor:
    """``x`` as it is, or in float32 if it is float16, for sums and products that may leave its range."""
    return x.float() if x.dtype == torch.float16 else x


def scaled(x: Tensor, gate: Tensor) -> Tensor:
    """x · gate, in the type of ``x``, for a gate in at least float32 that is broadcast.

    The gradient of the gate is a sum over all that it is broadcast to. It may leave float16 where what becomes of it,
    behind a sigmoid say, is small.
    """
    return (x * gate).to(x.dtype) if x.dtype == torch.float16 else x * gate.to(x.dtype)


def outside_autocast(x: Tensor):
    """A context in which torch multiplies in the types it is given, on the device of ``x``."""
    # the meta device has no autocast
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
