"""What the training loop costs (beside a bare loop, to the first step, with several processes) and what blocks gain.

    python benchmarks/training_loop.py loop --dir DATA_DIR --bf16 true
    python benchmarks/training_loop.py start
    python benchmarks/training_loop.py processes
    python benchmarks/training_loop.py blocks --dir DATA_DIR

Writes CSV files to results/, named by threads, torch version and date. Ratios are of one run, its parts taking turns.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli

import backbones  # registers the named models
from training import checkpoint
from training.classification import Classification
from training.config import Config, DataConfig, ModelConfig
from training.distributed import Processes
from training.results import write
from training.run import Training
from training.signals import Stop

ROOT = Path(__file__).parents[1]
CORE = (
    "dense",
    "cbam",
    "global_context",
    "criss_cross",
    "axial",
    "interlaced_sparse",
    "efficient",
    "expectation_maximization",
)


def loop(
    model: str = "cifar_resnet20",
    dir: str | None = None,
    batch_size: int = 128,
    steps: int = 40,
    rounds: int = 5,
    bf16: bool = False,
    threads: int = 1,
    path: str | None = None,
) -> None:
    """Images/s of the script's loop, and of a bare one over the same model, optimizer and loader.

    Args:
        model: timm name.
        dir: root of CIFAR-10; null takes digits.
        batch_size: images of a step.
        steps: of each measurement.
        rounds: measurements of each, taking turns; the first round is not counted.
        bf16: under bfloat16 autocast.
        threads: of torch.
        path: CSV to write.
    """
    torch.set_num_threads(threads)
    data = DataConfig(name="cifar10" if dir else "digits", dir=dir)
    config = Config(model=ModelConfig(model), data=data, batch_size=batch_size, bf16=bf16, device="cpu")
    stop = Stop()
    with tempfile.TemporaryDirectory() as folder:
        config.output = folder
        training = Training(Classification, config, Processes(torch.device("cpu")), stop, backbones)
    stop.restore()
    steps = min(steps, training.steps_per_epoch)

    def bare():
        state = training.state
        state.model.train()
        for images, targets, _ in islice(training.train_batches.epoch(0), steps):
            state.optimizer.zero_grad()
            with training.autocast:
                loss = F.cross_entropy(state.model(images), targets)
            loss.backward()
            state.optimizer.step()

    def ours():
        for _ in islice(training.steps(), steps):
            pass

    speeds = {"bare loop": [], "this script": []}
    for _ in range(1 + rounds):
        for name, run in (("bare loop", bare), ("this script", ours)):
            start = time.perf_counter()
            run()
            speeds[name].append(steps * batch_size / (time.perf_counter() - start))
    ratios = [ours / bare for bare, ours in zip(*(values[1:] for values in speeds.values()))]
    row = {"model": model, "data": data.name, "batch": batch_size, "dtype": "bf16" if bf16 else "fp32"}
    row |= {f"{name}, images/s": f"{statistics.median(values[1:]):.0f}" for name, values in speeds.items()}
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    write(path, "training-loop", [row | {"this / bare": f"{statistics.median(ratios):.3f}", "of rounds": spread}])


def blocks(
    dir: str, epochs: int = 10, seeds: int = 2, threads: int = 1, runs: str = "runs/blocks", path: str | None = None
) -> None:
    """Top-1 accuracy on CIFAR-10 of ResNet-20 with each of eight blocks and without, one recipe for all.

    Written after every run; a call that was stopped goes on where it stood.

    Args:
        dir: root of CIFAR-10.
        epochs: of each run.
        seeds: runs of each network.
        threads: of torch.
        runs: folder for the runs.
        path: CSV to write.
    """
    results: dict[str, list[dict]] = {}
    for seed, block in product(range(seeds), ("", *CORE)):
        model = "_".join(filter(None, ("cifar_resnet20", block)))
        output = Path(runs, f"{model}-{seed}")
        command = [sys.executable, ROOT / "train_imagenet.py", "--config", ROOT / "configs/cifar10_cifar_resnet20.yaml"]
        command += ["--data.dir", dir, "--model.name", model, "--epochs", str(epochs), "--seed", str(seed)]
        command += ["--threads", str(threads), "--output", output, "--resume", "auto", "--save-every", "100"]
        subprocess.run(command, check=True)
        saved = checkpoint.load(output / "last.pt")
        if saved["epoch"] < epochs:  # it was stopped, so stop
            return
        last = saved["history"][-1]
        network = timm.create_model(saved["model"], **saved["model_args"])
        size = sum(parameter.numel() for parameter in network.parameters())
        speed = max(row["images_per_second"] for row in saved["history"])
        results.setdefault(model, []).append({"top1": last["top1"], "parameters": size, "speed": speed})
        path = write(path, "cifar10-blocks", block_rows(results, epochs))


def block_rows(results: dict[str, list[dict]], epochs: int) -> list[dict]:
    """What is there so far: mean and spread (highest less lowest) over the runs of each network."""
    rows = []
    for model, some in results.items():
        top1 = [run["top1"] for run in some]
        row = {"model": model, "parameters": some[0]["parameters"], "epochs": epochs, "seeds": len(some)}
        row |= {"top-1": f"{statistics.mean(top1):.2f}"}
        row |= {"spread": f"{max(top1) - min(top1):.2f}" if len(some) > 1 else "not run"}
        rows.append(row | {"images/s": f"{max(run['speed'] for run in some):.0f}"})
    return rows


def start(rounds: int = 3, path: str | None = None) -> None:
    """Seconds from the start of the process to the first step saved, of a new run and of one that goes on.

    Args:
        rounds: measurements; the median is written.
        path: CSV to write.
    """
    seconds = {"import torch, timm": [], "new run to first step": [], "resumed run to next step": []}
    for _ in range(rounds):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, timm"], check=True)
        seconds["import torch, timm"].append(time.perf_counter() - begun)
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--threads", "1", "--epochs", "99", "--save-every", "1", "--output", folder, "--resume", "auto"]
            for name in ("new run to first step", "resumed run to next step"):
                begun = time.perf_counter()
                command = [sys.executable, ROOT / "train_imagenet.py", *argv]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                before = sorted(Path(folder).glob("step-*.pt"))
                while sorted(Path(folder).glob("step-*.pt")) == before:
                    if process.poll() is not None:
                        raise RuntimeError(f"train_imagenet.py ended with code {process.returncode}")
                    time.sleep(0.01)
                seconds[name].append(time.perf_counter() - begun)
                process.kill()
                process.wait()
    write(path, "training-start", [{name: f"{statistics.median(values):.2f}" for name, values in seconds.items()}])


def processes(model: str = "cifar_resnet20", epochs: int = 3, most: int = 2, path: str | None = None) -> None:
    """Images/s of one process and of several, one thread each, on digits; the batch is the same in all.

    Args:
        model: timm name.
        epochs: of each; the fastest counts.
        most: processes; one and this many are compared.
        path: CSV to write.
    """
    rows = []
    for parallel in ("ddp", "fsdp"):
        for count in (1, most):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(count),
                ]
                command += [str(ROOT / "train_imagenet.py"), "--model.name", model, "--threads", "1", "--device", "cpu"]
                command += ["--epochs", str(epochs), "--output", folder, "--parallel", parallel]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                with open(Path(folder, "log.csv"), newline="") as file:
                    speed = max(float(row["images_per_second"]) for row in csv.DictReader(file))
            rows.append({"model": model, "parallel": parallel, "processes": count, "images/s": f"{speed:.0f}"})
            first = next(row for row in rows if row["parallel"] == parallel)
            rows[-1]["times one process"] = f"{speed / float(first['images/s']):.2f}"
    write(path, "training-processes", rows)


if __name__ == "__main__":
    sys.exit(auto_cli([loop, start, processes, blocks], as_positional=False))
