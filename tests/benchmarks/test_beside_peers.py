"""Blocks beside other packages: equal answers are compared, what can't be run is a row, and a stopped run goes on."""

import csv

import pytest
import torch
from scripts import load

beside_peers = load("benchmarks/beside_peers")
SMALL = dict(heads=2, channels=8, seconds=0.0)
INSTALLED = ["timm", "torchvision"]


def rows_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# python ")
    return list(csv.DictReader(lines[1:]))


def test_answers_are_the_same_where_it_is_said(tmp_path):
    """Of the packages that are always there, at two sizes, in a run that was stopped after the first."""
    path = tmp_path / "peers.csv"
    beside_peers.benchmark(packages=INSTALLED, sizes=((14, 7, 3),), path=str(path), **SMALL)
    stopped = rows_of(path)
    beside_peers.benchmark(packages=INSTALLED, sizes=((14, 7, 3), (7, 21, 2)), resume=str(path), **SMALL)
    rows = rows_of(path)
    assert rows[: len(stopped)] == stopped and len(rows) == 2 * len(stopped)
    pairs = [pair for pair in beside_peers.PAIRS if pair.package in INSTALLED]
    assert len(rows) == 2 * 2 * len(pairs) and {row["block"] for row in rows} == {pair.block for pair in pairs}
    for row in rows:
        differs = row["peer"] in ("HaloAttn", "Attention") and row["block"] != "dense"
        assert row["answers"].startswith("differs: ") if differs else row["answers"] == "same", row
        ratio = float(row["peer ms"]) / float(row["ours ms"])
        assert float(row["peer / ours"]) == pytest.approx(ratio, rel=0.05, abs=0.01)
        assert float(row["ours MiB"]) > 0 < float(row["peer MiB"])
    kinds = [row["kind"] for row in rows]
    assert kinds == ["forward", "forward + backward"] * (len(rows) // 2)


def test_other_weights_are_not_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(beside_peers, "copy", lambda source, *targets: None)
    path = tmp_path / "peers.csv"
    beside_peers.benchmark(blocks=["dense"], sizes=((5, 7, 2),), path=str(path), **SMALL)
    assert all(row["answers"].startswith("not the same: ") for row in rows_of(path))


def test_what_cannot_be_run_is_a_row(tmp_path, monkeypatch):
    def needs_another(create, Peer, dim, heads, grid):
        raise ImportError("no module\nnamed other")

    pairs = [("dense", "no-such-package", "nowhere.Peer"), ("dense", "timm", "timm.layers.Attention")]
    monkeypatch.setattr(beside_peers, "PAIRS", [])
    for pair in (*pairs, ("cbam", "timm", "timm.layers.NoSuchPeer")):
        beside_peers.pair(*pair, "tokens")(needs_another)
    path = tmp_path / "peers.csv"
    beside_peers.benchmark(sizes=((5, 7, 2),), path=str(path), **SMALL)
    missing, wanting, unknown = rows_of(path)
    assert (
        missing["answers"] == "not installed: pip install no-such-package" and missing["package"] == "no-such-package"
    )
    assert wanting["answers"] == "failed: ImportError: no module named other" and wanting["grid"] == "5×7"
    assert unknown["answers"].startswith("failed: AttributeError") and unknown["peer"] == "NoSuchPeer"
    assert not any(row[column] for row in (missing, wanting, unknown) for column in ("kind", "ours ms", "peer / ours"))
    monkeypatch.setattr(beside_peers, "PAIRS", beside_peers.PAIRS[:1])
    beside_peers.pair(*pairs[1], "tokens")(lambda create, Peer, dim, heads, grid: (create(), Peer(dim)))
    beside_peers.benchmark(sizes=((5, 7, 2),), resume=str(path), **SMALL)  # now there is all that was wanting
    assert [row["kind"] for row in rows_of(path)] == ["", "forward", "forward + backward"]


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="blocks='windw': no pair has it; nearest: window"):
        beside_peers.benchmark(blocks=["cbam", "windw"])
    with pytest.raises(ValueError, match="packages='tim': no pair has it; nearest: timm"):
        beside_peers.benchmark(packages=["tim"])
    with pytest.raises(ValueError, match=r"packages=\['torchvision'\]: no pair of cbam, dense"):
        beside_peers.benchmark(blocks=["cbam", "dense"], packages=["torchvision"])
    with pytest.raises(ValueError, match="packages='%%%': no pair has it; there are: aft-pytorch, "):
        beside_peers.benchmark(packages=["%%%"])


def test_divisor_is_the_largest_that_is_allowed():
    assert [beside_peers.divisor(n, 8) for n in (64, 28, 13, 5, 91)] == [8, 7, 1, 5, 7]


def test_copy_shares_out_rows_in_order():
    source, first, second = torch.nn.Linear(3, 7), torch.nn.Conv2d(3, 2, 1), torch.nn.Linear(3, 5)
    with torch.no_grad():
        beside_peers.copy(source, first, second)
    x = torch.randn(11, 3)
    both = torch.cat([first(x[:, :, None, None]).flatten(1), second(x)], dim=1)
    torch.testing.assert_close(both, source(x))
