"""Learned tables that belong to a size, on another one."""

import torch
from jaxtyping import Float
from torch import Tensor


def stretch(old: int, new: int, *, device=None, dtype=None) -> Float[Tensor, "new old"]:
    """The matrix that takes entries at ``old`` pixels to ``new`` pixels of the same image, linearly; old = new: itself.

    A pixel is its centre; beyond the outermost centres their entries go on. ``new`` may be symbolic.
    """
    wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    centre = (torch.arange(new, device=device, dtype=wide) + 0.5) * old / new - 0.5
    place = torch.arange(old, device=device, dtype=wide)
    hat = 1 - (centre.clamp(min=0, max=old - 1)[:, None] - place).abs()
    return hat.clamp(min=0).to(dtype)


def spread(parts: int, length: int, *, device=None, dtype=None) -> Float[Tensor, "parts length"]:
    """How much of each of ``parts`` equal parts of an axis lies in each of its ``length`` pixels; rows sum to 1.

    ``length`` may be symbolic.
    """
    wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    edges = torch.arange(parts + 1, device=device, dtype=wide) * length / parts
    pixel = torch.arange(length, device=device, dtype=wide)
    shared = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return (shared.clamp(min=0) * parts / length).to(dtype)
