"""The zoo: every file in ``blocks/`` is a block, and its docstring is its entry in the tables.

Blocks of one's own get a name beside them by `register`, or by an entry point of the group ``vision_attn.blocks`` in an
installed package: ``knight = "my_package.knight:Block"``. A class serves wherever a name does.
"""

import difflib
import fnmatch
import inspect
import itertools
import pkgutil
import re
import warnings
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
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


GROUP = "vision_attn.blocks"  # of entry points

_own: dict[str, type[Mixer] | type[Gate]] = {}  # that were registered
_followers: list[Callable[[str], None]] = []  # are told each name that is registered


def register(block: type[Mixer] | type[Gate], name: str) -> type[Mixer] | type[Gate]:
    """Gives a block of one's own a name, everywhere that names are taken, and returns the class.

    Where `backbones` is imported, before or after, there are timm models of that name, too.

    Raises:
        ValueError: the class is no block, the name is none or taken by another.

        vision_attn.register(Knight, name="knight")
        timm.create_model("resnet18_knight")
    """
    _check_class(block)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}: must be lower-case letters, digits and underscores, a letter first")
    if _own.get(name) is block:
        return block
    if name in list_blocks():
        raise ValueError(f"name={name!r}: there is a block of that name already")
    _own[name] = block
    for follow in _followers:
        follow(name)
    return block


def follow_names(call: Callable[[str], None]) -> None:
    """Calls ``call(name)`` for every block there is, and for each that is registered later."""
    for name in list_blocks():
        call(name)
    _followers.append(call)


def list_blocks(pattern: str = "*") -> list[str]:
    """Names of all blocks that match a wildcard, sorted: the zoo's, and one's own (`register`).

    Raises:
        ValueError: a name without wildcards that no block has; the nearest names are listed.
    """
    names = sorted({*_zoo(), *_own, *_of_packages()})
    found = fnmatch.filter(names, pattern)
    if not found and not re.search(r"[*?\[]", pattern):
        raise ValueError(f"block={pattern!r}: {_nearest(pattern, names)}")
    return found


def _zoo() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(blocks.__path__)]


@cache
def _of_packages() -> dict[str, EntryPoint]:
    found = {}
    for point in entry_points(group=GROUP):
        if point.name in found or point.name in _zoo():
            warnings.warn(f"{GROUP}: {point.name} = {point.value} is left out: the name is taken", stacklevel=4)
        else:
            found[point.name] = point
    return found


def block_class(block: str | type[Mixer] | type[Gate]) -> type[Mixer] | type[Gate]:
    """The class of a block. Raises ValueError for an unknown name, with the nearest ones, and for what is no block."""
    if not isinstance(block, str):
        return _check_class(block)
    if block in _own:
        return _own[block]
    if block in _of_packages():
        point = _of_packages()[block]
        try:
            return _check_class(point.load())
        except (ImportError, AttributeError) as error:
            raise ValueError(f"block={block!r}: {point.value} can't be loaded from its package: {error}") from error
    if block not in _zoo():
        raise ValueError(f"block={block!r}: {_nearest(block, list_blocks())}")
    return import_module(f"{blocks.__name__}.{block}").Block


def name_of(block: str | type[Mixer] | type[Gate]) -> str:
    """The name of a block: of a class that has none, its own in lower case (``MyBlock``: my_block)."""
    if isinstance(block, str):
        return block
    _check_class(block)
    if block.__module__.startswith(f"{blocks.__name__}."):
        return block.__module__.rpartition(".")[2]
    named = [name for name, own in _own.items() if own is block]
    named += [
        point.name for point in _of_packages().values() if point.value == f"{block.__module__}:{block.__qualname__}"
    ]
    return named[0] if named else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", block.__name__).lower()


def _check_class(block) -> type[Mixer] | type[Gate]:
    if not isinstance(block, type) or not issubclass(block, (Mixer, Gate)):
        shown = f"{type(block).__name__}(…)" if isinstance(block, nn.Module) else repr(block)
        raise ValueError(f"block={shown}: must be a name, or a subclass of Mixer or Gate")
    return block


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


def check_options(block: str | type, options: Collection[str]) -> None:
    """Raises TypeError for an option that a block does not have, with the nearest one and all it has."""
    name, known = name_of(block), list(parameters(block_class(block)))
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            nearest = f"; nearest: {near[0]}" if near else ""
            raise TypeError(f"{option}: no option of {name}{nearest}; it has {', '.join(known)}")


def create_block(name: str | type, dim: int, **options) -> Mixer | Gate:
    """A block on its own: a `Mixer` on tokens or a `Gate` on maps, as its paper has it.

    Args:
        name: one of `list_blocks`, or a class of blocks.
        dim: channels.
        options: of the block's class, for example ``num_heads``.

    Raises:
        ValueError: unknown name, or an option out of range; ``causal=True`` for a block that can't be.
        TypeError: an option the block does not have.
    """
    cls = block_class(name)
    if cls.not_causal and options.pop("causal", False):
        raise ValueError(f"causal=True: {name_of(name)} can't be causal: {cls.not_causal}")
    check_options(name, options)
    return cls(dim, **options)


def create_layer(name: str | type, dim: int, *, init_gain: float = 0.0, **options) -> OnMap:
    """Any block as an (B, C, H, W) → (B, C, H, W) layer that is the identity until trained (``init_gain=0``)."""
    return OnMap(create_block(name, dim, **options), init_gain)


def layer(name: str | type, **options) -> type:
    """`create_layer` as a class that takes the channel count: what timm's ``attn_layer`` slots ask for.

    >>> import timm
    >>> model = timm.create_model("resnet18", block_args=dict(attn_layer=layer("cbam")))

    Raises:
        ValueError: unknown name.
        TypeError: an option the block does not have.
    """
    check_options(name, options.keys() - {"init_gain", "causal"})  # of the layer, and to be False for all

    class Layer:
        made_of = name, options

        # Gives a plain OnMap, which copies and pickles. Some hosts pass their activation; a block keeps its paper's.
        def __new__(cls, channels: int, *, act_layer=None, **more):
            return create_layer(name, channels, **{**options, **more})

    Layer.__name__ = Layer.__qualname__ = f"layer({name_of(name)!r})"
    return Layer


def taken_apart(block: str | type, options: dict) -> tuple[str | type, dict]:
    """A block and its options; of a class that `layer` made, those it was made of, with ``options`` over them."""
    name, own = getattr(block, "made_of", (block, {}))
    return name, {**own, **options}


def describe(name: str | type) -> Entry:
    """A block's entry, read from the docstring of its file, of one's own as far as it is told there.

    Raises:
        ValueError: an unknown name.
    """
    cls = block_class(name)
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    line = r"(.+)\n\n(.+)\n(?:.*\n)*?Cost: (.+)\nComputed: ([\d.]+) ×"
    told = re.match(line, text)
    title, source, cost, computed = told.groups() if told else ((cls.__doc__ or text).partition("\n")[0], ", ", "", "")
    source, url = source.rsplit(", ", 1)
    kind = "gate" if issubclass(cls, Gate) else "mixer"
    return Entry(name_of(name), title, source, url, cost, computed, kind, not cls.not_causal)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or names
    return f"no such block; {'nearest' if near is not names else 'there are'}: {', '.join(near)}"
