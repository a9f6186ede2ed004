"""Training of models with a block, by name: checkpointing, autocast, layouts, copies, sizes in turn, torch.compile."""

import copy
import io
import pickle

import pytest
import torch
from conftest import alive, every_block, in_turn
from named import THIN, images, made, small_models, smallest_models
from timm.utils import ModelEmaV3

from vision_attn import list_blocks

COMPILED = [pytest.param(name, marks=() if name == "dense" else pytest.mark.slow) for name in list_blocks()]
compiled_block = pytest.mark.parametrize("block", COMPILED)


@small_models
def test_checkpointing_changes_nothing(stock, args, size, block):
    model = alive(made(stock, block, args)).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images(size)
    outs = []
    for one in (model, twin):
        outs.append(one(x))
        outs[-1].square().sum().backward()
    assert torch.equal(*outs)
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad), name


@small_models
def test_autocast(stock, args, size, block):
    model, x = alive(made(stock, block, args)).train(), images(size)
    wanted = copy.deepcopy(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16 and (out - wanted).norm() < 0.05 * wanted.norm()
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@small_models
def test_channels_last(stock, args, size, block):
    model, x = alive(made(stock, block, args)).eval(), images(size)
    wanted = model(x)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted)


@smallest_models
def test_copies_live_on_their_own(stock, args, size, block):
    """A deep copy, an average and a pickle give the same answers, after the original has seen another size."""
    free = dict(THIN, dynamic_img_size=True) if stock.startswith("vit") else args
    model, x = alive(made(stock, block, free)).eval(), images(size)
    wanted = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    copies.append(ModelEmaV3(model).module)
    model(images((16, 20)))
    for one in copies:
        assert torch.equal(one(x), wanted)
    with torch.no_grad():
        for p in copies[0].parameters():
            p.zero_()
    assert torch.equal(model(x), wanted)


@every_block
def test_two_sizes_in_turn_and_their_gradients(block):
    """Multi-scale training: each forward and backward has the grid of its own images."""
    model = alive(made("vit_tiny_patch4_32", block, THIN, dynamic_img_size=True)).eval()
    model.set_grad_checkpointing()
    small, large = images((12, 20)), images((28, 20))
    gradients = []
    for order in ([small, large], [large, small]):
        model.zero_grad()
        for x in order:
            model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def compiled_equals(model, sizes):
    model = alive(model).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in sizes:
        x = images(size, batch=3)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


@compiled_block
def test_compiled_vit_in_one_graph(block):
    model = made("vit_tiny_patch4_32", block, depth=1, dynamic_img_size=True)
    compiled_equals(model, [(28, 44), (20, 12), (36, 28)])


@compiled_block
def test_compiled_resnet_in_one_graph(block):
    compiled_equals(made("cifar_resnet20", block, attn_at=["layer2.2", "layer3.2"]), [(29, 37), (41, 23)])


@pytest.mark.slow
@in_turn(
    {
        "block": list_blocks(),
        "name, args, size": [
            ("vit_tiny_patch4_32", dict(depth=2, img_size=(28, 44)), (28, 44)),
            ("cifar_resnet20", dict(attn_at="layer3.1"), (67, 43)),
        ],
    },
    rest=False,
)
def test_compiled_training_step(block, name, args, size):
    model, x = alive(made(name, block, **args)).double().train(), images(size).double()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    torch.compile(twin, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    model(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda text, name=name: f"{name}: {text}")
