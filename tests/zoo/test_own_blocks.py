"""Blocks of one's own: classes where names are taken, and names by `register` and by entry points of packages."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import timm
import torch

import backbones
from vision_attn import Gate, Grid, create_block, create_layer, describe, layer, list_blocks, recommend, register, zoo
from vision_attn.__main__ import main
from vision_attn.key_set import Everything, Only
from vision_attn.mixer import PatternMixer
from vision_attn.pattern import Pattern


@dataclass(frozen=True)
class Jumps(Pattern):
    """Where a knight jumps to, and itself."""

    def allowed(self, qy, qx, ky, kx, grid):
        down, right = abs(qy - ky), abs(qx - kx)
        return ((down == 1) & (right == 2)) | ((down == 2) & (right == 1)) | ((down == 0) & (right == 0))

    def key_sets(self):
        return (Only(Everything(), self),)


class KnightMoves(PatternMixer):
    """A knight's moves."""

    def __init__(self, dim, num_heads=None, *, twice: bool = False, **mixer):
        super().__init__(Jumps(), dim, num_heads, **mixer)
        self.twice = twice


class Halves(Gate):
    """Half of it."""

    def gate(self, x):
        return x / 2


@pytest.fixture
def names(monkeypatch):
    """Names that are given in a test end with it; timm, which keeps them, is told none."""
    monkeypatch.setattr(zoo, "_own", {})
    monkeypatch.setattr(zoo, "_followers", [])


def test_a_class_serves_wherever_a_name_does(names):
    x, grid = torch.randn(2, 33, 5, 7), Grid(5, 7)
    assert isinstance(create_block(KnightMoves, 33, num_heads=3), KnightMoves)
    assert torch.equal(create_layer(KnightMoves, 33)(x), x)
    assert isinstance(layer(KnightMoves, num_heads=3)(33).block, KnightMoves)
    assert layer(KnightMoves).__name__ == "layer('knight_moves')"
    entry = describe(KnightMoves)
    assert (entry.name, entry.title, entry.kind, entry.causal) == ("knight_moves", "A knight's moves.", "mixer", True)
    resnet = timm.create_model("resnet18").eval()
    images = torch.randn(1, 3, 64, 96)
    wanted = resnet(images)
    backbones.insert(resnet, KnightMoves, "layer3.1")
    assert isinstance(resnet.layer3[1].attn_knight_moves.block, KnightMoves) and torch.equal(resnet(images), wanted)
    with pytest.raises(ValueError, match="layer3.1 already has a knight_moves"):
        backbones.insert(resnet, KnightMoves, "layer3.1")
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert isinstance(backbones.replace(vit, KnightMoves, "blocks.1").model.blocks[1].attn, KnightMoves)
    assert {one.name for one in recommend(*grid, 33, blocks=[KnightMoves, "win*"], seconds=0)} == {
        "dense",
        "knight_moves",
        "window",
    }
    assert list_blocks("kni*") == []


def test_what_is_refused_names_the_class(names):
    with pytest.raises(TypeError, match="twise: no option of knight_moves; nearest: twice"):
        create_block(KnightMoves, 33, twise=True)
    with pytest.raises(ValueError, match="block='halves': is a gate"):
        backbones.replace(timm.create_model("vit_tiny_patch16_224", depth=1), Halves)
    for wrong in (torch.nn.Linear, KnightMoves(33), 5, None):
        for take in (lambda wrong=wrong: create_block(wrong, 33), lambda wrong=wrong: register(wrong, "wrong")):
            with pytest.raises(ValueError, match="block=.*: must be a name, or a subclass of Mixer or Gate"):
                take()


def test_a_registered_name_is_one_like_the_others(names):
    assert register(KnightMoves, name="knight") is KnightMoves
    assert list_blocks("kn*") == ["knight"] and describe("knight").name == "knight"
    assert isinstance(create_block("knight", 33, twice=True), KnightMoves)
    assert layer(KnightMoves).__name__ == "layer('knight')"
    with pytest.raises(ValueError, match="block='knigth': no such block; nearest: knight"):
        create_block("knigth", 33)


def test_names_are_given_once(names):
    register(KnightMoves, name="knight")
    register(KnightMoves, name="knight")  # the same
    for taken in ("knight", "cbam"):
        with pytest.raises(ValueError, match=f"name='{taken}': there is a block of that name already"):
            register(Halves, name=taken)
    for wrong in ("Knight", "a-b", "", "1st", None, 5):
        with pytest.raises(ValueError, match="name=.*: must be lower-case letters"):
            register(Halves, name=wrong)


PACKAGE = """
from vision_attn.blocks.window import Block as Window

class Block(Window):
    "A window of one row."
    def __init__(self, dim, num_heads=None, **options):
        super().__init__(dim, num_heads, kernel_size=(1, 3), **options)
"""
PROGRAM = """
import sys, timm, warnings
warnings.simplefilter("error")
import vision_attn
assert vision_attn.list_blocks("ro*") == ["routing", "rowwise"], vision_attn.list_blocks("ro*")
assert "own_package.rowwise" not in sys.modules  # until it is used
block = vision_attn.create_block("rowwise", 33)
assert vision_attn.describe("rowwise").title == "A window of one row."
import backbones
timm.create_model("cifar_resnet20_rowwise")
assert vision_attn.create_layer(type(block), 33).block.dim == 33
assert not timm.list_models("*_thrice")
vision_attn.register(type("Thrice", (type(block),), {}), name="thrice")  # after the import
assert len(timm.list_models("*_thrice")) == len(timm.list_models("*_rowwise")) == len(timm.list_models("*_cbam")) > 9
names = [name for name, _ in timm.create_model("cifar_resnet20_thrice").named_modules()]
assert "layer2.2.attn_thrice" in names, names
print(vision_attn.zoo.name_of(type(block)))
"""


def test_an_installed_package_brings_names(tmp_path):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "rowwise.py").write_text(PACKAGE)
    info = tmp_path / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vision_attn.blocks]\nrowwise = own_package.rowwise:Block\n")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "rowwise"), done.stderr


def test_a_package_that_can_not_be_loaded_is_named(monkeypatch):
    for value, said in (("gone_package:Block", "No module named 'gone_package'"), ("json:Block", "has no attribute")):
        point = EntryPoint("lost", value, "vision_attn.blocks")
        monkeypatch.setattr(zoo, "_of_packages", lambda point=point: {"lost": point})
        with pytest.raises(ValueError, match=f"block='lost': {value} can't be loaded from its package: .*{said}"):
            create_block("lost", 33)


def test_what_a_block_of_ones_own_does_not_say_is_left_out(names, capsys):
    register(KnightMoves, name="knight")
    assert main(["list", "knight"]) == 0
    assert capsys.readouterr().out.split(maxsplit=3) == ["knight", "mixer", "causal", "A knight's moves.\n"]
    assert main(["cost", "knight", "--size", "3x5", "--dim", "32", "--seconds", "0"]) == 0
    assert "by its docstring" not in capsys.readouterr().out
    quiet = type("Quiet", (Halves,), {"__module__": __name__})  # without a docstring: that of its file
    assert describe(quiet).title == __doc__


def test_a_package_can_not_take_a_name(monkeypatch):
    class Point:
        name, value = "cbam", "own_package:Block"

    monkeypatch.setattr(zoo, "entry_points", lambda group: [Point()])
    zoo._of_packages.cache_clear()
    with pytest.warns(UserWarning, match="vision_attn.blocks: cbam = own_package:Block is left out: the name is taken"):
        assert list_blocks("cbam") == ["cbam"]
    monkeypatch.undo()
    zoo._of_packages.cache_clear()
