"""Rows of tensors that a table of integers chooses, another table for each image and head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..traced import is_traced, is_transformed


def rows(x: Shaped[Tensor, "*b N d"], index: Int[Tensor, "..."]) -> Shaped[Tensor, "... d"]:
    """x[…, index, :] of each image and head: one selection from all of them, the fastest way there is.

    ``index`` is (*b, some), or has more axes than one behind b.
    """
    d = x.shape[-1]
    return x.reshape(-1, d).index_select(0, flat(index.flatten(x.ndim - 2), x.shape[-2])).reshape(*index.shape, d)


def sums_of_rows(
    x: Float[Tensor, "M d"], index: Int[Tensor, "N some"], weights: Float[Tensor, "N some"]
) -> Float[Tensor, "N d"]:
    """Σ_j weights[n, j] x[index[n, j]] for each n; but in graphs what is chosen is never side by side in memory."""
    if is_traced() or is_transformed():  # which know no bags, or make a loop of them
        return (weights[:, None] @ x[index])[:, 0]
    return F.embedding_bag(index, x, per_sample_weights=weights, mode="sum")


def with_rows(
    x: Shaped[Tensor, "*b N d"], index: Int[Tensor, "*b some"], new: Shaped[Tensor, "*b some d"]
) -> Shaped[Tensor, "*b N d"]:
    """``x`` with ``new`` in the place of the rows that ``rows(x, index)`` takes, which are different ones."""
    d = x.shape[-1]
    return x.reshape(-1, d).index_copy(0, flat(index, x.shape[-2]), new.reshape(-1, d)).reshape(x.shape)


def flat(index: Int[Tensor, "*b some"], size: int) -> Int[Tensor, "b_some"]:
    """Numbers of the rows where those of all images and heads, ``size`` each, are counted through."""
    table = index.flatten(0, -2)
    return (table + torch.arange(table.shape[0], device=index.device)[:, None] * size).flatten()
