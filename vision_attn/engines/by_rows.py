"""Attention that needs something of N×N numbers, scores or a mask: some rows of it at a time.

What a chunk of rows needs is computed anew in the backward, so that only queries, keys and values are kept: memory is
(rows of a chunk) × N, not N². A chunk that is all there is keeps what it has.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..precision import at_least_float32, outside_autocast
from ..traced import is_traced, is_transformed
from .cache import FullPast

ROWS = 128  # of a chunk of scores


def in_chunks(
    run: Callable[[Tensor, Tensor], Tensor], q: Float[Tensor, "B heads tokens dk"], size: int
) -> Float[Tensor, "B heads tokens dv"]:
    """``run(queries, rows)`` of all queries, ``size`` at a time; ``rows`` are their numbers among the tokens.

    ``run`` must hold the tensors that it uses, not look them up in a module, whose parameters may have been swapped
    back by the time of the backward. A traced graph, whose sizes are free, has one chunk with everything.
    """
    rows = torch.arange(q.shape[2], device=q.device)
    if is_traced() or q.shape[2] <= size:
        return run(q, rows)
    if torch.is_grad_enabled() and not is_transformed():  # which checkpointing does not know
        run = partial(checkpoint, run, use_reentrant=False)
    return torch.cat([run(some, at) for some, at in zip(q.split(size, dim=2), rows.split(size))], dim=2)


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads tokens dk"],
    v: Float[Tensor, "B heads tokens dv"],
    weights_of: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float,
) -> Float[Tensor, "B heads tokens dv"]:
    """``weights_of(scores, rows)`` @ v, where scores (B, heads, rows, tokens) are scale · q kᵀ of the tokens ``rows``.

    For weights that need all scores of a query, of all heads, at once; in at least float32. ``weights_of`` must hold
    the tensors that it uses, as for `in_chunks`.
    """
    with outside_autocast(q):
        return in_chunks(lambda some, rows: _rows(some, k, v, rows, weights_of, scale), q, ROWS)


def _rows(q, k, v, rows, weights_of, scale):
    """The output of some rows."""
    wide = at_least_float32(v)
    weights = weights_of(scale * (q.to(wide) @ k.to(wide).transpose(-2, -1)), rows)
    return (weights @ v.to(wide)).to(v.dtype)


class RowPast(FullPast):
    """The past of a causal mixer, of which every pixel of an image in the making computes its own row.

    Args:
        weights_of, scale: as in `attend`.
        Others: those of `FullPast`, ``dims`` of keys and values.
    """

    def __init__(self, weights_of, scale: float, *args, **options):
        super().__init__(*args, **options)
        self.weights_of, self.scale = weights_of, scale

    def step(
        self, q: Float[Tensor, "B heads dq"], k: Float[Tensor, "B heads dk"], v: Float[Tensor, "B heads dv"], place: int
    ) -> Float[Tensor, "B heads dv"]:
        """Takes in the pixel at raster index ``place``, and returns what it draws from the past and itself."""
        self.put(place, k, v)
        keys, values = (past[:, :, : place + 1] for past in self.past)
        with outside_autocast(q):
            row = torch.tensor([place], device=q.device)
            return _rows(q[:, :, None], keys, values, row, self.weights_of, self.scale)[:, :, 0]
