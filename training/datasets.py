"""Datasets by name, as pairs (PIL image, class index); name(index) tells of an image where it is."""

from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from training.config import DataConfig
from training.shards import Shards

FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
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
    """What a reader of timm finds; unlike timm's own dataset it raises for a file it can't read."""

    def __init__(self, reader):
        self.reader = reader

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        return Image.open(file), target

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

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.dataset.name(index)


class Held(Dataset):
    """A dataset of torchvision that holds its images in memory."""

    def __init__(self, dataset: Dataset, title: str):
        self.dataset, self.title = dataset, title

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.title} {index}"


def create_datasets(
    config: DataConfig, in_chans: int = 3, seed: int = 0, processes: int = 1
) -> tuple[Dataset | Shards, Dataset | Shards, list[str]]:
    """The training set, the validation set, and the names of their classes.

    digits            see Digits
    cifar10, cifar100 torchvision's, under config.dir
    folder            config.dir/train/CLASS/*.jpg and config.dir/val/CLASS/*.jpg
    hfds/NAME         what datasets.load_dataset(NAME) gives: a name on the Hub, or a local folder of parquet files or
                      images (what Dataset.save_to_disk wrote is not such a folder; what Dataset.to_parquet wrote is)
    wds               shards under config.dir, splits named by _info.json or as 'train-{0000..0009}.tar|IMAGE_COUNT';
                      the order of the images depends on the numbers of processes and workers, of which there must not
                      be more than shards

    Args:
        in_chans: 3 reads colour images, 1 grey ones.
        seed: of the order of shards.
        processes: that divide the shards.

    Raises:
        ValueError: if the data are not there, are not what config says, or have fewer than two classes.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans must be 1 (grey) or 3 (colour) for images, got {in_chans}")
    if config.name == "digits":
        train, val, classes = Digits(train=True), Digits(train=False), Digits.classes
    else:
        kind = config.name.partition("/")[0]
        source = {"cifar10": _cifar, "cifar100": _cifar, "folder": _folder, "hfds": _hfds, "wds": _wds}[kind]
        try:
            train, val, classes = source(config)
            if kind == "wds":
                _spread(train, config, processes)
                train.seed = seed
        except (OSError, RuntimeError, AssertionError, TypeError, KeyError) as error:  # of readers that lack something
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"data.name {config.name}, data.dir {config.dir}: {reason}") from error
    if len(val) == 0:
        raise ValueError(f"data.dir {config.dir} has no validation images")
    if len(classes) < 2:
        raise ValueError(f"data.dir {config.dir} must have at least 2 classes, has {len(classes)}: {classes}")
    if config.num_classes not in (None, len(classes)):
        raise ValueError(f"data.num_classes is {config.num_classes}, but {config.name} has {len(classes)} classes")
    if config.train_images is not None:
        if isinstance(train, Shards) or config.train_images > len(train):
            allowed = "null for shards" if isinstance(train, Shards) else f"at most {len(train)}"
            raise ValueError(f"data.train_images must be {allowed}, got {config.train_images}")
        train = First(train, config.train_images)
    return train, val, classes


def _directory(config: DataConfig) -> Path:
    if config.dir is None:
        raise ValueError(f"data.dir must be given for data.name {config.name}")
    path = Path(config.dir)
    if not path.is_dir() and not (config.download and not path.exists()):
        raise ValueError(f"data.dir {config.dir} is not a directory")
    return path


def _cifar(config):
    root = _directory(config)
    train, val = (
        create_dataset(f"torch/{config.name}", root=root, split=split, download=config.download)
        for split in ("train", "val")
    )
    return Held(train, f"{config.name} train"), Held(val, f"{config.name} test"), list(train.classes)


def _folder(config):
    root = _directory(config)

    def split(kind, **kwargs):
        given = getattr(config, f"{kind}_split")
        names = (given,) if given else FOLDERS[kind]
        found = [root / name for name in names if (root / name).is_dir()]
        if not found:
            raise ValueError(f"data.dir {root} has no folder {' or '.join(names)}")
        return create_dataset("", root=found[0], search_split=False, **kwargs).reader

    train = split("train")
    class_to_idx = train.class_to_idx
    extra = sorted(set(split("val").class_to_idx) - set(class_to_idx))
    if extra:
        raise ValueError(f"data.dir {root}: validation has classes that training lacks: {', '.join(extra)}")
    return Read(train), Read(split("val", class_map=class_to_idx)), list(class_to_idx)


def _hfds(config):
    train, val = (
        create_dataset(
            config.name, root=config.dir, split=split, input_key=config.input_key, target_key=config.target_key
        ).reader
        for split in (config.train_split or "train", config.val_split or "validation")
    )
    class_to_idx = train.class_to_idx
    if not class_to_idx:  # labels are plain numbers
        labels = train.dataset.unique(config.target_key or "label")
        class_to_idx = {str(label): label for label in range(max(labels) + 1)}
    return Read(train), Read(val), sorted(class_to_idx, key=class_to_idx.get)


def _wds(config):
    root = _directory(config)
    if config.num_classes is None:
        raise ValueError("data.num_classes must be given for data.name wds")

    def split(name, training):
        reader = create_dataset("wds/", root=str(root), split=name, is_training=training).reader
        paths = [root / file for file in reader.split_info.filenames]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"data.dir {root} has no shard {', '.join(missing)}")
        if not reader.num_samples:
            raise ValueError(f"data.dir {root}: say how many images {name} has, as in {name}|IMAGE_COUNT")
        keys = tuple((config.input_key or "jpg;jpeg;png;webp").split(";"))
        return Shards(paths, reader.num_samples, keys, config.target_key, shuffle=training)

    train, val = split(config.train_split or "train", True), split(config.val_split or "validation", False)
    return train, val, [str(index) for index in range(config.num_classes)]


def _spread(train, config, processes):
    """Refuse more readers than shards: one of them would have nothing to read."""
    readers = max(config.workers, 1) * processes
    if readers > len(train.paths):
        raise ValueError(
            f"data.workers × processes must not exceed the {len(train.paths)} training shards of {config.dir}, "
            f"got {max(config.workers, 1)} × {processes}"
        )
