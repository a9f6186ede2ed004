"""What every run is set up from: device, model, optimizer and schedule. Bad input raises ValueError that names it."""

import difflib
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

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


def create_model(name: str, args: dict, pretrained: bool = False) -> torch.nn.Module:
    """timm's model of that name; ValueError with what is wrong, and with similar names for one timm does not know."""
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        similar = [] if timm.is_model(name) else difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise ValueError(f"model {name} {args}: {first_line(error)}{hint}") from error


def restore_model(path: str | Path, saved: dict, args: dict | None = None) -> torch.nn.Module:
    """The model of a checkpoint, with the weights that its metrics were measured on.

    Args:
        path: of the checkpoint, for messages.
        args: of timm.create_model, beside or instead of those of the checkpoint.

    Raises:
        ValueError: if there is no such model, or the weights are of another.
    """
    name, args = saved["model"], saved["model_args"] | (args or {})
    model = create_model(name, args)
    try:
        model.load_state_dict(saved["ema"] or saved["state_dict"])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"the weights of {path} do not fit {name} {args}: {reason}") from error
    return model


def create_state(
    config: RunConfig, model: torch.nn.Module, loss, steps_per_epoch: int, processes: Processes, spread: bool = False
) -> State:
    """A training state at step 0, its weights `spread` over the processes or not.

    Raises:
        ValueError: for an optimizer or an option of it that timm does not know.
    """
    optim = config.optim
    ema = None
    if optim.ema is not None:  # one by one where weights in pieces stand beside whole buffers
        ema = ModelEmaV3(model, decay=optim.ema, use_warmup=True, foreach=not spread)
    for network in (model, ema.module) if ema else (model,):
        if spread:
            shard(network, processes)
        if config.compile:
            network.compile()
    objective = Objective(model, loss)
    try:
        optimizer = create_optimizer_v2(
            model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum, **optim.args
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
    return State(model, objective if spread else average_gradients(objective, processes), optimizer, scheduler, ema)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
