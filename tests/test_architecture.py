"""Who may import whom, and that a block is one file and nothing else."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import importlinter.cli

import vision_attn
from vision_attn import list_blocks

ROOT = Path(__file__).parent.parent
ROOMS = ["vision_attn", "backbones", "training"]


def imported(file: Path) -> set[str]:
    """Names of the top-level modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_rooms_import_only_what_they_may(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = importlinter.cli.lint_imports(config_filename=".importlinter", no_cache=True)
    assert code == importlinter.cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_nothing_imports_a_script():
    scripts = {"benchmarks", *(file.stem for file in ROOT.glob("*.py"))}
    assert "train_imagenet" in scripts
    files = [*ROOT.glob("*.py"), *(file for room in [*ROOMS, "benchmarks"] for file in (ROOT / room).rglob("*.py"))]
    assert len(files) > 20
    for file in files:
        assert not imported(file) & scripts, file


def test_a_block_is_one_file(tmp_path):
    """In a copy of the zoo, in a process of its own: any block works without any other, and one may be added.

    Half of the files are deleted at a time, so that of any two either one is once alone.
    """
    zoo = Path(vision_attn.__file__).parent
    shutil.copytree(zoo, tmp_path / "vision_attn", ignore=shutil.ignore_patterns("__pycache__"))
    program = tmp_path / "program.py"
    program.write_text(TRY_EACH)
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *gone, added = done.stdout.split()
    assert set(gone) == set(list_blocks()) and added == "brand_new"


TRY_EACH = """
import importlib, itertools, pathlib, shutil, sys
import torch
import vision_attn

folder = pathlib.Path("vision_attn/blocks").resolve()
assert pathlib.Path(vision_attn.blocks.__file__).parent == folder
names = vision_attn.list_blocks()

def work(expected):
    for module in [module for module in sys.modules if module.startswith("vision_attn.blocks.")]:
        del sys.modules[module]
    importlib.invalidate_caches()
    assert vision_attn.list_blocks() == sorted(expected)
    for name in expected:
        assert vision_attn.describe(name).name == name
        vision_attn.create_layer(name, 37)(torch.randn(2, 37, 5, 3))

pathlib.Path("hidden").mkdir()
for bit, value in itertools.product(range(len(names).bit_length()), (0, 1)):  # of the numbers of blocks
    gone = [name for number, name in enumerate(names) if number >> bit & 1 == value]
    for name in gone:
        (folder / f"{name}.py").rename(f"hidden/{name}.py")
    work([name for name in names if name not in gone])
    for name in gone:
        pathlib.Path(f"hidden/{name}.py").rename(folder / f"{name}.py")
        print(name)
shutil.copy(folder / f"{names[0]}.py", folder / "brand_new.py")
work([*names, "brand_new"])
print("brand_new")
"""
