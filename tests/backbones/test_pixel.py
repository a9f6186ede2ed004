"""Pixel models: what each value is predicted from, the published initialisation, sampling, and the names in timm."""

import copy
import json
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

from backbones.pixel import PixelTransformer, ResidualBlock, TwoStreamPixelTransformer
from vision_attn import Grid, describe, list_blocks
from vision_attn.pattern import BlindSpot

SIZES = dict(img_size=(5, 7), in_chans=3, levels=11)
N = 5 * 7 * 3
CAUSAL = [name for name in list_blocks() if describe(name).causal]
NAMES = [f"pixel_{data}{kind}" for data in ("digits", "cifar10", "imagenet32", "imagenet64") for kind in ("", "_axial")]
SPLIT = {"name": "strided", "split_heads": True}
LOCAL, COLUMN = {"name": "strided", "part": "local"}, {"name": "strided", "part": "column"}

every_causal_block = pytest.mark.parametrize("block", CAUSAL)
both_classes = pytest.mark.parametrize("cls", [PixelTransformer, TwoStreamPixelTransformer])


def made(cls=PixelTransformer, **options):
    """A small model in float64 and eval mode, with no parameter at its initial value."""
    options = dict(dim=33, depth=2, num_heads=3) | options
    if cls is PixelTransformer:
        options.setdefault("blocks", "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlindSpot)
        model = cls(**SIZES | options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def drawn(batch=2, levels=11, size=(5, 7), channels=3):
    return torch.randint(levels, (batch, channels, *size))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reached(model):
    """(N, N): whether another value at the place of the row changes the logits at the place of the column, by a bit."""
    values = model.values(drawn(1)).expand(N, N)
    with torch.no_grad():
        return (model.logits(values) != model.logits((values + torch.eye(N).long()) % model.levels)).any(dim=-1)


# What is predicted from what


@every_causal_block
def test_no_value_is_predicted_from_itself_or_a_later_one(block):
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    seen = reached(made(blocks=block))
    assert not (seen & ~later).any()
    assert seen[torch.arange(N - 1), torch.arange(1, N)].all()  # the value just before is the input


@pytest.mark.parametrize("blocks", ["dense", SPLIT, [LOCAL, COLUMN], ["dense", COLUMN]], ids=str)
def test_every_earlier_value_is_reached(blocks):
    assert torch.equal(reached(made(blocks=blocks)), torch.ones(N, N, dtype=torch.bool).triu(1))


def test_two_streams_hear_exactly_the_past():
    assert torch.equal(reached(made(TwoStreamPixelTransformer, depth=1)), torch.ones(N, N, dtype=torch.bool).triu(1))


def test_the_first_row_reaches_nothing_of_the_outer_stream():
    model = made(TwoStreamPixelTransformer, outer_depth=2)
    logits = model(drawn())
    outer = list(model.outer.parameters())
    assert len(model.outer) == 4 and len(outer) > 4
    first = torch.autograd.grad(logits[:, :21].square().sum(), outer, retain_graph=True)
    assert all((g == 0).all() for g in first)
    second = torch.autograd.grad(logits[:, 21:42].square().sum(), outer)
    assert all((g != 0).any() for g in second)


@both_classes
def test_the_first_value_is_predicted_from_the_start_alone(cls):
    model = made(cls)
    images = drawn(3)
    before, other = model(images), model((images + 1) % 11)
    assert torch.equal(before[:, 0], other[:, 0]) and not torch.equal(before[:, 1], other[:, 1])
    with torch.no_grad():
        model.start[0] += 1
    assert not torch.equal(model(images)[:, 0], before[:, 0])


def test_raster_order_is_rows_columns_channels():
    model = made()
    images = drawn(2)
    values = model.values(images)
    assert values.shape == (2, N) and torch.equal(model.images(values), images)
    y, x, c = 3, 4, 1
    place = (y * 7 + x) * 3 + c
    assert torch.equal(values[:, place], images[:, c, y, x])
    assert model.grid == Grid(5, 21) and model.positions().shape == (5, 21, 33)
    assert torch.equal(model.positions().flatten(0, 1)[place], model.row[y] + model.column[x] + model.channel[c])


# Likelihood and initialisation


@both_classes
def test_bits_per_dim_is_the_mean_negative_log2_likelihood(cls):
    model, images = made(cls), drawn()
    logits, total = model(images), 0.0
    assert logits.shape == (2, N, 11)
    for b in range(2):
        for y in range(5):
            for x in range(7):
                for c in range(3):
                    p = logits[b, (y * 7 + x) * 3 + c].softmax(0)
                    total -= math.log2(p[images[b, c, y, x]].item())
    assert model.bits_per_dim(images).item() == pytest.approx(total / (2 * N), rel=1e-5)
    assert torch.equal(model(images.to(torch.uint8)), logits)


@both_classes
def test_every_parameter_gets_a_gradient(cls):
    model = made(cls)
    model.bits_per_dim(drawn()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@both_classes
def test_initialisation_is_the_published_one(cls):
    options = dict(blocks="dense") if cls is PixelTransformer else {}
    model = cls(img_size=(29, 31), in_chans=23, levels=37, dim=128, depth=3, **options)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == (3 if cls is PixelTransformer else 5)
    last = (2 * len(blocks)) ** -0.5
    expected = {
        model.value.weight: 0.125 / 128**0.5,
        model.start: 0.125 / 128**0.5,
        **{table: 0.125 / (3 * 128) ** 0.5 for table in (model.row, model.column, model.channel)},
    }
    for block in blocks:
        expected[block.attn.qkv.weight] = expected[block.mlp.fc1.weight] = (0.125 / 128) ** 0.5
        expected[block.attn.proj.weight] = (0.125 / 128) ** 0.5 * last
        expected[block.mlp.fc2.weight] = (0.125 / 512) ** 0.5 * last
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=4 * (2 * parameter.numel()) ** -0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter in expected or name == "head.weight", name
    with torch.no_grad():  # every value equally likely
        assert not model.head(torch.randn(5, 128)).any()


def test_the_activation_is_the_published_one():
    block = made().blocks[0]
    x = torch.randn(3, 33, dtype=torch.float64)
    hidden = block.mlp.fc1(x)
    assert hidden.shape == (3, 4 * 33)
    assert torch.allclose(block.mlp(x), block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden)))


def test_a_block_is_two_residual_branches_with_dropout_at_their_ends():
    block, x = made(drop_rate=0.5).blocks[0], torch.randn(2, N, 33, dtype=torch.float64)
    y = x + block.attn(block.norm1(x), Grid(5, 21))
    assert torch.allclose(block(x, Grid(5, 21)), y + block.mlp(block.norm2(y)))
    for branch in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(branch.weight)
        nn.init.ones_(branch.bias)
    added = block.train()(x, Grid(5, 21)) - x  # each branch adds 0 or 2
    shares = [(added - n).abs().lt(1e-9).double().mean().item() for n in (0, 2, 4)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@both_classes
def test_recomputed_activations_give_the_same_gradients(cls):
    model, images, calls = made(cls, drop_rate=0.3).train(), drawn(), []
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.norm1.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        torch.manual_seed(1)
        calls.clear()
        return torch.autograd.grad(model.bits_per_dim(images), list(model.parameters())), len(calls)

    plain, once = gradients()
    model.set_grad_checkpointing()
    again, twice = gradients()
    assert twice == 2 * once > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    model.set_grad_checkpointing(False)
    assert gradients()[1] == once


def test_embeddings_are_not_decayed():
    model = made()
    optimizer = create_optimizer_v2(model, "adamw", lr=1, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    layer = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {"head.weight", *(f"blocks.{i}.{part}.weight" for i in range(2) for part in layer)}


# The blocks of the zoo


def test_layers_cycle_through_the_blocks():
    model = made(depth=5, blocks=["dense", {"name": "dense", "scale": 0.5, "num_heads": 11}])
    assert [block.attn.num_heads for block in model.blocks] == [3, 11, 3, 11, 3]
    assert [block.attn.scale == 0.5 for block in model.blocks] == [False, True, False, True, False]


def test_the_cycle_is_warned_of_as_a_whole():
    def warned(blocks, depth=2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PixelTransformer(blocks=blocks, depth=depth)
        return [str(w.message) for w in caught if issubclass(w.category, BlindSpot)]

    assert not warned([LOCAL, COLUMN]) and not warned(["dense", COLUMN]) and not warned(SPLIT) and not warned("dense")
    (message,) = warned(COLUMN)
    assert "756 of the 903 past pairs" in message and "'part': 'column'" in message  # 7 columns of 6 · 7 / 2 pairs
    assert warned([COLUMN, COLUMN], depth=4)


# Sampling


@pytest.mark.parametrize(
    "block, full", [*((block, False) for block in CAUSAL), ("dense", True), (SPLIT, True), (COLUMN, True)], ids=str
)
def test_steps_are_the_forward_pass(block, full):
    model = made(blocks=block)
    values = model.values(drawn(3))
    caches = model.new_caches(3, full=full)
    with torch.no_grad():
        steps = [model.step(values[:, place - 1], place, caches) for place in range(N)]
        assert torch.allclose(torch.stack(steps, dim=1), model.logits(values), atol=1e-9)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(
    "cls, cache, options",
    [
        (PixelTransformer, "pattern", dict(blocks="dense")),
        (PixelTransformer, "full", dict(blocks="dense")),
        (PixelTransformer, "pattern", dict(blocks=[SPLIT, "dense"])),
        (TwoStreamPixelTransformer, "pattern", {}),
    ],
    ids=["dense", "full", "strided", "axial"],
)
def test_what_is_drawn_does_not_depend_on_the_cache(cls, cache, options, rows):
    model = made(cls, **options)
    start = drawn(3) if rows else 3
    fast, slow = (model.generate(start, rows, cache=kind, generator=seeded()) for kind in (cache, None))
    assert torch.equal(fast, slow)
    assert fast.shape == (3, 3, 5, 7) and fast.dtype == torch.int64
    assert fast.min() >= 0 and fast.max() < 11 and fast.unique().numel() > 5


@both_classes
def test_draws_follow_the_generator(cls):
    model = made(cls).train()
    one, same, other = (model.generate(2, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert model.training and not one.requires_grad
    torch.manual_seed(0)
    assert not torch.equal(model.generate(2), model.generate(2))


@both_classes
@pytest.mark.parametrize("channels", [1, 3])
def test_completion_keeps_the_given_rows_and_never_looks_at_the_rest(cls, channels):
    model, images = made(cls, in_chans=channels), drawn(channels=channels)
    before = images.clone()
    done = model.generate(images, 2, generator=seeded())
    assert torch.equal(images, before)
    assert torch.equal(done[:, :, :2], images[:, :, :2]) and not torch.equal(done[:, :, 2:], images[:, :, 2:])
    images[:, :, 2:] = drawn(channels=channels)[:, :, 2:]
    assert torch.equal(model.generate(images, 2, generator=seeded()), done)
    assert torch.equal(model.generate(images, 5), images)
    assert torch.equal(model.generate(images, 0, generator=seeded()), model.generate(2, generator=seeded()))
    assert torch.equal(model.generate(images.to(torch.uint8), 5), images)


@both_classes
def test_one_choice_or_no_heat_is_greedy(cls):
    model = made(cls)
    greedy = model.generate(1, top_k=1)
    assert torch.equal(model(greedy).argmax(dim=-1), model.values(greedy))
    assert torch.equal(model.generate(1, temperature=1e-9), greedy)


def test_draws_have_the_probabilities_of_the_logits():
    model = made(levels=5)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(logits)

    def shares(**options):
        images = model.generate(50, generator=seeded(), **options)
        return torch.bincount(images.flatten(), minlength=5) / images.numel()

    near = dict(atol=0.03)  # five standard errors of 50 · 105 draws
    assert torch.allclose(shares(), logits.softmax(0), **near)
    assert torch.allclose(shares(temperature=2.0), (logits / 2).softmax(0), **near)
    kept = torch.tensor([-math.inf, 1.0, -math.inf, 2.0, -math.inf])
    assert torch.allclose(shares(top_k=2), kept.softmax(0), **near) and not shares(top_k=2)[[0, 2, 4]].any()


def test_progress_is_shown_on_request(capsys):
    made().generate(drawn(), 4)
    assert capsys.readouterr().err == ""
    made().generate(drawn(), 4, progress=True)
    assert "values" in capsys.readouterr().err


# Bad arguments


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(img_size=0), "img_size=0: must be an integer ≥ 1 or a"),
        (dict(in_chans=0), "in_chans=0: must be an integer ≥ 1"),
        (dict(levels=2.5), "levels=2.5: must be an integer ≥ 1"),
        (dict(dim=-1), "dim=-1: must be an integer ≥ 1"),
        (dict(depth=0), "depth=0: must be an integer ≥ 1"),
        (dict(num_heads=3), "num_heads=3: must divide dim=64"),
        (dict(mlp_ratio=0), "mlp_ratio=0: must be a finite number > 0"),
        (dict(drop_rate=1), r"drop_rate=1: must be a number in \[0, 1\)"),
        (dict(blocks="dens"), "block='dens': no such block; nearest: dense"),
        (dict(blocks="axial"), "causal=True: axial can't be causal"),
        (dict(blocks="cbam"), "causal=True: cbam can't be causal"),
        (dict(blocks=[]), r"blocks=\[\]: must be a block's name, a dict with a name, or a list of these"),
        (dict(blocks=[{"part": "row"}]), "blocks=.*: must be a block's name, a dict with a name"),
        (dict(blocks=3), "blocks=3: must be a block's name"),
        (dict(blocks=["dense"] * 5), "blocks=.*: must be at most as many as depth=4"),
        (dict(blocks={"name": "dense", "scale": -1}), "scale=-1: must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        PixelTransformer(**dict(blocks="dense") | options)


@pytest.mark.parametrize("options, said", [(dict(outer_depth=0), "outer_depth=0"), (dict(depth=0), "depth=0")])
def test_bad_arguments_of_two_streams_are_named(options, said):
    with pytest.raises(ValueError, match=f"{said}: must be an integer ≥ 1"):
        TwoStreamPixelTransformer(**options)


@pytest.mark.parametrize(
    "images, said",
    [
        (torch.zeros(2, 3, 7, 5, dtype=torch.long), r"shape \(2, 3, 7, 5\): must be \(B, C, H, W\) .* = \(3, 5, 7\)"),
        (torch.zeros(3, 5, 7, dtype=torch.long), r"shape \(3, 5, 7\)"),
        (torch.zeros(2, 3, 5, 7), "images of torch.float32: must be integers in 0..10"),
        (torch.full((2, 3, 5, 7), 11), "images with values 11..11: must be integers in 0..10"),
        (torch.full((2, 3, 5, 7), -1), "images with values -1..-1"),
    ],
)
@both_classes
def test_bad_images_are_named(cls, images, said):
    model = made(cls)
    for call in (model, model.bits_per_dim, lambda images: model.generate(images, 2)):
        with pytest.raises(ValueError, match=said):
            call(images)


@pytest.mark.parametrize(
    "start, options, said",
    [
        (0, {}, "start=0: must be an integer ≥ 1"),
        (2, dict(rows=1), "rows=1: must be one of 0"),
        ("images", dict(rows=6), "rows=6: must be one of 0, 1, 2, 3, 4, 5"),
        (2, dict(temperature=0), "temperature=0: must be a finite number > 0"),
        (2, dict(top_k=0), "top_k=0: must be one of 1, 2"),
        (2, dict(top_k=12), "top_k=12: must be one of"),
        (2, dict(cache="some"), "cache='some': must be one of 'pattern', "),
    ],
)
@both_classes
def test_bad_sampling_is_named(cls, start, options, said):
    with pytest.raises(ValueError, match=said):
        made(cls).generate(drawn() if start == "images" else start, **options)


def test_two_streams_have_no_full_cache():
    with pytest.raises(ValueError, match="cache='full': must be one of 'pattern', None"):
        made(TwoStreamPixelTransformer).generate(1, cache="full")


# Names


def test_named_models_are_listed_and_made_without_memory():
    assert sorted(timm.list_models("pixel_*", module="pixel")) == sorted(NAMES)
    sizes = {}
    for name in NAMES:
        with torch.device("meta"):
            model = timm.create_model(name)
        cfg = timm.get_pretrained_cfg(name)
        assert (model.in_chans, *model.img_size) == cfg.input_size and model.levels == cfg.num_classes
        assert all(block.attn.dim // block.attn.num_heads >= 16 for block in model.modules() if hasattr(block, "attn"))
        sizes[name] = sum(p.numel() for p in model.parameters()) / 1e6
    assert sizes["pixel_digits"] == pytest.approx(0.2034, abs=1e-4)
    assert sizes["pixel_cifar10"] == pytest.approx(9.6, abs=0.1)
    assert all(sizes[f"{name}_axial"] == sizes[name] for name in NAMES[::2])


def test_named_models_split_the_heads_of_strided_attention():
    model = timm.create_model("pixel_digits")
    assert [type(block.attn) for block in model.blocks] == [type(PixelTransformer().blocks[0].attn)] * 4
    assert "strided" in type(model.blocks[0].attn).__module__
    assert model(drawn(2, 17, (8, 8), 1)).shape == (2, 64, 17)


@pytest.mark.parametrize("name", ["pixel_digits", "pixel_digits_axial"])
def test_arguments_are_json_and_models_come_back(name, tmp_path):
    args = dict(img_size=[5, 3], in_chans=2, levels=7, dim=32, drop_rate=0.1)
    if name == "pixel_digits":
        args |= dict(depth=3, num_heads=2, blocks=["dense", {"name": "dense", "scale": 0.5}])
    args = json.loads(json.dumps(args))
    model = timm.create_model(name, **args).eval()
    nn.init.normal_(model.head.weight)
    images = drawn(2, 7, (5, 3), 2)
    again = timm.create_model(name, **args).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images), model(images)) and torch.equal(copy.deepcopy(model)(images), model(images))

    save_for_hf(model, tmp_path, model_args=args)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))


def test_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes=10: a pixel model has none; its number of values is levels=17"):
        timm.create_model("pixel_digits", num_classes=10)


def test_the_forward_pass_is_one_graph():
    for cls in (PixelTransformer, TwoStreamPixelTransformer):
        model, images = made(cls, depth=1), drawn()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(images), model(images))


def test_bits_per_dim_trains():
    model = PixelTransformer((3, 5), levels=5, dim=16, depth=1, num_heads=2, blocks="dense")
    images = (torch.arange(15).view(1, 1, 3, 5) + torch.arange(8).view(8, 1, 1, 1)) % 5  # the first value tells all
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.bits_per_dim(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 < math.log2(5)
    assert F.mse_loss(model.generate(images, 1, top_k=1).float(), images.float()).item() == 0
