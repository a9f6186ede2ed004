"""Where in a model a layer can follow, and what it meets there; everything else is refused by name.

A layer can follow a module that is called once, in one model, whose output's channel axis is certain, that does not run
all its children, and that is still there when the model has merged its norms into its convolutions.
"""

import copy
import functools
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import NamedTuple

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .grids import is_told
from .hosts import (
    also_called,
    holders,
    input_size_of,
    is_chain,
    last_of,
    like,
    listed_channels,
    matches,
    observe,
    shapes_of,
    stages,
)

ITERATES = re.compile(r"\bself\.(children|named_children|_modules)\b")  # in a forward that runs all its children
FUSE = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy")  # methods that merge norms into convolutions
FUSED_FORWARD = ("forward_fuse", "fuseforward")  # what is run when a YOLO network has merged the norm of this part
NORMS = nn.modules.batchnorm._NormBase
MOST = 12  # places that are offered
NOT_CALLED = "is not called when the model runs"
NO_MAP = "gives neither a feature map (B, C, H, W) nor tokens (B, N, C)"
MAPS = {(0, 0, 1, -1): 1, (0, 1, -1, 0): 3}  # how axes change from a wide image to a tall one: which one is channels


class Place(NamedTuple):
    """What a module gives for one image."""

    shape: tuple[int, ...]
    channel_axis: int


class Look(NamedTuple):
    """What is seen of modules, by their names."""

    wrong: dict[str, str]  # why no layer can follow, where none can
    nothing: set[str]  # those that give no map and no tokens
    places: dict[str, Place]  # where one can
    shapes: dict[str, tuple[int, ...]]  # of what gives one map or tokens, certain or not


def places(
    model: nn.Module, names: list[str], size: tuple[int, int, int] | None = None, passed_over: Collection[str] = ()
) -> dict[str, Place]:
    """What the named modules give for an image of (channels, height, width) = ``size``.

    Args:
        passed_over: those of ``names`` that are left out if they give no map and no tokens, where others do.

    Raises:
        ValueError: a layer can't follow one of them; a place that works is named.
    """
    size, every = size or input_size_of(model), list(dict.fromkeys([*names, *(h for n in names for h in holders(n))]))
    look = look_at(model, every, size, names)
    left = [name for name in names if not (name in passed_over and name in look.nothing)] or names
    for name in left:
        if name in look.wrong:
            better = next((holder for holder in holders(name) if holder not in look.wrong), None)
            better = repr(better) if better else "one behind or inside it"
            raise ValueError(f"at={name!r}: {look.wrong[name]}; try {better}")
    for name in left:
        if name not in look.places:
            listed = ", ".join(stages(model)) or "a whole stage"
            raise ValueError(
                f"at={name!r}: gives {look.shapes[name]} for an image {size[1]}×{size[2]}, where no axis is certain to "
                f"be the channels of a feature map; try {listed}"
            )
    return {name: look.places[name] for name in left}


def offers(model: nn.Module, size: tuple[int, int, int] | None = None) -> list[str]:
    """Patterns for ``at`` behind whose modules a layer can follow, large parts before small ones.

    Of a model with parts that have parts of their own only those are told.
    """
    size, modules = size or input_size_of(model), dict(model.named_modules())
    ends = {name: last_of(model, name) for name in modules if name}
    look = look_at(model, list(ends), size, list(ends))
    met = {name: look.places[end].shape for name, end in ends.items() if end in look.places}
    tokens = {name: shape[1] for name, shape in met.items() if len(shape) == 3}
    count = Counter(tokens.values()).most_common(1)[0][0] if tokens else 0  # others lack the prefix
    tokens = {name: n for name, n in tokens.items() if n == count}
    told = tokens and is_told(model, {[*tokens][-1]: count}, size)
    right = {name for name, shape in met.items() if len(shape) == 4 or (told and name in tokens)}
    large = [name for name in ends if name in right and modules[name]._modules] or [n for n in ends if n in right]
    alike = defaultdict(list)
    for name in large:
        alike[re.sub(r"\d+", "*", name)].append(name)
    found = []
    for pattern, names in alike.items():
        hit = {name for name in ends if matches(pattern, name, inside=False)}
        found += names if len(names) == 1 or hit - right - look.nothing else [pattern]
    found.sort(key=lambda name: name.count("."))
    return [*found[:MOST], f"and {len(found) - MOST} deeper inside"] if len(found) > MOST else found


