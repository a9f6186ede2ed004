"""Tensors that are made once for a grid and kept: masks, and tables of indices."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .traced import is_passing

MOST = 256 * 2**20  # bytes in all, of the last ones used

_tensors: OrderedDict[tuple, tuple[Tensor | None, ...]] = OrderedDict()
_lock = threading.Lock()


def kept(make: Callable[..., tuple[Tensor | None, ...]], *args: Any, device: torch.device) -> tuple[Tensor | None, ...]:
    """``make(*args, device)``, made once; it must depend on nothing else.

    Made anew where it could not be kept (`is_passing`), where it would take more than a quarter of ``MOST``, and where
    ``args`` have no hash. Nothing kept belongs to a module, so copies, pickles and graphs do not hold it.
    """
    if is_passing(device):
        return make(*args, device)
    key = make, *args, device
    try:
        with _lock:
            found = _tensors.get(key)
            if found is not None:
                _tensors.move_to_end(key)
    except TypeError:  # a pattern of someone's own that has no hash
        return make(*args, device)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = make(*args, device)
        if fits(_bytes(found)):
            with _lock:
                _tensors[key] = found
                while sum(map(_bytes, _tensors.values())) > MOST:
                    _tensors.popitem(last=False)
    return found


def fits(nbytes: int) -> bool:
    """Whether tensors of so many bytes are kept."""
    return nbytes <= MOST // 4


def _bytes(tensors: tuple[Tensor | None, ...]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
