"""The README is true: its code runs as written, its table is the registry's, its commands name files that exist."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import alive
from pictures import make_folder
from PIL import Image
from scripts import load
from timm.data import create_transform, resolve_data_config

import backbones
from training.datasets import Digits
from vision_attn import list_blocks
from vision_attn.__main__ import BEGIN, END, main, parse, renew

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, pixels, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (2, 10)
    assert names["tokens"].shape == (2, 1 + 7 * 11, 64)
    assert names["maps"]["blocks.0.attn"].shape == (1, 6, 10)
    assert max(names["errors"].values()) < 1e-4 and (tmp_path / "model.onnx").is_file()
    assert all(torch.isfinite(names["slot"](torch.zeros(1, 3, 64, 96))).flatten())
    names = {}
    exec(pixels, names)
    assert names["tokens"].shape == (1, 32 * 96, 64) and names["images"].shape == (4, 1, 8, 8)
    assert abs(names["bits"].item() - math.log2(17)) < 1e-5  # its logits start at 0
    assert len(names["mixed"].blocks) == 3


@pytest.mark.slow
def test_a_block_of_ones_own_is_tested_as_written(tmp_path):
    *_, own = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "own.py").write_text(own)
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RowsAndWindows(dim=33, num_heads=3, key_dim=21): everything holds" in done.stdout


def test_table_is_the_registry(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"above\n{BEGIN}\nstale\n{END}\nbelow", encoding="utf-8")
    assert main(["readme", str(page)]) == 0
    new = page.read_text(encoding="utf-8")
    assert new.startswith("above\n") and new.endswith("\nbelow") and "stale" not in new
    assert all(f"| `{name}` |" in new for name in list_blocks())
    table = re.search(f"{BEGIN}.*{END}", new, re.DOTALL).group()
    assert table in README, "the table is stale: make docs"


def test_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="page"):
        renew(page)
    assert page.read_text(encoding="utf-8") == "no marks"


def test_list_names_every_block(capsys):
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_blocks()


def test_show_prints_what_it_says(capsys):
    shown, _ = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    command = next(line for line in README.splitlines() if "-m vision_attn show" in line)
    assert main(shlex.split(command, comments=True)[3:]) == 0
    assert capsys.readouterr().out == shown


def test_commands_name_existing_files():
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = blocks.replace("\\\n", " ").splitlines()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in filter(None, commands):
        words = shlex.split(command, comments=True)
        words = words["=" in words[0] :]  # without a variable in front
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, command
        elif words[1:3] == ["-m", "vision_attn"]:
            assert parse(words[3:])
        else:
            assert words[0] in (".venv/bin/python", ".venv/bin/torchrun"), command
            assert (ROOT / next(word for word in words if word.endswith(".py"))).is_file(), command
            assert all((ROOT / word).is_file() for word in words if word.startswith("configs/")), command
    assert len(commands) >= 6


def test_the_commands_for_ones_own_folder_run(tmp_path, monkeypatch, capsys):
    """As written, but for fewer epochs and blocks; the first command twice, as it goes on by itself."""
    section = README.partition("### Your own folder\n")[2].partition("\n#")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    train, *others = [shlex.split(line, comments=True)[1:] for line in block.replace("\\\n", " ").splitlines()]
    assert len(others) == 4
    train += ["--model.args.attn_at", "layer3.2"]  # of nine blocks an export takes long
    make_folder(tmp_path / "photos", images=8)
    make_folder(tmp_path / "new_photos", splits=("val",))
    monkeypatch.chdir(tmp_path)
    place = train.index("--epochs") + 1
    for epochs in ("1", "2"):
        assert load("train_imagenet").main([*train[1:place], epochs, *train[place + 1 :]]) == 0
    out = capsys.readouterr().out
    assert "3×64×64, 2 classes; folder photos: 16 images an epoch" in out
    assert "goes on from runs/photos/step-00000001.pt: epoch 2, step 1" in out
    for script, *words in others:
        assert load(script.removesuffix(".py")).main(words) == 0, words
    out = capsys.readouterr().out
    for told in (
        "input 3×64×64",
        "input 3×96×96",
        "folder new_photos: 6 to evaluate",
        "photos.onnx: largest difference",
    ):
        assert told in out
    assert load("train_imagenet").main([*train[1:], "--data.val_split", "validation"]) == 2
    assert "has no folder validation, it has train, val" in capsys.readouterr().err


def test_relative_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "results/README.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_the_mixers_shows_the_newest_table_of_each_machine():
    newest = {file.name.partition("-torch")[0]: file for file in sorted(ROOT.glob("results/*-mixer-accuracy.txt"))}
    shown = re.findall(r"```text\n(.*?)```", (ROOT / "docs/mixers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert sorted(shown) == sorted(file.read_text(encoding="utf-8") for file in newest.values())


CROPS = [((61, 47), 0.9)]
CROPS += [
    pytest.param(*crop, marks=pytest.mark.slow) for crop in (((23, 40), 0.875), ((32, 32), 1.0), ((299, 450), 0.95))
]


@pytest.mark.parametrize("size, crop_pct", CROPS)
def test_the_exported_file_is_enough(tmp_path, size, crop_pct):
    """In a process of its own, which refuses every import but those of the snippet; images prepared as by timm."""
    (program,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "InferenceSession" in code]
    assert len(program.splitlines()) <= 20
    torch.manual_seed(0)
    model = alive(timm.create_model("cifar_resnet20_cbam", num_classes=10, attn_at="layer3.2")).eval()
    model.pretrained_cfg = model.pretrained_cfg | {"crop_pct": crop_pct}
    names = [f"digit {digit}" for digit in range(10)]
    backbones.export_onnx(model, tmp_path / "model.onnx", metadata={"class_names": names})
    image = Digits(train=False)[3][0].resize(size, Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    banned = "import sys\nfor name in ('torch', 'timm', 'vision_attn', 'backbones'): sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", banned + program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prepare = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        shares = model(prepare(image.convert("RGB"))[None]).softmax(dim=1)[0]
    assert done.stdout.strip() == f"{names[shares.argmax()]} {shares.max():.0%}"
