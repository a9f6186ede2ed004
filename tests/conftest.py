"""The registry as test cases: an argument named as in `CHOICES` runs over every block in every row of its options.

What takes long runs with the first options of a block (`first_options`), and what has several arguments with a
combination of them for each block, in turn (`in_turn`); all else of it is marked slow, for `make test-all`.
"""

import gc
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from zlib import crc32

import pytest
import torch
from go_on import pytest_addoption, pytest_configure  # noqa: F401  hooks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_attn import describe, kept, list_blocks, route
from vision_attn.testing import Case
from vision_attn.testing.case import KINDS
from vision_attn.zoo import block_class

# pytest-xdist runs a process on every core: threads in each would only wait for one another
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)  # a million objects live as long as the run: to go through them costs seconds

# Options that make a block more itself, at sizes that fit the suite. A block that is not here: with its defaults.
OPTIONS = {
    "adaptive_connection": [{"edges": 5, "width": 3}],
    "adaptive_span": [{}, {"span": 4, "ramp": 1.5}, {"span": 3, "include_self": False}],
    "attention_free": [{"kernel_size": (3, 5)}, {"kernel_size": 7}],
    "axial": [{}, {"mode": "sum", "length": 3}, {"length": (5, 7)}, {"out_proj": False}],
    "big_bird": [{"tile": 3, "drawn": 2, "tokens": 3}],
    "bilevel": [{"tile": 3, "routes": 2}],
    "binary_partition": [{"levels": 2}, {"levels": 3}],
    "cbam": [{}, {"spatial": False}, {"kernel_size": 3, "rd_channels": 2}],
    "clustered": [{}, {"cells": (2, 3), "top": 5}],
    "collaborative": [{}, {"content_bias": False}],
    "compressive": [{"memory": 1, "stride": 2, "waves": 3}],
    "criss_cross": [{}, {"out_proj": False}],
    "dense": [{}, {"rotary": "mixed"}],
    "dilated": [
        {"kernel_size": 3, "dilation": (2, 3)},
        {"kernel_size": (3, 5), "dilation": (3, 2), "border": "shift"},
    ],
    "efficient": [{}, {"value_dim": 84}],
    "expectation_maximization": [{"bases": 3}, {"bases": 5, "temperature": 0.5, "iterations": 1}],
    "fixed": [{"c": 3}, {"c": 3, "split_heads": True}, {"c": 2, "part": "summary"}, {"c": 2, "num_verts": 2}],
    "fourier": [{}, {"projections": False}],
    "global_context": [{}, {"fusion": "multiply"}, {"fusion": "both", "rd_channels": 2}, {"pooling": "average"}],
    "factored": [{}, {"part": "previous_row"}, {"include_self": False}],
    "gaussian_prior": [{"width": 1.5}],
    "global_filter": [{"length": (5, 7)}, {"length": (4, 3), "projections": False}],
    "global_local": [{"windows": (2, 3), "kernel_size": (3, 5)}],
    "global_memory": [{"memory": 5, "chunk": (2, 3)}],
    "global_tokens": [{"tokens": 3, "kernel_size": 3}, {"tokens": 0, "kernel_size": (3, 5)}],
    "hand_crafted": [
        {},
        {"patterns": ("left", "up", "column")},
        {"patterns": ("all", "gaussian_up", "gaussian"), "width": 2.5},
    ],
    "inducing_points": [{"points": 5}],
    "interlaced_sparse": [{}, {"factor": (2, 3)}],
    "light_non_local": [{}, {"ratio": 1.0, "stride": 3}],
    "linformer": [
        {"rank": (2, 3), "length": (5, 7)},
        {"rank": 2, "length": 3, "sharing": "none"},
        {"rank": (3, 2), "projection": "mean"},
    ],
    "longformer": [
        {"tokens": 3, "kernel_size": 3},
        {"tokens": 0, "kernel_size": (3, 5)},
        {"tokens": 3, "kernel_size": 3, "rotary": "dinov3"},
    ],
    "low_rank": [{}, {"l2_norm": True}],
    "lsh": [{"chunk": 5}, {"chunk": 3, "rounds": 3}],
    "luna": [{"memory": 5}],
    "memory_compressed": [{}, {"stride": (2, 5)}],
    "multiscale": [{"kernel_size": 3, "scale_factor": 3, "levels": 2}],
    "nystrom": [{}, {"cells": (2, 3), "iterations": 5}],
    "patch_match": [{"window": 5, "rounds": 1, "searches": 1}, {"window": 7, "rounds": 2, "searches": 2, "seed": 7}],
    "per_head": [{"kernel_size": (3, 5), "stride": (2, 3), "tokens": 3}],
    "permutohedral": [{"features": 2}, {}],
    "prob_sparse": [{}, {"factor": 2, "cells": (2, 3)}],
    "product_keys": [
        {"keys": 5, "nearest": 7, "key_dim": 10},
        {"keys": 3, "nearest": 7, "num_heads": 2},  # more than the half keys of a side
    ],
    "random_features": [{"features": 67}],
    "residual_logits": [{}, {"layers": 3, "share": "scores"}],
    "routing": [{}, {"clusters": 3, "chunk": 5}],
    "sinkhorn": [{"tile": 3}, {"tile": 5, "cut": 2}],
    "spatial_gating": [{"length": (5, 7)}, {"length": (4, 3), "gated": False}],
    "strided": [{}, {"split_heads": True}],
    "synthesizer": [
        {"length": (5, 7)},
        {"length": 3, "form": "random"},
        {"length": (7, 5), "rank": 2, "form": "factorized"},
        {"length": 5, "form": "mixture"},
    ],
    "talking_heads": [{}, {"mixing_bias": True}],
    "transformer_xl": [{"memory": 2, "waves": 3}, {"memory": None}],
    "window": [{}, {"kernel_size": (3, 5)}, {"kernel_size": (5, 3), "border": "shift"}],
}
# One block of each engine and kind: with the others, what takes long is left to `make test-all`.
OFTEN = ("criss_cross", "cbam", "dense", "linear", "multiscale", "talking_heads")
# Parameters whose gradient is 0, of blocks with these options.
UNFELT = [
    ("global_context", {}, {"key.bias"}),  # a softmax does not see a constant
    ("longformer", {"tokens": 0}, {"qkv_global.weight", "qkv_global.bias"}),  # on a map, without prefix tokens
]

