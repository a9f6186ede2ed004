"""Rows of tensors that a table of integers chooses, another table for each image and head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..traced import is_traced, is_transformed


def rows(x: Shaped[Tensor, "*b N d"], index: Int[Tensor, "..."]) -> Shaped[Tensor, "... d"]:
    """x[…, index, :] of each image and head: one selection from all of them, the fastest way there is.

    ``index`` is (*b, some), or has more axes than one behind b.
    """
    d = x.shape[-1]
    return x.reshape(-1, d).index_select(0, flat(index.flatten(x.ndim - 2), x.shape[-2])).reshape(*index.shape, d)


def members(
    y: Shaped[Tensor, "b groups size d"], group: Int[Tensor, "b N"], place: Int[Tensor, "b N"]
) -> Shaped[Tensor, "b N d"]:
    """y[…, group, place, :]."""
    # what torch's kernel on a CPU returns has groups behind places: so it is not copied
    if not is_traced() and y.transpose(1, 2).is_contiguous():
        y, group, place = y.transpose(1, 2), place, group
    return rows(y.flatten(1, 2), group * y.shape[2] + place)


def sums_of_rows(
    x: Float[Tensor, "M d"], index: Int[Tensor, "N some"], weights: Float[Tensor, "N some"]
) -> Float[Tensor, "N d"]:
    """Σ_j weights[n, j] x[index[n, j]] for each n; but in graphs what is chosen is never side by side in memory."""
    if is_traced() or is_transformed():  # which know no bags, or make a loop of them
        return (weights[:, None] @ x[index])[:, 0]
    return Sums.apply(x, index, weights)


def dots_of_rows(
    q: Float[Tensor, "N d"], x: Float[Tensor, "M d"], index: Int[Tensor, "N some"]
) -> Float[Tensor, "N some"]:
    """q[n] · x[index[n, j]] for each n and j, as `sums_of_rows`."""
    if is_traced() or is_transformed():
        return (x[index] @ q[..., None])[..., 0]
    return Dots.apply(q, x, index)


class Sums(torch.autograd.Function):
    """`sums_of_rows`; in its gradients nothing is side by side either."""

    @staticmethod
    def forward(ctx, x, index, weights):
        ctx.save_for_backward(x, index, weights)
        return F.embedding_bag(index, x, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        x, index, weights = ctx.saved_tensors
        return _given_back(slope, index, weights, len(x)), None, _dots(slope, x, index)


class Dots(torch.autograd.Function):
    """`dots_of_rows`; in its gradients nothing is side by side either."""

    @staticmethod
    def forward(ctx, q, x, index):
        ctx.save_for_backward(q, x, index)
        return _dots(q, x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        q, x, index = ctx.saved_tensors
        of_q = F.embedding_bag(index, x, per_sample_weights=slope, mode="sum")
        return of_q, _given_back(q, index, slope, len(x)), None


def _dots(q, x, index):
    """As the gradient of weights that rows are summed by: for that torch has a kernel, five times as fast as copies."""
    with torch.inference_mode(False), torch.enable_grad():
        q, x, index = (t.clone() if t.is_inference() else t.detach() for t in (q, x, index))
        weights = q.new_ones(index.shape).requires_grad_()
        sums = F.embedding_bag(index, x, per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(sums, weights, q)[0]


def _given_back(q, index, weights, size: int):
    """Σ weights[n, j] q[n] over all (n, j) that chose each of ``size`` rows, in their order."""
    chosen, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(size, device=index.device))
    some, chooser = weights.flatten()[order], torch.div(order, index.shape[1], rounding_mode="floor")
    return F.embedding_bag(chooser, q.contiguous(), ends, per_sample_weights=some, mode="sum")


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
