"""WebDataset shards as a stream that can be taken up anywhere: its order depends on (seed, epoch) alone."""

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from training.seeding import permutation, seed_of

SHUFFLED = 1024  # samples in memory from which the next one is drawn


class Shards(IterableDataset):
    """The samples of tar files, divided among processes and their loader processes by whole files.

    Iterating gives ((part, number), name, read); read() gives (PIL image, class index). The order depends on how many
    processes and loader processes there are.

    Args:
        paths: the tar files.
        length: samples in them.
        image_keys: endings that an image may have, such as ('jpg', 'png').
        target_key: field of the sample's json that holds its class; None reads its cls file.
        shuffle: take the files, and the samples within a window, in an order of (seed, epoch).
    """

    def __init__(
        self,
        paths: list[Path],
        length: int,
        image_keys: tuple[str, ...],
        target_key: str | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.paths, self.length = paths, length
        self.image_keys, self.target_key = image_keys, target_key
        self.shuffle, self.seed = shuffle, seed
        self.share(0, 1, 1, 1, endless=False)
        self.set_epoch(0)

    def share(self, rank: int, size: int, workers: int, batch_size: int, endless: bool):
        """Take the part of process `rank` of `size`, each with `workers` loader processes; `endless` starts over."""
        self.rank, self.size, self.workers = rank, size, workers
        self.batch_size, self.endless = batch_size, endless

    def set_epoch(self, epoch: int, start: int = 0):
        """Give the samples of batch number start, start + 1, … of that epoch."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[tuple[int, int], str, Callable]]:
        worker = get_worker_info()
        worker = worker.id if worker else 0
        worker = (worker + self.start) % self.workers  # batch i is of part i mod n, and the first loader process begins
        part = self.rank * self.workers + worker
        skipped = len(range(worker, self.start, self.workers)) * self.batch_size
        for number, (name, read) in enumerate(self._samples(part)):
            if number >= skipped:
                yield (part, number), name, read

    def _samples(self, part: int) -> Iterator[tuple[str, Callable]]:
        from webdataset import DataPipeline, SimpleShardList, shuffle, tarfile_to_samples

        turn = 0
        while turn == 0 or self.endless:
            key = ("shards", self.seed, self.epoch, turn)
            order = permutation(len(self.paths), *key) if self.shuffle else range(len(self.paths))
            mine = [str(self.paths[i]) for i in order][part :: self.size * self.workers]
            if not mine:
                return
            samples = iter(DataPipeline(SimpleShardList(mine), tarfile_to_samples()))
            if self.shuffle:
                rng = random.Random(seed_of(*key, part))
                samples = shuffle(SHUFFLED, rng=rng, initial=SHUFFLED)(samples)
            try:
                for sample in samples:
                    yield f"{sample['__url__']}/{sample['__key__']}", lambda sample=sample: self._read(sample)
            except tarfile.TarError as error:
                raise OSError(f"one of the shards {', '.join(mine)} is damaged: {error}") from error
            turn += 1

    def _read(self, sample: dict) -> tuple[Image.Image, int]:
        found = [sample[key] for key in self.image_keys if key in sample]
        if not found:
            raise ValueError(f"has no {' or '.join(self.image_keys)}, only {', '.join(sample)}")
        fields = json.loads(sample.get("json", b"{}")) if self.target_key else {"cls": sample.get("cls")}
        target = fields.get(self.target_key or "cls")
        if target is None:
            raise ValueError(f"has no label {self.target_key or 'cls'}")
        return Image.open(io.BytesIO(found[0])), int(target)
