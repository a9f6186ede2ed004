"""Say what images without labels show: a table with the likeliest classes of each.

    python predict.py --checkpoint runs/digits/best.pt --images photos --path photos.csv
    python predict.py --model resnet50.a1_in1k --images photo.jpg --path photo.csv

A row for each image: its path, then name and probability of the likeliest class, the next, and so on. Exit code 0:
done; 2: bad input, with one line that says what.
"""

import csv
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import backbones
from training import command
from training.image_folder import images_below
from training.loader import one_line
from training.setup import find_device, import_modules
from training.trained import Classifier, open_classifier, published_classifier


def predict(
    images: str,
    path: str,
    checkpoint: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
    imports: list[str] | None = None,
    top: int = 5,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Writes a CSV file: image, top1, p1, top2, p2, …

    Args:
        images: a folder of images, at any depth, or one image.
        path: the CSV to write.
        checkpoint: a checkpoint of train_imagenet.py; its moving average answers if it has one.
        model: instead, a name that timm.create_model knows, whose published weights are fetched.
        model_args: further arguments of timm.create_model.
        imports: modules of your own to import first, by name.
        top: how many classes of each image; all if it has fewer.
        batch_size: images at a time.
        device: auto (cuda if there is one), or a torch device.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")
    if (checkpoint is None) == (model is None):
        raise ValueError("give either checkpoint or model")
    if checkpoint is not None and model_args:
        raise ValueError(f"model_args={model_args}: is for model, a checkpoint has arguments of its own")
    folder = Path(images)
    if not folder.exists():
        raise ValueError(f"images={images}: there is no such folder or image")
    paths = images_below(folder) if folder.is_dir() else [images]
    if not paths:
        raise ValueError(f"images={images}: holds no image")
    import_modules(imports or [])
    found = open_classifier(checkpoint, backbones) if model is None else published_classifier(model, model_args or {})
    found.model.to(find_device(device))
    rows, faults = [], []
    for start in range(0, len(paths), batch_size):
        rows += answers(found, paths[start : start + batch_size], top, faults)
    if not rows:
        raise ValueError(f"images={images}: none can be read; the first is {faults[0]}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if faults:
        print(f"note: {len(faults)} of {len(paths)} images can't be read, the first is {faults[0]}")
    print(f"{path}: {len(rows)} images")


def answers(found: Classifier, paths: list[str], top: int, faults: list[str]) -> list[dict]:
    """A row for each image that can be read; those that can't go to `faults`."""
    pixels, read = [], []
    for path in paths:
        try:
            pixels.append(found.seen([Image.open(path)]))
            read.append(path)
        except MemoryError:
            raise
        except Exception as error:  # of damaged files Pillow raises nearly everything
            faults.append(f"{path}: {one_line(error)}")
    if not read:
        return []
    probabilities, classes = found.probabilities(torch.cat(pixels)).sort(dim=1, descending=True)
    top = min(top, len(found.classes))
    names = list(chain.from_iterable((f"top{place}", f"p{place}") for place in range(1, top + 1)))
    rows = []
    for path, shares, numbers in zip(read, probabilities.tolist(), classes.tolist()):
        told = chain.from_iterable((found.classes[n], f"{share:.4f}") for n, share in zip(numbers[:top], shares))
        rows.append({"image": path, **dict(zip(names, told))})
    return rows


def main(argv: list[str] | None = None) -> int:
    return command.run(predict, __doc__, argv, (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
