"""Whether a device gives right answers: every block, forward and backward, beside the CPU in float64."""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .engines.flash import Cpu, Cuda, agrees
from .grid import Grid
from .pattern import BlindSpot
from .zoo import create_block, describe, list_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIM, HEADS, BATCH = 64, 4, 2
PLACES = ((Grid(17, 26), 1), (Grid(33, 13), 5), (Grid(1, 9), 0))  # with so many prefix tokens
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of a block's operations, all together
SWAY = 4  # times what rounding input and weights once more does to the answer
DRAWS = 3  # of such roundings: the largest counts, since what is chosen or cut off at 0 may turn over in one of them


class Answer(NamedTuple):
    """The largest error of a block on a device, as a share of what it is allowed; right is at most 1."""

    block: str
    causal: bool
    dtype: torch.dtype
    forward: float
    backward: float  # of the gradients of input and weights
    said: str  # by what went wrong on the way, or nothing

    @property
    def right(self) -> bool:
        return not self.said and self.forward <= 1 and self.backward <= 1


def trusted(device: torch.device) -> dict[torch.dtype, str]:
    """Of each type, why the device's kernel for several key sets is not used; nothing where it is."""
    kernel, found = Cuda if device.type == "cuda" else Cpu, {}
    for dtype in DTYPES:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found[dtype] = "" if agrees(kernel, device, dtype) else "; ".join(str(w.message) for w in told) or "no"
    return found


def answers(device: torch.device, blocks: str = "*") -> Iterator[Answer]:
    """Each block with its default options, causal too where it can be, in each type; small sizes, two images.

    Right is what is no further from float64 than the operations of the type round, and than the answer sways when
    input and weights are rounded once more. TF32 is no rounding of float32: switch it off.

    Raises:
        ValueError: no block matches ``blocks``.
    """
    entries = [describe(name) for name in list_blocks(blocks)]
    if not entries:
        raise ValueError(f"blocks={blocks!r}: no block matches")
    return (
        answer(entry.name, entry.kind == "mixer", causal, dtype, device)
        for entry in entries
        for causal in ((False, True) if entry.causal else (False,))
        for dtype in DTYPES
    )


def answer(name: str, mixer: bool, causal: bool, dtype: torch.dtype, device: torch.device) -> Answer:
    """One of `answers`: the worst of all sizes."""
    worst = [0.0, 0.0]
    try:
        for grid, prefix in PLACES:
            for i, share in enumerate(shares_of(made(name, mixer, causal), mixer, grid, prefix, dtype, device)):
                worst[i > 0] = max(worst[i > 0], share if math.isfinite(share) else math.inf)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        return Answer(name, causal, dtype, *worst, " ".join(f"{type(error).__name__}: {error}".split()))
    return Answer(name, causal, dtype, *worst, "")


def shares_of(block, mixer: bool, grid: Grid, prefix: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Errors of the output and of each gradient, as shares of what they are allowed."""
    shape = (BATCH, prefix + grid.size, DIM) if mixer else (BATCH, DIM, *grid)
    x, slope = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    block = block.to(dtype)
    here = both_ways(copy.deepcopy(block).to(device), x.to(device), slope.to(device), grid, mixer)
    exact, x, slope, rng = block.double(), x.double(), slope.double(), torch.Generator().manual_seed(2)
    wanted = both_ways(exact, x, slope, grid, mixer)
    least = 0.01 * max(t.norm().item() for t in wanted[1:])  # for gradients that vanish
    sizes = [max(t.norm().item(), least if i else 0.0) for i, t in enumerate(wanted)]

    def away(got):
        return [(one.double().cpu() - other).norm().item() / size for one, other, size in zip(got, wanted, sizes)]

    errors, moves, shares = away(here), [0.0] * len(here), []
    for _ in range(DRAWS):
        moved = copy.deepcopy(exact)
        with torch.no_grad():
            for p in moved.parameters():
                p.copy_(rounded(p, dtype, rng))
        moves = list(map(max, moves, away(both_ways(moved, rounded(x, dtype, rng), slope, grid, mixer))))
        shares = [
            error / (ROUNDING[dtype] * (3 if i else 1) + SWAY * move)
            for i, (error, move) in enumerate(zip(errors, moves))
        ]
        if max(shares) <= 1:
            break
    return shares


def rounded(t: Tensor, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """The numbers as rounding to a type may leave them."""
    return t * (1 + torch.finfo(dtype).eps * torch.randn(t.shape, generator=rng, dtype=t.dtype))


def made(name: str, mixer: bool, causal: bool) -> nn.Module:
    """The same block at every call."""
    options = dict(num_heads=HEADS) | ({"causal": True} if causal else {}) if mixer else {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", BlindSpot)  # no matter of right and wrong
        torch.manual_seed(0)
        return create_block(name, DIM, **options).eval()


def both_ways(block: nn.Module, x: Tensor, slope: Tensor, grid: Grid, mixer: bool) -> list[Tensor]:
    """Output, and gradients of input and weights."""
    x = x.detach().requires_grad_()
    out = block(x, grid) if mixer else block(x)
    if out.dtype != x.dtype:
        raise TypeError(f"gives {out.dtype} for {x.dtype}")
    felt = [x, *(p for p in block.parameters() if p.requires_grad)]
    slopes = torch.autograd.grad(out, felt, slope, allow_unused=True, materialize_grads=True)
    return [out.detach(), *slopes]
