"""Reversible stacks: the input of each layer is computed from its output, so no activation is kept.

Gomez et al. 2017, RevNet, https://arxiv.org/abs/1707.04585; Kitaev et al. 2020, Reformer,
https://arxiv.org/abs/2001.04451
    forward   y₁ = x₁ + F(x₂)    y₂ = x₂ + G(y₁)
    backward  x₂ = y₂ - G(y₁)    x₁ = y₁ - F(x₂)
F attends and G is the MLP of a layer; both streams begin as the tokens, and their mean is the stack's output. It is
another function than x + F(x), so weights of one are no use to the other. In the backward pass each layer runs once
more, as under gradient checkpointing, and memory is that of one layer, whatever the depth: with large batches, whose
tokens are larger than the gradients of a layer's weights, less than checkpointing takes.
Deviations: gradients of weights are returned to autograd (a well-known reimplementation writes them to ``.grad``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from vision_attn.precision import at_least_float32
from vision_attn.traced import is_traced, is_transformed


@dataclass(frozen=True)
class Half:
    """F or G of a layer.

    Args:
        run: ``run(x, *args)`` of tokens (B, N, dim) gives what is added to the other stream, of the same shape.
        modules: all that have parameters which it uses.
        chunks: parts of the tokens that it runs on one after the other; it must not mix tokens if there are several.
    """

    run: Callable[..., Tensor]
    modules: tuple[nn.Module, ...]
    chunks: int = 1

    def parameters(self) -> list[nn.Parameter]:
        """All that it uses."""
        return [p for module in self.modules for p in module.parameters()]


def two_streams(layers: Sequence[tuple[Half, Half]], x: Tensor, *args) -> Tensor:
    """Tokens (B, N, dim) through layers of F and G: the mean of the two streams, which are in at least float32.

    Where a graph is recorded, where no gradient is asked for and under torch.func it is this in plain steps.
    """
    wide = x.to(at_least_float32(x))
    if torch.is_grad_enabled() and not (is_traced() or is_transformed() or x.is_meta):
        weights = [p for layer in layers for half in layer for p in half.parameters()]
        first, second = Reversible.apply(layers, x.dtype, args, wide, wide, *weights)
    else:
        first, second = _forward(layers, x.dtype, args, wide, wide)
    return ((first + second) / 2).to(x.dtype)


def in_chunks(run: Callable[[Tensor], Tensor], x: Tensor, chunks: int) -> Tensor:
    """``run(x)`` of tokens (B, N, dim) that it does not mix, some at a time; where there are several chunks, what each
    needs in the backward pass is computed anew then."""
    if chunks == 1 or is_traced():
        return run(x)
    if torch.is_grad_enabled() and not is_transformed():
        return torch.cat([checkpoint(run, some, use_reentrant=False) for some in x.chunk(chunks, dim=1)], dim=1)
    return torch.cat([run(some) for some in x.chunk(chunks, dim=1)], dim=1)


def refuse_statistics(name: str, module: nn.Module) -> None:
    """Raises ValueError for layers that would count each image twice."""
    for path, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            raise ValueError(f"{name}=True: {path} is a {type(part).__name__}, which would count every image twice")


def _forward(layers, dtype, args, first, second, note=lambda: None):
    """Both streams behind the layers; ``note()`` is called before each part is run."""
    for attend, transform in layers:
        first = first + _run(attend, second, dtype, args, note)
        second = second + _run(transform, first, dtype, args, note)
    return first, second


def _run(half: Half, x: Tensor, dtype: torch.dtype, args: tuple, note: Callable) -> Tensor:
    x, outs = x.to(dtype), []
    for some in [x] if half.chunks == 1 or is_traced() else x.chunk(half.chunks, dim=1):
        note()
        outs.append(half.run(some, *args))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


class Reversible(torch.autograd.Function):
    """The streams behind layers. Kept are the two outputs and the states of random numbers."""

    @staticmethod
    def forward(ctx, layers, dtype, args, first, second, *weights):
        states, device = [], first.device.type
        ctx.layers, ctx.dtype, ctx.args, ctx.states, ctx.weights = layers, dtype, args, states, weights
        ctx.autocast = dict(device_type=device, enabled=torch.is_autocast_enabled(device))
        ctx.autocast |= dict(dtype=torch.get_autocast_dtype(device), cache_enabled=torch.is_autocast_cache_enabled())
        first, second = _forward(layers, dtype, args, first, second, lambda: states.append(Randomness(first)))
        ctx.save_for_backward(first, second)
        return first, second

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope_first, slope_second):
        (first, second), slopes = ctx.saved_tensors, {}
        states, now = iter(reversed(ctx.states)), Randomness(first)
        with torch.autocast(**ctx.autocast):
            for attend, transform in reversed(ctx.layers):
                out, slope = Reversible.back(ctx, transform, first, slope_second, states, slopes)
                second, slope_first = second - out, slope_first + slope
                out, slope = Reversible.back(ctx, attend, second, slope_first, states, slopes)
                first, slope_second = first - out, slope_second + slope
        now.restore()
        return None, None, None, slope_first, slope_second, *(slopes.pop(id(p), None) for p in ctx.weights)

    @staticmethod
    def back(ctx, half, x, slope, states, slopes):
        """What a half gave for ``x``, and the gradient of ``x``; those of weights are added to ``slopes``."""
        felt, parts = [p for p in half.parameters() if p.requires_grad], []
        pieces = [t.chunk(half.chunks, dim=1) for t in (x.to(ctx.dtype), slope.to(ctx.dtype))]
        for some, slope_here in zip(*map(reversed, pieces)):
            next(states).restore()
            with torch.enable_grad():
                some = some.detach().requires_grad_()
                out = half.run(some, *ctx.args)
            found, *of_weights = torch.autograd.grad(out, [some, *felt], slope_here.to(out.dtype), allow_unused=True)
            for p, of_weight in zip(felt, of_weights):
                if of_weight is not None:
                    slopes[id(p)] = slopes[id(p)] + of_weight if id(p) in slopes else of_weight
            parts.append((out.detach(), torch.zeros_like(some) if found is None else found))
        outs, found = zip(*reversed(parts))
        return torch.cat(outs, dim=1), torch.cat(found, dim=1)


class Randomness:
    """The states of the random numbers of the CPU and of the devices of a tensor."""

    def __init__(self, like: Tensor):
        self.of_cpu, self.of_devices = torch.get_rng_state(), get_device_states(like)

    def restore(self) -> None:
        torch.set_rng_state(self.of_cpu)
        set_device_states(*self.of_devices)
