"""What a module costs: operations and memory counted by torch, time measured, nothing written by hand."""

import gc
import itertools
import os
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from . import check

aten = torch.ops.aten
UNCOUNTED = {  # by torch 2.11: attention on a CPU
    operator: flop_registry[alike].__wrapped__
    for operator, alike in (
        (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, aten._scaled_dot_product_flash_attention_backward),
    )
    if operator not in flop_registry
}


class Cost(NamedTuple):
    """What a module takes for one input, batch and all."""

    flops: int  # forward
    parameters: int
    mebibytes: float  # that forward + backward hold at most, beside weights and input
    ms: float  # of forward + backward, the fastest of several


def counting(more: dict | None = None) -> FlopCounterMode:
    """Torch's counter of floating-point operations, a context, with formulas of ``more`` operators."""
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED | (more or {}))


def flops(module: nn.Module, *args) -> int:
    """Floating-point operations of ``module(*args)`` forward, 2 per multiply-add, as torch's flop counter sees them."""
    with counting() as counter:
        module(*args)
    return counter.get_total_flops()


def parameters(module: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in module.parameters())


def clock(call: Callable[[], object], device: str | torch.device) -> float:
    """Milliseconds of one call."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def peak_memory(call: Callable[[], object], device: str | torch.device) -> float:
    """MiB that tensors take at most during one call, beyond what there was before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to stderr
    collects = gc.isenabled()
    gc.disable()  # what is freed of earlier calls would count
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # torch 2.11 tells of itself
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            call()
    finally:
        if collects:
            gc.enable()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0) / 2**20


def forward_backward(module: nn.Module, x: Tensor, *args) -> Callable[[], None]:
    """A call of ``module(x, *args)`` and of its backward to ``x`` and all weights, which leaves no gradient behind."""
    x = x.detach().requires_grad_()
    felt = [x, *(p for p in module.parameters() if p.requires_grad)]

    def call():
        out = module(x, *args)
        torch.autograd.grad(out, felt, torch.ones_like(out), allow_unused=True)

    return call


def times(
    calls: dict[str, Callable],
    device: str | torch.device,
    seconds: float = 0.0,
    least: int = 2,
    clock: Callable[[Callable, str | torch.device], float] = clock,
) -> dict[str, list[float]]:
    """Milliseconds of each call, the calls taking turns, until ``seconds`` are over and each had ``least`` turns.

    ``clock(call, device)`` says how long one takes.

    Raises:
        ValueError: ``seconds`` is no finite number ≥ 0.
    """
    check.not_negative("seconds", seconds)
    taken = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn >= least and time.perf_counter() >= end:
            return taken
        for name, call in calls.items():
            taken[name].append(clock(call, device))


def measure(modules: dict[str, nn.Module], x: Tensor, *args, seconds: float = 0.0, least: int = 2) -> dict[str, Cost]:
    """The cost of each of ``modules`` for the input ``(x, *args)``; their timed calls take turns, as in `times`."""
    calls = {name: forward_backward(module, x, *args) for name, module in modules.items()}
    for call in calls.values():
        call()  # the first builds what later ones keep
    taken = times(calls, x.device, seconds, least)
    return {
        name: Cost(flops(module, x, *args), parameters(module), peak_memory(calls[name], x.device), min(taken[name]))
        for name, module in modules.items()
    }
