"""The training room: configuration, data, loading, engine, checkpoints, log."""

import csv
import io
import json
import math
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import functional as TF

from training import checkpoint
from training.config import AugmentConfig, Config, DataConfig, OptimConfig, parse
from training.datasets import Digits, create_datasets
from training.engine import State, current_lr, evaluate, train_one_epoch
from training.loader import Batches, EpochSampler, Samples, StreamSamples
from training.log import COLUMNS, CsvLog
from training.seeding import permutation, seed_of
from training.transforms import eval_transform, train_transform

CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").glob("*.yaml") if not path.stem.endswith("_pixels")
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
STRONG = AugmentConfig(hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erase=0.5)


def picture(height=13, width=17, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# configuration


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_says_what_was_measured(path):
    config = parse("", ["--config", str(path)])
    assert config.model.name == path.stem.partition("_")[2]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name} lacks {word}"
    assert f"--config configs/{path.name}" in header[0]


def test_options_override_the_file_and_each_other(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim:\n  lr: 1e-3\nmodel:\n  args: {drop_rate: 0.1}\n")
    config = parse("", ["--config", str(path), "--model.args.drop_path_rate", "0.2", "--epochs", "3", "--epochs", "4"])
    assert config.optim.lr == 1e-3 and config.epochs == 4
    assert config.model.args == {"drop_rate": 0.1, "drop_path_rate": 0.2}
    assert config.augment == AugmentConfig()


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--epohcs", "3"], "epohcs"),
        (["--epoch", "3"], "epoch"),  # no abbreviations
        (["--optim.lrr", "3"], "lrr"),
        (["--epochs", "many"], "epochs"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--augment.crop", "diagonal"], "augment.crop"),
        (["--optim.lr", "-1"], "optim.lr must be positive, got -1.0"),
        (["--augment.hflip", "2"], "augment.hflip must be a probability in 0..1, got 2.0"),
        (["--data.name", "cifar11"], "data.name must be digits"),
        (["--data.num_classes", "1"], "data.num_classes must be at least 2, got 1"),
        (
            ["--batch_size", "6", "--optim.accumulate", "4"],
            "batch_size must be a multiple of optim.accumulate = 4, got 6",
        ),
        (["--batch_size", "5", "--augment.mixup", "1"], "batch_size must be a multiple of 2"),
        (["--resume", "a", "--eval", "b"], "resume and eval exclude each other"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_options_exit_with_code_2_and_their_name(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("", argv)
    assert exit.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, named",
    [
        ("epohcs: 3", "epohcs"),
        ("optim:\n  lrr: 3", "lrr"),
        ("optim:\n  lr: fast", "optim.lr"),
        ("optim: !!python/object:os.system {}", "python/object"),
    ],
)
def test_bad_files_exit_with_code_2_and_the_name(text, named, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        parse("", ["--config", str(path)])
    assert exit.value.code == 2
    assert named in capsys.readouterr().err


# seeds


def test_seeds_and_orders_depend_on_their_key_alone():
    assert seed_of("sample", 1, 2, 3) == 3615570767436277948
    assert len({seed_of("sample", *key) for key in ((1, 2, 3), (1, 3, 2), (12, 3), (2, 1, 3))}) == 4
    assert sorted(permutation(101, "order", 0, 0)) == list(range(101))
    assert permutation(101, "order", 0, 0) == permutation(101, "order", 0, 0) != permutation(101, "order", 0, 1)


# data


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


def make_folder(root, classes=("cat", "dog"), splits=("train", "val"), images=3):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                picture(seed=100 * label + i).save(root / split / name / f"{i}.png")
    return root


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


def make_shards(root, shards=2, images=5, classes=3):
    for shard in range(shards):
        with tarfile.open(root / f"train-{shard}.tar", "w") as tar:
            for key in range(shard * images, (shard + 1) * images):
                png = io.BytesIO()
                picture(seed=key).save(png, "PNG")
                for name, content in ((f"{key}.png", png.getvalue()), (f"{key}.cls", str(key % classes).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    names = [f"train-{shard}.tar" for shard in range(shards)]
    split = dict(filenames=names, shard_lengths=[images] * shards, num_samples=images * shards)
    splits = {name: split | dict(name=name) for name in ("train", "validation")}
    (root / "_info.json").write_text(json.dumps(dict(splits=splits)))


@pytest.mark.parametrize("workers", [0, 2])
def test_wds(tmp_path, workers):
    pytest.importorskip("webdataset")
    make_shards(tmp_path)
    config = DataConfig(name="wds", dir=str(tmp_path), num_classes=3, workers=workers)
    train, val, classes = create_datasets(config, batch_size=2)
    assert classes == ["0", "1", "2"]
    common = dict(mean=MEAN, std=STD, workers=workers)
    evaluation = Batches(StreamSamples(val, eval_transform((8, 8))), 4, **common)
    images = torch.cat([images for images, _ in evaluation.epoch()])
    targets = torch.cat([targets for _, targets in evaluation.epoch()])
    assert images.shape == (10, 3, 8, 8) and sorted(targets.tolist()) == sorted(i % 3 for i in range(10))
    training = Batches(
        StreamSamples(train, train_transform(STRONG, (8, 8), MEAN, STD)), 2, shuffle=True, multiple=2, **common
    )
    epochs = [[images for images, _ in training.epoch(epoch)] for epoch in range(2)]
    assert training.num_batches == 4 and all([len(images) for images in epoch] == [2, 2, 2, 2] for epoch in epochs)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_wds_without_an_info_file_names_its_shards(tmp_path):
    pytest.importorskip("webdataset")
    make_shards(tmp_path)
    (tmp_path / "_info.json").unlink()
    config = dict(name="wds", dir=str(tmp_path), num_classes=3, train_split="train-{0..1}.tar|10")
    train, val, _ = create_datasets(DataConfig(**config, val_split="train-0.tar"))
    assert len(list(val)) == 5 and train.reader.num_samples == 10
    with pytest.raises(ValueError, match="has no shard train-7.tar"):
        create_datasets(DataConfig(**config, val_split="train-7.tar"))
    with pytest.raises(ValueError, match="data.workers must not exceed the 2 training shards"):
        create_datasets(DataConfig(**config, val_split="train-0.tar", workers=3))
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


# transforms


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


# loading


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return picture(16, 16, seed=index), index


def loader(shuffle=True, seed=0, augment=STRONG, transform=None, **kwargs):
    transform = transform or train_transform(augment, (16, 16), MEAN, STD)
    return Batches(Samples(Pictures(), transform, seed=seed), 4, MEAN, STD, shuffle=shuffle, seed=seed, **kwargs)


def digest(batches, epoch=0):
    return [(images.clone(), targets.tolist()) for images, targets in batches.epoch(epoch)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and y == v for (x, y), (u, v) in zip(a, b))


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    expected = {epoch: digest(loader(), epoch) for epoch in (0, 1)}
    workers = loader(workers=2)
    assert same(digest(workers, 1), expected[1]) and same(digest(workers, 0), expected[0])
    torch.manual_seed(99)
    alone = Samples(Pictures(), train_transform(STRONG, (16, 16), MEAN, STD))
    image, targets = expected[1][2]
    assert torch.equal(alone[1, targets[3]][0], image[3])
    assert not same(expected[0], expected[1]) and not same(digest(loader(seed=1)), expected[0])


def test_an_epoch_has_full_batches_in_multiples_and_evaluation_has_everything():
    assert [len(targets) for _, targets in digest(loader())] == [4] * 5
    assert len(digest(loader(multiple=2))) == 4 and loader(multiple=2).num_images == 16
    seen = [target for _, targets in digest(loader(shuffle=False)) for target in targets]
    assert seen == list(range(23))
    assert list(EpochSampler(5, 2)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    with pytest.raises(ValueError, match="batch_size must be at most the 23 training images, got 24"):
        loader(multiple=6)


def test_images_are_normalised_once():
    expected = torch.stack([TF.normalize(TF.to_tensor(picture(16, 16, seed=i)), MEAN, STD) for i in range(4)])
    for transform in (
        eval_transform((16, 16)),
        train_transform(AugmentConfig(crop="centre", erase=1e-9), (16, 16), MEAN, STD),
    ):
        images, targets = digest(loader(shuffle=False, transform=transform))[0]
        assert images.dtype == torch.float32 and torch.allclose(images, expected, atol=1e-6)
    channels_last = loader(shuffle=False, memory_format=torch.channels_last)
    assert next(channels_last.epoch())[0].is_contiguous(memory_format=torch.channels_last)


def test_grey_images():
    samples = Samples(Pictures(), eval_transform((16, 16)), in_chans=1)
    assert torch.equal(samples[0, 0][0], TF.pil_to_tensor(picture(16, 16).convert("L")))


# engine


def tiny_state(optim=OptimConfig(lr=0.1, momentum=0.9, warmup_epochs=1), epochs=3, steps=5, num_classes=23):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(63, num_classes)
    ).double()
    optimizer = create_optimizer_v2(
        model, optim.name, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=optim.warmup_epochs,
        warmup_lr=optim.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    scheduler.step_update(0)
    return State(model, optimizer, scheduler, ModelEmaV3(model, decay=0.7, use_warmup=True))


def cross_entropy(state):
    return lambda images, targets: F.cross_entropy(state.model(images.double()), targets)


def test_accumulation_equals_the_whole_batch():
    transform = eval_transform((16, 16))
    whole, split = tiny_state(steps=2), tiny_state(steps=2)
    samples = Samples(Pictures(), transform)
    losses = []
    for state, batch_size, passes in ((whole, 8, 1), (split, 2, 4)):
        batches = Batches(samples, batch_size, MEAN, STD, shuffle=True, multiple=passes)
        losses.append(
            [
                train_one_epoch(state, batches, cross_entropy(state), epoch, accumulate=passes, clip_grad=0.1)
                for epoch in range(2)
            ]
        )
    assert whole.step == split.step == 4
    assert np.allclose(*losses, rtol=1e-12)
    for a, b in zip(whole.model.state_dict().values(), split.model.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    moved = [not torch.equal(a, b) for a, b in zip(whole.model.parameters(), tiny_state().model.parameters())]
    assert all(moved)


def test_the_moving_average_is_the_recursion():
    state, history = tiny_state(), []
    average = {k: v.clone() for k, v in state.model.state_dict().items()}
    state.optimizer.register_step_post_hook(
        lambda *_: history.append({k: v.clone() for k, v in state.model.state_dict().items()})
    )
    train_one_epoch(state, loader(transform=eval_transform((16, 16))), cross_entropy(state), 0)
    assert len(history) == 5
    for step, weights in enumerate(history, start=1):
        decay = state.ema.get_decay(step)
        average = {k: decay * average[k] + (1 - decay) * weights[k] for k in average}
    assert 0 < decay < 0.7
    for name, value in state.evaluated.state_dict().items():
        assert torch.allclose(value, average[name]) and not torch.equal(value, history[-1][name])


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    state, seen = tiny_state(), []
    state.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    for epoch in range(3):
        train_one_epoch(state, loader(transform=eval_transform((16, 16))), cross_entropy(state), epoch)
    expected = [0.001 + 0.099 * step / 5 for step in range(5)]
    expected += [0.05 * (1 + math.cos(math.pi * step / 15)) for step in range(5, 15)]
    assert np.allclose(seen, expected) and current_lr(state) == 0


def test_clipping_bounds_the_gradient():
    state, norms = tiny_state(), []
    state.optimizer.register_step_pre_hook(
        lambda *_: norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in state.model.parameters())))
    )
    batches = loader(transform=eval_transform((16, 16)))
    train_one_epoch(state, batches, cross_entropy(state), 0, clip_grad=0.01)
    assert np.allclose(norms, 0.01, rtol=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    state = tiny_state()
    before = [p.clone() for p in state.model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1, epoch 3"):
        train_one_epoch(
            state, loader(), lambda images, targets: cross_entropy(state)(images, targets) * float("nan"), 2
        )
    assert state.step == 0 and all(torch.equal(a, b) for a, b in zip(before, state.model.parameters()))


def test_forward_passes_draw_from_seed_step_and_pass_alone():
    def draws(seed, workers):
        state, drawn = tiny_state(), []

        def loss_fn(images, targets):
            drawn.append(torch.rand(()).item())
            return cross_entropy(state)(images, targets)

        train_one_epoch(state, loader(multiple=2, workers=workers), loss_fn, 0, seed=seed, accumulate=2)
        return drawn

    assert draws(0, 0) == draws(0, 2) != draws(1, 0)
    assert len(set(draws(0, 0))) == 4


@pytest.mark.parametrize("num_classes", [2, 5, 23])
def test_evaluation_counts_every_image_and_caps_top5(num_classes):
    targets = torch.arange(23) % num_classes
    logits = torch.randn(23, num_classes, generator=torch.Generator().manual_seed(0))
    answers = iter(logits.split(4))

    class Model(nn.Module):
        def forward(self, images):
            return next(answers)

    class Labelled(Pictures):
        def __getitem__(self, index):
            return picture(), int(targets[index])

    metrics = evaluate(Model(), Batches(Samples(Labelled(), eval_transform((16, 16))), 4, MEAN, STD))
    rank = (logits > logits.gather(1, targets[:, None])).sum(1)  # classes placed before the right one
    assert metrics["top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert num_classes > 5 or metrics["top5"] == 100


# checkpoints and log


def contents(**kwargs):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return (
        dict(
            model="resnet18",
            model_args={"num_classes": 2, "in_chans": 3},
            state_dict=model.state_dict(),
            ema=None,
            optimizer=optimizer.state_dict(),
            epoch=2,
            step=7,
            metrics={"top1": 51.5},
            config={},
            data={"mean": [0.5], "class_names": ["a", "b"]},
            versions=checkpoint.versions(),
        )
        | kwargs
    )


def test_checkpoints_come_back(tmp_path):
    path, saved = tmp_path / "new" / "last.pt", contents()
    checkpoint.save(path, **saved)
    loaded = checkpoint.load(path)
    assert {k: v for k, v in loaded.items() if k not in ("state_dict", "optimizer")} == {
        k: v for k, v in saved.items() if k not in ("state_dict", "optimizer")
    }
    assert torch.equal(loaded["state_dict"]["weight"], saved["state_dict"]["weight"])
    assert torch.equal(
        loaded["optimizer"]["state"][0]["momentum_buffer"], saved["optimizer"]["state"][0]["momentum_buffer"]
    )
    assert set(loaded["versions"]) == {"python", "torch", "torchvision", "timm"}


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, **contents(epoch=1))

    def half(_, file):
        file.write(b"PK half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, **contents(epoch=2))
    assert checkpoint.load(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_bad_checkpoints_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint {path}"):
        checkpoint.load(path)
    checkpoint.save(path, **contents())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"checkpoint {path} is damaged or not a checkpoint"):
        checkpoint.load(path)
    path.write_text("epoch: 3")
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        checkpoint.load(path)
    torch.save({"model": "resnet18", "epoch": 3}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of this project: it lacks model_args, state_dict"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is not a checkpoint of this project"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="a checkpoint has the keys"):
        checkpoint.save(path, model="resnet18")


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save(contents(config=Config()), tmp_path / "last.pt")
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_the_log_grows_row_by_row_and_is_cut_on_resume(tmp_path):
    path = tmp_path / "log.csv"
    row = dict.fromkeys(COLUMNS, 0.123456789)
    log = CsvLog(path)
    for epoch in (1, 2, 3):
        log.write(**row | dict(epoch=epoch))
    CsvLog(path, epochs=2).write(**row | dict(epoch=3, top1=50.0))
    rows = list(csv.DictReader(path.open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3] and tuple(rows[0]) == COLUMNS
    assert [row["top1"] for row in rows] == ["0.123457", "0.123457", "50"]
    CsvLog(path)
    assert path.read_text().strip() == ",".join(COLUMNS)
    with pytest.raises(ValueError, match="extra"):
        log.write(**row, extra=1)
