"""Seeds, datasets by name, transforms."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import MEAN, STD, STRONG, make_folder, make_shards, picture
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF

from training.config import AugmentConfig, DataConfig
from training.datasets import Digits, create_datasets
from training.distributed import Processes
from training.engine import mean_over
from training.loader import BadImages, Batches, StreamSamples
from training.seeding import permutation, seed_of
from training.transforms import eval_transform, train_transform


def test_seeds_and_orders_depend_on_their_key_alone():
    assert seed_of("sample", 1, 2, 3) == 3615570767436277948
    assert len({seed_of("sample", *key) for key in ((1, 2, 3), (1, 3, 2), (12, 3), (2, 1, 3))}) == 4
    assert sorted(permutation(101, "order", 0, 0)) == list(range(101))
    assert permutation(101, "order", 0, 0) == permutation(101, "order", 0, 0) != permutation(101, "order", 0, 1)


def test_digits_are_fixed_disjoint_and_complete():
    from sklearn.datasets import load_digits

    train, test = Digits(train=True), Digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert train.targets[:8] == [3, 9, 1, 3, 1, 9, 4, 4] and test.targets[:8] == [7, 6, 3, 7, 7, 3, 2, 8]
    assert min(Counter(test.targets).values()) >= 35
    images = [[image.tobytes() for image in part.images] for part in (train, test)]
    assert not set(images[0]) & set(images[1])
    pixels, labels = load_digits(return_X_y=True)
    whole = [
        Image.fromarray(np.round(p.reshape(8, 8) * 255 / 16).astype(np.uint8)).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        for p in pixels
    ]
    expected = Counter(zip((image.tobytes() for image in whole), labels.tolist()))
    assert Counter(zip(images[0] + images[1], train.targets + test.targets)) == expected
    for part in (train, test):
        raw = Digits(train=part is train, raw=True)
        assert raw.targets == part.targets and {image.size for image in raw.images} == {(8, 8)}
        large = [np.round(np.asarray(image) * (255 / 16)).astype(np.uint8) for image in raw.images]
        large = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in large]
        assert [image.tobytes() for image in large] == [image.tobytes() for image in part.images]


def test_the_first_training_images_alone(tmp_path):
    train, val, _ = create_datasets(DataConfig(name="digits", train_images=11))
    assert (len(train), len(val)) == (11, 360) and train.name(7) == "digits 7"
    assert [train[i][0].tobytes() for i in range(11)] == [image.tobytes() for image in Digits(train=True).images[:11]]
    for wrong, said in ((0, "at least 1"), (1438, "at most 1437")):
        with pytest.raises(ValueError, match=f"data.train_images must be {said}, got {wrong}"):
            create_datasets(DataConfig(name="digits", train_images=wrong))
    make_shards(tmp_path)
    with pytest.raises(ValueError, match="data.train_images must be null for shards, got 5"):
        create_datasets(DataConfig(name="wds", dir=str(tmp_path), num_classes=3, train_images=5))


def labels_of(dataset):
    return [target for _, target in dataset]


def test_folder(tmp_path):
    root = make_folder(tmp_path, splits=("training", "validation"))
    train, val, classes = create_datasets(DataConfig(name="folder", dir=str(root)))
    assert classes == ["cat", "dog"]
    assert labels_of(train) == labels_of(val) == [0, 0, 0, 1, 1, 1]
    assert train[0][0].size == (17, 13) and np.array_equal(train[0][0], picture(seed=0))


def test_folder_keeps_class_numbers_when_validation_lacks_a_class(tmp_path):
    make_folder(tmp_path, ("cat", "dog", "eel"), ("train",))
    make_folder(tmp_path, ("dog", "eel"), ("val",))
    _, val, classes = create_datasets(DataConfig(name="folder", dir=str(tmp_path)))
    assert classes == ["cat", "dog", "eel"] and labels_of(val) == [1, 1, 1, 2, 2, 2]


def test_hfds(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "eel"]))
    for split, count in (("train", 6), ("validation", 3)):
        rows = {"image": [picture(seed=i) for i in range(count)], "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    config = DataConfig(name=f"hfds/{tmp_path}/mine", dir=str(tmp_path / "cache"))
    train, val, classes = create_datasets(config)
    assert classes == ["cat", "dog", "eel"]
    assert labels_of(train) == [0, 1, 2, 0, 1, 2] and labels_of(val) == [0, 1, 2]
    assert np.array_equal(val[1][0], picture(seed=1))


def drain(batches, *where):
    return [(images.clone(), targets.tolist(), faults) for images, targets, faults in batches.epoch(*where)]


def shards(tmp_path, workers=0, processes=1, rank=0, shuffle=True):
    config = DataConfig(name="wds", dir=str(tmp_path), num_classes=3, workers=workers)
    train, val, classes = create_datasets(config, seed=5, processes=processes)
    assert classes == ["0", "1", "2"]
    transform = train_transform(STRONG, (8, 8), MEAN, STD) if shuffle else eval_transform((8, 8))
    samples = StreamSamples(train if shuffle else val, transform, seed=5)
    processes = Processes(torch.device("cpu"), rank, processes)
    return Batches(samples, 2, MEAN, STD, shuffle=shuffle, workers=workers, num_classes=3, processes=processes)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_depend_on_the_epoch_alone_and_start_anywhere(tmp_path, workers):
    make_shards(tmp_path, shards=3, unreadable=(4, 11))
    training = shards(tmp_path, workers)
    assert training.num_batches == 7 and training.num_images == 14
    whole = [drain(training, epoch) for epoch in (0, 1)]
    assert [len(epoch) for epoch in whole] == [7, 7]
    assert not torch.equal(
        torch.cat([images for images, *_ in whole[0]]), torch.cat([images for images, *_ in whole[1]])
    )
    torch.manual_seed(99)
    for start in (0, 1, 4, 7):
        rest = drain(shards(tmp_path, workers), 1, start)
        assert len(rest) == 7 - start
        for (images, targets, _), (same, labels, _) in zip(rest, whole[1][start:]):
            assert torch.equal(images, same) and targets == labels
    faults = [fault for epoch in whole for *_, faults in epoch for fault in faults]
    assert faults and all(re.search(r"train-\d\.tar/(4|11): UnidentifiedImageError", fault) for fault in faults)
    assert drain(training, 1) and training.names(1, 0) == []


@pytest.mark.parametrize("workers, size", [(0, 1), (2, 1), (0, 2), (0, 3)])
def test_shards_to_evaluate_come_once_each_to_any_number_of_processes(tmp_path, workers, size):
    make_shards(tmp_path, shards=3)
    parts = [shards(tmp_path, workers, size, rank, shuffle=False) for rank in range(size)]
    seen = [batch for part in parts for batch in drain(part)]
    expected = torch.stack([eval_transform((8, 8))(picture(seed=key)) for key in range(15)])
    got = torch.cat([images for images, *_ in seen])
    means, stds = (255 * torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    ours = sorted(image.numpy().tobytes() for image in got)
    assert ours == sorted(image.numpy().tobytes() for image in (expected - means) / stds)
    assert sorted(label for _, labels, _ in seen for label in labels) == sorted(key % 3 for key in range(15))


def test_a_shard_that_is_cut_off_or_has_wrong_labels_is_told_of(tmp_path):
    make_shards(tmp_path, classes=9)
    with pytest.raises(BadImages, match=r"label \d, but labels are 0..2"):
        drain(shards(tmp_path))
    make_shards(tmp_path)
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BadImages, match="10 images to evaluate were announced, [56] were there"):
        mean_over(nn.Identity(), shards(tmp_path, shuffle=False), lambda *_: {"loss": torch.zeros(())})


def test_wds_without_an_info_file_names_its_shards(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "_info.json").unlink()
    config = dict(name="wds", dir=str(tmp_path), num_classes=3, train_split="train-{0..1}.tar|10")
    train, val, _ = create_datasets(DataConfig(**config, val_split="train-0.tar|5"))
    assert len(list(val)) == len(val) == 5 and len(train) == 10
    with pytest.raises(ValueError, match="say how many images train-0.tar has, as in"):
        create_datasets(DataConfig(**config, val_split="train-0.tar"))
    with pytest.raises(ValueError, match="has no shard train-7.tar"):
        create_datasets(DataConfig(**config, val_split="train-7.tar"))
    with pytest.raises(ValueError, match="data.workers × processes must not exceed the 2 training shards"):
        create_datasets(DataConfig(**config, val_split="train-0.tar|5", workers=3))
    with pytest.raises(ValueError, match="shards of .*, got 2 × 3"):
        create_datasets(DataConfig(**config, val_split="train-0.tar|5", workers=2), processes=3)
    with pytest.raises(ValueError, match="data.num_classes must be given"):
        create_datasets(DataConfig(name="wds", dir=str(tmp_path)))


def test_missing_or_wrong_data_is_named(tmp_path):
    def error(**kwargs):
        with pytest.raises(ValueError) as info:
            create_datasets(DataConfig(**kwargs))
        return str(info.value)

    empty, one, extra = tmp_path / "empty", tmp_path / "one", tmp_path / "extra"
    for split in ("train", "val"):
        (empty / split).mkdir(parents=True)
    make_folder(one, classes=("cat",))
    make_folder(extra, ("cat", "dog"), ("train",))
    make_folder(extra, ("cat", "dgo"), ("val",))
    assert "data.dir must be given for data.name folder" in error(name="folder")
    assert f"data.dir {tmp_path}/nowhere is not a directory" in error(name="folder", dir=f"{tmp_path}/nowhere")
    assert "has no folder train or training" in error(name="folder", dir=str(tmp_path))
    assert "has no folder fit" in error(name="folder", dir=str(one), train_split="fit")
    assert "Found 0 images" in error(name="folder", dir=str(empty))
    assert "must have at least 2 classes, has 1: ['cat']" in error(name="folder", dir=str(one))
    assert "validation has classes that training lacks: dgo" in error(name="folder", dir=str(extra))
    assert "data.num_classes is 7, but digits has 10" in error(name="digits", num_classes=7)
    assert "Dataset not found" in error(name="cifar10", dir=str(empty))
    with pytest.raises(ValueError, match=r"in_chans must be 1 \(grey\) or 3 \(colour\) for images, got 4"):
        create_datasets(DataConfig(name="digits"), in_chans=4)


@pytest.mark.parametrize("crop", ["pad", "resized", "centre"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_train_transform_gives_the_size_asked(crop, mode):
    transform = train_transform(AugmentConfig(crop=crop, hflip=0.5, color_jitter=0.4), (32, 24), MEAN, STD)
    for size in ((32, 24), (71, 53), (5, 7)):
        image = transform(picture(*size, mode=mode))
        assert image.shape == (len(mode) if mode == "RGB" else 1, 32, 24) and image.dtype == torch.uint8


def test_pad_and_crop_shifts_by_at_most_an_eighth_and_flips_only_when_asked():
    source = TF.pil_to_tensor(picture(32, 32))
    padded = F.pad(source, (4, 4, 4, 4))
    crops = {padded[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(9) for x in range(9)}
    plain = train_transform(AugmentConfig(crop="pad"), (32, 32), MEAN, STD)
    flipped = train_transform(AugmentConfig(crop="pad", hflip=1.0), (32, 32), MEAN, STD)
    seen = {plain(picture(32, 32)).numpy().tobytes() for _ in range(40)}
    assert len(seen) > 20 and seen <= crops
    assert all(flipped(picture(32, 32)).flip(-1).contiguous().numpy().tobytes() in crops for _ in range(5))


def test_eval_transform_keeps_the_centre():
    exact = eval_transform((32, 32))(picture(32, 32))
    assert torch.equal(exact, TF.pil_to_tensor(picture(32, 32)))
    cropped = eval_transform((24, 24), crop_pct=0.75)(picture(32, 32))
    assert torch.equal(cropped, TF.pil_to_tensor(picture(32, 32))[:, 4:28, 4:28])
    assert eval_transform((7, 11))(picture(32, 53)).shape == (3, 7, 11)


def test_erasing_gives_normalised_images():
    plain = AugmentConfig(crop="centre", erase=1e-9)
    image = train_transform(plain, (32, 32), MEAN, STD)(picture(32, 32))
    assert torch.allclose(image, TF.normalize(TF.to_tensor(picture(32, 32)), MEAN, STD))
    erased = train_transform(AugmentConfig(crop="centre", erase=1.0), (32, 32), MEAN, STD)(picture(32, 32))
    share = (erased != image).any(0).float().mean()
    assert 0.01 < share < 0.5


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n2", "original", "v0"])
def test_posterize_keeps_a_bit(policy):
    transform = train_transform(AugmentConfig(auto_augment=policy), (32, 32), MEAN, STD)
    policies = [t for t in transform.transforms if hasattr(t, "ops") or hasattr(t, "policy")]
    operations = [op for t in policies for op in getattr(t, "ops", None) or sum(t.policy, [])]
    posterize = [op for op in operations if op.name.startswith("Posterize")]
    assert posterize
    for operation in posterize:
        assert np.array_equal(operation.aug_fn(picture(), 0), np.asarray(picture()) & 128)
        assert np.array_equal(operation.aug_fn(picture(), 3), np.asarray(picture()) & 224)
        assert np.array_equal(operation.aug_fn(picture(), 8), picture())


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="augment.auto_augment is not a policy timm knows: 'brand'"):
        train_transform(AugmentConfig(auto_augment="brand"), (32, 32), MEAN, STD)
