"""Which mixers win over dense attention at a size, on this machine: measured, not looked up."""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .cost import clock, forward_backward, peak_memory, times
from .engines.route import taken_routes
from .grid import Grid
from .pattern import BlindSpot
from .zoo import create_block, describe, list_blocks, name_of


class Measured(NamedTuple):
    """A mixer beside dense attention, both whole blocks with their projections; ratios below 1 win."""

    name: str
    heads: int
    ms: float  # of forward + backward
    times_dense: float  # its time / that of dense
    mebibytes: float  # that forward + backward hold at most, beside weights and input
    memory_times_dense: float  # its memory / that of dense
    route: str  # by which its pattern was computed (`vision_attn.route`), several joined by +; "": it has none


def recommend(
    height: int,
    width: int,
    dim: int,
    device: str | torch.device = "cpu",
    causal: bool = False,
    *,
    num_heads: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    blocks: str | Sequence[str | type] = "*",
    options: dict | None = None,
    seconds: float = 10.0,
) -> list[Measured]:
    """Time and memory of every mixer of the zoo beside dense attention, which runs torch's fused kernel; fastest first.

    Measured is forward + backward of the whole block, projections included, with the options it has by default: three
    rounds in which all blocks take turns, more while there is time; a block's fastest counts, and what needs over
    three times as long as dense has only the first. Machines are noisy: ratios near 1 may change sides from call to
    call. What wins here is faster, not more accurate.

    Only mixers are compared: a gate does not take the place of attention.

    Args:
        height, width: of the grid.
        dim: channels.
        device: where to measure.
        causal: in raster order; what can't be is left out.
        num_heads: of all blocks; None: each block's own choice. A block that can't have them is left out, as is one
            that needs more heads than ``dim`` allows.
        batch: images.
        dtype: of weights and input.
        blocks: wildcard of the blocks to compare, or several, or classes of blocks; dense is always among them.
        options: of each of ``blocks``, beside what is said above; a block that lacks one is left out. Not of dense.
        seconds: that further rounds may take.

    Raises:
        ValueError: an argument is out of range, or none of ``blocks`` can be compared; the message says why.
        RuntimeError: there is too little memory for dense attention.

    Warns:
        UserWarning: a block is left out, because there is too little memory for it, or it lacks one of ``options``.
    """
    for name, value in (("height", height), ("width", width), ("dim", dim), ("batch", batch)):
        check.positive_int(name, value)
    check.boolean("causal", causal)
    check.not_negative("seconds", seconds)
    of_all = dict(num_heads=num_heads, device=device, dtype=dtype) | ({"causal": True} if causal else {})
    asked = [blocks] if isinstance(blocks, str) else blocks
    some = [name for one in asked for name in (list_blocks(one) if isinstance(one, str) else [one])]
    chosen = {name_of(one): one for one in some}
    mixers = {"dense": create_block("dense", dim, **of_all)}  # first, for its refusals are the caller's
    left_out = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlindSpot)  # no matter of speed
        for name, block in chosen.items():
            if describe(block).kind != "mixer":
                left_out[name] = "is a gate"
            elif name != "dense":
                try:
                    mixers[name] = create_block(block, dim, **of_all | (options or {}))
                except (TypeError, ValueError) as refusal:  # of causal=True, of heads that do not fit, of an option
                    left_out[name] = str(refusal)
    if len(mixers) == 1 and "dense" not in chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no block matches"
        raise ValueError(f"blocks={blocks!r}: nothing to compare: {why}")
    if options and left_out:
        warnings.warn(f"left out: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}", stacklevel=2)
    grid = Grid(height, width)
    x = torch.randn(batch, grid.size, dim, device=device, dtype=dtype)
    ms, mebibytes, routes = measured(
        {name: forward_backward(mixer, x, grid) for name, mixer in mixers.items()}, x, seconds
    )
    found = [
        Measured(
            name,
            (mixers[name].steps or (mixers[name],))[0].num_heads,
            of,
            of / ms["dense"],
            mebibytes[name],
            mebibytes[name] / mebibytes["dense"],
            routes[name],
        )
        for name, of in ms.items()
    ]
    return sorted(found, key=lambda one: one.ms)


def in_a_sentence(found: list[Measured]) -> str:
    """What follows from it, for whoever reads one line."""
    faster = [one.name for one in found if one.times_dense < 1 and one.name != "dense"]
    if not faster:
        return "Take dense: nothing here is faster."
    best = next(one for one in found if one.name == faster[0])
    others = f"; {', '.join(faster[1:4])} follow" if faster[1:] else ""
    beaten = f"{len(faster)} of {len(found) - 1} are faster"
    return (
        f"Fastest is {best.name}, in {best.times_dense:.2g} of the time of dense attention and "
        f"{best.memory_times_dense:.2g} of its memory{others}. {beaten}; which learns best only training tells."
    )


def measured(calls: dict[str, Callable], x: Tensor, seconds: float) -> tuple[dict, dict, dict]:
    """Milliseconds, MiB and routes of each call that there is memory for; slow ones are called but twice."""
    ms, mebibytes, routes = {}, {}, {}
    for name, call in calls.items():
        try:
            with taken_routes() as taken:
                mebibytes[name] = peak_memory(call, x.device)  # the first builds what later ones keep
            routes[name] = "+".join(sorted(taken))
            ms[name] = clock(call, x.device)
        except RuntimeError as error:
            if name == "dense" or not re.search("allocate|out of memory", str(error)):
                raise
            warnings.warn(f"{name} is left out: not enough memory", stacklevel=3)
    quick = {name: calls[name] for name in ms if ms[name] <= 3 * ms["dense"]}
    for name, taken in times(quick, x.device, seconds).items():
        ms[name] = min(ms[name], *taken)
    return ms, mebibytes, routes
