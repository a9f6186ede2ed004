"""The steps of an epoch, and evaluation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import MEAN, STD, Pictures, picture
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from training.classification import Classification
from training.config import Config, OptimConfig
from training.distributed import Processes
from training.engine import NotFinite, Objective, State, mean_over, steps
from training.loader import BadImages, Batches, Samples
from training.transforms import eval_transform


def tiny_state(optim=OptimConfig(lr=0.1, momentum=0.9, warmup_epochs=1), epochs=3, steps=5, num_classes=23):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(63, num_classes)
    ).double()
    optimizer = create_optimizer_v2(
        model, optim.name, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=optim.warmup_epochs,
        warmup_lr=optim.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    scheduler.step_update(0)
    objective = Objective(model, cross_entropy)
    return State(model, objective, optimizer, scheduler, ModelEmaV3(model, decay=0.7, use_warmup=True))


def cross_entropy(model, images, targets):
    return F.cross_entropy(model(images.double()), targets)


def loader(**kwargs):
    return Batches(Samples(Pictures(), eval_transform((16, 16))), 4, MEAN, STD, shuffle=True, **kwargs)


def train(state, batches, epoch=0, **kwargs):
    return [step.loss for step in steps(state, batches, epoch, **kwargs)]


def test_accumulation_equals_the_whole_batch():
    transform = eval_transform((16, 16))
    whole, split = tiny_state(steps=2), tiny_state(steps=2)
    samples = Samples(Pictures(), transform)
    losses = []
    for state, batch_size, passes in ((whole, 8, 1), (split, 2, 4)):
        batches = Batches(samples, batch_size, MEAN, STD, shuffle=True, multiple=passes)
        losses.append([train(state, batches, epoch, accumulate=passes, clip_grad=0.1) for epoch in range(2)])
    assert whole.step == split.step == 4
    assert np.allclose(*losses, rtol=1e-12)
    for a, b in zip(whole.model.state_dict().values(), split.model.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    moved = [not torch.equal(a, b) for a, b in zip(whole.model.parameters(), tiny_state().model.parameters())]
    assert all(moved)


def test_the_moving_average_is_the_recursion():
    state, history = tiny_state(), []
    average = {k: v.clone() for k, v in state.model.state_dict().items()}
    state.optimizer.register_step_post_hook(
        lambda *_: history.append({k: v.clone() for k, v in state.model.state_dict().items()})
    )
    train(state, loader())
    assert len(history) == 5
    for step, weights in enumerate(history, start=1):
        decay = state.ema.get_decay(step)
        average = {k: decay * average[k] + (1 - decay) * weights[k] for k in average}
    assert 0 < decay < 0.7
    for name, value in state.evaluated.state_dict().items():
        assert torch.allclose(value, average[name]) and not torch.equal(value, history[-1][name])


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    state, seen = tiny_state(), []
    state.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    for epoch in range(3):
        train(state, loader(), epoch)
    expected = [0.001 + 0.099 * step / 5 for step in range(5)]
    expected += [0.05 * (1 + math.cos(math.pi * step / 15)) for step in range(5, 15)]
    assert np.allclose(seen, expected) and state.lr == 0


def test_clipping_bounds_the_gradient():
    state, norms = tiny_state(), []
    state.optimizer.register_step_pre_hook(
        lambda *_: norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in state.model.parameters())))
    )
    train(state, loader(), clip_grad=0.01)
    assert np.allclose(norms, 0.01, rtol=1e-3)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_before_the_step(what):
    state = tiny_state()
    before = [p.clone() for p in state.model.parameters()]
    if what == "loss":
        state.objective.loss = lambda *batch: cross_entropy(*batch) * float("nan")
    else:
        state.model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match=f"the {what} is (nan|inf) at step 1, epoch 3"):
        train(state, loader(), 2)
    assert state.step == 0 and all(torch.equal(a, b) for a, b in zip(before, state.model.parameters()))


def test_forward_passes_draw_from_seed_step_pass_and_rank_alone():
    def draws(seed, workers=0, start=0, rank=0):
        state, drawn = tiny_state(), []

        def loss(*batch):
            drawn.append(torch.rand(()).item())
            return cross_entropy(*batch)

        state.objective.loss, state.step = loss, start
        processes = Processes(torch.device("cpu"), rank, 1)
        train(state, loader(multiple=2, workers=workers), start=start, seed=seed, accumulate=2, processes=processes)
        return drawn

    assert draws(0) == draws(0, workers=2) != draws(1) != draws(1, rank=1)
    assert draws(0, start=1) == draws(0)[2:]
    assert len(set(draws(0))) == 4


def test_an_epoch_taken_up_in_the_middle_ends_the_same():
    whole, parts = tiny_state(), tiny_state()
    losses = train(whole, loader())
    first = []
    for step in steps(parts, loader(), 0):
        first.append(step.loss)
        if parts.step == 3:
            break
    torch.rand(5)
    assert first + train(parts, loader(workers=2), start=3) == losses
    for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_step_says_whether_to_stop():
    state = tiny_state()
    asked = [step.stop for step in steps(state, loader(), 0, asked_to_stop=lambda: state.step >= 2)]
    assert asked == [False, False, True, True, True]


@pytest.mark.parametrize("num_classes", [2, 5, 23])
def test_evaluation_counts_every_image_and_caps_top5(num_classes):
    targets = torch.arange(23) % num_classes
    logits = torch.randn(23, num_classes, generator=torch.Generator().manual_seed(0))
    answers = iter(logits.split(4))

    class Model(nn.Module):
        def forward(self, images):
            return next(answers)

    class Labelled(Pictures):
        def __getitem__(self, index):
            return picture(), int(targets[index])

    batches = Batches(Samples(Labelled(), eval_transform((16, 16))), 4, MEAN, STD)
    metrics = mean_over(Model(), batches, Classification(Config(), batches.processes).measure)
    rank = (logits > logits.gather(1, targets[:, None])).sum(1)  # classes placed before the right one
    assert metrics["top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert num_classes > 5 or metrics["top5"] == 100


def test_evaluation_is_strict():
    class Torn(Pictures):
        def __getitem__(self, index):
            if index == 7:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

    def evaluate(dataset, value=1.0, **kwargs):
        batches = Batches(Samples(dataset, eval_transform((16, 16))), 4, MEAN, STD)
        model = nn.Flatten()
        return mean_over(model, batches, lambda *_: {"value": torch.tensor(value)}, **kwargs)

    assert evaluate(Pictures()) == {"value": 1.0}
    with pytest.raises(
        BadImages, match="1 of the images to evaluate can't be read, the first is picture 7: OSError: image file"
    ):
        evaluate(Torn())
    with pytest.raises(FloatingPointError, match="the value is nan on the images to evaluate"):
        evaluate(Pictures(), float("nan"))
    assert evaluate(Pictures(), asked_to_stop=lambda: True) is None
