"""Self-attention as libraries build it: what of it is the qkv and proj of a mixer."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from vision_attn import Mixer

# Names of the layers that give queries, keys and values (one, or three), and of the one behind the mixed values
LAYOUTS = (
    (("qkv",), "proj"),  # timm, DINOv2
    (("q_proj", "k_proj", "v_proj"), "proj"),  # timm's EVA
    (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Hugging Face from version 5 on
    (("q_proj", "k_proj", "v_proj"), "out_proj"),  # CLIP, SigLIP
    (("attention.query", "attention.key", "attention.value"), "output.dense"),  # Hugging Face before
)
OF_TIMM = (Attention, EvaAttention)  # the only ones whose further parts are known


class SelfAttention(NamedTuple):
    """What a host's self-attention is to a mixer."""

    num_heads: int
    weight: Tensor  # (3 dim, dim): queries, keys, values
    bias: Tensor | None
    out: nn.Linear
    attn_drop: float
    proj_drop: float
    norm: type[nn.Module] | None  # of queries and keys
    names: dict[str, tuple[str, ...]]  # of our parameters, and what in the host they are taken from


@torch.no_grad()
def read(module: nn.Module) -> SelfAttention | None:
    """What a module is to a mixer; None if it is no self-attention, of a kind that is not known, or a mixer itself.

    Of kinds that are not timm's every parameter must have its place in a mixer.
    """
    parts = None if isinstance(module, Mixer) else _of_torch(module) or _of_layers(module)
    return parts if parts and (isinstance(module, OF_TIMM) or _is_whole(module, parts)) else None


def _of_torch(module: nn.Module) -> SelfAttention | None:
    plain = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    if not plain or module.bias_k is not None or module.add_zero_attn:
        return None
    names = {
        "qkv.weight": ("in_proj_weight",),
        "qkv.bias": ("in_proj_bias",),
        "proj.weight": ("out_proj.weight",),
        "proj.bias": ("out_proj.bias",),
    }
    in_proj = module.in_proj_weight, module.in_proj_bias
    return SelfAttention(module.num_heads, *in_proj, module.out_proj, module.dropout, 0.0, None, names)


def _of_layers(module: nn.Module) -> SelfAttention | None:
    heads = next((n for n in _found(module, "num_heads", "num_attention_heads", "attention.num_attention_heads")), None)
    for inner, outer in LAYOUTS:
        layers = [_linear(module, name) for name in (*inner, outer)]
        if isinstance(heads, int) and all(layers):
            break
    else:
        return None
    *layers, out = layers
    weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    bias = layers[0].bias if len(layers) == 1 else _joined([layer.bias for layer in layers], layers)
    names = {
        "qkv.weight": tuple(f"{name}.weight" for name in inner),
        "qkv.bias": tuple(f"{name}.bias" for name in inner),
    }
    if getattr(module, "q_bias", None) is not None:  # EVA's keys have none
        bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
        names["qkv.bias"] = "q_bias", "v_bias"
    names |= {f"proj.{kind}": (f"{outer}.{kind}",) for kind in ("weight", "bias")}
    norm = getattr(module, "q_norm", None)
    norm = None if isinstance(norm, (nn.Identity, type(None))) else type(norm)
    drops = (
        next((_rate(drop) for drop in _found(module, *where)), 0.0)
        for where in (
            ("attn_drop", "attention_dropout", "attention.dropout", "dropout"),
            ("proj_drop", "output.dropout"),
        )
    )
    return SelfAttention(heads, weight, bias, out, *drops, norm, names)


def _joined(biases: list[Tensor | None], layers: list[nn.Linear]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat([a.weight.new_zeros(a.out_features) if b is None else b for b, a in zip(biases, layers)])


def _is_whole(module: nn.Module, parts: SelfAttention) -> bool:
    known = {name for names in parts.names.values() for name in names}
    norms = tuple(f"{norm}." for norm in ("q_norm", "k_norm"))
    dim = parts.out.out_features
    return parts.weight.shape == (3 * dim, dim) and all(
        name in known or name.startswith(norms) for name in module.state_dict()
    )


def _found(module: nn.Module, *paths: str) -> Iterator:
    """Attributes that there are, by dotted paths."""
    for path in paths:
        value = module
        for name in path.split("."):
            value = getattr(value, name, None)
        if value is not None:
            yield value


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    return next((layer for layer in _found(module, path) if isinstance(layer, nn.Linear)), None)


def _rate(drop: nn.Dropout | float) -> float:
    return getattr(drop, "p", drop)
