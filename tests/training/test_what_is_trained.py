"""optim.only, optim.new_lr_scale, optim.layer_decay and no_weight_decay: which parameters move, and how fast."""

import pytest
import timm
import torch
from scripts import equal, load, options, refused, standing
from timm.optim import param_groups_layer_decay

import backbones
from training import checkpoint
from training.classification import Classification
from training.config import Config, ModelConfig, OptimConfig, RunConfig
from training.distributed import Processes
from training.run import Training
from training.setup import create_state
from training.signals import Stop

FAST = options(model__name="cifar_resnet20", data__img_size=8, batch_size=96, threads=1, data__train_images=192)
GATE = options(model__insert="light_non_local", model__at="layer3")  # a block with a BatchNorm in it


def state_of(model, **optim):
    config = RunConfig(optim=OptimConfig(name="adamw", lr=0.01, weight_decay=0.3, warmup_epochs=1, **optim), epochs=3)
    return create_state(config, model, None, 4, Processes(torch.device("cpu")), backbones)


def rates(state):
    """Each parameter's learning rate as a share of the one logged, and its weight decay."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    groups = state.optimizer.param_groups
    return {names[p]: (group["lr"] / state.lr, group["weight_decay"]) for group in groups for p in group["params"]}


def test_only_what_is_named_moves_and_frozen_statistics_stand_still(tmp_path):
    assert load("train_imagenet").main([*FAST, *options(epochs=1, output=tmp_path / "plain")]) == 0
    plain = checkpoint.load(tmp_path / "plain" / "best.pt")
    argv = [*FAST, *GATE, *options(optim__only="*attn_*", epochs=2, output=tmp_path / "only", keep=9)]
    argv += options(
        model__pretrained=True, model__args='{"pretrained_cfg_overlay": {"file": "FILE", "num_classes": 10}}'
    )
    argv[-1] = argv[-1].replace("FILE", str(tmp_path / "plain" / "best.safetensors"))
    assert load("train_imagenet").main(argv) == 0
    saved = checkpoint.load(tmp_path / "only" / "last.pt")
    new = {name for name in saved["state_dict"] if "attn_" in name}
    assert new and {name for name in saved["state_dict"] if name not in plain["state_dict"]} == new
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in plain["state_dict"].items())
    norms = [name for name in new if name.endswith("running_var")]
    assert norms and all(not torch.equal(saved["state_dict"][name], torch.ones(16)) for name in norms)

    whole = standing(tmp_path / "only")
    first = next((tmp_path / "only").glob("step-*2.pt"))
    assert load("train_imagenet").main(["--resume", str(first), "--overwrite"]) == 0
    assert equal(standing(tmp_path / "only"), whole)


def test_new_parameters_learn_faster():
    model = timm.create_model("cifar_resnet20_cbam", attn_at="layer3.*")
    found = rates(state_of(model, new_lr_scale=7.0))
    assert {n: rate for n, (rate, _) in found.items()} == pytest.approx({n: 7 if ".se." in n else 1 for n in found})
    stock = rates(state_of(timm.create_model("cifar_resnet20")))
    assert {name: decay for name, (_, decay) in found.items() if name in stock} == {n: d for n, (_, d) in stock.items()}


def test_layers_learn_as_slowly_as_timm_says_and_new_parameters_by_a_factor_more():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2)
    backbones.insert(model, "global_memory", at="blocks.1")
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {
        names[p]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, 0.3, model.no_weight_decay(), layer_decay=0.5)
        for p in group["params"]
    }
    assert len({rate for rate, _ in expected.values()}) == 5  # embedding, three blocks, head
    found = rates(state_of(model, layer_decay=0.5, new_lr_scale=3.0))
    new = {name for name in found if "attn_global_memory" in name}
    assert new and found.keys() == expected.keys()
    for name, (rate, decay) in expected.items():
        assert found[name] == pytest.approx((rate * (3 if name in new else 1), decay))
    assert found["blocks.1.attn_global_memory.block.memory"] == pytest.approx((0.25 * 3, 0.0))


def test_the_rate_logged_is_the_schedule_s_whatever_the_groups(tmp_path):
    logs = []
    for more in ({}, {"optim__layer_decay": 0.6}):
        argv = [*FAST, *options(epochs=2, output=tmp_path / str(len(logs)), **more)]
        assert load("train_imagenet").main(argv) == 0
        history = checkpoint.load(tmp_path / str(len(logs)) / "last.pt")["history"]
        logs.append([row["lr"] for row in history])
    assert logs[0] == pytest.approx(logs[1])


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(optim__only="*atn_*"), "optim.only *atn_*: is no parameter's name; there are "),
        (dict(optim__new_lr_scale=3), "optim.new_lr_scale is 3.0, but no block brought parameters to the model"),
        (dict(optim__new_lr_scale=0), "optim.new_lr_scale must be positive, got 0.0"),
        (dict(optim__layer_decay=1.5), "optim.layer_decay must be in (0, 1], got 1.5"),
    ],
)
def test_what_cannot_be_trained_is_said(given, named, tmp_path, capsys):
    assert named in refused("train_imagenet", [*FAST, *options(**given, output=tmp_path / "run")], capsys)


def test_a_run_goes_on_with_the_same_groups_only(tmp_path, capsys):
    assert load("train_imagenet").main([*FAST, *options(epochs=1, output=tmp_path)]) == 0
    argv = options(resume=tmp_path / "last.pt", epochs=2)
    line = refused("train_imagenet", [*argv, *options(optim__only="fc.*")], capsys)
    assert f"optim.only must be None, as in {tmp_path}/last.pt, got 'fc.*'" in line


def test_frozen_norms_are_in_evaluation_mode_while_the_rest_trains():
    config = Config(model=ModelConfig("cifar_resnet20"), optim=OptimConfig(only=["fc.*", "layer3.2.bn2.*"]))
    config.data.img_size, config.batch_size, config.data.train_images = 8, 96, 96
    training = Training(Classification, config, Processes(torch.device("cpu")), Stop(), backbones)
    training.stop.restore()
    next(iter(training.steps()))
    modes = {n: m.training for n, m in training.state.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert [name for name, mode in modes.items() if mode] == ["layer3.2.bn2"]
