"""Puts attention into a model that exists already.

`insert` adds a layer behind stages or blocks: every original parameter keeps its name, and the function stays the
same bit for bit until the layer is trained. `replace` swaps a model's own attention for a block of the zoo and
keeps its projections.
"""

import logging
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
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
    register_notrace_module,
)
from timm.layers.cbam import CbamModule
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.eva import EvaAttention
from timm.models.regnet import RegStage
from torch import Tensor, nn

from vision_attn import Gate, Grid, Mixer, OnMap, OnTokens, create_block, create_layer
from vision_attn.zoo import block_class

_logger = logging.getLogger(__name__)
register_notrace_module(OnMap)  # torch.fx stops at a check of a shape: timm's tracers take the layer as a whole
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
CHAINS = (nn.Sequential, RegStage)  # run all of their children in turn: one of ours would be run as if it were theirs
STEMS = ("act", "bn", "conv", "norm", "stem")  # how timm's models name what precedes the first stage


class Report(NamedTuple):
    """What `replace` did, as names of parameters and buffers."""

    model: nn.Module
    copied: tuple[str, ...]  # taken from the replaced attention
    new: tuple[str, ...]  # of the new block, at their own initialisation
    unused: tuple[str, ...]  # of the replaced attention, dropped

    def __str__(self) -> str:
        parts = (f"{kind}: {', '.join(names) or 'none'}" for kind, names in zip(self._fields[1:], self[1:]))
        return "\n".join(parts)


class RememberGrid(torch.autograd.Function):
    """The identity on tokens. Saves an empty tensor of the grid's shape, by which torch's gradient checkpointing
    notices that it recomputes on another grid."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid):
        return x.view_as(x), x.new_empty(*grid, 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, slope, _):
        return slope, None


class GridSource:
    """Knows the grid of the patch embedding's latest call, and hands it to the layers behind it."""

    def __init__(self, num_prefix_tokens: int):
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = None

    def record(self, patch_embed: nn.Module, args, output) -> None:
        """Forward hook of the patch embedding."""
        self.grid = Grid(*patch_embed.dynamic_feat_size(args[0].shape[-2:]))

    def give(self, mixer: nn.Module, args, kwargs):
        """Forward pre-hook of a mixer that stands where a ViT calls ``attn(x, attn_mask=…, is_causal=…)``."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError(f"attn_mask and is_causal: {type(mixer).__module__} takes neither, its pattern is its own")
        return self.with_grid(args[0]), {}

    def grid_of(self, x: Tensor) -> Grid:
        """The grid of tokens ``x``; ValueError if they are not those of the latest patch embedding."""
        if self.grid is None:
            raise ValueError("grid: the patch embedding has not run, so the grid of these tokens is unknown")
        if x.shape[1] != self.num_prefix_tokens + self.grid.size:
            raise ValueError(
                f"x has {x.shape[1]} tokens, but the latest patch embedding made {self.num_prefix_tokens} + "
                f"{self.grid.height}×{self.grid.width}: dropped patches, or a checkpointed backward of another size"
            )
        return self.grid

    def with_grid(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Tokens ``x`` and their grid, which a checkpointed backward must find again or torch's CheckpointError."""
        grid = self.grid_of(x)
        if x.requires_grad and not torch.compiler.is_compiling():
            x, _ = RememberGrid.apply(x, grid)
        return x, grid

    def __getstate__(self):
        return {**self.__dict__, "grid": None}  # a copy or a saved model waits for its own patch embedding


