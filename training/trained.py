"""A classifier's checkpoint together with the images it is evaluated on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from training import checkpoint
from training.config import DataConfig, source_of
from training.datasets import create_datasets
from training.loader import BadImages, Batches, Samples, as_mode
from training.setup import Blocks, restore_model
from training.transforms import eval_transform


@dataclass
class Trained:
    """What `open_trained` gives. `model` is in eval mode, `images` are those to evaluate on."""

    saved: dict
    model: nn.Module
    images: Dataset
    classes: list[str]

    @property
    def transform(self):
        """From PIL image to a uint8 tensor (C, H, W), as the model is evaluated."""
        data = self.saved["data"]
        return eval_transform(tuple(data["input_size"][1:]), data["interpolation"], data["crop_pct"])

    @property
    def channels(self) -> int:
        return self.saved["data"]["input_size"][0]

    def pixels(self, indices: Iterable[int]) -> Tensor:
        """Images (B, C, H, W), values in 0..1."""
        mode = "L" if self.channels == 1 else "RGB"
        return torch.stack([self.transform(as_mode(self.images[index][0], mode)) for index in indices]) / 255

    def normalised(self, pixels: Tensor) -> Tensor:
        """The same as the model takes them."""
        mean, std = (torch.tensor(self.saved["data"][key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    @torch.no_grad()
    def answers(self, batch_size: int = 128) -> tuple[Tensor, Tensor]:
        """Probabilities (N, classes) and targets (N,) of all images, in order; BadImages if one can't be read."""
        data = self.saved["data"]
        samples = Samples(self.images, self.transform, self.channels)
        batches = Batches(samples, batch_size, data["mean"], data["std"], num_classes=len(self.classes))
        parts = []
        for images, targets, faults in batches.epoch():
            if faults:
                raise BadImages(f"an image to evaluate can't be read: {faults[0]}")
            parts.append((self.model(images).float().softmax(dim=1), targets))
        return tuple(map(torch.cat, zip(*parts)))


def check_classifier(path: str | Path, saved: dict):
    """ValueError if the checkpoint is no classifier's."""
    if "class_names" not in saved["data"]:
        raise ValueError(f"{path} is not a classifier's checkpoint")


def open_trained(path: str | Path, blocks: Blocks, dir: str | None = None) -> Trained:
    """The checkpoint at `path`, of train_imagenet.py.

    Args:
        blocks: the package that has the blocks of its model.
        dir: where the images are, if not where they were in training; instead of shards, a folder of images.

    Raises:
        ValueError, OSError: if the checkpoint or the images can't be used.
    """
    saved = checkpoint.load(path)
    check_classifier(path, saved)
    source, known = source_of(saved), saved["data"]["class_names"]
    if source["name"] == "wds":  # which can only be read in order
        if dir is None:
            raise ValueError(f"the images of {path} are shards: give a folder of images with dir")
        source = {"name": "folder"}
    source = DataConfig(**source | ({"dir": dir} if dir else {}))
    seed = saved["config"].get("seed", 0)
    _, images, classes = create_datasets(source, saved["data"]["input_size"][0], seed, known=known)
    return Trained(saved, restore_model(path, saved, blocks).eval(), images, classes)
