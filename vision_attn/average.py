"""State that follows what a module saw, once per optimizer step.

A training step may run forward many times (gradient accumulation, checkpointing). So ``forward`` only notes what it
saw; the notes are folded in when the optimizer that trains the module has stepped, averaged over all processes.
"""

import itertools
import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_live: "weakref.WeakSet[StepAverage]" = weakref.WeakSet()
_born = itertools.count()


class StepAverage(nn.Module):
    """A module that notes a tensor in ``forward`` and folds the mean of its notes in after each optimizer step.

    Args:
        beside: a module trained along with it; the optimizer that holds its parameters is the one to follow.
    """

    def __init__(self, beside: nn.Module):
        super().__init__()
        self._beside = (beside,)  # in a tuple, so that it is not registered a second time
        self._start()

    def _start(self):
        self._notes, self._order = None, next(_born)
        _live.add(self)

    def fold(self, seen: Tensor) -> None:
        """Takes the mean of all notes since the last optimizer step into the buffers."""
        raise NotImplementedError

    def note(self, seen: Tensor) -> None:
        """Remembers ``seen`` for the coming step. Does nothing in eval mode or without gradients."""
        if self.training and torch.is_grad_enabled():
            note = (seen.detach(), torch.ones((), device=seen.device))  # a tensor counts: an int would recompile
            self._notes = note if self._notes is None else tuple(a + b for a, b in zip(self._notes, note))

    def settle(self) -> None:
        """Folds the notes in, averaged over processes. Called after every optimizer step; no notes, no change."""
        if self._notes is None:
            return
        (seen, times), self._notes = self._notes, None
        if dist.is_available() and dist.is_initialized():
            seen, times = seen.clone(), times.clone()
            dist.all_reduce(seen)
            dist.all_reduce(times)
        before = [buffer.clone() for buffer in self.buffers()]
        self.fold(seen / times)
        # after an overflow the optimizer skips the step and these notes are worth nothing; to ask would be to wait
        sound = seen.isfinite().all()
        with torch.no_grad():
            for buffer, old in zip(self.buffers(), before):
                buffer.copy_(torch.where(sound, buffer, old))

    def __getstate__(self):
        return {**self.__dict__, "_notes": None}  # a copy starts without notes

    def __setstate__(self, state):
        super().__setstate__(state)
        self._start()  # a deepcopy or an unpickled module is a live one too


def _after_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if not _live:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in sorted(_live, key=lambda m: m._order):  # the same order in every process
        if any(id(p) in held for p in module._beside[0].parameters()):
            module.settle()


register_optimizer_step_post_hook(_after_step)
