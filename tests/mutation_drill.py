"""A drill for the tests: the source of a mechanism is broken in one place at a time, and some test must say so.

    python tests/mutation_drill.py                                 every block
    python tests/mutation_drill.py --files '[engines/union.py, pattern.py]' --blocks '[dense, window]'

The second breaks what blocks share, and tries it on some of them.

The scale is dropped, height and width change places, a comparison is off by one, a mask is forgotten (so that what
it leaves to another set counts twice), an axis is the wrong one. Each broken zoo runs in a process of its own: first
the properties of `vision_attn.testing` on the blocks concerned, then the tests that are special to them, until one
fails or it has taken three times as long as all of them did unbroken. Writes a CSV to results/, survivors last.
"""

import ast
import importlib.abc
import importlib.util
import itertools
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401  what takes long to import is imported once, before processes fork
import pytest
import timm  # noqa: F401
import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from training.results import write

TESTS = Path(__file__).parent
ZOO = TESTS.parent / "vision_attn"
LIMIT = 1800  # seconds for what is not broken
SURVIVED, NO_ANSWER = "SURVIVED", "no end in three times the time, or a crash"
SHARED_TESTS = [f"zoo/test_{name}.py" for name in ("union", "patterns", "layers", "cache", "average")]


class Mutant(NamedTuple):
    """A file of the zoo with one change."""

    file: str  # relative to the zoo
    line: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def module(self) -> str:
        return ".".join(["vision_attn", *Path(self.file).with_suffix("").parts])

    @property
    def block(self) -> str | None:
        """The block whose file it is; None of what all share."""
        return Path(self.file).stem if self.file.startswith("blocks") else None


# Mutations


