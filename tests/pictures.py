"""Small images, in memory, in folders and in shards, for the tests of training."""

import io
import json
import tarfile

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from training.config import AugmentConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
STRONG = AugmentConfig(hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erase=0.5)


def picture(height=13, width=17, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


class Pictures(Dataset):
    """23 of them, each with its own label."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return picture(16, 16, seed=index), index

    def name(self, index):
        return f"picture {index}"


def make_folder(root, classes=("cat", "dog"), splits=("train", "val"), images=3):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                picture(seed=100 * label + i).save(root / split / name / f"{i}.png")
    return root


def make_shards(root, shards=2, images=5, classes=3, unreadable=()):
    """train-N.tar files whose image number i has the label i % classes; both splits are all of them."""
    for shard in range(shards):
        with tarfile.open(root / f"train-{shard}.tar", "w") as tar:
            for key in range(shard * images, (shard + 1) * images):
                png = io.BytesIO()
                picture(seed=key).save(png, "PNG")
                image = b"nothing" if key in unreadable else png.getvalue()
                for name, content in ((f"{key}.png", image), (f"{key}.cls", str(key % classes).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    names = [f"train-{shard}.tar" for shard in range(shards)]
    split = dict(filenames=names, shard_lengths=[images] * shards, num_samples=images * shards)
    splits = {name: split | dict(name=name) for name in ("train", "validation")}
    (root / "_info.json").write_text(json.dumps(dict(splits=splits)))
