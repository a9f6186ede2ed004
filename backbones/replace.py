"""Swaps a model's own attention for a block of the zoo, and keeps its projections."""

import inspect
import logging
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from timm.layers import (
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    GatherExcite,
    GlobalContext,
    SEModule,
)
from timm.layers.cbam import CbamModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from vision_attn import Grid, Mixer, create_block, create_layer
from vision_attn.hooks import InTuple
from vision_attn.zoo import block_class, name_of, taken_apart

from .added import spare_tables
from .grids import embeddings, grid_source
from .hosts import (
    also_called,
    given,
    holders,
    input_size_of,
    like,
    observing,
    options_within,
    refuse_wrapped,
    resolve,
    shapes_of,
)
from .rotary import drop, hand_on
from .self_attention import OF_TIMM, SelfAttention, read

_logger = logging.getLogger(__name__)
MAP_ATTENTION = (
    SqueezeExcite,
    SEModule,
    EffectiveSEModule,
    EcaModule,
    CecaModule,
    GatherExcite,
    GlobalContext,
    CbamModule,
)
CALLED_SO = re.compile("Attention|Attn|PSA")  # how networks name attention, of whatever kind


class Report(NamedTuple):
    """What `replace` or `load_authors` did, as names of parameters and buffers."""

    model: nn.Module
    copied: tuple[str, ...]  # taken from the replaced attention
    new: tuple[str, ...]  # of the new block, at their own initialisation
    unused: tuple[str, ...]  # of the replaced attention, dropped

    def __str__(self) -> str:
        parts = (f"{kind}: {', '.join(names) or 'none'}" for kind, names in zip(self._fields[1:], self[1:]))
        return "\n".join(parts)


