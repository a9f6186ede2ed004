"""What blocks cost: the two figures of a docstring, of what a mechanism looks at and of what is computed for it."""

import inspect
import math
import re

import pytest
import torch
from torch import nn

from vision_attn import Grid, create_block, describe, list_blocks
from vision_attn.cost import counting
from vision_attn.mixer import Mixer
from vision_attn.pyramid import Pyramid

SQUARE, UNEVEN = Grid(64, 64), Grid(40, 56)
DIM = 96  # three heads, or one for each pattern
LETTERS = dict(k="kernel_size", c="chunk", f="factor", s="stride", S="span", R="ramp", K="bases", ρ="ratio")
# Options for what is looked at: as far as it may learn to; no windows that are wider than the map
IN_FULL = {"adaptive_span": {"init": 1.0}, "multiscale": {"levels": 2}}
BY_ELEMENT = ("cbam", "hand_crafted", "star")  # products and sums that are no matrix products, which torch counts alone


def stated(name: str, grid: Grid, **given) -> float:
    """The multiply-adds of a docstring's ``Cost:``, at the block's own options or those ``given``."""
    block = create_block(name, DIM, **given)
    options = {option: p.default for option, p in inspect.signature(type(block).__init__).parameters.items()} | given
    values = {letter: options[option] for letter, option in LETTERS.items() if option in options} | options
    values |= dict(N=grid.size, H=grid.height, W=grid.width, d=DIM, heads=getattr(block, "num_heads", None), min=min)
    values["log2"] = math.log2
    # d ln d of a head; 5 ⌈ln N⌉ of 64×64 pixels; the relay
    values |= {
        "collaborative": {"D": DIM // 4},
        "performer": {"M": 111},
        "prob_sparse": {"u": 45},
        "star": {"R": 1},
    }.get(name, {})
    formula = describe(name).cost.replace("²", "**2").replace("^", "**")
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula), values)


def looked_at(mixer: Mixer, grid: Grid) -> float:
    """Multiply-adds of queries with the keys that they may see, and of these with values, by the definition."""
    places = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    y, x = (place.flatten() for place in places)
    pairs = 0
    if isinstance(mixer.pattern, Pyramid):
        for level, side in enumerate(mixer.pattern.sides):
            first = (y % side == 0) & (x % side == 0)  # the pixel that stands for its cell
            seen = mixer.pattern.seen(level, y[:, None], x[:, None], y[first], x[first], grid)
            pairs = pairs + seen.expand(grid.size, int(first.sum())).sum(dim=1)
        pairs = mixer.num_heads * away_from_the_border(pairs)
    else:
        for part, heads in zip(mixer.pattern.by_head(), mixer.pattern.shares(mixer.num_heads)):
            pairs += heads * away_from_the_border(part.mask(grid).sum(dim=1))
    key, value = mixer.head_dims
    return pairs * (value + key * ("q" in mixer.projects))  # weights that compare nothing are only multiplied by values


def away_from_the_border(seen: torch.Tensor) -> float:
    """The sum of how many keys each query sees, those at the border, which see fewer, taken for some that see all."""
    return seen.clamp(min=seen.float().quantile(0.9).int()).sum().item()


def computed(block: nn.Module, by_element: bool) -> float:
    """Multiply-adds of a forward pass, without those of projections, which are from all channels to as many or more."""
    inputs = (torch.randn(1, SQUARE.size, DIM), SQUARE) if isinstance(block, Mixer) else (torch.randn(1, DIM, *SQUARE),)
    projected = []

    def note(module, _, out):
        shape = module.weight.shape
        if min(shape[:2]) >= DIM and shape[2:].numel() == 1:
            projected.append(out.numel() * shape[1])

    for module in block.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(note)
    aten = torch.ops.aten
    outputs = {op: lambda *_, out_shape, **__: torch.Size(out_shape).numel() for op in (aten.mul, aten.add)}
    inputs_ = {op: lambda x, *_, **__: torch.Size(x).numel() for op in (aten.sum, aten.mean)}
    own = {aten._fft_c2c: of_a_transform, aten._fft_r2c: of_a_real_transform, aten._fft_c2r: of_a_real_transform}
    own |= {op: of_bags for op in (aten._embedding_bag, aten._embedding_bag_forward_only)}
    counter = counting(own | (outputs | inputs_ if by_element else {}))
    with torch.no_grad(), counter:
        block.eval()(*inputs)
    return counter.get_total_flops() / 2 - sum(projected)


def of_bags(table, chosen, *_, **__) -> float:
    """Each row that is chosen, times its weight."""
    return 2 * math.prod(chosen) * table[1]


def of_a_transform(shape, axes, *_, out_shape, **__) -> float:
    """Operations of a fast Fourier transform, by convention: 5 n log₂ n."""
    return 5 * math.prod(out_shape) * math.log2(math.prod(shape[axis] for axis in axes))


def of_a_real_transform(shape, axes, *_, out_shape, **__) -> float:
    """From or to real numbers, for which half of the frequencies do: half of that."""
    whole = max(shape, out_shape, key=math.prod)
    return of_a_transform(whole, axes, out_shape=whole) / 2


def patterns(name: str) -> list[Mixer]:
    """The mixers that a block is made of, if all have a pattern."""
    block = create_block(name, DIM, **IN_FULL.get(name, {}))
    steps = block.steps if isinstance(block, Mixer) else ()
    return list(steps) if all(hasattr(step, "pattern") for step in steps) else []


def test_what_is_computed_is_what_the_docstring_says(block_name):
    ratio = computed(create_block(block_name, DIM), block_name in BY_ELEMENT) / stated(block_name, SQUARE)
    assert float(describe(block_name).computed) == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("name", [name for name in list_blocks() if patterns(name)])
def test_what_is_looked_at_is_what_the_docstring_says(name):
    per_key = 3**2 if name == "memory_compressed" else 1  # pixels that are compressed to one
    pairs = sum(looked_at(step, UNEVEN) for step in patterns(name)) / per_key
    assert stated(name, UNEVEN, **IN_FULL.get(name, {})) == pytest.approx(pairs, rel=0.1)


@pytest.mark.parametrize("name", ["window", "dilated"])
@pytest.mark.parametrize("border", ["cut", "shift"])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_a_window_computes_at_most_two_and_a_half_times_what_it_looks_at(name, border, kernel_size):
    block = create_block(name, DIM, kernel_size=kernel_size, border=border)
    pairs = block.pattern.mask(SQUARE).sum().item()  # cut off at the border where it is
    assert computed(block, by_element=False) <= 2.5 * 2 * pairs * DIM
