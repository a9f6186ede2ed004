"""ViTs that timm did not make: the grid of their tokens is found or told, and their attention gives way to a mixer."""

import copy
import pickle
from functools import partial

import pytest
import torch
from conftest import GATES, MIXERS, alive, often
from host_models import JoinedViT, layers
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import ConvStemConfig

import backbones
from vision_attn import Grid, Mixer

OWN, WIDE, TALL = (28, 28), (12, 20), (20, 12)  # grids 7×7, 3×5 and 5×3
STEM = [ConvStemConfig(8, 3, 2), ConvStemConfig(12, 3, 2)]


def torchvisions(**args):
    model = VisionTransformer(28, 4, 2, 3, 48, 96, num_classes=7, **args)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


# the model, and where in it blocks, their attention and the map of patches are
HOSTS = {
    "torchvision": (torchvisions, "encoder.layers.*", "self_attention", "conv_proj"),
    "torchvision, a stem of convolutions": (
        lambda: torchvisions(conv_stem_configs=STEM), "encoder.layers.*", "self_attention", "conv_proj.conv_last",
    ),
    "Hugging Face": (JoinedViT, "encoder.layer.*", "attention", "embeddings.patch_embeddings.projection"),
    "Hugging Face, tensors": (
        lambda: JoinedViT(prefix=5, in_tuple=False, bias=False),
        "encoder.layer.*", "attention", "embeddings.patch_embeddings.projection",
    ),
}  # fmt: skip
every_host = pytest.mark.parametrize("host", HOSTS)


def made(host):
    torch.manual_seed(0)
    return alive(HOSTS[host][0]()).double().eval()


def freely(model):
    """The same model for images of any size, as a function."""
    if isinstance(model, VisionTransformer):
        return backbones.any_size(model)
    return lambda x: model(x, interpolate_pos_encoding=True)["logits"]


def answer(model, x):
    out = model(x)
    return out["logits"] if isinstance(out, dict) else out


