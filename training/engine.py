"""One epoch of training, one pass of evaluation; nothing about models, data or files."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad
from tqdm import tqdm

from training.loader import Batches
from training.seeding import seed_all


@dataclass
class State:
    """What training changes. `step` counts optimizer steps since the start of the run."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None = None
    step: int = 0

    @property
    def evaluated(self) -> torch.nn.Module:
        """The moving average where there is one, else the model."""
        return self.ema.module if self.ema else self.model


def train_one_epoch(
    state: State,
    batches: Batches,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    epoch: int,
    seed: int = 0,
    accumulate: int = 1,
    clip_grad: float | None = None,
    autocast=nullcontext(),
) -> float:
    """Train for the batches of one epoch; returns the mean loss.

    Args:
        loss_fn: mean loss, a scalar, of one batch (images (B, C, H, W), targets (B,)). What it draws depends on
            (seed, step, pass) alone.
        accumulate: batches of one optimizer step; their gradients are averaged.
        clip_grad: largest gradient norm.
        autocast: context of the forward passes.

    Raises:
        FloatingPointError: if the loss is not finite, before the step that would spoil the weights.
    """
    state.model.train()
    losses = AverageMeter()
    with tqdm(total=batches.num_images, desc=f"epoch {epoch + 1}", unit=" images", leave=False, disable=None) as bar:
        step_loss = 0.0
        for i, (images, targets) in enumerate(batches.epoch(epoch)):
            pass_ = i % accumulate
            if pass_ == 0:
                state.optimizer.zero_grad()
                step_loss = 0.0
            seed_all("forward", seed, state.step, pass_)
            with autocast:
                loss = loss_fn(images, targets) / accumulate
            loss.backward()
            step_loss += loss.detach()
            bar.update(len(images))
            if pass_ + 1 < accumulate:
                continue

            step_loss = step_loss.item()
            if not math.isfinite(step_loss):
                raise FloatingPointError(f"the loss is {step_loss} at step {state.step + 1}, epoch {epoch + 1}")
            losses.update(step_loss)
            if clip_grad is not None:
                dispatch_clip_grad(state.model.parameters(), clip_grad)
            state.optimizer.step()
            state.step += 1
            if state.ema is not None:
                state.ema.update(state.model, step=state.step)
            bar.set_postfix(loss=f"{losses.avg:.3f}", lr=f"{current_lr(state):.2g}", refresh=False)
            state.scheduler.step_update(state.step)
    return losses.avg


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Batches, autocast=nullcontext()) -> dict[str, float]:
    """Mean cross-entropy and accuracy in percent over all batches: {'loss', 'top1', 'top5'}.

    With fewer than five classes top5 counts all of them.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    model.eval()
    meters = {"loss": AverageMeter(), "top1": AverageMeter(), "top5": AverageMeter()}
    with tqdm(total=batches.num_images or None, desc="evaluate", unit=" images", leave=False, disable=None) as bar:
        for images, targets in batches.epoch():
            with autocast:
                logits = model(images)
            logits = logits.float()
            values = [F.cross_entropy(logits, targets), *accuracy(logits, targets, topk=(1, 5))]
            for meter, value in zip(meters.values(), values):
                meter.update(value.item(), len(images))
            bar.update(len(images))
    if not math.isfinite(meters["loss"].avg):
        raise FloatingPointError(f"the loss is {meters['loss'].avg} on the validation images")
    return {name: meter.avg for name, meter in meters.items()}


def current_lr(state: State) -> float:
    """Learning rate of the step to come."""
    return state.optimizer.param_groups[0]["lr"]
