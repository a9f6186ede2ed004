"""Checkpoints and tables that are whole or not there."""

import hashlib
import os

import pytest
import timm
import torch
from torch import nn

from training import checkpoint
from training.config import Config
from training.folder import Folder
from training.log import read_rows, write_rows


def contents(**kwargs):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return (
        dict(
            model="resnet18",
            model_args={"num_classes": 2, "in_chans": 3},
            insert=None,
            imports=[],
            scaler=None,
            state_dict=model.state_dict(),
            ema=None,
            optimizer=optimizer.state_dict(),
            epoch=2,
            step=7,
            within={"steps": 3, "loss": 4.5, "bad": 0},
            metrics={"top1": 51.5},
            history=[{"epoch": 1, "top1": 49.0}],
            config={},
            data={"mean": [0.5], "class_names": ["a", "b"]},
            versions=checkpoint.versions(),
            made={},
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
    assert set(loaded["versions"]) == {"python", "torch", "torchvision", "timm", "threads", "processes"}


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, **contents(epoch=1))

    def half(_, path):
        path.write_bytes(b"PK half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, **contents(epoch=2))
    assert checkpoint.load(path)["epoch"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "last.pt.sha256"]


def test_bad_checkpoints_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint {path}"):
        checkpoint.load(path)
    checkpoint.save(path, **contents())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"checkpoint {path} is damaged: its SHA-256 is not the one in last.pt.sha256"):
        checkpoint.load(path)
    (tmp_path / "last.pt.sha256").unlink()
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


def test_every_flipped_byte_is_refused_by_name(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, **contents())
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"checkpoint {path} is damaged"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)["step"] == 7
    assert checkpoint.sha256(path) == hashlib.sha256(whole).hexdigest()
    assert (tmp_path / "last.pt.sha256").read_text() == f"{hashlib.sha256(whole).hexdigest()}  last.pt\n"


@pytest.mark.parametrize("moment", range(1, 7))
def test_a_save_that_is_killed_leaves_a_good_checkpoint(moment, tmp_path, monkeypatch):
    """Killed before, in between and after: whatever was done by then, the file and its hash go together."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, **contents(epoch=1))
    replace, calls = os.replace, []

    def killed(old, new):
        calls.append(new)
        if len(calls) * 2 - 1 == moment:
            raise KeyboardInterrupt
        replace(old, new)
        if len(calls) * 2 == moment:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, **contents(epoch=2))
    monkeypatch.setattr(os, "replace", replace)
    assert checkpoint.load(path)["epoch"] == (1 if moment < 4 else 2)
    checkpoint.forget(tmp_path, step=99)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "last.pt.sha256"]


def run_of(folder, steps):
    for step in steps:
        checkpoint.save(folder / f"step-{step:08d}.pt", **contents(step=step))
    return folder


def test_the_newest_good_checkpoint_is_found_and_bad_ones_are_told_of(tmp_path, capsys):
    assert checkpoint.newest(tmp_path) is None
    run_of(tmp_path, (9, 20, 100))
    assert checkpoint.newest(tmp_path).name == "step-00000100.pt" and capsys.readouterr().err == ""
    for step in (100, 20):
        path = tmp_path / f"step-{step:08d}.pt"
        path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.newest(tmp_path).name == "step-00000009.pt"
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in warnings] == [["warning:", "checkpoint"]] * 2
    assert "step-00000100.pt is damaged" in warnings[0] and "step-00000020.pt is damaged" in warnings[1]
    (tmp_path / "step-00000009.pt").write_text("")
    with pytest.raises(ValueError, match=f"none of the 3 checkpoints in {tmp_path} is good"):
        checkpoint.newest(tmp_path)


def test_old_checkpoints_go_and_names_stay(tmp_path):
    run_of(tmp_path, (1, 2, 3, 4))
    checkpoint.give_name(tmp_path / "step-00000002.pt", tmp_path / "best.pt")
    checkpoint.clean(tmp_path, keep=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000004.pt", "step-00000003.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert not (tmp_path / "step-00000002.pt.sha256").exists()
    (tmp_path / ".best.pt.123.writing").write_text("half")
    checkpoint.forget(tmp_path, step=3)
    left = ["best.pt", "best.pt.sha256", "step-00000003.pt", "step-00000003.pt.sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    checkpoint.forget(tmp_path, step=None)
    assert list(tmp_path.iterdir()) == []


def test_a_further_name_is_a_copy_where_links_do_not_work(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    run_of(tmp_path, (5,))
    checkpoint.give_name(tmp_path / "step-00000005.pt", tmp_path / "last.pt")
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 5


def test_weights_are_a_file_that_timm_loads(tmp_path):
    model = timm.create_model("resnet18", num_classes=7).to(memory_format=torch.channels_last)
    checkpoint.save_weights(tmp_path / "best.safetensors", model.state_dict())
    loaded = timm.create_model("resnet18", num_classes=7, checkpoint_path=str(tmp_path / "best.safetensors"))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_tables_are_whole_files(tmp_path):
    path = tmp_path / "log.csv"
    assert read_rows(path) == []
    rows = [{"epoch": epoch, "loss": 0.123456789, "name": "a, b"} for epoch in (1, 2)]
    write_rows(path, rows)
    assert path.read_text() == 'epoch,loss,name\n1,0.123457,"a, b"\n2,0.123457,"a, b"\n'
    assert read_rows(path) == [{"epoch": str(epoch), "loss": "0.123457", "name": "a, b"} for epoch in (1, 2)]
    with pytest.raises(ValueError, match="extra"):
        write_rows(path, [*rows, rows[0] | {"extra": 1}])
    assert len(read_rows(path)) == 2


def best_of(folder):
    return checkpoint.load(folder / "best.pt")["step"] if (folder / "best.pt").exists() else None


def test_the_best_is_found_by_its_step_or_gone(tmp_path):
    """A run at step 20 whose best was step 9: under its number, under its name, in the folder it came from, nowhere."""
    metrics = {"best_step": 9}
    nine = contents(step=9, metrics=metrics)

    def folder(name, *steps):
        for step in steps:
            checkpoint.save(tmp_path / name / f"step-{step:08d}.pt", **(nine if step == 9 else contents(step=step)))
        folder = Folder(tmp_path / name)
        folder.last = tmp_path / name / "step-00000020.pt"
        return folder

    assert folder("numbered", 9, 20, 30).make_room(20, [], metrics)
    assert best_of(tmp_path / "numbered") == 9 and (tmp_path / "numbered" / "best.safetensors").exists()
    assert [checkpoint.step_of(path) for path in checkpoint.steps(tmp_path / "numbered")] == [20, 9]

    named = folder("named", 20)
    checkpoint.save(tmp_path / "named" / "best.pt", **nine)
    assert named.make_room(20, [], metrics) and best_of(tmp_path / "named") == 9

    other = Folder(tmp_path / "other")
    other.last = named.last
    assert other.make_room(20, [], metrics) and best_of(tmp_path / "other") == 9
    assert other.last == tmp_path / "other" / "step-00000020.pt" and checkpoint.load(other.last)["step"] == 20

    later = folder("later", 20)
    checkpoint.save(tmp_path / "later" / "best.pt", **contents(step=30, metrics={"best_step": 30}))
    assert not later.make_room(20, [], metrics) and best_of(tmp_path / "later") is None
