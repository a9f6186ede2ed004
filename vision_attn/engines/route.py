"""By which route the attention of a pattern is computed: never what it is.

- ``dense``: one call of torch's attention with the pattern's N×N mask, which is made once and kept. For small grids.
- ``flat``: one softmax over the concatenated scores of all key sets. For graphs, and for short groups on a CPU.
- ``union``: a flash call for each key set, merged by log-sum-exp. For large grids.
- ``flex``: a compiled call of FlexAttention, or two merged, on CUDA, where it is asked for (`flex`).
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..grid import Grid
from ..kept import fits
from ..key_set import KeySet
from ..pattern import Pattern
from ..traced import is_traced

ROUTES = ("auto", "dense", "flat", "union", "flex")
LARGEST_DENSE = 900  # positions: a larger mask leaves the cache of a CPU
# On an H100, forward and backward in bfloat16 at 14×14 to 64×64; of smaller devices pairs take longer, launches do not
LARGEST_ON_CUDA = 4096  # positions
PAIRS_OF_LAUNCHES = 2.5e8
SHORT = 24  # rows and columns up to which scores are concatenated
# Fitted on a CPU to forward and backward at 14×14 and 20×20, in the time of a pair of a masked N×N call:
GATHERED = 1.8  # a pair of a key set whose groups share keys
QUERY = 120  # a query of a key set: its fold, its share of a call, its merge
ALONE = 30  # a query that meets one key, which takes no call

_asked: ContextVar[str] = ContextVar("asked", default="auto")
_taken: ContextVar[set[str] | None] = ContextVar("taken", default=None)


@contextmanager
def route(name: str = "auto") -> Iterator[set[str]]:
    """A context in which patterns are computed by a route: the fastest (``auto``), or that of a name (`ROUTES`).

    It changes speed and memory, never the function. It holds in the thread that enters it, and gives the names of the
    routes that were taken in it. Where a route does not exist, the next simpler one is taken: ``flat`` for ``union``
    where no kernel tells a log-sum-exp (in graphs, with dropout, in float64 on CUDA), ``union`` for ``flex`` on a CPU.

    Raises:
        ValueError: there is no such route.

    >>> from vision_attn import Grid, create_block, route
    >>> x, block = torch.randn(1, 35, 64), create_block("criss_cross", 64)
    >>> with route("union") as taken:
    ...     y = block(x, Grid(5, 7))
    >>> taken
    {'union'}
    """
    if name not in ROUTES:
        raise ValueError(f"route={name!r}: must be one of {', '.join(ROUTES)}")
    taken: set[str] = set()
    before = _asked.set(name), _taken.set(taken)
    try:
        yield taken
    finally:
        _asked.reset(before[0])
        _taken.reset(before[1])


def taken_routes():
    """A context in which nothing changes, and which gives the names of the routes that are taken in it."""
    return route(asked())


@torch.compiler.assume_constant_result  # dynamo of torch 2.11 does not read a ContextVar
def asked() -> str:
    """The route that is asked for here."""
    return _asked.get()


def takes_dense(faster: bool) -> bool:
    """Whether the whole mask is asked for, or ``faster`` where the route is free; graphs keep key sets."""
    return asked() == "dense" or (asked() == "auto" and not is_traced() and faster)


def note(name: str) -> None:
    """Notes that a route is taken."""
    if not is_traced() and (taken := _taken.get()) is not None:
        taken.add(name)


def is_small(grid: Grid, device: torch.device, side: int) -> bool:
    """Whether a grid is no larger than ``side`` × ``side``, on a CPU, or 40×40 on CUDA: launches take time there."""
    return grid.size <= (40 if device.type == "cuda" else side) ** 2


def dense_is_faster(pattern: Pattern, q: Float[Tensor, "B heads tokens d"], grid: Grid) -> bool:
    """Whether one masked N×N call takes less time than calls of the pattern's key sets; the size is not traced.

    Only where its mask may be kept. On CUDA a key set takes launches, whose time is that of so many pairs of a masked
    call; half as many where it is but a fold.
    """
    if is_traced() or grid.size > LARGEST_ON_CUDA:
        return False
    (images, heads, *_), parts = q.shape, pattern.by_head()
    if not fits(grid.size**2 * q.element_size() * (1 if len(parts) == 1 else heads)):
        return False
    if q.device.type == "cuda":
        sets = [keys for part in parts for keys in part.key_sets()]
        launches = 0.5 if len(sets) == len(parts) and not any(keys.overlap for keys in sets) else len(sets)
        return images * heads * grid.size**2 <= PAIRS_OF_LAUNCHES * launches
    if grid.size > LARGEST_DENSE:
        return False
    try:
        cost = _cost(pattern, heads, grid, q.device)
    except TypeError:  # a pattern of someone's own that has no hash
        cost = _cost.__wrapped__(pattern, heads, grid, q.device)
    return grid.size**2 <= cost


def flat_is_faster(key_sets: Sequence[KeySet], grid: Grid, device: torch.device) -> bool:
    """Whether one softmax over several key sets takes less time than to merge them; graphs have no choice."""
    return (
        not is_traced() and device.type == "cpu" and max(grid) <= SHORT and not any(keys.overlap for keys in key_sets)
    )


@functools.lru_cache(maxsize=1024)
def _cost(pattern: Pattern, heads: int, grid: Grid, device: torch.device) -> float:
    """What the key sets take for a head and image, in the time of a pair of a masked N×N call."""
    x, cost = torch.empty(1, *grid, 1, device=device), 0.0
    for part, share in zip(pattern.by_head(), pattern.shares(heads)):
        for keys in part.key_sets():
            (_, groups, queries, _), known = keys.queries(x).shape, keys.keys(x).shape[2]
            of_query = ALONE if queries == known == 1 else QUERY
            pairs = (GATHERED if keys.overlap else 1) * groups * queries * known
            cost += share / heads * (pairs + of_query * grid.size)
    return cost
