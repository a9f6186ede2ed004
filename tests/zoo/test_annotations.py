"""The shapes in the annotations are true: the definitions' tests, run once more with every annotation checked."""

import subprocess
import sys
from pathlib import Path


def test_annotated_shapes_hold():
    chosen = "(definition or reference or mask or identity) and not any_size"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "not slow", "-k", chosen]
    command += [
        "--jaxtyping-packages=vision_attn,beartype.beartype",
        "tests/zoo/test_blocks.py",
        "tests/zoo/test_layers.py",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
