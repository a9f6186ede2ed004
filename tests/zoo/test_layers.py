"""Any block as a residual layer: identity until trained, on maps, on tokens and in timm's slots."""

import copy

import pytest
import timm
import torch
from conftest import chosen, in_turn, often
from torch import nn

from vision_attn import OnMap, OnTokens, create_block, create_layer, layer, list_blocks
from vision_attn.testing.case import BATCH, GRIDS, PREFIXES

GRID = GRIDS[-1]
DIM = 37
EVERY, DTYPES = chosen("any_case"), [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# Identity


@in_turn({"case": EVERY, "training": [False, True], "dtype": DTYPES})
def test_new_layer_is_bit_for_bit_the_identity(case, dtype, training):
    new = OnMap(case.new()).to(dtype).train(training)
    x = torch.randn(BATCH, new.block.dim, *GRID, dtype=dtype)
    out = new(x)
    assert torch.equal(out, x) and out.dtype == dtype and out.shape == x.shape


@in_turn({"case": EVERY, "training": [False, True]})
def test_new_layer_is_the_identity_under_autocast(case, training):
    new = OnMap(case.new()).train(training)
    for dtype in (torch.float32, torch.bfloat16):  # a map from the input, or from a convolution under autocast
        x = torch.randn(BATCH, new.block.dim, *GRID, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = new(x)
        assert torch.equal(out, x) and out.dtype == dtype


@in_turn({"case": EVERY, "prefix": PREFIXES})
def test_new_layer_on_tokens_is_bit_for_bit_the_identity(case, prefix):
    new = OnTokens(case.block().train())
    x = torch.randn(BATCH, prefix + GRID.size, new.block.dim, dtype=torch.float64)
    assert torch.equal(new(x, GRID), x)


def test_a_new_layer_learns_at_once(any_case):
    """With the gain at 0 only the gain feels anything; after one step everything does."""
    new = OnMap(any_case.new())
    x = torch.randn(BATCH, new.block.dim, *GRID)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    new(x).square().mean().backward()
    assert new.gain.grad.abs() > 0
    optimizer.step()
    assert not torch.equal(new(x), x)


def test_gain_of_one_is_the_block_as_published(gate_case):
    block, x = gate_case.block(), torch.randn(BATCH, gate_case.sizes["dim"], *GRID, dtype=torch.float64)
    torch.testing.assert_close(OnMap(block, init_gain=1).double()(x), block(x), rtol=1e-12, atol=1e-12)


# On maps and on tokens


def test_on_a_map_a_mixer_sees_pixels_in_raster_order(mixer_case):
    trained = mixer_case.layer()
    x = torch.randn(BATCH, trained.block.dim, *GRID, dtype=torch.float64)
    tokens = torch.stack([x[:, :, y, z] for y in range(GRID.height) for z in range(GRID.width)], dim=1)
    for _ in range(trained.block.recurrence):  # the same weights and the same gain every time
        tokens = tokens + trained.gain * trained.block(tokens, GRID)
    out = trained(x)
    for y, z in [(0, 0), (0, GRID.width - 1), (GRID.height - 1, 0), (7, 11)]:
        torch.testing.assert_close(out[:, :, y, z], tokens[:, y * GRID.width + z], rtol=1e-9, atol=1e-10)


def test_on_a_map_a_gate_is_blended_in(gate_case):
    trained = gate_case.layer()
    x = torch.randn(BATCH, trained.block.dim, *GRID, dtype=torch.float64)
    expected = (1 - trained.gain) * x + trained.gain * trained.block.reference(x)
    torch.testing.assert_close(trained(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_on_tokens_a_gate_leaves_prefix_tokens_alone(gate_case, prefix):
    on_map = gate_case.layer()
    on_tokens = OnTokens(on_map.block)
    on_tokens.load_state_dict(on_map.state_dict())
    x = torch.randn(BATCH, prefix + GRID.size, on_map.block.dim, dtype=torch.float64)
    out = on_tokens.double()(x, GRID)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    image = x[:, prefix:].mT.reshape(BATCH, -1, *GRID)
    torch.testing.assert_close(out[:, prefix:], on_map(image).flatten(2).mT, rtol=1e-12, atol=1e-12)
    x[:, :prefix] += 1
    assert torch.equal(on_tokens(x, GRID)[:, prefix:], out[:, prefix:])


@in_turn({"case": chosen("mixer_case"), "prefix": PREFIXES})
def test_on_tokens_a_mixer_is_applied_once_to_all(case, prefix):
    on_tokens = OnTokens(case.block(), init_gain=0.7).double()
    x = torch.randn(BATCH, prefix + GRID.size, on_tokens.block.dim, dtype=torch.float64)
    expected = x + on_tokens.gain * on_tokens.block(x, GRID)
    torch.testing.assert_close(on_tokens(x, tuple(GRID)), expected, rtol=1e-12, atol=1e-12)


def test_channels_last_maps_give_the_same(any_case):
    trained = any_case.layer()
    x = torch.randn(BATCH, trained.block.dim, *GRID, dtype=torch.float64)
    last = trained.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, trained(x), rtol=1e-9, atol=1e-10)


# Bad input


@in_turn(
    {
        "block": list_blocks(),
        "shape": [(BATCH, DIM, 13), (DIM, 13, 17), (BATCH, DIM + 1, 13, 17), (BATCH, 13, 17, DIM)],
    }
)
def test_a_map_of_another_shape_is_refused(block, shape):
    with pytest.raises(ValueError) as refusal:
        create_layer(block, DIM)(torch.randn(shape))
    assert str(shape) in str(refusal.value) and f"C={DIM}" in str(refusal.value)


@in_turn({"block": list_blocks(), "shape": [(BATCH, DIM), (BATCH, DIM, 13, 17), (BATCH, 221, DIM + 1)]})
def test_tokens_of_another_shape_are_refused(block, shape):
    with pytest.raises(ValueError) as refusal:
        OnTokens(create_block(block, DIM))(torch.randn(shape), GRID)
    assert str(shape) in str(refusal.value) and f"C={DIM}" in str(refusal.value)


def test_a_grid_larger_than_the_tokens_is_refused(block_name):
    with pytest.raises(ValueError, match=r"grid=13×17 has 221 positions, but there are only 220 tokens"):
        OnTokens(create_block(block_name, DIM))(torch.randn(BATCH, 220, DIM), GRID)


@pytest.mark.parametrize("init_gain", [float("nan"), float("inf"), "1", None, True])
def test_a_bad_gain_is_refused(init_gain):
    with pytest.raises(ValueError, match="init_gain="):
        create_layer("dense", DIM, init_gain=init_gain)


def test_only_blocks_are_made_layers():
    with pytest.raises(ValueError, match="block=Conv2d"):
        OnMap(nn.Conv2d(3, 3, 1))


# In timm's own slots


def test_gain_survives_the_initialisation_of_a_resnet(block_name):
    """ResNet draws all convolutions anew and touches norms; the model must still be the stock model."""
    narrow = dict(num_classes=7, channels=(16, 24, 40, 56))
    args = dict(block_args=dict(attn_layer=layer(block_name)), zero_init_last=False)  # True: all layers see zeros
    model = timm.create_model("resnet18", **narrow, **args).eval()
    layers = [module for module in model.modules() if isinstance(module, OnMap)]
    assert len(layers) == 8 and all(torch.equal(one.gain, torch.zeros(1)) for one in layers)
    stock = timm.create_model("resnet18", **narrow).eval()
    stock.load_state_dict({key: value for key, value in model.state_dict().items() if key in stock.state_dict()})
    image = torch.randn(BATCH, 3, 67, 97)
    out = model(image)
    assert out.isfinite().all() and torch.equal(out, stock(image))
    with torch.no_grad():
        for one in layers:
            one.gain.fill_(0.5)
    assert not torch.allclose(model(image), out)


@pytest.mark.parametrize("block", often(list_blocks()))
def test_a_resnet_learns_through_all_its_layers(block):
    model = timm.create_model("resnet18", num_classes=7, block_args=dict(attn_layer=layer(block)))
    model(torch.randn(BATCH, 3, 67, 97)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("block", often(list_blocks()))
def test_efficientnet_takes_a_layer(block):
    model = timm.create_model("efficientnet_b0", num_classes=7, se_layer=layer(block)).eval()
    layers = [module for module in model.modules() if isinstance(module, OnMap)]
    assert len(layers) == 16
    assert model(torch.randn(BATCH, 3, 67, 97)).isfinite().all()


def test_layer_is_a_class_with_its_options(block_name):
    cls = layer(block_name, init_gain=0.25)
    assert isinstance(cls, type) and repr(block_name) in cls.__name__
    made = cls(DIM, device="meta", dtype=torch.bfloat16)
    assert type(made) is OnMap and made.block.dim == DIM and made.init_gain == 0.25
    assert made.gain.shape == (1,) and made.gain.device.type == "meta" and made.gain.dtype == torch.bfloat16
    assert type(made.block) is type(create_block(block_name, DIM))


def test_options_at_the_slot_go_before_those_of_the_class():
    assert layer("cbam", rd_channels=5)(DIM, rd_channels=3).block.mlp[0].out_features == 3


def test_a_gain_is_reset_to_its_start():
    one = create_layer("dense", DIM, init_gain=0.25)
    nn.init.ones_(one.gain)
    copy.deepcopy(one).reset_parameters()
    assert one.gain.item() == 1
    one.reset_parameters()
    assert one.gain.item() == 0.25
