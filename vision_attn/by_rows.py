"""Attention whose weights need all scores of a query, of all heads, at once: some rows at a time.

The weights of a chunk of rows are computed anew in the backward, so that only queries, keys and values are kept:
memory is (rows of a chunk) × N × heads, not N². Scores and weights are in at least float32.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cache import FullPast
from .precision import at_least_float32, outside_autocast

ROWS = 128  # of a chunk


def attend(
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads tokens dk"],
    v: Float[Tensor, "B heads tokens dv"],
    weights_of: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float,
) -> Float[Tensor, "B heads tokens dv"]:
    """``weights_of(scores, rows)`` @ v, where scores (B, heads, rows, tokens) are scale · q kᵀ of the tokens ``rows``.

    ``weights_of`` must hold the tensors that it uses, not look them up in a module, whose parameters may have been
    swapped back by the time of the backward. A traced graph, whose sizes are free, has one chunk with everything.
    """
    traced = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # which checkpointing does not know
    again = torch.is_grad_enabled() and not (traced or transformed)
    rows = torch.arange(q.shape[2], device=q.device)
    with outside_autocast(q):
        if traced:
            return _rows(q, k, v, rows, weights_of, scale)
        outs = [
            checkpoint(_rows, some, k, v, at, weights_of, scale, use_reentrant=False)
            if again
            else _rows(some, k, v, at, weights_of, scale)
            for some, at in zip(q.split(ROWS, dim=2), rows.split(ROWS))
        ]
        return torch.cat(outs, dim=2)


def _rows(q, k, v, rows, weights_of, scale):
    """The output of some rows."""
    wide = at_least_float32(v)
    weights = weights_of(scale * (q.to(wide) @ k.to(wide).mT), rows)
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
