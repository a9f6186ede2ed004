"""Folders of images, ROOT/SPLIT/CLASS/…/IMAGE, by one set of rules; and tables that name images and their labels.

The class is the first folder below the split; an image may lie at any depth in it. Hidden files and folders, whose
names begin with a dot, are left out; so is what lies beside the class folders, and what Pillow does not read by its
ending. Symbolic links are followed, but not to folders that they lie in.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile
from torch.utils.data import Dataset

from training.seeding import permutation

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
NO_IMAGES = ("EPS", "MPEG")  # the one is a program that Ghostscript would run; of the other Pillow knows only the size


@dataclass
class Split:
    """What the folder of a split holds: paths of images by class; `left_out` says in a line what is not among them."""

    images: dict[str, list[str]]
    left_out: str


class ImageFolder(Dataset):
    """The images of a split, in the order of their paths, as pairs (PIL image, class index).

    Args:
        images: their paths, by class.
        classes: names of the classes, those without images included.
    """

    def __init__(self, images: dict[str, list[str]], classes: list[str]):
        samples = [(path, index) for index, name in enumerate(classes) for path in images.get(name, ())]
        self.samples = sorted(samples, key=lambda sample: order(sample[0]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return Image.open(path), target

    @property
    def targets(self) -> list[int]:
        return [target for _, target in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]


@cache
def endings() -> frozenset[str]:
    """The endings of files that Pillow reads as images, such as '.jpg'."""
    Image.init()
    stubs = {n for n, (reader, _) in Image.OPEN.items() if isinstance(reader, type) and _is_stub(reader)}
    formats = Image.OPEN.keys() - stubs - {*NO_IMAGES} | {"MPO"}  # which the reader of JPEG opens
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def _is_stub(reader: type) -> bool:
    """Whether it only tells what a file is, and leaves it to others to read it."""
    return issubclass(reader, ImageFile.StubImageFile)


def order(name: str) -> tuple:
    """What names are sorted by: 2 comes before 10, and no two names are equal. As timm sorts them, which fails at ²."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def find_split(root: Path, kind: str, given: str | None = None) -> Path:
    """The folder of a split.

    Args:
        kind: "train" or "val".
        given: its path within `root`; None takes the usual names, in capitals too.

    Raises:
        ValueError: if it is not there; says what is wanted.
    """
    there = [entry.name for entry in _visible(root) if entry.is_dir()]
    in_capitals = {name.lower(): name for name in there}
    names = (given,) if given else SPLITS[kind]
    for name in names:
        path = root / (given or in_capitals.get(name, name))
        if path.is_dir():
            return path
    has = f", it has {_some(there)}" if there else ""
    wanted = f"{root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE"
    itself = root.resolve().name.lower() in sum(SPLITS.values(), ())
    hint = f"; if it is a split itself, give {root.resolve().parent}" if itself else ""
    if not given and not itself:
        hint = f"; or {root}/train/CLASS/IMAGE or {root}/CLASS/IMAGE alone, with data.val_share"
    raise ValueError(f"data.dir {root} has no folder {' or '.join(names)}{has}; wanted are {wanted}{hint}")


def images_below(folder: Path) -> list[str]:
    """The images in a folder at any depth, in the order of their names; those that Pillow reads by their ending."""
    found = _files(str(folder), (os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)))
    return sorted((path for path in found if _ending(path) in endings()), key=order)


def has_split(root: Path, kind: str) -> bool:
    """Whether there is a folder with one of the usual names of that split."""
    return any(entry.is_dir() and entry.name.lower() in SPLITS[kind] for entry in _visible(root))


def divide(images: dict[str, list[str]], share: float, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Images by class, in two: what is left to train on, and `share` of each class; which ones follows from `seed`.

    A class of two images or more has some in both, a class of one none to validate on.
    """
    train, held = {}, {}
    for name, paths in images.items():
        paths = sorted(paths, key=order)
        count = min(max(round(share * len(paths)), 1), len(paths) - 1)
        places = {*permutation(len(paths), "validation", seed, name)[:count]}
        train[name] = [path for place, path in enumerate(paths) if place not in places]
        held[name] = [path for place, path in enumerate(paths) if place in places]
    return train, {name: paths for name, paths in held.items() if paths}


def read_table(path: Path, root: Path, image: str = "path", label: str = "label") -> dict[str, list[str]]:
    """Images by label of a CSV file with a row of names and columns `image`, relative to `root`, and `label`.

    Raises:
        ValueError: if a column is missing, a row lacks something, names no file, or has another label than before.
    """
    images, labels = {}, {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for column in (image, label):
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"{path} has no column {column}, it has {_some(rows.fieldnames or ['none'])}")
        for row in rows:
            name, value = row[image], row[label]
            if not name or not value:
                raise ValueError(
                    f"{path}, line {rows.line_num}: must have {image} and {label}, got {name!r}, {value!r}"
                )
            where = os.path.join(root, name)
            if labels.setdefault(where, value) != value:
                raise ValueError(f"{path}, line {rows.line_num}: {name} is {labels[where]} above and {value} here")
            if not os.path.isfile(where):
                raise ValueError(f"{path}, line {rows.line_num}: there is no image {where}")
            images.setdefault(value, []).append(where)
    if not images:
        raise ValueError(f"{path} names no image")
    return images


def read_split(folder: Path) -> Split:
    """The images in the folder of a split.

    Raises:
        ValueError: if there is none in a class folder; says what is wanted.
        OSError: if a folder can't be read.
    """
    images, beside, upwards, others = {}, [], [], Counter()
    real = Path(os.path.realpath(folder))
    within = (str(real), *map(str, real.parents))
    for entry in _visible(folder):
        if entry.is_dir() and os.path.realpath(entry.path) in within:
            upwards.append(entry.name)
        elif entry.is_dir():
            images[entry.name] = []
            for path in _files(entry.path, within):
                if _ending(path) in endings():
                    images[entry.name].append(path)
                else:
                    others[_ending(path) or "no ending"] += 1
        else:
            beside.append(entry.name)
    empty = [name for name, paths in images.items() if not paths]
    if len(empty) == len(images):
        flat = sum(_ending(name) in endings() for name in beside)
        also = f", and {flat} beside them: move each into the folder of its class" if flat else ""
        raise ValueError(f"Found 0 images in class folders of {folder}{also}; wanted is {folder}/CLASS/IMAGE")
    told = {
        "files in no class folder": _some(beside),
        "links to folders that hold them": _some(upwards),
        "class folders without images": _some(empty),
        "files of other endings": _some(f"{ending} {count}" for ending, count in others.most_common()),
    }
    left_out = "; ".join(f"{what}: {which}" for what, which in told.items() if which)
    images = {name: paths for name, paths in images.items() if paths}
    return Split(images, f"{folder}: left out {left_out}" if left_out else "")


def _visible(folder: str | Path) -> list[os.DirEntry]:
    """What is in a folder and not hidden, by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _files(folder: str, within: tuple[str, ...]) -> Iterator[str]:
    """The visible files below a folder, at any depth; a link to a folder that it lies `within` is not followed."""
    within = (*within, os.path.realpath(folder))
    for entry in _visible(folder):
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) not in within:
            yield from _files(entry.path, within)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _some(names, most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