logging.getLogger("torch.__trace").propagate = False  # thousands of lines under a failure in compiled code

# What is special to a block goes with the block.
collect_ignore = [
    str(path) for path in (Path(__file__).parent / "blocks").glob("test_*.py") if path.stem[5:] not in list_blocks()
]


GATES = [name for name in list_blocks() if describe(name).kind == "gate"]
MIXERS = [name for name in list_blocks() if describe(name).kind == "mixer"]
every_block = pytest.mark.parametrize("block", list_blocks())
every_mixer = pytest.mark.parametrize("block", MIXERS)
every_gate = pytest.mark.parametrize("block", GATES)


class Largest(TorchDispatchMode):
    """Notes the largest number of elements that any operation gave memory to."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def alive(model: nn.Module) -> nn.Module:
    """A host with no gain, norm, bias or running statistic at a special initial value, so that every part matters."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or p.numel() and p.min() == p.max():
                p += torch.randn_like(p).mul(0.2).add(0.1)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 2)
    return model


def case(name: str, **options) -> Case:
    unfelt = [names for block, given, names in UNFELT if block == name and given.items() <= options.items()]
    return Case(block_class(name), options, frozenset().union(*unfelt))


@cache
def cases() -> list[Case]:
    """Every block with every row of its options, and causal where it can be."""
    rows = [(name, options) for name in list_blocks() for options in OPTIONS.get(name, [{}])]
    never = [("border", "shift"), ("cut", 2)]  # options with which a block can't be
    could_be = [row for row in rows if describe(row[0]).causal and not any(item in never for item in row[1].items())]
    rows += [(name, {**options, "causal": True}) for name, options in could_be]
    return [case(name, **options) for name, options in rows]


CHOICES = {f"{kind}_case": applies for kind, applies in KINDS.items()}


def short_name(case: Case) -> str:
    return "-".join([block_of(case), *(f"{name}={value}" for name, value in case.options.items())])


def block_of(case: Case) -> str:
    return case.block_class.__module__.rpartition(".")[2]


