"""Argument checks: every error names the argument, its value, and what is allowed."""

import math
import numbers
from collections.abc import Collection
from typing import Annotated

Count = Annotated[int, "≥ 0"]  # the type of an argument that `count` checks


def positive_int(name: str, value) -> None:
    """Raises ValueError unless ``value`` is an integer ≥ 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be an integer ≥ 1")


def count(name: str, value) -> None:
    """Raises ValueError unless ``value`` is an integer ≥ 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r}: must be an integer ≥ 0")


def positive(name: str, value) -> None:
    """Raises ValueError unless ``value`` is a finite number > 0."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a finite number > 0")


def finite(name: str, value) -> None:
    """Raises ValueError unless ``value`` is a finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: must be a finite number")


def not_negative(name: str, value) -> None:
    """Raises ValueError unless ``value`` is a finite number ≥ 0."""
    finite(name, value)
    if value < 0:
        raise ValueError(f"{name}={value!r}: must be a finite number ≥ 0")


def rate(name: str, value) -> None:
    """Raises ValueError unless ``value`` is a rate: a number in [0, 1)."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be a number in [0, 1)")


def boolean(name: str, value) -> None:
    """Raises ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def one_of(name: str, value, allowed: Collection) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def border(value, causal: bool) -> None:
    """Raises ValueError unless ``value`` says what a window does at the border and, with ``causal``, can do."""
    one_of("border", value, ("cut", "shift"))
    if causal and value == "shift":
        why = "the first pixels have nothing before them to move to"
        raise ValueError(f"border={value!r}: must be 'cut' with causal=True: {why}")


def pair(name: str, value) -> tuple[int, int]:
    """``value`` or ``(value, value)`` as two integers ≥ 1; raises ValueError for anything else."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    try:
        height, width = both
        positive_int(name, height)
        positive_int(name, width)
    except ValueError:
        raise ValueError(f"{name}={value!r}: must be an integer ≥ 1 or a (height, width) pair of them") from None
    return both


def odd_pair(name: str, value) -> tuple[int, int]:
    """As `pair`, of odd integers."""
    both = pair(name, value)
    if both[0] % 2 == 0 or both[1] % 2 == 0:
        raise ValueError(f"{name}={value!r}: must be odd, or a (height, width) pair of odd integers")
    return both


def no_attn_drop(value) -> None:
    """Raises ValueError unless ``attn_drop`` is 0, for blocks that make no matrix to drop from."""
    rate("attn_drop", value)
    if value:
        raise ValueError(f"attn_drop={value!r}: must be 0: the matrix it would drop from is never made; use proj_drop")


def no_scale(value, why: str) -> None:
    """Raises ValueError unless ``scale`` is None, for blocks that have no q · k to scale."""
    if value is not None:
        raise ValueError(f"scale={value!r}: must be None: {why}")
