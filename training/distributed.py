"""One process or many: the same calls. Under torchrun every process runs the same script; without it there is one.

Gradients are averaged over the processes (DDP), or weights, gradients and optimizer state are spread over them as well
(FSDP2). Checkpoints hold whole tensors in both cases, so any number of processes can go on from them.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Processes:
    """Those of this run. `rank` is this one's number among `size`; `device` is what it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Each value, summed over the processes."""
        values = list(values)
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """The value of every process, in order; any plain object."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value):
        """The main process's value; any plain object."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def of_main(self, call: Callable):
        """What call() gives in the main process, which alone calls it; what it raises is raised in all."""
        result = error = None
        if self.main:
            try:
                result = call()
            except (ValueError, OSError) as problem:
                error = problem
        result, error = self.from_main((result, error))
        if error:
            raise error
        return result

    def main_first(self, call: Callable):
        """What call() gives here, after it has given something in the main process: a download, say."""
        done = []
        self.of_main(lambda: done.append(call()))
        return done[0] if done else call()

    def in_step(self, items: Iterable, stop: Callable[[], bool] = lambda: False) -> Iterator:
        """The items of this process, then None for as long as another process has some left; for all processes until
        stop() is true in one."""
        iterator = iter(items)
        while True:
            item = next(iterator, None)
            left, stopped = self.sum([item is not None, stop()])
            if stopped or not left:
                return
            yield item

    def share_buffers(self, *models: nn.Module | None):
        """Give every process the main one's buffers, such as the running means of BatchNorm."""
        if self.size > 1:
            for buffer in (buffer for model in models if model is not None for buffer in model.buffers()):
                dist.broadcast(buffer.data, src=0)


def start(device: torch.device) -> Processes:
    """Join the processes torchrun started, one CUDA device each; alone without torchrun."""
    if "LOCAL_RANK" not in os.environ:
        return Processes(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(device, dist.get_rank(), dist.get_world_size())


def stop():
    """Where torchrun started this process: wait for the others, then end it, all well. Its group is not taken apart:
    that can abort a process whose work is done."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def shard(model: nn.Module, processes: Processes):
    """Spread the model's parameters over the processes (FSDP2): a unit for each block of a stage, and for the rest."""
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    for stage in model.children():
        if isinstance(stage, (nn.Sequential, nn.ModuleList)):
            for block in stage:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def average_gradients(objective: nn.Module, processes: Processes) -> nn.Module:
    """`objective`, its gradients averaged over the processes (DDP); as it is where there is one process."""
    if processes.size == 1:
        return objective
    return DistributedDataParallel(objective, [processes.device] if processes.device.type == "cuda" else None)


def synchronized(objective: nn.Module, last: bool):
    """Context of a forward and backward pass; gradients meet those of other processes in a step's last pass only."""
    if isinstance(objective, DistributedDataParallel):
        return nullcontext() if last else objective.no_sync()
    if isinstance(objective.model, FSDPModule):
        objective.model.set_requires_gradient_sync(last)
    return nullcontext()


def whole(tree):
    """`tree` with every tensor in one piece on the CPU. Every process must call it."""
    tree = tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), tree)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), tree)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]):
    """Load whole tensors into a model, spread over processes or not."""
    own = model.state_dict()
    model.load_state_dict({name: _spread_like(value, own.get(name)) for name, value in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict):
    """Load whole tensors into an optimizer, its parameters spread over processes or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {key: _spread_like(value, parameters[number]) for key, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _spread_like(value, reference):
    """A whole tensor in the pieces of `reference`, where that is in pieces and as large."""
    if isinstance(reference, DTensor) and isinstance(value, torch.Tensor) and value.shape == reference.shape:
        value = value.to(reference.device)
        return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
    return value
