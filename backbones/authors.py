"""Weights as authors published them, into the blocks that compute the same: what goes where, key by key.

A network takes them whole, a layer or a block one module of them.

    model = timm.create_model("resnet50_cbam")
    print(load_authors(model, torch.load("RESNET50_CBAM_new_name_wrap.pth"), "cbam"))
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from vision_attn import check
from vision_attn.layout import Residual
from vision_attn.zoo import block_class

from .replace import Report


class Published(NamedTuple):
    """How the parameters of a block are called in a published module that is the same function."""

    block: str
    known_by: str  # a regular expression of the key that every such module has, and no other
    names: dict[str, str | tuple[str, ...]]  # of the block's modules and tensors, or of several that are joined to one
    transposed: tuple[str, ...] = ()  # of them
    options: dict[str, float] = {}  # of the block, which weights do not tell
    silent: tuple[str, ...] = ()  # published keys that do not change what the module gives


PUBLISHED = {
    "cbam": Published(
        block="cbam",
        known_by=r"ChannelGate\.mlp\.1\.weight",
        names={
            "mlp.0": "ChannelGate.mlp.1",
            "mlp.2": "ChannelGate.mlp.3",
            "spatial.0": "SpatialGate.spatial.conv",
            "spatial.1": "SpatialGate.spatial.bn",
        },
    ),
    "ccnet": Published(
        block="criss_cross",
        known_by=r"query_conv\.weight",
        names={"qkv": ("query_conv", "key_conv", "value_conv"), "gain": "gamma"},
        options={"num_heads": 1, "scale": 1.0},
    ),
    "gcnet": Published(
        block="global_context",
        known_by=r"channel_(add|mul)_conv\.0\.weight",
        names={"key": "conv_mask", "add": "channel_add_conv", "multiply": "channel_mul_conv"},
    ),
    "emanet": Published(
        block="expectation_maximization",
        known_by="mu",
        names={"bases.value": "mu", "before": "conv1", "after": "conv2.0", "norm": "conv2.1"},
        options={"temperature": 1.0},
    ),
    "efficient_attention": Published(
        block="efficient",
        known_by=r"reprojection\.weight",
        names={"qkv": ("queries", "keys", "values"), "proj": "reprojection"},
    ),
    "longformer": Published(
        block="longformer",
        known_by=r"self\.query_global\.weight",
        names={
            "qkv": ("self.query", "self.key", "self.value"),
            "qkv_global": ("self.query_global", "self.key_global", "self.value_global"),
            "proj": "output.dense",
        },
        silent=("output.LayerNorm.weight", "output.LayerNorm.bias"),  # behind the sum with the input: the host's
    ),
    "cait": Published(
        block="talking_heads",
        known_by=r"proj_l\.weight",
        names={"qkv": "qkv", "proj": "proj", "p_l": "proj_l.weight", "p_w": "proj_w.weight", "b_w": "proj_w.bias"},
        transposed=("p_l", "p_w"),
        silent=("proj_l.bias",),  # a constant to the softmax behind it
    ),
}


def load_authors(model: nn.Module, state_dict: Mapping, source: str, *, prefix: str = "") -> Report:
    """Loads weights that the authors of a mechanism published, under their own keys, and reports what became of them.

    =================== ======================== ======================================================================
    source              block                    what it must be made with to be the published module
    =================== ======================== ======================================================================
    cbam                cbam                     nothing; timm's ResNets (``resnet50_cbam``) take the whole file
    ccnet               criss_cross              a layer; ``num_heads=1, key_dim=dim // 8, scale=1.0``
    gcnet               global_context           ``fusion``, ``rd_ratio`` of the config; ``prefix="backbone."`` of a
                                                 detector gives timm's ``resnet50_global_context`` its ResNet too
    emanet              expectation_maximization ``bases``, ``iterations`` of the settings; a ReLU follows it
    efficient_attention efficient                a layer; ``num_heads``, ``key_dim``, ``value_dim`` it was made with
    longformer          longformer               ``num_heads``, and the window: on a line of text ``(1, 2 w + 1)``
    cait                talking_heads            ``num_heads``, ``mixing_bias=True``
    =================== ======================== ======================================================================

    A layer (`vision_attn.create_layer`, `insert`, timm's slots) adds what the module adds to its input with gain 1, or
    the published one; a block alone gives it without the input.

    Args:
        model: a block, a layer, or a network with such layers. A network takes all of the file or an error: a published
            module goes to the block that stands in the same part of the network (``layer1.0``), and all other keys must
            be equal. A block or layer takes the one module that the file has.
        state_dict: what was published, also below "state_dict" or "model" and with "module." before its keys.
        source: one of the above.
        prefix: of the keys that are meant, others count as unused: ``"blocks.0.attn."`` is one of the modules of CaiT,
            ``"encoder.layer.0.attention."`` of Longformer.

    Returns:
        Names of parameters and buffers: copied from the file, new (gains and output projections that the published
        module does not have, set to 1 and to the identity; counters), and unused keys of the file.

    Raises:
        ValueError: the source is unknown; the model has no such block, or the file no such module or more than fit; a
            parameter has no value, a key no place, or two have different shapes: they are named. Nothing is loaded.
    """
    check.one_of("source", source, PUBLISHED)
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict={state_dict!r:.80}: must be a mapping of names to tensors, as torch.load gives")
    everything, ours = _plain(state_dict), model.state_dict()
    theirs = {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}
    pairs, origins = _pairs(model, theirs, source), {}
    for name, root in pairs:
        origins |= _origins(model, name, root, PUBLISHED[source])
    is_network = any(key not in origins for key in ours)
    origins = {key: origins.get(key, Origin((key,))) for key in ours}  # in a network all others are called the same

    has_all = {key: origin for key, origin in origins.items() if origin.names and theirs.keys() >= set(origin.names)}
    copied = {key: origin.taken_from(theirs, ours[key].shape) for key, origin in has_all.items()}
    new = {key: _neutral(key, ours[key], origin) for key, origin in origins.items() if key not in copied}
    used = {name for origin in has_all.values() for name in origin.names}
    unused = [key for key in theirs if key not in used]
    silent = {root + key for _, root in pairs for key in PUBLISHED[source].silent}
    within = "" if is_network else tuple(root for _, root in pairs)  # keys that must have a place
    faults = {
        "no value for": [f"{key} (there {origins[key]})" for key, value in new.items() if value is None],
        "no place for": [prefix + key for key in unused if key.startswith(within) and key not in silent],
        "another shape for": [
            f"{k} of {tuple(ours[k].shape)} (there {origins[k]})" for k, v in copied.items() if v is None
        ],
    }
    if any(faults.values()):
        said = "; ".join(f"{fault} {_some(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(f"state_dict: is not that of such a model by {source}: {said}")
    model.load_state_dict(copied | new)
    rest = [key for key in everything if not key.startswith(prefix)]
    return Report(model, tuple(copied), tuple(new), (*(prefix + key for key in unused), *rest))


class Origin(NamedTuple):
    """Where a tensor comes from: keys of the file, joined in this order; none if the published module has no such."""

    names: tuple[str, ...]
    transposed: bool = False

    def taken_from(self, theirs: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
        """The tensor in our ``shape``; None if it has another, axes of size 1 aside."""
        parts = [theirs[name] for name in self.names]
        if len({part.shape[1:] for part in parts}) > 1:
            return None
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        joined = joined.T if self.transposed else joined
        same = [n for n in joined.shape if n != 1] == [n for n in shape if n != 1]
        return joined.reshape(shape) if same else None

    def __str__(self) -> str:
        return " + ".join(self.names) or "nothing"


def _plain(state_dict: Mapping) -> dict[str, Tensor]:
    """The tensors of what was published, without what training wrapped around them."""
    for wrapper in ("state_dict", "model"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    return clean_state_dict(state_dict)


def _pairs(model: nn.Module, theirs: Mapping, source: str) -> list[tuple[str, str]]:
    """Names of blocks, and with what the keys of the published module begin that goes into each."""
    published = PUBLISHED[source]
    kind = block_class(published.block)
    blocks = [name for name, module in model.named_modules() if isinstance(module, kind)]
    if not blocks:
        raise ValueError(f"model={type(model).__name__}: has no {published.block}, which is the block of {source}")
    matches = [re.fullmatch(rf"((?:.*\.)?){published.known_by}", key) for key in theirs]
    roots = list(dict.fromkeys(match[1] for match in matches if match))
    if len(blocks) == len(roots) == 1:
        return [(blocks[0], roots[0])]
    around = {_parent(root.removesuffix(".")): root for root in roots}
    pairs = [(name, around.get(_parent(_layer_or_block(model, name)))) for name in blocks]
    if len(pairs) != len(roots) or {root for _, root in pairs} != set(roots):
        raise ValueError(
            f"state_dict: has {len(roots)} modules of {source}{', ' * bool(roots)}{_some(roots)}, which do not stand "
            f"where the model has its {len(blocks)} blocks, {_some(blocks)}; prefix chooses among them"
        )
    return pairs


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _layer_or_block(model: nn.Module, name: str) -> str:
    """The name of the layer that holds a block, or of the block."""
    has_layer = name and isinstance(model.get_submodule(_parent(name)), Residual)
    return _parent(name) if has_layer else name


def _origins(model: nn.Module, name: str, root: str, published: Published) -> dict[str, Origin]:
    """Where the tensors of a block and of its layer come from."""
    block, layer = model.get_submodule(name), _layer_or_block(model, name)
    for option, value in published.options.items():
        if getattr(block, option) != value:
            raise ValueError(f"{option}={getattr(block, option)!r}: must be {value!r} for weights of this source")
    ours = {key: f"{name}.{key}" if name else key for key in block.state_dict()}
    if layer != name:
        ours["gain"] = f"{layer}.gain" if layer else "gain"
    return {full: _origin(key, root, published) for key, full in ours.items()}


def _origin(key: str, root: str, published: Published) -> Origin:
    for ours, theirs in published.names.items():
        if key == ours or key.startswith(f"{ours}."):
            names = (theirs,) if isinstance(theirs, str) else theirs
            return Origin(tuple(root + name + key[len(ours) :] for name in names), ours in published.transposed)
    return Origin(())


def _neutral(key: str, ours: Tensor, origin: Origin) -> Tensor | None:
    """The value that is as good as none, for what the published module does not have; None where the file lacks one."""
    if key.endswith("num_batches_tracked"):  # which old files do not have, and nothing depends on
        return ours
    if origin.names:
        return None
    if key.endswith("gain"):
        return torch.ones_like(ours)
    if key.endswith("proj.weight"):
        return torch.eye(*ours.shape)
    return torch.zeros_like(ours) if key.endswith("proj.bias") else None


def _some(names: Iterable[str]) -> str:
    names = [name or "''" for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
