"""The zoo: every file in ``blocks/`` is a block, and its docstring is its entry in the tables."""

import difflib
import fnmatch
import inspect
import itertools
import pkgutil
import re
from collections.abc import Collection
from importlib import import_module
from typing import NamedTuple

from torch import nn

from . import blocks
from .gate import Gate
from .layout import OnMap
from .mixer import Mixer


class Entry(NamedTuple):
    """A block's row in the tables, read from its docstring."""

    name: str
    title: str  # one sentence
    source: str  # authors, year, name
    url: str
    cost: str  # multiply-adds of what the mechanism looks at, projections aside
    computed: str  # multiply-adds that the fast path does for each of these
    kind: str  # "mixer" or "gate"
    causal: bool


def list_blocks(pattern: str = "*") -> list[str]:
    """Names of all blocks that match a wildcard, sorted.

    Raises:
        ValueError: a name without wildcards that no block has; the nearest names are listed.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(blocks.__path__))
    found = fnmatch.filter(names, pattern)
    if not found and not re.search(r"[*?\[]", pattern):
        raise ValueError(f"block={pattern!r}: {_nearest(pattern, names)}")
    return found


def block_class(name: str) -> type[Mixer] | type[Gate]:
    """The class of a block. Raises ValueError for an unknown name, with the nearest ones."""
    names = list_blocks()
    if name not in names:
        raise ValueError(f"block={name!r}: {_nearest(name, names)}")
    return import_module(f"{blocks.__name__}.{name}").Block


def parameters(cls: type[Mixer] | type[Gate]) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a class of blocks but ``dim``, its own first, then those that it hands on to its bases."""
    found = {}
    for base in itertools.takewhile(lambda base: base is not nn.Module, cls.__mro__):
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                known = found.setdefault(name, parameter)
                if known.annotation is known.empty:  # said by the base
                    found[name] = known.replace(annotation=parameter.annotation)
    return {name: parameter for name, parameter in found.items() if name not in ("self", "dim", "pattern")}


def check_options(name: str, options: Collection[str]) -> None:
    """Raises TypeError for an option that a block does not have, with the nearest one and all it has."""
    known = list(parameters(block_class(name)))
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            nearest = f"; nearest: {near[0]}" if near else ""
            raise TypeError(f"{option}: no option of {name}{nearest}; it has {', '.join(known)}")


def create_block(name: str, dim: int, **options) -> Mixer | Gate:
    """A block on its own: a `Mixer` on tokens or a `Gate` on maps, as its paper has it.

    Args:
        name: one of `list_blocks`.
        dim: channels.
        options: of the block's class, for example ``num_heads``.

    Raises:
        ValueError: unknown name, or an option out of range; ``causal=True`` for a block that can't be.
        TypeError: an option the block does not have.
    """
    cls = block_class(name)
    if cls.not_causal and options.pop("causal", False):
        raise ValueError(f"causal=True: {name} can't be causal: {cls.not_causal}")
    check_options(name, options)
    return cls(dim, **options)


def create_layer(name: str, dim: int, *, init_gain: float = 0.0, **options) -> OnMap:
    """Any block as an (B, C, H, W) → (B, C, H, W) layer that is the identity until trained (``init_gain=0``)."""
    return OnMap(create_block(name, dim, **options), init_gain)


def layer(name: str, **options) -> type:
    """`create_layer` as a class that takes the channel count: what timm's ``attn_layer`` slots ask for.

    >>> import timm
    >>> model = timm.create_model("resnet18", block_args=dict(attn_layer=layer("cbam")))

    Raises:
        ValueError: unknown name.
        TypeError: an option the block does not have.
    """
    check_options(name, options.keys() - {"init_gain", "causal"})  # of the layer, and to be False for all

    class Layer:
        # Gives a plain OnMap, which copies and pickles. Some hosts pass their activation; a block keeps its paper's.
        def __new__(cls, channels: int, *, act_layer=None, **more):
            return create_layer(name, channels, **{**options, **more})

    Layer.__name__ = Layer.__qualname__ = f"layer({name!r})"
    return Layer


def describe(name: str) -> Entry:
    """A block's entry, read from the docstring of its file. Raises ValueError for an unknown name."""
    cls = block_class(name)
    text = inspect.getdoc(inspect.getmodule(cls))
    line = r"(.+)\n\n(.+)\n(?:.*\n)*?Cost: (.+)\nComputed: ([\d.]+) ×"
    title, source, cost, computed = re.match(line, text).groups()
    source, url = source.rsplit(", ", 1)
    kind = "gate" if issubclass(cls, Gate) else "mixer"
    return Entry(name, title, source, url, cost, computed, kind, not cls.not_causal)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or names
    return f"no such block; {'nearest' if near is not names else 'there are'}: {', '.join(near)}"