def images(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def attentions(model, host):
    """The attention of each block."""
    *path, _ = HOSTS[host][1].split(".")
    return {
        f"{'.'.join(path)}.{name}.{HOSTS[host][2]}": block.get_submodule(HOSTS[host][2])
        for name, block in model.get_submodule(".".join(path)).named_children()
    }


# Inserting


@every_host
@pytest.mark.parametrize("block", [GATES[0], MIXERS[0]])
def test_inserting_keeps_the_function_and_hands_on_the_grid(host, block):
    model, x, met = made(host), images(*OWN), []
    wanted, names = answer(model, x), list(model.state_dict())
    backbones.insert(model, block, HOSTS[host][1])
    assert len(layers(model)) == 2 and torch.equal(answer(model, x), wanted)
    assert [name for name in model.state_dict() if f"attn_{block}" not in name] == names
    for layer in layers(model).values():
        nn.init.constant_(layer.gain, 0.5)
        layer.register_forward_hook(lambda m, args, out: met.append(args[1]))
    assert not torch.equal(answer(model, x), wanted)
    freely(model)(images(*WIDE)), freely(model)(images(*TALL))
    assert met == [Grid(7, 7)] * 2 + [Grid(3, 5)] * 2 + [Grid(5, 3)] * 2


@every_host
def test_blocks_take_turns_in_one_model(host):
    model, x = made(host), images(*OWN)
    wanted = answer(model, x)
    backbones.insert(model, GATES[0], HOSTS[host][1])
    backbones.insert(model, "dense", HOSTS[host][1])
    report = backbones.replace(model, "dense")  # the host's own attention, not what was inserted
    assert {name.partition(".qkv")[0] for name in report.copied if "qkv" in name} == set(attentions(model, host))
    backbones.insert(model, MIXERS[0], HOSTS[host][1])
    close(answer(model, x), wanted)
    assert len(layers(model)) == 6
    hooks = [hook for part in model.modules() for hook in part._forward_hooks.values()]
    assert [getattr(hook, "__name__", None) for hook in hooks].count("record") == 1  # one source of grids


# Replacing


@every_host
def test_dense_is_the_attention_of_the_host(host):
    model, many = made(host), [images(*size) for size in (OWN, WIDE, TALL)]
    wanted, whole = [freely(copy.deepcopy(model))(x) for x in many], answer(model, many[0])
    bias = host != "Hugging Face, tensors"
    names = [f"{name}." for name in attentions(model, host)]
    keys = (
        ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"] if bias else ["qkv.weight", "proj.weight", "proj.bias"]
    )
    report = backbones.replace(model, "dense")
    assert report == (model, tuple(name + key for name in names for key in keys), (), ())
    assert all(isinstance(part, Mixer) and part.num_heads == 3 for part in attentions(model, host).values())
    close(answer(model, many[0]), whole)
    for x, one in zip(many, wanted):
        close(freely(model)(x), one)


@pytest.mark.parametrize("block", often(MIXERS))
@every_host
def test_any_mixer_takes_the_place_of_attention(host, block):
    model = made(host)
    backbones.replace(model, block, HOSTS[host][1]).model.train()
    for size in (WIDE, TALL):
        model.zero_grad()
        freely(model)(images(*size)).square().sum().backward()
        for part in attentions(model, host).values():
            assert isinstance(part, Mixer) and all(step.proj.weight.grad.any() for step in part.steps)


@every_host
@pytest.mark.parametrize("size", [WIDE, TALL])
def test_criss_cross_sees_rows_and_columns_of_the_image(host, size):
    """What one patch changes: its own row and column, and the prefix tokens. Nobody is asked for the grid."""
    model, (first, *_) = made(host), attentions(made(host), host)
    backbones.replace(model, "criss_cross", first)
    run, x, given = freely(model), images(*size), []
    model.get_submodule(first).register_forward_hook(lambda m, args, out: given.append(out))
    height, width = (n // 4 for n in size)
    run(x)
    for row, column in ((0, 0), (height - 1, 1), (1, width - 1)):
        if HOSTS[host][3].endswith("conv_last"):  # there a pixel changes the patches around it
            change = partial(changed, row=row, column=column)
            handle = model.get_submodule(HOSTS[host][3]).register_forward_hook(change)
            run(x)
            handle.remove()
        else:
            other = x.clone()
            other[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += torch.randn(3, 4, 4)
            run(other)
        before, after = (out[0] if isinstance(out, tuple) else out for out in (given[0], given[-1]))
        far = (after - before).abs().amax(dim=(0, 2)) > 1e-9
        sees = torch.zeros(height, width, dtype=torch.bool)
        sees[row], sees[:, column] = True, True
        assert torch.equal(far[-height * width :].view(height, width), sees)
        assert far[: -height * width].all()


def changed(module, args, output, row, column):
    output = output.clone()
    output[:, :, row, column] += torch.randn(output.shape[1])
    return output


@every_host
def test_the_mixer_inherits_heads_and_dropout(host):
    if host.startswith("torchvision"):
        model = torchvisions(attention_dropout=0.25)
    else:
        model = JoinedViT(dropout=0.25)
    wanted = model.eval()(images(*OWN).float())
    backbones.replace(model, "dense", num_heads=2)
    for part in attentions(model, host).values():
        assert part.num_heads == 2 and part.attn_drop == 0.25
        assert part.proj_drop.p == (0 if host.startswith("torchvision") else 0.25)
    assert type(model(images(*OWN).float())) is type(wanted)


@every_host
@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_find_their_own_grid(host, how):
    model, x = backbones.replace(made(host), "criss_cross").model, images(*OWN)
    backbones.insert(model, GATES[0], HOSTS[host][1], init_gain=0.5)
    wanted = answer(model, x)
    twin = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    freely(model)(images(*WIDE))
    assert torch.equal(answer(twin, x), wanted)


def around_forward(layer, x):
    """As transformers checkpoint from version 5 on: without the hooks of the layer."""
    return checkpoint(layer.forward, layer_in(layer, x), use_reentrant=False)


def layer_in(layer, x):
    for hook in layer._forward_pre_hooks.values():
        hook(layer, (x,))
    return x


@pytest.mark.parametrize("run", [lambda layer, x: checkpoint(layer, x, use_reentrant=False), around_forward])
def test_checkpoints_of_transposed_sizes(run):
    model, many = made("Hugging Face, tensors"), [images(*size) for size in (WIDE, TALL)]
    backbones.replace(model, "criss_cross")

    def slopes():
        loss = sum(freely(model)(x).square().sum() for x in many)
        return torch.autograd.grad(loss, list(model.encoder.parameters()))

    wanted = slopes()
    model.encoder.register_forward_pre_hook(lambda m, args: (args[0], run))
    for got, one in zip(slopes(), wanted):
        close(got, one)


@pytest.mark.parametrize("host", ["torchvision", "Hugging Face"])
def test_the_whole_model_is_exported(host):
    model = made(host)
    backbones.insert(backbones.replace(model, "criss_cross").model, GATES[0], HOSTS[host][1], init_gain=0.5)
    x = images(*OWN)
    exported = torch.export.export(model, (x,)).module()
    close(answer(exported, x), answer(model, x))


# One size of torchvision's


def test_any_size_is_the_same_model_at_its_own_size():
    for stem in (None, STEM):
        model, x = alive(torchvisions(conv_stem_configs=stem)).eval(), torch.randn(2, 3, *OWN)
        wanted, state = model(x), copy.deepcopy(model.state_dict())
        with pytest.raises(AssertionError, match="Wrong image height"):
            model(torch.randn(2, 3, *WIDE))
        assert backbones.any_size(model) is model and torch.equal(model(x), wanted)
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
        assert model(torch.randn(2, 3, *WIDE)).shape == (2, 7)
        assert torch.equal(pickle.loads(pickle.dumps(backbones.any_size(model)))(x), wanted)
        again = torchvisions(conv_stem_configs=stem)
        again.load_state_dict(model.state_dict())  # strictly, into what torchvision makes


def test_positions_of_any_size_lie_where_the_patches_do():
    """A table that tells rows apart, and not columns, does so at another size."""
    model = torchvisions().eval()
    with torch.no_grad():
        model.encoder.pos_embedding[:, 1:] = torch.arange(7.0).repeat_interleave(7)[None, :, None]
        nn.init.zeros_(model.conv_proj.weight), nn.init.zeros_(model.conv_proj.bias)
    given = []
    model.encoder.dropout.register_forward_hook(lambda m, args, out: given.append(out[0, 1:, 0]))
    backbones.any_size(model)(torch.randn(1, 3, *WIDE))
    rows = given[0].view(3, 5)
    torch.testing.assert_close(rows, rows[:, :1].expand(3, 5))
    assert rows[0, 0] < rows[1, 0] < rows[2, 0]


def test_any_size_is_for_torchvisions_vit():
    with pytest.raises(ValueError, match="model=JoinedViT: must be a VisionTransformer of torchvision"):
        backbones.any_size(JoinedViT())


# The grid is told, found or refused


def by_rows_of_four(x):
    return x.shape[2] // 4, x.shape[3] // 4


@every_host
@pytest.mark.parametrize("by_name", [True, False])
def test_the_grid_may_be_told(host, by_name):
    told, met = HOSTS[host][3] if by_name else by_rows_of_four, []
    model, x = made(host), images(*OWN)
    wanted = answer(model, x)
    backbones.replace(model, "dense", grid=told)
    backbones.insert(model, MIXERS[0], HOSTS[host][1], grid=told)
    close(answer(model, x), wanted)
    hooks = [
        part.register_forward_hook(lambda m, args, out: met.append(args[1]))
        for part in attentions(model, host).values()
    ]
    freely(model)(images(*TALL))
    assert met == [Grid(5, 3)] * 2 and [hook.remove() for hook in hooks]
    with pytest.raises(ValueError, match="grid='encoder': this model's grids come from .* already"):
        backbones.insert(model, GATES[0], HOSTS[host][1], grid="encoder")
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(freely(twin)(x), freely(model)(x))


@pytest.mark.parametrize("add", [backbones.insert, backbones.replace])
def test_a_grid_that_is_none_is_refused(add):
    for told in ("encoder", "embeddings.patch_embeddings", "nothing"):
        with pytest.raises(ValueError, match=f"grid='{told}': must be .*: embeddings.patch_embeddings.projection$"):
            add(JoinedViT(), MIXERS[0], "encoder.layer.*", grid=told)
    for told, size in ((14, 14), (3, 7)):
        with pytest.raises(ValueError, match=f"gives {told}×{size} positions, but there are 50 tokens .* makes 49$"):
            add(JoinedViT(), MIXERS[0], "encoder.layer.*", grid=lambda x: (told, size))  # noqa: B023
    with pytest.raises(ValueError, match="gives 14×14 positions, but there are 50 tokens at encoder.layer.0[a-z.]*$"):
        add(Shuffled(torch.arange(49, -1, -1)), MIXERS[0], "encoder.layer.*", grid=lambda x: (14, 14))


class Shuffled(JoinedViT):
    """As autoencoders do that see a part of the patches."""

    def __init__(self, order):
        super().__init__()
        self.register_buffer("order", order)
        self.embeddings.register_forward_hook(lambda m, args, out: out[:, self.order])


ORDERS = {
    "columns": [0, *(1 + torch.arange(49).view(7, 7).T.flatten()).tolist()],
    "backwards": [*range(49, 0, -1), 0],
    "prefix behind": [*range(1, 50), 0],
}


@pytest.mark.parametrize("add", [backbones.insert, backbones.replace])
@pytest.mark.parametrize("order", ORDERS)
def test_tokens_in_another_order_are_refused(order, add):
    model = Shuffled(torch.tensor(ORDERS[order]))
    with pytest.raises(ValueError, match="gives tokens, and no part of Shuffled is seen to make them of a map"):
        add(model, MIXERS[0], "encoder.layer.*")
    with pytest.raises(ValueError, match="grid='embeddings.*': its map of 7×7 positions does not become the last"):
        add(model, MIXERS[0], "encoder.layer.*", grid="embeddings.patch_embeddings.projection")


def test_models_without_numbers_are_told_their_grid():
    model = torchvisions().to("meta")
    with pytest.raises(ValueError, match="no part of VisionTransformer is seen to make them"):
        backbones.replace(model, "dense")
    report = backbones.replace(model, "dense", grid="conv_proj")
    assert len(report.copied) == 8 and {p.device.type for p in model.parameters()} == {"meta"}


# Attention that a mixer can't stand for


class Attends(nn.Module):
    """A ViT of one attention, which is run by ``run(attention, tokens)``."""

    def __init__(self, attention, run):
        super().__init__()
        self.patches, self.attention, self.run = nn.Conv2d(3, 48, 4, 4), attention, run

    def forward(self, x):
        return self.run(self.attention, self.patches(x).flatten(2).transpose(1, 2)).mean((1, 2))


def of_torch(**args):
    return nn.MultiheadAttention(48, 3, **{"batch_first": True, **args})


class Cosines(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 1, nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (nn.functional.normalize(part, dim=-1) for part in (q, k))
        return self.proj((q @ k.transpose(1, 2)).softmax(dim=-1) @ v)


MASK = torch.zeros(49, 49)
REFUSED = {
    "other keys": (of_torch, lambda attn, x: attn(x, x + 1, x)[0], "is called with key, and a mixer takes one"),
    "mask": (of_torch, lambda attn, x: attn(x, x, x, attn_mask=MASK)[0], "is called with attn_mask"),
    "tokens first": (lambda: of_torch(batch_first=False), lambda attn, x: attn(x, x, x)[0], "batch_first=False"),
    "not called": (of_torch, lambda attn, x: x + attn.in_proj_bias[:48], "is called 0 times"),
    "twice": (of_torch, lambda attn, x: attn(*[attn(x, x, x)[0]] * 3)[0], "is called 2 times"),
    "windows": (
        of_torch,
        lambda attn, x: attn(*[x.reshape(-1, 7, 48)] * 3)[0],
        r"is called with \(7, 7, 48\), not with the tokens",
    ),
    "cosines": (Cosines, lambda attn, x: attn(x), "gives something else than softmax"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_attention_of_another_kind_is_refused(kind):
    make, run, why = REFUSED[kind]
    model = Attends(make(), run)
    with pytest.raises(ValueError, match=f"at='attention': .*{why}"):
        backbones.replace(model, "dense", input_size=(3, 28, 28))
    assert not isinstance(model.attention, Mixer)


class Sized(nn.Module):
    """Attention that is told the grid, as in pyramids."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.num_heads, self.qkv, self.proj, self.scale = 3, nn.Linear(48, 144), nn.Linear(48, 48), scale

    def forward(self, x, height, width):
        q, k, v = (part.unflatten(2, (3, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale / 4)
        return self.proj(out.transpose(1, 2).flatten(2))


def test_attention_of_ones_own_that_is_told_the_grid():
    model, x = Attends(Sized(), lambda attn, x: attn(x, 7, 7)).double(), images(*OWN)
    wanted = model(x)
    report = backbones.replace(model, "dense", input_size=(3, *OWN))
    assert len(report.copied) == 4 and not report.new and not report.unused
    close(model(x), wanted)
    other = Attends(Sized(scale=1.1), lambda attn, x: attn(x, 7, 7))
    with pytest.raises(ValueError, match="gives something else than softmax"):
        backbones.replace(other, "dense", input_size=(3, *OWN))


def test_encoders_of_torch_are_refused_by_name():
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
    model = Attends(nn.TransformerEncoder(layer, 2), lambda encoder, x: encoder(x))
    with pytest.raises(ValueError, match="at='attention.layers.0.self_attn': is called by torch's TransformerEncoder"):
        backbones.replace(model, "dense", input_size=(3, 28, 28))
    x = torch.randn(2, 3, 20, 12)
    wanted = model.eval()(x)
    backbones.insert(model, "criss_cross", "attention.layers.*", input_size=(3, 28, 28))
    torch.testing.assert_close(model(x), wanted)  # without hooks torch takes another route


def test_masks_that_come_later_are_refused():
    model, x = made("Hugging Face"), images(*OWN)
    backbones.replace(model, "dense")
    for layer in model.encoder.layer:
        layer(torch.randn(2, 50, 48).double() + 0 * answer(model, x).sum(), None, False)
        with pytest.raises(ValueError, match="attention_mask, attn_mask and is_causal: vision_attn.blocks.dense takes"):
            layer(torch.randn(2, 50, 48).double(), torch.ones(50, 50))


# Hugging Face's own


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    args = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=4)
    args |= dict(mlp_ratio=2) if name == "Dinov2" else dict(intermediate_size=96)
    config = getattr(transformers, f"{name}Config")(**args)
    model = alive(getattr(transformers, f"{name}ForImageClassification")(config)).double().eval()
    any_size = {} if name == "Dinov2" else dict(interpolate_pos_encoding=True)
    many = [images(*size) for size in (OWN, WIDE, TALL)]
    wanted = [model(x, **any_size).logits for x in many]
    blocks = [key for key, part in model.named_modules() if type(part).__name__ == f"{name}Layer"]
    with_block, crossed = (copy.deepcopy(model) for _ in range(2))
    backbones.replace(model, "dense")
    backbones.insert(with_block, "criss_cross", blocks)
    backbones.replace(crossed, "criss_cross").model.gradient_checkpointing_enable()
    for x, one in zip(many, wanted):
        close(model(x, **any_size).logits, one)
        assert torch.equal(with_block(x, **any_size).logits, one)
        assert crossed(x, **any_size).logits.isfinite().all()
