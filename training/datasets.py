"""Datasets by name, as pairs (PIL image, class index); name(index) tells of an image where it is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from training.config import DataConfig
from training.image_folder import ImageFolder, divide, endings, find_split, has_split, order, read_split, read_table
from training.pathfinder import LEVELS, Pathfinder
from training.shards import Shards

DIGITS_SPLIT = dict(test_size=360, random_state=0)


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, 8×8, enlarged bicubically to 32×32; needs no download.

    A fixed stratified split, `train_test_split(test_size=360, random_state=0)`: 1,437 images to train, 360 to test.

    Args:
        train: the images to train on, or those to test on.
        raw: leave them as they are, 8×8 with integers in 0..16 as pixels.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool, raw: bool = False):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        indices = train_test_split(np.arange(len(labels)), stratify=labels, **DIGITS_SPLIT)[0 if train else 1]
        pixels = pixels[indices].reshape(-1, 8, 8)
        if raw:
            self.images = [Image.fromarray(image) for image in pixels.astype(np.uint8)]
        else:
            small = np.round(pixels * (255 / 16)).astype(np.uint8)
            self.images = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in small]
        self.targets = labels[indices].tolist()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return f"digits {index}"


class Read(Dataset):
    """What a reader of timm finds; unlike timm's own dataset it raises for a file it can't read.

    Args:
        numbers: class indices of labels that are text.
    """

    def __init__(self, reader, numbers: dict[str, int] | None = None):
        self.reader, self.numbers = reader, numbers

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.reader[index]
        if label is None:
            raise ValueError("has no label")
        return Image.open(file), self.numbers[label] if self.numbers else int(label)

    @property
    def targets(self) -> list[int]:
        labels = self.reader.dataset[self.reader.label_key]
        return [self.numbers[label] if self.numbers else int(label) for label in labels if label is not None]

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or f"image {index}"


class First(Dataset):
    """The first images of a dataset."""

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    @property
    def targets(self) -> list[int]:
        return self.dataset.targets[: self.count]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.dataset.name(index)


class Held(Dataset):
    """A dataset of torchvision that holds its images in memory."""

    def __init__(self, dataset: Dataset, title: str):
        self.dataset, self.title = dataset, title
        self.targets = dataset.targets

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.title} {index}"


def create_datasets(
    config: DataConfig,
    in_chans: int = 3,
    seed: int = 0,
    processes: int = 1,
    known: list[str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    alone: bool = False,
) -> tuple[Dataset | Shards | None, Dataset | Shards, list[str]]:
    """The training set, the validation set, and the names of their classes.

    digits            see Digits
    pathfinder/LEVEL  see pathfinder.py; easy, hard or 64, pathfinder alone is easy; under config.dir, if it is given,
                      images are kept once they are drawn
    cifar10, cifar100 torchvision's, under config.dir
    folder            config.dir/train/CLASS/IMAGE and config.dir/val/CLASS/IMAGE: see image_folder.py; with val_share
                      config.dir/train/CLASS/IMAGE or config.dir/CLASS/IMAGE
    csv               config.dir/train.csv and config.dir/val.csv, tables with a row of names: path,label
    hfds/NAME         what datasets.load_dataset(NAME) gives: a name on the Hub, or a local folder of parquet files or
                      images (what Dataset.save_to_disk wrote is not such a folder; what Dataset.to_parquet wrote is);
                      labels that are text become classes in the order of their names
    wds               shards under config.dir, splits and classes named by _info.json, as write_shards.py writes it,
                      or splits as 'train-{0000..0009}.tar|IMAGE_COUNT';
                      the order of the images depends on the numbers of processes and workers, of which there must not
                      be more than shards

    Args:
        in_chans: 3 reads colour images, 1 grey ones.
        seed: of the order of shards, and of what val_share keeps.
        processes: that divide the shards.
        known: classes of a trained model that is to be evaluated: folder, csv and hfds then read the validation set
            alone, which may lack some of them, and give None as the training set.
        tell: is called with a line for each split of which something was left out.
        alone: read the validation set alone, though no classes are known.

    Raises:
        ValueError: if the data are not there, are not what config says, or have fewer than two classes or others than
            those known.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans must be 1 (grey) or 3 (colour) for images, got {in_chans}")
    if config.name == "digits":
        train, val, classes = Digits(train=True), Digits(train=False), Digits.classes
    elif (kind := config.name.partition("/")[0]) == "pathfinder":
        level = config.name.removeprefix("pathfinder").removeprefix("/") or "easy"
        if level not in LEVELS:
            raise ValueError(f"data.name must be pathfinder/LEVEL, with {', '.join(LEVELS)}, got {config.name!r}")
        try:
            train, val = (Pathfinder(train, level, config.dir) for train in (True, False))
        except OSError as error:
            raise ValueError(f"data.dir {config.dir} can't keep the images of pathfinder: {error}") from error
        classes = Pathfinder.classes
    else:
        sources = {"cifar10": _cifar, "cifar100": _cifar, "folder": _folder, "csv": _csv, "hfds": _hfds, "wds": _wds}
        try:
            train, val, classes = sources[kind](config, known, tell, seed, alone or known is not None)
            if kind == "wds":
                _spread(train, config, processes)
                train.seed = seed
        except (OSError, RuntimeError, AssertionError, TypeError, KeyError) as error:  # of readers that lack something
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"data.name {config.name}, data.dir {config.dir}: {reason}") from error
    if len(val) == 0:
        raise ValueError(f"data.dir {config.dir} has no validation images")
    if known not in (None, classes):
        raise ValueError(f"the model knows the classes {_short(known)}, the data have {_short(classes)}")
    if len(classes) < 2:
        raise ValueError(f"data.dir {config.dir} must have at least 2 classes, has {len(classes)}: {classes}")
    if config.num_classes not in (None, len(classes)):
        raise ValueError(f"data.num_classes is {config.num_classes}, but {config.name} has {len(classes)} classes")
    if config.train_images is not None and train is not None:
        if isinstance(train, Shards) or config.train_images > len(train):
            allowed = "null for shards" if isinstance(train, Shards) else f"at most {len(train)}"
            raise ValueError(f"data.train_images must be {allowed}, got {config.train_images}")
        train = First(train, config.train_images)
    return train, val, classes


