"""Loaders: batches of normalised images on the device, the same for any number of worker processes."""

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from training.seeding import permutation, seed_cpu


class Samples(Dataset):
    """A dataset indexed by (epoch, index); what its transform draws depends on (seed, epoch, index) alone.

    Args:
        dataset: gives (PIL image, class index).
        transform: from PIL image to tensor.
        in_chans: 3 converts images to colour, 1 to grey.
    """

    def __init__(self, dataset: Dataset, transform, in_chans: int = 3, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.mode = "L" if in_chans == 1 else "RGB"
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image, target = self.dataset[index]
        seed_cpu("sample", self.seed, epoch, index)
        return self.transform(image if image.mode == self.mode else image.convert(self.mode)), target

    def __len__(self) -> int:
        return len(self.dataset)


class StreamSamples(IterableDataset):
    """The same for a timm dataset that can only be read in order; `index` is the place in the worker's stream."""

    def __init__(self, dataset: IterableDataset, transform, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        worker = worker.id if worker else 0
        epoch = self.dataset.reader.epoch_count.value
        for index, (image, target) in enumerate(self.dataset):
            seed_cpu("sample", self.seed, epoch, worker, index)
            yield self.transform(image), target


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, index): the permutation of (seed, epoch) in full batches; or all samples in order.

    Args:
        length: number of samples.
        batch_size: samples of one list.
        shuffle: False gives all samples in order, the last list shorter.
        multiple: the number of shuffled lists is a multiple of this; the samples left over wait for another epoch.
    """

    def __init__(self, length: int, batch_size: int, shuffle: bool = False, multiple: int = 1, seed: int = 0):
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.multiple = multiple
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.length, "order", self.seed, self.epoch) if self.shuffle else range(self.length)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // (self.batch_size * self.multiple) * self.multiple
        return math.ceil(self.length / self.batch_size)


class Batches:
    """Batches of one epoch at a time: images (B, C, H, W) float32, normalised; targets (B,) int64; both on `device`.

    Args:
        samples: Samples or StreamSamples.
        batch_size: images of one batch.
        mean, std: of each channel, in 0..1.
        shuffle: True for training; False gives every sample once, in order.
        multiple: a shuffled epoch has a multiple of this many batches, all of them full.
        memory_format: of the images.

    Raises:
        ValueError: if there are too few training images for an epoch.
    """

    def __init__(
        self,
        samples: Samples | StreamSamples,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        multiple: int = 1,
        seed: int = 0,
        workers: int = 0,
        device: str | torch.device = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.device = torch.device(device)
        self.memory_format = memory_format
        self.mean = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(-1, 1, 1)

        stream = isinstance(samples, StreamSamples)
        length = samples.dataset.reader.num_samples if stream else len(samples)
        sampler = EpochSampler(length, batch_size, shuffle, multiple, seed)
        if shuffle and len(sampler) == 0:
            raise ValueError(f"batch_size must be at most the {length} training images, got {batch_size * multiple}")
        self.num_batches = len(sampler) if shuffle else None
        self.num_images = len(sampler) * batch_size if shuffle else length
        common = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=self.device.type == "cuda")
        if stream:
            samples.dataset.set_loader_cfg(num_workers=workers)
            self.epoched = samples.dataset
            self.loader = DataLoader(samples, batch_size, drop_last=shuffle, **common)
        else:
            self.epoched = sampler
            self.loader = DataLoader(samples, batch_sampler=sampler, **common)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of epoch number `epoch`."""
        self.epoched.set_epoch(epoch)
        for images, targets in islice(self.loader, self.num_batches):  # a stream gives a few more than asked
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            if images.dtype == torch.uint8:
                images = images.float().sub_(self.mean).div_(self.std)
            yield images.contiguous(memory_format=self.memory_format), targets
