"""The training scripts, for tests: as functions, as commands, and what their runs end with."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import checkpoint

ROOT = Path(__file__).parents[1]


def load(name):
    """The script as a module; ``name`` is its path in the project, without ending."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**kwargs):
    """{'optim__lr': 0.1} as ['--optim.lr', '0.1']."""
    return [word for name, value in kwargs.items() for word in (f"--{name.replace('__', '.')}", str(value))]


# Everything that draws at random, in both scripts
CLASSIFY = options(
    model__name="cifar_resnet20",
    model__args='{"drop_path_rate": 0.1, "drop_rate": 0.1}',
    data__img_size=8,
    batch_size=96,
    threads=1,
    epochs=2,
    optim__ema=0.9,
    optim__accumulate=2,
    optim__clip_grad=1.0,
    augment__mixup=0.2,
    augment__cutmix=1.0,
    augment__erase=0.2,
    augment__auto_augment="rand-m9-mstd0.5-inc1",
)
PIXELS = options(
    model__name="pixel_digits",
    model__args='{"dim": 26, "depth": 1, "num_heads": 2, "blocks": "dense", "drop_rate": 0.1}',
    batch_size=96,
    threads=1,
    device="cpu",
    epochs=2,
    optim__ema=0.9,
    optim__accumulate=2,
    pictures__every=2,
    pictures__count=3,
)
# What both scripts refuse, and a part of the line they say it with
REFUSED = [
    (["--epohcs", "3"], "epohcs"),
    (["--optim.lrr", "3"], "lrr"),
    (["--epochs", "0"], "epochs must be at least 1, got 0"),
    (["--optim.accumulate", "5"], "batch_size must be a multiple of optim.accumulate = 5, got 96"),
    (["--resume", "a", "--eval", "b"], "resume, eval and dry_run exclude each other"),
    (["--model.args.colour", "red"], "unexpected keyword argument 'colour'"),
    (["--data.name", "folder"], "data.dir must be given for data.name folder"),
    (["--data.name", "cifar10", "--data.dir", "/nowhere"], "data.dir /nowhere is not a directory"),
    (["--device", "toaster"], "device must be auto or a torch device that is there, got 'toaster'"),
    (["--optim.name", "sdg"], "optim.name sdg"),
    (["--optim.args.speed", "3"], "speed"),
    (["--batch_size", "2000"], "batch_size must be at most the 1437 training images, got 2000"),
    (["--resume", "/nowhere.pt"], "there is no checkpoint /nowhere.pt"),
    (["--eval", __file__], "is damaged or not a checkpoint"),
]
# Without what depends on the process: dropout and BatchNorm
SHARED = options(
    model__name="vit_tiny_patch4_32_criss_cross",
    model__args='{"embed_dim": 32, "depth": 2, "num_heads": 2}',
    data__img_size=16,
    batch_size=96,
    threads=1,
    epochs=2,
    optim__ema=0.9,
    optim__name="adamw",
    optim__lr=1e-3,
    optim__clip_grad=1.0,
)


def command(script, argv, processes=0):
    """The command line, under torchrun for one process or more."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*start, str(script if Path(script).exists() else ROOT / f"{script}.py"), *argv]


def start(script, argv, processes=0, **kwargs):
    """The script in a process group of its own."""
    return launch(command(script, argv, processes), **kwargs)


def launch(words, **kwargs):
    """A command line, which finds the project and the helpers of its tests, in a process group of its own."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CI": "true", "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        start_new_session=True,
        **kwargs,
    )


def finish(process, timeout=240):
    """(exit code, stdout, stderr) of a process; it is killed if it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def refused(script, argv, capsys):
    """The last line of what the script says where it refuses `argv`."""
    capsys.readouterr()
    try:
        code = load(script).main([str(word) for word in argv])
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    assert said.splitlines()[-1].startswith("error: ")
    return said.splitlines()[-1]


def log_of(output):
    """The rows of log.csv."""
    with open(output / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def rows(output):
    """log.csv without what a clock says."""
    clock = ("images_per_second", "seconds")
    return [{name: value for name, value in row.items() if name not in clock} for row in log_of(output)]


def names(output):
    """What a run leaves, its numbered checkpoints and the hashes aside."""
    return sorted(p.name for p in output.iterdir() if p.suffix != ".sha256" and not p.name.startswith("step-"))


def standing(output):
    """All that a run's end is made of."""
    saved = checkpoint.load(output / "last.pt")
    return {key: saved[key] for key in ("state_dict", "ema", "optimizer", "epoch", "step", "within", "metrics")}


def equal(a, b):
    """Whether two trees are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def gap(a, b):
    """Largest difference between the tensors of two trees."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((gap(a[key], b[key]) for key in a), default=0.0)
    return 0.0


CLOSE = 2e-5  # after dozens of steps of AdamW, whose first steps magnify rounding


def compare(a, b):
    """The same run but for rounding."""
    one, other = standing(a), standing(b)
    for key in ("epoch", "step"):
        assert one[key] == other[key]
    for key in ("state_dict", "ema"):
        assert gap(one[key], other[key]) < CLOSE, key
    for row, same in zip(rows(a), rows(b), strict=True):
        for name in row:
            assert float(row[name]) == pytest.approx(float(same[name]), rel=1e-5, abs=0.3 if "top" in name else 0), name