def look_at(model: nn.Module, every: list[str], size: tuple[int, int, int], names: list[str]) -> Look:
    """What is seen of modules, and which axis is the channels of what those with ``names`` give.

    Args:
        every: names, and those of the modules that hold them.
    """
    shapes, owners = shapes_of(model, every, size), _owners(model)
    lost = _lost_when_fused(model, every, size)
    wrong = {name: _why_not(model, name, shapes[name], owners, name in lost) for name in every}
    once = {name: shapes[name][0] for name in every if not wrong[name]}
    axes = _channel_axes(model, [name for name in names if name in once], once, size)
    return Look(
        {name: why for name, why in wrong.items() if why},
        {name for name, why in wrong.items() if why in (NOT_CALLED, NO_MAP)},
        {name: Place(once[name], axis) for name, axis in axes.items()},
        once,
    )


def _owners(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are attributes of a class, or defaults of its constructor, with the name of that class."""
    owners = {}
    for kind in dict.fromkeys(kind for part in model.modules() for kind in type(part).__mro__):
        defaults = getattr(vars(kind).get("__init__"), "__defaults__", None) or ()
        kept = (*vars(kind).values(), *defaults)
        owners |= {value: kind.__name__ for value in kept if isinstance(value, nn.Module)}
    return owners


def _why_not(model: nn.Module, name: str, shapes: list, owners: dict[nn.Module, str], lost: bool) -> str | None:
    """Why no layer can follow the module that gives ``shapes``, one for each call."""
    module = model.get_submodule(name)
    other = also_called(model, name)
    if other:
        return f"is also {other}, and a layer would act behind both"
    for part in (name, *holders(name)):
        if model.get_submodule(part) in owners:
            kind = owners[model.get_submodule(part)]
            return f"all objects of class {kind} share {part}, and a layer would act in other models too"
    if len(shapes) > 1:
        return f"is called {len(shapes)} times for one image, and a layer would act at each"
    if not shapes:
        return NOT_CALLED
    if len(shapes[0]) not in (3, 4) or shapes[0][0] != 1:
        return NO_MAP
    if lost:
        return "goes, or gives something else, when the model is fused, and a layer would be lost"
    if _runs_children(module):
        return "runs all its children, so it can't hold a layer"
    return None


def _runs_children(module: nn.Module) -> bool:
    """Whether a child of ours would be run, or counted, as one of its own."""
    if is_chain(module) or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    names = (name for name in dir(type(module)) if name.lstrip("_").startswith("forward"))
    return any(ITERATES.search(_source(getattr(type(module), name))) for name in names)


@functools.cache
def _source(method) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):  # made at run time
        return ""


def _channel_axes(model: nn.Module, names: list[str], shapes: dict, size: tuple[int, int, int]) -> dict[str, int]:
    """Channel axes of what the named modules give, without those that are not certain.

    Of a listed stage it is the axis as long as the list says, if the others keep the image's proportions. Of others
    it is the one that stays between a wide image and a tall one, while the next two grow and shrink. Where the model
    takes one size only, it is that of the listed stage around, if it gives the same shape.

    Args:
        shapes: of these modules and of those that hold them.
    """
    listed = listed_channels(model)
    told = {place: listed[stage] for stage in listed for place in (stage, last_of(model, stage))}
    axes = {n: 2 for n, shape in shapes.items() if len(shape) == 3 and (shape[1] != shape[2] or n in told)}
    maps = {name: shape for name, shape in shapes.items() if name not in axes}
    fits = {n: [axis for axis in (1, 3) if _is_map(shape, axis, told.get(n), size)] for n, shape in maps.items()}
    axes |= {name: fit[0] for name, fit in fits.items() if len(fit) == 1}
    unclear = [name for name in names if name not in axes]
    if not unclear:
        return axes
    turned = _axes_when_turned(model, unclear, size)
    if turned is None:  # takes one size only
        usual = {"NCHW": 1, "NHWC": 3}.get(getattr(model, "output_fmt", None))
        axes |= {name: usual for name in unclear if usual in fits[name]}
        around = {name: [h for h in holders(name) if h in axes and shapes[h] == shapes[name]] for name in unclear}
        turned = {name: axes[holders[0]] for name, holders in around.items() if holders}
    return axes | turned


def _axes_when_turned(model: nn.Module, names: list[str], size: tuple[int, int, int]) -> dict[str, int] | None:
    """Channel axes as a wide image and a tall one show them; None if the model takes neither pair of those."""
    channels, height, width = size
    halves = (height // 2, width), (height, width // 2)
    doubles = (height, 2 * width), (2 * height, width)
    axes = None
    for pair in (halves, doubles):
        left = [name for name in names if name not in (axes or {})]
        if not left:
            break
        try:
            wide, tall = (shapes_of(model, left, (channels, *image)) for image in pair)
        except ValueError:
            continue
        changes = {n: tuple((t > w) - (t < w) for w, t in zip(sum(wide[n], ()), sum(tall[n], ()))) for n in left}
        axes = (axes or {}) | {name: MAPS[change] for name, change in changes.items() if change in MAPS}
    return axes


def _is_map(shape: tuple[int, ...], axis: int, channels: int | None, size: tuple[int, int, int]) -> bool:
    """Whether ``shape`` has ``channels`` at ``axis``, and otherwise the image's proportions up to one pixel."""
    if len(shape) != 4:
        return False
    height, width = shape[2:] if axis == 1 else shape[1:3]
    return shape[axis] == channels and abs(height * size[2] - width * size[1]) <= max(size[1:])


@torch.no_grad()
def _lost_when_fused(model: nn.Module, names: list[str], size: tuple[int, int, int]) -> set[str]:
    """Of ``names``, those that go, or give something else, when the model merges its norms into its convolutions."""
    merged = [n for n in names if isinstance(model.get_submodule(n), (nn.modules.conv._ConvNd, NORMS))]
    lost = {n for n in merged if any(_has(model.get_submodule(holder), FUSED_FORWARD) for holder in holders(n))}
    if like(model)["device"].type == "meta" or not any(_has(module, FUSE) for module in model.modules()):
        return lost
    plain, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for norm in plain.modules():
        if isinstance(norm, NORMS) and norm.running_var is not None:  # a fresh one changes nothing
            norm.running_mean.copy_(torch.rand(norm.running_mean.shape, generator=generator) - 0.5)
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    fused = copy.deepcopy(plain).eval()
    image = torch.rand(1, *size, generator=generator).to(**like(model))
    try:
        for name in names:
            fused.get_submodule(name).vision_attn_place = name  # goes where a layer would, into copies too
        fused = _fuse(fused)
        after = dict(fused.named_modules())
        same = [name for name in names if getattr(after.get(name), "vision_attn_place", None) == name]
        was, now = observe(plain, same, image), observe(fused, same, image)
    except Exception:  # whatever the host raises: nobody fuses it as it is
        return lost
    kept = {name for name in same if len(was[name]) == len(now[name]) and all(map(_close, was[name], now[name]))}
    return lost | (set(names) - kept)


def _has(module: nn.Module, methods: tuple[str, ...]) -> bool:
    return any(hasattr(type(module), method) for method in methods)


def _fuse(model: nn.Module) -> nn.Module:
    """What is used once norms are merged: ``model``, or another that it gives."""
    for method in ("fuse", "fuse_model"):
        if _has(model, (method,)):
            given = getattr(model, method)()
            return given if isinstance(given, nn.Module) else model
    return reparameterize_model(model, inplace=True)


def _close(a, b) -> bool:
    """Whether two outputs are equal but for rounding; what is no tensor of such numbers is not compared."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in (a, b)):
        return True
    return a.shape == b.shape and bool((a - b).abs().max() <= 0.02 * a.abs().max())
