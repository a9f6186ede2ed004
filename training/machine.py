"""What a run is made on: the hardware by name, and the memory it has taken."""

import platform
import resource
from pathlib import Path

import torch


def hardware(device: torch.device) -> str:
    """The name of the accelerator, or of the CPU with the threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
