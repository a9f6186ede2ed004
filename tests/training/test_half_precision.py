"""float16 with a scale for losses: runs go on exactly, steps that overflow are left out, wrong combinations refused."""

import pytest
import torch
from scripts import equal, load, options, refused, standing
from torch.amp import GradScaler

import backbones
from training import checkpoint, setup
from training.classification import Classification
from training.config import Config, ModelConfig
from training.distributed import Processes
from training.engine import NotFinite
from training.run import Training
from training.signals import Stop

FAST = options(model__name="cifar_resnet20", data__img_size=8, batch_size=96, threads=1, data__train_images=96)
FAST += options(fp16=True, optim__accumulate=2, optim__clip_grad=1.0, optim__ema=0.9)


def test_a_run_goes_on_with_its_scale(tmp_path, monkeypatch):
    def scaler(device, enabled):  # which grows in one run as in thousands of steps
        return GradScaler(device, init_scale=2.0**11, growth_interval=2, enabled=enabled)

    monkeypatch.setattr(setup, "GradScaler", scaler)
    assert load("train_imagenet").main([*FAST, *options(epochs=3, output=tmp_path, keep=9)]) == 0
    whole, saved = standing(tmp_path), checkpoint.load(tmp_path / "last.pt")["scaler"]
    assert saved["scale"] == 2.0**12 and saved["_growth_tracker"] == 1
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}.pt"
        assert load("train_imagenet").main(["--resume", str(path), "--overwrite"]) == 0
        assert equal(standing(tmp_path), whole) and checkpoint.load(tmp_path / "last.pt")["scaler"] == saved
    assert all(value.dtype != torch.float16 for value in whole["state_dict"].values())


@pytest.fixture
def training():
    config = Config(model=ModelConfig("cifar_resnet20"), fp16=True, batch_size=96)
    config.data.img_size, config.data.train_images = 8, 96 * 3
    run = Training(Classification, config, Processes(torch.device("cpu")), Stop(), backbones)
    run.stop.restore()
    return run


def test_a_step_that_overflows_is_left_out(training):
    training.state.scaler = GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in training.state.model.named_parameters()}
    steps = training.steps()
    next(steps)
    assert training.state.scaler.get_scale() == 2.0**39 and training.state.step == 1
    assert all(torch.equal(value, before[name]) for name, value in training.state.model.named_parameters())
    training.state.scaler = GradScaler("cpu", init_scale=2.0**10)
    next(steps)
    assert training.state.scaler.get_scale() == 2.0**10
    assert not torch.equal(training.state.model.fc.weight, before["fc.weight"])


def test_a_gradient_that_no_scale_helps_ends_the_run(training):
    training.state.scaler = GradScaler("cpu", init_scale=0.5)
    training.state.model.fc.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NotFinite, match="the gradient norm is (nan|inf) at step 1"):
        next(training.steps())


def test_gradients_are_those_of_the_loss_unscaled(training):
    training.state.scaler = GradScaler("cpu", init_scale=2.0**7)
    training.autocast = torch.autocast("cpu", enabled=False)
    before = training.state.model.fc.bias.detach().clone()
    next(training.steps())
    moved = training.state.model.fc.bias.detach() - before
    gradient = training.state.model.fc.bias.grad
    lr = training.config.optim.lr  # no warm-up: the first step is of the peak, with Nesterov momentum
    torch.testing.assert_close(moved, -lr * 1.9 * gradient)
    assert gradient.norm() < 1


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--fp16", "--bf16"], "fp16 must be false beside bf16, got True"),
        (["--fp16", "--parallel", "fsdp"], "parallel must be ddp with fp16, got 'fsdp'"),
    ],
)
def test_what_float16_does_not_go_with(argv, named, capsys):
    assert named in refused("train_imagenet", argv, capsys)
