"""Swaps a model's own attention for a block of the zoo, and keeps its projections."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import torch
from timm.layers import (
    Attention,
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    GatherExcite,
    GlobalContext,
    SEModule,
)
from timm.layers.cbam import CbamModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from vision_attn import Mixer, create_block, create_layer
from vision_attn.zoo import block_class, name_of

from .added import spare_tables
from .grids import grid_source
from .hosts import also_called, input_size_of, options_within, resolve, shapes_of

_logger = logging.getLogger(__name__)
TOKEN_ATTENTION = (Attention, EvaAttention)
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
    **options,
) -> Report:
    """Swaps attention of ``model`` for ``block``, in place, and reports what became of the parameters.

    Self-attention of ViT, DeiT and EVA gives way to a mixer that takes over its heads, dropouts, qkv and proj;
    squeeze-and-excite layers of convolutional networks to any block as a layer.

    Args:
        block: one of `vision_attn.list_blocks`, or a class of blocks.
        at: names, with wildcards that do not cross dots, of attention modules or of modules that hold them
            ("blocks.*.attn", "blocks.[6-9]"), or several; None: all.
        input_size: (channels, height, width) of an image the model takes; None: what the model says.
        options: of the block, whose device and type are the model's.

    Returns:
        The model and the names of copied, new and unused parameters.

    Raises:
        ValueError: there is no attention that can be replaced, ``at`` matches none (what could match is listed) or one
            that has several names, or a gate is to stand for self-attention.
    """
    able = {n: m for n, m in model.named_modules() if isinstance(m, TOKEN_ATTENTION + MAP_ATTENTION)}
    if not able:
        raise ValueError(
            f"model={type(model).__name__}: has no attention that can be replaced, of ViT, DeiT or EVA or by "
            "squeeze-and-excite; insert adds a block to it"
        )
    names = resolve(model, at, list(able), able, inside=True)
    for name in names:
        if also_called(model, name):
            raise ValueError(f"at={name!r}: is also {also_called(model, name)}, which would keep the old one")
    options, done = options_within(model, options), []
    channels = _channels(model, [name for name in names if isinstance(able[name], MAP_ATTENTION)], input_size)
    layers = {name: _layer_like(able[name], block, channels.get(name), options) for name in names}
    for name, new in layers.items():
        if isinstance(able[name], TOKEN_ATTENTION):
            new.register_forward_pre_hook(grid_source(model).give, with_kwargs=True)
        copied, unused = _take_over(new, able[name])
        if getattr(model, "rope", None) is not None:
            unused.append("rope")  # rotary positions arrive from outside, and a mixer has no use for them
        model.set_submodule(name, new.train(model.training))
        fresh = [key for key in new.state_dict() if key not in copied]
        done.append([[f"{name}.{key}" for key in keys] for keys in (copied, fresh, unused)])
    spare_tables(model)
    report = Report(model, *(tuple(sum(part, [])) for part in zip(*done)))
    _logger.info("replaced %d attentions by %s\n%s", len(names), block, report)
    return report


def _channels(model: nn.Module, names: list[str], size: tuple[int, int, int] | None) -> dict[str, int]:
    """Channels of the maps that the named modules give."""
    shapes = shapes_of(model, names, size or input_size_of(model)) if names else {}
    for name in names:
        if not shapes[name]:
            raise ValueError(f"at={name!r}: is not called when the model runs")
    return {name: calls[0][1] for name, calls in shapes.items()}


def _layer_like(old: nn.Module, block: str | type, channels: int | None, options: dict) -> nn.Module:
    """What takes the place of ``old``: a layer of its channels, or a mixer of its width, heads, biases and dropouts."""
    if isinstance(old, MAP_ATTENTION):
        return create_layer(block, channels, **options)
    if not issubclass(block_class(block), Mixer):
        raise ValueError(
            f"block={name_of(block)!r}: is a gate, it can't stand for self-attention; insert adds it behind one"
        )
    has_norm = not isinstance(old.q_norm, nn.Identity)
    taken = dict(
        num_heads=old.num_heads, proj_bias=old.proj.bias is not None, qkv_bias=_fused_qkv(old)["bias"] is not None
    )
    taken |= dict(qk_norm=True, norm_layer=type(old.q_norm)) if has_norm else {}
    taken |= {f"{which}_drop": getattr(old, f"{which}_drop").p for which in ("attn", "proj")}
    return create_block(block, old.proj.out_features, **{**taken, **options})


def _fused_qkv(old: nn.Module) -> dict[str, Tensor | None]:
    """Weight and bias of one linear layer that gives queries, keys and values."""
    if old.qkv is not None:
        bias = old.qkv.bias
        if getattr(old, "q_bias", None) is not None:
            bias = torch.cat([old.q_bias, torch.zeros_like(old.q_bias), old.v_bias])
        return dict(weight=old.qkv.weight, bias=bias)
    parts = (old.q_proj, old.k_proj, old.v_proj)
    bias = None
    if any(p.bias is not None for p in parts):
        bias = torch.cat([p.weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in parts])
    return dict(weight=torch.cat([p.weight for p in parts]), bias=bias)


@torch.no_grad()
def _take_over(new: nn.Module, old: nn.Module) -> tuple[list[str], list[str]]:
    """Copies what fits; names copied in ``new`` and left over in ``old``."""
    theirs, used = dict(old.state_dict()), set()
    if isinstance(old, TOKEN_ATTENTION):
        theirs |= {f"qkv.{key}": value for key, value in _fused_qkv(old).items() if value is not None}
    ours = new.state_dict()
    copied = [key for key in ours if key in theirs and ours[key].shape == theirs[key].shape]
    for key in copied:
        ours[key].copy_(theirs[key])
    if "qkv.weight" in copied:
        parts = ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")
        used = {key for key in old.state_dict() if key.split(".")[0] in parts}
    return copied, [key for key in old.state_dict() if key not in copied and key not in used]
