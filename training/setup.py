"""What every run is set up from: device, model, optimizer and schedule. Bad input raises ValueError that names it."""

import difflib
import fnmatch
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm

from training.config import RunConfig
from training.distributed import Processes, average_gradients, shard
from training.engine import Objective, State


def find_device(name: str) -> torch.device:
    """`auto` is cuda if there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ValueError(f"device must be auto or a torch device that is there, got {name!r}: {reason}") from error
    return torch.device(name)


class Blocks(Protocol):
    """What training asks of the package that has the blocks; scripts hand it in."""

    def insert(self, model: nn.Module, block: str, at: str | list[str] | None, **options) -> nn.Module:
        """Adds a block to a model."""

    def new_parameters(self, model: nn.Module) -> set[str]:
        """Names of the parameters that blocks brought to a model."""


def import_modules(names: Iterable[str]):
    """Import modules by name, also of the folder one is in; ValueError for one that is not there."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f"imports {name}: {first_line(error)}") from error


def create_model(
    name: str, args: dict, pretrained: bool = False, insert: dict | None = None, blocks: Blocks | None = None
) -> nn.Module:
    """timm's model of that name; ValueError with what is wrong, and with similar names for one timm does not know.

    Args:
        insert: what is added to it, {block, at, options}, by `blocks`.
    """
    model = _stock(name, args, pretrained)
    if insert is None:
        return model
    try:
        return blocks.insert(model, insert["block"], insert["at"], **insert["options"])
    except (RuntimeError, TypeError, ValueError) as error:
        what = f"model.insert {insert['block']}, model.at {insert['at']}, model.attn_args {insert['options']}"
        raise ValueError(f"{what}, into {name}: {first_line(error)}") from error


def _stock(name: str, args: dict, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:  # the last of weights out of reach
        similar = [] if timm.is_model(name) else difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise ValueError(f"model {name} {args}: {first_line(error)}{hint}") from error


def restore_model(
    path: str | Path, saved: dict, blocks: Blocks, args: dict | None = None, attn_args: dict | None = None
) -> nn.Module:
    """The model of a checkpoint, with the weights that its metrics were measured on. Imports what it names.

    Args:
        path: of the checkpoint, for messages.
        args, attn_args: of timm.create_model and of the inserted block, beside or instead of those of the checkpoint.

    Raises:
        ValueError: if there is no such model, or the weights are of another.
    """
    name, args, insert = saved["model"], saved["model_args"] | (args or {}), saved["insert"]
    if insert and attn_args:
        insert = insert | {"options": insert["options"] | attn_args}
    import_modules(saved["imports"])
    model = create_model(name, args, insert=insert, blocks=blocks)
    try:
        model.load_state_dict(saved["ema"] or saved["state_dict"])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"the weights of {path} do not fit {name} {args}: {reason}") from error
    return model


def create_state(
    config: RunConfig,
    model: nn.Module,
    loss,
    steps_per_epoch: int,
    processes: Processes,
    blocks: Blocks,
    spread: bool = False,
) -> State:
    """A training state at step 0, its weights `spread` over the processes or not.

    Raises:
        ValueError: for an optimizer or an option of it that timm does not know; for names of parameters, or learning
            rates of new ones, that the model has not.
    """
    optim = config.optim
    frozen = freeze(model, optim.only) if optim.only else []
    new = blocks.new_parameters(model) if optim.new_lr_scale else set()
    if optim.new_lr_scale and not new:
        raise ValueError(f"optim.new_lr_scale is {optim.new_lr_scale}, but no block brought parameters to the model")
    ema = None
    if optim.ema is not None:  # one by one where weights in pieces stand beside whole buffers
        ema = ModelEmaV3(model, decay=optim.ema, use_warmup=True, foreach=not spread)
    for network in (model, ema.module) if ema else (model,):
        if spread:
            shard(network, processes)
        if config.compile:
            network.compile()
    objective = Objective(model, loss)
    groups = parameter_groups(config, model, new)  # of parameters as they are now, spread or not
    if not groups:
        raise ValueError(f"optim.only {optim.only}: leaves nothing to train")
    try:
        optimizer = create_optimizer_v2(
            groups, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum, **optim.args
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"optim.name {optim.name}, optim.args {optim.args}: {first_line(error)}") from error
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=config.epochs,
        warmup_epochs=optim.warmup_epochs,
        warmup_lr=optim.lr / 100,
        min_lr=optim.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    scheduler.step_update(0)
    objective = objective if spread else average_gradients(objective, processes)
    scaler = GradScaler(processes.device.type, enabled=config.fp16)
    return State(model, objective, optimizer, scheduler, ema, frozen, scaler)


def freeze(model: nn.Module, only: str | list[str]) -> list[nn.Module]:
    """Freeze the parameters that `only` does not name; gives the BatchNorm layers among what is frozen.

    Raises:
        ValueError: if it names no parameter.
    """
    patterns = [only] if isinstance(only, str) else only
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(parameters, pattern):
            near = difflib.get_close_matches(pattern, parameters, 3, cutoff=0.3) or list(parameters)[-3:]
            raise ValueError(f"optim.only {pattern}: is no parameter's name; there are {', '.join(near)} and others")

    def named(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    for name, parameter in parameters.items():
        parameter.requires_grad_(parameter.requires_grad and named(name))
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return [module for name, module in norms.items() if not named(f"{name}.weight")]


def parameter_groups(config: RunConfig, model: nn.Module, new: set[str]) -> list[dict]:
    """timm's groups of what is trained, by weight decay and, with layer_decay, by layer; `new` parameters in groups of
    their own, whose learning rate is new_lr_scale times as high."""
    optim, spared = config.optim, getattr(model, "no_weight_decay", set)()
    if optim.layer_decay is None:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=spared)
    else:
        decay = dict(weight_decay=optim.weight_decay, layer_decay=optim.layer_decay)
        groups = param_groups_layer_decay(model, no_weight_decay_list=spared, **decay)
    if not new:
        return groups
    brought = {parameter for name, parameter in model.named_parameters() if name in new}
    split = []
    for group in groups:
        for ours, scale in ((False, 1.0), (True, optim.new_lr_scale)):
            params = [parameter for parameter in group["params"] if (parameter in brought) == ours]
            split += [group | dict(params=params, lr_scale=group.get("lr_scale", 1.0) * scale)] if params else []
    return split


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
