"""Reversible stacks: the gradients of plain streams, in the memory of one layer."""

import copy

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import backbones
from backbones.pixel import PixelTransformer
from backbones.reversible import Half, two_streams
from vision_attn.cost import peak_memory

SIZES = dict(img_size=(5, 7), in_chans=3, levels=11, dim=33, num_heads=3, blocks="dense")
CHUNKS = [1, 4]  # of 105 tokens, the last one of 24


def made(depth=3, **options):
    model = PixelTransformer(**SIZES | dict(depth=depth, reversible=True) | options).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def drawn(batch=2):
    return torch.randint(11, (batch, 3, 5, 7))


def plain(layers, x, *args):
    """The definition, which autograd differentiates as it is."""
    first = second = x
    for attend, transform in layers:
        first = first + attend.run(second, *args)
        second = second + torch.cat(
            [transform.run(some, *args) for some in first.chunk(transform.chunks, dim=1)], dim=1
        )
    return (first + second) / 2


def layers_of(model):
    return [block.halves() for block in model.blocks]


def tokens(dtype=torch.float64, dim=33, size=105):
    return torch.randn(2, size, dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("mlp_chunks", CHUNKS)
@pytest.mark.parametrize("depth", [1, 5])
def test_gradients_are_those_of_plain_streams(depth, mlp_chunks):
    model, x = made(depth, mlp_chunks=mlp_chunks), tokens()
    layers, felt = layers_of(model), [x, *model.blocks.parameters()]
    out, expected = two_streams(layers, x, model.grid), plain(layers, x, model.grid)
    assert torch.equal(out, expected)
    slope = torch.randn_like(out)
    for one, other in zip(torch.autograd.grad(out, felt, slope), torch.autograd.grad(expected, felt, slope)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_in_float32_they_are_as_good_as_those_of_plain_streams():
    exact, x = made(8), tokens()
    model = copy.deepcopy(exact).float()
    found = []
    for one, run in ((exact, plain), (model, plain), (model, two_streams)):
        own = x.detach().to(one.start.dtype).requires_grad_()
        out = run(layers_of(one), own, one.grid)
        found.append(torch.autograd.grad(out.square().sum(), [own, *one.blocks.parameters()]))
    for wanted, one, other in zip(*found):
        least = 1e-5 * wanted.norm()
        assert (other - wanted).norm() <= 2 * (one - wanted).norm() + least


@pytest.mark.parametrize("mlp_chunks", CHUNKS)
def test_dropout_drops_again_what_it_dropped(mlp_chunks):
    model, x = made(drop_rate=0.4, mlp_chunks=mlp_chunks).train(), tokens()
    layers, felt, found = layers_of(model), [x, *model.blocks.parameters()], []
    for run in (two_streams, plain):
        torch.manual_seed(7)
        found.append(torch.autograd.grad(run(layers, x, model.grid).square().sum(), felt))
        found[-1] += (torch.rand(3),)  # what is drawn after it is the same, too
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_autocast_is_that_of_the_forward_pass():
    model, x = made().float(), tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = (run(layers_of(model), x, model.grid) for run in (two_streams, plain))
    felt = [x, *model.blocks.parameters()]
    for one, other in zip(torch.autograd.grad(out.sum(), felt), torch.autograd.grad(expected.sum(), felt)):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_weights_that_are_frozen_or_shared():
    model, x = made(), tokens()
    model.blocks[1].mlp = model.blocks[0].mlp
    for p in model.blocks[2].attn.parameters():
        p.requires_grad_(False)
    layers, felt = layers_of(model), [x, *(p for p in model.blocks.parameters() if p.requires_grad)]
    found = [torch.autograd.grad(run(layers, x, model.grid).square().sum(), felt) for run in (two_streams, plain)]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def forward_backward(model, images):
    def call():
        model.bits_per_dim(images).backward()
        model.zero_grad()

    return call


@pytest.mark.parametrize("mlp_chunks", CHUNKS)
def test_memory_does_not_grow_with_depth_but_by_gradients_of_weights(mlp_chunks):
    peaks = {}
    for depth in (2, 16):
        for reversible in (True, False):
            model = PixelTransformer(**SIZES | dict(depth=depth, reversible=reversible, mlp_chunks=mlp_chunks))
            weights = sum(p.nbytes for p in model.blocks.parameters()) / 2**20
            peaks[depth, reversible] = peak_memory(forward_backward(model, drawn(16)), "cpu") - weights
    assert peaks[16, True] < 1.1 * peaks[2, True]
    assert peaks[16, False] > 3 * peaks[2, False]


def test_chunks_of_the_mlp_take_less_memory_and_give_the_same():
    peaks, gradients = [], []
    for mlp_chunks in (1, 8):
        torch.manual_seed(0)
        model = made(depth=2, reversible=False, mlp_chunks=mlp_chunks).float()
        peaks.append(peak_memory(forward_backward(model, drawn(16)), "cpu"))
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model.bits_per_dim(drawn()), list(model.parameters())))
    assert peaks[1] < 0.75 * peaks[0]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_gradients_nothing_is_computed_twice():
    calls = []
    half = Half(lambda x: calls.append(len(calls)) or x, ())
    x = tokens()
    with torch.no_grad():
        two_streams([(half, half)], x)
    assert calls == [0, 1]
    two_streams([(half, half)], x).sum().backward()
    assert len(calls) == 2 + 2 + 2


