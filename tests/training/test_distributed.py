"""Several processes: the same curve as one, checkpoints that any number goes on from, and an end without a hang."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from pictures import make_folder
from scripts import CLASSIFY, PIXELS, ROOT, SHARED, compare, equal, finish, gap, load, options, rows, standing, start

from training import checkpoint
from training.log import read_rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Where a run of one process has ended."""
    output = tmp_path_factory.mktemp("alone")
    assert load("train_imagenet").main([*SHARED, "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_like_one_and_any_number_goes_on(parallel, alone, tmp_path):
    argv = [*SHARED, *options(output=tmp_path, parallel=parallel, resume="auto")]
    process = start("train_imagenet", argv, processes=2)
    lines = [process.stdout.readline() for _ in range(2)]
    assert f"cpu × 2 ({parallel})" in lines[0] and lines[1].startswith("epoch 1/2"), process.stderr.read()
    os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
    code, out, err = finish(process)
    stopped = checkpoint.load(tmp_path / "last.pt")
    assert "stopped by SIGTERM at step" in out and 14 <= stopped["step"] < 28, err
    assert stopped["versions"]["processes"] == 2
    assert load("train_imagenet").main(argv) == 0  # in one process
    compare(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_s_checkpoint_goes_on_in_two(parallel, alone, tmp_path):
    for path in alone.glob("step-00000014.pt*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    argv = [*SHARED, *options(output=tmp_path, parallel=parallel, resume="auto")]
    code, out, err = finish(start("train_imagenet", argv, processes=2))
    assert code == 0, err
    assert "step-00000014.pt: epoch 2, step 14" in out and out.count("epoch 2/2") == 1
    assert "note: processes is 2 now and was 1" in out
    compare(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_on_exactly(parallel, tmp_path):
    """With BatchNorm, mixup, dropout and all: the same bits as two processes that were not stopped."""
    argv = [*CLASSIFY, *options(parallel=parallel, data__workers=1)]
    code, _, err = finish(start("train_imagenet", [*argv, *options(output=tmp_path / "whole")], processes=2))
    assert code == 0, err
    process = start("train_imagenet", [*argv, *options(output=tmp_path / "stopped")], processes=2)
    assert all(process.stdout.readline() for _ in range(2)), process.stderr.read()
    os.kill(process.pid, signal.SIGTERM)
    finish(process)
    assert 14 <= checkpoint.load(tmp_path / "stopped" / "last.pt")["step"] < 28
    argv += options(output=tmp_path / "stopped", resume="auto")
    code, _, err = finish(start("train_imagenet", argv, processes=2))
    assert code == 0, err
    assert equal(standing(tmp_path / "whole"), standing(tmp_path / "stopped"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")


@pytest.mark.slow
def test_unreadable_images_of_all_processes_are_counted(tmp_path):
    make_folder(tmp_path / "data", images=16)
    for name in ("cat/3.png", "dog/9.png"):
        (tmp_path / "data" / "train" / name).write_text("nothing")
    argv = options(model__name="cifar_resnet20", data__img_size=8, batch_size=16, threads=1, epochs=1)
    argv += options(data__name="folder", data__dir=tmp_path / "data")
    code, _, err = finish(start("train_imagenet", [*argv, *options(output=tmp_path / "a", max_bad=0.1)], processes=2))
    assert code == 0, err
    faults = [row["image"] for row in read_rows(tmp_path / "a" / "bad_images.csv")]
    assert {fault.split(": ")[0][-9:] for fault in faults} == {"cat/3.png", "dog/9.png"}
    code, _, err = finish(start("train_imagenet", [*argv, *options(output=tmp_path / "b")], processes=2))
    assert code != 0 and "of the epoch's 32 training images can't be read" in err
    (tmp_path / "data" / "val" / "dog" / "7.png").write_text("nothing")
    code, _, err = finish(start("train_imagenet", [*argv, *options(output=tmp_path / "c", max_bad=0.1)], processes=2))
    assert code != 0 and "1 of the images to evaluate can't be read, the first is" in err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation_in_two_processes(parallel, tmp_path):
    argv = [*SHARED, *options(epochs=1, optim__accumulate=2)]
    assert load("train_imagenet").main([*argv, "--output", str(tmp_path / "one")]) == 0
    code, _, err = finish(start("train_imagenet", [*argv, *options(output=tmp_path / "two", parallel=parallel)], 2))
    assert code == 0, err
    compare(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_bases_of_expectation_maximization_are_averaged(parallel, tmp_path):
    """After the first step they are those of one process; from then on BatchNorm, which is not shared here, differs."""
    name = "vit_tiny_patch4_32_expectation_maximization"
    argv = [*SHARED, *options(model__name=name, epochs=1, save_every=1, keep=99)]
    argv += ["--model.args.attn_kwargs", '{"bases": 5}']
    assert load("train_imagenet").main([*argv, "--output", str(tmp_path / "one")]) == 0
    code, _, err = finish(start("train_imagenet", [*argv, *options(output=tmp_path / "two", parallel=parallel)], 2))
    assert code == 0, err
    weights = {
        (name, step): checkpoint.load(tmp_path / name / f"step-{step:08d}.pt")["state_dict"]
        for name in ("one", "two")
        for step in (1, 14)
    }
    bases = [name for name in weights["one", 1] if name.endswith("bases.value")]
    assert len(bases) == 1  # of two blocks the last has no gate: nobody reads patch tokens behind it
    for name in bases:
        moved = (weights["one", 14][name] - weights["one", 1][name]).abs().max()
        assert (weights["one", 1][name] - weights["two", 1][name]).abs().max() < 1e-5 < 100 * moved


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_pixels_in_two_processes(parallel, tmp_path):
    argv = [*PIXELS, *options(model__args__drop_rate=0, epochs=1, pictures__every=1)]
    assert load("train_pixels").main([*argv, "--output", str(tmp_path / "one")]) == 0
    code, _, err = finish(start("train_pixels", [*argv, *options(output=tmp_path / "two", parallel=parallel)], 2))
    assert code == 0, err
    compare(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "samples-0001.png").exists()


def test_the_gradient_of_a_step_is_that_of_one_process(tmp_path, monkeypatch):
    """In float64, through DDP over gloo: equal to rounding, and the images to evaluate are counted once each."""
    program = tmp_path / "program.py"
    program.write_text(GRADIENTS)
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path)])
    runpy.run_path(str(program))
    code, _, err = finish(start(program, [str(tmp_path)], processes=2))
    assert code == 0, err
    one, two = (torch.load(tmp_path / f"{size}.pt", weights_only=True) for size in (1, 2))
    assert len(one["gradients"]) == len(two["gradients"]) == 2
    assert gap(dict(enumerate(one["gradients"])), dict(enumerate(two["gradients"]))) < 1e-14
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-12)
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-12) and one["metrics"]["images"] == 1


GRADIENTS = """
import sys, torch
from torch import nn
from pictures import MEAN, STD, Pictures
from training import distributed
from training.engine import Objective, State, mean_over, steps
from training.loader import Batches, Samples
from training.transforms import eval_transform
from timm.scheduler import create_scheduler_v2

torch.set_num_threads(1)
processes = distributed.start(torch.device("cpu"))
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.GELU(), nn.Flatten(), nn.Linear(7 * 36, 23)).double()
objective = Objective(model, lambda model, x, y: nn.functional.cross_entropy(model(x.double()), y))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=1, step_on_epochs=False, updates_per_epoch=2)
state = State(model, distributed.average_gradients(objective, processes), optimizer, scheduler)
gradients = []
optimizer.register_step_pre_hook(lambda *_: gradients.append(model[0].weight.grad.clone()))
samples = Samples(Pictures(), eval_transform((8, 8)))
share = processes.size * 2
batches = Batches(samples, 8 // share, MEAN, STD, shuffle=True, multiple=2, processes=processes)
losses = [step.loss for step in steps(state, batches, 0, accumulate=2, clip_grad=1.0, processes=processes)]
evaluated = Batches(samples, 4, MEAN, STD, processes=processes)
measure = lambda model, x, y: {"loss": objective(x, y), "images": torch.ones(())}
metrics = mean_over(model, evaluated, measure, processes=processes)
if processes.main:
    content = {"gradients": gradients, "losses": losses, "metrics": metrics}
    torch.save(content, f"{sys.argv[1]}/{processes.size}.pt")
distributed.stop()
"""


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_traceback(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(FAULTY)
    began = time.monotonic()
    code, _, err = finish(start(program, [*SHARED, "--output", str(tmp_path / "run")], processes=2))
    assert code != 0 and time.monotonic() - began < 120
    assert "RuntimeError: broken on purpose in process 1" in err and "in broken_loss" in err


FAULTY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_imagenet
from training.classification import Classification

loss, count = Classification.loss, iter(range(99))

def broken_loss(self, *batch):
    if next(count) == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("broken on purpose in process 1")
    return loss(self, *batch)

Classification.loss = broken_loss
sys.exit(train_imagenet.main())
"""


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job(tmp_path):
    process = start("train_imagenet", [*SHARED, *options(output=tmp_path, epochs=99)], processes=2)
    process.stdout.readline()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, _, err = finish(process, timeout=120)
    assert code != 0 and "SIGKILL" in err


@pytest.mark.slow
def test_wrong_shares_are_refused(tmp_path):
    argv = [*SHARED, *options(output=tmp_path / "run", batch_size=95)]
    code, _, err = finish(start("train_imagenet", argv, processes=2))
    assert code == 1 and "error: batch_size must be a multiple of 2 (2 processes × 1 passes), got 95" in err
    assert not (tmp_path / "run").exists()


def test_norms_of_several_processes_are_refused_on_a_cpu(tmp_path, capsys):
    argv = [*SHARED, *options(output=tmp_path / "run", device="cpu"), "--sync-bn"]
    assert load("train_imagenet").main(argv) == 2
    assert "error: sync_bn must be false on cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