class Behind:
    """Forward hook that sends a module's output through its own child ``name``."""

    def __init__(self, name: str, channels_last: bool = False, source: GridSource | None = None):
        self.name, self.channels_last, self.source = name, channels_last, source

    def __call__(self, module: nn.Module, args, output: Tensor) -> Tensor:
        layer = getattr(module, self.name)
        if self.source is not None:
            return layer(*self.source.with_grid(output))
        if self.channels_last:
            return layer(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return layer(output)


def insert(
    model: nn.Module,
    block: str,
    at: str | Iterable[str] | None = None,
    *,
    init_gain: float = 0.0,
    input_size: tuple[int, int, int] | None = None,
    **options,
) -> nn.Module:
    """Adds ``block`` behind modules of ``model`` and returns the model.

    With ``init_gain=0`` the model stays the same function, bit for bit, until trained. The layer at ``layer3``
    becomes the parameters ``layer3.<last block>.attn_<block>.*``; all others keep their names. The model is run
    once on zeros, in eval mode, to learn the shapes.

    Args:
        block: one of `vision_attn.list_blocks`.
        at: names of modules, with wildcards that do not cross dots ("layer3.*"), or several; None: after every
            stage of a convolutional network that timm lists in ``feature_info``, every block of a ViT. A gate leaves
            out the last of several blocks where a class token is read: it changes patch tokens, and nothing would
            hear them.
        init_gain: 0 starts as identity, 1 as the block was published.
        input_size: (channels, height, width) of an image the model takes; None: what the model says.
        options: of the block.

    Raises:
        ValueError: ``at`` matches nothing (what could match is listed) or something that does not give feature maps or
            tokens; a block of this name is already there; an option is out of range.
    """
    could = _stages(model)
    if at is None and issubclass(block_class(block), Gate) and getattr(model, "global_pool", None) == "token":
        could = could[:-1] or could
    found = _resolve(model, at, could, dict(model.named_modules()))
    names = list(dict.fromkeys(_last(model, name) for name in found))  # "layer3" and "layer3.1" may be the same place
    size = input_size or _input_size(model)
    shapes = _probe(model, names, size)
    child, like, ready = f"attn_{block}", _like(model), []
    for name in names:
        target, shape = model.get_submodule(name), shapes[name]
        if hasattr(target, child):
            raise ValueError(f"at={at!r}: {name} already has a {block}")
        if isinstance(target, nn.ModuleDict):
            raise ValueError(
                f"at={at!r}: {name} runs all its children, so it can't hold a layer; try the module behind it"
            )
        if len(shape) == 3:
            source = _grid_source(model)
            grid = Grid(*model.patch_embed.dynamic_feat_size(size[1:]))
            if shape[1] != source.num_prefix_tokens + grid.size:
                raise ValueError(
                    f"at={at!r}: {name} gives {shape[1]} tokens, but a block of this ViT must give "
                    f"{source.num_prefix_tokens} + {grid.height}×{grid.width}"
                )
            layer = OnTokens(create_block(block, shape[-1], **options, **like), init_gain)
            ready.append((target, layer, Behind(child, source=source)))
        else:
            channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            layer = create_layer(block, shape[-1 if channels_last else 1], init_gain=init_gain, **options, **like)
            ready.append((target, layer, Behind(child, channels_last)))
    for target, layer, behind in ready:  # all of them or, where one can't be made, none
        target.add_module(child, layer.train(model.training))
        target.register_forward_hook(behind)
    return model


def replace(model: nn.Module, block: str, at: str | Iterable[str] | None = None, **options) -> Report:
    """Swaps attention of ``model`` for ``block``, in place, and reports what became of the parameters.

    Self-attention of ViT, DeiT and EVA gives way to a mixer that takes over its heads, dropouts, qkv and proj;
    squeeze-and-excite layers of convolutional networks to any block as a layer.

    Args:
        block: one of `vision_attn.list_blocks`.
        at: names, with wildcards that do not cross dots, of attention modules or of modules that hold them
            ("blocks.*.attn", "blocks.[6-9]"), or several; None: all.
        options: of the block.

    Returns:
        The model and the names of copied, new and unused parameters.

    Raises:
        ValueError: there is no attention that can be replaced, ``at`` matches none (what could match is listed), or a
            gate is to stand for self-attention.
    """
    able = {n: m for n, m in model.named_modules() if isinstance(m, TOKEN_ATTENTION + MAP_ATTENTION)}
    if not able:
        raise ValueError(
            f"model={type(model).__name__}: has no attention that can be replaced, of ViT, DeiT or EVA or by "
            "squeeze-and-excite; insert adds a block to it"
        )
    names = _resolve(model, at, list(able), able, inside=True)
    like, done = _like(model), []
    shapes = _probe(model, [name for name in names if isinstance(able[name], MAP_ATTENTION)])
    layers = {name: _layer_like(able[name], block, shapes.get(name), {**options, **like}) for name in names}
    for name, new in layers.items():
        if isinstance(able[name], TOKEN_ATTENTION):
            new.register_forward_pre_hook(_grid_source(model).give, with_kwargs=True)
        copied, unused = _take_over(new, able[name])
        if getattr(model, "rope", None) is not None:
            unused.append("rope")  # rotary positions arrive from outside, and a mixer has no use for them
        model.set_submodule(name, new.train(model.training))
        fresh = [key for key in new.state_dict() if key not in copied]
        done.append([[f"{name}.{key}" for key in keys] for keys in (copied, fresh, unused)])
    report = Report(model, *(tuple(sum(part, [])) for part in zip(*done)))
    _logger.info("replaced %d attentions by %s\n%s", len(names), block, report)
    return report


def _layer_like(old: nn.Module, block: str, shape, options: dict) -> nn.Module:
    """What takes the place of ``old``: a layer of its channels, or a mixer of its width, heads, biases and dropouts."""
    if isinstance(old, MAP_ATTENTION):
        return create_layer(block, shape[1], **options)
    if not issubclass(block_class(block), Mixer):
        raise ValueError(f"block={block!r}: is a gate, it can't stand for self-attention; insert adds it behind one")
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


def _resolve(model, at, could: list[str], among: Iterable[str], inside: bool = False) -> list[str]:
    """Names in ``among`` that ``at`` matches (or, ``inside``, that lie within a match), in the model's order."""
    patterns = could if at is None else [at] if isinstance(at, str) else list(at)
    listed = ", ".join(could) or "nothing: this model lists none"
    if not patterns:
        raise ValueError(f"at={at!r}: nowhere to go in {type(model).__name__}; what could match: {listed}")
    found = []
    for pattern in patterns:
        hits = [name for name in among if name and _matches(pattern, name, inside)]
        if not hits:
            raise ValueError(f"at={pattern!r}: matches no module of {type(model).__name__}; what could match: {listed}")
        found += hits
    return [name for name in among if name in found]


def _matches(pattern: str, name: str, inside: bool) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    if len(wanted) > len(parts) or (len(wanted) < len(parts) and not inside):
        return False
    return all(fnmatchcase(part, want) for part, want in zip(parts, wanted))


def _stages(model: nn.Module) -> list[str]:
    """The stages (or ViT blocks) that a timm model lists as its features."""
    names, modules = [info["module"] for info in getattr(model, "feature_info", ())], dict(model.named_modules())
    return [n for n in names if n and n in modules and not n.startswith(STEMS)]  # some models list what they don't have


def _last(model: nn.Module, name: str) -> str:
    """The module whose output is that of ``name``: hosts may run the parts of a chain without calling it."""
    module = model.get_submodule(name)
    while isinstance(module, CHAINS) and len(module._modules):
        child = next(reversed(module._modules))
        name, module = f"{name}.{child}", module.get_submodule(child)
    return name


def _probe(model: nn.Module, names: list[str], size: tuple[int, int, int] | None = None) -> dict[str, torch.Size]:
    """Shapes of what the named modules give for one image of zeros, (channels, height, width) = ``size``."""
    if not names:
        return {}
    shapes, was_training = {}, {module: module.training for module in model.modules()}

    def keep(name: str) -> Callable:
        return lambda module, args, output: shapes.__setitem__(name, getattr(output, "shape", ()))

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *(size or _input_size(model)), **_like(model)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    for name in names:
        if len(shapes.get(name, ())) not in (3, 4):
            raise ValueError(f"at={name!r}: gives neither a feature map (B, C, H, W) nor tokens (B, N, C)")
    return shapes


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    strict = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = strict or tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    return channels, *size


def _grid_source(model: nn.Module) -> GridSource:
    """The model's one source of grids, made at first use."""
    patch_embed = getattr(model, "patch_embed", None)
    if not hasattr(patch_embed, "dynamic_feat_size"):
        raise ValueError(f"model={type(model).__name__}: gives tokens, but has no patch_embed that tells their grid")
    for hook in patch_embed._forward_hooks.values():
        if isinstance(getattr(hook, "__self__", None), GridSource):
            return hook.__self__
    source = GridSource(getattr(model, "num_prefix_tokens", 0))
    patch_embed.register_forward_hook(source.record)
    return source


def _like(model: nn.Module) -> dict:
    parameter = next(model.parameters())
    return dict(device=parameter.device, dtype=parameter.dtype)
