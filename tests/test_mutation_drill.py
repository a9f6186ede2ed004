"""The mutation drill itself: every block can be broken, and what is broken is found out."""

import csv
import subprocess
import sys

import pytest
from mutation_drill import TESTS, ZOO, Mutant, drill, mutants

from vision_attn import list_blocks
from vision_attn.testing import PROPERTIES


def test_every_block_is_broken_in_places_that_compute():
    kinds = set()
    for block in list_blocks():
        source = (ZOO / f"blocks/{block}.py").read_text(encoding="utf-8")
        found = list(mutants(f"blocks/{block}.py"))
        assert found or block == "dense"  # whose file computes nothing
        for mutant in found:
            compile(mutant.source, mutant.file, "exec")
            old, new = source.splitlines(), mutant.source.splitlines()
            assert old[: mutant.line - 1] == new[: mutant.line - 1] and old != new
            assert mutant.block == block and mutant.module == f"vision_attn.blocks.{block}"
            kinds.add(mutant.kind)
    assert kinds >= {"off by one", "mask forgotten", "scale dropped", "wrong axis", "height and width swapped"}


def test_messages_checks_and_annotations_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("mutation_drill.ZOO", tmp_path)
    (tmp_path / "a.py").write_text(
        '"""Of H W pixels."""\ndef f(x: int | None) -> int | None:\n'
        '    check.pair("x", x - 1)\n    if x <= 0:\n        raise ValueError(f"{x - 1}")\n    return x\n'
    )
    assert [mutant[1:5] for mutant in mutants("a.py")] == [(4, "off by one", "x <= 0", "(x < 0)")]


@pytest.mark.slow
def test_a_drill_lists_which_test_caught_what(tmp_path):
    path = tmp_path / "mutations.csv"
    command = [sys.executable, TESTS / "mutation_drill.py", "--files", "[blocks/criss_cross.py]", "--path", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.read_text().splitlines()[1:]))
    assert len(rows) == len(list(mutants("blocks/criss_cross.py")))
    assert {row["file"] for row in rows} == {"blocks/criss_cross.py"}
    names = {row["caught by"] for row in rows if not row["caught by"].startswith("test_criss_cross.py::test_")}
    assert names and names <= {each.name for each in PROPERTIES}
    assert f"{len(rows)} of {len(rows)} caught, 100.0 %" in done.stdout


def test_blocks_to_try_must_exist():
    with pytest.raises(ValueError, match=r"blocks=\['dense', 'windows'\]: there is no windows"):
        drill(files=["engines/union.py"], blocks=["dense", "windows"])


def test_mutants_name_their_module():
    assert Mutant("engines/union.py", 1, "", "", "", "").module == "vision_attn.engines.union"
    assert Mutant("engines/union.py", 1, "", "", "", "").block is None