def replace(
    model: nn.Module,
    block: str | type,
    at: str | Iterable[str] | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
    grid: str | Callable[[Tensor], tuple[int, int]] | None = None,
    **options,
) -> Report:
    """Swaps attention of ``model`` for ``block``, in place, and reports what became of the parameters.

    Self-attention of ViTs gives way to a mixer that takes over its heads, dropouts, qkv and proj: timm's ViT, DeiT and
    EVA, DINOv2, `torch.nn.MultiheadAttention` as in torchvision's ViT, and what Hugging Face builds of ``query``,
    ``key``, ``value`` and ``dense`` (ViT, DeiT, DINOv2; ``q_proj`` to ``o_proj`` in its newer words). ``dense`` in
    their place is the same function up to rounding: where attention is not timm's that is looked at, by a pass over
    noise in eval mode. Squeeze-and-excite layers of convolutional networks give way to any block as a layer.

    Args:
        block: one of `vision_attn.list_blocks`, a class of blocks, or one of layers (`vision_attn.layer`).
        at: names, with wildcards that do not cross dots, of attention modules or of modules that hold them
            ("blocks.*.attn", "blocks.[6-9]"), or several; None: all.
        input_size: (channels, height, width) of an image the model takes; None: what the model says.
        grid: where the grid of the tokens comes from, as for `insert`; None: found.
        options: of the block, whose device and type are the model's.

    Returns:
        The model and the names of copied, new and unused parameters. A copied name is the block's own: ``qkv.weight``
        may be joined of the host's ``query``, ``key`` and ``value``. Rotary positions of timm's EVA, DINOv3 and rope-vit
        go on to the block, unless ``rotary`` says otherwise; in training without their random shifts. Where the block
        refuses them, or they are of another kind, they are unused, as is what else is handed to the host's attention
        from outside, by the name it has there.

    Raises:
        ValueError: there is no attention that can be replaced (what is called so is listed), ``at`` matches none (what
            could match is listed) or one that has several names, or a gate is to stand for self-attention. An attention
            that is not timm's is not called, gives something else than the softmax of its projections, takes a mask, or
            keys of other tokens; the grid of its tokens is not found.
    """
    refuse_wrapped(model)
    block, options = taken_apart(block, options)
    tokens = {name: parts for name, module in model.named_modules() if (parts := read(module))}
    able = {n: m for n, m in model.named_modules() if n in tokens or isinstance(m, MAP_ATTENTION)}
    if not able:
        raise ValueError(f"model={type(model).__name__}: has no attention that can be replaced{_what_there_is(model)}")
    names = resolve(model, at, list(able), able, inside=True)
    for name in names:
        if also_called(model, name):
            raise ValueError(f"at={name!r}: is also {also_called(model, name)}, which would keep the old one")
    order = list(tokens)
    tokens = {name: tokens[name] for name in names if name in tokens}
    told = embeddings(model) and grid is None  # of others the grid must be looked for
    foreign = [name for name in tokens if not isinstance(able[name], OF_TIMM)]
    seen = foreign if told else list(tokens)
    size = input_size or (input_size_of(model) if seen or len(tokens) < len(names) else None)
    options, done, turning = options_within(model, options), [], 0
    channels = _channels(model, [name for name in names if name not in tokens], size)
    layers = {n: _mixer_like(tokens[n], block, options) for n in tokens}
    layers |= {n: create_layer(block, channels[n], **options) for n in channels}
    calls = _calls(model, seen, size)
    for name in foreign:
        _check_dense(name, calls[name], tokens[name])
    counts = {name: calls[name].x.shape[1] if name in calls else None for name in tokens}
    source = grid_source(model, counts, grid, size) if tokens else None
    for name in names:
        new, old = layers[name], able[name]
        copied, unused = _take_over(new, old, tokens.get(name))
        rotary = hand_on(model, old, order.index(name), new) if name in tokens and "rotary" not in options else None
        copied += rotary or []
        if name in tokens:
            new.register_forward_pre_hook(source.give, with_kwargs=True)
        if name in calls:
            unused += [key for key in calls[name].outside if key != "rope" or rotary is None]
            if isinstance(calls[name].output, tuple):
                new.register_forward_hook(InTuple(len(calls[name].output)))
        elif getattr(model, "rope", None) is not None and rotary is None:
            unused.append("rope")  # it arrives from outside, and this mixer has no use for it
        turning += rotary is not None
        model.set_submodule(name, new.train(model.training))
        fresh = [key for key in new.state_dict() if key not in copied]
        done.append([[f"{name}.{key}" for key in keys] for keys in (copied, fresh, unused)])
    if turning == len(order):
        drop(model)
    spare_tables(model)
    report = Report(model, *(tuple(sum(part, [])) for part in zip(*done)))
    _logger.info("replaced %d attentions by %s\n%s", len(names), block, report)
    return report


def _what_there_is(model: nn.Module) -> str:
    """What in the model is called attention, of a kind that can't be replaced: the first of each class."""
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name and CALLED_SO.search(kind := type(module).__name__):
            kinds.setdefault(kind, []).append(name)
    named = [f"{n} ({kind}{f', and {len(more)} more' if more else ''})" for kind, (n, *more) in kinds.items()]
    return f"; what is called attention in it is of another kind: {', '.join(named)}" if named else ""


def _channels(model: nn.Module, names: list[str], size: tuple[int, int, int] | None) -> dict[str, int]:
    """Channels of the maps that the named modules give."""
    shapes = shapes_of(model, names, size) if names else {}
    for name in names:
        if not shapes[name]:
            raise ValueError(f"at={name!r}: is not called when the model runs")
    return {name: calls[0][1] for name, calls in shapes.items()}


class Call(NamedTuple):
    """What a host's self-attention is called with, and what it gives."""

    x: Tensor
    output: Tensor | tuple
    outside: tuple[str, ...]  # what else comes in, by its names there


