"""Attention by association: φ(q)(φ(k)ᵀ v) in place of (φ(q) φ(k)ᵀ) v. Cost N·m·d instead of N²·d.

Sums over positions are taken in at least float32, under autocast too.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..grid import Grid
from ..precision import at_least_float32, outside_autocast
from ..traced import fixed

CHUNK = 64  # positions whose past within the chunk is masked one by one


def attend(
    q: Float[Tensor, "B heads tokens m"], k: Float[Tensor, "B heads tokens m"], v: Float[Tensor, "B heads tokens d"]
) -> Float[Tensor, "B heads tokens d"]:
    """q (kᵀ v) for feature maps q and k."""
    with outside_autocast(v):
        return (q.to(at_least_float32(v)) @ state(k, v)).to(v.dtype)


def average(
    q: Float[Tensor, "B heads tokens m"], k: Float[Tensor, "B heads tokens m"], v: Float[Tensor, "B heads tokens d"]
) -> Float[Tensor, "B heads tokens d"]:
    """q (kᵀ v) divided by q (kᵀ 1), for positive feature maps q and k."""
    wide = at_least_float32(v)
    with outside_autocast(v):
        q, k = q.to(wide), k.to(wide)
        return (q @ state(k, v) / (q @ k.sum(dim=2)[..., None])).to(v.dtype)


def attend_past(
    q: Float[Tensor, "B heads tokens m"],
    k: Float[Tensor, "B heads tokens m"],
    v: Float[Tensor, "B heads tokens d"],
    before: Float[Tensor, "B heads m d"] | float = 0.0,
) -> Float[Tensor, "B heads tokens d"]:
    """Σ_{j ≤ i} (q_i · k_j) v_j + q_i ``before``: chunk by chunk, from the state before each and a mask within."""
    wide, tokens = at_least_float32(v), q.shape[2]
    q, k, v_wide = (
        rearrange(F.pad(t.to(wide), (0, 0, 0, -tokens % CHUNK)), "B n (c t) d -> B n c t d", t=CHUNK) for t in (q, k, v)
    )  # (B, heads, chunks, CHUNK, ·)
    with outside_autocast(v):
        # the state before a chunk: shifted, for a difference of sums would round by what comes later
        earlier = F.pad((k.transpose(-2, -1) @ v_wide).cumsum(dim=2), (0, 0, 0, 0, 1, 0)).narrow(2, 0, q.shape[2])
        before = before if isinstance(before, float) else before[:, :, None]
        out = q @ (earlier + before) + (q @ k.transpose(-2, -1)).tril() @ v_wide
    return out.flatten(2, 3).narrow(2, 0, tokens).to(v.dtype)


def attend_in_order(
    q: Float[Tensor, "B heads tokens m"],
    k: Float[Tensor, "B heads tokens m"],
    v: Float[Tensor, "B heads tokens d"],
    prefix: int,
) -> Float[Tensor, "B heads tokens d"]:
    """`attend_past` of the positions; the first ``prefix`` tokens come before all of them, and see one another."""
    (first_q, q), (first_k, k), (first_v, v) = (t.split([prefix, t.shape[2] - prefix], dim=2) for t in (q, k, v))
    out = attend_past(q, k, v, state(first_k, first_v))
    return torch.cat([attend(first_q, first_k, first_v), out], dim=2)


def state(k: Float[Tensor, "B heads tokens m"], v: Float[Tensor, "B heads tokens d"]) -> Float[Tensor, "B heads m d"]:
    """kᵀ v, all that a query needs to know of the keys and values."""
    wide = at_least_float32(v)
    if fixed(k.shape[2]) == 0:  # onnxruntime leaves a product over nothing as the memory was
        return k.new_zeros((k.shape[0], k.shape[1], k.shape[3], v.shape[3]), dtype=wide)
    with outside_autocast(v):
        k, v = k.to(wide), v.to(wide)
        # the gradient of the second factor lies in memory as it does: of k, which is often made point by point
        if fixed(k.shape[-1]) < fixed(v.shape[-1]):
            return k.transpose(-2, -1) @ v
        return (v.transpose(-2, -1) @ k).transpose(-2, -1)


class Recurrence:
    """The state of a causal attention by association while an image is made pixel by pixel: O(1) a step.

    Args:
        of_queries, of_keys: φ, applied to them.
        shape: of the state, (B, heads, m, d + 1).
        grid: of the image that is made, for what needs to know it.
    """

    def __init__(self, of_queries, of_keys, *shape: int, grid: Grid | None = None, device=None, dtype=None):
        self.of_queries, self.of_keys, self.grid = of_queries, of_keys, grid
        self.past = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    @property
    def nbytes(self) -> int:
        """Memory of the state, in bytes."""
        return self.past.nbytes

    def step(
        self, q: Float[Tensor, "B heads dq"], k: Float[Tensor, "B heads dk"], v: Float[Tensor, "B heads dv"], place: int
    ) -> Float[Tensor, "B heads dv"]:
        """Takes in the next pixel, and returns what it draws from the past and itself."""
        return normalised(self.drawn(q, k, with_ones(v.to(self.past.dtype)))).to(v.dtype)

    def drawn(self, q, k, v):
        """φ(q) times the state, into which φ(k) v goes first."""
        with outside_autocast(q):
            q, k, v = (t.to(self.past.dtype) for t in (self.of_queries(q), self.of_keys(k), v))
            self.past = self.past + k[..., :, None] * v[..., None, :]
            return (q[..., None, :] @ self.past)[..., 0, :]


def with_ones(v: Float[Tensor, "... d"]) -> Float[Tensor, "... d_1"]:
    """A channel of ones beside v: what is summed with it is the sum of the weights."""
    return F.pad(v, (0, 1), value=1.0)


def normalised(out: Float[Tensor, "... d_1"]) -> Float[Tensor, "... d"]:
    """The first channels divided by the last, the sum of the weights."""
    return out[..., :-1] / out[..., -1:]
