"""Whole models, eager, compiled and in onnxruntime: what is measured is written, and so is what fails."""

import csv

import pytest
from scripts import load

exported_models = load("benchmarks/exported_models")


def test_exported_models_are_timed_and_failures_said(tmp_path, monkeypatch):
    """Also by a run that goes on; without a compiler."""
    path = tmp_path / "speed.csv"

    def no_compiler(model, images, threads):
        raise RuntimeError("no\ncompiler")

    monkeypatch.setitem(exported_models.ROUTES, "compiled", ("compile", no_compiler))
    options = dict(models=["cifar_resnet20"], image_size=32, rounds=1)
    exported_models.benchmark(**options, blocks=[], path=str(path))
    stopped = path.read_text(encoding="utf-8").splitlines()
    exported_models.benchmark(**options, blocks=["efficient"], resume=str(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# python ") and lines[1:3] == stopped[1:]
    rows = list(csv.DictReader(lines[1:]))
    assert [row["model"] for row in rows] == ["cifar_resnet20", "cifar_resnet20_efficient"]
    assert rows[0]["parameters"] == "269722" < rows[1]["parameters"]
    for row in rows:
        assert row["compiled ms"] == "failed: RuntimeError: no compiler" and row["eager / compiled"] == "not run"
        ratio = float(row["eager ms"]) / float(row["onnxruntime ms"])
        assert float(row["eager / onnxruntime"]) == pytest.approx(ratio, rel=0.05)
        assert 0 < float(row["export: largest difference"]) < 1e-4
    with pytest.raises(ValueError, match="resnet18_nope"):
        exported_models.benchmark(models=["resnet18"], blocks=["nope"])