def _calls(model: nn.Module, names: list[str], size: tuple[int, int, int] | None) -> dict[str, Call]:
    """How the host calls its self-attentions, for one image of noise; ValueError for a way that a mixer can't go."""
    if not names:
        return {}
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *size, generator=generator).to(**like(model))
    calls = {}
    for name, met in observing(model, names, image).items():
        module = model.get_submodule(name)
        holder = model.get_submodule(next(holders(name), ""))
        if isinstance(holder, nn.TransformerEncoderLayer) or len(met) != 1:
            why = "is called by torch's TransformerEncoderLayer, which reads its weights itself"
            why = why if isinstance(holder, nn.TransformerEncoderLayer) else f"is called {len(met)} times for one image"
            raise ValueError(f"at={name!r}: {why}")
        ((args, kwargs, output),) = met
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        x = next(iter(named.values()))
        outside = [key for key, value in named.items() if value is not x and isinstance(value, (Tensor, tuple))]
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise ValueError(f"at={name!r}: batch_first=False: takes (tokens, images, channels), a mixer images first")
        if x.ndim != 3 or len(x) != 1:
            raise ValueError(f"at={name!r}: is called with {tuple(x.shape)}, not with the tokens (1, N, C) of an image")
        masks = [key for key in outside if "mask" in key or isinstance(module, nn.MultiheadAttention)]
        if masks:
            raise ValueError(
                f"at={name!r}: is called with {', '.join(masks)}, and a mixer takes one sequence of tokens"
            )
        calls[name] = Call(x, output, tuple(outside))
    return calls


@torch.no_grad()
def _check_dense(name: str, call: Call, parts: SelfAttention) -> None:
    """ValueError if the host's attention is not dense attention with its projections."""
    if call.outside or call.x.device.type == "meta":
        return
    if parts.norm is not None:  # nor are its weights at hand
        return
    dense = _mixer_like(parts, "dense", dict(device=call.x.device, dtype=call.x.dtype)).eval()
    _copy(dense, parts)
    wanted = given(call.output)
    rounding = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 0.02
    if (dense(call.x, Grid(1, call.x.shape[1])) - wanted).abs().max() > rounding * wanted.abs().max():
        raise ValueError(f"at={name!r}: gives something else than softmax(q · k / √d) · v of its projections")


def _mixer_like(old: SelfAttention, block: str | type, options: dict) -> Mixer:
    """A mixer of the width, heads, biases and dropouts of a self-attention."""
    if not issubclass(block_class(block), Mixer):
        raise ValueError(
            f"block={name_of(block)!r}: is a gate, it can't stand for self-attention; insert adds it behind one"
        )
    taken = dict(num_heads=old.num_heads, proj_bias=old.out.bias is not None, qkv_bias=old.bias is not None)
    taken |= dict(qk_norm=True, norm_layer=old.norm) if old.norm else {}
    taken |= dict(attn_drop=old.attn_drop, proj_drop=old.proj_drop)
    return create_block(block, old.out.out_features, **{**taken, **options})


@torch.no_grad()
def _copy(new: nn.Module, parts: SelfAttention) -> list[str]:
    """Copies the projections that fit; their names in ``new``."""
    theirs = {"qkv.weight": parts.weight, "qkv.bias": parts.bias}
    theirs |= {"proj.weight": parts.out.weight, "proj.bias": parts.out.bias}
    ours = new.state_dict()
    copied = [k for k, value in theirs.items() if value is not None and k in ours and ours[k].shape == value.shape]
    for key in copied:
        ours[key].copy_(theirs[key])
    return copied


@torch.no_grad()
def _take_over(new: nn.Module, old: nn.Module, parts: SelfAttention | None) -> tuple[list[str], list[str]]:
    """Copies what fits; names copied in ``new`` and left over in ``old``."""
    copied = set(_copy(new, parts) if parts else ())
    used = {name for key in copied for name in parts.names[key]}
    ours, theirs = new.state_dict(), old.state_dict()
    for key in theirs.keys() & ours.keys() - copied - used:
        if ours[key].shape == theirs[key].shape:
            ours[key].copy_(theirs[key])
            copied.add(key)
    return [key for key in ours if key in copied], [key for key in theirs if key not in copied and key not in used]