def mutants(file: str) -> Iterator[Mutant]:
    """Every way to break a file in one place."""
    source = (ZOO / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in code(ast.parse(source)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = source[begin:end].decode()
        for kind, after in broken(node):
            changed = source[:begin] + after.encode() + source[end:]
            yield Mutant(file, node.lineno, kind, " ".join(before.split()), after, changed.decode())


def code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute: without annotations, docstrings, messages and checks of arguments."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("check.", "warnings.")):
        return
    if isinstance(node, ast.FunctionDef) and node.name == "extra_repr":
        return
    if isinstance(node, ast.expr):
        yield node
    for name, value in ast.iter_fields(node):
        if name not in (
            "annotation",
            "returns",
            "decorator_list",
            "type_params",
            "args" if hasattr(node, "returns") else "",
        ):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from code(child)


OFF_BY_ONE = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
MASKS = ("masked_fill", "tril", "triu", "clamp", "relu")


def broken(node: ast.expr) -> Iterator[tuple[str, str]]:
    """What may stand in a node's place: the kind of fault, and its source."""
    text = ast.unparse
    match node:
        case ast.Compare(left, [op], [right]) if type(op) in OFF_BY_ONE:
            yield "off by one", f"({text(left)} {OFF_BY_ONE[type(op)]} {text(right)})"
        case ast.BinOp(left, ast.Add() | ast.Sub(), ast.Constant(value=int())):
            yield "off by one", f"({text(left)})"
        case ast.BinOp(left, ast.BitAnd() | ast.BitOr(), right):
            yield "mask forgotten", f"({text(left)})"
            yield "mask forgotten", f"({text(right)})"
        case ast.BinOp(left, ast.Mult() | ast.Div(), right) if is_scale(right):
            yield "scale dropped", f"({text(left)})"
        case ast.BinOp(left, ast.Mult(), right) if is_scale(left):
            yield "scale dropped", f"({text(right)})"
        case ast.UnaryOp(ast.Invert() | ast.Not(), operand):
            yield "mask turned around", f"({text(operand)})"
        case ast.Attribute(value, "mT"):
            yield "wrong axis", text(value)
        case ast.Attribute(value, "height"):
            yield "height for width", f"{text(value)}.width"
        case ast.Attribute(value, "width"):
            yield "width for height", f"{text(value)}.height"
        case ast.Constant(str(value)) if "H W" in value:
            yield "height and width swapped", repr(value.replace("H W", "W H", 1))
        case ast.Call(ast.Attribute(value, name), _, _) if name in MASKS:
            yield "mask forgotten", text(value)
    if isinstance(node, ast.Call):
        for number, keyword in enumerate(node.keywords):
            for kind, value in broken_keyword(keyword):
                keywords = [*node.keywords[:number], ast.keyword(keyword.arg, value), *node.keywords[number + 1 :]]
                yield kind, text(ast.Call(node.func, node.args, keywords))


def broken_keyword(keyword: ast.keyword) -> Iterator[tuple[str, ast.expr]]:
    match keyword:
        case ast.keyword("scale", value) if not isinstance(value, ast.Constant):
            yield "scale dropped", ast.Constant(1.0)
        case ast.keyword("causal" | "past", value) if not isinstance(value, ast.Constant):
            yield "mask forgotten", ast.Constant(False)
        case ast.keyword("dim", ast.UnaryOp(ast.USub(), ast.Constant(axis))):
            yield "wrong axis", ast.Constant(-3 + axis)
        case ast.keyword("dim", ast.Constant(int(axis))):
            yield "wrong axis", ast.Constant(axis - 1 if axis else 1)
        case ast.keyword("dim", ast.Tuple([first, *_])):
            yield "wrong axis", first
        case ast.keyword("keepdim", ast.Constant(True)):
            yield "wrong axis", ast.Constant(False)


def is_scale(node: ast.expr) -> bool:
    return ast.unparse(node).rpartition(".")[2] in ("scale", "temperature", "gain")


# Running them


class Broken(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module from another source."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.mutant.module else None

    def get_source(self, name):
        return self.mutant.source


def caught_by(mutant: Mutant, blocks: list[str], limit: float) -> str:
    """Name of the first test that fails on a mutant, found in a process of its own; "" if none does in time."""
    read, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(math.ceil(limit))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.meta_path.insert(0, Broken(mutant))
        try:
            said = first_failure(mutant.block, blocks)
        except BaseException:  # the zoo can't even be imported
            said = "import: " + traceback.format_exc().strip().rpartition("\n")[2]
        os.write(send, (said or "nothing").encode()[:4000])
        os._exit(0)
    os.close(send)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return {"nothing": "", "": NO_ANSWER}.get(said, said)


def time_unbroken(file: str, blocks: list[str]) -> float:
    """Seconds that all tests of a file take; SystemExit if one fails."""
    start = time.monotonic()
    whole = Mutant(file, 0, "none", "", "", (ZOO / file).read_text(encoding="utf-8"))
    if said := caught_by(whole, blocks, LIMIT):
        raise SystemExit(f"{file}, which is not broken: {said}")
    return time.monotonic() - start


def first_failure(block: str | None, blocks: list[str]) -> str:
    """The first property or test that fails, for one block, or for those that share a file."""
    import conftest

    from vision_attn.testing import PROPERTIES

    cases = [case for case in conftest.cases() if conftest.block_of(case) in ([block] if block else blocks)]
    first = list({case.block_class: case for case in reversed(cases)}.values())
    quick = [each for each in PROPERTIES if not each.slow]
    long = [each for each in PROPERTIES if each.slow and not each.name.startswith(("compiles", "is_traced"))]
    return failing_property(quick, cases) or failing_test(block) or failing_property(long, first)


def failing_property(properties: list, cases: list) -> str:
    for each, case in itertools.product(properties, cases):
        if each.applies(case):
            torch.manual_seed(0)
            try:
                each.check(case)
            except Exception:
                return each.name
    return ""


def failing_test(block: str | None) -> str:
    """Of the tests special to a block, or to what all share."""
    if block:
        files = [f"blocks/test_{block}.py", "zoo/test_patterns.py", "zoo/test_cache.py", "zoo/test_zoo.py"]
        names = ["-k", f"{block} or coverage or blind"]
    else:
        files, names = SHARED_TESTS, []
    paths = [str(TESTS / file) for file in files if (TESTS / file).exists()]
    failures = Failures()
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *names]  # also the combinations that are marked slow
    pytest.main([*options, *paths], plugins=[failures])
    return failures.first


class Failures:
    """A pytest plugin that remembers the first failure."""

    first = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.first:
            self.first = report.nodeid.rpartition("/")[2]


def drill(files: list[str] | None = None, blocks: list[str] | None = None, path: str | None = None) -> None:
    """Breaks files of the zoo, place by place, and lists which test catches it.

    Args:
        files: relative to vision_attn/; null takes all blocks.
        blocks: to try what blocks share on; null takes all.
        path: CSV to write.
    """
    torch.set_num_threads(1)
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    every = sorted(file.stem for file in (ZOO / "blocks").glob("[!_]*.py"))
    if unknown := set(blocks or every).difference(every):
        raise ValueError(f"blocks={blocks}: there is no {', '.join(sorted(unknown))}")
    files, blocks = files or [f"blocks/{block}.py" for block in every], blocks or every
    rows = []
    limits = {file: 60 + 3 * time_unbroken(file, blocks) for file in files if any(mutants(file))}
    for mutant in tqdm([mutant for file in files for mutant in mutants(file)], unit=" mutants", smoothing=0):
        test = caught_by(mutant, blocks, limits[mutant.file])
        row = {"file": mutant.file, "line": mutant.line, "fault": mutant.kind, "before": mutant.before}
        rows.append(row | {"after": mutant.after, "caught by": test or SURVIVED})
        with redirect_stdout(None):  # the path, each time
            write(path, "mutations", sorted(rows, key=lambda row: row["caught by"] == SURVIVED))
    survived = sum(row["caught by"] == SURVIVED for row in rows)
    print(f"{len(rows) - survived} of {len(rows)} caught, {100 - 100 * survived / max(1, len(rows)):.1f} %")


if __name__ == "__main__":
    sys.exit(auto_cli(drill, as_positional=False))
