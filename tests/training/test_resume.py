"""A run that was stopped anywhere, by anything, ends with the same bits as one that was not."""

import os
import random
import re
import signal
import time

import pytest
import torch
from conftest import in_turn
from pictures import make_shards
from scripts import CLASSIFY, PIXELS, equal, finish, load, options, rows, standing, start

from training import checkpoint
from training.classification import Classification
from training.log import read_rows
from training.pixels import Pixels

RUNS = {"train_imagenet": (CLASSIFY, Classification), "train_pixels": (PIXELS, Pixels)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where an unbroken run of a script has ended."""
    done = {}

    def run(script):
        if script not in done:
            done[script] = tmp_path_factory.mktemp("whole")
            assert load(script).main([*RUNS[script][0], "--output", str(done[script])]) == 0
        return done[script]

    return run


def stop_after(monkeypatch, task, passes):
    """Send this process a SIGTERM in forward pass number `passes` of the run."""
    loss, count = task.loss, iter(range(1, 10**9))

    def counted(self, *batch):
        if next(count) == passes:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, *batch)

    monkeypatch.setattr(task, "loss", counted)


@in_turn({"script": RUNS, "workers": [0, 2]})
def test_stopped_at_any_step(script, workers, whole, tmp_path, monkeypatch, capsys):
    options_, task = RUNS[script]
    argv = [*options_, "--output", str(tmp_path), "--resume", "auto", "--keep", "1"]
    for passes, step in ((3, 2), (9, 7), (13, 14), (20, 24)):  # two passes a step, 14 steps an epoch
        with monkeypatch.context() as patch:
            stop_after(patch, task, passes)
            assert load(script).main([*argv, *options(data__workers=workers)]) == 0
        lines = capsys.readouterr().out.splitlines()
        path = tmp_path / f"step-{step:08d}.pt"
        stopped = f"stopped by SIGTERM at step {step}, epoch {step // 14 + 1}; the last good checkpoint is {path}; "
        assert lines[-1].startswith(stopped if step != 14 else stopped.replace("epoch 2", "epoch 1"))
        assert checkpoint.steps(tmp_path) == [path]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        torch.rand(7)
    workers = options(data__workers=2 - workers)
    assert load(script).main([*argv, *workers]) == 0
    assert f"goes on from {path}: epoch 2, step 24" in capsys.readouterr().out
    assert equal(standing(whole(script)), standing(tmp_path))
    assert rows(whole(script)) == rows(tmp_path) and len(rows(tmp_path)) == 2
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes() == (whole(script) / picture.name).read_bytes()
    names = ["best.pt", "best.safetensors", "config.json", "last.pt", "log.csv", "step-00000028.pt"]
    left = [path.name for path in tmp_path.iterdir() if path.suffix not in (".png", ".sha256")]
    assert sorted(left) == names


@pytest.mark.parametrize("script", RUNS)
def test_stopped_while_evaluating(script, whole, tmp_path, monkeypatch, capsys):
    options_, task = RUNS[script]
    argv = [*options_, "--output", str(tmp_path), "--resume", "auto"]
    measure, count = task.measure, iter(range(99))

    def interrupted(self, *batch):
        if next(count) == 2:  # of 0 and more, the first being a trial before the run
            signal.raise_signal(signal.SIGINT)
        return measure(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(task, "measure", interrupted)
        assert load(script).main(argv) == 0
    assert "stopped by SIGINT at step 14, epoch 1" in capsys.readouterr().out
    assert not (tmp_path / "log.csv").exists()
    assert load(script).main(argv) == 0
    assert equal(standing(whole(script)), standing(tmp_path)) and rows(whole(script)) == rows(tmp_path)


def test_auto_starts_anew_where_there_is_nothing_and_passes_over_what_is_damaged(whole, tmp_path, capsys):
    argv = [*CLASSIFY, "--output", str(tmp_path), "--resume", "auto", "--save-every", "5", "--keep", "3"]
    assert load("train_imagenet").main(argv) == 0
    assert "goes on from" not in capsys.readouterr().out
    assert [checkpoint.step_of(path) for path in checkpoint.steps(tmp_path)] == [28, 25, 20]
    newest = tmp_path / "step-00000028.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    assert load("train_imagenet").main(argv) == 0
    out, err = capsys.readouterr()
    assert f"warning: checkpoint {newest} is damaged: its SHA-256 is not the one" in err
    assert f"goes on from {tmp_path}/step-00000025.pt: epoch 2, step 25" in out
    assert equal(standing(whole("train_imagenet")), standing(tmp_path))


def test_what_can_not_be_gone_on_from_is_refused(whole, tmp_path, capsys):
    run = whole("train_imagenet")

    def refused(*argv, script="train_imagenet"):
        assert load(script).main([*RUNS[script][0], *argv]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    there, last = ["--output", str(run)], ["--resume", str(run / "last.pt")]
    new = ["--output", str(tmp_path / "new")]
    assert "holds a run already: go on with --resume auto" in refused(*there)
    assert "holds cifar_resnet20 {" in refused(*new, *last, "--model.args.drop_rate", "0.3")
    assert "optim.ema is None, but" in refused(*new, *last, "--optim.ema", "null")
    assert "last.pt holds cifar_resnet20" in refused(*new, *last, script="train_pixels")
    assert "there is no checkpoint" in refused(*new, "--resume", str(tmp_path / "nowhere.pt"))
    assert not (tmp_path / "new").exists()

    argv = [*CLASSIFY, *new, "--save-every", "5", "--keep", "9"]
    assert load("train_imagenet").main(argv) == 0
    middle = ["--resume", str(tmp_path / "new" / "step-00000005.pt")]
    assert "is of step 5, but output" in refused(*new, *middle)
    other = refused("--output", str(tmp_path / "b"), *middle, "--batch_size", "48")
    assert "is of 1437 training images in batches of 96, not 1437 training images in batches of 48" in other
    assert len(checkpoint.steps(tmp_path / "new")) == 7

    assert load("train_imagenet").main([*argv, *middle, "--overwrite", "--optim.lr", "0.2"]) == 0
    assert "note: optim.lr is 0.2 now and was 0.1, so the result may differ" in capsys.readouterr().out
    assert not equal(standing(run), standing(tmp_path / "new"))
    assert load("train_imagenet").main([*argv, "--overwrite"]) == 0
    assert equal(standing(run), standing(tmp_path / "new"))


def test_what_the_optimizer_brings_back_can_not_be_changed(whole, tmp_path, capsys):
    last = ["--resume", str(whole("train_imagenet") / "step-00000014.pt"), "--output", str(tmp_path)]
    for name, value, message in (
        ("optim.weight_decay", "0.1", "optim.weight_decay must be 0.0005, as in"),
        ("optim.momentum", "0.5", "optim.momentum must be 0.9, as in"),
        ("optim.name", "adamw", "optim.name must be 'sgd', as in"),
        ("optim.args.maximize", "false", "optim.args must be {}, as in"),
    ):
        assert load("train_imagenet").main([*CLASSIFY, *last, f"--{name}", value]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_goes_on_in_another_folder_takes_its_best_along(whole, tmp_path, capsys):
    run, new = whole("train_imagenet"), tmp_path / "new"
    argv = [*CLASSIFY, "--resume", str(run / "last.pt"), "--output", str(new)]
    assert load("train_imagenet").main(argv) == 0
    assert equal(standing(run), standing(new)) and rows(run) == rows(new)
    best = checkpoint.load(run / "last.pt")["metrics"]["best_step"]
    assert checkpoint.load(new / "best.pt")["step"] == best and (new / "best.safetensors").exists()
    assert "holds a run already" in refused_by(argv, capsys)
    assert load("train_imagenet").main([*argv, "--overwrite", "--epochs", "3"]) == 0
    assert checkpoint.load(new / "last.pt")["epoch"] == 3


def refused_by(argv, capsys):
    assert load("train_imagenet").main(argv) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_going_back_drops_what_is_later(tmp_path):
    argv = [*CLASSIFY, *options(output=tmp_path, epochs=3, keep=9)]
    assert load("train_imagenet").main(argv) == 0
    best = checkpoint.load(tmp_path / "last.pt")["metrics"]["best_step"]
    assert load("train_imagenet").main([*argv, "--overwrite", "--resume", str(tmp_path / "step-00000014.pt")]) == 0
    assert checkpoint.load(tmp_path / "best.pt")["step"] == best
    assert [checkpoint.step_of(path) for path in checkpoint.steps(tmp_path)] == [42, 28, 14]


def test_trouble_in_evaluation_does_not_cost_the_epoch(tmp_path, monkeypatch, capsys):
    argv = [*CLASSIFY, *options(output=tmp_path, epochs=1, resume="auto")]
    measure, count = Classification.measure, iter(range(99))

    def broken(self, *batch):
        values = measure(self, *batch)
        return values if next(count) == 0 else values | {"loss": torch.tensor(float("nan"))}

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "measure", broken)
        assert load("train_imagenet").main(argv) == 1
    assert "the loss is nan on the images to evaluate; the last good checkpoint is" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 14
    assert load("train_imagenet").main(argv) == 0
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


LONG = [*CLASSIFY, *options(data__workers=2, epochs=5, save_every=3)]


def first_line(process):
    return process.stdout.readline()


@pytest.mark.slow  # in two processes: test_distributed
@pytest.mark.parametrize("everyone", [True, False], ids=["group", "process"])
def test_sigterm_saves_within_a_step_and_exits_with_0(everyone, tmp_path):
    process = start("train_imagenet", [*LONG, "--output", str(tmp_path), "--save-every", "999"])
    assert "cifar_resnet20: " in first_line(process)
    time.sleep(2)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    last = out.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM at step ") and last.endswith("--resume auto goes on from there")
    step, epoch = map(int, re.search(r"at step (\d+), epoch (\d+); ", last).groups())
    assert checkpoint.load(tmp_path / "last.pt")["step"] == step > 0
    process = start("train_imagenet", [*LONG, "--output", str(tmp_path), "--resume", "auto"])
    line = first_line(process)
    process.kill()
    finish(process)
    assert f"epoch {epoch}, step {step}" in line


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = [*LONG, "--epochs", "12"]
    began = time.monotonic()
    assert load("train_imagenet").main([*argv, "--output", str(whole), "--data.workers", "0"]) == 0
    longest = (time.monotonic() - began) / 40  # of what is done between two kills, so that the run outlives all
    moments = random.Random(0)
    kills, argv = 0, [*argv, "--output", str(broken), "--resume", "auto"]
    while kills < 20:
        process = start("train_imagenet", argv)
        first_line(process)
        time.sleep(moments.uniform(0, longest))
        process.kill()
        code, _, err = finish(process)
        assert code == -signal.SIGKILL, f"ended before it was killed {kills + 1} times: {err}"
        kills += 1
    code, out, err = finish(start("train_imagenet", argv))
    assert code == 0, err
    assert equal(standing(whole), standing(broken)) and rows(whole) == rows(broken)
    assert not list(broken.glob(".*"))


def test_shards_go_on_exactly_with_as_many_workers(tmp_path, monkeypatch, capsys):
    make_shards(tmp_path, shards=3, images=40, unreadable=(47, 77))
    argv = options(model__name="cifar_resnet20", data__img_size=8, batch_size=10, threads=1, epochs=2, resume="auto")
    argv += options(data__name="wds", data__dir=tmp_path, data__num_classes=3, data__workers=2, max_bad=0.1)
    argv += options(augment__erase=0.5, augment__auto_augment="rand-m9-mstd0.5-inc1", data__val_split="train-0.tar|40")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    script = load("train_imagenet")
    assert script.main([*argv, "--output", str(whole)]) == 0
    for passes in (5, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, Classification, passes)
            assert script.main([*argv, "--output", str(stopped)]) == 0
    capsys.readouterr()
    assert script.main([*argv, "--output", str(stopped)]) == 0
    assert "note: " not in capsys.readouterr().out.replace("note: unreadable", "")
    assert equal(standing(whole), standing(stopped)) and rows(whole) == rows(stopped)
    assert read_rows(whole / "bad_images.csv") == read_rows(stopped / "bad_images.csv")
    assert script.main([*argv, "--output", str(stopped), "--data.workers", "1"]) == 0
    assert "note: data.workers is 1 now and was 2" in capsys.readouterr().out
