"""Attention by association: φ(q)(φ(k)ᵀ v) in place of (φ(q) φ(k)ᵀ) v. Cost N·m·d instead of N²·d."""

import torch
from jaxtyping import Float
from torch import Tensor


def attend(
    q: Float[Tensor, "B heads tokens m"], k: Float[Tensor, "B heads tokens m"], v: Float[Tensor, "B heads tokens d"]
) -> Float[Tensor, "B heads tokens d"]:
    """q (kᵀ v) for feature maps q and k; the sum over positions is taken in at least float32."""
    wide = torch.promote_types(v.dtype, torch.float32)
    state = k.to(wide).mT @ v.to(wide)  # (B, heads, m, d)
    return (q.to(wide) @ state).to(v.dtype)
