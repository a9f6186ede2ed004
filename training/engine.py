"""The steps of one epoch, one pass of evaluation; nothing about models, data or files."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from training.distributed import Processes, synchronized
from training.loader import BadImages, Batches
from training.seeding import seed_all


class Objective(nn.Module):
    """A model and its loss as one module, which processes can share: forward(images, targets) is the mean loss.

    Args:
        loss: function (model, images, targets) → scalar. What it draws depends on (seed, step, pass, rank) alone.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model, images, targets)


@dataclass
class State:
    """What training changes. `objective` is the model with its loss; `frozen` are parts of it that stay in evaluation
    mode; `scaler` scales losses in float16; `step` counts optimizer steps of the whole run."""

    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None = None
    frozen: list[nn.Module] = field(default_factory=list)
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    step: int = 0

    @property
    def evaluated(self) -> nn.Module:
        """The moving average where there is one, else the model."""
        return self.ema.module if self.ema else self.model

    @property
    def lr(self) -> float:
        """Learning rate of the step to come, before factors of single groups."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)


class NotFinite(FloatingPointError):
    """A loss or a gradient that is not finite, before it touches the weights."""


class Step(NamedTuple):
    """A step that was done: its mean loss over all processes, whether any was asked to stop, this one's faults, and
    the number of faults of all."""

    loss: float
    stop: bool
    faults: list[str]
    num_faults: int


def steps(
    state: State,
    batches: Batches,
    epoch: int,
    start: int = 0,
    seed: int = 0,
    accumulate: int = 1,
    clip_grad: float | None = None,
    autocast=nullcontext(),
    processes: Processes = Processes(torch.device("cpu")),
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train for the steps of one epoch, from step number `start` of it on.

    Args:
        accumulate: batches of one optimizer step; their gradients are averaged.
        clip_grad: largest gradient norm.
        autocast: context of the forward passes.
        asked_to_stop: asked after each step; the answer of any process counts for all.

    Raises:
        NotFinite: if the loss or the gradient of a step is not finite, before the weights change. Where losses are
            scaled, a step whose gradient is not is left out instead, for as long as the scale is not below 1.
    """
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    state.objective.train()
    for module in state.frozen:
        module.eval()
    for number, (images, targets, new_faults) in enumerate(batches.epoch(epoch, start * accumulate)):
        pass_ = number % accumulate
        if pass_ == 0:
            state.optimizer.zero_grad()
            loss, faults = 0.0, []
        faults += new_faults
        seed_all("forward", seed, state.step, pass_, processes.rank)
        with synchronized(state.objective, last=pass_ + 1 == accumulate):
            with autocast:
                part = state.objective(images, targets) / accumulate
            state.scaler.scale(part).backward()
        loss = loss + part.detach()
        if pass_ + 1 < accumulate:
            continue

        if scaled := state.scaler.is_enabled():
            state.scaler.unscale_(state.optimizer)
        norm = _norm(parameters)
        both = torch.stack([loss.double(), norm.double()]).tolist()  # the step's only wait for the device
        total, stop, num_faults = processes.sum([both[0], asked_to_stop(), len(faults)])
        values = {"loss": total / processes.size, "gradient norm": both[1]}
        if scaled and state.scaler.get_scale() >= 1:
            del values["gradient norm"]  # the scaler leaves the step out
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"the {name} is {value} at step {state.step + 1}, epoch {epoch + 1}")
        if clip_grad is not None:
            clip_grads_with_norm_(parameters, clip_grad, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)
        state.scheduler.step_update(state.step)
        yield Step(values["loss"], stop > 0, faults, int(num_faults))


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of the gradient of all parameters, those other processes hold included."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def mean_over(
    model: nn.Module,
    batches: Batches,
    measure: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]],
    autocast=nullcontext(),
    processes: Processes = Processes(torch.device("cpu")),
    together: bool = False,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over all images of all processes, each image once; None if any process was asked to stop.

    Args:
        measure: function (model, images, targets) → means over a batch, by name.
        together: every process does as many forward passes as the others, as models spread over them need.

    Raises:
        BadImages: if an image can't be read, or the images are not as many as said.
        FloatingPointError: if a mean is not finite.
    """
    model.eval()
    sums, count, faults, batch = {}, 0, [], None
    passes = processes.in_step(batches.epoch(), asked_to_stop) if together else batches.epoch()
    with tqdm(total=batches.num_images, desc="evaluate", unit=" images", leave=False, disable=hidden(processes)) as bar:
        for new in passes:
            if asked_to_stop() and not together:
                break
            batch = new or batch or batches.blank()
            with autocast:
                values = measure(model, batch.images, batch.targets)
            if new:
                faults += batch.faults
                count += len(batch.images)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.double() * len(batch.images)
                bar.update(len(batch.images) * processes.size)
    sums = {name: value.item() for name, value in sums.items()}
    everyone = processes.gather((asked_to_stop(), faults, count, sums))
    if any(stop for stop, *_ in everyone):
        return None
    faults = [fault for _, some, *_ in everyone for fault in some]
    if faults:
        raise BadImages(f"{len(faults)} of the images to evaluate can't be read, the first is {faults[0]}")
    count = sum(count for *_, count, _ in everyone)
    if count != batches.num_images:
        raise BadImages(f"{batches.num_images} images to evaluate were announced, {count} were there")
    names = max((sums for *_, sums in everyone), key=len)  # a process without images has none
    means = {name: sum(sums.get(name, 0.0) for *_, sums in everyone) / count for name in names}
    for name, value in means.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value} on the images to evaluate")
    return means


def hidden(processes: Processes) -> bool | None:
    """For tqdm: only the main process shows a bar, and only on a terminal."""
    return None if processes.main else True
