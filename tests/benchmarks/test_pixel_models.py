"""Pixel models: simple ones to compare with, steps and sampling."""

import csv

import numpy as np
import pytest
from scripts import load

from training.datasets import Digits

pixel_models = load("benchmarks/pixel_models")


def test_simple_models_of_digits_are_counts():
    """Of every pixel: near the entropy of its values, averaged."""
    simple = pixel_models.simple_models()
    train, test = (np.stack([np.asarray(image) for image, _ in Digits(train=one, raw=True)]) for one in (True, False))
    bits = []
    for y in range(8):
        for x in range(8):
            share = (np.bincount(train[:, y, x], minlength=17) + 1) / (len(train) + 17)
            bits.append(-np.log2(share[test[:, y, x]]).mean())
    assert simple["per-pixel marginal"] == pytest.approx(np.mean(bits), rel=1e-5)
    assert 2 < simple["left bigram"] < simple["per-pixel marginal"] - 0.1


def test_training_steps_are_compared(tmp_path):
    path = tmp_path / "step.csv"
    pixel_models.step(depth=1, dim=48, heads=3, repeats=1, path=str(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = {row["model"]: row for row in csv.DictReader(lines[1:])}
    assert rows["dense"]["model: dense / this"] == rows["dense"]["attention: dense / this"] == "1.00"
    assert all(float(row[f"{what} ms"]) > 0 for row in rows.values() for what in ("model", "attention"))


@pytest.mark.slow
def test_sampling_is_timed_with_every_cache(tmp_path):
    path = tmp_path / "sampling.csv"
    pixel_models.sampling(batches=(1,), depth=1, dim=48, heads=3, path=str(path))
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()[1:]))
    assert {row["cache"] for row in rows} == {"none", "full", "pattern"}
    held = {(row["model"], row["cache"]): float(row["cache MiB"]) for row in rows}
    assert held["linear, recurrent", "pattern"] < held["fixed c=8", "pattern"] < held["fixed c=8", "full"]
