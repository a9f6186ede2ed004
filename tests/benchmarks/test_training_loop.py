"""The comparison of blocks on CIFAR-10: what is written is what the runs say, and a run that was stopped ends it."""

import csv
import subprocess
from pathlib import Path

import timm
from scripts import load

from training import checkpoint

training_loop = load("benchmarks/training_loop")


def read(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:]))


def test_blocks_are_written_run_by_run_until_one_is_stopped(tmp_path, monkeypatch):
    """Of three networks with two seeds each, the last run of the last network is cut short."""
    path, networks, found, started = tmp_path / "blocks.csv", ("", "cbam", "efficient"), [], []

    def run(command, check):
        assert check
        started.append(command[command.index("--output") + 1].name)
        if path.exists():
            found.append(len(read(path)))

    def load_last(last):
        model, seed = last.parent.name.rsplit("-", 1)
        whole = (model, seed) != ("cifar_resnet20_efficient", "1")
        top1 = 40.0 + len(model) + 2 * int(seed)
        history = [{"top1": 11.0, "images_per_second": 700.0}, {"top1": top1, "images_per_second": 300.0 + int(seed)}]
        return {"epoch": 2 if whole else 1, "history": history, "model": model, "model_args": {"num_classes": 10}}

    monkeypatch.setattr(training_loop, "CORE", networks[1:])
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(checkpoint, "load", load_last)
    training_loop.blocks("data", epochs=2, runs=str(tmp_path), path=str(path))

    names = [f"cifar_resnet20{'_' if block else ''}{block}" for block in networks]
    assert started == [f"{name}-{seed}" for seed in (0, 1) for name in names]
    assert found == [1, 2, 3, 3, 3]
    rows = read(path)
    assert [row["model"] for row in rows] == names
    assert [row["seeds"] for row in rows] == ["2", "2", "1"]
    assert [row["spread"] for row in rows] == ["2.00", "2.00", "not run"]
    for row in rows:
        assert float(row["top-1"]) == 40 + len(row["model"]) + (row["seeds"] == "2")
        size = sum(p.numel() for p in timm.create_model(row["model"], num_classes=10).parameters())
        assert row["parameters"] == str(size) and row["images/s"] == "700" and row["epochs"] == "2"
