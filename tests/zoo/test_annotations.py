"""The shapes in the annotations are true: the definitions' tests, run once more with every annotation checked."""

import subprocess
import sys
from pathlib import Path

import pytest

WHICH = {"quick": ["-m", "not slow", "-k", "float32_is_close or on_tokens_is_bit_for_bit"]}
WHICH["all"] = ["-k", "(definition or reference or mask or identity) and not any_size"]


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_annotated_shapes_hold(which):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *WHICH[which]]
    command += [
        "--jaxtyping-packages=vision_attn,beartype.beartype",
        "tests/zoo/test_blocks.py",
        "tests/zoo/test_layers.py",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