def _short(names: list[str], most: int = 10) -> str:
    return f"{names[:most]}"[:-1] + f", … {len(names)} in all]" if len(names) > most else f"{names}"


def _directory(config: DataConfig) -> Path:
    if config.dir is None:
        raise ValueError(f"data.dir must be given for data.name {config.name}")
    path = Path(config.dir)
    if not path.is_dir() and not (config.download and not path.exists()):
        raise ValueError(f"data.dir {config.dir} is not a directory")
    return path


def _cifar(config, known, tell, seed, alone):
    root = _directory(config)
    train, val = (
        create_dataset(f"torch/{config.name}", root=root, split=split, download=config.download)
        for split in ("train", "val")
    )
    return Held(train, f"{config.name} train"), Held(val, f"{config.name} test"), list(train.classes)


def _folder(config, known, tell, seed, alone):
    root = _directory(config)

    def read(folder):
        split = read_split(folder)
        if split.left_out:
            tell(split.left_out)
        return split.images

    share = config.val_share
    if share and has_split(root, "val"):
        if not alone:
            raise ValueError(f"data.val_share must be left out: data.dir {root} has a validation split; got {share}")
        share = None  # images of a later day
    if share:
        undivided = config.train_split or has_split(root, "train")
        train, val = divide(read(find_split(root, "train", config.train_split) if undivided else root), share, seed)
        if alone:
            tell(f"of {root} the images that val_share {share} sets aside; to evaluate all, put them into {root}/val")
    else:
        train = None if alone else read(find_split(root, "train", config.train_split))
        val = read(find_split(root, "val", config.val_split))
    return _of_paths(train, val, known, alone, f"data.dir {root}")


