"""torch.fx takes every layer as one step, so feature extraction works on models with blocks as on stock ones."""

import pytest
import timm
import torch
import torchvision
from conftest import GATES, MIXERS, alive, every_block, often
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import backbones
from vision_attn import OnMap, create_block, list_blocks


@pytest.mark.parametrize("block", often(list_blocks()))
def test_features_of_a_resnet(block):
    """torchvision's own function, told nothing of our layers, on its own and on timm's ResNet."""
    model = alive(backbones.insert(torchvision.models.resnet18(num_classes=7), block, "layer3")).eval()
    extractor = create_feature_extractor(model, {f"layer3.1.attn_{block}": "block", "fc": "logits"})
    for size in ((67, 43), (43, 67)):
        x, seen = torch.randn(2, 3, *size), {}
        layer = model.get_submodule(f"layer3.1.attn_{block}")
        handle = layer.register_forward_hook(lambda layer, args, out: seen.update(block=out))  # noqa: B023
        logits = model(x)
        handle.remove()
        found = extractor(x)
        assert torch.equal(found["logits"], logits)
        assert torch.equal(found["block"], seen["block"])


@pytest.mark.parametrize("block", often(list_blocks()))
def test_features_of_a_resnet_with_blocks_in_its_own_slots(block):
    model = alive(timm.create_model(f"resnet18_{block}", num_classes=7)).eval()
    names = get_graph_node_names(model)[1]
    layers = [name for name, part in model.named_modules() if isinstance(part, OnMap)]
    assert layers and set(layers) <= set(names)
    x = torch.randn(2, 3, 67, 43)
    assert torch.equal(create_feature_extractor(model, {"fc": "y"})(x)["y"], model(x))


@every_block
def test_features_of_a_vit(block):
    """The grid is part of the graph, whatever ran before."""
    model = alive(timm.create_model(f"vit_tiny_patch4_32_{block}", depth=2, img_size=(12, 20), num_classes=7)).eval()
    other = timm.create_model(f"vit_tiny_patch4_32_{block}", depth=2, img_size=(20, 12), num_classes=7).eval()
    extractor = create_feature_extractor(model, {"blocks.1": "last", "head": "logits"})
    other(torch.randn(2, 3, 20, 12))
    x = torch.randn(2, 3, 12, 20)
    wanted = model(x)
    found = extractor(x)
    assert torch.equal(found["logits"], wanted)
    torch.testing.assert_close(model.forward_head(model.norm(found["last"])), wanted)
    if block in MIXERS:
        with pytest.raises(ValueError, match="attn_mask and is_causal"):
            extractor(x, attn_mask=torch.ones(16, 16))
        with pytest.raises(ValueError, match="attn_mask and is_causal"):
            extractor(x, is_causal=True)
    assert torch.equal(model(x), wanted)  # the model goes on after it was traced


def test_features_of_a_vit_train():
    model = alive(backbones.insert(timm.create_model("vit_tiny_patch4_32", depth=2, num_classes=7), GATES[0]))
    x = torch.randn(2, 3, 32, 32)
    model.train()(x).square().sum().backward()
    wanted = [p.grad for p in model.parameters()]
    extractor = create_feature_extractor(model, {"head": "y"}).train()
    names = dict(extractor.named_parameters())
    model.zero_grad()
    extractor(x)["y"].square().sum().backward()
    for (name, _), slope in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(names[name].grad, slope)


class Network(nn.Module):
    """One of a user's own, with blocks as they are."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 32, 3), create_block(GATES[0], 32)
        self.mixer = create_block(MIXERS[0], 32)

    def forward(self, x):
        x = self.gate(self.conv(x))
        return self.mixer(x.flatten(2).mT, (5, 9))


def test_blocks_in_a_network_of_ones_own():
    network, x = Network().eval(), torch.randn(2, 3, 7, 11)
    traced = fx.symbolic_trace(network)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["conv", "gate", "mixer"]
    assert torch.equal(traced(x), network(x))
    with pytest.raises(ValueError, match="there are only 40 tokens"):
        traced(torch.randn(2, 3, 7, 10))


class Leaves(fx.Tracer):
    def is_leaf_module(self, module, name):
        return name == "patch_embed" or super().is_leaf_module(module, name)


def test_a_graph_that_hides_the_patch_embedding_is_refused():
    model = timm.create_model(f"vit_tiny_patch4_32_{MIXERS[0]}", depth=1, num_classes=7).eval()
    model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="grid: the patch embedding has not run"):
        Leaves().trace(model)
