"""The registry, its errors, its tables, and what the blocks cost."""

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch

import vision_attn
from vision_attn import Gate, Grid, Mixer, OnMap, create_block, create_layer, describe, layer, list_blocks
from vision_attn.cost import flops, parameters
from vision_attn.testing.case import HEADS
from vision_attn.zoo import block_class

DIM = 37


def test_everything_promised_is_there():
    assert {"Gate", "Grid", "Mixer", "Pattern", "create_block", "create_layer", "layer", "list_blocks"} <= set(
        vision_attn.__all__
    )
    assert all(hasattr(vision_attn, name) for name in vision_attn.__all__)


# Names


def test_blocks_are_listed_by_wildcard():
    names = list_blocks()
    assert names == sorted(names) and len(names) >= 8
    assert list_blocks("*cross*") == ["criss_cross"]
    assert list_blocks("c*") == [name for name in names if name[0] == "c"]
    assert list_blocks("cbam") == ["cbam"]
    assert list_blocks("nothing*") == []


@pytest.mark.parametrize("find", [list_blocks, describe, layer, lambda name: create_block(name, DIM)])
@pytest.mark.parametrize(
    "wrong, near", [("cris_cross", "criss_cross"), ("cbma", "cbam"), ("gcontext", "global_context")]
)
def test_an_unknown_name_gets_the_nearest_ones(find, wrong, near):
    with pytest.raises(ValueError) as refusal:
        find(wrong)
    assert f"block={wrong!r}" in str(refusal.value) and near in str(refusal.value)
    assert not all(name in str(refusal.value) for name in list_blocks())


def test_a_name_like_no_other_gets_all():
    with pytest.raises(ValueError) as refusal:
        create_block("!", DIM)
    assert all(name in str(refusal.value) for name in list_blocks())


def test_every_block_is_a_mixer_or_a_gate(block_name):
    block = create_block(block_name, DIM)
    assert isinstance(block, Mixer) != isinstance(block, Gate)
    assert describe(block_name).kind == ("mixer" if isinstance(block, Mixer) else "gate")
    assert type(create_layer(block_name, DIM)) is OnMap


# What a file says of its block


def test_entry_is_complete(block_name):
    entry = describe(block_name)
    assert entry.name == block_name and all(isinstance(field, (str, bool)) and field != "" for field in entry)
    assert entry.title.endswith(".") and any(letter in entry.cost for letter in "Nd")
    assert entry.url.startswith("https://") and " " not in entry.url
    assert any(year in entry.source for year in map(str, range(2014, 2030)))
    assert entry.causal == (not block_class(block_name).not_causal)


def test_file_names_its_deviations_and_arguments(block_name):
    module = import_module(f"vision_attn.blocks.{block_name}")
    assert "\nDeviations: " in module.__doc__
    assert module.Block.__doc__.strip()


def test_drawings_and_examples_are_true(block_name):
    module = import_module(f"vision_attn.blocks.{block_name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0
    if any(hasattr(step, "pattern") for step in getattr(create_block(block_name, DIM), "steps", ())):
        assert ".draw(" in module.__doc__, "a pattern is drawn in the docstring"


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(vision_attn.__path__) if m.name != "__main__"])
def test_examples_of_the_core_are_true(module):
    assert doctest.testmod(import_module(f"vision_attn.{module}")).failed == 0


# Bad options: the error names the option and its value


def refused(error, make, *said):
    with pytest.raises(error) as refusal:
        make()
    for text in said:
        assert text in str(refusal.value)


def test_an_unknown_option_is_refused(block_name):
    for make in (create_block, create_layer):
        refused(TypeError, lambda make=make: make(block_name, DIM, num_haeds=1), "num_haeds")
    refused(TypeError, lambda: layer(block_name, num_haeds=1)(DIM), "num_haeds")


@pytest.mark.parametrize("dim", [0, -1, 2.0, "64", None, True])
def test_a_bad_width_is_refused(block_name, dim):
    refused(ValueError, lambda: create_block(block_name, dim), f"dim={dim!r}")


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(num_heads=5), "num_heads=5: must divide dim=37"),
        (dict(num_heads=37, key_dim=13), "num_heads=37: must divide key_dim=13"),
        (dict(num_heads=0), "num_heads=0"),
        (dict(num_heads=1.0), "num_heads=1.0"),
        (dict(key_dim=0), "key_dim=0"),
        (dict(scale=0), "scale=0"),
        (dict(scale=-1.0), "scale=-1.0"),
        (dict(scale=float("nan")), "scale=nan"),
        (dict(scale="big"), "scale='big'"),
        (dict(attn_drop=1), "attn_drop=1"),
        (dict(attn_drop=-0.1), "attn_drop=-0.1"),
        (dict(attn_drop="a bit"), "attn_drop='a bit'"),
        (dict(proj_drop=1.5), "proj_drop=1.5"),
        (dict(proj_drop=None), "proj_drop=None"),
    ],
)
def test_a_bad_option_of_any_mixer_is_refused(block_name, options, said):
    if describe(block_name).kind == "mixer":
        text = said if "must divide" in said else said.split(":")[0]
        refused(ValueError, lambda: create_block(block_name, DIM, **options), text)


