"""A block inserted into any timm model: checkpoints remember it, so later commands need nothing more."""

import pytest
import torch
from scripts import equal, finish, load, log_of, options, refused, standing, start

from training import checkpoint

FAST = options(model__name="cifar_resnet20", data__img_size=8, batch_size=96, threads=1, data__train_images=192)
GATE = options(model__insert="cbam", model__at="layer[23]", model__attn_args='{"kernel_size": 3}')
OWN = """
from vision_attn import Gate, register

class Half(Gate):
    def __init__(self, dim, device=None, dtype=None):
        super().__init__(dim)

    def gate(self, x):
        return x / 2
    def attention_map(self, x):
        return x.mean(dim=1)

register(Half, name="half_of_it")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert load("train_imagenet").main([*FAST, *GATE, *options(epochs=2, output=output)]) == 0
    return output


def test_it_is_there_and_is_the_identity_before_training(whole, tmp_path, capsys):
    saved = checkpoint.load(whole / "best.pt")
    assert saved["insert"] == {"block": "cbam", "at": "layer[23]", "options": {"kernel_size": 3}}
    assert [name for name in saved["state_dict"] if name.endswith("gain")] == [
        f"layer{i}.2.attn_cbam.gain" for i in (2, 3)
    ]
    assert all(saved["state_dict"][f"layer{i}.2.attn_cbam.gain"].item() != 0 for i in (2, 3))
    first = {}
    for name, more in (("plain", []), ("cbam", GATE)):
        argv = [*FAST, *more, *options(epochs=1, seed=5, output=tmp_path / name), "--eval-first"]
        assert load("train_imagenet").main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        first[name] = lines[1].startswith("before training") and lines[1]
    assert first["plain"] == first["cbam"]


def test_a_run_goes_on_from_its_checkpoint_alone(whole, tmp_path, capsys):
    halves = [*FAST, *GATE, *options(epochs=2, output=tmp_path / "halves", keep=9)]
    assert load("train_imagenet").main(halves) == 0
    for path in (tmp_path / "halves").glob("step-00000004*"):
        path.unlink()
    first = next((tmp_path / "halves").glob("step-*2.pt"))
    assert load("train_imagenet").main(["--resume", str(first), "--overwrite"]) == 0
    assert "goes on from" in capsys.readouterr().out
    assert equal(standing(tmp_path / "halves"), standing(whole))
    assert len(log_of(tmp_path / "halves")) == 2
    moved = (tmp_path / "halves").rename(tmp_path / "moved")
    assert load("train_imagenet").main([*options(output=moved, resume="auto", epochs=3)]) == 0
    assert checkpoint.load(moved / "last.pt")["epoch"] == 3 and not (tmp_path / "halves").exists()


def test_evaluation_report_maps_and_export_need_nothing_more(whole, tmp_path, capsys):
    best = whole / "best.pt"
    assert load("train_imagenet").main(["--eval", str(best), "--threads", "1"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert f"{best}: cifar_resnet20 + cbam, input 3×8×8" in first
    assert f"top1 {checkpoint.load(best)['metrics']['best_top1']:.4f}" in last
    maps, page, onnx = (tmp_path / name for name in ("maps.png", "r.html", "m.onnx"))
    for script, given in (
        ("show_attention", dict(checkpoint=best, path=maps, count=1)),
        ("report", dict(run=whole, path=page, count=2)),
        ("export_onnx", dict(checkpoint=best, path=onnx, dynamic=False)),
    ):
        assert load(script).main(options(**given)) == 0
    assert maps.exists() and "<h2>Attention</h2>" in page.read_text() and onnx.exists()


def test_options_of_the_block_may_be_changed_in_an_evaluation(whole, capsys):
    best = str(whole / "best.pt")
    line = refused("train_imagenet", ["--eval", best, *options(model__attn_args__kernel_size=5)], capsys)
    assert f"the weights of {best} do not fit cifar_resnet20" in line
    line = refused("train_imagenet", ["--eval", best, *options(model__insert="axial")], capsys)
    assert f"model.insert is axial, but {best} holds cbam" in line
    line = refused("train_imagenet", ["--resume", best, *options(model__at="layer3")], capsys)
    assert "inserted, not {'block': 'cbam', 'at': 'layer3', 'options': {'kernel_size': 3}}" in line


TWICE = """
import sys
import train_imagenet
from vision_attn import zoo

assert train_imagenet.main(sys.argv[1:]) == 0
del sys.modules["my_blocks"], zoo._own["half_of_it"]  # as in another process
assert train_imagenet.main(["--eval", "run/best.pt", "--threads", "1"]) == 0
"""


def test_code_of_ones_own_is_imported_and_remembered(tmp_path):
    """In a process of its own, which registers a block for itself alone."""
    (tmp_path / "my_blocks.py").write_text(OWN)
    (tmp_path / "twice.py").write_text(TWICE)
    run = [*FAST, *options(imports="my_blocks", model__name="cifar_resnet20_half_of_it", epochs=1, output="run")]
    code, out, err = finish(start(tmp_path / "twice.py", run, cwd=tmp_path))
    assert code == 0, err
    saved = checkpoint.load(tmp_path / "run" / "best.pt")
    assert saved["imports"] == ["my_blocks"] and "layer3.2.se.gain" in saved["state_dict"]
    assert f"top1 {saved['metrics']['top1']:.4f}" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(model__at="layer3"), "model.at must be left out without model.insert, got 'layer3'"),
        (
            dict(model__attn_args__kernel_size=3),
            "model.attn_args must be left out without model.insert, got {'kernel_size': 3}",
        ),
        (dict(model__insert="cbm"), "model.insert cbm, model.at None, model.attn_args {}, into cifar_resnet20: block="),
        (dict(model__insert="cbam", model__at="layr3"), "layer3"),
        (
            dict(model__insert="cbam", model__attn_args__kernelsize=3),
            "kernelsize: no option of cbam; nearest: kernel_size",
        ),
        (dict(imports="no_such_module"), "imports no_such_module: No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_inserted_is_said(given, named, tmp_path, capsys):
    assert named in refused("train_imagenet", [*FAST, *options(**given, output=tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_pixel_models_name_their_blocks_themselves(capsys):
    line = refused("train_pixels", options(model__insert="cbam"), capsys)
    assert "model.insert must be left out: model.args.blocks names a pixel model's own, got 'cbam'" in line


def test_older_checkpoints_have_nothing_inserted(whole, tmp_path):
    saved = checkpoint.load(whole / "best.pt")
    torch.save({key: value for key, value in saved.items() if key not in checkpoint.LATER}, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")["insert"] is None
