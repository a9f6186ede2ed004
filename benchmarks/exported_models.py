"""Speed of whole models in onnxruntime beside torch, eager and compiled: plain and with every block, all in one run.

    python benchmarks/exported_models.py
    python benchmarks/exported_models.py --models '[resnet50]' --blocks '[cbam, criss_cross]' --batch 8 --threads 4
    python benchmarks/exported_models.py --resume results/FILE.csv

Times of a forward pass are minima over rounds in which eager, compiled and onnxruntime take turns: of one thread its
processor time, which a busy machine changes little, of several the time that passes. Machines are noisy all the same:
trust the ratios. Compiled is torch.compile as it comes, for one shape and with an empty cache; the file is that of
backbones.export_onnx for one height and width. Seconds until the first answer, to compile, and to export, check and
load, are beside: those pass slower on a busy machine. A model that can't be compiled or exported says so in its row.
Writes a CSV, anew after each model: a stopped run goes on with --resume.
"""

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import onnxruntime
import timm
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

import backbones
from training.results import read, write
from vision_attn import list_blocks

COLUMNS = "model", "parameters", "eager ms", "compiled ms", "onnxruntime ms", "eager / compiled", "eager / onnxruntime"
COLUMNS += "compile s", "export s", "compile: largest difference", "export: largest difference"


def create(name: str, image_size: int) -> nn.Module:
    """A model to evaluate. None of its tensors is all zero or one: no graph can leave out what a gain of zero
    multiplies, and export_onnx needs no further copy to check."""
    model = timm.create_model(name).eval()
    if hasattr(model, "set_input_size"):  # of a ViT
        model.set_input_size(image_size)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.unique().numel() == 1:
                tensor += torch.empty_like(tensor).uniform_(0.01, 0.1)
    return model


def compiled(model: nn.Module, images: Tensor, threads: int) -> tuple[Callable, float]:
    """A call of the compiled model, and its largest difference."""
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = threads
    call = torch.compile(model, dynamic=False)
    with fresh_cache(), torch.no_grad():
        return lambda: call(images), (call(images) - model(images)).abs().max().item()


def exported(model: nn.Module, images: Tensor, threads: int) -> tuple[Callable, float]:
    """A call of the exported model, and its largest difference at the batches that export_onnx tries."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        errors = backbones.export_onnx(model, path, tuple(images.shape[2:]), dynamic=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"image": images.numpy()}
    return lambda: session.run(None, inputs), max(errors.values())


ROUTES = {"compiled": ("compile", compiled), "onnxruntime": ("export", exported)}


def measure(name: str, images: Tensor, rounds: int, threads: int) -> dict:
    """One row of the table."""
    model = create(name, images.shape[-1])
    row = {"model": name, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    calls = {"eager": lambda: model(images)}
    for route, (verb, prepare) in ROUTES.items():
        start = time.perf_counter()
        try:
            calls[route], error = prepare(model, images, threads)
            row |= {f"{verb} s": f"{time.perf_counter() - start:.1f}", f"{verb}: largest difference": f"{error:.1e}"}
        except Exception as failure:  # compilers and exporters raise anything
            row[f"{route} ms"] = f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:80]}"
    best, clock = dict.fromkeys(calls, math.inf), time.thread_time if threads == 1 else time.perf_counter
    with torch.no_grad():
        for turn, route in itertools.product(range(rounds + 1), calls):
            start = clock()
            calls[route]()
            if turn:
                best[route] = min(best[route], 1e3 * (clock() - start))
    row |= {f"{route} ms": f"{ms:.2f}" for route, ms in best.items()}
    row |= {f"eager / {route}": f"{best['eager'] / ms:.2f}" for route, ms in best.items()}
    return {column: row.get(column, "not run") for column in COLUMNS}


def benchmark(
    models: tuple[str, ...] = ("resnet18", "vit_tiny_patch16_224", "resnet50"),
    blocks: list[str] | None = None,
    batch: int = 1,
    image_size: int = 224,
    rounds: int = 10,
    threads: int = 1,
    path: str | None = None,
    resume: str | None = None,
) -> None:
    """Writes a CSV of times.

    Args:
        models: names that timm knows; each is measured plain and with each block.
        blocks: names; null: all.
        batch: images of a call.
        image_size: height and width.
        rounds: timed calls of each kind, after one that is not counted.
        threads: of torch, its compiler and onnxruntime.
        path: of the CSV; null names it by threads, torch version and date under results/.
        resume: instead, the CSV of a stopped run, to measure the models it has no row of.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size)
    blocks = list_blocks() if blocks is None else blocks
    names = [name for model in models for name in (model, *(f"{model}_{block}" for block in blocks))]
    if unknown := [name for name in names if not timm.is_model(name)]:
        raise ValueError(f"timm knows no {', '.join(unknown)}")
    rows, path = [], resume or path
    if resume:
        rows = read(resume)
    for name in tqdm([name for name in names if name not in {row["model"] for row in rows}], unit=" models"):
        rows.append(measure(name, images, rounds, threads))
        with redirect_stdout(None):  # the path, each time
            path = write(path, "onnx-speed", rows)
    print(path)


if __name__ == "__main__":
    sys.exit(auto_cli(benchmark))