BAD = {
    "axial": [("mode", "both"), *[("length", bad) for bad in (0, (3,), (3, 0), 2.5)]],
    "cbam": [
        *[("rd_ratio", bad) for bad in (0, -1, float("inf"), "1/16", None)],
        *[("rd_channels", bad) for bad in (0, 1.5, "4")],
        *[("kernel_size", bad) for bad in (0, 4, -3, 7.0, None)],
    ],
    "criss_cross": [("recurrence", 0), ("recurrence", 1.5), ("recurrence", None)],
    "efficient": [("scale", 1.0), ("attn_drop", 0.1)],
    "expectation_maximization": [
        *[(option, bad) for option in ("bases", "iterations") for bad in (0, 2.5, "64", None)],
        *[("momentum", bad) for bad in (1, -0.1, "0.9", None)],
        *[("temperature", bad) for bad in (0, -1, float("nan"), None)],
        *[("grad", bad) for bad in ("none", None, True)],
    ],
    "global_context": [
        *[("fusion", bad) for bad in ("sum", None, True)],
        *[("pooling", bad) for bad in ("max", None)],
        *[("rd_ratio", bad) for bad in (0, -1, float("inf"), "1/16", None)],
        *[("rd_channels", bad) for bad in (0, 1.5, "4")],
    ],
    "interlaced_sparse": [("factor", bad) for bad in (0, (8,), (8, 0), (2, 3, 5), 2.0, "8", None)],
}


@pytest.mark.parametrize("name, option, bad", [(name, *row) for name in list_blocks() for row in BAD.get(name, [])])
def test_a_bad_option_is_refused(name, option, bad):
    refused(ValueError, lambda: create_block(name, DIM, **{option: bad}), f"{option}={bad!r}")


# Bad input


@pytest.mark.parametrize("shape", [(3, DIM), (3, 13, 17, DIM), (3, 221, DIM + 1)])
def test_tokens_of_another_shape_are_refused(block_name, shape):
    block = create_block(block_name, DIM)
    if isinstance(block, Mixer):
        refused(ValueError, lambda: block(torch.randn(shape), Grid(13, 17)), str(shape), f"dim={DIM}")


@pytest.mark.parametrize("shape", [(3, DIM, 221), (3, DIM + 1, 13, 17), (3, 13, 17, DIM)])
def test_maps_of_another_shape_are_refused(block_name, shape):
    block = create_block(block_name, DIM)
    if isinstance(block, Gate):
        for call in (block, block.attention_map):
            refused(ValueError, lambda call=call: call(torch.randn(shape)), str(shape), f"C={DIM}")


@pytest.mark.parametrize("grid, said", [((13, 17), "221 positions, but there are only 220 tokens"), ((0, 17), "≥ 1")])
def test_a_grid_that_does_not_fit_is_refused(block_name, grid, said):
    block = create_block(block_name, DIM)
    if isinstance(block, Mixer):
        for call in (block, block.attention):
            refused(ValueError, lambda call=call: call(torch.randn(3, 220, DIM), grid), f"{grid[0]}×{grid[1]}", said)


def test_a_grid_may_be_a_pair(block_name):
    block = create_block(block_name, DIM).eval()
    if isinstance(block, Mixer):
        x = torch.randn(3, 5 + 221, DIM)
        assert torch.equal(block(x, (13, 17)), block(x, Grid(13, 17)))
        assert torch.equal(block.attention(x, (13, 17)), block.attention(x, Grid(13, 17)))


# Cost


def test_parameters_are_counted():
    assert parameters(torch.nn.Conv2d(3, 5, 7)) == 5 * (3 * 7 * 7 + 1)


def test_flops_are_two_per_multiply_add():
    assert flops(torch.nn.Linear(5, 7), torch.randn(3, 5)) == 2 * 3 * 5 * 7


def test_heads_are_as_many_as_leave_32_channels(block_name):
    if describe(block_name).kind == "mixer":
        patterns = {"factored": 3, "hand_crafted": 6, "longformer": 2, "per_head": 3}  # a head for each
        least = patterns.get(block_name, 1)
        for dim, heads in [(31, 1), (64, 2), (97, 1), (192, 6), (7 * 32, 7), (7 * 31, 1), (60, 1), (90, 2)]:
            heads = next(n for n in range(max(least, heads), dim + 1) if dim % n == 0)
            heads = 1 if block_name == "single_head" else heads
            assert {step.num_heads for step in create_block(block_name, dim).steps} <= {heads}
    assert HEADS != 1  # of the cases: one head would hide a mix-up


PAPER = dict(key_dim=64, num_heads=1, device="meta")  # CCNet's table: C = 512, keys of 64 channels, a 97 × 97 map
PIXELS = torch.empty(1, 97 * 97, 512, device="meta")


def flops_without_proj(block):
    """The papers have no projection after the values."""
    return flops(block, PIXELS, (97, 97)) - flops(block.proj, PIXELS)


def test_dense_costs_what_the_papers_say_of_non_local():
    assert round(flops_without_proj(create_block("dense", 512, **PAPER)) / 1e9, 2) == 108.15


def test_criss_cross_costs_what_its_paper_says():
    block = create_block("criss_cross", 512, **PAPER)
    pairs = block.pattern.mask(Grid(97, 97)).sum().item()
    paper = 2 * (flops(block.qkv, PIXELS) + 2 * pairs * (64 + 512))  # twice: recurrence 2
    assert round(paper / 1e9, 2) == 16.52
    assert 1 <= 2 * flops_without_proj(block) / paper < 1.015


@pytest.mark.parametrize("option", ["qkv_bias", "qk_norm", "proj_bias"])
def test_what_is_neither_true_nor_false_is_refused(block_name, option):
    if describe(block_name).kind == "mixer":
        refused(ValueError, lambda: create_block(block_name, DIM, **{option: "no"}), f"{option}='no'")


@pytest.mark.parametrize("grid", [6, (2,), (2.0, 3), "23", (1, 2, 3)])
def test_what_is_not_a_grid_is_named(grid):
    refused(ValueError, lambda: create_block("dense", DIM)(torch.randn(1, 6, DIM), grid), f"grid={grid!r}")


def test_case_does_not_hide_the_nearest():
    refused(ValueError, lambda: create_block("CBAM", DIM), "nearest: cbam")
