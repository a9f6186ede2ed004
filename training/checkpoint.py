"""Checkpoints: a dict of plain types and tensors in one file, written whole or not at all, its SHA-256 beside it.

model         timm name
model_args    arguments of timm.create_model, num_classes and in_chans among them
insert        what was added to that model, {block, at, options}: see backbones.insert; or None
imports       modules to import before it is made, by name
state_dict    the weights
ema           their moving average, or None; where there is one, it is what `metrics` were measured on
optimizer     state of the optimizer
scaler        state of the scale of losses in float16, or None
epoch, step   epochs and optimizer steps done; `within` says how much of the next epoch
within        steps done of the epoch begun, the sum of their losses, and unreadable images met
metrics       of the last evaluation, and the best there was; empty before the first
history       rows of log.csv
data          what the images are: size, normalisation, class names
config        the configuration of the run
versions      of python, torch, torchvision, timm; and threads and processes, which change rounding
made          hardware, date (UTC), and memory, the most bytes that the main process has held

    ckpt = checkpoint.load("best.pt")
    model = timm.create_model(ckpt["model"], **ckpt["model_args"])
    model.load_state_dict(ckpt["ema"] or ckpt["state_dict"])      # of one without `insert`

Which files a run leaves is in folder.py.
"""

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
import torch
import torchvision

KEYS = (
    "model",
    "model_args",
    "insert",
    "imports",
    "state_dict",
    "ema",
    "optimizer",
    "scaler",
    "epoch",
    "step",
    "within",
    "metrics",
    "history",
    "data",
    "config",
    "versions",
    "made",
)
LATER = {"insert": None, "imports": [], "scaler": None, "made": {}}  # what was not always written, and what it was


def versions(processes: int = 1) -> dict[str, str | int]:
    """What else decides a result: versions, and the numbers of threads and processes."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def save(path: str | Path, **contents):
    """Write the checkpoint `contents`, which has exactly the KEYS, to `path`; there is never half a file at `path`.

    Raises:
        ValueError: if a key is missing or unknown.
        OSError: if it can't be written; what was at `path` is still there.
    """
    if set(contents) != set(KEYS):
        raise ValueError(f"a checkpoint has the keys {', '.join(KEYS)}; got {', '.join(contents)}")

    def write(temporary):
        try:
            torch.save(contents, temporary)
        except RuntimeError as error:  # what torch makes of a file it can't open or fill
            raise OSError(f"{path} can't be written: {error}") from error

    write_whole(path, write)


def save_weights(path: str | Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write weights alone as safetensors, a file that timm loads, with `metadata`. Raises OSError as `save`."""
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    content = safetensors.torch.save(weights, metadata={"format": "pt"} | (metadata or {}))
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def give_name(path: Path, name: Path):
    """Make `name` a further name of the checkpoint `path`; a copy of it where files can't have two names."""

    def link(temporary):
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)

    write_whole(name, link)


def write_whole(path: str | Path, write: Callable[[Path], None]):
    """`write(temporary)`, then move that file to `path`, its SHA-256 beside it: at any moment there is a whole file.

    While the file is exchanged, the one beside it names the hashes of both, the old file and the new.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, beside = _temporary(path), _hash_file(path)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        line = f"{sha256(temporary)}  {path.name}\n"
        old = beside.read_text() if path.exists() and beside.exists() else ""
        write_text(beside, line + old)
        os.replace(temporary, path)
        write_text(beside, line)
    finally:
        temporary.unlink(missing_ok=True)  # after an error, or where it already was the same file as `path`


def load(path: str | Path) -> dict:
    """The checkpoint at `path`, its tensors on the CPU. Runs no code from the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file can't be read, is not what was written, or is not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    beside = _hash_file(path)
    known = beside.read_text() if beside.is_file() else None
    if known is None:
        print(f"note: no {beside.name} beside {path}, so nothing tells whether it is whole", file=sys.stderr)
    elif sha256(path) not in (known + beside.read_text()).split():  # a run may be writing it: before or after
        raise ValueError(f"checkpoint {path} is damaged: its SHA-256 is not the one in {beside.name}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, from EOFError to RuntimeError
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({type(error).__name__})") from error
    missing = [key for key in KEYS if not isinstance(contents, dict) or key not in {**LATER, **contents}]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    return LATER | contents


def steps(folder: str | Path) -> list[Path]:
    """The checkpoints `step-N.pt` of a run, newest first."""
    return sorted(Path(folder).glob("step-*.pt"), key=step_of, reverse=True)


def all_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first; those named last and best come last."""
    return steps(folder) + [path for path in (Path(folder, "last.pt"), Path(folder, "best.pt")) if path.is_file()]


def config_of(path: Path) -> dict | None:
    """The configuration in a checkpoint, without a look at its weights or its hash; None if it can't be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["config"]
    except Exception:  # `load` says what is wrong with it
        return None


def step_of(path: Path) -> int:
    """N of `step-N.pt`."""
    return int(path.stem.removeprefix("step-"))


def newest(folder: str | Path) -> Path | None:
    """The newest good checkpoint of a run; None if there is no checkpoint. Says loudly which ones it passes over.

    Raises:
        ValueError: if there are checkpoints and none is good.
    """
    found = all_in(folder)
    for path in found:
        try:
            load(path)
            return path
        except ValueError as error:
            print(f"warning: {error}; trying the one before it", file=sys.stderr, flush=True)
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} is good")
    return None


def clean(folder: Path, keep: int):
    """Remove all but the newest few `step-N.pt`."""
    for path in steps(folder)[keep:]:
        _remove(path)


def forget(folder: Path, step: int | None):
    """Remove what a killed process left half-written, and what is later than `step`; None: everything of a run."""
    for path in folder.glob(".*.writing"):
        path.unlink()
    for path in steps(folder):
        if step is None or step_of(path) > step:
            _remove(path)
    for name in ("last.pt", "best.pt"):
        if step is None or not _is_of(folder / name, step):
            _remove(folder / name)
    if not (folder / "best.pt").exists():
        _remove(folder / "best.safetensors")
        (folder / "config.json").unlink(missing_ok=True)


def _is_of(path: Path, most: int) -> bool:
    """Whether there is a good checkpoint of step `most` or before."""
    try:
        return load(path)["step"] <= most
    except (ValueError, FileNotFoundError):
        return False


def _remove(path: Path):
    path.unlink(missing_ok=True)
    _hash_file(path).unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """The hash of a file, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.writing")


def write_text(path: Path, text: str):
    """Write a text file; there is never half a file at `path`."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files need not be UTF-8
    os.replace(temporary, path)
