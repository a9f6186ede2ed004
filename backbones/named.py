"""Registers ``<stock name>_<block>`` with timm: the stock model, its weights, and a block of the zoo added."""

import dataclasses
import sys
from collections.abc import Callable

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from vision_attn.zoo import follow_names


def register_stock(
    stock: str, add: Callable, module: str, feature_cfg: dict, filter_weights: Callable | None = None
) -> None:
    """Registers ``stock`` with every block there is, and with those that get a name later.

    Args:
        stock: a name that timm knows.
        add: ``add(model, block, attn_at, **attn_kwargs)`` puts the block into a fresh stock model and returns it.
        module: name of the module that the models are listed under.
        feature_cfg: of timm's ``features_only``.
        filter_weights: timm's filter of the stock weights, ``filter_weights(state_dict, model)``.
    """
    cfgs = get_arch_pretrained_cfgs(stock)
    default = timm.get_pretrained_cfg(stock).tag
    # npz files are read by the stock class, past the filter below: leave the same weights' safetensors
    tags = {c.tag: dataclasses.replace(c, custom_load=False, url="") if c.custom_load else c for c in cfgs.values()}

    def register(block: str) -> None:
        name = f"{stock}_{block}"
        marked = {f"{name}.{tag}{'*' if tag == default else ''}": cfg for tag, cfg in tags.items()}
        home = sys.modules[module]
        home.default_cfgs = {**getattr(home, "default_cfgs", {}), **generate_default_cfgs(marked)}
        register_model(_entrypoint(name, stock, block, add, module, feature_cfg, filter_weights))

    follow_names(register)


def _entrypoint(name, stock, block, add, module, feature_cfg, filter_weights):
    def create(pretrained=False, **kwargs):
        plain = {}

        def build(attn_kwargs=None, attn_at=None, **kwargs):
            if not isinstance(attn_kwargs, dict | None):
                raise ValueError(f"attn_kwargs={attn_kwargs!r}: must be a dict of the block's options")
            model = model_entrypoint(stock)(pretrained=False, **kwargs)
            plain.update({key: value.shape for key, value in model.state_dict().items()})
            try:
                return add(model, block, attn_at, **(attn_kwargs or {}))
            except ValueError as error:
                if str(error).startswith("at="):  # which is called attn_at here
                    raise ValueError(f"attn_{error}") from error
                raise

        def weights(state_dict: dict, model: nn.Module) -> dict:
            return _with_own(filter_weights(state_dict, model) if filter_weights else state_dict, model, plain)

        return build_model_with_cfg(
            build, name, pretrained, feature_cfg=dict(feature_cfg), pretrained_filter_fn=weights, **kwargs
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = (
        f"``{stock}`` with ``{block}``. Arguments: timm's, ``attn_kwargs`` (options of the block) and "
        "``attn_at`` (where it goes)."
    )
    return create


def _with_own(weights: dict[str, Tensor], model: nn.Module, plain: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Stock weights made to load strictly: completed by what the block adds, without what it drops.

    Only that: any other weight that is missing, left over or of another shape stays an error.

    Args:
        weights: of the stock model, or of one with the block.
        model: with the block.
        plain: shapes of the stock model's weights, before the block was added.
    """
    ours = model.state_dict()
    added = {key: value for key, value in ours.items() if plain.get(key) != value.shape}
    dropped = {key for key, shape in plain.items() if key not in ours or key in added}
    kept = {k: v for k, v in weights.items() if k not in dropped or (k in added and v.shape == added[k].shape)}
    return added | kept
