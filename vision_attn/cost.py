"""What a module costs: counted by torch, never written by hand."""

from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops(module: nn.Module, *args) -> int:
    """Floating-point operations of ``module(*args)`` forward, 2 per multiply-add, as torch's flop counter sees them."""
    with FlopCounterMode(display=False) as counter:
        module(*args)
    return counter.get_total_flops()


def parameters(module: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in module.parameters())
