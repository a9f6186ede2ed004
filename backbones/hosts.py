"""What a model that exists already says of itself: where a block can go, and what it would meet there."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from timm.models.regnet import RegStage
from torch import nn

CHAINS = (nn.Sequential, RegStage)  # run all of their children in turn: one of ours would be run as if it were theirs
STEMS = ("act", "bn", "conv", "norm", "stem")  # how timm's models name what precedes the first stage


def resolve(model, at, could: list[str], among: Iterable[str], inside: bool = False) -> list[str]:
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


def stages(model: nn.Module) -> list[str]:
    """The stages (or ViT blocks) that a timm model lists as its features."""
    names, modules = [info["module"] for info in getattr(model, "feature_info", ())], dict(model.named_modules())
    return [n for n in names if n and n in modules and not n.startswith(STEMS)]  # some models list what they don't have


def last_of(model: nn.Module, name: str) -> str:
    """The module whose output is that of ``name``: hosts may run the parts of a chain without calling it."""
    module = model.get_submodule(name)
    while isinstance(module, CHAINS) and len(module._modules):
        child = next(reversed(module._modules))
        name, module = f"{name}.{child}", module.get_submodule(child)
    return name


def probe(model: nn.Module, names: list[str], size: tuple[int, int, int] | None = None) -> dict[str, torch.Size]:
    """Shapes of what the named modules give for one image of zeros, (channels, height, width) = ``size``."""
    if not names:
        return {}
    shapes, was_training = {}, {module: module.training for module in model.modules()}

    def keep(name: str) -> Callable:
        return lambda module, args, output: shapes.__setitem__(name, getattr(output, "shape", ()))

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *(size or input_size_of(model)), **like(model)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    for name in names:
        if len(shapes.get(name, ())) not in (3, 4):
            raise ValueError(f"at={name!r}: gives neither a feature map (B, C, H, W) nor tokens (B, N, C)")
    return shapes


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    strict = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = strict or tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    return channels, *size


def like(model: nn.Module) -> dict:
    parameter = next(model.parameters())
    return dict(device=parameter.device, dtype=parameter.dtype)
