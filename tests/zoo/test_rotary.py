"""Rotary positions: the turn by its definition, and every mixer turns rightly or says why it can't."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import OPTIONS, every_mixer
from torch import nn
from torch.export import Dim, export

from vision_attn import Grid, create_block
from vision_attn.rotary import FORMS, Rotary
from vision_attn.zoo import block_class

GRID, PREFIX, DIM, HEADS = Grid(3, 5), 2, 33, 3  # 11 channels a head, of which 8 turn
# what estimates a softmax by features that are drawn does not see only distances, but for the softmax it estimates
ESTIMATES = ("performer",)


def angle(form, frequencies, y, x, pair, pairs, grid):
    """θ of a pair of a head at a place, in radians."""
    if form == "mixed":
        of_x, of_y = frequencies
        return x * of_x[pair] + y * of_y[pair]
    half = pairs // 2
    slower = 100 ** (-(pair % half) / half)
    if form == "axial":
        return (x if pair < half else y) * slower
    centre = (y + 0.5) / grid.height if pair < half else (x + 0.5) / grid.width
    return 2 * math.pi * (2 * centre - 1) * slower


def turned(rotary, t, grid):
    """Of tokens (B, heads, P + H·W, d) each pair of channels times e^{iθ}, one by one."""
    out, prefix, pairs = t.clone(), t.shape[2] - grid.size, t.shape[3] // 4 * 2
    for head in range(t.shape[1]):
        frequencies = None if rotary.frequencies is None else rotary.frequencies[:, head].tolist()
        for place in range(grid.size):
            y, x = divmod(place, grid.width)
            for pair in range(pairs):
                both = [pair, pair + pairs] if rotary.form == "dinov3" else [2 * pair, 2 * pair + 1]
                turn = cmath.exp(1j * angle(rotary.form, frequencies, y, x, pair, pairs, grid))
                number = torch.complex(*t[:, head, prefix + place, both].unbind(-1)) * turn
                out[:, head, prefix + place, both] = torch.view_as_real(number)
    return out


def close(actual, expected, rtol=1e-10, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def made(name, **options):
    """As it is, and with rotary positions or the refusal of them, otherwise the same."""
    options = {"num_heads": HEADS, **OPTIONS.get(name, [{}])[0], **options}
    torch.manual_seed(1)
    plain = create_block(name, DIM, **{**options, "rotary": None}).double().eval()
    torch.manual_seed(1)
    try:
        block = create_block(name, DIM, **options).double().eval()
    except ValueError as refusal:
        return plain, refusal
    block.load_state_dict(plain.state_dict(), strict=False)
    return plain, block


@pytest.mark.parametrize("form", FORMS)
def test_every_pair_is_a_complex_number_that_turns(form):
    rotary = Rotary(form, HEADS, 11).double()
    q, k = torch.randn(2, 2, HEADS, PREFIX + GRID.size, 11, dtype=torch.float64).unbind()
    ours = rotary(q, k, GRID)
    for before, after in zip((q, k), ours):
        close(after, turned(rotary, before, GRID))
        assert torch.equal(after[:, :, :PREFIX], before[:, :, :PREFIX]) and torch.equal(after[..., 8:], before[..., 8:])
        close(after.norm(dim=-1), before.norm(dim=-1))


@every_mixer
def test_a_mixer_sees_only_distances_or_says_why_it_can_not_turn(block):
    plain, made_so = made(block, rotary="axial")
    if isinstance(made_so, ValueError):
        assert f"rotary='axial': must be None, {block} has no rotary positions: " in str(made_so)
        assert len(str(made_so).rpartition(": ")[2]) > 20
        return
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    out, turns = made_so(x, GRID), [module for module in made_so.modules() if isinstance(module, Rotary)]
    assert turns and (out - plain(x, GRID)).abs().max() > 1e-4
    for rotary in turns:
        rotary.offset = 3.7
    same = (made_so(x, GRID) - out).abs().max()
    assert (same > 1e-6) if block in ESTIMATES else (same < 1e-12)


@every_mixer
def test_what_a_mixer_turns_is_what_the_definition_turns(block, monkeypatch):
    _, made_so = made(block, rotary="mixed")
    if isinstance(made_so, ValueError):
        return
    x = torch.randn(1, PREFIX + GRID.size, DIM, dtype=torch.float64)
    out = made_so(x, GRID)
    assert any(name.endswith("rotary.frequencies") for name, _ in made_so.named_parameters())
    monkeypatch.setattr(Rotary, "forward", lambda self, q, k, grid, _: [turned(self, t, grid) for t in (q, k)])
    close(made_so(x, GRID), out)


@every_mixer
@pytest.mark.parametrize("form", ["mixed", "dinov3"])
def test_a_pixel_is_turned_by_its_own_place(block, form):
    if block_class(block).not_causal:
        return
    _, made_so = made(block, rotary=form, causal=True)
    if isinstance(made_so, ValueError):
        return
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    cache = made_so.new_cache(2, GRID)
    close(torch.stack([made_so.step(x[:, i], i, cache) for i in range(GRID.size)], dim=1), made_so(x, GRID))


def test_layers_that_share_scores_turn_once():
    block = create_block("residual_logits", DIM, num_heads=HEADS, share="scores", layers=3, rotary="mixed")
    assert [name for name, _ in block.named_parameters() if "rotary" in name] == ["chain.0.rotary.frequencies"]


def test_relative_positions_of_axial_attention_are_not_turned():
    with pytest.raises(ValueError, match="rotary='axial': must be None, axial .*relative positions"):
        create_block("axial", DIM, num_heads=HEADS, rotary="axial", length=5)


def test_heads_of_fewer_channels_than_two_pairs_are_refused():
    with pytest.raises(ValueError, match="rotary='mixed': queries and keys must have ≥ 4 channels a head, not 3"):
        create_block("dense", 9, num_heads=3, rotary="mixed")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_exact_in_half_precision(form, dtype):
    """At places beyond the integers of bfloat16, with learned frequencies as the type rounds them."""
    grid = Grid(3, 501)
    half = Rotary(form, HEADS, 8).to(dtype)
    exact = Rotary(form, HEADS, 8).double()
    exact.load_state_dict(half.state_dict())
    q = torch.randn(1, HEADS, grid.size, 8).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            out, _ = half(q, q, grid)
        assert out.dtype == dtype
        wanted, _ = exact(q.double(), q.double(), grid)
        close(out.double(), wanted, rtol=0, atol=2 * torch.finfo(dtype).eps * q.abs().max().item() + 3e-4)


def test_learned_frequencies_start_as_axes_at_a_right_angle_and_learn():
    rotary = Rotary("mixed", 67, 12)
    along = rotary.frequencies.detach()
    size = along.square().sum(0).sqrt()
    close(size, torch.tensor([10 ** (-p / 3) for p in range(3)] * 2).expand(67, -1), rtol=1e-5, atol=1e-6)
    first, second = along.chunk(2, dim=2)
    close((first * second).sum(0), torch.zeros(67, 3), rtol=0, atol=1e-6)
    assert along[0, :, 0].std() > 0.5  # each head in a direction of its own
    q, k = torch.randn(2, 1, 67, GRID.size, 12).unbind()
    turned_q, turned_k = rotary(q, k, GRID)
    (turned_q @ turned_k.mT).square().sum().backward()
    assert (rotary.frequencies.grad.abs() > 0).all()


class Turn(nn.Module):
    """Of maps (B, heads, H, W, d), behind prefix tokens."""

    def __init__(self, form):
        super().__init__()
        self.rotary = Rotary(form, HEADS, 11)

    def forward(self, q, k):
        tokens = (F.pad(t.flatten(2, 3), (0, 0, PREFIX, 0), value=1.0) for t in (q, k))
        return self.rotary(*tokens, Grid(*q.shape[2:4]))


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_turns_on_grids_of_any_size(form):
    turn, free = Turn(form), {2: Dim("height", max=99), 3: Dim("width", max=99)}
    example = torch.randn(2, 2, HEADS, 5, 7, 11).unbind()
    graph = export(turn, example, dynamic_shapes=(free, free)).module()
    for size in ((7, 5), (11, 3), (29, 31)):
        maps = torch.randn(2, 2, HEADS, *size, 11).unbind()
        close(graph(*maps), turn(*maps), rtol=1e-5, atol=1e-5)