def test_steps_are_the_forward_pass():
    model = made().eval()
    values = model.values(drawn(3))
    caches = model.new_caches(3)
    with torch.no_grad():
        steps = [model.step(values[:, place - 1], place, caches) for place in range(105)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model.logits(values), rtol=1e-9, atol=1e-9)


def test_streams_of_half_precision_are_float32():
    model, seen = made().to(torch.bfloat16), []
    half = Half(lambda x: seen.append(x.dtype) or torch.full_like(x, 1e-3), ())
    out = two_streams([(half, half)] * 20, torch.ones(2, 3, 5, dtype=torch.bfloat16))
    assert set(seen) == {torch.bfloat16} and out.dtype == torch.bfloat16
    assert out[0, 0, 0] == torch.tensor(1.02).bfloat16()  # 1 + 0.001 is 1 in bfloat16
    model.bits_per_dim(drawn()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_forward_pass_is_one_graph():
    model, images = made(depth=1), drawn()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(reversible=1), "reversible=1: must be True or False"),
        (dict(mlp_chunks=0), "mlp_chunks=0: must be an integer ≥ 1"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        made(**options)


# ViTs

VIT = dict(depth=3, embed_dim=48, num_heads=3, num_classes=7)


def vit(**options):
    model = timm.create_model("reversible_vit_tiny_patch4_32", **VIT | options).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def test_named_vits_are_listed_and_have_the_parameters_of_the_stock_ones():
    dims = dict(base_patch16_224=768, small_patch16_224=384, tiny_patch16_224=192, tiny_patch4_32=192)
    assert set(timm.list_models("*reversible*")) == {f"reversible_vit_{name}" for name in dims}
    for name, dim in dims.items():
        with torch.device("meta"):
            model, stock = (timm.create_model(f"{kind}_{name}", num_classes=7) for kind in ("reversible_vit", "vit"))
        assert model.embed_dim == dim and len(model.blocks) == 12
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
        assert timm.get_pretrained_cfg(f"reversible_vit_{name}").input_size[1] == int(name.rpartition("_")[2])


@pytest.mark.parametrize("block", [None, "criss_cross", "transformer_xl"])
@pytest.mark.parametrize("options", [dict(drop_path_rate=0.2), dict(mlp_chunks=3, proj_drop_rate=0.2)], ids=str)
def test_the_gradients_of_a_vit_are_those_of_plain_streams(block, options, monkeypatch):
    model = vit(dynamic_img_size=True, **options).train()
    if block:
        backbones.replace(model, block)
    images = torch.randn(2, 3, 20, 28, dtype=torch.float64)

    def gradients():
        torch.manual_seed(3)
        out = model(images)
        return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

    found = gradients()
    monkeypatch.setattr("backbones.reversible_vit.two_streams", plain)
    for one, other in zip(found, gradients()):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_two_sizes_before_one_backward():
    """As many tokens on two grids, through a block that must know which is which."""
    model = backbones.replace(vit(dynamic_img_size=True), "criss_cross").model
    images = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((8, 48), (24, 16))]
    alone = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for x in images]
    both = torch.autograd.grad(sum(model(x).square().sum() for x in images), list(model.parameters()))
    for one, *parts in zip(both, *alone):
        torch.testing.assert_close(one, sum(parts), rtol=1e-9, atol=1e-12)


def test_the_memory_of_a_vit_does_not_grow_with_depth_but_by_gradients_of_weights():
    peaks = {}
    for depth in (2, 16):
        model = vit(depth=depth).float()

        def step(model=model):
            model(torch.randn(16, 3, 32, 32)).sum().backward()
            model.zero_grad()

        peaks[depth] = peak_memory(step, "cpu") - sum(p.nbytes for p in model.blocks.parameters()) / 2**20
    assert peaks[16] < 1.1 * peaks[2]


def test_a_vit_exports_and_comes_back(tmp_path):
    model = vit(dynamic_img_size=True, depth=1).float().eval()
    errors = backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(28, 36))
    assert len(errors) == 6 and all(error < 1e-4 for error in errors.values())
    args = VIT | dict(depth=1, dynamic_img_size=True, mlp_chunks=2)
    save_for_hf(model, tmp_path / "hf", model_args=args)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    images = torch.randn(2, 3, 28, 36)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-6)


def test_what_a_reversible_vit_can_not_do_is_said():
    model = vit().float()
    with pytest.raises(NotImplementedError, match="two streams"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        model.forward_features(torch.randn(1, 3, 32, 32), is_causal=True)
    for options, said in (
        (dict(patch_drop_rate=0.3), "patch_drop_rate=0.3: must be 0"),
        (dict(drop_path_rate=0.1, mlp_chunks=2), "drop_path_rate=0.1: must be 0 with mlp_chunks=2"),
        (dict(mlp_chunks=0), "mlp_chunks=0: must be an integer ≥ 1"),
        (dict(norm_layer=nn.BatchNorm1d), "reversible=True: 0.norm1 is a BatchNorm1d"),
    ):
        with pytest.raises(ValueError, match=said):
            vit(**options)
