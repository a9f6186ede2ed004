"""The discrete Fourier transform along one axis, as matrices of cosines and sines.

For graphs, whose exporters lack transforms or whose runtimes fail at them. Everywhere else torch.fft is faster.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def waves(length: int, frequencies: int | None = None, *, device=None, dtype=None) -> tuple[Tensor, Tensor]:
    """cos(2π f x / length) / √length and the sine, each (frequencies, length), of f = 0, 1, … and places x.

    All ``length`` frequencies if None; either number may be symbolic. Angles are exact up to the type's rounding.
    """
    place = torch.arange(length, device=device)
    frequency = place if frequencies is None else torch.arange(frequencies, device=device)
    turns = frequency[:, None] * place
    turns = turns - turns // length * length  # whole turns left out, for large angles round; onnxruntime has no such %
    angle = turns.to(dtype) * (2 * math.pi) / length
    cosines, sines = angle.cos(), angle.sin()
    size = cosines[0].sum().rsqrt()  # the first are all 1; √ of a symbolic number leaves some graphs
    return cosines * size, sines * size


def turn(
    real: Float[Tensor, "... places d"], imaginary: Float[Tensor, "... places d"], cosines: Tensor, sines: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_x e^{-iθ_fx} of complex numbers at places x, by `waves` (frequencies, places): (..., frequencies, d) each."""
    return cosines @ real + sines @ imaginary, cosines @ imaginary - sines @ real
