"""timm's own tests of models, on our named models: every block in a ResNet and in a ViT, and these two without.

    python tests/backbones/timm_names.py

writes a table to results/. timm's tests come with its sources: they are fetched each time, and no copy is kept here.

As a pytest plugin (`-p timm_names`) this file answers for `timm.list_models`, where test_models.py gets its names.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import timm
import torch
from torch import nn

import backbones  # noqa: F401  registers the named models
from training.results import write
from vision_attn import list_blocks
from vision_attn.layout import Residual

ROOT = Path(__file__).parents[2]
STOCK = ("resnet18", "vit_tiny_patch4_32")
NAMES = {name: stock for stock in STOCK for name in (stock, *(f"{stock}_{block}" for block in list_blocks()))}


class Known(NamedTuple):
    """Tests that fail on models with a block; those of the stock models pass."""

    kind: str  # of test, with wildcards
    names: str  # of models, with wildcards
    said: str  # regular expression, to be found in the failure
    why: str


SCRIPT = "TorchScript takes neither hooks that are objects nor jaxtyping's annotations"
KNOWN = (
    Known("forward_torchscript", "*", r"torch.jit", SCRIPT),
    Known("forward_fx_torchscript", "*", r"torch.jit", SCRIPT),
)


class Result(NamedTuple):
    """One test of one model."""

    kind: str  # as timm names it, without "test_"
    name: str  # of the model
    outcome: str  # "passed", "failed" or "skipped"
    message: str

    @property
    def known(self) -> Known | None:
        """The failure that is expected, if one is."""
        rows = (row for row in KNOWN if fnmatchcase(self.kind, row.kind) and fnmatchcase(self.name, row.names))
        return None if self.name in STOCK else next(rows, None)

    @property
    def as_expected(self) -> bool:
        if self.known is None:
            return self.outcome == "passed"
        return self.outcome == "failed" and re.search(self.known.said, self.message) is not None


def pytest_configure():
    listed = timm.list_models

    def list_ours(filter="", module="", pretrained=False, **others):
        """As timm's, of our names. Ours lie in modules of their own, and with pretrained=True weights are fetched."""
        names = listed(filter, **{**others, "include_tags": False})
        return [] if pretrained else [name for name in names if name in NAMES]

    timm.list_models = list_ours
    # behind a gain of 0 a wrong block would pass
    Residual.reset_parameters = lambda layer: nn.init.constant_(layer.gain, 0.3)


def pytest_collection_modifyitems(items):
    """Without the tests of models that timm names itself."""
    named = {item: item.callspec.params.get("model_name") for item in items if hasattr(item, "callspec")}
    ours = {item.originalname for item, name in named.items() if name in NAMES and name not in STOCK}
    items[:] = [item for item, name in named.items() if name in NAMES and item.originalname in ours]


def fetch(folder: Path) -> Path:
    """test_models.py of the timm that is installed; ConnectionError if its sources can't be had."""
    command = [sys.executable, "-m", "pip", "download", f"timm=={timm.__version__}", "--no-binary", "timm", "--no-deps"]
    command += ["--dest", folder, "--retries", "1", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConnectionError(f"pip can't fetch the sources of timm {timm.__version__}:\n{done.stderr}")
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as sources:
        tests = sources.extractfile(f"timm-{timm.__version__}/tests/test_models.py").read()
    path = folder / "test_models.py"
    path.write_bytes(tests)
    return path


def run(path: Path) -> list[Result]:
    """All results of test_models.py, in a process of its own."""
    report = path.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", path.name, "-p", "timm_names", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-W", "ignore", "--tb", "short", "--junit-xml", report]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTEST_ADDOPTS": ""}
    env.pop("GITHUB_ACTIONS", None)  # there timm leaves out some
    done = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: some tests failed
    return [_result(case) for case in ElementTree.parse(report).iter("testcase")]


def _result(case: ElementTree.Element) -> Result:
    kind, _, arguments = case.get("name").removesuffix("]").partition("[")
    kind = kind.removeprefix("test_").removeprefix("model_")
    name = next(name for name in arguments.split("-") if name in NAMES)
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    for part in case:
        if part.tag in outcomes:
            return Result(kind, name, outcomes[part.tag], part.text or "")
    return Result(kind, name, "passed", "")


def table(results: list[Result]) -> list[dict]:
    """One row for each kind of test, of models with a block; the stock models are counted beside."""
    rows = []
    for kind in dict.fromkeys(result.kind for result in results):
        some = [result for result in results if result.kind == kind]
        stock = [result.outcome for result in some if result.name in STOCK]
        outcomes = Counter(result.outcome for result in some if result.name not in STOCK)
        row = {"test": kind} | {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
        row |= {"total": outcomes.total(), "stock": f"{stock.count('passed')} of {len(stock)} passed"}
        known = Counter(result.known for result in some if result.known and result.as_expected)
        notes = [f"{count} × {row.names} failed: {row.why}" for row, count in known.items()]
        rows.append(row | {"note": "; ".join(notes)})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(None, "timm-tests", table(run(fetch(Path(folder)))))
