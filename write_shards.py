"""Write a folder of images as WebDataset shards, for disks that read long files faster than many short ones.

    python write_shards.py --dir photos --path shards
    python write_shards.py --dir photos --val_share 0.1 --path shards --images 2000
    python train_imagenet.py --data.name wds --data.dir shards

Writes train-000000.tar, …, validation-000000.tar, …, each image with its bytes as they are, and _info.json with the
counts and the names of the classes, so that neither has to be typed. Training images are shuffled once, since training
shuffles within a window only. Needs the extra "data". Exit code 0: done; 2: bad input, with one line that says what.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from training import command
from training.checkpoint import write_text
from training.config import DataConfig
from training.datasets import create_datasets
from training.image_folder import ImageFolder
from training.seeding import permutation


def write(
    dir: str,
    path: str,
    name: str = "folder",
    train_split: str | None = None,
    val_split: str | None = None,
    val_share: float | None = None,
    images: int = 1000,
    seed: int = 0,
) -> None:
    """Writes shards and _info.json.

    Args:
        dir: the root of the images, as data.dir of train_imagenet.py.
        path: the folder to write to; must hold no shards yet.
        name: folder or csv, as data.name.
        train_split, val_split, val_share: as of data; what val_share keeps follows from seed.
        images: images of a shard, the last one of a split may have fewer.
        seed: of the order of the training images.
    """
    if not find_spec("webdataset"):
        raise ValueError('the package webdataset is not installed: it comes with the extra "data"')
    if name not in ("folder", "csv"):
        raise ValueError(f"name={name!r}: must be folder or csv")
    if images < 1:
        raise ValueError(f"images={images}: must be 1 or more")
    folder = Path(path)
    if there := sorted(folder.glob("*.tar")):
        raise ValueError(f"path={path}: holds shards already, {there[0].name} among them")
    config = DataConfig(name, dir, train_split=train_split, val_split=val_split, val_share=val_share)
    train, val, classes = create_datasets(config, seed=seed, tell=lambda line: print(f"note: {line}"))
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        split: write_split(folder, split, dataset, order, images)
        for split, dataset, order in (
            ("train", train, permutation(len(train), "shards", seed)),
            ("validation", val, range(len(val))),
        )
    }
    write_text(folder / "_info.json", json.dumps({"splits": splits, "class_names": classes}, indent=2) + "\n")
    for split, told in splits.items():
        print(f"{split}: {told['num_samples']} images of {len(classes)} classes in {len(told['filenames'])} shards")


def write_split(folder: Path, split: str, dataset: ImageFolder, order, images: int) -> dict:
    """Writes the shards of a split; what timm wants to know of them."""
    from webdataset import ShardWriter

    written = []
    with ShardWriter(str(folder / f"{split}-%06d.tar"), images, float("inf"), written.append, verbose=0) as shards:
        for number, index in enumerate(order):
            path, target = dataset.samples[index]
            ending = Path(path).suffix[1:].lower()
            content = Path(path).read_bytes()
            shards.write({"__key__": f"{number:08d}", ending: content, "cls": str(target).encode()})
    names = [Path(name).name for name in written]
    lengths = [len(range(start, min(start + images, len(order)))) for start in range(0, len(order), images)]
    return {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(order)}


def main(argv: list[str] | None = None) -> int:
    return command.run(write, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
