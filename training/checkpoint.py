"""Checkpoints: one dict of plain types and tensors in one file, written whole or not at all.

model         timm name
model_args    arguments of timm.create_model, num_classes and in_chans among them
state_dict    the weights
ema           their moving average, or None; where there is one, it is what `metrics` were measured on
optimizer     state of the optimizer
epoch, step   epochs and optimizer steps done
metrics       loss, top1, top5 on the validation images
data          mean, std, input_size (channels, height, width), interpolation, crop_pct, class_names
config        the configuration of the run
versions      of python, torch, torchvision, timm

    ckpt = checkpoint.load("best.pt")
    model = timm.create_model(ckpt["model"], **ckpt["model_args"])
    model.load_state_dict(ckpt["ema"] or ckpt["state_dict"])
"""

import os
import platform
from pathlib import Path

import timm
import torch
import torchvision

KEYS = (
    "model",
    "model_args",
    "state_dict",
    "ema",
    "optimizer",
    "epoch",
    "step",
    "metrics",
    "data",
    "config",
    "versions",
)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def save(path: str | Path, **contents):
    """Write the checkpoint `contents`, which has exactly the KEYS, to `path`; there is never half a file at `path`.

    Raises:
        ValueError: if a key is missing or unknown.
    """
    if set(contents) != set(KEYS):
        raise ValueError(f"a checkpoint has the keys {', '.join(KEYS)}; got {', '.join(contents)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """The checkpoint at `path`, its tensors on `device`. Runs no code from the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file can't be read or is not a checkpoint of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds, from EOFError to RuntimeError
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({type(error).__name__})") from error
    missing = [key for key in KEYS if not isinstance(contents, dict) or key not in contents]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    return contents
