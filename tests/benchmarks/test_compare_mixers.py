"""The comparison of mixers: what it writes is what the runs and the models say, and what is done is not done again."""

import csv
import re
import subprocess
import sys
from itertools import combinations

import pytest
import timm
import torch
from PIL import Image
from scripts import load

from training import checkpoint
from vision_attn.cost import flops, parameters

compare_mixers = load("benchmarks/compare_mixers")
SMALL = dict(mixers=["window", "dense"], data=["digits"], epochs=1, seeds=1, depth=1, repeats=1)


def in_this_process(words):
    """`subprocess.run` of the training script, without the seconds that a start takes."""
    assert words[:2] == [sys.executable, compare_mixers.ROOT / "train_imagenet.py"]
    return subprocess.CompletedProcess(words, load("train_imagenet").main(words[2:]))


def test_two_mixers_are_compared_once(tmp_path, monkeypatch):
    target, runs = tmp_path / "out" / "mixers.csv", tmp_path / "runs"
    options = {"window": {"kernel_size": 3}}
    monkeypatch.setattr(subprocess, "run", in_this_process)
    compare_mixers.compare(**SMALL, options=options, runs=str(runs), path=str(target))
    lines = target.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# python ")
    rows = {row["mixer"]: row for row in csv.DictReader(lines[1:])}
    assert set(rows) == {"dense", "window"}
    for mixer, row in rows.items():
        (run,) = runs.glob(f"digits-{mixer}-0-*")
        saved = checkpoint.load(run / "last.pt")
        assert saved["model_args"]["attn_kwargs"] == options.get(mixer, {}) and saved["epoch"] == 1
        assert float(row["top-1 %"]) == pytest.approx(saved["metrics"]["top1"], abs=0.01)
        model = timm.create_model(saved["model"], **saved["model_args"])
        assert int(row["parameters"]) == parameters(model)
        counted = flops(model, torch.zeros(1, 3, 32, 32)) / 1e6
        assert float(row["MFLOP of an image"]) == pytest.approx(counted, rel=0.01)
        assert saved["data"]["train_images"] == int(row["images"])
        assert row["options"] == ("kernel_size=3" if mixer == "window" else "")
        assert row["spread"] == "0.00" and float(row["step ms"]) > 0 and float(row["step MiB"]) > 1
    text = target.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in text] == ["mixer", *rows]
    assert Image.open(target.with_suffix(".png")).size[0] > 1000

    monkeypatch.setattr(subprocess, "run", None)  # nothing is left to train
    monkeypatch.setattr(compare_mixers, "step_costs", None)
    compare_mixers.compare(**SMALL, options=options, runs=str(runs), path=str(target))
    assert target.read_text(encoding="utf-8").splitlines()[1:] == lines[1:]
    with pytest.raises(TypeError):  # but what was made with other options is of no use
        compare_mixers.compare(**SMALL, options={"window": {"kernel_size": 5}}, runs=str(runs), path=str(target))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(data=["cifar10"]), "dir=None: must be the root of cifar10"),
        (dict(data=["cifar10", "folder"], dir="photos"), "dir='photos': must be the root of cifar10 or folder"),
        (dict(data=["digit"]), "data='digit': must be digits, cifar10"),
        (dict(mixers=["cbam"]), "mixers='cbam': must be the name of a mixer"),
        (dict(gates=[{"kernel_size": 3}]), "gates={'kernel_size': 3}: must be the name of a gate"),
    ],
)
def test_bad_arguments_are_named(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        compare_mixers.compare(**wrong)


def test_gates_stand_beside_a_resnet_without_on_one_s_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    for place in range(24):
        shade = tmp_path / "photos" / ("dark", "light")[place % 2] / f"{place}.png"
        shade.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (29, 23), (100 * (place % 2) + place,) * 3).save(shade)
    mixers, gates = [{"name": "window", "kernel_size": 3}, {"name": "window", "kernel_size": 5}], ["global_context"]
    training = ["--data.val-share", "0.34", "--batch-size", "8"]
    given = SMALL | dict(mixers=mixers, gates=gates, data=["folder"], dir=str(tmp_path / "photos"), training=training)
    compare_mixers.compare(**given, runs=str(tmp_path / "runs"), path=str(tmp_path / "own.csv"))
    rows = list(csv.DictReader((tmp_path / "own.csv").read_text(encoding="utf-8").splitlines()[1:]))
    assert {(row["mixer"], row["options"]) for row in rows} == {
        ("none", ""),
        ("global_context", ""),
        ("window", "kernel_size=3"),
        ("window", "kernel_size=5"),
    }
    assert {row["data"] for row in rows} == {"folder"} and len(list((tmp_path / "runs").glob("folder-*"))) == 4
    for run in (tmp_path / "runs").glob("folder-*"):
        assert checkpoint.load(run / "last.pt")["config"]["data"]["val_share"] == 0.34


def test_a_run_that_diverged_is_told_of_and_one_that_was_stopped_ends_the_call(tmp_path, monkeypatch):
    for code, said in ((1, "nan"), (2, None)):
        monkeypatch.setattr(subprocess, "run", lambda *_, code=code: subprocess.CompletedProcess([], code))
        if said:
            assert str(compare_mixers.trained([], tmp_path, 1)) == said
        else:
            with pytest.raises(subprocess.CalledProcessError):
                compare_mixers.trained([], tmp_path, 1)
    monkeypatch.setattr(checkpoint, "load", lambda _: dict(epoch=1, history=[dict(top1=37.0), dict(top1=41.0)]))
    (tmp_path / "last.pt").touch()
    assert compare_mixers.trained([], tmp_path, 1) == 41.0
    monkeypatch.setattr(subprocess, "run", lambda *_: subprocess.CompletedProcess([], 0))
    assert compare_mixers.trained([], tmp_path, 2) is None


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_was_asked_for_is_done_once_by_several_jobs(jobs):
    asked = [(seed, "digits", place) for seed in range(2) for place in range(5)]
    done = list(compare_mixers.outcomes(lambda what: what[0] + 10 * what[2], asked, jobs))
    assert sorted(done) == [(what, what[0] + 10 * what[2]) for what in asked]


def test_names_in_the_picture_do_not_hide_one_another():
    from matplotlib.figure import Figure

    axis = Figure(figsize=(9, 7), layout="constrained").subplots()
    spots = [(1 + 0.02 * (i % 5), 1 + 0.03 * (i // 5)) for i in range(23)]
    x, y = map(list, zip((0.5, 0.5), *spots, (2, 2)))
    axis.scatter(x, y)
    compare_mixers.label(axis, x, y, [f"a mixer {i}" for i in range(25)], ["black"] * 25)
    boxes = [note.get_window_extent() for note in axis.texts if note.get_text()]  # lines to points are notes, too
    assert len(boxes) == 25
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
