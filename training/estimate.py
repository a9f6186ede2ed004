"""A dry run: what an epoch would take, from a few steps of it. Nothing is written."""

import dataclasses
import time

import torch
import yaml

from training.machine import peak_memory

STEPS = 4  # the first is told apart: it also starts the loader and fills caches


def estimate(training) -> int:
    """Print the configuration of a `Training`, its parameters, and the time and memory of an epoch; spoils its weights.

    Returns:
        The exit code.
    """
    cuda = training.processes.device.type == "cuda"
    training.say(yaml.safe_dump(dataclasses.asdict(training.config), sort_keys=False))
    training.introduce()
    training.stop.restore()  # nothing to save
    moments = [time.perf_counter()]
    for number, _ in enumerate(training.steps(), start=1):
        if cuda:
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        if number == STEPS:
            break
    first = each = moments[1] - moments[0]
    if len(moments) > 2:
        each = (moments[-1] - moments[1]) / (len(moments) - 2)
    seconds = each * training.steps_per_epoch + _evaluation(training)
    training.say(
        f"{training.steps_per_epoch} steps an epoch, {each:.3g} s each after {first:.3g} s for the first: about "
        f"{duration(seconds)} an epoch with evaluation, {duration(seconds * training.config.epochs)} in all; at most "
        f"{peak_memory(training.processes.device) / 2**20:.0f} MiB {'of the GPU' if cuda else 'of this process'}"
    )
    return 0


def _evaluation(training) -> float:
    """Seconds that evaluating all images would take, from one batch; of this process's share of them."""
    model, batches = training.state.evaluated.eval(), training.val_batches
    start = time.perf_counter()
    with torch.no_grad(), training.autocast:
        batch = next(iter(batches.epoch()), None) or batches.blank()
        training.task.measure(model, batch.images, batch.targets)
    return (time.perf_counter() - start) / len(batch.images) * batches.num_images / training.processes.size


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