def _csv(config, known, tell, seed, alone):
    root = _directory(config)

    def read(split, usual):
        path = root / (split or usual)
        if not path.is_file():
            raise ValueError(f"data.dir {root} has no table {path.name}")
        return read_table(path, root, config.input_key or "path", config.target_key or "label")

    if config.val_share:
        train, val = divide(read(config.train_split, "train.csv"), config.val_share, seed)
    else:
        train = None if alone else read(config.train_split, "train.csv")
        val = read(config.val_split, "val.csv")
    return _of_paths(train, val, known, alone, f"data.dir {root}")


def _of_paths(train, val, known, alone, place):
    """The datasets of paths by class; without the training set where that of validation is read alone."""
    classes = _classes(train or val, val, known, place)
    return None if alone else ImageFolder(train, classes), ImageFolder(val, classes), classes


def _hfds(config, known, tell, seed, alone):
    def read(split):
        keys = dict(input_key=config.input_key, target_key=config.target_key)
        return create_dataset(config.name, root=config.dir, split=split, **keys).reader

    train = None if alone else read(config.train_split or "train")
    val = read(config.val_split or "validation")
    class_to_idx = (train or val).class_to_idx
    if class_to_idx:
        return train and Read(train), Read(val), sorted(class_to_idx, key=class_to_idx.get)

    trained, tested = (_labels(reader, config.target_key or "label") for reader in (train or val, val))
    is_text = any(isinstance(label, str) for label in trained)
    trained = trained if is_text else map(str, range(max(trained) + 1))
    classes = _classes(trained, map(str, tested), known, f"data.name {config.name}")
    numbers = {name: index for index, name in enumerate(classes)} if is_text else None
    return train and Read(train, numbers), Read(val, numbers), classes


def _labels(reader, key: str) -> set:
    """The labels of a reader of hfds: text or integers; what has none is told of when it is read."""
    labels = {label for label in reader.dataset.unique(key) if label is not None}
    return {int(label) if isinstance(label, bool) else label for label in labels}


def _classes(trained, tested, known: list[str] | None, place: str) -> list[str]:
    """The names known, or those of the training set in order; ValueError if the validation set has others."""
    tested = set(tested)
    if known:
        return known if tested <= set(known) else sorted(tested, key=order)  # which is refused
    trained = sorted(trained, key=order)
    extra = sorted(tested - set(trained), key=order)
    if extra:
        raise ValueError(f"{place}: validation has classes that training lacks: {', '.join(extra)}")
    return trained


def _wds(config, known, tell, seed, alone):
    root = _directory(config)
    names = _names_of_shards(root)
    if names is None and config.num_classes is None:
        raise ValueError("data.num_classes must be given for data.name wds: its _info.json has no class_names")

    def split(name, training):
        reader = create_dataset("wds/", root=str(root), split=name, is_training=training).reader
        paths = [root / file for file in reader.split_info.filenames]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"data.dir {root} has no shard {', '.join(missing)}")
        if not reader.num_samples:
            raise ValueError(f"data.dir {root}: say how many images {name} has, as in {name}|IMAGE_COUNT")
        usual = ("jpg", "jpeg", "png", "webp", *sorted(ending[1:] for ending in endings()))  # the first one counts
        keys = tuple(config.input_key.split(";")) if config.input_key else usual
        return Shards(paths, reader.num_samples, keys, config.target_key, shuffle=training)

    train, val = split(config.train_split or "train", True), split(config.val_split or "validation", False)
    return train, val, names or [str(index) for index in range(config.num_classes)]


def _names_of_shards(root: Path) -> list[str] | None:
    """The names of classes that write_shards.py wrote beside the shards; None where there are none."""
    path = root / "_info.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("class_names") if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _spread(train, config, processes):
    """Refuse more readers than shards: one of them would have nothing to read."""
    readers = max(config.workers, 1) * processes
    if readers > len(train.paths):
        raise ValueError(
            f"data.workers × processes must not exceed the {len(train.paths)} training shards of {config.dir}, "
            f"got {max(config.workers, 1)} × {processes}"
        )