@cache
def chosen(argument: str) -> list:
    """The cases of `CHOICES`, as parameters of a test."""
    return [pytest.param(case, id=short_name(case)) for case in cases() if CHOICES[argument](case)]


def pytest_generate_tests(metafunc):
    for argument in CHOICES.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(argument, chosen(argument))
    if "block_name" in metafunc.fixturenames:
        metafunc.parametrize("block_name", list_blocks())


# What is left to `make test-all`


def first_options(params: list) -> list:
    """Cases as they are, all but the first of each block slow."""
    first = {block_of(param.values[0]): param for param in reversed(params)}
    return [slow_unless(param is first[block_of(param.values[0])], param) for param in params]


def often(choices: Iterable) -> list:
    """Cases or names of blocks, all but those of a few blocks slow."""
    params = [as_param(choice) for choice in choices]
    names = [one if isinstance(one, str) else block_of(one) for one in (param.values[0] for param in params)]
    return [slow_unless(name in OFTEN, param) for name, param in zip(names, params)]


def in_turn(choices: dict[str, Iterable], *, rest: bool = True) -> Callable:
    """As `pytest.mark.parametrize` for each argument, or several that go together, in all combinations.

    Each of the first choice meets one combination of the others, in turn, from where depends on the test, and each
    combination one of the first choice, more where there are more; the rest is slow, or not there without ``rest``.
    What is slow itself takes no turn.
    """
    first, *others = [[as_param(choice, "," in names) for choice in some] for names, some in choices.items()]
    combined = [joined(parts) for parts in itertools.product(*others)]
    turns = min(sum(not is_slow(param) for param in some) for some in (first, combined))

    def decorate(test):
        pairs = itertools.product(numbered(first, crc32(test.__name__.encode())), numbered(combined, 0))
        params = [
            slow_unless(None not in (i, j) and i % turns == j % turns, joined([one, rest]))
            for (i, one), (j, rest) in pairs
        ]
        params = [param for param in params if rest or not is_slow(param)]
        return pytest.mark.parametrize(", ".join(choices), params)(test)

    return decorate


def numbered(params: list, start: int) -> list[tuple]:
    """Each with its turn, or None."""
    turn = itertools.count(start)
    return [(None if is_slow(param) else next(turn), param) for param in params]


def as_param(choice, several: bool = False):
    """With a name, which tells what it is of the values."""
    param = choice if hasattr(choice, "marks") else pytest.param(*(choice if several else [choice]))
    name = param.id or "-".join(filter(None, map(name_of, param.values)))
    return pytest.param(*param.values, id=name, marks=param.marks)


def name_of(value) -> str:
    if isinstance(value, tuple | list):
        return "-".join(map(name_of, value))
    return "" if isinstance(value, dict) else getattr(value, "__name__", str(value))


def joined(params):
    values, marks = ([thing for param in params for thing in getattr(param, of)] for of in ("values", "marks"))
    return pytest.param(*values, id="-".join(param.id for param in params), marks=marks)


def slow_unless(quick: bool, param):
    return pytest.param(*param.values, id=param.id, marks=[*param.marks, *([] if quick else [pytest.mark.slow])])


def is_slow(param) -> bool:
    return any(mark.name == "slow" for mark in param.marks)


@pytest.fixture(autouse=True)
def by_key_sets(request):
    """Tests of the zoo run patterns by their key sets, as on large grids; `test_routes` compares all ways."""
    with route("union" if request.path.parent.name in ("zoo", "blocks") else "auto"):
        yield


@pytest.fixture(autouse=True)
def same_numbers_every_run():
    # without CUDA torch.manual_seed writes down, for when it is there, where it was called from
    torch.manual_seed(0) if torch.cuda.is_available() else torch.default_generator.manual_seed(0)
    kept._tensors.clear()  # what a test that breaks something has made


def pytest_terminal_summary(terminalreporter):
    """How many trials each property of `vision_attn.testing` had."""
    trials = Counter()
    for report in terminalreporter.stats.get("passed", ()):
        trials.update({name: count for name, count in report.user_properties})
    if trials:
        terminalreporter.section("trials of properties")
        for name, count in sorted(trials.items()):
            terminalreporter.write_line(f"{count:7,}  {name.replace('_', ' ')}")
        terminalreporter.write_line(f"{trials.total():7,}  in all")
